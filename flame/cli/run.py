"""``flame run``: a job from its files to its end. Starts a server first of all, if it needs one."""

from __future__ import annotations

import click

from flame.cli.app import CONTEXT, examples, output_option, server_option, set_option


@click.command(
    context_settings=CONTEXT,
    epilog=examples(
        "flame run examples/digits",
        "flame run examples/digits --set hyperparameters.rounds=5",
        "flame run job.yaml --server http://flame.example.org:10100 -o json",
    ),
)
@click.argument("job")
@set_option
@server_option
@output_option
def run(job: str, overrides: tuple[str, ...], server: str | None, how: str) -> int:
    """Run JOB, a job folder or a job file, to its end and watch it.

    Uses the configured server; without one, the server that runs on this machine, or a private one for as long as the job
    takes. Ctrl-C stops the job. The exit status is 0 only if the job completed.
    """
    from flame.client import config
    from flame.client.local import PrivateServer, running

    settings = config.resolve(server)
    private = None
    if settings.server is None and running(config.data_dir()) is None:
        private = PrivateServer(config.data_dir())  # it starts while the rest is imported and the job is read
    try:
        from flame.cli.running import Run
        from flame.client.running import Reading

        reading = Reading(job, overrides)
    except BaseException:
        if private is not None:
            private.end()
        raise
    return Run(settings, private, how).go(reading)
