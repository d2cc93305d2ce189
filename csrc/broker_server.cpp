// The broker's thread: connections, messages, alarms and shares; see broker_server.h for the rules.
#include "broker_server.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace everett {

namespace {

// What an epoll event is about: the client's number above two bits that say which of its descriptors.
enum Which : uint64_t { socket_ = 0, eventfd_ = 1, pidfd_ = 2, own_ = 3 };
enum Own : uint64_t { listener = 3, wake = 7, source = 11 };  // number 0, 1, 2 with `own_`

double monotonic_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

double utc_s() {
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

size_t whole_blocks(size_t n) { return n / kSharedBlock * kSharedBlock; }

int eventfd_or_throw() {
  const int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) throw std::runtime_error("the broker gets no descriptor for an eventfd");
  return fd;
}

}  // namespace

struct BrokerServer::Client {
  uint64_t id = 0;
  int fd = -1, pidfd = -1;
  pid_t pid = 0;
  uid_t uid = 0;
  gid_t gid = 0;
  double since_s = 0;
  bool greeted = false, queued = false, throttled = false, state_due = false;
  std::unique_ptr<ServedRing> ring;
  TokenBucket quota;
  uint64_t bytes = 0, draws = 0;
  size_t idle_wakes = 0;
  // An open DRAW, and what is there for it already: those blocks belong to this client.
  uint32_t draw_n = 0, draw_tag = 0, draw_have = 0;
  uint8_t drawn[wire::kMostDraw];

  Client() = default;
  ~Client() {
    wipe(drawn, sizeof drawn);
    if (fd >= 0) close(fd);
    if (pidfd >= 0) close(pidfd);
  }
};

BrokerServer::BrokerServer(int listener, std::vector<std::shared_ptr<Ring>> sources, const BrokerRules& rules,
                           std::string serves)
    : listener_(listener), epoll_(epoll_create1(EPOLL_CLOEXEC)), wake_(eventfd_or_throw()),
      source_signal_(eventfd_or_throw()), rules_(rules), serves_(std::move(serves)) {
  if (epoll_ < 0) throw std::runtime_error("the broker gets no descriptor for its events");
  for (auto& ring : sources) sources_.push_back({ring, ring->destructions(), ring->ended(), monotonic_s()});
  watch(listener_, Own::listener, EPOLLIN);
  watch(wake_, Own::wake, EPOLLIN);
  watch(source_signal_, Own::source, EPOLLIN);
  for (SourceSeen& s : sources_) s.ring->signal(source_signal_);
  thread_ = std::thread([this] { run(); });
}

BrokerServer::~BrokerServer() {
  stop();
  close(epoll_);
  close(wake_);
  close(source_signal_);
}

void BrokerServer::stop() {
  quit_ = true;
  tick();
  if (thread_.joinable()) thread_.join();
  std::lock_guard<std::mutex> lock(lock_);
  for (SourceSeen& s : sources_) s.ring->signal(-1);
  while (!clients_.empty()) drop(*clients_.begin()->second, "the broker was stopped");
}

void BrokerServer::tick() {
  const uint64_t one = 1;
  if (write(wake_, &one, sizeof one) < 0) {  // full: it has been woken before
  }
}

void BrokerServer::watch(int fd, uint64_t what, uint32_t events) {
  epoll_event e{};
  e.events = events;
  e.data.u64 = what;
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &e) != 0) throw std::runtime_error("the broker cannot watch a descriptor");
}

// --- the thread ---

void BrokerServer::run() {
  epoll_event events[256];
  int timeout = 0;
  while (!quit_) {
    const int n = epoll_wait(epoll_, events, 256, timeout);
    std::lock_guard<std::mutex> lock(lock_);
    turns_++;
    look_at_sources();  // first: no byte goes out after an alarm was there to be seen
    for (int i = 0; i < n; i++) handle(events[i].data.u64, events[i].events);
    const double now = monotonic_s();
    wake_throttled(now);
    drop_late_greeters(now);
    share(now);
    look_at_sources();  // one that has ended may have given its last byte
    timeout = timeout_ms(now);
  }
}

