"""Published architectures without a download: their sizes, and that they run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, T5EncoderModel

from tdm_serve import Pipeline
from tdm_serve.errors import ConfigError, UnknownModel
from tdm_serve.models.architectures import Part, architecture_of, architectures, parts
from tdm_serve.models.byte_tokenizer import CLIP_END, CLIP_START, write_tokenizer
from tdm_serve.models.entries import catalogue
from tdm_serve.models.load import load
from tdm_serve.models.outline import outline
from tdm_serve.models.random_weights import build, random_specs

CPU = torch.device("cpu")
PUBLISHED = [name for name, entry in catalogue().items() if entry.base is not None]


def counted(part: Part, folder: Path, *, tiny: bool) -> int:
    """Of the class itself; SD3's table of positions is no parameter, but takes seconds to compute."""
    if "pos_embed_max_size" in part.config:
        part = replace(part, config={**part.config, "pos_embed_max_size": 8})
    part.write(folder, tiny=tiny)
    return sum(parameter.numel() for parameter in outline(part.kind, folder).parameters())


@pytest.mark.parametrize("name", parts())
def test_parameters_are_those_that_are_published(name: str, tmp_path: Path) -> None:
    part = parts()[name]
    found = counted(part, tmp_path / "full", tiny=False)
    assert found == part.parameters
    assert counted(part, tmp_path / "tiny", tiny=True) < 5_000_000
    if part.published:
        said = float(part.published[:-1]) * {"B": 1e9, "M": 1e6}[part.published[-1]]
        table = part.config["pos_embed_max_size"] ** 2 * 1536 if "pos_embed_max_size" in part.config else 0
        assert (found + table) / said == pytest.approx(1, abs=0.05)  # authors round, and count SD3's table of positions


def test_every_published_model_has_its_shapes() -> None:
    for name in PUBLISHED:
        entry = catalogue()[name]
        assert entry.base is not None
        assert architecture_of(entry.base.repo).family == entry.fields["family"], name
    with pytest.raises(ConfigError, match="the architecture of somebody/else is not known here"):
        architecture_of("somebody/else")
    assert {part for one in architectures().values() for part in one.parts.values()} == set(parts())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_without_a_download_makes_noise(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tdm_serve"):
        pipeline = Pipeline.from_pretrained(f"{name}:tiny", random_weights=True)
    assert f"{name} has random weights: its pictures are noise" in caplog.text
    assert "random weights" in pipeline.info.description and pipeline.info.id == name
    [image] = pipeline("a red circle", seed=1)
    assert image.nfe == pipeline.info.nfe and np.asarray(image.image).std() > 5


def test_equal_shapes_have_equal_weights() -> None:
    made = [Pipeline.from_pretrained("sd3-medium-tdm:tiny:no-t5", random_weights=True) for _ in range(2)]
    assert made[0].info.checkpoint_hash == made[1].info.checkpoint_hash
    one, other = (pipeline("a red circle", seed=1)[0].image.tobytes() for pipeline in made)
    assert one == other


def test_several_versions_share_a_random_base() -> None:
    loaded = load(["zimage-tdm-r1:tiny", "zimage-turbo:tiny"], random_weights=True)
    assert [one.spec.id for one in loaded.served] == ["zimage-tdm-r1", "zimage-turbo"]


def test_the_embedded_checkpoint_can_be_random_too(pipeline: Pipeline) -> None:
    random = Pipeline.from_pretrained("default", random_weights=True)
    assert random("a red star", seed=1)[0].image.tobytes() != pipeline("a red star", seed=1)[0].image.tobytes()


def test_weights_are_drawn_in_their_type(tmp_path: Path) -> None:
    parts()["sd15-vae"].write(tmp_path / "vae", tiny=True)
    vae = build(AutoencoderKL, tmp_path / "vae", CPU, torch.bfloat16)
    assert {one.dtype for one in vae.parameters()} == {torch.bfloat16} and not vae.training
    assert not any(one.is_meta for one in (*vae.parameters(), *vae.buffers()))
    norm = vae.get_parameter("decoder.conv_norm_out.weight")
    assert bool((norm == 1).all()) and not bool(vae.get_parameter("decoder.conv_out.bias").any())


def test_parameters_that_are_one_stay_one(tmp_path: Path) -> None:
    parts()["t5-xxl"].write(tmp_path / "t5", tiny=True)
    t5 = build(T5EncoderModel, tmp_path / "t5", CPU, torch.float32)
    assert t5.shared.weight is t5.encoder.embed_tokens.weight


WRONG = {
    "no such variant": (
        "zimage-turbo:small",
        ConfigError,
        "has the variant 'small'; random weights come in tiny, no-t5",
    ),
    "nothing to leave out": ("zimage-turbo:no-t5", ConfigError, "zimage-turbo has no text_encoder_3"),
    "no such model": ("nobody", UnknownModel, "model 'nobody' cannot have random weights"),
    "variants of the embedded": ("default:tiny", UnknownModel, "'default:tiny'"),
}


@pytest.mark.parametrize(("name", "error", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_refused(name: str, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence), random_specs([name]):
        pass


def test_byte_tokenizers_read_any_text(tmp_path: Path) -> None:
    for kind in ("qwen", "clip", "clip-g", "t5"):
        write_tokenizer(kind, tmp_path / kind)
    loaded = {folder.name: AutoTokenizer.from_pretrained(folder) for folder in tmp_path.iterdir()}
    clip = loaded["clip"]("ab")["input_ids"]
    assert (clip[0], clip[-1], len(clip), loaded["clip"].model_max_length) == (CLIP_START, CLIP_END, 4, 77)
    assert loaded["clip-g"].pad_token_id != loaded["clip"].pad_token_id == CLIP_END
    assert loaded["t5"]("ab")["input_ids"][-1] == loaded["t5"].eos_token_id == 1
    chat = loaded["qwen"].apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>user\nab<|im_end|>\n"
    text = "ein Kreis, ein 圆"
    for name, one in loaded.items():
        assert one.decode(one(text)["input_ids"], skip_special_tokens=True) == text, name


@pytest.mark.gpu
def test_a_full_size_on_a_gpu_takes_what_was_said() -> None:
    from tdm_serve.models.memory import Wish, need
    from tdm_serve.models.sizes import sizes_of

    with random_specs(["dreamshaper7-tdm"]) as [spec]:
        sizes = sizes_of(spec.base, spec.family, random=True)
    cuda = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pipeline = Pipeline.from_pretrained("dreamshaper7-tdm", device="cuda", random_weights=True)
    held = torch.cuda.memory_allocated() - before
    expected = need(sizes, Wish(cuda, torch.bfloat16, random=True, pixels=512 * 512))
    weights = sum(size for part, size in expected.parts if part != "work")
    assert held == pytest.approx(weights, rel=0.1)
    pipeline("a red circle", size="512x512")
    assert torch.cuda.max_memory_allocated() - before <= expected.device * 1.3
