"""TLS of the server: what it shows, whom it asks for a certificate, and what the workers that it starts need for it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from flame.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """What an operator has set. All are PEM files.

    :ivar cert: the server's certificate, with those of authorities between it and the trusted one.
    :ivar key: its private key; None: it is in the file of the certificate.
    :ivar ca: the authority that vouches for it, where workers would not know it: they are told.
    :ivar client_ca: workers must show a certificate of this authority, besides their task's key.
    :ivar worker_cert: the certificate that workers show which the server starts; others bring their own.
    :ivar worker_key: its private key.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    client_ca: Path | None = None
    worker_cert: Path | None = None
    worker_key: Path | None = None

    @property
    def on(self) -> bool:
        """Whether the server speaks TLS."""
        return self.cert is not None

    def context(self) -> ssl.SSLContext | None:
        """For the listening socket; None without TLS.

        :raises flame.errors.UsageError: a file cannot be read or is not what it should be, or one is missing.
        """
        if self.cert is None:
            if any((self.key, self.ca, self.client_ca, self.worker_cert)):
                raise UsageError("TLS needs the server's certificate: give --tls-cert, too.")
            return None
        if self.client_ca is not None and not (self.worker_cert and self.worker_key):
            raise UsageError(
                "With --tls-client-ca the workers that the server starts must show a certificate, too: "
                "give --tls-worker-cert and --tls-worker-key (`flame cert client` makes them)."
            )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)  # on some systems it speaks all
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ValueError) as error:
            raise UsageError(f"The server's certificate {self.cert} or its key cannot be used: {error}.") from error
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ValueError) as error:
                raise UsageError(f"The workers' authority {self.client_ca} cannot be used: {error}.") from error
            # Asked for, and good if shown. That workers do show one is checked with their requests: users have tokens.
            context.verify_mode = ssl.CERT_OPTIONAL
        return context

    def for_workers(self) -> dict[str, str]:
        """Variables for the workers that the server starts: the PEM texts themselves, as they may have no file of it.

        :raises flame.errors.UsageError: a file cannot be read.
        """
        given = {"FLAME_CA": self.ca, "FLAME_TLS_CERT": self.worker_cert, "FLAME_TLS_KEY": self.worker_key}
        try:
            return {name: path.read_text("ascii") for name, path in given.items() if path is not None}
        except (OSError, ValueError) as error:
            raise UsageError(f"A certificate for workers cannot be read: {error}.") from error
