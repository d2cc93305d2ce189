// SipHash-2-4 with 128 bits of output (Aumasson, Bernstein): the keyed fingerprint of the duplicate test. libcrypto has
// it too, but the duplicate test must also run where no libcrypto opens.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace everett {

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "everett_cuda is written for little-endian machines"
#endif

struct Fingerprint {
  uint64_t low, high;
  bool operator==(const Fingerprint& o) const { return low == o.low && high == o.high; }
};

class SipHash128 {
 public:
  explicit SipHash128(const uint8_t key[16]) {
    memcpy(&k0_, key, 8);
    memcpy(&k1_, key + 8, 8);
  }

  Fingerprint operator()(const uint8_t* data, size_t n) const {
    State s{k0_ ^ 0x736f6d6570736575ull, k1_ ^ 0x646f72616e646f6dull ^ 0xee, k0_ ^ 0x6c7967656e657261ull,
            k1_ ^ 0x7465646279746573ull};
    size_t at = 0;
    for (; at + 8 <= n; at += 8) {
      uint64_t m;
      memcpy(&m, data + at, 8);
      s.absorb(m);
    }
    uint64_t last = uint64_t(n) << 56;  // the tail and the length modulo 256
    memcpy(&last, data + at, n - at);
    s.absorb(last);
    s.v2 ^= 0xee;
    uint64_t low = s.finish();
    s.v1 ^= 0xdd;
    return {low, s.finish()};
  }

 private:
  struct State {
    uint64_t v0, v1, v2, v3;
    static uint64_t rotl(uint64_t x, int r) { return (x << r) | (x >> (64 - r)); }
    void round() {
      v0 += v1, v1 = rotl(v1, 13) ^ v0, v0 = rotl(v0, 32);
      v2 += v3, v3 = rotl(v3, 16) ^ v2;
      v0 += v3, v3 = rotl(v3, 21) ^ v0;
      v2 += v1, v1 = rotl(v1, 17) ^ v2, v2 = rotl(v2, 32);
    }
    void absorb(uint64_t m) {
      v3 ^= m;
      round();
      round();
      v0 ^= m;
    }
    uint64_t finish() {
      for (int i = 0; i < 4; i++) round();
      return v0 ^ v1 ^ v2 ^ v3;
    }
  };
  uint64_t k0_, k1_;
};

}  // namespace everett
