// Keep masks as packed bits: bit i of the output, little endian within its byte, is 1 where element i is kept.
#pragma once

#include <algorithm>

#include "cpu/keep.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

// Four masks (-1 or 0) as four bits: the product brings bit 0 of half-word j to bit 48 + j.
EV_FN u32 four_bits(const int16_t* keep) {
  u64 masks;
  memcpy(&masks, keep, sizeof masks);
  return (u32)((masks & 0x0001000100010001u) * 0x0001000200040008u >> 48) & 15u;
}

// Bytes [begin, end) of the output. The bits of the last byte beyond the job's elements are 0.
static void keep_bits(const MaskedJob& job, i64 begin, i64 end) {
  KeepMasks masks(job);
  u8* out = (u8*)job.out;
  const i64 last = std::min(end * 8, job.layout.size[0]);
  memset(out + begin, 0, end - begin);
  for (i64 at = begin * 8; at < last;) {
    i64 n = last - at, i = 0;
    const int16_t* keep = masks.from(job.layout.e0 + (u64)at, n);
    for (; i < n && (at + i) % 8 != 0; i++) out[(at + i) / 8] |= (keep[i] & 1) << (at + i) % 8;
    for (; i + 8 <= n; i += 8) out[(at + i) / 8] = (u8)(four_bits(keep + i) | four_bits(keep + i + 4) << 4);
    for (; i < n; i++) out[(at + i) / 8] |= (keep[i] & 1) << (at + i) % 8;
    at += n;
  }
}

}  // namespace
}  // namespace everett
