"""Forked children and child interpreters for tests, with time limits, so that a hang is a failure and not a hang."""

import os
import signal
import time


def in_forked_child(check, limit_s: float = 20.0) -> str:
    """Runs check() in a forked child and returns what it returns, as text; an exception comes back as its repr."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(check())
        except BaseException as error:
            text = repr(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + limit_s
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            raise AssertionError(f"the forked child hung for {limit_s} s")
        time.sleep(0.01)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read().decode()
