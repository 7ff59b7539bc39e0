"""The smallest world that the trainers can be tested on: 4 x 4 pictures, a network of a few hundred weights.

Prompts are "bright 3" or "dark 3": a picture should be that bright, and more so the larger the number. Test modules and
the processes that tests start import this module by name; conftest.py puts this folder on the path. Rewards at the
end are found as `toy`, `toy-nan` and so on, through an entry point as any other reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from tdm_finetune.process import Diffusion, Flow, Process
from tdm_finetune.scoring import World
from tdm_finetune.student import Student, StudentConfig
from tdm_finetune.tdm import Distillation, TdmConfig
from tdm_finetune.tdm_r1 import Reinforcement, TdmR1Config
from tdm_finetune.trainee import Conditioning, Prompt, Trainee
from tdm_finetune.workers import Workers
from tdm_serve.models.lora import Lora

CATEGORIES = ("bright", "dark", "grey")
SHAPE = (2, 4, 4)
WIDTH = 8

ENTRY_POINTS = """[tdm_serve.rewards]
toy = toy_trainee:brightness
toy-sign = toy_trainee:sign
toy-constant = toy_trainee:constant
toy-nan = toy_trainee:not_a_number
toy-short = toy_trainee:one_too_few
toy-runaway = toy_trainee:runaway
"""


@dataclass(frozen=True, slots=True)
class Grade:
    strict: float
    soft: float


def check(pictures: NDArray[np.uint8], specs: Sequence[float]) -> list[Grade]:
    """How near the pictures' brightness is to what is asked for."""
    far = [abs(float(picture.mean()) / 255 - spec) for picture, spec in zip(pictures, specs, strict=True)]
    return [Grade(float(distance < 0.05), 1 - distance) for distance in far]


WORLD = World(check, CATEGORIES, [(value, value, value) for value in range(0, 256, 51)])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x) + condition))


class ToyNet(nn.Module):
    """Every pixel is a token; the prompt comes in through `said`, whose adapters stay unmerged for small batches."""

    def __init__(self, top: float) -> None:
        super().__init__()
        self.top = top
        self.into, self.said = nn.Linear(2, WIDTH), nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, latents: Tensor, level: Tensor, text: Tensor, strength: Tensor) -> Tensor:
        """latents (B, 2, 4, 4), level (B,), text (B, 3), strength (B,)."""
        share = (level / self.top).to(latents.dtype)
        condition = self.said(torch.cat([text, torch.stack([strength, share], 1)], 1)).unsqueeze(1)
        x = self.into(latents.flatten(2).transpose(1, 2))  # (B, 16, D)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x).transpose(1, 2).unflatten(2, (4, 4))


