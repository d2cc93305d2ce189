// Philox4x32-10 (Salmon et al., SC 2011). Fast, well tested, not cryptographic. W as in chacha.h.
#pragma once

#include "law/word.h"

namespace everett {

template <class W>
EV_FN void philox4x32_10(u32 key0, u32 key1, W c[4]) {
  const W m0 = splat(0xD2511F53u, W{}), m1 = splat(0xCD9E8D57u, W{});
  EV_UNROLL
  for (int round = 0; round < 10; round++) {
    W hi0 = mul_hi(m0, c[0]), lo0 = m0 * c[0], hi1 = mul_hi(m1, c[2]), lo1 = m1 * c[2];
    c[0] = hi1 ^ c[1] ^ splat(key0, W{}), c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ splat(key1, W{}), c[3] = lo0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}

}  // namespace everett
