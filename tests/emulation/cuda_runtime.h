// Stands in for CUDA's cuda_runtime.h where g++ compiles csrc/cuda: the kernels run on the CPU and device memory is host
// memory. Work runs at once and in order, or as streams.h says. Two devices, so that a wrong one is noticed.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>
#include <tuple>
#include <type_traits>

#include "streams.h"
#include "warps.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

// ---- vectors and instructions ---------------------------------------------------------------------------------------

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  const T before = *p;
  if (before == expected) *p = value;
  return before;
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
}

// ---- runtime --------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorLaunchFailure = 719,
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
constexpr unsigned cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1, cudaHostRegisterDefault = 0;

namespace emulation {

// What tests look at and set (through the C functions in control.cpp).
struct State {
  int device = 0, devices = 2;
  int launches = 0;
  int last_launch_device = -1;
  cudaStream_t last_launch_stream = nullptr;
  cudaError_t next_launch = cudaSuccess;  // what the next launch returns instead of running
  std::map<std::string, cudaError_t> next;  // likewise for the next call of the function of this name
  size_t pinned = 0;                       // pieces of memory that are registered
};
inline State state;

inline cudaError_t failure(const char* function) {
  const auto found = state.next.find(function);
  if (found == state.next.end()) return cudaSuccess;
  const cudaError_t error = found->second;
  state.next.erase(found);
  return error;
}
#define EMULATION_MAY_FAIL \
  if (const cudaError_t error = emulation::failure(__func__)) return error

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return "invalid argument";
  }
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = emulation::state.devices;
  return *n ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::state.device;
  return emulation::state.devices ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::state.devices) return cudaErrorInvalidDevice;
  emulation::state.device = device;
  return cudaSuccess;
}
// 2 and 3 multiprocessors: few, so that small tests have more tiles than warps.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 2 + device;
  return cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

inline cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) {
  *p = malloc(bytes);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
template <class T>
cudaError_t cudaMallocAsync(T** p, size_t bytes, cudaStream_t stream) {
  return cudaMallocAsync((void**)p, bytes, stream);
}
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  emulation::streams.add(stream, [p] { free(p); });
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  EMULATION_MAY_FAIL;
  return cudaMallocAsync(p, bytes, nullptr);
}
inline cudaError_t cudaFree(void* p) {
  emulation::streams.finish_all();
  free(p);
  return cudaSuccess;
}
inline cudaError_t cudaHostRegister(void*, size_t, unsigned) {
  EMULATION_MAY_FAIL;
  emulation::state.pinned++;
  return cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void*) {
  emulation::state.pinned--;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream = nullptr) {
  EMULATION_MAY_FAIL;
  emulation::streams.add(stream, [=] { memcpy(to, from, bytes); });
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream = nullptr) {
  EMULATION_MAY_FAIL;
  emulation::streams.add(stream, [=] { memset(to, byte, bytes); });
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int byte, size_t bytes) { return cudaMemsetAsync(to, byte, bytes); }

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static uintptr_t made = 0x1000;  // above the small numbers that tests take for streams of their own
  *stream = reinterpret_cast<cudaStream_t>(made++);
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  emulation::streams.finish(stream);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  emulation::streams.finish_all();
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  emulation::streams.wait(stream, event);
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id) {
  *id = emulation::streams.capture_of(stream);
  *status = *id ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode now = cudaStreamCaptureModeGlobal;
  std::swap(now, *mode);
  return cudaSuccess;
}

// Events outlive their destruction, as in CUDA: work that is queued may still name them.
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  static std::deque<CUevent_st> events;
  events.emplace_back();
  events.back().device = emulation::state.device;
  *event = &events.back();
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
// Streams have no device here, so a record counts as one on the current device.
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  EMULATION_MAY_FAIL;
  if (event->device != emulation::state.device) return cudaErrorInvalidResourceHandle;
  emulation::streams.record(stream, event);
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->done >= event->recorded ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  emulation::streams.finish(event);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(std::decay_t<Parameters>) + ... + 0) <= 4096, "a kernel's parameters take at most 4096 bytes");
  emulation::State& s = emulation::state;
  if (s.next_launch != cudaSuccess) {
    const cudaError_t error = s.next_launch;
    s.next_launch = cudaSuccess;
    return error;
  }
  const unsigned grid = config->gridDim.x, threads = config->blockDim.x;
  if (grid == 0 || grid > 0x7FFFFFFFu || threads == 0 || threads > emulation::kMaxThreads)
    return cudaErrorInvalidConfiguration;
  s.launches++, s.last_launch_device = s.device, s.last_launch_stream = config->stream;
  emulation::streams.add(config->stream, [=, values = std::tuple<std::decay_t<Parameters>...>(arguments...)] {
    emulation::blocks.run(grid, threads, [&] { std::apply(kernel, values); });
  });
  return cudaSuccess;
}
