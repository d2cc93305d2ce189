// The masked ops on the GPU: dropout, dropout_add and affine (alpha) dropout of contiguous or strided memory.
#pragma once

#include <cuda_runtime.h>

#include "cuda/record.h"
#include "law/keepdrop.h"
#include "law/stream.h"
#include "layout.h"
#include "types.h"

namespace everett {

struct MaskedCall {
  MaskedOp op;
  DType type;
  Generator generator;
  RecordSource record;
  u32 s;
  Threshold threshold;
  double scale, shift, dropped;  // rounded to fp32 for all types but fp64
  const void* in;
  const void* extra;  // dropout_add only
  void* out;
};

// Both launch on the current device and throw std::runtime_error with the kernel's name where that fails.

// Elements 0 ... n-1 of contiguous memory, with logical indices e0, e0+1, ...
void launch_masked(const MaskedCall& call, u64 n, u64 e0, cudaStream_t stream);

void launch_masked_strided(const MaskedCall& call, const Layout& layout, cudaStream_t stream);

}  // namespace everett
