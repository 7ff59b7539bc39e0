"""Names become rewards through entry points only, mixtures are weighted sums, and scores are checked."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tdm_finetune.rewards import GROUP, known, load_reward, registry
from tdm_serve.errors import ConfigError, MissingExtra, RewardError


def test_installed_entry_points_are_those_of_pyproject(root: Path) -> None:
    table = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    assert set(table) <= set(known()), "the installation is older than pyproject.toml; run: pip install -e ."
    assert all(target.startswith("tdm_finetune.rewards.") for target in table.values())
    assert list(table) == sorted(table)


def test_every_entry_point_resolves_to_a_documented_factory() -> None:
    for name in known():
        factory = registry._points()[name].load()
        assert callable(factory) and factory.__doc__, name


def test_a_mixture_is_the_weighted_sum_of_its_parts(batch) -> None:
    mixture = load_reward("scenes:2.0,jpeg:-1,scenes-strict:0")
    scores = mixture.scores(*batch)
    assert list(scores.parts) == ["scenes", "jpeg", "scenes-strict"]
    torch.testing.assert_close(scores.total, 2 * scores.parts["scenes"] - scores.parts["jpeg"])
    torch.testing.assert_close(mixture(*batch), scores.total)
    torch.testing.assert_close(scores.parts["scenes-strict"], torch.ones(7))


def test_the_same_reward_twice_is_numbered(batch) -> None:
    mixture = load_reward("scenes-likes(threshold=0):1,scenes-likes(threshold=2):1")
    assert [part.label for part in mixture.parts] == ["scenes-likes#1", "scenes-likes#2"]
    scores = mixture.scores(*batch)
    torch.testing.assert_close(scores.parts["scenes-likes#1"], torch.ones(7))
    torch.testing.assert_close(scores.parts["scenes-likes#2"], torch.zeros(7))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        load_reward("scenes,sceens-strict")
    message = str(caught.value)
    assert "'sceens-strict' is unknown (did you mean scenes-strict?)" in message
    assert all(name in message for name in known())


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda **_: ())
    assert known() == []
    with pytest.raises(ConfigError, match=r"no rewards are installed.*pip install -e"):
        load_reward("scenes")


def test_another_package_registers_a_reward(batch, install: Callable[[str], None]) -> None:
    install("""
        def brightness(scale: float = 1.0):
            return lambda images, prompts, metadata: images.float().mean((1, 2, 3)) * scale
    """)
    assert "brightness" in known()
    torch.testing.assert_close(load_reward("brightness(scale=2):0.5")(*batch), batch.images.float().mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("import scipy.nothing\ndef broken(): ...", MissingExtra, r"tdm-serve\[finetune\]"),
        ("import nosuchpackage\ndef broken(): ...", ConfigError, "nosuchpackage"),
        ("from math import nothing\ndef broken(): ...", ConfigError, "does not import"),
        ("def broken(): return 5", ConfigError, "made a int; a factory must return a callable"),
    ],
)
def test_entry_points_that_do_not_work(
    install: Callable[[str], None], source: str, error: type[Exception], said: str
) -> None:
    install(source)
    with pytest.raises(error, match=said):
        load_reward("broken")


BAD_SCORES = """
def listed():
    return lambda images, prompts, metadata: [1.0] * len(prompts)

def short():
    return lambda images, prompts, metadata: torch.ones(len(prompts) - 1)

def column():
    return lambda images, prompts, metadata: torch.ones(len(prompts), 1)

def whole():
    return lambda images, prompts, metadata: torch.ones(len(prompts), dtype=torch.int64)

def nan():
    return lambda images, prompts, metadata: torch.tensor([1.0, 2.0, float("nan"), 0.0, 0.0, 0.0, 0.0])

def infinite():
    return lambda images, prompts, metadata: torch.full((len(prompts),), float("inf"))

def raising():
    def reward(images, prompts, metadata):
        raise KeyError("the reward's own")
    return reward
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("listed", "'listed' returned a list for samples 0 to 6"),
        ("short", "'short' returned shape (6,) for samples 0 to 6"),
        ("column", "'column' returned shape (7, 1)"),
        ("whole", "'whole' returned torch.int64"),
        ("nan", "'nan' returned nan for sample 2 ("),
        ("infinite", "'infinite' returned inf for sample 0 ("),
        ("raising", "'raising' failed on samples 0 to 6"),
    ],
)
def test_what_is_no_score(batch, install: Callable[[str], None], name: str, said: str) -> None:
    install(BAD_SCORES)
    with pytest.raises(RewardError) as caught:
        load_reward(f"scenes,{name}")(*batch)
    assert said in str(caught.value)
    if name == "nan":
        assert repr(batch.prompts[2]) in str(caught.value)
    if name == "raising":
        assert isinstance(caught.value.__cause__, KeyError) and "the reward's own" in str(caught.value)


def test_a_batch_that_is_none(batch) -> None:
    reward = load_reward("jpeg")
    with pytest.raises(ValueError, match="rewards take uint8"):
        reward(batch.images.float(), batch.prompts, batch.metadata)
    with pytest.raises(ValueError, match="on meta; rewards take uint8"):
        reward(batch.images.to("meta"), batch.prompts, batch.metadata)
    with pytest.raises(ValueError, match="7 images, 6 prompts"):
        reward(batch.images, batch.prompts[1:], batch.metadata)
    with pytest.raises(ValueError, match="0 images"):
        reward(batch.images[:0], [], [])
