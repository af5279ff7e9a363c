"""The expansion: schema + job -> tasks. Pure: the same job gives the same tasks, wherever it is expanded.

The rules:

* Roles come in alphabetical order.
* A role that consumes no data gives ``replica`` times its ``groupAssociation`` entries: ``replica`` is the outer
  loop, the entries keep the schema's order. Its dataset is empty, its realm ``default``.
* A role that consumes data gives one task for each dataset that the job's dataSpec has for it: groups in sorted
  order, datasets in the order of the list; ``replica`` does not matter. The task's groupAssociation is the
  role's first one in which any channel has that group as its value. Its dataset is the dataset's URL, its realm
  the dataset's.
* Behind the datasets of a group come the workers that participants bring (``fromUser``). Their dataset is empty, as
  nobody but its owner needs to know it, and their realm is the group.
* A role that names no groupAssociation gets the natural one, every channel of it with its only group.
* A task's channels are those with its role in ``pair``; a channel that names no backend has the job's.
* A task is told how many peers it has at the other end of each channel, in its group.
* A task's id is the SHA-1 (40 hex digits) of the job's id and the rest of the task's configuration. Tasks that
  are equal in all of it (replicas) are told apart by a running number.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from flame.errors import SpecError
from flame.spec.nouns import (
    Broker,
    Channel,
    Dataset,
    DatasetGroups,
    JobForm,
    JobRef,
    Registry,
    Role,
    Schema,
    TaskConfig,
)
from flame.spec.places import Places
from flame.spec.shape import listing, suggestion
from flame.spec.topology import association_for, associations, channels_of, other_end

#: The realm of a task that has no dataset: it may run anywhere.
ANYWHERE = "default"


def expand(
    form: JobForm,
    schema: Schema | None,
    datasets: Mapping[str, Dataset],
    job_id: str,
    *,
    brokers: Sequence[Broker] | None = None,
    registry: Registry | None = None,
    places: Places | None = None,
) -> list[TaskConfig]:
    """The tasks of a job, in the order of expansion.

    :param form: the job.
    :param schema: the design's schema; None takes the one that the job brings.
    :param datasets: registered datasets by id. Those that the job itself brings come before them.
    :param job_id: the job's id.
    :param brokers: where the backends' meeting points are, when the server knows better than the job.
    :param registry: the registry, when the server has chosen one for ``default``.
    :param places: where the job was written, for complaints.
    :raises flame.errors.SpecError: the job cannot be expanded.
    """
    places = places or Places()
    schema = schema or form.schema
    if schema is None:
        raise SpecError(
            "the job has no schema: give one, or the designId of a registered design.", places.where() or None
        )
    known = {**datasets, **{dataset.id: dataset for dataset in form.datasets if dataset.id is not None}}
    roles = sorted(schema.roles, key=lambda one: one.name)
    taken = {role.name: list(_places_of(role, form, schema, known, places)) for role in roles}
    members = Counter(
        (name, channel, group)
        for name, workers in taken.items()
        for association, _ in workers
        for channel, group in association.items()
    )
    tasks: list[TaskConfig] = []
    twins: dict[bytes, int] = {}
    for role in roles:
        channels = [
            channel if channel.backend else msgspec.structs.replace(channel, backend=form.backend)
            for channel in channels_of(schema, role.name)
        ]
        for association, source in taken[role.name]:
            dataset = source if isinstance(source, Dataset) else None
            config = TaskConfig(
                taskid="",
                role=role.name,
                job=JobRef(id=job_id, name=form.name),
                realm=dataset.realm if dataset else source if isinstance(source, str) else ANYWHERE,
                backend=form.backend,
                brokers=list(form.brokers if brokers is None else brokers),
                channels=channels,
                group_association=association,
                dataset=dataset.url if dataset else "",
                hyperparameters=form.model_spec.hyperparameters,
                base_model=form.model_spec.base_model,
                optimizer=form.model_spec.optimizer,
                selector=form.model_spec.selector,
                registry=registry or form.registry,
                dependencies=form.model_spec.dependencies,
                max_run_time=form.max_run_time,
                datasampler=form.model_spec.datasampler,
                privacy=form.model_spec.privacy,
                policy=form.policy,
                restart=form.restart,
                schema=schema.name,
                peers=_peers(role.name, channels, association, members),
                from_user=isinstance(source, str),
            )
            content = msgspec.json.encode(config, order="deterministic")
            twin = twins[content] = twins.get(content, -1) + 1
            dataset_id = (dataset.id or "") if dataset else ""
            tasks.append(
                msgspec.structs.replace(
                    config,
                    taskid=_task_id(job_id, content, twin),
                    dataset_id=dataset_id,
                    dataset_sha256=dataset.sha256 if dataset else "",
                )
            )
    return tasks


def offline_job_id(form: JobForm) -> str:
    """An id for a job that no server has seen: 24 hex digits of its content's hash."""
    return hashlib.sha256(msgspec.json.encode(form, order="deterministic")).hexdigest()[:24]


def _peers(
    role: str, channels: list[Channel], association: Mapping[str, str], members: Counter[tuple[str, str, str]]
) -> dict[str, int]:
    """By channel: how many workers are at the other end in this worker's group, itself not counted."""
    peers: dict[str, int] = {}
    for channel in channels:
        if channel.name in association:
            other = other_end(channel, role)
            peers[channel.name] = members[other, channel.name, association[channel.name]] - (other == role)
    return peers


def _task_id(job_id: str, content: bytes, twin: int) -> str:
    digest = hashlib.sha1(job_id.encode() + b"\0" + content, usedforsecurity=False)
    if twin:
        digest.update(b"\0" + str(twin).encode())
    return digest.hexdigest()


#: Where a worker's data come from: a registered dataset, the realm of a participant who brings them, or nowhere.
Source = Dataset | str | None


def _places_of(
    role: Role, form: JobForm, schema: Schema, known: Mapping[str, Dataset], places: Places
) -> Iterator[tuple[dict[str, str], Source]]:
    """A role's workers: the association of each, and where its data come from."""
    candidates = associations(schema, role, places.under("schema"))
    if not role.is_data_consumer:
        for _ in range(role.replica):
            for association in candidates:
                yield association, None
        return
    for index, entry in enumerate(form.data_spec):
        if entry.role == role.name:
            yield from _data_places(role, entry, candidates, known, places.under("dataSpec", index))


def _data_places(
    role: Role,
    entry: DatasetGroups,
    candidates: list[dict[str, str]],
    known: Mapping[str, Dataset],
    places: Places,
) -> Iterator[tuple[dict[str, str], Source]]:
    for group in entry.groups():
        association = association_for(candidates, group)
        if association is None:
            groups = sorted({value for one in candidates for value in one.values()})
            raise SpecError(
                f"role {role.name!r} has no groupAssociation with the group {group!r}; "
                + suggestion(group, groups, "its groups"),
                places.where("datasetGroups" if group in entry.dataset_groups else "fromUser", group),
            )
        for at, ref in enumerate(entry.dataset_groups.get(group, ())):
            if ref not in known:
                raise SpecError(
                    f"unknown dataset {ref!r}: no dataset of the job and none that is registered has this id; "
                    f"the job brings {listing(known)}.",
                    places.where("datasetGroups", group, at),
                )
            yield association, known[ref]
        for _ in range(entry.from_user.get(group, 0)):
            yield association, group
