"""``flame compute``: the places that run workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from flame.cli import names, output
from flame.cli.app import CONTEXT, Function, ask, examples, output_option, server_option
from flame.client import Client
from flame.errors import UsageError
from flame.spec.load import load_computes
from flame.spec.nouns import Compute
from flame.spec.override import split
from flame.spec.quantities import show_bytes
from flame.spec.read import parse
from flame.spec.records import ComputeStatus, ComputeUse
from flame.spec.shape import shape


@click.group(
    context_settings=CONTEXT,
    epilog=examples("flame compute list", "flame compute create engine --kind docker --region default/us --slots 8"),
)
def compute() -> None:
    """Places that run workers: this host, Docker engines, Kubernetes clusters."""


def _field_options(function: Function) -> Function:
    """The fields of a compute, as options."""
    options: list[Callable[[Function], Function]] = [
        click.option("--kind", help="What runs its workers: local, docker, kubernetes, or a kind of another package."),
        click.option("--region", help="Where it lies, such as default/us/west."),
        click.option("--config", "config", metavar="KEY=VALUE", multiple=True, help="A field of its configuration."),
        click.option("--slots", type=click.IntRange(min=1), help="Most workers at once."),
        click.option("--cpu", type=click.FloatRange(min=0, min_open=True), help="Cores for workers."),
        click.option("--memory", metavar="AMOUNT", help="Memory for workers, such as 16Gi."),
        click.option("--gpu", type=click.IntRange(min=0), help="GPUs for workers."),
        click.option(
            "--worker-server", metavar="URL", help="Where its workers reach the server, if not where it listens."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@compute.command(
    context_settings=CONTEXT,
    epilog=examples(
        "flame compute create engine --kind docker --config network=flame",
        "flame compute create cluster --kind kubernetes --region default/eu --slots 50",
        "flame compute create computes.yaml",
    ),
)
@click.argument("source", metavar="NAME|FILE")
@_field_options
@server_option
@output_option
def create(source: str, server: str | None, how: str, **fields: Any) -> None:
    """Register the compute NAME, or those that FILE (- for standard input) describes.

    One that cannot be reached is registered all the same and tried again; what is wrong is printed.
    """
    if source == "-" or Path(source).exists():
        if _given(fields):
            raise UsageError("Give a file or options, not both.")
        forms = load_computes(source)
    else:
        if not fields.get("kind"):
            raise UsageError(f"There is no file {source!r}; for a compute of this name give its --kind.")
        forms = [shape({"name": source, **_given(fields)}, Compute)]

    async def do(client: Client) -> list[ComputeStatus]:
        return [await client.computes.create(form) for form in forms]

    _print(ask(server, do), how, alone=len(forms) == 1)


@compute.command(
    name="list", context_settings=CONTEXT, epilog=examples("flame compute list", "flame compute list -o json")
)
@server_option
@output_option
def list_(server: str | None, how: str) -> None:
    """List the computes: what they have, and what of it is taken."""
    _print(ask(server, lambda client: client.computes.list()), how)


@compute.command(context_settings=CONTEXT, epilog=examples("flame compute get local"))
@click.argument("name", metavar="COMPUTE")
@server_option
@output_option
def get(name: str, server: str | None, how: str) -> None:
    """Print COMPUTE, with what is wrong where it cannot be reached. Secrets are not shown."""

    async def do(client: Client) -> ComputeStatus:
        return await client.computes.get(await names.compute_id(client, name))

    found = ask(server, do)
    output.show(found, how, lambda: _facts(found))


@compute.command(
    context_settings=CONTEXT,
    epilog=examples("flame compute update local --slots 4", "flame compute update engine --config image=flame:2"),
)
@click.argument("name", metavar="COMPUTE")
@_field_options
@server_option
@output_option
def update(name: str, server: str | None, how: str, **fields: Any) -> None:
    """Change what is given of COMPUTE. Its kind and configuration change only while it has no workers."""
    if not _given(fields):
        raise UsageError("Nothing is to be changed; see `flame compute update --help`.")

    async def do(client: Client) -> ComputeStatus:
        there = await client.computes.get(await names.compute_id(client, name))
        known = {
            key: value for key, value in msgspec.to_builtins(there).items() if key in Compute.__struct_encode_fields__
        }
        given = _given(fields, config=known["config"])
        return await client.computes.update(there.id, shape({**known, **given}, Compute))

    _print([ask(server, do)], how, alone=True)


@compute.command(
    context_settings=CONTEXT, epilog=examples("flame compute drain engine", "flame compute drain engine --undo")
)
@click.argument("name", metavar="COMPUTE")
@click.option("--undo", is_flag=True, help="Let it have new workers again.")
@server_option
@output_option
def drain(name: str, undo: bool, server: str | None, how: str) -> None:
    """Give COMPUTE no new workers; those that are there go on to their end."""

    async def do(client: Client) -> ComputeStatus:
        return await client.computes.drain(await names.compute_id(client, name), undo=undo)

    _print([ask(server, do)], how, alone=True)


@compute.command(context_settings=CONTEXT, epilog=examples("flame compute delete engine"))
@click.argument("given", metavar="COMPUTE...", nargs=-1, required=True)
@server_option
def delete(given: tuple[str, ...], server: str | None) -> None:
    """Take computes from the register. One with workers is refused: drain it first."""

    async def do(client: Client) -> None:
        for one in given:
            await client.computes.delete(await names.compute_id(client, one))

    ask(server, do)
    output.note(f"Deleted {', '.join(given)}.")


def _given(fields: dict[str, Any], config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The fields that the command line gives, under their names on the wire."""
    said = {key: value for key, value in fields.items() if value not in (None, ())}
    if "worker_server" in said:
        said["server"] = said.pop("worker_server")
    if "config" in said:
        said["config"] = _configuration(said["config"], config or {})
    return said


