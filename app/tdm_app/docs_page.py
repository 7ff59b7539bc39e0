"""`/docs`: the OpenAPI document as one plain page.

Written here because the usual viewers load their scripts from other hosts, and this server has to be readable
offline. The page is made from `/openapi.json`'s content, so it cannot disagree with it.
"""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any, cast

Json = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; font-size: .92em; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #8884; }
section { margin-top: 2.5rem; }
pre { background: #8882; padding: .6rem; overflow-x: auto; }
"""


def docs_page(document: Json, base_url: str) -> str:
    """The whole page as HTML. `base_url` is where the reader reached the server; the examples use it."""
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    parts = [f"<h1>{title}</h1><p>{escape(info['description'])}</p>"]
    parts.append('<p>The same as a machine reads it: <a href="openapi.json">openapi.json</a>.</p>')
    for path, methods in document["paths"].items():
        for method, endpoint in methods.items():
            parts.append(_endpoint(document, method.upper(), path, endpoint, base_url.rstrip("/")))
    parts.append(f"<section><h2>Errors</h2>{_table(document, _named(document, 'ErrorResponse'))}</section>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    view = '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    return f"{head}{view}<style>{STYLE}</style><body>{''.join(parts)}</body></html>"


def _endpoint(document: Json, method: str, path: str, endpoint: Json, base_url: str) -> str:
    parts = [f"<section><h2><code>{method} {escape(path)}</code></h2><p>{_prose(endpoint.get('description', ''))}</p>"]
    body = _schema_of(document, endpoint.get("requestBody"))
    parts.append(f"<pre>{escape(_curl(method, base_url + path, body))}</pre>")
    if "parameters" in endpoint:
        parts.append(f"<h3>Parameters</h3>{_parameters(document, endpoint['parameters'])}")
    if body is not None:
        parts.append(f"<h3>Request, JSON</h3>{_table(document, body)}")
    good = next(response for status, response in endpoint["responses"].items() if status.startswith("2"))
    answer = _schema_of(document, good)
    if answer is not None:
        parts.append(f"<h3>Answer, JSON</h3>{_table(document, answer)}")
    events = good.get("content", {}).get("text/event-stream", {})
    parts += [f"<h3>Answer, events</h3><p>{_prose(schema['description'])}</p>" for schema in events.values()]
    return "".join(parts) + "</section>"


def _curl(method: str, url: str, body: Json | None) -> str:
    """A command that works as it stands but for ids; required fields have their examples from the schema."""
    if body is None:
        return f"curl '{url}'" if method == "GET" else f"curl -X {method} '{url}'"
    example = {name: body["properties"][name].get("examples", [name.upper()])[0] for name in body.get("required", ())}
    return f"curl '{url}' -H 'content-type: application/json' -d '{json.dumps(example)}'"


def _parameters(document: Json, parameters: list[Json]) -> str:
    """The table of what goes into the address and the headers."""
    fields = {one["name"]: one["schema"] | {"description": f"In the {one['in']}."} for one in parameters}
    return _table(document, {"properties": fields})


def _schema_of(document: Json, holder: Json | None) -> Json | None:
    """The JSON schema of a request or response body, or None."""
    schema = (holder or {}).get("content", {}).get("application/json", {}).get("schema")
    return _resolve(document, schema) if schema else None


def _resolve(document: Json, schema: Json) -> Json:
    """Follows a `$ref`."""
    return _named(document, schema["$ref"].rpartition("/")[2]) if "$ref" in schema else schema


def _named(document: Json, name: str) -> Json:
    return document["components"]["schemas"][name]


def _table(document: Json, schema: Json) -> str:
    rows = "".join(_rows(document, schema, ""))
    return f"<table><tr><th>field</th><th>type</th><th>meaning</th></tr>{rows}</table>"


def _rows(document: Json, schema: Json, prefix: str) -> list[str]:
    """One row per field; the fields of objects and of lists of objects follow with a dotted name."""
    rows: list[str] = []
    for name, field in cast("dict[str, Json]", schema["properties"]).items():
        kind = escape(_type(document, field))
        rows.append(f"<tr><td><code>{escape(prefix + name)}</code></td><td>{kind}</td><td>{_meaning(field)}</td></tr>")
        inner = _object_in(document, field)
        if inner is not None:
            rows += _rows(document, inner, f"{prefix}{name}{'[]' if 'items' in field else ''}.")
    return rows


def _object_in(document: Json, field: Json) -> Json | None:
    """The object that a field is, may be (beside null), or is a list of."""
    item = field.get("items", field)
    referring = [option for option in (item, *item.get("anyOf", ())) if "$ref" in option]
    found = _resolve(document, referring[0]) if referring else {}
    return found if "properties" in found else None


def _meaning(field: Json) -> str:
    default = field.get("default")
    shown = "" if default is None else f" Default: `{default if isinstance(default, str) else json.dumps(default)}`."
    return _prose(field.get("description", "") + shown)


def _prose(text: str) -> str:
    """Text with `code` in it, as HTML."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _type(document: Json, field: Json) -> str:
    """A type in a few words: the enum's values, the range, or the name."""
    if "anyOf" in field:
        return " or ".join(_type(document, option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(str(value) for value in field.get("enum", [field.get("const")]))
    if "items" in field:
        return f"list of {_type(document, field['items'])}"
    name = str(_resolve(document, field).get("type", "any"))
    bounds = [f"{field[key]:g}" for key in ("minimum", "maximum") if key in field]
    return f"{name} {' to '.join(bounds)}" if bounds else name
