// A subkey record from Python: its 48 bytes, or the device address of 48 bytes.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings_layout.h"
#include "cuda/record.h"

namespace everett {

inline RecordSource record_source(const pybind11::object& record) {
  if (pybind11::isinstance<pybind11::bytes>(record)) return {record_from(record), nullptr};
  const u64 address = record.cast<u64>();
  if (address == 0 || address % alignof(Subkey) != 0)
    throw pybind11::value_error("a record's device address must be a multiple of 4, and not 0");
  return {{}, reinterpret_cast<const Subkey*>(address)};
}

}  // namespace everett
