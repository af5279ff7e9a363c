"""Where the client finds its server and its token, and what it says when the file is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame.client import config
from flame.client.config import Settings
from flame.errors import FlameError, SpecError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "some" / "config.yaml"
    monkeypatch.setenv("FLAME_CONFIG", str(path))
    monkeypatch.delenv("FLAME_SERVER", raising=False)
    monkeypatch.delenv("FLAME_TOKEN", raising=False)
    path.parent.mkdir()
    return path


def test_without_a_file_nothing_is_configured(file: Path) -> None:
    assert config.resolve() == Settings(None, None)


def test_arguments_are_stronger_than_variables_and_these_than_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("server: http://file:1\ntoken: file-token\n")
    assert config.resolve() == Settings("http://file:1", "file-token")
    monkeypatch.setenv("FLAME_SERVER", "http://variable:1")
    monkeypatch.setenv("FLAME_TOKEN", "variable-token")
    assert config.resolve() == Settings("http://variable:1", "variable-token")
    assert config.resolve("http://argument:1", "argument-token") == Settings("http://argument:1", "argument-token")


def test_a_token_in_the_file_is_for_no_other_server(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("server: http://file:1\ntoken: file-token\n")
    assert config.resolve("http://stranger:1").token is None
    monkeypatch.setenv("FLAME_SERVER", "http://stranger:1")
    assert config.resolve().token is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sever: http://a:1", "no setting 'sever'"),
        ("server: 10100", "must be text, not 10100"),
        ("server: localhost:10100", "write it like http://"),
        ("- server", "keys and values"),
        ("server: [", "no YAML"),
        ("token: 12345", "must be text"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_the_mend(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(SpecError, match=complaint) as caught:
        config.resolve()
    assert str(file) in str(caught.value)


def test_a_file_that_cannot_be_read_is_said_so(file: Path) -> None:
    file.mkdir()
    with pytest.raises(FlameError, match="cannot be read"):
        config.resolve()


def test_what_is_written_is_read_again_and_is_for_its_owner_alone(file: Path) -> None:
    settings = Settings("http://a:1", "t: #'\"")
    assert config.write(settings) == file
    assert config.resolve() == settings
    assert file.stat().st_mode & 0o777 == 0o600
    config.write(Settings())
    assert config.resolve() == Settings(None, None)
