// Python's names for the entropy path: ring, health, conditioner, pipeline, feed. Argument checks only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <string>

#include "conditioner.h"
#include "feed.h"
#include "health.h"
#include "pipeline.h"
#include "ring.h"
#include "sha256.h"

namespace py = pybind11;

namespace everett {
namespace {

using Clock = std::chrono::steady_clock;

struct Bytes {
  uint8_t* data;
  size_t size;
};

Bytes bytes_of(const py::buffer_info& info) {
  if (info.ndim != 1 || (info.size > 1 && info.strides[0] != info.itemsize))
    throw py::value_error("a contiguous buffer of one dimension is needed");
  return {static_cast<uint8_t*>(info.ptr), size_t(info.size * info.itemsize)};
}

// Waits without the GIL, in slices, so that Ctrl-C is seen. timeout_s < 0: as long as it takes.
Take take_with_signals(RingReader& ring, uint8_t* out, size_t n, double timeout_s) {
  if (std::isnan(timeout_s)) throw py::value_error("timeout_s is not a number");
  // A small take that can be had at once keeps the GIL: to get it back from a spinning thread would take 5 ms.
  if (n <= 65536) {
    Take got = ring.try_take(out, n);
    if (got != Take::empty || timeout_s == 0) return got;
  }
  constexpr double kSlice_s = 0.2;
  const Clock::time_point start = Clock::now();
  for (;;) {
    double left = kSlice_s;
    if (timeout_s >= 0)
      left = std::min(kSlice_s, timeout_s - std::chrono::duration<double>(Clock::now() - start).count());
    Take got;
    {
      py::gil_scoped_release release;
      got = ring.take(out, n, std::max(left, 0.0));
    }
    if (got != Take::empty || left < kSlice_s) return got;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

HashBlocks python_hash(py::function f) {
  // The last owner of the pipeline may drop it on a thread that does not hold the GIL.
  std::shared_ptr<py::function> hash(new py::function(std::move(f)), [](py::function* p) {
    py::gil_scoped_acquire gil;
    delete p;
  });
  return [hash](const uint8_t* raw, size_t n, size_t blocks, uint8_t* out) {
    py::gil_scoped_acquire gil;
    std::string made;
    try {
      made = py::bytes((*hash)(py::bytes(reinterpret_cast<const char*>(raw), n * blocks), n));
    } catch (const py::error_already_set& e) {  // it travels to another thread: as text, not as Python objects
      throw std::runtime_error(e.what());
    }
    if (made.size() != blocks * kBlock) throw std::runtime_error("the hash gave a wrong number of bytes");
    std::copy(made.begin(), made.end(), out);
    wipe(made.data(), made.size());
  };
}

Health make_health(py::object cutoffs, const std::string& bit_order, const std::string& fingerprint_key,
                   std::optional<bool> avx2) {
  if (fingerprint_key.size() != 16) throw py::value_error("the fingerprint key has 16 bytes");
  if (bit_order != "msb_first" && bit_order != "lsb_first")
    throw py::value_error("bit_order is 'msb_first' or 'lsb_first', not '" + bit_order + "'");
  const Cutoffs c{cutoffs.attr("rct_bytes").cast<uint32_t>(), cutoffs.attr("apt_bytes").cast<uint32_t>(),
                  cutoffs.attr("rct_bits").cast<uint32_t>(), cutoffs.attr("apt_bits").cast<uint32_t>()};
  return Health(c, bit_order == "msb_first" ? BitOrder::msb_first : BitOrder::lsb_first,
                reinterpret_cast<const uint8_t*>(fingerprint_key.data()), avx2.value_or(has_avx2()));
}

void bind_ring(py::module_& m) {
  py::enum_<Take>(m, "Take", "What a take answers")
      .value("ok", Take::ok)
      .value("empty", Take::empty)
      .value("ended", Take::ended)
      .value("failed", Take::failed)
      .value("alarm", Take::alarm)
      .value("closed", Take::closed)
      .value("forked", Take::forked);

  py::class_<RingReader, std::shared_ptr<RingReader>>(m, "RingReader", "What consumers see of a ring, whoever fills it")
      .def(
          "take_into",
          [](RingReader& ring, py::buffer out, double timeout_s) {
            py::buffer_info info = out.request(true);
            Bytes to = bytes_of(info);
            return take_with_signals(ring, to.data, to.size, timeout_s);
          },
          py::arg("out"), py::arg("timeout_s") = -1.0, "Fills `out` whole or leaves it; waits up to timeout_s (< 0: ever)")
      .def("discard", &RingReader::discard, py::arg("n"), py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>(),
           "Takes n bytes and destroys them; returns how many there were in time")
      .def("destroy_unread", &RingReader::destroy_unread, py::call_guard<py::gil_scoped_release>())
      .def("end", &RingReader::end, py::arg("why"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("capacity", &RingReader::capacity)
      .def_property_readonly("locked", &RingReader::locked)
      .def_property_readonly("forked", &RingReader::forked)
      .def_property_readonly("destructions", &RingReader::destructions, "How often unread bytes were destroyed")
      .def_property_readonly("unread", [](const RingReader& r) { return r.counts().unread; })
      .def_property_readonly("bytes_in", [](const RingReader& r) { return r.counts().in; })
      .def_property_readonly("bytes_out", [](const RingReader& r) { return r.counts().out; })
      .def_property_readonly("bytes_destroyed", [](const RingReader& r) { return r.counts().destroyed; });

  py::class_<Ring, RingReader, std::shared_ptr<Ring>>(m, "Ring", "Conditioned bytes, handed out at most once, zeroed behind")
      .def(py::init<size_t>(), py::arg("capacity"))
      .def(
          "put",
          [](Ring& ring, py::buffer data) {
            py::buffer_info info = data.request();
            Bytes from = bytes_of(info);
            py::gil_scoped_release release;
            return ring.put(from.data, from.size);
          },
          py::arg("data"), "Single producer; waits for room; False when the ring was ended")
      .def("reopen", &Ring::reopen, py::call_guard<py::gil_scoped_release>())
      .def("all_zero", &Ring::all_zero, py::call_guard<py::gil_scoped_release>());
}

void bind_health(py::module_& m) {
  m.def("has_avx2", &has_avx2);
  m.def(
      "siphash128",
      [](const std::string& key, const std::string& data) {
        if (key.size() != 16) throw py::value_error("SipHash takes a key of 16 bytes");
        Fingerprint f = SipHash128(reinterpret_cast<const uint8_t*>(key.data()))(
            reinterpret_cast<const uint8_t*>(data.data()), data.size());
        return py::bytes(reinterpret_cast<const char*>(&f), sizeof f);
      },
      py::arg("key"), py::arg("data"));
  py::class_<Alarm>(m, "Alarm")
      .def_property_readonly("test", [](const Alarm& a) { return test_name(a.test); })
      .def_readonly("offset", &Alarm::offset)
      .def_readonly("value", &Alarm::value)
      .def_readonly("cutoff", &Alarm::cutoff);
  py::class_<Health>(m, "Health")
      .def(py::init(&make_health), py::arg("cutoffs"), py::arg("bit_order") = "msb_first", py::arg("fingerprint_key"),
           py::arg("avx2") = py::none())
      .def(
          "scan",
          [](Health& health, py::buffer units, uint64_t offset) {
            py::buffer_info info = units.request();
            Bytes raw = bytes_of(info);
            if (raw.size % kUnit != 0) throw py::value_error("whole units of 512 bytes are needed");
            py::gil_scoped_release release;
            Health::Scan scan = health.scan(raw.data, raw.size / kUnit, offset);
            return std::make_pair(scan.passed, scan.alarm);
          },
          py::arg("units"), py::arg("offset") = 0, "(units that passed, first alarm or None)")
      .def("break_sequence", &Health::break_sequence)
      .def("forget_units", &Health::forget_units);
}

void bind_pipeline(py::module_& m) {
  m.def("sha256_library", &libcrypto_name, "The libcrypto in use, or '' where none opens");
  m.def(
      "sha256_blocks",
      [](py::buffer raw, size_t block_bytes) {
        py::buffer_info info = raw.request();
        Bytes from = bytes_of(info);
        if (block_bytes == 0 || from.size % block_bytes != 0) throw py::value_error("whole blocks of raw bytes are needed");
        std::string out(from.size / block_bytes * kBlock, '\0');
        {
          py::gil_scoped_release release;
          sha256_libcrypto()(from.data, block_bytes, from.size / block_bytes, reinterpret_cast<uint8_t*>(&out[0]));
        }
        return py::bytes(out);
      },
      py::arg("raw"), py::arg("block_bytes"), "SHA-256 of each piece of block_bytes raw bytes, by libcrypto");
  m.attr("TESTS") = [] {
    py::tuple names(kTests);
    for (int i = 0; i < kTests; i++) names[size_t(i)] = test_name(Test(i));
    return names;
  }();
  py::enum_<Flow>(m, "Flow")
      .value("starting", Flow::starting)
      .value("flowing", Flow::flowing)
      .value("stopped", Flow::stopped);
  py::class_<AlarmRecord>(m, "AlarmRecord")
      .def_property_readonly("test", [](const AlarmRecord& r) { return test_name(r.alarm.test); })
      .def_property_readonly("offset", [](const AlarmRecord& r) { return r.alarm.offset; })
      .def_property_readonly("value", [](const AlarmRecord& r) { return r.alarm.value; })
      .def_property_readonly("cutoff", [](const AlarmRecord& r) { return r.alarm.cutoff; })
      .def_readonly("at_s", &AlarmRecord::at_s)
      .def_readonly("startup", &AlarmRecord::startup)
      .def_readonly("permanent", &AlarmRecord::permanent);

  py::class_<Pipeline, std::shared_ptr<Pipeline>>(m, "Pipeline", "Raw bytes in, proven and conditioned blocks to a ring")
      .def(py::init([](std::shared_ptr<Ring> ring, py::object cutoffs, const std::string& fingerprint_key,
                       size_t block_bytes, const std::string& bit_order, size_t startup_bytes, py::object hash) {
             HashBlocks blocks;
             if (hash.is_none())
               blocks = sha256_libcrypto();
             else if (py::isinstance<py::str>(hash) && hash.cast<std::string>() == "none" && block_bytes == kBlock)
               blocks = pass_through();
             else if (py::isinstance<py::function>(hash))
               blocks = python_hash(hash);
             else
               throw py::value_error("hash is None (libcrypto), a function, or 'none' with 32 raw bytes a block");
             return std::make_shared<Pipeline>(ring, make_health(cutoffs, bit_order, fingerprint_key, {}), blocks,
                                               block_bytes, startup_bytes);
           }),
           py::arg("ring"), py::arg("cutoffs"), py::kw_only(), py::arg("fingerprint_key"), py::arg("block_bytes"),
           py::arg("bit_order") = "msb_first", py::arg("startup_bytes") = 4096, py::arg("hash") = py::none())
      .def(
          "push",
          [](Pipeline& pipeline, py::buffer raw, double now_s) {
            py::buffer_info info = raw.request(true);
            Bytes from = bytes_of(info);
            py::gil_scoped_release release;
            return pipeline.push(from.data, from.size, now_s);
          },
          py::arg("raw"), py::arg("now_s"), "Processes and zeroes `raw`; False when nothing more can flow")
      .def("transport_error", &Pipeline::transport_error, py::call_guard<py::gil_scoped_release>())
      .def("device_alarm", &Pipeline::device_alarm, py::arg("status"), py::arg("expected"), py::arg("now_s"),
           py::call_guard<py::gil_scoped_release>())
      .def("forget_units", &Pipeline::forget_units)
      .def("reopen", &Pipeline::reopen)
      .def_property_readonly("flow", &Pipeline::flow)
      .def_property_readonly("alarms", &Pipeline::alarms)
      .def_property_readonly("counts",
                             [](const Pipeline& p) {
                               const Pipeline::Counts c = p.counts();
                               py::dict alarms;
                               for (int i = 0; i < kTests; i++) alarms[test_name(Test(i))] = c.alarms[i];
                               return py::dict(py::arg("raw_in") = c.raw_in, py::arg("raw_held") = c.raw_held,
                                               py::arg("raw_dropped") = c.raw_dropped,
                                               py::arg("blocks_out") = c.blocks_out,
                                               py::arg("transport_errors") = c.transport_errors,
                                               py::arg("transients") = c.transients, py::arg("startups") = c.startups,
                                               py::arg("alarms") = alarms);
                             })
      .def("raw_offset", &Pipeline::raw_offset, py::arg("block"), "Raw offset of the bytes behind a block (IndexError)")
      .def_property_readonly("block_bytes", &Pipeline::block_bytes)
      .def_property_readonly("startup_bytes", &Pipeline::startup_bytes);

  py::class_<SecretPages, std::shared_ptr<SecretPages>>(m, "RawBuffer", py::buffer_protocol())
      .def_buffer([](SecretPages& pages) {
        return py::buffer_info(pages.data(), 1, "B", 1, {py::ssize_t(pages.bytes())}, {py::ssize_t(1)});
      })
      .def_property_readonly("locked", &SecretPages::locked);
  py::class_<Feed, std::shared_ptr<Feed>>(m, "Feed", "Two raw buffers between a reader and the pipeline's thread")
      .def(py::init([](std::shared_ptr<Pipeline> pipeline, size_t buffer_bytes, bool lock) {
             return std::shared_ptr<Feed>(new Feed(pipeline, buffer_bytes, lock), [](Feed* feed) {
               py::gil_scoped_release release;  // its thread may need the GIL (hashlib) before it can end
               delete feed;
             });
           }),
           py::arg("pipeline"), py::arg("buffer_bytes"), py::arg("lock") = true)
      .def_property_readonly("buffer", &Feed::buffer)
      .def("submit", &Feed::submit, py::arg("n"), py::arg("now_s"), py::call_guard<py::gil_scoped_release>())
      .def("drain", &Feed::drain, py::call_guard<py::gil_scoped_release>())
      .def("stop", &Feed::stop, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_entropy(py::module_& m) {
  bind_ring(m);
  bind_health(m);
  bind_pipeline(m);
}

}  // namespace everett
