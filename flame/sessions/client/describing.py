"""What a session is opened with, from what its user says: a class or a function with its code, and common data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from flame.errors import UsageError
from flame.sessions.code import gather
from flame.sessions.objects import pack
from flame.sessions.payload import Reference, dumps
from flame.spec.sessions import Application, SessionForm

#: Bytes of common data up to which they are part of what a session is opened with.
_INLINE = 64 << 10

#: An object, with its bytes in parts.
Packed = tuple[Reference, list[bytes | memoryview]]

_APPLICATION = {"arguments", "environment", "dependencies", "resources", "image", "name"}


def describe(
    app: Any, *, common_data: Any = None, code: str | Path | None = None, **options: Any
) -> tuple[SessionForm, dict[str, bytes], Packed | None]:
    """What a session is opened with, the bundles that belong to it by their digests, and its common data where they are an object.

    :raises flame.errors.UsageError: it cannot be.
    """
    bundles: dict[str, bytes] = {}
    common: Packed | None = None
    own = {name: options.pop(name) for name in list(options) if name in _APPLICATION}
    try:
        if isinstance(app, str):
            options["app"] = app
            if own:
                raise UsageError(f"{', '.join(own)} belong to the application {app!r}, which is registered already.")
        elif isinstance(app, Application):
            options["application"] = msgspec.structs.replace(app, **own)
        else:
            found = gather(app, code)
            if found.bundle is not None and found.digest is not None:
                bundles[found.digest] = found.bundle
            options["application"] = Application(entry=found.entry, code=found.digest, **own)
        if common_data is not None:
            reference, parts = pack(common_data)
            if sum(memoryview(part).nbytes for part in parts) <= _INLINE:
                options["common"] = dumps(common_data)
            else:
                common = reference, parts
                options["common_digest"] = reference.digest
        return SessionForm(**options), bundles, common
    except TypeError as error:
        raise UsageError(f"A session cannot be opened like this: {error}.") from error
