"""``flame dataset``: data registered by URL and realm."""

from __future__ import annotations

import asyncio

import click

from flame.cli import names, output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option
from flame.client import Client
from flame.spec.load import load_dataset, load_datasets
from flame.spec.records import DatasetRecord


@click.group(context_settings=CONTEXT, epilog=examples("flame dataset create dataset.json", "flame dataset list"))
def dataset() -> None:
    """Data registered by URL and realm; each one that a job uses becomes one data-consuming worker."""


@dataset.command(
    context_settings=CONTEXT,
    epilog=examples("flame dataset create dataset.json", "flame dataset create examples/digits"),
)
@click.argument("source")
@server_option
@output_option
def create(source: str, server: str | None, how: str) -> None:
    """Register the datasets in SOURCE: a file with one or with a list, a folder with dataset* files, or - for standard input."""
    forms = load_datasets(source)

    async def do(client: Client) -> list[DatasetRecord]:
        return [await client.datasets.create(form) for form in forms]

    _print(ask(server, do), how, alone=len(forms) == 1)


@dataset.command(name="list", context_settings=CONTEXT, epilog=examples("flame dataset list"))
@server_option
@output_option
def list_(server: str | None, how: str) -> None:
    """List the registered datasets."""
    _print(ask(server, lambda client: client.datasets.list()), how)


@dataset.command(context_settings=CONTEXT, epilog=examples("flame dataset get digits-site-1"))
@click.argument("dataset", metavar="DATASET")
@server_option
@output_option
def get(dataset: str, server: str | None, how: str) -> None:
    """Print DATASET, given by its id, the beginning of it, or its name."""

    async def do(client: Client) -> DatasetRecord:
        return await client.datasets.get(await names.dataset_id(client, dataset))

    _print([ask(server, do)], how, alone=True)


@dataset.command(context_settings=CONTEXT, epilog=examples("flame dataset update digits-site-1 dataset.json"))
@click.argument("dataset", metavar="DATASET")
@click.argument("source")
@server_option
@output_option
def update(dataset: str, source: str, server: str | None, how: str) -> None:
    """Change DATASET to what the file SOURCE says."""
    form = load_dataset(source)

    async def do(client: Client) -> DatasetRecord:
        return await client.datasets.update(await names.dataset_id(client, dataset), form)

    _print([ask(server, do)], how, alone=True)


@dataset.command(context_settings=CONTEXT, epilog=examples("flame dataset delete digits-site-1"))
@click.argument("datasets", metavar="DATASET...", nargs=-1, required=True)
@server_option
def delete(datasets: tuple[str, ...], server: str | None) -> None:
    """Take datasets from the register. The data themselves are not touched."""

    async def do(client: Client) -> None:
        ids = [await names.dataset_id(client, given) for given in datasets]
        await asyncio.gather(*(client.datasets.delete(one) for one in ids))

    ask(server, do)
    output.note(f"Deleted {', '.join(datasets)}.")


def _print(records: list[DatasetRecord], how: str, *, alone: bool = False) -> None:
    output.show(
        records[0] if alone else records,
        how,
        lambda: output.table(
            ["ID", "NAME", "REALM", "URL", "CREATED"],
            [
                [one.id, one.dataset.name, one.dataset.realm, one.dataset.url, output.when(one.created_at)]
                for one in records
            ],
        ),
    )
