"""Where workers come in: each with the key of its task's attempt, and each is given what it needs to run the task.

What a worker says, once it is in, is for the :class:`~flame.controller.hearing.Hearing` of its job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from flame.controller.bookkeeping import task_stream
from flame.controller.context import Context
from flame.controller.supervisor import Supervisor
from flame.controller.workers import too_late
from flame.errors import Unauthorized
from flame.spec.nouns import Registry, TaskConfig
from flame.spec.records import Event, Job, Manifest, P2pTls
from flame.spec.topology import other_end


class Door:
    """Lets the workers of all jobs in.

    :param context: the controller's surroundings.
    :param find: gives what sees to the job of a task; None where the job is not under way.
    """

    def __init__(self, context: Context, find: Callable[[str], Supervisor | None]) -> None:
        self._context = context
        self._find = find

    def check_key(self, task: str, attempt: int, key: str | None) -> None:
        """Refuse whoever has not the key of this attempt.

        :raises flame.errors.Unauthorized: there is no key, or not the one of this attempt.
        """
        if key is None:
            raise Unauthorized("This is for workers only: it needs the task's key.")
        if not self._context.keys.opens(key, task, attempt):
            raise Unauthorized(f"This is not the key of attempt {attempt} of task {task}.")

    def enter(self, task: str, attempt: int, key: str | None) -> Supervisor:
        """Let a worker in: check its key, renew its lease.

        :raises flame.errors.Unauthorized: there is no key, or not the one of this attempt.
        :raises flame.errors.Forbidden: the attempt is over.
        """
        self.check_key(task, attempt, key)
        supervisor = self._find(task)
        if supervisor is None:
            raise too_late(task, attempt, "its job has ended")
        supervisor.worker(task, attempt)
        self._context.leases.renew((supervisor.id, task, attempt))
        return supervisor

    async def orders(
        self, supervisor: Supervisor, task: str, attempt: int, after: int = 0
    ) -> AsyncGenerator[Sequence[Event], None]:
        """The events of a task for its flamelet. Following them is being there."""
        await supervisor.connected(task, attempt)
        return self._context.notifier.batches(task_stream(task, attempt), after)

    async def manifest(self, supervisor: Supervisor, task: str, attempt: int) -> Manifest:
        """What a flamelet needs to run a task: the configuration with the server's own choices filled in."""
        job = supervisor.job
        assert job.code is not None
        kept = await self._context.checkpoints.find(job.id, task)
        return Manifest(
            config=self._filled(_without_absent(supervisor, supervisor.task(task).config)),
            code=job.code,
            job_key=self._context.keys.job(job.id),
            attempt=attempt,
            p2p_tls=self._certificate(job, task, attempt) if self._context.options.p2p_tls else None,
            checkpoints=[one.round for one in kept],
        )

    def _certificate(self, job: Job, task: str, attempt: int) -> P2pTls:
        """What a worker shows to the others of its job. The key is made here and kept nowhere."""
        from flame.certificates import JobAuthority

        authority = JobAuthority(bytes.fromhex(self._context.keys.job(job.id)), job.id, job.created_at)
        pair = authority.issue(f"{task}.{attempt}")
        return P2pTls(cert=pair.certificate, key=pair.key, ca=authority.certificate)

    def _filled(self, config: TaskConfig) -> TaskConfig:
        options = self._context.options
        named = {broker.sort for broker in config.brokers}
        brokers = [*config.brokers, *(broker for broker in options.brokers if broker.sort not in named)]
        registry = config.registry
        if registry.sort in ("default", options.registry.sort):
            mine = not registry.uri or registry.uri == options.registry.uri
            registry = options.registry if mine else Registry(sort=options.registry.sort, uri=registry.uri)
        elif registry.sort == "local" and not registry.uri:
            registry = Registry(sort="local", uri=str(options.data_dir / "registry"))
        return msgspec.structs.replace(config, brokers=brokers, registry=registry)


def _without_absent(supervisor: Supervisor, config: TaskConfig) -> TaskConfig:
    """A configuration that says to wait at the start for those alone who are there: participants may come later, or never."""
    absent = Counter(
        (task.role, channel, group)
        for task in supervisor.tasks
        if supervisor.waits(task.id)
        for channel, group in task.config.group_association.items()
    )
    if not absent:
        return config
    peers = {
        channel.name: config.peers[channel.name]
        - absent[other_end(channel, config.role), channel.name, config.group_association[channel.name]]
        for channel in config.channels
        if channel.name in config.peers
    }
    return msgspec.structs.replace(config, peers=peers)
