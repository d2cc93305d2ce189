// Python's names for the broker: its server, and the ring of a client. Argument checks only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "broker_ring.h"
#include "broker_server.h"

namespace py = pybind11;

namespace everett {

namespace {

BrokerRules rules_of(const py::kwargs& given) {
  BrokerRules r;
  for (const auto& [key, value] : given) {
    const std::string name = py::cast<std::string>(key);
    if (name == "ring_bytes") r.ring_bytes = value.cast<size_t>();
    else if (name == "most_clients") r.most_clients = value.cast<size_t>();
    else if (name == "most_clients_of_user") r.most_clients_of_user = value.cast<size_t>();
    else if (name == "client_bytes_per_s") r.client_bytes_per_s = value.cast<double>();
    else if (name == "user_bytes_per_s") r.user_bytes_per_s = value.cast<double>();
    else if (name == "restricted") r.restricted = value.cast<bool>();
    else if (name == "users") r.users = value.cast<std::vector<uid_t>>();
    else if (name == "groups") r.groups = value.cast<std::vector<gid_t>>();
    else if (name == "failover") r.failover = value.cast<bool>();
    else if (name == "failover_after_s") r.failover_after_s = value.cast<double>();
    else throw py::type_error("the broker has no rule " + name);
  }
  if (r.ring_bytes < 4096 || r.ring_bytes > (size_t(1) << 24) || (r.ring_bytes & (r.ring_bytes - 1)) != 0)
    throw py::value_error("ring_bytes is a power of two from 4096 to 16 MiB");
  if (!(r.client_bytes_per_s >= 0) || !(r.user_bytes_per_s >= 0) || !(r.failover_after_s >= 0))
    throw py::value_error("rates and times are not negative");
  return r;
}

const char* name_of(BrokerEvent::Kind kind) {
  switch (kind) {
    case BrokerEvent::connected: return "connected";
    case BrokerEvent::disconnected: return "disconnected";
    case BrokerEvent::refused: return "refused";
    case BrokerEvent::destroyed: return "destroyed";
    case BrokerEvent::ended: return "ended";
    case BrokerEvent::reopened: return "reopened";
    default: return "source_used";
  }
}

}  // namespace

void bind_broker(py::module_& m) {
  py::enum_<Supply>(m, "Supply", "What bits a broker's client may expect")
      .value("flowing", Supply::flowing)
      .value("ended", Supply::ended)
      .value("alarm", Supply::alarm);
  py::class_<BrokerRing, RingReader, std::shared_ptr<BrokerRing>>(m, "BrokerRing", "A client's end of a broker's ring")
      .def(py::init<size_t>(), py::arg("capacity"))
      .def("attach", &BrokerRing::attach, py::arg("memfd"), py::arg("eventfd"), py::call_guard<py::gil_scoped_release>(),
           "Takes over both descriptors; unread bytes of the broker before are destroyed")
      .def_property_readonly("supply", [](const BrokerRing& ring) {  // another process wrote it: it may be any number
        const Supply s = ring.supply();
        return s == Supply::ended || s == Supply::alarm ? s : Supply::flowing;
      });

  py::class_<BrokerEvent>(m, "BrokerEvent")
      .def_property_readonly("kind", [](const BrokerEvent& e) { return name_of(e.kind); })
      .def_readonly("at_s", &BrokerEvent::at_s)
      .def_readonly("client", &BrokerEvent::client)
      .def_readonly("pid", &BrokerEvent::pid)
      .def_readonly("uid", &BrokerEvent::uid)
      .def_readonly("gid", &BrokerEvent::gid)
      .def_readonly("bytes", &BrokerEvent::bytes)
      .def_readonly("text", &BrokerEvent::text);
  py::class_<ClientFacts>(m, "ClientFacts")
      .def_readonly("client", &ClientFacts::client)
      .def_readonly("pid", &ClientFacts::pid)
      .def_readonly("uid", &ClientFacts::uid)
      .def_readonly("gid", &ClientFacts::gid)
      .def_readonly("connected_s", &ClientFacts::connected_s)
      .def_readonly("bytes", &ClientFacts::bytes)
      .def_readonly("draws", &ClientFacts::draws)
      .def_readonly("unread", &ClientFacts::unread)
      .def_readonly("ring", &ClientFacts::ring)
      .def_readonly("throttled", &ClientFacts::throttled);

  py::class_<BrokerServer, std::shared_ptr<BrokerServer>>(m, "BrokerServer", "Hands blocks of 32 bytes to its clients")
      .def(py::init([](int listener, std::vector<std::shared_ptr<Ring>> sources, const py::bytes& serves,
                       const py::kwargs& rules) {
             return std::shared_ptr<BrokerServer>(new BrokerServer(listener, std::move(sources), rules_of(rules), serves),
                                                  [](BrokerServer* server) {
                                                    py::gil_scoped_release release;
                                                    delete server;
                                                  });
           }),
           py::arg("listener"), py::arg("sources"), py::arg("serves"))
      .def("stop", &BrokerServer::stop, py::call_guard<py::gil_scoped_release>())
      .def("tick", &BrokerServer::tick)
      .def(
          "set_rules",
          [](BrokerServer& server, const py::kwargs& rules) {
            const BrokerRules r = rules_of(rules);
            py::gil_scoped_release release;
            server.set_rules(r);
          },
          "Rules from now on; rings that are there keep their size")
      .def("set_serves", [](BrokerServer& s, const py::bytes& text) { s.set_serves(text); }, py::arg("serves"))
      .def("announce", [](BrokerServer& s, const py::bytes& text) { s.announce(text); }, py::arg("how"))
      .def("events", &BrokerServer::events, py::arg("n"), py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("events_lost", &BrokerServer::events_lost)
      .def_property_readonly("clients", &BrokerServer::clients)
      .def_property_readonly("supply", &BrokerServer::supply)
      .def_property_readonly("turns", &BrokerServer::turns)
      .def_property_readonly("counts", [](const BrokerServer& server) {
        const BrokerCounts c = server.counts();
        return py::dict(py::arg("clients") = c.clients, py::arg("connections") = c.connections,
                        py::arg("refused") = c.refused, py::arg("dropped") = c.dropped, py::arg("bytes") = c.bytes,
                        py::arg("destroyed_bytes") = c.destroyed_bytes, py::arg("draws") = c.draws,
                        py::arg("throttled") = c.throttled);
      });
}

}  // namespace everett
