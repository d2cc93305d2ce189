// Staging: secrets on their way to a GPU. Pinned host memory that is wiped when, and only when, the copy from it is over.
//
// The pages are SecretPages (wiped in a forked child, left out of core dumps) that CUDA pins: memory from cudaHostAlloc is
// a mapping of the driver's, to which a fork does what the driver says. A wiped-on-fork page is never shared with a
// child, so pinning it has none of the hazards of copy-on-write either.
#pragma once

#include <cuda_runtime.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "secret_pages.h"

namespace everett {

// Calls such as cudaEventQuery and cudaHostRegister are refused, and spoil the capture, while any thread captures a graph
// with the default mode. They concern streams that are not captured, so this thread says that it knows.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// An event without timing. In a forked child, where CUDA does not work, it is left alone.
class Event {
 public:
  explicit Event(int device) {
    DeviceGuard guard(device);  // an event serves the streams of its own device
    check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "making an event");
  }
  ~Event() {
    if (!mark_.forked()) cudaEventDestroy(event_);
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "recording an event"); }
  void wait_in(cudaStream_t stream) const { check(cudaStreamWaitEvent(stream, event_, 0), "waiting for an event"); }
  // Whether all work before the last record is done; true before the first.
  bool done() const {
    const cudaError_t state = cudaEventQuery(event_);
    if (state != cudaErrorNotReady) check(state, "asking for an event");
    return state == cudaSuccess;
  }
  void wait() const { check(cudaEventSynchronize(event_), "waiting for an event"); }

 private:
  cudaEvent_t event_ = nullptr;
  ForkMark mark_;
};

class Staging {
 public:
  // Throws std::runtime_error where no (more) memory can be pinned.
  Staging(int device, size_t bytes) : pages_(bytes, false), over_(device) {
    DeviceGuard guard(device);
    RelaxedCapture relaxed;
    const cudaError_t error = cudaHostRegister(pages_.data(), pages_.bytes(), cudaHostRegisterDefault);
    if (error != cudaSuccess)
      throw std::runtime_error("pinning " + std::to_string(pages_.bytes()) + " bytes of host memory for copies to the GPU: " +
                               cudaGetErrorString(error) + ". Free pinned memory elsewhere (pin_memory of data loaders)");
  }
  // The last copy is waited for: what it reads must not be unmapped under it.
  ~Staging() {
    if (mark_.forked()) return;
    RelaxedCapture relaxed;
    try {
      if (used_ != 0) over_.wait();
    } catch (const std::exception&) {  // a broken context copies nothing any more
    }
    cudaHostUnregister(pages_.data());
  }

  // Memory to write secrets to, all zero; waits until the copy before is over.
  uint8_t* open() {
    RelaxedCapture relaxed;
    if (used_ != 0) over_.wait();
    clear();
    return pages_.data();
  }
  size_t bytes() const { return pages_.bytes(); }

  // Queues the copy of n bytes at `from`; `seal` must follow on the same stream once all of them are queued.
  void copy(size_t from, void* to, size_t n, cudaStream_t stream) {
    used_ = from + n > used_ ? from + n : used_;
    check(cudaMemcpyAsync(to, pages_.data() + from, n, cudaMemcpyHostToDevice, stream), "copying bits to the GPU");
  }
  void seal(cudaStream_t stream) { over_.record(stream); }
  const Event& copied() const { return over_; }

  // Wipes what was copied, if the copy is over.
  void reap() {
    RelaxedCapture relaxed;
    if (used_ != 0 && over_.done()) clear();
  }
  // Wipes at once: for bytes that shall not be used any more, whether or not a copy still reads them.
  void drop() { wipe(pages_.data(), pages_.bytes()); }
  bool all_zero() const {
    for (size_t i = 0; i < pages_.bytes(); i++)
      if (pages_.data()[i] != 0) return false;
    return true;
  }

 private:
  void clear() {
    wipe(pages_.data(), used_);
    used_ = 0;
  }

  SecretPages pages_;
  ForkMark mark_;
  Event over_;
  size_t used_ = 0;  // bytes from the start that a copy may still read, and that are not wiped yet
};

}  // namespace everett
