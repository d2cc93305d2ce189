// Keep masks by the group: 32*kLanes decisions of consecutive logical indices, one 16-bit lane each, -1 keep and 0 drop.
#pragma once

#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

constexpr int kGroup = 32 * kLanes;  // decisions in a group, and elements that the kernels handle at a time

typedef int16_t S __attribute__((vector_size(4 * kLanes), may_alias));       // two decisions a 32-bit lane
typedef int16_t HalfS __attribute__((vector_size(2 * kLanes), may_alias));   // one decision a 32-bit lane

// The 15-bit form. T_b - 1 < h as signed 16-bit numbers: T_b is at most 31*2^10 + 1.
static inline void keep_group_narrow(const MaskedJob& job, GenerateGroup generate, u64 group, int16_t* keep) {
  U x[16];
  generate(job.stream, group, x);
  const U block = lane_numbers() + (u32)(group * kLanes);
  const U dither = block * 0x9E3779B9u + job.stream.subkey.dither;
  const U threshold = splat(job.threshold.t - 1, U{}) - (U)(dither < splat(job.threshold.f, U{}));
  const S below = (S)(threshold | (threshold << 16));
  for (int j = 0; j < 16; j++) x[j] = (U)(((S)x[j] & (S)splat(0x7FFF7FFFu, U{})) > below);
  store_in_stream_order<16>(x, (u32*)keep);
}

// The 32-bit form, for p nearer to 0 or 1 than 15 bits serve well. Two groups of 32-bit draws; drop iff h < T + dither.
static inline void keep_group_wide(const MaskedJob& job, GenerateGroup generate, u64 group, int16_t* keep) {
  const U t = splat(job.threshold.t, U{});
  for (int half = 0; half < 2; half++) {
    U x[16];
    const u64 words_group = 2 * group + half;
    generate(job.stream, words_group, x);
    // Block e >> 4 of the keystream holds draw e; the dither counts in steps of 32 elements, so two blocks share one.
    const U step = (lane_numbers() + (u32)(words_group * kLanes)) >> 1;
    const U high_half = splat((u32)((words_group * kLanes) >> 32) << 31, U{});
    const U dither = (step | high_half) * 0x9E3779B9u + job.stream.subkey.dither;
    const U more = (U)(dither < splat(job.threshold.f, U{}));
    for (int j = 0; j < 16; j++) x[j] = ~((U)(x[j] < t) | ((U)(x[j] == t) & more));
    alignas(64) u32 words[kGroupWords];
    store_in_stream_order<16>(x, words);
    for (int i = 0; i < kGroupWords; i += kLanes) {
      HalfS narrow = __builtin_convertvector((I)load(words + i), HalfS);
      memcpy(keep + half * kGroupWords + i, &narrow, sizeof narrow);
    }
  }
}

// The masks of one job, with the group made last kept for the next run.
class KeepMasks {
 public:
  explicit KeepMasks(const MaskedJob& job) : job_(job), generate_(generator_of(job.generator)) {}

  // Decisions e ... of e's group; `n` is cut to what the group still holds. Valid until the next call.
  const int16_t* from(u64 e, i64& n) {
    const u64 group = e / kGroup;
    const i64 at = (i64)(e % kGroup);
    if (n > kGroup - at) n = kGroup - at;
    if (group != group_) {
      if (job_.threshold.p47 == 0 || job_.threshold.p47 == kP47One)
        memset(keep_, job_.threshold.p47 == 0 ? 0xFF : 0, sizeof keep_);
      else if (job_.threshold.wide)
        keep_group_wide(job_, generate_, group, keep_);
      else
        keep_group_narrow(job_, generate_, group, keep_);
      group_ = group;
    }
    return keep_ + at;
  }

  // n <= kGroup decisions along a run whose logical index moves by e_stride.
  const int16_t* along(u64 e, i64 e_stride, i64& n) {
    if (e_stride == 1) return from(e, n);
    if (n > kGroup) n = kGroup;
    for (i64 i = 0; i < n; i++) {
      i64 one = 1;
      gathered_[i] = e_stride == 0 && i > 0 ? gathered_[0] : *from(e + (u64)(i * e_stride), one);
    }
    return gathered_;
  }

 private:
  const MaskedJob& job_;
  GenerateGroup generate_;
  u64 group_ = ~0ull;
  alignas(64) int16_t keep_[kGroup];
  alignas(64) int16_t gathered_[kGroup];
};

}  // namespace
}  // namespace everett
