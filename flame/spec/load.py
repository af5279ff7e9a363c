"""Files -> forms: reads a JOB, and single schemas, datasets and designs.

A JOB is a folder or a job file. Two ways of writing one are understood, and can be mixed:

* Flame's own folder: ``job.json``, ``schema.json``, ``dataSpec.json``, ``modelSpec.json``, ``dataset*.json`` and one zip
  (or a folder ``code``) with a folder for each role;
* one short file that says everything, with the schema, the code and the datasets given by path, by URL or inline, and
  the keys of a modelSpec at its top level.

YAML is read wherever JSON is. What comes out is the same: a :class:`flame.spec.nouns.JobForm`, the code as a bundle,
and the places where everything was written, so that a later complaint can name the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from flame.errors import SpecError, UsageError
from flame.spec import bundle, datasets, normal
from flame.spec.check import check_dataset, check_job, check_schema
from flame.spec.gather import Brought, dataset_files, name_in
from flame.spec.nouns import Compute, Dataset, Form, JobForm, Name, Schema
from flame.spec.override import apply_overrides, split
from flame.spec.places import Places
from flame.spec.read import SUFFIXES, files_in, parse, reach, read, read_noun
from flame.spec.shape import describe, listing, shape, suggestion

__all__ = [
    "DesignForm",
    "JobBundle",
    "apply_overrides",
    "load_dataset",
    "load_datasets",
    "load_design",
    "load_job",
    "load_schema",
]

#: What a job file may give by path instead of inline.
_BY_PATH = {"schema": "schemaPath", "dataSpec": "dataSpecPath", "modelSpec": "modelSpecPath", "code": "codePath"}


class JobBundle(NamedTuple):
    """A JOB, read and checked.

    :ivar form: what to send to the server; ``form.code`` is the digest of ``archive``.
    :ivar archive: the code as a bundle to upload; None when the job uses the code of a registered design.
    :ivar places: where each part was written, for further complaints.
    :ivar notes: sentences to tell the user: what was matched, what was left out.
    :ivar design: what the files call the job's design, where the job brings schema and code itself.
    :ivar folder: the folder that relative paths were read from.
    """

    form: JobForm
    archive: bytes | None
    places: Places
    notes: tuple[str, ...]
    design: str | None
    folder: FilePath


class DesignForm(Form, frozen=True, kw_only=True):
    """What a user writes to make a design."""

    name: Name
    description: str = ""


def load_job(path: str | FilePath, overrides: Iterable[str] = (), *, registered: Collection[str] = ()) -> JobBundle:
    """Read a JOB and check all of it that can be checked without a server.

    :param path: a job folder or a job file.
    :param overrides: ``path=value``, see :func:`flame.spec.override.apply_overrides`. ``schema=FILE``, ``code=PATH``,
        ``modelSpec=FILE``, ``dataSpec=FILE`` exchange a whole part; such a path is relative to the current directory.
    :param registered: ids of datasets that the server knows.
    :raises flame.errors.UsageError: a file is not there or cannot be read; an override leads nowhere.
    :raises flame.errors.SpecError: the job says something that cannot be.
    """
    return _Loader(reach(FilePath.cwd(), str(path), str(path)), str(path), list(overrides), registered).load()


def load_schema(source: str | FilePath) -> Schema:
    """Read and check a schema from a file, or from standard input when ``source`` is ``-``."""
    data, name = read_noun(source)
    places = Places({(): (name, ())})
    return check_schema(shape(normal.schema(data, name, lambda note: None), Schema, places), places)


def load_dataset(source: str | FilePath) -> Dataset:
    """Read and check one dataset from a file or from standard input."""
    found = load_datasets(source)
    if len(found) != 1:
        raise SpecError(f"one dataset is expected here; there are {len(found)}.", str(source))
    return found[0]


def load_datasets(source: str | FilePath) -> list[Dataset]:
    """Read datasets: a file with one or with a list, a folder with ``dataset*`` files, or standard input."""
    path = reach(FilePath.cwd(), str(source), str(source))
    if str(source) != "-" and path.is_dir():
        files = dataset_files(path)
        if not files:
            raise UsageError(f"{source}: there is no dataset*.json or dataset*.yaml in this folder.")
        return [dataset for file in files for dataset in load_datasets(file)]
    data, name = read_noun(source)
    base = path.parent
    several = isinstance(data, list)
    found: list[Dataset] = []
    for index, one in enumerate(data if several else [data]):
        places = Places({(): (name, (index,) if several else ())})
        one = normal.dataset(one, name, lambda note: None)
        if isinstance(one, dict) and isinstance(one.get("url"), str):
            one["url"] = datasets.locate(one["url"], base, places.where("url"))
        found.append(check_dataset(shape(one, Dataset, places), places))
    return found


def load_computes(source: str | FilePath) -> list[Compute]:
    """Read one compute, or a list of them, from a file or from standard input."""
    data, name = read_noun(source)
    several = isinstance(data, list)
    return [
        shape(one, Compute, Places({(): (name, (index,) if several else ())}))
        for index, one in enumerate(data if several else [data])
    ]


def load_design(source: str | FilePath) -> DesignForm:
    """Read a design's name and description from a file or from standard input."""
    data, name = read_noun(source)
    if isinstance(data, dict):
        data = {key: value for key, value in normal.present(data).items() if key not in ("id", "userId")}
    return shape(data, DesignForm, Places({(): (name, ())}))


