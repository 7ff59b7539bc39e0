"""A batch that fails is taken apart until only those pictures fail that must.

Out of memory: the batch is halved and each half tried once. Anything else: the pictures are tried one by one. Both are
sound because a failed call has changed no sample, and because a picture's pixels do not depend on its company.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tdm_serve.device import Device
from tdm_serve.errors import OutOfDeviceMemory, PictureFailed, TdmServeError

logger = logging.getLogger(__name__)

M = TypeVar("M")
V = TypeVar("V")
E = TypeVar("E", bound=BaseException)

NO_MEMORY = "the picture did not fit the memory of the device, not even in a smaller batch; ask for a smaller size"
NO_PICTURE = "the picture could not be made; the server's log says why"


@dataclass(frozen=True, slots=True)
class Parted(Generic[M, V]):
    """Which members went through, and what became of the others. `fits` is a batch that fitted where all did not."""

    made: list[tuple[M, V]]
    failed: list[tuple[M, Exception]]
    fits: int | None = None


def isolated(device: Device, action: Callable[[Sequence[M]], Sequence[V]], members: Sequence[M]) -> Parted[M, V]:
    """Runs `action`, which gives one value per member, so that a member fails only for reasons of its own."""
    tried = _attempt(action, members)
    if not isinstance(tried, Exception):
        return Parted(list(zip(members, tried, strict=True)), [])
    if device.out_of_memory(tried):
        return _halved(device, action, members)
    if len(members) == 1:
        return Parted([], _failures(members, tried))
    return _each(device, action, members)


def _halved(device: Device, action: Callable[[Sequence[M]], Sequence[V]], members: Sequence[M]) -> Parted[M, V]:
    """Both halves, once each. A picture that was alone is tried again alone: emptying the cache may have helped."""
    device.empty_cache()
    middle = (len(members) + 1) // 2
    parted: Parted[M, V] = Parted([], [], middle if len(members) > 1 else None)
    for half in (members[:middle], members[middle:]):
        tried = _attempt(action, half) if half else ()
        if not isinstance(tried, Exception):
            parted.made.extend(zip(half, tried, strict=True))
        elif device.out_of_memory(tried):
            device.empty_cache()
            parted.failed.extend(_too_large(half))
        else:
            alone = _each(device, action, half)
            parted.made.extend(alone.made)
            parted.failed.extend(alone.failed)
    return parted


def _each(device: Device, action: Callable[[Sequence[M]], Sequence[V]], members: Sequence[M]) -> Parted[M, V]:
    parted: Parted[M, V] = Parted([], [])
    for member in members:
        tried = _attempt(action, [member])
        if not isinstance(tried, Exception):
            parted.made.append((member, tried[0]))
        elif device.out_of_memory(tried):
            device.empty_cache()
            parted.failed.extend(_too_large([member]))
        else:
            parted.failed.extend(_failures([member], tried))
    return parted


def _attempt(action: Callable[[Sequence[M]], Sequence[V]], members: Sequence[M]) -> Sequence[V] | Exception:
    """The error is returned without the frames it came from: they hold tensors, and a retry needs their memory."""
    try:
        return action(members)
    except Exception as error:  # noqa: BLE001 - whatever a model raises, it belongs to these pictures
        logger.warning("a batch of %d failed: %s", len(members), described(error))
        return forget_frames(error)


def described(error: BaseException) -> str:
    """The error with its traceback as text: a log record with the traceback itself would keep the tensors in it."""
    return "".join(traceback.format_exception(error))


def forget_frames(error: E) -> E:
    """The error and its causes without their frames, and so without the tensors in them."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _failures(members: Sequence[M], error: Exception) -> list[tuple[M, Exception]]:
    """Each with an error of its own; one that was raised on purpose already says what a user may know."""
    if isinstance(error, TdmServeError):
        return [(member, error) for member in members]
    return [(member, PictureFailed(NO_PICTURE)) for member in members]


def _too_large(members: Sequence[M]) -> list[tuple[M, Exception]]:
    return [(member, OutOfDeviceMemory(NO_MEMORY)) for member in members]
