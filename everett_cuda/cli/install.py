"""`everett doctor --install-udev`: the packaged udev rules and systemd units, to their places under /etc.

As root it writes these fixed paths with the packaged texts and nothing else: no argument, no variable and no link can
make it write another file or another text. Without root it prints what it would do.
"""

import os
import stat
from pathlib import Path

import typer

from .. import drivers
from ..drivers.permission import RULES_PATH, udev_rules
from ..errors import EverettError

UNITS_FOLDER = Path("/etc/systemd/system")
UNITS = ("everett.service", "everett-health@.service", "everett-health@.timer")
AFTER = """\
Then, as root:
  groupadd -f --system everett && usermod -aG everett USER   (and log in again as USER)
  useradd --system --gid everett --no-create-home --shell /usr/sbin/nologin everett   (who runs the broker)
  udevadm control --reload                                   (and replug the device)
A broker for all processes of this machine, when /etc/everett/broker.conf is written (docs/node.md):
  systemctl daemon-reload && systemctl enable --now everett
A look at a source every day, with its result in the journal:
  systemctl daemon-reload
  systemctl enable --now everett-health@$(systemd-escape 'quantis-usb:').timer"""


def files() -> dict[Path, str]:
    """Where each packaged file goes, and its text."""
    packaged = Path(drivers.__file__).with_name("systemd")
    return {RULES_PATH: udev_rules(), **{UNITS_FOLDER / unit: (packaged / unit).read_text() for unit in UNITS}}


def install() -> None:
    """Writes or prints; raises EverettError or OSError for a path that cannot be written."""
    if os.geteuid() != 0:
        for path, text in files().items():
            typer.echo(f"# as root, this would be written to {path}:\n\n{text}")
        typer.echo("# Nothing was written. To do it: sudo everett doctor --install-udev")
        typer.echo(AFTER)
        return
    for path, text in files().items():
        if not path.parent.is_dir():
            typer.echo(f"skipped  {path}: there is no {path.parent}, so nothing here would read it")
            continue
        typer.echo(f"{'wrote   ' if write(path, text) else 'is there'} {path}")
    typer.echo(AFTER)


def write(path: Path, text: str) -> bool:
    """Makes `path` a file of this text, 0644; False when it was one already.

    A symbolic link is not followed and not replaced (one to /dev/null is an administrator's no): EverettError.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if path.is_symlink():
            raise EverettError(f"{path} is a symbolic link, which is not followed; remove it, then run this again") from None
        raise error
    with open(descriptor, "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise EverettError(f"{path} is not a regular file; remove it, then run this again")
        if file.read() == text.encode():
            return False
        file.seek(0)
        file.truncate()
        file.write(text.encode())
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
    return True
