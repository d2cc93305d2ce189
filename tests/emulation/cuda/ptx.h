// The C++ twin of csrc/cuda/ptx.h: what the PTX manual says each instruction does, written without the law's own
// conversions, so that these tests hold the two against each other.
#pragma once

#include <math.h>

#include "cuda_runtime.h"
#include "law/word.h"

namespace everett {
namespace ptx {

// A format as a table of its non-negative finite values, in the order of their patterns.
template <int kExponent, int kMantissa, bool kHasInf>
struct Format {
  static constexpr int kSign = kExponent + kMantissa;
  static constexpr u32 kLargest = kHasInf ? (((1u << kExponent) - 1) << kMantissa) - 1 : (1u << kSign) - 2;
  double values[kLargest + 1];

  Format() {
    const int bias = (1 << (kExponent - 1)) - 1;
    for (u32 u = 0; u <= kLargest; u++) {
      const u32 e = u >> kMantissa, m = u & ((1u << kMantissa) - 1);
      values[u] = e ? ldexp((1u << kMantissa) + m, (int)e - bias - kMantissa) : ldexp(m, 1 - bias - kMantissa);
    }
  }

  // Nearest, ties to even; what lies beyond the largest: `beyond`, from half a step above it on.
  u32 pattern(float x, u32 nan, u32 beyond) const {
    if (isnan(x)) return nan;
    const double a = fabs((double)x);
    const u32 sign = signbit(x) ? 1u << kSign : 0;
    u32 low = 0, high = kLargest + 1;  // the last value that is at most a
    while (high - low > 1) (values[(low + high) / 2] <= a ? low : high) = (low + high) / 2;
    if (low == kLargest) return sign | (a >= values[low] + (values[low] - values[low - 1]) / 2 ? beyond : low);
    const double below = a - values[low], above = values[low + 1] - a;
    return sign | (below < above || (below == above && low % 2 == 0) ? low : low + 1);
  }

  float value(u32 pattern) const {
    const u32 u = pattern & ((1u << kSign) - 1);
    float x = NAN;
    if (u <= kLargest) x = (float)values[u];
    if (kHasInf && u == kLargest + 1) x = INFINITY;
    return pattern >> kSign & 1 ? -x : x;
  }
};

inline const Format<5, 10, true> f16;
inline const Format<4, 3, false> e4m3;
inline const Format<5, 2, true> e5m2;

}  // namespace ptx

// A GPU faults where an address is not a multiple of what is loaded or stored; so do these.
template <class T, class Address>
T* aligned(Address at) {
  if ((uintptr_t)at % sizeof(T) != 0) throw std::logic_error("a misaligned address in a kernel");
  return (T*)at;
}

inline uint4 load_streaming(const u8* at) { return *aligned<const uint4>(at); }
inline uint4 load_vector(const u8* at) { return *aligned<const uint4>(at); }
inline void store_vector(u8* at, uint4 x) { *aligned<uint4>(at) = x; }
inline void store_vector(u8* at, uint2 x) { *aligned<uint2>(at) = x; }

using Shared = uintptr_t;

inline Shared shared_address(const void* p) { return (Shared)p; }
inline void store_shared(Shared at, u32 x, u32 y, u32 z, u32 w) {
  *aligned<uint4>(at) = make_uint4(x, y, z, w);
}
inline u16 load_shared_half(Shared at) { return *aligned<const u16>(at); }
template <int Words>
void load_shared(Shared at, u32 x[Words]) {
  struct alignas(4 * Words) Vector {
    u32 x[Words];
  };
  const Vector v = *aligned<const Vector>(at);
  for (int i = 0; i < Words; i++) x[i] = v.x[i];
}
template <class T, int N>
void hide(T (&)[N], Shared, u32) {}

template <class T>
void compute_here(T&) {}

// Two fp16 comparisons, greater or equal or unordered, of magnitudes.
inline u32 at_least_15(u32 draws, u32 thresholds) {
  u32 r = 0;
  for (int half = 0; half < 32; half += 16) {
    const float draw = ptx::f16.value(draws >> half & 0x7FFFu), threshold = ptx::f16.value(thresholds >> half & 0xFFFFu);
    if (!(draw < threshold)) r |= 0xFFFFu << half;
  }
  return r;
}

inline u32 bf16_pair(float low, float high) {
  const auto one = [](float x) {
    if (isnan(x)) return 0x7FFFu;
    const u32 bits = as_u32(x), cut = bits & 0xFFFF0000u, next = cut + 0x10000u;
    const u32 left = bits & 0xFFFFu;
    return (left > 0x8000u || (left == 0x8000u && cut >> 16 & 1) ? next : cut) >> 16;
  };
  return one(low) | one(high) << 16;
}

inline u32 f16_pair(float low, float high) {
  return ptx::f16.pattern(low, 0x7FFF, 0x7C00) | ptx::f16.pattern(high, 0x7FFF, 0x7C00) << 16;
}
inline void f32_of_f16_pair(u32 pair, float& low, float& high) {
  low = ptx::f16.value(pair & 0xFFFFu), high = ptx::f16.value(pair >> 16);
}
inline u32 e4m3_pair(float low, float high) {
  return ptx::e4m3.pattern(low, 0x7F, 0x7E) | ptx::e4m3.pattern(high, 0x7F, 0x7E) << 8;
}
inline u32 e5m2_pair_finite(float low, float high) {
  return ptx::e5m2.pattern(low, 0x7F, 0x7B) | ptx::e5m2.pattern(high, 0x7F, 0x7B) << 8;
}
inline void f32_of_e4m3_pair(u32 pair, float& low, float& high) {
  low = ptx::e4m3.value(pair & 0xFFu), high = ptx::e4m3.value(pair >> 8 & 0xFFu);
}
inline void f32_of_e5m2_pair(u32 pair, float& low, float& high) {
  low = ptx::e5m2.value(pair & 0xFFu), high = ptx::e5m2.value(pair >> 8 & 0xFFu);
}

}  // namespace everett
