"""What the role that closes a job's rounds does, whatever the topology: it counts and reports them, and keeps the model.

There is one such worker in a job, or one in each of its groups, where these know nothing of each other (parallel
experiments). The round's metrics go through the link to the user and to the registry; at the end the model goes to
the registry and, as ``model.safetensors``, to the server. Those of independent groups carry the group's name:
``model-GROUP.safetensors``, and ``JOB-GROUP`` in the registry.
"""

from __future__ import annotations

import time

from flame.sdk import modelfile, registries
from flame.sdk.mode.role import Role, return_memory
from flame.sdk.registries.base import Registry
from flame.sdk.weights import get_weights, set_weights

#: How long the end of a job may wait for its registry, and for the server to take the model, in seconds.
REGISTRY_SECONDS = 60.0
ARTIFACT_SECONDS = 600.0


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
        if base:
            weights = self.registry_client.load_model(base.name, base.version)
            if self.model is None:
                self.model = weights
            else:
                set_weights(self.model, weights)
        return_memory()  # the rounds begin

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
        modelfile.save(path, weights, about)
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

    def close(self) -> None:
        """See :class:`Role`."""
        if "registry_client" in self.__dict__:
            self.registry_client.close()
        super().close()
