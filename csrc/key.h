// Keys: 32 conditioned bytes each, drawn from the ring, given to draws by the rules of freshness and the tape,
// stretched when the source is slow and the user allows it. Out comes the subkey record of a draw. No key leaves, save
// one made for the purpose: a CUDA graph derives its records on the GPU, from a key that was copied there.
//
// Stretching derives K' = SHA-256("everett/1/stretch\0" || K) from the last key, fresh or stretched, and overwrites it.
// It bridges a gap: it goes on while the ring says `empty`, at most max_stretch times per fresh key, and never once no
// fresh key can come any more (recording exhausted, source broken or closed, permanent alarm): that is an error,
// because stretching for ever would be a pseudo-random generator. Keys on the tape still serve recomputations then.
#pragma once

#include <functional>
#include <mutex>

#include "law/subkey.h"
#include "ring_reader.h"
#include "secret_pages.h"
#include "tape.h"

namespace everett {

enum class Freshness {
  op,    // every draw takes a key of its own
  step,  // a device's generator keeps its key of a family until the next step boundary
};
enum class OnStarved { stretch, wait, error };

struct KeyPolicy {
  Freshness freshness = Freshness::op;
  OnStarved on_starved = OnStarved::stretch;
  // A minute without one fresh key at 1,000 draws/s: enough for a device to be plugged in again and pass its start-up
  // test. Longer is an outage that the user should hear of.
  u64 max_stretch = 1 << 16;
  double timeout_s = 60;  // longest wait for a fresh key; negative: as long as it takes
};

struct KeyRequest {
  DrawName name;
  bool inference = false;  // torch.inference_mode: no backward can need it, so always a new key, and no tape
  Place place;
  // What the key is for: a draw; or it is itself what is asked for, and has no name.
  enum Use : u8 {
    draw,
    graph,     // a CUDA graph's
    to_share,  // will become a group key: of this process's own, whatever group key stands
  } use = draw;
};

// Where several processes work on one model, a family's draws may have to agree among a group of them. Then they take the
// group key, which was brought from outside, under their nonces (`shared`): every draw, also under inference_mode, where
// equal nonces then give equal records. It serves until it is replaced; keys that draws had before stay on the tape.
enum class GroupKey {
  none,
  set,
  withheld,  // the group could not agree on the next one: draws are refused, for a key of this rank's own would be another
};

// What became of a draw. The first five made a record.
enum class Drawn {
  fresh,      // a key from the source, first used here
  stretched,  // a key from the ratchet, first used here
  shared,     // the step's or the group's key, under a nonce not seen before in this step
  reused,     // the same name again in this step: the same record again
  replayed,   // a recomputation's record, as its forward had it
  must_wait,  // draw() only: no key now; draw_waiting() may get one
  starved,    // no fresh key in time, or at once under OnStarved::error
  replay_miss,
  replay_ambiguous,
  withheld,  // the group key is
  ended,     // from here: the ring's answers
  failed,
  alarm,
  closed,
  forked,
  unrecorded,  // from here: the witness's answers. The journal could not be written, so the key is lost
  unscripted,  // the replay has to be given more records first
  differs,     // not the draw that was recorded
};
inline bool made_record(Drawn d) { return d <= Drawn::replayed; }

// Who is told of every draw before its key is used, or kept where another draw finds it: a journal that records it
// (journal.h), or a replay that compares it with what was recorded (script.h), which then gives the keys as well.
// All is called under the keyring's mutex, so in the order of tickets, and must neither wait for it nor need the GIL.
class KeyWitness {
 public:
  virtual ~KeyWitness() = default;
  // Whether new keys come from here, and the next one of them: `fresh` or `stretched` as it was recorded, or a refusal.
  virtual bool gives_keys() const { return false; }
  virtual Drawn give(const KeyRequest&, u8[32]) { return Drawn::differs; }
  // A draw that is about to happen; key: that of a fresh or stretched one. Answers `drawn`, or a refusal: then the key
  // is wiped and the draw has not happened.
  virtual Drawn see(const KeyRequest& request, Drawn drawn, u64 ticket, const u8 key[32]) = 0;
  // A family's group key was brought from outside. If that cannot be recorded, or differs, every draw is refused.
  virtual void group_key(Family family, const u8 key[32]) = 0;
  // A step ended; both counts are up to and including now.
  virtual void boundary(u64 boundaries, u64 draws) = 0;
};

struct KeyCounters {
  u64 draws, fresh, stretched, shared, reused, replayed;  // records made, and how
  u64 unverified;         // of these: unknown in a backward with gradients on that keeps its graph (tape.h, 3)
  u64 replay_misses;      // refused as replay_miss or replay_ambiguous
  u64 waits;              // draws that had to wait
  u64 discarded;          // keys taken by a draw that waited, and then found its record on the tape
  u64 stretched_in_a_row; // since the last fresh key
  u64 boundaries, boundaries_ignored;
  u64 tape_entries, tape_evicted;
};

class Keyring {
 public:
  // The ring must outlive the keyring or its replacement by set_ring.
  Keyring(RingReader* ring, size_t tape_entries);
  Keyring(const Keyring&) = delete;
  Keyring& operator=(const Keyring&) = delete;

