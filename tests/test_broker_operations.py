"""A broker as a service: what systemd, Prometheus and the log are told; the unit, the dashboard and the documentation."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from http.client import HTTPConnection
from pathlib import Path

import pytest
from commands import everett, everett_process
from ledger_checks import until

from everett_cuda.broker import metrics
from everett_cuda.broker.config import BrokerConfig, read_config
from everett_cuda.broker.notify import Notifier
from everett_cuda.drivers import broker_connection
from everett_cuda.errors import BadParameter, SourceError
from everett_cuda.source import Source

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "sim:seed=5,rate=4MB/s"


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """A service manager's socket; read with `messages`."""
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(address))
        receiver.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))
        yield receiver


@pytest.fixture
def run(tmp_path):
    """A folder that clients trust for a broker's socket."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    return folder


@pytest.fixture
def serving(run, manager, monkeypatch):
    """A broker as a process, under a service manager with a watchdog; returns it, ready."""
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    config = run.parent / "broker.conf"
    config.write_text(
        f"[broker]\nsources = {SOURCE}\nsocket = {run / 's.sock'}\ngroup =\nmetrics = {run / 'm.sock'}\nlog = json\n"
    )
    process = everett_process("serve", "--config", config)
    process.config = config
    try:
        assert manager.recv(4096).decode().splitlines() == ["READY=1", "STATUS=serving NOT QUANTUM (simulated) bits"]
        yield process
    finally:
        process.kill()
        process.communicate()


def get(path, what="/metrics"):
    """(status, body) over a Unix socket."""
    connection = HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(20)
    connection.sock.connect(str(path))
    connection.request("GET", what)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def values(text):
    """Figures of an exposition by name, labels as written; the comments are left out."""
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


# --- systemd ---


@pytest.mark.parametrize("abstract", [False, True])
def test_messages_to_the_service_manager(tmp_path, monkeypatch, abstract):
    name = f"@everett-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + name[1:] if abstract else name)
        receiver.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "60000000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        notifier = Notifier()
        assert notifier.watchdog_s == 30
        notifier.tell(READY=1, STATUS="two\nlines\x1b")
        assert receiver.recv(4096) == b"READY=1\nSTATUS=two lines "
        notifier.lives()
        notifier.lives()  # not due again for half a minute
        notifier.tell(STOPPING=1)
        assert [receiver.recv(4096) for _ in range(2)] == [b"WATCHDOG=1", b"STOPPING=1"]
    notifier.tell(READY=1)  # nobody is there any more
    notifier.close()
    notifier.close()


def test_without_a_service_manager_nothing_is_sent(monkeypatch):
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)
    notifier = Notifier()
    notifier.tell(READY=1)
    notifier.lives()
    assert notifier.watchdog_s == 0
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")  # another process is meant
    assert Notifier().watchdog_s == 0


def test_a_service_is_ready_lives_logs_reloads_and_stops(serving, manager, run):
    pytest.importorskip("prometheus_client", reason="needs the extra 'serve'")
    assert manager.recv(4096) == manager.recv(4096) == b"WATCHDOG=1"
    with Source.open(f"broker:{run / 's.sock'}") as client:
        client.take(32_000)
        until(lambda: values(get(run / "m.sock")[1])["everett_served_bytes_total"] >= 32_000)
        figures = values(get(run / "m.sock")[1])
        assert figures["everett_clients"] == figures["everett_broker_flowing"] == 1
        who = f'pid="{os.getpid()}",uid="{os.getuid()}"'
        (taken,) = (value for name, value in figures.items() if name.startswith("everett_client_bytes") and who in name)
        assert taken >= 32_000
        assert figures[f'everett_source_raw_bytes_total{{source="{SOURCE}"}}'] >= 4096
        assert figures[f'everett_source_startup_tests_total{{source="{SOURCE}"}}'] == 1
        assert get(run / "m.sock", "/secrets")[0] == 404
        serving.config.write_text(serving.config.read_text() + "quota = 1MB/s\n")
        serving.send_signal(signal.SIGHUP)
        lines = []
        while not lines or "read again" not in lines[-1]["text"]:
            lines.append(json.loads(serving.stdout.readline()))
    while lines[-1].get("event") != "disconnected":
        lines.append(json.loads(serving.stdout.readline()))
    assert lines[-1]["bytes"] >= 32_000
    serving.send_signal(signal.SIGTERM)
    said, error = serving.communicate(timeout=30)
    assert (serving.returncode, error) == (0, "")
    lines += [json.loads(line) for line in said.splitlines()]
    events = {line["event"]: line for line in lines if "event" in line}
    for event in ("connected", "disconnected"):
        assert (events[event]["pid"], events[event]["uid"], events[event]["gid"]) == (os.getpid(), os.getuid(), os.getgid())
    assert lines[-1]["text"] == "stopped; every buffer was zeroed" and all(line["time_utc"] for line in lines)
    manager.setblocking(False)
    told = []
    try:
        while True:
            told.append(manager.recv(4096))
    except BlockingIOError:
        pass
    assert told[-1] == b"STOPPING=1" and not list(run.glob("*.sock"))


def test_a_hanging_broker_is_seen_by_the_watchdog(serving, manager):
    assert manager.recv(4096) == b"WATCHDOG=1"
    serving.send_signal(signal.SIGSTOP)
    manager.settimeout(1)
    with pytest.raises(TimeoutError):
        while True:
            manager.recv(4096)
    serving.send_signal(signal.SIGCONT)
    manager.settimeout(20)
    assert manager.recv(4096) == b"WATCHDOG=1"


def test_it_serves_without_memory_that_can_be_written_and_executed(run, monkeypatch):
    """As MemoryDenyWriteExecute=yes of the unit has it (prctl(2), PR_SET_MDWE)."""
    code = (
        "import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.prctl(65, 1, 0, 0, 0): sys.exit(77)\n"
        "from everett_cuda.broker import Broker, BrokerConfig; from pathlib import Path\n"
        "import numpy, ctypes.util, usb.backend.libusb1\n"
        "broker = Broker(BrokerConfig(sources=('sim:seed=1',), socket=Path(sys.argv[1]), group='')); broker.turn(0.1)\n"
        "print(broker.stats().supply); broker.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, run / "s.sock"], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    assert done.stdout == "flowing\n", done.stderr


def test_the_unit_is_understood_and_safe(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze (apt install systemd) is not installed")
    text = (ROOT / "drivers/systemd/everett.service").read_text()
    # systemd asks whether the commands exist; everett need not be in /usr/bin here.
    text = text.replace("=everett serve", "=/bin/echo serve").replace("=kill ", "=/bin/sh -c kill ")
    unit = tmp_path / "everett.service"
    unit.write_text(text)

    def analyze(*arguments):
        done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert analyze("verify", str(unit)) == (0, "")
    if "--offline" not in analyze("--help")[1]:
        pytest.skip("this systemd-analyze judges no unit offline (systemd 250)")
    code, said = analyze("security", "--offline=true", "--threshold=15", "--no-pager", str(unit))
    assert code == 0, said  # exposure at most 1.5 of 10


def test_the_unit_runs_commands_that_there_are(tmp_path):
    lines = dict(
        line.split("=", 1)
        for line in (ROOT / "drivers/systemd/everett.service").read_text().splitlines()
        if re.match("Exec|User|Group|Runtime", line)
    )
    config = tmp_path / "broker.conf"
    config.write_text(f"[broker]\nsources = {SOURCE}\n")
    checked = lines["ExecStartPre"].replace("/etc/everett/broker.conf", str(config)).split()[1:]
    assert everett(*checked).exit_code == 0
    assert lines["ExecStart"].split() == [*lines["ExecStartPre"].split()[:-1]]
    assert broker_connection.DEFAULT_PATH == Path("/run") / lines["RuntimeDirectory"] / "everett.sock"
    assert lines["User"] == lines["Group"] == BrokerConfig(sources=(SOURCE,)).group
    config.write_text("[broker]\nsources = nope:\n")
    assert everett(*checked).exit_code == 2  # RestartPreventExitStatus


# --- configuration ---


@pytest.mark.parametrize(
    "line, said",
    [
        ("metrics = 0.0.0.0:9123", "a port of this machine"),
        ("metrics = example.org:80", "a port of this machine"),
        ("metrics = m.sock", "an absolute path"),
        ("metrics = 127.0.0.1:99999", "a port of this machine"),
        ("log = xml", "text or json"),
    ],
)
def test_settings_that_are_refused(tmp_path, line, said):
    config = tmp_path / "broker.conf"
    config.write_text(f"[broker]\nsources = {SOURCE}\n{line}\n")
    with pytest.raises(BadParameter, match=said):
        BrokerConfig(**read_config(config))
    result = everett("serve", "--config", config, "--check-config")
    assert result.exit_code == 2 and said in result.stderr


# --- metrics ---


@pytest.fixture
def stats(run):
    from everett_cuda.broker import Broker

    with Broker(BrokerConfig(sources=(SOURCE, "sim:seed=6"), socket=run / "s.sock", group="")) as broker:
        yield broker.stats


def test_figures_on_a_port_of_this_machine(stats):
    client = pytest.importorskip("prometheus_client", reason="needs the extra 'serve'")
    from prometheus_client.parser import text_string_to_metric_families

    server = metrics.MetricsServer(metrics.parse_address("0"), stats)
    host, port = server.address
    assert host == "127.0.0.1"
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=20) as answer:
        assert answer.headers["Content-Type"] == client.CONTENT_TYPE_LATEST
        text = answer.read().decode()
    with pytest.raises(SourceError, match="metrics cannot be served at"):
        metrics.MetricsServer(("127.0.0.1", port), stats)
    server.close()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert set(families) == {name.removesuffix("_total") for name in metrics.NAMES}
    for name, (kind, labels, meaning) in metrics.NAMES.items():
        family = families[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (kind, meaning)
        assert all(set(sample.labels) == set(labels) for sample in family.samples)
    sources = {s.labels["source"] for s in families["everett_source_flowing"].samples}
    assert sources == {SOURCE, "sim:seed=6"}


def test_a_socket_that_a_killed_broker_left_is_replaced_and_private(stats, run):
    pytest.importorskip("prometheus_client", reason="needs the extra 'serve'")
    path = run / "m.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    server = metrics.MetricsServer(path, stats)
    assert path.stat().st_mode & 0o777 == 0o660 and get(path)[0] == 200
    server.close()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(SourceError, match="metrics cannot be served"):
        metrics.MetricsServer(path, stats)
    assert path.read_text() == "precious"


def test_spend_is_told_where_it_is_booked(stats):
    from dataclasses import replace

    one = stats()
    status = replace(one.sources[0], device={"spend": "$0.005 of $1.00, 1 request since 2026-11-25"})
    told = {(n, labels): v for n, labels, v in metrics.samples(replace(one, sources=(status,)))}
    assert told[("everett_source_spent_dollars", (SOURCE,))] == 0.005
    assert told[("everett_source_budget_dollars", (SOURCE,))] == 1
    assert not [n for n, _, _ in metrics.samples(one) if "dollars" in n]


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are():
    board = json.loads((ROOT / "drivers/grafana/everett.json").read_text())
    asked = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"everett_\w+", target["expr"])
            assert names and all(name in metrics.NAMES for name in names), target
            labels = {label for name in names for label in metrics.NAMES[name][1]}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, target
            asked |= set(names)
    assert asked == set(metrics.NAMES)  # nothing is told that nobody looks at
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_documentation_names_every_metric():
    text = (ROOT / "docs" / "node.md").read_text()
    rows = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if line.startswith("| `everett_")}
    assert set(rows) == set(metrics.NAMES)
    for name, (_, labels, meaning) in metrics.NAMES.items():
        assert meaning in rows[name] and all(f"`{label}`" in rows[name] for label in labels)
