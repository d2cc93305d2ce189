// A warp's tile: 1024 consecutive logical indices, their draws made by the lane that computes the block, then handed
// through shared memory to the lane that holds the elements.
//
// In 2 KiB of shared memory a warp, 16 bytes to a piece and 4 pieces to a row of 32 half-words, piece c of row r lies at
// piece r*4 + (c ^ (r>>1 & 3)): with that exchange no store of a lane's row and no load of vectors of 2, 4, 8 or 16
// half-words a lane meets a bank conflict.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx.h"
#include "law/keepdrop.h"
#include "law/stream.h"

namespace everett {

constexpr int kTile = 1024;     // half-words (16-bit decisions) in a tile
constexpr int kTilePieces = 128;

__device__ __forceinline__ u32 piece_at(u32 row, u32 piece) { return row * 4 + (piece ^ (row >> 1 & 3)); }

// What a kernel needs to know of a Threshold.
struct KeepRule {
  u32 t, f;
  u32 possible;  // 0 where p = 1, so that nothing is kept, else all ones
};

inline KeepRule keep_rule(const Threshold& h) { return {h.t, h.f, h.p47 == kP47One ? 0u : ~0u}; }

// The masks of the 1024 elements from block first_block on (32 elements a block) into the warp's tile, in order, as
// half-words: all ones keep, 0 drop. Begins and ends with a barrier of the warp.
template <Generator G, bool Wide>
__device__ __forceinline__ void keep_tile(const Stream& t, const KeepRule& rule, u64 first_block, u32 lane, uint4* tile) {
  if constexpr (!Wide) {
    // The 15-bit form: lane l makes block l of the tile, which is its row l.
    const u64 block = first_block + lane;
    u32 x[16];
    stream_block<G>(t, (u32)block, (u32)(block >> 32), x);
    const u32 threshold = (rule.t + (dither_of(t.subkey.dither, (u32)block) < rule.f)) * 0x10001u;
    for (int j = 0; j < 16; j++) x[j] = at_least_15(x[j], threshold);
    __syncwarp();
    for (int c = 0; c < 4; c++) tile[piece_at(lane, c)] = make_uint4(x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]);
  } else {
    // The 32-bit form takes 64 blocks of draws: lanes 2i and 2i+1 make the halves of rows i, then of rows 16+i.
    __syncwarp();
#pragma unroll 1
    for (u32 half = 0; half < 2; half++) {
      const u64 draws = 2 * first_block + 32 * half + lane;
      u32 x[16];
      stream_block<G>(t, (u32)draws, (u32)(draws >> 32), x);
      const bool more = dither_of(t.subkey.dither, (u32)(draws >> 1)) < rule.f;
      for (int j = 0; j < 8; j++) {
        const auto dropped = [&](u32 h) { return h < rule.t || (h == rule.t && more); };
        x[j] = ((dropped(x[2 * j]) ? 0u : 0xFFFFu) | (dropped(x[2 * j + 1]) ? 0u : 0xFFFF0000u)) & rule.possible;
      }
      const u32 row = 16 * half + lane / 2, piece = lane % 2 * 2;
      tile[piece_at(row, piece)] = make_uint4(x[0], x[1], x[2], x[3]);
      tile[piece_at(row, piece + 1)] = make_uint4(x[4], x[5], x[6], x[7]);
    }
  }
  __syncwarp();
}

// The half-word of element i of the tile.
__device__ __forceinline__ u16 tile_half(const uint4* tile, u32 i) {
  return ((const u16*)&tile[piece_at(i >> 5, i >> 3 & 3)])[i & 7];
}

// Half-words [first, first + N) as words in order, N = 2, 4, 8 or 16, first a multiple of N.
template <int N>
__device__ __forceinline__ void tile_halves(const uint4* tile, u32 first, u32 words[N / 2]) {
  const uint4* piece = &tile[piece_at(first >> 5, first >> 3 & 3)];
  if constexpr (N == 2) {
    words[0] = ((const u32*)piece)[first >> 1 & 3];
  } else if constexpr (N == 4) {
    const uint2 half = ((const uint2*)piece)[first >> 2 & 1];
    words[0] = half.x, words[1] = half.y;
  } else {
    for (int i = 0; i < N / 8; i++) {
      const uint4 p = tile[piece_at(first >> 5, (first >> 3 & 3) + i)];
      words[4 * i] = p.x, words[4 * i + 1] = p.y, words[4 * i + 2] = p.z, words[4 * i + 3] = p.w;
    }
  }
}

}  // namespace everett
