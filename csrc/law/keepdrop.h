// Keep or drop with an exact p from 16 random bits: a threshold that is dithered from block to block.
//
// P = round(p * 2^47). In [2^39, 31*2^42] (p from 1/256 to 31/32) a decision compares the low 15 bits of the 16-bit draw
// e with T = P >> 32, plus one in the share F / 2^32 of the blocks; otherwise the 32-bit draw e is compared with P >> 15
// in the same way. The 15-bit form stops at 31/32 because then GPUs can compare two draws as fp16 patterns.
// Over the dither d each decision drops with probability exactly P / 2^47, and two decisions under one subkey covary by
// at most 2^-32.
#pragma once

#include "law/subkey.h"

namespace everett {

struct Threshold {
  u64 p47;     // P
  u32 t, f;    // T and F
  bool wide;   // 32-bit draws
  float scale; // c = float32(1 / (1 - P / 2^47)); for P = 2^47 everything is dropped and c is 0
  double scale64;
};

constexpr u64 kP47One = 1ull << 47;

// p in [0, 1], checked by the caller. 2^47 * p is exact in fp64, and adding 1/2 could round: rint rounds once.
EV_FN Threshold threshold_of(double p) {
  Threshold h = {};
  h.p47 = (u64)__builtin_rint(p * (double)kP47One);
  h.wide = h.p47 < (1ull << 39) || h.p47 > (31ull << 42);
  h.t = h.wide ? (u32)(h.p47 >> 15) : (u32)(h.p47 >> 32);
  h.f = h.wide ? (u32)(h.p47 << 17) : (u32)h.p47;
  h.scale64 = h.p47 == kP47One ? 0.0 : 1.0 / (1.0 - (double)h.p47 / (double)kP47One);
  h.scale = (float)h.scale64;
  return h;
}

// x_e of the law: the dither of block e >> 5.
EV_FN u32 dither_of(u32 d, u32 block) { return d + block * 0x9E3779B9u; }

// The threshold of one block: T or T+1. May be 2^32 in the wide form, so it is 64 bits.
EV_FN u64 block_threshold(const Threshold& h, u32 d, u32 block) { return (u64)h.t + (dither_of(d, block) < h.f); }

}  // namespace everett
