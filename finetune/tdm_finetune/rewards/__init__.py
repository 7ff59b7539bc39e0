"""Rewards without gradients: named, mixed by weights, run beside the trainer, and never trusted unchecked."""

from tdm_finetune.rewards.base import BadSample, Part, Reward, Scores
from tdm_finetune.rewards.pool import RewardPool
from tdm_finetune.rewards.registry import GROUP, Mixture, known, load_reward

__all__ = ["GROUP", "BadSample", "Mixture", "Part", "Reward", "RewardPool", "Scores", "known", "load_reward"]
