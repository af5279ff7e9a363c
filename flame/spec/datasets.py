"""Which dataset goes to which worker: the dataSpec of a job, and the datasets that it brings.

A dataSpec names datasets by id. A job's folder may bring files of datasets that no server knows yet; these
have no id, so they are found by name, or, where the counts agree, in order: the ids in the order
of the expansion (roles, groups, then the lists), the files in natural order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path as FilePath
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from flame.errors import SpecError
from flame.spec.nouns import Schema
from flame.spec.places import Path, Places
from flame.spec.read import reach
from flame.spec.shape import describe, listing
from flame.spec.topology import associations

#: A dataSpec's entries as plain data, each with the place of every id in the file that it came from.
Entries = list[dict[str, Any]]


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key to sort names as people do: ``dataset2`` before ``dataset10``."""
    return [(0, int(part)) if part.isdecimal() else (1, part.casefold()) for part in re.split(r"(\d+)", name) if part]


class Local:
    """A dataset that the job brings: its form as plain data, and the words by which a dataSpec may call it."""

    def __init__(self, data: dict[str, Any], label: str, words: Collection[str], file: str, inside: Path) -> None:
        self.data = data
        self.label = label
        self.words = {str(word) for word in (*words, data.get("id"), data.get("name")) if word}
        self.file = file
        self.inside = inside


def locate(url: str, base: FilePath, where: str) -> str:
    """A dataset's URL, made absolute: a path without a scheme is relative to the file that says it.

    :raises flame.errors.SpecError: a relative path leads to nothing.
    """
    scheme = urlsplit(url).scheme if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) else ""
    if scheme or not url.strip():
        return url
    path = reach(base, url, where)
    if not FilePath(url).is_absolute() and not path.exists():
        raise SpecError(f"there is no file {url!r} in {base}; give a path that exists, or a URL.", where)
    return str(path)


def stem(url: str) -> str:
    """A short name for a dataset that has none: its file's, without the ending."""
    path = PurePosixPath(urlsplit(url).path or url)
    return path.name.split(".")[0] or path.name or "dataset"


def only_place(schema: Schema | None, where: str) -> tuple[str, str]:
    """The one data-consuming role of a schema, and its one group; for datasets that come without either.

    :raises flame.errors.SpecError: there are several, so the job must say which.
    """
    role = only_role(schema, where)
    assert schema is not None
    candidates = associations(schema, next(one for one in schema.roles if one.name == role))
    if len(candidates) > 1:
        groups = sorted({group for one in candidates for group in one.values()})
        raise SpecError(
            f"role {role!r} has several groups ({listing(groups)}); write the datasets under their groups.", where
        )
    return role, next(iter(candidates[0].values()), "default")


def only_role(schema: Schema | None, where: str) -> str:
    """The one data-consuming role of a schema."""
    if schema is None:
        raise SpecError("the job's schema is not at hand, so dataSpec must name role and group of each dataset.", where)
    roles = [role.name for role in schema.roles if role.is_data_consumer]
    if len(roles) != 1:
        what = f"several roles consume data ({listing(roles)})" if roles else "no role consumes data"
        raise SpecError(f"{what}; write the datasets under the name of the role that is meant.", where)
    return roles[0]


def by_role(data: Any, schema: Schema | None, where: str) -> Iterator[tuple[str, str, Any, Path]]:
    """The short ways to give datasets, as ``(role, group, datasets, path)``.

    A list goes to the one group of the one data-consuming role; an object has groups, or roles, as its keys.
    """
    if isinstance(data, list):
        yield *only_place(schema, where), data, ()
        return
    if not isinstance(data, dict):
        raise SpecError(f"must be a list of datasets, or such lists by group, not {describe(data)}.", where)
    roles = {role.name for role in schema.roles} if schema is not None else set()
    for key, value in data.items():
        if isinstance(value, dict):
            for group, inner in value.items():
                yield key, group, inner, (key, group)
        elif key in roles:
            assert schema is not None
            one = [role for role in schema.roles if role.name == key]
            candidates = associations(schema, one[0])
            if len(candidates) > 1:
                groups = sorted({group for each in candidates for group in each.values()})
                raise SpecError(
                    f"role {key!r} has several groups ({listing(groups)}); write the datasets under their groups.",
                    where,
                )
            yield key, next(iter(candidates[0].values()), "default"), value, (key,)
        else:
            yield only_role(schema, where), key, value, (key,)


