"""What can be done to a process of this host, by somebody else and without its knowledge."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import sys

from flame.errors import UsageError

_PIDFD_GETFD = 438  # the same number on every architecture
_TCP = (socket.AF_INET, socket.AF_INET6)


def kill(pid: int) -> None:
    """SIGKILL; one that is gone already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def freeze(pid: int) -> None:
    """SIGSTOP: it is there and does nothing, as a machine that sleeps."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)


def thaw(pid: int) -> None:
    """Let it go on."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def cut(pid: int) -> int:
    """End all connections of a process, as a network does that breaks; it may make new ones at once.

    The kernel lends us its descriptors, so neither side takes part in it. What listens goes on listening; pairs of sockets that a process
    shares with its children are no connections.

    :returns: how many there were.
    :raises flame.errors.UsageError: the system does not let us.
    """
    if sys.platform != "linux":
        raise UsageError("Connections can be cut on Linux only.")
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, process)
        connections = []
        for name in _sockets(pid):
            sock = _borrow(process, int(name))
            if sock is not None:
                stack.enter_context(sock)
                if (ends := _ends(sock)) is not None:
                    connections.append((sock, ends))
        # By what a process tells itself, such as a library's pair of sockets to wake its own thread, no network runs.
        there = {ends for _, ends in connections if ends[0] and ends[1]}
        cut = [sock for sock, (mine, far) in connections if (far, mine) not in there]
        for sock in cut:
            with contextlib.suppress(OSError):  # it has just been closed by the other side
                sock.shutdown(socket.SHUT_RDWR)
        return len(cut)


def _sockets(pid: int) -> list[str]:
    found = []
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                if os.readlink(f"{folder}/{name}").startswith("socket:"):
                    found.append(name)
    return found


def _borrow(process: int, number: int) -> socket.socket | None:
    libc = ctypes.CDLL(None, use_errno=True)
    borrowed = libc.syscall(_PIDFD_GETFD, process, number, 0)
    if borrowed >= 0:
        return socket.socket(fileno=borrowed)
    code = ctypes.get_errno()
    if code in (errno.EBADF, errno.ESRCH):
        return None  # closed, or the process has ended
    raise UsageError(f"The connections of a process cannot be cut here: {os.strerror(code)}.")


def _ends(sock: socket.socket) -> tuple[object, object] | None:
    """The two addresses of a connection; None for what is none."""
    try:
        if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        mine, far = sock.getsockname(), sock.getpeername()
    except OSError:
        return None  # it is not connected
    return (mine, far) if sock.family in _TCP or mine or far else None
