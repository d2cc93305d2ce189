"""A local server that behaves as four QRNG services do on the wire, well and badly; over HTTP, or TLS with its own CA.

    GET  /                        ANU Quantum Numbers   x-api-key, ?length&type&size
    POST /api/v1/random_numbers   Cisco Outshift        x-id-api-key, JSON body
    GET  /api/v1/quantum-entropy  Qrypt                 Bearer token, ?size in KiB
    GET  /api/2.0/streambytes     Quantis Appliance     ?size in bytes

Its bytes are a function of how many responses were served before. What it does with the next requests is told by `then`
(one behaviour a request, `good` when none is left) or `always`; `asked` and `served` hold what came and what was given.
"""

import base64
import datetime
import hashlib
import ipaddress
import json
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

KEY = "kx7-SECRET-of-the-tests-91Qz"
THROTTLED = b"<html>The QRNG API is limited to 1 requests per minute.</html>"
BEHAVIOURS = (
    "good", "repeat", "instant", "html", "text", "garbage", "failure", "short", "long", "wide", "truncated", "packed",
    "endless", "reset", "slow", "drip", "hang", "redirect",
)  # fmt: skip


@dataclass(frozen=True)
class Status:
    """A behaviour: answers with a status, and headers such as Retry-After."""

    status: int
    headers: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """One request as it came: `at` on the monotonic clock."""

    method: str
    path: str
    query: dict
    headers: dict
    body: bytes
    at: float


