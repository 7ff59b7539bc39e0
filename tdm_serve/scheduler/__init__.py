"""What runs next on the device, and what is promised to whom: pure decisions, no torch, no clock, no threads."""

from tdm_serve.scheduler.nouns import Costs, Idle, Outcome, Policy, Promise, Refusal, Run, Stage, Work
from tdm_serve.scheduler.scheduler import Scheduler

__all__ = [
    "Costs",
    "Idle",
    "Outcome",
    "Policy",
    "Promise",
    "Refusal",
    "Run",
    "Scheduler",
    "Stage",
    "Work",
]
