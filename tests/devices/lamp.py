"""A quantum device of another package: a driver that everett_cuda finds by its entry point and knows nothing else of.

`install(folder)` writes that package, as pip would, and `LAMP_HOME/lamps.json` is the world: the lamps that are attached
and what is the matter with each. Its bytes come from Python's Mersenne Twister, seeded with the serial number.
"""

import json
from pathlib import Path

_MODULE = """
import json, os, random, time
from everett_cuda.drivers import Attached, DeviceFault, DeviceLost, Driver, Finding, TransportError
from everett_cuda.errors import DeviceNotFound, SourceError


def lamps():
    with open(os.path.join(os.environ["LAMP_HOME"], "lamps.json")) as file:
        return json.load(file)


class LampDriver(Driver):
    scheme = "lamp"
    looks_for = "lamps on the roof"
    kind = "quantum"
    chunk_bytes = 4096
    rate_bytes_per_s = 1e6

    def __init__(self, about):
        self.about = about
        self.name = about.get("name", "roof lamp")
        self.serial = about["serial"]
        self.kind = about.get("kind", "quantum")
        self.conditioned = about.get("conditioned", False)
        self.details = {"firmware": "1.7", "mode": "raw"}
        self.random = random.Random(self.serial)
        self.given = 0
        self.log("opened")

    def log(self, word):
        with open(os.path.join(os.environ["LAMP_HOME"], "log"), "a") as file:
            file.write(f"{word} {self.serial} {self.given}\\n")

    @classmethod
    def attached(cls):
        return [
            Attached(f"lamp:{a['serial']}", a.get("name", "roof lamp"), a["serial"], a.get("kind", "quantum"),
                     a.get("rate", 1e6), a.get("state", "ready"))
            for a in lamps()
        ]

    @classmethod
    def examine(cls, uri):
        found = [a for a in lamps() if a["serial"] == uri.rest]
        if not found:
            return [Finding("found", "fail", f"no lamp {uri.rest} on the roof", "screw it in", absent=True)]
        state = found[0].get("state", "ready")
        if state != "ready":
            return [Finding("found", "ok", uri.rest), Finding("permission", "fail", state, "ask the janitor")]
        return [Finding("found", "ok", uri.rest), Finding("permission", "ok", "yes")]

    @classmethod
    def open(cls, uri):
        uri.parameters(cls.parameters)
        for about in lamps():
            if about["serial"] == uri.rest:
                if about.get("state", "ready") != "ready":
                    raise SourceError(f"lamp {uri.rest}: {about['state']}")
                return cls(about)
        raise DeviceNotFound(f"no lamp {uri.rest} on the roof")

    def readinto(self, buffer, timeout_s):
        trouble, at = self.about.get("trouble"), self.about.get("at", 0)
        n = len(buffer)
        if trouble and self.given < at:
            n = min(n, at - self.given)
        elif trouble == "lost":
            raise DeviceLost(f"{self.name} {self.serial} fell off the roof")
        elif trouble == "fault":
            raise DeviceFault(f"{self.name} {self.serial} says that its filament is broken", 0x2, 0x3)
        elif trouble == "short" and not self.about.get("past"):
            self.about["past"] = True
            raise TransportError("a short read")
        elif trouble == "silent":
            time.sleep(timeout_s)
            return 0
        buffer[:n] = bytes(n) if trouble == "stuck" and self.given >= at else self.random.randbytes(n)
        self.given += n
        return n

    def reconnect(self, timeout_s):
        raise SourceError("it will not come back")

    def close(self):
        self.log("closed")


class MeteredLampDriver(LampDriver):
    scheme = "paidlamp"
    metered = True
    looks_for = ""
    kind = "quantum-remote"
"""


def install(folder: Path) -> None:
    """Puts the package into `folder`, which has to be on sys.path."""
    (folder / "lamp_device.py").write_text(_MODULE)
    about = folder / "lamp_device-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lamp_device\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[everett_cuda.drivers]\nlamp = lamp_device:LampDriver\npaidlamp = lamp_device:MeteredLampDriver\n"
    )


class Roof:
    """The world of the lamps, as a test arranges it."""

    def __init__(self, home: Path):
        self._home = home
        self.put()

    def put(self, *lamps: dict) -> None:
        """Attaches these lamps and no others. A lamp has a serial, and may have name, kind, rate, state, conditioned,
        and trouble (lost, fault, short, silent, stuck) that begins at byte `at`."""
        (self._home / "lamps.json").write_text(json.dumps(lamps))

    def log(self) -> list[str]:
        """`opened SERIAL 0` and `closed SERIAL BYTES_GIVEN`, in order."""
        path = self._home / "log"
        return path.read_text().splitlines() if path.exists() else []
