// Min-entropy estimators by prediction: MultiMCW, Lag, MultiMMC, LZ78Y (SP 800-90B 6.3.7 to 6.3.10).
//
// Each guesses the next symbol from those before it. What counts is how often it is right, and its longest run of right
// guesses: the smallest p that makes both likely bounds the source's predictability.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "entropy_bounds.h"
#include "entropy_estimate.h"

namespace everett {
namespace {

// log of the chance that n guesses, right with probability p each, hold no run of r right ones (Feller; 6.3.7 step 5).
double log_no_run(long double p, long double r, long double n) {
  const long double q = 1 - p;
  long double x = 1, before = 0;
  for (int i = 0; i < 66 && x > before; i++) before = x, x = 1 + q * powl(p, r) * powl(x, r + 1);
  return (double)(logl(1 - p * x) - logl((r + 1 - r * x) * q) - (n + 1) * logl(x));
}

struct Score {
  size_t right = 0, run = 0, longest = 0;
  void guess(bool is_right) {
    run = is_right ? run + 1 : 0;
    right += is_right;
    longest = std::max(longest, run);
  }

  double min_entropy(size_t guesses, int k) const {
    const double seen = (double)right / (double)guesses;
    const double global = right > 0 ? upper_bound(seen, guesses) : 1 - std::pow(0.01, 1 / (double)guesses);
    double p = std::max(1.0 / k, global);
    const long double r = (long double)longest + 1;
    if (p < 1 && log_no_run(p, r, guesses) > std::log(0.99)) {
      double high = 1;
      while (high - p > 1e-13) {
        const double middle = (p + high) / 2;
        (log_no_run(middle, r, guesses) > std::log(0.99) ? p : high) = middle;
      }
    }
    return -std::log2(p);
  }
};

// Which of several predictors is trusted: the one with the most right guesses so far, the latest to get there.
template <size_t N>
struct Trust {
  size_t points[N] = {}, winner = 0;
  void right(size_t j) {
    if (++points[j] >= points[winner]) winner = j;
  }
};

// The most common symbol among the last `width`, of several the one seen last.
struct Window {
  size_t width;
  std::vector<size_t> count, last;
  size_t mode = 0;

  Window(size_t w, int k) : width(w), count(k), last(k) {}

  // s[i] enters, s[i - width] leaves.
  void move(const uint8_t* s, size_t i) {
    const size_t in = s[i], k = count.size();
    last[in] = i + 1;
    count[in]++;
    if (i >= width) {
      const size_t out = s[i - width];
      count[out]--;
      if (out == mode && out != in)
        for (size_t c = 0; c < k; c++)
          if (count[c] > count[mode] || (count[c] == count[mode] && last[c] > last[mode])) mode = c;
    }
    if (count[in] >= count[mode]) mode = in;
  }
};

}  // namespace

double multi_mcw_estimate(const uint8_t* s, size_t n, int k) {
  constexpr size_t kWidths[4] = {63, 255, 1023, 4095};
  if (n < kWidths[0] + 3) return kTooShort;
  std::vector<Window> windows;
  for (size_t w : kWidths) windows.emplace_back(w, k);
  Trust<4> trust;
  Score score;
  for (size_t i = 0; i < n; i++) {
    if (i >= kWidths[0]) {
      const size_t winner = trust.winner;
      score.guess(i >= kWidths[winner] && windows[winner].mode == s[i]);
      for (size_t j = 0; j < 4; j++)
        if (i >= kWidths[j] && windows[j].mode == s[i]) trust.right(j);
    }
    for (Window& w : windows) w.move(s, i);
  }
  return score.min_entropy(n - kWidths[0], k);
}

double lag_estimate(const uint8_t* s, size_t n, int k) {
  constexpr size_t kLags = 128;
  if (n < 3) return kTooShort;
  Trust<kLags> trust;
  Score score;
  for (size_t i = 1; i < n; i++) {
    score.guess(i > trust.winner && s[i - trust.winner - 1] == s[i]);
    const size_t lags = std::min(i, kLags);
    for (size_t lag = 1; lag <= lags; lag++)
      if (s[i - lag] == s[i]) trust.right(lag - 1);
  }
  return score.min_entropy(n - 1, k);
}

namespace {

constexpr size_t kDepths = 16;

// What followed each context of 1 .. 16 symbols. Contexts of bits index tables; others are hashed.
class BitContexts {
 public:
  BitContexts() {
    for (size_t d = 1; d <= kDepths; d++) counts_[d].resize(2ull << d);
  }

  // Context of the d symbols before s[i] as a place; valid until the next call for the same d.
  void look(const uint8_t* s, size_t i, size_t d) {
    size_t context = 0;
    if (d > 1 && d <= i) context = place_[d - 1] | ((size_t)s[i - d] << (d - 1));
    else context = s[i - 1];
    place_[d] = context;
  }
  bool known(size_t d) const { return count(d, 0) + count(d, 1) > 0; }
  bool knows(size_t d, uint8_t y) const { return count(d, y) > 0; }
  void add(size_t d, uint8_t y) { counts_[d][2 * place_[d] + y]++; }
  uint8_t guess(size_t d) const { return count(d, 1) >= count(d, 0); }  // ties go to the greater symbol
  size_t times(size_t d) const { return count(d, guess(d)); }

