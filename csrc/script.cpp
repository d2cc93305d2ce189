// Finds the record that a draw must equal; see script.h for the order that counts.
#include "script.h"

#include <string.h>

namespace everett {
namespace {

constexpr i64 kGraphs = -2, kGroups = -3;

i64 lane_of(const RecordHead& head) {
  if (head.type == RecordType::group) return kGroups;
  return head.family == 2 ? kGraphs : head.device;
}

bool same_draw(const RecordHead& a, const RecordHead& b) {
  return a.family == b.family && a.device == b.device && a.generator == b.generator && a.number[0] == b.number[0] &&
         a.number[1] == b.number[1];
}

}  // namespace

RecordHead Script::asked(const KeyRequest& request) {
  RecordHead head{RecordType::draw};
  head.family = request.use == KeyRequest::draw ? u8(request.name.family) : u8(1 + request.use);
  head.device = request.name.device;
  head.generator = request.name.generator;
  memcpy(head.number, request.name.nonce, 16);
  return head;
}

void Script::differ(const KeyRequest& request, std::optional<Drawn> drawn, u64 record, const RecordHead* expected) {
  Difference d;
  d.record = record;
  if (expected) d.expected = *expected;
  d.asked = asked(request);
  d.drawn_known = drawn.has_value();
  if (drawn) d.asked.drawn = u8(*drawn);
  difference_ = d;
}

void Script::differ_at_step(u64 record, const RecordHead* expected) {
  Difference d;
  d.record = record;
  if (expected) d.expected = *expected;
  d.asked_step = true;
  difference_ = d;
}

void Script::add(u64 number, const RecordHead& head, const u8* key) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (head.type == RecordType::step) {
    steps_added_++;
    if (steps_added_ <= steps_done_) {  // the program ended this step before its record was here
      seen_++;
      return;
    }
    steps_.push_back({head, number});
    return;
  }
  if (steps_added_ < steps_done_ && !difference_) differ_at_step(number, &head);
  const bool waited_for = head.type == RecordType::group && !group_keys_.empty();
  Lane brought_before;
  Entry& e = (waited_for ? brought_before : lanes_[lane_of(head)]).emplace_back();
  e.head = head;
  e.number = number;
  e.step = steps_added_;
  memset(e.key, 0, 32);
  if (head.type != RecordType::draw) memcpy(e.key, key, 32);
  if (waited_for) {
    compare_group_key(e, group_keys_.front());
    group_keys_.pop_front();
  }
}

void Script::compare_group_key(const Entry& recorded, const Entry& brought) {
  if (difference_) return;
  if (recorded.head.family == brought.head.family && memcmp(recorded.key, brought.key, 32) == 0) {
    seen_++;
    return;
  }
  Difference d;
  d.record = recorded.number;
  d.expected = recorded.head;
  d.asked = brought.head;
  difference_ = d;
}

// The lane may hold no record yet: then the key is compared when its record comes, before any draw of the next records.
void Script::group_key(Family family, const u8 key[32]) {
  std::lock_guard<std::mutex> lock(mutex_);
  Entry brought{RecordHead{RecordType::group}, 0, steps_done_, {}};
  brought.head.family = u8(family);
  memcpy(brought.key, key, 32);
  Lane& lane = lanes_[kGroups];
  if (lane.empty()) {
    group_keys_.push_back(brought);
    return;
  }
  compare_group_key(lane.front(), brought);
  lane.pop_front();
}

void Script::end(u64 number) {
  std::lock_guard<std::mutex> lock(mutex_);
  end_ = number;
  if (steps_added_ < steps_done_ && !difference_) differ_at_step(number, nullptr);
}

// The record that this draw must equal, or null and why.
Script::Entry* Script::next(const KeyRequest& request, Drawn& refusal) {
  refusal = Drawn::differs;
  if (difference_) return nullptr;
  Lane& lane = lanes_[lane_of(asked(request))];
  if (lane.empty()) {
    if (!steps_.empty())
      differ(request, {}, steps_.front().number, &steps_.front().head);  // one draw more than the step had
    else if (end_)
      differ(request, {}, *end_, nullptr);
    else
      refusal = Drawn::unscripted;
    return nullptr;
  }
  Entry& e = lane.front();
  if (e.step > steps_done_) {
    differ(request, {}, steps_.front().number, &steps_.front().head);
    return nullptr;
  }
  if (!same_draw(e.head, asked(request))) {
    differ(request, {}, e.number, &e.head);
    return nullptr;
  }
  return &e;
}

Drawn Script::give(const KeyRequest& request, u8 key[32]) {
  std::lock_guard<std::mutex> lock(mutex_);
  Drawn refusal;
  Entry* e = next(request, refusal);
  if (!e) return refusal;
  if (e->head.type != RecordType::key) {
    differ(request, Drawn::fresh, e->number, &e->head);
    return Drawn::differs;
  }
  memcpy(key, e->key, 32);
  return Drawn(e->head.drawn);
}

Drawn Script::see(const KeyRequest& request, Drawn drawn, u64, const u8[32]) {
  std::lock_guard<std::mutex> lock(mutex_);
  Drawn refusal;
  Entry* e = next(request, refusal);
  if (!e) return refusal;
  if (Drawn(e->head.drawn) != drawn) {
    differ(request, drawn, e->number, &e->head);
    return Drawn::differs;
  }
  lanes_[lane_of(e->head)].pop_front();
  seen_++;
  return drawn;
}

void Script::boundary(u64, u64) {
  std::lock_guard<std::mutex> lock(mutex_);
  steps_done_++;
  if (difference_) return;
  const Entry* skipped = nullptr;
  for (auto& [_, lane] : lanes_)
    if (!lane.empty() && lane.front().step < steps_done_ && (!skipped || lane.front().number < skipped->number))
      skipped = &lane.front();
  if (skipped) {
    differ_at_step(skipped->number, &skipped->head);
    return;
  }
  if (!steps_.empty()) {
    steps_.pop_front();
    seen_++;
  } else if (end_) {
    differ_at_step(*end_, nullptr);
  }
}

std::optional<Script::Difference> Script::difference() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return difference_;
}

u64 Script::seen() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return seen_;
}

u64 Script::waiting() const {
  std::lock_guard<std::mutex> lock(mutex_);
  u64 n = steps_.size();
  for (auto& [_, lane] : lanes_) n += lane.size();
  return n;
}

u64 Script::step() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return steps_done_;
}

}  // namespace everett