  // Never waits. Fills `out` when made_record(); `ticket` then is the number of this draw, from 1.
  Drawn draw(const KeyRequest& request, Subkey& out, u64& ticket);
  // Waits for a key by the policy; call without Python's GIL. `between` runs at least every 0.2 s and may throw.
  Drawn draw_waiting(const KeyRequest& request, Subkey& out, u64& ticket, const std::function<void()>& between);
  // For a GPU's graphs: the group key of the rank family, else a key that no draw has had and none will get, by the policy,
  // counted as one draw. Else as the two above.
  Drawn new_graph_key(u8 out[32]);
  Drawn new_graph_key_waiting(u8 out[32], const std::function<void()>& between);
  // The same for a key that is to be brought to others as their group key, whatever group key stands here: SHA-256(label ||
  // K) of a new key K. The network may see it, and K, which the ratchet goes on from, stays here.
  Drawn new_key_to_share(u8 out[32]);
  Drawn new_key_to_share_waiting(u8 out[32], const std::function<void()>& between);

  void set_group_key(Family family, const u8 key[32]);
  void withhold_group_key(Family family);
  void clear_group_keys();

  // A step boundary, on the thread whose next autograd node will have this sequence number.
  void boundary(u64 sequence);
  void boundary_ignored();  // one inside a backward or a capture

  void set_policy(const KeyPolicy& policy);
  // From now on `witness` is told, null: nobody. It must outlive the keyring or its replacement.
  void set_witness(KeyWitness* witness);
  // A run goes on that was interrupted: counts and tickets continue from these (what the tape holds is its own).
  void continue_from(const KeyCounters& counters);
  // Another source: keys on the tape stay for recomputations, but nothing is stretched from the old source's key, and group
  // keys are withheld until they are set again.
  void set_ring(RingReader* ring);
  KeyCounters counters() const;
  bool forked() const { return mark_.forked(); }

 private:
  // A key made outside the mutex: taken while waiting, or the ratchet's next value for one state of the ratchet.
  struct Offer {
    enum { nothing, taken, ratcheted } kind = nothing;
    u64 state = 0;
    u8 key[32];
    ~Offer() { wipe(key, 32); }
  };
  struct StepKey {
    u8 key[32];
    i32 device;
    u32 generator;
    Family family;
    u64 boundaries;  // it serves while this is the count; 0 never set
  };
  struct Secrets {
    static constexpr int kStepKeys = 64;
    u8 ratchet[32];
    u8 group_keys[kFamilies][32];
    StepKey step_keys[kStepKeys];
  };

  Drawn take(const KeyRequest& request, Offer& offer, u8 key[32], u64& ticket);
  Drawn take_waiting(const KeyRequest& request, u8 key[32], u64& ticket, const std::function<void()>& between);
  bool choose(const KeyRequest& request, Offer& offer, u8 key[32], Drawn& drawn);
  bool new_key(Offer& offer, u8 key[32], Drawn& drawn);
  Drawn witnessed(const KeyRequest& request, Drawn drawn, u8 key[32]);
  StepKey* find_step_key(const DrawName& name);
  void keep_step_key(StepKey* place, const DrawName& name, const u8 key[32]);
  void count(Drawn drawn, bool unverified);
  Secrets& secrets() const { return *reinterpret_cast<Secrets*>(pages_.data()); }

  ForkMark mark_;
  SecretPages pages_;
  // Held for well under a microsecond: never while waiting, hashing or asking for the GIL. A journal adds its write(2).
  mutable std::mutex mutex_;
  RingReader* ring_;
  KeyWitness* witness_ = nullptr;
  Tape tape_;
  KeyPolicy policy_;
  KeyCounters counters_ = {};
  bool can_stretch_ = false;
  u64 ratchet_state_ = 0;
  u64 step_ = 1;  // counts every boundary, from 1
  u32 next_step_key_ = 0;
  GroupKey group_[kFamilies] = {};
};

// The ratchet, a key that others get, and what a ledger may publish of a key: SHA-256(label || key). The labels keep them
// apart.
void stretched_key(const u8 key[32], u8 out[32]);
void key_to_share(const u8 key[32], u8 out[32]);
void key_commitment(const u8 key[32], u8 out[32]);

}  // namespace everett