int BrokerServer::timeout_ms(double now_s) {
  double wait = 1e9;
  if (hungry_.empty()) {
    wanted_since_s_ = 0;
  } else {
    if (wanted_since_s_ == 0) wanted_since_s_ = now_s;
    for (SourceSeen& s : sources_) s.ring->arm(kSharedBlock);
    if (available() >= kSharedBlock) return 0;
    if (rules_.failover) wait = rules_.failover_after_s / 4;
  }
  if (!throttled_.empty()) wait = std::min(wait, throttled_until_s_ - now_s);
  if (greeting_ > 0) wait = std::min(wait, 1.0);
  return wait > 1e6 ? -1 : std::max(1, int(std::ceil(wait * 1e3)));
}

void BrokerServer::handle(uint64_t what, uint32_t events) {
  uint64_t count;
  if ((what & 3) == own_) {
    if (what == Own::listener) accept_some();
    if (what == Own::wake && read(wake_, &count, sizeof count) < 0) return;
    if (what == Own::source && read(source_signal_, &count, sizeof count) < 0) return;
    return;
  }
  const auto found = clients_.find(what >> 2);
  if (found == clients_.end()) return;  // dropped earlier in this turn
  Client& c = *found->second;
  switch (what & 3) {
    case pidfd_: return drop(c, "its process has ended");
    case eventfd_:
      // Not read: the client holds it too, could have emptied it and made it block. It is watched by its edges.
      if (!c.queued && !c.throttled && ++c.idle_wakes > kMostIdleWakes) return drop(c, "it wakes the broker for nothing");
      return enqueue(c);
    default:
      if (events & EPOLLIN) return read_message(c);
      if (events & (EPOLLHUP | EPOLLERR)) return drop(c, "it has closed the connection");
      if (events & EPOLLOUT) send_state(c);
  }
}

// --- connections ---

bool BrokerServer::allowed(int fd, uid_t uid, gid_t gid) const {
  if (!rules_.restricted || uid == 0 || uid == geteuid()) return true;
  if (std::count(rules_.users.begin(), rules_.users.end(), uid)) return true;
  const auto has = [&](gid_t g) { return std::count(rules_.groups.begin(), rules_.groups.end(), g) != 0; };
  if (has(gid)) return true;
#ifdef SO_PEERGROUPS
  std::vector<gid_t> groups(1024);
  socklen_t size = socklen_t(groups.size() * sizeof(gid_t));
  if (fd >= 0 && getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups.data(), &size) == 0)
    return std::any_of(groups.begin(), groups.begin() + size / sizeof(gid_t), has);
#endif
  return false;
}

void BrokerServer::accept_some() {
  for (int i = 0; i < 64; i++) {
    const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE) {  // it would come again at once
        const timespec pause{0, 10000000};
        nanosleep(&pause, nullptr);
      }
      return;
    }
    counts_.connections++;
    ucred who{};
    socklen_t size = sizeof who;
    auto c = std::make_unique<Client>();
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) != 0) {
      close(fd);
      continue;
    }
    c->pid = who.pid;
    c->uid = who.uid;
    c->gid = who.gid;
    const std::string user = "user " + std::to_string(who.uid);
    std::string no;
    wire::Refused why = wire::Refused::too_many;
    if (!allowed(fd, who.uid, who.gid)) {
      why = wire::Refused::not_allowed;
      no = user + " is not on the broker's list";
    } else if (clients_.size() >= rules_.most_clients) {
      no = "the broker has " + std::to_string(rules_.most_clients) + " clients, and takes no more";
    } else if (users_[who.uid].connections >= rules_.most_clients_of_user) {
      no = user + " has " + std::to_string(rules_.most_clients_of_user) + " connections, and gets no more";
    }
    if (!no.empty()) {
      log(BrokerEvent::refused, c.get(), no);
      refuse(fd, why, no);
      continue;
    }
    c->fd = fd;
    c->id = next_client_++;
    c->since_s = monotonic_s();
    if (who.pid > 0) c->pidfd = int(syscall(SYS_pidfd_open, who.pid, 0));  // -1: the hang-up has to do
    try {
      watch(fd, c->id << 2 | socket_, EPOLLIN);
      if (c->pidfd >= 0) watch(c->pidfd, c->id << 2 | pidfd_, EPOLLIN);
    } catch (const std::runtime_error&) {
      continue;
    }
    User& u = users_[who.uid];
    if (u.connections++ == 0) u.quota.set_rate(rules_.user_bytes_per_s);
    c->quota.set_rate(rules_.client_bytes_per_s);
    greeting_++;
    clients_.emplace(c->id, std::move(c));
  }
}

