"""What a job would run on the machine of a participant, shown to its owner; and the owner's word on it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import click

from flame.cli import output
from flame.client.participant import Participant
from flame.errors import FlameError, SpecError, UsageError
from flame.spec import bundle
from flame.spec.records import Invitation


class Review:
    """A job that somebody is invited to, with its code.

    :param server: where it is.
    :param invitation: what the server says of it.
    :param data: the bundle with its code; its digest has been checked.
    """

    def __init__(self, server: str, invitation: Invitation, data: bytes) -> None:
        self.server = server
        self.invitation = invitation
        self._data = data

    def files(self) -> list[dict[str, Any]]:
        """The files of the roles that participants can have: path, size and digest of each."""
        return [
            {"path": "/".join(path), "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for path, content in sorted(bundle.contents(self._data, "the job's code").items())
            if path[0] in self.invitation.roles
        ]

    def show(self, how: str) -> None:
        """Print it."""
        about, files = self.invitation, self.files()
        document = {
            "server": self.server,
            "job": about.job_id,
            "name": about.name,
            "state": about.state.value,
            "reason": about.reason,
            "roles": about.roles,
            "realm": about.realm,
            "digest": about.code,
            "dependencies": about.dependencies,
            "backends": about.backends,
            "free": about.free,
            "files": files,
        }

        def table() -> None:
            output.facts(
                [
                    ("server", self.server),
                    ("job", f"{about.name} ({about.job_id})"),
                    ("state", f"{about.state.value}{f': {about.reason}' if about.reason else ''}"),
                    ("role", ", ".join(about.roles)),
                    ("realm", about.realm),
                    ("places", f"{about.free} free"),
                    ("backends", ", ".join(about.backends)),
                    ("needs", ", ".join(about.dependencies) or "nothing but Flame"),
                    ("digest", about.code),
                ]
            )
            output.table(
                ("FILE", "BYTES", "SHA-256"),
                [(one["path"], one["size"], one["sha256"]) for one in files],
                right=[1],
            )

        output.show(document, how, table)

    def unpack(self, into: Path) -> None:
        """Lay the roles' code out in a folder, to be read."""
        try:
            into.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{into} cannot be made: {error.strerror}.") from error
        for role in self.invitation.roles:
            folder = bundle.extract(self._data, role, into, "the job's code")
            output.note(f"The code of {role} is in {folder}.")

    def agree(self, accepted: str | None) -> None:
        """Have the owner's word, or refuse.

        :param accepted: the digest that the owner has agreed to beforehand; None asks, where there is somebody to ask.
        :raises flame.errors.UsageError: the owner does not agree, or cannot be asked.
        """
        digest = self.invitation.code
        if accepted is not None:
            if accepted.strip().lower().removeprefix("sha256:") != digest:
                raise UsageError(f"The code's digest is {digest}, not {accepted}; nothing was run.")
            return
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(
                f"Look at the job's code first (--inspect, with --unpack DIR), then agree to it: --accept-digest {digest}"
            )
        self.show("table")
        if not click.confirm("Run this code on this machine?", err=True):
            raise UsageError("Nothing was run.")

    def check_dependencies(self) -> None:
        """Refuse to begin where the code cannot run: what is installed here is for the owner to decide.

        :raises flame.errors.FlameError: something is not installed.
        """
        from packaging.requirements import InvalidRequirement, Requirement

        absent = []
        for text in self.invitation.dependencies:
            try:
                needed = Requirement(text)
                if needed.marker is not None and not needed.marker.evaluate():
                    continue
                there = importlib.metadata.version(needed.name)
                if not needed.specifier.contains(there, prereleases=True):
                    absent.append(f"{text} (there is {there})")
            except InvalidRequirement as error:
                raise SpecError(f"The dependency {text!r} is none that pip would take: {error}.") from error
            except importlib.metadata.PackageNotFoundError:
                absent.append(text)
        if absent:
            raise FlameError(
                f"The job's code needs what is not installed for {sys.executable}: {', '.join(absent)}. "
                "Install it with pip and come again."
            )


async def review(me: Participant) -> Review:
    """Fetch what there is to look at.

    :raises flame.errors.SpecError: the code is not what the server says it is.
    """
    invitation = await me.invitation()
    data = await me.code()
    digest = bundle.digest(data)
    if digest != invitation.code:
        raise SpecError(f"The code's digest is {digest}, the server says {invitation.code}; nothing was run.")
    bundle.folders(data, "the job's code")  # no entry of it leaves its folder
    return Review(me.server, invitation, data)
