"""The story of TDM-R1, reproduced: trains a world's methods, scores each, appends one row a method and seed.

`python benchmarks/experiments.py micro --seeds 0,1,2 --keep` reads `benchmarks/experiments/micro.toml`: one table a
method, with its stage and options. `like` takes another table's options first and `preset` a shipped config's, `start`
and `surrogate` name the table whose run it goes on from, `method` is its name in the row where several tables share
one, `seeds` are the only ones it is run for. Runs resume, and what has a row already is not done again. Levers are
chosen on `val`; `--split heldout` is for the end.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness  # first: it sets the OpenMP policy before torch loads
import torch

from tdm_finetune import tdm, tdm_r1
from tdm_finetune.cli import PRESETS
from tdm_finetune.fit import open_trainee
from tdm_finetune.paint import score_network
from tdm_finetune.roles import Roles
from tdm_finetune.run import LOG_FILE, STATE_FILE
from tdm_finetune.student import Student, StudentConfig
from tdm_finetune.workers import Workers
from tdm_serve.config import check
from tdm_serve.errors import ConfigError, TrainingDiverged

FILES = Path(__file__).resolve().parent / "experiments"
RESULTS = harness.RESULTS / "experiments.jsonl"
CURVES = ("reward", "val_strict", "val_soft", "val_palette_error", "val_diversity")  # what the plots show
SAMPLE = "sample"  # the stage that trains nothing: the checkpoint as it is
STAGES: dict[str, tuple[type[StudentConfig], Any]] = {
    "tdm": (tdm.TdmConfig, tdm.train),
    "tdm-r1": (tdm_r1.TdmR1Config, tdm_r1.train),
}


class World(NamedTuple):
    """What all methods of a file share."""

    name: str
    checkpoint: str
    n: int  # prompts that are scored
    note: str  # what a reader of the rows should know, such as noise on the teacher's captions


class Method(NamedTuple):
    """One table of the file."""

    key: str
    name: str
    stage: str
    options: dict[str, Any]
    links: dict[str, str]  # "start" and "surrogate" -> key of another table
    seeds: tuple[int, ...]  # the only ones it is run for; empty is any


def read(name: str) -> tuple[World, dict[str, Method]]:
    """A world's file. ConfigError lists the known ones, or names the table that does not fit."""
    path = FILES / f"{name}.toml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in FILES.glob("*.toml")))
        raise ConfigError(f"world {name!r} is unknown; known: {known}")
    tables = tomllib.loads(path.read_text())
    world = World(name, **tables.pop("world"))
    return world, {key: _method(key, tables) for key in tables}


def _method(key: str, tables: Mapping[str, Mapping[str, Any]]) -> Method:
    options = _resolved(key, tables)
    if "preset" in options:
        options = _shipped(options["stage"], options.pop("preset")) | options
    links = {name: options.pop(name) for name in ("start", "surrogate") if name in options}
    if unknown := [target for target in links.values() if target not in tables]:
        raise ConfigError(f"table {key!r} goes on from {unknown[0]!r}, which is no table")
    name, stage, seeds = options.pop("method", key), options.pop("stage"), tuple(options.pop("seeds", ()))
    if stage != SAMPLE and stage not in STAGES:
        raise ConfigError(f"table {key!r} has stage {stage!r}; choose one of {SAMPLE}, {', '.join(STAGES)}")
    return Method(key, name, stage, options, links, seeds)