void BrokerServer::refuse(int fd, wire::Refused why, const std::string& text) {
  char hello[256];
  if (recv(fd, hello, sizeof hello, MSG_DONTWAIT) < 0) {  // unread, it would make the peer lose our answer
  }
  Client c;
  c.fd = fd;
  const wire::Refusal body{uint32_t(why), 0};
  counts_.refused++;
  send(c, wire::refused, &body, sizeof body, text);
}

void BrokerServer::drop_late_greeters(double now_s) {
  if (greeting_ == 0) return;
  for (auto i = clients_.begin(); i != clients_.end();) {
    Client& c = *(i++)->second;
    if (!c.greeted && now_s - c.since_s > kGreeting_s) drop(c, "it has not said what it wants");
  }
}

void BrokerServer::drop(Client& c, const std::string& why) {
  log(BrokerEvent::disconnected, &c, why, c.bytes);
  counts_.dropped++;
  if (!c.greeted) greeting_--;
  users_[c.uid].connections--;  // kept, with what is used of its quota
  hungry_.erase(std::remove(hungry_.begin(), hungry_.end(), c.id), hungry_.end());
  throttled_.erase(std::remove(throttled_.begin(), throttled_.end(), c.id), throttled_.end());
  clients_.erase(c.id);  // zeroes its ring
}

// --- messages ---