class ToyTrainee:
    """A fixed random network as a `Trainee`."""

    adapter: Lora | None = None
    component = "transformer"
    checkpoint_hash = "toy"
    picture_size = (4, 4)

    def __init__(self, process: Process | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        self.process: Process = process or Flow(3.0)
        self.latent_shape = SHAPE
        self.world: World | None = WORLD
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.toy = ToyNet(self.process.levels(1)[0])
        self.net: nn.Module = self.toy.requires_grad_(False).to(dtype)
        self._linears = {n: m for n, m in self.toy.named_modules() if isinstance(m, nn.Linear)}

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.toy.blocks)

    def linears(self) -> dict[str, nn.Linear]:
        return self._linears

    def check_prompt(self, prompt: str) -> None:
        """Every text is read."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        words = [prompt.split() for prompt in prompts]
        kinds = [[float(kind in said) for kind in CATEGORIES] for said in words]
        return torch.tensor(kinds), torch.tensor([float(said[1]) / 4 if len(said) > 1 else 0.0 for said in words])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        three = torch.cat([latents, latents.mean(1, keepdim=True)], 1)
        return three.float().mul(40).add(128).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        random = np.random.default_rng((seed, len(split)))
        while True:
            kind, number = CATEGORIES[random.integers(3)], int(random.integers(1, 5))
            yield Prompt(f"{kind} {number}", {"category": kind, "spec": goal(kind, number)})

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in self.net.state_dict().items()}, folder / "toy.safetensors"
        )


def goal(kind: str, number: int) -> float:
    """Brightness 0 to 1 that a prompt asks for."""
    return 0.5 + {"bright": 0.1, "dark": -0.1, "grey": 0.0}[kind] * number


def diffusion(prediction: str = "epsilon") -> Diffusion:
    """A short table, with alphas that fall from 0.99 to 0.05."""
    alphas = np.linspace(0.99, 0.05, 50).tolist()
    return Diffusion(alphas, prediction="v" if prediction == "v" else "epsilon", top=45)


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    return list(islice(ToyTrainee().prompts("train", seed), count))


SMALL: dict[str, Any] = {
    "checkpoint": "toy", "rank": 2, "alpha": 4.0, "precision": "fp32", "steps": 8, "decay_steps": 2, "warmup": 1,
    "save_every": 2, "score_every": 4, "score_prompts": 6,
}  # fmt: skip
SMALL_R1: dict[str, Any] = SMALL | {"reward": "toy", "groups": 4, "group": 4, "fake_warmup": 0}


def tdm_config(run: Path, **values: Any) -> TdmConfig:
    given: dict[str, Any] = {**SMALL, "run": run, "batch": 8, **values}
    return TdmConfig(**given)


def r1_config(run: Path, **values: Any) -> TdmR1Config:
    given: dict[str, Any] = {**SMALL_R1, "run": run, **values}
    return TdmR1Config(**given)


def student(config: StudentConfig, trainee: Trainee | None = None) -> Student:
    """What `fit.make_student` does, on the toy."""
    torch.manual_seed(config.seed)
    workers = Workers()
    made = Student(config, trainee or ToyTrainee(), workers)
    if config.shard:
        workers.shard(made.trainee.net, made.trainee.blocks())
    return made


def distillation(config: TdmConfig, trainee: ToyTrainee | None = None) -> Distillation:
    return Distillation(config, student(config, trainee))


def reinforcement(config: TdmR1Config, trainee: ToyTrainee | None = None) -> Reinforcement:
    return Reinforcement(config, student(config, trainee), config.rewards())


def step(trainer: Distillation | Reinforcement, count: int, seed: int = 0, first: int = 0) -> list[dict[str, float]]:
    """`count` updates on prompts of their own; every update's scalars."""
    found: list[dict[str, float]] = []
    for index in range(first, first + count):
        share = trainer.student.workers.share(trainer.groups)
        chosen = prompts(trainer.groups, seed + index)[share.start : share.stop]
        found.append(trainer.update(chosen, share, index))
    return found


def finite(scalars: Mapping[str, float]) -> bool:
    return bool(scalars) and all(math.isfinite(value) for value in scalars.values())


def bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, to compare with later."""
    return [tensor.detach().clone() for tensor in tensors]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def close(first: Sequence[Tensor], second: Sequence[Tensor], tolerance: float = 1e-5) -> bool:
    """Equal relative to the largest value of all."""
    one, two = bits(first), bits(second)
    scale = max(float(tensor.abs().max()) for tensor in one)
    return all(float((a - b).abs().max()) <= tolerance * scale for a, b in zip(one, two, strict=True))


Reward = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], Tensor]


def brightness() -> Reward:
    """0 at best: minus the distance from the brightness that is asked for."""

    def reward(images: Tensor, _prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        wanted = torch.tensor([float(data["spec"]) for data in metadata])
        return -(images.float().mean((1, 2, 3)) / 255 - wanted).abs()

    return reward


def sign() -> Reward:
    """1 or 0, as likes are."""
    return lambda images, _prompts, _metadata: (images.float().mean((1, 2, 3)) > 128).float()


def constant() -> Reward:
    return lambda images, _prompts, _metadata: torch.full((len(images),), 0.1)


def not_a_number(after: int = 0) -> Reward:
    """NaN for the third picture of a batch, from the `after`-th batch on."""
    calls = 0

    def reward(images: Tensor, _prompts: Sequence[str], _metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        nonlocal calls
        calls += 1
        scores = images.float().mean((1, 2, 3)) / 255
        if calls > after:
            scores[2] = float("nan")
        return scores

    return reward


def one_too_few(after: int = 0) -> Reward:
    calls = 0

    def reward(images: Tensor, _prompts: Sequence[str], _metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(len(images) - (calls > after))

    return reward


def runaway(after: int) -> Reward:
    """As `sign`, and after so many batches a million times that."""
    calls = 0

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        nonlocal calls
        calls += 1
        return sign()(images, prompts, metadata) * (1e6 if calls > after else 1.0)

    return reward