def _resolved(key: str, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    own = dict(tables[key])
    like = own.pop("like", None)
    return own if like is None else _resolved(like, tables) | own


def _shipped(stage: str, name: str) -> dict[str, Any]:
    """A shipped config's options, but for where its run goes."""
    options = tomllib.loads((PRESETS / stage / f"{name}.toml").read_text())
    return {key: value for key, value in options.items() if key != "run"}


def config_of(method: Method, world: World, runs: Path, seed: int) -> StudentConfig:
    """A method's config for one seed; its run is RUNS/KEY-SEED."""
    kind = STAGES[method.stage][0]
    links = {name: str(runs / f"{key}-{seed}") for name, key in method.links.items()}
    own = {"checkpoint": world.checkpoint, "run": str(runs / f"{method.key}-{seed}"), "seed": seed}
    return kind(**check(kind, {**own, **links, **method.options}, f"table {method.key!r}"))


def measure(method: Method, world: World, runs: Path, seed: int, split: str) -> dict[str, Any]:
    """Trains what is not trained yet, and scores it."""
    if method.stage == SAMPLE:
        config = StudentConfig(checkpoint=world.checkpoint)
        trainee = open_trainee(config, Workers().device)
        roles = Roles(trainee, 0 if trainee.adapter is None else config.rank, config.alpha)
        network = roles.base if trainee.adapter is None else roles.new(torch.Generator(), trainee.adapter)
        row = score_network(trainee, network, split=split, n=world.n, seed=seed, **method.options)
        return {**row, "reward": None, "updates": 0, "train_seconds": 0.0}
    config = config_of(method, world, runs, seed)
    diverged = trained(method, config)
    workers = Workers()
    student = Student(config, open_trainee(config, workers.device), workers)
    state = torch.load(config.run / STATE_FILE, weights_only=True)
    student.load(state)
    eta = config.eta if isinstance(config, tdm_r1.TdmR1Config) else 0.0
    with student.average.applied():
        row = score_network(
            student.trainee, student.generator, split=split, n=world.n, nfe=config.nfe, seed=seed, eta=eta
        )
    log = [json.loads(line) for line in (config.run / LOG_FILE).read_text().splitlines()]
    reward = config.reward if isinstance(config, tdm_r1.TdmR1Config) else None
    facts = {"reward": reward, "updates": state["step"], "train_seconds": log[-1]["elapsed_s"], "diverged": diverged}
    return {**row, **facts, "curves": {name: curve(log, name) for name in CURVES}}


def trained(method: Method, config: StudentConfig) -> str | None:
    """Trains, or resumes; what the guard said if the run exploded, whose last good state is what counts then."""
    try:
        STAGES[method.stage][1](config)
    except TrainingDiverged as error:
        return str(error)
    return None


def curve(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(update, value) of one scalar of a run's log."""
    return [(row["step"], round(row[name], 5)) for row in log if name in row]


def known_rows() -> set[tuple[str, str, int, str]]:
    """(world, table, seed, split) of what has a row."""
    if not RESULTS.exists():
        return set()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {(row["world"], row["table"], row["seed"], row["split"]) for row in rows}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What happened, for people."""
    head = f"{'method':<20}{'seed':>5}{'NFE':>5}{'strict':>8}{'soft':>8}{'palette':>9}{'diversity':>10}{'train s':>9}"
    return "\n".join([head, *map(_line, rows)])


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['table']:<20}{row['seed']:>5}{row['nfe']:>5}{row['strict']:>8.3f}{row['soft']:>8.3f}"
        f"{row['palette_error']:>9.5f}{row['diversity']:>10.4f}{row['train_seconds']:>9.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", help="a file of benchmarks/experiments without its ending")
    parser.add_argument("--tables", help="only these, with commas; otherwise all, in the file's order")
    parser.add_argument("--seeds", default="0", help="with commas")
    parser.add_argument("--split", choices=("val", "heldout"), default="val")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--keep", action="store_true", help="append rows to benchmarks/results/experiments.jsonl")
    args = parser.parse_args()
    world, methods = read(args.world)
    chosen = args.tables.split(",") if args.tables else list(methods)
    if unknown := [key for key in chosen if key not in methods]:
        raise SystemExit(f"table {unknown[0]!r} is unknown; {args.world} has {', '.join(methods)}")
    rows: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        for key in chosen:
            method = methods[key]
            if method.seeds and seed not in method.seeds:
                continue
            if args.keep and (world.name, key, seed, args.split) in known_rows():
                continue
            found = measure(method, world, args.runs, seed, args.split)
            row = {"world": world.name, "method": method.name, "table": key, "seed": seed, "note": world.note, **found}
            rows.append(row)
            print(table(rows[-1:]), flush=True)
            harness.publish("experiments", row, keep=args.keep)
    print(table(rows))


if __name__ == "__main__":
    main()
