// The replay's side of the keys: recorded draws, handed in record by record, give their keys again to a program that
// asks for the same draws in the same order, and refuse everything from the first difference on.
//
// The order counts per lane: a device's draws, the graphs' keys, and the keys of groups of processes. Threads that draw on different devices may come in
// another order than they did. Steps are fences over all lanes: a draw belongs to the step it was recorded in.
//
// Never waits for records: it answers `unscripted`, and who has the GIL hands in more and draws again.
#pragma once

#include <deque>
#include <map>
#include <mutex>
#include <optional>

#include "journal_format.h"
#include "key.h"

namespace everett {

class Script : public KeyWitness {
 public:
  // The first difference. record: its number in the journal; expected: none where the journal had ended, or the step.
  struct Difference {
    u64 record = 0;
    std::optional<RecordHead> expected;
    bool asked_step = false;          // the program ended a step; else it asked for the draw in `asked`
    RecordHead asked{RecordType::draw};  // or a group key; `drawn` is meaningful if drawn_known
    bool drawn_known = false;
  };

  // Records in the order of the file; `number` is theirs in it. key: 32 bytes where the head is of that type.
  void add(u64 number, const RecordHead& head, const u8* key);
  // No more will come: number is that of the closing record, or of the first one that is missing.
  void end(u64 number);

  bool gives_keys() const override { return true; }
  Drawn give(const KeyRequest& request, u8 key[32]) override;
  Drawn see(const KeyRequest& request, Drawn drawn, u64 ticket, const u8 key[32]) override;
  void group_key(Family family, const u8 key[32]) override;
  void boundary(u64 boundaries, u64 draws) override;

  std::optional<Difference> difference() const;
  u64 seen() const;     // records of draws and steps that were asked for again
  u64 waiting() const;  // handed in and not asked for yet
  u64 step() const;     // steps that the program has ended

 private:
  struct Entry {
    RecordHead head;
    u64 number, step;  // step: recorded steps before it
    u8 key[32];
    ~Entry() { wipe(key, 32); }
  };
  struct Step {
    RecordHead head;
    u64 number;
  };
  using Lane = std::deque<Entry>;
  static RecordHead asked(const KeyRequest& request);
  Entry* next(const KeyRequest& request, Drawn& refusal);
  void differ(const KeyRequest& request, std::optional<Drawn> drawn, u64 record, const RecordHead* expected);
  void compare_group_key(const Entry& recorded, const Entry& brought);
  void differ_at_step(u64 record, const RecordHead* expected);

  mutable std::mutex mutex_;
  std::map<i64, Lane> lanes_;  // by device; below every device the graphs' keys and the groups'
  std::deque<Entry> group_keys_;  // brought by the program before their records were here
  std::deque<Step> steps_;     // recorded, and not ended by the program yet
  u64 steps_added_ = 0, steps_done_ = 0, seen_ = 0;
  std::optional<u64> end_;
  std::optional<Difference> difference_;
};

}  // namespace everett
