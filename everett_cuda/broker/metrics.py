"""A broker's figures for Prometheus, at /metrics on a Unix socket or on a port of this machine.

No figure tells a bit: counts, states and names only. `NAMES` has every metric with what it means; docs/node.md and the
dashboard (drivers/grafana/everett.json) are held to it by a test.
"""

import os
import re
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from ..drivers.contract import require
from ..errors import BadParameter, SourceError
from .server import BrokerStats

# name: (type, labels, meaning)
NAMES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "everett_broker_info": ("gauge", ("kind", "label", "socket"), "1; what is served, and where"),
    "everett_broker_flowing": ("gauge", (), "1 while bits flow to clients"),
    "everett_clients": ("gauge", (), "clients that are connected"),
    "everett_connections_total": ("counter", (), "clients that were let in"),
    "everett_refused_total": ("counter", (), "connections that were refused: not allowed, over a limit, or no client"),
    "everett_dropped_total": ("counter", (), "clients that were dropped for breaking a rule"),
    "everett_served_bytes_total": ("counter", (), "bytes that clients were given"),
    "everett_draws_total": ("counter", (), "draws over the socket alone"),
    "everett_throttled_total": ("counter", (), "times that a quota held a client back"),
    "everett_destroyed_bytes_total": ("counter", (), "unread bytes of clients that an alarm or their end destroyed"),
    "everett_log_events_lost_total": ("counter", (), "events that came too fast to be logged"),
    "everett_client_bytes": ("gauge", ("client", "pid", "uid"), "bytes that a connected client was given"),
    "everett_client_ring_fill": ("gauge", ("client", "pid", "uid"), "unread part of a client's ring, 0 to 1"),
    "everett_source_info": ("gauge", ("source", "name", "serial", "label"), "1; a source that is served"),
    "everett_source_flowing": ("gauge", ("source",), "1 while the source flows"),
    "everett_source_permanent_alarm": ("gauge", ("source",), "1 while an operator is needed (systemctl reload everett)"),
    "everett_source_alarms_total": ("counter", ("source", "test"), "health alarms"),
    "everett_source_startup_tests_total": ("counter", ("source",), "start-up tests that were passed"),
    "everett_source_reconnections_total": ("counter", ("source",), "times that a lost device was found again"),
    "everett_source_transport_errors_total": ("counter", ("source",), "losses on the way from the device"),
    "everett_source_raw_bytes_total": ("counter", ("source",), "raw bytes of the device"),
    "everett_source_dropped_raw_bytes_total": ("counter", ("source",), "raw bytes that alarms and errors destroyed"),
    "everett_source_conditioned_bytes_total": ("counter", ("source",), "conditioned bytes made"),
    "everett_source_ring_fill": ("gauge", ("source",), "unread part of the source's ring, 0 to 1"),
    "everett_source_min_entropy_bits": ("gauge", ("source", "origin"), "claimed min-entropy, bits a raw byte"),
    "everett_source_spent_dollars": ("gauge", ("source",), "booked on the key of a web service, ever"),
    "everett_source_budget_dollars": ("gauge", ("source",), "its budget"),
}  # fmt: skip


