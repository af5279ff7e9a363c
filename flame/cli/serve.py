"""``flame serve``: the server, in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

from flame.cli.app import CONTEXT, examples


@click.command(
    context_settings=CONTEXT,
    epilog=examples(
        "flame serve",
        "flame serve --data-dir /srv/flame --db sqlite:////srv/flame/state.db",
        "FLAME_TOKEN=secret flame serve --host 0.0.0.0 --advertise http://flame.example.org:10100",
    ),
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=10100, show_default=True, help="The port; 0 takes a free one."
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where the state is kept; else FLAME_DATA_DIR, else ~/.flame/data.",
)
@click.option(
    "--db", metavar="URL", help="The state's database, such as sqlite:///state.db; else flame.db in the data directory."
)
@click.option(
    "--artifacts",
    metavar="URL",
    help="Where models, checkpoints, code and past logs are kept, such as s3://bucket/prefix; else in the data directory.",
)
@click.option(
    "--token",
    envvar="FLAME_TOKEN",
    help="What users must show; better given as FLAME_TOKEN, which no process list shows.",
)
@click.option("--slots", type=click.IntRange(min=1), help="The most workers at once; else eight for each core.")
@click.option(
    "--lease",
    type=click.FloatRange(min=1),
    default=20.0,
    show_default=True,
    help="Seconds of silence after which a worker is lost.",
)
@click.option(
    "--advertise", metavar="URL", help="The server's address for workers and users, if it is not where it listens."
)
@click.option("--mqtt", metavar="HOST:PORT", help="The broker for jobs that use mqtt and name none.")
@click.option(
    "--allow-anyone",
    is_flag=True,
    envvar="FLAME_ALLOW_ANYONE",
    help="Listen beyond this machine without users, token or TLS. Whoever comes can run code here.",
)
@click.option(
    "--insecure-plain-http",
    is_flag=True,
    envvar="FLAME_INSECURE_PLAIN_HTTP",
    help="Listen beyond this machine without TLS: for a network that is trusted, or behind a proxy that does TLS.",
)
@click.option("--private", is_flag=True, help="Print the address as JSON, and end when nobody is attached any more.")
@click.option("-v", "--verbose", is_flag=True, help="Log what only developers want to read.")
def serve(
    *,
    host: str,
    port: int,
    data_dir: Path | None,
    db: str | None,
    artifacts: str | None,
    token: str | None,
    slots: int | None,
    lease: float,
    advertise: str | None,
    mqtt: str | None,
    allow_anyone: bool,
    insecure_plain_http: bool,
    private: bool,
    verbose: bool,
) -> int:
    """Run a server until it is told to end (Ctrl-C or SIGTERM). Its jobs go on meanwhile, and the next server finds them."""
    from flame.client.config import data_dir as default_dir
    from flame.serve import ServeSettings, run_server

    return run_server(
        ServeSettings(
            host=host,
            port=port,
            data_dir=data_dir or default_dir(),
            db=db,
            artifacts=artifacts,
            token=token,
            slots=slots,
            lease=lease,
            private=private,
            advertise=advertise,
            mqtt=mqtt,
            allow_anyone=allow_anyone,
            insecure_plain_http=insecure_plain_http,
            verbose=verbose,
        )
    )
