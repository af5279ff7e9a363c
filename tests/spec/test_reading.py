"""Text becomes plain data, whatever it is: or a sentence with the place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import SpecError, UsageError
from flame.spec.places import Places, dotted
from flame.spec.read import MAX_BYTES, parse, read

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text().filter(lambda key: key != "//"), inner, max_size=4)
    ),
    max_leaves=20,
)


def refusal(text: str | bytes, name: str = "file.yaml") -> str:
    with pytest.raises(SpecError) as caught:
        parse(text, name)
    return str(caught.value)


@given(values)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse(json.dumps(value), "x.json") == value


@given(values.filter(lambda value: isinstance(value, dict | list)))
def test_json_in_a_yaml_file_is_read_as_json(value: Any) -> None:
    assert parse(json.dumps(value), "x.yaml") == value


words = st.text("abcdeno0123456789.:-", min_size=1, max_size=8)


@given(st.dictionaries(words, st.lists(words | st.integers() | st.booleans() | st.none(), max_size=3), max_size=4))
def test_quoted_yaml_is_read_as_it_was_written(value: Any) -> None:
    assert parse(yaml.safe_dump(value, default_style='"', width=1000), "x.yaml") == parse(json.dumps(value), "x.json")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("NO", "NO"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-2.", -2.0),
        ("010", 10),
        ("+7", 7),
        ("0x10", "0x10"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-05-01", "2024-05-01"),
        ("1.2.3", "1.2.3"),
        ("numpy >= 1.2.0", "numpy >= 1.2.0"),
        ("", None),
        ("~", None),
        ("null", None),
        ("'5'", "5"),
        ("64109d853e579ab7ff9fafb9", "64109d853e579ab7ff9fafb9"),
        ("[a, b,]", ["a", "b"]),
    ],
)
def test_yaml_scalars_are_those_of_its_version_1_2(text: str, value: Any) -> None:
    assert parse(text, "x.yaml") == value
    assert parse(f"key: {text}", "x.yaml") == {"key": value}


def test_keys_are_text_as_written() -> None:
    assert parse("1: a\ntrue: b\nno: c\n1.50: d", "x.yaml") == {"1": "a", "true": "b", "no": "c", "1.50": "d"}


def test_anchors_and_merges_work() -> None:
    text = "base: &b {rounds: 5, epochs: 1}\njob: {<<: *b, epochs: 2}\nagain: *b"
    assert parse(text, "x.yaml") == {
        "base": {"rounds": 5, "epochs": 1},
        "job": {"rounds": 5, "epochs": 2},
        "again": {"rounds": 5, "epochs": 1},
    }


def test_tabs_are_fine_in_json_under_any_name() -> None:
    assert parse('{\n\t"a":\t1\n}', "x.yaml") == {"a": 1}
    assert parse("\ufeff{}".encode(), "x.json") == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1,}', "x.json: line 1, column 9: this is no JSON: Expecting property name enclosed in double quotes."),
        ('{\n "a": tru\n}', "x.json: line 2, column 7: this is no JSON: Expecting value."),
        ('{"a": NaN}', "x.json: this is no JSON: NaN is no number that JSON knows."),
        ('{"a": {"b": 1, "b": 2}}', "x.json: a: the key 'b' stands here twice; keep one of them."),
        ('[{"a": 1}, {"a": 1, "a": 1}]', "x.json: [1]: the key 'a' stands here twice; keep one of them."),
        (b"\xff\xfe", "x.json: the file is no UTF-8 text (byte 0)."),
        ("[" * 100_000, "x.json: values lie more than 64 deep in each other."),
        ("[" * 70 + "]" * 70, "x.json: values lie more than 64 deep in each other."),
        ("1e999", "x.json: infinity and not-a-number cannot be used here."),
    ],
)
def test_json_that_cannot_be_read_names_the_place(text: str | bytes, sentence: str) -> None:
    assert refusal(text, "x.json") == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: [1\nc: 2", "file.yaml: line 3, column "),
        (
            "a: 1\n a: 2",
            "file.yaml: line 2, column 3: this is no YAML: mapping values are not allowed in this context.",
        ),
        ("a: {b: 1, b: 2}", "file.yaml: a: the key 'b' stands here twice; keep one of them."),
        ("- x\n- a: 1\n  a: 1", "file.yaml: [1]: the key 'a' stands here twice; keep one of them."),
        ("a: .nan", "file.yaml: a: infinity and not-a-number cannot be used here."),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("a: !!binary aGk=", "file.yaml: a: a YAML value of type bytes cannot be used; put it in quotes."),
        ("? [a]\n: 1", "file.yaml: line 1, column 3: this is no YAML: a key must be text."),
        ("&a [*a]", "values lie more than 64 deep in each other."),
        ("a: *b", "file.yaml: line 1, column 4: this is no YAML: found undefined alias"),
        ("a: 1\n---\nb: 2", "file.yaml: line 2, column 1: this is no YAML: but found another document."),
        ("a: \x01", "file.yaml: this is no YAML"),
    ],
)
def test_yaml_that_cannot_be_read_names_the_place(text: str, sentence: str) -> None:
    assert sentence in refusal(text)


def test_aliases_that_unfold_without_end_are_refused_soon() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert refusal(bomb) == "file.yaml: the file unfolds to more than 500000 values."


def test_a_file_that_is_too_large_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing.json cannot be read: No such file or directory"):
        read(tmp_path / "nothing.json")
    with pytest.raises(UsageError, match=r"the folder cannot be read: Is a directory"):
        read(tmp_path, "the folder")
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(SpecError, match="the file is larger than 16 MiB"):
        read(big)


@given(st.binary(max_size=200), st.sampled_from(["x.json", "x.yaml"]))
def test_any_bytes_are_read_or_refused(content: bytes, name: str) -> None:
    try:
        value = parse(content, name)
    except SpecError as error:
        place = str(error)
    else:
        place = name
        assert not isinstance(value, float) or math.isfinite(value)
    assert place.startswith(name)


@given(st.text("{}[]:,&*!-#|>'\"% \nab1~<?", max_size=40))
def test_any_text_of_yamls_signs_is_read_or_refused(text: str) -> None:
    try:
        parse(text, "x.yaml")
        place = "x.yaml"
    except SpecError as error:
        place = str(error)
    assert place.startswith("x.yaml")


# --- places


def test_places_name_the_file_of_the_longest_path() -> None:
    places = Places(
        {
            (): ("job.yaml", ()),
            ("schema",): ("schema.json", ()),
            ("modelSpec", "optimizer"): ("job.yaml", ("optimizer",)),
        }
    )
    assert places.where("name") == "job.yaml: name"
    assert places.where("schema", "roles", 0, "name") == "schema.json: roles[0].name"
    assert places.where("schema") == "schema.json"
    assert places.where("modelSpec", "optimizer", "sort") == "job.yaml: optimizer.sort"
    assert places.under("schema").where("roles", 0) == "schema.json: roles[0]"
    assert places.under("schema", "roles", 1).where("name") == "schema.json: roles[1].name"
    assert places.under("modelSpec").where("optimizer", "sort") == "job.yaml: optimizer.sort"
    assert Places().where("a", 0, "b c", "d.e") == 'a[0]["b c"]["d.e"]'
    assert dotted(()) == ""
