"""`everett doctor --install-udev`: fixed paths with packaged texts as root, and only words otherwise."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from commands import everett

from everett_cuda.cli import install
from everett_cuda.drivers.permission import udev_rules
from everett_cuda.errors import EverettError

ROOT = Path(__file__).resolve().parent.parent


def test_it_writes_these_paths_and_no_others():
    assert {str(p) for p in install.files()} == {
        "/etc/udev/rules.d/60-everett.rules",
        "/etc/systemd/system/everett.service",
        "/etc/systemd/system/everett-health@.service",
        "/etc/systemd/system/everett-health@.timer",
    }
    texts = {path.name: text for path, text in install.files().items()}
    assert texts["60-everett.rules"] == udev_rules() == (ROOT / "drivers/udev/60-everett.rules").read_text()
    for unit in install.UNITS:
        assert texts[unit] == (ROOT / "drivers/systemd" / unit).read_text()


def test_a_file_is_made_once_and_kept_up_to_date(tmp_path):
    path = tmp_path / "rules"
    old = os.umask(0o077)
    try:
        assert install.write(path, "first and longer\n") and not install.write(path, "first and longer\n")
        assert install.write(path, "second\n")
    finally:
        os.umask(old)
    assert path.read_text() == "second\n" and stat.S_IMODE(path.stat().st_mode) == 0o644


def test_links_and_pipes_are_left_alone(tmp_path):
    victim, link, pipe = tmp_path / "victim", tmp_path / "link", tmp_path / "pipe"
    victim.write_text("precious")
    link.symlink_to(victim)
    os.mkfifo(pipe)
    with pytest.raises(EverettError, match="link is a symbolic link, which is not followed"):
        install.write(link, "text")
    with pytest.raises(EverettError, match="pipe is not a regular file"):
        install.write(pipe, "text")
    with pytest.raises(OSError, match="No such file"):
        install.write(tmp_path / "none" / "rules", "text")
    assert victim.read_text() == "precious" and link.is_symlink()


def test_without_root_it_only_says_what_it_would_do():
    command = [sys.executable, "-m", "everett_cuda", "doctor", "--install-udev"]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("setpriv (util-linux) is needed to become another user")
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
    before = [path.exists() and path.read_text() for path in install.files()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for path, text in install.files().items():
        assert f"would be written to {path}" in done.stdout and text in done.stdout
    assert "Nothing was written" in done.stdout and "sudo everett doctor --install-udev" in done.stdout
    assert [path.exists() and path.read_text() for path in install.files()] == before


def test_as_root_it_writes_and_says_what_is_next(tmp_path):
    """In a mount namespace of its own, with an empty /etc."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("root and a mount namespace are needed to write under /etc")
    script = f"""
mount -t tmpfs none /etc && mkdir -p /etc/udev/rules.d
{sys.executable} -m everett_cuda doctor --install-udev
{sys.executable} -m everett_cuda doctor --install-udev
echo; cd /etc && find . -type f | sort && cat udev/rules.d/60-everett.rules > {tmp_path}/rules
"""
    done = subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "wrote    /etc/udev/rules.d/60-everett.rules\n" in done.stdout
    assert "is there /etc/udev/rules.d/60-everett.rules\n" in done.stdout
    assert "skipped  /etc/systemd/system/everett-health@.timer: there is no /etc/systemd/system" in done.stdout
    assert "udevadm control --reload" in done.stdout and "replug" in done.stdout
    assert done.stdout.endswith("\n./udev/rules.d/60-everett.rules\n")
    assert (tmp_path / "rules").read_text() == udev_rules()


def test_systemd_accepts_the_units(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    for unit in install.UNITS:
        text = (ROOT / "drivers/systemd" / unit).read_text()
        # systemd asks whether the command exists; everett need not be in /usr/bin here.
        (tmp_path / unit).write_text(text.replace("=everett ", "=/bin/echo ").replace("=kill ", "=/bin/sh -c kill "))
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(tmp_path / u) for u in install.UNITS)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_runs_a_command_that_exists():
    line = next(x for x in install.files()[install.UNITS_FOLDER / install.UNITS[1]].splitlines() if "ExecStart=" in x)
    arguments = line.removeprefix("ExecStart=everett ").replace("%I", "sim:seed=1").replace("10", "0.1").split()
    result = everett(*arguments)
    assert result.exit_code == 0 and '"state": "flowing"' in result.stdout
