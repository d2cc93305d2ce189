// How a draw gets its key, in order: the tape, the group's key, the step's, the ring, the ratchet; see key.h for the rules.
#include "key.h"

#include <string.h>

#include <algorithm>
#include <chrono>

#include "sha256.h"

namespace everett {
namespace {

constexpr double kSlice_s = 0.2;  // longest wait between two looks at pending signals (Ctrl-C)

// The label's closing zero byte is part of it.
template <size_t N>
void labelled_hash(const char (&label)[N], const u8 key[32], u8 out[32]) {
  u8 message[N + 32];
  memcpy(message, label, N);
  memcpy(message + N, key, 32);
  sha256(message, sizeof(message), out);
  wipe(message, sizeof(message));
}

Drawn refusal(Take t) {
  switch (t) {
    case Take::ended: return Drawn::ended;
    case Take::failed: return Drawn::failed;
    case Take::alarm: return Drawn::alarm;
    case Take::forked: return Drawn::forked;
    default: return Drawn::closed;
  }
}

// Under inference a request always gets a new key and leaves no trace on the tape, which is what a graph's key needs.
constexpr KeyRequest kGraphKey{{-1, 0, {}, Family::rank}, true, {}, KeyRequest::graph};
constexpr KeyRequest kKeyToShare{{-1, 0, {}, Family::rank}, true, {}, KeyRequest::to_share};

// The record of a key that was drawn; the key is wiped in any case.
Drawn derived(const KeyRequest& request, Drawn drawn, u8 key[32], Subkey& out) {
  if (made_record(drawn)) {
    u32 key_words[8], nonce_words[4];  // little endian, as every target of this package is
    memcpy(key_words, key, 32);
    memcpy(nonce_words, request.name.nonce, 16);
    out = derive_subkey(key_words, nonce_words);
    wipe(key_words, 32);
  }
  wipe(key, 32);
  return drawn;
}

}  // namespace

void stretched_key(const u8 key[32], u8 out[32]) { labelled_hash("everett/1/stretch", key, out); }
void key_to_share(const u8 key[32], u8 out[32]) { labelled_hash("everett/1/share", key, out); }
void key_commitment(const u8 key[32], u8 out[32]) { labelled_hash("everett/1/commit", key, out); }

Keyring::Keyring(RingReader* ring, size_t tape_entries) : pages_(sizeof(Secrets)), ring_(ring), tape_(tape_entries) {}

Drawn Keyring::draw(const KeyRequest& request, Subkey& out, u64& ticket) {
  Offer nothing;
  u8 key[32];
  return derived(request, take(request, nothing, key, ticket), key, out);
}

Drawn Keyring::draw_waiting(const KeyRequest& request, Subkey& out, u64& ticket,
                            const std::function<void()>& between) {
  u8 key[32];
  return derived(request, take_waiting(request, key, ticket, between), key, out);
}

Drawn Keyring::new_graph_key(u8 out[32]) {
  Offer nothing;
  u64 ticket;
  return take(kGraphKey, nothing, out, ticket);
}

Drawn Keyring::new_graph_key_waiting(u8 out[32], const std::function<void()>& between) {
  u64 ticket;
  return take_waiting(kGraphKey, out, ticket, between);
}

Drawn Keyring::new_key_to_share(u8 out[32]) {
  Offer nothing;
  u64 ticket;
  Drawn drawn = take(kKeyToShare, nothing, out, ticket);
  if (made_record(drawn)) key_to_share(out, out);
  return drawn;
}

Drawn Keyring::new_key_to_share_waiting(u8 out[32], const std::function<void()>& between) {
  u64 ticket;
  Drawn drawn = take_waiting(kKeyToShare, out, ticket, between);
  if (made_record(drawn)) key_to_share(out, out);
  return drawn;
}

Drawn Keyring::take(const KeyRequest& request, Offer& offer, u8 key[32], u64& ticket) {
  if (mark_.forked()) return Drawn::forked;  // before the mutex: the parent may have held it at the fork
  Drawn drawn;
  for (;;) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (choose(request, offer, key, drawn)) {
        ticket = counters_.draws;
        return drawn;
      }
    }
    // The ratchet's present key is in the offer. Should another thread turn the ratchet meanwhile, the loop repeats.
    stretched_key(offer.key, offer.key);
  }
}

