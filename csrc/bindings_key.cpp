// Python names for the keyring: reads the nonce at an address, waits without the GIL, turns refusals into exceptions.
#include <pybind11/pybind11.h>
#include <string.h>

#include "bindings_key.h"
#include "sha256.h"

namespace py = pybind11;

namespace everett {
namespace {

const char* name_of(Drawn d) {
  static const char* names[] = {"fresh",   "stretched",   "shared",           "reused", "replayed", "must_wait",
                                "starved", "replay_miss", "replay_ambiguous", "withheld", "ended",  "failed",
                                "alarm",   "closed",      "forked",           "unrecorded", "unscripted", "differs"};
  return names[int(d)];
}

Family family_of(bool world) { return world ? Family::world : Family::rank; }

thread_local struct {
  Drawn drawn = Drawn::must_wait;
  u64 ticket = 0;
} last_draw;

void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void refuse(PyKeyring& k, Drawn drawn) {
  k.on_refusal(name_of(drawn));
  throw std::runtime_error(std::string("draw refused: ") + name_of(drawn));
}

// take: draws without waiting. take_waiting: draws without the GIL.
template <class T, class W>
Drawn draw_by_all_means(PyKeyring& k, T&& take, W&& take_waiting) {
  for (;;) {
    Drawn drawn = take();
    if (drawn == Drawn::must_wait) {
      py::gil_scoped_release nogil;
      drawn = take_waiting();
    }
    if (drawn != Drawn::unscripted) return drawn;
    k.on_unscripted();
  }
}

py::bytes draw(PyKeyring& k, uintptr_t nonce_address, KeyRequest& request) {
  Subkey record;
  draw_or_raise(k, nonce_address, request, record);
  return py::bytes(reinterpret_cast<const char*>(&record), sizeof(record));
}

u8* checked_key(uintptr_t address) {
  if (address == 0) throw py::value_error("the key needs 32 bytes of memory");
  return reinterpret_cast<u8*>(address);
}

void new_key(PyKeyring& k, uintptr_t out_address, Drawn (Keyring::*take)(u8*),
             Drawn (Keyring::*take_waiting)(u8*, const std::function<void()>&)) {
  u8* out = checked_key(out_address);
  Drawn drawn = draw_by_all_means(
      k, [&] { return (k.*take)(out); }, [&] { return (k.*take_waiting)(out, check_signals); });
  if (!made_record(drawn)) refuse(k, drawn);
}

KeyPolicy policy_of(const std::string& freshness, const std::string& on_starved, u64 max_stretch, double timeout_s) {
  KeyPolicy p;
  if (freshness == "op")
    p.freshness = Freshness::op;
  else if (freshness == "step")
    p.freshness = Freshness::step;
  else
    throw py::value_error("freshness: 'op' or 'step'");
  if (on_starved == "stretch")
    p.on_starved = OnStarved::stretch;
  else if (on_starved == "wait")
    p.on_starved = OnStarved::wait;
  else if (on_starved == "error")
    p.on_starved = OnStarved::error;
  else
    throw py::value_error("on_starved: 'stretch', 'wait' or 'error'");
  p.max_stretch = max_stretch;
  p.timeout_s = timeout_s;
  return p;
}

py::dict counters(const PyKeyring& k) {
  KeyCounters c = k.counters();
  py::dict d;
  d["draws"] = c.draws;
  d["fresh"] = c.fresh;
  d["stretched"] = c.stretched;
  d["shared"] = c.shared;
  d["reused"] = c.reused;
  d["replayed"] = c.replayed;
  d["unverified"] = c.unverified;
  d["replay_misses"] = c.replay_misses;
  d["waits"] = c.waits;
  d["discarded"] = c.discarded;
  d["stretched_in_a_row"] = c.stretched_in_a_row;
  d["boundaries"] = c.boundaries;
  d["boundaries_ignored"] = c.boundaries_ignored;
  d["tape_entries"] = c.tape_entries;
  d["tape_evicted"] = c.tape_evicted;
  return d;
}

void continue_from(PyKeyring& k, const py::dict& d) {
  KeyCounters c{};
  auto get = [&](const char* name) { return d[name].cast<u64>(); };
  c.draws = get("draws");
  c.fresh = get("fresh");
  c.stretched = get("stretched");
  c.shared = get("shared");
  c.reused = get("reused");
  c.replayed = get("replayed");
  c.unverified = get("unverified");
  c.replay_misses = get("replay_misses");
  c.waits = get("waits");
  c.discarded = get("discarded");
  c.boundaries = get("boundaries");
  c.boundaries_ignored = get("boundaries_ignored");
  k.continue_from(c);
}

// Python's hashlib, where no libcrypto opens.
void hashlib_sha256(const u8* data, size_t n, u8 out[32]) {
  py::gil_scoped_acquire gil;
  py::bytes message(reinterpret_cast<const char*>(data), n);
  std::string digest = py::cast<std::string>(py::module_::import("hashlib").attr("sha256")(message).attr("digest")());
  memcpy(out, digest.data(), 32);
  wipe(digest.data(), digest.size());
}

py::bytes hash_of_key(void (*hash)(const u8*, u8*), py::bytes key) {
  std::string_view k = key;
  if (k.size() != 32) throw py::value_error("a key has 32 bytes");
  u8 out[32];
  hash(reinterpret_cast<const u8*>(k.data()), out);
  return py::bytes(reinterpret_cast<const char*>(out), 32);
}

}  // namespace

void draw_or_raise(PyKeyring& k, uintptr_t nonce_address, KeyRequest& request, Subkey& record) {
  if (nonce_address == 0) throw py::value_error("the nonce has no memory (a fake, meta or wrapped tensor?)");
  memcpy(request.name.nonce, reinterpret_cast<const void*>(nonce_address), 16);
  u64 ticket = 0;
  Drawn drawn = draw_by_all_means(
      k, [&] { return k.draw(request, record, ticket); },
      [&] { return k.draw_waiting(request, record, ticket, check_signals); });
  if (!made_record(drawn)) refuse(k, drawn);
  last_draw = {drawn, ticket};
  if (drawn == Drawn::reused && !k.on_repeat.is_none()) k.on_repeat();
}

void bind_key(py::module_& m) {
  set_sha256_fallback(hashlib_sha256);
  try {
    py::module_::import("_hashlib");  // so that the libcrypto of Python itself is the one found
  } catch (const py::error_already_set&) {
  }  // a Python built without OpenSSL

  py::class_<PyKeyring>(m, "Keyring", "Draws subkey records by the rules of the tape, freshness and starvation.")
      .def(py::init<RingReader*, size_t, py::function>(), py::arg("ring"), py::arg("tape_entries"), py::arg("on_refusal"),
           py::keep_alive<1, 2>())
      .def_readwrite("on_repeat", &PyKeyring::on_repeat)
      .def_readwrite("on_unscripted", &PyKeyring::on_unscripted)
      .def(
          "draw",
          [](PyKeyring& k, uintptr_t nonce_address, bool inference, int device, bool world) {
            KeyRequest r{{device, 0, {}, family_of(world)}, inference, {}};
            return draw(k, nonce_address, r);
          },
          py::arg("nonce_address"), py::arg("inference"), py::arg("device") = -1, py::arg("world") = false,
          "Record (48 bytes) for a device's default generator (-1: the CPU's), outside a backward.")
      .def(
          "draw_at",
          [](PyKeyring& k, uintptr_t nonce_address, int device, u32 generator, bool inference, bool in_backward,
             bool grad_enabled, bool keep_graph, bool nested, u64 node, bool world) {
            KeyRequest r{{device, generator, {}, family_of(world)},
                         inference,
                         {in_backward, grad_enabled, keep_graph, nested, node}};
            return draw(k, nonce_address, r);
          },
          py::arg("nonce_address"), py::arg("device"), py::arg("generator"), py::arg("inference"),
          py::arg("in_backward"), py::arg("grad_enabled"), py::arg("keep_graph"), py::arg("nested"), py::arg("node"),
          py::arg("world") = false,
          "Record (48 bytes) with every fact given; node = 2**64-1: none.")
      .def(
          "new_graph_key",
          [](PyKeyring& k, uintptr_t out_address) {
            new_key(k, out_address, &Keyring::new_graph_key, &Keyring::new_graph_key_waiting);
          },
          py::arg("out_address"),
          "Writes a key for a GPU's graphs (32 bytes) to an address: the rank family's group key, or one that nothing else "
          "has or gets.")
      .def(
          "new_key_to_share",
          [](PyKeyring& k, uintptr_t out_address) {
            new_key(k, out_address, &Keyring::new_key_to_share, &Keyring::new_key_to_share_waiting);
          },
          py::arg("out_address"), "Writes SHA-256('everett/1/share' 00 K) of a new key K (32 bytes) to an address.")
      .def(
          "set_group_key",
          [](PyKeyring& k, bool world, uintptr_t key_address) {
            k.set_group_key(family_of(world), checked_key(key_address));
          },
          py::arg("world"), py::arg("key_address"), "All draws of the family take this key (32 bytes at an address).")
      .def(
          "withhold_group_key", [](PyKeyring& k, bool world) { k.withhold_group_key(family_of(world)); },
          py::arg("world"), "Draws of the family are refused until a group key is set, or all are cleared.")
      .def("clear_group_keys", &PyKeyring::clear_group_keys, "Draws take keys of this process's own again.")
      .def("boundary", &PyKeyring::boundary, py::arg("sequence"))
      .def("boundary_ignored", &PyKeyring::boundary_ignored)
      .def(
          "set_policy",
          [](PyKeyring& k, const std::string& freshness, const std::string& on_starved, u64 max_stretch,
             double timeout_s) { k.set_policy(policy_of(freshness, on_starved, max_stretch, timeout_s)); },
          py::arg("freshness"), py::arg("on_starved"), py::arg("max_stretch"), py::arg("timeout_s"))
      .def("set_ring", &PyKeyring::set_ring, py::keep_alive<1, 2>())
      .def("set_witness", &PyKeyring::set_witness, py::arg("witness").none(true), py::keep_alive<1, 2>(),
           "Who is told of every draw from now on; None: nobody")
      .def("continue_from", &continue_from, py::arg("counters"), "Counts and tickets go on from these, of counters()")
      .def("counters", &counters)
      .def_property_readonly("forked", &PyKeyring::forked)
      .def_static(
          "last_draw", [] { return py::make_tuple(name_of(last_draw.drawn), last_draw.ticket); },
          "(kind, ticket) of this thread's last draw that made a record.");

  m.def(
      "stretched_key", [](py::bytes key) { return hash_of_key(stretched_key, key); },
      "SHA-256('everett/1/stretch' 00 key): the ratchet.");
  m.def(
      "key_commitment", [](py::bytes key) { return hash_of_key(key_commitment, key); },
      "SHA-256('everett/1/commit' 00 key): what may be published of a key.");
}

}  // namespace everett
