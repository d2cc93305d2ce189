// Layouts and streams from Python's tuples and bytes, for the bindings of CPU and CUDA kernels.
#pragma once

#include <pybind11/pybind11.h>

#include "law/stream.h"
#include "layout.h"

namespace everett {

inline Generator generator_named(int g) {
  if (g < kChaCha8 || g > kPhilox)
    throw pybind11::value_error("generator is 0 ChaCha8, 1 ChaCha12, 2 ChaCha20 or 3 Philox");
  return static_cast<Generator>(g);
}

inline Subkey record_from(const pybind11::bytes& record) {
  char* data;
  Py_ssize_t n;
  if (PyBytes_AsStringAndSize(record.ptr(), &data, &n) != 0 || n != sizeof(Subkey))
    throw pybind11::value_error("a subkey record is 48 bytes");
  Subkey r;
  memcpy(&r, data, sizeof r);
  return r;
}

inline void dims_into(const pybind11::tuple& from, int dims, i64* to, const char* what) {
  if ((int)pybind11::len(from) != dims)
    throw pybind11::value_error(std::string(what) + " must have one number a dimension");
  for (int d = 0; d < dims; d++) to[d] = from[d].cast<i64>();
}

inline Layout layout_of(const pybind11::tuple& size, const pybind11::tuple& in, const pybind11::tuple& extra,
                        const pybind11::tuple& out, const pybind11::tuple& e, u64 e0) {
  Layout l;
  l.dims = (int)pybind11::len(size);
  l.e0 = e0;
  if (l.dims < 1 || l.dims > kMaxDims) throw pybind11::value_error("a layout has 1 to 16 dimensions");
  dims_into(size, l.dims, l.size, "size");
  dims_into(in, l.dims, l.in, "in");
  dims_into(extra, l.dims, l.extra, "extra");
  dims_into(out, l.dims, l.out, "out");
  dims_into(e, l.dims, l.e, "e");
  return l;
}

}  // namespace everett
