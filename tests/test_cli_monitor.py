"""`everett monitor`: one measurement, many, and how it ends when the source does."""

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import everett, everett_process

FIELDS = {
    "time_utc", "uri", "name", "serial", "kind", "label", "state", "failure", "health", "seconds", "raw_bytes_per_s",
    "conditioned_bytes_per_s", "alarms", "alarm_counts", "transport_errors", "raw_bytes_in", "raw_bytes_held_back",
    "raw_bytes_dropped", "conditioned_bytes_out", "conditioned_bytes_destroyed", "ring_bytes", "ring_unread", "min_entropy",
    "min_entropy_origin", "device_conditions", "conditioner", "device", "histogram",
}  # fmt: skip


def once(uri, *arguments):
    result = everett("monitor", uri, "--once", "--json", "--seconds", "0.3", *arguments)
    (line,) = result.stdout.splitlines()
    return result, json.loads(line)


def test_one_measurement_of_a_device(roof):
    roof.put({"serial": "7"})
    result, seen = once("lamp:7")
    assert result.exit_code == 0 and set(seen) == FIELDS
    assert (seen["state"], seen["health"], seen["label"], seen["serial"]) == ("flowing", "ok", "quantum", "7")
    assert seen["device"] == {"firmware": "1.7", "mode": "raw"}
    assert seen["raw_bytes_in"] > 0 < seen["raw_bytes_per_s"]
    assert 0 < seen["conditioned_bytes_destroyed"] <= seen["conditioned_bytes_out"] <= seen["raw_bytes_in"] * 32 / 80
    assert [line.split()[0] for line in roof.log()] == ["opened", "closed"]


def test_the_histogram_counts_raw_bytes(tmp_path):
    data = random.Random(1).randbytes(50_000)
    (tmp_path / "r.bin").write_bytes(data)
    result, seen = once(f"replay:{tmp_path / 'r.bin'}")
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    histogram = seen["histogram"]
    assert (result.exit_code, seen["state"], seen["label"]) == (0, "exhausted", "NOT QUANTUM NOW (recorded)")
    assert (histogram["of"], histogram["bytes"], histogram["counts"]) == ("raw bytes", 50_000, counts.tolist())
    assert histogram["ones_fraction"] == np.unpackbits(np.frombuffer(data, dtype=np.uint8)).mean()
    assert histogram["most_frequent"] == counts.argmax() and histogram["most_frequent_fraction"] == counts.max() / 50_000


def test_a_fast_source_is_counted_in_part():
    _, seen = once("sim:seed=7")  # reads of 1 MiB
    assert 0 < seen["histogram"]["bytes"] < seen["raw_bytes_in"] / 8


@pytest.mark.parametrize(
    "lamp, code, state, said",
    [
        ({"trouble": "stuck", "at": 20_000}, 4, "alarm", "repetition count (bits)"),
        ({"trouble": "fault", "at": 20_000}, 4, "alarm", "device status"),
        ({"trouble": "lost", "at": 20_000}, 1, "failed", "fell off the roof"),
    ],
)
def test_a_source_that_breaks_ends_it(roof, lamp, code, state, said):
    roof.put({"serial": "7", **lamp})
    result = everett("monitor", "lamp:7", "--json", "--seconds", "0.3")
    last = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, last["state"]) == (code, state)
    assert said in last["health"] + last["failure"]
    if code == 4:
        assert last["alarms"][-1]["permanent"] and sum(last["alarm_counts"].values()) == len(last["alarms"]) >= 1
    result = everett("monitor", "lamp:7", "--seconds", "0.3")
    assert result.exit_code == code and said in result.output


@pytest.mark.parametrize(
    "lamp, code, type_",
    [({"trouble": "stuck"}, 4, "StartupTestFailed"), ({"trouble": "lost"}, 1, "DeviceLost"), (None, 3, "DeviceNotFound")],
)
def test_a_source_that_cannot_be_opened_is_json_too(roof, lamp, code, type_):
    roof.put(*([{"serial": "7", **lamp}] if lamp else []))
    result, seen = once("lamp:7")
    assert result.exit_code == code and seen["uri"] == "lamp:7"
    assert (seen["error"]["type"], seen["error"]["exit_code"]) == (type_, code)
    assert seen["error"]["message"] in result.stderr


def test_a_source_that_costs_money_is_not_drawn_from(roof):
    roof.put({"serial": "7"})
    _, seen = once("paidlamp:7")
    assert seen["conditioned_bytes_destroyed"] == 0 and seen["ring_unread"] == seen["ring_bytes"] == 16384
    assert int(roof.log()[-1].split()[2]) <= 65536


def test_measurements_go_on_until_it_is_stopped():
    process = everett_process("monitor", "sim:seed=7,rate=4Mbit/s", "--json", "--seconds", "0.1")
    seen = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    raw = [s["raw_bytes_in"] for s in seen]
    assert raw[0] < raw[1] < raw[2]


def test_in_words():
    text = everett("monitor", "sim:seed=7,fault=short@20480", "--once", "--seconds", "0.3").stdout
    for words in ("NOT QUANTUM (simulated)", "1 transport errors", "drawn and destroyed", "values 0 to 255"):
        assert words in text


def test_on_a_terminal_one_table_is_drawn_over_itself():
    own, child = pty.openpty()
    command = [sys.executable, "-m", "everett_cuda", "monitor", "sim:seed=7,rate=4Mbit/s", "--seconds", "0.1"]
    process = subprocess.Popen(
        command, stdout=child, stderr=child, close_fds=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(child)
    seen, deadline = b"", time.monotonic() + 30
    while seen.count(b"drawn and destroyed") < 3:
        assert time.monotonic() < deadline, seen
        if select.select([own], [], [], 1.0)[0]:
            seen += os.read(own, 65536)
    process.send_signal(signal.SIGINT)
    while True:  # a child whose terminal is full does not end
        try:
            if not os.read(own, 65536):
                break
        except OSError:  # the child has closed its end
            break
    os.close(own)
    assert process.wait(timeout=20) == 130
    assert b"\x1b[1A" in seen or b"\x1b[2K" in seen  # cursor up, line cleared
