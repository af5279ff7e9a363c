"""What all roles have in common: a configuration, channels, metrics, a workflow; and how they wait for each other."""

from __future__ import annotations

import logging
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flame.errors import ChannelError, DeadlineExceeded, WorkerError
from flame.sdk import link as links
from flame.sdk.channel import Channel
from flame.sdk.channel_manager import ChannelManager
from flame.sdk.chaospoints import points
from flame.sdk.checkpoints import Checkpoints, State
from flame.sdk.config import Config
from flame.sdk.link import Link
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.seeding import seed_all, seed_of
from flame.sdk.mode.tasklet import Tasklet
from flame.sdk.weights import as_arrays

log = logging.getLogger(__name__)

#: A wait shorter than this is nothing to tell the user of, in seconds.
SHORT_WAIT = 1.0


class WorkIsDone(Exception):
    """Whoever is waited for has done the work, and will not come: there is nothing left for this worker but its own part."""


class Role(ABC):
    """Base of all roles. A user's class sets :attr:`config` in its ``__init__``, which need not call this one's.

    :ivar config: the task's configuration.
    :ivar model: what is trained; see :mod:`flame.sdk.weights` for what it may be. Set in ``initialize``.
    :ivar composer: the workflow, after :meth:`compose`.
    :ivar cm: the channels, after ``internal_init``.
    :ivar attempt: which start of the task this process is.
    :ivar metrics: what :meth:`update_metrics` was told since the last report.
    :ivar round_seed: a number that belongs to this worker and round, the same in every run of the job with the same hyperparameter
        ``seed``: for generators of the user's own. With ``policy.deterministic`` those of Python, numpy and PyTorch are seeded with it at the
        beginning of each round, so that a round that is done again after a crash is the same.
    """

    config: Config
    model: Any = None
    composer: Composer
    cm: ChannelManager
    metrics: dict[str, float]
    link: Link
    attempt: int = 1
    round_seed: int = 0
    _round: int = 1
    _work_done: bool = False
    _kept: Checkpoints

    def internal_init(self) -> None:
        """The first tasklet: join the channels."""
        self.link = links.current()
        self.metrics = {}
        self._round = 1
        self._work_done = False
        self.attempt = int(os.environ.get("FLAME_ATTEMPT") or 1)
        self._kept = Checkpoints(self.link, self.config.policy.checkpoint)
        self.cm = ChannelManager(self.config, rendezvous=self.link.rendezvous, attempt=self.attempt)
        self.link.on_done = self.cm.wake
        self._seed_round(0)
        self._join_channels()

    def _join_channels(self) -> None:
        """Join them all; for roles that must not be seen on one before they are settled on another."""
        self.cm.join_all()

    def load_data(self) -> None:
        """For the user: load the data. Does nothing where it is not written."""

    @abstractmethod
    def initialize(self) -> None:
        """For the user: make the model, as ``self.model``."""

    def evaluate(self) -> None:
        """For the user: evaluate the model and tell :meth:`update_metrics`. Does nothing where it is not written."""

    def checkpoint(self) -> Mapping[str, Any]:
        """For the user: what of this worker's own must outlive it, beside the model and what Flame keeps: arrays and plain values by name,
        such as a local optimizer's momentum. It is asked after each round that is kept, and goes to the server.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """For the user: take up what :meth:`checkpoint` gave in an earlier worker of this task, or before a round that is done again."""

    # What is kept of a round. Each class adds its part.

    def _state(self) -> State:
        """All that the worker that takes this one's place needs. Large arrays may be views."""
        state = State({}, {})
        own: dict[str, Any] = {}
        for name, value in self.checkpoint().items():
            if hasattr(value, "dtype") and hasattr(value, "shape"):
                state.arrays[f"user/{name}"] = as_arrays({name: value})[name]
            else:
                own[str(name)] = value
        if own:
            state.values["user"] = own
        if self._strict:
            self._keep_compressions(state)
        return state

    def _keep_compressions(self, state: State) -> None:
        """What compressed messages have lost so far, and the next ones will make up for. It is as large as the model, so only a job that must
        end with the same bits keeps it."""
        for channel, entries in self.cm.compression_states().items():
            for name, value in entries.items():
                if isinstance(value, np.ndarray):
                    state.arrays[f"compression/{channel}/{name}"] = value
                else:
                    state.values.setdefault("compression", {}).setdefault(channel, {})[name] = value

    def _load(self, state: State) -> None:
        """Be where an earlier worker was."""
        own = {**state.part("user"), **state.values.get("user", {})}
        if own:
            self.restore(own)
        if self._strict:
            found: dict[str, dict[str, Any]] = {
                channel: dict(values) for channel, values in state.values.get("compression", {}).items()
            }
            for key, array in state.part("compression").items():
                channel, _, name = key.partition("/")
                found.setdefault(channel, {})[name] = array
            self.cm.load_compression_states(found)

    @property
    def _strict(self) -> bool:
        """Whether a worker that is replaced must not change the result: rounds wait for it, and nobody goes on before its state is kept."""
        return self.config.policy.deterministic and self.config.policy.checkpoint.every > 0

    def _seed_round(self, round: int) -> None:
        """A round begins, or with 0 the work."""
        self.round_seed = seed_of(self.config, self.cm.order, round)
        if self.config.policy.deterministic:
            seed_all(self.round_seed)

    @abstractmethod
    def compose(self) -> None:
        """Put the workflow together, as ``self.composer``."""

    def run(self) -> None:
        """Do the workflow to its end.

        :raises flame.errors.FlameError: the work cannot be done; what the user's own code raises passes through.
        """
        _ensure_logging()
        if not hasattr(self, "composer"):
            raise WorkerError(f"{type(self).__name__} has no workflow yet: call compose() before run().")
        reach = points(self.config.role)
        if reach is not None:
            Tasklet.watch = lambda point: reach(point, self._round)
        try:
            self.composer.run()
        except WorkIsDone:
            log.info("The others have done the work; nothing is left to do here.")
        finally:
            self.close()

    def close(self) -> None:
        """Leave the channels and say what is left to say. Safe to call again."""
        if "_kept" in self.__dict__:
            self._kept.close()
        if "cm" in self.__dict__:
            self.cm.cleanup()
        if "link" in self.__dict__:
            self.link.waiting("")
            self.link.flush()

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """The function tags that this role's code acts on."""
        return []

    def update_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Report metrics of the current round.

        :param metrics: numbers by name, also those of numpy and PyTorch. One that is not finite is left out, with a warning.
        :raises flame.errors.WorkerError: a value is no number.
        """
        for name, value in metrics.items():
            try:
                number = float(value)
            except (TypeError, ValueError) as error:
                raise WorkerError(f"update_metrics: {name!r} is {value!r}, which is no number.") from error
            if math.isfinite(number):
                self.metrics[str(name)] = number
            else:
                self.link.warning(f"The metric {name!r} of {self.config.role} is {number} in round {self._round}.")

    def take_metrics(self) -> dict[str, float]:
        """What was reported since the last call."""
        metrics, self.metrics = self.metrics, {}
        return metrics

    def channel(self, tag: str) -> Channel:
        """The channel that a function tag of this role acts on.

        :raises flame.errors.ChannelError: there is none.
        """
        channel = self.cm.get_by_tag(tag)
        if channel is None:
            tags = ", ".join(sorted(self.config.func_tag_map)) or "none"
            raise ChannelError(
                f"No channel of role {self.config.role} has the function tag {tag!r} (it has {tags}): "
                "name it in the channel's funcTags."
            )
        return channel

    def wait_for(self, channel: Channel, enough: Callable[[], bool], whom: Callable[[], str], timeout: float) -> bool:
        """Wait until ``enough()``; a wait that is not short is told to the user.

        :param whom: says what is waited for, as in ``2 more workers of role trainer``.
        :param timeout: seconds.
        :returns: whether it came.
        :raises WorkIsDone: it will not come, as the others have done the work.
        """

        def over() -> bool:
            return enough() or self.link.done

        came = channel.wait_until(over, min(SHORT_WAIT, timeout))
        if not came and timeout > SHORT_WAIT:
            self.link.waiting(f"Waiting for {whom()} on channel {channel.name()}.")
            came = channel.wait_until(over, timeout - SHORT_WAIT)
            self.link.waiting("")
        if self.link.done and not channel.wait_until(enough, 0):
            raise WorkIsDone
        return came

    def wait_for_ends(self, channel: Channel, expected: int, timeout: float) -> bool:
        """Wait until so many others are on a channel: see :meth:`wait_for`."""
        return self.wait_for(
            channel,
            lambda: len(channel.all_ends()) >= expected,
            lambda: f"{expected - len(channel.all_ends())} more of {expected} workers of role {channel.other_role()}",
            timeout,
        )

    def await_peer(self, channel: Channel) -> None:
        """Wait until somebody is there, as long as the policy's ``joinDeadline`` allows.

        :raises flame.errors.DeadlineExceeded: nobody came.
        :raises WorkIsDone: nobody will come.
        """
        deadline = self.config.policy.join_deadline
        if not self.wait_for(
            channel,
            lambda: not channel.empty() or bool(channel.heard()),
            lambda: f"a worker of role {channel.other_role()}",
            deadline,
        ):
            raise DeadlineExceeded(
                f"No worker of role {channel.other_role()} was on channel {channel.name()} (group {channel.groupby()}) "
                f"within {deadline:g} s (policy.joinDeadline)."
            )


def return_memory() -> None:
    """Give what start-up has freed back to the system (glibc keeps it otherwise): the rounds need other sizes."""
    if sys.platform == "linux":
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _ensure_logging() -> None:
    """By hand nobody has set up logging, and the metrics go to the log."""
    if not logging.getLogger().handlers and "FLAME_TASK" not in os.environ:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
