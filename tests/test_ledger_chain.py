"""The lines of a ledger: one text for one content, each bound to the one before; and the keys that sign them."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from ledger_checks import chained, records_of, written

from everett_cuda.errors import LedgerError
from everett_cuda.ledgers import chain, signature
from everett_cuda.ledgers.schema import FIELDS

pytest.importorskip("cryptography", reason="needs the extra 'sign'")

# RFC 8410, 10.1 and 10.3: an Ed25519 public and private key
PUBLIC_PEM = b"""-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
"""
PRIVATE_PEM = b"""-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
"""
PUBLIC = "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1"


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "keys" / "ledger.key"
    path.parent.mkdir()
    path.write_bytes(PRIVATE_PEM)
    path.chmod(0o600)
    return path


# --- keys ---


def test_published_keys_are_read(key, tmp_path):
    (tmp_path / "rfc.pub").write_bytes(PUBLIC_PEM)
    assert signature.load_public(str(tmp_path / "rfc.pub")) == PUBLIC == signature.load_signer(key).public
    assert signature.load_public(PUBLIC.upper()) == PUBLIC


def test_a_signature_is_of_the_labelled_hash_and_of_nothing_else(key):
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    head = hashlib.sha256(b"line").hexdigest()
    made = signature.load_signer(key).sign(head)
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(PUBLIC))
    public.verify(bytes.fromhex(made), b"everett/1/ledger\0" + bytes.fromhex(head))
    with pytest.raises(InvalidSignature):
        public.verify(bytes.fromhex(made), bytes.fromhex(head))
    assert signature.verify(PUBLIC, head, made)
    other = hashlib.sha256(b"another").hexdigest()
    wrong = [(PUBLIC, other, made), (other, head, made), (PUBLIC, head, made[:-1] + chr(ord(made[-1]) ^ 1))]
    wrong += [(PUBLIC, head, made[:-2]), (PUBLIC, head, made.upper()), (PUBLIC[:-2], head, made), (None, head, made)]
    assert not [w for w in wrong if signature.verify(*w)]


def test_a_new_key_is_for_its_owner_and_never_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path.parent / f"{tmp_path.name}-config"))
    path = signature.default_key_path()
    old = os.umask(0)
    try:
        made = signature.generate(path)
    finally:
        os.umask(old)
    assert [stat.S_IMODE(os.stat(p).st_mode) for p in (path, f"{path}.pub", path.parent)] == [0o600, 0o644, 0o700]
    assert signature.load_signer(path).public == signature.load_public(f"{path}.pub") == made.public
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="exists, and a key is never written over"):
        signature.generate(path)
    path.unlink()
    with pytest.raises(LedgerError, match=r"ledger.key.pub exists"):
        signature.generate(path)
    assert not path.exists() and before != b""


def test_no_key_is_made_or_used_in_the_folder_of_a_run(key, tmp_path, monkeypatch):
    run, home = tmp_path / "run", tmp_path / "home"
    (run / "sub").mkdir(parents=True)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(run)
    for inside in (run / "k", Path("k"), run / "sub" / "k"):
        with pytest.raises(LedgerError, match="in the run's folder"):
            signature.generate(inside)
    assert list(run.iterdir()) == [run / "sub"]
    with pytest.raises(LedgerError, match="in the run's folder"):
        written(key.parent / "run.evl", key=key)  # beside the ledger
    (tmp_path / "link").symlink_to(key.parent)
    with pytest.raises(LedgerError, match="in the run's folder"):
        signature.refuse_in_run_folder(tmp_path / "link" / "ledger.key", key.parent)
    monkeypatch.chdir(home)  # below the home folder is where keys are: only beside the run is refused there
    signature.generate(home / "config" / "k")
    with pytest.raises(LedgerError, match="in the run's folder"):
        signature.generate(home / "k")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda path: path.chmod(0o640), "nobody else can read"),
        (lambda path: path.write_bytes(b"no key"), "no private key in PEM"),
        (lambda path: path.write_bytes(PUBLIC_PEM), "no private key in PEM"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/null")), "symbolic link"),
        (lambda path: (path.unlink(), os.mkfifo(path, 0o600)), "regular file"),
    ],
)
def test_unusable_keys_are_refused(key, tmp_path, spoil, said):
    (tmp_path / "run").mkdir()
    spoil(key)
    with pytest.raises(LedgerError, match=said):
        written(tmp_path / "run" / "run.evl", key=key)
    assert not list((tmp_path / "run").iterdir())


def test_a_key_of_another_kind_is_refused(key, tmp_path):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    key.write_bytes(private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    with pytest.raises(LedgerError, match="no Ed25519 key"):
        signature.load_signer(key)
    pem = private.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "p256.pub").write_bytes(pem)
    for text, said in ((str(tmp_path / "p256.pub"), "no Ed25519 public key"), (str(key), "no public key"), ("x", "neither")):
        with pytest.raises(LedgerError, match=said):
            signature.load_public(text)


# --- lines ---


def test_a_line_is_canonical_json():
    line = b'{"a":{"\\u00fc":"\\n\\udc80"},"b":[1,true,null]}'
    assert chain.encode({"b": [1, True, None], "a": {"ü": "\n\udc80"}}) == line
    assert chain.decode(chain.encode({"a": "\ud800"})) == {"a": "\ud800"}
    for wrong in ({"a": 1.0}, {"a": float("nan")}, {1: 2}, {"a": b"x"}, {"a": {2}}):
        with pytest.raises(TypeError):
            chain.encode(wrong)
    with pytest.raises(ValueError, match="64 bits"):
        chain.encode({"a": 2**63})


@pytest.mark.parametrize(
    "line",
    [
        b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":1}', b'{"a":1.0}', b'{"a":NaN}', b'{"a":1e2}', b'{"a":"\xc3\xbc"}',
        b'{"a":01}', b'{"a":-0}', b"[1]", b"1", b"", b"{", b'{"a":1} ', b'\xef\xbb\xbf{"a":1}', b'{"a":"\\u0041"}',
        b'{"a":9223372036854775808}', b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
    ],
)  # fmt: skip
def test_other_texts_of_a_record_are_refused(line):
    with pytest.raises(ValueError):
        chain.decode(line)


def test_each_line_holds_the_hash_of_the_one_before(tmp_path):
    path = written(tmp_path / "run.evl", counts=3)
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b"" and len(lines) == 6
    before = "0" * 64
    for n, line in enumerate(lines):
        record = json.loads(line)
        assert (record["n"], record["prev"]) == (n, before)
        before = hashlib.sha256(line).hexdigest()
    reading = chain.read_chain(path)
    assert (reading.heads[-1], reading.torn, reading.damage) == (before, 0, "")
    assert reading.records == records_of(path)


def test_a_file_cut_anywhere_is_read_up_to_its_last_whole_line(tmp_path):
    whole = written(tmp_path / "run.evl").read_bytes()
    records = records_of(tmp_path / "run.evl")
    cut = tmp_path / "cut.evl"
    first = whole.index(b"\n")
    for n in range(0, len(whole), 3):
        cut.write_bytes(whole[:n])
        if n <= first:
            with pytest.raises(LedgerError, match="is no ledger"):
                chain.read_chain(cut)
            continue
        reading = chain.read_chain(cut)
        lines = whole[:n].count(b"\n")
        assert reading.records == records[:lines] and not reading.damage
        assert reading.torn == n - whole[:n].rfind(b"\n") - 1


def test_a_changed_byte_ends_the_reading_at_its_line_or_the_next(tmp_path):
    path = written(tmp_path / "run.evl", counts=2)
    whole = path.read_bytes()
    for i in range(whole.index(b"\n") + 1, len(whole), 5):
        spoilt = bytearray(whole)
        spoilt[i] ^= 1
        path.write_bytes(spoilt)
        reading = chain.read_chain(path)
        line = whole[:i].count(b"\n")  # lines before the changed one
        # Of the last line, which nothing follows, only its form shows; its signature shows the rest.
        assert len(reading.records) in (line, line + 1) and (reading.damage or reading.torn or line == 4)


def test_lines_that_are_taken_out_doubled_or_swapped_break_the_chain(tmp_path):
    path = written(tmp_path / "run.evl", counts=4)
    lines = path.read_bytes().splitlines(keepends=True)
    for changed, kept in (
        (lines[:2] + lines[3:], 2),
        (lines[:3] + lines[2:], 3),
        (lines[:2] + [lines[3], lines[2]] + lines[4:], 2),
        (lines[:2] + [b"\n"] + lines[2:], 2),
    ):
        path.write_bytes(b"".join(changed))
        reading = chain.read_chain(path)
        assert len(reading.records) == kept and reading.damage.startswith(f"line {kept + 1}: ")


def test_what_is_no_ledger_is_said_to_be_none(tmp_path):
    path = tmp_path / "x"
    for content in (b"", b"\n", b"everett responses 1\n", b'{"a":1}\n', bytes(100), b"x" * (chain.MAX_LINE + 9)):
        path.write_bytes(content)
        with pytest.raises(LedgerError, match="is no ledger"):
            chain.read_chain(path)
    begin = records_of(written(tmp_path / "run.evl"))[0]
    with pytest.raises(LedgerError, match="no ledger of this version"):
        chain.read_chain(chained(path, [{**begin, "format": "everett ledger 2"}]))
    with pytest.raises(LedgerError, match="is not a file"):
        chain.read_chain(tmp_path)


def test_records_that_lack_a_field_or_have_one_more_are_refused(tmp_path):
    records = records_of(written(tmp_path / "run.evl"))
    for i in range(1, len(records)):
        own = set(FIELDS[records[i]["type"]])
        changes = [{k: v for k, v in records[i].items() if k != name} for name in own]
        changes += [{**records[i], name: []} for name in own if not isinstance(records[i][name], list)]
        changes += [{**records[i], "more": 1}, {**records[i], "type": "gate"}, {**records[i], "utc": 5}]
        for changed in changes:
            reading = chain.read_chain(chained(tmp_path / "x", [*records[:i], changed]))
            assert len(reading.records) == i and reading.damage.startswith(f"line {i + 1}: "), changed
