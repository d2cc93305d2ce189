"""The emulated Quantis below libusb (quantis_usb_umockdev.c): built, started, told what to do; and programs that see it."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("quantis_usb_umockdev.c")


def why_not() -> str:
    """What is missing for this emulation, "" when nothing is."""
    for tool in ("umockdev-wrapper", "gcc", "pkg-config"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: umockdev, gcc, pkg-config, libumockdev-dev)"
    if subprocess.run(["pkg-config", "--exists", "umockdev-1.0"]).returncode:
        return "the headers of umockdev are not installed (Debian: libumockdev-dev)"
    return ""


def build(folder: Path) -> Path:
    """Compiles the emulator into `folder`; returns the program."""
    program = folder / "quantis_usb_umockdev"
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "umockdev-1.0"], capture_output=True, text=True, check=True
    ).stdout.split()
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE, *flags], check=True)
    return program


class Wire:
    """A bus with room for one emulated Quantis, in a process of its own. `environment` lets other programs see it."""

    def __init__(self, program: Path):
        self._process = subprocess.Popen(
            ["umockdev-wrapper", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.folder = Path(self._process.stdout.readline().strip())
        preload = " ".join(filter(None, ["libumockdev-preload.so.0", os.environ.get("LD_PRELOAD", "")]))
        self.environment = {**os.environ, "UMOCKDEV_DIR": str(self.folder), "LD_PRELOAD": preload}

    def tell(self, command: str) -> str:
        """Obeys one command of quantis_usb_umockdev.c; returns what follows "ok"."""
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer.startswith("ok"):
            raise RuntimeError(f"{command}: {answer or 'the emulator has died'}")
        return answer[3:]

    def served(self) -> int:
        """Bytes of data given since it was plugged in."""
        return int(self.tell("served"))

    def forbid(self) -> None:
        """Nobody but root may open the device's node."""
        node = max((self.folder / "dev/bus/usb/001").iterdir())  # the test bed keeps those of earlier addresses
        node.chmod(0)
        # umockdev connects to its socket before it opens the node, and aborts a process that cannot.
        self.folder.chmod(0o755)
        (self.folder / "ioctl/dev/bus/usb/001" / node.name).chmod(0o777)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


_LOOP = """
import json, sys
scope, out = {}, sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    code, mode = json.loads(line)
    try:
        answer = repr(eval(code, scope)) if mode == "eval" else exec(code, scope) or "None"
        print(json.dumps([answer, ""]), file=out, flush=True)
    except BaseException as error:
        print(json.dumps(["", f"{type(error).__name__}: {error}"]), file=out, flush=True)
"""


class ClientError(Exception):
    """What a client's code raised, as `TypeName: message`."""


class Client:
    """A Python process that sees a wire's device and runs the code it is given, statement by statement."""

    def __init__(self, wire: Wire):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOOP], env=wire.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _send(self, code: str, mode: str) -> None:
        self.process.stdin.write(json.dumps([code, mode]) + "\n")
        self.process.stdin.flush()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise ClientError("the client has died")
        answer, error = json.loads(line)
        if error:
            raise ClientError(error)
        return ast.literal_eval(answer)

    def do(self, code: str) -> None:
        """Runs statements."""
        self._send(code, "exec")
        self._answer()

    def ask(self, expression: str):
        """The value of an expression, of Python's plain types."""
        self._send(expression, "eval")
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
