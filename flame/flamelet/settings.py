"""What a runner says to a flamelet, in the environment."""

from __future__ import annotations

import msgspec

from flame.errors import UsageError


class Settings(msgspec.Struct, kw_only=True, frozen=True, rename=lambda name: f"FLAME_{name.upper()}"):
    """The environment of a flamelet: ``FLAME_SERVER``, ``FLAME_TASK`` and so on.

    :ivar task_key: the secret of this attempt of the task.
    :ivar work_dir: where the role's code is laid out and run.
    :ivar stop_grace: seconds that a child has to end when it is asked to.
    :ivar orphan_after: seconds without a word from the server after which the worker ends.
    :ivar accept: the SHA-256 of the code that the owner of this machine has agreed to; no other is run. None: any.
    :ivar dataset: a participant's own data, which the server need not know; takes the place of the task's.
    :ivar realm: likewise where they lie.
    :ivar leash: the worker ends when its standard input does: it belongs to the process that holds the other end.
    """

    server: str
    task: str
    task_key: str
    attempt: int
    work_dir: str
    stop_grace: float = 5.0
    orphan_after: float = 3600.0
    accept: str | None = None
    dataset: str | None = None
    realm: str | None = None
    leash: bool = False

    @classmethod
    def read(cls, environment: dict[str, str]) -> Settings:
        """Read the variables.

        :raises flame.errors.UsageError: one is missing, or says something that cannot be.
        """
        try:
            return msgspec.convert(environment, cls, strict=False)
        except msgspec.ValidationError as error:
            raise UsageError(f"The flamelet's environment is wrong ({error}); it is a runner that sets it.") from error
