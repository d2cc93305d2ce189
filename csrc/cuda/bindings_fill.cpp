// Python names and checks of the fills on the GPU, and of masks as packed bits. Addresses are the device's.
#include <pybind11/pybind11.h>

#include "cuda/bindings_record.h"
#include "cuda/fill.h"
#include "cuda/keep_bits.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace everett {
namespace {

void fill(int kind, const py::object& record, int generator, u32 tag, int type, u64 p, u64 out, i64 n, u64 e0, u32 s,
          int device, u64 stream, bool one_p) {
  if (kind < 0 || kind > 8)
    throw py::value_error(
        "kind is 0 words, 1 uniform, 2 normal, 3 exponential, 4 gumbel, 5 bernoulli, 6 integers, 7 gamma or 8 log_gamma");
  if (type < 0 || type > 7)
    throw py::value_error("type is 0 fp32, 1 fp64, 2 bf16, 3 fp16 or, for words, 4 uint32, for integers 7 int64");
  if (n < 0) throw py::value_error("n must not be negative");
  FillCall c{};
  c.kind = static_cast<Fill>(kind);
  c.type = static_cast<DType>(type);
  c.generator = generator_named(generator);
  c.record = record_source(record);
  c.tag = tag, c.s = s;
  c.p = reinterpret_cast<const u64*>(p);
  c.one_p = one_p;
  c.out = reinterpret_cast<void*>(out);
  if (c.kind >= Fill::bernoulli && n > 0 && (p == 0 || p % sizeof(u64) != 0))
    throw py::value_error("p is the address of the parameters, 8 bytes each");
  if (out % bytes_of(c.type) != 0) throw py::value_error("out must be a multiple of the type's size");
  DeviceGuard guard(device);
  launch_fill(c, (u64)n, e0, reinterpret_cast<cudaStream_t>(stream));
}

void keep_bits(const py::object& record, int generator, double p, u64 out, i64 n, u64 e0, u32 s, int device, u64 stream) {
  if (!(p >= 0 && p <= 1)) throw py::value_error("p must be from 0 to 1");
  if (n < 0) throw py::value_error("n must not be negative");
  const KeepBitsCall c{generator_named(generator), record_source(record), s, threshold_of(p), reinterpret_cast<u8*>(out)};
  DeviceGuard guard(device);
  launch_keep_bits(c, (u64)n, e0, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_fills(py::module_& m) {
  m.def("fill", &fill, py::arg("kind"), py::arg("record"), py::arg("generator"), py::arg("tag"), py::arg("type"),
        py::arg("p"), py::arg("out"), py::arg("n"), py::arg("e0"), py::arg("s"), py::arg("device"), py::arg("stream"),
        py::arg("one_p") = false,
        "Fills n contiguous elements whose first has logical index e0. p: the address of n parameters, or with one_p of one: "
        "fp64 probabilities (bernoulli), how many integers there are (uint64, 0 for 2^64), fp64 shapes (gamma, log_gamma).");
  m.def("keep_bits", &keep_bits, py::arg("record"), py::arg("generator"), py::arg("p"), py::arg("out"), py::arg("n"),
        py::arg("e0"), py::arg("s"), py::arg("device"), py::arg("stream"),
        "Keep masks as packed bits: bit i%8 of byte i//8 is 1 where element i, with logical index e0 + i, is kept; the bits "
        "of the last byte beyond n are 0.");
}

}  // namespace everett
