"""The keys that workers hold, derived from one secret, so that a restarted server knows them again.

A task's key opens that task's part of the API, for one attempt. A job's key is shared by the job's workers, who
know each other by it. Neither can be had from the other. Both are HMACs, which nobody without the secret can make.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from flame.errors import StoreError


class Keys:
    """Makes and checks keys.

    :param secret: at least 16 random bytes.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Read the secret from a file, or make it (mode 0600).

        :raises flame.errors.StoreError: the file cannot be read or written, or is too short.
        """
        try:
            if not path.exists():
                write_whole(path, secrets.token_bytes(32))
            secret = path.read_bytes()
        except OSError as error:
            raise StoreError(f"The server's secret {path} cannot be read or made: {error.strerror}.") from error
        if len(secret) < 16:
            raise StoreError(f"The server's secret {path} is damaged: remove it, and start again jobs that run.")
        return cls(secret)

    def task(self, task: str, attempt: int) -> str:
        """The key of one attempt of a task, in hex."""
        return self._hmac(f"task:{task}.{attempt}")

    def opens(self, key: str, task: str, attempt: int) -> bool:
        """Whether ``key`` is the key of this attempt; takes the same time whatever the key."""
        return hmac.compare_digest(key.encode(errors="replace"), self.task(task, attempt).encode())

    def job(self, job: str) -> str:
        """The key that the workers of a job share, in hex."""
        return self._hmac(f"job:{job}")

    def _hmac(self, purpose: str) -> str:
        return hmac.new(self._secret, purpose.encode(), hashlib.sha256).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file of the data directory that only its owner may read (mode 0600), whole or not at all.

    :raises OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.new")  # one process alone has the folder
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
