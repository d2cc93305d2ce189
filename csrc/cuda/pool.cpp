// Slabs between staging, side stream and the streams of ops; see pool.h for the order of things.
#include "cuda/pool.h"

namespace everett {

Pool::Pool(int device, u64 slab_words, int slabs)
    : memory_(device, (size_t)slabs * slab_words * sizeof(u64)), slab_words_(slab_words) {
  DeviceGuard guard(device);
  for (int i = 0; i < slabs; i++) {
    slabs_.push_back(std::make_unique<Slab>(device, slab_words * sizeof(u64)));
    slabs_.back()->words = reinterpret_cast<u64*>(memory_.data()) + (size_t)i * slab_words;
    empty_.push_back(i);
  }
  // Non-blocking: the legacy default stream, where torch's work usually runs, would otherwise wait for every copy.
  check(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "making the stream that copies bits");
}

Pool::~Pool() {
  if (!memory_.forked()) cudaStreamDestroy(side_);
}

u8* Pool::open() {
  if (empty_.empty()) return nullptr;
  opened_ = empty_.front();
  return slabs_[(size_t)opened_]->staging.open();
}

void Pool::submit(u64 words) {
  Slab& slab = *slabs_[(size_t)opened_];
  if (words == 0 || words > slab_words_) throw std::invalid_argument("a slab takes from 1 to slab_words words");
  DeviceGuard guard(memory_.device());
  try {
    slab.staging.copy(0, slab.words, words * sizeof(u64), side_);
    slab.staging.seal(side_);
  } catch (...) {
    slab.staging.drop();
    cudaMemsetAsync(slab.words, 0, words * sizeof(u64), side_);  // part of them may be on their way
    throw;
  }
  slab.filled = words, slab.taken = 0;
  empty_.pop_front();
  ready_.push_back(opened_);
}

// The event behind the last op of `stream` on the slab.
Event& Pool::reader(Slab& slab, cudaStream_t stream) {
  for (auto& [known, event] : slab.readers)
    if (known == stream) return *event;
  slab.readers.emplace_back(stream, std::make_unique<Event>(memory_.device()));
  return *slab.readers.back().second;
}

// Zeroes the slab behind its readers; its next copy comes after that on the same stream.
void Pool::retire(int i) {
  Slab& slab = *slabs_[(size_t)i];
  for (auto& [stream, event] : slab.readers) event->wait_in(side_);
  slab.readers.clear();
  check(cudaMemsetAsync(slab.words, 0, slab_words_ * sizeof(u64), side_), "zeroing used bits");
  ready_.erase(std::find(ready_.begin(), ready_.end(), i));
  empty_.push_back(i);
}

u64 Pool::ready() const {
  u64 n = 0;
  for (int i : ready_) n += slabs_[(size_t)i]->filled - slabs_[(size_t)i]->taken;
  return n;
}

void Pool::reap() {
  for (auto& slab : slabs_) slab->staging.reap();
}

void Pool::destroy() {
  if (memory_.forked()) return;
  DeviceGuard guard(memory_.device());
  for (auto& slab : slabs_) slab->staging.drop();
  while (!ready_.empty()) retire(ready_.front());
}

bool Pool::all_zero() {
  DeviceGuard guard(memory_.device());
  check(cudaStreamSynchronize(side_), "waiting for the GPU");
  std::vector<u64> words(memory_.bytes() / sizeof(u64));
  check(cudaMemcpyAsync(words.data(), memory_.data(), memory_.bytes(), cudaMemcpyDeviceToHost, side_), "reading back bits");
  check(cudaStreamSynchronize(side_), "reading back bits");
  bool zero = std::all_of(words.begin(), words.end(), [](u64 w) { return w == 0; });
  for (auto& slab : slabs_) zero &= slab->staging.all_zero();
  return zero;
}

}  // namespace everett
