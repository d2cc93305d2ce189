// Direct words of a pool into values on the GPU: the law's formulas, with no key and no expansion.
#pragma once

#include <cuda_runtime.h>

#include "law/direct.h"
#include "types.h"

namespace everett {

// Where the words of an op lie: in a row at `words`, or, where `start` is given, in a ring of mask+1 words from position
// *start on, which a kernel before has reserved (lane.h).
struct WordSource {
  const u64* words;
  u64 mask = ~u64(0);
  const u64* start = nullptr;
};
// *start where there were not enough words: kernels then write NaN (integers: -1) and read none.
constexpr u64 kNoWords = ~u64(0);

// The first word of the op in its ring, or kNoWords.
__device__ __forceinline__ u64 start_of(const WordSource& from) { return from.start != nullptr ? *from.start : 0; }

struct DirectCall {
  Fill kind;
  DType type;       // u32 for words; f32, f64, bf16, f16 for all others
  const double* p;  // bernoulli: one probability for each of the n elements
  void* out;
  u64 n;
};

// Values come in granules (law/direct.h); these are the numbers of values and of 64-bit words in one.
int direct_values(Fill kind, DType type);
int direct_words(Fill kind, DType type);

// Granules [first, first + granules) of the call, from the words at `from`, on the current device.
void launch_direct(const DirectCall& call, const WordSource& from, u64 first, u64 granules, cudaStream_t stream);

}  // namespace everett
