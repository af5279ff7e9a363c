"""A worker's configuration, as its role's code sees it.

The file is Flame's ``config.json``: the control plane writes it for each task, and people write it by hand. Names are
camelCase there and snake_case here, as in Flame's library, so that scripts written for that one read the same
attributes. By hand much may be left out, and unknown keys are passed over with a word in the log; what is there
must be right, and an error says which field of which file is not.

The parts are mutable: a script may change a hyperparameter before it composes its role.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from flame.errors import DatasetError, SpecError
from flame.spec.nouns import RestartPolicy, RoundPolicy, TaskConfig

log = logging.getLogger(__name__)

GROUPBY_DEFAULT_GROUP = "default"

#: What Flame's library assumes where a configuration does not say.
DEFAULT_HYPERPARAMETERS: dict[str, Any] = {"rounds": 1, "epochs": 1, "batchSize": 16}
#: Hyperparameters that may be asked for although a configuration does not have them.
KNOWN_HYPERPARAMETERS = ("learningRate", "aggGoal", "concurrency")
#: Attribute names of Flame's library that are not the snake_case of the file's name.
HYPERPARAMETER_NAMES = {"aggregation_goal": "aggGoal"}


def camel(name: str) -> str:
    """``batch_size`` -> ``batchSize``."""
    first, *rest = name.split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in rest)


class Part(msgspec.Struct, kw_only=True, rename="camel"):
    """Base of the pieces of a configuration."""


class Job(Part, kw_only=True):
    """The job that the task belongs to; ``id`` in the file."""

    job_id: str = field(name="id")
    name: str


class Sorted(Part, kw_only=True):
    """A choice by name with arguments: an optimizer, a selector ..."""

    sort: str = "default"
    kwargs: dict[str, Any] = field(default_factory=dict)


class Registry(Part, kw_only=True):
    """Where metrics and models go."""

    sort: str = "default"
    uri: str = ""
    artifacts: str = ""


class BaseModel(Part, kw_only=True):
    """A registered model to begin from; none where the name is empty or the version is 0."""

    name: str = ""
    version: int = 0

    def __bool__(self) -> bool:
        return bool(self.name) and self.version > 0


class BrokerEntry(Part, kw_only=True):
    """One entry of ``brokers`` in the file."""

    sort: str
    host: str


class Brokers(Part, kw_only=True):
    """Where backends' meeting points are: ``sort_to_host["mqtt"]`` is ``host:port``."""

    sort_to_host: dict[str, str] = field(default_factory=dict)


class GroupBy(Part, kw_only=True):
    """Which groups a channel has."""

    type: str = "tag"
    value: list[str] = field(default_factory=list)

    def groupable_value(self, group_association: str | None = "") -> str:
        """The group that an association means: itself where the channel has it, else ``default``."""
        if group_association and group_association in self.value:
            return group_association
        return GROUPBY_DEFAULT_GROUP


class Channel(Part, kw_only=True):
    """A channel that the role is at one end of. ``backend`` and ``broker_host`` override the job's."""

    name: str
    pair: Annotated[list[str], Meta(min_length=2, max_length=2)]
    description: str = ""
    is_bidirectional: bool = True
    group_by: GroupBy = field(default_factory=GroupBy)
    func_tags: dict[str, list[str]] = field(default_factory=dict)
    backend: str | None = None
    broker_host: str | None = None
    selector: Sorted | None = None
    compression: Sorted | None = None


