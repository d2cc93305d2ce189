// Python names for what lies on a GPU between the source and the ops: the graphs' key, pools and lanes of direct words.
//
// Each object belongs to one device; callers take turns (a lock in Python). Nothing here takes bits from the source:
// `open` gives the pinned memory, and Python has the ring write into it.
#include <pybind11/pybind11.h>

#include "cuda/direct.h"
#include "cuda/key_slot.h"
#include "cuda/lane.h"
#include "cuda/pool.h"

namespace py = pybind11;

namespace everett {
namespace {

cudaStream_t stream_at(u64 handle) { return reinterpret_cast<cudaStream_t>(handle); }

// The number of the capture that the stream is in; 0: none.
u64 capture_id(int device, u64 stream) {
  DeviceGuard guard(device);
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(stream_at(stream), &status, &id), "asking whether a graph is captured");
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

DirectCall direct_call(int kind, int type, u64 p, u64 out, u64 n) {
  if (kind < 0 || kind > static_cast<int>(Fill::bernoulli)) throw py::value_error("unknown kind of fill");
  const bool words = kind == static_cast<int>(Fill::words);
  if (words ? type != static_cast<int>(DType::u32) : type < 0 || type > static_cast<int>(DType::f16))
    throw py::value_error("type is 4 for words, and 0 fp32, 1 fp64, 2 bf16 or 3 fp16 for all other kinds");
  return {static_cast<Fill>(kind), static_cast<DType>(type), reinterpret_cast<const double*>(p), reinterpret_cast<void*>(out),
          n};
}

u64 words_of(const DirectCall& c) {
  const u64 values = (u64)direct_values(c.kind, c.type);
  return (c.n + values - 1) / values * (u64)direct_words(c.kind, c.type);
}

// Converts from granule `first` on as much as one slab gives; returns the granules done.
u64 pool_direct(Pool& pool, int device, int kind, int type, u64 p, u64 out, u64 n, u64 first, u64 stream) {
  const DirectCall call = direct_call(kind, type, p, out, n);
  const u64 per = (u64)direct_words(call.kind, call.type), left = words_of(call) - first * per;
  if (left == 0) return 0;
  DeviceGuard guard(device);
  const u64 words = pool.use(left, per, stream_at(stream), [&](const u64* at, u64 got) {
    launch_direct(call, {at}, first, got / per, stream_at(stream));
  });
  return words / per;
}

// The whole call from the lane; *start: 8 bytes of the op's own on the device.
void lane_direct(Lane& lane, int device, int kind, int type, u64 p, u64 out, u64 n, u64 start, u64 stream) {
  const DirectCall call = direct_call(kind, type, p, out, n);
  const u64 words = words_of(call);
  if (words == 0) return;
  DeviceGuard guard(device);
  u64* at = reinterpret_cast<u64*>(start);
  const WordSource from = lane.reserve(words, at, stream_at(stream));
  launch_direct(call, from, 0, words / (u64)direct_words(call.kind, call.type), stream_at(stream));
  lane.finish(words, at, stream_at(stream));
}

py::object memory_or_none(u8* memory, u64 bytes) {
  if (memory == nullptr) return py::none();
  return py::memoryview::from_memory(memory, (py::ssize_t)bytes);
}

// Local to the module: the tests' emulated module has classes of the same names in the same process.
void bind_classes(py::module_& m) {
  py::class_<KeySlot>(m, "KeySlot", py::module_local(), "The key that a GPU's captured graphs read: 32 bytes on the device")
      .def(py::init<int>(), py::arg("device"))
      .def("open", [](KeySlot& k) { return reinterpret_cast<u64>(k.open()); }, "Address of 32 host bytes for the next key")
      .def("abandon", &KeySlot::abandon)
      .def("publish", [](KeySlot& k, u64 stream) { k.publish(stream_at(stream)); }, py::arg("stream"))
      .def("reap", &KeySlot::reap, "Wipes host memory whose copies are over")
      .def("forget", [](KeySlot& k, u64 stream) { k.forget(stream_at(stream)); }, py::arg("stream"))
      .def_property_readonly("address", [](const KeySlot& k) { return reinterpret_cast<u64>(k.data()); })
      .def_property_readonly("forked", &KeySlot::forked)
      .def_property_readonly("staging_all_zero", &KeySlot::staging_all_zero);

  py::class_<Pool>(m, "Pool", py::module_local(), "Direct words of one GPU in slabs, copied ahead")
      .def(py::init<int, u64, int>(), py::arg("device"), py::arg("slab_words"), py::arg("slabs"))
      .def("open", [](Pool& p) { return memory_or_none(p.open(), p.slab_words() * sizeof(u64)); },
           "Host memory for the next slab's words, or None while all slabs are in use")
      .def("submit", &Pool::submit, py::arg("words"))
      .def("abandon", &Pool::abandon)
      .def("direct", &pool_direct, py::arg("device"), py::arg("kind"), py::arg("type"), py::arg("p"), py::arg("out"),
           py::arg("n"), py::arg("first"), py::arg("stream"),
           "Values of granules first, first+1, ... of n values, as far as the next slab reaches: granules done, 0 when empty")
      .def("reap", &Pool::reap)
      .def("destroy", &Pool::destroy)
      .def("all_zero", &Pool::all_zero)
      .def_property_readonly("ready", &Pool::ready)
      .def_property_readonly("skipped", &Pool::skipped)
      .def_property_readonly("slab_words", &Pool::slab_words)
      .def_property_readonly("forked", &Pool::forked);

  py::class_<Lane>(m, "Lane", py::module_local(), "Direct words for the captured graphs of one GPU")
      .def(py::init<int, u64>(), py::arg("device"), py::arg("capacity"))
      .def("direct", &lane_direct, py::arg("device"), py::arg("kind"), py::arg("type"), py::arg("p"), py::arg("out"),
           py::arg("n"), py::arg("start"), py::arg("stream"), "n values, for a capture; start: address of 8 device bytes")
      .def("read",
           [](Lane& l, u64 stream) {
             const LaneState s = l.read(stream_at(stream));
             return py::make_tuple(s.reserved, s.finished, s.limit, s.failed);
           },
           py::arg("stream"), "(reserved, finished, limit, failed); waits for the stream")
      .def_property_readonly("room", &Lane::room)
      .def("open", [](Lane& l, u64 stream) { return memory_or_none(l.open(stream_at(stream)), l.capacity() * sizeof(u64)); },
           py::arg("stream"))
      .def("submit", [](Lane& l, u64 words, u64 stream) { l.submit(words, stream_at(stream)); }, py::arg("words"),
           py::arg("stream"))
      .def("abandon", &Lane::abandon)
      .def("forgive", [](Lane& l, u64 stream) { l.forgive(stream_at(stream)); }, py::arg("stream"))
      .def("destroy", [](Lane& l, u64 stream) { l.destroy(stream_at(stream)); }, py::arg("stream"))
      .def_property_readonly("forked", &Lane::forked);
}

}  // namespace

void bind_pool(py::module_& m) {
  m.def("capture_id", &capture_id, py::arg("device"), py::arg("stream"), "Number of the capture in progress; 0: none");
  m.def(
      "direct_size",
      [](int kind, int type, u64 n) {
        const DirectCall call = direct_call(kind, type, 0, 0, n);
        const u64 per = (u64)direct_words(call.kind, call.type);
        return py::make_tuple(words_of(call) / per, per);
      },
      py::arg("kind"), py::arg("type"), py::arg("n"), "(granules, 64-bit words in each) of n values");
  bind_classes(m);
}

}  // namespace everett
