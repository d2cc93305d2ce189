// Python names for the journal, the replay's script and what they need: checks of arguments only.
#include <pybind11/pybind11.h>
#include <string.h>

#include "crc32c.h"
#include "journal.h"
#include "script.h"

namespace py = pybind11;

namespace everett {
namespace {

const u8* bytes_of(const std::string_view& s) { return reinterpret_cast<const u8*>(s.data()); }

py::bytes to_bytes(const RecordHead& head) { return py::bytes(reinterpret_cast<const char*>(&head), sizeof(head)); }

RecordHead head_of(const std::string_view& body) {
  if (body.size() < sizeof(RecordHead)) throw py::value_error("a record's head has 40 bytes");
  RecordHead head{RecordType::close};
  memcpy(&head, body.data(), sizeof(head));
  return head;
}

template <class F>
auto with_bytes(py::buffer data, F&& f) {
  py::buffer_info info = data.request();
  if (info.ndim != 1 || (info.size > 1 && info.strides[0] != info.itemsize))
    throw py::value_error("a contiguous buffer of one dimension is needed");
  return f(static_cast<const u8*>(info.ptr), size_t(info.size * info.itemsize));
}

}  // namespace

void bind_journal(py::module_& m) {
  py::class_<KeyWitness>(m, "KeyWitness", "Who is told of every draw before its key is used");

  py::class_<Journal, KeyWitness>(m, "Journal", "Writes the records of a journal")
      .def(py::init([](int descriptor, py::bytes header, py::object file_key, py::bytes header_hash) {
             std::string_view hash = header_hash, key;
             if (!file_key.is_none()) key = file_key.cast<py::bytes>();
             if (hash.size() != 32 || (!file_key.is_none() && key.size() != 32))
               throw py::value_error("header_hash and file_key have 32 bytes");
             return std::make_unique<Journal>(descriptor, header, key.empty() ? nullptr : bytes_of(key),
                                              bytes_of(hash));
           }),
           py::arg("descriptor"), py::arg("header"), py::arg("file_key"), py::arg("header_hash"))
      .def(
          "words",
          [](Journal& j, py::buffer data, int device, u8 store) {
            return with_bytes(data, [&](const u8* p, size_t n) { return j.words(device, store, p, n); });
          },
          py::arg("data"), py::arg("device"), py::arg("store"), "Direct words; False: not recorded")
      .def(
          "append",
          [](Journal& j, py::bytes head, py::bytes data) {
            std::string_view d = data;
            return j.append(head_of(std::string_view(head)), bytes_of(d), d.size());
          },
          py::arg("head"), py::arg("data"), "A record of another type; False: not written")
      .def("close", &Journal::close, py::arg("why"), py::call_guard<py::gil_scoped_release>(),
           "Closing record, all made durable, file closed; False: see failure")
      .def_property_readonly("records", &Journal::records)
      .def_property_readonly("bytes", &Journal::bytes)
      .def_property_readonly("failure", &Journal::failure)
      .def_property_readonly("forked", &Journal::forked);

  py::class_<Script, KeyWitness>(m, "Script", "Gives recorded keys again to the same draws")
      .def(py::init<>())
      .def(
          "add",
          [](Script& s, u64 number, py::bytes body) {
            std::string_view b = body;
            RecordHead head = head_of(b);
            const size_t data = head.type == RecordType::key || head.type == RecordType::group ? 32 : 0;
            if ((!data && head.type != RecordType::draw && head.type != RecordType::step) ||
                b.size() != sizeof(head) + data)
              throw py::value_error("a record of a key, a draw, a group key or a step");
            s.add(number, head, bytes_of(b) + sizeof(head));
          },
          py::arg("number"), py::arg("body"))
      .def("end", &Script::end, py::arg("number"))
      .def_property_readonly(
          "difference",
          [](const Script& s) -> py::object {
            auto d = s.difference();
            if (!d) return py::none();
            py::object expected = py::none();
            if (d->expected) expected = to_bytes(*d->expected);
            return py::make_tuple(d->record, expected, d->asked_step, to_bytes(d->asked), d->drawn_known);
          },
          "None, or (record, head expected or None, asked for a step, head asked for, whether its `drawn` is known)")
      .def_property_readonly("seen", &Script::seen)
      .def_property_readonly("waiting", &Script::waiting)
      .def_property_readonly("step", &Script::step);

  m.def(
      "crc32c", [](py::buffer data) { return with_bytes(data, [](const u8* p, size_t n) { return crc32c(p, n); }); },
      py::arg("data"));
  m.def("aes_gcm_available", &AesGcm::available);
  m.def(
      "aes_gcm_seal",
      [](py::bytes key, py::bytes iv, py::bytes associated, py::bytes plain) {
        std::string_view k = key, i = iv, a = associated, p = plain;
        if (k.size() != 32 || i.size() != 12) throw py::value_error("a key has 32 bytes, an iv 12");
        std::string out(p.size() + AesGcm::kTag, 0);
        AesGcm(bytes_of(k)).seal(bytes_of(i), bytes_of(a), a.size(), bytes_of(p), p.size(),
                                 reinterpret_cast<u8*>(out.data()));
        return py::bytes(out);
      },
      py::arg("key"), py::arg("iv"), py::arg("associated"), py::arg("plain"), "Ciphertext, then the tag of 16 bytes");
}

}  // namespace everett
