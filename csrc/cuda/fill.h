// Fills on the GPU: contiguous memory with uint32 words, uniforms, normals, exponentials, Gumbels, Bernoulli decisions,
// integers or gamma variates.
#pragma once

#include <cuda_runtime.h>

#include "cuda/record.h"
#include "law/stream.h"
#include "types.h"

namespace everett {

struct FillCall {
  Fill kind;
  DType type;  // words: u32; integers: i64; gamma, log_gamma: f64; all others: f32, f64, bf16 or f16
  Generator generator;
  RecordSource record;
  u32 tag, s;
  const u64* p;  // the parameters of kinds that have one, 8 bytes each
  bool one_p;    // one of them for all elements
  void* out;        // at a multiple of the type's size
};

// Elements 0 ... n-1, with logical indices e0, e0+1, ..., on the current device. Throws std::invalid_argument for a type
// that the kind does not have, std::runtime_error with the kernel's name where the launch fails.
void launch_fill(const FillCall& call, u64 n, u64 e0, cudaStream_t stream);

// The part of it in gamma.cu.
void launch_gamma(const FillCall& call, u64 n, u64 e0, cudaStream_t stream);

}  // namespace everett
