"""benchmarks/errors.py: what a wrong picture gets wrong first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tdm_finetune.scenes import Verdict
from tdm_finetune.scenes.check import Seen
from tdm_finetune.scenes.world import Spec, Thing


def seen(name: str | None, colour: str | None) -> Seen:
    return Seen(name, colour, 0.0, 0.0, 100, 1.0)


PAIR = Spec("attribution", (Thing("star", "red"), Thing("ring", "blue")))
STAR, RING = seen("star", "red"), seen("ring", "blue")


@pytest.mark.parametrize(
    ("found", "spec", "error"),
    [
        ((STAR,), PAIR, "number"),
        ((STAR, seen(None, "blue")), PAIR, "shape"),
        ((STAR, seen("star", "blue")), PAIR, "twice"),
        ((RING, seen("star", "blue")), PAIR, "colour"),
        ((RING, STAR), PAIR, "place"),  # nothing but the place is left to be wrong
        ((seen("G", "red"), seen("O", "red")), Spec("text", word="GO", colour="red"), "place"),
        ((seen("O", "red"), seen("G", "red")), Spec("text", word="GO", colour="red"), "shape"),
    ],
)
def test_the_first_error(
    found: tuple[Seen, ...], spec: Spec, error: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    sys.modules.pop("errors", None)
    from errors import first_error  # pyright: ignore[reportMissingImports] - a script beside the package

    assert first_error(Verdict(0, 0.5, found), spec) == error
    assert first_error(Verdict(1, 1.0, found), spec) is None
