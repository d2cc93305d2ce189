// Noise onto the elements of a tensor: x + sigma * normal, and stochastic rounding.
#pragma once

#include <algorithm>

#include "cpu/fill.h"
#include "law/rounding.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

// y = x + sigma * n in fp32, the product rounded before the sum, then rounded once to the type. n is the fp32 normal.
template <class Type>
static void add_noise(const PerturbJob& job, i64 begin, i64 end) {
  using T = typename Type::T;
  FillJob normals{};
  normals.kind = Fill::normal;
  normals.type = DType::f32;
  normals.generator = job.generator;
  normals.stream = job.stream;
  Values values(normals);
  const F sigma = splat((float)job.sigma, F{});
  alignas(64) float noise[kGroupWords];
  while (begin < end) {
    const i64 n = std::min<i64>(end - begin, kGroupWords);
    values.write(job.e0 + (u64)begin, n, (u8*)noise);
    const T* in = (const T*)job.in + begin;
    T* out = (T*)job.out + begin;
    i64 i = 0;
    for (; i + kLanes <= n; i += kLanes) Type::store(out + i, Type::load(in + i) + sigma * Fp32::load(noise + i));
    if (i < n) {
      T x[kLanes] = {}, y[kLanes];
      float rest[kLanes] = {};
      memcpy(x, in + i, (n - i) * sizeof(T));
      memcpy(rest, noise + i, (n - i) * sizeof(float));
      Type::store(y, Type::load(x) + sigma * Fp32::load(rest));
      memcpy(out + i, y, (n - i) * sizeof(T));
    }
    begin += n;
  }
}

// fp32 to bf16 or fp16 by the 16-bit draw of each element.
static void stochastic_round(const PerturbJob& job, i64 begin, i64 end) {
  const GenerateGroup generate = generator_of(job.generator);
  alignas(64) u32 words[kGroupWords];
  const u16* draws = (const u16*)words;
  u64 group = ~0ull;
  while (begin < end) {
    const u64 e = job.e0 + (u64)begin;
    const i64 at = (i64)(e % (2 * kGroupWords)), n = std::min<i64>(end - begin, 2 * kGroupWords - at);
    if (e / (2 * kGroupWords) != group) {
      U x[16];
      group = e / (2 * kGroupWords);
      generate(job.stream, group, x);
      store_in_stream_order<16>(x, words);
    }
    const u32* in = (const u32*)job.in + begin;
    u16* out = (u16*)job.out + begin;
    i64 i = 0;
    if (job.type == DType::bf16) {
      for (; i + kLanes <= n; i += kLanes) {
        HalfU narrow;
        memcpy(&narrow, draws + at + i, sizeof narrow);
        narrow = __builtin_convertvector(bf16_stochastic<U>(load(in + i), __builtin_convertvector(narrow, U)), HalfU);
        memcpy(out + i, &narrow, sizeof narrow);
      }
      for (; i < n; i++) out[i] = (u16)bf16_stochastic<u32>(in[i], draws[at + i]);
    }
    for (; i < n; i++) out[i] = (u16)f16_stochastic(in[i], draws[at + i]);
    begin += n;
  }
}

static void perturb(const PerturbJob& job, i64 begin, i64 end) {
  if (job.op == PerturbOp::stochastic_round) return stochastic_round(job, begin, end);
  switch (job.type) {
    case DType::bf16: return add_noise<Bf16>(job, begin, end);
    case DType::f16: return add_noise<Fp16>(job, begin, end);
    default: return add_noise<Fp32>(job, begin, end);
  }
}

}  // namespace
}  // namespace everett
