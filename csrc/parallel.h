// Shares a range among threads: the OpenMP team that torch already runs, so that two pools never fight for the cores.
#pragma once

#include <stdint.h>

namespace everett {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn on disjoint pieces of [0, n) whose borders are multiples of `grain`, on up to `threads` threads.
// Measured on 2 cores: after an OpenMP region torch's workers spin for milliseconds, and a second pool loses up to half
// its speed to them. Without an OpenMP runtime in the process, threads are started for the call.
void parallel_for(int64_t n, int64_t grain, int threads, RangeFn fn, void* context);

// The OpenMP library in use ("" when none was found).
const char* openmp_library();

}  // namespace everett