def entries(data: Any, schema: Schema | None, places: Places, notes: list[str], *, file: str, inside: Path) -> Any:
    """A dataSpec in today's form, whichever way it was written; registers the place of each part.

    :param file: where it was written, at ``inside``.
    """
    here = Places({(): (file, inside)})
    users: list[tuple[str, str, int, Path]] = []
    if isinstance(data, dict) and {"fromSystem", "fromUser"} & data.keys() and "role" not in data:
        users = list(_brought(data.get("fromUser"), schema, here.under("fromUser"), (*inside, "fromUser")))
        data, inside = _older(data, schema, here, notes), (*inside, "fromSystem")
        here = Places({(): (file, inside)})
        if users and not data:
            data = {}
    elif isinstance(data, list) and (not data or any(isinstance(one, dict) for one in data)):
        places.put(("dataSpec",), file, inside)
        return data
    elif isinstance(data, dict) and {"role", "datasetGroups"} & data.keys():
        places.put(("dataSpec", 0), file, inside)
        return [data]
    if not isinstance(data, list | dict):
        raise SpecError(f"must be a list of entries with role and datasetGroups, not {describe(data)}.", here.where())
    collected: dict[str, dict[str, Any]] = {}
    order: list[tuple[str, str, Path]] = []
    for role, group, ids, path in by_role(data, schema, here.where()):
        collected.setdefault(role, {})[group] = ids
        order.append((role, group, path))
    for role, _, _, _ in users:
        collected.setdefault(role, {})
    index = {role: at for at, role in enumerate(collected)}
    places.put(("dataSpec",), file, inside)
    for role, group, path in order:
        places.put(("dataSpec", index[role], "datasetGroups", group), file, (*inside, *path))
    for role, group, _, written in users:
        places.put(("dataSpec", index[role], "fromUser", group), file, written)
    counts: dict[str, dict[str, int]] = {}
    for role, group, count, _ in users:
        counts.setdefault(role, {})[group] = count
    return [
        {"role": role, "datasetGroups": groups, **({"fromUser": counts[role]} if role in counts else {})}
        for role, groups in collected.items()
    ]


def _brought(users: Any, schema: Schema | None, here: Places, inside: Path) -> Iterator[tuple[str, str, int, Path]]:
    """The earlier form's counts of workers that participants bring, as ``(role, group, count, path)``; none where all are 0."""
    if not users:
        return
    if not isinstance(users, dict):
        raise SpecError(f'must be counts by group, such as {{"us": 2}}, not {describe(users)}.', here.where() or None)
    if not any(users.values()):
        return
    by_role = all(isinstance(value, dict) for value in users.values())
    for role, groups in users.items() if by_role else [(only_role(schema, here.where()), users)]:
        place = next((one for one in schema.roles if one.name == role), None) if schema is not None else None
        known = {value for one in associations(schema, place) for value in one.values()} if schema and place else set()
        for group, count in groups.items():
            if not count:
                continue
            # Some of these files call their only group `default`, whatever its name.
            meant = next(iter(known)) if len(known) == 1 and group == "default" else group
            yield role, meant, count, (*inside, *([role] if by_role else []), group)


def _older(data: dict[str, Any], schema: Schema | None, here: Places, notes: list[str]) -> Any:
    """Flame's earlier dataSpec: ``fromSystem`` has the ids, ``fromUser`` counts of workers that participants bring."""
    ids = data.get("fromSystem") or []
    if isinstance(ids, dict) and schema is not None and all(isinstance(one, list) for one in ids.values()):
        # Some of these files number their only group instead of naming it.
        role = next((one for one in schema.roles if one.is_data_consumer), None)
        candidates = associations(schema, role) if role is not None else []
        groups = {group for one in candidates for group in one.values()}
        if len(candidates) == 1 and len(ids) == 1 and not (groups & ids.keys()):
            (written,) = ids
            notes.append(
                f"{here.where('fromSystem')}: the datasets of {written!r} go to {listing(sorted(groups))}, the only group."
            )
            return ids[written]
    return ids