bool BrokerServer::send(Client& c, uint16_t type, const void* fixed, size_t fixed_bytes, const std::string& text,
                        const int* fds, size_t n_fds) {
  wire::Header header{wire::kMagic, wire::kVersion, type, uint32_t(sizeof(wire::Header) + fixed_bytes + text.size()), 0};
  iovec parts[3] = {{&header, sizeof header},
                    {const_cast<void*>(fixed), fixed_bytes},
                    {const_cast<char*>(text.data()), text.size()}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = 3;
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  if (n_fds > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
    memcpy(CMSG_DATA(rights), fds, n_fds * sizeof(int));
  }
  return sendmsg(c.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == ssize_t(header.length);
}

void BrokerServer::send_state(Client& c) {
  const wire::State body{uint32_t(supply_), 0};
  const bool sent = send(c, wire::state, &body, sizeof body, how_);
  if (sent != c.state_due) return;  // nothing changes about what is watched
  c.state_due = !sent;  // a client that does not read hears of it when it does
  epoll_event e{};
  e.events = EPOLLIN | (c.state_due ? uint32_t(EPOLLOUT) : 0u);
  e.data.u64 = c.id << 2 | socket_;
  epoll_ctl(epoll_, EPOLL_CTL_MOD, c.fd, &e);
}

void BrokerServer::read_message(Client& c) {
  alignas(8) char buffer[wire::kMostBytes];
  // No room for descriptors: the kernel closes those that a client sends.
  const ssize_t n = recv(c.fd, buffer, sizeof buffer, MSG_DONTWAIT | MSG_TRUNC);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) return drop(c, "it has closed the connection");
  wire::Header h;
  wire::Hello hello;
  wire::Draw draw;
  static_assert(sizeof hello == 8 && sizeof draw == 8, "both bodies have 8 bytes");
  if (size_t(n) != sizeof h + 8) return drop(c, "malformed message: " + std::to_string(n) + " bytes");
  memcpy(&h, buffer, sizeof h);
  memcpy(&hello, buffer + sizeof h, sizeof hello);
  memcpy(&draw, buffer + sizeof h, sizeof draw);
  if (h.magic != wire::kMagic || h.length != size_t(n)) return drop(c, "malformed message: no header of this protocol");
  if (h.version != wire::kVersion) {
    const std::string text = "this broker speaks version 1 of the protocol, not " + std::to_string(h.version);
    const wire::Refusal body{uint32_t(wire::Refused::version), 0};
    send(c, wire::refused, &body, sizeof body, text);
    return drop(c, text);
  }
  if (h.type == wire::hello && !c.greeted && hello.ring <= 1 && hello.zero == 0 && h.zero == 0) return greet(c, hello);
  if (h.type == wire::draw && c.greeted && c.draw_n == 0 && h.zero == 0) return want(c, draw);
  drop(c, "malformed message: type " + std::to_string(h.type) + " at the wrong moment, or with wrong values");
}

void BrokerServer::greet(Client& c, const wire::Hello& hello) {
  int fds[2];
  if (hello.ring != 0) {
    try {
      c.ring = std::make_unique<ServedRing>(rules_.ring_bytes);
      watch(c.ring->eventfd(), c.id << 2 | eventfd_, EPOLLIN | EPOLLET);
    } catch (const std::exception& error) {
      const wire::Refusal body{uint32_t(wire::Refused::no_memory), 0};
      send(c, wire::refused, &body, sizeof body, error.what());
      return drop(c, error.what());
    }
    c.ring->set_state(supply_);
    fds[0] = c.ring->memfd();
    fds[1] = c.ring->eventfd();
  }
  const wire::Welcome body{c.id, c.ring ? uint32_t(c.ring->capacity()) : 0, uint32_t(supply_)};
  if (!send(c, wire::welcome, &body, sizeof body, serves_, fds, c.ring ? 2 : 0)) return drop(c, "it takes no welcome");
  c.greeted = true;
  greeting_--;
  log(BrokerEvent::connected, &c, c.ring ? "shared memory" : "messages only");
  send_state(c);
  if (!c.ring) return;
  c.ring->forget_memfd();
  enqueue(c);
}

void BrokerServer::want(Client& c, const wire::Draw& draw) {
  if (draw.n < kSharedBlock || draw.n > wire::kMostDraw || draw.n % kSharedBlock != 0)
    return drop(c, "malformed message: a draw of " + std::to_string(draw.n) + " bytes");
  c.draw_n = draw.n;
  c.draw_tag = draw.tag;
  c.draw_have = 0;
  c.draws++;
  counts_.draws++;
  enqueue(c);
}

// --- shares ---

void BrokerServer::enqueue(Client& c) {
  if (c.queued || c.throttled) return;
  c.queued = true;
  hungry_.push_back(c.id);
}

size_t BrokerServer::available() const {
  size_t n = 0;
  const double now = monotonic_s();
  for (const SourceSeen& s : sources_) {
    n += whole_blocks(s.ring->counts().unread);
    if (!rules_.failover || n > 0) {
      if (rules_.failover) return n;
      continue;
    }
    const bool waited = now - std::max(s.gave_at_s, wanted_since_s_) > rules_.failover_after_s;
    if (s.ring->ended() == Take::ok && !waited) return 0;  // it is still waited for
  }
  return n;
}

// Up to n bytes in whole blocks; a block is of one source.
size_t BrokerServer::take_from_sources(uint8_t* out, size_t n, double now_s) {
  size_t done = 0;
  for (size_t i = 0; i < sources_.size() && done < n; i++) {
    const size_t index = rules_.failover ? i : (next_source_ + i) % sources_.size();
    SourceSeen& s = sources_[index];
    const size_t there = std::min(whole_blocks(s.ring->counts().unread), n - done);
    if (there > 0 && s.ring->try_take(out + done, there) == Take::ok) {
      done += there;
      s.gave_at_s = now_s;
      if (rules_.failover && index != last_used_) {
        last_used_ = index;
        log(BrokerEvent::source_used, nullptr, std::to_string(index));
      }
      if (rules_.failover) break;
    } else if (rules_.failover && s.ring->ended() == Take::ok &&
               now_s - std::max(s.gave_at_s, wanted_since_s_) <= rules_.failover_after_s) {
      break;
    }
  }
  if (!rules_.failover && !sources_.empty()) next_source_ = (next_source_ + 1) % sources_.size();
  return done;
}

// Bytes that went to the client. `dry`: the sources have no more.
size_t BrokerServer::serve(Client& c, size_t quantum, double now_s, bool* dry) {
  User& user = users_[c.uid];
  const size_t wanted = c.draw_n ? c.draw_n - c.draw_have : c.ring->room();
  const size_t limit = whole_blocks(std::min({quantum, wanted, c.quota.allowed(now_s), user.quota.allowed(now_s)}));
  if (limit == 0) {
    if (wanted < kSharedBlock) return 0;
    c.throttled = true;  // over its quota
    counts_.throttled++;
    const size_t next = std::min<size_t>(wanted, 4096);
    const double until = now_s + std::max({c.quota.wait_for(next), user.quota.wait_for(next), 1e-3});
    throttled_until_s_ = throttled_.empty() ? until : std::min(throttled_until_s_, until);
    throttled_.push_back(c.id);
    return 0;
  }
  size_t done = 0;
  while (done < limit && !*dry) {
    size_t fill = limit - done;
    uint8_t* to = c.draw_n ? c.drawn + c.draw_have : c.ring->place(limit - done, &fill);
    const size_t got = take_from_sources(to, fill, now_s);
    *dry = got < fill;
    done += got;
    if (c.draw_n)
      c.draw_have += uint32_t(got);
    else if (got > 0)
      c.ring->publish(got);
  }
  c.quota.spend(done);
  user.quota.spend(done);
  c.bytes += done;
  counts_.bytes += done;
  if (done > 0) c.idle_wakes = 0;
  return done;
}

// After its turn: a finished draw is sent, and a client that still has room stays in the queue.
void BrokerServer::settle(Client& c) {
  if (c.draw_n != 0 && c.draw_have == c.draw_n) {
    const wire::Draw body{c.draw_n, c.draw_tag};
    std::string bytes(reinterpret_cast<char*>(c.drawn), c.draw_n);
    const bool sent = send(c, wire::bytes, &body, sizeof body, bytes);
    wipe(bytes.data(), bytes.size());
    wipe(c.drawn, sizeof c.drawn);
    c.draw_n = 0;
    if (!sent) return drop(c, "it does not take the bytes that it asked for");
  }
  if (c.throttled) return;
  if (c.draw_n != 0 || (c.ring && (c.ring->room() >= c.ring->capacity() / 4 || !c.ring->ask()))) enqueue(c);
}

void BrokerServer::share(double now_s) {
  const size_t there = available(), n = hungry_.size();
  if (n == 0) return;
  const size_t quantum = std::clamp(whole_blocks(there / n), kSharedBlock, kQuantum);
  bool dry = there < kSharedBlock;
  for (size_t i = 0; i < n && !dry && !hungry_.empty(); i++) {
    const uint64_t id = hungry_.front();
    Client& c = *clients_.at(id);
    if (c.ring && !c.ring->look()) {
      drop(c, "its tail cannot be true");
      continue;
    }
    serve(c, quantum, now_s, &dry);
    if (dry && !c.throttled && (c.draw_n == 0 || c.draw_have < c.draw_n)) break;  // it is first when there is more
    hungry_.pop_front();
    c.queued = false;
    settle(c);
  }
}

void BrokerServer::wake_throttled(double now_s) {
  if (throttled_.empty() || now_s < throttled_until_s_) return;
  std::vector<uint64_t> all;
  all.swap(throttled_);
  for (uint64_t id : all) {
    Client& c = *clients_.at(id);
    c.throttled = false;
    enqueue(c);
  }
}

// --- sources ---

void BrokerServer::look_at_sources() {
  bool destroy = false, all_ended = !sources_.empty(), alarm = false, exhausted = true;
  for (size_t i = 0; i < sources_.size(); i++) {
    SourceSeen& s = sources_[i];
    const uint64_t destructions = s.ring->destructions();
    const Take ended = s.ring->ended();
    if (ended != s.ended) log(ended == Take::ok ? BrokerEvent::reopened : BrokerEvent::ended, nullptr, std::to_string(i));
    // A source that is closed or opened again destroys its ring as well; that says nothing against what it gave before.
    destroy |= destructions != s.destructions && ended == s.ended;
    destroy |= ended == Take::alarm && s.ended != Take::alarm;
    s.destructions = destructions;
    s.ended = ended;
    all_ended &= ended != Take::ok;
    alarm |= ended == Take::alarm;
    exhausted &= ended == Take::ended && s.ring->counts().unread < kSharedBlock;
  }
  const Supply supply = !all_ended ? Supply::flowing
                        : alarm    ? Supply::alarm
                        : exhausted ? Supply::ended
                                    : Supply::flowing;
  const bool changed = supply != supply_;
  if (!changed && !destroy) return;
  supply_ = supply;
  uint64_t destroyed = 0;
  for (auto i = clients_.begin(); i != clients_.end();) {
    Client& c = *(i++)->second;
    if (c.ring && changed) c.ring->set_state(supply);  // before the ring is emptied: no take may come between
    if (destroy) {
      if (c.ring && c.ring->look()) {
        destroyed += c.ring->unread();
        c.ring->destroy();
        c.ring->ask();
      }
      destroyed += c.draw_have;
      c.draw_have = 0;
      wipe(c.drawn, sizeof c.drawn);
    }
    if (changed && c.greeted) send_state(c);
  }
  counts_.destroyed_bytes += destroyed;
  if (destroy) log(BrokerEvent::destroyed, nullptr, "health alarm", destroyed);
}

// --- other threads ---

void BrokerServer::set_rules(const BrokerRules& rules) {
  std::lock_guard<std::mutex> lock(lock_);
  rules_ = rules;
  for (auto& [uid, user] : users_) user.quota.set_rate(rules.user_bytes_per_s);
  for (auto i = clients_.begin(); i != clients_.end();) {
    Client& c = *(i++)->second;
    c.quota.set_rate(rules.client_bytes_per_s);
    if (!allowed(c.fd, c.uid, c.gid)) drop(c, "its user is not on the broker's list any more");
  }
  throttled_until_s_ = 0;
  tick();
}

void BrokerServer::set_serves(std::string serves) {
  std::lock_guard<std::mutex> lock(lock_);
  serves_ = std::move(serves);
}

void BrokerServer::announce(std::string how) {
  std::lock_guard<std::mutex> lock(lock_);
  if (how == how_) return;
  how_ = std::move(how);
  for (auto& [id, c] : clients_)
    if (c->greeted) send_state(*c);
}

void BrokerServer::log(BrokerEvent::Kind kind, const Client* c, std::string text, uint64_t bytes) {
  BrokerEvent e{kind, utc_s(), c ? c->id : 0, c ? c->pid : 0, c ? c->uid : 0, c ? c->gid : 0, bytes, std::move(text)};
  std::lock_guard<std::mutex> lock(events_lock_);
  if (events_.size() >= kMostEvents) {
    events_.pop_front();
    events_lost_++;
  }
  events_.push_back(std::move(e));
  events_changed_.notify_all();
}

std::vector<BrokerEvent> BrokerServer::events(size_t n, double timeout_s) {
  std::unique_lock<std::mutex> lock(events_lock_);
  events_changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), [&] { return !events_.empty(); });
  std::vector<BrokerEvent> out;
  while (!events_.empty() && out.size() < n) {
    out.push_back(std::move(events_.front()));
    events_.pop_front();
  }
  return out;
}

std::vector<ClientFacts> BrokerServer::clients() const {
  std::lock_guard<std::mutex> lock(lock_);
  std::vector<ClientFacts> out;
  const double now = monotonic_s();
  for (const auto& [id, c] : clients_)
    out.push_back({id, c->pid, c->uid, c->gid, now - c->since_s, c->bytes, c->draws, c->ring ? c->ring->unread() : 0,
                   c->ring != nullptr, c->throttled});
  return out;
}

BrokerCounts BrokerServer::counts() const {
  std::lock_guard<std::mutex> lock(lock_);
  BrokerCounts counts = counts_;
  counts.clients = clients_.size();
  return counts;
}

Supply BrokerServer::supply() const {
  std::lock_guard<std::mutex> lock(lock_);
  return supply_;
}

}  // namespace everett
