// A stream's blocks on the GPU, with the part of ChaCha's first round that no block number touches computed once: columns
// 2 and 3, half of a round, which would cost 0.75 instructions for each element of a dropout.
#pragma once

#include "cuda/ptx.h"
#include "law/attention.h"
#include "law/stream.h"

namespace everett {

constexpr int kKeystreamBytes = 32;  // of shared memory for a warp's Keystream

// How a kernel is compiled to make its draws. ChaCha8 has its rounds written out; `chacha` counts rounds at run time, for
// 12 and 20 (0.5 instructions an element dearer) and wherever speed matters less than the number of kernels to compile.
enum class Engine : int { chacha8, chacha, philox };

inline int rounds_of(Generator g) { return g == kChaCha8 ? 8 : g == kChaCha12 ? 12 : 20; }

template <Engine E>
struct Keystream {
  Stream stream;
  int rounds;
  // Where words 2, 6, 10, 14, 3, 7, 11, 15 are after the first round's columns. In shared memory, because the compiler
  // would compute what is equal in all lanes again for each block rather than keep it, and eight registers are better
  // used for loads under way.
  Shared columns;

  // `columns` are kKeystreamBytes of the warp's own, at a multiple of 16.
  __device__ __forceinline__ Keystream(const Stream& t, int rounds, Shared columns, u32 lane)
      : stream(t), rounds(rounds), columns(columns) {
    u32 x[16];
    chacha_start(t.subkey.words, 0u, 0u, t.tag, t.s, x);
    chacha_quarter_round(x[2], x[6], x[10], x[14]);
    chacha_quarter_round(x[3], x[7], x[11], x[15]);
    if (lane == 0) {
      store_shared(columns, x[2], x[6], x[10], x[14]);
      store_shared(columns + 16, x[3], x[7], x[11], x[15]);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void block(u64 number, u32 x[16]) const {
    const u32 lo = (u32)number, hi = (u32)(number >> 32);
    u32 after[8];
    load_shared<4>(columns, after);
    load_shared<4>(columns + 16, after + 4);
    chacha_start(stream.subkey.words, lo, hi, stream.tag, stream.s, x);
    for (int i = 0; i < 4; i++) x[4 * i + 2] = after[i], x[4 * i + 3] = after[4 + i];
    chacha_quarter_round(x[0], x[4], x[8], x[12]);
    chacha_quarter_round(x[1], x[5], x[9], x[13]);
    chacha_diagonal_round(x);
    if constexpr (E == Engine::chacha8) {
      chacha_double_rounds<3>(x);
    } else {
#pragma unroll 1
      for (int done = 2; done < rounds; done += 2) chacha_double_rounds<1>(x);
    }
    chacha_finish(stream.subkey.words, lo, hi, stream.tag, stream.s, x);
  }
};

template <>
struct Keystream<Engine::philox> {
  Stream stream;

  __device__ __forceinline__ Keystream(const Stream& t, int, Shared, u32) : stream(t) {}
  __device__ __forceinline__ void block(u64 number, u32 x[16]) const {
    stream_block<kPhilox>(stream, (u32)number, (u32)(number >> 32), x);
  }
};

// ---- words without a Keystream: for kernels whose stream differs from element to element -----------------------------

// ChaCha's 16 words for the last row (lo, hi, tag, s).
__device__ __forceinline__ void chacha_words(const Stream& t, int rounds, u32 lo, u32 hi, u32 x[16]) {
  chacha_start(t.subkey.words, lo, hi, t.tag, t.s, x);
#pragma unroll 1
  for (int done = 0; done < rounds; done += 2) chacha_double_rounds<1>(x);
  chacha_finish(t.subkey.words, lo, hi, t.tag, t.s, x);
}

// Block `number`.
template <Engine E>
__device__ __forceinline__ void plain_block(const Stream& t, int rounds, u64 number, u32 x[16]) {
  if constexpr (E == Engine::philox)
    stream_block<kPhilox>(t, (u32)number, (u32)(number >> 32), x);
  else
    chacha_words(t, rounds, (u32)number, (u32)(number >> 32), x);
}

// A unit of attention's words (law/attention.h): 4 of Philox, 16 of ChaCha.
template <Engine E>
__device__ __forceinline__ void attention_words(const Stream& t, int rounds, u32 number, u32 query_tile, u32 x[]) {
  if constexpr (E == Engine::philox)
    attention_unit<kPhilox>(t, number, query_tile, x);
  else
    chacha_words(t, rounds, number, query_tile, x);
}

}  // namespace everett
