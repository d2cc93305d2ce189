// The CPU kernels: what a job is, and the entry points that pick an instruction set and share the work among threads.
#pragma once

#include "cpu/layout.h"
#include "law/keepdrop.h"
#include "law/stream.h"

namespace everett {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, u32 = 4 };

constexpr int bytes_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 || t == DType::u32 ? 4 : 2; }

// out = keep ? in * scale : 0                   (dropout)
// out = (keep ? in * scale : 0) + extra         (dropout_add, one rounding at the end)
// out = keep ? in * scale + shift : dropped     (affine: alpha dropout)
enum class MaskedOp : int { dropout = 0, dropout_add = 1, affine = 2 };

struct MaskedJob {
  MaskedOp op;
  DType type;
  Generator generator;
  Stream stream;
  Threshold threshold;
  double scale, shift, dropped;  // rounded to fp32 for all types but fp64
  const void* in;
  const void* extra;
  void* out;
  Layout layout;
};

enum class Fill : int { words = 0, uniform = 1, normal = 2, exponential = 3, gumbel = 4, bernoulli = 5 };

struct FillJob {
  Fill kind;
  DType type;
  Generator generator;
  Stream stream;
  const double* p;  // bernoulli: one probability an element, at layout.in
  void* out;
  Layout layout;
};

// Contiguous rows of `columns` elements: v = in + bias (one row of it, or null), and then
//   bias_dropout_add     out = (keep ? v * scale : 0) + extra
//   gelu_erf, gelu_tanh  out = keep ? gelu(v) * scale : 0
//   ..._backward         out = keep ? extra * scale * gelu'(v) : 0, extra being the incoming gradient
// all in fp32 (so fp64 is not served), rounded once.
enum class FusedOp : int {
  bias_dropout_add = 0, gelu_erf = 1, gelu_tanh = 2, gelu_erf_backward = 3, gelu_tanh_backward = 4
};

struct FusedJob : MaskedJob {  // layout: one dimension, all elements
  FusedOp fused;
  const void* bias;
  i64 columns;
};

// Contiguous: out = in + sigma * normal, or fp32 `in` rounded stochastically to `type`.
enum class PerturbOp : int { add_noise = 0, stochastic_round = 1 };

struct PerturbJob {
  PerturbOp op;
  DType type;
  Generator generator;
  Stream stream;
  double sigma;
  const void* in;
  void* out;
  i64 n;
  u64 e0;
};

// Below this many elements a kernel ends sooner than another thread could take Python's GIL.
constexpr i64 kReleaseGil = 1 << 14;

// Runs the job on up to `threads` threads. The bits depend on neither the threads nor the instruction set.
void run_masked(const MaskedJob& job, int threads);
void run_fill(const FillJob& job, int threads);
void run_fused(const FusedJob& job, int threads);
void run_perturb(const PerturbJob& job, int threads);

// The instruction sets this CPU can run, best first, and the one in use ("avx512", "avx2", "portable").
const char* instruction_set();
bool use_instruction_set(const char* name);  // false: unknown, or this CPU lacks it
int available_instruction_sets(const char* names[3]);

// One instruction set's kernels: elements [begin, end) of a job, on the calling thread.
struct Kernels {
  const char* name;
  void (*masked)(const MaskedJob&, i64 begin, i64 end);
  void (*fill)(const FillJob&, i64 begin, i64 end);
  void (*fused)(const FusedJob&, i64 begin, i64 end);
  void (*perturb)(const PerturbJob&, i64 begin, i64 end);
};
extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace everett
