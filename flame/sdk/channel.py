"""A channel: how a role's code talks with the workers at the other end.

The calls are those of Flame's library, so that code written for it runs. What differs is what happens underneath:
messages are encoded once however many receivers there are, tensors are not copied on the way in, every wait takes
a deadline and is woken by what it waits for, and an end that leaves is reported at once.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from flame.errors import ChannelError, CodecError, DeadlineExceeded, EndLeft
from flame.sdk import codec
from flame.sdk.end import KEY_END_STATE, VAL_END_STATE_RECVD, End
from flame.sdk.inbox import Arrival, Inbox, Wait

if TYPE_CHECKING:
    from flame.sdk.backends.base import Backend, Frames, Member

log = logging.getLogger(__name__)

#: The channel's property that tells a selector what its ends are wanted for, and its values, as in Flame's library.
KEY_CH_STATE = "state"
VAL_CH_STATE_RECV = "recv"
VAL_CH_STATE_SEND = "send"

#: Bytes of arrived messages that a channel holds before its backend stops reading; one message is always let in. So
#: a small model's updates queue up, and of a large one there is one at a time.
WINDOW = 16 << 20


class Selector(Protocol):
    """Chooses the ends that take part."""

    def select(self, ends: dict[str, End], channel_props: dict[str, Any]) -> Iterable[str]:
        """Some of ``ends``, by id.

        A mapping is taken too: its values, where they are not None, are ``(key, value)`` to set as property of the end.
        """


class Compression(Protocol):
    """Changes what travels on a channel."""

    def compress(self, message: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """What to send in place of ``message``; one that was made by this is left as it is."""

    def restore(self, message: codec.Message) -> codec.Message:
        """The message as it was meant, from one that has arrived."""

    def state(self) -> dict[str, Any]:
        """What it remembers of what was sent: arrays and plain values by name."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be as when :meth:`state` gave this."""


