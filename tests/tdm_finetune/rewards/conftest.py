"""True scenes as a batch, rewards from a package of their own, and tiny models of the published classes."""

from __future__ import annotations

import random
import string
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tdm_finetune import scenes

Register = Callable[[str], None]


@dataclass(frozen=True)
class Batch:
    """What a reward is called with."""

    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]

    def __iter__(self) -> Any:
        return iter((self.images, self.prompts, self.metadata))


def scene_batch(n: int, category: scenes.Category | None = None, seed: int = 0) -> Batch:
    """True pictures of the first `n` validation prompts."""
    chosen = list(islice(scenes.prompts("val", category, seed), n))
    rng = random.Random(seed)
    pictures = np.stack([scenes.render(prompt.spec, rng) for prompt in chosen])
    metadata = [{"spec": prompt.spec, "category": prompt.spec.category} for prompt in chosen]
    return Batch(torch.from_numpy(pictures), [prompt.text for prompt in chosen], metadata)


@pytest.fixture
def batch() -> Batch:
    return scene_batch(7)


@pytest.fixture
def scenes_of() -> Callable[..., Batch]:
    """`scenes_of(7, "text")`."""
    return scene_batch


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Puts a module on the path as an installed package; every function in it becomes a reward of the same name."""

    def register(source: str) -> None:
        code = textwrap.dedent(source)
        module = f"somebodys_{tmp_path.name.replace('-', '_')}"
        folder = tmp_path / "site"
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text("import torch\n" + code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        names = [line[4 : line.index("(")] for line in code.splitlines() if line.startswith("def ")]
        points = [f"{name} = {module}:{name}" for name in names]
        (info / "entry_points.txt").write_text("\n".join(["[tdm_serve.rewards]", *points, ""]))
        monkeypatch.syspath_prepend(folder)

    return register


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that depend on nothing but the name and the shape, so that other packages can be given the same."""
    from zlib import crc32

    places = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    values = torch.sin(places * 0.7 + crc32(name.encode()) % 1000).reshape(shape) * 0.2
    return (values + (len(shape) == 1 and name.endswith("weight"))).float()


@pytest.fixture(scope="session")
def waves() -> Callable[[str, tuple[int, ...]], Tensor]:
    return wave


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random CLIPModel of a few thousand weights and a tokenizer of letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    names = ["<|startoftext|>", *letters, *(letter + "</w>" for letter in letters), "<|endoftext|>"]
    CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": len(names), "bos_token_id": 0, "eos_token_id": len(names) - 1},
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():  # transformers' initial weights are so small that all texts look alike
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() else 0.0)
    model.save_pretrained(folder)
    return folder