class _Loader:
    """The state of reading one JOB: what was read so far, where, and what is to be told."""

    def __init__(self, path: FilePath, written: str, overrides: list[str], registered: Collection[str]) -> None:
        self.file = self._job_file(path, written)
        self.folder = self.file.parent
        self.places = Places({(): (self.file.name, ())})
        self.notes: list[str] = []
        self.registered = registered
        self.overrides = overrides
        #: Parts that the command line exchanges as a whole: key -> file.
        self.exchanged: dict[str, FilePath] = {}

    @staticmethod
    def _job_file(path: FilePath, written: str) -> FilePath:
        if path.is_dir():
            found = [path / f"job{suffix}" for suffix in SUFFIXES if (path / f"job{suffix}").is_file()]
            if len(found) > 1:
                raise UsageError(
                    f"{written}: there are {listing(file.name for file in found)}; name the one that is meant."
                )
            if not found:
                raise UsageError(f"{written}: there is no job.yaml or job.json in this folder.")
            return found[0]
        if not path.exists():
            raise UsageError(f"{written}: there is no such job folder or job file.")
        return path

    def load(self) -> JobBundle:
        self._take_exchanges()
        data = read(self.file, self.file.name)
        if not isinstance(data, dict):
            raise SpecError(
                f"a job is an object with keys such as name and schema, not {describe(data)}.", self.file.name
            )
        data = normal.job(data, self.file.name, self.notes.append)
        self._refuse_unknown(data)
        job: dict[str, Any] = {
            key: data[key]
            for key in (
                "priority",
                "maxRunTime",
                "backend",
                "brokers",
                "policy",
                "registry",
                "restart",
                "onFailure",
                "placement",
            )
            if key in data
        }
        design = data.get("designId")
        job["name"] = data.get("name", design or self.folder.name or "job")
        job["schema"] = self._schema(data)
        schema = shape(job["schema"], Schema, self.places.under("schema")) if job["schema"] is not None else None
        archive, code_name = self._code(data, schema)
        job["code"] = bundle.digest(archive) if archive is not None else None
        if design is not None and (schema is None or archive is None):
            job["designId"] = design
        job["modelSpec"] = self._model_spec(data, job)
        try:
            job["dataSpec"], job["datasets"] = self._data(data, schema)
        except SpecError:
            if schema is not None and not self.overrides:
                # Datasets find no place where the schema is wrong; then that is what the user should hear first.
                check_schema(schema, self.places.under("schema"), data_spec_follows=True)
            raise
        form = shape(job, JobForm, self.places)
        form = apply_overrides(form, self.overrides, self.places, self.notes)
        if schema is not None and archive is None and form.design_id is None:
            raise SpecError(
                "the job has no code: give the roles' folders as a zip, as a folder 'code', or by the key code.",
                self.file.name,
            )
        code = bundle.folders(archive, code_name) if archive is not None else None
        form = check_job(form, code=code, code_name=code_name, datasets=self.registered, places=self.places)
        return JobBundle(form, archive, self.places, tuple(self.notes), design, self.folder)

    def _take_exchanges(self) -> None:
        kept: list[str] = []
        for override in self.overrides:
            steps, value = split(override)
            if (
                len(steps) == 1
                and steps[0] in _BY_PATH
                and isinstance(parse(value, f"--set {override}", json_only=False), str)
            ):
                self.exchanged[steps[0]] = reach(FilePath.cwd(), value.strip(), f"--set {override}")
            else:
                kept.append(override)
        self.overrides = kept

    def _refuse_unknown(self, data: dict[str, Any]) -> None:
        fields = ["name", "designId", "schema", "code", "datasets", "dataSpec", "modelSpec", *_BY_PATH.values()]
        fields += [*normal.MODEL_KEYS, "backend", "brokers", "priority", "maxRunTime", "registry", "policy"]
        fields += ["restart", "onFailure", "placement"]
        for key in data:
            if key not in fields:
                raise SpecError(f"unknown key {key!r}; {suggestion(key, fields, 'the keys of a job')}", self.file.name)
        for key, by_path in _BY_PATH.items():
            if key in data and by_path in data:
                raise SpecError(f"{key} and {by_path} say the same thing; keep one of them.", self.file.name)

    def _name(self, path: FilePath) -> str:
        return name_in(self.folder, path)

    def _part(self, data: dict[str, Any], key: str) -> tuple[Any, FilePath | None]:
        """One part of the job: inline, from the file that is named, or from the file with the usual name; None if there is none.

        Gives the file that it was read from; None for inline.
        """
        if key in self.exchanged:
            path = self.exchanged[key]
        else:
            value = data.get(key, data.get(_BY_PATH[key]))
            if value is not None and not isinstance(value, str):
                return value, None
            if isinstance(value, str):
                path = reach(self.folder, value, self.places.where(key))
            else:
                found = [
                    self.folder / f"{key}{suffix}" for suffix in SUFFIXES if (self.folder / f"{key}{suffix}").is_file()
                ]
                if not found:
                    return None, None
                path = found[0]
        return read(path, self._name(path)), path

    def _schema(self, data: dict[str, Any]) -> Any:
        schema, path = self._part(data, "schema")
        name = self.file.name
        if path is not None:
            name = self._name(path)
            self.places.put(("schema",), name)
        return normal.schema(schema, name, self.notes.append)

    def _model_spec(self, data: dict[str, Any], job: dict[str, Any]) -> Any:
        spec, path = self._part(data, "modelSpec")
        spec = normal.model_spec({} if spec is None else spec)
        if path is not None:
            self.places.put(("modelSpec",), self._name(path))
        if not isinstance(spec, dict):
            return spec
        if "registry" in spec:
            if "registry" in job:
                raise SpecError(
                    "the registry is given twice, here and in the job file; keep one.",
                    self.places.where("modelSpec", "registry"),
                )
            job["registry"] = spec.pop("registry")
            self.places.put(
                ("registry",),
                self._name(path) if path else self.file.name,
                ("registry",) if path else ("modelSpec", "registry"),
            )
        for key in normal.MODEL_KEYS:
            if key not in data:
                continue
            mine, theirs = data[key], spec.get(key)
            if isinstance(mine, dict) and isinstance(theirs, dict) and key == "hyperparameters":
                for inner in mine:
                    self.places.put(("modelSpec", key, inner), self.file.name, (key, inner))
                spec[key] = {**theirs, **mine}
            elif theirs is not None:
                raise SpecError(f"{key} is given twice, here and in the modelSpec; keep one.", self.places.where(key))
            else:
                self.places.put(("modelSpec", key), self.file.name, (key,))
                spec[key] = mine
        return spec

    def _code(self, data: dict[str, Any], schema: Schema | None) -> tuple[bytes | None, str]:
        roles = [role.name for role in schema.roles] if schema is not None else None
        source = self._code_source(data, roles)
        if source is None:
            return None, "the code"
        name = "the job's folder" if source.resolve() == self.folder else self._name(source)
        return bundle.pack(source, roles, name), name

    def _code_source(self, data: dict[str, Any], roles: list[str] | None) -> FilePath | None:
        if "code" in self.exchanged:
            return self.exchanged["code"]
        value = data.get("code", data.get("codePath"))
        if value is not None:
            if not isinstance(value, str):
                raise SpecError(
                    f"must be the path of a folder or a zip, not {describe(value)}.", self.places.where("code")
                )
            return reach(self.folder, value, self.places.where("code"))
        zips = [file for file in files_in(self.folder) if file.suffix.lower() == ".zip"]
        if len(zips) > 1:
            raise SpecError(
                f"there are several zips ({listing(file.name for file in zips)}); say which by the key code.",
                self.file.name,
            )
        if zips:
            return zips[0]
        if (self.folder / "code").is_dir():
            return self.folder / "code"
        if roles and any((self.folder / role / bundle.MAIN).is_file() for role in roles):
            return self.folder
        return None

    def _data(self, data: dict[str, Any], schema: Schema | None) -> tuple[Any, list[dict[str, Any]]]:
        """The dataSpec, and the datasets that the job brings and uses."""
        spec, path = self._part(data, "dataSpec")
        given = data.get("datasets")
        brought = Brought(self.folder, self.file.name, self.places, self.notes)
        if given is None:
            brought.find()
        elif spec is not None:
            brought.take(given if isinstance(given, list) else [given], ("datasets",))
        if spec is not None:
            name = self._name(path) if path is not None else self.file.name
            inside = () if path is not None else ("dataSpec",)
            spec = datasets.entries(spec, schema, self.places, self.notes, file=name, inside=inside)
        elif given is not None or brought.local:
            spec = brought.derive(given, schema)
        else:
            spec = []
        used = datasets.match(spec, brought.local, self.registered, self.places, self.notes)
        for index, one in enumerate(used):
            self.places.put(("datasets", index), one.file, one.inside)
        return spec, [one.data for one in used]
