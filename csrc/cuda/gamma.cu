// Gamma variates: a thread an element, which draws blocks of its own until a try is taken (law/gamma.h). fp64 arithmetic and
// the blocks are all the cost; how lanes diverge hardly matters, since 95 of 100 elements need one try.
#include <stdexcept>

#include "cuda/fill.h"
#include "cuda/keystream.h"
#include "cuda/launch.h"
#include "law/gamma.h"

namespace everett {
namespace {

constexpr int kThreads = 128;

struct Parameters {
  RecordSource record;
  u32 tag, s;
  int rounds;
  bool logarithm;
  const u64* p;
  u64 p_step;
  double* out;
  u64 n, e0;
};

template <Engine E>
__global__ void __launch_bounds__(kThreads) gamma_kernel(const Parameters p) {
  const Subkey subkey = record_of(p.record);
  const u64 step = (u64)gridDim.x * kThreads;
  for (u64 i = (u64)blockIdx.x * kThreads + threadIdx.x; i < p.n; i += step) {
    const u64 e = p.e0 + i;
    p.out[i] = gamma_variate(as_f64(p.p[i * p.p_step]), p.logarithm, [&](u32 round, u64 w[8]) {
      u32 x[16];
      plain_block<E>({subkey, p.tag, p.s + round}, p.rounds, e, x);
      EV_UNROLL
      for (int j = 0; j < 8; j++) w[j] = (u64)x[2 * j + 1] << 32 | x[2 * j];
    });
  }
}

template <Engine E>
void launch_one(const FillCall& c, u64 n, u64 e0, cudaStream_t stream) {
  const u64 blocks = (n + kThreads - 1) / kThreads, resident = resident_blocks<gamma_kernel<E>>(kThreads);
  const Parameters p = {c.record, c.tag, c.s, rounds_of(c.generator), c.kind == Fill::log_gamma, c.p, c.one_p ? 0u : 1u,
                        (double*)c.out, n, e0};
  launch("gamma_kernel", gamma_kernel<E>, (unsigned)(blocks < resident ? blocks : resident), kThreads, stream, p);
}

}  // namespace

void launch_gamma(const FillCall& c, u64 n, u64 e0, cudaStream_t stream) {
  if (c.generator == kPhilox) return launch_one<Engine::philox>(c, n, e0, stream);
  launch_one<Engine::chacha>(c, n, e0, stream);
}

}  // namespace everett
