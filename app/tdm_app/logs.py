"""Logs for people (text) or for machines (one JSON object a line), every line with the request that it belongs to.

One access line per request comes from `access`. Prompts are in no line unless somebody has asked for them; keys and
signatures never are: neither headers nor query strings are logged.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
request_id: ContextVar[str] = ContextVar("request_id", default="")
EXTRA = "facts"  # `extra={EXTRA: {...}}` puts facts beside a message: keys of the JSON, key=value pairs of the text


class _WithRequestId(logging.Filter):
    """Remembers the request in the record, since a handler may format it elsewhere."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, the facts, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if name := getattr(record, "request_id", ""):
            line["request_id"] = name
        line.update(getattr(record, EXTRA, {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Text(logging.Formatter):
    """The same for people: time, level, message, then key=value pairs."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = dict(getattr(record, EXTRA, {}))
        if name := getattr(record, "request_id", ""):
            facts["request_id"] = name
        time = self.formatTime(record, "%H:%M:%S")
        pairs = "".join(f" {key}={_plain(value)}" for key, value in facts.items())
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")  # one record, one line
        line = f"{time} {record.levelname} {record.name}: {message}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _plain(value: Any) -> str:
    """A value that cannot break out of its line or its pair."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c.isspace() or c in '"=' for c in text) else text


def configure_logs(style: LogFormat = "text", level: str = "info", stream: TextIO | None = None) -> None:
    """Sets the root logger up for a server process: one handler, on stderr where no stream is given.

    `level` is ours; other packages are heard from warnings on.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else Text())
    handler.addFilter(_WithRequestId())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("tdm_app", "tdm_serve"):
        logging.getLogger(name).setLevel(level.upper())
