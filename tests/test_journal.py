"""Journals: known answers, writer against reader, every place where a file can end, and whoever may not write or read."""

import hashlib
import json
import os
import resource
import signal
import stat
import struct
import time

import numpy as np
import pytest
import torch
from processes import in_forked_child

import everett_cuda as ev
from everett_cuda import _C, journal_file, journaling, keys
from everett_cuda.errors import ForkedError, JournalError

USER_KEY = bytes(range(40))
both = pytest.mark.parametrize("key", [None, USER_KEY], ids=["clear", "encrypted"])


@pytest.fixture
def source():
    keys.set_freshness("op")
    keys.configure(on_starved="stretch", max_stretch=2**16, timeout_s=60.0)
    yield ev.open("sim:seed=7")
    ev.close()
    keys.set_freshness("op")


def drawn_records(path, key=None):
    """[(record of a draw as an op gets it, kind)], from the journal alone: shared and repeated draws find their key by the
    nonce or the step."""
    by_nonce, step_key, result = {}, {}, []
    for record in ev.read_journal(path, key):
        if record.type == journal_file.STEP:
            step_key.clear()
        if record.type == journal_file.KEY:
            by_nonce[record.family, record.number] = step_key[record.family] = record.data
        if record.type == journal_file.DRAW:
            found = step_key[record.family] if record.drawn == 2 else by_nonce[record.family, record.number]
            by_nonce[record.family, record.number] = found
        if record.type in (journal_file.KEY, journal_file.DRAW):
            key_of_draw = by_nonce[record.family, record.number]
            result.append((_C.derive_record(key_of_draw, record.number), journal_file.DRAWN[record.drawn]))
    return result


