// The tape's index, its windows of sequence numbers and the choice among several entries; see tape.h for the law.
#include "tape.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace everett {
namespace {

// Numbers threads like torch's sequence numbers do: a new thread starts both anew.
u32 this_thread() {
  static std::atomic<u32> threads{0};
  thread_local u32 number = threads++;
  return number;
}

bool same(const DrawName& a, const DrawName& b) {
  return a.nonce[0] == b.nonce[0] && a.nonce[1] == b.nonce[1] && a.device == b.device && a.generator == b.generator &&
         a.family == b.family;
}

}  // namespace

Tape::Tape(size_t capacity) : capacity_(capacity) {
  if (capacity == 0 || capacity >= kNone) throw std::invalid_argument("the tape holds from 1 to 2^32 - 2 entries");
  while ((size_t(1) << bucket_bits_) < capacity) bucket_bits_++;
  heads_.assign(size_t(1) << bucket_bits_, kNone);
}

size_t Tape::bucket(const DrawName& n) const {
  // CUDA nonces (seed, offset) differ in few low bits, so the product's high bits are taken.
  u64 h = n.nonce[0] ^ (n.nonce[1] << 31 | n.nonce[1] >> 33) ^ (u64(u32(n.device)) << 32 | n.generator);
  h = (h ^ (h >> 32)) * 0x9E3779B97F4A7C15ull;
  return size_t(h >> (64 - bucket_bits_));
}

// The first entry of this name at `slot` or behind it in its chain, which runs from new to old.
u32 Tape::next_of(const DrawName& name, u32 slot) const {
  while (slot != kNone && !same(at(slot).name, name)) slot = at(slot).older;
  return slot;
}

// In which of its windows a thread made the node.
u32 Tape::epoch_of(u32 thread, u64 node) const {
  auto found = threads_.find(thread);
  if (found == threads_.end()) return 0;
  const auto& starts = found->second.starts;
  auto after = std::upper_bound(starts.begin(), starts.end(), node,
                                [](u64 n, const Windows::Start& start) { return n < start.sequence; });
  return found->second.dropped + u32(after - starts.begin());
}

Found Tape::find(const DrawName& name, const Place& place, u8 key[32]) {
  if (place.in_backward) return find_in_backward(name, place, key);
  u32 slot = next_of(name, heads_[bucket(name)]);
  if (slot == kNone || at(slot).step != step_) return Found::nothing;
  memcpy(key, at(slot).key, 32);
  return Found::reused;
}

Found Tape::unknown(const Place& place) {
  if (!place.grad_enabled) return Found::nothing;
  return place.keep_graph ? Found::unverified : Found::miss;
}

void Tape::touch(Entry& e) {
  e.touched_at = ++clock_;
  e.touched_thread = this_thread();
}

Found Tape::replay(Entry& e, u8 key[32]) {
  touch(e);
  memcpy(key, e.key, 32);
  return Found::replayed;
}

Found Tape::find_in_backward(const DrawName& name, const Place& place, u8 key[32]) {
  u32 newest = next_of(name, heads_[bucket(name)]);
  if (newest == kNone) return unknown(place);

  if (place.node == Place::kNoNode) {  // a callback, a hook of a leaf, or an engine that names no node
    if (at(newest).step == step_) return replay(at(newest), key);
    if (!place.grad_enabled) return Found::nothing;
    return next_of(name, at(newest).older) == kNone ? replay(at(newest), key) : Found::ambiguous;
  }

  u32 drawn = kNone, last = kNone;  // drawn in the node's window; touched last by this thread
  int many_drawn = 0;
  for (u32 s = newest; s != kNone; s = next_of(name, at(s).older)) {
    const Entry& e = at(s);
    if (epoch_of(e.thread, place.node) == e.epoch) drawn = s, many_drawn++;
    bool mine = e.touched_at && e.touched_thread == this_thread();
    if (mine && (last == kNone || at(last).touched_at < e.touched_at)) last = s;
  }
  if (place.nested && last != kNone) return replay(at(last), key);
  if (many_drawn == 1) return replay(at(drawn), key);
  if (many_drawn > 1) return Found::ambiguous;
  // No recomputation of anything on the tape. What may be new still obeys law 1.
  Found found = unknown(place);
  if (found == Found::miss || at(newest).step != step_) return found;
  memcpy(key, at(newest).key, 32);
  return Found::reused;
}

void Tape::evict_oldest() {
  u32 slot = u32(evicted_ % capacity_);
  Entry& e = at(slot);  // the oldest of all, so the end of its chain
  if (e.newer == kNone)
    heads_[bucket(e.name)] = kNone;
  else
    at(e.newer).older = kNone;
  wipe(&e, sizeof(Entry));
  evicted_++;
}

void Tape::record(const DrawName& name, const Place& place, const u8 key[32]) {
  if (entries() == capacity_) evict_oldest();
  u32 slot = u32(recorded_ % capacity_);
  if (slot / kChunk == chunks_.size())
    chunks_.push_back(std::make_unique<SecretPages>(std::min<size_t>(kChunk, capacity_) * sizeof(Entry)));
  u32& head = heads_[bucket(name)];
  Entry& e = at(slot);
  memcpy(e.key, key, 32);
  e.name = name;
  e.step = step_;
  e.touched_at = 0;
  if (place.in_backward) touch(e);
  e.thread = this_thread();
  auto windows = threads_.find(e.thread);
  e.epoch = 0;
  if (windows != threads_.end()) {
    e.epoch = windows->second.dropped + u32(windows->second.starts.size());
    windows->second.recorded++;
  }
  e.older = head;
  e.newer = kNone;
  if (head != kNone) at(head).newer = slot;
  head = slot;
  recorded_++;
}

void Tape::boundary(u64 sequence) {
  // A step that recorded nothing is one with the next: loops without dropout do not make windows for ever.
  if (recorded_ != recorded_before_step_) step_++;
  recorded_before_step_ = recorded_;

  auto [mine, first] = threads_.try_emplace(this_thread());
  Windows& w = mine->second;
  if (first || w.recorded != 0) w.starts.push_back({sequence, step_});
  w.recorded = 0;
  // A window that ended before the oldest entry was drawn can hold no entry any more.
  u64 oldest = entries() ? at(u32(evicted_ % capacity_)).step : step_;
  while (w.starts.size() > 1 && w.starts[1].step <= oldest) {
    w.starts.pop_front();
    w.dropped++;
  }
}

}  // namespace everett
