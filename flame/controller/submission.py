"""From what a user submits to a job in the store: everything is checked before anything is written.

What is written is ordered so that a crash in between leaves nothing that is half there: first what the job refers to,
then its tasks, last the job itself. Without the job's document nobody sees the rest, and a second try finds it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping

import msgspec

from flame.controller.catalog import Catalog
from flame.controller.context import Context, StoredTask
from flame.controller.placement import need_of, never, priority
from flame.controller.shelf import Saved
from flame.errors import NotFound, SpecError
from flame.spec.check import check_job
from flame.spec.expand import expand
from flame.spec.nouns import DatasetGroups, JobForm, Schema, TaskConfig
from flame.spec.records import DatasetRecord, Job, JobState, TaskState

#: The most tasks in a job.
MAX_TASKS = 10_000

_last_stamp = 0


class Submission:
    """Makes jobs.

    :param context: the controller's surroundings.
    :param catalog: what is registered.
    """

    def __init__(self, context: Context, catalog: Catalog) -> None:
        self._context = context
        self._catalog = catalog

    async def create(self, form: JobForm, project: str, owner: str) -> Saved[Job]:
        """Check a job and write it, with its tasks, in state ``ready``.

        :raises flame.errors.SpecError: something in it cannot be.
        """
        job_id = new_id()
        async with self._catalog.bundles:
            form, tasks = await self._prepare(form, job_id, project, owner)
            job = Job(
                id=job_id,
                name=form.name,
                state=JobState.READY,
                form=form,
                design_id=form.design_id,
                code=form.code,
                created_at=time.time(),
                project=project,
                owner=owner,
            )
            await self._write_tasks(tasks)
            return await self._context.jobs.insert(job_id, job)

    async def replace(self, saved: Saved[Job], form: JobForm) -> None:
        """Write a job that is ``ready`` anew, under its id."""
        before = saved.record.code
        async with self._catalog.bundles:
            form, tasks = await self._prepare(form, saved.id, saved.record.project, saved.record.owner)
            fields = {"name": form.name, "form": form, "design_id": form.design_id, "code": form.code}
            job = msgspec.structs.replace(saved.record, **fields)
            old = await self._context.tasks.all({"jobId": saved.id})
            await asyncio.gather(*(self._context.tasks.delete(task.id) for task in old))
            await self._write_tasks(tasks)
            await self._context.jobs.put(saved, job)
        if before != job.code:
            await self._catalog.release(before)

    async def _prepare(self, form: JobForm, id: str, project: str, owner: str) -> tuple[JobForm, list[StoredTask]]:
        """Check everything; then register what the job brings.

        A job uses the designs of its project, and its datasets, and those that are public.
        """
        schema, code = form.schema, form.code
        if form.design_id is not None:
            try:
                design = await self._catalog.design(form.design_id, project)
            except NotFound as error:
                raise SpecError(error.message, "designId") from None
            schema, code = schema or design.schema, code or design.code
            if schema is None or code is None:
                lacks = "schema" if schema is None else "code"
                raise SpecError(f"design {design.name!r} has no {lacks} yet; give it one first.", "designId")
        if schema is None:
            raise SpecError("the job has no schema: give one, or the designId of a registered design.", "schema")
        if code is None:
            raise SpecError("the job has no code: give one, or the designId of a registered design.", "code")
        folders = await self._catalog.folders(code)
        records = await self._catalog.registered(form, project)
        registered = {name: record.dataset for name, record in records.items()}
        form = check_job(form, schema=schema, code=folders, datasets=registered)
        priority(form.priority)
        schema = form.schema or schema
        _refuse_crowds(form, schema)
        configs = expand(form, schema, registered, id)
        self._refuse_unplaceable(form, schema, configs)
        if form.design_id is None:
            form = msgspec.structs.replace(
                form, design_id=(await self._catalog.design_for(form, schema, code, project, owner)).id
            )
        brought = await self._catalog.register_all(form.datasets, project, owner)
        tasks = [_task(id, index, config, {**records, **brought}) for index, config in enumerate(configs)]
        spec = [_renamed(entry, brought) for entry in form.data_spec]
        return msgspec.structs.replace(form, schema=schema, code=code, datasets=[], data_spec=spec), tasks

    def _refuse_unplaceable(self, form: JobForm, schema: Schema, configs: list[TaskConfig]) -> None:
        """A job whose workers no computes could take, even if nothing else ran, would only wait."""
        needs = [need_of(form, schema, config) for config in configs if not config.from_user]
        if reason := never(needs, self._context.computes.rooms()):
            raise SpecError(f"the job could never start: {reason}", "placement")

    async def _write_tasks(self, tasks: list[StoredTask]) -> None:
        await asyncio.gather(*(self._context.tasks.insert(task.id, task) for task in tasks))


def new_id() -> str:
    """An id of 24 hex digits that sorts behind every one made before it: milliseconds, then chance."""
    global _last_stamp  # noqa: PLW0603 - the clock may step back or stand still; ids must not
    _last_stamp = max(_last_stamp + 1, int(time.time() * 1000))
    return f"{_last_stamp:012x}{secrets.token_hex(6)}"


def _refuse_crowds(form: JobForm, schema: Schema) -> None:
    """Count the tasks before they are made: a number is short to write and long to work off."""
    count = sum(
        role.replica * max(1, len(role.group_association)) for role in schema.roles if not role.is_data_consumer
    )
    count += sum(entry.workers(group) for entry in form.data_spec for group in entry.groups())
    if count > MAX_TASKS:
        raise SpecError(f"the job has {count} tasks; {MAX_TASKS} are allowed. Reduce the replicas.", "schema: roles")


def _task(job: str, index: int, config: TaskConfig, datasets: Mapping[str, DatasetRecord]) -> StoredTask:
    """A task that was not started; ``datasets`` are the registered ones by the ids that the job's files use."""
    dataset = datasets.get(config.dataset_id)
    if dataset is not None:
        config = msgspec.structs.replace(config, dataset_id=dataset.id)
    return StoredTask(
        id=config.taskid,
        job_id=job,
        role=config.role,
        index=index,
        state=TaskState.READY,
        config=config,
        dataset_id=config.dataset_id,
        owner=dataset.owner if dataset is not None else "",
    )


def _renamed(entry: DatasetGroups, given: Mapping[str, DatasetRecord]) -> DatasetGroups:
    groups = {
        group: [given[named].id if named in given else named for named in names]
        for group, names in entry.dataset_groups.items()
    }
    return msgspec.structs.replace(entry, dataset_groups=groups)
