// A stream: the keystream of (subkey, tag, s) under one generator, in 64-byte blocks, and the place of a draw in it.
// Draw e of w bits is bits [e*w, (e+1)*w) of the concatenated blocks, little endian. ChaCha and Philox are read in the
// same order, so a block is 16 words for both (four Philox calls).
#pragma once

#include "law/chacha.h"
#include "law/philox.h"
#include "law/subkey.h"

namespace everett {

enum Generator : int { kChaCha8 = 0, kChaCha12 = 1, kChaCha20 = 2, kPhilox = 3 };

struct Stream {
  Subkey subkey;
  u32 tag;
  u32 s;
};

// Block (lo, hi) into x[0..15]. Lanes of W are blocks of their own.
template <Generator G, class W>
EV_FN void stream_block(const Stream& t, W lo, W hi, W x[16]) {
  if constexpr (G == kPhilox) {
    // Block b holds calls 4b .. 4b+3.
    const u32* k = t.subkey.words;
    const W call_hi = (hi << 2) | (lo >> 30);
    for (int i = 0; i < 4; i++) {
      W* c = x + 4 * i;
      c[0] = (lo << 2) | splat((u32)i, W{}), c[1] = call_hi;
      c[2] = splat(k[2] ^ t.tag, W{}), c[3] = splat(k[3] ^ t.s, W{});
      philox4x32_10(k[0], k[1], c);
    }
  } else {
    constexpr int rounds = G == kChaCha8 ? 8 : G == kChaCha12 ? 12 : 20;
    chacha_block<rounds>(t.subkey.words, lo, hi, t.tag, t.s, x);
  }
}

}  // namespace everett
