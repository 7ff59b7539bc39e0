"""The frozen parts of training and what they need to compute only once: latents and text features of scenes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Model

from tdm_finetune.data import examples, to_tensor
from tdm_finetune.run import finished
from tdm_finetune.text import MARKERS, features, tokenize
from tdm_serve.files import sha256
from tdm_serve.models.autoencoder import decode, posterior
from tdm_serve.models.placement import placed
from tdm_serve.models.quiet import quiet_bars

logger = logging.getLogger(__name__)
CHUNK = 64
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Frozen:
    """Autoencoder, tokenizer and text encoder, on one device; none of them trains once the denoiser does."""

    vae: AutoencoderKL
    tokenizer: PreTrainedTokenizerFast
    encoder: Qwen3Model
    digest: str  # of the files they were read from, so that a cache never outlives them

    @classmethod
    def load(cls, vae: Path, text: Path, device: torch.device = CPU) -> Frozen:
        """From a VAE folder and a folder that holds `tokenizer` and `text_encoder`; in bfloat16 on a GPU."""
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        parts = (finished(vae, "vae"), finished(text / "tokenizer", "text"), finished(text / "text_encoder", "text"))
        with quiet_bars():
            return cls(
                placed(AutoencoderKL.from_pretrained(parts[0], dtype=dtype), device),
                AutoTokenizer.from_pretrained(parts[1]),
                placed(Qwen3Model.from_pretrained(parts[2], dtype=dtype), device),
                _digest(parts),
            )

    @property
    def channels(self) -> int:
        return int(self.vae.config["latent_channels"])

    @property
    def factor(self) -> int:
        """Pixels a latent, along one side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def text_width(self) -> int:
        return self.encoder.config.hidden_size

    @property
    def reads_scenes(self) -> bool:
        """Whether the text encoder was trained on the synthetic world, whose markers it reads behind every prompt."""
        return all(marker in str(self.tokenizer.chat_template) for marker in MARKERS)

    def check(self, prompt: str, length: int, truncate: bool = False) -> None:
        """Raises ConfigError for a prompt that does not fit into `length` tokens, unless it may be cut."""
        tokenize(self.tokenizer, [prompt], length, truncate)

    @torch.no_grad()
    def encode(self, prompts: list[str], length: int, truncate: bool = False) -> tuple[Tensor, Tensor]:
        """Text features (B, length, width) and token counts (B,), on the CPU, of prompts of at most `length` tokens."""
        ids, lengths = tokenize(self.tokenizer, prompts, length, truncate)
        return features(self.encoder, ids.to(self.encoder.device)).cpu(), lengths

    @torch.no_grad()
    def to_latents(self, pictures: Tensor) -> Tensor:
        """Normalised latents (B, C, H / 8, W / 8) of pictures (B, 3, H, W) in [-1, 1]: the posterior's mean."""
        mean = posterior(self.vae, pictures).mean
        return (mean - self.vae.config["shift_factor"]) * self.vae.config["scaling_factor"]

    @torch.no_grad()
    def to_pictures(self, latents: Tensor) -> Tensor:
        """uint8 pictures (B, H, W, 3) on the CPU, of normalised latents."""
        raw = latents.float() / self.vae.config["scaling_factor"] + self.vae.config["shift_factor"]
        decoded = decode(self.vae, raw.to(self.vae.device, self.vae.dtype)).float()
        return decoded.add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _digest(folders: Iterable[Path]) -> str:
    """Short digest of every weight and configuration file."""
    files = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()[:12]


class Cache:
    """Latents and text features of a fixed set of training scenes, in half precision, on disk and in memory."""

    def __init__(self, tensors: dict[str, Tensor], seed: int) -> None:
        self.latents, self.text, self.lengths = tensors["latents"], tensors["text"], tensors["lengths"]
        self.seed = seed

    @classmethod
    def build(cls, folder: Path, frozen: Frozen, count: int, text_tokens: int, seed: int) -> Cache:
        """Loads the cache from `folder`, or renders and encodes `count` scenes and stores them there."""
        path = folder / f"scenes-{count}-{text_tokens}-{seed}-{frozen.digest}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".part")
            save_file(_encode_scenes(frozen, count, text_tokens, seed), temporary)
            temporary.replace(path)
        return cls(load_file(path), seed)

    def batch(self, size: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, text features and token counts of batch `step`; every epoch is a fresh permutation."""
        per_epoch = len(self.latents) // size
        epoch, index = divmod(step, per_epoch)
        order = torch.randperm(len(self.latents), generator=torch.Generator().manual_seed(self.seed + epoch))
        chosen = order[index * size : (index + 1) * size]
        return self.latents[chosen].float(), self.text[chosen].float(), self.lengths[chosen]


def _encode_scenes(frozen: Frozen, count: int, text_tokens: int, seed: int) -> dict[str, Tensor]:
    stream = examples(seed)
    latents: list[Tensor] = []
    text: list[Tensor] = []
    lengths: list[Tensor] = []
    for start in tqdm(range(0, count, CHUNK), desc="encoding scenes", disable=None):
        prompts, pictures = zip(*islice(stream, min(CHUNK, count - start)), strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(frozen.to_latents(to_tensor(list(pictures))).half())
        encoded, counted = frozen.encode([prompt.text for prompt in prompts], text_tokens)
        text.append(encoded.half())
        lengths.append(counted)
    return {"latents": torch.cat(latents).contiguous(), "text": torch.cat(text), "lengths": torch.cat(lengths)}
