// The key of a GPU's graphs: 32 bytes at an address that captured kernels read at every replay. All zero means no key: the
// kernel that derives records from it then stops the GPU's work with an error (subkey.cu).
//
// A new key comes by a copy in the order of the given stream: replays queued there before see the old key, later ones the
// new. The slot lives as long as the process, because a graph may be replayed at any time.
#pragma once

#include <memory>

#include "cuda/device_memory.h"
#include "cuda/staging.h"

namespace everett {

class KeySlot {
 public:
  explicit KeySlot(int device) : memory_(device, kKey) {
    for (auto& s : staging_) s = std::make_unique<Staging>(device, kKey);
  }

  // Where to write the next key (32 bytes on the host) before `publish`, or `abandon` when there is none.
  uint8_t* open() { return staging_[turn_]->open(); }
  void abandon() { staging_[turn_]->drop(); }
  void publish(cudaStream_t stream) {
    Staging& s = *staging_[turn_];
    DeviceGuard guard(memory_.device());
    try {
      s.copy(0, memory_.data(), kKey, stream);
      s.seal(stream);
    } catch (...) {
      s.drop();
      throw;
    }
    turn_ = (turn_ + 1) % kTurns;
    reap();
  }
  // Wipes host memory whose copies are over.
  void reap() {
    for (auto& s : staging_) s->reap();
  }
  // No key from here on, at once for the host and in the order of `stream` for the GPU.
  void forget(cudaStream_t stream) {
    if (memory_.forked()) return;
    for (auto& s : staging_) s->drop();
    DeviceGuard guard(memory_.device());
    check(cudaMemsetAsync(memory_.data(), 0, kKey, stream), "zeroing the key of the GPU's graphs");
  }
  const uint8_t* data() const { return memory_.data(); }
  bool forked() const { return memory_.forked(); }
  bool staging_all_zero() const {
    for (auto& s : staging_)
      if (!s->all_zero()) return false;
    return true;
  }

 private:
  static constexpr size_t kKey = 32;
  static constexpr int kTurns = 4;  // steps that the host may be ahead of the GPU before a refresh waits for it
  DeviceMemory memory_;
  std::unique_ptr<Staging> staging_[kTurns];
  int turn_ = 0;
};

}  // namespace everett
