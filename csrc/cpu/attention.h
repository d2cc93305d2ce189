// Attention's keep mask applied to a tensor of weights, a stripe of 16 queries at a time (law/attention.h).
#pragma once

#include <algorithm>

#include "cpu/masked.h"
#include "law/attention.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

constexpr int kChunkKeys = 256;  // of a stripe, whose masks are made before they are used

// The masks (-1 keep, 0 drop) of tiles first_tile ... of one stripe, `tiles` of them side by side.
template <Generator G>
static void attention_masks(const Stream& t, const u32 below[2][kTileUnits], u32 query_tile, u32 first_tile, int tiles,
                            int16_t keep[kTileQueries][kChunkKeys]) {
  constexpr int kWords = unit_words(G);
  for (int tile = 0; tile < tiles; tile++) {
    for (u32 unit = 0; unit < kTileUnits; unit += kLanes) {
      U x[16];
      attention_unit<G>(t, lane_numbers() + ((first_tile + tile) * kTileUnits + unit), query_tile, x);
      for (u32 j = 0; j < kWords; j++) {
        const S draw = (S)x[j] & (S)splat(0x7FFF7FFFu, U{});
        const U kept = (U)(draw > (S)load(below[j >= kWords / 2] + unit));
        // Four units make eight neighbouring decisions of one query.
        for (u32 i = 0; i < kLanes; i += 4)
          memcpy(&keep[unit_query(unit + i, j, kWords)][tile * tile_keys(G) + unit_key(0, j, kWords)],
                 (const u32*)&kept + i, 16);
      }
    }
  }
}

using AttentionMasks = void (*)(const Stream&, const u32[2][kTileUnits], u32, u32, int, int16_t[kTileQueries][kChunkKeys]);

static inline AttentionMasks attention_masks_of(Generator g) {
  switch (g) {
    case kChaCha8: return attention_masks<kChaCha8>;
    case kChaCha12: return attention_masks<kChaCha12>;
    case kChaCha20: return attention_masks<kChaCha20>;
    default: return attention_masks<kPhilox>;
  }
}

// body(keep, offset, n): n elements from `offset` on.
template <class Body>
static void attention_stripes(const AttentionJob& job, i64 begin, i64 end, Body body) {
  const AttentionMasks masks = attention_masks_of(job.generator);
  const int tile = tile_keys(job.generator);
  const u64 first_stripe = job.q0 / kTileQueries, last_query = job.q0 + (u64)job.queries, last_key = job.k0 + (u64)job.keys;
  const i64 stripes = attention_stripes_of(job);
  alignas(64) int16_t keep[kTileQueries][kChunkKeys];
  for (; begin < end; begin++) {
    const i64 row = begin / stripes;
    Stream stream = job.stream;
    stream.s = job.bh0 + (u32)row;
    const u64 stripe = first_stripe + (u64)(begin % stripes);
    alignas(64) u32 below[2][kTileUnits];
    for (u32 half = 0; half < 2; half++)
      for (u32 i = 0; i < kTileUnits; i++) {
        const u32 q = (u32)stripe * kTileQueries + unit_query(i, half, 2);
        below[half][i] = (attention_threshold(job.threshold, stream.subkey.dither, stream.s, q) - 1) * 0x10001u;
      }
    const u64 from = std::max(stripe * kTileQueries, job.q0), to = std::min((stripe + 1) * kTileQueries, last_query);
    for (u64 chunk = job.k0 / tile * tile; chunk < last_key; chunk += kChunkKeys) {
      const u64 first = std::max(chunk, job.k0), last = std::min(chunk + kChunkKeys, last_key);
      masks(stream, below, (u32)stripe, (u32)(chunk / tile), (int)((last - chunk + tile - 1) / tile), keep);
      for (u64 q = from; q < to; q++)
        body(&keep[q % kTileQueries][first - chunk], (row * job.queries + (i64)(q - job.q0)) * job.keys + (i64)(first - job.k0),
             (i64)(last - first));
    }
  }
}

template <class Type>
static void attention_as(const AttentionJob& job, i64 begin, i64 end) {
  using T = typename Type::T;
  attention_stripes(job, begin, end, [&](const int16_t* keep, i64 at, i64 n) {
    apply<MaskedOp::dropout, Type>(job, keep, (const T*)job.in + at, nullptr, (T*)job.out + at, n);
  });
}

// Stripes [begin, end) of a job.
static void attention(const AttentionJob& job, i64 begin, i64 end) {
  switch (job.type) {
    case DType::f64:
      return attention_stripes(job, begin, end, [&](const int16_t* keep, i64 at, i64 n) {
        apply_fp64<MaskedOp::dropout>(job, keep, (const double*)job.in + at, nullptr, (double*)job.out + at, n);
      });
    case DType::bf16: return attention_as<Bf16>(job, begin, end);
    case DType::f16: return attention_as<Fp16>(job, begin, end);
    default: return attention_as<Fp32>(job, begin, end);
  }
}

}  // namespace
}  // namespace everett
