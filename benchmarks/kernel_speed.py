"""The kernels on an NVIDIA GPU, beside named backends in the same run: correctness first, then speed.

Timed are replays of CUDA graphs with a cold L2 cache. A contender whose result is wrong gets no time. `--tune` writes
what was fastest on this card into the tables that the package reads (tdm_kernels/attention/table.json, measured.json).
`TRITON_INTERPRET=1 ... --smoke` runs small cases where there is no GPU, and times nothing.

Not called kernels.py: Hugging Face has a package of that name, and diffusers would take this file for it wherever
another benchmark runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import harness
import kernel_cases
import kernel_setting
import torch
from kernel_cases import Case
from kernel_setting import BATCHES, Setting
from kernel_targets import kernel, verdicts

from tdm_kernels import dispatch
from tdm_kernels.attention import table
from tdm_kernels.attention.variants import VARIANTS

Row = dict[str, Any]
GROUPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "attention": kernel_cases.attention_cases,
    "quantised": kernel_cases.quantised_cases,
    "group_norm": kernel_cases.group_norm_cases,
    "norm_rope": kernel_cases.norm_rope_cases,
}


def measure(case: Case, setting: Setting, ceilings: dict[str, float]) -> Row:
    """One row: what each contender took, or why it took nothing."""
    refused: dict[str, str] = {}
    for name, call in case.contenders.items():
        try:
            if reason := case.check(name, call()):
                refused[name] = reason
        except Exception as error:  # noqa: BLE001 - a backend that cannot run a shape is a result of this benchmark
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    calls = {name: call for name, call in case.contenders.items() if name not in refused}
    times = setting.clock(calls)
    found = {name: values | rates(case, values["p50"], ceilings) for name, values in times.items()}
    return {"operation": case.operation, "shape": case.shape, "contenders": found, "refused": refused}


def measured(setting: Setting, only: list[str], ceilings: dict[str, float]) -> Iterator[Row]:
    """A row for each case of the groups."""
    with torch.no_grad():
        for case in chain.from_iterable(GROUPS[name](setting) for name in only):
            yield measure(case, setting, ceilings)
            del case
            gc.collect()
            torch.compiler.reset()  # it gives up on a function that it compiled for many shapes


def rates(case: Case, milliseconds: float, ceilings: dict[str, float]) -> dict[str, float]:
    """What a median means beside the card's ceiling."""
    if case.flops:
        tflops = case.flops / milliseconds / 1e9
        return {"tflops": round(tflops, 1), "share_of_matmul": round(tflops / ceilings["matmul_tflops"], 3)}
    gbps = case.traffic / milliseconds / 1e6
    return {"gbps": round(gbps, 1), "share_of_copy": round(gbps / ceilings["copy_gbps"], 3)}


def show(row: Row) -> None:
    print(row["operation"], " ".join(f"{name}={value}" for name, value in row["shape"].items()))
    for name, found in sorted(row["contenders"].items(), key=lambda item: item[1]["p50"]):
        numbers = " ".join(f"{key} {value:g}" for key, value in found.items())
        print(f"    {name:<36}{numbers}")
    for name, reason in row["refused"].items():
        print(f"    {name:<36}{reason}")


def fastest(row: Row, wanted: Callable[[str], bool] = lambda _: True) -> str | None:
    """The contender with the smallest median among those `wanted`."""
    medians = {name: found["p50"] for name, found in row["contenders"].items() if wanted(name)}
    return min(medians, key=medians.__getitem__) if medians else None


def attention_entries(rows: list[Row], device: str) -> list[Row]:
    """Rows of table.json. FlexAttention is a baseline here, nothing that the package can choose."""
    entries: list[Row] = []
    for row in rows:
        winner = fastest(row, lambda name: name != "flex") if row["operation"] == "joint_attention" else None
        if winner is not None:
            shape = row["shape"]
            choice = {"backend": "triton", "variant": winner} if winner in VARIANTS else {"backend": winner}
            sizes = {"keys": shape["tokens"], "streams": shape["batch"] * shape["heads"]}
            entry = {"device": device, "head_dim": shape["head_dim"], **sizes, "ragged": shape["ragged"], **choice}
            entries.append(entry | {"ms": row["contenders"][winner]["p50"]})
    return entries


