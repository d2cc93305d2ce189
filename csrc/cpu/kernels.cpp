// Picks the instruction set once, and shares a job's elements among threads.
#include "cpu/kernels.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

#include "parallel.h"

namespace everett {
namespace {

// A share is a multiple of this many elements: whole groups for every instruction set, and no shared cache lines.
constexpr i64 kGrain = 16384;

const Kernels* const* available(int* count) {
  static const Kernels* sets[3];
  static const int n = [] {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      sets[n++] = &kAvx512;
    if (avx2) sets[n++] = &kAvx2;
#endif
    sets[n++] = &kPortable;
    return n;
  }();
  *count = n;
  return sets;
}

const Kernels* named(const char* name) {
  int n;
  const Kernels* const* sets = available(&n);
  for (int i = 0; i < n; i++)
    if (strcmp(sets[i]->name, name) == 0) return sets[i];
  return nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{[] {
    int n;
    return available(&n)[0];
  }()};
  return kernels;
}

// A fresh 64 MiB tensor is 16,384 page faults, which here take ten times as long as the dropout that fills it. Where
// the system leaves huge pages to who asks for them (`madvise`), asking makes it 32: dropout of 2^24 fp32 elements with
// its allocation fell from 56 to 14 ms on one thread, from 32 to 9 on two. Only whole huge pages inside the output are
// named, all of which the kernel is about to write; memory that is there already stays as it is.
void ask_for_huge_pages(void* out, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  if (bytes < 2 * kHuge) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(out) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out) + bytes) & ~(kHuge - 1);
  if (first < end) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a wish: may fail
#endif
}

template <class Job, void (*Kernels::*Run)(const Job&, i64, i64)>
void share(const Job& job, i64 n, bool contiguous, int threads, i64 grain = kGrain) {
  struct Context {
    const Job& job;
    const Kernels* kernels;
  } context{job, current().load(std::memory_order_relaxed)};
  if (contiguous) ask_for_huge_pages(job.out, size_t(n) * bytes_of(job.type));
  parallel_for(
      n, grain, threads,
      [](void* c, i64 begin, i64 end) {
        const Context* context = static_cast<const Context*>(c);
        (context->kernels->*Run)(context->job, begin, end);
      },
      &context);
}

template <class Job, void (*Kernels::*Run)(const Job&, i64, i64)>
void share_layout(const Job& job, int threads) {
  Job simple = job;
  simple.layout = coalesced(job.layout);
  share<Job, Run>(simple, elements(simple.layout), simple.layout.dims == 1 && simple.layout.out[0] == 1, threads);
}

}  // namespace

const char* instruction_set() { return current().load()->name; }

bool use_instruction_set(const char* name) {
  const Kernels* kernels = named(name);
  if (kernels) current() = kernels;
  return kernels != nullptr;
}

int available_instruction_sets(const char* names[3]) {
  int n;
  const Kernels* const* sets = available(&n);
  for (int i = 0; i < n; i++) names[i] = sets[i]->name;
  return n;
}

void run_masked(const MaskedJob& job, int threads) { share_layout<MaskedJob, &Kernels::masked>(job, threads); }
void run_fill(const FillJob& job, int threads) { share_layout<FillJob, &Kernels::fill>(job, threads); }
void run_fused(const FusedJob& job, int threads) {
  share<FusedJob, &Kernels::fused>(job, elements(job.layout), true, threads);
}
void run_perturb(const PerturbJob& job, int threads) {
  share<PerturbJob, &Kernels::perturb>(job, job.n, true, threads);
}
void run_attention(const AttentionJob& job, int threads) {
  const i64 grain = kGrain / (16 * job.keys) + 1;
  share<AttentionJob, &Kernels::attention>(job, job.layout.size[0] * attention_stripes_of(job), false, threads, grain);
}
void run_keep_bits(const MaskedJob& job, int threads) {
  share<MaskedJob, &Kernels::keep_bits>(job, (elements(job.layout) + 7) / 8, false, threads);
}

}  // namespace everett
