"""``flame job invite|invites|uninvite``: what lets participants into a job."""

from __future__ import annotations

import re
import time
from typing import Any

import click

from flame.cli import names, output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option
from flame.client import Client
from flame.errors import UsageError
from flame.spec.records import Invite

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


class Duration(click.ParamType[float]):
    """A length of time, such as ``90s``, ``30m``, ``12h``, ``7d`` or ``2w``; in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", str(value).strip())
        if found is None or float(found[1]) == 0:
            self.fail(f"{value!r} is no length of time; write it like 90s, 30m, 12h or 7d.", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


@click.command(
    context_settings=CONTEXT,
    epilog=examples("flame job invite digits", "flame job invite digits --uses 3 --expires 2d"),
)
@click.argument("given", metavar="JOB")
@click.option("--uses", type=click.IntRange(1, 10_000), default=1, show_default=True, help="How many may come with it.")
@click.option("--expires", type=Duration(), default="7d", show_default=True, help="How long it is good for.")
@click.option("--realm", help="Where their data must lie, such as us or us/west; else anywhere.")
@server_option
@output_option
def invite(  # noqa: PLR0917
    given: str, uses: int, expires: float, realm: str | None, server: str | None, how: str
) -> None:
    """Make a token that lets participants into JOB with their own workers and data. It is shown once."""

    async def do(client: Client) -> tuple[str, Invite]:
        job = await names.job_id(client, given)
        return client.server, await client.invites.create(job, uses=uses, seconds=expires, realm=realm)

    url, made = ask(server, do)

    def table() -> None:
        many = "one participant" if uses == 1 else f"{uses} participants"
        output.note(f"For {many}, until {output.when(made.expires_at)}; it is not shown again. They run:")
        click.echo(f"flame join --server {url} --token {made.token} --dataset PATH")

    output.show(made, how, table)


@click.command(context_settings=CONTEXT, epilog=examples("flame job invites digits"))
@click.argument("given", metavar="JOB")
@server_option
@output_option
def invites(given: str, server: str | None, how: str) -> None:
    """List the invites of JOB, and who has come with them."""

    async def do(client: Client) -> list[Invite]:
        return await client.invites.list(await names.job_id(client, given))

    found = ask(server, do)

    def table() -> None:
        rows = [(one.id, _state(one), f"{len(one.names)}/{one.uses}", one.realm, ", ".join(one.names)) for one in found]
        output.table(("ID", "STATE", "USED", "REALM", "PARTICIPANTS"), rows)

    output.show(found, how, table)


@click.command(context_settings=CONTEXT, epilog=examples("flame job uninvite digits 0197f3"))
@click.argument("given", metavar="JOB")
@click.argument("wanted", metavar="INVITE")
@server_option
def uninvite(given: str, wanted: str, server: str | None) -> None:
    """Take an INVITE of JOB back: nobody comes with it any more, and who came with it is sent away."""

    async def do(client: Client) -> str:
        job = await names.job_id(client, given)
        there = [one.id for one in await client.invites.list(job) if one.id.startswith(wanted)]
        if len(there) != 1:
            raise UsageError(f"{wanted!r} fits {len(there) or 'no'} invites of this job; see `flame job invites`.")
        await client.invites.revoke(job, there[0])
        return there[0]

    output.note(f"The invite {ask(server, do)} is taken back.")


def _state(invite: Invite) -> str:
    if invite.revoked:
        return "taken back"
    if invite.expires_at < time.time():
        return "expired"
    return "used up" if len(invite.names) >= invite.uses else f"until {output.when(invite.expires_at)}"