def samples(stats: BrokerStats) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """(name, values of its labels, value) of all that there is to tell."""
    counts = stats.counts
    yield "everett_broker_info", (stats.kind, stats.label, stats.socket), 1
    yield "everett_broker_flowing", (), stats.supply == "flowing"
    yield "everett_clients", (), counts["clients"]
    for name in ("connections", "refused", "dropped", "draws", "throttled", "destroyed_bytes"):
        yield f"everett_{name}_total", (), counts[name]
    yield "everett_served_bytes_total", (), counts["bytes"]
    yield "everett_log_events_lost_total", (), stats.events_lost
    for client in stats.clients:
        who = (str(client.client), str(client.pid), str(client.uid))
        yield "everett_client_bytes", who, client.bytes
        if client.ring:
            yield "everett_client_ring_fill", who, client.unread / client.ring
    for status in stats.sources:
        source = (status.uri,)
        yield "everett_source_info", (status.uri, status.name, status.serial, status.label), 1
        yield "everett_source_flowing", source, status.state == "flowing"
        yield "everett_source_permanent_alarm", source, status.state == "alarm"
        for test, n in status.alarm_counts.items():
            yield "everett_source_alarms_total", (status.uri, test), n
        yield "everett_source_startup_tests_total", source, status.startup_tests
        yield "everett_source_reconnections_total", source, status.reconnections
        yield "everett_source_transport_errors_total", source, status.transport_errors
        yield "everett_source_raw_bytes_total", source, status.raw_bytes_in
        yield "everett_source_dropped_raw_bytes_total", source, status.raw_bytes_dropped
        yield "everett_source_conditioned_bytes_total", source, status.conditioned_bytes_out
        yield "everett_source_ring_fill", source, status.ring_unread / status.ring_bytes
        yield "everett_source_min_entropy_bits", (status.uri, status.min_entropy_origin), status.min_entropy
        spend = re.match(r"\$(\d+\.\d+) of \$(\d+\.\d+)", status.device.get("spend", ""))  # drivers/spend.py
        if spend:
            yield "everett_source_spent_dollars", source, float(spend[1])
            yield "everett_source_budget_dollars", source, float(spend[2])


class _Collector:
    """What prometheus-client asks for figures."""

    def __init__(self, stats: Callable[[], BrokerStats]):
        self._core = require("prometheus_client.core", "serve", "prometheus-client")
        self._stats = stats

    def collect(self):
        families = {}
        for name, (kind, labels, meaning) in NAMES.items():
            family = self._core.CounterMetricFamily if kind == "counter" else self._core.GaugeMetricFamily
            families[name] = family(name.removesuffix("_total"), meaning, labels=labels)
        for name, labels, value in samples(self._stats()):
            families[name].add_metric(labels, value)
        return families.values()


def parse_address(text: str) -> Path | tuple[str, int]:
    """A socket's absolute path, or a port of this machine: `9123`, `127.0.0.1:9123`, `[::1]:9123`. BadParameter."""
    if text.startswith("/"):
        return Path(text)
    match = re.fullmatch(r"(?:(127\.0\.0\.1|localhost|\[::1\]):)?(\d{1,5})", text)
    if not match or not int(match[2]) < 65536:
        raise BadParameter(
            f"metrics = {text}: an absolute path for a socket, or a port of this machine, such as 127.0.0.1:9123; what "
            "the network may see is for a web server in front of it"
        )
    host = (match[1] or "127.0.0.1").strip("[]").replace("localhost", "127.0.0.1")
    return host, int(match[2])


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class _TcpServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True


class _Tcp6Server(_TcpServer):
    address_family = socket.AF_INET6


class MetricsServer:
    """Answers GET /metrics until it is closed. address: from `parse_address`.

    A socket is 0660, of the broker's group. Raises SourceError when it cannot listen, or prometheus-client is missing.
    """

    def __init__(self, address: Path | tuple[str, int], stats: Callable[[], BrokerStats]):
        client = require("prometheus_client", "serve", "prometheus-client")
        registry = client.CollectorRegistry()
        registry.register(_Collector(stats))

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # a scraper that says nothing

            def do_GET(self):
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                body = client.generate_latest(registry)
                self.send_response(200)
                self.send_header("Content-Type", client.CONTENT_TYPE_LATEST)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def address_string(self):
                return "-"  # a Unix socket has no addresses

            def log_message(self, *_):
                pass

        self._path = address if isinstance(address, Path) else None
        try:
            if self._path is not None:
                if self._path.is_socket():  # of a broker that was killed; a living one has its lock, and so is alone
                    self._path.unlink()
                before = os.umask(0o117)
                try:
                    self._server = _UnixServer(str(self._path), Handler)
                finally:
                    os.umask(before)
            else:
                self._server = (_Tcp6Server if ":" in address[0] else _TcpServer)(address, Handler)
        except OSError as error:
            raise SourceError(f"metrics cannot be served at {address}: {error}; choose another place") from error
        self.address = self._path or self._server.server_address[:2]
        self._thread = threading.Thread(target=self._server.serve_forever, name="everett metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