// False: hash offer.key by the ratchet and come again. Else `drawn` is decided, and all is counted and recorded.
bool Keyring::choose(const KeyRequest& request, Offer& offer, u8 key[32], Drawn& drawn) {
  Found found = request.inference ? Found::nothing : tape_.find(request.name, request.place, key);
  switch (found) {
    case Found::reused: drawn = Drawn::reused; break;
    case Found::replayed: drawn = Drawn::replayed; break;
    case Found::miss: drawn = Drawn::replay_miss; break;
    case Found::ambiguous: drawn = Drawn::replay_ambiguous; break;
    case Found::nothing:
    case Found::unverified: {
      const int family = int(request.name.family);
      const GroupKey group = request.use == KeyRequest::to_share ? GroupKey::none : group_[family];
      if (group == GroupKey::withheld) {
        drawn = Drawn::withheld;
        break;
      }
      bool by_step = policy_.freshness == Freshness::step && !request.inference;
      StepKey* held = by_step && group == GroupKey::none ? find_step_key(request.name) : nullptr;
      if (group == GroupKey::set || (held && held->boundaries == step_)) {
        // New bits, though from an old key: not while an alarm stands, nor from a closed source.
        Take state = ring_->try_take(key, 0);
        bool open = state == Take::ok || state == Take::ended || state == Take::failed;
        drawn = open ? Drawn::shared : refusal(state);
        if (open) memcpy(key, group == GroupKey::set ? secrets().group_keys[family] : held->key, 32);
      } else if (witness_ && witness_->gives_keys()) {
        drawn = witness_->give(request, key);
      } else if (!new_key(offer, key, drawn)) {
        return false;
      }
      // Before the key is on the tape: another thread that draws the same name would use it unwitnessed.
      drawn = witnessed(request, drawn, key);
      if (!made_record(drawn)) break;
      if (by_step && drawn != Drawn::shared) keep_step_key(held, request.name, key);
      if (!request.inference) tape_.record(request.name, request.place, key);
      break;
    }
  }
  if (found == Found::reused || found == Found::replayed) drawn = witnessed(request, drawn, key);
  if (offer.kind == Offer::taken) counters_.discarded++;
  count(drawn, found == Found::unverified);
  return true;
}

Drawn Keyring::witnessed(const KeyRequest& request, Drawn drawn, u8 key[32]) {
  if (!witness_ || !made_record(drawn)) return drawn;
  drawn = witness_->see(request, drawn, counters_.draws + 1, key);
  if (!made_record(drawn)) wipe(key, 32);
  return drawn;
}

Keyring::StepKey* Keyring::find_step_key(const DrawName& name) {
  for (StepKey& k : secrets().step_keys)
    if (k.boundaries && k.device == name.device && k.generator == name.generator && k.family == name.family) return &k;
  return nullptr;
}

void Keyring::keep_step_key(StepKey* place, const DrawName& name, const u8 key[32]) {
  // With more generators than places the oldest loses its key and takes a fresh one: never wrong, only dearer.
  if (!place) place = &secrets().step_keys[next_step_key_++ % Secrets::kStepKeys];
  memcpy(place->key, key, 32);
  place->device = name.device;
  place->generator = name.generator;
  place->family = name.family;
  place->boundaries = step_;
}

// A key that no draw has had: the one offered, else from the ring, else by the policy.
bool Keyring::new_key(Offer& offer, u8 key[32], Drawn& drawn) {
  Take taken;
  if (offer.kind == Offer::taken) {
    memcpy(key, offer.key, 32);
    offer.kind = Offer::nothing;
    taken = Take::ok;
  } else {
    taken = ring_->try_take(key, 32);
  }
  if (taken == Take::ok) {
    drawn = Drawn::fresh;
    counters_.stretched_in_a_row = 0;
  } else if (taken != Take::empty) {
    drawn = refusal(taken);
    return true;
  } else if (policy_.on_starved == OnStarved::error) {
    drawn = Drawn::starved;
    return true;
  } else if (policy_.on_starved == OnStarved::wait || !can_stretch_ ||
             counters_.stretched_in_a_row >= policy_.max_stretch) {
    drawn = Drawn::must_wait;
    return true;
  } else if (offer.kind == Offer::ratcheted && offer.state == ratchet_state_) {
    memcpy(key, offer.key, 32);
    drawn = Drawn::stretched;
    counters_.stretched_in_a_row++;
  } else {
    memcpy(offer.key, secrets().ratchet, 32);
    offer.kind = Offer::ratcheted;
    offer.state = ratchet_state_;
    return false;
  }
  memcpy(secrets().ratchet, key, 32);
  can_stretch_ = true;
  ratchet_state_++;
  return true;
}

