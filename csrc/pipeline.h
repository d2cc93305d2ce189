// The pipeline: raw bytes in, units, health tests, quarantine, conditioner, ring.
//
// Raw bytes are cut into units of 512 from the start of a *segment* (a stretch of raw bytes with no alarm and no
// transport error in it). A unit that passed stays in quarantine until the next one has passed too, because a run that
// began in it may end there; so the ring never holds an unproven byte. Block b of a segment is the hash of raw bytes
// [start + b*n, start + (b+1)*n).
//
//   starting   the first `startup_bytes` of a segment are held until all have passed; then they are used (90B 4.3)
//   flowing
//   stopped    a permanent alarm: takes answer `alarm` until an operator reopens
//
// On an alarm everything that was not yet handed out is destroyed: held bytes, the alarming unit, the ring. The start-up
// test begins with the byte after the alarming unit. It passes, and no other alarm came within a day: transient, the
// flow resumes. It fails, or a second alarm comes within a day, or it was the start-up test of an opening: permanent.
// A transport error is not an alarm: held bytes are dropped, blocks that passed stay, and the start-up test begins anew.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "conditioner.h"
#include "health.h"
#include "ring.h"

namespace everett {

enum class Flow { starting, flowing, stopped };

struct AlarmRecord {
  Alarm alarm;
  double at_s;     // on the clock of push()
  bool startup;    // during a start-up test
  bool permanent;
};

class Pipeline {
 public:
  static constexpr double kAlarmMemory_s = 24 * 3600;
  static constexpr size_t kSegments = 4096;  // starts that are kept; older blocks cannot be located any more

  // block_bytes: raw bytes a block takes. startup_bytes is rounded up to whole units.
  Pipeline(std::shared_ptr<Ring> ring, Health health, HashBlocks hash, size_t block_bytes, size_t startup_bytes);
  ~Pipeline();

  // One thread at a time calls the functions from here to reopen(); none of them needs Python's GIL.
  // now_s: any monotonic clock in seconds. Zeroes `raw`. False when nothing more can flow (stopped, or the ring ended).
  bool push(uint8_t* raw, size_t n, double now_s);
  void transport_error();
  // The device itself reports a fault, such as a missing module: status is what it said, expected what it should say.
  bool device_alarm(uint64_t status, uint64_t expected, double now_s);
  // The source begins again by request (a recording in a loop): its units are no duplicates.
  void forget_units() { health_.forget_units(); }
  // An operator starts over after a permanent alarm: the start-up test runs, the alarms before no longer count towards
  // "a second one within a day". The ring must be reopened as well.
  void reopen();

  // Any thread, any time. All counts are since construction.
  struct Counts {
    uint64_t raw_in, raw_held, raw_dropped, blocks_out, transport_errors, transients, startups;
    uint64_t alarms[kTests];
  };
  Flow flow() const { return flow_.load(); }
  Counts counts() const;
  std::vector<AlarmRecord> alarms() const;
  // Raw offset of the first byte behind block `block`; throws std::out_of_range for a block that was not made yet or
  // whose segment is no longer kept.
  uint64_t raw_offset(uint64_t block) const;
  size_t block_bytes() const { return block_bytes_; }
  size_t startup_bytes() const { return startup_bytes_; }
  Ring& ring() const { return *ring_; }

 private:
  // What other threads read, under its lock. A forked child leaves it behind: the parent may have held the lock or been
  // in the middle of a change.
  struct Shared {
    mutable std::mutex lock;
    Counts counts{};
    std::vector<AlarmRecord> alarms;  // at most one a day besides those that needed an operator
    struct Segment {
      uint64_t first_block, raw_offset;
    };
    std::deque<Segment> segments;
  };
  static constexpr size_t kChunk = 16384;  // raw bytes at a time: stays in the first-level cache with its blocks

  bool process(double now_s);
  void begin_segment();
  bool release();
  bool on_alarm(const Alarm& alarm, size_t destroy, double now_s);
  void drop(size_t n);

  std::shared_ptr<Ring> ring_;
  Health health_;
  HashBlocks hash_;
  size_t block_bytes_, startup_bytes_;
  ForkMark mark_;

  // window_[0, held_) are raw bytes that were not conditioned yet; the first passed_ of them have passed.
  SecretPages window_, blocks_;
  size_t held_ = 0, passed_ = 0;
  uint64_t base_ = 0;  // raw offset of window_[0]
  std::atomic<Flow> flow_{Flow::starting};
  bool opening_ = true;         // the start-up test of an opening: an alarm in it is permanent
  bool after_alarm_ = false;    // the start-up test after an alarm: likewise
  bool alarmed_before_ = false;
  double last_alarm_s_ = 0;
  std::unique_ptr<Shared> shared_{std::make_unique<Shared>()};
};

}  // namespace everett
