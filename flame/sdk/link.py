"""What a role tells the world beside its models: metrics, rounds, warnings, artifacts, and where its peers are.

Under a flamelet this goes over the *link*, a socket pair with lines of JSON (docs/architecture.md, "Worker"). By hand
there is none: reports go to the log, artifacts into ``./artifacts``. A role sees no difference.

Reports never hold up the role: they are handed to a thread, which writes what has gathered. It lingers a few
milliseconds over metrics, so that many short rounds wake the other processes of the machine once and not each.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flame.errors import DeadlineExceeded, WorkerError
from flame.sdk.backends.base import Member, Rendezvous

log = logging.getLogger(__name__)

#: How long metrics and rounds may wait for company, in seconds.
LINGER_SECONDS = 0.005

Change = Callable[[list[Member], list[str]], None]


class Link:
    """The link of a worker that is run by hand; also the interface of the real one.

    :param artifacts: the folder that artifacts are kept in; ``FLAME_ARTIFACTS``, else ``./artifacts``.
    """

    #: How workers find each other through the control plane; None where there is none.
    rendezvous: Rendezvous | None = None
    #: The group whose rounds and model this worker tells of, in a job of independent groups; empty where there is one.
    group: str = ""
    #: Whether the control plane has said that the others have done the work and are gone: whoever is waited for will not come.
    done: bool = False
    #: Called in a thread of the link's when :attr:`done` has become true.
    on_done: Callable[[], object] | None = None
    #: Called in a thread of the link's when the other side of it is gone, before anybody here can act on that.
    on_lost: Callable[[], object] | None = None

    def __init__(self, artifacts: str | os.PathLike[str] | None = None) -> None:
        self._folder = Path(artifacts or os.environ.get("FLAME_ARTIFACTS") or "artifacts")
        self._waiting = ""

    @property
    def folder(self) -> Path:
        """Where a role writes the files that it hands in with :meth:`artifact`; made when it is first asked for."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def metrics(self, round: int, metrics: Mapping[str, float]) -> None:
        """Metrics of this worker in a round. The values are finite."""
        log.info("round %d: %s", round, _words(metrics))

    def round(self, round: int, metrics: Mapping[str, float], seconds: float) -> None:
        """A round has ended; said by the role that closes the rounds. ``seconds`` is its wall time."""
        log.info("round %d finished in %.3f s: %s", round, seconds, _words(metrics) or "no metrics")

    def warning(self, message: str) -> None:
        """A sentence that the user of the job should read although it goes on."""
        log.warning("%s", message)

    def waiting(self, message: str) -> None:
        """Whom this worker waits for, as a sentence; empty when it no longer does. Repeating it costs nothing."""
        if message != self._waiting:
            self._waiting = message
            self._say_waiting(message)

    def _say_waiting(self, message: str) -> None:
        if message:
            log.info("%s", message)

    def model(self, model: Mapping[str, Any]) -> None:
        """Where the job's model is now: name, version, uri, path, registry."""
        log.info("the model is at %s", model.get("path") or model.get("uri"))

    def artifact(self, name: str, path: str | os.PathLike[str], timeout: float | None = None) -> str:
        """Hand in a file, which is no longer needed here then; gives the place where it is kept.

        :param name: what it is called there, such as ``model.safetensors``.
        :param timeout: the longest to wait for the answer, in seconds.
        :raises flame.errors.WorkerError: it could not be kept.
        :raises flame.errors.DeadlineExceeded: no answer in time.
        """
        target = self.folder / name
        try:
            if not (target.exists() and target.samefile(path)):
                shutil.move(path, target)
        except OSError as error:
            raise WorkerError(f"The artifact {name} could not be kept in {self.folder}: {error}.") from error
        return str(target.resolve())

    def owes(self) -> None:
        """Say that this worker has something to hand in at the end that nobody else has: it is not let go before, whoever is done."""

    @property
    def keeps(self) -> bool:
        """Whether somebody keeps checkpoints; by hand that is whoever has set ``FLAME_CHECKPOINTS``."""
        return bool(os.environ.get("FLAME_CHECKPOINTS"))

    def checkpoint(self, round: int, path: Path, timeout: float | None = None) -> None:
        """Hand in the checkpoint of a round, a file that is no longer needed here then.

        :param timeout: the longest to wait for the answer, in seconds.
        :raises flame.errors.FlameError: it could not be kept, or no answer came in time.
        """
        folder = Path(os.environ["FLAME_CHECKPOINTS"])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(path, folder / f"{round}.safetensors")

    def failure(self, message: str) -> None:
        """The sentence for the user when this process then exits with a status that is not 0."""
        log.error("%s", message)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that was said is out; False when the time did not suffice."""
        return True

    def close(self) -> None:
        """Say what is left and let go. Safe to call again."""
        self.flush()


class SocketLink(Link):
    """The child's end of a flamelet's link.

    :param sock: a connected stream socket.
    :param artifacts: see :class:`Link`.
    """

    def __init__(self, sock: socket.socket, artifacts: str | os.PathLike[str] | None = None) -> None:
        super().__init__(artifacts)
        self._sock = sock
        self._sock.setblocking(True)
        self._news = threading.Condition()
        self._backlog: list[bytes] = []
        self._urgent = False
        self._idle = True
        self._gone: str | None = None
        self._answers: dict[str, msgspec.Raw | None] = {}
        self._seats: dict[tuple[str, str], Change] = {}
        self.rendezvous = LinkRendezvous(self)
        for name, target in (("flame-link-out", self._write), ("flame-link-in", self._read)):
            threading.Thread(target=target, name=name, daemon=True).start()

    def metrics(self, round: int, metrics: Mapping[str, float]) -> None:
        """See :class:`Link`."""
        self.say({"type": "metrics", "round": round, "metrics": metrics}, urgent=False)

    def round(self, round: int, metrics: Mapping[str, float], seconds: float) -> None:
        """See :class:`Link`."""
        line = {"type": "round", "round": round, "metrics": metrics, "seconds": seconds}
        self.say({**line, "group": self.group} if self.group else line, urgent=False)

    def warning(self, message: str) -> None:
        """See :class:`Link`; also goes to the log."""
        super().warning(message)
        self.say({"type": "warning", "message": message})

    def _say_waiting(self, message: str) -> None:
        super()._say_waiting(message)
        self.say({"type": "waiting", "message": message})

    def model(self, model: Mapping[str, Any]) -> None:
        """See :class:`Link`."""
        self.say({"type": "model", **model})

    def owes(self) -> None:
        """See :class:`Link`."""
        self.say({"type": "owes"})

    def failure(self, message: str) -> None:
        """See :class:`Link`; the caller has logged what it wants to."""
        self.say({"type": "failure", "message": message})

    def artifact(self, name: str, path: str | os.PathLike[str], timeout: float | None = None) -> str:
        """See :class:`Link`: the file is in the server's hands when this returns."""
        with self._news:
            self._answers.pop(name, None)
        self.say({"type": "artifact", "name": name, "path": str(Path(path).resolve())})
        return self._answer(name, f"artifact {name}", timeout)

    @property
    def keeps(self) -> bool:
        """See :class:`Link`: the server does."""
        return True

    def checkpoint(self, round: int, path: Path, timeout: float | None = None) -> None:
        """See :class:`Link`: the file is in the server's hands when this returns."""
        with self._news:
            self._answers.pop(path.name, None)
        self.say({"type": "checkpoint", "round": round, "path": str(path.resolve())})
        self._answer(path.name, f"checkpoint of round {round}", timeout)

    def _answer(self, name: str, what: str, timeout: float | None) -> str:
        """Wait for the flamelet's word on a file; gives the place where it is kept."""
        with self._news:
            answered = self._news.wait_for(lambda: name in self._answers or self._gone is not None, timeout)
            answer = self._answers.pop(name, None)
        if answer is None:
            if answered:
                raise WorkerError(f"The {what} was not handed in: the flamelet is gone.")
            raise DeadlineExceeded(f"The {what} was not taken within {timeout:g} s.")
        told = msgspec.json.decode(answer, type=_Artifact)
        if told.error:
            raise WorkerError(f"The {what} was not taken: {told.error}")
        return told.path

    def say(self, message: Mapping[str, Any], *, urgent: bool = True) -> None:
        """Queue one line; ``urgent`` ones are written at once."""
        line = msgspec.json.encode(message) + b"\n"
        with self._news:
            self._backlog.append(line)
            if (urgent and not self._urgent) or (self._idle and len(self._backlog) == 1):
                self._urgent = self._urgent or urgent
                self._news.notify_all()

    def flush(self, timeout: float = 5.0) -> bool:
        """See :class:`Link`."""
        with self._news:
            self._urgent = bool(self._backlog)
            self._news.notify_all()
            return self._news.wait_for(lambda: (self._idle and not self._backlog) or self._gone is not None, timeout)

    def close(self) -> None:
        """See :class:`Link`."""
        self.flush()
        with self._news:
            self._gone = self._gone or "closed"
            self._news.notify_all()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.debug("link: %s", error)
        self._sock.close()

    def _write(self) -> None:
        while True:
            with self._news:
                self._idle = True
                self._news.notify_all()
                self._news.wait_for(lambda: self._backlog or self._gone is not None)
                self._idle = False
                if self._gone is None and not self._urgent:
                    self._news.wait_for(lambda: self._urgent or self._gone is not None, LINGER_SECONDS)
                if self._gone is not None:
                    return
                data = b"".join(self._backlog)
                self._backlog.clear()
                self._urgent = False
            try:
                self._sock.sendall(data)
            except OSError as error:
                self._lose(str(error))
                return

    def _read(self) -> None:
        try:
            with self._sock.makefile("rb") as lines:
                for line in lines:
                    self._hear(line)
            self._lose("the flamelet closed it")
        except (OSError, ValueError) as error:
            self._lose(str(error))

    def _lose(self, why: str) -> None:
        with self._news:
            if self._gone is None and self.on_lost is not None:
                self.on_lost()
            if self._gone is None:
                self._gone = why
                log.warning("The link to the flamelet is gone: %s.", why)
            self._news.notify_all()

    def _hear(self, line: bytes) -> None:
        try:
            message = msgspec.json.decode(line, type=_Heard)
        except msgspec.DecodeError as error:
            log.warning("The flamelet said something that is not understood: %s", error)
            return
        if message.type == "artifact":
            with self._news:
                self._answers[message.name] = msgspec.Raw(line)
                self._news.notify_all()
        elif message.type == "done":
            self.done = True
            if self.on_done is not None:
                self.on_done()
        elif message.type == "peers":
            with self._news:
                tell = self._seats.get((message.channel, message.group))
            if tell is not None:
                tell(message.joined, message.left)


