"""The engine behind asyncio on the real checkpoint: shared evaluations, the same pixels, an orderly end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tdm_serve import AsyncEngine, GeneratedImage, Pipeline, Request
from tdm_serve.core import Shape, Terms
from tdm_serve.errors import ConfigError, EngineClosed, InvalidRequest, UnknownModel
from tdm_serve.profile import Profile
from tdm_serve.scheduler import Policy

SIDE = 128


def star(seed: int, prompt: str = "a red star", side: int = SIDE, steps: int | None = None) -> Request:
    return Request(prompt, seed, side, side, steps, allow_untrained_schedule=steps is not None)


def same(image: GeneratedImage, request: Request, pipeline: Pipeline) -> bool:
    [alone] = pipeline.generate([request])
    return np.array_equal(np.asarray(image.image), np.asarray(alone.image)) and image.recipe() == alone.recipe()


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured once, by whichever test comes first."""
    return tmp_path_factory.mktemp("profile")


def roomy(engine: AsyncEngine) -> AsyncEngine:
    """An engine that finds batches of four cheap, whatever this machine measured: its steps mix then."""
    best = engine.capabilities()[0].best_batch
    assert best >= 1
    engine._desk.profile.best_batch = lambda _: 4  # pyright: ignore[reportAttributeAccessIssue]
    return engine


def test_a_request_is_looked_at_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs in the event loop of the caller, whom it holds up."""
    checked: list[Request] = []
    check = pipeline.engine.check

    def counting(request: Request) -> Shape:
        checked.append(request)
        return check(request)

    monkeypatch.setattr(pipeline.engine, "check", counting)
    engine = AsyncEngine(pipeline)
    checked.clear()  # its own, of the shapes that are to be warm
    engine.check(star(1))
    assert checked == [star(1)]


def test_pictures_share_evaluations_and_are_the_same_as_alone(pipeline: Pipeline, profile: Path) -> None:
    """Different prompts, text lengths, sizes and steps, arriving while others run, and one that leaves."""
    long = "a red star left of a blue ring above a small green cross and a white square beside a big yellow circle"
    requests = [
        *(star(seed) for seed in range(4)),
        *(star(seed, long) for seed in range(2)),
        star(5, steps=2),
        star(6, side=64),
        star(0, "a blue ring"),
    ]

    async def main() -> tuple[list[GeneratedImage], dict[int, int]]:
        engine = AsyncEngine(pipeline, policy=Policy(slack=10.0), profile=profile)
        await engine.start()
        roomy(engine)
        tickets = [engine.submit([request], previews=index == 0) for index, request in enumerate(requests[:4])]
        dropped = engine.submit([star(99), star(98)])
        async for _ in tickets[0].progress():
            break
        dropped.cancel()
        tickets += [engine.submit([request]) for request in requests[4:]]
        images = [(await ticket.result())[0] for ticket in tickets]
        await engine.close()
        return images, dict(engine.stats().batch_fill)

    images, fill = asyncio.run(main())
    for image, request in zip(images, requests, strict=True):
        assert same(image, request, pipeline)
    assert max(fill) > 1


def test_previews_show_the_picture_that_comes(pipeline: Pipeline, profile: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(pipeline, profile=profile)
        await engine.start()
        ticket = engine.submit([star(3)], previews=True)
        previews = [event.preview async for event in ticket.progress()]
        [image] = await ticket.result()
        await engine.close()
        assert [preview is not None for preview in previews] == [True, True, True, False]
        assert previews[2] is not None
        shown, made = np.asarray(previews[2], np.float32), np.asarray(image.image, np.float32)
        assert np.corrcoef(shown.ravel(), made.ravel())[0, 1] > 0.5

    asyncio.run(main())


def test_a_bad_request_queues_nothing(pipeline: Pipeline, profile: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(pipeline, profile=profile)
        await engine.start()
        for bad in (star(1, ""), star(1, side=100), star(1, "star " * 100)):
            with pytest.raises(InvalidRequest):
                await engine.generate([star(1), bad])
        with pytest.raises(UnknownModel, match="'nonsense' is not served"):
            await engine.generate([Request("a star", 1, SIDE, SIDE, model="nonsense")])
        await engine.close()
        stats = engine.stats()
        assert (stats.accepted, stats.steps, dict(stats.refused)) == (0, 0, {"invalid": 4})

    asyncio.run(main())


def test_closing_finishes_the_queue_and_refuses_the_rest(pipeline: Pipeline, profile: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(pipeline, max_batch=1, profile=profile)
        await engine.start()
        assert engine.ready
        waiting = [asyncio.ensure_future(engine.generate([star(seed)])) for seed in range(3)]
        await asyncio.sleep(0)
        await engine.close()
        assert not engine.ready
        assert [len(images) for images in await asyncio.gather(*waiting)] == [1, 1, 1]
        with pytest.raises(EngineClosed):
            await engine.generate([star(1)])

    asyncio.run(main())


def test_versions_of_one_base_are_chosen_by_name(profile: Path) -> None:
    pipeline = Pipeline.from_pretrained(["default", "default-tdm"])
    first, second = pipeline.engine.infos

    async def main() -> Sequence[GeneratedImage]:
        engine = AsyncEngine(pipeline, profile=profile, max_batch=2)
        assert list(engine.infos) == [first, second]
        await engine.start()
        assert set(engine.capabilities()[0].alone_ms) == {first, second}
        requests = [Request("a red star", 1, SIDE, SIDE, model=name) for name in (first, second, "")]
        images = await engine.generate(requests, Terms(tenant="somebody"))
        await engine.close()
        return images

    images = asyncio.run(main())
    assert [image.model for image in images] == [first, second, first]
    assert np.array_equal(np.asarray(images[0].image), np.asarray(images[2].image))
    assert not np.array_equal(np.asarray(images[0].image), np.asarray(images[1].image))
    for image in images:
        assert same(image, Request("a red star", 1, SIDE, SIDE, model=image.model), pipeline)


def test_the_profile_is_kept_and_used_again(pipeline: Pipeline, tmp_path: Path) -> None:
    async def main() -> tuple[Profile, float]:
        engine = AsyncEngine(pipeline, profile=tmp_path, max_batch=2)
        began = asyncio.get_running_loop().time()
        await engine.start()
        took_s = asyncio.get_running_loop().time() - began
        await engine.close()
        return Profile.load(next(tmp_path.iterdir()), engine._identity), took_s

    profile, _ = asyncio.run(main())
    [shape] = profile.shapes()
    assert profile.batches(shape) == (1, 2)
    again, took_s = asyncio.run(main())
    assert again.shapes() == (shape,)
    assert took_s < 10


def test_a_batch_holds_at_least_one_picture(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="max_batch is 0"):
        AsyncEngine(pipeline, max_batch=0)


@pytest.mark.slow
def test_a_program_may_end_without_closing(environment: dict[str, str], tmp_path: Path) -> None:
    """In the middle of a picture: no crash in C++, no hang."""
    program = """
import asyncio
from pathlib import Path
from tdm_serve import AsyncEngine, Pipeline, Request

async def main():
    engine = AsyncEngine(Pipeline.from_pretrained("default"), profile=Path("."))
    await engine.start()
    for seed in range(4):
        engine.submit([Request("a star", seed, 128, 128)])
    await asyncio.sleep(0.03)

asyncio.run(main())
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
