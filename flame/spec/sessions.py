"""What users write and the server keeps of elastic sessions: applications, sessions, their tasks and executors.

An application is the code that serves tasks; a session is a stream of tasks for it. Payloads (what a task is given and
answers, a session's common data) are bytes to everyone but the two ends.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

from msgspec import Meta, field

from flame.spec.nouns import Form, PositiveFloat, PositiveInt, Resources
from flame.spec.records import Record

#: The longest id of a session that a user may choose, and what it is made of: it names files and rows.
SessionId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]


class Application(Form, frozen=True, kw_only=True):
    """The code that serves tasks.

    :ivar name: under which it is registered; of one that is given inline it is for people only.
    :ivar entry: ``module:Name`` of a class with ``on_session_enter``, ``on_task_invoke`` and ``on_session_leave``, or of a function.
    :ivar code: the SHA-256 of the bundle that holds the module; None: the module is installed where executors run.
    :ivar image: the image of executors in containers.
    :ivar arguments: keyword arguments of the class, or further ones of the function.
    :ivar environment: variables of the executors.
    :ivar dependencies: what the executors need installed, as pip takes it.
    :ivar resources: what each executor may use.
    :ivar max_instances: most executors at once, over all sessions; None: no limit.
    :ivar delay_release: seconds that an executor with nothing to do is kept.
    """

    name: Annotated[str, Meta(max_length=200)] = ""
    entry: Annotated[str, Meta(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", max_length=400)]
    code: str | None = None
    image: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    dependencies: list[str] = field(default_factory=list)
    resources: Resources = field(default_factory=Resources)
    max_instances: PositiveInt | None = None
    delay_release: Seconds = 60.0


class SessionForm(Form, frozen=True, kw_only=True):
    """What a session is opened with.

    :ivar id: chosen by the user, to open the same session again; None: the server makes one.
    :ivar app: the name or id of a registered application.
    :ivar application: one that is given inline.
    :ivar common: the common data's bytes, where they are few.
    :ivar common_digest: the digest of the object that holds them, where they are many; the session begins once it was brought.
    :ivar slots: how many slots an executor takes.
    :ivar priority: a session of a higher one is served first.
    :ivar weight: its share among sessions of one priority.
    :ivar min_instances: executors that are kept whether there are tasks or not.
    :ivar max_instances: most executors; None: no limit.
    :ivar batch_size: executors come and work in groups of so many, or not at all.
    :ivar timeout: seconds that a task may run, unless it says otherwise; None: no limit.
    :ivar retries: how often a failed task is tried again, unless it says otherwise.
    :ivar retry_budget: most retries in the whole session; None: no limit.
    :ivar delay_release: the application's, unless this is given.
    """

    id: SessionId | None = None
    app: str | None = None
    application: Application | None = None
    common: bytes | None = None
    common_digest: str | None = None
    slots: PositiveInt = 1
    priority: int = 0
    weight: PositiveFloat = 1.0
    min_instances: Count = 0
    max_instances: PositiveInt | None = None
    batch_size: PositiveInt = 1
    timeout: PositiveFloat | None = None
    retries: Count = 0
    retry_budget: Count | None = None
    delay_release: Seconds | None = None


class AppRecord(Record, kw_only=True):
    """A registered application. ``code`` is the application's, where bundles in use are looked for."""

    id: str
    name: str
    application: Application
    code: str | None = None
    created_at: float = 0.0
    updated_at: float = 0.0
    project: str = "default"
    owner: str = ""


class SessionState(str, enum.Enum):
    """The life of a session."""

    OPEN = "open"
    CLOSED = "closed"


class WorkState(str, enum.Enum):
    """The life of a task of a session."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEED = "succeed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ExecutorState(str, enum.Enum):
    """The life of an executor: a process that serves one session at a time. ``starting``: it is not there yet."""

    STARTING = "starting"
    IDLE = "idle"
    BINDING = "binding"
    BOUND = "bound"
    UNBINDING = "unbinding"
    RELEASED = "released"


class Counts(Record, kw_only=True):
    """How many tasks a session has, by state. ``total`` is the sum."""

    total: int = 0
    pending: int = 0
    running: int = 0
    succeed: int = 0
    failed: int = 0
    cancelled: int = 0


class ExecutorRecord(Record, kw_only=True):
    """An executor. ``key`` says what application and resources it has: which sessions it can serve."""

    id: str
    compute: str
    key: str
    app: str = ""
    state: ExecutorState = ExecutorState.STARTING
    session: str | None = None
    worker: str | None = None
    slots: int = 1
    resources: Resources = field(default_factory=Resources)
    delay_release: float = 60.0
    created_at: float = 0.0


class SessionRecord(Record, kw_only=True):
    """A session as the server knows it. ``reason``: why it gets no executors, where that is so."""

    id: str
    state: SessionState
    form: SessionForm
    application: Application
    code: str | None = None
    counts: Counts = field(default_factory=Counts)
    executors: list[ExecutorRecord] = field(default_factory=list)
    reason: str | None = None
    created_at: float = 0.0
    closed_at: float | None = None
    project: str = "default"
    owner: str = ""


class WorkFailure(Record, kw_only=True):
    """Why a task failed: the exception's type, its message and its trace, as text."""

    type: str
    message: str
    trace: str = ""


class WorkRecord(Record, kw_only=True):
    """A task of a session. ``attempt`` counts its starts."""

    id: int
    state: WorkState
    attempt: int = 1
    failure: WorkFailure | None = None
