"""The OCR reward: the formula by hand, and Tesseract on true and wrong pictures."""

from __future__ import annotations

import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from tdm_finetune import scenes
from tdm_finetune.rewards import load_reward
from tdm_finetune.rewards.ocr import reward_from, similarity
from tdm_finetune.rewards.readers import _paddle_text, pages_of, prepare
from tdm_finetune.scenes import Spec
from tdm_serve.errors import ConfigError, RewardError

needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="Tesseract is not installed")


@pytest.mark.parametrize(
    ("recognised", "wanted", "score"),
    [
        ("HELLO", "hello", 1.0),
        ("h e l\nl o", "Hel lo", 1.0),  # spaces and capitals do not count
        ("say HELLO twice", "hello", 1.0),  # text around it costs nothing
        ("hallo", "hello", 0.8),  # one replacement of five letters
        ("helo", "hello", 0.8),  # one deletion
        ("hheelo", "hello", 0.6),  # HEELO needs a deletion and a replacement
        ("", "hello", 0.0),
        ("completely different", "cat", 0.0),  # the distance is capped at the length
        ("ab", "ba", 0.0),
        ("X|", "XI", 0.5),
    ],
)
def test_similarity_by_hand(recognised: str, wanted: str, score: float) -> None:
    assert similarity(recognised, wanted) == pytest.approx(score)


def test_folded_bars() -> None:
    assert similarity("X|", "XI", fold_bars=True) == similarity("a1", "Al", fold_bars=True) == 1.0
    assert similarity("X/", "XI", fold_bars=True) == 0.5


def test_the_wanted_text_comes_from_quotes_or_from_the_scene() -> None:
    seen: list[int] = []

    def reader(pictures: np.ndarray[Any, Any]) -> list[str]:
        seen.append(len(pictures))
        return ["STOP", "AB", "AB", "AB"]

    spec = Spec("text", word="AB", colour="red")
    reward = reward_from(reader)
    prompts = ['a sign with "stop" and "go"', "red letters AB", "red letters AB", 'the word "AD" in red']
    metadata: list[dict[str, Any]] = [{}, {"spec": spec}, {"spec": asdict(spec)}, {"spec": spec}]
    scores = reward(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), prompts, metadata)
    assert scores.tolist() == [1.0, 1.0, 1.0, 0.5] and seen == [4]


@pytest.mark.parametrize(
    ("prompt", "metadata"), [("a red circle", {}), ('an empty "" quote', {}), ('a lone " quote', {})]
)
@needs_tesseract
def test_a_prompt_without_text(prompt: str, metadata: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=r"'ocr' cannot judge sample 0 .*asks for no text"):
        load_reward("ocr")(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [prompt], [metadata])


@needs_tesseract
def test_tesseract_reads_the_scenes(scenes_of) -> None:
    batch = scenes_of(24, "text")
    reward = load_reward("ocr(processes=2,fold_bars=true)")
    right = reward(*batch)
    assert (right == 1).float().mean() >= 0.95
    exact = load_reward("ocr(processes=1)")(*batch)
    assert (exact == 1).float().mean() >= 0.85  # 0.97 over 300; a lone I is a bar to it
    unlike = [data["spec"].word for data, same in zip(batch.metadata, exact == right, strict=True) if not same]
    assert all("I" in word for word in unlike)
    others = batch.metadata[1:] + batch.metadata[:1]
    wrong = reward(batch.images, ["letters"] * 24, others)
    assert wrong.mean() < 0.3 < right.mean()
    assert torch.equal(reward(batch.images[3:5], batch.prompts[3:5], batch.metadata[3:5]), right[3:5])


@needs_tesseract
def test_blank_pictures_read_as_nothing() -> None:
    spec = Spec("text", word="OO", colour="red")
    blank = np.full((1, 128, 128, 3), scenes.BACKGROUND, dtype=np.uint8)
    pictures = np.concatenate([blank, scenes.render(spec, random.Random(0))[None], blank])
    scores = load_reward("ocr")(torch.from_numpy(pictures), ["x"] * 3, [{"spec": spec}] * 3)
    assert scores.tolist() == [0.0, 1.0, 0.0]


@needs_tesseract
def test_a_page_is_read_as_a_whole() -> None:
    image = Image.new("RGB", (384, 384), (230, 220, 200))
    font = ImageFont.load_default(size=40)
    draw = ImageDraw.Draw(image)
    draw.text((30, 60), "OPEN DAILY", font=font, fill=(40, 20, 90))
    draw.text((90, 250), "coffee", font=font, fill=(140, 20, 30))
    pictures = torch.from_numpy(np.array(image)[None])
    reward = load_reward("ocr(layout=page)")
    assert reward(pictures, ['a shop that says "open daily"'], [{}]).item() == 1.0
    assert reward(pictures, ['a shop that says "coffee"'], [{}]).item() == 1.0


def test_a_line_is_cut_out_and_made_dark_on_white() -> None:
    picture = scenes.render(Spec("text", word="L", colour="yellow"), random.Random(0))
    image = prepare(picture, "line")
    assert image is not None and image.mode == "L"
    values = np.asarray(image)
    assert values[0, 0] == 255 and values.min() < 10
    assert 100 < image.height < 250  # a letter of 36 pixels, 3 times as high, with its margins
    assert prepare(np.full((128, 128, 3), 7, dtype=np.uint8), "line") is None


@needs_tesseract
def test_missing_readers_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no language 'tlh'; installed: .*eng"):
        load_reward("ocr(language=eng+tlh)")
    with pytest.raises(ConfigError, match="processes is 0"):
        load_reward("ocr(processes=0)")
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    with pytest.raises(ConfigError, match="pip install paddleocr"):
        load_reward("ocr(reader=paddle)")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get install tesseract-ocr"):
        load_reward("ocr")


@needs_tesseract
def test_a_reader_that_breaks_is_an_error_and_no_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scenes_of
) -> None:
    broken = tmp_path / "tesseract"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --list-langs ] && printf "List\\neng\\n" && exit 0\necho no luck >&2; exit 3\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(RewardError, match=r"tesseract ended with 3 .*no luck"):
        load_reward("ocr")(*scenes_of(2, "text"))


def test_both_generations_of_paddleocr_are_understood() -> None:
    def ocr(picture: Any, cls: bool) -> list[Any]:
        return [[[[[0, 0]], ("he", 0.9)], [[[1, 1]], ("llo", 0.8)]]]

    def nothing(picture: Any, cls: bool) -> list[Any]:
        return [None]

    def predict(picture: Any) -> list[Any]:
        return [{"rec_texts": ["he", "llo"]}]

    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    assert _paddle_text(SimpleNamespace(ocr=ocr), picture) == "hello"
    assert _paddle_text(SimpleNamespace(predict=predict), picture) == "hello"
    assert _paddle_text(SimpleNamespace(ocr=nothing), picture) == ""


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("AB\n\fCD\n", ["AB\n", "CD\n"]),
        ("AB\n\f", ["AB\n", ""]),
        ("AB\n\fCD\n\f", ["AB\n", "CD\n"]),
        ("\f\f", ["", ""]),
    ],
)
def test_pages_of_either_version_of_tesseract(text: str, pages: list[str]) -> None:
    assert pages_of(text, 2) == pages
