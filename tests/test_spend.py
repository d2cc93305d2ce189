"""Spending: amounts, budgets, bookings that survive a kill at any point, one client for each key, and honest refusals."""

import hashlib
import json
import os
import signal
import stat
import time

import pytest
from processes import in_forked_child

from everett_cuda.drivers import spend
from everett_cuda.drivers.spend import Account, account_id, parse_usd, usd
from everett_cuda.errors import SourceError

ID = "0123456789abcdef"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The state folder of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "everett"


@pytest.fixture
def account():
    opened = Account("anu", ID)
    yield opened
    opened.close()


# --- amounts ---


@pytest.mark.parametrize(
    "text, micro, shown",
    [("0", 0, "$0.00"), ("0.005", 5000, "$0.005"), ("2", 2_000_000, "$2.00"), ("0.000001", 1, "$0.000001"),
     ("12.5", 12_500_000, "$12.50"), ("999999999.999999", 10**15 - 1, "$999999999.999999")],
)  # fmt: skip
def test_amounts_are_exact(text, micro, shown):
    assert parse_usd(text) == micro and usd(micro) == shown


@pytest.mark.parametrize("text", ["", "-1", "1e3", ".5", "1.", "0.0000001", "nan", "$1", "1,5", " 1", "1" * 10])
def test_amounts_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="US dollars"):
        parse_usd(text)


def test_an_account_is_named_by_a_labelled_hash():
    assert account_id("anu", "key") == hashlib.sha256(b"everett/1/account\0anu\0key").hexdigest()[:16]
    assert len({account_id(s, k) for s in ("anu", "qrypt") for k in ("a", "b")}) == 4


# --- budgets ---


def test_without_a_budget_nothing_is_booked(account, folder):
    with pytest.raises(SourceError, match=r"costs \$0.005 and no budget is set.*budget_usd=1 for 200 requests"):
        account.book(5000, 0)
    assert not (folder / f"anu-{ID}.spend").exists()


def test_a_budget_is_spent_to_the_last_request_and_no_further(account):
    for k in range(1, 4):
        account.book(5000, 15_999)
        assert (account.spent.requests, account.spent.microusd) == (k, 5000 * k)
    assert account.meter(15_999).startswith("$0.015 of $0.015999, 3 requests since 20")
    with pytest.raises(SourceError, match=r"\$0.015 of budget_usd \$0.015999 is spent \(3 requests since .*raise budget"):
        account.book(5000, 15_999)
    account.book(5000, 20_000)
    assert account.spent.microusd == 20_000


def test_requests_without_a_price_are_counted(account):
    account.book(0, 0)
    assert account.meter(0).startswith("1 request since 20") and "$" not in account.meter(0)


def test_bookings_survive_a_restart(folder):
    for k in range(1, 4):
        account = Account("anu", ID)
        account.book(5000, 10**6)
        account.close()
        saved = json.loads((folder / f"anu-{ID}.spend").read_text())
        assert (saved["requests"], saved["microusd"]) == (k, 5000 * k)
    assert Account("qrypt", ID).spent.requests == 0  # another service, another account


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_booking_that_fails_is_not_made_and_not_sent(account, folder, monkeypatch, call):
    account.book(5000, 10**6)
    before = (folder / f"anu-{ID}.spend").read_bytes()

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(spend.os, call, broken)
        with pytest.raises(SourceError, match="No space left on device"):
            account.book(5000, 10**6)
    assert (folder / f"anu-{ID}.spend").read_bytes() == before and account.spent.requests == 1
    account.book(5000, 10**6)
    assert account.spent.requests == 2


def test_a_client_killed_at_any_point_has_booked_what_it_sent(folder):
    sent = 0
    for k in range(40):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                account = Account("anu", ID)
                while True:
                    account.book(5000, 10**12)
                    os.write(writer, account.spent.requests.to_bytes(4, "big"))  # the request would be sent here
            finally:
                os._exit(1)
        os.close(writer)
        with open(reader, "rb") as pipe:
            said = pipe.read(4)
            time.sleep(0.0005 * (k % 10))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said += pipe.read()
        sent = int.from_bytes(said[-4:], "big")
        account = Account("anu", ID)  # the lock went with the process, and the file is whole
        assert sent <= account.spent.requests <= sent + 1
        assert account.spent.microusd == 5000 * account.spent.requests
        account.close()
    assert sent >= 40


# --- files ---


def test_files_are_private(account, folder):
    account.book(5000, 10**6)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
    assert names == {f"anu-{ID}.lock": 0o600, f"anu-{ID}.spend": 0o600}


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"since": "x", "requests": 1}x', '{"since": "x", "requests": -1, "microusd": 0}',
     '{"since": "x", "requests": 1.5, "microusd": 0}', '{"since": 7, "requests": 1, "microusd": 0}',
     '{"since": "x", "requests": true, "microusd": 0}', '{"since": "x", "requests": 1, "microusd": 0, "more": 1}'],
)  # fmt: skip
def test_a_damaged_record_is_never_taken_for_zero(folder, text):
    Account("anu", ID).close()
    path = folder / f"anu-{ID}.spend"
    path.write_text(text)
    with pytest.raises(SourceError, match="is damaged .* nothing is sent"):
        Account("anu", ID)
    path.unlink()
    Account("anu", ID).close()  # the failed opening let the lock go


@pytest.mark.parametrize("name", ["spend", "lock"])
def test_files_that_others_could_have_made_are_refused(folder, tmp_path, name):
    Account("anu", ID).close()
    path, target = folder / f"anu-{ID}.{name}", tmp_path / "target"
    target.write_text("kept")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    with pytest.raises(SourceError, match="it is a symbolic link"):
        Account("anu", ID)
    path.unlink()
    path.write_text("")
    path.chmod(0o622)
    with pytest.raises(SourceError, match="nobody else can write"):
        Account("anu", ID)
    assert target.read_text() == "kept"


def test_a_folder_that_others_can_write_is_refused(folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(SourceError, match="chmod 700"):
        Account("anu", ID)


def test_a_relative_state_home_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert spend.state_folder() == tmp_path / "home/.local/state/everett"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="cannot be made: .* set XDG_STATE_HOME"):
        spend.state_folder()


# --- one client for each key ---


def test_a_second_client_of_a_key_is_refused_and_told_who_has_it(account):
    with pytest.raises(SourceError, match="in use by this process itself.*broker"):
        Account("anu", ID)
    Account("anu", "f" * 16).close()  # another key
    assert f"anu: its key is in use by process {os.getpid()} (" in in_forked_child(lambda: Account("anu", ID))
    account.close()
    assert "Account object" in in_forked_child(lambda: Account("anu", ID))


def test_a_forked_child_cannot_give_its_parents_lock_away(account):
    def child():
        account.close()
        try:
            Account("anu", ID)
        except SourceError as error:
            return str(error)
        return "no error"

    assert f"in use by process {os.getpid()} (" in in_forked_child(child)
    with pytest.raises(SourceError, match="in use by this process itself"):
        Account("anu", ID)
    account.close()
    account.close()
    Account("anu", ID).close()
