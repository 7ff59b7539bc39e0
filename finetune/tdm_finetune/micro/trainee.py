"""The micro model as trainers see it, and its folder: `micro.json` and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tdm_finetune.data import to_tensor
from tdm_finetune.micro import world
from tdm_finetune.micro.check import check
from tdm_finetune.micro.model import CHANNELS, LENGTH, WORDS, MicroNet
from tdm_finetune.process import Diffusion, Flow, Process
from tdm_finetune.scenes import Split
from tdm_finetune.scoring import World
from tdm_finetune.trainee import Conditioning, Prompt
from tdm_serve.config import at_least, multiple_of, positive
from tdm_serve.config import check as check_table
from tdm_serve.errors import CheckpointError, InvalidRequest
from tdm_serve.files import sha256, write_atomically
from tdm_serve.models.lora import Lora

SETTINGS_FILE = "micro.json"
WEIGHTS_FILE = "model.safetensors"
NOISING_STEPS = 1000
BETAS = (1e-4, 0.02)  # the linear table of DDPM and PixArt
TARGETS = ("to_q", "to_k", "to_v", "to_out", "up", "down", "modulation")
WORLD = World(
    check=lambda pictures, specs: check(pictures, specs).each(),
    categories=world.CATEGORIES,
    palette=(world.BACKGROUND, *world.COLOURS.values()),
)
IDS = {word: index for index, word in enumerate(WORDS, start=1)}


@dataclass(frozen=True, slots=True)
class MicroSettings:
    """What `micro.json` holds: the network's shape and the process that it was trained for."""

    process: Literal["flow", "epsilon"] = "flow"
    shift: float = 1.0  # of flow matching
    top: int = 900  # of the epsilon process: the noising step at which sampling starts
    width: int = 128
    layers: int = 4
    heads: int = 4
    guidance: float = 2.5  # of the multi-step sampler

    def __post_init__(self) -> None:
        at_least(self, 1, "top", "layers", "heads")
        at_least(self, 0, "guidance")
        positive(self, "shift")
        multiple_of(self, self.heads, "width")
        if self.top > NOISING_STEPS:
            raise ValueError(f"top is {self.top}; it must be at most {NOISING_STEPS}")

    def build(self) -> MicroNet:
        """The network, untrained."""
        return MicroNet(self.width, self.layers, self.heads, 1.0 if self.process == "flow" else float(NOISING_STEPS))

    def forward_process(self) -> Process:
        if self.process == "flow":
            return Flow(self.shift)
        betas = torch.linspace(*BETAS, NOISING_STEPS, dtype=torch.float64)
        return Diffusion((1 - betas).cumprod(0).tolist(), top=self.top)


class MicroTrainee:
    """A micro model as a `Trainee`. Nothing of it is an adapter: what LoRA training makes stays with its run."""

    adapter: Lora | None = None
    component = "transformer"
    picture_size = (world.SIZE, world.SIZE)

    def __init__(self, settings: MicroSettings, net: MicroNet, checkpoint_hash: str = "") -> None:
        self.settings, self.checkpoint_hash = settings, checkpoint_hash
        self.world: World | None = WORLD
        self.net: nn.Module = net
        self.process = settings.forward_process()
        self.guidance = settings.guidance
        self.latent_shape = (CHANNELS, world.SIZE, world.SIZE)
        self._blocks = list(net.blocks)
        self._linears = {
            name: module
            for name, module in net.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS
        }

    @classmethod
    def load(cls, folder: Path) -> MicroTrainee:
        """Reads a folder; CheckpointError names a file that is missing or does not fit."""
        settings = _read_settings(folder / SETTINGS_FILE)
        net = settings.build()
        path = folder / WEIGHTS_FILE
        try:
            net.load_state_dict(load(path.read_bytes()))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not hold the network of its {SETTINGS_FILE}: {error}") from error
        return cls(settings, net.requires_grad_(False).eval(), sha256(path))

    def blocks(self) -> Sequence[nn.Module]:
        return self._blocks

    def linears(self) -> dict[str, nn.Linear]:
        """Attention, feed-forward and modulation, by which alone the prompt comes in."""
        return self._linears

    def check_prompt(self, prompt: str) -> None:
        _ids(prompt)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Tokens (B, LENGTH) and lengths (B,); InvalidRequest for a word or a length that the model does not know."""
        tokens = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
        lengths = torch.zeros(len(prompts), dtype=torch.long)
        for index, prompt in enumerate(prompts):
            ids = _ids(prompt)
            tokens[index, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            lengths[index] = len(ids)
        return tokens, lengths

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        for prompt in world.prompts(cast(Split, split), seed=seed):
            yield Prompt(prompt.text, {"spec": prompt.spec, "category": prompt.spec.category})

    def save(self, folder: Path) -> None:
        """The settings go last: a folder with them is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS_FILE, save(dict(self.net.state_dict())))
        described = json.dumps(dataclasses.asdict(self.settings), indent=1)
        write_atomically(folder / SETTINGS_FILE, f"{described}\n".encode())


def encode_pictures(pictures: world.Pixels) -> Tensor:
    """Clean latents (B, 3, 16, 16) of uint8 pictures (B, 16, 16, 3): the inverse of `decode`."""
    return to_tensor(list(pictures))


def _read_settings(path: Path) -> MicroSettings:
    try:
        table: Any = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    try:
        return MicroSettings(**check_table(MicroSettings, cast(dict[str, Any], table), str(path)))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _ids(prompt: str) -> list[int]:
    """The prompt's tokens."""
    words = prompt.lower().split()
    if unknown := [word for word in words if word not in IDS]:
        raise InvalidRequest(f"the word {unknown[0]!r} is unknown to the micro world; it knows {', '.join(WORDS)}")
    if len(words) > LENGTH:
        raise InvalidRequest(f"the prompt {prompt!r} has {len(words)} words; the micro world reads at most {LENGTH}")
    return [IDS[word] for word in words]
