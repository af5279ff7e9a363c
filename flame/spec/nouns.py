"""What users write: schema, job, dataset. Field names on the wire and in files are camelCase, here snake_case.

The forms are those of Flame's JSON files (https://github.com/cisco-open/flame), which load unchanged.
Reading, checking across files and expanding are in the sibling modules; this one only says what the
forms are. Unknown keys are refused, except in ``hyperparameters`` and ``kwargs``, which are the user's own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from flame.spec.quantities import parse_bytes

Name = Annotated[str, Meta(min_length=1, max_length=200)]
ComputeName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}(?![\s\S])")]
PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
Kwargs = dict[str, Any]


class Form(msgspec.Struct, kw_only=True, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Base of everything a user writes: immutable, camelCase outside, strict about unknown keys."""


class Resources(Form, frozen=True, kw_only=True):
    """What one worker may use: at most this many cores, this much memory, these GPUs. It is taken from the compute's room.

    :ivar cpu: cores, such as 0.5; None for no limit.
    :ivar memory: bytes, or text such as ``512Mi``; None for no limit.
    :ivar gpu: whole GPUs.
    """

    cpu: PositiveFloat | None = None
    memory: str | PositiveInt | None = None
    gpu: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        """Refuse what is no amount here: whoever reckons with it later has nobody to complain to.

        :raises flame.errors.SpecError: the memory is no amount of memory.
        """
        _ = self.memory_bytes

    @property
    def memory_bytes(self) -> int | None:
        """The memory in bytes.

        :raises flame.errors.SpecError: it is no amount of memory.
        """
        return None if self.memory is None else parse_bytes(self.memory, "resources: memory")


class Placement(Form, frozen=True, kw_only=True):
    """Where the workers of a role run, and with what.

    :ivar realm: a compute's name, or a region such as ``default/us``; empty: anywhere. Workers that consume data are
        bound to their dataset's realm besides.
    :ivar resources: what each worker may use.
    :ivar image: the container image on computes that run containers; None: the compute's own.
    """

    realm: str = ""
    resources: Resources = field(default_factory=Resources)
    image: str | None = None


class Sorted(Form, frozen=True, kw_only=True):
    """A choice by name with arguments: ``{"sort": "fedadam", "kwargs": {"beta_1": 0.9}}``."""

    sort: Name
    kwargs: Kwargs = field(default_factory=dict)


class GroupBy(Form, frozen=True, kw_only=True):
    """Which groups a channel has. ``type`` is always ``tag``; no value means the one group ``default``."""

    type: str = "tag"
    value: list[Name] = field(default_factory=lambda: ["default"])


class Role(Form, frozen=True, kw_only=True):
    """A kind of worker.

    ``group_association`` has an entry for each kind of place in the topology: a mapping of channel to group.
    ``replica`` counts workers per entry of a role that consumes no data. ``placement`` says where and with what its
    workers run, unless the job says it.
    """

    name: Name
    description: str = ""
    is_data_consumer: bool = False
    replica: PositiveInt = 1
    group_association: list[dict[str, str]] = field(default_factory=list)
    placement: Placement | None = None


class Channel(Form, frozen=True, kw_only=True):
    """A link between two roles, or between one role and itself (``pair`` then names it twice).

    ``backend``, ``selector`` and ``compression`` override the job's for this channel.
    """

    name: Name
    description: str = ""
    pair: list[Name]
    group_by: GroupBy = field(default_factory=GroupBy)
    func_tags: dict[str, list[str]] = field(default_factory=dict)
    backend: str | None = None
    selector: Sorted | None = None
    compression: Sorted | None = None


class Schema(Form, frozen=True, kw_only=True):
    """The topology as a graph: roles and channels (TAG, topology abstraction graph)."""

    name: Name
    description: str = ""
    roles: list[Role]
    channels: list[Channel]


