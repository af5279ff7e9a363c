"""Who is there, as far as presence messages tell; pure, like the other halves of the protocol.

A presence message is retained by the broker, so that newcomers see it; that is also why it proves little: its
author may have died while the broker was down. So a member that is known from a retained message only, and
everyone after a reconnection, is asked for a sign of life, and counts as lost when none comes.
"""

from __future__ import annotations

from collections.abc import Callable

from flame.sdk.backends.base import Member
from flame.sdk.backends.mqtt_wire import Presence

#: A doubtful member is asked after so long, and again in this interval.
ASK_SECONDS = 2.5
#: It counts as lost after so long, and is taken back should it speak after all.
LOST_SECONDS = 10.0


class Peer:
    """One member, as its latest presence message says.

    :ivar here: the seats that it is in; none when it is gone.
    :ivar doubtful_since: since when a sign of life is wanted; None: it gave one.
    :ivar lost: it gave none in time.
    """

    def __init__(self, said: Presence) -> None:
        self.said = said
        self.here: frozenset[tuple[str, str]] = frozenset()
        self.doubtful_since: float | None = None
        self.lost = False
        self.ask_at = 0.0

    @property
    def member(self) -> Member:
        """How it presents itself."""
        return self.said.member

    @property
    def epoch(self) -> int:
        """What stands for its life in messages."""
        return self.said.epoch.nonce


class Roster:
    """All members of a job except this one.

    :param joined: called with a seat and the peer that is now in it.
    :param left: called with a seat, the end and why.
    """

    def __init__(
        self,
        joined: Callable[[tuple[str, str], Peer], None],
        left: Callable[[tuple[str, str], str, str], None],
        lost_seconds: float = LOST_SECONDS,
    ) -> None:
        self._joined = joined
        self._left = left
        self._lost_seconds = lost_seconds
        self._ask_seconds = min(ASK_SECONDS, lost_seconds / 4)
        self.peers: dict[str, Peer] = {}

    def hear(self, said: Presence, now: float, *, retained: bool) -> None:
        """A presence message or a will has come."""
        end = said.member.end
        peer = self.peers.get(end)
        if peer is None:
            peer = self.peers[end] = Peer(said)
        else:
            known = peer.said
            if said.left:
                if (said.epoch, said.connection) < (known.epoch, known.connection):
                    return  # of an earlier life or connection, and overtaken
            elif (said.epoch, said.connection, said.beat) <= (known.epoch, known.connection, known.beat):
                return
        new_life = said.epoch != peer.said.epoch
        before, peer.here = peer.here, frozenset() if said.left else frozenset(said.seats)
        peer.said, peer.lost = said, False
        peer.doubtful_since = now if retained and peer.here else None
        peer.ask_at = now + self._ask_seconds
        if new_life:
            # Who waits for the earlier one has to hear that nothing more comes from it.
            for seat in before:
                self._left(seat, end, "was started anew")
            before = frozenset()
        for seat in before - peer.here:
            self._left(seat, end, said.left or "left the channel")
        for seat in peer.here - before:
            self._joined(seat, peer)

    def sign_of_life(self, end: str, epoch: int) -> None:
        """Something signed has come from that life of an end."""
        peer = self.peers.get(end)
        if peer is None or peer.epoch != epoch:
            return
        peer.doubtful_since = None
        if peer.lost:  # it was only very slow
            peer.lost, peer.here = False, frozenset(peer.said.seats)
            for seat in peer.here:
                self._joined(seat, peer)

    def doubt_all(self, now: float) -> None:
        """The connection was lost: news may have been missed."""
        for peer in self.peers.values():
            if peer.here and peer.doubtful_since is None:
                peer.doubtful_since = now
                peer.ask_at = now + self._ask_seconds

    def let_go(self, reason: str) -> None:
        """The others have taken this worker for lost and given up what was on its way: begin with them anew."""
        for end, peer in self.peers.items():
            for seat in peer.here:
                self._left(seat, end, reason)
                self._joined(seat, peer)

    def check(self, now: float) -> list[Peer]:
        """Report the lost ones; gives those that should be asked for a sign of life now."""
        asked = []
        for end, peer in self.peers.items():
            if peer.doubtful_since is None:
                continue
            if now - peer.doubtful_since >= self._lost_seconds:
                before, peer.here, peer.doubtful_since, peer.lost = peer.here, frozenset(), None, True
                for seat in before:
                    self._left(seat, end, f"gave no sign of life for {self._lost_seconds:g} s")
            elif now >= peer.ask_at:
                peer.ask_at = now + self._ask_seconds
                asked.append(peer)
        return asked

    def deadline(self) -> float | None:
        """When :meth:`check` has something to do."""
        times = [
            min(peer.ask_at, peer.doubtful_since + self._lost_seconds)
            for peer in self.peers.values()
            if peer.doubtful_since is not None
        ]
        return min(times, default=None)
