"""Tokenizers that need no download: one token a byte, with the special tokens of the ones they stand in for.

They go with random weights, for which any text is as good as any other; text is longer in tokens than with a real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

Kind = Literal["qwen", "clip", "clip-g", "t5"]

CLIP_LENGTH, CLIP_START, CLIP_END = 77, 49406, 49407  # the encoder looks for the end by its number
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(kind: Kind, folder: Path) -> None:
    """Saves one as transformers' `AutoTokenizer` loads it."""
    made = {"qwen": _qwen, "clip": _clip, "clip-g": _clip_g, "t5": _t5}[kind]()
    made.save_pretrained(folder)


def _qwen() -> PreTrainedTokenizerFast:
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    made = PreTrainedTokenizerFast(
        tokenizer_object=_bytes(0, special), pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=131072
    )
    made.chat_template = CHAT
    return made


def _clip(pad: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    special = {"<|startoftext|>": CLIP_START, "<|endoftext|>": CLIP_END}
    inner = _bytes(0, special)
    inner.post_processor = processors.TemplateProcessing(
        "<|startoftext|> $A <|endoftext|>", special_tokens=list(special.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token=pad,
        model_max_length=CLIP_LENGTH,
    )


def _clip_g() -> PreTrainedTokenizerFast:
    return _clip(pad="!")


def _t5() -> PreTrainedTokenizerFast:
    inner = _bytes(2, {"<pad>": 0, "</s>": 1})
    inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", model_max_length=512)


def _bytes(first: int, special: dict[str, int]) -> Tokenizer:
    """One token for each byte, numbered from `first`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: first + index for index, piece in enumerate(alphabet)} | special
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return inner
