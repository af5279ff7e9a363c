"""What the fuzzer knows of the server: ids that are there, so that not everything ends at "no such thing"; see fuzz.py."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import schemathesis

_KNOWN: dict[str, Any] = json.loads(os.environ["FLAME_FUZZ"])
_chance = random.Random(_KNOWN["seed"])


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """Two of three times, a thing that is there."""
    tag = context.operation.path.split("/")[2] if context.operation.path.startswith("/v1/") else ""
    for name in path_parameters or {}:
        known = _KNOWN["things"].get(f"{tag}.{name}")
        if known and _chance.random() < 0.66:
            path_parameters[name] = _chance.choice(known)
    return path_parameters


@schemathesis.hook
def map_query(context: Any, query: Any) -> Any:
    """Two of three times, the attempt that there is."""
    if isinstance(query, dict) and "attempt" in query and _chance.random() < 0.66:
        query["attempt"] = 1
    return query


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Streams are asked for what there is. Routes for workers get the key of the task that runs. Where the fuzzer tries without a token, so it stays."""
    if isinstance(case.query, dict) and case.query.get("follow") in (True, "true"):
        case.query["follow"] = "false"  # what is to come does not come: nothing happens here
    headers = case.headers if case.headers is not None else {}
    operation = f"{case.operation.method.upper()} {case.operation.path}"
    if operation in _KNOWN["workers"] and headers.get("Authorization") == f"Bearer {_KNOWN['token']}":
        case.headers["Authorization"] = f"Bearer {_KNOWN['key']}"
