"""The registry of plain files, for places without MLflow.

    ROOT/runs/JOB/params.json        the hyperparameters
    ROOT/runs/JOB/metrics.jsonl      a line of JSON a round
    ROOT/models/NAME/VERSION/        model.safetensors and about.json; versions count from 1

Several jobs may write at once: a version's folder is made beside its place and moved there whole, and the next number
is tried when another job was faster. What is made beside has the task's name, so that whoever comes after a worker that was killed in
the middle takes it over and nothing is left. ROOT is ``registry.uri`` (a path or a ``file:`` URL), else ``./registry``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import numpy.typing as npt

from flame.errors import WorkerError
from flame.sdk import modelfile
from flame.sdk.registries.base import Registry, Version

if TYPE_CHECKING:
    from flame.sdk.config import Config
    from flame.sdk.link import Link


_NEW = ".new-"
_STALE = 86_400.0  # seconds after which nobody copies a model any more


class LocalRegistry(Registry):
    """Files in a folder. Writing them is quick, so nothing is left to the background; a full disk becomes a warning."""

    sort = "local"

    def __init__(self, config: Config, link: Link) -> None:
        super().__init__(config, link)
        self.root = _folder(config.registry.uri)
        self.run = self.root / "runs" / quote(config.job.job_id, safe="")
        self._own = quote(f"{config.job.job_id}-{config.task_id}", safe="")
        self._kept: Version | None = None
        self._warned = False

    def save_params(self, params: Mapping[str, Any]) -> None:
        """See :class:`Registry`."""
        about = {"job": self.config.job.job_id, "name": self.config.job.name, "schema": self.config.schema}
        with _Trouble(self):
            self.run.mkdir(parents=True, exist_ok=True)
            self._write(self.run / "params.json", {**about, "hyperparameters": dict(params)})

    def save_metrics(self, round: int, metrics: Mapping[str, float]) -> None:
        """See :class:`Registry`."""
        line = json.dumps({"round": round, "time": time.time(), "metrics": dict(metrics)}) + "\n"
        with _Trouble(self), (self.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)

    def save_model(self, name: str, model: Any, path: Path) -> None:
        """See :class:`Registry`."""
        with _Trouble(self):
            versions = self.root / "models" / quote(name, safe="")
            versions.mkdir(parents=True, exist_ok=True)
            new = versions / f"{_NEW}{self._own}"
            _forget_unfinished(versions, new)
            new.mkdir()
            try:
                shutil.copyfile(path, new / "model.safetensors")
                about = {"job": self.config.job.job_id, "schema": self.config.schema, "time": time.time()}
                self._write(new / "about.json", about)
                place = _settle(new, versions)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            self._kept = Version(place.as_uri(), place.name)

    def load_model(self, name: str, version: int) -> dict[str, npt.NDArray[Any]]:
        """See :class:`Registry`."""
        path = self.root / "models" / quote(name, safe="") / str(version) / "model.safetensors"
        try:
            return modelfile.load(path)[0]
        except FileNotFoundError:
            there = _numbers(path.parent.parent)
            have = f"it has versions {', '.join(map(str, there))} of it" if there else "it has no model of that name"
            raise WorkerError(
                f"baseModel {name!r} version {version} is not in the registry {self.root}: {have}."
            ) from None
        except OSError as error:
            raise WorkerError(f"baseModel {name!r} version {version} cannot be read: {error}.") from error

    def finish(self, timeout: float) -> Version | None:
        """See :class:`Registry`: all is kept already."""
        return self._kept

    def _write(self, path: Path, document: Mapping[str, Any]) -> None:
        beside = path.with_name(f".{path.name}.{self._own}")
        beside.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(beside, path)

    def trouble(self, error: OSError) -> None:
        """Tell the user, once, that something could not be kept."""
        if not self._warned:
            self._warned = True
            self.link.warning(f"The registry {self.root} cannot be written: {error}. The job goes on without it.")


class _Trouble:
    """Turns an OSError into a warning: a registry never ends a job."""

    def __init__(self, registry: LocalRegistry) -> None:
        self._registry = registry

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, OSError):
            self._registry.trouble(error)
            return True
        return False


def _folder(uri: str) -> Path:
    parts = urlsplit(uri)
    return Path(unquote(parts.path) if parts.scheme == "file" else uri or "registry").expanduser().absolute()


def _numbers(versions: Path) -> list[int]:
    return sorted(int(entry.name) for entry in versions.glob("*") if entry.name.isdecimal())


def _forget_unfinished(versions: Path, mine: Path) -> None:
    """Remove what workers have begun that were killed: this task's, and of others what nobody can be at any more."""
    for begun in versions.glob(f"{_NEW}*"):
        with contextlib.suppress(FileNotFoundError):
            if begun == mine or time.time() - begun.stat().st_mtime > _STALE:
                shutil.rmtree(begun)


def _settle(new: Path, versions: Path) -> Path:
    """Move a finished folder to the first free number."""
    number = max(_numbers(versions), default=0) + 1
    while True:
        place = versions / str(number)
        try:
            # Moving onto a folder with something in it fails, so two jobs cannot get the same number.
            os.rename(new, place)
        except OSError:
            if not place.exists():
                raise
            number += 1
        else:
            return place
