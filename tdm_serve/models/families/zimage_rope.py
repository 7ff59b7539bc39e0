"""Z-Image's rotary tables: kept per axis, and cut to a sequence in every forward.

Every position is a triple (sequence, row, column). Sines and cosines of each coordinate are made once; those of a
sequence are slices of them side by side, so any size and any mixture of text lengths costs a copy, nothing is kept per
size, and no complex number stands in the way of a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from diffusers.models.transformers.transformer_z_image import RopeEmbedder
from torch import Tensor, nn

Tables = tuple[Tensor, Tensor]  # cos and sin, (S, 1, D / 2) each, or (B, S, 1, D / 2) where rows differ


class Rope(nn.Module):
    """The tables of `source`, in float32 whatever the type of the weights."""

    def __init__(self, source: RopeEmbedder) -> None:
        super().__init__()
        complex_ = source.precompute_freqs_cis(source.axes_dims, source.axes_lens, theta=source.theta)
        self.axes = [torch.stack((axis.real, axis.imag)) for axis in complex_]  # (2, positions, dims / 2) each

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follows the module to its device, but not to another type, as a buffer would."""
        super()._apply(fn, recurse)
        self.axes = [axis.to(fn(axis).device) for axis in self.axes]
        return self

    @property
    def limits(self) -> tuple[int, int, int]:
        """Text tokens, rows and columns of a picture (both in patches), at most."""
        sequence, rows, columns = (axis.shape[1] for axis in self.axes)
        return sequence - 2, rows, columns  # the picture's place in the sequence comes behind the text's

    def text(self, length: int) -> Tables:
        """Of `length` text tokens alone, which count from 1."""
        table = self._text(length).unsqueeze(-2)
        return table[0], table[1]

    def joint(self, text: int, height: int, width: int, padding: int, lengths: Tensor | None = None) -> Tables:
        """Of height x width image tokens, `padding` ones behind them, and `text` text tokens.

        The picture's place in the sequence comes after the padded caption: one place, or one per row by `lengths` (B,).
        """
        sequence, rows, columns = self.axes
        index = slice(text + 1, text + 2) if lengths is None else lengths + 1
        place = sequence[:, index].unflatten(1, (-1, 1, 1))  # (2, B or 1, 1, 1, d)
        parts = (place, rows[:, None, :height, None], columns[:, None, None, :width])
        image = torch.cat([part.expand(2, place.shape[1], height, width, -1) for part in parts], dim=-1).flatten(2, 3)
        rest = [self._nowhere(padding), self._text(text)] if padding else [self._text(text)]
        whole = torch.cat([image, *(one.unsqueeze(1).expand(-1, len(image[0]), -1, -1) for one in rest)], dim=2)
        table = whole.unsqueeze(-2)  # (2, B or 1, S, 1, D / 2)
        return (table[0, 0], table[1, 0]) if lengths is None else (table[0], table[1])

    def _text(self, length: int) -> Tensor:
        """(2, length, D / 2) at (1, 0, 0), (2, 0, 0), ..."""
        sequence, *others = self.axes
        still = [axis[:, :1].expand(-1, length, -1) for axis in others]
        return torch.cat((sequence[:, 1 : length + 1], *still), dim=-1)

    def _nowhere(self, count: int) -> Tensor:
        """(2, count, D / 2) at (0, 0, 0), where padding of the picture is."""
        return torch.cat([axis[:, :1] for axis in self.axes], dim=-1).expand(-1, count, -1)
