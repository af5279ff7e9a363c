"""The names that the control plane accepts are those that the data plane has."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import flame.sdk
from flame.sdk.backends import BACKENDS
from flame.sdk.datasamplers import datasamplers
from flame.sdk.optimizers import optimizers
from flame.sdk.privacy import privacies
from flame.sdk.registries import registries
from flame.sdk.selectors import selectors
from flame.spec import known


@pytest.mark.parametrize(
    ("kind", "plugins"),
    [
        (known.OPTIMIZERS, optimizers),
        (known.SELECTORS, selectors),
        (known.DATASAMPLERS, datasamplers),
        (known.PRIVACIES, privacies),
    ],
)
def test_algorithms_are_known_by_their_names_in_the_sdk(kind: known.Kind, plugins: Any) -> None:
    assert set(plugins.builtin) == set(kind.names)
    assert plugins.group == kind.group


@pytest.mark.parametrize(("kind", "plugins"), [(known.BACKENDS, BACKENDS), (known.REGISTRIES, registries)])
def test_backends_and_registries_of_the_sdk_are_known(kind: known.Kind, plugins: Any) -> None:
    assert set(plugins.builtin) <= set(kind.names)
    assert plugins.group == kind.group


def test_every_function_tag_of_the_sdks_roles_is_known() -> None:
    folder = Path(flame.sdk.__file__).parent
    tags = {tag for file in folder.rglob("*.py") for tag in re.findall(r'^TAG_\w+ = "([^"]+)"', file.read_text(), re.M)}
    assert {"fetch", "upload", "distribute", "aggregate"} <= tags
    assert {tag for tag in tags if known.canonical_tag(tag) is None} == set()


@pytest.mark.parametrize(
    ("kind", "written", "name"),
    [
        (known.OPTIMIZERS, "FedAvg", "fedavg"),
        (known.OPTIMIZERS, "trimmed_mean", "trimmedmean"),
        (known.OPTIMIZERS, "Multi-Krum", "multikrum"),
        (known.SELECTORS, "asyncOort", "async_oort"),
        (known.SELECTORS, "DEFAULT", "default"),
        (known.BACKENDS, "MQTT", "mqtt"),
        (known.OPTIMIZERS, "adam", None),
        (known.PRIORITIES, "urgent", None),
        (known.OPTIMIZERS, "", None),
    ],
)
def test_spelling_does_not_matter(kind: known.Kind, written: str, name: str | None) -> None:
    assert known.canonical(kind, written) == name


def test_packages_add_names_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(*, group: str) -> list[EntryPoint]:
        return [EntryPoint("mine", "mine:Mine", group)] if group in ("flame.optimizers", "flame.functags") else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert known.canonical(known.OPTIMIZERS, "mine") == "mine"
    assert known.canonical(known.SELECTORS, "mine") is None
    assert known.canonical_tag("mine") == "mine"
    assert known.canonical_tag("x-anything") == "x-anything"
    assert known.canonical_tag("x-") is None
    assert known.canonical_tag("Fetch") is None
