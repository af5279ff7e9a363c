"""``flame join``: take part in somebody's job, with a worker and data of one's own.

Nothing runs before the owner of this machine has agreed to the code, by its digest. From then on the worker is an
ordinary one, a flamelet as a child of this command, and needs outgoing connections alone. It leaves when this command
does, and comes back when this command is run again in the same folder: there it keeps the secret by which it is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flame.cli.app import CONTEXT, FAILED, INTERRUPTED, examples, output_option
from flame.errors import Conflict, UsageError

if TYPE_CHECKING:
    from flame.cli.code_review import Review
    from flame.client.participant import Participant
    from flame.spec.records import Seat

#: Variables that name certificates and keys: towards the server, and between workers.
_FILES = tuple(
    f"FLAME_{name}" for name in ("CA", "TLS_CERT", "TLS_KEY", "P2P_TLS_CERT", "P2P_TLS_KEY", "P2P_TLS_CA", "MQTT_CA")
)
#: Seconds between two tries after the worker was lost; doubled each time, up to the second.
_PAUSES = (0.5, 30.0)


@click.command(
    context_settings=CONTEXT,
    epilog=examples(
        "flame join --server https://flame.example.org --token TOKEN --inspect",
        "flame join --server https://flame.example.org --token TOKEN --dataset data/train.npz --accept-digest SHA256",
    ),
)
@click.option("--server", metavar="URL", help="The server's address. Else FLAME_SERVER, else the configured one.")
@click.option(
    "--ca",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The authority that vouches for the server, where the system does not know it; else FLAME_CA.",
)
@click.option("--token", envvar="FLAME_INVITE", required=True, help="The invite's token; else FLAME_INVITE.")
@click.option("--dataset", metavar="URL", help="Your data: a path or an URL. Only your own worker learns of it.")
@click.option("--realm", help="Where your data lie, such as us/west; chooses the place in the job.")
@click.option("--name", help="What to call yourself in the job; else this machine's name.")
@click.option(
    "--work-dir", type=click.Path(file_okay=False, path_type=Path), help="Where the code runs; else ~/.flame/join/JOB."
)
@click.option("--inspect", is_flag=True, help="Say what the job would run here, and do nothing.")
@click.option(
    "--unpack", type=click.Path(path_type=Path), metavar="DIR", help="With --inspect: unpack the code, to read it."
)
@click.option("--accept-digest", metavar="SHA256", help="Run the code if its digest is this one; do not ask.")
@output_option
def join(  # noqa: PLR0917
    server: str | None,
    ca: Path | None,
    token: str,
    dataset: str | None,
    realm: str | None,
    name: str | None,
    work_dir: Path | None,
    inspect: bool,
    unpack: Path | None,
    accept_digest: str | None,
    how: str,
) -> int:
    """Take part in a job with your own machine and data, by an invite (`flame job invite`).

    Ctrl-C leaves the job; the same command takes part again."""
    from flame.cli.code_review import review
    from flame.client import config, local

    settings = config.resolve(server)
    url = settings.server or local.running(config.data_dir()) or config.DEFAULT_SERVER
    if trusted := str(ca or "") or os.environ.get("FLAME_CA") or settings.ca:
        os.environ["FLAME_CA"] = trusted
    for variable in _FILES:  # for the worker too, which runs in another folder
        if (given := os.environ.get(variable)) and not given.startswith("-----BEGIN "):
            os.environ[variable] = str(Path(given).expanduser().absolute())

    async def look() -> Review:
        from flame.client.participant import Participant

        async with Participant(url, token) as me:
            return await review(me)

    found = asyncio.run(look())
    if inspect:
        found.show(how)
        if unpack is not None:
            found.unpack(unpack)
        return 0
    found.agree(accept_digest)
    found.check_dependencies()
    part = Part(url, token, found, name or socket.gethostname(), realm, _located(dataset), work_dir)
    return asyncio.run(part.go())


class Part:
    """One participant's part in a job.

    :param found: the job, whose code the owner has agreed to.
    :param name: what the participant is called.
    :param dataset: its data, which the server is not told of.
    """

    def __init__(  # noqa: PLR0917
        self,
        server: str,
        token: str,
        found: Review,
        name: str,
        realm: str | None,
        dataset: str | None,
        work_dir: Path | None,
    ) -> None:
        self._server = server
        self._token = token
        self._found = found
        self._name = name
        self._realm = realm
        self._dataset = dataset
        self._folder = (work_dir or Path.home() / ".flame" / "join" / found.invitation.job_id).absolute()
        self._leaving = asyncio.Event()

    async def go(self) -> int:
        """Take part until the job ends or the owner wants to leave; gives the command's exit status."""
        from flame.client.participant import Participant

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._leave)
        with _held(self._folder):
            async with Participant(self._server, self._token) as me:
                working = asyncio.ensure_future(self._take_part(me))
                leaving = asyncio.ensure_future(self._leaving.wait())
                await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    working.cancel()
                    await asyncio.wait([working])
                leaving.cancel()
                if not working.cancelled():
                    return working.result()
        _say("You have left; the same command takes part again.")
        return INTERRUPTED

    def _leave(self) -> None:
        """The first signal leaves in order; after a second one the worker does so by itself, for its leash is cut."""
        if self._leaving.is_set():
            os._exit(INTERRUPTED)
        _say("Leaving the job; Ctrl-C again does not wait for it.")
        self._leaving.set()

    async def _take_part(self, me: Participant) -> int:
        pause = _PAUSES[0]
        while True:
            status = await self._await_begin(me)
            if status is not None:
                return status
            try:
                seat = await me.seat(_secret(self._folder), self._name, self._realm)
            except Conflict:
                if (await me.invitation()).state.ended:
                    continue  # between the two the job has ended: how, says the wait
                raise
            if seat.key is None:
                return await self._tell_end(me, seat)
            if seat.code != self._found.invitation.code:
                raise Conflict("The job's code has changed since you looked at it; look again.")
            _say(f"You are {seat.role}/{seat.index} of {self._found.invitation.name} (attempt {seat.attempt}).")
            if await self._work(seat, self._place(seat)) == 0:
                pause = _PAUSES[0]
                continue
            _say(f"The worker was lost; it takes part again in {pause:g} s.")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])

    async def _await_begin(self, me: Participant) -> int | None:
        """Wait until the job takes participants; gives the exit status if it has ended instead."""
        from flame.cli.running import Lost
        from flame.spec.records import JobState

        told = None
        async with aclosing(me.states(Lost(_say))) as states:
            async for state, reason in states:
                line = f"job {self._found.invitation.name}: {state.value}{f': {reason}' if reason else ''}"
                if line != told:
                    _say(line)
                    told = line
                if state in (JobState.DEPLOYING, JobState.RUNNING):
                    return None
                if state.ended:
                    return 0 if state is JobState.COMPLETED else FAILED
        return None

    async def _tell_end(self, me: Participant, seat: Seat) -> int:
        """The participant's own task has ended; the job's end follows."""
        from flame.spec.records import TaskState

        done = seat.state is TaskState.COMPLETED
        _say(f"Your part has {'completed' if done else f'ended: {seat.state.value}'}.")
        if done:
            shutil.rmtree(self._place(seat), ignore_errors=True)
        async with aclosing(me.states()) as states:
            async for state, _ in states:
                if state.ended:
                    _say(f"job {self._found.invitation.name}: {state.value}")
                    break
        return 0 if done else FAILED

    def _place(self, seat: Seat) -> Path:
        return self._folder / f"{seat.task}.{seat.attempt}"

    async def _work(self, seat: Seat, folder: Path) -> int:
        """Run the worker to its end; cancelled, it leaves the job in order. Gives its exit status."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = ("FLAME_P2P_", "FLAME_MQTT_", "FLAME_TLS_", "FLAME_CA", "FLAME_CERT", "FLAME_CACHE_")
        environment = {n: value for n, value in os.environ.items() if not n.startswith("FLAME_") or n.startswith(kept)}
        assert seat.key is not None
        environment |= {
            "FLAME_SERVER": self._server,
            "FLAME_TASK": seat.task,
            "FLAME_TASK_KEY": seat.key,
            "FLAME_ATTEMPT": str(seat.attempt),
            "FLAME_WORK_DIR": str(folder),
            "FLAME_ACCEPT": seat.code,
            "FLAME_LEASH": "true",
            **({"FLAME_DATASET": self._dataset} if self._dataset is not None else {}),
            **({"FLAME_REALM": self._realm} if self._realm is not None else {}),
        }
        # A group of its own: a Ctrl-C is for this command, which then pulls the leash.
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "flame.flamelet"),
            cwd=folder,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert worker.stdin is not None
        try:
            return await worker.wait()
        finally:
            worker.stdin.close()
            await worker.wait()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One participant a folder: two would be one and the same to the server, and fence each other off."""
    import fcntl

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be used: {error.strerror}. Choose another --work-dir.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"Another `flame join` works in {folder}; give this one another --work-dir.") from None
        yield


def _secret(folder: Path) -> str:
    """By what the server knows this participant again: made once, kept in its folder."""
    path = folder / "participant"
    try:
        if not path.exists():
            partial = folder / "participant.new"
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(32))
            partial.replace(path)
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read or made ({error}); choose another --work-dir.") from error


def _located(dataset: str | None) -> str | None:
    """A path made absolute, since the code runs in another folder; an URL as it is."""
    if dataset is None or "://" in dataset:
        return dataset
    path = Path(dataset).expanduser().absolute()
    if not path.exists():
        raise UsageError(f"There is no dataset {dataset!r}; give a path that exists, or an URL.")
    return str(path)


def _say(text: str) -> None:
    click.echo(text, err=True)
