"""Several processes as one trainer: each rolls out its share of the groups, gradients are averaged.

Started by `accelerate launch` or `torchrun`; alone it costs nothing. A group is never split, so only the batch-wide
scale of advantages and the gradients cross processes. `shard` spreads the frozen base over the processes (FSDP2): the
roles' low-rank pairs are small and stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from tdm_serve.errors import ConfigError

Precision = Literal["bf16", "fp32"]  # no fp16: these losses would need scaling


class Workers:
    """This process among its peers."""

    def __init__(self) -> None:
        # without being told, accelerate takes several processes on CPUs for as many that are alone
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.rank, self.count = state.process_index, state.num_processes
        self.device = torch.device(str(state.device))

    @property
    def leads(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0

    def share(self, groups: int) -> range:
        """This process's groups of an update's `groups`; ConfigError unless they divide evenly."""
        if groups % self.count:
            raise ConfigError(f"{groups} prompts an update do not divide among {self.count} processes; use a multiple")
        own = groups // self.count
        return range(self.rank * own, (self.rank + 1) * own)

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Averages tensors of the same shapes over the processes, in place and in one exchange."""
        listed = list(tensors)
        if self.count == 1 or not listed:
            return
        flat = self.mean(torch.cat([tensor.flatten() for tensor in listed]))
        for tensor, part in zip(listed, flat.split([t.numel() for t in listed]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def std(self, values: Tensor) -> Tensor:
        """Standard deviation of values (B,) over all processes; a scalar."""
        mean = self.mean(values.mean())
        return self.mean((values - mean).square().mean()).sqrt()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return value if self.count == 1 else cast(Tensor, reduce(value, "mean"))

    def means(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Scalars averaged over the processes, so that all of them judge a run alike."""
        if self.count == 1:
            return dict(scalars)
        values = torch.tensor(list(scalars.values()), dtype=torch.float64, device=self.device)
        return dict(zip(scalars, self.mean(values).tolist(), strict=True))

    def shard(self, net: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Spreads the frozen parameters of `net`, block by block, over the processes."""
        if self.count == 1:
            return
        from torch.distributed.fsdp import fully_shard

        for block in blocks:
            fully_shard(block)
        fully_shard(net)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Mixed precision for one phase.

    Without autocast's cache of converted weights: inside one phase a role runs with its averages in place, too, and
    the cache would hand those to the live role.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
