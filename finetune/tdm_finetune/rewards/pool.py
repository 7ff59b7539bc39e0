"""Rewards beside the trainer: batches go in, futures come out, and nothing that a reward does can hang a run.

Threads, on purpose. What the built-ins wait for releases the interpreter (torch, Tesseract, a remote server, Pillow's
codecs). The one that is pure Python, the scene checker, was measured: 0.65 ms a picture, and a trainer beside it in a
thread finished no later than when both ran one after the other, so the worst case is that nothing overlaps. Where
even that is too much, because a GPU waits for the interpreter between small kernels, put the reward into a process of
its own with `python -m tdm_finetune.rewards.server` and name it `http(url=...)`.

The threads are daemons of our own, because those of concurrent.futures are joined at exit, where a reward that never
returns would keep the process alive for ever.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from tdm_finetune.rewards.base import Metadata, Part, Scores, check_batch, name_sample, score, weighted
from tdm_finetune.rewards.registry import load_reward
from tdm_serve.errors import ConfigError, RewardError

logger = logging.getLogger(__name__)

PIECE = 32  # pictures; smaller pieces point closer at the sample that hangs, larger ones suit models better


@dataclass(slots=True)
class _Piece:
    """Work for one thread: some of a batch's samples for one part of the mixture."""

    batch: _Batch
    part: Part
    rows: slice
    running: bool = False
    result: Tensor | None = None

    def run(self) -> None:
        batch, rows = self.batch, self.rows
        try:
            self.result = score(
                self.part, batch.images[rows], batch.prompts[rows], batch.metadata[rows], first=rows.start
            )
        except RewardError as error:
            batch.fail(error)


class _Batch:
    """One submitted batch and the future that answers it."""

    def __init__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], timeout_s: float) -> None:
        self.images = images
        self.prompts = list(prompts)
        self.metadata = list(metadata)
        self.timeout_s = timeout_s
        self.answer: Future[Scores] = Future()
        self.pieces: list[_Piece] = []  # in the order of their samples
        self.given_up = False
        self._lock = threading.Lock()

    def fail(self, error: RewardError) -> None:
        with self._lock:
            if not self.answer.done():
                self.answer.set_exception(error)

    def finish(self, parts: Sequence[Part]) -> None:
        """Answers with the scores if the last piece is in."""
        with self._lock:
            if self.answer.done() or any(piece.result is None for piece in self.pieces):
                return
            self.answer.set_result(weighted(parts, {part.label: self._whole(part) for part in parts}))

    def _whole(self, part: Part) -> Tensor:
        return torch.cat([piece.result for piece in self.pieces if piece.part is part and piece.result is not None])

    def late(self) -> RewardError | None:
        """Names the first sample without an answer; None if the last one has come in this moment."""
        piece = next((piece for piece in self.pieces if piece.result is None), None)
        if piece is None:
            return None
        start = piece.rows.start
        return RewardError(
            f"the reward {piece.part.label!r} took longer than {self.timeout_s:g} s; "
            f"the first sample without an answer is {name_sample(start, self.prompts[start])}"
        )


class RewardPool:
    """Scores batches in `workers` threads; a context manager.

    `timeout_s` counts from `submit` to the last score of that batch, the wait behind earlier batches included. With
    more than one worker a reward is called from several threads at once, with different samples; the built-ins allow
    it. Models load in the constructor, which raises ConfigError as `load_reward` does.
    """

    def __init__(self, reward: str, *, workers: int = 1, timeout_s: float = 60.0) -> None:
        if workers < 1 or not timeout_s > 0:
            raise ConfigError(f"workers is {workers} and timeout_s {timeout_s}; they must be at least 1 and above 0")
        self.parts = load_reward(reward).parts
        self.workers = workers
        self.timeout_s = timeout_s
        self._queue: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._waiting: set[_Batch] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._threads = [self._start() for _ in range(workers)]

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Future[Tensor]:
        """The weighted scores, float32 (B,) on the CPU; raises RewardError from `result()`.

        images uint8 (B, H, W, 3) on the CPU; they must not change until the answer is there.
        """
        total: Future[Tensor] = Future()
        total.set_running_or_notify_cancel()

        def forward(done: Future[Scores]) -> None:
            error = done.exception()
            if error is not None:
                total.set_exception(error)
            else:
                total.set_result(done.result().total)

        self.submit_parts(images, prompts, metadata).add_done_callback(forward)
        return total

    def submit_parts(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Future[Scores]:
        """As `submit`, with each part's own scores, for the log."""
        check_batch(images, prompts, metadata)
        batch = _Batch(images, prompts, metadata, self.timeout_s)
        batch.answer.set_running_or_notify_cancel()
        batch.pieces = [_Piece(batch, part, rows) for rows in _rows(len(prompts), self.workers) for part in self.parts]
        with self._lock:
            if self._closed:
                raise RewardError("the reward pool is closed")
            self._waiting.add(batch)
            for piece in batch.pieces:
                self._queue.put(piece)
        timer = threading.Timer(self.timeout_s, self._time_out, (batch,))
        timer.daemon = True
        timer.start()
        batch.answer.add_done_callback(lambda _: self._done(batch, timer))
        return batch.answer

    def close(self) -> None:
        """Fails what is not answered yet and ends the threads; waits for a running reward as long as its time-out."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = list(self._waiting)
        for batch in waiting:
            batch.fail(RewardError("the reward pool was closed before this batch was scored"))
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + self.timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._work, name="reward", daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        """A thread's life: pieces until None. Pieces of a batch that is answered already are passed over."""
        while (piece := self._queue.get()) is not None:
            with self._lock:
                piece.running = not (piece.batch.given_up or piece.batch.answer.done())
            if not piece.running:
                continue
            piece.run()
            with self._lock:
                if piece.batch.given_up:  # another thread has taken this one's place
                    return
                piece.running = False
            piece.batch.finish(self.parts)

    def _time_out(self, batch: _Batch) -> None:
        error = batch.late()
        if error is None or batch.answer.done():
            return
        with self._lock:
            batch.given_up = True
            stuck = sum(piece.running for piece in batch.pieces)
        batch.fail(error)
        if stuck:
            logger.warning("%s; the thread it runs in is given up and replaced", error)
            self._threads += [self._start() for _ in range(stuck)]

    def _done(self, batch: _Batch, timer: threading.Timer) -> None:
        timer.cancel()
        with self._lock:
            self._waiting.discard(batch)


def _rows(size: int, workers: int) -> Iterator[slice]:
    """Slices of at most PIECE samples, and enough of them for every worker."""
    step = min(PIECE, -(-size // workers))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
