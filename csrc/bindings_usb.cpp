// Python's name for the USB reader. Argument checks only.
#include <pybind11/pybind11.h>

#include <cmath>

#include "usb_read.h"

namespace py = pybind11;

namespace everett {

void bind_usb(py::module_& m) {
  py::class_<UsbReader, std::shared_ptr<UsbReader>>(m, "UsbReader", "Reads a bulk endpoint ahead, in its own thread")
      .def(py::init([](uintptr_t bulk_transfer, uintptr_t handle, unsigned endpoint, size_t transfer_bytes,
                       unsigned timeout_ms, size_t discard_bytes, size_t ahead_bytes) {
             if (bulk_transfer == 0 || handle == 0) throw py::value_error("bulk_transfer and handle are addresses");
             if (endpoint < 0x80 || endpoint > 0x8F) throw py::value_error("endpoint is one that reads, 0x80 to 0x8f");
             if (transfer_bytes == 0 || transfer_bytes > (1 << 24) || ahead_bytes > (1 << 28))
               throw py::value_error("transfer_bytes is 1 to 16 MiB, ahead_bytes at most 256 MiB");
             if (timeout_ms == 0) throw py::value_error("timeout_ms 0 would wait for ever, and stop() with it");
             return std::shared_ptr<UsbReader>(
                 new UsbReader(reinterpret_cast<BulkTransfer>(bulk_transfer), reinterpret_cast<void*>(handle),
                               uint8_t(endpoint), transfer_bytes, timeout_ms, discard_bytes, ahead_bytes),
                 [](UsbReader* reader) {
                   py::gil_scoped_release release;  // its thread may have to leave a transfer first
                   delete reader;
                 });
           }),
           py::kw_only(), py::arg("bulk_transfer"), py::arg("handle"), py::arg("endpoint"), py::arg("transfer_bytes"),
           py::arg("timeout_ms"), py::arg("discard_bytes"), py::arg("ahead_bytes"))
      .def(
          "take",
          [](UsbReader& reader, py::buffer out, size_t enough, double timeout_s) {
            py::buffer_info info = out.request(true);
            if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1)
              throw py::value_error("a contiguous buffer of bytes is needed");
            if (!(timeout_s >= 0 && timeout_s < 1e6)) throw py::value_error("timeout_s is in seconds, at least 0");
            py::gil_scoped_release release;
            const UsbReader::Taken taken =
                reader.take(static_cast<uint8_t*>(info.ptr), size_t(info.size), enough, timeout_s);
            return std::make_pair(taken.bytes, taken.status);
          },
          py::arg("out"), py::arg("enough"), py::arg("timeout_s"), "(bytes, status): see usb_read.h")
      .def("stop", &UsbReader::stop, py::call_guard<py::gil_scoped_release>())
      .def_readonly_static("SHORT", &UsbReader::kShort)
      .def_readonly_static("STOPPED", &UsbReader::kStopped);
}

}  // namespace everett
