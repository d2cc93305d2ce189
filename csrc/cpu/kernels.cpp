// Picks the instruction set once, and shares a job's elements among threads.
#include "cpu/kernels.h"

#include <stdlib.h>
#include <string.h>

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

template <class Job, void (*Kernels::*Run)(const Job&, i64, i64)>
void share(const Job& job, int threads) {
  struct Context {
    Job job;
    const Kernels* kernels;
  } context{job, current().load(std::memory_order_relaxed)};
  context.job.layout = coalesced(job.layout);
  parallel_for(
      elements(context.job.layout), kGrain, threads,
      [](void* c, i64 begin, i64 end) {
        const Context* context = static_cast<const Context*>(c);
        (context->kernels->*Run)(context->job, begin, end);
      },
      &context);
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

void run_masked(const MaskedJob& job, int threads) { share<MaskedJob, &Kernels::masked>(job, threads); }
void run_fill(const FillJob& job, int threads) { share<FillJob, &Kernels::fill>(job, threads); }

}  // namespace everett
