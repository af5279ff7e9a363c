"""What the server keeps and answers: the state of designs, datasets, jobs, tasks, and the events about them.

Times are seconds since the epoch (float, UTC). Names on the wire are camelCase.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec
from msgspec import field

from flame.spec.nouns import Dataset, JobForm, Schema, TaskConfig


class Record(msgspec.Struct, kw_only=True, rename="camel"):
    """Base of what is stored and answered. Unknown keys are passed over: an older client reads a newer server."""


class JobState(str, enum.Enum):
    """The life of a job; the transitions are in :mod:`flame.controller.lifecycle`."""

    READY = "ready"
    STARTING = "starting"
    DEPLOYING = "deploying"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPING = "stopping"
    TERMINATED = "terminated"
    PAUSING = "pausing"
    PAUSED = "paused"

    @property
    def ended(self) -> bool:
        """True for the states that a job does not leave."""
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.TERMINATED)


class TaskState(str, enum.Enum):
    """The life of a task: waiting in ``ready``, its worker asked for, connected and running, ended."""

    READY = "ready"
    DEPLOYING = "deploying"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    TERMINATED = "terminated"

    @property
    def ended(self) -> bool:
        """True for the states that an attempt does not leave."""
        return self in (TaskState.COMPLETED, TaskState.FAILED, TaskState.TERMINATED)


class Failure(Record, kw_only=True):
    """Why something failed: one sentence, and where it comes from.

    ``log`` holds the last lines of the task's log.
    """

    message: str
    task: str | None = None
    role: str | None = None
    attempt: int | None = None
    exit_code: int | None = None
    signal: str | None = None
    log: list[str] = field(default_factory=list)


class Round(Record, kw_only=True):
    """One finished round of a job, as its aggregating role reported it. ``seconds`` is the round's wall time.

    ``group``: whose round it was, in a job of independent groups; empty where there is one.
    """

    round: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    group: str = ""


class Model(Record, kw_only=True):
    """Where a job's model is: ``path`` in the server's data directory, ``uri`` and ``version`` in the registry.

    ``group``: whose model it is, in a job of independent groups; empty where there is one.
    """

    name: str
    path: str | None = None
    uri: str | None = None
    version: str | None = None
    registry: str = "local"
    group: str = ""


class Design(Record, kw_only=True):
    """A named workflow: a schema and the code of its roles (``code``: SHA-256 of the bundle)."""

    id: str
    name: str
    description: str = ""
    schema: Schema | None = None
    code: str | None = None
    created_at: float = 0.0
    updated_at: float = 0.0
    project: str = "default"
    owner: str = ""


class DatasetRecord(Record, kw_only=True):
    """A registered dataset. ``owner``: who has registered it, and alone may change it, but for admins."""

    id: str
    dataset: Dataset
    created_at: float = 0.0
    project: str = "default"
    owner: str = ""


class ComputeRecord(Record, kw_only=True):
    """A registered compute; ``id`` is its name. See :class:`flame.spec.nouns.Compute`.

    ``drained``: it gets no new workers. Where it is answered, secrets in ``config`` are ``***``.
    """

    id: str
    name: str
    kind: str
    region: str = "default"
    config: dict[str, Any] = field(default_factory=dict)
    slots: int | None = None
    cpu: float | None = None
    memory: str | int | None = None
    gpu: int | None = None
    server: str = ""
    drained: bool = False
    created_at: float = 0.0


class ComputeUse(Record, kw_only=True):
    """What there is on a compute, or what of it is taken: workers, cores, bytes, GPUs. None: no limit is known."""

    slots: int | None = None
    cpu: float | None = None
    memory: int | None = None
    gpu: int | None = None


class ComputeStatus(ComputeRecord, kw_only=True):
    """A compute as it is answered.

    :ivar state: ``ready``, ``unreachable`` (``problem`` says why) or ``drained``.
    :ivar capacity: what there is in all: what is registered, else what the compute says itself.
    :ivar used: what its workers take, or have been promised.
    """

    state: str
    problem: str | None = None
    capacity: ComputeUse = field(default_factory=ComputeUse)
    used: ComputeUse = field(default_factory=ComputeUse)


class Job(Record, kw_only=True):
    """A job as the server knows it. ``warnings`` are sentences such as: the registry is down since 10:04.

    ``model`` is the job's model; of a job of independent groups the first one's, and ``models`` has those of all.
    ``running_mark``: the moment ``running_at`` on the clock since the server's machine was started, which nobody sets.
    ``restart_behind``: it is being restarted, and goes on behind this round once its workers have ended.
    """

    id: str
    name: str
    state: JobState
    form: JobForm
    design_id: str | None = None
    code: str | None = None
    created_at: float = 0.0
    started_at: float | None = None
    running_at: float | None = None
    running_mark: str | None = None
    ended_at: float | None = None
    failure: Failure | None = None
    reason: str | None = None
    restart_behind: int | None = None
    rounds: list[Round] = field(default_factory=list)
    model: Model | None = None
    models: list[Model] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    project: str = "default"
    owner: str = ""


class Task(Record, kw_only=True):
    """A task as the server knows it. ``attempt`` counts starts from 1; 0 means never started.

    ``reason`` says in one sentence what it waits for, where it waits. ``dataset_id``: the dataset that it consumes;
    ``owner``: the participant whose data or machine it works on, who may see it for that. ``participant``: what whoever brings
    its worker calls itself.
    """

    id: str
    job_id: str
    role: str
    index: int
    state: TaskState
    config: TaskConfig
    attempt: int = 0
    compute: str | None = None
    worker: str | None = None
    participant: str | None = None
    reason: str | None = None
    failure: Failure | None = None
    started_at: float | None = None
    ended_at: float | None = None
    dataset_id: str = ""
    owner: str = ""


class Invite(Record, kw_only=True):
    """What lets participants into a job, each with a worker and data of its own.

    :ivar realm: where their data must lie: a region, or a part of one; None: anywhere.
    :ivar uses: how many participants may come with it.
    :ivar names: what those who came call themselves.
    :ivar token: the secret itself; there in the answer that makes the invite, and never again.
    """

    id: str
    job_id: str
    realm: str | None = None
    uses: int = 1
    names: list[str] = field(default_factory=list)
    created_at: float = 0.0
    expires_at: float = 0.0
    revoked: bool = False
    token: str | None = None


class Invitation(Record, kw_only=True):
    """What a participant learns of a job before it takes part: enough to decide.

    :ivar roles: those that participants can have.
    :ivar code: the SHA-256 of the bundle with the roles' code.
    :ivar free: how many places nobody has taken.
    """

    job_id: str
    name: str
    state: JobState
    reason: str | None = None
    roles: list[str] = field(default_factory=list)
    realm: str | None = None
    code: str
    dependencies: list[str] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    free: int = 0
    expires_at: float = 0.0


class Seat(Record, kw_only=True):
    """A participant's place in a job: a task, and the key of this attempt of it.

    :ivar state: the task's state. Where it has ended there is no key.
    """

    job_id: str
    task: str
    role: str
    index: int
    realm: str
    attempt: int
    state: TaskState
    code: str
    key: str | None = None


class Event(Record, kw_only=True):
    """One entry of a durable stream. ``seq`` counts from 1 in each stream, without gaps.

    A job's stream (``GET /v1/jobs/{id}/events``) has these types:

    * ``job``: ``{state, reason?, failure?}``
    * ``task``: ``{task, role, index, state, attempt, reason?, failure?}``
    * ``metrics``: ``{task, role, round, metrics}``, from one worker
    * ``round``: ``{round, metrics, seconds, group?}``, a finished round
    * ``model``: a :class:`Model`
    * ``warning``: ``{message}``

    A task's stream (``GET /v1/tasks/{id}/events``), followed by its flamelet:

    * ``start``: ``{attempt}``: fetch the manifest and run it
    * ``stop``: ``{reason}``: end the child, report, exit
    * ``peers``: ``{channel, group, joined: [member], left: [end]}``

    Any stream ends with one that is not stored and has the number 0, ``refused``: ``{type, message}``, when its caller may not follow it
    any more: the token was revoked or has expired, the attempt is over, the invite was taken back.
    """

    seq: int
    time: float
    type: str
    data: dict[str, Any] = field(default_factory=dict)


class P2pTls(Record, kw_only=True):
    """A worker's certificate and key, and the authority of its job, which has issued those of all its peers (PEM)."""

    cert: str
    key: str
    ca: str


