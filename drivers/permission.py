"""Who may open a device node, and who has it open: the packaged udev rules, and the processes that /proc shows."""

import os
import re
import stat
from fnmatch import fnmatchcase
from pathlib import Path

RULES_PATH = Path("/etc/udev/rules.d/60-everett.rules")


def udev_rules() -> str:
    """The text of the packaged rules file, which `RULES_PATH` should hold."""
    return (Path(__file__).with_name("udev") / RULES_PATH.name).read_text(encoding="utf-8")


def udev_rule(*words: str) -> str:
    """The first packaged rule that sets the mode of what all `words` match, such as "0aba" and "0102"; else LookupError.

    A rule's values may be patterns as udev has them: alternatives with |, and shell wildcards.
    """
    lines = [line for line in udev_rules().splitlines() if "MODE=" in line and not line.startswith("#")]
    patterns = {line: [p for v in re.findall(r'=="([^"]*)"', line) for p in v.split("|")] for line in lines}
    found = [line for line in lines if all(any(fnmatchcase(word, p) for p in patterns[line]) for word in words)]
    if not found:
        raise LookupError(f"no udev rule names {', '.join(words)}")
    return found[0]


def permission_hint(*words: str) -> str:
    """What a user who may not open a device has to do; `words` name its rule as in `udev_rule`."""
    return (
        "run `sudo everett doctor --install-udev`, join the group with `sudo usermod -aG everett $USER`, log in again "
        f"and replug the device. The rule is: {udev_rule(*words)}"
    )


def holders(node: str | os.PathLike, own: int = 0) -> list[tuple[int, str]]:
    """(pid, name) of the processes that have this device node open, ascending, as far as /proc lets this user see.

    Processes of other users are only seen by root. own: as many descriptors of this process as do not count.
    """
    try:
        wanted = os.stat(node)
    except OSError:
        return []
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            spare = own if int(process.name) == os.getpid() else 0
            if _open_descriptors(process, wanted) > spare:
                found.append((int(process.name), _name(process)))
    return sorted(found)


def _open_descriptors(process: Path, wanted: os.stat_result) -> int:
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:  # of another user, or ended
        return 0
    count = 0
    for descriptor in descriptors:
        try:
            about = os.stat(descriptor)
        except OSError:
            continue
        # A container may have a node of its own for the same device: the device number counts.
        if stat.S_ISCHR(about.st_mode) and stat.S_ISCHR(wanted.st_mode):
            count += about.st_rdev == wanted.st_rdev
        else:
            count += os.path.samestat(about, wanted)
    return count


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return "unknown"


def in_words(processes: list[tuple[int, str]]) -> str:
    """`rngd (pid 71), this process`."""
    return ", ".join("this process" if pid == os.getpid() else f"{name} (pid {pid})" for pid, name in processes)
