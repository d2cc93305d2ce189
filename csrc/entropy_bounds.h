// Confidence bounds that the estimators of SP 800-90B section 6.3 share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace everett {

constexpr double kTooShort = std::numeric_limits<double>::quiet_NaN();
constexpr double kNormal99 = 2.5758293035489008;  // the standard prints 2.576

// Upper end of the 99 % interval of a probability seen as p in n trials.
inline double upper_bound(double p, size_t n) {
  return std::min(1.0, p + kNormal99 * std::sqrt(p * (1 - p) / (double)(n - 1)));
}

}  // namespace everett
