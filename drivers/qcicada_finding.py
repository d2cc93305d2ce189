"""Which serial port is a QCicada's, and what the doctor finds between its cable and its bytes."""

from ..errors import DeviceNotFound, SourceError
from . import serial_port
from .contract import DeviceLost, Finding, TransportError
from .named_port import found_finding, named_port
from .qcicada_protocol import BAUDRATE, POST_PROCESSING, Config, Info, Link
from .serial_port import Port, ports
from .uri import SourceURI

# What the USB strings of a device are expected to say. The FTDI chip's strings of a real one are not documented; one
# that says nothing of the kind must be named by its path, for bytes sent to a stranger's port may do harm.
_WORDS = ("cicada", "crypta labs")


def named_ports() -> list[Port]:
    """The ports whose USB strings name a QCicada, sorted."""
    return sorted({port for word in _WORDS for port in ports(text=word)})


def connect(uri: SourceURI, looks_for: str) -> tuple[Port, Link, Info]:
    """Opens the device that a URI names by path, by the serial number of its USB chip or by its own, or the only one.

    Raises DeviceNotFound, or SourceError: several are meant, the port cannot be opened, or another device answers.
    """
    if not _names_its_own_serial(uri):
        port = named_port(uri, _candidates(uri), looks_for)
        return port, *identify(port.device)
    answers, missing = [], DeviceNotFound
    for port in named_ports():
        try:
            link, info = identify(port.device)
        except SourceError as error:
            answers.append(str(error))
            missing = SourceError  # it may be the one behind this port
            continue
        if info.serial == uri.rest:
            return port, link, info
        serial_port.close_port(link.port)
        answers.append(f"{info.serial} is on {port.device}")
    there = "; ".join(answers) or "none is attached"
    raise missing(f"{uri.text}: no device with this serial number answers ({there}); it looks for {looks_for}")


def _candidates(uri: SourceURI) -> list[Port]:
    """Ports that name a QCicada, or the one whose serial number the URI gives, whatever its strings say."""
    return [p for p in ports() if uri.rest and p.serial == uri.rest] or named_ports()


def _names_its_own_serial(uri: SourceURI) -> bool:
    """Whether the URI's serial number is one that no port shows, so that the devices must be asked for theirs."""
    shown = {name for p in _candidates(uri) for name in (p.serial, p.device)}
    return uri.rest not in ("", *shown) and not uri.rest.startswith("/")


def identify(device: str, attempts: int = 2) -> tuple[Link, Info]:
    """Opens a port and asks who is there; SourceError when it is no QCicada."""
    link = Link(serial_port.open_port(device, BAUDRATE, 1.0))
    for _ in range(attempts):
        try:
            return link, link.resynchronize()
        except DeviceLost as error:
            failure = error
            break
        except TransportError as error:
            failure = error
    serial_port.close_port(link.port)
    raise SourceError(f"{device} does not answer as a QCicada does: {failure}") from failure


def problem_of(config: Config) -> str:
    """What makes a configuration unfit, in words; "" for nothing."""
    if config.flags & Config.GENERATE_ON_ERROR:
        return "it is set to go on delivering when its tests fail (generate on error)"
    if config.post_processing == POST_PROCESSING["sha"] and config.tests_off:
        return f"its {', '.join(config.tests_off)} test is off, and nobody else sees what goes into its hash"
    return ""


# --- the doctor ---


def examine(uri: SourceURI, values: dict[str, object], looks_for: str) -> list[Finding]:
    """Found, permission, who else has it, firmware, configuration, health; ends at the first fail. Changes nothing.

    values: the URI's parameters, parsed.
    """
    findings = []
    if not _names_its_own_serial(uri):
        port, found = found_finding(uri, _candidates(uri), looks_for)
        findings.append(found)
        if port is None:
            return findings
        findings += serial_port.examine_port(port.device)
        if findings[-1].verdict == "fail":
            return findings
    try:
        port, link, info = connect(uri, looks_for)
    except SourceError as error:
        step = "name the port of a QCicada, and close what uses it"
        return [*findings, Finding("answer", "fail", str(error), step, isinstance(error, DeviceNotFound))]
    try:
        findings += _ask(link, info, port, values)
    except TransportError as error:
        findings.append(Finding("answer", "fail", str(error), "unplug it and plug it in again"))
    finally:
        serial_port.close_port(link.port)
    return findings


def _ask(link: Link, info: Info, port: Port, values: dict[str, object]):
    version = Info.version(info.firmware_version)
    yield Finding("firmware", "ok", f"{info.hardware}, serial {info.serial}, firmware {version} on {port.device}")
    config, post = link.config(), values.get("post", "sha")
    wanted = config.with_post_processing(POST_PROCESSING[post])
    problem = problem_of(wanted)
    if problem and not values.get("repair"):
        yield Finding("configuration", "fail", problem, "add repair=1 to the URI")
        return
    yield Finding("configuration", "ok", "it falls silent when one of its own tests fails")
    if wanted != config:
        yield Finding("mode", "note", f"its post-processing will be set to {post}")
    if post == "sha":
        text = "its output is hashed: the tests on this side see total failure only"
        yield Finding("mode", "note", text, "post=raw-noise gives what was not hashed")
    counts = link.statistics()
    failures = counts.repetition_count_failures + counts.adaptive_proportion_failures + counts.bit_count_failures
    if failures:
        yield Finding("statistics", "note", f"its own tests have failed {failures} times since it was reset")
    status = link.status()
    if status.healthy:
        yield Finding("device health", "ok", "ok")
    else:
        yield Finding("device health", "fail", str(status), "reset=1 in the URI restarts its tests")
