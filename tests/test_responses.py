"""Responses: commitments that give nothing away, a log that survives restarts, and logs compared across machines."""

import hashlib
import os
import re

import pytest

from everett_cuda.drivers import responses
from everett_cuda.drivers.responses import ResponseLog, commitment, compare_responses, read_responses
from everett_cuda.errors import SourceError

A, B, C = (bytes([k]) * 512 for k in (1, 2, 3))


@pytest.fixture
def log(tmp_path):
    opened = ResponseLog(tmp_path / "a.responses")
    yield opened
    opened.close()


def write(path, *contents):
    log = ResponseLog(path)
    for content in contents:
        log.add(content)
    log.close()
    return path


def test_a_commitment_is_a_labelled_hash_of_the_whole_response():
    # printf 'everett/1/response\0' and 64 letters a, by sha256sum
    assert commitment(b"a" * 64) == "cd1f730ad56b9798e82ad0a7a2270971bb332f10bfba5fc15fbe98ccc4616f0d"
    assert commitment(A) == hashlib.sha256(b"everett/1/response\0" + A).hexdigest()
    assert commitment(A) != hashlib.sha256(A).hexdigest()  # that could equal conditioner output
    with pytest.raises(ValueError, match="63 bytes gives them away"):
        commitment(b"x" * 63)


def test_a_response_served_twice_is_found(log):
    assert log.add(A) is None and log.add(B) is None
    when = log.add(A)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", when) and log.add(A) == when
    assert len(log) == 2 and log.add(A[:-1]) is None  # another response: only whole ones are compared


def test_a_log_outlives_its_client(tmp_path):
    path = write(tmp_path / "a.responses", A, B)
    log = ResponseLog(path)
    assert len(log) == 2 and log.add(B) is not None and log.add(C) is None
    log.close()
    log.close()
    lines = read_responses(path)
    assert [(r.line, r.n_bytes, r.commitment) for r in lines] == [
        (n, 512, commitment(x)) for n, x in enumerate((A, B, B, C), start=2)
    ]
    assert [r.when for r in lines] == sorted(r.when for r in lines)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cut", [1, 60, 85])
def test_a_line_that_was_being_written_at_a_kill_is_dropped(tmp_path, cut):
    path = write(tmp_path / "a.responses", A, B)
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(read_responses(path)) == 1
    log = ResponseLog(path)
    assert log.add(B) is None and log.add(A) is not None
    log.close()
    assert len(read_responses(path)) == 3


def test_a_log_killed_in_its_first_line_begins_anew(tmp_path):
    (tmp_path / "a.responses").write_text("everett resp")
    path = write(tmp_path / "a.responses", A)
    assert len(read_responses(path)) == 1


def test_a_damaged_log_is_named_with_its_line(tmp_path):
    path = write(tmp_path / "a.responses", A, B, C)
    lines = path.read_text().split("\n")
    lines[2] = lines[2][:-1]
    path.write_text("\n".join(lines))
    for use in (lambda: ResponseLog(path), lambda: compare_responses([path])):
        with pytest.raises(SourceError, match="a.responses:3 is damaged"):
            use()
    for text in ("", "something else\n", "everett responses 2\n"):
        path.write_text(text)
        with pytest.raises(SourceError, match="no response log of this version"):
            read_responses(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(SourceError, match="no response log"):
        ResponseLog(path)
    with pytest.raises(SourceError, match="cannot be read as a response log"):
        read_responses(path)
    with pytest.raises(SourceError, match="No such file"):
        compare_responses([tmp_path / "missing"])


def test_a_response_that_cannot_be_logged_is_not_used(log, monkeypatch):
    monkeypatch.setattr(responses.os, "write", lambda fd, data: len(data) - 1)
    with pytest.raises(SourceError, match="the disk is full.*is not used"):
        log.add(A)


def test_logs_of_several_machines_are_compared(tmp_path):
    a = write(tmp_path / "a", A, B)
    b = write(tmp_path / "b", C)
    assert compare_responses([a, b]) == [] == compare_responses([a])
    c = write(tmp_path / "c", B, C, os.urandom(512))
    repeated = compare_responses([a, str(b), c])
    assert [[(os.path.basename(r.path), r.line) for r in group] for group in repeated] == [
        [("a", 3), ("c", 2)], [("b", 2), ("c", 3)],
    ]  # fmt: skip
    assert [group[0].commitment for group in repeated] == [commitment(B), commitment(C)]
    d = write(tmp_path / "d", A, A)
    assert [[r.line for r in group] for group in compare_responses([d])] == [[2, 3]]
    (tmp_path / "link").symlink_to(a)
    with pytest.raises(SourceError, match="named twice"):
        compare_responses([a, tmp_path / "link"])
