// Launching kernels: the error that names the kernel, the device guard, and how many blocks a GPU holds at once.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace everett {

// Throws std::runtime_error with CUDA's own words. `what` names the kernel or the call. CUDA also keeps the error for
// whoever asks for its last one: that is taken back, or torch would report it at its next launch.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// kernel<<<grid, threads, 0, stream>>>(arguments...). A failure of earlier work on the device may surface here too.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned grid, unsigned threads, cudaStream_t stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

// Makes `device` current, and the one before it again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (device == before_) return;
    check(cudaSetDevice(device), "choosing the device");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// How many blocks of `Kernel` run at the same time on the current device: more would only queue. Asked once for each
// device, since the answer takes microseconds.
template <auto* Kernel>
unsigned resident_blocks(int threads) {
  constexpr int kDevices = 64;
  static std::atomic<unsigned> known[kDevices];
  int device;
  check(cudaGetDevice(&device), "asking for the current device");
  if (device < kDevices)
    if (const unsigned blocks = known[device].load(std::memory_order_relaxed)) return blocks;
  int per_processor, processors;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, Kernel, threads, 0), "asking for the occupancy");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking for the multiprocessors");
  const unsigned blocks = (unsigned)(per_processor * processors);
  if (device < kDevices) known[device].store(blocks, std::memory_order_relaxed);
  return blocks;
}

}  // namespace everett