class Hyperparameters(Mapping[str, Any]):
    """The user's own settings: ``hyperparameters.batch_size`` or ``hyperparameters["batchSize"]``.

    Both spellings work in both forms. ``rounds``, ``epochs`` and ``batch_size`` have Flame's defaults (1, 1, 16),
    ``learning_rate`` is None where it is not set; any other name that the configuration lacks is an AttributeError
    (``hyperparameters.get("momentum", 0.9)`` gives a default).
    """

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(self, "_values", DEFAULT_HYPERPARAMETERS | dict(values or {}))

    def _key(self, name: str) -> str | None:
        for key in (name, HYPERPARAMETER_NAMES.get(name, ""), camel(name)):
            if key in self._values:
                return key
        return None

    def __getitem__(self, name: str) -> Any:
        key = self._key(name)
        if key is None:
            raise KeyError(name)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        key = None if name.startswith("__") else self._key(name)
        if key is not None:
            return self._values[key]
        if HYPERPARAMETER_NAMES.get(name, camel(name)) in KNOWN_HYPERPARAMETERS:
            return None
        raise AttributeError(f"no hyperparameter {name!r}; the configuration has {', '.join(sorted(self._values))}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._values[self._key(name) or HYPERPARAMETER_NAMES.get(name, camel(name))] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return (Hyperparameters, (self._values,))

    def __repr__(self) -> str:
        return f"Hyperparameters({self._values!r})"

    def dict(self) -> dict[str, Any]:
        """All values by their names in the file."""
        return dict(self._values)


class _File(Part, kw_only=True):
    """The form of the file. Only who and where is required: by hand the rest may be left out."""

    taskid: str
    role: str
    job: Job
    realm: str = ""
    task: str = "local"
    backend: str = "p2p"
    brokers: list[BrokerEntry] = field(default_factory=list)
    channels: list[Channel]
    group_association: dict[str, str] = field(default_factory=dict)
    dataset: str | None = ""
    dataset_id: str = ""
    dataset_sha256: str = ""
    hyperparameters: dict[str, Any] | None = None
    base_model: BaseModel | None = None
    optimizer: Sorted | None = None
    selector: Sorted | None = None
    datasampler: Sorted | None = None
    privacy: Sorted | None = None
    registry: Registry | None = None
    dependencies: list[str] | None = None
    max_run_time: float | None = None
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    restart: RestartPolicy = field(default_factory=lambda: RestartPolicy(attempts=0))
    schema: str = ""
    peers: dict[str, int] = field(default_factory=dict)
    from_user: bool = False


class Config:
    """What a role's code is constructed with: ``Config("config.json")``.

    :param source: a path to a JSON or YAML file, its contents as a mapping, or a :class:`flame.spec.nouns.TaskConfig`.
    :raises flame.errors.SpecError: the file cannot be read, or a field of it is wrong; the text names both.

    :ivar task_id: this task's id; it is the worker's name on its channels.
    :ivar role: the role's name in the schema.
    :ivar job: ``job_id`` and ``name``.
    :ivar schema: the schema's name; empty by hand.
    :ivar backend: the backend of channels that name none.
    :ivar brokers: ``sort_to_host``: address by sort.
    :ivar channels: channel by name, those that the role is at one end of.
    :ivar func_tag_map: channel's name by function tag of this role.
    :ivar group_association: group by channel.
    :ivar peers: how many peers the expansion made, by channel; empty by hand.
    :ivar dataset: the dataset's URL, or path; empty for a role without one. Where it may be a URL, use ``dataset_path``.
    :ivar from_user: a participant brings this worker: it may sit behind a NAT, whatever its dataset.
    :ivar policy: the round policy.
    :ivar restart: how lost workers are replaced; by hand nobody does.
    """

    def __init__(self, source: str | os.PathLike[str] | Mapping[str, Any] | TaskConfig = "config.json") -> None:
        raw, where = _read(source)
        document = _convert(raw, where)
        self.task_id = document.taskid
        self.role = document.role
        self.job = document.job
        self.realm = document.realm
        self.task = document.task
        self.schema = document.schema
        self.backend = document.backend
        self.brokers = Brokers(sort_to_host={entry.sort: entry.host for entry in document.brokers})
        self.channels = {channel.name: channel for channel in document.channels if document.role in channel.pair}
        self.func_tag_map = {
            tag: channel.name for channel in self.channels.values() for tag in channel.func_tags.get(self.role, ())
        }
        self.group_association = document.group_association
        self.peers = document.peers
        self.dataset = document.dataset or ""
        self._dataset_sha256 = document.dataset_sha256
        self.from_user = document.from_user
        self.hyperparameters = Hyperparameters(document.hyperparameters)
        self.base_model = document.base_model or BaseModel()
        self.optimizer = document.optimizer or Sorted(sort="fedavg")
        self.selector = document.selector or Sorted()
        self.datasampler = document.datasampler or Sorted()
        self.privacy = document.privacy or Sorted()
        self.registry = document.registry or Registry()
        self.dependencies = document.dependencies or []
        self.max_run_time = document.max_run_time
        self.policy = document.policy
        self.restart = document.restart
        if not self.channels:
            raise SpecError(f"no channel has the role {self.role!r} in its pair", f"{where}: channels")

    def group(self, channel: str) -> str:
        """This worker's group on a channel."""
        return self.channels[channel].group_by.groupable_value(self.group_association.get(channel))

    @functools.cached_property
    def dataset_path(self) -> Path:
        """The dataset as a file of this host: a local one as it is, anything else as a copy, downloaded once a host and version.

        :raises flame.errors.DatasetError: it cannot be had, or is not what was promised.
        """
        from flame.sdk.dataset_cache import local_copy
        from flame.sdk.link import current

        if not self.dataset:
            raise DatasetError(f"The role {self.role!r} has no dataset; its task in the job names none.")
        link = current()
        try:
            return local_copy(self.dataset, self._dataset_sha256, tell=link.waiting)
        finally:
            link.waiting("")

    def __repr__(self) -> str:
        return f"Config(task_id={self.task_id!r}, role={self.role!r}, job={self.job.name!r})"


def load_config(source: str | os.PathLike[str]) -> Config:
    """The same as ``Config(source)``; some of Flame's scripts spell it this way."""
    return Config(source)


def _read(source: str | os.PathLike[str] | Mapping[str, Any] | TaskConfig) -> tuple[Any, str]:
    """The raw document, and what to call it in an error."""
    if isinstance(source, TaskConfig):
        return msgspec.to_builtins(source), "the task's configuration"
    if isinstance(source, Mapping):
        return source, "the configuration"
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(f"the configuration cannot be read: {reason}", str(path)) from error
    if path.suffix.lower() in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text), str(path)
        except yaml.YAMLError as error:
            raise SpecError(f"this is not YAML: {' '.join(str(error).split())}", str(path)) from error
    try:
        return json.loads(text), str(path)
    except json.JSONDecodeError as error:
        raise SpecError(f"this is not JSON: {error.msg}", f"{path}: line {error.lineno}") from error


def _convert(raw: Any, where: str) -> _File:
    if not isinstance(raw, Mapping):
        raise SpecError("a configuration is an object with fields such as taskid, role and channels", where)
    known = {info.encode_name for info in msgspec.structs.fields(_File)}
    unknown = [key for key in raw if key not in known and key not in ("//", "groups")]
    if unknown:
        log.info("%s: passing over what is not known here: %s", where, ", ".join(map(str, unknown)))
    try:
        return msgspec.convert(_without_nulls(raw), _File)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        raise SpecError(
            message[:1].lower() + message[1:], f"{where}: {place.strip('`.')}" if place else where
        ) from error


def _without_nulls(raw: Any) -> Any:
    """Flame's writers put null where there is nothing to say; and ``//`` is a comment."""
    if isinstance(raw, Mapping):
        return {key: _without_nulls(value) for key, value in raw.items() if value is not None and key != "//"}
    if isinstance(raw, list):
        return [_without_nulls(value) for value in raw]
    return raw
