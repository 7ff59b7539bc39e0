"""The outside check: stock diffusers makes the same picture from a converted folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from tdm_serve import Pipeline
from tdm_serve.convert import convert, convert_adapter
from tdm_serve.errors import CheckpointError, OutputError
from tdm_serve.models.catalog import EMBEDDED
from tdm_serve.models.lora import read_lora

PROMPTS = ("two red circles", "a blue ring left of a yellow star", 'the word "HI" in green')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("default", tmp_path_factory.mktemp("converted") / "plain")


@pytest.fixture(scope="module")
def stock(folder: Path) -> ZImagePipeline:
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_stock_diffusers_makes_the_same_picture(
    pipeline: Pipeline, stock: ZImagePipeline, prompt: str, size: tuple[int, int]
) -> None:
    width, height = size
    theirs = stock(
        prompt,
        num_inference_steps=4,
        guidance_scale=0.0,
        width=width,
        height=height,
        generator=torch.Generator("cpu").manual_seed(21),
    ).images[0]
    ours = pipeline(prompt, seed=21, size=size)[0].image
    difference = np.abs(np.asarray(theirs).astype(int) - np.asarray(ours).astype(int))
    assert difference.max() <= 2
    assert np.asarray(ours).std() > 1  # not two blank pictures


def test_guidance_means_the_same_in_both(pipeline: Pipeline, stock: ZImagePipeline) -> None:
    """Stock counts from 0 (off); ours is the weight of the conditional prediction, 1 is off."""
    random = torch.Generator("cpu").manual_seed(5)
    theirs = stock("a red star", num_inference_steps=6, guidance_scale=2.0, width=128, height=128, generator=random)
    ours = pipeline("a red star", seed=5, steps=6, guidance=3.0, allow_untrained_schedule=True)[0].image
    assert np.abs(np.asarray(theirs.images[0]).astype(int) - np.asarray(ours).astype(int)).max() <= 2


def test_the_converted_folder_is_a_checkpoint_of_ours(folder: Path, pipeline: Pipeline) -> None:
    again = Pipeline.from_pretrained(folder)
    assert again.info.sigmas == pipeline.info.sigmas
    before, after = (p("two red circles", seed=4)[0].image for p in (pipeline, again))
    assert np.abs(np.asarray(before).astype(int) - np.asarray(after).astype(int)).max() <= 1


def test_the_converted_folder_does_not_tell_where_it_was_made(folder: Path, tmp_path: Path) -> None:
    again = convert(folder, tmp_path / "again")  # from an absolute path
    for path in (*folder.rglob("*.json"), *again.rglob("*.json")):
        text = path.read_text()
        assert str(folder.parent) not in text and str(EMBEDDED) not in text, path
    tokenizers = [(parent / "tokenizer" / "tokenizer.json").read_bytes() for parent in (folder, again)]
    assert tokenizers[0] == tokenizers[1]


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not an empty folder"):
        convert("default", folder)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="not an empty folder"):
        convert("default", tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write"):
        convert("default", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        convert(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fold", [False, True], ids=["metadata", "folded"])
def test_a_converted_adapter_on_a_stock_pipeline(tmp_path: Path, fold: bool) -> None:
    """`load_lora_weights` on the plain base makes the pictures of the version that has the adapter."""
    adapter = EMBEDDED / "adapters" / "tdm.safetensors"
    assert {delta.scale for delta in read_lora(adapter).modules.values()} != {1.0}
    pipe = ZImagePipeline.from_pretrained(convert("default-teacher", tmp_path / "base"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(convert_adapter(adapter, "default", tmp_path / "a.safetensors", fold_alpha=fold)))
    random = torch.Generator("cpu").manual_seed(3)
    theirs = pipe("two red circles", num_inference_steps=4, guidance_scale=0.0, width=128, height=128, generator=random)
    ours = Pipeline.from_pretrained("default-tdm")("two red circles", seed=3)[0].image
    assert np.abs(np.asarray(theirs.images[0]).astype(int) - np.asarray(ours).astype(int)).max() <= (8 if fold else 2)
    assert np.asarray(ours).std() > 1
