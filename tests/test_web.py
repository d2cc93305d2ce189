"""Web drivers: exact answers or none, failures told apart, keys kept, budgets, repeats; each against a local server."""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
from devices.web_server import KEY, Status, WebServer, self_made_ca
from processes import in_forked_child

from everett_cuda import drivers, source
from everett_cuda.drivers import DeviceFault, DeviceLost, TransportError, open_driver, parse_uri, patience, web
from everett_cuda.drivers.patience import Patience, retry_after_s
from everett_cuda.drivers.responses import compare_responses
from everett_cuda.drivers.spend import account_id
from everett_cuda.errors import BadParameter, HealthAlarm, SourceError, StartupTestFailed, UnknownScheme
from everett_cuda.source import Source

SERVICES = {
    "anu": "anu:?budget_usd=9&url=",
    "outshift": "outshift:?url=",
    "qrypt": "qrypt:?size=4&url=",
    "quantis-appliance": "quantis-appliance:?url=",
}
VARIABLES = {"anu": "EVERETT_ANU_KEY", "outshift": "EVERETT_OUTSHIFT_KEY", "qrypt": "EVERETT_QRYPT_TOKEN"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Spending records of this test alone, keys in the environment, and waits that a test can wait for."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for variable in VARIABLES.values():
        monkeypatch.setenv(variable, KEY)
    monkeypatch.setattr(patience, "BACKOFF_S", 0.01)
    yield tmp_path
    assert [t.name for t in threading.enumerate() if t.name.startswith("everett")] == []


@pytest.fixture
def server():
    with WebServer() as opened:
        yield opened


@pytest.fixture(params=SERVICES)
def service(request):
    return request.param


@pytest.fixture(params=VARIABLES)
def keyed(request):
    """A service that has keys."""
    return request.param


@contextlib.contextmanager
def opened(uri):
    driver = open_driver(uri)
    try:
        yield driver
    finally:
        driver.close()


def read(driver, n, timeout_s=1.0, limit_s=20.0):
    """Exactly n bytes by as many reads as it takes."""
    out, at, deadline = bytearray(n), 0, time.monotonic() + limit_s
    while at < n:
        assert time.monotonic() < deadline
        at += driver.readinto(memoryview(out)[at:], timeout_s)
    return bytes(out)


def fails(driver, limit_s=20.0):
    """The error that ends the next read; nothing may be read before it."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            assert driver.readinto(memoryview(bytearray(64)), 0.2) == 0
        except SourceError as error:
            return error
    raise AssertionError("no error")


# --- what the services answer ---


@pytest.mark.parametrize(
    "uri, n_bytes, asked",
    [
        ("anu:?budget_usd=9", 20_480, {"length": "1024", "type": "hex16", "size": "10"}),
        ("anu:?budget_usd=9&type=hex16&size=4&length=100", 800, {"length": "100", "type": "hex16", "size": "4"}),
        ("anu:?budget_usd=9&type=hex8&size=1", 1024, {"length": "1024", "type": "hex8", "size": "1"}),
        ("anu:?budget_usd=9&type=uint8", 1024, {"length": "1024", "type": "uint8"}),
        ("anu:?budget_usd=9&type=uint16&length=999", 1998, {"length": "999", "type": "uint16"}),
        ("outshift:", 2000, {"bits_per_block": 16, "number_of_blocks": 1000, "format": "hexadecimal", "encoding": "raw"}),
        ("outshift:?bits_per_block=8&blocks=600", 600, {"bits_per_block": 8, "number_of_blocks": 600}),
        ("outshift:?bits_per_block=10000&blocks=2&format=binary", 2500, {"bits_per_block": 10_000, "format": "binary"}),
        ("qrypt:", 16_384, {"size": "16"}),
        ("qrypt:?size=1", 1024, {"size": "1"}),
        ("quantis-appliance:", 16_384, {"size": "16384"}),
        ("quantis-appliance:?size=1000", 1000, {"size": "1000"}),
    ],
)
def test_bytes_are_those_of_the_service_in_order(server, uri, n_bytes, asked):
    with opened(uri + ("&" if "?" in uri else "?") + f"url={server.url}") as driver:
        assert driver.chunk_bytes == n_bytes
        got = read(driver, 2 * n_bytes + 100)
        assert got == b"".join(server.served)[: 2 * n_bytes + 100] and len(server.served) == 3
    first = server.asked[0]
    got = first.query or json.loads(first.body)
    assert {k: got[k] for k in asked} == asked
    assert set(got) - set(asked) <= {"format", "encoding", "number_of_blocks"}
    assert first.headers["accept-encoding"] == "identity"


def test_what_a_web_source_declares(server, service):
    with opened(SERVICES[service] + server.url) as driver:
        assert (driver.kind, driver.conditioned, driver.bit_order) == ("quantum-remote", True, "msb_first")
        assert str(driver.min_entropy) == "4 bits a byte (assumed)" and driver.rate_bytes_per_s is None
        assert driver.metered == (service != "quantis-appliance")
        assert driver.name.endswith(" at 127.0.0.1") and driver.attached() == [] and not driver.looks_for
        if service == "quantis-appliance":
            assert driver.serial == "127.0.0.1"
        else:
            assert driver.serial == f"key {account_id(service, KEY)}" and KEY not in driver.serial
    with opened(SERVICES[service] + server.url + "&h=6") as driver:
        assert str(driver.min_entropy) == "6 bits a byte (claimed by user)"
    assert server.asked == []  # opening asks for nothing


def test_a_source_of_each_service_flows(server, service):
    with Source.open(SERVICES[service] + server.url) as source_:
        assert source_.take(320) == hashes(b"".join(server.served[:2]))[:320]
        status = source_.status()
    assert status.label == "quantum, remote (the provider knows these bits)"
    assert status.health == "ok; total-failure only (device output is conditioned)"
    assert status.device["responses"].endswith("logged, none repeated") and "request" in status.device["spend"]
    assert status.ring_bytes == (16384 if service != "quantis-appliance" else 1 << 20)


def hashes(raw, n=80):
    return b"".join(hashlib.sha256(raw[i : i + n]).digest() for i in range(0, len(raw) - n + 1, n))


ODD = {
    "html": "text/html instead of application/",
    "text": "text/plain instead of application/",
    "garbage": "it is not JSON",
    "failure": "",
    "short": "instead of",
    "long": "instead of",
    "wide": "",
    "truncated": "without sending complete message body",
    "packed": "the answer is packed \\(gzip\\)",
    "endless": "longer than the \\d+ bytes",
    "reset": "Server disconnected",
}


# The appliance's answers have no form that could be broken.
@pytest.mark.parametrize(
    "service, behaviour", [(s, b) for s in SERVICES for b in ODD if (s, b) != ("quantis-appliance", "garbage")]
)
def test_an_odd_answer_is_dropped_whole(server, service, behaviour):
    server.then("good", behaviour)
    with opened(SERVICES[service] + server.url) as driver:
        n = driver.chunk_bytes
        assert read(driver, n) == server.served[0]
        error = fails(driver)
        assert isinstance(error, TransportError) and not isinstance(error, DeviceLost)
        assert re.search(ODD[behaviour], str(error)) and "its response was dropped" in str(error)
        assert read(driver, n) == server.served[-1] not in server.served[:-1]
        assert len(server.asked) == 3 and driver.details["requests"] == "ok"


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"[" * 100_000, b'{"success": 1}', b'{"success": true}', b"\xff"])
def test_json_that_is_no_answer_is_refused_without_showing_it(server, body):
    for uri in ("anu:?budget_usd=9", "outshift:", "qrypt:"):
        with opened(uri + ("&" if "?" in uri else "?") + f"url={server.url}") as driver:
            with pytest.raises(ValueError, match="^(it |its |a )"):
                driver.decode(body)


@pytest.mark.parametrize(
    "change",
    [{"length": 1023}, {"length": "x"}, {"length": True}, {"type": "hex8"}, {"size": 9}, {"success": "true"},
     {"success": None}, {"data": None}, {"data": {}}, {"data": [1] * 1024}, {"data": ["0x" + "a" * 38] * 1024}],
)  # fmt: skip
def test_fields_that_contradict_the_request_are_refused(server, change):
    answer = {"success": True, "type": "hex16", "length": 1024, "size": 10, "data": ["ab" * 20] * 1024}
    with opened(SERVICES["anu"] + server.url) as driver:
        assert driver.decode(json.dumps(answer).encode()) == b"\xab" * 20_480
        with pytest.raises(ValueError):
            driver.decode(json.dumps({**answer, **change}).encode())


def test_numbers_written_short_keep_their_zeros(server):
    with opened(f"outshift:?bits_per_block=16&blocks=256&url={server.url}") as driver:
        numbers = [{"hexadecimal": f"{k:x}"} for k in range(256)]
        whole = b"".join(k.to_bytes(2, "big") for k in range(256))
        assert driver.decode(json.dumps({"random_numbers": numbers}).encode()) == whole
        padded = [{"hexadecimal": f"{k:04X}"} for k in range(256)]
        assert driver.decode(json.dumps({"random_numbers": padded, "encoding": "raw"}).encode()) == whole
        for wrong in ("", "-1", "0x1", "12345", "1 ", "g", 7, None):
            with pytest.raises(ValueError, match="no hexadecimal number of 16 bits"):
                driver.decode(json.dumps({"random_numbers": [{"hexadecimal": wrong}, *numbers[1:]]}).encode())
        with pytest.raises(ValueError, match="encoding"):
            driver.decode(json.dumps({"random_numbers": numbers, "encoding": "base64"}).encode())


# --- refusals, and answers that are put off ---


@pytest.mark.parametrize(
    "service, status, words",
    [("anu", 403, "key is missing or wrong"), ("outshift", 401, "expired"), ("qrypt", 401, "token is missing"),
     ("qrypt", 403, "allotment"), ("anu", 400, "check the parameters"), ("qrypt", 404, "check url="), ("anu", 418, "418")],
)  # fmt: skip
def test_a_refusal_is_final_and_says_what_to_change(server, service, status, words):
    server.then("good", Status(status))
    with opened(SERVICES[service] + server.url) as driver:
        read(driver, driver.chunk_bytes)
        error = fails(driver)
        assert type(error) is SourceError and f"status {status}" in str(error) and words in str(error)
        assert len(server.asked) == 2


def test_a_wrong_key_is_told_at_opening(server, keyed):
    server.key = "another-key"
    with pytest.raises(SourceError, match="status 40[13]: the (key|token) is missing"):
        Source.open(SERVICES[keyed] + server.url)
    assert len(server.asked) == 1


def test_a_redirect_is_not_followed(server, service):
    with WebServer() as elsewhere:
        server.elsewhere = elsewhere.url + "/"
        server.then("redirect")
        with opened(SERVICES[service] + server.url) as driver:
            assert "sends the request to 127.0.0.1; it is not followed, because the key" in str(fails(driver))
        assert elsewhere.asked == [] and len(server.asked) == 1
    for odd in ("https://[", "/login", ""):
        server.elsewhere = odd
        server.then("redirect")
        with opened(SERVICES[service] + server.url) as driver:
            assert "sends the request to another place; it is not followed" in str(fails(driver))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_is_put_off_is_asked_again_and_loses_nothing(server, status):
    server.then("good", Status(status), Status(status))
    with opened(SERVICES["anu"] + server.url) as driver:
        n = driver.chunk_bytes
        assert read(driver, 2 * n) == server.served[0] + server.served[1]
        assert len(server.asked) == 4 and driver.details["spend"].startswith("$0.02 of $9.00, 4 requests")


def test_retry_after_is_honoured(server):
    server.then(Status(429, {"Retry_After": "1"}))
    with opened(SERVICES["anu"] + server.url) as driver:
        assert driver.readinto(memoryview(bytearray(10)), 0.3) == 0
        assert re.match(r"next request in 1.0 s, after status 429: too many requests", driver.details["requests"])
        assert read(driver, 10) == server.served[0][:10]
    first, second = server.asked
    assert second.at - first.at >= 1.0


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_a_wait_beyond_patience_ends_the_source_at_once(server, kind):
    later = format_datetime(datetime.now(timezone.utc) + timedelta(hours=1), usegmt=True)
    server.then("good", Status(429, {"Retry_After": "3600" if kind == "seconds" else later}))
    with opened(SERVICES["outshift"] + server.url) as driver:
        read(driver, driver.chunk_bytes)
        error = fails(driver, limit_s=2)
        assert re.search(r"quota of the key .* asks to wait (3600|3599) s; given up after 1 failed request ", str(error))
        assert type(error) is SourceError and driver.details["requests"] == f"ended: {error}"


def test_retry_after_headers():
    now = datetime.now(timezone.utc)
    assert retry_after_s("120") == 120.0
    assert 118 < retry_after_s(format_datetime(now + timedelta(seconds=120), usegmt=True)) <= 120
    assert retry_after_s(format_datetime(now - timedelta(seconds=120), usegmt=True)) == 0.0
    for nothing in ("", "soon", "-5", "1.5", "٣", "Wed, 99 Foo"):
        assert retry_after_s(nothing) == 0.0


def test_waits_grow_have_chance_in_them_and_end(monkeypatch):
    monkeypatch.setattr(patience, "BACKOFF_S", 1.0)
    waits = []
    for _ in range(50):
        impatient = Patience()
        assert impatient.wait_s() == 0.0
        impatient.succeeded()
        impatient.wait_s()
        waits.append([impatient.failed("no") for _ in range(6)])
        assert 0 < impatient.wait_s() <= waits[-1][-1]
    for k, top in enumerate((1, 2, 4, 8, 16, 16)):
        column = [w[k] for w in waits]
        assert all(top / 2 <= w <= top for w in column) and len(set(column)) > 40
    fresh = Patience()
    fresh.wait_s()
    with pytest.raises(SourceError, match="no, and asks to wait 9 s; given up after 1 failed request in 0 s"):
        fresh.failed("no", "9")  # at opening it has 8 s


def test_a_service_that_only_fails_is_given_up(server, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_AT_OPEN_S", 0.2)
    server.always = Status(503)
    with pytest.raises(SourceError, match=r"status 503: .*given up after \d+ failed requests in 0 s"):
        Source.open(SERVICES["qrypt"] + server.url)
    server.always = "html"
    with pytest.raises(SourceError, match=r"text/html instead of application/json .*given up after"):
        Source.open(SERVICES["qrypt"] + server.url)


# --- time ---


def test_a_slow_answer_lets_reads_return_and_comes_later(server):
    server.then("slow")
    with opened(SERVICES["anu"] + server.url) as driver:
        buffer = bytearray(100)
        started = time.monotonic()
        assert driver.readinto(memoryview(buffer), 0.05) == 0
        assert time.monotonic() - started < 0.4 and driver.details["requests"] == "waiting for an answer"
        assert driver.readinto(memoryview(buffer), 0.05) == 0
        assert read(driver, 100) == server.served[0][:100] and len(server.asked) == 1


@pytest.mark.parametrize("behaviour", ["hang", "drip"])
def test_a_request_without_end_is_broken_off_booked_and_lost(server, monkeypatch, behaviour):
    monkeypatch.setattr(web, "REQUEST_TIMEOUT_S", 0.3)
    server.then("good", behaviour)
    with opened(SERVICES["anu"] + server.url) as driver:
        read(driver, driver.chunk_bytes)
        error = fails(driver, limit_s=3)
        assert isinstance(error, TransportError) and "no whole answer within 0.3 s" in str(error)
        assert driver.details["spend"].startswith("$0.01 of $9.00, 2 requests")
        assert read(driver, 64) == server.served[-1][:64]


def test_closing_breaks_a_request_off_and_ends_the_read(server):
    server.always = "hang"
    driver = open_driver(SERVICES["anu"] + server.url)
    ended = []

    def reader():
        try:
            driver.readinto(memoryview(bytearray(10)), 30.0)
        except SourceError as error:
            ended.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    while not server.asked:
        time.sleep(0.01)
    started = time.monotonic()
    driver.close()
    thread.join(5)
    assert time.monotonic() - started < 2 and isinstance(ended[0], DeviceLost) and "was closed" in str(ended[0])
    driver.close()
    with pytest.raises(DeviceLost, match="was closed"):
        driver.readinto(memoryview(bytearray(10)), 0.1)


def kill_request_thread(driver):
    """Ends it as nothing but a defect could: with an exception between two steps of its loop."""
    driver._client._loop.call_soon_threadsafe(sys.exit)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_killed_thread_is_an_error_and_not_a_wait(server):
    server.always = "slow"
    driver = open_driver(SERVICES["anu"] + server.url)
    assert driver.readinto(memoryview(bytearray(10)), 0.05) == 0
    kill_request_thread(driver)
    error = fails(driver, limit_s=5)
    assert type(error) is SourceError and "has died; open the source again" in str(error)
    with pytest.raises(SourceError, match="has died"):
        driver.readinto(memoryview(bytearray(10)), 0.1)
    driver.close()


# --- keys ---


def test_the_key_goes_into_one_header_and_nowhere_else(server, keyed, home, caplog, capfd):
    uri = SERVICES[keyed] + server.url
    caplog.set_level(logging.DEBUG)
    texts = []
    server.then("good", "html", "repeat", "reset", Status(403))
    driver = open_driver(uri)
    for _ in range(2000):
        try:
            driver.readinto(memoryview(bytearray(4096)), 1.0)
        except SourceError as error:
            texts += [str(error), repr(error), repr(error.__context__), repr(error.__cause__)]
            if "403" in str(error):
                break
    texts += [repr(driver), repr(driver.details), driver.serial, driver.name, repr(vars(driver)), repr(vars(driver._client))]
    texts += [str(finding) for finding in driver.examine(parse_uri(uri))]
    driver.close()
    with pytest.raises(StartupTestFailed) as caught:  # the service repeats itself
        server.always = "repeat"
        Source.open(uri)
    texts += [str(caught.value), caplog.text, *capfd.readouterr()]
    files = [p for p in home.rglob("*") if p.is_file()]
    assert len(files) == 3
    texts += [p.read_text() for p in files] + [str(p) for p in files]
    assert all(KEY not in text and "SECRET" not in text for text in texts)
    ours = [r for r in caplog.records if r.name.startswith(("httpx", "httpcore"))]
    assert ours == []
    sent = [[name for name, value in asked.headers.items() if KEY in value] for asked in server.asked]
    assert len(sent) == 6 and all(len(names) == 1 for names in sent)
    assert not any(KEY in str(asked.query) + asked.path + asked.body.decode() for asked in server.asked)


def test_other_users_of_the_http_library_keep_their_logs(server, caplog):
    caplog.set_level(logging.DEBUG)
    httpx.get(server.url + "/nothing", trust_env=False)
    assert {r.name.split(".")[0] for r in caplog.records} >= {"httpx", "httpcore"}


def test_a_key_file_must_be_private(server, home, monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable)
    with pytest.raises(SourceError, match=r"anu: no API key; put one in .*EVERETT_ANU_KEY.*key_file=FILE.*https://"):
        open_driver(SERVICES["anu"] + server.url)
    path = home / "key"
    uri = SERVICES["anu"] + server.url + f"&key_file={path}"
    with pytest.raises(SourceError, match="cannot be used: No such file"):
        open_driver(uri)
    path.write_text(KEY + "\n")
    for mode in (0o644, 0o640, 0o602):
        path.chmod(mode)
        with pytest.raises(SourceError, match="chmod 600"):
            open_driver(uri)
    path.chmod(0o600)
    with opened(uri) as driver:
        read(driver, 10)
    for text in ("", "two words", "short", "a\nb" * 9, "ключ" * 4, "x" * 5000):
        path.write_text(text)
        with pytest.raises(SourceError, match="holds no API key") as caught:
            open_driver(uri)
        assert not text or text not in str(caught.value)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(SourceError, match="not a regular file"):
        open_driver(uri)


@pytest.mark.parametrize(
    "uri",
    ["anu:?key=K3Y-in-URI", "anu:api_key=K3Y-in-URI", "qrypt:?token=K3Y-in-URI", "outshift:?x_id_api_key=K3Y-in-URI",
     "anu:?url=https://me:K3Y-in-URI@proxy", "anu:?url=https://proxy/?api_key=K3Y-in-URI", "anu:K3Y-in-URI",
     "anu:K3Y-in-URI?budget_usd=1", "quantis-appliance:me:K3Y-in-URI@host", "qrypt:?password=K3Y-in-URI"],
)  # fmt: skip
def test_a_key_in_a_uri_is_refused_and_not_repeated(uri):
    with pytest.raises(BadParameter) as caught:
        open_driver(uri)
    assert "K3Y" not in str(caught.value) + repr(caught.value.__context__) + repr(caught.value.__cause__)


# --- addresses and certificates ---


@pytest.mark.parametrize(
    "url",
    ["http://example.org", "http://10.0.0.1", "ftp://127.0.0.1", "127.0.0.1", "https://", "https://h:x", "https://[::1"],
)
def test_a_key_is_never_sent_in_clear(url):
    with pytest.raises(BadParameter, match="must be https"):
        open_driver(f"anu:?budget_usd=1&url={url}")


def test_parameters_out_of_range_are_named():
    for uri, message in (
        ("anu:?size=11", "from 1 to 10"), ("anu:?length=0", "from 1 to 1024"), ("anu:?type=hex32", "uint8 or uint16"),
        ("anu:?type=uint8&size=2", "hexadecimal types only"), ("anu:?size=1&length=10", "at least 512"),
        ("anu:?budget_usd=x", "US dollars"), ("outshift:?bits_per_block=12", "multiple of 8"),
        ("outshift:?blocks=1001", "from 1 to 1000"), ("outshift:?format=base64", "hexadecimal or binary"),
        ("qrypt:?size=513", "from 1 to 512"), ("quantis-appliance:h?size=511", "from 512"),
        ("quantis-appliance:", "names one host"), ("quantis-appliance:a b", "names one host"),
        ("quantis-appliance:h?url=https://h", "names one host"), ("quantis-appliance:h?key_file=x", "unknown parameter"),
        ("quantis-appliance:h?content_type=x", "content type"), ("quantis-appliance:h:99999", "https://HOST"),
        ("anu:?budget_usd=1&ca_file=/no/such", "ca_file=/no/such is no certificate file"),
    ):  # fmt: skip
        with pytest.raises((BadParameter, ValueError), match=message):
            open_driver(uri)


def test_certificates_are_always_verified(home):
    (home / "own").mkdir(), (home / "other").mkdir()
    ca, own = self_made_ca(home / "own")
    other_ca, _ = self_made_ca(home / "other")
    with WebServer(tls=own) as server:
        with opened(f"quantis-appliance:{server.host}?ca_file={ca}") as driver:
            assert read(driver, 100) == server.served[0][:100] and server.asked
        server.asked.clear()
        for trust in ("", f"?ca_file={other_ca}"):
            with opened(f"quantis-appliance:{server.host}{trust}") as driver:
                error = fails(driver)
                assert "its certificate is not trusted" in str(error) and "ca_file=FILE" in str(error)
                assert type(error) is SourceError
        with pytest.raises(BadParameter, match="is no certificate file"):
            open_driver(f"quantis-appliance:{server.host}?ca_file={home / 'own'}")
        assert server.asked == []


@pytest.mark.parametrize("wrong, words", [({"names": ("localhost",)}, "mismatch"), ({"days": -1}, "expired")])
def test_a_certificate_for_another_host_or_time_is_refused(home, wrong, words):
    ca, own = self_made_ca(home, **wrong)
    with WebServer(tls=own) as server, opened(f"quantis-appliance:{server.host}?ca_file={ca}") as driver:
        assert re.search(f"not trusted .*{words}", str(fails(driver)))
        assert server.asked == []


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with opened(SERVICES["anu"] + server.url) as driver:
        assert read(driver, 10) == server.served[0][:10]


# --- money, and one client for each key ---


def test_without_a_budget_nothing_is_sent(server):
    with pytest.raises(SourceError, match=r"anu: a request costs \$0.005 and no budget is set.*such as budget_usd=1"):
        open_driver(f"anu:?url={server.url}")
    assert server.asked == []


def test_a_request_is_on_the_disk_before_it_is_sent(server, home):
    server.always = "hang"
    with opened(SERVICES["anu"] + server.url) as driver:
        while not server.asked:
            assert driver.readinto(memoryview(bytearray(10)), 0.01) == 0
        (path,) = home.rglob("*.spend")
        saved = json.loads(path.read_text())
        assert (saved["requests"], saved["microusd"]) == (1, 5000)


def test_a_budget_ends_the_source_also_after_a_restart(server):
    uri = f"anu:?budget_usd=0.015&url={server.url}"
    for before in (0, 2):
        with opened(uri) as driver:
            for k in range(before + 1, 3 if before == 0 else 4):
                read(driver, driver.chunk_bytes)
                assert driver.details["spend"].startswith(f"${0.005 * k:.3f}".rstrip("0") + " of $0.015")
            if before:
                error = fails(driver)
                assert type(error) is SourceError and "$0.015 of budget_usd $0.015 is spent" in str(error)
    assert len(server.asked) == 3
    with pytest.raises(SourceError, match="raise budget_usd= to go on"):
        open_driver(uri)
    with opened(f"anu:?budget_usd=0.02&cost_usd=0.001&url={server.url}") as driver:
        read(driver, 10)
        assert driver.details["spend"].startswith("$0.016 of $0.02, 4 requests")


def test_a_budget_lets_what_was_paid_be_drawn_and_then_says_so(server):
    with Source.open(f"anu:?budget_usd=0.01&url={server.url}") as source_:
        out = b""
        with pytest.raises(SourceError, match=r"\$0.01 of budget_usd \$0.01 is spent"):
            while True:
                out += source_.take(32, timeout_s=10)
        status = source_.status()
    assert out == hashes(b"".join(server.served)[: -512]) and len(server.asked) == 2
    assert status.state == "failed" and status.device["spend"].startswith("$0.01 of $0.01")


def test_a_second_client_of_a_key_is_refused(server):
    uri = SERVICES["anu"] + server.url
    with opened(uri):
        assert f"in use by process {os.getpid()} (" in in_forked_child(lambda: open_driver(uri))
        with pytest.raises(SourceError, match="in use by this process itself"):
            open_driver(uri)
    with opened(uri):
        pass


# --- repeats ---


def test_a_response_served_twice_is_an_alarm(server):
    server.then("good", "repeat", "good")
    with opened(SERVICES["anu"] + server.url) as driver:
        n = driver.chunk_bytes
        read(driver, n)
        error = fails(driver)
        assert isinstance(error, DeviceFault) and (error.status, error.expected) == (1, 0)
        assert re.search(r"duplicate response: the 20480 bytes of ANU .* were served before, at 20\d\d-", str(error))
        assert driver.details["responses"] == "1 logged, 1 REPEATED"
        assert read(driver, n) == server.served[2]


def test_a_repeat_is_a_health_alarm_and_the_second_is_permanent(server):
    server.then("good", "good", "repeat", "good", "good", "good", "repeat")
    with Source.open(SERVICES["anu"] + server.url) as source_:
        out = b""
        with pytest.raises(HealthAlarm, match=r"device status 0x2 instead of 0x0 at byte \d+: duplicate response: the"):
            while True:
                out += source_.take(32, timeout_s=10)
        alarms = source_.status().alarms
    assert [(a.test, a.permanent) for a in alarms] == [("device status", False), ("device status", True)]
    assert all("duplicate response" in str(a) for a in alarms)
    before, after = b"".join(server.served[:2]), b"".join(server.served[3:6])
    allowed = {h[i : i + 32] for h in (hashes(before[:-512]), hashes(after[:-512])) for i in range(0, len(h), 32)}
    assert {out[i : i + 32] for i in range(0, len(out), 32)} <= allowed


def test_a_response_of_an_earlier_run_is_an_alarm(server):
    with opened(SERVICES["qrypt"] + server.url) as driver:
        read(driver, driver.chunk_bytes)
    server.then("repeat")
    with pytest.raises(StartupTestFailed, match="duplicate response"):
        Source.open(SERVICES["qrypt"] + server.url)


def test_two_clients_at_one_instant_are_found_by_comparing_their_logs(server, home, monkeypatch):
    logs, clients = [], []
    server.then("instant", "instant")
    for machine in ("one", "two"):
        monkeypatch.setenv("XDG_STATE_HOME", str(home / machine))
        clients.append(open_driver(SERVICES["anu"] + server.url))
        logs.append(home / machine / "everett" / f"anu-{account_id('anu', KEY)}.responses")
    got = [None, None]
    threads = [threading.Thread(target=lambda k=k: got.__setitem__(k, read(clients[k], 20_480))) for k in range(2)]
    for step in ("start", "join"):
        for thread in threads:
            getattr(thread, step)()
    assert got[0] == got[1]  # neither client could know
    ((first, second),) = compare_responses(logs)
    assert (first.path, second.path) == (Path(logs[0]), Path(logs[1])) and first.n_bytes == 20_480
    for client in clients:
        read(client, 20_480)
        client.close()
    assert len(compare_responses(logs)) == 1


# --- faults, through the source ---


def take_all(source_, piece=32):
    out = b""
    try:
        while True:
            out += source_.take(piece, timeout_s=20)
    except (SourceError, HealthAlarm) as error:
        return out, error


def test_a_service_that_goes_away_in_a_response_gives_no_part_of_it(server, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.3)
    monkeypatch.setattr(web, "REQUEST_TIMEOUT_S", 0.3)
    server.then("good", "good", "truncated")
    server.always = "reset"
    with Source.open(SERVICES["anu"] + server.url) as source_:
        out, error = take_all(source_)
        assert re.search(r"Server disconnected.*given up after \d+ failed requests", str(error))
        assert source_.status().state == "failed"
    assert out == hashes(b"".join(server.served[:2])[:-512])


def test_a_service_that_comes_back_begins_with_a_startup_test(server):
    server.then("good", "reset", "truncated", "good")
    with Source.open(SERVICES["anu"] + server.url) as source_:
        first = hashes(server.served[0][:-512])
        assert source_.take(len(first), timeout_s=10) == first
        assert source_.take(320, timeout_s=10) == hashes(server.served[2])[:320]
        assert source_.status().transport_errors == 2 and source_.status().alarms == ()


def test_a_long_stall_ends_with_its_reason(server, monkeypatch):
    monkeypatch.setattr(web, "REQUEST_TIMEOUT_S", 0.2)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    with Source.open(SERVICES["qrypt"] + server.url) as source_:
        server.always = "hang"
        started = time.monotonic()
        _, error = take_all(source_)
        assert "no whole answer within 0.2 s" in str(error) and time.monotonic() - started < 5
    monkeypatch.setattr(patience, "PATIENCE_S", 50.0)  # the source's own patience, where it is the shorter one
    monkeypatch.setattr(source, "PATIENCE_S", 0.5)
    server.always = "good"
    with Source.open(SERVICES["qrypt"] + server.url) as source_:
        server.always = "hang"
        assert re.search("no bytes for 0.5 s", str(take_all(source_)[1]))


@pytest.mark.parametrize("fault", ["stuck", "biased"])
def test_a_service_gone_bad_raises_an_alarm_and_gives_no_unproven_byte(server, fault):
    server.bad, server.bad_from = fault, 2
    with Source.open(SERVICES["anu"] + server.url) as source_:
        out, error = take_all(source_)
        first = source_.status().alarms[0]
        assert isinstance(error, HealthAlarm) and source_.status().state == "alarm"
    raw = b"".join(server.served)
    assert 2 * 20_480 <= first.offset < 2 * 20_480 + 512
    assert out == hashes(raw)[: len(out)] and len(out) <= (first.offset // 512 - 1) * 512 // 80 * 32


def test_after_an_alarm_the_same_key_may_reopen_and_another_may_not(server, monkeypatch):
    server.bad, server.bad_from = "stuck", 1
    with Source.open(SERVICES["anu"] + server.url) as source_:
        assert isinstance(take_all(source_)[1], HealthAlarm)
        server.bad_from = 10**9
        source_.reopen()
        assert len(source_.take(64, timeout_s=10)) == 64
        server.bad_from = len(server.served)
        assert isinstance(take_all(source_)[1], HealthAlarm)
        server.bad_from, server.key = 10**9, "the-key-of-somebody-else"
        monkeypatch.setenv("EVERETT_ANU_KEY", server.key)
        with pytest.raises(SourceError, match="another device now: key [0-9a-f]{16}, not key [0-9a-f]{16}"):
            source_.reopen()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_source_whose_request_thread_is_killed_says_so(server):
    with Source.open(SERVICES["anu"] + server.url) as source_:
        kill_request_thread(source_.driver)
        out, error = take_all(source_)
        assert "the thread that asks http://127.0.0.1" in str(error) and "has died" in str(error)
    raw = b"".join(server.served)
    assert out and out == hashes(raw)[: len(out)]


def test_two_hundred_cycles_leave_no_thread_and_no_file(server):
    with opened(SERVICES["anu"] + server.url) as driver:
        read(driver, 10)

    def held():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    server.always = "slow"  # closed in the middle of a request
    before = held()
    for k in range(200):
        # By name, the address is looked up in yet another thread.
        with opened(SERVICES["anu"] + (server.url.replace("127.0.0.1", "localhost") if k % 8 else server.url)) as driver:
            if k % 4 == 0:
                driver.readinto(memoryview(bytearray(10)), 0.02)
    server.always = "good"
    with Source.open(SERVICES["qrypt"] + server.url) as source_:
        source_.take(32)
    deadline = time.monotonic() + 10
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.02)  # the server's side of the last connections
    assert held() == before


# --- the doctor, and what is refused by name ---


def test_the_doctor_asks_for_nothing_and_ends_at_the_first_failure(server, home, monkeypatch):
    def examine(uri):
        parsed = parse_uri(uri)
        return [(f.check, f.verdict) for f in drivers.driver_of(parsed).examine(parsed)]

    ok = [(check, "ok") for check in ("parameters", "key", "other clients", "budget", "address")]
    for uri in SERVICES.values():
        assert examine(uri + server.url) == [*ok, ("kind", "note")]
    assert server.asked == []
    anu = SERVICES["anu"] + server.url
    assert examine(anu + "&size=99") == [("parameters", "fail")]
    assert examine(f"anu:?url={server.url}") == [*ok[:3], ("budget", "fail")]
    with opened(anu):
        assert examine(anu) == [*ok[:2], ("other clients", "fail")]
    ca, own = self_made_ca(home)
    with WebServer(tls=own) as secure:
        assert examine(f"quantis-appliance:{secure.host}?ca_file={ca}")[-2:] == [("address", "ok"), ("kind", "note")]
        assert examine(f"quantis-appliance:{secure.host}") == [*ok[:4], ("address", "fail")]
    assert examine(f"quantis-appliance:{secure.host}?ca_file={ca}") == [*ok[:4], ("address", "fail")]
    monkeypatch.delenv("EVERETT_ANU_KEY")
    assert examine(anu) == [ok[0], ("key", "fail")]


@pytest.mark.parametrize("uri", ["nist:", "curby:", "random.org:", "random-org:x", "drand:"])
def test_public_beacons_are_refused_with_the_reason(uri):
    with pytest.raises(UnknownScheme, match="a public beacon shows its values to everybody"):
        open_driver(uri)


def test_auto_never_looks_at_the_web(monkeypatch):
    loaded, load = [], drivers._load
    monkeypatch.setattr(drivers, "_load", lambda scheme, found: loaded.append(scheme) or load(scheme, found))
    drivers.attached()
    assert not set(SERVICES) & set(loaded)
    assert set(SERVICES) <= set(drivers.installed())


