// The health tests; see health.h for the rules. One pass over a unit (AVX2 or portable) finds masks and counts; the
// verdicts are drawn from those by one text, so the two passes cannot disagree unless their facts do.
#include "health.h"

#include <algorithm>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace everett {

const char* test_name(Test test) {
  static const char* const names[kTests] = {"device status",           "repetition count (bits)",
                                            "repetition count (bytes)", "adaptive proportion (bits)",
                                            "adaptive proportion (bytes)", "duplicate unit"};
  return names[int(test)];
}

namespace {

// A bit a byte of x that is zero, in byte order.
inline uint64_t zero_bytes(uint64_t x) {
  constexpr uint64_t k7f = 0x7f7f7f7f7f7f7f7full;
  uint64_t high = ~(((x & k7f) + k7f) | x | k7f);    // 0x80 in each byte that is zero, exactly
  return ((high >> 7) * 0x0102040810204080ull) >> 56;  // gathers the eight bits
}

inline uint64_t load64(const uint8_t* p) {
  uint64_t x;
  memcpy(&x, p, 8);
  return x;
}

inline uint32_t ones_of(uint64_t x) {  // without the popcnt instruction, which the baseline does not have
  x -= (x >> 1) & 0x5555555555555555ull;
  x = (x & 0x3333333333333333ull) + ((x >> 2) & 0x3333333333333333ull);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0full;
  return uint32_t((x * 0x0101010101010101ull) >> 56);
}

inline uint64_t clz8(uint8_t x) { return uint64_t(__builtin_clz(x)) - 24; }
inline uint64_t ctz8(uint8_t x) { return uint64_t(__builtin_ctz(x)); }

}  // namespace

UnitFacts unit_facts_portable(const uint8_t* unit, uint8_t before) {
  UnitFacts f{};
  const uint64_t first = unit[0] * 0x0101010101010101ull;
  uint64_t previous = uint64_t(before) << 56;
  for (size_t i = 0; i < kUnit; i += 8) {
    uint64_t x = load64(unit + i);
    f.equal[i / 64] |= zero_bytes(x ^ ((x << 8) | (previous >> 56))) << (i % 64);
    f.solid[i / 64] |= (zero_bytes(x) | zero_bytes(~x)) << (i % 64);
    f.like_first += ones_of(zero_bytes(x ^ first));
    f.ones[i / (kBitWindow / 8)] += ones_of(x);
    previous = x;
  }
  return f;
}

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }

__attribute__((target("avx2,popcnt"))) UnitFacts unit_facts_avx2(const uint8_t* unit, uint8_t before) {
  UnitFacts f{};
  const __m256i first = _mm256_set1_epi8(char(unit[0])), zero = _mm256_setzero_si256(), full = _mm256_set1_epi8(-1);
  for (size_t i = 0; i < kUnit; i += 32) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit + i));
    uint32_t equal;
    if (i == 0) {  // byte 0 has its neighbour outside the unit
      __m256i crossed = _mm256_permute2x128_si256(x, x, 0x08);  // low half to high, zeros below
      equal = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_alignr_epi8(x, crossed, 15))));
      equal = (equal & ~1u) | uint32_t(unit[0] == before);
    } else {
      __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit + i - 1));
      equal = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, left)));
    }
    uint32_t solid =
        uint32_t(_mm256_movemask_epi8(_mm256_or_si256(_mm256_cmpeq_epi8(x, zero), _mm256_cmpeq_epi8(x, full))));
    f.equal[i / 64] |= uint64_t(equal) << (i % 64);
    f.solid[i / 64] |= uint64_t(solid) << (i % 64);
    f.like_first += uint32_t(_mm_popcnt_u32(uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, first)))));
    uint64_t ones = 0;
    for (size_t j = 0; j < 32; j += 8) ones += uint64_t(_mm_popcnt_u64(load64(unit + i + j)));
    f.ones[i / (kBitWindow / 8)] += uint32_t(ones);
  }
  return f;
}
#else
bool has_avx2() { return false; }
UnitFacts unit_facts_avx2(const uint8_t* unit, uint8_t before) { return unit_facts_portable(unit, before); }
#endif

// The first alarm of the unit so far: candidates may come in any order.
struct Health::Found {
  uint64_t base;  // raw offset of the unit
  std::optional<Alarm> alarm;
  void at(size_t byte, Test test, uint64_t value, uint64_t cutoff) {
    uint64_t offset = base + byte;
    if (!alarm || offset < alarm->offset || (offset == alarm->offset && test < alarm->test))
      alarm = Alarm{test, offset, value, cutoff};
  }
};

Health::Health(const Cutoffs& cutoffs, BitOrder order, const uint8_t fingerprint_key[16], bool avx2)
    : cutoffs_(cutoffs), order_(order), avx2_(avx2), fingerprint_(fingerprint_key), history_(kHistoryUnits),
      older_(kHistoryUnits), newest_(kHistoryUnits) {
  if (avx2 && !has_avx2()) throw std::invalid_argument("this CPU has no AVX2");
  // Below 23 equal bits a run need not hold two whole bytes 0x00 or 0xff, which is what the fast pass looks for.
  if (cutoffs.repetition_bits < 23 || cutoffs.repetition_bytes < 2)
    throw std::invalid_argument("repetition cutoffs must be at least 23 bits and 2 bytes");
  if (cutoffs.proportion_bits < 2 || cutoffs.proportion_bits >= kBitWindow || cutoffs.proportion_bytes < 2 ||
      cutoffs.proportion_bytes >= kUnit)
    throw std::invalid_argument("proportion cutoffs must lie inside their windows of 1024 bits and 512 bytes");
}

