"""What a process that holds everybody's bits gives up before it has any: core dumps, being looked at, swapping."""

import ctypes
import os
import resource

_PR_SET_DUMPABLE = 4


def harden() -> list[str]:
    """Core dumps and ptrace by the same user off; limits of locked memory and descriptors as high as allowed.

    Returns what could not be had, in words.
    """
    notes = []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        notes.append(f"this process can be dumped: {os.strerror(ctypes.get_errno())}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for limit in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE):
        _, most = resource.getrlimit(limit)
        resource.setrlimit(limit, (most, most))
    return notes


def notes_on_limits(max_clients: int, ring_bytes: int) -> list[str]:
    """What the limits of this process will not allow for so many clients, in words."""
    notes = []
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = (files - 64) // 3  # socket, eventfd, pidfd
    if files != resource.RLIM_INFINITY and most < max_clients:
        notes.append(f"{files} descriptors are enough for {most} clients, not for {max_clients} (LimitNOFILE=)")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and locked < max_clients * (ring_bytes + 4096):
        notes.append(f"{locked >> 20} MiB may be locked in memory, less than {max_clients} clients' rings; the rest "
                     "could be swapped out (LimitMEMLOCK=infinity)")  # fmt: skip
    return notes
