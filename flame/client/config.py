"""Where the server is and who asks: ``~/.flame/config.yaml`` and the ``FLAME_*`` variables.

========================  =====================================================================
``FLAME_CONFIG``          the path of the file, instead of ``~/.flame/config.yaml``
``FLAME_SERVER``          the server's address; stronger than the file
``FLAME_TOKEN``           the token; stronger than the file
``FLAME_PROJECT``         the project in which new things are made; stronger than the file
``FLAME_CA``              certificates of the authorities that may vouch for the server (PEM: a path, or the text)
``FLAME_TLS_CERT``        the certificate to show a server that asks for one, and ``FLAME_TLS_KEY``, its key
``FLAME_DATA_DIR``        where a server on this machine keeps its state, ``~/.flame/data`` if unset
========================  =====================================================================

The module imports next to nothing: `flame run` reads it before anything else, to start a server at once if it needs one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from flame.errors import SpecError, UsageError

#: Where `flame serve` listens unless it is told otherwise.
DEFAULT_SERVER = "http://127.0.0.1:10100"


class Settings(NamedTuple):
    """What is configured; None where nothing is."""

    server: str | None = None
    token: str | None = None
    project: str | None = None
    ca: str | None = None


def config_path() -> Path:
    """The file that is read and that `flame config set` writes."""
    given = os.environ.get("FLAME_CONFIG")
    return Path(given).expanduser() if given else Path.home() / ".flame" / "config.yaml"


def data_dir() -> Path:
    """The data directory of a server on this machine."""
    given = os.environ.get("FLAME_DATA_DIR")
    return (Path(given).expanduser() if given else Path.home() / ".flame" / "data").absolute()


def read_file() -> Settings:
    """What the file says; nothing if there is none.

    :raises flame.errors.SpecError: it cannot be read, or says something that cannot be.
    """
    path = config_path()
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"It cannot be read ({error}).", str(path)) from error
    import yaml

    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SpecError(f"It is no YAML ({' '.join(str(error).split())}).", str(path)) from error
    if not isinstance(values, dict):
        raise SpecError("It must hold keys and values, such as `server: http://127.0.0.1:10100`.", str(path))
    for key, value in values.items():
        check(str(key), value, str(path))
    return Settings(**values)


def resolve(server: str | None = None, token: str | None = None) -> Settings:
    """What holds: the arguments, else the variables, else the file.

    A token in the file is for the server in the file: it is not sent to another one that an argument or a variable names.
    The same holds for the project and the authority.

    :raises flame.errors.SpecError: see :func:`read_file`.
    """
    file = read_file()
    chosen = server or os.environ.get("FLAME_SERVER") or file.server
    kept = file if chosen == file.server else Settings()
    return Settings(
        chosen,
        token or os.environ.get("FLAME_TOKEN") or kept.token,
        os.environ.get("FLAME_PROJECT") or kept.project,
        os.environ.get("FLAME_CA") or kept.ca,
    )


def write(settings: Settings) -> Path:
    """Write the file, readable by its owner alone since it may hold a token; gives its path.

    :raises flame.errors.UsageError: it cannot be written.
    """
    import yaml

    path = config_path()
    values = {key: value for key, value in settings._asdict().items() if value is not None}
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            yaml.safe_dump(values, file)
        fresh.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def check(key: str, value: object, where: str | None = None) -> None:
    """Check one setting.

    :raises flame.errors.SpecError: the key is unknown or the value is of the wrong kind.
    """
    if key not in Settings._fields:
        raise SpecError(f"There is no setting {key!r}; there are {', '.join(Settings._fields)}.", where)
    if value is not None and not isinstance(value, str):
        raise SpecError(f"The setting {key!r} must be text, not {value!r}.", where)
    if key == "server" and isinstance(value, str) and not value.startswith(("http://", "https://")):
        raise SpecError(f"The server {value!r} is no address; write it like {DEFAULT_SERVER}.", where)
