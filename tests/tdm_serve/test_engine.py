"""The device engine: shapes, cached text, atomic steps, negative prompts, faults, versions within a memory budget."""

from __future__ import annotations

import gc
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tdm_serve import Pipeline
from tdm_serve.core import Request, Shape
from tdm_serve.engine import Engine, Sample
from tdm_serve.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequest,
    PictureFailed,
    PromptTooLong,
    UnknownModel,
)
from tdm_serve.files import sha256
from tdm_serve.models import load as loading
from tdm_serve.models.catalog import EMBEDDED, resolve
from tdm_serve.models.families.zimage import load_transformer
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser

VERSIONS = ("default", "default-tdm", "default-teacher")
LONG = "a star " * 18


def request(prompt: str = "a star", seed: int = 1, **others: object) -> Request:
    """Any number of steps: here they are short cuts to fewer evaluations."""
    usual = {"prompt": prompt, "seed": seed, "width": 64, "height": 64, "allow_untrained_schedule": "steps" in others}
    return Request(**(usual | others))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(VERSIONS)


def made(engine: Engine, *requests: Request) -> list[bytes]:
    return [image.image.tobytes() for image in engine.generate(requests)]


def cached(engine: Engine, asked: Request) -> bool:
    return engine.look(asked)[1]


# What a request is


def test_a_request_has_the_shape_of_its_forwards(engine: Engine) -> None:
    assert engine.check(request()) == Shape(64, 64, 32)
    assert engine.check(request(LONG, width=96)) == Shape(96, 64, 64)
    assert engine.check(request(guidance=2.0)) == Shape(64, 64, 32, guided=True)
    assert engine.check(request(guidance=2.0, negative_prompt=LONG)) == Shape(64, 64, 64, guided=True)
    assert engine.check(request(model="default-teacher")) == Shape(64, 64, 32, guided=True)
    assert engine.check(request(model="default-teacher", guidance=1.0)) == Shape(64, 64, 32)


def test_samples_have_the_shape_that_was_told(engine: Engine) -> None:
    asked = [request(), request(LONG), request(guidance=2.0, negative_prompt=LONG), request(model="default-teacher")]
    for one, sample in zip(asked, engine.start(asked), strict=True):
        assert sample.shape == engine.check(one)
        texts = [text for text in (sample.text, sample.away) if text is not None]  # each as long as it is alone
        assert max(text.shape[1] for text in texts) == sample.shape.text
        assert (sample.away is not None) == sample.shape.guided


def test_a_negative_prompt_without_guidance_is_refused(engine: Engine) -> None:
    for one in (request(negative_prompt="red"), request(negative_prompt="red", model="default-teacher", guidance=1.0)):
        with pytest.raises(InvalidRequest, match=r"'red', but .* so nothing would read it") as caught:
            engine.check(one)
        assert caught.value.param == "negative_prompt"
    with pytest.raises(PromptTooLong, match=r"the negative prompt is too long.* at most 64") as caught:
        engine.check(request(guidance=2.0, negative_prompt=LONG * 3))
    assert caught.value.param == "negative_prompt"


def test_an_unknown_model_lists_the_served(engine: Engine) -> None:
    with pytest.raises(UnknownModel, match="'other' is not served here; served are default, default-tdm"):
        engine.check(request(model="other"))


def test_checks_run_in_any_thread_while_the_owner_starts(engine: Engine) -> None:
    stop, wrong = threading.Event(), []

    def check() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            one = request(f"a star {count % 30}", model=VERSIONS[count % 3])
            if engine.check(one).text != 32 or cached(engine, request("never made", model=VERSIONS[count % 3])):
                wrong.append(one)

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    expected = engine.start([request("two red circles")])[0].text
    for index in range(30):
        engine.cache.clear()
        assert torch.equal(engine.start([request("two red circles"), request(f"a {index}")])[0].text, expected)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


# Text


def test_cached_text_makes_the_same_pictures_and_is_counted(engine: Engine) -> None:
    one, other = request("a green cross"), request("a green cross", 2, guidance=2.0, steps=2)
    engine.cache.clear()
    assert not cached(engine, one)
    first = made(engine, one)
    assert cached(engine, one) and not cached(engine, other)  # the empty negative prompt is not there yet
    hits, misses = engine.cache.hits, engine.cache.misses
    assert made(engine, one) == first
    assert (engine.cache.hits, engine.cache.misses) == (hits + 1, misses)
    guided = made(engine, other)
    assert cached(engine, other)
    assert made(Engine.load("default", cache_mb=0), one, other) == [*first, *guided]


