"""Turns what pydantic found wrong in a body into one sentence that names the field, the value and what is allowed."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 60
_shorten.maxlist = _shorten.maxdict = 4
_shorten.maxlevel = 2

# pydantic's kinds that have a name of their own in OpenAI's errors; `*_type` is handled below.
CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
    "unsupported_value": "unsupported_value",
    "string_too_long": "prompt_too_long",
}


def first_problem(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str, str | None]:
    """(code, message, param) of the first error, which is what OpenAI reports too."""
    error = errors[0]
    name = str(error["type"])
    if name == "json_invalid":
        offset = error["loc"][-1]
        return "invalid_json", f"the body is not valid JSON: {error['ctx']['error']}, at character {offset}", None
    field = ".".join(str(part) for part in error["loc"][1:])
    if not field and name == "string_unicode":
        return "invalid_body", "the name of a field is no valid Unicode text", None
    if not field:
        return "invalid_body", 'the body must be a JSON object, such as {"prompt": "two red circles"}', None
    code = "invalid_type" if name.endswith("_type") else CODES.get(name, "invalid_value")
    if code == "prompt_too_long" and not field.endswith("prompt"):
        code = "invalid_value"
    return code, _sentence(name, field, error), field


def _sentence(name: str, field: str, error: Mapping[str, Any]) -> str:
    shown = _shorten.repr(error.get("input"))
    match name:
        case "missing":
            return f"{field} is required"
        case "extra_forbidden":
            return f"{field} is not a field of this endpoint; /docs lists the fields"
        case "unsupported_value":
            return str(error["msg"])
        case "literal_error":
            return f"{field} is {shown}; allowed: {error['ctx']['expected']}"
        case "string_too_long":
            limit = error["ctx"]["max_length"]
            return f"{field} has {len(str(error['input']))} characters; allowed: at most {limit}"
        case _:
            reason = str(error["msg"])
            return f"{field} is {shown}; {reason[:1].lower()}{reason[1:]}"
