// Words into values on the host, one value (or pair) at a time.
#include "convert.h"

#include <type_traits>

#include "law/convert.h"
#include "law/narrow.h"

namespace everett {

namespace {

u64 draw64(const u32* words, u64 i) { return (u64)words[2 * i + 1] << 32 | words[2 * i]; }

void store(ValueType type, void* out, u64 i, float x) {
  if (type == ValueType::bf16)
    ((u16*)out)[i] = (u16)bf16_of<u32>(x);
  else if (type == ValueType::f16)
    ((u16*)out)[i] = (u16)f16_of<u32>(x);
  else
    ((float*)out)[i] = x;
}

template <bool Open>
float unit(ValueType type, u32 w) {
  auto with_bits = [&](auto bits) {
    return Open ? unit_open_closed<decltype(bits)::value>(w) : unit_closed_open<decltype(bits)::value>(w);
  };
  if (type == ValueType::bf16) return with_bits(std::integral_constant<int, kUniformBitsBf16>{});
  if (type == ValueType::f16) return with_bits(std::integral_constant<int, kUniformBitsF16>{});
  return with_bits(std::integral_constant<int, kUniformBitsF32>{});
}

void convert_f64(Conversion kind, const u32* words, u64 n, double* out) {
  for (u64 i = 0; i < n; i++) {
    switch (kind) {
      case Conversion::uniform: out[i] = unit_closed_open_f64(draw64(words, i)); break;
      case Conversion::uniform_open: out[i] = unit_open_closed_f64(draw64(words, i)); break;
      case Conversion::exponential: out[i] = exponential_f64(draw64(words, i)); break;
      case Conversion::gumbel: out[i] = gumbel_f64(draw64(words, i)); break;
      case Conversion::normal: {
        double odd;
        normal_pair_f64(draw64(words, i), draw64(words, i + 1), out[i], odd);
        if (++i < n) out[i] = odd;
      }
    }
  }
}

}  // namespace

u64 words_for(Conversion kind, ValueType type, u64 n) {
  const u64 draws = kind == Conversion::normal ? n + (n & 1) : n;
  const bool wide = type == ValueType::f64 || kind == Conversion::exponential || kind == Conversion::gumbel;
  return wide ? 2 * draws : draws;
}

void convert_words(Conversion kind, ValueType type, const u32* words, u64 n, void* out) {
  if (type == ValueType::f64) return convert_f64(kind, words, n, (double*)out);
  for (u64 i = 0; i < n; i++) {
    switch (kind) {
      case Conversion::uniform: store(type, out, i, unit<false>(type, words[i])); break;
      case Conversion::uniform_open: store(type, out, i, unit<true>(type, words[i])); break;
      case Conversion::gumbel: store(type, out, i, gumbel(words[2 * i], words[2 * i + 1])); break;
      case Conversion::exponential: {
        const float x = exponential(words[2 * i], words[2 * i + 1]);
        store(type, out, i, type == ValueType::f16 ? above_zero_f16(x) : x);
        break;
      }
      case Conversion::normal: {
        float even, odd;
        normal_pair(words[i], words[i + 1], even, odd);
        store(type, out, i, even);
        if (++i < n) store(type, out, i, odd);
      }
    }
  }
}

u64 bernoulli_words(const u32* words, const double* p, u64 n, u8* out) {
  for (u64 i = 0; i < n; i++)
    if (!(p[i] >= 0.0 && p[i] <= 1.0)) return i;
  for (u64 i = 0; i < n; i++) out[i] = bernoulli(draw64(words, i), p[i]);
  return n;
}

}  // namespace everett
