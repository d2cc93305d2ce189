// CRC-32C by the processor's instruction (8 bytes each 3 cycles) where there is one, else by a table, a byte at a time.
#include "crc32c.h"

#include <string.h>

#include <array>

namespace everett {
namespace {

constexpr std::array<u32, 256> make_table() {
  std::array<u32, 256> table{};
  for (u32 i = 0; i < 256; i++) {
    u32 c = i;
    for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0);
    table[i] = c;
  }
  return table;
}

constexpr std::array<u32, 256> kTable = make_table();

u32 by_table(const u8* data, size_t n, u32 c) {
  for (size_t i = 0; i < n; i++) c = kTable[(c ^ data[i]) & 255] ^ (c >> 8);
  return c;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) u32 by_instruction(const u8* data, size_t n, u32 crc) {
  u64 c = crc;
  for (; n >= 8; n -= 8, data += 8) {
    u64 word;
    memcpy(&word, data, 8);
    c = __builtin_ia32_crc32di(c, word);
  }
  for (; n > 0; n--, data++) c = __builtin_ia32_crc32qi(u32(c), *data);
  return u32(c);
}

bool has_instruction() {
  static const bool found = __builtin_cpu_supports("sse4.2");
  return found;
}
#endif

}  // namespace

u32 crc32c(const u8* data, size_t n, u32 crc) {
#if defined(__x86_64__)
  if (has_instruction()) return ~by_instruction(data, n, ~crc);
#endif
  return ~by_table(data, n, ~crc);
}

}  // namespace everett
