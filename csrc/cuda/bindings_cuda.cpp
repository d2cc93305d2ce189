// The Python names of the CUDA module: names and checks only. It imports on machines without a GPU or a driver.
#include <pybind11/pybind11.h>

#include "cuda/law_check.h"

namespace py = pybind11;
using namespace everett;

namespace {

py::bytes law(int generator, const std::string& record, u32 tag, u32 s, double p, int what, u64 first_block, u32 blocks,
              u64 stream) {
  if (record.size() != sizeof(Subkey)) throw py::value_error("a subkey record is 48 bytes");
  if (generator < kChaCha8 || generator > kPhilox) throw py::value_error("generator is 0 to 3");
  if (what < 0 || what > 5) throw py::value_error("what is 0 words, 1 keep, 2 uniform, 3 normal, 4 exponential, 5 gumbel");
  if (!(p >= 0 && p <= 1) || (what == 1 && threshold_of(p).wide))
    throw py::value_error("p: from 1/256 to 31/32, where decisions take 16-bit draws");
  Stream t{{}, tag, s};
  memcpy(&t.subkey, record.data(), sizeof(Subkey));
  std::string out((size_t)blocks * values_per_block(static_cast<LawCheck>(what)) * sizeof(u32), '\0');
  {
    py::gil_scoped_release release;
    law_check(static_cast<Generator>(generator), t, p, static_cast<LawCheck>(what), first_block, blocks,
              reinterpret_cast<u32*>(&out[0]), reinterpret_cast<cudaStream_t>(stream));
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA side of everett_cuda: the stream law on the GPU.";
  m.def("device_count", &device_count, "GPUs that this process can use; RuntimeError where the driver is too old.");
  m.def("law", &law, py::arg("generator"), py::arg("record"), py::arg("tag"), py::arg("s"), py::arg("p"), py::arg("what"),
        py::arg("first_block"), py::arg("blocks"), py::arg("stream") = 0,
        "The law's values of keystream blocks, computed on the current GPU, as bytes of 32-bit words.");
}