def self_made_ca(folder, names=("127.0.0.1",), days=1):
    """(CA certificate, server certificate with key): PEM files in `folder`; days < 0: the server's has expired."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.timezone.utc)
    first, last = now - datetime.timedelta(days=9), now + datetime.timedelta(days=days)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def certificate(subject, public, ca, until):
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject)).issuer_name(name("CA of the tests")).public_key(public)
            .serial_number(x509.random_serial_number()).not_valid_before(first).not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )  # fmt: skip

    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    ca = certificate("CA of the tests", ca_key.public_key(), True, now + datetime.timedelta(days=9))
    ca = ca.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
    alternatives = []
    for text in names:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(text)))
        except ValueError:
            alternatives.append(x509.DNSName(text))
    leaf = certificate("server of the tests", key.public_key(), False, last)
    leaf = leaf.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    pem = serialization.Encoding.PEM
    ca_file, leaf_file = folder / "ca.pem", folder / "server.pem"
    ca_file.write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    leaf_file.write_bytes(
        leaf.sign(ca_key, hashes.SHA256()).public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return ca_file, leaf_file


class WebServer:
    """Serves from its construction until `close`; use it in a `with`. tls: the file with certificate and key."""

    def __init__(self, tls=None, key=KEY, seed=b"web", delay_s=0.5):
        self.key, self.seed, self.delay_s = key, seed, delay_s
        self.script, self.always = [], "good"
        self.asked: list[Asked] = []
        self.served: list[bytes] = []
        self.elsewhere = "https://elsewhere.invalid/"
        self.bad, self.bad_from = "", 0  # "stuck" or "biased" from this response on
        self.closing = threading.Event()
        self.both = threading.Barrier(2)  # "instant": two requests that are served the same numbers
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": self}))
        self._http.daemon_threads = True
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self.url = f"{'http' if tls is None else 'https'}://{self.host}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), name="web server", daemon=True)
        self._thread.start()

    def then(self, *behaviours):
        """What the next requests meet, one each."""
        assert all(b in BEHAVIOURS or isinstance(b, Status) for b in behaviours)
        with self._lock:
            self.script += behaviours

    def next_behaviour(self):
        with self._lock:
            return self.script.pop(0) if self.script else self.always

    def bytes_for(self, n, behaviour):
        """The numbers of one response."""
        if behaviour == "instant":
            first = self.both.wait(5) == 0
            if first:
                self._instant = self._fresh(n)
            self.both.wait(5)
            with self._lock:
                self.served.append(self._instant)
            return self._instant
        with self._lock:
            data = self.served[-1] if behaviour == "repeat" else self._fresh(n)
            self.served.append(data)
        return data

    def _fresh(self, n):
        data = hashlib.shake_256(self.seed + len(self.served).to_bytes(8, "big")).digest(3 * n)
        if not self.bad or len(self.served) < self.bad_from:
            return data[:n]
        return bytes(n) if self.bad == "stuck" else bytes(data[i] & data[n + i] & data[2 * n + i] for i in range(n))

    def close(self):
        self.closing.set()
        self.both.abort()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    web: WebServer

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # the client hung up
            self.close_connection = True

    def do_GET(self):
        self._serve()

    def do_POST(self):
        self._serve()

    def _serve(self):
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        query = {k: v[-1] for k, v in parse_qs(parts.query).items()}
        headers = {k.lower(): v for k, v in self.headers.items()}
        self.web.asked.append(Asked(self.command, parts.path, query, headers, body, time.monotonic()))
        route = (self.command, parts.path)
        if route not in _ROUTES:
            return self._send(404, b'{"message":"Not Found"}')
        answer, allowed, denied = _ROUTES[route]
        behaviour = self.web.next_behaviour()
        if isinstance(behaviour, Status):
            return self._send(behaviour.status, b'{"message":"status of the tests"}', **behaviour.headers)
        if behaviour == "redirect":
            return self._send(302, b"", Location=self.web.elsewhere)
        if behaviour == "html":
            return self._send(200, THROTTLED, "text/html; charset=utf-8")
        if behaviour == "reset":
            self.close_connection = True
            return None
        if behaviour == "hang":
            self.web.closing.wait(30)
            self.close_connection = True
            return None
        if not allowed(headers, self.web.key):
            return self._send(*denied)
        if behaviour == "slow":
            self.web.closing.wait(self.web.delay_s)
        try:
            type_, data = answer(self.web, query, body, behaviour)
        except (KeyError, ValueError):
            return self._send(400, b'{"message":"Bad Request"}')
        if behaviour == "garbage":
            data = data[:-1] + b"%"
        if behaviour == "text":
            type_ = "text/plain"
        self._send(200, data, type_, behaviour)
        return None

    def _send(self, status, data, type_="application/json", behaviour="good", **headers):
        self.send_response(status)
        self.send_header("Content-Type", type_)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if behaviour == "packed":
            self.send_header("Content-Encoding", "gzip")
        if behaviour == "endless":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while not self.web.closing.is_set():
                self.wfile.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
            return
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if behaviour == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif behaviour == "drip":
            for at in range(len(data)):
                self.wfile.write(data[at : at + 1])
                if self.web.closing.wait(0.02):
                    break
        else:
            self.wfile.write(data)


def _resized(values, behaviour):
    return values[:-1] if behaviour == "short" else values + values[:1] if behaviour == "long" else values


def _anu(web, query, body, behaviour):
    length, type_ = int(query["length"]), query["type"]
    if not 1 <= length <= 1024:
        raise ValueError("length")
    answer = {"success": behaviour != "failure", "type": type_, "length": str(length)}
    if type_ in ("hex8", "hex16"):
        size = int(query.get("size", 1))
        if not 1 <= size <= 10:
            raise ValueError("size")
        answer["size"] = size
        width = size * (1 if type_ == "hex8" else 2)
        data = web.bytes_for(length * width, behaviour)
        values = [data[i : i + width].hex() for i in range(0, len(data), width)]
        wide = values[0] + "0"
    else:
        width = {"uint8": 1, "uint16": 2}[type_]
        data = web.bytes_for(length * width, behaviour)
        values = [int.from_bytes(data[i : i + width], "big") for i in range(0, len(data), width)]
        wide = 256**width
    answer["data"] = _resized([wide, *values[1:]] if behaviour == "wide" else values, behaviour)
    return "application/json", json.dumps(answer).encode()


def _outshift(web, query, body, behaviour):
    asked = json.loads(body)
    bits, blocks = asked["bits_per_block"], asked["number_of_blocks"]
    if not (1 <= bits <= 10_000 and 1 <= blocks <= 1000 and asked["encoding"] == "raw"):
        raise ValueError("limits")
    if behaviour == "failure":
        return "application/json", b'{"error":"of the tests"}'
    data = web.bytes_for(blocks * bits // 8, behaviour)
    values = [int.from_bytes(data[i : i + bits // 8], "big") for i in range(0, len(data), bits // 8)]
    if behaviour == "wide":
        values[0] += 1 << (bits + 3)
    write = {"hexadecimal": "x", "binary": "b", "decimal": "d"}[asked["format"]]
    numbers = [{asked["format"]: format(v, write)} for v in _resized(values, behaviour)]
    return "application/json", json.dumps({"encoding": "raw", "random_numbers": numbers}).encode()


def _qrypt(web, query, body, behaviour):
    size = int(query["size"])
    if not 1 <= size <= 512:
        raise ValueError("size")
    if behaviour == "failure":
        return "application/json", b'{"random":[],"size":0}'
    data = web.bytes_for(size * 1024, behaviour)
    pieces = [base64.b64encode(data[i : i + 1024]).decode() for i in range(0, len(data), 1024)]
    if behaviour == "wide":
        pieces[0] = base64.b64encode(data[:1025] + b"\0").decode()
    answer = {"random": _resized(pieces, behaviour), "size": size}
    return "application/json; charset=utf-8", json.dumps(answer).encode()


def _appliance(web, query, body, behaviour):
    if behaviour == "failure":
        return "application/json", b'{"error":"of the tests"}'
    data = web.bytes_for(int(query["size"]), behaviour)
    return "application/octet-stream", data + b"\0" if behaviour == "wide" else _resized(data, behaviour)


_ROUTES = {
    ("GET", "/"): (_anu, lambda h, key: h.get("x-api-key") == key, (403, b'{"message":"Forbidden"}')),
    ("POST", "/api/v1/random_numbers"): (
        _outshift, lambda h, key: h.get("x-id-api-key") == key, (401, b'{"message":"Unauthorized"}'),
    ),
    ("GET", "/api/v1/quantum-entropy"): (
        _qrypt, lambda h, key: h.get("authorization") == f"Bearer {key}", (401, b'{"message":"Unauthorized"}'),
    ),
    ("GET", "/api/2.0/streambytes"): (_appliance, lambda h, key: True, (401, b"")),
}  # fmt: skip
