"""Eyes for the GenEval reward: what is in a picture, how sure that is, and in which colours.

A detector is any callable from a picture to objects. Two are here: the scene checker, exact and free of weights, and
Mask2Former as GenEval uses it, through transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tdm_finetune.rewards.hub import device_of, normalised, pixels, pretrained

Picture = NDArray[np.uint8]  # (H, W, 3)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GREY = (153, 153, 153)  # behind an object while its colour is named
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_DETECTIONS = 100
# COCO's names in other vocabularies -> GenEval's (its object_names.txt)
GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """An object. box: left, top, right, bottom in pixels; mask bool (H, W) where the detector draws one."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_] | None = None
    colour: str | None = None


class Detector(Protocol):
    """Finds objects in a picture uint8 (H, W, 3), in any order and of any score in [0, 1]."""

    def __call__(self, picture: Picture, /) -> Sequence[Found]: ...


class ColourNamer(Protocol):
    """Names the colours of a picture's objects of one class."""

    def __call__(self, picture: Picture, objects: Sequence[Found], /) -> Sequence[str | None]: ...


def scene_objects(picture: Picture) -> list[Found]:
    """The shapes that the scene checker recognises, with score 1; unknown objects are not reported.

    The checker tells centre and pixels; a shape fills a known share of its square box, so the box follows from those.
    """
    from tdm_finetune import scenes

    return [
        Found(seen.name, 1.0, _square(seen.x, seen.y, math.sqrt(seen.pixels / _share(seen.name))), colour=seen.colour)
        for seen in scenes.look(picture)
        if seen.name is not None
    ]


def own_colours(_picture: Picture, objects: Sequence[Found]) -> list[str | None]:
    """The colours that the detector has named itself."""
    return [item.colour for item in objects]


def mask2former(model: str, device: str) -> Detector:
    """Instance segmentation with a Mask2Former checkpoint; COCO's classes are named as GenEval names them."""
    from transformers import Mask2FormerForUniversalSegmentation

    chosen = device_of(device)
    network = pretrained("geneval", Mask2FormerForUniversalSegmentation, model).to(chosen).eval()
    return Segmenter(network, chosen)


class Segmenter:
    """Mask2Former as a detector: mmdetection's test-time steps, which GenEval's thresholds were chosen on.

    Short side 800 pixels, long side at most 1333; the 100 likeliest pairs of query and class; score = class
    probability times the mean probability inside the mask; the box is the mask's.
    """

    def __init__(self, model: Any, device: torch.device, short: int = 800, long: int = 1333) -> None:
        self.model, self.device, self.short, self.long = model, device, short, long
        labels = [str(label).lower() for _, label in sorted(model.config.id2label.items())]
        self.names = [GENEVAL_NAMES.get(label, label) for label in labels]

    @torch.no_grad()
    def __call__(self, picture: Picture) -> list[Found]:
        values = self._input(picture)
        height, width = values.shape[2:]
        padded = F.pad(values, (0, -width % 32, 0, -height % 32))
        mask = torch.zeros(1, *padded.shape[2:], dtype=torch.long, device=self.device)
        mask[:, :height, :width] = 1
        output = self.model(pixel_values=padded, pixel_mask=mask)
        masks = F.interpolate(output.masks_queries_logits, tuple(padded.shape[2:]), mode="bilinear")
        masks = F.interpolate(masks[:, :, :height, :width], picture.shape[:2], mode="bilinear")[0]  # (Q, H, W)
        return self._objects(output.class_queries_logits[0], masks)

    def _input(self, picture: Picture) -> Tensor:
        height, width = picture.shape[:2]
        scale = min(self.short / min(height, width), self.long / max(height, width))
        size = (int(width * scale + 0.5), int(height * scale + 0.5))
        resized = np.array(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
        return normalised(resized[None], IMAGENET_MEAN, IMAGENET_STD, self.device)

    def _objects(self, classes: Tensor, masks: Tensor) -> list[Found]:
        """classes (Q, C + 1) and masks (Q, H, W), both logits."""
        likely = classes.softmax(-1)[:, :-1].flatten()
        scores, places = likely.topk(min(MAX_DETECTIONS, likely.numel()))
        found: list[Found] = []
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            query, label = divmod(place, len(self.names))
            inside = masks[query] > 0
            if not inside.any():
                continue
            sure = masks[query].sigmoid()[inside].mean().item()
            drawn = inside.cpu().numpy()
            found.append(Found(self.names[label], score * sure, _box(drawn), drawn))
        return found


def clip_colours(model: str, device: str) -> ColourNamer:
    """Zero-shot colours by CLIP on the object in front of grey, with GenEval's ten colours and three phrasings."""
    from tdm_finetune.rewards.clip import load

    clip = load("geneval", model, model, device)
    known: dict[str, Tensor] = {}

    def classifier(name: str) -> Tensor:
        """(10, D), a direction per colour."""
        if name not in known:
            forms = [
                (f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object")
                for c in COLOURS
            ]
            means = torch.stack([clip.text_features(form).mean(0) for form in forms])
            known[name] = F.normalize(means, dim=-1)
        return known[name]

    def colours(picture: Picture, objects: Sequence[Found]) -> list[str | None]:
        if not objects:
            return []
        seen = torch.cat([pixels(torch.from_numpy(cut_out(picture, o))[None], clip.side, clip.device) for o in objects])
        best = (clip.image_features(seen) @ classifier(objects[0].name).T).argmax(1)
        return [COLOURS[int(place)] for place in best]

    return colours


def cut_out(picture: Picture, item: Found) -> Picture:
    """The object's box, with grey where its mask is not; at least one pixel."""
    shown = picture if item.mask is None else np.where(item.mask[..., None], picture, np.uint8(GREY[0]))
    left, top, right, bottom = (round(edge) for edge in item.box)
    return np.ascontiguousarray(shown[top : max(bottom, top + 1), left : max(right, left + 1)])


@cache
def _share(shape: str) -> float:
    """Of its box that a shape covers."""
    from tdm_finetune.scenes.render import shape_mask

    return float(shape_mask(shape, 40).mean())


def _square(x: float, y: float, side: float) -> tuple[float, float, float, float]:
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Edges of the mask; right and bottom are one past the last pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1
