// What the emulated devices give: splitmix64 of a counter, as in seeded_bytes.py.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline void seeded_bytes(uint64_t seed, uint64_t offset, unsigned char* out, size_t n) {
  while (n > 0) {
    uint64_t z = (offset / 8 + 1) * 0x9E3779B97F4A7C15u + seed;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    size_t at = offset % 8, piece = 8 - at < n ? 8 - at : n;
    memcpy(out, (unsigned char*)&z + at, piece);  // little-endian hosts only, as the extension itself
    out += piece;
    offset += piece;
    n -= piece;
  }
}
