"""A topology is drawn readably, and never wider than the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.spec.check import check_job
from flame.spec.draw import cells, clip, draw_topology
from flame.spec.expand import expand
from flame.spec.nouns import JobForm, Schema
from flame.spec.shape import shape

JOB = "0" * 24
Make = Callable[..., JobForm]

TWO_TIERS = """\
two tiers · 4 workers · 2 roles · 1 channel

┌────────────┐
│ aggregator │
│  1 worker  │
└──────┬─────┘
       │ param-channel · p2p
       │ us 1↔3
┌──────┴─────┐
│  trainer   │
│ 3 datasets │
└────────────┘"""

THREE_TIERS = """\
three tiers · 6 workers · 3 roles · 2 channels

 ┌────────────────┐
 │ top-aggregator │
 │    1 worker    │
 └────────┬───────┘
          │ global-channel · p2p
          │ default 1↔2
┌─────────┴─────────┐
│ middle-aggregator │
│     2 workers     │
│    eu 1 · na 1    │
└─────────┬─────────┘
          │ param-channel · p2p
          │ eu 1↔2 · na 1↔1
   ┌──────┴──────┐
   │   trainer   │
   │ 3 datasets  │
   │ eu 2 · na 1 │
   └─────────────┘"""

HYBRID = """\
hybrid · 4 workers · 2 roles · 2 channels

┌────────────┐
│ aggregator │
│  1 worker  │
└──────┬─────┘
       │ global-channel · mqtt
       │ default 1↔3
┌──────┴──────┐
│   trainer   ├─╮ param-channel · p2p
│ 3 datasets  │ │ eu 2 · us 1
│ eu 2 · us 1 ├─╯
└─────────────┘"""

DISTRIBUTED = """\
distributed · 3 workers · 1 role · 1 channel

┌────────────┐
│  trainer   ├─╮ param-channel · p2p
│ 3 datasets ├─╯ us 3
└────────────┘"""

COORDINATED = """\
coordinated · 6 workers · 4 roles · 5 channels

                   ┌────────────────┐
                   │ top-aggregator │
                   │    1 worker    │
                   └────────┬───────┘
           ┌────────────────┴────────────────┐
           │ global-channel · p2p            │ top-coord · p2p
           │ default 1↔2                     │ default 1↔1
┌──────────┴──────────┐             ┌────────┴───────┐
│ middle-aggregator ① │             │ coordinator ①② │
│      2 workers      │             │    1 worker    │
└──────────┬──────────┘             └────────────────┘
           │ param-channel · p2p
           │ default 2↔2
    ┌──────┴─────┐
    │ trainer ②  │
    │ 2 datasets │
    └────────────┘

① middle-coord · p2p · middle-aggregator ↔ coordinator · default 2↔1
② trainer-coord · p2p · trainer ↔ coordinator · default 2↔1"""

NARROW = """\
coordinated · 4 roles · 5 channels

┌────────────────┐
│ top-aggregator │
│ 1 worker       │
└──┬─────────────┘
   ├─ global-channel
   │  default
   │  ┌─────────────────────┐
   │  │ middle-aggregator ① │
   │  │ 2 workers           │
   │  └──┬──────────────────┘
   │     └─ param-channel
   │        default
   │        ┌────────────────────┐
   │        │ trainer ②          │
   │        │ a worker a dataset │
   │        └────────────────────┘
   └─ top-coord
      default
      ┌────────────────┐
      │ coordinator ①② │
      │ 1 worker       │
      └────────────────┘

① middle-coord
  middle-aggregator ↔ coordinator
  default
② trainer-coord
  trainer ↔ coordinator
  default"""


@pytest.mark.parametrize(
    ("name", "groups", "drawing"),
    [
        ("mnist", {"us": ["a", "b", "c"]}, TWO_TIERS),
        ("hier_mnist", {"eu": ["a", "b"], "na": ["c"]}, THREE_TIERS),
        ("hybrid", {"eu": ["a", "b"], "us": ["c"]}, HYBRID),
        ("distributed_training", {"us": ["a", "b", "c"]}, DISTRIBUTED),
        ("coordinated", {"default": ["a", "b"]}, COORDINATED),
    ],
)
def test_the_known_topologies_look_so(
    name: str, groups: Any, drawing: str, schemas: dict[str, Any], make_job: Make
) -> None:
    form = check_job(make_job(schemas[name], groups))
    assert form.schema is not None
    tasks = expand(form, None, {}, JOB)
    channels = {channel.name: channel.backend for task in tasks for channel in task.channels}
    assert set(channels.values()) <= {"p2p", "mqtt"}
    assert draw_topology(form.schema, tasks, 100) == drawing


def test_a_schema_by_itself_is_drawn_and_indented_where_it_is_narrow(schemas: dict[str, Any]) -> None:
    assert draw_topology(shape(schemas["coordinated"], Schema), (), 44) == NARROW


def test_many_groups_are_summarised(schemas: dict[str, Any], make_job: Make) -> None:
    schema = schemas["mnist"]
    groups = [f"site-{number}" for number in range(40)]
    schema["channels"][0]["groupBy"]["value"] = groups
    for role in schema["roles"]:
        role["groupAssociation"] = [{"param-channel": group} for group in groups]
    form = make_job(schema, {group: ["a", "b"] for group in groups})
    assert form.schema is not None
    drawing = draw_topology(form.schema, expand(form, None, {}, JOB), 72)
    assert "40 groups, 1↔2 each" in drawing
    assert "40 places, 2 each" in drawing
    assert len(drawing.splitlines()) < 20


names = st.text(min_size=1, max_size=12)


@st.composite
def schemas_of_any_kind(draw: st.DrawFn) -> Schema:
    roles = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    groups = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    pairs = draw(st.lists(st.tuples(st.sampled_from(roles), st.sampled_from(roles)), max_size=30))
    channels = [
        {"name": f"c{index}", "pair": list(pair), "groupBy": {"value": groups}} for index, pair in enumerate(pairs)
    ]
    made = []
    for role in roles:
        mine = [channel["name"] for channel in channels if role in channel["pair"]]
        association = [dict.fromkeys(mine, group) for group in groups]
        made.append({"name": role, "isDataConsumer": draw(st.booleans()), "groupAssociation": association})
    return shape({"name": draw(names), "roles": made, "channels": channels}, Schema)


@given(schemas_of_any_kind(), st.integers(1, 160))
def test_no_line_is_wider_than_the_terminal(schema: Schema, width: int) -> None:
    drawing = draw_topology(schema, (), width)
    assert all(cells(line) <= width for line in drawing.split("\n"))
    assert all(letter.isprintable() for line in drawing.split("\n") for letter in line)


@given(st.text(), st.integers(0, 20))
def test_a_clipped_text_fits(text: str, width: int) -> None:
    assert cells(clip(text, width)) <= width
