"""``flame serve``: the server, in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

from flame.cli.app import CONTEXT, examples


@click.command(
    context_settings=CONTEXT,
    epilog=examples("flame serve", "flame serve --port 0 --data-dir /srv/flame --db sqlite:////srv/flame/state.db"),
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=10100, show_default=True, help="The port; 0 takes any.")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where everything is kept. Else FLAME_DATA_DIR, else ~/.flame/data.",
)
@click.option(
    "--db", metavar="URL", help="Where the state is, such as sqlite:///state.db. Else flame.db in the data directory."
)
@click.option(
    "--token", envvar="FLAME_TOKEN", help="What users must show. Else FLAME_TOKEN; without one, nobody is asked."
)
@click.option("--slots", type=click.IntRange(1), help="How many workers may be there at once. Else eight a core.")
@click.option(
    "--lease", type=float, default=20.0, show_default=True, help="Seconds of silence after which a worker is lost."
)
@click.option(
    "--advertise", metavar="URL", help="The server's address as others reach it, where it is not the one above."
)
@click.option("--mqtt", metavar="HOST:PORT", help="The broker for jobs that use mqtt and name none.")
@click.option("--allow-anyone", is_flag=True, help="Listen beyond this machine without a token.")
@click.option("--private", is_flag=True, hidden=True, help="Live while somebody is attached.")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def serve(data_dir: Path | None, **settings: object) -> int:
    """Run a server: it accepts jobs, starts their workers and sees them through.

    A server that is killed and started again on the same data directory goes on with its jobs. Ctrl-C ends it and leaves
    the workers running.
    """
    from flame.client.config import data_dir as default
    from flame.serve import ServeSettings, run_server

    return run_server(ServeSettings(data_dir=data_dir or default(), **settings))  # type: ignore[arg-type]
