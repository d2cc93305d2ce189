// A warp's tile: 1024 consecutive logical indices, their draws made by the lane that computes the block, then handed
// through shared memory to the lane that holds the elements.
//
// In 2 KiB of shared memory a warp, a row holds the 32 half-words of a block as 4 pieces of 16 bytes, and piece c of row
// r lies at r*64 + 16*(c ^ (r>>1 & 3)). With that exchange neither a store of a row by each lane nor a load of 2, 4, 8 or
// 16 half-words by each lane meets a bank conflict.
#pragma once

#include <cuda_runtime.h>

#include "cuda/keystream.h"
#include "cuda/ptx.h"
#include "law/keepdrop.h"

namespace everett {

constexpr int kTile = 1024;  // half-words in a tile
constexpr int kTileBytes = 2 * kTile;
constexpr int kWarpBytes = kTileBytes + 64;  // of shared memory: a tile, at a multiple of 64, and behind it a Keystream's
static_assert(kKeystreamBytes <= 64, "a keystream's part follows the tile");

__device__ __forceinline__ Shared piece_at(Shared tile, u32 row, u32 piece) {
  return tile + row * 64 + ((piece ^ (row >> 1 & 3)) << 4);
}

// What a kernel needs to know of a Threshold.
struct KeepRule {
  u32 t, f;
  u32 possible;  // 0 where p = 1, so that nothing is kept, else all ones
};

inline KeepRule keep_rule(const Threshold& h) { return {h.t, h.f, h.p47 == kP47One ? 0u : ~0u}; }

// Where a lane writes its draws into the warp's tile: its row, or in the wide form half of row lane/2.
template <bool Wide>
__device__ __forceinline__ Shared tile_row(Shared tile, u32 lane) {
  return Wide ? piece_at(tile, lane / 2, lane % 2 * 2) : piece_at(tile, lane, 0);
}

// The masks of 32 blocks of 32 elements into the rows of the warp's tile, as half-words: all ones keep, 0 drop. `block`
// is the number of the lane's block, whose masks fill row `lane`; `row` is its tile_row. Begins and ends with a barrier
// of the warp.
template <Engine E, bool Wide>
__device__ __forceinline__ void keep_tile(const Keystream<E>& t, const KeepRule& rule, u64 block, u32 lane, Shared row) {
  if constexpr (!Wide) {
    u32 x[16];
    t.block(block, x);
    const u32 threshold = (rule.t + (dither_of(t.stream.subkey.dither, (u32)block) < rule.f)) * 0x10001u;
    for (int j = 0; j < 16; j++) x[j] = at_least_15(x[j], threshold);
    __syncwarp();
    for (int c = 0; c < 4; c++) store_shared(row ^ (c << 4), x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]);
  } else {
    // 32-bit draws take two blocks of the keystream a row. Two lanes make a row: first rows 0-15, then 16-31.
    __syncwarp();
#pragma unroll 1
    for (u32 half = 0; half < 2; half++) {
      const u64 of_row = __shfl_sync(~0u, block, 16 * half + lane / 2);
      u32 x[16];
      t.block(2 * of_row + lane % 2, x);
      const bool more = dither_of(t.stream.subkey.dither, (u32)of_row) < rule.f;
      for (int j = 0; j < 8; j++) {
        const auto kept = [&](u32 h) { return h > rule.t || (h == rule.t && !more); };
        x[j] = ((kept(x[2 * j]) ? 0xFFFFu : 0u) | (kept(x[2 * j + 1]) ? 0xFFFF0000u : 0u)) & rule.possible;
      }
      store_shared(row + half * (kTileBytes / 2), x[0], x[1], x[2], x[3]);
      store_shared((row ^ 16) + half * (kTileBytes / 2), x[4], x[5], x[6], x[7]);
    }
  }
  __syncwarp();
}

// Vector q of a lane holds the N half-words from (32q + lane)*N on, N = 1, 2, 4, 8 or 16. Where vector 0 lies:
template <int N>
__device__ __forceinline__ Shared tile_vectors(Shared tile, u32 lane) {
  const u32 first = lane * N;
  return piece_at(tile, first >> 5, first >> 3 & 3) + (first & 7) * 2;
}

// The half-words of vector q, as words in order (N = 1: in the low half). From vector to vector the row moves by N, and
// its swizzle with it.
template <int N>
__device__ __forceinline__ void load_vector(Shared vectors, u32 q, u32 words[(N + 1) / 2]) {
  const Shared at = (vectors ^ ((q * N / 2 & 3) << 4)) + q * N * 64;
  if constexpr (N == 1)
    words[0] = load_shared_half(at);
  else
    load_shared<N < 8 ? N / 2 : 4>(at, words);
  if constexpr (N == 16) load_shared<4>(at ^ 16, words + 4);
}

}  // namespace everett
