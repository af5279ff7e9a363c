"""``flame serve``: the server, in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from flame.cli.app import CONTEXT, examples
from flame.errors import UsageError

if TYPE_CHECKING:
    from flame.spec.people import UserRole


class _Measure(click.ParamType[float]):
    """A number with a unit."""

    units: ClassVar[dict[str, float]]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See :class:`click.ParamType`."""
        if isinstance(value, int | float):
            return value
        number, unit = str(value)[:-1], str(value)[-1:]
        if unit not in self.units or not number.isascii() or not number.isdigit() or not int(number):
            self.fail(f"{value!r} is no {self.name}; write a number with one of {', '.join(self.units)}.", param, ctx)
        return int(number) * self.units[unit]


class Duration(_Measure):
    """Seconds."""

    name = "time"
    units: ClassVar[dict[str, float]] = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


class Size(_Measure):
    """Bytes."""

    name = "size"
    units: ClassVar[dict[str, float]] = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


FILE = click.Path(path_type=Path, dir_okay=False)


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
    "--db",
    metavar="URL",
    envvar="FLAME_SERVE_DB",
    help="The state's database, such as sqlite:///state.db; else flame.db in the data directory.",
)
@click.option(
    "--artifacts",
    metavar="URL",
    envvar="FLAME_SERVE_ARTIFACTS",
    help="Where models, checkpoints, code and past logs are kept, such as s3://bucket/prefix; else in the data directory.",
)
@click.option(
    "--standby",
    is_flag=True,
    help="If another server works on the database, wait, and take over when it ends or falls silent.",
)
@click.option(
    "--takeover",
    type=click.FloatRange(min=2),
    default=20.0,
    show_default=True,
    help="Seconds until a standby has taken over from a silent server; the same for all servers of a database.",
)
@click.option(
    "--token",
    envvar="FLAME_TOKEN",
    help="What users must show; better given as FLAME_TOKEN, which no process list shows.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file with what users must show.",
)
@click.option(
    "--computes",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    envvar="FLAME_SERVE_COMPUTES",
    help="A file with a list of computes (as `flame compute create` takes them), registered or brought up to date now.",
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
@click.option("--tls-cert", type=FILE, envvar="FLAME_SERVE_TLS_CERT", help="The server's certificate (PEM).")
@click.option("--tls-key", type=FILE, envvar="FLAME_SERVE_TLS_KEY", help="Its private key (PEM).")
@click.option(
    "--tls-ca",
    type=FILE,
    envvar="FLAME_SERVE_TLS_CA",
    help="The authority of the server's certificate, where workers would not know it (PEM): they are told.",
)
@click.option(
    "--tls-client-ca",
    type=FILE,
    envvar="FLAME_SERVE_TLS_CLIENT_CA",
    help="Workers must show a certificate of this authority (PEM).",
)
@click.option(
    "--tls-worker-cert",
    type=FILE,
    envvar="FLAME_SERVE_TLS_WORKER_CERT",
    help="What workers show that the server starts (PEM); with --tls-client-ca.",
)
@click.option("--tls-worker-key", type=FILE, envvar="FLAME_SERVE_TLS_WORKER_KEY", help="Its private key (PEM).")
@click.option(
    "--oidc-issuer",
    metavar="URL",
    envvar="FLAME_SERVE_OIDC_ISSUER",
    help="Accept bearer tokens of this OpenID provider.",
)
@click.option(
    "--oidc-audience",
    metavar="NAME",
    envvar="FLAME_SERVE_OIDC_AUDIENCE",
    help="For whom its tokens must have been made out.",
)
@click.option(
    "--oidc-role",
    "oidc_roles",
    metavar="GROUP=ROLE",
    multiple=True,
    envvar="FLAME_SERVE_OIDC_ROLES",
    help="Which role (admin, user, participant, viewer) a group has; can be given several times.",
)
@click.option(
    "--oidc-project",
    "oidc_projects",
    metavar="GROUP=PROJECT",
    multiple=True,
    envvar="FLAME_SERVE_OIDC_PROJECTS",
    help="Which project a group belongs to; can be given several times.",
)
@click.option(
    "--oidc-group-claim",
    metavar="CLAIM",
    default="groups",
    show_default=True,
    envvar="FLAME_SERVE_OIDC_GROUP_CLAIM",
    help="Where tokens hold the groups, such as realm_access.roles.",
)
@click.option(
    "--oidc-name-claim",
    metavar="CLAIM",
    default="sub",
    show_default=True,
    envvar="FLAME_SERVE_OIDC_NAME_CLAIM",
    help="What names somebody in tokens.",
)
@click.option(
    "--p2p-tls",
    is_flag=True,
    envvar="FLAME_SERVE_P2P_TLS",
    help="Workers of a job speak TLS with each other, by an authority of the job's own.",
)
@click.option(
    "--drain",
    is_flag=True,
    help="Start no jobs any more, and end when those that run have ended; a server that is there is told to do so.",
)
@click.option(
    "--keep-jobs",
    type=Duration(),
    metavar="TIME",
    help="Remove jobs that ended longer ago than that, such as 30d or 12h.",
)
@click.option(
    "--keep-size",
    type=Size(),
    metavar="SIZE",
    help="Remove the oldest jobs that ended while all have more, such as 50G.",
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
    standby: bool,
    takeover: float,
    token: str | None,
    computes: Path | None,
    slots: int | None,
    lease: float,
    advertise: str | None,
    mqtt: str | None,
    allow_anyone: bool,
    insecure_plain_http: bool,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    tls_client_ca: Path | None,
    tls_worker_cert: Path | None,
    tls_worker_key: Path | None,
    oidc_issuer: str | None,
    oidc_audience: str | None,
    oidc_roles: tuple[str, ...],
    oidc_projects: tuple[str, ...],
    oidc_group_claim: str,
    oidc_name_claim: str,
    p2p_tls: bool,
    drain: bool,
    keep_jobs: float | None,
    keep_size: int | None,
    private: bool,
    verbose: bool,
) -> int:
    """Run a server until it is told to end (Ctrl-C or SIGTERM). Its jobs go on meanwhile, and the next server finds them."""
    from flame.apiserver.oidc import OidcSettings
    from flame.apiserver.tls import ServerTls
    from flame.client.config import data_dir as default_dir
    from flame.process import run_server
    from flame.serve import ServeSettings
    from flame.spec.people import UserRole

    oidc = None
    if oidc_issuer is not None:
        if oidc_audience is None or not oidc_roles:
            raise UsageError("--oidc-issuer needs --oidc-audience, and --oidc-role for each group that may come in.")
        oidc = OidcSettings(
            issuer=oidc_issuer,
            audience=oidc_audience,
            name_claim=oidc_name_claim,
            group_claim=oidc_group_claim,
            roles={group: _role(role, UserRole) for group, role in map(_rule, oidc_roles)},
            projects=dict(map(_rule, oidc_projects)),
        )
    return run_server(
        ServeSettings(
            host=host,
            port=port,
            data_dir=data_dir or default_dir(),
            db=db,
            artifacts=artifacts,
            token=_token(token, token_file),
            standby=standby,
            takeover=takeover,
            computes=computes,
            slots=slots,
            lease=lease,
            tls=ServerTls(
                cert=tls_cert,
                key=tls_key,
                ca=tls_ca,
                client_ca=tls_client_ca,
                worker_cert=tls_worker_cert,
                worker_key=tls_worker_key,
            ),
            oidc=oidc,
            p2p_tls=p2p_tls,
            drain=drain,
            keep_jobs=keep_jobs,
            keep_size=keep_size,
            private=private,
            advertise=advertise,
            mqtt=mqtt,
            allow_anyone=allow_anyone,
            insecure_plain_http=insecure_plain_http,
            verbose=verbose,
        )
    )


def _rule(text: str) -> tuple[str, str]:
    group, sign, what = text.rpartition("=")
    if not (sign and group and what):
        raise UsageError(f"{text!r} is no rule; write it like GROUP=NAME.")
    return group, what


def _role(name: str, roles: type[UserRole]) -> UserRole:
    try:
        return roles(name)
    except ValueError:
        raise UsageError(f"There is no role {name!r}; there are {', '.join(roles)}.") from None


def _token(given: str | None, file: Path | None) -> str | None:
    """The token, or the one in a file."""
    if file is None:
        return given
    if given is not None:
        raise UsageError("Give either --token (FLAME_TOKEN) or --token-file.")
    try:
        read = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The file with the token, {file}, cannot be read: {error}.") from error
    if len(read) < 16:
        raise UsageError(f"The token in {file} is too short: it needs 16 characters at least.")
    return read
