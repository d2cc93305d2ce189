// The broker's server: one thread without Python that hands conditioned blocks of 32 bytes to its clients, each block to
// one of them. Bytes come from rings that sources fill, and go straight into the memory of the client they now belong to
// (broker_ring.h) or into its reply (broker_wire.h).
//
// Fair shares: clients with room take turns, each with as much as there is for everybody, at most kQuantum; bytes can be
// cut at every block, so a turn leaves no deficit over. A client that has its fill leaves the queue until it asks.
// No client is waited for: whoever breaks a rule, does not read its replies, or dies is dropped and its memory zeroed.
//
// An alarm of a source destroys what is unread in all rings of clients, whichever source it came from: blocks are not
// told apart once they are there.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "broker_quota.h"
#include "broker_ring.h"
#include "broker_wire.h"
#include "ring.h"

namespace everett {

struct BrokerRules {
  size_t ring_bytes = 65536;  // a client's
  size_t most_clients = 2048, most_clients_of_user = 1024;
  double client_bytes_per_s = 0, user_bytes_per_s = 0;  // 0: no limit
  bool restricted = false;  // only these users and groups; root and the broker's own user always
  std::vector<uid_t> users;
  std::vector<gid_t> groups;
  bool failover = false;       // the first source that gives bytes, not all in turn
  double failover_after_s = 2;  // a source that gives none for so long is passed over
};

// Something for the log. `text` says why, in words.
struct BrokerEvent {
  enum Kind { connected, disconnected, refused, destroyed, ended, reopened, source_used } kind;
  double at_s;  // CLOCK_REALTIME
  uint64_t client;
  pid_t pid;
  uid_t uid;
  gid_t gid;
  uint64_t bytes;  // that went to the client; of `destroyed`: that were unread
  std::string text;
};

struct ClientFacts {
  uint64_t client;
  pid_t pid;
  uid_t uid;
  gid_t gid;
  double connected_s;  // for so long
  uint64_t bytes, draws, unread;
  bool ring, throttled;
};

struct BrokerCounts {
  uint64_t clients, connections, refused, dropped, bytes, destroyed_bytes, draws, throttled;
};

class BrokerServer {
 public:
  // listener: a bound, listening SOCK_SEQPACKET socket, which stays the caller's. serves: the text behind Welcome.
  BrokerServer(int listener, std::vector<std::shared_ptr<Ring>> sources, const BrokerRules& rules, std::string serves);
  ~BrokerServer();
  BrokerServer(const BrokerServer&) = delete;
  BrokerServer& operator=(const BrokerServer&) = delete;

  // Zeroes and drops everything; connections end. May be called twice.
  void stop();
  void set_rules(const BrokerRules& rules);  // connected clients that are no longer allowed are dropped
  void set_serves(std::string serves);       // for clients that come from now on
  void announce(std::string how);            // the text behind State, to all and to those who come

  // Waits up to timeout_s for something to log; at most `n` events, oldest first.
  std::vector<BrokerEvent> events(size_t n, double timeout_s);
  uint64_t events_lost() const { return events_lost_.load(); }
  std::vector<ClientFacts> clients() const;
  BrokerCounts counts() const;
  Supply supply() const;
  // Turns of the thread since the start: for a watchdog, and to see that idling costs nothing. tick() makes it turn.
  uint64_t turns() const { return turns_.load(); }
  void tick();

 private:
  static constexpr size_t kQuantum = 16384;
  static constexpr double kGreeting_s = 5;       // a connection says hello within this time
  static constexpr size_t kMostIdleWakes = 10000;  // wake-ups running that were for nothing
  static constexpr size_t kMostEvents = 4096;

  struct User {
    size_t connections = 0;
    TokenBucket quota;
  };
  struct Client;
  struct SourceSeen {
    std::shared_ptr<Ring> ring;
    uint64_t destructions;
    Take ended;
    double gave_at_s;
  };

  void run();
  int timeout_ms(double now_s);
  void handle(uint64_t what, uint32_t events);
  void accept_some();
  void read_message(Client& c);
  void greet(Client& c, const wire::Hello& hello);
  void want(Client& c, const wire::Draw& draw);
  void look_at_sources();
  void share(double now_s);
  void wake_throttled(double now_s);
  void drop_late_greeters(double now_s);
  size_t available() const;
  size_t take_from_sources(uint8_t* out, size_t n, double now_s);
  size_t serve(Client& c, size_t quantum, double now_s, bool* dry);
  void enqueue(Client& c);
  void settle(Client& c);
  bool send(Client& c, uint16_t type, const void* fixed, size_t fixed_bytes, const std::string& text,
            const int* fds = nullptr, size_t n_fds = 0);
  void send_state(Client& c);
  void refuse(int fd, wire::Refused why, const std::string& text);
  void drop(Client& c, const std::string& why);
  bool allowed(int fd, uid_t uid, gid_t gid) const;
  void log(BrokerEvent::Kind kind, const Client* c, std::string text, uint64_t bytes = 0);
  void watch(int fd, uint64_t what, uint32_t events);

  int listener_, epoll_, wake_, source_signal_;
  mutable std::mutex lock_;  // everything below; the thread holds it except while it waits
  std::vector<SourceSeen> sources_;
  size_t next_source_ = 0, last_used_ = SIZE_MAX;
  BrokerRules rules_;
  std::string serves_, how_;
  Supply supply_ = Supply::flowing;
  std::map<uint64_t, std::unique_ptr<Client>> clients_;
  std::map<uid_t, User> users_;
  std::deque<uint64_t> hungry_;     // clients with room or an open draw, in turn
  std::vector<uint64_t> throttled_;
  double throttled_until_s_ = 0;
  uint64_t next_client_ = 1;
  size_t greeting_ = 0;
  double wanted_since_s_ = 0;  // since when somebody has wanted bytes without a break
  BrokerCounts counts_{};

  std::mutex events_lock_;
  std::condition_variable events_changed_;
  std::deque<BrokerEvent> events_;
  std::atomic<uint64_t> events_lost_{0}, turns_{0};
  std::atomic<bool> quit_{false};
  std::thread thread_;
};

}  // namespace everett