class Channel:
    """One channel of a worker, in its group.

    :param name: the channel's name in the schema.
    :param backend: what carries its messages.
    :param job: the job's id.
    :param me: this worker.
    :param other_role: the role at the other end; this worker's own where the channel links a role with itself.
    :param group: this worker's group on the channel.
    :param selector: chooses among the ends in :meth:`ends`; None takes all.
    :param window: see :data:`WINDOW`.
    :param compression: changes what travels; None leaves it as it is.
    :param condition: shared by a worker's channels; see :class:`flame.sdk.inbox.Inbox`.
    :ivar properties: what a selector is told besides the ends.
    """

    def __init__(
        self,
        name: str,
        *,
        backend: Backend,
        job: str,
        me: Member,
        other_role: str,
        group: str = "default",
        selector: Selector | None = None,
        window: int = WINDOW,
        compression: Compression | None = None,
        condition: threading.Condition | None = None,
    ) -> None:
        self._name = name
        self._backend = backend
        self._job = job
        self._me = me
        self._other_role = other_role
        self._group = group
        self._selector = selector
        self._compression = compression
        self.properties: dict[str, Any] = {}
        self._joined = False
        self._inbox = Inbox(
            window,
            wants=lambda member: member.role == other_role and member.end != me.end,
            on_want=lambda ends: backend.want(name, group, ends),
            condition=condition,
        )

    # Who and where.

    def name(self) -> str:
        """The channel's name."""
        return self._name

    def job_id(self) -> str:
        """The job's id."""
        return self._job

    def my_role(self) -> str:
        """This worker's role."""
        return self._me.role

    def other_role(self) -> str:
        """The role at the other end."""
        return self._other_role

    def groupby(self) -> str:
        """This worker's group on the channel."""
        return self._group

    group = groupby

    def get_backend_id(self) -> str:
        """This worker's own end id."""
        return self._me.end

    # Coming and going.

    def join(self) -> None:
        """Become a member of the channel; peers are heard of from now on. Does not wait for them.

        :raises flame.errors.BackendError: the transport cannot be used.
        """
        if not self._joined:
            self._joined = True
            self._inbox.open()
            try:
                self._backend.join(self._name, self._group, self._inbox)
            except BaseException:
                self._joined = False
                raise

    def leave(self) -> None:
        """Leave the channel: what was sent is delivered, what has arrived and was not received is dropped."""
        if self._joined:
            self._joined = False
            self._backend.leave(self._name, self._group)
            self._inbox.close("this worker left the channel")

    def await_join(self, timeout: float | None = None) -> bool:
        """Wait until at least one end is there.

        :param timeout: seconds; None waits as long as it takes.
        :returns: **True when the time ran out**, False when an end is there (as in Flame's library).
        """
        return not self.wait_until(lambda: bool(self._inbox.present), timeout)

    def wait_until(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until ``predicate()`` holds; it is asked again whenever an end comes or goes or a message arrives.

        It is called with the lock of the worker's channels held: let it look at them (at any of them, where they come from
        one channel manager), and be quick.

        :param timeout: seconds; None waits as long as it takes.
        :returns: whether it holds.
        """
        with self._inbox.condition:
            return self._inbox.condition.wait_for(predicate, timeout)

    # The ends.

    def ends(self, state: str | None = None) -> list[str]:
        """The ends that the selector chooses.

        :param state: ``recv`` or ``send``: what they are wanted for; kept as the channel's property ``state``.
        """
        if state in (VAL_CH_STATE_RECV, VAL_CH_STATE_SEND):
            self.properties[KEY_CH_STATE] = state
        with self._inbox.condition:
            here = dict(self._inbox.present)
        if self._selector is None:
            return list(here)
        here = dict(sorted(here.items(), key=lambda item: (item[1].member.order if item[1].member else "", item[0])))
        chosen = self._selector.select(here, self.properties)
        if isinstance(chosen, Mapping):
            for end, pair in chosen.items():
                if pair is not None and end in here:
                    here[end].set_property(*pair)
        return [end for end in chosen if end in here]

    def selector_state(self) -> dict[str, Any]:
        """What the selector must not forget; empty where there is nothing, or it does not say."""
        state: dict[str, Any] = getattr(self._selector, "state", dict)()
        return state

    def load_selector_state(self, state: Mapping[str, Any]) -> None:
        """Let the selector go on where that of an earlier process was."""
        load = getattr(self._selector, "load_state", None)
        if load is not None:
            load(state)

    def prepare(self, message: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """A message as it will leave, for one who must know beforehand what sending it leaves behind here. Send it once."""
        return message if self._compression is None else self._compression.compress(message)

    def compression_state(self) -> dict[str, Any]:
        """What the channel's compression must not forget: arrays and plain values by name."""
        return {} if self._compression is None else self._compression.state()

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        """Let the compression go on where that of an earlier process, or of an earlier round, was."""
        if self._compression is not None:
            self._compression.load_state(state)

    def all_ends(self) -> list[str]:
        """All ends that are there, in the order in which they came."""
        with self._inbox.condition:
            return list(self._inbox.present)

    def one_end(self, state: str | None = None) -> str:
        """The first of :meth:`ends`.

        :raises flame.errors.ChannelError: there is none.
        """
        for end in self.ends(state):
            return end
        raise ChannelError(f"Nobody is there on channel {self._name}; wait with await_join() first.")

    def has(self, end: str) -> bool:
        """Whether an end is there."""
        return end in self._inbox.present

    def strayed(self, within: float) -> list[str]:
        """The ends whose connection was lost in the last ``within`` seconds, and who have not come back; they may be about to."""
        since = time.monotonic() - within
        with self._inbox.condition:
            return [end for end, when in self._inbox.lost.items() if when > since]

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nobody comes or goes while the context lasts, except in its own waits. Be quick."""
        with self._inbox.condition:
            yield

    def visits(self) -> dict[str, int]:
        """How often each end has come: whose number has grown has lost its connection in between, and what was sent on it perhaps."""
        with self._inbox.condition:
            return dict(self._inbox.visits)

    def empty(self) -> bool:
        """True when no end is there."""
        return not self._inbox.present

    def ends_digest(self) -> str:
        """A digest of who is there, this worker included: equal at all members that see the same ones; empty when alone."""
        ends = self.ends()
        return hashlib.sha256("\n".join(sorted([*ends, self._me.end])).encode()).hexdigest()[:32] if ends else ""

    def member(self, end: str) -> Member | None:
        """How an end, or this worker, presented itself; None when it is not there."""
        if end == self._me.end:
            return self._me
        known = self._inbox.present.get(end)
        return known.member if known else None

    def set_property(self, key: str, value: Any) -> None:
        """Tell the selector something about the channel; ``round`` also goes along with each message."""
        self.properties[key] = value

    def set_end_property(self, end: str, key: str, value: Any) -> None:
        """Note something about an end; passed over when it is not there."""
        known = self._inbox.present.get(end)
        if known is not None:
            known.set_property(key, value)

    def get_end_property(self, end: str, key: str) -> Any:
        """What was noted about an end; None where nothing was, or the end is not there."""
        known = self._inbox.present.get(end)
        return known.get_property(key) if known is not None else None

    # Sending.

    def send(
        self,
        end: str,
        message: Mapping[Any, Any],
        timeout: float | None = None,
        *,
        kind: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Send a message to one end. Returns when its tensors may be changed again.

        :param timeout: seconds to wait for a slow end; None waits as long as it takes, or until the end leaves.
        :raises flame.errors.EndLeft: the end is not there, left meanwhile, or did not take a message in time.
        :raises flame.errors.CodecError: the message cannot be sent.
        """
        if not self.has(end):
            raise self._left(end)
        failed = self._send([end], message, timeout, kind, metadata)
        if failed:
            raise EndLeft(end, f"A message on channel {self._name} did not reach {end}: it {failed[end]}.")

    def broadcast(
        self,
        message: Mapping[Any, Any],
        ends: Collection[str] | None = None,
        timeout: float | None = None,
        *,
        kind: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, str]:
        """Send a message, encoded once, to all ends or to some. A slow one does not hold up the others.

        :param ends: their ids; None: everyone who is there.
        :param timeout: seconds to wait for slow ends; None waits as long as it takes, or until they leave.
        :returns: the ends that it did not reach, each with the reason; empty when all is well.
        :raises flame.errors.CodecError: the message cannot be sent.
        """
        wanted = self.all_ends() if ends is None else list(dict.fromkeys(ends))
        here = [end for end in wanted if self.has(end)]
        failed = {end: self._inbox.reasons.get(end, "is not there") for end in wanted if end not in here}
        if here:
            failed.update(self._send(here, message, timeout, kind, metadata))
        return failed

    def encode(
        self, message: Mapping[Any, Any], *, kind: str = "", metadata: Mapping[str, Any] | None = None
    ) -> Frames:
        """The message as this channel sends it."""
        if self._compression is not None:
            message = self._compression.compress(message)
        at = self.properties.get("round", 0)
        return codec.encode(
            message,
            sender=self._me.end,
            attempt=self._me.attempt,
            round=at if isinstance(at, int) else 0,
            kind=kind,
            metadata=metadata,
        )

    def _send(
        self,
        ends: Sequence[str],
        message: Mapping[Any, Any],
        timeout: float | None,
        kind: str,
        metadata: Mapping[str, Any] | None,
    ) -> dict[str, str]:
        if not self._joined:
            raise ChannelError(f"This worker has not joined channel {self._name}.")
        frames = self.encode(message, kind=kind, metadata=metadata)
        return self._backend.send(self._name, self._group, ends, frames, timeout)

    def _left(self, end: str) -> EndLeft:
        reason = self._inbox.reasons.get(end)
        return EndLeft(end, f"{end} is not there on channel {self._name}" + (f": it {reason}." if reason else "."))

    # Receiving.

    def recv(
        self, end: str, timeout: float | None = None, visits: Mapping[str, int] | None = None
    ) -> tuple[codec.Message | None, datetime | None]:
        """Receive the next message of an end.

        :param timeout: seconds; None waits as long as it takes, or until the end leaves.
        :param visits: see :meth:`recv_fifo`.
        :returns: the message and when it arrived; ``(None, when)`` when the end is not there or leaves.
        :raises flame.errors.DeadlineExceeded: the time ran out.
        """
        for message, (_, when) in self.recv_fifo([end], 1, timeout, visits):
            return message, when
        return None, None

    def recv_fifo(
        self,
        ends: Iterable[str],
        first_k: int = 0,
        timeout: float | None = None,
        visits: Mapping[str, int] | None = None,
    ) -> Iterator[tuple[codec.Message | None, tuple[str, datetime | None]]]:
        """Receive one message of each end, in the order in which they arrive.

        A received message's memory is used again once its arrays are dropped: drop them (``del``) before the next one
        is asked for, and only one of them is there at a time.

        :param ends: whom to wait for.
        :param first_k: stop after so many; what the others send stays for a later call. 0: all of them.
        :param timeout: seconds for all of them together; None waits as long as it takes.
        :param visits: what :attr:`visits` was when they were asked for what is waited for. Who has come anew since then may not know of it,
            or its answer was lost with the connection: if nothing of it is here, it counts as one that has left.
        :returns: yields ``(message, (end, when))``; the message is None for an end that is not there or leaves.
        :raises flame.errors.DeadlineExceeded: the time ran out; the text names who is missing.
        """
        ends = list(dict.fromkeys(ends))
        count = min(first_k, len(ends)) if first_k > 0 else len(ends)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._inbox.waiting(ends, visits) as wait:
            for _ in range(count):
                # Nothing of the message stays here while the caller has it.
                yield self._next(wait, deadline, timeout)

    def peek(self, end: str) -> tuple[codec.Message | None, datetime | None]:
        """The next message of an end if it has arrived, left to be received; else ``(None, None)``."""
        arrival = self._inbox.peek(end)
        if arrival is None:
            return None, None
        if arrival.message is None:
            arrival.message = self._open(end, arrival)
        return arrival.message, datetime.fromtimestamp(arrival.time)

    def heard(self) -> list[str]:
        """The ends, also those that have left, of which a message waits to be received."""
        return self._inbox.heard()

    def drain(self, ends: Collection[str] | None = None) -> int:
        """Drop what has arrived and was not received, of all ends or some; returns how many messages."""
        return self._inbox.drain(ends)

    drain_messages = drain

    def is_rxq_empty(self, end: str) -> bool:
        """True when no message of the end waits to be received."""
        return self._inbox.empty(end)

    def is_txq_empty(self, end: str) -> bool:
        """True: a message is on its way when :meth:`send` returns."""
        return True

    def _next(
        self, wait: Wait, deadline: float | None, timeout: float | None
    ) -> tuple[codec.Message | None, tuple[str, datetime | None]]:
        taken = self._inbox.take(wait, deadline)
        if taken is None:
            missing = sorted(wait.pending)
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise DeadlineExceeded(f"Nothing came on channel {self._name} from {shown} within {timeout:g} s.")
        end, arrival = taken
        if arrival is None:
            return None, (end, datetime.now())
        when = datetime.fromtimestamp(arrival.time)
        self.set_end_property(end, KEY_END_STATE, VAL_END_STATE_RECVD)
        return arrival.message or self._open(end, arrival), (end, when)

    def _open(self, end: str, arrival: Arrival) -> codec.Message | None:
        """Decode; what cannot be read counts as no message, and the log says why."""
        data, release = arrival.data, arrival.release
        arrival.data = arrival.release = None
        if data is None:
            return None
        if release is not None and type(data) is bytes:
            # Its own memory: the window is free as soon as the message is taken.
            release()
            release = None
        try:
            message = codec.decode(data, release=release)
            if self._compression is not None:
                message = self._compression.restore(message)
        except CodecError as error:
            log.warning("A message of %s on channel %s cannot be read: %s", end, self._name, error)
            return None
        message.sender = end
        return message

    def __repr__(self) -> str:
        return f"Channel({self._name!r}, group={self._group!r}, {len(self._inbox.present)} ends)"
