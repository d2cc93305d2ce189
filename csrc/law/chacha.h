// ChaCha (Bernstein 2008; state layout of RFC 8439 with a 64-bit block number) and HChaCha20 (the XChaCha draft).
// W is a 32-bit word, or a vector of lanes that each compute a block of their own.
#pragma once

#include "law/word.h"

namespace everett {

template <class W>
EV_FN void chacha_quarter_round(W& a, W& b, W& c, W& d) {
  a = a + b, d = rotl<16>(d ^ a);
  c = c + d, b = rotl<12>(b ^ c);
  a = a + b, d = rotl<8>(d ^ a);
  c = c + d, b = rotl<7>(b ^ c);
}

template <class W>
EV_FN void chacha_column_round(W x[16]) {
  chacha_quarter_round(x[0], x[4], x[8], x[12]);
  chacha_quarter_round(x[1], x[5], x[9], x[13]);
  chacha_quarter_round(x[2], x[6], x[10], x[14]);
  chacha_quarter_round(x[3], x[7], x[11], x[15]);
}

template <class W>
EV_FN void chacha_diagonal_round(W x[16]) {
  chacha_quarter_round(x[0], x[5], x[10], x[15]);
  chacha_quarter_round(x[1], x[6], x[11], x[12]);
  chacha_quarter_round(x[2], x[7], x[8], x[13]);
  chacha_quarter_round(x[3], x[4], x[9], x[14]);
}

template <int N, class W>
EV_FN void chacha_double_rounds(W x[16]) {
  EV_UNROLL
  for (int i = 0; i < N; i++) {
    chacha_column_round(x);
    chacha_diagonal_round(x);
  }
}

// The state before the rounds: constants, key, block number and the last two words.
template <class W>
EV_FN void chacha_start(const u32 key[8], W lo, W hi, u32 word14, u32 word15, W x[16]) {
  x[0] = splat(0x61707865u, W{}), x[1] = splat(0x3320646eu, W{});
  x[2] = splat(0x79622d32u, W{}), x[3] = splat(0x6b206574u, W{});
  for (int i = 0; i < 8; i++) x[4 + i] = splat(key[i], W{});
  x[12] = lo, x[13] = hi, x[14] = splat(word14, W{}), x[15] = splat(word15, W{});
}

// Adds that state to x.
template <class W>
EV_FN void chacha_finish(const u32 key[8], W lo, W hi, u32 word14, u32 word15, W x[16]) {
  W start[16];
  chacha_start(key, lo, hi, word14, word15, start);
  for (int i = 0; i < 16; i++) x[i] = x[i] + start[i];
}

// Block (lo, hi) of the stream (key, word14, word15): x[0..15], to be read as 64 little-endian bytes.
template <int Rounds, class W>
EV_FN void chacha_block(const u32 key[8], W lo, W hi, u32 word14, u32 word15, W x[16]) {
  static_assert(Rounds == 8 || Rounds == 12 || Rounds == 20, "ChaCha8, ChaCha12 or ChaCha20");
  chacha_start(key, lo, hi, word14, word15, x);
  chacha_double_rounds<Rounds / 2>(x);
  chacha_finish(key, lo, hi, word14, word15, x);
}

// 256-bit subkey of (key, 128-bit nonce): the first and last rows after 20 rounds, without the final addition.
EV_FN void hchacha20(const u32 key[8], const u32 nonce[4], u32 out[8]) {
  u32 x[16];
  chacha_start(key, nonce[0], nonce[1], nonce[2], nonce[3], x);
  chacha_double_rounds<10>(x);
  for (int i = 0; i < 4; i++) out[i] = x[i], out[4 + i] = x[12 + i];
}

}  // namespace everett
