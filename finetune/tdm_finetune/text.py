"""Trains the small text encoder: a byte-level BPE tokenizer and a Qwen3 model that learns to read prompts.

The task is parsing. Four marker tokens that the chat template appends after the prompt must hold, linearly readable,
what the scene contains: its kind, count and axis in the first, one object (or letter) in each of the others, ordered
as in the picture, so that "a star below a ring" and "a ring above a star" end up alike. The denoiser is then
conditioned on features in which binding is already done. Conditioning is `hidden_states[-2]`, as in Z-Image, so the
last layer is never used.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from tdm_finetune import scenes
from tdm_finetune.run import Run, cosine, seed_everything
from tdm_finetune.scenes import CATEGORIES, COLOURS, SHAPES, ScenePrompt, Spec
from tdm_finetune.scenes.world import LETTERS, MAX_COUNT
from tdm_serve.config import at_least, multiple_of, positive
from tdm_serve.errors import ConfigError
from tdm_serve.models.quiet import quiet_bars

logger = logging.getLogger(__name__)

MARKERS = ("<|scene|>", "<|first|>", "<|second|>", "<|third|>")
SPECIALS = ("<|pad|>", "<|user|>", "<|end|>", *MARKERS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}" + "".join(MARKERS) + "{% endif %}"
)
NAMES = (None, *SHAPES, *LETTERS)
COLOUR_NAMES = (None, *COLOURS)
KINDS = (None, *CATEGORIES)
AXES = (None, "horizontal", "vertical")
HEADS = 4
SLOT = "\0"  # stands for the prompt while the chat template is rendered


@dataclass(frozen=True, slots=True)
class TextConfig:
    """`tdm-serve finetune text`."""

    run: Path = Path("runs/text")
    seed: int = 0
    steps: int = 1500
    batch: int = 192
    learning_rate: float = 2e-3
    warmup: int = 100
    empty_share: float = 0.05  # prompts replaced by the empty one, the unconditional input of guidance
    save_every: int = 300
    vocabulary: int = 640
    width: int = 128
    layers: int = 4  # three that are used and the one after them
    max_tokens: int = 64

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch", "save_every", "max_tokens")
        at_least(self, 0, "warmup", "empty_share")
        at_least(self, 2, "layers")
        at_least(self, 256 + len(SPECIALS), "vocabulary")  # every byte is a token
        positive(self, "learning_rate")
        multiple_of(self, 2 * HEADS, "width")  # rotary embedding needs an even number a head


def build_tokenizer(config: TextConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on prompts; capitals stay single tokens, so that words to draw are spelled out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=config.vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (_spell_out(prompt.text) for prompt in islice(scenes.prompts("train", seed=config.seed), 20_000))
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=config.max_tokens,
        padding_side="right",
    )


def _spell_out(text: str) -> str:
    """Puts spaces around runs of capitals, so that BPE never merges them."""
    return "".join(f" {c} " if c in LETTERS else c for c in text)


def build_encoder(config: TextConfig, vocabulary: int) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=config.width,
            intermediate_size=2 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            head_dim=config.width // HEADS,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


def ordered_objects(spec: Spec) -> list[tuple[str | None, str | None]]:
    """(name, colour) of up to three objects, in reading order of the picture where the prompt fixes it."""
    if spec.word is not None:
        return [(letter, spec.colour) for letter in spec.word]
    objects: list[tuple[str | None, str | None]] = [(thing.shape, thing.colour) for thing in spec.things]
    return objects[::-1] if spec.relation in ("right of", "below") else objects


def targets(spec: Spec | None) -> list[int]:
    """Class indices: kind, count, axis, then name and colour of three objects; None is the empty prompt."""
    if spec is None:
        return [0] * 9
    axis = {"left of": 1, "right of": 1, "above": 2, "below": 2}.get(spec.relation or "", 0)
    row = [KINDS.index(spec.category), spec.count, axis]
    objects = ordered_objects(spec)
    for name, colour in objects + [(None, None)] * (3 - len(objects)):
        row += [NAMES.index(name), COLOUR_NAMES.index(colour)]
    return row


class Parser(nn.Module):
    """Linear read-outs of the markers; discarded after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (len(KINDS), MAX_COUNT + 1, len(AXES), *(len(NAMES), len(COLOUR_NAMES)) * 3)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.marker = (0, 0, 0, 1, 1, 2, 2, 3, 3)

    def forward(self, markers: Tensor) -> list[Tensor]:
        """Logits for each target from the markers' features (B, 4, width)."""
        return [head(markers[:, index]) for head, index in zip(self.heads, self.marker, strict=True)]


