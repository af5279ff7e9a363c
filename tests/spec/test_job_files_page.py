"""``docs/job-files.md`` is true: its files load, its drawing is drawn, its names are all there are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame.spec import known
from flame.spec.check import check_job
from flame.spec.draw import draw_topology
from flame.spec.expand import expand
from flame.spec.load import load_job, load_schema
from flame.spec.nouns import JobForm, RoundPolicy
from flame.spec.read import parse

PAGE = (Path(__file__).parents[2] / "docs" / "job-files.md").read_text()


def blocks() -> dict[str, str]:
    """The files that the page shows, by the name in their first line."""
    found = re.findall(r"```(?:yaml|json)\n(?:#|//) (\S+)\n(.*?)```", PAGE, re.DOTALL)
    return dict(found)


@pytest.fixture
def code() -> dict[str, str]:
    return {f"{role}/main.py": "pass\n" for role in ("trainer", "aggregator")}


def test_the_short_file_is_a_job(folder: Callable[..., Path], code: dict[str, str]) -> None:
    files = {"job.yaml": blocks()["job.yaml"], "data/north.csv": "1\n", **code}
    form = load_job(folder.all(files)).form  # type: ignore[attr-defined]
    assert len(expand(form, None, {}, "0" * 24)) == 3
    assert form.model_spec.hyperparameters["learningRate"] == 0.01


def test_flames_folder_is_a_job_and_the_note_is_as_shown(folder: Callable[..., Path], code: dict[str, str]) -> None:
    files = {name: text for name, text in blocks().items() if name.endswith(".json")}
    files["dataset2.json"] = files["dataset1.json"].replace("digits_1", "digits_2")
    job = load_job(folder.all(files | code))  # type: ignore[attr-defined]
    assert [dataset.url[-5] for dataset in job.form.datasets] == ["1", "2"]
    assert [f"note: {note}" for note in job.notes] == [
        re.findall(r"note: .*?\.json\.", PAGE, re.DOTALL)[0].replace("\n", " ")
    ]


def test_the_drawing_is_what_is_drawn(tmp_path: Path, make_job: Callable[..., JobForm]) -> None:
    (tmp_path / "schema.yaml").write_text(blocks()["schema.yaml"])
    schema = load_schema(tmp_path / "schema.yaml")
    raw: Any = parse(blocks()["schema.yaml"], "schema.yaml")
    form = check_job(make_job(raw, {"eu": ["a", "b", "c"], "na": ["d", "e"]}))
    drawing = draw_topology(schema, expand(form, None, {}, "0" * 24), 80)
    assert drawing in PAGE


def test_every_name_and_key_is_on_the_page() -> None:
    kinds = (
        known.OPTIMIZERS,
        known.SELECTORS,
        known.DATASAMPLERS,
        known.PRIVACIES,
        known.BACKENDS,
        known.COMPRESSIONS,
        known.FUNC_TAGS,
    )
    names = {name for kind in kinds for name in kind.names} | {kind.group for kind in kinds if kind.group}
    names |= {field for form in (JobForm, RoundPolicy) for field in form.__struct_encode_fields__}
    assert {name for name in names if f"`{name}" not in PAGE} == set()
