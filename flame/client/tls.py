"""TLS towards a server: whom to trust, and what to show.

Each of the three is a path or the PEM text itself: a runner hands a worker what it needs in its environment, where there may be no
file to name.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flame.errors import UsageError

_PEM = "-----BEGIN "


class Tls(NamedTuple):
    """What an operator has set.

    :ivar ca: certificates of the authorities that are trusted; None: those of the system.
    :ivar cert: the certificate to show, for servers that ask for one.
    :ivar key: its private key; None: it is beside the certificate.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    @classmethod
    def read(cls, ca: str | None = None) -> Tls:
        """From ``FLAME_CA``, ``FLAME_TLS_CERT`` and ``FLAME_TLS_KEY``; ``ca`` where the first is not set."""
        return cls(os.environ.get("FLAME_CA") or ca, os.environ.get("FLAME_TLS_CERT"), os.environ.get("FLAME_TLS_KEY"))

    def context(self) -> ssl.SSLContext:
        """What connections are made with: the server is always verified, by name too.

        :raises flame.errors.UsageError: a file cannot be read, or is not what it should be.
        """
        try:
            if self.ca is None:
                context = ssl.create_default_context()
            elif self.ca.startswith(_PEM):
                context = ssl.create_default_context(cadata=self.ca)
            else:
                context = ssl.create_default_context(cafile=Path(self.ca).expanduser())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The certificates to trust (FLAME_CA, {_named(self.ca)}) cannot be used: {error}."
            ) from error
        context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)  # on some systems it speaks all
        if self.cert:
            try:
                with _file(self.cert) as cert, _file(self.key) as key:
                    context.load_cert_chain(cert, key or None)
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"The certificate to show (FLAME_TLS_CERT, {_named(self.cert)}; FLAME_TLS_KEY) cannot be used: {error}."
                ) from error
        return context


@contextlib.contextmanager
def _file(given: str | None) -> Iterator[str]:
    """A path for what OpenSSL reads from files alone; readable by this user, and gone afterwards."""
    if given is None or not given.startswith(_PEM):
        yield str(Path(given).expanduser()) if given else ""
        return
    with tempfile.NamedTemporaryFile("w", prefix="flame-") as file:
        file.write(given)
        file.flush()
        yield file.name


def _named(given: str | None) -> str:
    return "given as text" if given and given.startswith(_PEM) else str(given or "the system's")