void Keyring::count(Drawn drawn, bool unverified) {
  if (drawn == Drawn::replay_miss || drawn == Drawn::replay_ambiguous) counters_.replay_misses++;
  if (!made_record(drawn)) return;
  counters_.draws++;
  counters_.unverified += unverified;
  counters_.fresh += drawn == Drawn::fresh;
  counters_.stretched += drawn == Drawn::stretched;
  counters_.shared += drawn == Drawn::shared;
  counters_.reused += drawn == Drawn::reused;
  counters_.replayed += drawn == Drawn::replayed;
}

Drawn Keyring::take_waiting(const KeyRequest& request, u8 key[32], u64& ticket,
                            const std::function<void()>& between) {
  using Clock = std::chrono::steady_clock;
  auto begin = Clock::now();
  bool counted = false;
  for (;;) {
    // Each round looks afresh: a key that another thread took may have made stretching possible again.
    Offer offer;
    Drawn drawn = take(request, offer, key, ticket);
    if (drawn != Drawn::must_wait) return drawn;
    RingReader* ring;
    double timeout_s;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ring = ring_;
      timeout_s = policy_.timeout_s;
      counters_.waits += !counted;
    }
    counted = true;
    double left_s = timeout_s < 0 ? kSlice_s : timeout_s - std::chrono::duration<double>(Clock::now() - begin).count();
    if (left_s <= 0) return Drawn::starved;
    Take taken = ring->take(offer.key, 32, std::min(left_s, kSlice_s));
    if (taken == Take::ok) {
      offer.kind = Offer::taken;
      return take(request, offer, key, ticket);
    }
    // `closed` may only mean that the ring was replaced; the next round asks the present one.
    if (taken != Take::empty && taken != Take::closed) return refusal(taken);
    between();
  }
}

void Keyring::boundary(u64 sequence) {
  if (mark_.forked()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  step_++;
  counters_.boundaries++;
  tape_.boundary(sequence);
  if (witness_) witness_->boundary(counters_.boundaries, counters_.draws);
}

void Keyring::boundary_ignored() {
  if (mark_.forked()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  counters_.boundaries_ignored++;
}

void Keyring::set_policy(const KeyPolicy& policy) {
  if (mark_.forked()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  policy_ = policy;
}

void Keyring::set_witness(KeyWitness* witness) {
  if (mark_.forked()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  witness_ = witness;
}

void Keyring::continue_from(const KeyCounters& counters) {
  if (mark_.forked()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  counters_ = counters;
  counters_.stretched_in_a_row = 0;  // the ratchet's, which nobody continues
}

void Keyring::set_ring(RingReader* ring) {
  std::lock_guard<std::mutex> lock(mutex_);
  ring_ = ring;
  wipe(&secrets(), sizeof(Secrets));
  for (GroupKey& g : group_)
    if (g == GroupKey::set) g = GroupKey::withheld;
  can_stretch_ = false;
  ratchet_state_++;
  counters_.stretched_in_a_row = 0;
}

void Keyring::set_group_key(Family family, const u8 key[32]) {
  if (mark_.forked()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (witness_) witness_->group_key(family, key);
  memcpy(secrets().group_keys[int(family)], key, 32);
  group_[int(family)] = GroupKey::set;
}

void Keyring::withhold_group_key(Family family) {
  if (mark_.forked()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  wipe(secrets().group_keys[int(family)], 32);
  group_[int(family)] = GroupKey::withheld;
}

void Keyring::clear_group_keys() {
  if (mark_.forked()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  wipe(secrets().group_keys, sizeof(secrets().group_keys));
  for (GroupKey& g : group_) g = GroupKey::none;
}

KeyCounters Keyring::counters() const {
  if (mark_.forked()) return {};
  std::lock_guard<std::mutex> lock(mutex_);
  KeyCounters c = counters_;
  c.tape_entries = tape_.entries();
  c.tape_evicted = tape_.evicted();
  return c;
}

}  // namespace everett