class Compute(Form, frozen=True, kw_only=True):
    """A place that can run workers: this host, a Docker engine, a Kubernetes cluster.

    :ivar name: how jobs, datasets and commands call it; it does not change.
    :ivar region: where it lies, such as ``default/us/west``.
    :ivar kind: what runs its workers: ``local``, ``docker``, ``kubernetes``, or one that another package brings.
    :ivar config: the kind's own configuration. Secrets in it are kept, and never shown.
    :ivar slots: most workers at once; None: what the compute itself says. Likewise cpu (cores), memory and gpu.
    :ivar server: the address at which its workers reach the server; empty: the server's own address.
    """

    name: ComputeName
    region: str = "default"
    kind: Name
    config: dict[str, Any] = field(default_factory=dict)
    slots: PositiveInt | None = None
    cpu: PositiveFloat | None = None
    memory: str | PositiveInt | None = None
    gpu: Annotated[int, Meta(ge=0)] | None = None
    server: str = ""


class Dataset(Form, frozen=True, kw_only=True):
    """Data registered by URL and realm. ``id`` is given by the server, or by a file that names one.

    :ivar sha256: what the file must have, in hex, where it is downloaded or read; empty for anything.
    """

    id: Annotated[str, Meta(min_length=1)] | None = None
    name: Name
    description: str = ""
    url: str
    data_format: str = ""
    realm: str = "default"
    is_public: bool = False
    sha256: Annotated[str, Meta(pattern=r"^([0-9a-fA-F]{64})?$")] = ""


class DatasetGroups(Form, frozen=True, kw_only=True):
    """One entry of a dataSpec: which datasets the workers of a data-consuming role use, by group.

    :ivar dataset_groups: registered datasets, or the job's own: each one gets a worker that Flame starts.
    :ivar from_user: how many workers participants bring, each with data of its own (``flame join``).
    """

    role: Name
    dataset_groups: dict[str, list[str]] = field(default_factory=dict)
    from_user: dict[str, Annotated[int, Meta(ge=0)]] = field(default_factory=dict)

    def groups(self) -> list[str]:
        """The groups that have a worker, sorted."""
        return sorted(
            {
                *(group for group, ids in self.dataset_groups.items() if ids),
                *(group for group, n in self.from_user.items() if n),
            }
        )

    def workers(self, group: str) -> int:
        """How many workers a group has."""
        return len(self.dataset_groups.get(group, ())) + self.from_user.get(group, 0)


class BaseModel(Form, frozen=True, kw_only=True):
    """A registered model to begin from; an empty name means: from the role's own ``initialize``."""

    name: str = ""
    version: int = 0


class Registry(Form, frozen=True, kw_only=True):
    """Where metrics and models go: ``mlflow``, ``local`` or ``dummy``; no ``uri`` means the server's default.

    :ivar artifacts: where an MLflow store that is a database keeps the files of new experiments, such as ``s3://bucket/mlflow``; empty:
        beside the database.
    """

    sort: str = "default"
    uri: str = ""
    artifacts: str = ""


class Broker(Form, frozen=True, kw_only=True):
    """Where a backend's meeting point is, such as ``{"sort": "mqtt", "host": "localhost:1883"}``."""

    sort: Name
    host: str


class ModelSpec(Form, frozen=True, kw_only=True):
    """What is trained and how."""

    base_model: BaseModel = field(default_factory=BaseModel)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    dependencies: list[str] = field(default_factory=list)
    optimizer: Sorted = field(default_factory=lambda: Sorted(sort="fedavg"))
    selector: Sorted = field(default_factory=lambda: Sorted(sort="default"))
    datasampler: Sorted = field(default_factory=lambda: Sorted(sort="default"))
    privacy: Sorted = field(default_factory=lambda: Sorted(sort="default"))


class Restart(Form, frozen=True, kw_only=True):
    """How the workers of a task are replaced that are lost, or whose code is killed by a signal.

    :ivar attempts: how often, one after another; who has run for ten minutes begins to count anew. 0: never.
    :ivar backoff: seconds before the second replacement (the first one comes at once); doubles with each further one, to a minute.
    :ivar on_error: replace also those whose code ends with an error of its own, which it will mostly do again.
    """

    attempts: Annotated[int, Meta(ge=0)] = 3
    backoff: Annotated[float, Meta(ge=0)] = 1.0
    on_error: bool = False


class RestartPolicy(Restart, frozen=True, kw_only=True):
    """How lost workers are replaced, by ``roles`` where one differs from the others."""

    roles: dict[str, Restart] = field(default_factory=dict)

    def of(self, role: str) -> Restart:
        """What holds for a role."""
        return self.roles.get(role, self)


