// The pipeline's work on raw bytes; see pipeline.h for the rules.
#include "pipeline.h"

#include <string.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace everett {

namespace {

size_t whole_units(size_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

// Zeroes what is left of a buffer however its reader leaves.
struct WipeRest {
  uint8_t* at;
  size_t left;
  ~WipeRest() { wipe(at, left); }
};

}  // namespace

Pipeline::Pipeline(std::shared_ptr<Ring> ring, Health health, HashBlocks hash, size_t block_bytes, size_t startup_bytes)
    : ring_(std::move(ring)), health_(std::move(health)), hash_(std::move(hash)), block_bytes_(block_bytes),
      startup_bytes_(whole_units(startup_bytes)),
      // The most that can be held before a chunk is added, and the chunk.
      window_(std::max(startup_bytes_, block_bytes_ + kUnit) + 2 * kUnit + kChunk),
      blocks_((window_.bytes() / std::max<size_t>(block_bytes_, 1) + 1) * kBlock) {
  if (block_bytes < kBlock || block_bytes > 4096) throw std::invalid_argument("a block takes 32 to 4096 raw bytes");
  // SP 800-90B 4.3 asks for 1,024 samples at least; the upper limit keeps the window small.
  if (startup_bytes < 1024 || startup_bytes > (size_t(1) << 20))
    throw std::invalid_argument("the start-up test takes 1024 to 1048576 raw bytes");
}

Pipeline::~Pipeline() {
  if (mark_.forked()) (void)shared_.release();
}

bool Pipeline::push(uint8_t* raw, size_t n, double now_s) {
  if (mark_.forked()) return false;
  for (WipeRest rest{raw, n}; rest.left > 0;) {
    if (flow_.load() == Flow::stopped) {  // what comes after a permanent alarm is counted and destroyed
      std::lock_guard<std::mutex> lock(shared_->lock);
      shared_->counts.raw_in += rest.left;
      shared_->counts.raw_dropped += rest.left;
      base_ += rest.left;
      return false;
    }
    const size_t now = std::min(rest.left, kChunk);
    memcpy(window_.data() + held_, rest.at, now);
    wipe(rest.at, now);
    rest.at += now;
    rest.left -= now;
    held_ += now;
    {
      std::lock_guard<std::mutex> lock(shared_->lock);
      shared_->counts.raw_in += now;
      shared_->counts.raw_held = held_;
    }
    if (!process(now_s) && flow_.load() != Flow::stopped) return false;  // the ring was ended
  }
  return flow_.load() != Flow::stopped;
}

bool Pipeline::process(double now_s) {
  while (const size_t units = (held_ - passed_) / kUnit) {
    const Health::Scan scan = health_.scan(window_.data() + passed_, units, base_ + passed_);
    passed_ += scan.passed * kUnit;
    if (flow_.load() == Flow::starting && passed_ >= startup_bytes_) begin_segment();
    if (!scan.alarm) break;
    // What had passed before the alarm in this window is destroyed with it, never released: when an alarm is known,
    // nothing from before it may still go out.
    if (!on_alarm(*scan.alarm, passed_ + kUnit, now_s)) return false;
  }
  return release();
}

void Pipeline::begin_segment() {
  std::lock_guard<std::mutex> lock(shared_->lock);
  shared_->segments.push_back({shared_->counts.blocks_out, base_});
  if (shared_->segments.size() > kSegments) shared_->segments.pop_front();
  shared_->counts.transients += after_alarm_;
  shared_->counts.startups++;
  opening_ = after_alarm_ = false;
  flow_.store(Flow::flowing);
}

bool Pipeline::release() {
  if (flow_.load() == Flow::starting) return true;
  const size_t blocks = passed_ > kUnit ? (passed_ - kUnit) / block_bytes_ : 0;
  if (blocks == 0) return true;
  hash_(window_.data(), block_bytes_, blocks, blocks_.data());
  const size_t used = blocks * block_bytes_;
  const bool open = ring_->put(blocks_.data(), blocks * kBlock);
  wipe(blocks_.data(), blocks * kBlock);
  memmove(window_.data(), window_.data() + used, held_ - used);
  wipe(window_.data() + held_ - used, used);
  held_ -= used;
  passed_ -= used;
  base_ += used;
  std::lock_guard<std::mutex> lock(shared_->lock);
  shared_->counts.raw_held = held_;
  if (open) shared_->counts.blocks_out += blocks;
  return open;
}

void Pipeline::drop(size_t n) {
  memmove(window_.data(), window_.data() + n, held_ - n);
  wipe(window_.data() + held_ - n, n);
  held_ -= n;
  base_ += n;
  passed_ = 0;
  std::lock_guard<std::mutex> lock(shared_->lock);
  shared_->counts.raw_held = held_;
  shared_->counts.raw_dropped += n;
}

bool Pipeline::on_alarm(const Alarm& alarm, size_t destroy, double now_s) {
  const bool startup = flow_.load() == Flow::starting;
  const bool permanent = opening_ || after_alarm_ || (alarmed_before_ && now_s - last_alarm_s_ < kAlarmMemory_s);
  alarmed_before_ = after_alarm_ = true;
  last_alarm_s_ = now_s;
  {
    std::lock_guard<std::mutex> lock(shared_->lock);
    shared_->counts.alarms[int(alarm.test)]++;
    shared_->alarms.push_back({alarm, now_s, startup, permanent});
  }
  flow_.store(permanent ? Flow::stopped : Flow::starting);
  if (permanent) ring_->end(Take::alarm);  // before the ring is emptied: no take may come between
  ring_->destroy_unread();
  drop(permanent ? held_ : destroy);
  health_.break_sequence();
  return !permanent;
}

void Pipeline::transport_error() {
  if (mark_.forked() || flow_.load() == Flow::stopped) return;
  drop(held_);
  health_.break_sequence();
  flow_.store(Flow::starting);
  std::lock_guard<std::mutex> lock(shared_->lock);
  shared_->counts.transport_errors++;
}

bool Pipeline::device_alarm(uint64_t status, uint64_t expected, double now_s) {
  if (mark_.forked() || flow_.load() == Flow::stopped) return false;
  return on_alarm({Test::device_status, base_ + held_, status, expected}, held_, now_s);
}

void Pipeline::reopen() {
  drop(held_);
  health_.break_sequence();
  opening_ = true;
  after_alarm_ = alarmed_before_ = false;
  flow_.store(Flow::starting);
}

Pipeline::Counts Pipeline::counts() const {
  if (mark_.forked()) return {};
  std::lock_guard<std::mutex> lock(shared_->lock);
  return shared_->counts;
}

std::vector<AlarmRecord> Pipeline::alarms() const {
  if (mark_.forked()) return {};
  std::lock_guard<std::mutex> lock(shared_->lock);
  return shared_->alarms;
}

uint64_t Pipeline::raw_offset(uint64_t block) const {
  if (mark_.forked()) throw std::out_of_range("a forked child has no blocks");
  std::lock_guard<std::mutex> lock(shared_->lock);
  if (block >= shared_->counts.blocks_out) throw std::out_of_range("this block was not made yet");
  for (auto s = shared_->segments.rbegin(); s != shared_->segments.rend(); ++s)
    if (s->first_block <= block) return s->raw_offset + (block - s->first_block) * block_bytes_;
  throw std::out_of_range("this block is older than the last 4096 segments");
}

}  // namespace everett
