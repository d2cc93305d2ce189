// Words into values on the host: the law's conversions over whole arrays, for bits that were not made by a kernel
// (direct quantum bits), and for tests.
#pragma once

#include "law/direct.h"

namespace everett {

constexpr int bytes_of(ValueType t) { return t == ValueType::f64 ? 8 : t == ValueType::f32 ? 4 : 2; }

// 32-bit words that values [0, n) take. Normals come in pairs: an odd n takes the words of the whole last pair.
u64 words_for(Conversion kind, ValueType type, u64 n);

// Values [0, n) of the law's formulas into out (of `type`; bf16 and fp16 as patterns).
void convert_words(Conversion kind, ValueType type, const u32* words, u64 n, void* out);

// out[i] = 64-bit draw i < round(p[i] * 2^64), as 0 or 1. Every p must be in [0,1]; returns the index of the first that
// is not (NaN included) and writes nothing then, or n.
u64 bernoulli_words(const u32* words, const double* p, u64 n, u8* out);

}  // namespace everett
