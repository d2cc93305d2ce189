// Attention's keep mask on a tensor of weights on the GPU (law/attention.h), for attention that is not fused.
#pragma once

#include <cuda_runtime.h>

#include "cuda/record.h"
#include "law/attention.h"
#include "types.h"

namespace everett {

struct AttentionMaskCall {
  DType type;  // f32, f64, bf16 or f16
  Generator generator;
  RecordSource record;
  Threshold threshold;  // of the 15-bit form
  double scale;         // rounded to fp32 for all types but fp64
  const void* in;       // contiguous (heads, queries, keys)
  void* out;
  u64 heads, queries, keys;
  u32 bh0;  // global indices of the first weight
  u64 q0, k0;
};

// On the current device. Throws std::invalid_argument for another type, std::runtime_error with the kernel's name where the
// launch fails.
void launch_attention_mask(const AttentionMaskCall& call, cudaStream_t stream);

}  // namespace everett
