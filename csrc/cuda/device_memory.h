// Memory on one GPU for keys and words: zero from the start, and zeroed before it goes back.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/launch.h"
#include "secret_pages.h"

namespace everett {

class DeviceMemory {
 public:
  DeviceMemory(int device, size_t bytes) : device_(device), bytes_(bytes) {
    DeviceGuard guard(device);
    check(cudaMalloc(&data_, bytes), ("memory for bits on cuda:" + std::to_string(device)).c_str());
    check(cudaMemset(data_, 0, bytes), "zeroing memory for bits");
    check(cudaDeviceSynchronize(), "zeroing memory for bits");  // cudaMemset may return before it is done
  }
  // In a forked child CUDA does not work, and the memory is the parent's.
  ~DeviceMemory() {
    if (mark_.forked()) return;
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device_);
    cudaDeviceSynchronize();
    cudaMemset(data_, 0, bytes_);
    cudaFree(data_);
    cudaSetDevice(before);
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(data_); }
  size_t bytes() const { return bytes_; }
  int device() const { return device_; }
  bool forked() const { return mark_.forked(); }

 private:
  int device_;
  size_t bytes_;
  void* data_ = nullptr;
  ForkMark mark_;
};

}  // namespace everett