# --- known answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, crc",
    [
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_crc32c_known_answers(data, crc):
    assert _C.crc32c(data) == crc


def test_crc32c_matches_the_polynomial_at_every_length():
    data = np.random.default_rng(3).bytes(40)
    for n in range(40):
        c = 0xFFFFFFFF
        for byte in data[:n]:
            c ^= byte
            for _ in range(8):
                c = (c >> 1) ^ (0x82F63B78 if c & 1 else 0)
        assert _C.crc32c(data[:n]) == c ^ 0xFFFFFFFF


def test_aes_256_gcm_known_answer():
    # Test cases 13 and 14 of McGrew and Viega's GCM specification, appendix B.
    assert _C.aes_gcm_seal(bytes(32), bytes(12), b"", b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    assert _C.aes_gcm_seal(bytes(32), bytes(12), b"", bytes(16)).hex() == (
        "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    )


def test_aes_256_gcm_matches_cryptography():
    aead = pytest.importorskip("cryptography.hazmat.primitives.ciphers.aead", reason="needs the extra sign")
    random = np.random.default_rng(4)
    for n in (0, 1, 15, 16, 17, 72, 1000, 65537):
        key, iv, bound, plain = (random.bytes(m) for m in (32, 12, 32, n))
        assert _C.aes_gcm_seal(key, iv, bound, plain) == aead.AESGCM(key).encrypt(iv, plain, bound)


def test_the_file_key_is_hkdf():
    kdf = pytest.importorskip("cryptography.hazmat.primitives.kdf.hkdf", reason="needs the extra sign")
    from cryptography.hazmat.primitives.hashes import SHA256

    salt = hashlib.sha256(b"salt").digest()
    expected = kdf.HKDF(SHA256(), 32, salt, b"everett/1/journal").derive(USER_KEY)
    assert journal_file.file_key(USER_KEY, salt) == expected


# --- what is written ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("freshness", ["op", "step"])
def test_every_draw_is_in_the_file_before_it_is_used(source, tmp_path, key, freshness):
    ev.set_freshness(freshness)
    path = tmp_path / "run.evj"
    with ev.journal(path, key) as journal:
        made = []
        for i in range(12):
            if i == 6:
                torch.manual_seed(3)
            if i == 9:
                torch.manual_seed(3)  # the same again within the step: `reused`
            if i == 5:
                ev.step()
            made.append((keys.draw_record(world=i % 3 == 0), _C.Keyring.last_draw()[0]))
            assert drawn_records(path, key) == made, "readable while the journal is still open"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size == journal.bytes
    assert {kind for _, kind in made} == ({"fresh", "reused"} | ({"shared"} if freshness == "step" else set()))
    assert drawn_records(path, key) == made


def test_stretched_and_graph_keys_are_recorded(ring, tmp_path, source):
    small = _C.Ring(1 << 12)
    small.put(hashlib.sha256(b"k").digest())
    keys.attach(small)  # behind the source's back: one fresh key, then the ratchet
    path = tmp_path / "run.evj"
    memory = (np.zeros(32, np.uint8), np.zeros(32, np.uint8))
    with ev.journal(path):
        for m in memory:
            keys.draw_graph_key(m.ctypes.data)
    records = [r for r in ev.read_journal(path) if r.type == journal_file.KEY]
    assert [(journal_file.DRAWN[r.drawn], journal_file.FAMILIES[r.family], r.data) for r in records] == [
        (kind, "graph", m.tobytes()) for kind, m in zip(("fresh", "stretched"), memory, strict=True)
    ]


def test_direct_words_are_recorded(source, tmp_path):
    path = tmp_path / "run.evj"
    with ev.journal(path):
        words = source.direct_words(5)
        rand = ev.rand(3, freshness="direct")
    first, second = (r for r in ev.read_journal(path) if r.type == journal_file.WORDS)
    assert first.data == words.tobytes() and (first.device, first.store, first.ticket) == (-1, 0, 1)
    expected = (np.frombuffer(second.data, "<u4")[:3] >> 8) * np.float32(2**-24)
    assert torch.equal(rand, torch.from_numpy(expected.astype(np.float32)))


def test_the_header_says_where_it_was_recorded(source, tmp_path):
    path = tmp_path / "run.evj"
    ev.configure(max_stretch=17)
    with ev.journal(path):
        pass
    header = ev.read_journal(path).header
    assert header["source"]["label"] == "NOT QUANTUM (simulated)" and header["source"]["uri"] == "sim:seed=7"
    assert (header["torch"], header["stream_law"], header["rank"], header["world_size"]) == (torch.__version__, 1, 0, 1)
    assert header["settings"]["max_stretch"] == 17 and header["default_dtype"] == "torch.float32"
    assert "none" in header["encryption"] and header["continues"] is None


def test_the_layout_is_that_of_the_documentation(source, tmp_path):
    """A second reader, of the table in docs/journal.md."""
    path = tmp_path / "run.evj"
    with ev.journal(path):
        keys.draw_record()
        ev.step()
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"EVERETTJ", 1) and json.loads(data[16 : 16 + length])["stream_law"] == 1
    at, types = 16 + length + 4, []
    while at < len(data):
        (n,) = struct.unpack_from("<I", data, at)
        body, crc = data[at + 4 : at + n], struct.unpack_from("<I", data, at + n)[0]
        assert crc == _C.crc32c(data[at : at + n])
        types.append((body[0], len(body)))
        at += 4 + n
    states = [(5, 40 + torch.get_rng_state().numel())]
    assert types == [*states, (1, 72), (4, 40), (7, 40 + len('{"why": "closed"}'))]


def test_no_key_is_ever_printed(source, tmp_path):
    path = tmp_path / "run.evj"
    with ev.journal(path) as journal:
        keys.draw_record()
        source.direct_words(1)
    said = repr(journal) + "".join(f"{r} {r!r}" for r in ev.read_journal(path))
    for record in ev.read_journal(path):
        if record.type in (journal_file.KEY, journal_file.WORDS):
            assert record.data.hex() not in said and str(record.data) not in said
    assert "draw 1: fresh" in said


def test_an_encrypted_journal_shows_no_key_and_no_nonce(source, tmp_path):
    path = tmp_path / "run.evj"
    with ev.journal(path, USER_KEY):
        keys.draw_record()
        words = source.direct_words(2).tobytes()
    data = path.read_bytes()
    secrets = [(r.data, r.number) for r in ev.read_journal(path, USER_KEY) if r.type == journal_file.KEY]
    assert len(secrets) == 1
    assert not [s for pair in secrets for s in (*pair, words) if s in data]


# --- ends and damage ----------------------------------------------------------------------------------------------


@both
def test_a_file_cut_anywhere_gives_all_whole_records(source, tmp_path, key):
    path = tmp_path / "run.evj"
    ends = []
    with ev.journal(path, key) as journal:
        ends.append(journal.bytes)  # behind the generator's state
        for i in range(4):
            keys.draw_record() if i % 2 else source.direct_words(1)
            ends.append(journal.bytes)
    data = path.read_bytes()
    whole = list(map(str, ev.read_journal(path, key)))
    assert len(whole) == len(ends) + 1
    header = ends[0] - 8 - 40 - torch.get_rng_state().numel() - (16 if key else 0)
    for n in range(header):
        with pytest.raises(JournalError, match="torn or damaged"):
            _read_cut(tmp_path, data[:n], key)
    with pytest.raises(JournalError, match="not a journal"):
        _read_cut(tmp_path, b"EVERETTX" + data[8:], key)
    places = {header, header + 1, header + 5, ends[0] - 1, *range(ends[0], len(data))}
    for n in sorted(places):
        reader, records = _read_cut(tmp_path, data[:n], key)
        good = sum(end <= n for end in ends)
        assert list(map(str, records)) == whole[:good]
        assert not reader.closed and reader.good_bytes == ([header, *ends][good])
        at_a_record = n in (header, *ends)
        assert ("no closing record" if at_a_record else f"record {good} at byte {reader.good_bytes} is torn") in reader.end
    reader, records = _read_cut(tmp_path, data, key)
    assert reader.closed and reader.end == f"closed after {len(ends)} records" and reader.good_bytes == len(data)
    assert "bytes behind" in _read_cut(tmp_path, data + b"\0", key)[0].end


def _read_cut(folder, data, key):
    path = folder / "cut.evj"
    path.write_bytes(data)
    reader = ev.read_journal(path, key)
    return reader, list(reader)


@both
def test_damage_ends_the_reading_where_it_is(source, tmp_path, key):
    path = tmp_path / "run.evj"
    with ev.journal(path, key) as journal:
        keys.draw_record()
        start = journal.bytes
        keys.draw_record()
        stop = journal.bytes
        keys.draw_record()
    data = path.read_bytes()
    for at in range(start, stop):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        reader, records = _read_cut(tmp_path, damaged, key)
        assert len(records) == 2 and not reader.closed and "record 2 at byte" in reader.end
    swapped = data[:start] + data[stop : 2 * stop - start] + data[start:stop] + data[2 * stop - start :]
    reader, records = _read_cut(tmp_path, swapped, key)
    if key is None:
        assert len(records) == 5, "in clear nothing protects the order: whoever can write can forge"
    else:
        assert len(records) == 2 and "was altered" in reader.end
    zeroed = data[:stop] + bytes(100)  # what some file systems leave behind a power cut
    assert "its length is 0" in _read_cut(tmp_path, zeroed, key)[0].end


def test_a_killed_process_leaves_every_draw_that_it_used(tmp_path):
    for i in range(5):
        path, used = tmp_path / f"{i}.evj", tmp_path / f"{i}.used"
        child = os.fork()
        if child == 0:
            try:
                ev.open("sim:seed=7")
                ev.journal(path, USER_KEY if i % 2 else None)
                with open(used, "wb", buffering=0) as out:
                    while True:
                        out.write(keys.draw_record())
                        if np.random.default_rng().random() < 0.1:
                            ev.step()
            finally:
                os._exit(1)
        deadline = time.monotonic() + 30
        while not (used.exists() and used.stat().st_size > 48 * 50 * (i + 1)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        drawn = [record for record, _ in drawn_records(path, USER_KEY if i % 2 else None)]
        got = used.read_bytes()
        got = [got[48 * j : 48 * j + 48] for j in range(len(got) // 48)]
        assert len(got) > 50 and drawn[: len(got)] == got and len(drawn) <= len(got) + 1


# --- who may not --------------------------------------------------------------------------------------------------


def test_what_is_there_is_never_written_on(source, tmp_path):
    path, target = tmp_path / "run.evj", tmp_path / "target"
    path.write_bytes(b"precious")
    with pytest.raises(JournalError, match="exists.*resume=True.*run.1.evj"):
        ev.journal(path)
    link = tmp_path / "link.evj"
    link.symlink_to(target)
    with pytest.raises(JournalError, match="exists"):
        ev.journal(link)
    assert path.read_bytes() == b"precious" and not target.exists()
    with pytest.raises(JournalError, match="No such file"):
        ev.journal(tmp_path / "none" / "run.evj")
    assert keys.watched_by() == "" and keys.draw_record()


def test_resume_begins_the_next_segment(source, tmp_path):
    for name in ("run.evj", "run.1.evj", "run.2.evj"):
        with ev.journal(tmp_path / "run.evj", resume=True) as journal:
            assert journal.path.name == name
    assert [ev.read_journal(p).header["segment"] for p in sorted(tmp_path.iterdir())] == [1, 2, 0]


def test_keys_that_do_not_fit(source, tmp_path):
    path = tmp_path / "run.evj"
    with pytest.raises(ValueError, match="at least 16 bytes"):
        ev.journal(path, b"password")
    with pytest.raises(TypeError, match="bytes"):
        ev.journal(path, "k" * 32)
    assert not path.exists()
    with ev.journal(path, USER_KEY):
        keys.draw_record()
    with pytest.raises(JournalError, match="is encrypted"):
        ev.read_journal(path)
    with pytest.raises(JournalError, match="not the key"):
        list(ev.read_journal(path, USER_KEY[::-1]))
    private, loose = tmp_path / "private", tmp_path / "loose"
    for file, mode in ((private, 0o600), (loose, 0o644)):
        file.write_bytes(USER_KEY)
        file.chmod(mode)
    assert journal_file.read_key_file(private) == USER_KEY
    with pytest.raises(JournalError, match="chmod 600"):
        journal_file.read_key_file(loose)


def test_one_journal_at_a_time_and_one_source_a_journal(source, tmp_path):
    with ev.journal(tmp_path / "a.evj"):
        with pytest.raises(JournalError, match="being written already"):
            ev.journal(tmp_path / "b.evj")
        with pytest.raises(JournalError, match="before another source is opened"):
            ev.open("sim:seed=8")
        assert "journal:" in str(ev.status()) and "in clear" in str(ev.status())
    assert "journal:" not in str(ev.status())
    journal = ev.journal(tmp_path / "c.evj")
    ev.close()
    assert list(ev.read_journal(journal.path))[-1].data == b'{"why": "the source was closed"}'


def test_a_forked_child_writes_nothing_into_its_parents_journal(source, tmp_path):
    path = tmp_path / "run.evj"
    with ev.journal(path) as journal:
        keys.draw_record()
        size = path.stat().st_size

        def child():
            said = []
            for attempt in (
                keys.draw_record,
                lambda: source.direct_words(1),
                lambda: journal.record_words(memoryview(b"1"), -1, 0),
            ):
                try:
                    said.append(str(attempt()))
                except ForkedError:
                    said.append("forked")
            journal.close()
            ev.step()
            ev.open("sim:seed=9")
            with ev.journal(tmp_path / "child.evj"):
                keys.draw_record()
            ev.close()
            return said

        assert in_forked_child(child) == "['forked', 'forked', 'forked']"
        assert path.stat().st_size == size
        keys.draw_record()
    assert len(drawn_records(path)) == 2 and len(drawn_records(tmp_path / "child.evj")) == 1


@both
def test_on_a_full_disk_nothing_is_drawn(source, tmp_path, key):
    path = tmp_path / "run.evj"
    journal = ev.journal(path, key)
    made = [keys.draw_record() for _ in range(3)]
    before, out = keys.counters(), source.status().bytes_handed_out
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.bytes + 50, limits[1]))  # half a record more
    try:
        with pytest.raises(JournalError, match="File too large.*destroyed, not used"):
            keys.draw_record()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert source.status().bytes_handed_out == out + 32, "the key was taken, and is lost"
    for attempt in (keys.draw_record, lambda: ev.dropout(torch.ones(9), 0.5), lambda: source.direct_words(1)):
        with pytest.raises(JournalError):  # room again, but behind a torn record nothing could be read
            attempt()
    with pytest.raises(JournalError, match="File too large"):
        ev.step()
    after = keys.counters()
    assert (after["draws"], after["fresh"]) == (before["draws"], before["fresh"]) and "BROKEN" in str(ev.status())
    with pytest.raises(JournalError, match="no closing record"):
        journal.close()
    assert keys.draw_record() and journaling.current() is None, "who gives the journal up may go on"
    assert [record for record, _ in drawn_records(path, key)] == made


def test_a_disk_that_is_full_from_the_start():
    with pytest.raises(RuntimeError, match="No space left on device"):
        _C.Journal(os.open("/dev/full", os.O_WRONLY), b"header", None, bytes(32))


def test_a_lost_key_is_not_found_by_the_next_draw_of_its_name(source, tmp_path):
    """Were the tape written before the journal, the draw after a failed one would be handed the unrecorded key."""
    journal = ev.journal(tmp_path / "run.evj")
    torch.manual_seed(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.bytes, limits[1]))
    try:
        with pytest.raises(JournalError):
            keys.draw_record()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(JournalError):
        journal.close()
    torch.manual_seed(1)
    keys.draw_record()
    assert _C.Keyring.last_draw()[0] == "fresh"
