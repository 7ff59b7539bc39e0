"""A reward that lives elsewhere: in another process, on another machine, in another Python with other packages."""

from __future__ import annotations

import http.client
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from tdm_finetune.rewards import wire
from tdm_finetune.rewards.base import Metadata, Reward
from tdm_serve.errors import ConfigError, RewardError

logger = logging.getLogger(__name__)

PASSING = (429, 502, 503, 504)  # statuses that another attempt may get past
FIRST_WAIT_S, MAX_WAIT_S = 0.25, 8.0


def http_reward(
    url: str,
    timeout_s: float = 30.0,
    retries: int = 3,
    format: wire.Format = "json",  # noqa: A002 - the option's name
) -> Reward:
    """Whatever the server at `url` answers.

    `timeout_s` is for one attempt; after a failure that may pass (no connection, no answer, status 429, 502, 503 or
    504) it is tried `retries` more times, waiting 0.25 s, then twice as long each time, at most 8 s.
    """
    if format == "msgpack":
        wire.msgpack()
    return Remote(address(url), timeout_s, retries, format)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    url: str
    secure: bool
    host: str
    port: int | None
    path: str


@dataclass(frozen=True, slots=True)
class Remote:
    """The client. Each call opens its own connection, so any number of threads may call."""

    address: Address
    timeout_s: float
    retries: int
    form: wire.Format

    def __post_init__(self) -> None:
        if not self.timeout_s > 0 or self.retries < 0:
            allowed = "timeout_s must be above 0 and retries at least 0"
            raise ConfigError(f"http: timeout_s is {self.timeout_s} and retries {self.retries}; {allowed}")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        body = wire.pack_request(self.form, images, prompts, metadata)
        status, answer = self._insist(body)
        url = self.address.url
        try:
            data = wire.unpack(self.form, answer)
        except wire.BadRequest as error:
            raise RewardError(f"{url} answered {status} with something else than a reward: {error}") from error
        if status != 200:
            raise RewardError(f"{url} answered {status}: {data.get('error', data)}")
        scores: Any = data.get("scores")
        if not isinstance(scores, list) or not all(_is_number(value) for value in scores):
            raise RewardError(f"{url} answered without a list of numbers under 'scores', only {sorted(data)}")
        return torch.tensor(scores, dtype=torch.float32)

    def _insist(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the first answer that is not a passing failure."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                wait_s = min(FIRST_WAIT_S * 2 ** (attempt - 1), MAX_WAIT_S)
                logger.info("%s: %s; trying again in %g s", self.address.url, problem, wait_s)
                time.sleep(wait_s)
            try:
                status, answer = self._post(body)
                if status not in PASSING:
                    return status, answer
                problem = f"status {status}"
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
        attempts = f"{self.retries + 1} attempt{'s' if self.retries else ''}"
        raise RewardError(f"{self.address.url} gave no answer in {attempts}; the last problem: {problem}")

    def _post(self, body: bytes) -> tuple[int, bytes]:
        where = self.address
        kind = http.client.HTTPSConnection if where.secure else http.client.HTTPConnection
        connection = kind(where.host, where.port, timeout=self.timeout_s)
        try:
            media = wire.TYPES[self.form]
            connection.request("POST", where.path, body, {"content-type": media, "accept": media})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def address(url: str) -> Address:
    """The parts of an http or https address; ConfigError for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"http: url is {url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"http: url is {url!r}; it must be like http://127.0.0.1:9000")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(url, parts.scheme == "https", parts.hostname, port, path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
