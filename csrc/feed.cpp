// The feed's hand-over between reader and pipeline thread; see feed.h.
#include "feed.h"

namespace everett {

Feed::Feed(std::shared_ptr<Pipeline> pipeline, size_t buffer_bytes, bool lock)
    : pipeline_(std::move(pipeline)),
      buffers_{std::make_shared<SecretPages>(buffer_bytes, lock), std::make_shared<SecretPages>(buffer_bytes, lock)} {
  machinery_->thread = std::thread([this] { run(); });
}

Feed::~Feed() {
  if (mark_.forked()) {
    (void)machinery_.release();
    return;
  }
  if (machinery_->thread.joinable()) pipeline_->ring().end(Take::closed);
  stop();
}

void Feed::run() {
  std::unique_lock<std::mutex> lock(machinery_->lock);
  for (;;) {
    machinery_->changed.wait(lock, [&] { return work_ != nullptr || quit_; });
    if (work_ == nullptr) return;
    bool open = false;
    std::exception_ptr error;
    lock.unlock();
    try {
      open = pipeline_->push(work_, work_bytes_, work_now_s_);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    open_ = open;
    if (error) error_ = error;
    work_ = nullptr;
    machinery_->changed.notify_all();
  }
}

bool Feed::submit(size_t n, double now_s) {
  if (!drain()) return false;
  std::lock_guard<std::mutex> lock(machinery_->lock);
  if (quit_) return false;
  work_ = buffers_[filling_]->data();
  work_bytes_ = n;
  work_now_s_ = now_s;
  filling_ ^= 1;
  machinery_->changed.notify_all();
  return true;
}

bool Feed::drain() {
  if (mark_.forked()) return false;
  std::unique_lock<std::mutex> lock(machinery_->lock);
  machinery_->changed.wait(lock, [&] { return work_ == nullptr; });
  if (error_) std::rethrow_exception(error_);
  return open_;
}

void Feed::stop() {
  if (mark_.forked()) return;
  {
    std::lock_guard<std::mutex> lock(machinery_->lock);
    quit_ = true;
    machinery_->changed.notify_all();
  }
  if (machinery_->thread.joinable()) machinery_->thread.join();
}

}  // namespace everett
