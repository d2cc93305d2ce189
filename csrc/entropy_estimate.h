// The min-entropy estimators of SP 800-90B section 6.3 for data that is not assumed to be IID.
//
// Symbols are 0 .. k-1, one a byte. Each function returns bits of min-entropy a symbol, or NaN where the data is too
// short for it. Where the text of the standard leaves a choice (ties, what counts as a dictionary entry, the normal
// quantile's digits), the choice is the one of NIST's own tool (SP800-90B_EntropyAssessment), so that results agree.
#pragma once

#include <cstddef>
#include <cstdint>

namespace everett {

double most_common_value_estimate(const uint8_t* s, size_t n, int k);  // 6.3.1
// 6.3.2 to 6.3.4: bits only (k = 2).
double collision_estimate(const uint8_t* bits, size_t n);
double markov_estimate(const uint8_t* bits, size_t n);
double compression_estimate(const uint8_t* bits, size_t n);
// 6.3.5 and 6.3.6, from one suffix array. n < 2^31 - 2.
struct TupleEstimates {
  double t_tuple, lrs;
};
TupleEstimates tuple_estimates(const uint8_t* s, size_t n);
// 6.3.7 to 6.3.10: predictors.
double multi_mcw_estimate(const uint8_t* s, size_t n, int k);
double lag_estimate(const uint8_t* s, size_t n, int k);
double multi_mmc_estimate(const uint8_t* s, size_t n, int k);
double lz78y_estimate(const uint8_t* s, size_t n, int k);

}  // namespace everett
