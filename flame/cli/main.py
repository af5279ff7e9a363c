"""``flame``: the command line's entry."""

from __future__ import annotations

import click

from flame.cli.app import CONTEXT, LazyGroup, examples, finish

_COMMANDS = {
    "run": ("flame.cli.run:run", "Run a job to its end and watch it."),
    "serve": ("flame.cli.serve:serve", "Run a server."),
    "job": ("flame.cli.job:job", "Create, start, follow, stop jobs; read their logs."),
    "join": ("flame.cli.join:join", "Take part in a job with your own machine and data."),
    "task": ("flame.cli.task:task", "The tasks of a job: list, get, logs, delete."),
    "session": ("flame.cli.session:session", "Elastic sessions: list, watch, close; their tasks."),
    "app": ("flame.cli.application:app", "Applications: the code that serves the tasks of sessions."),
    "exec": ("flame.cli.execute:execute", "Run tasks of an application and print their answers."),
    "ping": ("flame.cli.ping:ping", "Run empty tasks and see how fast they are."),
    "design": ("flame.cli.design:design", "Named workflows: a schema and the code of its roles."),
    "schema": ("flame.cli.schema:schema", "The topology of a design; draw it."),
    "code": ("flame.cli.code:code", "The code of a design's roles."),
    "chaos": ("flame.cli.chaos:chaos", "Kill, pause and cut off parts of a job on purpose, and see that it goes on."),
    "compute": ("flame.cli.compute:compute", "Places that run workers: register, list, drain them."),
    "dataset": ("flame.cli.dataset:dataset", "Data registered by URL and realm."),
    "login": ("flame.cli.login:login", "Keep a server's address and your token for the commands that follow."),
    "user": ("flame.cli.user:user", "Who may use a server, and as what."),
    "token": ("flame.cli.token:token", "Tokens with which users say who they are."),
    "project": ("flame.cli.project:project", "Projects keep teams' things apart."),
    "audit": ("flame.cli.audit:audit", "Who did what on a server, and what was refused."),
    "cert": ("flame.cli.cert:cert", "Certificates for a trial deployment with TLS."),
    "db": ("flame.cli.db:db", "Move the state to another database."),
    "config": ("flame.cli.config:config", "Where the server is and who asks."),
    "version": ("flame.cli.main:version", "Print the version."),
}


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
    context_settings=CONTEXT,
    epilog=examples("flame run examples/digits", "flame serve", "flame job list"),
)
def flame() -> None:
    """Federated learning: compose it, run it, watch it."""


@click.command(context_settings=CONTEXT, epilog=examples("flame version"))
@click.option(
    "-o", "--output", "how", type=click.Choice(["table", "json", "yaml"]), default="table", help="What to print."
)
def version(how: str) -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    from flame.cli import output

    output.show({"version": installed("flame")}, how, lambda: click.echo(f"flame {installed('flame')}"))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with its status.

    :param arguments: None takes the process's own.
    """
    finish(flame, arguments)
