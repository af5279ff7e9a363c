"""What an operator says of a Docker engine and of the containers that it runs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from flame.errors import SpecError
from flame.runners.docker_engine import Tls
from flame.runners.secret import Secret
from flame.spec.quantities import parse_bytes

Variable = Annotated[str, msgspec.Meta(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
Amount = str | Annotated[int, msgspec.Meta(ge=1)]


class Credentials(msgspec.Struct, kw_only=True, frozen=True, rename="camel", forbid_unknown_fields=True):
    """What a registry of images wants to know."""

    username: str
    password: Secret
    registry: str = ""


class DockerConfig(msgspec.Struct, kw_only=True, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Configuration of the kind ``docker``.

    :ivar image: what workers run in: the project's own image, or one that is based on it.
    :ivar host: the engine, ``unix:///PATH`` or ``tcp://HOST:PORT``; empty: what ``DOCKER_HOST`` says, else this host's own.
    :ivar tls: certificates, for an engine behind ``tcp``.
    :ivar network: the network in which the workers find each other and the server: the name of one, ``bridge`` or ``host``.
    :ivar volumes: what of the engine's host they see, such as ``/data:/data:ro``.
    :ivar pull_policy: ``missing`` pulls an image that is not there, ``always`` looks for a newer one, ``never`` pulls none.
    :ivar credentials: for the registry that images are pulled from.
    :ivar cpu: most cores of a worker whose job says nothing; likewise memory (such as ``512Mi``) and gpu.
    :ivar shared_memory: size of ``/dev/shm``, which data loaders use.
    :ivar processes: most processes and threads of a worker.
    :ivar environment: variables for every worker.
    :ivar secrets: the same, for what nobody may read.
    :ivar user: as whom they run; empty: as the image says.
    :ivar python: the image's interpreter, with Flame installed.
    :ivar capabilities: of Linux; a worker has none but these.
    :ivar labels: for the containers, beside Flame's own.
    """

    image: str
    host: str = ""
    tls: Tls | None = None
    network: str = "bridge"
    volumes: list[str] = msgspec.field(default_factory=list)
    pull_policy: Literal["missing", "always", "never"] = "missing"
    credentials: Credentials | None = None
    cpu: Annotated[float, msgspec.Meta(gt=0)] | None = None
    memory: Amount | None = None
    gpu: Annotated[int, msgspec.Meta(ge=0)] = 0
    shared_memory: Amount | None = None
    processes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    environment: dict[Variable, str] = msgspec.field(default_factory=dict)
    secrets: dict[Variable, Secret] = msgspec.field(default_factory=dict)
    user: str = ""
    python: str = "python"
    capabilities: list[str] = msgspec.field(default_factory=list)
    labels: dict[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no engine would take, when the compute is registered and not when its first worker starts.

        :raises ValueError: with the field (msgspec makes a ValidationError of it).
        """
        if not self.image:
            raise ValueError("`image` is empty; it names the image that workers run in")
        if self.tls is not None and not self.host.startswith("tcp://"):
            raise ValueError("`tls` is for an engine whose `host` is tcp://HOST:PORT")
        for volume in self.volumes:
            if volume.count(":") not in (1, 2) or not volume.split(":")[1].startswith("/"):
                raise ValueError(f"`volumes` has {volume!r}; write SOURCE:/PATH or SOURCE:/PATH:ro")
        for name, amount in (("memory", self.memory), ("sharedMemory", self.shared_memory)):
            try:
                _ = amount is None or parse_bytes(amount)
            except SpecError as error:
                raise ValueError(f"`{name}`: {error.message}") from error
