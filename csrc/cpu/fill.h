// Fills: a tensor of uint32 words, uniforms, normals, exponentials, Gumbels, Bernoulli decisions, integers or gamma variates
// from a stream.
#pragma once

#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/values.h"
#include "law/convert.h"
#include "law/gamma.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

// How many 32-bit words a value of this kind and type takes from the keystream (a normal: its half of a pair).
constexpr int words_per_value(Fill kind, DType type) {
  if (kind >= Fill::exponential) return 2;
  return type == DType::f64 ? 2 : 1;
}

// The values of one group in stream order, fp32 (or words): kGroupWords of them, half as many from 64-bit draws.
void fp32_group(Fill kind, DType type, U x[16], u32* out) {
  switch (kind) {
    case Fill::uniform:
      for (int j = 0; j < 16; j++) {
        const F unit = type == DType::bf16  ? unit_closed_open<kUniformBitsBf16>(x[j])
                       : type == DType::f16 ? unit_closed_open<kUniformBitsF16>(x[j])
                                            : unit_closed_open<kUniformBitsF32>(x[j]);
        x[j] = as_u32(unit);
      }
      break;
    case Fill::normal:
      for (int j = 0; j < 16; j += 2) {
        F even, odd;
        normal_pair(x[j], x[j + 1], even, odd);
        x[j] = as_u32(even), x[j + 1] = as_u32(odd);
      }
      break;
    case Fill::exponential:
    case Fill::gumbel:
      for (int j = 0; j < 8; j++) {
        F value = kind == Fill::exponential ? exponential(x[2 * j], x[2 * j + 1]) : gumbel(x[2 * j], x[2 * j + 1]);
        if (kind == Fill::exponential && type == DType::f16) value = above_zero_f16(value);
        x[j] = as_u32(value);
      }
      return store_in_stream_order<8>(x, out);
    default: break;  // words
  }
  store_in_stream_order<16>(x, out);
}

// fp64 values of one group, from 64-bit draws; scalar, since nobody waits for fp64 noise.
void fp64_group(Fill kind, const U x[16], double* out) {
  alignas(64) u32 words[kGroupWords];
  store_in_stream_order<16>(x, words);
  u64 draws[kGroupWords / 2];
  memcpy(draws, words, sizeof draws);
  for (int i = 0; i < kGroupWords / 2; i++) {
    if (kind == Fill::uniform) out[i] = unit_closed_open_f64(draws[i]);
    if (kind == Fill::exponential) out[i] = exponential_f64(draws[i]);
    if (kind == Fill::gumbel) out[i] = gumbel_f64(draws[i]);
    if (kind == Fill::normal && i % 2 == 0) normal_pair_f64(draws[i], draws[i + 1], out[i], out[i + 1]);
  }
}

// Stores fp32 values as the tensor's type.
void store_as(DType type, const u32* values, void* out, i64 n) {
  if (type == DType::f32 || type == DType::u32) {
    memcpy(out, values, n * 4);
    return;
  }
  u16* halves = (u16*)out;
  i64 i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F x = as_f32(load(values + i));
    type == DType::bf16 ? Bf16::store(halves + i, x) : Fp16::store(halves + i, x);
  }
  if (i < n) {
    u32 rest[kLanes] = {};
    u16 rounded[kLanes];
    memcpy(rest, values + i, (n - i) * 4);
    type == DType::bf16 ? Bf16::store(rounded, as_f32(load(rest))) : Fp16::store(rounded, as_f32(load(rest)));
    memcpy(halves + i, rounded, (n - i) * 2);
  }
}

// The values of a job by logical index, with the group made last kept for the next run.
class Values {
 public:
  explicit Values(const FillJob& job)
      : job_(job),
        generate_(generator_of(job.generator)),
        per_group_(kGroupWords / words_per_value(job.kind, job.type)),
        bytes_(bytes_of(job.type)) {}

  // Values e, e+1, ... into contiguous memory.
  void write(u64 e, i64 n, u8* out) {
    while (n > 0) {
      const i64 at = (i64)(e % per_group_);
      if (at == 0 && n >= per_group_ && (job_.type == DType::f32 || job_.type == DType::u32)) {
        // A whole group of the keystream goes straight to its place.
        U x[16];
        generate_(job_.stream, e / per_group_, x);
        fp32_group(job_.kind, job_.type, x, (u32*)out);
        e += per_group_, n -= per_group_, out += per_group_ * 4;
        continue;
      }
      i64 now = per_group_ - at < n ? per_group_ - at : n;
      make(e / per_group_);
      memcpy(out, values_ + at * bytes_, now * bytes_);
      e += now, n -= now, out += now * bytes_;
    }
  }

