// Keystream by the group: kLanes consecutive blocks at once, one in each lane, and their way back into stream order.
#pragma once

#include "cpu/lanes.h"
#include "law/stream.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

constexpr int kGroupWords = 16 * kLanes;  // 32-bit words in a group of blocks

EV_FN U lane_numbers() {
  U r;
  for (int i = 0; i < kLanes; i++) r[i] = i;
  return r;
}

// Blocks group*kLanes ... +kLanes-1: x[j], lane l is word j of block l. The low block word cannot carry inside a group.
template <Generator G>
static void generate_group(const Stream& t, u64 group, U x[16]) {
  const u64 first = group * kLanes;
  stream_block<G>(t, lane_numbers() + (u32)first, splat((u32)(first >> 32), U{}), x);
}

using GenerateGroup = void (*)(const Stream&, u64 group, U x[16]);

static inline GenerateGroup generator_of(Generator g) {
  switch (g) {
    case kChaCha12: return generate_group<kChaCha12>;
    case kChaCha20: return generate_group<kChaCha20>;
    case kPhilox: return generate_group<kPhilox>;
    default: return generate_group<kChaCha8>;
  }
}

#if EVERETT_ISA == 2
#define EV_UNPACK(name, op) \
  EV_FN U name(U a, U b) { return (U)op((__m512i)a, (__m512i)b); }
EV_UNPACK(low_words, _mm512_unpacklo_epi32)
EV_UNPACK(high_words, _mm512_unpackhi_epi32)
EV_UNPACK(low_pairs, _mm512_unpacklo_epi64)
EV_UNPACK(high_pairs, _mm512_unpackhi_epi64)
#elif EVERETT_ISA == 1
#define EV_UNPACK(name, op) \
  EV_FN U name(U a, U b) { return (U)op((__m256i)a, (__m256i)b); }
EV_UNPACK(low_words, _mm256_unpacklo_epi32)
EV_UNPACK(high_words, _mm256_unpackhi_epi32)
EV_UNPACK(low_pairs, _mm256_unpacklo_epi64)
EV_UNPACK(high_pairs, _mm256_unpackhi_epi64)
#else
EV_FN U low_words(U a, U b) { return (U){a[0], b[0], a[1], b[1]}; }
EV_FN U high_words(U a, U b) { return (U){a[2], b[2], a[3], b[3]}; }
EV_FN U low_pairs(U a, U b) { return (U){a[0], a[1], b[0], b[1]}; }
EV_FN U high_pairs(U a, U b) { return (U){a[2], a[3], b[2], b[3]}; }
#endif

// Four vectors (words j..j+3 of every lane) become four vectors whose 128-bit piece i is words j..j+3 of lane 4i+k.
EV_FN void transpose_4(const U x[4], U r[4]) {
  U a0 = low_words(x[0], x[1]), a1 = high_words(x[0], x[1]), b0 = low_words(x[2], x[3]), b1 = high_words(x[2], x[3]);
  r[0] = low_pairs(a0, b0), r[1] = high_pairs(a0, b0), r[2] = low_pairs(a1, b1), r[3] = high_pairs(a1, b1);
}

typedef U UnalignedU __attribute__((aligned(4)));
EV_FN void store(u32* p, U x) { *(UnalignedU*)p = x; }
EV_FN U load(const u32* p) { return *(const UnalignedU*)p; }

// x[j], lane l -> out[l*Words + j] for Words = 8 or 16 words a lane.
template <int Words>
EV_FN void store_in_stream_order(const U x[Words], u32* out) {
  U r[Words / 4][4];
  for (int q = 0; q < Words / 4; q++) transpose_4(x + 4 * q, r[q]);
  for (int k = 0; k < 4; k++) {
#if EVERETT_ISA == 2
    if constexpr (Words == 16) {
      // A 4x4 transpose of 128-bit pieces: r[q][k] piece i -> block 4i+k, piece q.
      __m512i a = _mm512_shuffle_i32x4((__m512i)r[0][k], (__m512i)r[1][k], 0x44);
      __m512i b = _mm512_shuffle_i32x4((__m512i)r[0][k], (__m512i)r[1][k], 0xEE);
      __m512i c = _mm512_shuffle_i32x4((__m512i)r[2][k], (__m512i)r[3][k], 0x44);
      __m512i d = _mm512_shuffle_i32x4((__m512i)r[2][k], (__m512i)r[3][k], 0xEE);
      store(out + (0 + k) * 16, (U)_mm512_shuffle_i32x4(a, c, 0x88));
      store(out + (4 + k) * 16, (U)_mm512_shuffle_i32x4(a, c, 0xDD));
      store(out + (8 + k) * 16, (U)_mm512_shuffle_i32x4(b, d, 0x88));
      store(out + (12 + k) * 16, (U)_mm512_shuffle_i32x4(b, d, 0xDD));
    } else {
      for (int i = 0; i < 4; i++)
        for (int q = 0; q < 2; q++) memcpy(out + (4 * i + k) * 8 + 4 * q, (const u32*)&r[q][k] + 4 * i, 16);
    }
#elif EVERETT_ISA == 1
    for (int q = 0; q < Words / 4; q += 2) {
      __m256i a = (__m256i)r[q][k], b = (__m256i)r[q + 1][k];
      store(out + k * Words + 4 * q, (U)_mm256_permute2x128_si256(a, b, 0x20));
      store(out + (4 + k) * Words + 4 * q, (U)_mm256_permute2x128_si256(a, b, 0x31));
    }
#else
    for (int q = 0; q < Words / 4; q++) store(out + k * Words + 4 * q, r[q][k]);
#endif
  }
}

}  // namespace
}  // namespace everett
