"""The page that shows the OpenAPI document. It needs nothing from outside, so it can be read without a network."""

from __future__ import annotations

import json
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { border-bottom: 1px solid #ccc; margin-top: 2.5rem; text-transform: capitalize; }
code, pre { font: 14px/1.4 ui-monospace, monospace; } pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
details { border: 1px solid #ddd; border-radius: 4px; margin: .4rem 0; padding: .3rem .7rem; }
summary { cursor: pointer; } summary span { color: #555; } b.method { display: inline-block; min-width: 4.2rem; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { border-top: 1px solid #ddd; padding: .2rem .8rem .2rem 0;
text-align: left; vertical-align: top; } a { color: #a33000; }
@media (prefers-color-scheme: dark) { body { background: #191919; color: #ddd; } pre { background: #262626; }
details, td, th, h2 { border-color: #444; } summary span { color: #aaa; } a { color: #ff9a5c; } }
"""


def render(document: dict[str, Any]) -> str:
    """The page.

    :param document: the OpenAPI document.
    """
    sections: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            sections.setdefault(operation["tags"][0], []).append(_operation(path, method, operation))
    info = document["info"]
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>",
        '<p>The same for programs: <a href="/openapi.json">/openapi.json</a>.</p>',
    ]
    for tag, operations in sections.items():
        parts.append(f"<h2>{escape(tag)}</h2>{''.join(operations)}")
    parts.append("<h2>types</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        text = escape(json.dumps(schema, indent=2))
        parts.append(
            f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary><pre>{text}</pre></details>'
        )
    return "".join(parts)


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    who = ", ".join(name for need in operation["security"] for name in need) or "anyone"
    rows = [f"<tr><th>who<td>{escape(who)}"]
    for parameter in operation["parameters"]:
        must = "" if parameter["required"] else " (optional)"
        kind = escape(_type(parameter["schema"]))
        rows.append(f"<tr><th>{parameter['in']}<td><code>{escape(parameter['name'])}</code>{must}: {kind}")
    for content, body in operation.get("requestBody", {}).get("content", {}).items():
        rows.append(f"<tr><th>body<td>{escape(content)}: {_link(body['schema'])}")
    for status, response in operation["responses"].items():
        kinds = [f"{escape(content)}: {_link(body['schema'])}" for content, body in response.get("content", {}).items()]
        rows.append(f"<tr><th>{status}<td>{escape(response['description'])} {' '.join(kinds)}")
    return (
        f'<details><summary><b class="method">{method.upper()}</b> <code>{escape(path)}</code> '
        f"<span>{escape(operation['summary'])}</span></summary><table>{''.join(rows)}</table></details>"
    )


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    return str(schema.get("format") or schema.get("type", "any"))


def _link(schema: dict[str, Any]) -> str:
    if schema.get("type") == "array":
        return f"list of {_link(schema['items'])}"
    if "$ref" not in schema:
        return escape(_type(schema))
    name = escape(_type(schema))
    return f'<a href="#{name}">{name}</a>'
