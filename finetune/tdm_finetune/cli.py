"""`tdm-serve finetune STAGE`: one config dataclass per trainer, its fields as flags and as a TOML file's keys.

Stages are a table of strings, and only the chosen one is imported: help for the whole needs no torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tdm_serve.cli.lazy import add_commands
from tdm_serve.config import add_dataclass_arguments, from_sources


class Stage(NamedTuple):
    """`module:name` of a trainer's config class and of its function `train(config) -> Path`."""

    config: str
    train: str
    help: str


STAGES: dict[str, Stage] = {
    "vae": Stage("tdm_finetune.vae:VaeConfig", "tdm_finetune.vae:train", "train the picture autoencoder"),
    "text": Stage("tdm_finetune.text:TextConfig", "tdm_finetune.text:train", "train the tokenizer and text encoder"),
    "pretrain": Stage(
        "tdm_finetune.pretrain:PretrainConfig",
        "tdm_finetune.pretrain:train",
        "train the multi-step teacher by flow matching",
    ),
    "tdm": Stage("tdm_finetune.tdm:TdmConfig", "tdm_finetune.tdm:train", "distil the teacher to few steps with TDM"),
    "assemble": Stage(
        "tdm_finetune.assemble:AssembleConfig",
        "tdm_finetune.assemble:assemble",
        "put trained parts together as a checkpoint",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stages; a stage's flags appear when it is the chosen one."""
    add_commands(parser, "stage", {name: (stage.help, partial(_fill, stage)) for name, stage in STAGES.items()})


def run(args: argparse.Namespace) -> int:
    """Trains the stage, with the log on stderr, and prints the path of what came out."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    stage = STAGES[args.stage]
    config = from_sources(load(stage.config), args.config, args)
    print(load(stage.train)(config))
    return 0


def load(target: str) -> Any:
    """The object behind `module:name`."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _fill(stage: Stage, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="values for the flags below; flags win")
    add_dataclass_arguments(parser, load(stage.config))
