// Packed keep masks: a lane makes the 32 decisions of one block as one word. Where e0 lies inside a block, a word of the
// output is the end of one block's word and the beginning of the next one's, which the next lane has.
#include "cuda/keep_bits.h"

#include "cuda/launch.h"
#include "cuda/tile.h"

namespace everett {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct Parameters {
  RecordSource record;
  KeepRule rule;
  u32 s;
  int rounds;
  bool wide;
  u8* out;
  u64 n, e0;
};

// Bits 0-15 of x to the even places, bits 16-31 to the odd ones (the outer perfect shuffle of Warren's Hacker's Delight).
__device__ __forceinline__ u32 interleaved(u32 x) {
  const auto exchange = [&](u32 mask, int by) {
    const u32 differ = (x ^ (x >> by)) & mask;
    x ^= differ ^ (differ << by);
  };
  exchange(0x0000FF00u, 8), exchange(0x00F000F0u, 4), exchange(0x0C0C0C0Cu, 2), exchange(0x22222222u, 1);
  return x;
}

// The decisions of block `block` of 32 elements, element 0 in bit 0.
template <Engine E>
__device__ __forceinline__ u32 keep_word(const Keystream<E>& t, const KeepRule& rule, bool wide, u64 block) {
  const bool more = dither_of(t.stream.subkey.dither, (u32)block) < rule.f;
  u32 x[16], bits = 0;
  if (!wide) {
    t.block(block, x);
    const u32 threshold = (rule.t + more) * 0x10001u;
    for (int j = 0; j < 16; j++) bits |= at_least_15(x[j], threshold) & (0x10001u << j);
    return interleaved(bits);
  }
#pragma unroll 1
  for (u32 half = 0; half < 2; half++) {
    t.block(2 * block + half, x);
    u32 kept = 0;
    for (int j = 0; j < 16; j++) kept |= (u32)(x[j] > rule.t || (x[j] == rule.t && !more)) << j;
    bits |= kept << 16 * half;
  }
  return bits & rule.possible;
}

template <Engine E>
__global__ void __launch_bounds__(kThreads) keep_bits_kernel(const Parameters p) {
  alignas(64) __shared__ u8 shared[kWarps * 64];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Keystream<E> stream({record_of(p.record), (u32)kTagKeep, p.s}, p.rounds, shared_address(shared) + warp * 64, lane);
  const u32 phase = (u32)p.e0 & 31, stretch = phase ? 31 : 32;  // words that the warp's 32 blocks give
  const bool aligned = ((uintptr_t)p.out & 3) == 0;
  const u64 words = (p.n + 31) / 32, bytes = (p.n + 7) / 8, step = (u64)gridDim.x * kWarps * stretch;
  for (u64 begin = ((u64)blockIdx.x * kWarps + warp) * stretch; begin < words; begin += step) {
    const u64 word = begin + lane, left = p.n - 32 * word;
    u32 bits = keep_word(stream, p.rule, p.wide, (p.e0 >> 5) + word);
    const u32 next = __shfl_sync(~0u, bits, (lane + 1) & 31);
    bits = (u32)(((u64)next << 32 | bits) >> phase);
    if (lane >= stretch || word >= words) continue;
    if (left < 32) bits &= (1u << left) - 1;
    if (aligned && 4 * word + 4 <= bytes) {
      ((u32*)p.out)[word] = bits;
    } else {
      for (u32 i = 0; i < 4; i++)
        if (4 * word + i < bytes) p.out[4 * word + i] = (u8)(bits >> 8 * i);
    }
  }
}

template <Engine E>
void launch_one(const KeepBitsCall& c, u64 n, u64 e0, cudaStream_t stream) {
  const u64 a_block = kWarps * (e0 % 32 ? 31 : 32), words = (n + 31) / 32, blocks = (words + a_block - 1) / a_block;
  const u64 resident = resident_blocks<keep_bits_kernel<E>>(kThreads);
  const Parameters p = {c.record, keep_rule(c.threshold), c.s, rounds_of(c.generator), c.threshold.wide, c.out, n, e0};
  launch("keep_bits_kernel", keep_bits_kernel<E>, (unsigned)(blocks < resident ? blocks : resident), kThreads, stream, p);
}

}  // namespace

void launch_keep_bits(const KeepBitsCall& c, u64 n, u64 e0, cudaStream_t stream) {
  if (n == 0) return;
  switch (c.generator) {
    case kChaCha8: return launch_one<Engine::chacha8>(c, n, e0, stream);
    case kPhilox: return launch_one<Engine::philox>(c, n, e0, stream);
    default: return launch_one<Engine::chacha>(c, n, e0, stream);
  }
}

}  // namespace everett
