"""Pre-trains the multi-step teacher: flow matching with condition dropout, on cached latents and text features.

v = noise - clean is regressed at x = (1 - sigma) * clean + sigma * noise (Lipman et al. 2022; method notes 1.1), with
sigma logit-normal and shifted like the sampler's grid. One prompt in ten is replaced by the encoded empty one, so
that guidance works. Hidden matrices are trained by Muon (orthogonalised momentum), everything else by AdamW.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from tdm_finetune import scenes
from tdm_finetune.cache import Cache, Frozen
from tdm_finetune.ema import Ema
from tdm_finetune.paint import paint, quick_scores, sheet
from tdm_finetune.process import Flow
from tdm_finetune.run import Run, finished, seed_everything, trapezoid
from tdm_finetune.zimage import VelocityNet, ZImageTrainee
from tdm_serve.config import at_least, multiple_of, positive
from tdm_serve.errors import ConfigError
from tdm_serve.models.families.zimage_denoiser import PATCH_KEY, TEXT_MULTIPLE, ZImageDenoiser
from tdm_serve.models.quiet import quiet_bars

logger = logging.getLogger(__name__)

SCORED_PROMPTS = 70


@dataclass(frozen=True, slots=True)
class PretrainConfig:
    """`tdm-serve finetune pretrain`."""

    run: Path = Path("runs/pretrain")
    vae: Path = Path("runs/vae")
    text: Path = Path("runs/text")
    start: Path | None = None  # a finished run of the same width, layers and heads whose weights this one goes on from
    seed: int = 0
    steps: int = 14_000
    decay_steps: int = 2_500  # the rate is constant, then falls linearly to zero over these last steps
    batch: int = 64
    scenes: int = 40_000  # cached training pictures
    text_tokens: int = 32
    long_text_share: float = 0.03  # batches padded to 64 text tokens, so that longer prompts work too
    learning_rate: float = 1.5e-3
    muon_learning_rate: float = 2e-3
    warmup: int = 200
    shift: float = 3.0
    dropout: float = 0.1
    ema: float = 0.999
    compile: bool = False  # torch.compile; about 1.5x faster on a CPU with a C++ compiler, after a minute or two
    save_every: int = 500
    score_every: int = 1000
    width: int = 160
    layers: int = 5
    heads: int = 5

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "decay_steps", "batch", "warmup", "save_every", "score_every", "layers", "heads")
        at_least(self, self.batch, "scenes")
        at_least(self, 0, "long_text_share", "dropout", "ema")
        positive(self, "learning_rate", "muon_learning_rate", "shift")
        multiple_of(self, TEXT_MULTIPLE, "text_tokens")
        multiple_of(self, 2 * self.heads, "width")
        at_least(self, 12 * self.heads, "width")  # rotary embedding of three axes needs 12 a head


def build(config: PretrainConfig, channels: int, text_width: int) -> ZImageTransformer2DModel:
    """Z-Image's transformer, small, started as the identity: zero modulation, gates and output (DiT's adaLN-zero)."""
    head = config.width // config.heads
    rows = 2 * ((head - 8) // 4)
    transformer = ZImageTransformer2DModel(
        in_channels=channels,
        dim=config.width,
        n_layers=config.layers,
        n_refiner_layers=1,
        n_heads=config.heads,
        n_kv_heads=config.heads,
        cap_feat_dim=text_width,
        axes_dims=[head - 2 * rows, rows, rows],
        axes_lens=[256, 64, 64],
    )
    output = f"all_final_layer.{PATCH_KEY}.linear"
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ("adaLN_modulation" in name or name == output):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def _copy_weights(start: Path, transformer: ZImageTransformer2DModel) -> None:
    """Puts a finished run's averaged weights in place; ConfigError if they belong to another architecture."""
    with quiet_bars():
        trained = ZImageTransformer2DModel.from_pretrained(finished(start / "transformer", "pretrain"))
    names = ("dim", "n_layers", "n_heads", "in_channels", "cap_feat_dim")
    differs = [
        f"{n}: {trained.config[n]} there, {transformer.config[n]} here"
        for n in names
        if trained.config[n] != transformer.config[n]
    ]
    if differs:
        raise ConfigError(f"start {start} holds another architecture ({'; '.join(differs)})")
    transformer.load_state_dict(trained.state_dict())