class LinkRendezvous(Rendezvous):
    """How workers learn of each other through the control plane; see :class:`flame.sdk.backends.base.Rendezvous`."""

    def __init__(self, link: SocketLink) -> None:
        self._link = link

    def join(self, channel: str, group: str, me: Member, on_change: Change) -> None:
        """Announce ``me``; ``on_change`` is called from the link's thread."""
        with self._link._news:
            self._link._seats[channel, group] = on_change
        self._link.say({"type": "join", "channel": channel, "group": group, "member": me})

    def leave(self, channel: str, group: str) -> None:
        """Withdraw."""
        with self._link._news:
            known = self._link._seats.pop((channel, group), None)
        if known is not None:
            self._link.say({"type": "leave", "channel": channel, "group": group})

    def close(self) -> None:
        """Withdraw from everything."""
        for channel, group in list(self._link._seats):
            self.leave(channel, group)


class _Heard(msgspec.Struct):
    type: str
    channel: str = ""
    group: str = ""
    joined: list[Member] = []
    left: list[str] = []
    name: str = ""


class _Artifact(msgspec.Struct):
    path: str = ""
    error: str | None = None


_lock = threading.Lock()
_current: Link | None = None


def current() -> Link:
    """The link of this process: made at the first call, from ``FLAME_LINK_FD`` or, without it, the one by hand."""
    global _current  # noqa: PLW0603 (a process has one link, as it has one stdout)
    with _lock:
        if _current is None:
            descriptor = os.environ.pop("FLAME_LINK_FD", None)  # not for this process's own children
            if descriptor is None:
                _current = Link()
            else:
                os.set_inheritable(int(descriptor), False)
                _current = SocketLink(socket.socket(fileno=int(descriptor)))
        return _current


def install(link: Link | None) -> None:
    """Make a link the process's; None lets the next :func:`current` make one. For tests and simulations."""
    global _current  # noqa: PLW0603
    with _lock:
        _current = link


def _words(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
