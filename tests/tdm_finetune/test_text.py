"""Training reads prompts exactly as serving does: the same template, nothing cut."""

from __future__ import annotations

from itertools import islice

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tdm_finetune import scenes
from tdm_finetune.text import MARKERS, TextConfig, build_tokenizer, tokenize
from tdm_serve import Pipeline
from tdm_serve.errors import ConfigError
from tdm_serve.models.catalog import EMBEDDED

ODD = ["", "{", "a {} star {0} {prompt}", "%s \\ {{ messages }}", "ein 星 🟣 Þ"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")


def test_training_and_serving_read_the_same_tokens(pipeline: Pipeline, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [*ODD, *(prompt.text for prompt in islice(scenes.prompts("heldout"), 70))]
    ids, lengths = tokenize(tokenizer, prompts, 64)
    assert ids.shape == (len(prompts), 64)
    for prompt, row, length in zip(prompts, ids.tolist(), lengths.tolist(), strict=True):
        assert row[:length] == pipeline.engine.model.tokens(prompt)
        assert set(row[length:]) <= {tokenizer.pad_token_id}


def test_a_new_tokenizer_keeps_prompts_and_ends_in_the_markers() -> None:
    tokenizer = build_tokenizer(TextConfig(vocabulary=300))
    markers = [tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS]
    ids, lengths = tokenize(tokenizer, ODD, 96)
    for prompt, row, length in zip(ODD, ids.tolist(), lengths.tolist(), strict=True):
        assert row[length - len(markers) : length] == markers
        assert tokenizer.decode(row[:length], skip_special_tokens=True) == prompt


def test_what_does_not_fit_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    for prompts in (["a red star and " * 20], ["a star", "a red star and " * 20]):
        with pytest.raises(ConfigError, match="tokens, template included; 32 are read"):
            tokenize(tokenizer, prompts, 32)
