// What the bindings of all kernels share: arguments from Python, checked.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace everett {

inline Stream stream_of(const pybind11::bytes& record, u32 tag, u32 s) {
  char* data;
  Py_ssize_t n;
  if (PyBytes_AsStringAndSize(record.ptr(), &data, &n) != 0 || n != sizeof(Subkey))
    throw pybind11::value_error("a subkey record is 48 bytes");
  Stream t{{}, tag, s};
  memcpy(&t.subkey, data, sizeof(Subkey));
  return t;
}

inline Generator generator_named(int g) {
  if (g < kChaCha8 || g > kPhilox) throw pybind11::value_error("generator is 0 ChaCha8, 1 ChaCha12, 2 ChaCha20 or 3 Philox");
  return static_cast<Generator>(g);
}

template <class Run>
void without_gil(i64 n, Run run) {
  if (n < kReleaseGil) return run();
  pybind11::gil_scoped_release release;
  run();
}

}  // namespace everett
