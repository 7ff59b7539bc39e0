"""People's likes as the surrogate's material: rated recipes make the same trajectories again.

What people rated was made by the checkpoint as it is served, from a prompt and a seed. Replayed from there, every
boundary of the trajectory has the rating as its exact reward; the generator itself goes on from fresh noise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdm_finetune.draws import stream
from tdm_finetune.rewards.feedback import Group, Recipe, groups, read_feedback
from tdm_finetune.rollout import Trajectory
from tdm_finetune.student import Batch, Student
from tdm_finetune.trainee import Prompt
from tdm_serve.errors import ConfigError

logger = logging.getLogger(__name__)

RATED = "rated"  # the key of a prompt's metadata that holds its rated group
FEWEST = 2


class Replay:
    """The groups of a feedback file, and the role that made their pictures."""

    def __init__(self, path: Path, student: Student, size: int) -> None:
        self.student, self.size = student, size
        found = groups(read_feedback(path), FEWEST)
        self.groups = [group for group in found if self._is_ours(group)]
        if not self.groups:
            raise ConfigError(
                f"feedback {path} has {len(found)} groups of two or more pictures of one prompt, rated differently, "
                f"and none of them is from checkpoint {student.trainee.checkpoint_hash} at its own steps and size"
            )
        logger.info("%d of %d rated groups are from this checkpoint", len(self.groups), len(found))
        self.role = student.roles.new(stream(0), student.trainee.adapter)

    def _is_ours(self, group: Group) -> bool:
        trainee, recipe = self.student.trainee, group.recipes[0]
        own = trainee.process.rows(self.student.config.nfe)
        steps = recipe.sigmas is None or np.allclose(recipe.sigmas, [row.sigma for row in own], atol=1e-6)
        size = (recipe.width, recipe.height) == trainee.picture_size
        return recipe.checkpoint_hash == trainee.checkpoint_hash and steps and size and recipe.guidance in (None, 1.0)

    def prompts(self, seed: int) -> Iterator[Prompt]:
        """The rated prompts, in another order every time round."""
        for epoch in count():
            for index in np.random.default_rng((seed, epoch)).permutation(len(self.groups)):
                group = self.groups[int(index)]
                yield Prompt(group.prompt, {RATED: group})

    @torch.no_grad()
    def trajectory(self, batch: Batch) -> tuple[Trajectory, Tensor]:
        """The rated trajectories of a batch's prompts and their ratings (B,); in float32, as they were served."""
        chosen = [
            member for first in range(0, len(batch), batch.group) for member in self._members(batch.prompts[first])
        ]
        noise = torch.cat([self._noise(recipe) for recipe, _ in chosen])
        ratings = torch.tensor([rating for _, rating in chosen])
        device = self.student.device
        return self.student.trajectory(self.role, noise.to(device), batch.conditioning), ratings.to(device)

    def _members(self, prompt: Prompt) -> list[tuple[Recipe, float]]:
        """`size` members of the group: all as often as it takes, or the worst and the best where there are too many."""
        group: Group = prompt.metadata[RATED]
        members = sorted(zip(group.recipes, group.ratings, strict=True), key=lambda member: member[1])
        if len(members) > self.size:
            half = self.size // 2
            members = [*members[:half], *members[len(members) - (self.size - half) :]]
        return [members[i % len(members)] for i in range(self.size)]

    def _noise(self, recipe: Recipe) -> Tensor:
        """A seed's initial latents, as serving draws them."""
        generator = torch.Generator("cpu").manual_seed(recipe.seed)
        return torch.randn(1, *self.student.trainee.latent_shape, generator=generator)
