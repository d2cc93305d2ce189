// Element types on the device: how the masked ops read, compute and round them, one at a time and 16 bytes at a time.
//
// The arithmetic is the CPU kernels': fp32 (fp64 for fp64), a multiply and an add never contracted, one rounding at the
// end. Masks are applied to the stored patterns, so a dropped element is +0 even where it was NaN or Inf.
#pragma once

#include <stdexcept>

#include "cuda/ptx.h"
#include "law/narrow.h"
#include "types.h"

namespace everett {

// A type's words: kInWord elements in each, unpack(word, values), pack(values). stored(x), on the host: one pattern.
struct ElementF32 {
  using Stored = u32;
  using Work = float;
  using Word = u32;
  static constexpr int kInWord = 1;
  static __device__ __forceinline__ void unpack(u32 word, float x[1]) { x[0] = as_f32(word); }
  static __device__ __forceinline__ u32 pack(const float x[1]) { return as_u32(x[0]); }
  static Stored stored(float x) { return as_u32(x); }
};

struct ElementBf16 {
  using Stored = u16;
  using Work = float;
  using Word = u32;
  static constexpr int kInWord = 2;
  static __device__ __forceinline__ void unpack(u32 word, float x[2]) {
    x[0] = as_f32(word << 16), x[1] = as_f32(word & 0xFFFF0000u);
  }
  static __device__ __forceinline__ u32 pack(const float x[2]) { return bf16_pair(x[0], x[1]); }
  static Stored stored(float x) { return (u16)bf16_of<u32>(x); }
};

struct ElementF16 {
  using Stored = u16;
  using Work = float;
  using Word = u32;
  static constexpr int kInWord = 2;
  static __device__ __forceinline__ void unpack(u32 word, float x[2]) { f32_of_f16_pair(word, x[0], x[1]); }
  static __device__ __forceinline__ u32 pack(const float x[2]) { return f16_pair(x[0], x[1]); }
  static Stored stored(float x) { return (u16)f16_of<u32>(x); }
};

struct ElementE4m3 {
  using Stored = u8;
  using Work = float;
  using Word = u32;
  static constexpr int kInWord = 4;
  static __device__ __forceinline__ void unpack(u32 word, float x[4]) {
    f32_of_e4m3_pair(word & 0xFFFFu, x[0], x[1]), f32_of_e4m3_pair(word >> 16, x[2], x[3]);
  }
  static __device__ __forceinline__ u32 pack(const float x[4]) {
    return e4m3_pair(x[0], x[1]) | e4m3_pair(x[2], x[3]) << 16;
  }
  static Stored stored(float x) { return (u8)e4m3_of<u32>(x); }
};

struct ElementE5m2 {
  using Stored = u8;
  using Work = float;
  using Word = u32;
  static constexpr int kInWord = 4;
  static __device__ __forceinline__ void unpack(u32 word, float x[4]) {
    f32_of_e5m2_pair(word & 0xFFFFu, x[0], x[1]), f32_of_e5m2_pair(word >> 16, x[2], x[3]);
  }
  static __device__ __forceinline__ u32 pack(const float x[4]) {
    u32 word = e5m2_pair_finite(x[0], x[1]) | e5m2_pair_finite(x[2], x[3]) << 16;
    // Inf came out as the largest number, 0x7B, and is the pattern after it. To look for such a byte first costs 1.2
    // instructions an element, to look at each x 3.4.
    const u32 apart = (word & 0x7F7F7F7Fu) ^ 0x7B7B7B7Bu;
    if (~(apart + 0x7F7F7F7Fu) & 0x80808080u)
      for (int i = 0; i < 4; i++) word += (u32)(fabsf(x[i]) == as_f32(0x7F800000u)) << 8 * i;
    return word;
  }
  static Stored stored(float x) { return (u8)e5m2_of<u32>(x); }
};

// fp64 fills two words, so it has no place in the functions on words below.
struct ElementF64 {
  using Stored = u64;
  using Work = double;
  using Word = u64;
  static u64 stored(double x) { return as_u64(x); }
};

// What an op computes with. `dropped` (affine only): the stored pattern, repeated to fill a word.
template <class Type>
struct Factors {
  typename Type::Work scale, shift;
  typename Type::Word dropped;
};

template <class Type>
Factors<Type> factors(double scale, double shift, double dropped) {
  using Work = typename Type::Work;
  using Stored = typename Type::Stored;
  constexpr auto kEach = (typename Type::Word)~(typename Type::Word)0 / (Stored)~(Stored)0;  // 0x10001 for 16 bits
  return {(Work)scale, (Work)shift, Type::stored((Work)dropped) * kEach};
}

// Calls body(Type{}) with the element type of a number from Python.
template <class Body>
void with_element(DType type, Body body) {
  switch (type) {
    case DType::f32: return body(ElementF32{});
    case DType::f64: return body(ElementF64{});
    case DType::bf16: return body(ElementBf16{});
    case DType::f16: return body(ElementF16{});
    case DType::f8e4m3: return body(ElementE4m3{});
    case DType::f8e5m2: return body(ElementE5m2{});
    case DType::u32:
    case DType::i64: throw std::invalid_argument("integers are no type of masked ops");
  }
}

template <class Type>
constexpr int kVector = 16 / sizeof(typename Type::Stored);  // elements in 16 bytes

template <MaskedOp Op, class Type, class Work>
__device__ __forceinline__ Work masked_value(Work x, Work extra, const Factors<Type>& by) {
  const Work scaled = x * by.scale;
  return Op == MaskedOp::dropout_add ? scaled + extra : Op == MaskedOp::affine ? scaled + by.shift : scaled;
}

// One word of elements under a mask of their width.
template <class Type, MaskedOp Op>
__device__ __forceinline__ u32 masked_word(u32 word, u32 extra, u32 keep, const Factors<Type>& by) {
  float x[Type::kInWord], r[Type::kInWord];
  Type::unpack(word & keep, x);
  if constexpr (Op == MaskedOp::dropout_add) Type::unpack(extra, r);
  for (int i = 0; i < Type::kInWord; i++) x[i] = masked_value<Op>(x[i], Op == MaskedOp::dropout_add ? r[i] : 0.0f, by);
  const u32 y = Type::pack(x);
  return Op == MaskedOp::affine ? (y & keep) | (by.dropped & ~keep) : y;
}

// The mask of word i of 16 bytes of elements of at most 4 bytes, whose decisions are half-words in `halves`.
template <class Type>
__device__ __forceinline__ u32 keep_of_word(const u32 halves[kVector<Type> / 2], int i) {
  if constexpr (sizeof(typename Type::Stored) == 4) return __byte_perm(halves[i / 2], 0, i % 2 ? 0x3232 : 0x1010);
  if constexpr (sizeof(typename Type::Stored) == 2) return halves[i];
  return __byte_perm(halves[2 * i], halves[2 * i + 1], 0x6420);
}

// 16 bytes of elements, whose decisions are half-words in `halves`.
template <class Type, MaskedOp Op>
__device__ __forceinline__ void masked_vector(u32 v[4], const u32 extra[4], const u32 halves[kVector<Type> / 2],
                                              const Factors<Type>& by) {
  if constexpr (sizeof(typename Type::Stored) == 8) {
    for (int i = 0; i < 2; i++) {
      const u64 keep = (u64)(i64)(i32)__byte_perm(halves[0], 0, i ? 0x3232 : 0x1010);
      const u64 in = (u64)v[2 * i + 1] << 32 | v[2 * i], more = (u64)extra[2 * i + 1] << 32 | extra[2 * i];
      u64 y = as_u64(masked_value<Op>(as_f64(in & keep), as_f64(more), by));
      if (Op == MaskedOp::affine && keep == 0) y = by.dropped;
      v[2 * i] = (u32)y, v[2 * i + 1] = (u32)(y >> 32);
    }
  } else {
    for (int i = 0; i < 4; i++) v[i] = masked_word<Type, Op>(v[i], extra[i], keep_of_word<Type>(halves, i), by);
  }
}

// One element, as for the tails of vectors.
template <class Type, MaskedOp Op>
__device__ __forceinline__ typename Type::Stored masked_element(typename Type::Stored in, typename Type::Stored extra,
                                                                bool keep, const Factors<Type>& by) {
  if constexpr (sizeof(typename Type::Stored) == 8) {
    if (Op == MaskedOp::affine && !keep) return by.dropped;
    return as_u64(masked_value<Op>(as_f64(keep ? in : 0), as_f64(extra), by));
  } else {
    return (typename Type::Stored)masked_word<Type, Op>(in, extra, keep ? ~0u : 0u, by);
  }
}

}  // namespace everett
