"""What is registered: designs, their schemas and code, and datasets.

A job keeps its own copy of the schema and the digest of its code, so a design may change or go while jobs run; it is
kept as long as unfinished jobs name it, because people look for what they started by its design.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Iterable, Mapping

import msgspec

from flame.controller.context import Context
from flame.controller.shelf import Saved
from flame.errors import Conflict, NotFound, SpecError
from flame.spec import bundle
from flame.spec.check import check_dataset, check_schema
from flame.spec.nouns import Dataset, JobForm, Schema
from flame.spec.people import DEFAULT_PROJECT
from flame.spec.records import DatasetRecord, Design, Job, JobState

_UNFINISHED = [state for state in JobState if not state.ended]


class Catalog:
    """Designs, code bundles and datasets.

    :param context: the controller's surroundings.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._names = asyncio.Lock()  # held while a design gets its name, which no other may have
        #: Held while something that refers to a bundle is written, and while unused bundles are removed.
        self.bundles = asyncio.Lock()

    # ----------------------------------------------------------------------------------------------- designs

    async def create_design(
        self, name: str, description: str = "", *, project: str = DEFAULT_PROJECT, owner: str = ""
    ) -> Design:
        """Register a design, without schema and code so far.

        :raises flame.errors.Conflict: there is one of that name in the project.
        """
        async with self._names:
            if await self._named(name, project):
                raise Conflict(f"There is a design named {name!r} already.")
            design = Design(id=secrets.token_hex(12), name=name, description=description, project=project, owner=owner)
            return await self._add_design(design)

    async def designs(self, name: str | None = None, after: str | None = None, limit: int = 100) -> list[Design]:
        """The designs in order of their ids; with ``name`` only the one that is called so."""
        where = {"name": name} if name is not None else None
        return [saved.record for saved in await self._context.designs.find(where, after=after, limit=limit)]

    async def design(self, id: str, project: str | None = None) -> Design:
        """A design.

        :param project: it must be of this project.
        """
        design = (await self._design(id)).record
        if project not in (None, design.project):
            raise NotFound(f"There is no design {id!r}.")
        return design

    async def update_design(self, id: str, name: str, description: str) -> Design:
        """Change a design's name and description.

        :raises flame.errors.Conflict: another one has the name.
        """
        async with self._names:
            saved = await self._design(id)
            if any(other.id != id for other in await self._named(name, saved.record.project)):
                raise Conflict(f"There is a design named {name!r} already.")
            return await self._change_design(saved, name=name, description=description)

    async def set_schema(self, id: str, schema: Schema | None) -> Design:
        """Give a design its schema, or take it away."""
        saved = await self._design(id)
        return await self._change_design(saved, schema=None if schema is None else check_schema(schema))

    async def set_code(self, id: str, digest: str | None) -> Design:
        """Give a design its code, by the digest of an uploaded bundle, or take it away."""
        saved = await self._design(id)
        before = saved.record.code
        async with self.bundles:
            if digest is not None:
                await self.folders(digest)
            design = await self._change_design(saved, code=digest)
        if before != digest:
            await self.release(before)
        return design

    async def delete_design(self, id: str) -> None:
        """Remove a design.

        :raises flame.errors.Conflict: unfinished jobs use it.
        """
        saved = await self._design(id)
        using = [job for job in await self._unfinished() if job.design_id == id]
        if using:
            raise Conflict(f"Design {saved.record.name!r} is used by {_jobs(using)}; stop or delete them first.")
        await self._context.designs.delete(id)
        await self.release(saved.record.code)

    async def design_for(self, form: JobForm, schema: Schema, code: str, project: str, owner: str) -> Design:
        """The design of a job that brings its own schema and code: one named after the job, found or made.

        One that earlier jobs of that name have made is brought up to date. One that somebody has registered under that
        name and that is different is left alone: the job's gets a name of its own.
        """
        description = "Registered on the way with a job of this name."
        async with self._names:
            for attempt in range(100):
                name = form.name if not attempt else f"{form.name} ({attempt + 1})"
                found = await self._named(name, project)
                if not found:
                    design = Design(
                        id=secrets.token_hex(12),
                        name=name,
                        description=description,
                        schema=schema,
                        code=code,
                        project=project,
                        owner=owner,
                    )
                    return await self._add_design(design)
                saved = found[0]
                if (saved.record.schema, saved.record.code) == (schema, code):
                    return saved.record
                if saved.record.description == description:
                    return await self._change_design(saved, schema=schema, code=code)
        raise Conflict(f"There are a hundred designs named {form.name!r} already; give the job another name.")

    async def _design(self, id: str) -> Saved[Design]:
        saved = await self._context.designs.get(id)
        if saved is None:
            raise NotFound(f"There is no design {id!r}.")
        return saved

    async def _named(self, name: str, project: str) -> list[Saved[Design]]:
        """The design of a name in a project: none or one. Designs of before there were projects say none in the store."""
        return [saved for saved in await self._context.designs.all({"name": name}) if saved.record.project == project]

    async def _add_design(self, design: Design) -> Design:
        design.created_at = design.updated_at = time.time()
        await self._context.designs.insert(design.id, design)
        return design

    async def _change_design(self, saved: Saved[Design], **fields: object) -> Design:
        changed = msgspec.structs.replace(saved.record, updated_at=time.time(), **fields)
        await self._context.designs.put(saved, changed)
        return changed

    # ----------------------------------------------------------------------------------------------- bundles

    async def put_bundle(self, digest: str, data: bytes) -> None:
        """Keep a code bundle.

        :raises flame.errors.SpecError: these bytes have another digest, or are no bundle.
        """
        actual = await asyncio.to_thread(bundle.digest, data)
        if actual != digest:
            raise SpecError(f"The uploaded bundle's SHA-256 is {actual}, not {digest}; it was damaged on its way.")
        await asyncio.to_thread(bundle.folders, data)
        await self._context.bundles.put(data)

    async def bundle(self, digest: str) -> bytes:
        """A code bundle's bytes."""
        data = await self._context.bundles.get(digest)
        if data is None:
            raise NotFound(f"There is no code bundle {digest}; upload it first.")
        return data

    async def folders(self, digest: str) -> dict[str, bool]:
        """The top-level folders of a bundle and whether each has a ``main.py``."""
        data = await self._context.bundles.get(digest)
        if data is None:
            raise SpecError(f"the code bundle {digest} is not there; upload it first.", "code")
        return bundle.folders(data, "the code")

    async def release(self, digest: str | None) -> None:
        """Remove a bundle that no design, job, application or session refers to any more."""
        if digest is None:
            return
        async with self.bundles:
            for collection in ("designs", "jobs", "apps", "sessions"):
                if await self._context.store.find(collection, where={"code": digest}, limit=1):
                    return
            await self._context.bundles.delete(digest)

    # ---------------------------------------------------------------------------------------------- datasets

    async def create_dataset(
        self, dataset: Dataset, *, project: str = DEFAULT_PROJECT, owner: str = ""
    ) -> DatasetRecord:
        """Register a dataset. The same one registered again is the same; it keeps its id.

        :raises flame.errors.Conflict: it names an id that another dataset has.
        :raises flame.errors.SpecError: something about it cannot be right.
        """
        check_dataset(dataset)
        if dataset.id in (".", ".."):
            raise SpecError(f"a dataset cannot have the id {dataset.id!r}: no address could name it.", "id")
        if dataset.id is None:
            return await self._register(dataset, project, owner)
        saved = await self._context.datasets.get(dataset.id)
        if saved is None:
            return await self._add_dataset(dataset.id, dataset, project, owner)
        if not _same(saved.record, dataset, project, owner):
            raise Conflict(f"The id {dataset.id!r} belongs to another dataset.")
        return saved.record

    async def datasets(self, after: str | None = None, limit: int = 100) -> list[DatasetRecord]:
        """The datasets in order of their ids."""
        return [saved.record for saved in await self._context.datasets.find(after=after, limit=limit)]

    async def dataset(self, id: str) -> DatasetRecord:
        """A dataset."""
        return (await self._dataset(id)).record

    async def update_dataset(self, id: str, dataset: Dataset) -> DatasetRecord:
        """Change a dataset; jobs that exist go on with what it was."""
        check_dataset(dataset)
        saved = await self._dataset(id)
        record = msgspec.structs.replace(saved.record, dataset=msgspec.structs.replace(dataset, id=id))
        await self._context.datasets.put(saved, record)
        return record

    async def delete_dataset(self, id: str) -> None:
        """Remove a dataset.

        :raises flame.errors.Conflict: unfinished jobs use it.
        """
        saved = await self._dataset(id)
        using = [job for job in await self._unfinished() if id in named_datasets(job.form)]
        if using:
            name = saved.record.dataset.name
            raise Conflict(f"Dataset {name!r} ({id}) is used by {_jobs(using)}; stop or delete them first.")
        await self._context.datasets.delete(id)

    async def registered(self, form: JobForm, project: str) -> dict[str, DatasetRecord]:
        """Those of the registered datasets that a job names and its project may use, by id."""
        brought = {dataset.id for dataset in form.datasets}
        found: dict[str, DatasetRecord] = {}
        for named in named_datasets(form) - brought:
            saved = await self._context.datasets.get(named)
            if saved is not None and (saved.record.project == project or saved.record.dataset.is_public):
                found[named] = saved.record
        return found

    async def register_all(self, datasets: Iterable[Dataset], project: str, owner: str) -> Mapping[str, DatasetRecord]:
        """Register what a job brings: from the ids that its files use to what is registered."""
        given: dict[str, DatasetRecord] = {}
        for dataset in datasets:
            if dataset.id is not None:
                given[dataset.id] = await self._register(dataset, project, owner)
        return given

    async def _register(self, dataset: Dataset, project: str, owner: str) -> DatasetRecord:
        """Found by content, or made, under an id that is made of the content."""
        for attempt in range(100):
            derived = hashlib.sha256(f"dataset {attempt} ".encode() + _content(dataset)).hexdigest()[:24]
            saved = await self._context.datasets.get(derived)
            if saved is None:
                try:
                    return await self._add_dataset(derived, dataset, project, owner)
                except Conflict:  # another request has just registered the same
                    saved = await self._context.datasets.get(derived)
            if saved is not None and _same(saved.record, dataset, project, owner):
                return saved.record
        raise Conflict(f"Dataset {dataset.name!r} cannot be registered: too many like it have been changed since.")

    async def _add_dataset(self, id: str, dataset: Dataset, project: str, owner: str) -> DatasetRecord:
        record = DatasetRecord(
            id=id,
            dataset=msgspec.structs.replace(dataset, id=id),
            created_at=time.time(),
            project=project,
            owner=owner,
        )
        await self._context.datasets.insert(id, record)
        return record

    async def _dataset(self, id: str) -> Saved[DatasetRecord]:
        saved = await self._context.datasets.get(id)
        if saved is None:
            raise NotFound(f"There is no dataset {id!r}.")
        return saved

    async def _unfinished(self) -> list[Job]:
        return [saved.record for state in _UNFINISHED for saved in await self._context.jobs.all({"state": state.value})]


def named_datasets(form: JobForm) -> set[str]:
    """The ids that a job's dataSpec refers to."""
    return {named for entry in form.data_spec for group in entry.dataset_groups.values() for named in group}


def _content(dataset: Dataset) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(dataset, id=None), order="deterministic")


def _same(record: DatasetRecord, dataset: Dataset, project: str, owner: str) -> bool:
    """Whether this very dataset was registered, in the project and by the same one: else it would change hands."""
    if _content(record.dataset) != _content(dataset):
        return False
    return (record.project, record.owner or owner) == (project, owner)


def _jobs(jobs: list[Job]) -> str:
    names = ", ".join(f"{job.name!r} ({job.id}, {job.state.value})" for job in jobs[:5])
    return f"{'job' if len(jobs) == 1 else 'jobs'} {names}{' and others' if len(jobs) > 5 else ''}"
