"""The datasets that a JOB brings with it: files beside the job file, or a list in it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path as FilePath
from typing import Any

from flame.errors import FlameError, SpecError
from flame.spec import datasets, normal
from flame.spec.nouns import Dataset, Schema
from flame.spec.places import Path, Places
from flame.spec.read import SUFFIXES, files_in, reach, read
from flame.spec.shape import describe, shape

#: Largest .json or .yaml file that is opened to see whether it describes a dataset or is the data.
_PEEK = 1 << 20


def dataset_files(folder: FilePath) -> list[FilePath]:
    """The files ``dataset*.json`` and ``dataset*.yaml`` of a folder, in natural order."""
    found = [
        file for file in files_in(folder) if file.name.lower().startswith("dataset") and file.suffix.lower() in SUFFIXES
    ]
    return sorted(found, key=lambda file: datasets.natural(file.name))


def name_in(folder: FilePath, path: FilePath) -> str:
    """What to call a file in a complaint: relative to the job's folder where it lies in it."""
    path = path.resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


class Brought:
    """Collects what a job brings.

    :param folder: the job's folder; relative paths begin there.
    :param file: what the job file is called.
    :param places: where parts of the job were written.
    :param notes: gets what the user should be told.
    :ivar local: what was found so far.
    """

    def __init__(self, folder: FilePath, file: str, places: Places, notes: list[str]) -> None:
        self.folder = folder
        self.file = file
        self.places = places
        self.notes = notes
        self.local: list[datasets.Local] = []

    def find(self) -> None:
        """Take the dataset files of the job's folder."""
        self.local += [self._described(file) for file in dataset_files(self.folder)]

    def take(self, items: list[Any], path: Path) -> None:
        """Take what the job file lists at ``path``: paths of data or of dataset files, URLs, or datasets inline."""
        for index, item in enumerate(items):
            inside = (*path, index)
            where = self.places.where(*inside)
            if isinstance(item, str):
                file = reach(self.folder, item, where)
                if _describes_dataset(file):
                    self.local.append(self._described(file))
                    continue
                url = datasets.locate(item, self.folder, where)
                one: Any = {"name": datasets.stem(url), "url": url}
                self.local.append(datasets.Local(one, item, (item,), self.file, inside))
            elif isinstance(item, dict):
                one = normal.dataset(item, where, self.notes.append)
                if isinstance(one.get("url"), str):
                    one["url"] = datasets.locate(one["url"], self.folder, self.places.where(*inside, "url"))
                    one.setdefault("name", datasets.stem(one["url"]))
                shape(one, Dataset, Places({(): (self.file, inside)}))
                self.local.append(datasets.Local(one, one["name"], (), self.file, inside))
            else:
                raise SpecError(f"must be a path, a URL or an object, not {describe(item)}.", where)

    def derive(self, given: Any, schema: Schema | None) -> Any:
        """The dataSpec of a job that has none: datasets go to the roles and groups under which they are listed.

        :param given: the job's ``datasets``; None when dataset files were found instead.
        """
        if given is None:
            self._number()
            refs = [one.data["id"] for one in self.local]
            return datasets.entries(refs, schema, self.places, self.notes, file=self.file, inside=())
        nested: dict[str, dict[str, list[datasets.Local]]] = {}
        for role, group, items, path in datasets.by_role(given, schema, self.places.where("datasets")):
            if not isinstance(items, list):
                raise SpecError(
                    f"must be a list of datasets, not {describe(items)}.", self.places.where("datasets", *path)
                )
            start = len(self.local)
            self.take(items, ("datasets", *path))
            nested.setdefault(role, {})[group] = self.local[start:]
        self._number()
        refs_of = {
            role: {group: [one.data["id"] for one in found] for group, found in groups.items()}
            for role, groups in nested.items()
        }
        return datasets.entries(refs_of, schema, self.places, self.notes, file=self.file, inside=("datasets",))

    def _number(self) -> None:
        """Give each dataset without an id one: its name, with a part of its URL's hash where names are alike."""
        names = [one.data["name"] for one in self.local]
        for one in self.local:
            if one.data.get("id") is None:
                name = str(one.data["name"])
                if names.count(name) > 1:
                    name += "-" + hashlib.sha256(one.data["url"].encode()).hexdigest()[:8]
                one.data["id"] = re.sub(r"\s+", "-", name)
                one.words = {one.data["id"]}

    def _described(self, file: FilePath) -> datasets.Local:
        name = name_in(self.folder, file)
        one = normal.dataset(read(file, name), name, self.notes.append)
        if isinstance(one, dict) and isinstance(one.get("url"), str):
            one["url"] = datasets.locate(one["url"], file.resolve().parent, f"{name}: url")
        shape(one, Dataset, Places({(): (name, ())}))
        return datasets.Local(one, name, (file.stem,), name, ())


def _describes_dataset(file: FilePath) -> bool:
    """Whether a path is that of a JSON or YAML file that describes a dataset, rather than being the data."""
    try:
        if file.suffix.lower() not in SUFFIXES or not file.is_file() or file.stat().st_size > _PEEK:
            return False
        data = read(file)
    except (OSError, FlameError):
        return False
    return isinstance(data, dict) and isinstance(data.get("url"), str)
