"""Files as they were written -> the keys that the forms have today.

Flame's own files have changed over the years, and a short job file may leave things out. Here, and nowhere
else, older keys are renamed or dropped, a choice by name alone (``optimizer: fedprox``) is spelt out,
and an empty value is taken as absent. Where meaning is lost, a note says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Note = Callable[[str], None]

#: Choices by name with arguments; a plain name is enough.
SORTED = ("optimizer", "selector", "datasampler", "privacy", "compression", "registry")
#: Keys of a modelSpec. A short job file, and Flame's oldest job.json, has them at its top level.
MODEL_KEYS = ("baseModel", "hyperparameters", "dependencies", "optimizer", "selector", "datasampler", "privacy")

_OLD_JOB_KEYS = ("id", "userId", "schemaVersion", "codeVersion")
_OLD_SCHEMA_KEYS = ("id", "userId", "version", "connectors")
_OLD_CHANNEL_KEYS = ("isBidirectional", "isUnidirectional", "brokerHost")
_OLD_DATASET_KEYS = ("userId", "computeId")


def present(data: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have no value."""
    return {key: value for key, value in data.items() if value is not None}


def _without(data: dict[str, Any], old: tuple[str, ...], where: str, note: Note) -> dict[str, Any]:
    dropped = [key for key in old if key in data]
    if dropped:
        note(
            f"{where}: {', '.join(dropped)} {'means' if len(dropped) == 1 else 'mean'} nothing here any more; left out."
        )
    return {key: value for key, value in data.items() if key not in old}


def choice(value: Any) -> Any:
    """``"fedprox"`` -> ``{"sort": "fedprox"}``; an empty choice -> None, which leaves the default."""
    if isinstance(value, str):
        value = {"sort": value}
    if isinstance(value, dict):
        value = present(value)
        if not value.get("sort", "x") or not value:
            return None
    return value


def _choices(data: dict[str, Any]) -> dict[str, Any]:
    return present({key: choice(value) if key in SORTED else value for key, value in data.items()})


def job(data: dict[str, Any], where: str, note: Note) -> dict[str, Any]:
    """A job file's top level."""
    renamed = {"dataSpecFile": "dataSpecPath", "modelSpecFile": "modelSpecPath"}
    data = {renamed.get(key, key): value for key, value in present(data).items()}
    return _choices(_without(data, _OLD_JOB_KEYS, where, note))


def model_spec(data: Any) -> Any:
    """A modelSpec."""
    return _choices(data) if isinstance(data, dict) else data


def dataset(data: Any, where: str, note: Note) -> Any:
    """A dataset file. Flame's empty realm means anywhere."""
    if not isinstance(data, dict):
        return data
    data = _without(present(data), _OLD_DATASET_KEYS, where, note)
    if data.get("realm") == "":
        del data["realm"]
    return data


def schema(data: Any, where: str, note: Note) -> Any:
    """A schema. Its old ``defaultBackend`` is written into the channels that name none."""
    if not isinstance(data, dict):
        return data
    data = _without(present(data), _OLD_SCHEMA_KEYS, where, note)
    backend = data.pop("defaultBackend", None)
    if isinstance(data.get("roles"), list):
        data["roles"] = [_role(role) for role in data["roles"]]
    if isinstance(data.get("channels"), list):
        data["channels"] = [_channel(channel, backend, where, note) for channel in data["channels"]]
    elif "channels" not in data:
        data["channels"] = []
    return data


def _role(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    data = present(data)
    if isinstance(data.get("groupAssociation"), dict):
        data["groupAssociation"] = [data["groupAssociation"]]
    return data


def _channel(data: Any, backend: Any, where: str, note: Note) -> Any:
    if not isinstance(data, dict):
        return data
    data = _choices(_without(data, _OLD_CHANNEL_KEYS, f"{where}: channel {data.get('name')!r}", note))
    if data.get("backend") == "":
        del data["backend"]
    if backend is not None:
        data.setdefault("backend", backend)
    groups = data.get("groupBy")
    if isinstance(groups, dict):
        groups = present(groups)
        if groups.get("type") == "":
            groups["type"] = "tag"
        if groups.get("value") == []:
            del groups["value"]
        data["groupBy"] = groups
    if isinstance(data.get("funcTags"), dict):
        data["funcTags"] = present(data["funcTags"])
    return data
