// Puts records together, encrypts them and writes them; see journal.h for the rules.
#include "journal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "crc32c.h"

namespace everett {
namespace {

constexpr size_t kPiece = size_t(1) << 26;  // direct words beyond this go into several records

void put_u32(u8* to, u32 value) { memcpy(to, &value, 4); }  // little endian, as every target of this package is

}  // namespace

Journal::Journal(int descriptor, const std::string& header, const u8* file_key, const u8 header_hash[32])
    : descriptor_(descriptor) {
  memcpy(header_hash_, header_hash, 32);
  try {
    if (file_key) cipher_ = std::make_unique<AesGcm>(file_key);
    if (!write_all(reinterpret_cast<const u8*>(header.data()), header.size())) throw std::runtime_error(failure_);
    bytes_ = header.size();
    shared_->syncer = std::thread([this] { sync_until_stopped(); });
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

Journal::~Journal() {
  if (mark_.forked()) {
    (void)shared_.release();
    ::close(descriptor_);  // the child's own copy
    return;
  }
  close("abandoned");
}

bool Journal::write_all(const u8* data, size_t n) {
  while (n > 0) {
    ssize_t done = ::write(descriptor_, data, n);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) {
      failure_ = std::string("write failed: ") + strerror(done < 0 ? errno : ENOSPC);
      return false;
    }
    data += done;
    n -= size_t(done);
  }
  return true;
}

bool Journal::append_locked(const RecordHead& head, const u8* data, size_t n) {
  if (shared_->stop || !failure_.empty()) return false;
  const size_t plain = sizeof(head) + n, body = plain + (cipher_ ? AesGcm::kTag : 0), all = 4 + body + 4;
  u8 small[128];  // any record of a key
  std::vector<u8> large(all > sizeof(small) ? all : 0);
  u8* record = large.empty() ? small : large.data();
  put_u32(record, u32(body + 4));
  memcpy(record + 4, &head, sizeof(head));
  if (n) memcpy(record + 4 + sizeof(head), data, n);
  bool right = true;
  if (cipher_) {
    u8 iv[12] = {};
    memcpy(iv, &records_, 8);  // in this file no two records have the same number, and no other file has its key
    try {
      cipher_->seal(iv, header_hash_, sizeof(header_hash_), record + 4, plain, record + 4);
    } catch (const std::exception& e) {
      failure_ = e.what();
      right = false;
    }
  }
  put_u32(record + 4 + body, crc32c(record, 4 + body));
  // One call, so that a process killed here leaves the record whole or not at all on most file systems.
  right = right && write_all(record, all);
  wipe(record, all);
  if (!right) return false;
  records_++;
  bytes_ += all;
  return true;
}

bool Journal::append(const RecordHead& head, const u8* data, size_t n) {
  if (mark_.forked()) return false;
  std::lock_guard<std::mutex> lock(shared_->mutex);
  return append_locked(head, data, n);
}

Drawn Journal::see(const KeyRequest& request, Drawn drawn, u64 ticket, const u8 key[32]) {
  const bool with_key = drawn == Drawn::fresh || drawn == Drawn::stretched;
  RecordHead head{with_key ? RecordType::key : RecordType::draw};
  head.drawn = u8(drawn);
  head.family = request.use == KeyRequest::draw ? u8(request.name.family) : u8(1 + request.use);
  head.device = request.name.device;
  head.generator = request.name.generator;
  head.ticket = ticket;
  memcpy(head.number, request.name.nonce, 16);
  return append(head, key, with_key ? 32 : 0) ? drawn : Drawn::unrecorded;
}

void Journal::group_key(Family family, const u8 key[32]) {
  RecordHead head{RecordType::group};
  head.family = u8(family);
  append(head, key, 32);
}

void Journal::boundary(u64 boundaries, u64 draws) {
  if (mark_.forked()) return;
  RecordHead head{RecordType::step};
  head.ticket = draws;
  head.number[0] = boundaries;
  std::lock_guard<std::mutex> lock(shared_->mutex);
  append_locked(head, nullptr, 0);
  shared_->sync = true;
  shared_->wanted.notify_one();
}

bool Journal::words(i32 device, u8 store, const u8* data, size_t n) {
  if (mark_.forked()) return false;
  std::lock_guard<std::mutex> lock(shared_->mutex);
  RecordHead head{RecordType::words};
  head.device = device;
  head.store = store;
  head.ticket = ++takes_;
  for (size_t at = 0; at < n; at += kPiece)
    if (!append_locked(head, data + at, std::min(kPiece, n - at))) return false;
  return true;
}

void Journal::sync_until_stopped() {
  std::unique_lock<std::mutex> lock(shared_->mutex);
  for (;;) {
    shared_->wanted.wait(lock, [&] { return shared_->sync || shared_->stop; });
    if (shared_->stop) return;
    shared_->sync = false;
    const int descriptor = descriptor_;
    lock.unlock();  // draws go on meanwhile; close() waits for this thread before it closes the file
    const int failed = fdatasync(descriptor) == 0 || errno == EINVAL ? 0 : errno;  // EINVAL: a pipe or a device
    lock.lock();
    if (failed && failure_.empty()) failure_ = std::string("fdatasync failed: ") + strerror(failed);
  }
}

bool Journal::close(const std::string& why) {
  if (mark_.forked()) return false;
  std::thread syncer;
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    if (shared_->stop) return failure_.empty();
    RecordHead head{RecordType::close};
    head.number[0] = records_;
    append_locked(head, reinterpret_cast<const u8*>(why.data()), why.size());
    shared_->stop = true;
    shared_->wanted.notify_one();
    syncer = std::move(shared_->syncer);
  }
  syncer.join();
  std::lock_guard<std::mutex> lock(shared_->mutex);
  if (fdatasync(descriptor_) != 0 && errno != EINVAL && failure_.empty())
    failure_ = std::string("fdatasync failed: ") + strerror(errno);
  if (::close(descriptor_) != 0 && failure_.empty()) failure_ = std::string("close failed: ") + strerror(errno);
  descriptor_ = -1;
  return failure_.empty();
}

u64 Journal::records() const {
  if (mark_.forked()) return 0;
  std::lock_guard<std::mutex> lock(shared_->mutex);
  return records_;
}

u64 Journal::bytes() const {
  if (mark_.forked()) return 0;
  std::lock_guard<std::mutex> lock(shared_->mutex);
  return bytes_;
}

std::string Journal::failure() const {
  if (mark_.forked()) return "this process was forked from the one that writes it";
  std::lock_guard<std::mutex> lock(shared_->mutex);
  return failure_;
}

}  // namespace everett
