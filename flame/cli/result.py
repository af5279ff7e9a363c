"""How a job that has ended is told: the rounds, the model, or the cause of its failure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from flame.cli import output
from flame.spec.records import Failure, Job, JobState, Model, Round

if TYPE_CHECKING:
    from flame.client import Client

_MOST_ROUNDS = 40


def document(job: Job) -> dict[str, Any]:
    """What ``flame run -o json`` prints."""
    result: dict[str, Any] = {
        "job": job.id,
        "state": job.state.value,
        "rounds": [
            {"round": one.round, "metrics": one.metrics, "seconds": one.seconds}
            | ({"group": one.group} if one.group else {})
            for one in job.rounds
        ],
        "model": msgspec.to_builtins(job.model),
    }
    if job.models:
        result["models"] = msgspec.to_builtins(job.models)
    if job.failure is not None:
        result["failure"] = msgspec.to_builtins(job.failure)
    return result


async def registry_of(client: Client, job: Job) -> str | None:
    """The address of the registry that has a job's model; None if it has an address of its own."""
    if job.model is None or job.model.registry != "mlflow":
        return None
    return job.form.registry.uri or (await client.info()).registry.uri


def report(job: Job, registry: str | None = None) -> None:
    """Print how a job ended, for people.

    :param registry: see :func:`registry_of`.
    """
    if job.rounds:
        click.echo()
        rounds(job.rounds)
    click.echo()
    took = output.span(job.ended_at - job.started_at) if job.ended_at and job.started_at else None
    facts: list[tuple[str, object]] = [("job", f"{job.name} ({job.id})"), ("state", job.state.value), ("took", took)]
    if job.state is not JobState.COMPLETED:
        facts += [("reason", job.reason), *failure(job.failure)]
    for model in job.models or filter(None, [job.model]):
        of = f" {model.group}" if model.group else ""
        facts += [(f"model{of}", where(model)), ("load it", how_to_load(model, registry))]
    output.facts([*facts, ("warnings", "\n".join(job.warnings))])


def rounds(done: list[Round]) -> None:
    """Print a table of rounds, shortened in the middle when there are many; of independent groups one after another."""
    grouped = any(one.group for one in done)
    done = sorted(done, key=lambda one: one.group)
    names = list(dict.fromkeys(name for one in done for name in one.metrics))
    rows: list[list[object]] = [
        [
            *([one.group] if grouped else []),
            one.round,
            *(output.number(one.metrics[name]) if name in one.metrics else None for name in names),
            f"{one.seconds:.3f}",
        ]
        for one in done
    ]
    left_out = len(rows) - _MOST_ROUNDS
    if left_out > 0:
        middle = _MOST_ROUNDS // 2
        rows[middle:-middle] = [["..."] * (len(names) + 2 + grouped)]
    head = ["GROUP"] if grouped else []
    right = range(len(head), len(head) + len(names) + 2)
    output.table([*head, "ROUND", *names, "SECONDS"], rows, right=right)
    if left_out > 0:
        click.echo(f"({left_out} rounds in the middle are left out; `-o json` has them all)")


def failure(cause: Failure | None) -> list[tuple[str, object]]:
    """Why something failed, as names and values."""
    if cause is None:
        return []
    who = f"{cause.role} (task {cause.task}, attempt {cause.attempt})" if cause.task else None
    how = cause.signal or (f"exit code {cause.exit_code}" if cause.exit_code is not None else None)
    return [("cause", cause.message), ("task", who), ("ended by", how), ("its log", "\n".join(cause.log))]


def where(model: Model) -> str:
    """Where a model is."""
    registered = f"{model.name} version {model.version}" if model.version else model.name
    places = [f"{registered} in the registry {model.registry}" + (f", {model.uri}" if model.uri else ""), model.path]
    return "\n".join(place for place in places if place)


def how_to_load(model: Model, registry: str | None = None) -> str:
    """Lines of Python that give the model, or its weights."""
    lines = []
    if model.path and model.path.endswith(".safetensors"):
        lines.append(f'safetensors.numpy.load_file("{model.path}")')
    if model.registry == "mlflow" and model.version:
        where = f"  # with MLFLOW_TRACKING_URI={registry}" if registry else ""
        lines.append(f'mlflow.pyfunc.load_model("models:/{model.name}/{model.version}"){where}')
    return "\n".join(lines)
