"""What a run would cost, and what an update does cost: seconds, memory, network evaluations."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from tdm_finetune.fit import Trainer, updates
from tdm_finetune.student import StudentConfig

MEASURED_UPDATES = 10


def estimate(trainer: Trainer, config: StudentConfig) -> str:
    """What a run would cost, after ten measured updates that are thrown away: nothing is written."""
    student = trainer.student
    share = student.workers.share(trainer.groups)
    started = time.perf_counter()
    with counted(student.trainee.net) as calls:
        for step, prompts in enumerate(islice(updates(trainer, config, 0), MEASURED_UPDATES), trainer.fake_warmup):
            trainer.update(prompts, share, step)
    seconds = (time.perf_counter() - started) / min(MEASURED_UPDATES, config.steps)
    trainer.close()
    base = sum(p.numel() for p in student.trainee.net.parameters())
    trained = sum(p.numel() for p in student.generator.parameters)
    return "\n".join(
        (
            f"parameters     {base / 1e6:.2f} M in the base, {trained / 1e6:.2f} M trained a role",
            f"memory         {memory_mb():.0f} MB at most so far",
            f"NFE an update  {calls() // min(MEASURED_UPDATES, config.steps)} (network evaluations of one picture)",
            f"time           {seconds:.2f} s an update, {config.steps * seconds / 60:.0f} minutes for {config.steps}",
        )
    )


@contextmanager
def counted(net: nn.Module) -> Generator[Callable[[], int]]:
    """Counts the network's evaluations of one picture while the block runs; the result says how many so far."""
    calls = 0

    def count(_module: object, inputs: tuple[Tensor, ...], _output: object) -> None:
        nonlocal calls
        calls += len(inputs[0])

    hook = net.register_forward_hook(count)
    try:
        yield lambda: calls
    finally:
        hook.remove()


def memory_mb() -> float:
    """The most memory so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