class Manifest(Record, kw_only=True):
    """What a flamelet fetches for a task: the configuration, and the role's code by digest.

    ``job_key`` (32 bytes, hex) is the secret that the job's workers share to know each other. ``p2p_tls``: with what they
    speak TLS with each other, where the server is set so. ``checkpoints``: the rounds of which there is what earlier attempts
    have reached.
    """

    config: TaskConfig
    code: str
    job_key: str
    attempt: int
    p2p_tls: P2pTls | None = None
    checkpoints: list[int] = field(default_factory=list)


class CheckpointRecord(Record, kw_only=True):
    """What is kept of a task after a round."""

    task: str
    role: str
    round: int
    size: int
    time: float


class Report(Record, kw_only=True):
    """One thing that a flamelet says of its task. ``seq`` counts from 1 in an attempt; a repeated one is ignored.

    Types and data:

    * ``state``: ``{state: running | completed | failed | terminated, exitCode?, signal?, message?, log?}``
    * ``metrics``: ``{round, metrics}``
    * ``round``: ``{round, metrics, seconds, group?}`` (from the role that closes the rounds)
    * ``join``: ``{channel, group, member: {end, role, attempt, address, ...}}``; ``leave``: ``{channel, group}``
    * ``model``: a :class:`Model`
    * ``warning``: ``{message}``
    * ``waiting``: ``{message}``: whom the worker waits for; an empty message when it no longer does
    """

    seq: int
    type: str
    data: dict[str, Any] = field(default_factory=dict)