  // The 64-bit draw e, for decisions that need it raw.
  u64 draw64(u64 e) {
    if (e / per_group_ != group_) {
      U x[16];
      generate_(job_.stream, e / per_group_, x);
      store_in_stream_order<16>(x, (u32*)values_);
      group_ = e / per_group_;
    }
    u64 draw;
    memcpy(&draw, values_ + (e % per_group_) * 8, 8);
    return draw;
  }

 private:
  void make(u64 group) {
    if (group == group_) return;
    U x[16];
    generate_(job_.stream, group, x);
    if (job_.type == DType::f64) {
      fp64_group(job_.kind, x, (double*)values_);
    } else {
      alignas(64) u32 fp32[kGroupWords];
      fp32_group(job_.kind, job_.type, x, fp32);
      store_as(job_.type, fp32, values_, per_group_);
    }
    group_ = group;
  }

  const FillJob& job_;
  GenerateGroup generate_;
  i64 per_group_;
  int bytes_;
  u64 group_ = ~0ull;
  alignas(64) u8 values_[kGroupWords * 4];
};

void store_one_or_zero(DType type, void* out, i64 i, bool one) {
  switch (type) {
    case DType::f64: ((double*)out)[i] = one; break;
    case DType::bf16: ((u16*)out)[i] = one ? 0x3F80 : 0; break;
    case DType::f16: ((u16*)out)[i] = one ? 0x3C00 : 0; break;
    default: ((float*)out)[i] = one; break;
  }
}

template <Generator G>
double gamma_of(const FillJob& job, u64 e, double shape) {
  Stream stream = job.stream;
  return gamma_variate(shape, job.kind == Fill::log_gamma, [&](u32 round, u64 w[8]) {
    u32 x[16];
    stream.s = job.stream.s + round;
    stream_block<G>(stream, (u32)e, (u32)(e >> 32), x);
    memcpy(w, x, sizeof x);
  });
}

// Every element has blocks of its own, so these are made one by one.
double gamma_of(const FillJob& job, u64 e, double shape) {
  switch (job.generator) {
    case kChaCha12: return gamma_of<kChaCha12>(job, e, shape);
    case kChaCha20: return gamma_of<kChaCha20>(job, e, shape);
    case kPhilox: return gamma_of<kPhilox>(job, e, shape);
    default: return gamma_of<kChaCha8>(job, e, shape);
  }
}

void fill(const FillJob& job, i64 begin, i64 end) {
  Values values(job);
  const Layout& l = job.layout;
  const int last = l.dims - 1, bytes = bytes_of(job.type);
  for_runs(l, begin, end, [&](Run r) {
    if (job.kind == Fill::bernoulli) {
      for (i64 i = 0; i < r.n; i++) {
        const double p = ((const double*)job.p)[r.in + i * l.in[last]];
        store_one_or_zero(job.type, job.out, r.out + i * l.out[last], bernoulli(values.draw64(r.e + i * l.e[last]), p));
      }
    } else if (job.kind == Fill::integers) {
      for (i64 i = 0; i < r.n; i++) {
        const u64 span = ((const u64*)job.p)[r.in + i * l.in[last]];
        ((u64*)job.out)[r.out + i * l.out[last]] = integer_below(values.draw64(r.e + i * l.e[last]), span);
      }
    } else if (job.kind == Fill::gamma || job.kind == Fill::log_gamma) {
      for (i64 i = 0; i < r.n; i++) {
        const double shape = ((const double*)job.p)[r.in + i * l.in[last]];
        ((double*)job.out)[r.out + i * l.out[last]] = gamma_of(job, r.e + (u64)(i * l.e[last]), shape);
      }
    } else if (l.e[last] == 1 && l.out[last] == 1) {
      values.write(r.e, r.n, (u8*)job.out + r.out * bytes);
    } else {
      for (i64 i = 0; i < r.n; i++)
        values.write(r.e + (u64)(i * l.e[last]), 1, (u8*)job.out + (r.out + i * l.out[last]) * bytes);
    }
  });
}

}  // namespace
}  // namespace everett
