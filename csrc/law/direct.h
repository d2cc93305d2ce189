// Words that follow one another, such as conditioned bits of a source, into arrays of values: one text for the host
// (convert.cpp) and for a GPU (cuda/direct.cu). Words lie as in the keystream: a 64-bit draw is its low word, then its
// high one.
//
// A granule is the least run of values that takes whole 64-bit words: two values of 32 bits, one of 64, two fp64 normals.
#pragma once

#include "law/convert.h"
#include "law/narrow.h"

namespace everett {

enum class Conversion : int { uniform = 0, uniform_open = 1, normal = 2, exponential = 3, gumbel = 4 };
enum class ValueType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

EV_FN constexpr bool takes_64_bits(Conversion kind, ValueType type) {
  return type == ValueType::f64 || kind == Conversion::exponential || kind == Conversion::gumbel;
}
EV_FN constexpr int values_per_granule(Conversion kind, ValueType type) {
  return kind == Conversion::normal || !takes_64_bits(kind, type) ? 2 : 1;
}
EV_FN constexpr int words_per_granule(Conversion kind, ValueType type) {  // of 64 bits
  return kind == Conversion::normal && type == ValueType::f64 ? 2 : 1;
}

EV_FN void store_value(ValueType type, void* out, u64 i, float x) {
  if (type == ValueType::bf16)
    ((u16*)out)[i] = (u16)bf16_of<u32>(x);
  else if (type == ValueType::f16)
    ((u16*)out)[i] = (u16)f16_of<u32>(x);
  else
    ((float*)out)[i] = x;
}

EV_FN float unit_value(ValueType type, bool open, u32 w) {
  switch (type) {
    case ValueType::bf16:
      return open ? unit_open_closed<kUniformBitsBf16>(w) : unit_closed_open<kUniformBitsBf16>(w);
    case ValueType::f16: return open ? unit_open_closed<kUniformBitsF16>(w) : unit_closed_open<kUniformBitsF16>(w);
    default: return open ? unit_open_closed<kUniformBitsF32>(w) : unit_closed_open<kUniformBitsF32>(w);
  }
}

EV_FN u64 draw64(const u32* w) { return (u64)w[1] << 32 | w[0]; }

EV_FN void convert_granule_f64(Conversion kind, const u32* w, u64 first, u64 n, double* out) {
  switch (kind) {
    case Conversion::uniform: out[first] = unit_closed_open_f64(draw64(w)); break;
    case Conversion::uniform_open: out[first] = unit_open_closed_f64(draw64(w)); break;
    case Conversion::exponential: out[first] = exponential_f64(draw64(w)); break;
    case Conversion::gumbel: out[first] = gumbel_f64(draw64(w)); break;
    case Conversion::normal: {
      double even, odd;
      normal_pair_f64(draw64(w), draw64(w + 2), even, odd);
      out[first] = even;
      if (first + 1 < n) out[first + 1] = odd;
    }
  }
}

// The values of one granule, the first of which is number `first` of n, from its words at w. Of a last granule with one
// value instead of two, only a normal reads both words.
EV_FN void convert_granule(Conversion kind, ValueType type, const u32* w, u64 first, u64 n, void* out) {
  if (type == ValueType::f64) return convert_granule_f64(kind, w, first, n, (double*)out);
  switch (kind) {
    case Conversion::uniform:
    case Conversion::uniform_open:
      for (int j = 0; j < 2 && first + j < n; j++)
        store_value(type, out, first + j, unit_value(type, kind == Conversion::uniform_open, w[j]));
      break;
    case Conversion::gumbel: store_value(type, out, first, gumbel(w[0], w[1])); break;
    case Conversion::exponential: {
      const float x = exponential(w[0], w[1]);
      store_value(type, out, first, type == ValueType::f16 ? above_zero_f16(x) : x);
      break;
    }
    case Conversion::normal: {
      float even, odd;
      normal_pair(w[0], w[1], even, odd);
      store_value(type, out, first, even);
      if (first + 1 < n) store_value(type, out, first + 1, odd);
    }
  }
}

}  // namespace everett
