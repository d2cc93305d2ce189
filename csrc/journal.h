// The journal's writing side: every key is in the file before it is used.
//
// As the keyring's witness it is called under the keyring's mutex, and writes there. That is right, though it costs a
// write(2) of about a microsecond:
// - records must stand in the order of tickets, for by that order they are replayed;
// - were the key on the tape before it is in the file, another thread drawing the same name could use it unrecorded;
// - it cannot deadlock: locks are always taken in the order keyring, journal, and nothing here needs Python's GIL.
// A disk that stalls stalls the draws: who asks for a journal wants no draw without it.
//
// A write that fails (disk full) makes this draw and all that follow refusals: the key is lost, not handed out. What was
// written before stays readable. Against a crash of the system a thread calls fdatasync after each step's end; on the
// training thread that would cost milliseconds a step. A crash of the process alone loses nothing.
//
// In a forked child nothing is ever written.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "aes_gcm.h"
#include "journal_format.h"
#include "key.h"

namespace everett {

class Journal : public KeyWitness {
 public:
  // Takes over a descriptor of a new, empty file and writes the header. file_key: of AES-256-GCM, or null for a journal
  // in clear; header_hash: 32 bytes that each encrypted record is bound to. Throws std::runtime_error.
  Journal(int descriptor, const std::string& header, const u8* file_key, const u8 header_hash[32]);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  Drawn see(const KeyRequest& request, Drawn drawn, u64 ticket, const u8 key[32]) override;
  void group_key(Family family, const u8 key[32]) override;
  void boundary(u64 boundaries, u64 draws) override;
  // Direct words taken from the source, before they are used. False: not recorded, they must be destroyed.
  bool words(i32 device, u8 store, const u8* data, size_t n);
  // A record of another type. False: not written.
  bool append(const RecordHead& head, const u8* data, size_t n);
  // Writes the closing record, makes all durable and closes the file. False: something was not written; see failure().
  bool close(const std::string& why);

  u64 records() const;   // written whole, the closing one included
  u64 bytes() const;
  std::string failure() const;  // empty: none
  bool forked() const { return mark_.forked(); }

 private:
  // What a forked child must neither take nor destroy: the parent may have held or joined it.
  struct Shared {
    std::mutex mutex;
    std::condition_variable wanted;
    std::thread syncer;
    bool sync = false, stop = false;
  };
  bool append_locked(const RecordHead& head, const u8* data, size_t n);
  bool write_all(const u8* data, size_t n);
  void sync_until_stopped();

  ForkMark mark_;
  int descriptor_;
  std::unique_ptr<AesGcm> cipher_;
  u8 header_hash_[32];
  u64 records_ = 0, bytes_ = 0, takes_ = 0;
  std::string failure_;
  std::unique_ptr<Shared> shared_{std::make_unique<Shared>()};
};

}  // namespace everett