def faster_operations(rows: list[Row], device: str) -> list[Row]:
    """Rows of measured.json: operations whose kernel won every shape; quantised attention is held against cuDNN."""
    found: list[Row] = []
    for operation in ("group_norm_silu", "qk_norm_rope"):
        winners = {fastest(row) for row in rows if row["operation"] == operation}
        found += [{"operation": operation, "device": device}] * (winners == {"triton"})
    quantised = [row for row in rows if row["operation"] == "quantised_attention"]
    winners = {fastest(row, lambda name: "with" in name or name == "cudnn") for row in quantised}
    if quantised and all("cudnn" in row["contenders"] for row in quantised) and "cudnn" not in winners:
        tma = {"quantised_attention (tma)"} if all("tma" in str(winner) for winner in winners) else set()
        found += [{"operation": name, "device": device} for name in ("quantised_attention", "quantise_qk", *tma)]
    return found


def replace(path: Path, key: str, entries: list[Row], device: str) -> None:
    """Puts the rows of this device into a table, one a line, and keeps those of other devices."""
    others = [row for row in json.loads(path.read_text())[key] if row["device"] != device]
    lines = ",\n".join("    " + json.dumps(row) for row in others + entries)
    path.write_text(f'{{\n  "{key}": [\n{lines}\n  ]\n}}\n' if lines else f'{{\n  "{key}": []\n}}\n')


def tune(rows: list[Row], device: str) -> None:
    replace(table.PATH, "rows", attention_entries(rows, device), device)
    replace(dispatch.MEASURED, "faster", faster_operations(rows, device), device)


def smoke(only: list[str]) -> int:
    """Runs and checks all cases, small; 1 where a kernel of ours was refused. Its times would say nothing of a GPU."""
    setting = kernel_setting.smoke()
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from tests.tdm_kernels.interpreted.repaired_interpreter import repaired_interpreter

    torch.manual_seed(0)
    with repaired_interpreter():
        rows = list(measured(setting, only, kernel_setting.ceilings(setting)))
    for row in rows:
        print(row["operation"], row["shape"], "right:", ", ".join(row["contenders"]), "refused:", row["refused"])
    table.parse(json.dumps({"rows": attention_entries(rows, setting.name)}))
    faster_operations(rows, setting.name)
    verdicts(rows)
    return int(any(ours(name) for row in rows for name in row["refused"]))


def ours(name: str) -> bool:
    """Whether a contender is a kernel of this project."""
    return name == "triton" or name.startswith("int8") or kernel(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of cases")
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=BATCHES, help="of attention")
    parser.add_argument("--tune", action="store_true", help="write the tables for this card; needs all groups")
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/kernels.jsonl")
    parser.add_argument("--smoke", action="store_true", help="small shapes in Triton's interpreter; measures nothing")
    args = parser.parse_args()
    if args.smoke and (args.tune or args.keep):
        raise SystemExit("--smoke measures nothing, so it cannot go with --tune or --keep")
    if args.tune and set(args.only) != set(GROUPS):
        raise SystemExit("--tune writes all tables of this card, so it cannot go with --only")
    if args.smoke:
        return smoke(args.only)
    setting = dataclasses.replace(kernel_setting.on_gpu(), batches=tuple(args.batches))
    torch.manual_seed(0)
    ceilings = kernel_setting.ceilings(setting)
    print(f"{setting.name}: " + ", ".join(f"{name} {value:g}" for name, value in ceilings.items()))
    rows: list[Row] = []
    for row in measured(setting, args.only, ceilings):
        rows.append(row)
        show(row)
    if args.tune:
        tune(rows, setting.name)
    targets = verdicts(rows)
    for target in targets:
        print(f"{target['target']}: {target['verdict']} ({target['measured']} of {target['wanted']})")
    harness.publish("kernels", {"ceilings": ceilings, "rows": rows, "targets": targets}, keep=args.keep)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
