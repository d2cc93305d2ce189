// The subkey record, 12 words, all that an op keeps of its randomness:
// 0-7 HChaCha20(key, nonce); 8 the dither d, word 0 of ChaCha20 block 2^64-1 (tag 0, s 0) under words 0-7; 9-11 zero.
#pragma once

#include "law/chacha.h"
#include "law/tags.h"

namespace everett {

struct Subkey {
  u32 words[8];
  u32 dither;
  u32 zero[3];
};
static_assert(sizeof(Subkey) == 48, "a record is 48 bytes");

EV_FN Subkey derive_subkey(const u32 key[8], const u32 nonce[4]) {
  Subkey r = {};
  hchacha20(key, nonce, r.words);
  u32 x[16];
  chacha_block<20>(r.words, 0xFFFFFFFFu, 0xFFFFFFFFu, (u32)kTagDerivation, 0u, x);
  r.dither = x[0];
  return r;
}

}  // namespace everett
