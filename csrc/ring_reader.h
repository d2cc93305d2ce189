// What the consumers of a ring see, whoever fills it: the pipeline of this process (ring.h) or a broker (broker_ring.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace everett {

// What a take answers. Every answer but `ok` leaves the caller's buffer untouched and takes nothing.
// From `ended` to `closed` in order of rank: a later end replaces an earlier one only if it ranks higher.
enum class Take {
  ok,
  empty,   // not enough bytes now (try_take) or in time (take)
  ended,   // the source is exhausted, and fewer bytes are left than were asked for
  failed,  // the source broke, and fewer bytes are left than were asked for
  alarm,   // a permanent health alarm stands
  closed,  // the source was closed
  forked,  // this process is a forked child of the one that opened the source
};

class RingReader {
 public:
  RingReader() = default;
  virtual ~RingReader() = default;
  RingReader(const RingReader&) = delete;
  RingReader& operator=(const RingReader&) = delete;

  // All n bytes or nothing; n may not exceed the capacity (std::invalid_argument).
  virtual Take try_take(uint8_t* out, size_t n) = 0;
  // Waits up to timeout_s seconds (negative: as long as it takes). Call without Python's GIL.
  virtual Take take(uint8_t* out, size_t n, double timeout_s) = 0;
  // Takes n bytes piece by piece and destroys them; returns how many there were before a take failed or timed out.
  size_t discard(size_t n, double timeout_s);

  // Zeroes and drops all unread bytes (an alarm); returns how many there were.
  virtual size_t destroy_unread() = 0;
  // How often that happened, also with nothing unread. Who keeps bytes that were taken ahead, such as words on a GPU, must
  // destroy them when this has changed since the take.
  virtual uint64_t destructions() const = 0;
  // From now on takes answer `why` (for `ended` and `failed`: once the unread bytes do not suffice). Wakes everybody.
  virtual void end(Take why) = 0;

  virtual bool forked() const = 0;
  virtual size_t capacity() const = 0;
  virtual bool locked() const = 0;
  // Counts of one instant; all zero in a forked child.
  struct Counts {
    uint64_t in, out, destroyed, unread;  // in = out + destroyed + unread
  };
  virtual Counts counts() const = 0;
};

}  // namespace everett
