// Words into values on the host, one granule after the other.
#include "convert.h"

namespace everett {

u64 words_for(Conversion kind, ValueType type, u64 n) {
  const u64 draws = kind == Conversion::normal ? n + (n & 1) : n;
  return takes_64_bits(kind, type) ? 2 * draws : draws;
}

void convert_words(Conversion kind, ValueType type, const u32* words, u64 n, void* out) {
  const u64 values = (u64)values_per_granule(kind, type), step = 2 * (u64)words_per_granule(kind, type);
  for (u64 first = 0; first < n; first += values, words += step) convert_granule(kind, type, words, first, n, out);
}

u64 bernoulli_words(const u32* words, const double* p, u64 n, u8* out) {
  for (u64 i = 0; i < n; i++)
    if (!(p[i] >= 0.0 && p[i] <= 1.0)) return i;
  for (u64 i = 0; i < n; i++) out[i] = bernoulli(draw64(words + 2 * i), p[i]);
  return n;
}

}  // namespace everett