class CheckpointPolicy(Form, frozen=True, kw_only=True):
    """What is kept of a job's rounds, so that a replaced worker goes on from there.

    :ivar every: after how many rounds; 0: never. What takes long is kept less often, so that it takes at most a tenth of the time.
    :ivar keep: how many are kept of each worker, the newest; a job can be restarted from any of them.
    """

    every: Annotated[int, Meta(ge=0)] = 1
    keep: PositiveInt = 2


class RoundPolicy(Form, frozen=True, kw_only=True):
    """What a round needs. Times in seconds.

    :ivar min_trainers: fewest updates that make a round; fewer by the deadline fail the job.
    :ivar min_aggregators: of a role that consumes no data and has several workers, as many must not fail; None: all.
    :ivar round_deadline: the longest a round waits for updates; None waits for everyone who is there.
    :ivar over_selection: factor (>= 1) by which more trainers are selected than are needed.
    :ivar join_deadline: the longest a worker waits for its peers at the start.
    :ivar deterministic: fold updates in a fixed order, and wait for those that are replaced, so that two runs are bitwise equal.
    :ivar checkpoint: what is kept of the rounds.
    """

    min_trainers: PositiveInt = 1
    min_aggregators: PositiveInt | None = None
    round_deadline: PositiveFloat | None = None
    over_selection: Annotated[float, Meta(ge=1)] = 1.0
    join_deadline: PositiveFloat = 120.0
    deterministic: bool = False
    checkpoint: CheckpointPolicy = field(default_factory=CheckpointPolicy)


class JobForm(Form, frozen=True, kw_only=True):
    """A run of a design, with everything in place: what the loader makes of a JOB and the server is sent.

    Either ``design_id`` names a registered design, or ``schema`` and ``code`` (the SHA-256 of an uploaded
    bundle, see ``PUT /v1/bundles/{sha256}``) are given inline. ``datasets`` registers those that the job brings;
    ``data_spec`` refers to them, or to registered ones, by id. ``placement`` says by role where its workers run and with
    what.

    :ivar restart: how lost workers are replaced.
    :ivar on_failure: what becomes of a job that cannot go on: ``fail``, or ``pause``, from where it can be resumed.
    """

    name: Name
    design_id: str | None = None
    schema: Schema | None = None
    code: str | None = None
    datasets: list[Dataset] = field(default_factory=list)
    priority: str = "medium"
    max_run_time: PositiveFloat | None = None
    backend: str = "p2p"
    brokers: list[Broker] = field(default_factory=list)
    data_spec: list[DatasetGroups] = field(default_factory=list)
    model_spec: ModelSpec = field(default_factory=ModelSpec)
    registry: Registry = field(default_factory=Registry)
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    on_failure: Literal["fail", "pause"] = "fail"
    placement: dict[str, Placement] = field(default_factory=dict)


class JobRef(Form, frozen=True, kw_only=True):
    """The job that a task belongs to."""

    id: str
    name: str


class TaskConfig(Form, frozen=True, kw_only=True):
    """A task's configuration: what the SDK's ``Config`` reads. Made by the expansion, never by hand in a job.

    :ivar schema: the schema's name.
    :ivar from_user: a participant brings this worker and its data; ``dataset`` is filled in on the participant's machine.
    :ivar restart: how lost workers are replaced: whether it is worth waiting for one.
    :ivar peers: by channel, how many tasks of the expansion are at the other end in this task's group. A worker waits
        at its start until they are there (at the longest ``policy.join_deadline``); a channel that is missing says nothing.
    :ivar dataset_id: the id of the dataset; empty for a role without one.
    :ivar dataset_sha256: the SHA-256 that the dataset must have; empty for anything.
    """

    taskid: str
    role: str
    job: JobRef
    realm: str
    backend: str
    brokers: list[Broker]
    channels: list[Channel]
    group_association: dict[str, str]
    dataset: str
    hyperparameters: dict[str, Any]
    base_model: BaseModel
    optimizer: Sorted
    selector: Sorted
    registry: Registry
    dependencies: list[str]
    max_run_time: float | None
    datasampler: Sorted = field(default_factory=lambda: Sorted(sort="default"))
    privacy: Sorted = field(default_factory=lambda: Sorted(sort="default"))
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    schema: str = ""
    peers: dict[str, int] = field(default_factory=dict)
    from_user: bool = False
    dataset_id: str = ""
    dataset_sha256: str = ""
