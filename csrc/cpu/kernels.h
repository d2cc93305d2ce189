// The CPU kernels: what a job is, and the entry points that pick an instruction set and share the work among threads.
#pragma once

#include "law/keepdrop.h"
#include "law/stream.h"
#include "layout.h"
#include "types.h"

namespace everett {

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

struct FillJob {
  Fill kind;
  DType type;
  Generator generator;
  Stream stream;
  const void* p;  // the parameters of kinds that have one, at layout.in
  void* out;
  Layout layout;
};

struct FusedJob : MaskedJob {  // layout: one dimension, all elements
  FusedOp fused;
  const void* bias;
  i64 columns;
};

// Contiguous weights (heads, queries, keys); layout.size[0] is how many heads. Only the 15-bit form of the threshold.
struct AttentionJob : MaskedJob {
  i64 queries, keys;
  u32 bh0;      // global indices of the first weight
  u64 q0, k0;
};

// Stripes of 16 queries in each head, counted from multiples of 16.
inline i64 attention_stripes_of(const AttentionJob& job) {
  return (i64)((job.q0 + (u64)job.queries + 15) / 16 - job.q0 / 16);
}

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
void run_attention(const AttentionJob& job, int threads);
void run_keep_bits(const MaskedJob& job, int threads);  // `out` takes a bit an element; only threshold and stream count

// The instruction sets this CPU can run, best first, and the one in use ("avx512", "avx2", "portable").
const char* instruction_set();
bool use_instruction_set(const char* name);  // false: unknown, or this CPU lacks it
int available_instruction_sets(const char* names[3]);

// One instruction set's kernels: elements (keep_bits: bytes, attention: stripes) [begin, end) of a job, on the calling thread.
struct Kernels {
  const char* name;
  void (*masked)(const MaskedJob&, i64 begin, i64 end);
  void (*fill)(const FillJob&, i64 begin, i64 end);
  void (*fused)(const FusedJob&, i64 begin, i64 end);
  void (*perturb)(const PerturbJob&, i64 begin, i64 end);
  void (*keep_bits)(const MaskedJob&, i64 begin, i64 end);
  void (*attention)(const AttentionJob&, i64 begin, i64 end);
};
extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace everett