def draw_sigma(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Logit-normal noise levels (B,) under the sampler's shift (Esser et al. 2024, section 3.1)."""
    u = torch.sigmoid(torch.randn(batch, generator=generator))
    return Flow(shift).shifted(u)


def flow_matching_loss(predicted: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity v = noise - clean."""
    return (predicted.float() - (noise - clean)).square().mean()


def optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' attention and feed-forward matrices; AdamW for embeddings, norms, modulation, output."""
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim == 2 and (".attention." in name or ".feed_forward." in name)
        (hidden if is_hidden else rest).append(parameter)
    muon = torch.optim.Muon(hidden, config.muon_learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)]


class Teacher:
    """Model, optimisers, average and random stream of one pre-training run."""

    def __init__(self, config: PretrainConfig, frozen: Frozen) -> None:
        self.config = config
        self.transformer = build(config, frozen.channels, frozen.text_width)
        if config.start is not None:
            _copy_weights(config.start, self.transformer)
        self.denoiser = ZImageDenoiser(self.transformer)
        self.optimizers = optimizers(self.transformer, config)
        self.ema = Ema(dict(self.transformer.named_parameters()), config.ema)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.empty = frozen.encode([""], config.text_tokens)
        self.predict = VelocityNet(self.denoiser)
        self._fill_tables(frozen)
        self.compiled: Callable[..., Tensor] = torch.compile(self.predict) if config.compile else self.predict

    @torch.no_grad()
    def _fill_tables(self, frozen: Frozen) -> None:
        """Rotary tables are complex-valued to build, which a compiler cannot: one eager call stores them."""
        for tokens in (self.config.text_tokens, 2 * self.config.text_tokens):
            text = torch.zeros(1, tokens, frozen.text_width)
            self.predict(torch.zeros(1, frozen.channels, 16, 16), torch.ones(1), text, torch.ones(1, dtype=torch.long))

    def step(self, cache: Cache, step: int) -> dict[str, float]:
        """One optimiser step; returns loss and gradient norm."""
        config = self.config
        latents, text, lengths = cache.batch(config.batch, step)
        dropped = torch.rand(config.batch, generator=self.generator) < config.dropout
        text = torch.where(dropped.view(-1, 1, 1), self.empty[0], text)
        lengths = torch.where(dropped, self.empty[1], lengths)
        noise = torch.randn(latents.shape, generator=self.generator)
        sigma = draw_sigma(config.batch, config.shift, self.generator)
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
        predict = self.compiled
        if float(torch.rand((), generator=self.generator)) < config.long_text_share:
            text, predict = torch.nn.functional.pad(text, (0, 0, 0, config.text_tokens)), self.predict
        with torch.autocast("cpu", torch.bfloat16):
            predicted = predict(noisy, sigma, text, lengths)
        loss = flow_matching_loss(predicted, latents, noise)
        return {"loss": loss.item(), "gradient_norm": self._update(loss, step)}

    def _update(self, loss: Tensor, step: int) -> float:
        config = self.config
        factor = trapezoid(step, config.steps, config.warmup, config.decay_steps)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        rates = (config.muon_learning_rate, config.learning_rate)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(step)
        return float(norm)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.transformer.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.transformer.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])


def train(config: PretrainConfig) -> Path:
    """Trains, or resumes, and writes the averaged transformer to `run/transformer`; returns the run folder."""
    seed_everything(config.seed)
    frozen = Frozen.load(config.vae / "vae", config.text)
    run = Run(config.run, config, total_steps=config.steps)  # first: it refuses another config's folder
    cache = Cache.build(config.run / "cache", frozen, config.scenes, config.text_tokens, config.seed)
    teacher = Teacher(config, frozen)
    if (state := run.resume()) is not None:
        teacher.load(state)
    while run.step < config.steps:
        run.advance(teacher.step(cache, run.step))
        if run.step % config.save_every == 0:
            run.save(**teacher.state())
        if run.step % config.score_every == 0 or run.step == config.steps:
            score(teacher, frozen, run)
    run.close()
    with teacher.ema.applied():
        teacher.transformer.save_pretrained(config.run / "transformer")
    return config.run


def score(teacher: Teacher, frozen: Frozen, run: Run) -> None:
    """Logs the averaged teacher's scores on a few validation prompts at 12 guided steps, and saves a sheet."""
    trainee = ZImageTrainee(
        teacher.transformer,
        frozen,
        shift=teacher.config.shift,
        picture_size=(scenes.SIZE, scenes.SIZE),
        text_tokens=teacher.config.text_tokens,
    )
    prompts = list(islice(trainee.prompts("val", 0), SCORED_PROMPTS))
    with teacher.ema.applied():
        pictures = paint(trainee, trainee.base, [prompt.text for prompt in prompts], nfe=12, guidance=3.0)
    run.picture("sheet", sheet(pictures, 7))
    scores = quick_scores(trainee, prompts, pictures, 1)
    run.log({f"val_{name}": value for name, value in scores.items()})
    logger.info("step %d: %s", run.step, scores)
