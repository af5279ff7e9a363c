"""Who is there, from presence messages that may be old, late, or of an earlier life."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flame.sdk.backends.base import Member
from flame.sdk.backends.mqtt_roster import Peer, Roster
from flame.sdk.backends.mqtt_wire import LAST_BEAT, Epoch, Presence

SEAT, OTHER = ("param", "default"), ("global", "default")


class Watched(Roster):
    """A roster, and what it has told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[str, str], str]] = []
        super().__init__(self.on_joined, self.on_left, lost_seconds=8)

    def on_joined(self, seat: tuple[str, str], peer: Peer) -> None:
        self.told.append(("joined", seat, peer.member.end))

    def on_left(self, seat: tuple[str, str], end: str, reason: str) -> None:
        self.told.append(("left", seat, reason))

    def news(self) -> list[tuple[str, tuple[str, str], str]]:
        told, self.told[:] = list(self.told), []
        return told


def said(attempt: int = 1, connection: int = 1, beat: int = 1, seats: list[tuple[str, str]] | None = None) -> Presence:
    member = Member(end="a", role="trainer", attempt=attempt)
    return Presence(member, Epoch(attempt, 5, attempt), connection, beat, [SEAT] if seats is None else seats)


def gone(attempt: int = 1, connection: int = 1) -> Presence:
    member = Member(end="a", role="trainer", attempt=attempt)
    return Presence(member, Epoch(attempt, 5, attempt), connection, LAST_BEAT, [], "lost its connection")


def test_seats_are_joined_and_left() -> None:
    roster = Watched()
    roster.hear(said(), 0, retained=False)
    assert roster.news() == [("joined", SEAT, "a")]
    roster.hear(said(beat=2, seats=[OTHER]), 0, retained=False)
    assert roster.news() == [("left", SEAT, "left the channel"), ("joined", OTHER, "a")]
    roster.hear(said(beat=3, seats=[OTHER]), 0, retained=False)
    assert roster.news() == []


def test_a_will_speaks_for_its_connection_and_earlier_ones_only() -> None:
    roster = Watched()
    roster.hear(said(connection=2), 0, retained=False)
    roster.hear(gone(connection=1), 0, retained=False)
    assert roster.news() == [("joined", SEAT, "a")]
    roster.hear(gone(connection=2), 0, retained=False)
    assert roster.news() == [("left", SEAT, "lost its connection")]
    roster.hear(said(connection=2, beat=9), 0, retained=False)
    assert roster.news() == [], "of a connection that has ended"
    roster.hear(said(connection=3), 0, retained=False)
    assert roster.news() == [("joined", SEAT, "a")]


def test_a_later_life_takes_the_place_and_an_earlier_one_does_not() -> None:
    roster = Watched()
    roster.hear(said(attempt=2), 0, retained=False)
    roster.hear(said(attempt=1, connection=7, beat=9), 0, retained=False)
    roster.hear(gone(attempt=1, connection=9), 0, retained=False)
    assert roster.news() == [("joined", SEAT, "a")]
    roster.hear(said(attempt=3), 0, retained=False)
    assert roster.news() == [("left", SEAT, "was started anew"), ("joined", SEAT, "a")]
    assert roster.peers["a"].member.attempt == 3


def test_a_retained_message_is_believed_for_a_while() -> None:
    roster = Watched()
    roster.hear(said(), 0, retained=True)
    assert roster.news() == [("joined", SEAT, "a")]
    assert roster.deadline() == 2
    assert roster.check(1) == []
    assert [peer.member.end for peer in roster.check(2)] == ["a"]
    assert roster.check(3) == []
    assert len(roster.check(4)) == 1
    assert roster.check(8) == []
    assert roster.news() == [("left", SEAT, "gave no sign of life for 8 s")]
    roster.sign_of_life("a", 1)
    assert roster.news() == [("joined", SEAT, "a")], "it was only very slow"


def test_a_sign_of_life_ends_the_doubt() -> None:
    roster = Watched()
    roster.hear(said(), 0, retained=True)
    roster.sign_of_life("a", 99)
    assert roster.deadline() is not None
    roster.sign_of_life("a", 1)
    assert roster.deadline() is None
    roster.doubt_all(5)
    assert roster.deadline() == 7
    roster.hear(said(beat=2), 6, retained=False)
    assert roster.deadline() is None
    assert roster.check(100) == []
    assert roster.news() == [("joined", SEAT, "a")]


messages = st.builds(said, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)) | st.builds(
    gone, st.integers(1, 3), st.integers(1, 3)
)


@given(st.permutations([said(1, 1, 1), said(1, 2, 2), gone(1, 1), said(2, 1, 1), said(2, 1, 2), gone(1, 2)]))
def test_any_order_ends_in_the_same_state(order: list[Presence]) -> None:
    roster = Watched()
    for message in order:
        roster.hear(message, 0, retained=False)
    peer = roster.peers["a"]
    assert (peer.epoch, peer.here) == (2, {SEAT})


@given(st.lists(messages, max_size=12))
def test_joined_and_left_take_turns(order: list[Presence]) -> None:
    roster = Watched()
    here = False
    for message in order:
        roster.hear(message, 0, retained=False)
        for what, _, _ in roster.news():
            assert here == (what == "left")
            here = what == "joined"
    assert here == bool(roster.peers and roster.peers["a"].here)
