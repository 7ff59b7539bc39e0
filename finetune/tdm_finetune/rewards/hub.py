"""Models that rewards load: from a folder, a file or the Hugging Face cache, with an error that says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tdm_serve.errors import ConfigError

# Preprocessing that OpenAI's CLIP fixed and every model here was trained with; RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def device_of(name: str) -> torch.device:
    """A torch device; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"the device {name!r} is unknown; choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"the device {name!r} was chosen, but torch finds no GPU here; choose auto or cpu")
    return device


def pretrained(reward: str, cls: Any, where: str) -> Any:
    """A model of class `cls` in float32, from a folder or a hub id; ConfigError where it cannot be had whole."""
    try:
        model, report = cls.from_pretrained(where, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise missing(reward, where, error) from error
    except RuntimeError as error:  # tensors of other shapes
        raise ConfigError(f"the reward {reward!r} cannot use {where!r}: {str(error)[:600]}") from error
    lacking = sorted(report["missing_keys"])
    if lacking:  # transformers only warns, and leaves them random
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ConfigError(f"the reward {reward!r} cannot use {where!r}: it lacks {', '.join(lacking[:3])}{more}")
    return model.eval().requires_grad_(False)


def tokenizer_of(reward: str, cls: Any, where: str) -> Any:
    """A tokenizer of class `cls` from a folder or a hub id; ConfigError where it cannot be had."""
    try:
        return cls.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise missing(reward, where, error) from error


def weights(reward: str, where: str, default_file: str) -> dict[str, Tensor]:
    """The tensors of a file: a local path, or a hub id whose `default_file` is taken.

    `.safetensors`, or a torch file that holds tensors only; a file that would run code is refused by torch.
    """
    path = Path(where)
    if not path.is_file():
        path = path / default_file if path.is_dir() else _from_hub(reward, where, default_file)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each have their own errors
        raise ConfigError(f"the reward {reward!r} cannot load {path}: {type(error).__name__}: {error}") from error
    inner = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(inner, dict) or not all(isinstance(value, Tensor) for value in inner.values()):
        raise ConfigError(f"the reward {reward!r} cannot use {path}: it is no table of tensors")
    return inner


def fill(reward: str, model: Any, state: dict[str, Tensor], where: str) -> Any:
    """Loads every tensor of `model` from `state`; ConfigError names what is missing, left over or of another shape."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"the reward {reward!r} cannot use {where}: {str(error)[:600]}") from error
    return model


def missing(reward: str, where: str, error: Exception) -> ConfigError:
    """What to do about weights that are not there."""
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    reason = "HF_HUB_OFFLINE is set, so nothing is downloaded" if offline else str(error).strip().split("\n")[0]
    return ConfigError(
        f"the reward {reward!r} cannot load {where!r}: it is no local path and not in the Hugging Face cache "
        f"({reason}); give a local path as an option, or fetch it once with: hf download {where}"
    )


def pixels(images: Tensor, side: int, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, side, side) as CLIP sees it: short side resized (bicubic), centre, normalised."""
    return normalised(np.stack([_centre(image, side) for image in images.numpy()]), CLIP_MEAN, CLIP_STD, device)


def normalised(
    pictures: NDArray[np.uint8], mean: Iterable[float], std: Iterable[float], device: torch.device
) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W)."""
    values = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255
    centre, scale = (torch.tensor(tuple(v), device=device).view(1, 3, 1, 1) for v in (mean, std))
    return (values - centre) / scale


def _centre(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    image = Image.fromarray(picture)
    width, height = (side * length // min(image.size) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _from_hub(reward: str, where: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(where, file))
    except (OSError, HFValidationError) as error:  # everything that the hub raises for a missing file is an OSError
        raise missing(reward, where, error) from error