 private:
  uint32_t count(size_t d, size_t y) const { return counts_[d][2 * place_[d] + y]; }
  std::vector<uint32_t> counts_[kDepths + 1];
  size_t place_[kDepths + 1] = {};
};

class ByteContexts {
 public:
  void look(const uint8_t* s, size_t i, size_t d) {
    Key key{};
    memcpy(key.symbols, s + i - d, d);
    key.depth = (uint8_t)d;
    key_[d] = key;
    const auto found = nodes_.find(key);
    node_[d] = found == nodes_.end() ? nullptr : &found->second;  // stays valid when the table grows
  }
  bool known(size_t d) const { return node_[d] != nullptr; }
  bool knows(size_t d, uint8_t y) const { return node_[d] != nullptr && node_[d]->after.count(y) > 0; }
  void add(size_t d, uint8_t y) {
    if (node_[d] == nullptr) node_[d] = &nodes_[key_[d]];
    Node& node = *node_[d];
    const uint32_t count = ++node.after[y];
    if (count > node.most || (count == node.most && y > node.guess)) node.most = count, node.guess = y;
  }
  uint8_t guess(size_t d) const { return node_[d]->guess; }
  size_t times(size_t d) const { return node_[d]->most; }

 private:
  struct Key {
    uint8_t symbols[kDepths], depth;
    bool operator==(const Key& o) const { return depth == o.depth && memcmp(symbols, o.symbols, kDepths) == 0; }
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t word[2];
      memcpy(word, key.symbols, kDepths);
      uint64_t h = (word[0] ^ key.depth) * 0x9E3779B97F4A7C15u;
      h = (h ^ (h >> 29) ^ word[1]) * 0xBF58476D1CE4E5B9u;
      return h ^ (h >> 32);
    }
  };
  // Few symbols follow a long context, so a short list beats a tree.
  struct After {
    std::vector<std::pair<uint8_t, uint32_t>> seen;
    uint32_t& operator[](uint8_t y) {
      for (auto& pair : seen)
        if (pair.first == y) return pair.second;
      return seen.emplace_back(y, 0u).second;
    }
    size_t count(uint8_t y) const {
      for (const auto& pair : seen)
        if (pair.first == y) return 1;
      return 0;
    }
  };
  struct Node {
    After after;
    uint32_t most = 0;
    uint8_t guess = 0;
  };
  std::unordered_map<Key, Node, Hash> nodes_;
  Key key_[kDepths + 1];
  Node* node_[kDepths + 1] = {};
};

template <class Contexts>
double multi_mmc(const uint8_t* s, size_t n, int k) {
  constexpr size_t kMostEntries = 100000;  // (context, next symbol) pairs a depth
  Contexts contexts;
  size_t entries[kDepths + 1] = {};
  Trust<kDepths> trust;
  Score score;
  for (size_t i = 1; i < n; i++) {
    const size_t winner = trust.winner;
    bool right = false;
    const size_t depths = std::min(i, kDepths);
    bool known = true;  // a context that was never seen is the end of no longer one that was
    for (size_t d = 1; d <= depths; d++) {
      if (!known && entries[d] >= kMostEntries) continue;
      contexts.look(s, i, d);
      known = contexts.known(d);
      if (i >= 2 && known && contexts.guess(d) == s[i]) {
        trust.right(d - 1);
        right = right || d - 1 == winner;
      }
      if (contexts.knows(d, s[i])) {
        contexts.add(d, s[i]);
      } else if (entries[d] < kMostEntries) {
        contexts.add(d, s[i]);
        entries[d]++;
      }
    }
    if (i >= 2) score.guess(right);
  }
  return score.min_entropy(n - 2, k);
}

template <class Contexts>
double lz78y(const uint8_t* s, size_t n, int k) {
  constexpr size_t kMostEntries = 65536;  // contexts, of all depths together
  Contexts contexts;
  size_t entries = 0;
  Score score;
  for (size_t i = kDepths; i < n; i++) {
    size_t most = 0;
    bool right = false;
    size_t depths = 0;
    while (depths < kDepths) {
      contexts.look(s, i, ++depths);
      if (entries >= kMostEntries && !contexts.known(depths)) break;  // nor is a longer one known
    }
    for (size_t d = depths; d > 0; d--) {  // longest first: it wins ties, and finds room first
      if (contexts.known(d)) {
        if (contexts.times(d) > most) most = contexts.times(d), right = contexts.guess(d) == s[i];
        contexts.add(d, s[i]);
      } else if (entries < kMostEntries) {
        contexts.add(d, s[i]);
        entries++;
      }
    }
    if (i > kDepths) score.guess(right);
  }
  return score.min_entropy(n - kDepths - 1, k);
}

}  // namespace

double multi_mmc_estimate(const uint8_t* s, size_t n, int k) {
  if (n < 4) return kTooShort;
  return k == 2 ? multi_mmc<BitContexts>(s, n, k) : multi_mmc<ByteContexts>(s, n, k);
}

double lz78y_estimate(const uint8_t* s, size_t n, int k) {
  if (n < kDepths + 4) return kTooShort;
  return k == 2 ? lz78y<BitContexts>(s, n, k) : lz78y<ByteContexts>(s, n, k);
}

}  // namespace everett
