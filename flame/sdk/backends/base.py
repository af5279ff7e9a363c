"""The interface of a backend: what carries messages between the workers of a channel.

A backend moves *frames*: the list of buffers that :func:`flame.sdk.codec.encode` makes of a message, once
for all receivers. It never looks inside. Arrived messages, and peers that come and go, are handed to a
:class:`Sink` from the backend's own thread; the channel behind the sink does the waiting.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import msgspec


class Member(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """A worker on a channel, as its peers see it.

    :ivar end: the worker's task id.
    :ivar attempt: the start of that task; a member with a higher attempt replaces the older one.
    :ivar dials: True for a worker that may sit behind a NAT (data consumers): it opens connections and need not be reachable.
    :ivar addresses: where it listens, best first, such as ``unix:...`` or ``tcp://10.1.0.4:40101``; may be empty.
    :ivar order: sorts a role's workers the same way in every run of a job (``end`` does not): a digest of what the worker works on.
    """

    end: str
    role: str
    attempt: int = 1
    dials: bool = False
    addresses: list[str] = msgspec.field(default_factory=list)
    order: str = ""


class Frames(msgspec.Struct, kw_only=True, frozen=True):
    """An encoded message: a small head, and the tensors' buffers as they lie in memory (no copy).

    The bytes on the wire are ``head`` followed by ``buffers``; ``nbytes`` is their sum.
    """

    head: bytes
    buffers: Sequence[memoryview]
    nbytes: int


class Sink(Protocol):
    """What a backend tells a channel. Called from the backend's thread; must not block for long.

    :ivar window: how many bytes of arrived messages may be held (waiting, or in use) before a backend that can do so
        stops reading; one message is always let in.
    """

    window: int

    def wants(self, member: Member) -> bool:
        """Whether ``member`` is one that this channel talks with (of the other role); others need not be connected."""

    def on_join(self, member: Member) -> None:
        """A peer can now be sent to."""

    def on_leave(self, end: str, reason: str) -> None:
        """A peer has left or was lost; ``reason`` is a sentence's end such as ``closed the connection``."""

    def on_frames(
        self, end: str, data: memoryview | bytearray | bytes, release: Callable[[], None] | None = None
    ) -> None:
        """A whole message has arrived in ``data`` (head and buffers, contiguous).

        :param data: ``bytes`` where the message has memory of its own; then the channel calls ``release`` when it is received.
        :param release: to be called when no view of ``data`` is used any more (a shared segment, a flow-control window).
        """


class Rendezvous(Protocol):
    """How workers of a channel learn of each other: through the control plane, or by hand through an address in ``brokers``."""

    def join(self, channel: str, group: str, me: Member, on_change: Callable[[list[Member], list[str]], None]) -> None:
        """Announce ``me``; from now on ``on_change(joined, left ends)`` is called, from any thread, first with who is there already."""

    def leave(self, channel: str, group: str) -> None:
        """Withdraw ``me`` from the channel."""

    def close(self) -> None:
        """Withdraw from everything."""


class BackendContext(msgspec.Struct, kw_only=True):
    """What a backend is made with. One backend object of a kind serves all channels of a worker that use it.

    :ivar job: the job's id; peers of another job are turned away.
    :ivar key: the job's secret; proves to a peer that both belong to the job.
    :ivar me: this worker; a backend that listens fills in ``addresses`` itself.
    :ivar broker: ``host:port`` from the configuration's ``brokers`` entry of this kind; None where there is none.
    :ivar rendezvous: for backends that have no meeting point of their own.
    :ivar options: further settings of the kind (TLS files, user name ...), from the environment or the configuration.
    """

    job: str
    key: bytes
    me: Member
    broker: str | None = None
    rendezvous: Rendezvous | None = None
    options: Mapping[str, Any] = msgspec.field(default_factory=dict)


class Backend(abc.ABC):
    """One kind of transport. Registered by name in :mod:`flame.sdk.backends`, or by the entry point group ``flame.backends``."""

    #: The name by which a channel chooses it.
    sort: ClassVar[str]

    def __init__(self, context: BackendContext) -> None:
        self.context = context

    @abc.abstractmethod
    def join(self, channel: str, group: str, sink: Sink) -> None:
        """Become a member of a channel's group; the sink hears of the others. Does not wait for them.

        :raises flame.errors.BackendError: the transport cannot be used (broker refuses, wrong credentials).
        """

    @abc.abstractmethod
    def leave(self, channel: str, group: str) -> None:
        """Leave: what was sent before is delivered first, then the peers are told."""

    @abc.abstractmethod
    def send(
        self, channel: str, group: str, ends: Sequence[str], frames: Frames, timeout: float | None
    ) -> dict[str, str]:
        """Send one message to some ends. Returns when the buffers may be reused (they were handed to the kernel, or copied).

        A slow end does not hold up the others.

        :returns: the ends that could not be served, each with the reason; empty when all is well.
        """

    def want(self, channel: str, group: str, ends: Collection[str]) -> None:
        """Someone waits for a message of one of ``ends`` and none is there: let one in although the window is full.

        Holds until called again; called with no ends when the wait is over.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Leave all channels and free everything. Safe to call again."""
