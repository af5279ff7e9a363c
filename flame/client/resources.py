"""What a server has, one class a noun: each method is one request of the REST API, with typed arguments and answers.

Every method raises :class:`flame.errors.FlameError`: what the server refused, or
:class:`~flame.errors.ServerUnreachable`. Lists are read page by page until their end.
"""

from __future__ import annotations

import hashlib
from typing import Any, Generic, TypeVar

import msgspec

from flame.client.http import Query, Session
from flame.errors import NotFound
from flame.spec.nouns import Compute, Dataset, Registry, Schema
from flame.spec.records import ComputeStatus, DatasetRecord, Design, Record

T = TypeVar("T")
_PAGE = 500


class Page(Record, Generic[T], kw_only=True):
    """One page of a list; ``next`` is where the following one begins."""

    items: list[T]
    next: str | None = None


class Code(Record, kw_only=True):
    """The digest of the bundle that holds a design's code."""

    code: str | None = None


async def pages(session: Session, path: str, of: type[T], **query: str | None) -> list[T]:
    """All items of a list.

    :param of: the items' type.
    """
    items: list[T] = []
    after: str | None = None
    while True:
        asked: Query = {**query, "after": after, "limit": _PAGE}
        page = await session.call("GET", path, query=asked, into=Page[of])  # type: ignore[valid-type]
        items += page.items
        after = page.next
        if after is None:
            return items


class Noun:
    """Requests about one kind of thing."""

    def __init__(self, session: Session) -> None:
        self._session = session


class Designs(Noun):
    """Named workflows: a schema and the code of its roles."""

    async def create(self, name: str, description: str = "") -> Design:
        """Register a design; its schema and code follow."""
        body = {"name": name, "description": description}
        return await self._session.call(
            "POST", "/v1/designs", query={"project": self._session.project}, body=body, into=Design
        )

    async def list(self) -> list[Design]:
        """All designs."""
        return await pages(self._session, "/v1/designs", Design)

    async def get(self, id: str) -> Design:
        """One design."""
        return await self._session.call("GET", f"/v1/designs/{id}", into=Design)

    async def update(self, id: str, *, name: str, description: str = "") -> Design:
        """Change name and description."""
        body = {"name": name, "description": description}
        return await self._session.call("PUT", f"/v1/designs/{id}", body=body, into=Design)

    async def delete(self, id: str) -> None:
        """Remove a design."""
        await self._session.call("DELETE", f"/v1/designs/{id}")


class Schemas(Noun):
    """The schema of each design."""

    async def put(self, design: str, schema: Schema) -> None:
        """Give a design its schema, or another one."""
        await self._session.call("PUT", f"/v1/designs/{design}/schema", body=schema)

    async def get(self, design: str) -> Schema:
        """A design's schema."""
        return await self._session.call("GET", f"/v1/designs/{design}/schema", into=Schema)

    async def delete(self, design: str) -> None:
        """Take a design's schema away."""
        await self._session.call("DELETE", f"/v1/designs/{design}/schema")


class Codes(Noun):
    """The code of each design, and the bundles in which it lies."""

    async def upload(self, bundle: bytes) -> str:
        """Bring a bundle (zip) to the server, unless it has it; gives its digest."""
        digest = hashlib.sha256(bundle).hexdigest()
        try:
            await self._session.call("HEAD", f"/v1/bundles/{digest}")
        except NotFound:
            await self._session.call("PUT", f"/v1/bundles/{digest}", data=bundle)
        return digest

    async def put(self, design: str, bundle: bytes) -> str:
        """Give a design its code (a zip with one top-level folder a role); gives the digest."""
        digest = await self.upload(bundle)
        await self._session.call("PUT", f"/v1/designs/{design}/code", body=Code(code=digest))
        return digest

    async def get(self, design: str) -> bytes:
        """A design's code (zip).

        :raises flame.errors.NotFound: the design has none.
        """
        kept = await self._session.call("GET", f"/v1/designs/{design}/code", into=Code)
        if kept.code is None:
            raise NotFound(f"The design {design} has no code.")
        return await self._session.call("GET", f"/v1/bundles/{kept.code}", into=bytes)

    async def delete(self, design: str) -> None:
        """Take a design's code away."""
        await self._session.call("DELETE", f"/v1/designs/{design}/code")


class Datasets(Noun):
    """Data registered by URL and realm."""

    async def create(self, dataset: Dataset) -> DatasetRecord:
        """Register a dataset."""
        return await self._session.call(
            "POST", "/v1/datasets", query={"project": self._session.project}, body=dataset, into=DatasetRecord
        )

    async def list(self) -> list[DatasetRecord]:
        """All datasets."""
        return await pages(self._session, "/v1/datasets", DatasetRecord)

    async def get(self, id: str) -> DatasetRecord:
        """One dataset."""
        return await self._session.call("GET", f"/v1/datasets/{id}", into=DatasetRecord)

    async def update(self, id: str, dataset: Dataset) -> DatasetRecord:
        """Change a dataset."""
        return await self._session.call("PUT", f"/v1/datasets/{id}", body=dataset, into=DatasetRecord)

    async def delete(self, id: str) -> None:
        """Remove a dataset."""
        await self._session.call("DELETE", f"/v1/datasets/{id}")


class Computes(Noun):
    """Places that run workers."""

    async def create(self, compute: Compute) -> ComputeStatus:
        """Register a compute. One that cannot be reached says so in ``problem``, and is tried again."""
        return await self._session.call("POST", "/v1/computes", body=compute, into=ComputeStatus)

    async def list(self) -> list[ComputeStatus]:
        """All computes."""
        return await pages(self._session, "/v1/computes", ComputeStatus)

    async def get(self, id: str) -> ComputeStatus:
        """One compute."""
        return await self._session.call("GET", f"/v1/computes/{id}", into=ComputeStatus)

    async def update(self, id: str, compute: Compute) -> ComputeStatus:
        """Change a compute. Secrets in its configuration that are ``***`` stay what they are."""
        return await self._session.call("PUT", f"/v1/computes/{id}", body=compute, into=ComputeStatus)

    async def drain(self, id: str, *, undo: bool = False) -> ComputeStatus:
        """Give a compute no new workers, or again."""
        how = "undrain" if undo else "drain"
        return await self._session.call("POST", f"/v1/computes/{id}/{how}", into=ComputeStatus)

    async def delete(self, id: str) -> None:
        """Remove a compute that has no workers."""
        await self._session.call("DELETE", f"/v1/computes/{id}")


class ServerInfo(Record, kw_only=True):
    """What a server says of itself."""

    version: str
    id: str = ""
    computes: list[dict[str, Any]] = msgspec.field(default_factory=list)
    registry: Registry = msgspec.field(default_factory=Registry)
    data_dir: str = ""
