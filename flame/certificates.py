"""Certificates: an authority of one's own, and what it vouches for.

For trials and closed deployments, where nobody outside has to know the authority (``flame cert``), and for the workers
of a job, who show each other certificates of an authority that exists for their job alone.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flame.errors import MissingExtra, SpecError

if TYPE_CHECKING:
    from cryptography import x509

#: Clocks of machines differ; a certificate is good from so long before it was made.
_SLACK = datetime.timedelta(days=1)
_FOREVER = 36_500


class Pair(NamedTuple):
    """A certificate and its private key, as PEM."""

    certificate: str
    key: str


class _Library(NamedTuple):
    x509: Any
    hashes: Any
    serialization: Any
    ec: Any
    ed25519: Any


def _library() -> _Library:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    except ImportError as error:
        raise MissingExtra("cryptography", "tls", "Making certificates") from error
    return _Library(x509, hashes, serialization, ec, ed25519)


def make_authority(name: str, days: float) -> Pair:
    """A new authority.

    :param name: what it is called.
    :param days: how long it is good for.
    :raises flame.errors.MissingExtra: the library for it is not installed.
    """
    lib = _library()
    key = lib.ec.generate_private_key(lib.ec.SECP256R1())
    return _sign(lib, _Wanted(name, days, authority=True), key, key, None)


def make_certificate(authority: Pair, name: str, days: float, *, hosts: Sequence[str] = (), server: bool) -> Pair:
    """A new certificate.

    :param authority: who vouches for it.
    :param name: whose it is.
    :param hosts: names and addresses at which a server is reached.
    :param server: a server shows it; else who calls one does.
    :raises flame.errors.SpecError: the authority is none.
    :raises flame.errors.MissingExtra: the library for it is not installed.
    """
    lib = _library()
    try:
        issuer = lib.x509.load_pem_x509_certificate(authority.certificate.encode())
        signer = lib.serialization.load_pem_private_key(authority.key.encode(), None)
    except (ValueError, TypeError) as error:
        raise SpecError(f"this is no authority's certificate and key: {error}.") from error
    key = lib.ec.generate_private_key(lib.ec.SECP256R1())
    return _sign(lib, _Wanted(name, days, hosts=tuple(hosts), server=server), key, signer, issuer)


class JobAuthority:
    """The authority of one job: who shows a certificate of it is a worker of this job.

    It is not kept anywhere: its key follows from the server's secret, so a server that was started again is the same authority.

    :param seed: a secret that belongs to the job.
    :param job: the job's id.
    :param since: when the job was made, in seconds since the epoch.
    """

    def __init__(self, seed: bytes, job: str, since: float) -> None:
        self._lib = lib = _library()
        self._key = lib.ed25519.Ed25519PrivateKey.from_private_bytes(
            hmac.digest(seed, b"job authority", hashlib.sha256)
        )
        start = datetime.datetime.fromtimestamp(int(since), datetime.UTC)
        wanted = _Wanted(f"flame job {job}", _FOREVER, authority=True, start=start, serial=1)
        self._pair = _sign(lib, wanted, self._key, self._key, None)
        self._issuer = lib.x509.load_pem_x509_certificate(self._pair.certificate.encode())

    @property
    def certificate(self) -> str:
        """The authority's own certificate, as PEM."""
        return self._pair.certificate

    def issue(self, worker: str, days: float = 30.0) -> Pair:
        """A certificate for one attempt of a task."""
        key = self._lib.ed25519.Ed25519PrivateKey.generate()
        return _sign(self._lib, _Wanted(worker, days), key, self._key, self._issuer)


class _Wanted(NamedTuple):
    name: str
    days: float
    authority: bool = False
    server: bool | None = None
    hosts: tuple[str, ...] = ()
    start: datetime.datetime | None = None
    serial: int | None = None


def _sign(lib: _Library, wanted: _Wanted, key: Any, signer: Any, issuer: x509.Certificate | None) -> Pair:
    x509 = lib.x509
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, wanted.name[:64])])
    start = wanted.start or datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer is not None else subject)
        .public_key(key.public_key())
        .serial_number(wanted.serial or x509.random_serial_number())
        .not_valid_before(start - _SLACK)
        .not_valid_after(start + datetime.timedelta(days=wanted.days))
        .add_extension(x509.BasicConstraints(ca=wanted.authority, path_length=0 if wanted.authority else None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
        .add_extension(_usage(x509, wanted.authority), True)
    )
    if not wanted.authority:
        usages = {True: ["SERVER_AUTH"], False: ["CLIENT_AUTH"], None: ["SERVER_AUTH", "CLIENT_AUTH"]}[wanted.server]
        kinds = [getattr(x509.ExtendedKeyUsageOID, usage) for usage in usages]
        builder = builder.add_extension(x509.ExtendedKeyUsage(kinds), False)
    if wanted.hosts:
        names = [_host(x509, host) for host in wanted.hosts]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    algorithm = None if isinstance(signer, lib.ed25519.Ed25519PrivateKey) else lib.hashes.SHA256()
    certificate = builder.sign(signer, algorithm)
    form = lib.serialization
    plain = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    return Pair(certificate.public_bytes(form.Encoding.PEM).decode(), plain.decode())


def _usage(x509: Any, authority: bool) -> Any:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
