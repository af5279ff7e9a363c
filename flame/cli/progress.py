"""What is known of a job that runs, gathered from its events. Pure: the views only print what is in here."""

from __future__ import annotations

from typing import Any

import msgspec

from flame.spec.records import Event, Failure, Job, JobState, Model, Round


class Worker:
    """One task as its events tell it. ``state`` is a :class:`flame.spec.records.TaskState`'s value."""

    def __init__(self, role: str, index: int) -> None:
        self.role = role
        self.index = index
        self.state = "ready"
        self.attempt = 0
        self.reason: str | None = None

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.role}/{self.index}"


class Progress:
    """A job's course.

    :param job: the job as it was when the events begin.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state = job.state
        self.workers: dict[str, Worker] = {}
        self.rounds: list[Round] = []
        self.latest: dict[str, float] = {}
        self.failure: Failure | None = None
        self.reason: str | None = None
        self.model: Model | None = None
        self.warnings: list[str] = []
        rounds = job.form.model_spec.hyperparameters.get("rounds")
        #: How many rounds there will be; None if the job does not say.
        self.expected = rounds if isinstance(rounds, int) and rounds > 0 else None

    def feed(self, event: Event) -> list[str]:
        """Take an event in.

        :returns: what to tell whoever reads along, a line each; none for what is not worth one.
        """
        return getattr(self, f"_on_{event.type}", lambda _: [])(event.data)

    def standing(self) -> dict[str, tuple[int, int]]:
        """By role: how many workers are running or done, and how many there are."""
        counts: dict[str, tuple[int, int]] = {}
        for worker in self.workers.values():
            up, there = counts.get(worker.role, (0, 0))
            counts[worker.role] = (up + (worker.state in ("running", "completed")), there + 1)
        return counts

    def waiting(self) -> list[str]:
        """Whom workers wait for, a sentence each."""
        return [f"{worker.label}: {worker.reason}" for worker in self.workers.values() if worker.reason]

    def _on_job(self, data: dict[str, Any]) -> list[str]:
        before, self.state = self.state, JobState(data["state"])
        self.reason = data.get("reason")
        if data.get("failure"):
            self.failure = msgspec.convert(data["failure"], Failure)
        if self.state == before and not self.reason:
            return []
        return [f"job {self.state.value}" + (f": {self.reason}" if self.reason else "")]

    def _on_task(self, data: dict[str, Any]) -> list[str]:
        worker = self.workers.setdefault(data["task"], Worker(data["role"], data["index"]))
        before = (worker.state, worker.attempt, worker.reason)
        worker.state = data["state"]
        worker.attempt = data.get("attempt", 0)
        worker.reason = data.get("reason") or None
        if before == (worker.state, worker.attempt, worker.reason):
            return []
        failure = (data.get("failure") or {}).get("message")
        why = failure or worker.reason
        again = f" (attempt {worker.attempt})" if worker.attempt > 1 else ""
        return [f"{worker.label} {worker.state}{again}" + (f": {why}" if why else "")]

    def _on_metrics(self, data: dict[str, Any]) -> list[str]:
        self.latest |= data["metrics"]
        return []

    def _on_round(self, data: dict[str, Any]) -> list[str]:
        done = msgspec.convert(data, Round)
        self.rounds = [*(one for one in self.rounds if (one.round, one.group) != (done.round, done.group)), done]
        where = f"{done.group}." if done.group else ""
        self.latest |= {f"{where}{name}": value for name, value in done.metrics.items()}
        return [describe(done, self.expected)]

    def _on_model(self, data: dict[str, Any]) -> list[str]:
        self.model = msgspec.convert(data, Model)
        return []

    def _on_warning(self, data: dict[str, Any]) -> list[str]:
        self.warnings.append(data["message"])
        return [f"warning: {data['message']}"]


def describe(done: Round, expected: int | None) -> str:
    """One round in a line."""
    from flame.cli.output import number, span

    of = f"/{expected}" if expected else ""
    metrics = "".join(f"  {name} {number(value)}" for name, value in done.metrics.items())
    group = f"{done.group}  " if done.group else ""
    return f"{group}round {done.round}{of}{metrics}  {span(done.seconds)}"
