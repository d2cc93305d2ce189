// C functions by which tests look at the emulated runtime, make its calls fail, and let its work go or wait.
#include "cuda_runtime.h"

#define EMULATION_API __attribute__((visibility("default")))

namespace {
std::string error;  // of the last call, empty: none

// Exceptions must not reach ctypes.
template <class F>
void guarded(F f) {
  error.clear();
  try {
    f();
  } catch (const std::exception& e) {
    error = e.what();
  }
}

std::vector<emulation::Streams::Graph> graphs;
cudaStream_t stream_of(uint64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }
}  // namespace

extern "C" {
EMULATION_API void emulation_fail_next_launch(int error) { emulation::state.next_launch = static_cast<cudaError_t>(error); }
EMULATION_API void emulation_fail_next(const char* function, int error) {
  emulation::state.next[function] = static_cast<cudaError_t>(error);
}
EMULATION_API void emulation_set_devices(int n) { emulation::state.devices = n; }
EMULATION_API int emulation_current_device() { return emulation::state.device; }
EMULATION_API int emulation_launches() { return emulation::state.launches; }
EMULATION_API int emulation_last_launch_device() { return emulation::state.last_launch_device; }
EMULATION_API uint64_t emulation_last_launch_stream() {
  return reinterpret_cast<uint64_t>(emulation::state.last_launch_stream);
}
EMULATION_API int emulation_pinned() { return (int)emulation::state.pinned; }

EMULATION_API void emulation_defer(int deferred) {
  if (!deferred) emulation::streams.finish_all();
  emulation::streams.deferred = deferred;
}
EMULATION_API void emulation_run(unsigned seed, int steps) {
  guarded([&] { emulation::streams.run(seed, steps); });
}
EMULATION_API int emulation_pending() { return (int)emulation::streams.pending(); }
EMULATION_API void emulation_finish(uint64_t stream) {
  guarded([&] { emulation::streams.finish(stream_of(stream)); });
}
EMULATION_API void emulation_begin_capture(uint64_t stream) { emulation::streams.begin_capture(stream_of(stream)); }
EMULATION_API int emulation_end_capture() {
  graphs.push_back(emulation::streams.end_capture());
  return (int)graphs.size() - 1;
}
EMULATION_API void emulation_replay(int graph, uint64_t stream) {
  guarded([&] { emulation::streams.replay(graphs.at((size_t)graph), stream_of(stream)); });
}
EMULATION_API const char* emulation_error() { return error.c_str(); }
}
