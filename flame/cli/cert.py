"""``flame cert``: certificates for a trial deployment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click

from flame.certificates import Pair, make_authority, make_certificate
from flame.cli import output
from flame.cli.app import CONTEXT, Function, examples, output_option
from flame.errors import UsageError

_HERE = ("localhost", "127.0.0.1", "::1")


@click.group(
    context_settings=CONTEXT,
    epilog=examples(
        "flame cert ca",
        "flame cert server --host flame.example.org",
        "flame cert client site-3",
        "flame serve --tls-cert server.pem --tls-key server-key.pem --tls-ca ca.pem",
    ),
)
def cert() -> None:
    """Make an authority of your own, and certificates of it: for trials and closed deployments.

    Others need the authority's certificate, ca.pem; its key, ca-key.pem, is for nobody else.
    """


def _folder(function: Function) -> Function:
    kind = click.Path(path_type=Path, file_okay=False)
    return click.option("--dir", "folder", type=kind, default=Path(), help="Where the files are; else here.")(function)


def _days(default: int) -> Callable[[Function], Function]:
    kind = click.FloatRange(0, 36_500, min_open=True)
    return click.option("--days", type=kind, default=default, show_default=True, help="How long it is good for.")


@cert.command(context_settings=CONTEXT, epilog=examples("flame cert ca --name 'Our hospital'"))
@click.option("--name", default="Flame", show_default=True, help="What it is called.")
@_days(3650)
@_folder
@output_option
def ca(name: str, days: float, folder: Path, how: str) -> None:
    """Make an authority: ca.pem and ca-key.pem."""
    _keep(folder, "ca", make_authority(name, days), how)


@cert.command(context_settings=CONTEXT, epilog=examples("flame cert server --host flame.example.org --host 10.0.0.7"))
@click.option("--host", "hosts", multiple=True, help="A name or address at which it is reached, beside localhost.")
@_days(365)
@_folder
@output_option
def server(hosts: tuple[str, ...], days: float, folder: Path, how: str) -> None:
    """Make a server's certificate: server.pem and server-key.pem."""
    every = list(dict.fromkeys([*hosts, *_HERE]))
    _keep(folder, "server", make_certificate(_authority(folder), every[0], days, hosts=every, server=True), how)


@cert.command(context_settings=CONTEXT, epilog=examples("flame cert client site-3"))
@click.argument("name")
@_days(365)
@_folder
@output_option
def client(name: str, days: float, folder: Path, how: str) -> None:
    """Make a certificate that a worker shows: NAME.pem and NAME-key.pem."""
    if Path(name).name != name or name in ("ca", "server", ".", ".."):
        raise UsageError(f"{name!r} cannot be the name of a client's files.")
    _keep(folder, name, make_certificate(_authority(folder), name, days, server=False), how)


def _authority(folder: Path) -> Pair:
    try:
        return Pair((folder / "ca.pem").read_text("ascii"), (folder / "ca-key.pem").read_text("ascii"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"There is no authority in {folder.absolute()} ({error}); `flame cert ca` makes one."
        ) from error


def _keep(folder: Path, name: str, pair: Pair, how: str) -> None:
    """Write both files, the key for its owner alone. What is there is not overwritten: somebody may trust it."""
    paths = {"certificate": folder / f"{name}.pem", "key": folder / f"{name}-key.pem"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text, mode in ((paths["key"], pair.key, 0o600), (paths["certificate"], pair.certificate, 0o644)):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as file:
                file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{error.filename} is there already; remove it first, or use another --dir.") from error
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}.") from error
    plain = {what: str(path) for what, path in paths.items()}
    output.show(plain, how, lambda: output.facts(list(plain.items())))
