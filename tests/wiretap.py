"""A listener on the way: passes on what two ends say to each other, and writes all of it down."""

from __future__ import annotations

import contextlib
import socket
import threading


class Wiretap:
    """Whoever connects to it is connected with somebody else, and overheard. A context manager.

    :param listen: where it listens, host and port; port 0 takes any.
    :param onward: where those lead who come.
    """

    def __init__(self, listen: tuple[str, int], onward: tuple[str, int]) -> None:
        self._onward = onward
        self._listener = socket.create_server(listen)
        self._pieces: list[bytes] = []
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    @property
    def heard(self) -> bytes:
        """All that was said, in both directions; what one said at a time is in one piece."""
        return b"".join(self._pieces)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._onward)
                except OSError:  # nobody is there yet
                    near.close()
                    continue
                self._sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pass_on, args=(one, other), daemon=True))
                    self._threads[-1].start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        said = bytearray()
        with contextlib.suppress(OSError):
            while piece := one.recv(1 << 16):
                said += piece
                other.sendall(piece)
        self._pieces.append(bytes(said))
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Stop listening, and end what was connected."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in self._sockets:
            one.close()

    def __enter__(self) -> Wiretap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
