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
  return a.nonce[0] == b.nonce[0] && a.nonce[1] == b.nonce[1] && a.device == b.device && a.generator == b.generator;
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

Found Tape::replay(Entry& e, const Place& place, u8 key[32]) {
  e.replayed_at = ++clock_;
  e.replay_thread = this_thread();
  e.replay_epoch = epoch_of(e.replay_thread, ~u64(0));
  e.replay_sequence = place.sequence;
  e.replay_without_grad = !place.grad_enabled;
  memcpy(key, e.key, 32);
  return Found::replayed;
}

Found Tape::find_in_backward(const DrawName& name, const Place& place, u8 key[32]) {
  u32 newest = next_of(name, heads_[bucket(name)]);
  if (newest == kNone) return unknown(place);

  if (place.node == Place::kNoNode) {  // a callback, a hook of a leaf, or an engine that names no node
    if (at(newest).step == step_) return replay(at(newest), place, key);
    if (!place.grad_enabled) return Found::nothing;
    return next_of(name, at(newest).older) == kNone ? replay(at(newest), place, key) : Found::ambiguous;
  }

  u32 drawn = kNone;   // the entry whose forward lies in the node's window
  u32 again = kNone;   // the entry replayed last among those replayed in the node's window, before the node was made
  u32 maybe = kNone;   // an entry replayed in the node's window, perhaps after the node was made
  int maybes = 0;
  for (u32 s = newest; s != kNone; s = next_of(name, at(s).older)) {
    const Entry& e = at(s);
    if (epoch_of(e.thread, place.node) == e.epoch) {
      if (drawn != kNone) return Found::ambiguous;
      drawn = s;
    } else if (e.replayed_at && epoch_of(e.replay_thread, place.node) == e.replay_epoch) {
      if (place.node >= e.replay_sequence && (again == kNone || at(again).replayed_at < e.replayed_at)) again = s;
      maybe = s;
      maybes++;
    }
  }
  if (drawn == kNone) {
    if (again != kNone) return replay(at(again), place, key);
    if (maybes == 1) return replay(at(maybe), place, key);
    if (maybes) return Found::ambiguous;
    // No recomputation of anything on the tape. What may be new still obeys law 1.
    if (unknown(place) == Found::miss || at(newest).step != step_) return unknown(place);
    memcpy(key, at(newest).key, 32);
    return Found::reused;
  }
  // The forward of `drawn` was over when `again` was replayed, so a node made after that replay comes from a
  // recomputation, not from that forward.
  if (again != kNone && at(again).replayed_at > at(drawn).drawn_at) return replay(at(again), place, key);
  // A reentrant checkpoint takes its sequence number right before it draws, with gradients off. The last node of a
  // forward can have that number too when a no_grad recomputation follows: then nothing tells them apart.
  for (u32 s = newest; s != kNone; s = next_of(name, at(s).older)) {
    const Entry& e = at(s);
    if (s != drawn && e.replayed_at > at(drawn).drawn_at && e.replay_without_grad && place.node + 1 == e.replay_sequence)
      return Found::ambiguous;
  }
  return replay(at(drawn), place, key);
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

void Tape::record(const DrawName& name, const u8 key[32]) {
  if (entries() == capacity_) evict_oldest();
  u32 slot = u32(recorded_ % capacity_);
  if (slot / kChunk == chunks_.size())
    chunks_.push_back(std::make_unique<SecretPages>(std::min<size_t>(kChunk, capacity_) * sizeof(Entry)));
  u32& head = heads_[bucket(name)];
  Entry& e = at(slot);
  memcpy(e.key, key, 32);
  e.name = name;
  e.step = step_;
  e.drawn_at = ++clock_;
  e.replayed_at = 0;
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
