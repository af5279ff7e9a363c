"""What a worker has reached, kept so that the one that takes its place goes on from there.

A checkpoint is one file in the safetensors layout: arrays, and plain values as JSON in its header. The worker's flamelet hands it to
the server, which gives it to the next attempt, on whatever machine that runs. A checkpoint that the server has is *durable*.

**It costs the rounds nothing that shows.** A thread writes and hands over; small states are copied for it, large ones are read where
they lie until :meth:`Checkpoints.settle`, which the owner calls before it changes them. The newest state is what counts: while a
checkpoint is under way the rounds that end are passed over, and after it for nine times as long. So at most a tenth of the time goes
into checkpoints, and what a crash costs is at most what was passed over, or one round.

**Commit.** Who must not go on before its state is durable, because others act on it, calls :meth:`Checkpoints.commit`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flame.errors import FlameError, WorkerError
from flame.sdk import modelfile
from flame.sdk.link import Link
from flame.spec.nouns import CheckpointPolicy

log = logging.getLogger(__name__)

#: States up to so many bytes are copied; larger ones are read where they lie.
SMALL = 1 << 20
#: After a checkpoint none is made for so many times as long as it took.
REST = 9.0
#: How long the server may take to have a checkpoint, in seconds, before its owner goes on without.
PATIENCE = 120.0
#: How long the end of the process may wait for what is under way, in seconds.
PARTING = 2.0

_VALUES = "state"


class State(NamedTuple):
    """What is kept.

    :ivar arrays: by name.
    :ivar values: plain values, as JSON takes them, by name.
    """

    arrays: dict[str, Any]
    values: dict[str, Any]

    def part(self, name: str) -> dict[str, Any]:
        """The arrays whose names begin with ``name/``, without that."""
        prefix = f"{name}/"
        return {each.removeprefix(prefix): array for each, array in self.arrays.items() if each.startswith(prefix)}

    def copy(self) -> State:
        """The same, in memory of its own."""
        return State(
            {name: np.array(array) for name, array in self.arrays.items()}, json.loads(json.dumps(self.values))
        )


class Checkpoints:
    """The checkpoints of one worker.

    :param link: hands them over.
    :param policy: how often.
    """

    def __init__(self, link: Link, policy: CheckpointPolicy) -> None:
        self._link = link
        self._every = policy.every if link.keeps else 0
        self._folder = os.environ.get("FLAME_CHECKPOINTS")
        self._news = threading.Condition()
        self._offer: tuple[int, State] | None = None
        self._writing = False
        self._under_way: int | None = None
        self._durable = -1
        self._next = 0.0
        self._closed = False
        self._complained = False
        self._thread: threading.Thread | None = None

    # What an earlier worker has left.

    def rounds(self) -> list[int]:
        """The rounds that an earlier worker has left a checkpoint of, in order."""
        if not self._folder:
            return []
        return sorted(int(path.stem) for path in Path(self._folder).glob("*.safetensors") if path.stem.isdigit())

    def load(self, before: int | None = None) -> tuple[int, State] | None:
        """The newest checkpoint that is whole.

        :param before: only of rounds before this one.
        :returns: its round, and what it holds; None where there is none.
        """
        for number in reversed(self.rounds()):
            if before is not None and number >= before:
                continue
            path = Path(self._folder or "") / f"{number}.safetensors"
            try:
                arrays, about = modelfile.load(path)
                return number, State(arrays, json.loads(about.get(_VALUES, "{}")))
            except (OSError, ValueError, WorkerError) as error:
                self._link.warning(f"The checkpoint of round {number} cannot be read, an earlier one is taken: {error}")
        return None

    # What this one leaves.

    @property
    def durable(self) -> int:
        """The newest round whose checkpoint the server has, 0 for the beginning; -1: none."""
        return self._durable

    def due(self, round: int, *, last: bool = False) -> bool:
        """Whether a checkpoint would be made of this round now.

        :param last: no round comes after it, so its checkpoint is made in any case.
        """
        if not self._every:
            return False
        return last or (round % self._every == 0 and self._under_way is None and time.monotonic() >= self._next)

    def offer(self, round: int, make: Callable[[], State], *, last: bool = False) -> None:
        """A round is done: keep what ``make`` gives, if it is time for that.

        Large arrays are read where they lie: call :meth:`settle` before they are changed.
        """
        if self.due(round, last=last):
            self._put(round, make())

    def _put(self, round: int, state: State) -> None:
        if sum(array.nbytes for array in state.arrays.values()) <= SMALL:
            state = state.copy()
        with self._news:
            self._offer = round, state
            self._writing = True
            self._under_way = round
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flame-checkpoints", daemon=True)
                self._thread.start()
            self._news.notify_all()

    def settle(self) -> None:
        """What was offered may be changed when this returns."""
        if self._writing:
            with self._news:
                self._news.wait_for(lambda: not self._writing)

    def commit(self, round: int, make: Callable[[], State], patience: float = PATIENCE) -> bool:
        """Keep the state of a round, and return when it is durable.

        :returns: False when the server did not take it in time, or it cannot be written; the user has been warned.
        """
        if not self._every:
            return True
        with self._news:
            self._news.wait_for(lambda: self._under_way is None, patience)
            if self._under_way is not None:
                self._complain(f"nobody has taken it within {patience:g} s", self._under_way)
                return False
        if self._durable < round:
            self._put(round, make())
            with self._news:
                self._news.wait_for(lambda: self._under_way is None, patience)
        if self._durable < round:
            self._complain(f"nobody has taken it within {patience:g} s", round)
        return self._durable >= round

    def close(self) -> None:
        """Let what is under way come to its end, if that is soon."""
        with self._news:
            if self._thread is not None and not self._closed:
                self._news.wait_for(lambda: self._under_way is None, PARTING)
            self._closed = True
            self._news.notify_all()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._offer is not None or self._closed)
                if self._offer is None:
                    return
                (number, state), self._offer = self._offer, None
            began = time.monotonic()
            try:
                path = self._link.folder / f"checkpoint-{number}.safetensors"
                try:
                    modelfile.save(path, state.arrays, {_VALUES: json.dumps(state.values)})
                finally:
                    del state
                    self._written()
                self._link.checkpoint(number, path, PATIENCE)
                self._durable = number
            except (OSError, FlameError, TypeError, ValueError) as error:
                self._complain(str(error), number)
            with self._news:
                now = time.monotonic()
                self._next = now + REST * (now - began)
                self._under_way = None
                self._news.notify_all()

    def _written(self) -> None:
        with self._news:
            self._writing = False
            self._news.notify_all()

    def _complain(self, why: str, number: int) -> None:
        """Once: a job goes on without checkpoints, and a warning a round would drown the others."""
        log.warning("The checkpoint of round %d is not kept: %s", number, why)
        if not self._complained:
            self._complained = True
            self._link.warning(
                f"The checkpoint of round {number} is not kept, and later ones may not be either: {why.rstrip('.')}. "
                "The job goes on; a worker that is lost now begins from an earlier round."
            )
