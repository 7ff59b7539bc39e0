"""What travels between the `http` reward and its server; docs/rewards.md shows it.

Request {"images": [PNG], "prompts": [text], "metadata": [object]}, answer {"scores": [number]} or {"error": sentence}.
As JSON the PNGs are base64 text; as msgpack they are bytes. Never pickle: a server must survive a stranger's request.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from types import ModuleType
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tdm_finetune.rewards.base import BadSample, Metadata
from tdm_serve.errors import ConfigError

Format = Literal["json", "msgpack"]
TYPES: dict[Format, str] = {"json": "application/json", "msgpack": "application/msgpack"}
MAX_SIDE = 4096  # pixels


class BadRequest(ValueError):
    """A body that is not a batch of pictures; the message is for whoever sent it."""


def pack_request(form: Format, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> bytes:
    """The request's body. BadSample for metadata that JSON has no form for."""
    pictures = [to_png(image) for image in images]
    plain: list[Any] = []
    for index, data in enumerate(metadata):
        try:
            plain.append(json.loads(json.dumps(data, default=_plain)))
        except (TypeError, ValueError) as error:
            raise BadSample(index, f"its metadata cannot be sent: {error}") from error
    body: dict[str, Any] = {"images": pictures, "prompts": list(prompts), "metadata": plain}
    if form == "msgpack":
        return msgpack().packb(body)
    body["images"] = [base64.b64encode(picture).decode() for picture in pictures]
    return json.dumps(body).encode()


def unpack_request(form: Format, body: bytes) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """images uint8 (B, H, W, 3), prompts, metadata. BadRequest names the key and the place of what does not fit."""
    data = unpack(form, body)
    images, prompts, metadata = (_list(data, key) for key in ("images", "prompts", "metadata"))
    if not len(images) == len(prompts) == len(metadata) > 0:
        counts = f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata"
        raise BadRequest(f"the body has {counts}; it needs equal counts, at least one")
    _all_are(str, "prompts", prompts)
    _all_are(dict, "metadata", metadata)
    pictures = [from_png(i, _bytes(form, i, image)) for i, image in enumerate(images)]
    sizes = {picture.shape[:2] for picture in pictures}
    if len(sizes) > 1:
        raise BadRequest(f"images differ in size: {sorted(sizes)}")
    return torch.from_numpy(np.stack(pictures)), prompts, metadata


def pack(form: Format, body: Mapping[str, Any]) -> bytes:
    """A small answer."""
    return msgpack().packb(dict(body)) if form == "msgpack" else json.dumps(body).encode()


def unpack(form: Format, body: bytes) -> dict[str, Any]:
    """An object; BadRequest for anything else."""
    try:
        data: Any = msgpack().unpackb(body) if form == "msgpack" else json.loads(body)
    except (ValueError, RecursionError) as error:  # msgpack's errors are ValueErrors, too
        raise BadRequest(f"the body is no {form}: {error}") from error
    if not isinstance(data, dict):
        raise BadRequest(f"the body is {type(data).__name__}; it must be an object")
    return data


def to_png(image: Tensor) -> bytes:
    """uint8 (H, W, 3) as PNG, packed for speed rather than size."""
    buffer = BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def from_png(index: int, data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 3). BadRequest unless it is a PNG of at most MAX_SIDE; its size is checked before it is unpacked."""
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as image:
            if max(image.size) > MAX_SIDE:
                raise BadRequest(
                    f"images[{index}] has {image.width} x {image.height} pixels; at most {MAX_SIDE} a side"
                )
            return np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRequest(f"images[{index}] is no PNG: {error}") from error


def msgpack() -> ModuleType:
    """The optional package."""
    try:
        import msgpack  # pyright: ignore[reportMissingImports] - an optional package
    except ImportError as error:
        raise ConfigError(
            "the format msgpack needs a package that is not installed; run: pip install msgpack"
        ) from error
    return msgpack


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    values = data.get(key)
    if not isinstance(values, list):
        raise BadRequest("the body must be an object with the lists 'images', 'prompts' and 'metadata'")
    return cast("list[Any]", values)


def _all_are(kind: type, name: str, values: list[Any]) -> None:
    for index, value in enumerate(values):
        if not isinstance(value, kind):
            raise BadRequest(f"{name}[{index}] must be {'text' if kind is str else 'an object'}")


def _bytes(form: Format, index: int, image: Any) -> bytes:
    if form == "msgpack" and isinstance(image, bytes):
        return image
    if form == "json" and isinstance(image, str):
        try:
            return base64.b64decode(image, validate=True)
        except ValueError as error:
            raise BadRequest(f"images[{index}] is no base64: {error}") from error
    raise BadRequest(f"images[{index}] must be a PNG, as {'base64 text' if form == 'json' else 'bytes'}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