def match(
    data_spec: Any, local: list[Local], registered: Collection[str], places: Places, notes: list[str]
) -> list[Local]:
    """Find the datasets that a dataSpec names among those that the job brings; gives those that are used.

    Each used one gets the id by which the dataSpec calls it. A dataSpec that has another form than it should is
    left for the form's own check.

    :param registered: ids that the server knows.
    :raises flame.errors.SpecError: a dataset is neither brought nor registered.
    """
    local = _distinct(local)
    called: dict[str, list[Local]] = {}
    for one in local:
        for word in one.words:
            called.setdefault(word, []).append(one)
    used: dict[str, Local] = {}
    unknown: dict[str, Path] = {}
    for ref, path in _ids(data_spec):
        if ref in used or ref in unknown:
            continue
        found = called.get(ref, [])
        exact = [one for one in found if one.data.get("id") == ref]
        if len(found) > 1 and len(exact) != 1:
            raise SpecError(
                f"{len(found)} datasets are called {ref!r} ({listing(one.label for one in found)}); "
                "give them different names.",
                places.where(*path),
            )
        if found:
            used[ref] = (exact or found)[0]
        elif ref not in registered:
            unknown[ref] = path
    taken = {id(one) for one in used.values()}
    free = [one for one in local if id(one) not in taken]
    if unknown and len(unknown) == len(free):
        pairs = dict(zip(unknown, free, strict=True))
        used.update(pairs)
        free = []
        matched = ", ".join(f"{ref} is {one.label}" for ref, one in pairs.items())
        notes.append(
            f"No server knows the dataset ids of dataSpec; matched in order with the job's own datasets: {matched}."
        )
    elif unknown:
        ref, path = next(iter(unknown.items()))
        sentence = f"unknown dataset {ref!r}: it is not registered and the job does not bring it; "
        if free:
            sentence += (
                f"{len(unknown)} of dataSpec's ids are unknown, but {len(free)} of the job's datasets are free to be matched "
                f"({listing(one.label for one in free)}): make the counts agree."
            )
        else:
            sentence += "register it, or add its dataset file to the job."
        raise SpecError(sentence, places.where(*path))
    if free:
        notes.append(f"Not used, because dataSpec does not name them: {listing(one.label for one in free)}.")
    chosen: list[Local] = []
    for ref, one in used.items():
        # A dataset that is called by two words keeps one entry for each, so that every id in the dataSpec stays as written.
        chosen.append(Local({**one.data, "id": ref}, one.label, (), one.file, one.inside))
    return chosen


def _distinct(local: list[Local]) -> list[Local]:
    """Without repetitions of a dataset that is listed twice, in two groups for example, under one id."""
    kept: dict[Any, Local] = {}
    for index, one in enumerate(local):
        kept.setdefault(repr(sorted(one.data.items())) if one.data.get("id") is not None else index, one)
    return list(kept.values())


def _ids(data_spec: Any) -> Iterator[tuple[str, Path]]:
    """The ids of a dataSpec with their paths, in the order of the expansion."""
    if not isinstance(data_spec, list):
        return
    order = sorted(
        (entry["role"], index)
        for index, entry in enumerate(data_spec)
        if isinstance(entry, dict)
        and isinstance(entry.get("role"), str)
        and isinstance(entry.get("datasetGroups"), dict)
    )
    for _, index in order:
        for group, ids in sorted(data_spec[index]["datasetGroups"].items()):
            for at, ref in enumerate(ids if isinstance(ids, list) else []):
                if isinstance(ref, str):
                    yield ref, ("dataSpec", index, "datasetGroups", group, at)
