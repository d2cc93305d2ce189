// Python's names for reading ahead. Argument checks only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "read_ahead.h"

namespace py = pybind11;

namespace everett {

void bind_read_ahead(py::module_& m) {
  py::enum_<Halt>(m, "Halt", "Why a read-ahead stopped")
      .value("running", Halt::running)
      .value("error", Halt::error)
      .value("end_of_file", Halt::end_of_file)
      .value("deviation", Halt::deviation)
      .value("closed", Halt::closed);
  py::class_<Halted>(m, "Halted")
      .def_readonly("why", &Halted::why)
      .def_readonly("code", &Halted::code)
      .def_readonly("check", &Halted::check)
      .def_readonly("answer", &Halted::answer);
  py::class_<ReadAhead, std::shared_ptr<ReadAhead>>(m, "ReadAhead", "A thread without Python that reads ahead and checks")
      .def(py::init([](int fd, size_t slot_bytes, size_t slots, size_t first_read_bytes,
                       const std::vector<std::tuple<unsigned long, uint32_t, uint32_t>>& checks, size_t check_bytes,
                       double check_s, bool lock) {
             if (slot_bytes == 0 || slots == 0) throw py::value_error("at least one slot of at least one byte is needed");
             if (first_read_bytes == 0 || first_read_bytes > slots * slot_bytes)
               throw py::value_error("the first read takes at least 1 byte, and at most all slots together");
             ReadPlan plan{slot_bytes, slots, first_read_bytes, {}, check_bytes, check_s, lock};
             for (const auto& [request, care, expected] : checks) plan.checks.push_back({request, care, expected});
             return std::shared_ptr<ReadAhead>(new ReadAhead(fd, plan), [](ReadAhead* reader) {
               py::gil_scoped_release release;
               delete reader;
             });
           }),
           py::arg("fd"), py::kw_only(), py::arg("slot_bytes"), py::arg("slots"), py::arg("first_read_bytes"),
           py::arg("checks") = std::vector<std::tuple<unsigned long, uint32_t, uint32_t>>(), py::arg("check_bytes") = 0,
           py::arg("check_s") = 0.0, py::arg("lock") = true)
      .def(
          "take_into",
          [](ReadAhead& reader, py::buffer out, double timeout_s) {
            if (!(timeout_s >= 0)) throw py::value_error("timeout_s must be at least 0");
            py::buffer_info info = out.request(true);
            if (info.ndim != 1 || info.itemsize != 1 || (info.size > 1 && info.strides[0] != 1))
              throw py::value_error("a contiguous buffer of bytes is needed");
            py::gil_scoped_release release;
            return reader.take(static_cast<uint8_t*>(info.ptr), size_t(info.size), timeout_s);
          },
          py::arg("out"), py::arg("timeout_s"), "Fills the front of `out`; how many bytes; 0 after a time-out or a halt")
      .def_property_readonly("halted", &ReadAhead::halted)
      .def("close", &ReadAhead::close, py::arg("wait_s"), py::call_guard<py::gil_scoped_release>(),
           "Whether the thread ended within wait_s");
}

}  // namespace everett
