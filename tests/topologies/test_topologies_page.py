"""docs/topologies.md shows what the command draws and what the examples have: neither can change without the other."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import msgspec
import pytest
import yaml

from flame.sdk.mode.role import Role
from flame.spec.load import load_job
from flame.spec.nouns import Schema

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "topologies.md").read_text(encoding="utf-8")
#: By example: what the page has between its heading and the next.
SECTIONS = {
    match[1]: section
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    if (match := re.search(r"^    flame run examples/(\S+)$", section, re.MULTILINE))
}
#: Examples that show something else than a topology.
OTHERS = {"algorithms", "numpy", "one-script"}


def test_every_section_has_an_example_and_every_topology_a_section():
    assert len(SECTIONS) == PAGE.count("\n## ")
    there = {path.parent.name for path in (ROOT / "examples").glob("*/job.yaml")}
    assert SECTIONS.keys() == there - OTHERS
    assert len(SECTIONS) >= 12


@pytest.mark.parametrize("example", SECTIONS)
def test_the_drawing_is_the_one_that_the_command_prints(example):
    shown = re.search(r"```\n\$ (flame schema draw examples/\S+)\n(.*?)\n```", SECTIONS[example], re.DOTALL)
    assert shown[1] == f"flame schema draw examples/{example}"
    done = subprocess.run(
        [sys.executable, "-m", *shown[1].split()],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert shown[2] == done.stdout.rstrip("\n")


@pytest.mark.parametrize("example", SECTIONS)
def test_the_schema_is_the_examples(example):
    (shown,) = re.findall(r"```yaml\n(.*?)```", SECTIONS[example], re.DOTALL)
    assert msgspec.convert(yaml.safe_load(shown), Schema) == load_job(ROOT / "examples" / example).form.schema


@pytest.mark.parametrize("example", SECTIONS)
def test_the_base_classes_are_those_of_the_examples_scripts(example):
    """The table names every role, and a class that is one and that the role's script uses."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", SECTIONS[example], re.MULTILINE)
    roles = {role: words for names, words in rows if names != "role" for role in names.split(", ")}
    assert roles.keys() == {role.name for role in load_job(ROOT / "examples" / example).form.schema.roles}
    for role, words in roles.items():
        script = (ROOT / "examples" / example / role / "main.py").read_text()
        imports = re.findall(r"^from (flame\.sdk\S*) import (.+)$", script, re.MULTILINE)
        found = [
            (module, getattr(import_module(module), name)) for module, names in imports for name in names.split(", ")
        ]
        ((module, used),) = [(module, cls) for module, cls in found if isinstance(cls, type) and issubclass(cls, Role)]
        named = re.findall(r"`([\w.]+)`", words)
        if len(named) == 1:
            place, _, attribute = named[0].rpartition(".")
            assert getattr(import_module(place), attribute) is used
        else:
            assert module in {named[0] + suffix for suffix in named[1:]}
