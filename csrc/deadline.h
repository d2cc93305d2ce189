// A time-out in seconds as a moment of the steady clock.
#pragma once

#include <algorithm>
#include <chrono>

namespace everett {

// timeout_s < 0: as long as it takes (31 years).
inline std::chrono::steady_clock::time_point deadline_in(double timeout_s) {
  constexpr double kForever = 1e9;  // 31 years
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(
             std::chrono::duration<double>(timeout_s < 0 ? kForever : std::min(timeout_s, kForever)));
}

// Seconds until then, at least 0.
inline double seconds_left(std::chrono::steady_clock::time_point deadline) {
  return std::max(0.0, std::chrono::duration<double>(deadline - std::chrono::steady_clock::now()).count());
}

}  // namespace everett