def tokenize(
    tokenizer: PreTrainedTokenizerFast, prompts: list[str], length: int, truncate: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids (B, length) of the templated prompts and their lengths (B,).

    ConfigError for a prompt that is longer, unless its end may be cut, as Z-Image's pipeline does. Scenes' may not:
    their markers come last.
    """
    # the tokenizer's own template, as when serving; rendered once, since Jinja is slow beside the tokenizer
    before, after = _templated(tokenizer, SLOT).split(SLOT)
    texts = [before + prompt + after for prompt in prompts]
    batch = tokenizer(texts, padding="max_length", max_length=length)
    ids = cast(list[list[int]], batch["input_ids"])
    if truncate:
        ids = [row[:length] for row in ids]
    longest = max(map(len, ids))
    if longest > length:
        raise ConfigError(f"a prompt has {longest} tokens, template included; {length} are read (text_tokens)")
    lengths = torch.tensor([sum(row[:length]) for row in batch["attention_mask"]])
    return torch.tensor(ids), lengths


def _templated(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def features(encoder: Qwen3Model, ids: Tensor) -> Tensor:
    """Second to last hidden state (B, L, width). Causal, so right padding changes nothing before it."""
    return encoder(input_ids=ids, output_hidden_states=True).hidden_states[-2]


def batches(config: TextConfig, skip: int) -> Iterator[list[ScenePrompt | None]]:
    """Batches of prompts, some replaced by None, the empty one; starts `skip` batches into the stream."""
    stream = scenes.prompts("train", seed=config.seed)
    rng = random.Random(f"text/{config.seed}")
    mixed = (None if rng.random() < config.empty_share else prompt for prompt in stream)
    next(islice(mixed, skip * config.batch, skip * config.batch), None)
    while True:
        yield list(islice(mixed, config.batch))


def loss_and_accuracy(
    encoder: Qwen3Model, parser: Parser, tokenizer: PreTrainedTokenizerFast, batch: list[ScenePrompt | None]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the nine targets, and the share of prompts with all nine right."""
    ids, lengths = tokenize(tokenizer, [p.text if p else "" for p in batch], 48)
    wanted = torch.tensor([targets(p.spec if p else None) for p in batch])
    positions = lengths.unsqueeze(1) - len(MARKERS) + torch.arange(len(MARKERS))
    states = features(encoder, ids[:, : int(lengths.max())])
    markers = states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    logits = parser(F.layer_norm(markers.float(), markers.shape[-1:]))
    losses = [F.cross_entropy(scores, wanted[:, index]) for index, scores in enumerate(logits)]
    right = torch.stack([scores.argmax(1) == wanted[:, index] for index, scores in enumerate(logits)]).all(0)
    return torch.stack(losses).mean(), right.float().mean()


def train(config: TextConfig) -> Path:
    """Trains, or resumes, and writes `run/text_encoder` and `run/tokenizer`; returns the run folder."""
    seed_everything(config.seed)
    tokenizer = build_tokenizer(config)
    encoder, parser = build_encoder(config, len(tokenizer)), Parser(config.width)
    parameters = [*encoder.parameters(), *parser.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(config.run, config, total_steps=config.steps)
    if (state := run.resume()) is not None:
        encoder.load_state_dict(state["encoder"])
        parser.load_state_dict(state["parser"])
        optimizer.load_state_dict(state["optimizer"])
    for batch in islice(batches(config, run.step), config.steps - run.step):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * cosine(run.step, config.steps, config.warmup)
        loss, accuracy = loss_and_accuracy(encoder, parser, tokenizer, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.advance({"loss": loss.item(), "all_right": accuracy.item()})
        if run.step % config.save_every == 0:
            run.save(encoder=encoder.state_dict(), parser=parser.state_dict(), optimizer=optimizer.state_dict())
    run.log({"heldout_all_right": heldout_accuracy(encoder, parser, tokenizer)})
    run.close()
    with quiet_bars():
        encoder.save_pretrained(config.run / "text_encoder")
    tokenizer.save_pretrained(str(config.run / "tokenizer"))
    return config.run


@torch.no_grad()
def heldout_accuracy(encoder: Qwen3Model, parser: Parser, tokenizer: PreTrainedTokenizerFast) -> float:
    """Share of held-out prompts that are parsed entirely right."""
    encoder.eval()
    batch: list[ScenePrompt | None] = list(islice(scenes.prompts("heldout", seed=1), 700))
    return float(loss_and_accuracy(encoder, parser, tokenizer, batch)[1])
