// Evaluates the stream law on the current GPU; see law_check.cu.
#pragma once

#include <cuda_runtime.h>

#include "law/keepdrop.h"
#include "law/stream.h"

namespace everett {

enum class LawCheck : int { words = 0, keep = 1, uniform = 2, normal = 3, exponential = 4, gumbel = 5 };

// 32-bit values that one keystream block gives: fp32 patterns, or 0 and 1 for keep (the 15-bit form).
EV_FN constexpr int values_per_block(LawCheck what) {
  return what == LawCheck::keep ? 32 : what >= LawCheck::exponential ? 8 : 16;
}

// Blocks [first_block, first_block + blocks) into host memory `out`; returns when it is there. Throws std::runtime_error
// with CUDA's own words.
void law_check(Generator g, const Stream& t, double p, LawCheck what, u64 first_block, u32 blocks, u32* out,
               cudaStream_t stream);

// How many GPUs there are; throws where the driver cannot say.
int device_count();

}  // namespace everett
