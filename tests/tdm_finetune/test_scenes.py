"""The synthetic world: deterministic prompts, a real split, and a checker that is right on true and wrong pictures."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from scipy import ndimage

from tdm_finetune import scenes
from tdm_finetune.scenes import CATEGORIES, COLOURS, SHAPES, SPLITS, Category, ScenePrompt, Spec, Split, Thing
from tdm_finetune.scenes.check import edit_distance
from tdm_finetune.scenes.world import LETTERS, OPPOSITE, RELATIONS, is_held_out

SEED = 20240


def drawn(split: Split, category: Category, n: int) -> list[ScenePrompt]:
    return list(islice(scenes.prompts(split, category, SEED), n))


def wrong(spec: Spec, rng: random.Random) -> Spec:
    """Another specification of the same category that no true picture of `spec` satisfies."""
    match spec.category:
        case "counting":
            return replace(spec, count=rng.choice([c for c in range(1, 5) if c != spec.count]))
        case "position":
            assert spec.relation is not None
            return replace(spec, relation=OPPOSITE[spec.relation] if rng.random() < 0.5 else _across(spec.relation))
        case "text":
            assert spec.word is not None
            if rng.random() < 0.5:
                return replace(spec, colour=rng.choice([c for c in COLOURS if c != spec.colour]))
            place = rng.randrange(len(spec.word))
            letter = rng.choice([x for x in LETTERS if x != spec.word[place]])
            return replace(spec, word=spec.word[:place] + letter + spec.word[place + 1 :])
        case "attribution" if rng.random() < 0.5:
            first, second = spec.things
            swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
            return replace(spec, things=swapped)
        case _:
            return replace(spec, things=(_other_thing(spec, rng), *spec.things[1:]))


def _across(relation: str) -> str:
    """A relation along the other axis."""
    return "above" if relation in ("left of", "right of") else "left of"


def _other_thing(spec: Spec, rng: random.Random) -> Thing:
    first = spec.things[0]
    if first.colour is not None and rng.random() < 0.5:
        return replace(first, colour=rng.choice([c for c in COLOURS if c != first.colour]))
    named = {thing.shape for thing in spec.things}
    return replace(first, shape=rng.choice([s for s in SHAPES if s not in named]))


@pytest.mark.parametrize("category", CATEGORIES)
def test_true_pictures_pass_and_wrong_ones_do_not(category: Category) -> None:
    rng = random.Random(SEED)
    passed = fooled = 0
    prompts = drawn("train", category, 200) + drawn("heldout", category, 200)
    for prompt in prompts:
        picture = scenes.render(prompt.spec, rng, allow_held_out=True)
        verdict = scenes.check(picture, prompt.spec)
        passed += verdict.strict
        assert (verdict.soft == pytest.approx(1.0)) == bool(verdict.strict)
        against = scenes.check(picture, wrong(prompt.spec, rng))
        fooled += against.strict
        assert 0.0 <= against.soft <= 1.0
    assert passed / len(prompts) >= 0.995
    assert fooled / len(prompts) <= 0.005


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_are_deterministic_and_varied(category: Category) -> None:
    for split in SPLITS:
        assert drawn(split, category, 50) == drawn(split, category, 50)
    assert len({prompt.text for prompt in drawn("train", category, 300)}) > 40


@pytest.mark.parametrize("category", CATEGORIES)
def test_training_never_sees_a_held_out_combination(category: Category) -> None:
    training, held = drawn("train", category, 3000), drawn("heldout", category, 300)
    assert not {prompt.text for prompt in training} & {prompt.text for prompt in held}
    if category != "one_object":  # whose phrasings are held out instead
        assert not any(is_held_out(prompt.spec) for prompt in training)
        assert all(is_held_out(prompt.spec) for prompt in held)


def test_every_word_of_the_world_stays_in_training() -> None:
    specs = [prompt.spec for prompt in islice(scenes.prompts("train", seed=1), 7000)]
    things = [thing for spec in specs for thing in spec.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} >= set(COLOURS)
    assert {spec.relation for spec in specs} >= set(RELATIONS)
    assert {letter for spec in specs for letter in spec.word or ""} == set(LETTERS)


def test_training_pictures_show_no_held_out_pair() -> None:
    """Also where the prompt leaves the colour open."""
    rng = random.Random(3)
    for prompt in islice(scenes.prompts("train", "one_object", 5), 400):
        [seen] = scenes.look(scenes.render(prompt.spec, rng))
        assert seen.name is not None and seen.colour is not None
        assert not is_held_out(Spec("colours", (Thing(seen.name, seen.colour),)))


def test_blur_noise_and_fragments_fail_the_strict_score() -> None:
    rng = random.Random(1)
    spec = Spec("colours", (Thing("star", "red"),))
    picture = scenes.render(spec, rng)
    blurred = ndimage.gaussian_filter(picture.astype(np.float32), (9, 9, 0)).astype(np.uint8)
    extra = picture.copy()
    extra[2:10, 2:10] = COLOURS["blue"]
    cut = picture.copy()
    cut[:, :64] = picture[0, 0]
    cut[:64] = picture[0, 0]
    noise = np.random.default_rng(0).integers(0, 255, picture.shape, dtype=np.uint8)
    blank = np.full_like(picture, 30)
    for damaged in (blurred, extra, noise, blank):
        assert scenes.check(damaged, spec).strict == 0
    assert scenes.check(blank, spec).soft == 0.0


def test_small_damage_is_forgiven() -> None:
    """A VAE's reconstruction error must not fail a right picture."""
    rng, spec = random.Random(1), Spec("text", word="QOR", colour="cyan")
    picture = scenes.render(spec, rng).astype(np.float32)
    softened = ndimage.gaussian_filter(picture, (0.8, 0.8, 0)) + np.random.default_rng(0).normal(0, 6, picture.shape)
    assert scenes.check(softened.clip(0, 255).astype(np.uint8), spec).strict == 1


def test_what_it_saw_is_reported() -> None:
    spec = Spec("position", (Thing("ring", "blue"), Thing("cross", "white")), relation="left of")
    seen = scenes.check(scenes.render(spec, random.Random(0)), spec).seen
    assert [(s.name, s.colour) for s in seen] == [("ring", "blue"), ("cross", "white")]


def test_edit_distance() -> None:
    assert [edit_distance(*pair) for pair in (("", ""), ("CAT", "CAT"), ("CAT", "CT"), ("ABC", "CBA"), ("", "XY"))] == [
        0,
        0,
        1,
        2,
        2,
    ]


def test_bad_names_list_the_allowed() -> None:
    with pytest.raises(ValueError, match="train, val, heldout"):
        next(scenes.prompts("test"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one_object"):
        next(scenes.prompts("train", "colors"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\(64, 64, 3\)"):
        scenes.look(np.zeros((64, 64, 3), dtype=np.uint8))


@pytest.mark.slow
def test_rendering_and_checking_are_no_bottleneck() -> None:
    """Training on two cores handles about a hundred pictures a second; a tenth of that time is allowed here."""
    rng = random.Random(0)
    prompts = list(islice(scenes.prompts("train", seed=2), 1000))
    started = time.process_time()
    pictures = [scenes.render(prompt.spec, rng) for prompt in prompts]
    for picture, prompt in zip(pictures, prompts, strict=True):
        scenes.check(picture, prompt.spec)
    assert (time.process_time() - started) / len(prompts) < 0.005
