// What the bindings of the CPU kernels share: a stream from a record in Python's bytes, and leaving the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings_layout.h"
#include "cpu/kernels.h"

namespace everett {

inline Stream stream_of(const pybind11::bytes& record, u32 tag, u32 s) { return {record_from(record), tag, s}; }

template <class Run>
void without_gil(i64 n, Run run) {
  if (n < kReleaseGil) return run();
  pybind11::gil_scoped_release release;
  run();
}

}  // namespace everett
