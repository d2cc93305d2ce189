// Emulated streams and events. At first work runs at once, as if every call waited. Once deferred, it waits in its
// stream until something needs it (a synchronization) or a test lets it go in an order drawn from a seed: an order that
// real streams allow, and that shows a missing event.
#pragma once

#include <stdint.h>

#include <deque>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

typedef struct CUstream_st* cudaStream_t;
struct CUevent_st {
  uint64_t recorded = 0, done = 0;  // counts of records: queued, and passed
  int device = 0;
};
typedef CUevent_st* cudaEvent_t;

namespace emulation {

class Streams {
 public:
  struct Item {
    std::function<void()> work;
    cudaEvent_t event = nullptr;  // null: just work
    uint64_t count = 0;
    enum { none, record, wait } kind = none;
  };
  using Graph = std::vector<Item>;

  bool deferred = false;

  void add(cudaStream_t stream, std::function<void()> work) { add(stream, Item{std::move(work)}); }
  void record(cudaStream_t stream, cudaEvent_t event) {
    add(stream, Item{nullptr, event, ++event->recorded, Item::record});
  }
  void wait(cudaStream_t stream, cudaEvent_t event) {
    add(stream, Item{nullptr, event, event->recorded, Item::wait});
  }

  // Runs what must have run before the host may go on, and nothing else.
  void finish(cudaStream_t stream) {
    while (!queues_[stream].empty()) step_towards(stream);
  }
  void finish(cudaEvent_t event) {
    while (event->done < event->recorded) step_towards(stream_that_records(event, event->recorded));
  }
  void finish_all() {
    for (auto& [stream, queue] : queues_) finish(stream);
  }
  // Runs up to `steps` pieces of work, each from a stream drawn among those that may go on.
  void run(uint32_t seed, int steps) {
    std::mt19937 random(seed);
    for (; steps > 0; steps--) {
      std::vector<cudaStream_t> ready;
      for (auto& [stream, queue] : queues_)
        if (!queue.empty() && may_go(queue.front())) ready.push_back(stream);
      if (ready.empty()) return;
      pop(ready[random() % ready.size()]);
    }
  }
  size_t pending() const {
    size_t n = 0;
    for (auto& [stream, queue] : queues_) n += queue.size();
    return n;
  }

  // Between begin and end the work of one stream is kept instead of done, as a graph that can be replayed.
  void begin_capture(cudaStream_t stream) { capturing_ = true, captured_ = stream, capture_id_++, graph_.clear(); }
  Graph end_capture() {
    capturing_ = false;
    return std::move(graph_);
  }
  void replay(const Graph& graph, cudaStream_t stream) {
    for (const Item& item : graph) add(stream, item);
  }
  uint64_t capture_of(cudaStream_t stream) const { return capturing_ && stream == captured_ ? capture_id_ : 0; }

 private:
  void add(cudaStream_t stream, Item item) {
    if (capture_of(stream) != 0) return graph_.push_back(std::move(item));
    queues_[stream].push_back(std::move(item));
    if (!deferred) finish(stream);
  }
  static bool may_go(const Item& item) { return item.kind != Item::wait || item.event->done >= item.count; }

  void pop(cudaStream_t stream) {
    Item item = std::move(queues_[stream].front());
    queues_[stream].pop_front();
    if (item.kind == Item::record && item.event->done < item.count) item.event->done = item.count;
    if (item.work) item.work();
  }
  // One piece of work that brings `stream` on: its own next, or one of a stream that it waits for.
  void step_towards(cudaStream_t stream) {
    for (size_t hops = 0; hops <= queues_.size(); hops++) {
      const Item& next = queues_[stream].front();
      if (may_go(next)) return pop(stream);
      stream = stream_that_records(next.event, next.count);
    }
    throw std::logic_error("streams wait for each other in a circle");
  }
  cudaStream_t stream_that_records(cudaEvent_t event, uint64_t count) const {
    for (auto& [stream, queue] : queues_)
      for (const Item& item : queue)
        if (item.kind == Item::record && item.event == event && item.count >= count) return stream;
    throw std::logic_error("an event is waited for that nothing records");
  }

  std::map<cudaStream_t, std::deque<Item>> queues_;
  bool capturing_ = false;
  cudaStream_t captured_ = nullptr;
  uint64_t capture_id_ = 0;
  Graph graph_;
};

inline Streams streams;

}  // namespace emulation
