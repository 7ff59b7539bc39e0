"""What a family cannot do is refused with a sentence; what a request allows to be cut is cut as stock cuts it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import PixArtAlphaPipeline

from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import CheckpointError, InvalidRequest, PromptTooLong
from tdm_serve.models.families.captions import cleaned
from tests.tdm_serve import tiny_folders
from tests.tdm_serve.family_cases import CASES, Case, latents, relative, spec_of, stock_pipeline, their_latents

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")

NAMES = ("zimage", "sd35-dpm", "sd3-without-t5", "sd15-dpm", "pixart-dpm")
LONG = "9 red stars, or 4 ars, and a blue one beside them all, b a n d c e f g h i j k l m n o p q r s t u"
BETWEEN = "a red red star " * 6  # too long for CLIP's 24 tokens here, but not for T5's 32


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.make(tmp_path_factory.mktemp(case.family) / "folder")


@pytest.fixture(scope="module")
def stock(case: Case, folder: Path) -> Any:
    return stock_pipeline(case, folder)


@pytest.fixture(scope="module")
def engine(case: Case, folder: Path) -> Engine:
    return Engine.load(spec_of(case, folder), device="cpu", dtype="float32")


def asked(prompt: str, **changes: Any) -> Request:
    return Request(prompt, 3, 64, 64, **changes)


def test_a_long_prompt_is_refused_with_what_to_do(engine: Engine) -> None:
    with pytest.raises(
        PromptTooLong, match=r"the prompt is too long: it has \d+ tokens.* reads at most \d+.*; shorten"
    ):
        engine.check(asked(LONG))
    with pytest.raises(PromptTooLong, match=r"the negative prompt is too long.*truncate_prompt"):
        engine.check(asked("b", guidance=3.0, negative_prompt=LONG))


def test_it_is_cut_as_stock_cuts_it(case: Case, engine: Engine, stock: Any, caplog: pytest.LogCaptureFixture) -> None:
    request = asked(LONG, truncate_prompt=True)
    assert relative(latents(engine, request), their_latents(stock, case, request)) <= 1e-4
    guided = asked("b", truncate_prompt=True, guidance=3.0, negative_prompt=LONG)
    assert relative(latents(engine, guided), their_latents(stock, case, guided)) <= 1e-4
    assert engine.generate([request])[0].truncated
    assert not engine.generate([asked("b", truncate_prompt=True)])[0].truncated


def test_cut_ids_keep_the_special_tokens_that_stock_keeps(case: Case, engine: Engine, stock: Any) -> None:
    ids = engine.model.tokens(LONG, truncate=True)
    if case.family == "zimage":  # stock cuts the template's end off, too
        limit = engine.model.spec.max_prompt_tokens
        assert ids == engine.model.tokens(LONG)[:limit] and len(ids) == limit
        return
    tokenizers = [getattr(stock, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    start = 0
    for tokenizer in (one for one in tokenizers if one is not None):
        length = tokenizer.model_max_length if hasattr(tokenizer, "bos_token") and tokenizer.bos_token else 32
        expected = tokenizer(cleaned(LONG) if case.family == "pixart" else LONG, max_length=length, truncation=True)
        assert ids[start : start + length] == expected["input_ids"]
        assert ids[start + length - 1] == tokenizer.eos_token_id
        start += length
    assert start == len(ids)


@pytest.mark.parametrize("case", ["sd35-dpm"], indirect=True)
def test_what_only_t5_would_read_is_not_lost_silently(case: Case, engine: Engine, stock: Any) -> None:
    with pytest.raises(
        PromptTooLong, match=r"it has 2\d tokens for CLIP, which reads at most 24, and 2\d tokens for T5"
    ):
        engine.check(asked(BETWEEN))
    request = asked(BETWEEN, truncate_prompt=True)
    assert relative(latents(engine, request), their_latents(stock, case, request)) <= 1e-4
    assert engine.generate([request])[0].truncated


def test_sizes_that_the_network_cannot_make(case: Case, folder: Path, engine: Engine) -> None:
    """Whatever the manifest allows."""
    wide = Engine.load(replace(spec_of(case, folder), size_multiple=4, max_side=4096), device="cpu", dtype="float32")
    multiple = {"sd15": 8}.get(case.family, 16)
    with pytest.raises(
        InvalidRequest, match=rf"size 64x68 has a height of 68; .* makes multiples of {multiple}"
    ) as odd:
        wide.check(replace(asked("b"), height=68))
    assert odd.value.param == "size"
    most = {"zimage": 512, "sd3": 384}.get(case.family)
    if most is None:
        assert wide.check(replace(asked("b"), width=1024)).width == 1024
        return
    assert wide.check(replace(asked("b"), width=most)).width == most
    with pytest.raises(InvalidRequest, match=rf"has a width of {most + 16}; .* multiples of 16 up to {most}"):
        wide.check(replace(asked("b"), width=most + 16))


def test_the_largest_size_and_the_longest_text_have_places(tmp_path: Path) -> None:
    """One token more is refused when the checkpoint is loaded, not by an index error in a picture."""
    case, folder = CASES["zimage"], tiny_folders.zimage(tmp_path / "folder")
    spec = replace(spec_of(case, folder), max_side=512)
    engine = Engine.load(spec, device="cpu", dtype="float32")
    prompt = "a red star " * 7
    assert latents(engine, replace(asked(prompt), width=512, height=32)).isfinite().all()
    assert latents(engine, replace(asked(prompt), width=32, height=512)).isfinite().all()
    with pytest.raises(CheckpointError, match="is to read 128 tokens; its transformer has 126 places"):
        Engine.load(replace(spec, max_prompt_tokens=97))


@pytest.mark.parametrize("case", ["sd15-dpm"], indirect=True)
def test_sd15_makes_every_multiple_of_eight(case: Case, folder: Path, stock: Any) -> None:
    """Latents with sides that do not halve evenly."""
    engine = Engine.load(replace(spec_of(case, folder), size_multiple=8), device="cpu", dtype="float32")
    request = replace(asked("a red star"), width=72, height=56)
    assert relative(latents(engine, request), their_latents(stock, case, request)) <= 1e-4


def test_a_tokenizer_that_does_not_say_its_length(tmp_path: Path) -> None:
    folder = tiny_folders.sd15(tmp_path / "folder")
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": int(1e30)}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json must say model_max_length"):
        Engine.load(spec_of(CASES["sd15-dpm"], folder), device="cpu", dtype="float32")


CAPTIONS = (
    "A <b>red</b> star",
    "9 Stars (512x512) see http://a.com/b.png",
    "star.html",
    "a red star \u4e00, @me #123 and a_red-star_or-b",
    "  &quot;AN ARS&quot;  ",
)


@pytest.mark.filterwarnings("ignore:.*looks more like")  # of stock's own cleaning
@pytest.mark.parametrize("case", ["pixart-dpm"], indirect=True)
def test_captions_are_cleaned_as_stock_does_by_default(case: Case, engine: Engine, stock: PixArtAlphaPipeline) -> None:
    for caption in CAPTIONS:
        assert cleaned(caption) != caption
        request = asked(caption)
        theirs = their_latents(stock, case, request)
        assert relative(latents(engine, request), theirs) <= 1e-4
    with pytest.raises(PromptTooLong, match="it has 3000 characters, and this checkpoint reads at most 2048"):
        engine.check(asked("a " * 1500))


@pytest.mark.parametrize("case", ["pixart-dpm"], indirect=True)
def test_pixart_at_a_size_of_stocks_list_is_stock_by_default(case: Case, folder: Path, stock: Any) -> None:
    """Its list of sizes changes nothing there."""
    engine = Engine.load(replace(spec_of(case, folder), max_side=512), device="cpu", dtype="float32")
    default = replace(case, call={name: value for name, value in case.call.items() if "binning" not in name})
    request = replace(asked("a red star"), width=512, height=512)
    assert relative(latents(engine, request), their_latents(stock, default, request)) <= 1e-4


def test_a_caption_that_looks_like_a_file_warns_nobody() -> None:
    assert cleaned("another star.html") == "another star. html"
