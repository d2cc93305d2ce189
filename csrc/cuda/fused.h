// Dropout fused with bias, GELU and residual on the GPU, and the backwards of the GELU forms.
#pragma once

#include <cuda_runtime.h>

#include "cuda/record.h"
#include "law/keepdrop.h"
#include "law/stream.h"
#include "types.h"

namespace everett {

struct FusedCall {
  FusedOp op;
  DType type;  // fp32, bf16, fp16 or fp8
  Generator generator;
  RecordSource record;
  Threshold threshold;
  const void* in;
  const void* bias;   // `columns` elements, or null
  const void* extra;  // the residual or the incoming gradient; null for the GELU forms
  void* out;
  u64 columns;  // of a row; counts only where there is a bias, and is below 2^31 then
};

// n contiguous elements (whole rows) with logical indices e0, e0+1, ..., on the current device. Throws
// std::invalid_argument for a type or a row that is not served, std::runtime_error with the kernel's name where the launch
// fails.
void launch_fused(const FusedCall& call, u64 n, u64 e0, cudaStream_t stream);

}  // namespace everett
