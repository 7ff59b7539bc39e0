"""One role's optimiser, and the guard that stops a run before it writes nonsense over its last good state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tdm_finetune import clock
from tdm_finetune.roles import Role
from tdm_finetune.student import Batch, Student
from tdm_serve.errors import TrainingDiverged

MIN_EXPLOSION = 1.0  # shares, such as that of constant groups, may leave 0 without alarm
Terms = Callable[[slice, Batch], Mapping[str, Tensor]]  # (which pictures, their part of the batch) -> terms (B,)


class Learner:
    """AdamW on a role's tensors. A rate of 0 freezes the role."""

    def __init__(self, name: str, role: Role, rate: float, beta1: float, student: Student) -> None:
        self.name, self.role, self.rate, self.student = name, role, rate, student
        decay = student.config.weight_decay
        self.optimizer = torch.optim.AdamW(role.parameters, rate, betas=(beta1, 0.999), weight_decay=decay)

    @property
    def trains(self) -> bool:
        return self.rate > 0

    def phase(self, batch: Batch, factor: float, terms_of: Terms) -> dict[str, float]:
        """One step on the whole batch; the terms' means and the gradient norm, for the log. Nothing if frozen."""
        if not self.trains:
            return {}
        scalars = {f"{self.name}_{name}": value for name, value in self._accumulate(batch, terms_of).items()}
        return {**scalars, f"{self.name}_gradient_norm": self._step(factor)}

    def _accumulate(self, batch: Batch, terms_of: Terms) -> dict[str, float]:
        """Adds up gradients part by part. Terms with a gradient are summed and differentiated, others only logged."""
        means: dict[str, float] = {}
        for chosen, part in batch.parts(self.student.config.micro_batch):
            share = len(part) / len(batch)
            with self.student.autocast():
                terms = terms_of(chosen, part)
            losses = [term.mean() for term in terms.values() if term.requires_grad]
            (torch.stack(losses).sum() * share).backward()
            for name, term in terms.items():
                means[name] = means.get(name, 0.0) + float(term.detach().float().mean()) * share
        return means

    def _step(self, factor: float) -> float:
        """One step with the gradients so far, averaged over the processes and clipped; their norm before clipping.

        Each role is clipped by itself: a common clip would let one role's gradient shrink another's step.
        """
        self.student.workers.mean_(p.grad for p in self.role.parameters if p.grad is not None)
        norm = float(torch.nn.utils.clip_grad_norm_(self.role.parameters, self.student.config.clip))
        self.optimizer.param_groups[0]["lr"] = self.rate * factor
        if math.isfinite(norm):  # the guard reports what is not; the weights stay as they were
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class EarlyStop:
    """Keeps the best scored average of the generator, until it has not got better for `patience` scores; 0 is off."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._best = -math.inf
        self._waited = 0
        self.kept: dict[str, Tensor] | None = None

    @property
    def over(self) -> bool:
        return 0 < self.patience <= self._waited

    def see(self, score: float, average: Mapping[str, Tensor]) -> None:
        """Takes in the score of the `average`."""
        if self.patience and score > self._best:
            self._best, self._waited = score, 0
            self.kept = {name: tensor.detach().clone() for name, tensor in average.items()}
        else:
            self._waited += 1

    def state(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "kept": self.kept}

    def load(self, state: Mapping[str, Any]) -> None:
        self._best, self._waited, self.kept = state["best"], state["waited"], state["kept"]


class Guard:
    """Raises TrainingDiverged, naming the term, when a scalar is not finite or stays far above what it used to be."""

    def __init__(self, factor: float = 100.0, patience: int = 3, settle: int = 20, decay: float = 0.95) -> None:
        self.factor, self.patience, self.settle, self.decay = factor, patience, settle, decay
        self._usual: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._over: dict[str, int] = {}

    def check(self, scalars: Mapping[str, float], step: int, kept: str) -> None:
        """`kept` says where the last good state is."""
        for name, value in scalars.items():
            if name.startswith(clock.PREFIX):
                continue  # a busy machine is no divergence
            if not math.isfinite(value):
                raise TrainingDiverged(f"{name} is {value} at update {step + 1}; the last good state is {kept}")
            self._compare(name, abs(value), step, kept)

    def _compare(self, name: str, value: float, step: int, kept: str) -> None:
        usual, seen = self._usual.get(name, value), self._seen.get(name, 0)
        over = seen >= self.settle and value > max(self.factor * usual, MIN_EXPLOSION)
        self._over[name] = self._over.get(name, 0) + 1 if over else 0
        if self._over[name] >= self.patience:
            raise TrainingDiverged(
                f"{name} exploded: {value:.4g} at update {step + 1}, usually {usual:.4g}; the last good state is {kept}"
            )
        if not over:
            self._usual[name] = self.decay * usual + (1 - self.decay) * value
            self._seen[name] = seen + 1
