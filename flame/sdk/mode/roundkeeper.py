"""What the role that closes a job's rounds does, whatever the topology: it counts and reports them, and keeps the model.

There is one such worker in a job. The round's metrics go through the link to the user and to the registry; at the end the
model goes to the registry and, as ``model.safetensors``, to the server.
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
        self._open_registry()

    def _open_registry(self) -> None:
        """Open the registry; where the keeping of rounds moves from worker to worker, only when it falls to this one."""
        self.registry_client = registries.open_registry(self.config, self.link)
        self.registry_client.save_params(self.config.hyperparameters.dict())

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
        self.registry_client.save_metrics(self._round, metrics)

    def increment_round(self) -> None:
        """Go on to the next round; the work is done after the last one."""
        self._round += 1
        self._work_done = self._round > self._rounds

    def save_model(self) -> None:
        """Hand the model to the registry and, as ``model.safetensors``, to the server."""
        config = self.config
        weights = get_weights(self.model)
        path = self.link.folder / "model.safetensors"
        about = {
            "job": config.job.job_id,
            "name": config.job.name,
            "rounds": str(self._round - 1),
            "schema": config.schema,
        }
        modelfile.save(path, weights, about)
        self.registry_client.save_model(config.job.name, self.model, path)
        kept = self.link.artifact(path.name, path, ARTIFACT_SECONDS)
        version = self.registry_client.finish(REGISTRY_SECONDS)
        self.link.model(
            {
                "name": config.job.name,
                "path": kept,
                "uri": version.uri if version else None,
                "version": version.version if version else None,
                "registry": self.registry_client.sort,
            }
        )

    def close(self) -> None:
        """See :class:`Role`."""
        if "registry_client" in self.__dict__:
            self.registry_client.close()
        super().close()
