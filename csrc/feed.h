// The feed: two raw buffers between a reader (Python around `readinto`) and a thread that runs the pipeline.
//
// A reader in Python waits up to 5 ms for the GIL whenever another thread spins. So the reader fills one buffer while
// the other is being processed without the GIL, and those waits cost no throughput as long as a buffer holds more than
// about 10 ms of work.
#pragma once

#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "pipeline.h"
#include "secret_pages.h"

namespace everett {

class Feed {
 public:
  // lock: keep the two buffers out of swap (see SecretPages).
  Feed(std::shared_ptr<Pipeline> pipeline, size_t buffer_bytes, bool lock);
  // Closes the ring if stop() was not called: the thread may be waiting for room in it.
  ~Feed();
  Feed(const Feed&) = delete;
  Feed& operator=(const Feed&) = delete;

  // The buffer to read into next; it belongs to the reader until it is handed over.
  const std::shared_ptr<SecretPages>& buffer() const { return buffers_[filling_]; }

  // Reader; without the GIL. Hands over the first n bytes of buffer(), once everything before has been processed, and
  // turns to the other buffer. False when the pipeline takes no more; rethrows what it threw.
  bool submit(size_t n, double now_s);
  // Waits until everything handed over has been processed; answers as submit() does.
  bool drain();
  // Ends the thread. If it may be waiting for room in the ring, end the ring first.
  void stop();

 private:
  void run();

  // Left behind in a forked child, where the thread does not exist and a lock may be held for ever.
  struct Machinery {
    std::mutex lock;
    std::condition_variable changed;
    std::thread thread;
  };
  std::shared_ptr<Pipeline> pipeline_;
  std::shared_ptr<SecretPages> buffers_[2];
  int filling_ = 0;
  ForkMark mark_;
  std::unique_ptr<Machinery> machinery_{std::make_unique<Machinery>()};
  // Under machinery_->lock.
  uint8_t* work_ = nullptr;  // handed over and not yet processed
  size_t work_bytes_ = 0;
  double work_now_s_ = 0;
  bool open_ = true, quit_ = false;
  std::exception_ptr error_;
};

}  // namespace everett
