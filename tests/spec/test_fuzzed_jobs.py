"""Whatever stands in a job's files, the answer is a job or one of Flame's own errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.errors import FlameError
from flame.spec.check import check_job
from flame.spec.draw import draw_topology
from flame.spec.expand import expand, offline_job_id
from flame.spec.load import load_datasets, load_design, load_job, load_schema
from flame.spec.nouns import JobForm
from flame.spec.override import apply_overrides
from flame.spec.shape import shape

KEYS = [
    "name",
    "designId",
    "schema",
    "code",
    "datasets",
    "dataSpec",
    "modelSpec",
    "priority",
    "maxRunTime",
    "backend",
    "brokers",
    "policy",
    "registry",
    "roles",
    "channels",
    "isDataConsumer",
    "replica",
    "groupAssociation",
    "pair",
    "groupBy",
    "funcTags",
    "value",
    "type",
    "sort",
    "kwargs",
    "url",
    "realm",
    "id",
    "role",
    "datasetGroups",
    "fromSystem",
    "fromUser",
    "hyperparameters",
    "rounds",
    "optimizer",
    "selector",
    "baseModel",
    "version",
    "trainer",
    "aggregator",
    "us",
    "//",
    "defaultBackend",
    "compression",
    "schemaPath",
    "dataSpecPath",
    "modelSpecPath",
    "dataSpecFile",
]
WORDS = [
    "trainer",
    "aggregator",
    "us",
    "default",
    "param-channel",
    "a",
    "",
    "fedavg",
    "random",
    "p2p",
    "tag",
    "fetch",
    ".",
    "..",
    "/",
    "x://y",
    "code",
]

values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats(-1, 1) | st.sampled_from(WORDS) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=2), inner, max_size=5)
    ),
    max_leaves=25,
)
FILES = ("job.json", "schema.json", "dataSpec.json", "modelSpec.json", "dataset1.json")


@st.composite
def spoilt(draw: st.DrawFn) -> Callable[[Any], Any]:
    """A change at one or two places of a document: another value, a key gone, a key more."""
    changes = draw(
        st.lists(
            st.tuples(st.lists(st.integers(0, 5), max_size=5), st.integers(0, 3), values, st.sampled_from(KEYS)),
            min_size=1,
            max_size=2,
        )
    )

    def spoil(document: Any) -> Any:
        document = copy.deepcopy(document)
        for steps, what, value, key in changes:
            node = document
            for step in steps:
                inner = list(node.values()) if isinstance(node, dict) else node
                if isinstance(inner, list) and inner and isinstance(inner[step % len(inner)], dict | list):
                    node = inner[step % len(inner)]
            if isinstance(node, dict) and node:
                chosen = list(node)[len(steps) % len(node)]
                if what == 0:
                    del node[chosen]
                else:
                    node[chosen if what == 1 else key] = value
            elif isinstance(node, list):
                node.append(value)
        return document

    return spoil


def use(form: JobForm) -> None:
    """A form that was accepted can be expanded, drawn, and read again."""
    tasks = expand(form, None, {}, offline_job_id(form))
    assert form.schema is not None
    draw_topology(form.schema, tasks, 60)
    assert {task.role for task in tasks} == {role.name for role in form.schema.roles}
    assert all(set(task.group_association) == {channel.name for channel in task.channels} for task in tasks)
    assert all(count >= 0 for task in tasks for count in task.peers.values())


@pytest.fixture
def good(flame_folder: Callable[..., Path]) -> Path:
    return flame_folder("hier_mnist", {"eu": ["a"], "na": ["b"]})


def test_spoilt_files_are_refused_or_make_a_job(good: Path) -> None:
    originals = {name: (good / name).read_text() for name in FILES}

    @settings(max_examples=120)
    @given(st.sampled_from(FILES), spoilt())
    def check(name: str, spoil: Callable[[Any], Any]) -> None:
        (good / name).write_text(json.dumps(spoil(json.loads(originals[name]))))
        try:
            form = load_job(good).form
            if form.schema is not None and form.code is not None:
                use(form)
        except FlameError:
            pass
        finally:
            (good / name).write_text(originals[name])

    check()


def test_any_document_as_a_job_file(good: Path) -> None:
    @settings(max_examples=120)
    @given(st.dictionaries(st.sampled_from(KEYS), values, max_size=6) | values, st.sampled_from(FILES))
    def check(document: Any, name: str) -> None:
        original = (good / name).read_text()
        (good / name).write_text(json.dumps(document))
        try:
            load_job(good)
        except FlameError:
            pass
        finally:
            (good / name).write_text(original)

    check()


def test_any_bytes_as_any_file(good: Path) -> None:
    @given(st.binary(max_size=100), st.sampled_from([*FILES, "code.zip"]))
    def check(content: bytes, name: str) -> None:
        original = (good / name).read_bytes() if (good / name).exists() else None
        (good / name).write_bytes(content)
        try:
            load_job(good)
        except FlameError:
            pass
        finally:
            if original is None:
                (good / name).unlink()
            else:
                (good / name).write_bytes(original)

    check()


def test_any_document_as_a_single_noun(tmp_path: Path) -> None:
    @given(values)
    def check(document: Any) -> None:
        (tmp_path / "noun.json").write_text(json.dumps(document))
        for load in (load_schema, load_datasets, load_design):
            try:
                load(tmp_path / "noun.json")
            except FlameError:
                pass

    check()


@settings(max_examples=120)
@given(values)
def test_any_document_that_a_server_is_sent(document: Any) -> None:
    try:
        form = check_job(shape(document, JobForm))
        if form.schema is not None:
            use(form)
    except FlameError:
        pass


paths = st.lists(st.sampled_from([*KEYS, "0", "1", "9", "[0]", "[trainer]", '["a.b"]', "", " "]), max_size=5).map(
    ".".join
)


def test_any_override(good: Path) -> None:
    form = load_job(good).form

    @settings(max_examples=120)
    @given(
        paths, st.sampled_from(["1", "x", "[a]", "{a: 1}", "", "{", "true", "'", "*a", "fedprox"]) | st.text(max_size=5)
    )
    def check(path: str, value: str) -> None:
        try:
            changed = apply_overrides(form, [f"{path}={value}"])
            use(check_job(changed))
        except FlameError:
            pass

    check()