def _configuration(settings: tuple[str, ...], before: dict[str, Any]) -> dict[str, Any]:
    """``("image=x", "limits.cpu=2")`` -> ``{"image": "x", "limits": {"cpu": 2}}``, laid over what is there."""
    config: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(before))
    for setting in settings:
        steps, value = split(setting)
        inner = config
        for step in steps[:-1]:
            inner = inner.setdefault(step, {})
            if not isinstance(inner, dict):
                raise UsageError(f"--config {setting}: {step!r} has no fields.")
        inner[steps[-1]] = parse(value, f"--config {setting}", json_only=False)
    return config


def _print(found: list[ComputeStatus], how: str, *, alone: bool = False) -> None:
    output.show(found[0] if alone else found, how, lambda: _table(found))
    for one in found:
        if one.problem and how == "table":
            output.note(f"note: {one.name} cannot be used now, and is tried again: {one.problem}")


def _table(found: list[ComputeStatus]) -> None:
    rows = [
        [
            one.name,
            one.kind,
            one.region,
            one.state,
            _share(one, "slots", str),
            _share(one, "cpu", "{:g}".format),
            _share(one, "memory", show_bytes),
            _share(one, "gpu", str),
        ]
        for one in found
    ]
    output.table(["NAME", "KIND", "REGION", "STATE", "WORKERS", "CPU", "MEMORY", "GPU"], rows)


def _share(one: ComputeStatus, part: str, show: Callable[[Any], str]) -> str:
    """What is taken of what there is."""
    taken, most = (getattr(amounts, part) for amounts in (one.used, one.capacity))
    return f"{show(taken or 0)}/{'-' if most is None else show(most)}"


def _facts(one: ComputeStatus) -> None:
    output.facts(
        [
            ("Name", one.name),
            ("Kind", one.kind),
            ("Region", one.region),
            ("State", one.state),
            ("Problem", one.problem),
            ("In all", _amounts(one.capacity)),
            ("Taken", _amounts(one.used)),
            ("Server", one.server),
            ("Configuration", "\n".join(f"{key}: {value}" for key, value in one.config.items())),
            ("Created", output.when(one.created_at)),
        ]
    )


def _amounts(use: ComputeUse) -> str:
    shown: list[tuple[float | None, str, Callable[[Any], str]]] = [
        (use.slots, "workers", str),
        (use.cpu, "cores", "{:g}".format),
        (use.memory, "of memory", show_bytes),
        (use.gpu, "GPUs", str),
    ]
    return ", ".join(f"{show(amount)} {word}" for amount, word, show in shown if amount is not None)
