"""What shall happen to whom, and when: ``aggregator@round=3``, ``server@upload``, ``trainer/2``; read, and drawn where it is left open."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Literal

import msgspec

from flame.errors import UsageError

Act = Literal["kill", "pause", "cut"]

#: The phases of a job: what a user calls them, and at which points of the workers' work each one is met.
PHASES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "start": ("start",),
        "deploy": ("internal_init", "load_data", "initialize"),
        "distribute": ("distribute", "fetch"),
        "train": ("train",),
        "upload": ("upload",),
        "aggregate": ("aggregate",),
        "save": ("checkpoint", "save_model"),
        "stop": ("inform_end_of_training",),
    }
)
#: What else phases may be called.
_ALIASES = {
    "before-start": "start",
    "deploying": "deploy",
    "distributing": "distribute",
    "training": "train",
    "uploading": "upload",
    "aggregating": "aggregate",
    "saving": "save",
    "stopping": "stop",
}
#: Phases that are met once, so that a round says nothing of them.
_ONCE = frozenset({"start", "deploy", "stop"})
#: Targets that are no roles.
PARTS = frozenset({"server", "flamelet", "broker", "database"})
_TEXT = re.compile(r"(?P<who>[A-Za-z][\w.-]*)(/(?P<number>\d+))?(@(?P<when>[a-z-]+)(=(?P<round>\d+))?)?")


class Deed(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that shall happen.

    :ivar act: ``kill``, ``pause`` or ``cut`` (its connections).
    :ivar who: a role, or one of ``PARTS``.
    :ivar number: which worker of the role; None: the one that comes to the moment first, or any.
    :ivar phase: at which phase; of the first worker that comes there.
    :ivar round: in which round; None: whichever is met.
    :ivar seconds: how long a pause lasts; how long what was killed is away, where somebody has to start it again.
    :ivar host: whose coming to the phase is the moment: a role, or ``*``.
    """

    act: Act
    who: str
    number: int | None = None
    phase: str = "train"
    round: int | None = None
    seconds: float = 0.0
    host: str = "*"

    def __str__(self) -> str:
        number = "" if self.number is None else f"/{self.number}"
        moment = "" if self.round is None or self.phase in _ONCE else f"={self.round}"
        for_long = f" {self.seconds:g}s" if self.act == "pause" else ""
        return f"{self.act} {self.who}{number}@{self.phase}{moment}{for_long}"

    def wishes(self) -> list[str]:
        """The points at which a worker shall be held for it, as :mod:`flame.sdk.chaospoints` has them; the first one counts."""
        number = "*" if self.round is None or self.phase in _ONCE else str(self.round)
        return [f"{self.host}@{point}@{number}.hold" for point in PHASES[self.phase]]


def read(act: Act, text: str, random: Random, *, rounds: int, seconds: float = 0.0) -> Deed:
    """A deed from what a user writes: ``WHO[/N][@PHASE[=ROUND]]`` or ``WHO[/N]@round=ROUND``; what is left open is drawn.

    :param random: draws the phase and the round where none is given.
    :param rounds: how many rounds the job has.
    :param seconds: how long it lasts.
    :raises flame.errors.UsageError: it cannot be read.
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{text!r} is no target. Write it as WHO, WHO/NUMBER, WHO@PHASE, WHO@PHASE=ROUND or WHO@round=ROUND."
        )
    who, number, when, turn = found["who"], found["number"], found["when"], found["round"]
    phase = _ALIASES.get(when or "", when or random.choice(sorted(PHASES)))
    if phase == "round":
        if turn is None:
            raise UsageError(f"{text!r} does not say which round; write {who}@round=3.")
        phase = "distribute"
    elif phase not in PHASES:
        raise UsageError(f"There is no phase {phase!r}. The phases are: {', '.join(PHASES)}; or say @round=N.")
    return Deed(
        act=act,
        who=who,
        number=None if number is None else int(number),
        phase=phase,
        round=_round(phase, None if turn is None else int(turn), random, rounds),
        seconds=seconds,
    )


def _round(phase: str, given: int | None, random: Random, rounds: int) -> int | None:
    if phase in _ONCE:
        return None
    if given is not None and not 1 <= given <= rounds:
        raise UsageError(f"There is no round {given}: the job has {rounds}.")
    return given if given is not None else random.randint(1, max(1, rounds))


def duration(text: str) -> float:
    """Seconds from ``20s``, ``500ms``, ``2m`` or a number.

    :raises flame.errors.UsageError: it cannot be read.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)?", text)
    if found is None:
        raise UsageError(f"{text!r} is no duration. Write it as 20s, 500ms or 2m.")
    return float(found[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0}[found[2] or "s"]
