"""`everett devices`: what is attached, without opening it."""

import json

from commands import everett

FIELDS = {"uri", "name", "serial", "kind", "label", "rate_bytes_per_s", "min_entropy", "min_entropy_origin", "state"}


def test_without_a_device_it_says_what_was_looked_for(roof):
    result = everett("devices")
    assert result.exit_code == 3
    assert result.stdout.startswith("no device is attached; looked for:\n")
    assert "  lamp: lamps on the roof\n" in result.stdout and "replay:FILE" in result.stdout
    result = everett("devices", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 3 and found["devices"] == [] and "lamp: lamps on the roof" in found["looked_for"]


def test_each_device_has_a_row(roof):
    roof.put({"serial": "7"}, {"serial": "8", "kind": "electronic", "state": "in use by rngd (pid 71)", "rate": None})
    result = everett("devices", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["devices"]
    assert all(set(row) == FIELDS for row in rows)
    assert rows[0] == {
        "uri": "lamp:7",
        "name": "roof lamp",
        "serial": "7",
        "kind": "quantum",
        "label": "quantum",
        "rate_bytes_per_s": 1e6,
        "min_entropy": 4.0,
        "min_entropy_origin": "assumed",
        "state": "ready",
    }
    assert (rows[1]["label"], rows[1]["rate_bytes_per_s"]) == ("NOT QUANTUM (electronic)", None)
    table = everett("devices", columns=160).stdout
    for word in ("lamp:7", "8 Mbit/s", "4 of 8 (assumed)", "NOT QUANTUM (electronic)", "in use by rngd (pid 71)"):
        assert word in table
    assert roof.log() == []  # nothing was opened


def test_what_a_device_calls_itself_is_text(roof):
    roof.put({"serial": "7", "name": "[bold]x[/bold] \x1b[2J"})
    table = everett("devices", columns=160).stdout
    assert "[bold]x[/bold] \\x1b[2J" in table and "\x1b" not in table
    doctor = everett("doctor", "lamp:8").output + everett("monitor", "lamp:7", "--once", "--seconds", "0.1").output
    assert "\\x1b[2J" in doctor and "\x1b" not in doctor


def test_serial_numbers_are_whole_on_a_narrow_terminal(roof):
    roof.put({"serial": "0123456789ABCDEFGHIJ"})
    table = everett("devices", columns=60).stdout
    (row,) = (line for line in zip(*(line.split("│") for line in table.splitlines() if "│" in line), strict=True)
              if "".join(line).replace(" ", "").startswith("0123"))  # fmt: skip
    assert "".join(row).replace(" ", "") == "0123456789ABCDEFGHIJ"


def test_a_driver_that_cannot_be_imported_is_named_and_the_others_are_listed(roof, tmp_path):
    roof.put({"serial": "7"})
    (tmp_path / "site" / "lamp_device-1.0.dist-info" / "entry_points.txt").write_text(
        "[everett_cuda.drivers]\nbroken = no_such_module:Driver\nlamp = lamp_device:LampDriver\n"
    )
    found = json.loads(everett("devices", "--json").stdout)
    assert [d["uri"] for d in found["devices"]] == ["lamp:7"]
    assert any(line.startswith("broken: not looked for: ") for line in found["looked_for"])
