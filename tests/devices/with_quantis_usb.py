"""`python -m tests.devices.with_quantis_usb [--seed N] [--serial S] [--rate BYTES_PER_S] -- COMMAND...`: runs a command
that sees an emulated Quantis USB through the real libusb and pyusb, such as `make demo SOURCE=quantis-usb:`.

Its bytes are pseudo-random, and no driver can tell: what runs here says "quantum" of bits that are not. For tests only.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from .quantis_usb_wire import Wire, build, why_not


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--serial", default="EMULATED-1")
    parser.add_argument("--rate", type=int, default=0, help="bytes a second, 0 as fast as it is read")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    missing = why_not()
    if missing:
        print(f"no device can be emulated: {missing}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        wire = Wire(build(Path(folder)))
        try:
            wire.tell(f"plug {arguments.serial} {arguments.seed}")
            wire.tell(f"rate {arguments.rate}")
            return subprocess.run(arguments.command, env=wire.environment).returncode
        except FileNotFoundError as error:
            print(f"no such command: {error.filename}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:  # the command has had it too
            return 130
        finally:
            wire.close()


if __name__ == "__main__":
    sys.exit(main())
