// The health tests: what a raw byte must pass before the conditioner may take it.
//
// Four continuous tests of NIST SP 800-90B 4.4, all four always, on whole units of 512 raw bytes:
//   repetition count (bits), (bytes)       a value occurs `cutoff` times running; runs straddle units
//   adaptive proportion (bits), (bytes)    the first sample of a window occurs `cutoff` times in it; windows are fixed:
//                                          one of 512 bytes and four of 1,024 bits a unit
// and the comparison of every unit with the last 2^16 units (32 MiB) by a 128-bit keyed fingerprint, which sees a device
// that repeats a buffer. Cutoffs come from everett_cuda/health.py. Bit tests miss 0x55 0x55 ..., byte tests miss bias.
//
// The first alarm by raw byte offset wins; ties go in the order of `Test`. The offset of an alarm is that of the byte
// with which the test reached its cutoff; for a duplicate, the last byte of the unit. So a stuck device is named by its
// repetition count, although its units are duplicates as well.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <optional>
#include <vector>

#include "siphash.h"

namespace everett {

constexpr size_t kUnit = 512;
constexpr size_t kBitWindow = 1024;                     // bits
constexpr size_t kBitWindows = kUnit * 8 / kBitWindow;  // a unit
constexpr size_t kHistoryUnits = size_t(1) << 16;

enum class BitOrder { msb_first, lsb_first };  // which bit of a byte the device made first

enum class Test { device_status, repetition_bits, repetition_bytes, proportion_bits, proportion_bytes, duplicate };
constexpr int kTests = 6;
const char* test_name(Test test);

struct Cutoffs {
  uint32_t repetition_bytes, proportion_bytes, repetition_bits, proportion_bits;
};

struct Alarm {
  Test test;
  uint64_t offset;  // of the raw byte with which the test reached its cutoff
  uint64_t value;   // repetition: the run; proportion: the count in the whole window; duplicate: units since the first copy
  uint64_t cutoff;  // duplicate: units that are remembered
};

// What the fast pass over a unit finds; bit i of word w of a mask is byte 64*w + i.
struct UnitFacts {
  uint64_t equal[kUnit / 64];   // bytes equal to the one before (byte 0: to the last byte of the unit before)
  uint64_t solid[kUnit / 64];   // bytes that are 0x00 or 0xff
  uint32_t like_first;          // bytes equal to byte 0
  uint32_t ones[kBitWindows];   // 1 bits in each bit window
};
UnitFacts unit_facts_portable(const uint8_t* unit, uint8_t before);
UnitFacts unit_facts_avx2(const uint8_t* unit, uint8_t before);  // only where has_avx2()
bool has_avx2();

class Health {
 public:
  // Throws std::invalid_argument for cutoffs outside their window. `avx2` is for tests that compare the two passes.
  Health(const Cutoffs& cutoffs, BitOrder order, const uint8_t fingerprint_key[16], bool avx2 = has_avx2());

  struct Scan {
    size_t passed;  // units that passed, all before the alarm
    std::optional<Alarm> alarm;
  };
  // Tests n units in order and stops at the first alarm; `offset` is the raw offset of the first byte.
  Scan scan(const uint8_t* units, size_t n, uint64_t offset);

  // The next unit does not follow the last one (an alarm, a transport error): runs start anew. Units stay remembered.
  void break_sequence();
  // The source repeats itself by request from here on (a recording begins again): units so far are forgotten.
  void forget_units();

 private:
  struct Found;  // the first alarm so far
  void repetition_bytes(const UnitFacts& facts, Found& found);
  void repetition_bits(const uint8_t* unit, const UnitFacts& facts, Found& found);
  void proportion(const uint8_t* unit, const UnitFacts& facts, Found& found) const;
  void duplicate(const uint8_t* unit, Found& found);
  int bit(uint8_t byte, int i) const { return (byte >> (order_ == BitOrder::msb_first ? 7 - i : i)) & 1; }

  Cutoffs cutoffs_;
  BitOrder order_;
  bool avx2_;
  // The run that the last byte, and the last bit, belong to. A length of 0: nothing came before.
  uint8_t last_byte_ = 0;
  uint64_t byte_run_ = 0, bit_run_ = 0;

  // Fingerprints by position modulo the history; positions count from 1. A bucket holds the newest position of its
  // chain, `older_` the next one; a chain ends where a position has left the history, so nothing is ever removed.
  SipHash128 fingerprint_;
  uint64_t units_seen_ = 0;
  std::vector<Fingerprint> history_;
  std::vector<uint64_t> older_, newest_;
};

}  // namespace everett
