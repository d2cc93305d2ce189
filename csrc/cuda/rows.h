// A warp's rows: each lane makes the 16, 32 or 64 bytes of output that one block of the keystream gives, and the warp
// stores them as one stretch, 16 bytes a lane, side by side.
//
// In between they lie in shared memory as pieces of 16 bytes, Pieces = 1, 2 or 4 a row. Piece v of the warp (row v /
// Pieces) has place v ^ (v>>3 & Pieces-1): so neither the lanes' stores of rows nor their loads of neighbouring pieces
// meet a bank conflict.
#pragma once

#include "cuda/ptx.h"

namespace everett {

template <int Pieces>
__device__ __forceinline__ Shared row_piece(Shared rows, u32 v) {
  static_assert(Pieces == 1 || Pieces == 2 || Pieces == 4, "16, 32 or 64 bytes a row");
  return rows + ((v ^ (v >> 3 & (Pieces - 1))) << 4);
}

// Where row `lane` begins. Its piece c is at this address ^ 16c.
template <int Pieces>
__device__ __forceinline__ Shared row_of(Shared rows, u32 lane) {
  return row_piece<Pieces>(rows, lane * Pieces);
}

template <int Pieces>
__device__ __forceinline__ void store_row(Shared row, const u32 x[4 * Pieces]) {
  for (int c = 0; c < Pieces; c++) store_shared(row ^ (c << 4), x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]);
}

// Piece 32q + lane, `pieces` being row_piece(rows, lane): 32 pieces are a multiple of the swizzle's period.
__device__ __forceinline__ void load_piece(Shared pieces, u32 q, u32 x[4]) { load_shared<4>(pieces + 512 * q, x); }

// Element i of the rows, 2, 4 or 8 bytes.
template <int Pieces, class T>
__device__ __forceinline__ T row_element(Shared rows, u32 i) {
  const u32 byte = i * (u32)sizeof(T);
  const Shared at = row_piece<Pieces>(rows, byte >> 4) + (byte & 15);
  if constexpr (sizeof(T) == 2) {
    return load_shared_half(at);
  } else {
    u32 words[sizeof(T) / 4];
    load_shared<sizeof(T) / 4>(at, words);
    return sizeof(T) == 8 ? (T)((u64)words[sizeof(T) / 4 - 1] << 32 | words[0]) : (T)words[0];
  }
}

}  // namespace everett