void Health::break_sequence() { byte_run_ = bit_run_ = 0; }

void Health::forget_units() { std::fill(newest_.begin(), newest_.end(), 0); }

void Health::repetition_bytes(const UnitFacts& facts, Found& found) {
  const uint64_t cutoff = cutoffs_.repetition_bytes;
  uint64_t run = byte_run_;
  for (size_t w = 0; w < kUnit / 64; w++) {
    uint64_t equal = facts.equal[w];
    if (w == 0 && run == 0) equal &= ~1ull;  // nothing came before
    for (size_t i = 0; i < 64;) {
      uint64_t rest = equal >> i;
      if (rest & 1) {
        size_t same = std::min<size_t>(~rest ? size_t(__builtin_ctzll(~rest)) : 64, 64 - i);
        if (run < cutoff && run + same >= cutoff)
          found.at(w * 64 + i + size_t(cutoff - run) - 1, Test::repetition_bytes, cutoff, cutoff);
        run += same;
        i += same;
      } else {
        run = 1;
        i += rest ? size_t(__builtin_ctzll(rest)) : 64;
      }
    }
  }
  byte_run_ = run;
}

void Health::repetition_bits(const uint8_t* unit, const UnitFacts& facts, Found& found) {
  // A run of 23 bits or more holds two neighbouring bytes that are both 0x00 or both 0xff, unless it began in the unit
  // before and adds at most 15 bits here. Where neither is so (all but one unit in 64 of a good source), only the run
  // that leads out of the unit is wanted, and its last three bytes hold that.
  const uint64_t cutoff = cutoffs_.repetition_bits;
  uint64_t solid_pairs = 0;
  for (size_t w = 0; w < kUnit / 64; w++) solid_pairs |= facts.solid[w] & facts.equal[w];
  const bool exact = solid_pairs != 0 || bit_run_ + 15 >= cutoff;
  uint64_t run = exact ? bit_run_ : 0;
  int value = run ? bit(last_byte_, 7) : 0;
  for (size_t i = exact ? 0 : kUnit - 3; i < kUnit; i++) {
    const uint8_t byte = unit[i];
    const int first = bit(byte, 0), last = bit(byte, 7);
    const uint8_t differ = uint8_t(first ? ~byte : byte);
    const uint64_t leading = differ == 0 ? 8 : order_ == BitOrder::msb_first ? clz8(differ) : ctz8(differ);
    const uint64_t joined = (run != 0 && first == value ? run : 0) + leading;
    if (joined >= cutoff) {
      found.at(i, Test::repetition_bits, cutoff, cutoff);
      break;  // scan() stops here, so what runs on does not matter
    }
    if (leading == 8) {
      run = joined;
    } else {
      const uint8_t differ_last = uint8_t(last ? ~byte : byte);
      run = order_ == BitOrder::msb_first ? ctz8(differ_last) : clz8(differ_last);
    }
    value = last;
  }
  bit_run_ = run;
}

void Health::proportion(const uint8_t* unit, const UnitFacts& facts, Found& found) const {
  if (facts.like_first >= cutoffs_.proportion_bytes) {
    size_t i = 0;
    for (uint32_t count = 0; count < cutoffs_.proportion_bytes; i++) count += unit[i] == unit[0];
    found.at(i - 1, Test::proportion_bytes, facts.like_first, cutoffs_.proportion_bytes);
  }
  for (size_t w = 0; w < kBitWindows; w++) {
    const uint8_t* window = unit + w * kBitWindow / 8;
    const int first = bit(window[0], 0);
    const uint32_t like_first = first ? facts.ones[w] : uint32_t(kBitWindow) - facts.ones[w];
    if (like_first < cutoffs_.proportion_bits) continue;
    size_t i = 0;
    for (uint32_t count = 0; count < cutoffs_.proportion_bits; i++) {
      uint32_t ones = ones_of(window[i]);
      count += first ? ones : 8 - ones;  // the order of bits inside the byte does not move the byte's offset
    }
    found.at(w * kBitWindow / 8 + i - 1, Test::proportion_bits, like_first, cutoffs_.proportion_bits);
    break;  // a later window cannot come first
  }
}

void Health::duplicate(const uint8_t* unit, Found& found) {
  const Fingerprint print = fingerprint_(unit, kUnit);
  const size_t bucket = print.low % kHistoryUnits;
  const uint64_t position = units_seen_ + 1;
  for (uint64_t p = newest_[bucket]; p != 0 && position - p <= kHistoryUnits; p = older_[p % kHistoryUnits]) {
    if (!(history_[p % kHistoryUnits] == print)) continue;
    found.at(kUnit - 1, Test::duplicate, position - p, kHistoryUnits);
    return;  // the first copy stays remembered
  }
  if (found.alarm) return;  // only units that passed are remembered
  units_seen_ = position;
  history_[position % kHistoryUnits] = print;
  older_[position % kHistoryUnits] = newest_[bucket];
  newest_[bucket] = position;
}

Health::Scan Health::scan(const uint8_t* units, size_t n, uint64_t offset) {
  for (size_t k = 0; k < n; k++) {
    const uint8_t* unit = units + k * kUnit;
    Found found{offset + k * kUnit, {}};
    const UnitFacts facts = avx2_ ? unit_facts_avx2(unit, last_byte_) : unit_facts_portable(unit, last_byte_);
    repetition_bytes(facts, found);
    repetition_bits(unit, facts, found);
    proportion(unit, facts, found);
    duplicate(unit, found);
    last_byte_ = unit[kUnit - 1];
    if (found.alarm) {
      break_sequence();
      return {k, found.alarm};
    }
  }
  return {n, {}};
}

}  // namespace everett
