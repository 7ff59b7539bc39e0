"""One export from checkpoint to a verified folder: load, write part by part, compare with eager, give it its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tdm_exporters import int8, onnx_format, pt2_format
from tdm_exporters.compare import Beside
from tdm_exporters.families import EXPORTABLE
from tdm_exporters.options import Options
from tdm_exporters.parts import Limits, Part
from tdm_exporters.staging import Staging, staging
from tdm_exporters.verify import Report, verify
from tdm_serve.artifact import REPORT, Artifact, Size, report_digest, write_artifact
from tdm_serve.backends.exported import DTYPE_NAMES, load_exported
from tdm_serve.engine import Engine
from tdm_serve.errors import InvalidRequest
from tdm_serve.files import write_atomically
from tdm_serve.machine import cpu_name, versions
from tdm_serve.models.catalog import evaluations
from tdm_serve.models.load import Loaded, examine, load
from tdm_serve.models.spec import ModelSpec
from tdm_serve.pipeline import Pipeline

Write = Callable[[Part, Path], Sequence[Path]]


def export(options: Options) -> Report | None:
    """Writes the folder of an engine. None where it was not verified; a report that failed left no folder.

    Raises InvalidRequest for what cannot be exported, OutputError where the folder cannot be written, and everything
    that loading a checkpoint raises.
    """
    options.check()
    spec, _ = examine(options.checkpoint)
    _check_family(spec)
    sizes, tokens = _sizes(options, spec), _tokens(options, spec)
    if options.kind == "pt2":
        pt2_format.check_compiler()
    options.say(f"loading {options.checkpoint}")
    loaded = load(options.checkpoint, "cpu", DTYPE_NAMES[options.dtype or "fp32"])
    blank = _artifact(options, loaded, sizes, tokens)
    with staging(options.output, _fingerprint(blank, options)) as stage:
        parts = _parts(loaded, blank)
        artifact = replace(blank, parts=_write_parts(options, parts, stage))
        write_artifact(stage.folder, artifact)
        report = None
        if options.verify:
            report = _verified(options, loaded, parts, artifact, stage)
            if report.failures:
                stage.drop()
                return report
        stage.publish()
    return report


def _check_family(spec: ModelSpec) -> None:
    if spec.family not in EXPORTABLE:
        raise InvalidRequest(
            f"{spec.id} is of family {spec.family!r}; only {', '.join(EXPORTABLE)} can be exported: serve it with "
            "--backend compiled"
        )


def _sizes(options: Options, spec: ModelSpec) -> tuple[Size, ...]:
    """Those that were asked for, or the checkpoint's own. Raises InvalidRequest for one that it cannot make."""
    for width, height in options.sizes:
        for side in (width, height):
            if side % spec.size_multiple or not spec.min_side <= side <= spec.max_side:
                raise InvalidRequest(
                    f"--sizes has {width}x{height}; {spec.id} makes sides that are multiples of {spec.size_multiple} "
                    f"between {spec.min_side} and {spec.max_side}"
                )
    return tuple(dict.fromkeys(options.sizes)) or ((spec.width, spec.height),)


def _tokens(options: Options, spec: ModelSpec) -> int:
    if options.text not in (None, spec.max_prompt_tokens) and not EXPORTABLE[spec.family].shortens:
        raise InvalidRequest(
            f"--text-len is {options.text}, but family {spec.family!r} attends to the padding behind a prompt, so that "
            f"another length makes other pictures; leave it out, which is {spec.max_prompt_tokens}"
        )
    if options.text is not None and options.text > spec.max_prompt_tokens:
        raise InvalidRequest(f"--text-len is {options.text}; {spec.id} reads at most {spec.max_prompt_tokens} tokens")
    return options.text or spec.max_prompt_tokens


def _artifact(options: Options, loaded: Loaded, sizes: tuple[Size, ...], tokens: int) -> Artifact:
    """All that is known before the first part is written."""
    [served] = loaded.served
    spec, model = served.spec, loaded.model
    return Artifact(
        kind=options.kind,
        family=spec.family,
        model=spec.id,
        checkpoint_hash=served.checkpoint_hash,
        dtype=options.dtype or "fp32",
        quantise=options.quantise,
        attention=options.attention,
        sizes=sizes,
        batch=options.batch[1],
        text=tokens,
        sigmas=spec.sigmas,
        nfe=evaluations(spec.sigmas, spec.guidance),
        guidance=spec.guidance,
        channels=model.channels,
        factor=model.factor,
        scale=model.scale,
        shift=model.shift,
        preview=tuple(tuple(row) for row in model.preview),
        parts={},
        versions=versions(),
        machine=cpu_name(),
    )


def _fingerprint(artifact: Artifact, options: Options) -> Mapping[str, Any]:
    """What decides the parts' contents."""
    return asdict(artifact) | {"body": options.body}


def _parts(loaded: Loaded, artifact: Artifact) -> list[Part]:
    limits = Limits(artifact.batch, artifact.sizes, artifact.text)
    with torch.no_grad():
        return EXPORTABLE[artifact.family].parts_of(loaded.model, limits)


def _write_parts(options: Options, parts: Sequence[Part], stage: Staging) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for number, part in enumerate(parts, 1):
        started, known = time.perf_counter(), part.name in stage.done
        facts[part.name] = stage.part(part.name, partial(_write, options, part))
        spent = "kept from before" if known else f"{time.perf_counter() - started:.1f} s"
        options.say(f"{number}/{len(parts)} {part.name}: {spent}")
    return facts


def _write(options: Options, part: Part, folder: Path) -> Sequence[Path]:
    if options.kind == "pt2":
        return pt2_format.write(part, folder)
    files = onnx_format.write(part, folder, options.attention, options.body)
    if options.quantise == "int8" and part.name not in int8.KEPT:
        if len(files) > 1:
            raise InvalidRequest(
                f"--quantise int8 takes graphs of at most {onnx_format.EXTERNAL_BYTES >> 30} GiB; {part.name} is larger"
            )
        int8.quantise(files[0])
    return files


def _verified(options: Options, loaded: Loaded, parts: Sequence[Part], artifact: Artifact, stage: Staging) -> Report:
    """Compares, and seals the report into the manifest."""
    options.say("comparing with eager")
    eager, beside = Pipeline(Engine(loaded, "eager")), Beside.of(parts)
    opened, backend = load_exported(options.checkpoint, stage.folder, "auto", "cpu", wrap=beside.over)
    report = verify(eager, Pipeline(Engine(opened, backend)), beside, artifact, options.score)
    write_atomically(stage.folder / REPORT, report.json().encode())
    write_artifact(stage.folder, replace(artifact, report=report_digest(stage.folder)))
    return report
