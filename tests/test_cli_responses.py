"""`everett responses`: logs of several clients compared."""

import json

from commands import everett

from everett_cuda.drivers.responses import ResponseLog


def log(path, *bodies):
    written = ResponseLog(path)
    for body in bodies:
        written.add(body)
    written.close()
    return str(path)


def test_bytes_that_two_clients_were_given_are_found(tmp_path):
    a = log(tmp_path / "a.responses", b"a" * 64, b"b" * 64)
    b = log(tmp_path / "b.responses", b"c" * 100, b"b" * 64)
    done = everett("responses", a, b)
    assert done.exit_code == 1
    assert "REPEATED 64 bytes" in done.stdout and f"{a}:3" in done.stdout and f"{b}:3" in done.stdout
    assert "4 responses in 2 logs, 1 of them served more than once" in done.stdout
    found = json.loads(everett("responses", a, b, "--json").stdout)
    assert found["responses"] == 4
    assert [(r["file"], r["line"], r["n_bytes"]) for r in found["repeated"][0]] == [(a, 3, 64), (b, 3, 64)]


def test_different_responses_and_files_that_are_no_logs(tmp_path):
    a, b = log(tmp_path / "a", b"a" * 64), log(tmp_path / "b", b"b" * 64)
    done = everett("responses", a, b)
    assert done.exit_code == 0 and "2 responses in 2 logs, 0 of them" in done.stdout
    (tmp_path / "other").write_text("hello\n")
    other, none = tmp_path / "other", tmp_path / "none"
    for wrong, why in (([other], "no response log"), ([none], "cannot be read"), ([a, a], "named twice")):
        done = everett("responses", *wrong)
        assert done.exit_code == 1 and why in done.stderr
