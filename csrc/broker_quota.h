// Quotas: bytes a second, for a client and for a user, as token buckets that hold one second's worth.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <algorithm>

namespace everett {

class TokenBucket {
 public:
  // rate: bytes a second; 0: no limit. Changing it keeps what was used.
  void set_rate(double rate) {
    const bool fresh = rate_ == 0;
    rate_ = rate;
    tokens_ = fresh ? most() : std::min(tokens_, most());
  }
  // Bytes that may go out now.
  size_t allowed(double now_s) {
    if (rate_ == 0) return SIZE_MAX;
    tokens_ = std::min(most(), tokens_ + (now_s - at_s_) * rate_);
    at_s_ = now_s;
    return size_t(std::max(tokens_, 0.0));
  }
  void spend(size_t n) {
    if (rate_ != 0) tokens_ -= double(n);
  }
  // Seconds until n bytes may go out.
  double wait_for(size_t n) const {
    return rate_ == 0 ? 0 : std::max(0.0, (std::min(double(n), most()) - tokens_) / rate_);
  }

 private:
  double most() const { return std::max(rate_, 64.0); }  // a block must fit
  double rate_ = 0, tokens_ = 0, at_s_ = 0;
};

}  // namespace everett
