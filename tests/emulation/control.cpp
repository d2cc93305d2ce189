// C functions by which tests look at the emulated runtime and make its next launch fail.
#include "cuda_runtime.h"

extern "C" {
__attribute__((visibility("default"))) void emulation_fail_next_launch(int error) {
  emulation::state.next_launch = static_cast<cudaError_t>(error);
}
__attribute__((visibility("default"))) void emulation_set_devices(int n) { emulation::state.devices = n; }
__attribute__((visibility("default"))) int emulation_current_device() { return emulation::state.device; }
__attribute__((visibility("default"))) int emulation_launches() { return emulation::state.launches; }
__attribute__((visibility("default"))) int emulation_last_launch_device() { return emulation::state.last_launch_device; }
__attribute__((visibility("default"))) uint64_t emulation_last_launch_stream() {
  return reinterpret_cast<uint64_t>(emulation::state.last_launch_stream);
}
}