def test_equal_prompts_of_one_start_are_encoded_once() -> None:
    engine = Engine.load(VERSIONS, cache_mb=0)
    rows: list[int] = []
    hook = engine.model.text_encoder.register_forward_hook(lambda *_: rows.append(1))
    engine.start([request(seed=seed, model=model) for seed in range(3) for model in VERSIONS[:2]])
    hook.remove()
    assert len(rows) == 1
    assert (engine.cache.misses, engine.cache.bytes) == (2, 0)


def test_versions_refine_their_own_text_of_shared_features(engine: Engine) -> None:
    engine.cache.clear()
    encoded: list[int] = []
    hook = engine.model.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    for version in VERSIONS:
        assert not cached(engine, request("a cyan ring", model=version, guidance=1.0))
        engine.start([request("a cyan ring", model=version, guidance=1.0)])
    hook.remove()
    assert len(encoded) == 1
    texts = [engine.start([request("a cyan ring", model=v, guidance=1.0)])[0].text for v in VERSIONS]
    assert not torch.equal(texts[0], texts[1]) and not torch.equal(texts[1], texts[2])


# Guidance


def test_a_negative_prompt_changes_the_picture_and_is_in_the_recipe(engine: Engine) -> None:
    [plain, negative] = engine.generate([request(guidance=3.0), request(guidance=3.0, negative_prompt="a blue square")])
    assert plain.image.tobytes() != negative.image.tobytes()
    assert "negative_prompt" not in plain.recipe()
    assert negative.recipe()["negative_prompt"] == "a blue square"
    assert (plain.nfe, negative.nfe) == (8, 8)


def test_the_prompt_as_its_own_negative_is_no_guidance(engine: Engine) -> None:
    """away + w * (towards - away) is the plain prediction where both are the same."""
    [one] = engine.generate([request(guidance=5.0, negative_prompt="a star")])
    [plain] = engine.generate([request(guidance=1.0)])
    assert np.abs(np.asarray(one.image).astype(int) - np.asarray(plain.image)).max() <= 1


# Steps


def breaking(denoise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: object) -> Tensor:
        denoise(*inputs)
        raise RuntimeError("the device is on fire")

    return run


def test_a_failed_step_changes_no_sample() -> None:
    engine = Engine.load("default")
    samples = engine.start([request(seed=1), request(seed=2, steps=3)])
    engine.step(samples)
    before = [(s.index, s.nfe, s.latents.clone(), s.clean.clone()) for s in samples]
    works, engine.denoise.denoise = engine.denoise.denoise, breaking(engine.denoise.denoise)
    with pytest.raises(RuntimeError, match="on fire"):
        engine.step(samples)
    engine.denoise.denoise = works
    for sample, (index, nfe, latents, clean) in zip(samples, before, strict=True):
        assert (sample.index, sample.nfe) == (index, nfe)
        assert torch.equal(sample.latents, latents) and torch.equal(sample.clean, clean)
    while not all(sample.done for sample in samples):
        engine.step([sample for sample in samples if not sample.done])
    finished = [image.image.tobytes() for image in engine.finish(samples)]
    assert finished == made(engine, request(seed=1), request(seed=2, steps=3))


def test_a_step_takes_one_shape_only(engine: Engine) -> None:
    with pytest.raises(AssertionError, match="share their shape"):
        engine.step(engine.start([request(), request(width=80)]))


def poisoned(sample: Sample) -> Sample:
    sample.latents = torch.full_like(sample.latents, torch.nan)
    return sample


def test_a_poisoned_picture_is_found_and_leaves_the_others_alone(engine: Engine) -> None:
    asked = [request(seed=1), request(seed=2, model="default-tdm"), request(seed=3)]
    samples = engine.start(asked)
    poisoned(samples[1])
    while not samples[0].done:
        engine.step(samples)
    assert engine.faulty(samples) == [1]
    with pytest.raises(PictureFailed, match=r"pictures \[1\] of a batch of 3"):
        engine.finish(samples)
    images = engine.finish([samples[0], samples[2]])
    assert [image.image.tobytes() for image in images] == made(engine, asked[0], asked[2])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("cuDNN error: out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_full_memory_are_known(error: Exception, expected: bool) -> None:
    assert Engine.out_of_memory(error) == expected


def test_torch_says_in_words_that_are_known_that_memory_is_full() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56)
    assert Engine.out_of_memory(caught.value)
    Engine.load("default").empty_cache()


# Versions


