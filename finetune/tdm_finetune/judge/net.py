"""The second judge's eye: a small fully-convolutional detector that names the objects of a 128 x 128 picture.

Every cell of a 16 x 16 grid says whether an object's centre lies in it, what kind and colour the object has, and where
its centre is. The names it knows are stored with its weights, so that judging reads no constant of the world.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tdm_serve.errors import CheckpointError
from tdm_serve.files import write_atomically

CELL = 8  # pixels a side
PATCH = 4
SAME_OBJECT = 5.0  # pixels: cells that point to centres this close speak of one object
UNLIKELY = 0.05  # probability up to which a cell is not looked at
SURE = 0.5  # summed probability from which an object is there


@dataclass(frozen=True, slots=True)
class Found:
    """One object that the detector sees, its centre in pixels."""

    kind: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What the detector says of a batch, per cell of its grid."""

    present: Tensor  # (B, G, G) logits
    kind: Tensor  # (B, kinds, G, G) logits
    colour: Tensor  # (B, colours, G, G) logits
    offset: Tensor  # (B, 2, G, G): from the cell's middle to the centre, x then y, in cells


class Block(nn.Module):
    """Residual 3 x 3 convolution."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.norm(self.conv(x)))


class Detector(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> `Seen` on a grid of H / 8 x W / 8 cells."""

    def __init__(self, kinds: tuple[str, ...], colours: tuple[str, ...], width: int = 72) -> None:
        super().__init__()
        self.kinds, self.colours, self.width = kinds, colours, width
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(PATCH),
            nn.Conv2d(3 * PATCH**2, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.SiLU(),
            nn.Conv2d(64, width, 3, stride=CELL // PATCH, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
        )
        self.blocks = nn.Sequential(*(Block(width, dilation) for dilation in (1, 1, 2, 1)))
        self.head = nn.Sequential(
            nn.Conv2d(width, 64, 1), nn.SiLU(), nn.Conv2d(64, 1 + len(kinds) + len(colours) + 2, 1)
        )

    def forward(self, pictures: Tensor) -> Seen:
        out = self.head(self.blocks(self.stem(pictures))).float()
        present, kind, colour, offset = out.split([1, len(self.kinds), len(self.colours), 2], dim=1)
        return Seen(present[:, 0], kind, colour, offset)

    @torch.no_grad()
    def look(self, pictures: Tensor) -> list[list[Found]]:
        """The objects of uint8 pictures (B, H, W, 3)."""
        seen = self(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
        present, kinds, colours = seen.present.sigmoid(), seen.kind.argmax(1), seen.colour.argmax(1)
        middles = torch.arange(present.shape[-1]) + 0.5
        x = (seen.offset[:, 0] + middles) * CELL
        y = (seen.offset[:, 1] + middles[:, None]) * CELL
        found: list[list[Found]] = []
        for picture, chances in enumerate(present):
            cells = (chances > UNLIKELY).nonzero(as_tuple=True)
            parts = (chances, *(part[picture] for part in (kinds, colours, x, y)))
            found.append(self._gathered(zip(*(part[cells].tolist() for part in parts), strict=True)))
        return found

    def _gathered(self, cells: Iterable[tuple[float, int, int, float, float]]) -> list[Found]:
        """One picture's cells (chance, kind, colour, x, y): those that point to one centre add up their chances."""
        groups: list[tuple[Found, float]] = []
        for chance, kind, colour, x, y in sorted(cells, reverse=True):
            for index, (found, total) in enumerate(groups):
                if max(abs(found.x - x), abs(found.y - y)) < SAME_OBJECT:
                    groups[index] = (found, total + chance)
                    break
            else:
                groups.append((Found(self.kinds[kind], self.colours[colour], x, y), chance))
        return [found for found, total in groups if total >= SURE]

    def save(self, path: Path) -> None:
        """float16 weights, with the names of kinds and colours in the file's metadata."""
        tensors = {
            name: (value.half() if value.is_floating_point() else value).contiguous()
            for name, value in self.state_dict().items()
        }
        facts = {"kinds": list(self.kinds), "colours": list(self.colours), "width": self.width}
        write_atomically(path, save(tensors, {"detector": json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path) -> Detector:
        """From `save`'s file. CheckpointError if it is missing, broken or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["detector"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            detector = cls(tuple(facts["kinds"]), tuple(facts["colours"]), int(facts["width"]))
            detector.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds no detector of the second judge: {error}") from error
        return detector.eval().requires_grad_(False)
