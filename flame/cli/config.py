"""``flame config``: where the server is and who asks."""

from __future__ import annotations

import click

from flame.cli import output
from flame.cli.app import CONTEXT, examples, output_option
from flame.client import config as settings


@click.group(
    context_settings=CONTEXT,
    epilog=examples("flame config set server http://flame.example.org:10100", "flame config show"),
)
def config() -> None:
    """Where the server is and who asks: ~/.flame/config.yaml, or the file that FLAME_CONFIG names."""


@config.command(context_settings=CONTEXT, epilog=examples("flame config show"))
@output_option
def show(how: str) -> None:
    """Print what holds: the variables FLAME_SERVER, FLAME_TOKEN and so on, else the file. Tokens are not printed."""
    held = settings.resolve()
    token = "(set)" if held.token else None
    plain = {
        "file": str(settings.config_path()),
        "server": held.server,
        "token": token,
        "project": held.project,
        "ca": held.ca,
        "dataDir": str(settings.data_dir()),
    }
    output.show(
        plain,
        how,
        lambda: output.facts(
            [
                ("file", plain["file"]),
                (
                    "server",
                    held.server or f"none: the one that runs in {settings.data_dir()}, or {settings.DEFAULT_SERVER}",
                ),
                ("token", token or "none"),
                ("project", held.project),
                ("ca", held.ca),
            ]
        ),
    )


@config.command(name="set", context_settings=CONTEXT, epilog=examples("flame config set server http://127.0.0.1:10100"))
@click.argument("key", metavar="server|token|project|ca")
@click.argument("value")
def set_(key: str, value: str) -> None:
    """Write a setting into the file. An empty VALUE takes it out."""
    settings.check(key, value or None)
    path = settings.write(settings.read_file()._replace(**{key: value or None}))
    output.note(f"{key} is {'set' if value else 'no longer set'} in {path}.")
