// The reading thread and its queue; see usb_read.h.
#include "usb_read.h"

#include <string.h>

#include <algorithm>
#include <chrono>

namespace everett {
namespace {
constexpr int kLibusbTimeout = -7;  // LIBUSB_ERROR_TIMEOUT
}

UsbReader::UsbReader(BulkTransfer transfer, void* handle, uint8_t endpoint, size_t transfer_bytes, unsigned timeout_ms,
                     size_t discard_bytes, size_t ahead_bytes)
    : transfer_(transfer),
      handle_(handle),
      endpoint_(endpoint),
      transfer_bytes_(transfer_bytes),
      capacity_(std::max<size_t>(2, ahead_bytes / transfer_bytes) * transfer_bytes),
      timeout_ms_(timeout_ms),
      queue_(capacity_),
      discard_(discard_bytes) {
  machinery_->thread = std::thread([this] { run(); });
}

UsbReader::~UsbReader() {
  if (mark_.forked())
    (void)machinery_.release();
  else
    stop();
}

void UsbReader::run() {
  std::unique_lock<std::mutex> lock(machinery_->lock);
  for (;;) {
    machinery_->changed.wait(lock, [&] { return status_ != 0 || in_ - out_ + transfer_bytes_ <= capacity_; });
    if (status_ != 0) return;
    // Transfers lie at multiples of their size, so none wraps around; takers do not touch what is not counted in in_.
    uint8_t* to = queue_.data() + in_ % capacity_;
    int got = 0;
    lock.unlock();
    int answer = transfer_(handle_, endpoint_, to, int(transfer_bytes_), &got, timeout_ms_);
    lock.lock();
    if (status_ != 0) return;
    if (answer == kLibusbTimeout && got == 0) continue;  // nothing came, nothing was lost
    if (answer < 0 && answer != kLibusbTimeout)
      status_ = answer;
    else if (size_t(got) != transfer_bytes_ || answer < 0)
      status_ = kShort;
    else if (discard_ > 0)
      discard_ -= std::min(discard_, transfer_bytes_);
    else
      in_ += transfer_bytes_;
    if (status_ != 0) {
      wipe(queue_.data(), capacity_);
      out_ = in_;
    }
    machinery_->changed.notify_all();
  }
}

UsbReader::Taken UsbReader::take(uint8_t* out, size_t n, size_t enough, double timeout_s) {
  if (mark_.forked()) return {0, kStopped};
  enough = std::min({enough, n, capacity_ - transfer_bytes_ + 1});  // more can never be there at once
  std::unique_lock<std::mutex> lock(machinery_->lock);
  machinery_->changed.wait_for(lock, std::chrono::duration<double>(timeout_s),
                               [&] { return status_ != 0 || in_ - out_ >= enough; });
  if (status_ != 0) return {0, status_};
  const size_t taken = std::min<uint64_t>(n, in_ - out_);
  for (size_t left = taken; left > 0;) {
    uint8_t* from = queue_.data() + out_ % capacity_;
    const size_t piece = std::min(left, capacity_ - size_t(out_ % capacity_));
    memcpy(out, from, piece);
    wipe(from, piece);
    out += piece;
    out_ += piece;
    left -= piece;
  }
  machinery_->changed.notify_all();
  return {taken, 0};
}

void UsbReader::stop() {
  if (mark_.forked()) return;
  {
    std::lock_guard<std::mutex> lock(machinery_->lock);
    if (status_ == 0) status_ = kStopped;
    machinery_->changed.notify_all();
  }
  std::lock_guard<std::mutex> joining(machinery_->joining);
  if (machinery_->thread.joinable()) machinery_->thread.join();
  wipe(queue_.data(), capacity_);
}

}  // namespace everett