def test_a_mixed_batch_equals_the_plain_algorithm(engine: Engine) -> None:
    """Against the fewest lines that make a picture of one version: adapter in the weights, one picture at a time."""
    model = engine.model
    asked = [request(seed=seed, model=VERSIONS[seed % 3], guidance=1.0, steps=3) for seed in range(6)]
    for one, got in zip(asked, made(engine, *asked), strict=True):
        spec = resolve(one.model)
        denoiser = ZImageDenoiser(load_transformer(spec)).pack()
        with torch.inference_mode():
            tokens = model.tokens(one.prompt)
            padded = torch.nn.functional.pad(model.encode([tokens])[0], (0, 0, 0, 32 - len(tokens))).unsqueeze(0)
            text = denoiser.refine_text(padded, torch.tensor([len(tokens)]))
            latents = model.noise(one.seed, 64, 64)
            for row in spec.rows(3):
                velocity = denoiser(latents, denoiser.modulation(torch.tensor([row.sigma])), text)
                clean = latents - torch.tensor(row.sigma) * velocity
                latents = torch.tensor(row.a) * latents + torch.tensor(row.b) * clean
            assert model.decode([latents]).numpy().tobytes() == got


def test_the_base_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()

    def counted(path: Path) -> str:
        read[path.name if path.parent.name == "adapters" else f"{path.parent.name}/{path.name}"] += 1
        return sha256(path)

    monkeypatch.setattr(loading, "sha256", counted)
    loaded = loading.load(VERSIONS)
    assert {"tdm.safetensors", "tdm-r1.safetensors", "vae/config.json"} <= read.keys()
    assert set(read.values()) == {1}
    one = {served.spec.id: served.checkpoint_hash for served in loaded.served}
    assert one == {name: Engine.load(name).info.checkpoint_hash for name in VERSIONS}


def test_versions_go_when_the_budget_is_full_and_come_back_the_same() -> None:
    unbounded = Engine.load(VERSIONS)
    each = unbounded.versions.stats().bytes / 2  # the teacher has nothing of its own
    engine = Engine.load(VERSIONS, memory_mb=1.5 * each / 2**20)
    stats = engine.versions.stats()
    assert (stats.loads, stats.unloads, stats.bytes) == (3, 1, each)
    assert set(stats.loaded) == {"default", "default-teacher"}
    asked = [request(seed=1, model="default-tdm"), request(seed=1), request(seed=1, model="default-tdm")]
    expected = made(unbounded, *asked)
    assert [made(engine, one)[0] for one in asked] == expected
    assert (engine.versions.stats().loads, engine.versions.stats().unloads) == (6, 4)


def test_a_version_in_use_is_never_unloaded() -> None:
    unbounded = Engine.load(VERSIONS)
    each = unbounded.versions.stats().bytes / 2
    engine = Engine.load(VERSIONS, memory_mb=1.5 * each / 2**20)
    samples = engine.start([request(seed=1)])
    samples += engine.start([request(seed=1, model="default-tdm")])
    assert engine.versions.stats().bytes == 2 * each  # over the budget, because both are needed
    while not samples[0].done:
        engine.step(samples)
    images = [image.image.tobytes() for image in engine.finish(samples)]
    assert images == made(unbounded, request(seed=1), request(seed=1, model="default-tdm"))
    assert engine.versions.stats().bytes == each
    engine.start([request(seed=1, model="default-tdm")])  # called off at once: nothing holds it
    gc.collect()
    engine.start([request(seed=1)])
    assert engine.versions.stats().bytes == each


def test_budgets_and_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"memory_mb is 0\.5, but default.* alone needs"):
        Engine.load(VERSIONS, memory_mb=0.5)
    with pytest.raises(ConfigError, match="must be a positive number"):
        Engine.load(VERSIONS, memory_mb=0)
    with pytest.raises(ConfigError, match="'melted'; it must be fused or separate"):
        Engine.load(VERSIONS, adapters="melted")
    with pytest.raises(ConfigError, match="name at least one"):
        Engine.load([])


def test_versions_of_two_bases_are_refused(tmp_path: Path) -> None:
    other = shutil.copytree(EMBEDDED, tmp_path / "other")
    with pytest.raises(ConfigError, match="versions of one base"):
        Engine.load(["default", other])


def test_an_adapter_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "broken"))
    (folder / "adapters" / "tdm.safetensors").write_bytes((folder / "adapters" / "tdm.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="its header promises"):
        Engine.load([f"{folder}@teacher", f"{folder}@tdm"])


def test_a_pipeline_of_several_versions() -> None:
    pipeline = Pipeline.from_pretrained(VERSIONS)
    [default] = pipeline("a star", seed=1, size="64x64")
    [other] = pipeline("a star", seed=1, size="64x64", model="default-tdm")
    assert (default.model, other.model) == ("default", "default-tdm")
    assert default.image.tobytes() != other.image.tobytes()


def test_requests_of_all_kinds_share_a_generate(engine: Engine) -> None:
    asked = [request(), request(width=96), request(steps=2), request(guidance=2.0), request(LONG, model="default-tdm")]
    assert made(engine, *asked) == [made(engine, one)[0] for one in asked]
