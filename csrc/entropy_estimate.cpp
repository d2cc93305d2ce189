// Min-entropy estimators by counting: most common value, collision, Markov, compression, tuples; see entropy_estimate.h.
#include "entropy_estimate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "entropy_bounds.h"
#include "suffix_array.h"

namespace everett {

double most_common_value_estimate(const uint8_t* s, size_t n, int k) {
  if (n < 2) return kTooShort;
  std::vector<size_t> count(k);
  for (size_t i = 0; i < n; i++) count[s[i]]++;
  return -std::log2(upper_bound((double)*std::max_element(count.begin(), count.end()) / (double)n, n));
}

// The mean time until a value comes again, 2 or 3 for bits, has a closed form in p.
double collision_estimate(const uint8_t* s, size_t n) {
  double events = 0, squares = 0;
  size_t i = 0;
  while (i + 1 < n) {
    const size_t t = s[i] == s[i + 1] ? 2 : 3;
    if (i + t > n) break;
    events++, squares += (double)(t * t), i += t;
  }
  if (events < 2) return kTooShort;
  const double mean = (double)i / events;
  const double deviation = std::sqrt((squares - (double)i * mean) / (events - 1));
  const double lower = std::max(2.0, mean - kNormal99 * deviation / std::sqrt(events));
  return lower < 2.5 ? -std::log2(0.5 + std::sqrt(1.25 - 0.5 * lower)) : 1.0;
}

// The likeliest sequence of 128 bits under the transition probabilities that were seen.
double markov_estimate(const uint8_t* s, size_t n) {
  if (n < 2) return kTooShort;
  double count[2] = {}, pair[2][2] = {};
  for (size_t i = 0; i + 1 < n; i++) count[s[i]]++, pair[s[i]][s[i + 1]]++;
  double cost[2][2], first[2];  // -log2 of probabilities; infinite where nothing was seen
  for (int a = 0; a < 2; a++)
    for (int b = 0; b < 2; b++) cost[a][b] = pair[a][b] > 0 ? -std::log2(pair[a][b] / count[a]) : INFINITY;
  count[s[n - 1]]++;
  for (int a = 0; a < 2; a++) first[a] = count[a] > 0 ? -std::log2(count[a] / (double)n) : INFINITY;
  // Costs are multiplied by counts above 0 only, so that no infinity meets a zero.
  double least = INFINITY;
  for (int a = 0; a < 2; a++) {
    const int b = 1 - a;
    least = std::min(least, first[a] + 127 * cost[a][a]);
    least = std::min(least, first[a] + 64 * cost[a][b] + 63 * cost[b][a]);
    least = std::min(least, first[a] + cost[a][b] + 126 * cost[b][b]);
  }
  return std::min(1.0, least / 128);
}

namespace {

constexpr size_t kBlockBits = 6, kDictionaryBlocks = 1000;

// E[log2(distance)] over test blocks for a value of probability z, times z^2-like weights: G(z) of 6.3.4 step 7, with
// the double sum over (t, u) turned into one over u. log2s[u] = log2(u).
double compression_g(double z, size_t blocks, const std::vector<double>& log2s) {
  const double q = 1 - z;
  double power = q, head = 0, tail = 0, weighted = 0;  // power = q^(u-1)
  for (size_t u = 2; u <= kDictionaryBlocks; u++, power *= q) head += log2s[u] * power;
  for (size_t u = kDictionaryBlocks + 1; u <= blocks; u++, power *= q) {
    const double term = log2s[u] * power;
    tail += term;                                   // the last test block that sees distance u as "never"
    weighted += (double)(blocks - u) * term;        // the test blocks after it
    if ((double)blocks * term < 1e-18 * (head + tail)) break;
  }
  const double tests = (double)(blocks - kDictionaryBlocks);
  return z * (z * (weighted + tests * head) + tail) / tests;
}

}  // namespace

// Maurer's universal statistic of 6-bit blocks, and the distribution with one likelier value that would give it.
double compression_estimate(const uint8_t* s, size_t n) {
  const size_t blocks = n / kBlockBits;
  if (blocks < kDictionaryBlocks + 2) return kTooShort;
  constexpr int values = 1 << kBlockBits;
  std::vector<double> log2s(blocks + 1);
  for (size_t u = 1; u <= blocks; u++) log2s[u] = std::log2((double)u);
  std::vector<size_t> seen(values);
  double sum = 0, squares = 0;
  for (size_t i = 0; i < blocks; i++) {
    unsigned block = 0;
    for (size_t j = 0; j < kBlockBits; j++) block = 2 * block + s[i * kBlockBits + j];
    if (i >= kDictionaryBlocks) {
      const double d = log2s[i + 1 - seen[block]];
      sum += d, squares += d * d;
    }
    seen[block] = i + 1;
  }
  const double tests = (double)(blocks - kDictionaryBlocks);
  const double mean = sum / tests;
  const double deviation = 0.5907 * std::sqrt(std::max(0.0, squares / (tests - 1) - mean * mean));
  const double lower = mean - kNormal99 * deviation / std::sqrt(tests);
  auto expected = [&](double p) {
    return compression_g(p, blocks, log2s) + (values - 1) * compression_g((1 - p) / (values - 1), blocks, log2s);
  };
  double low = 1.0 / values, high = 1;
  if (!(expected(low) > lower)) return 1.0;
  while (high - low > 1e-12) {
    const double middle = (low + high) / 2;
    (expected(middle) > lower ? low : high) = middle;
  }
  return -std::log2((low + high) / 2) / kBlockBits;
}

namespace {

// For each length w: the most often that one w-tuple occurs, and the number of pairs of places with equal w-tuples.
struct Repeats {
  std::vector<int64_t> most;
  std::vector<double> pairs;  // above 2^53 only where the estimate is near 0 anyway
};

// Suffixes with a common prefix of w are neighbours in the suffix array, so both follow from the runs of lcp >= w.
Repeats count_repeats(const std::vector<int32_t>& lcp) {
  const int32_t n = (int32_t)lcp.size();
  const int32_t longest = *std::max_element(lcp.begin(), lcp.end());
  Repeats r{std::vector<int64_t>(longest + 2, 1), std::vector<double>(longest + 2, 0.0)};
  struct Open {
    int32_t value, start;  // lcp >= value from index start on
  };
  std::vector<Open> open;
  for (int32_t i = 1; i <= n; i++) {
    const int32_t value = i < n ? lcp[i] : 0;
    int32_t start = i;
    while (!open.empty() && open.back().value > value) {
      const Open top = open.back();
      open.pop_back();
      const int32_t below = std::max(value, open.empty() ? 0 : open.back().value);
      // lcp >= w over [start, i) for every w in (below, value of top]: i - start + 1 suffixes share w symbols.
      const int64_t size = i - top.start + 1;
      r.most[top.value] = std::max(r.most[top.value], size);
      const double pairs = 0.5 * (double)size * (double)(size - 1);
      r.pairs[top.value] += pairs, r.pairs[below] -= pairs;  // a difference array: runs cover (below, value]
      start = top.start;
    }
    if (value > 0 && (open.empty() || open.back().value < value)) open.push_back({value, start});
  }
  for (int32_t w = longest; w > 0; w--) {
    r.most[w] = std::max(r.most[w], r.most[w + 1]);
    r.pairs[w] += r.pairs[w + 1];
  }
  return r;
}

}  // namespace

TupleEstimates tuple_estimates(const uint8_t* s, size_t n) {
  if (n < 2) return {kTooShort, kTooShort};
  constexpr int64_t kOften = 35;
  const Repeats r = count_repeats(common_prefixes(s, (int32_t)n, suffix_array(s, (int32_t)n)));
  const size_t longest = r.most.size() - 2;
  auto per_symbol = [](double p, size_t w) { return std::pow(p, 1.0 / (double)w); };
  double t_tuple = 0, lrs = 0;
  size_t w = 1;
  for (; w <= longest && r.most[w] >= kOften; w++)
    t_tuple = std::max(t_tuple, per_symbol((double)r.most[w] / (double)(n - w + 1), w));
  for (size_t v = w; v <= longest; v++) {
    const double places = (double)(n - v + 1);
    lrs = std::max(lrs, per_symbol(r.pairs[v] / (0.5 * places * (places - 1)), v));
  }
  auto estimate = [n](double p) { return p > 0 ? -std::log2(upper_bound(p, n)) : kTooShort; };
  return {estimate(t_tuple), estimate(lrs)};
}

}  // namespace everett
