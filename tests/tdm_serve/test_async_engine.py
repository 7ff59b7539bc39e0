"""The device thread: shared batches, errors that reach their caller only, an orderly end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from tdm_serve import AsyncEngine, GeneratedImage, Pipeline, Request
from tdm_serve.core import StepCallback
from tdm_serve.errors import ConfigError, EngineClosed, InvalidRequest


class Watched(Pipeline):
    """A real pipeline that notes the size of every batch, and fails on one prompt."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline.engine)
        self.batches: list[int] = []

    def generate(self, requests: Sequence[Request], callback: StepCallback | None = None) -> list[GeneratedImage]:
        self.batches.append(len(requests))
        if any(request.prompt == "a failure" for request in requests):
            raise RuntimeError("the device is on fire")
        return super().generate(requests, callback)


def test_concurrent_callers_share_batches_and_get_their_own_pictures(pipeline: Pipeline) -> None:
    watched = Watched(pipeline)

    async def main() -> list[list[GeneratedImage]]:
        engine = AsyncEngine(watched, max_batch=4)
        await engine.start()
        assert engine.ready
        calls = [engine.generate([Request("a red star", seed, 128, 128)]) for seed in range(6)]
        answers = await asyncio.gather(*calls)
        await engine.close()
        assert not engine.ready
        return answers

    answers = asyncio.run(main())
    assert max(watched.batches) > 1 and max(watched.batches) <= 4
    for seed, [image] in enumerate(answers):
        assert image.seed == seed
        assert np.array_equal(np.asarray(image.image), np.asarray(pipeline("a red star", seed=seed)[0].image))


def test_a_failing_batch_fails_its_callers_and_the_next_one_works(pipeline: Pipeline) -> None:
    async def main() -> None:
        engine = AsyncEngine(Watched(pipeline))
        await engine.start()
        with pytest.raises(RuntimeError, match="on fire"):
            await engine.generate([Request("a failure", 1, 128, 128)])
        assert len(await engine.generate([Request("a star", 1, 128, 128)])) == 1
        await engine.close()

    asyncio.run(main())


def test_a_bad_request_queues_nothing(pipeline: Pipeline) -> None:
    async def main() -> None:
        watched = Watched(pipeline)
        engine = AsyncEngine(watched)
        await engine.start()
        with pytest.raises(InvalidRequest):
            await engine.generate([Request("a star", 1, 128, 128), Request("", 1, 128, 128)])
        await engine.close()
        assert watched.batches == [1]

    asyncio.run(main())


def test_closing_finishes_the_queue_and_refuses_the_rest(pipeline: Pipeline) -> None:
    async def main() -> None:
        engine = AsyncEngine(Watched(pipeline), max_batch=1)
        await engine.start()
        waiting = [asyncio.ensure_future(engine.generate([Request("a star", s, 128, 128)])) for s in range(3)]
        await asyncio.sleep(0)
        await engine.close()
        assert [len(images) for images in await asyncio.gather(*waiting)] == [1, 1, 1]
        with pytest.raises(EngineClosed):
            await engine.generate([Request("a star", 1, 128, 128)])

    asyncio.run(main())


def test_a_batch_holds_at_least_one_picture(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="max_batch is 0"):
        AsyncEngine(pipeline, max_batch=0)
