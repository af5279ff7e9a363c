"""What the role that closes a job's rounds does, whatever the topology: it counts and reports them, and keeps the model.

There is one such worker in a job, or one in each of its groups, where these know nothing of each other (parallel
experiments). The round's metrics go through the link to the user and to the registry; at the end the model goes to
the registry and, as ``model.safetensors``, to the server. Those of independent groups carry the group's name:
``model-GROUP.safetensors``, and ``JOB-GROUP`` in the registry.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flame.errors import WorkerError
from flame.sdk import modelfile, registries
from flame.sdk.checkpoints import State
from flame.sdk.mode.role import Role, return_memory
from flame.sdk.registries.base import Registry
from flame.sdk.weights import get_weights, set_weights

log = logging.getLogger(__name__)

#: How long the end of a job may wait for its registry, and for the server to take the model, in seconds.
REGISTRY_SECONDS = 60.0
ARTIFACT_SECONDS = 600.0
#: How long to wait before a full disk is tried again, in seconds.
FULL_SECONDS = 1.0


class RoundKeeper(Role):
    """Mixed into the role that closes the rounds.

    :ivar registry_client: where metrics and the model are kept.
    """

    registry_client: Registry
    _rounds: int = 1
    _started: float = 0.0  # of the round, by time.monotonic()

    def internal_init(self) -> None:
        """See :class:`Role`; also opens the registry."""
        super().internal_init()
        self._rounds = int(self.config.hyperparameters.rounds)
        self.link.group = self._group()
        self._open_registry()

    def _open_registry(self) -> None:
        """Open the registry; where the keeping of rounds moves from worker to worker, only when it falls to this one."""
        self.registry_client = registries.open_registry(self.config, self.link)
        self.registry_client.save_params(self.config.hyperparameters.dict())

    def _group(self) -> str:
        """The group that this worker closes the rounds of, where the job has several that know nothing of each other."""
        channels = self.config.channels
        if all(len(channel.group_by.value) > 1 for channel in channels.values()):
            return self.config.group(next(iter(channels)))
        return ""

    def load_base_model(self) -> None:
        """Begin from the registered model that the job names, whatever ``initialize`` has made.

        :raises flame.errors.WorkerError: there is no such model, or it does not fit ``self.model``.
        """
        base = self.config.base_model
        if base and not self._kept.rounds():
            weights = self.registry_client.load_model(base.name, base.version)
            if self.model is None:
                self.model = weights
            else:
                set_weights(self.model, weights)
        return_memory()  # the rounds begin

    # Going on where an earlier worker was.

    def _state(self) -> State:
        """See :class:`Role`: the model."""
        state = super()._state()
        state.arrays.update({f"model/{name}": array for name, array in get_weights(self.model).items()})
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        set_weights(self.model, state.part("model"))

    def resume(self) -> None:
        """What the tasklet ``resume`` does: go on behind the last round that an earlier worker of this task has kept."""
        found = self._kept.load()
        if found is not None:
            self._round, state = found
            self._load(state)
            log.info("Round %d is the last that was kept; the work goes on behind it.", self._round)
            self.increment_round()

    def keep_round(self) -> None:
        """What the tasklet ``checkpoint`` does: keep what the round has made, if it is time for that."""
        if self._strict and self._round % self.config.policy.checkpoint.every == 0:
            self._kept.commit(self._round, self._state)
        else:
            self._kept.offer(self._round, self._state, last=self._round >= self._rounds)

    def commit(self) -> None:
        """What the tasklet ``commit`` does: nobody is told that the work is done before its result is safe."""
        if self._round > 1:
            self._kept.commit(self._round - 1, self._state)

    def save_metrics(self) -> None:
        """Report the round with what :meth:`update_metrics` was told in it."""
        metrics = self.take_metrics()
        self.link.round(self._round, metrics, time.monotonic() - self._started)
        where = f"{self.link.group}." if self.link.group else ""
        self.registry_client.save_metrics(self._round, {f"{where}{name}": value for name, value in metrics.items()})

    def increment_round(self) -> None:
        """Go on to the next round; the work is done after the last one."""
        self._round += 1
        self._work_done = self._round > self._rounds

    def save_model(self) -> None:
        """Hand the model to the registry and, as ``model.safetensors``, to the server."""
        config, group = self.config, self.link.group
        weights = get_weights(self.model)
        path = self.link.folder / (f"model-{group}.safetensors" if group else "model.safetensors")
        name = f"{config.job.name}-{group}" if group else config.job.name
        about = {
            "job": config.job.job_id,
            "name": config.job.name,
            "rounds": str(self._round - 1),
            "schema": config.schema,
        }
        self._write(path, weights, about)
        self.registry_client.save_model(name, self.model, path)
        kept = self.link.artifact(path.name, path, ARTIFACT_SECONDS)
        version = self.registry_client.finish(REGISTRY_SECONDS)
        self.link.model(
            {
                "name": name,
                "path": kept,
                "uri": version.uri if version else None,
                "version": version.version if version else None,
                "registry": self.registry_client.sort,
                **({"group": group} if group else {}),
            }
        )

    def _write(self, path: Path, weights: Mapping[str, Any], about: Mapping[str, str]) -> None:
        """Write the model. A disk that is full may not stay so: what the whole job has made is worth some patience.

        :raises flame.errors.WorkerError: it cannot be written.
        """
        deadline = time.monotonic() + ARTIFACT_SECONDS
        while True:
            try:
                modelfile.save(path, weights, about)
                self.link.waiting("")
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > deadline:
                    raise WorkerError(f"The model cannot be written to {path}: {error.strerror}.") from error
                self.link.waiting(f"Waiting for room on the disk of {path.parent}: the model cannot be written.")
                time.sleep(FULL_SECONDS)

    def close(self) -> None:
        """See :class:`Role`."""
        if "registry_client" in self.__dict__:
            self.registry_client.close()
        super().close()
