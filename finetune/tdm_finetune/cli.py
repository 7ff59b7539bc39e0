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
from tdm_serve.errors import ConfigError


class Stage(NamedTuple):
    """`module:name` of a trainer's config class and of its function `train(config) -> Path`.

    `dry_run(config) -> str`, where a trainer has one, tells what the run would cost.
    """

    config: str
    train: str
    help: str
    dry_run: str | None = None


PRESETS = Path(__file__).parent / "presets"  # STAGE/NAME.toml

STAGES: dict[str, Stage] = {
    "vae": Stage("tdm_finetune.vae:VaeConfig", "tdm_finetune.vae:train", "train the picture autoencoder"),
    "text": Stage("tdm_finetune.text:TextConfig", "tdm_finetune.text:train", "train the tokenizer and text encoder"),
    "pretrain": Stage(
        "tdm_finetune.pretrain:PretrainConfig",
        "tdm_finetune.pretrain:train",
        "train the multi-step teacher by flow matching",
    ),
    "micro": Stage(
        "tdm_finetune.micro.teacher:MicroConfig",
        "tdm_finetune.micro.teacher:train",
        "train the 16 x 16 world's multi-step teacher",
    ),
    "tdm": Stage(
        "tdm_finetune.tdm:TdmConfig",
        "tdm_finetune.tdm:train",
        "distil the teacher to few steps with TDM",
        "tdm_finetune.tdm:dry_run",
    ),
    "tdm-r1": Stage(
        "tdm_finetune.tdm_r1:TdmR1Config",
        "tdm_finetune.tdm_r1:train",
        "reinforce a few-step generator with rewards that have no gradient",
        "tdm_finetune.tdm_r1:dry_run",
    ),
    "judge": Stage("tdm_finetune.judge.train:JudgeConfig", "tdm_finetune.judge.train:train", "train the second judge"),
    "assemble": Stage(
        "tdm_finetune.assemble:AssembleConfig",
        "tdm_finetune.assemble:assemble",
        "put trained parts together as a checkpoint",
    ),
    "preview": Stage(
        "tdm_finetune.preview_fit:PreviewConfig",
        "tdm_finetune.preview_fit:train",
        "fit the colours of a checkpoint's previews",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stages; a stage's flags appear when it is the chosen one."""
    add_commands(parser, "stage", {name: (stage.help, partial(_fill, stage)) for name, stage in STAGES.items()})


def run(args: argparse.Namespace) -> int:
    """Trains the stage, with the log on stderr, and prints the path of what came out."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    stage = STAGES[args.stage]
    config = from_sources(load(stage.config), preset(args.stage, args.config), args)
    train = stage.dry_run if stage.dry_run and args.dry_run else stage.train
    print(load(train)(config))
    return 0


def preset(stage: str, given: Path | None) -> Path | None:
    """A config file as given, or the shipped one of that name, such as `scenes` or `geneval`."""
    if given is None or given.exists() or given.suffix:
        return given
    shipped = {path.stem: path for path in sorted((PRESETS / stage).glob("*.toml"))}
    if str(given) not in shipped:
        known = ", ".join(shipped) or "none for this stage"
        raise ConfigError(f"config {str(given)!r} is neither a file nor a shipped config; shipped: {known}")
    return shipped[str(given)]


def load(target: str) -> Any:
    """The object behind `module:name`."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _fill(stage: Stage, parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file or a shipped config's name; flags below win over it"
    )
    if stage.dry_run:
        parser.add_argument("--dry-run", action="store_true", help="measure ten updates, tell the cost, write nothing")
    add_dataclass_arguments(parser, load(stage.config))
