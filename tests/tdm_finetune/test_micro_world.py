"""The micro world: deterministic prompts, a real split, and a checker that is exact on whole batches."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from tdm_finetune.micro.check import check, look
from tdm_finetune.micro.world import (
    BACKGROUND,
    CATEGORIES,
    COLOURS,
    SIZE,
    Category,
    Pixels,
    Spec,
    draw,
    is_held_out,
    phrase,
    prompts,
    relation_holds,
    render,
)
from tdm_finetune.scenes.world import OPPOSITE, RELATIONS, SPLITS, Split

EVERY: tuple[Spec, ...] = (
    *(Spec("counting", (colour,), count=n) for colour in COLOURS for n in range(1, 5)),
    *(Spec("pair", (a, b)) for a in COLOURS for b in COLOURS if a != b),
    *(Spec("position", (a, b), relation=r) for a in COLOURS for b in COLOURS if a != b for r in RELATIONS),
)


def drawn(split: Split, category: Category | None, n: int) -> list[Spec]:
    return [prompt.spec for prompt in islice(prompts(split, category, seed=7), n)]


def alike(a: Spec, b: Spec) -> bool:
    """Whether some picture is right for both."""
    same = sorted(a.squares) == sorted(b.squares)
    if not same or a.relation is None or b.relation is None:
        return same
    return a.relation == (b.relation if a.colours == b.colours else OPPOSITE[b.relation])


def test_every_true_picture_passes_and_scores_one() -> None:
    specs = EVERY * 10
    verdicts = check(render(specs, random.Random(0)), specs)
    assert verdicts.strict.min() == 1.0
    assert verdicts.soft == pytest.approx(1.0)


def test_a_true_picture_fails_every_other_specification() -> None:
    pictures = render(EVERY, random.Random(1))
    for picture, spec in list(zip(pictures, EVERY, strict=True))[::3]:
        others = [other for other in EVERY if not alike(spec, other)]
        verdicts = check(np.broadcast_to(picture, (len(others), *picture.shape)), others)
        assert verdicts.strict.max() == 0.0
        assert verdicts.soft.min() >= 0.0 and verdicts.soft.max() < 1.0 - 1e-6


def test_soft_is_one_exactly_where_strict_is_on_damaged_pictures() -> None:
    specs = EVERY * 4
    rng = np.random.default_rng(0)
    pictures = render(specs, random.Random(2))
    spots = rng.random(pictures.shape[:3]) < rng.choice([0.0, 0.02, 0.2], (len(specs), 1, 1))
    colours = rng.choice(np.array([BACKGROUND, *COLOURS.values()], dtype=np.uint8), pictures.shape[:3])
    verdicts = check(np.where(spots[..., None], colours, pictures), specs)
    assert 0.1 < verdicts.strict.mean() < 0.9
    assert ((verdicts.soft > 1 - 1e-9) == (verdicts.strict == 1)).all()


def one(top: int, left: int, height: int = 4, width: int = 4, colour: str = "red") -> Pixels:
    """A picture with a single rectangle."""
    picture = np.empty((1, SIZE, SIZE, 3), dtype=np.uint8)
    picture[:] = BACKGROUND
    picture[0, top : top + height, left : left + width] = COLOURS[colour]
    return picture


@pytest.mark.parametrize(
    ("height", "width", "square"),
    [(4, 4, True), (4, 3, False), (3, 4, False), (5, 4, False), (5, 5, False), (8, 4, False), (2, 8, False)],
)
def test_only_squares_are_squares(height: int, width: int, square: bool) -> None:
    seen = look(one(6, 3, height, width))
    assert seen.square.tolist() == [square]
    verdict = check(one(6, 3, height, width), [Spec("counting", ("red",))])
    assert verdict.strict[0] == float(square)
    assert verdict.soft[0] == (1.0 if square else 0.75)  # count and colour are right, the shape is not


def test_hand_computed_soft_scores() -> None:
    red = one(1, 1)
    specs = [
        Spec("counting", ("red",), count=2),  # count 1/2; half the squares, half the colours
        Spec("counting", ("blue",)),  # count 1; the shape without the colour
        Spec("position", ("red", "blue"), relation="above"),  # count 1/2, half the things, no relation
    ]
    soft = check(np.repeat(red, 3, axis=0), specs).soft
    assert soft == pytest.approx([0.5, 0.75, (0.5 + 0.5 + 0) / 3])
    empty = np.broadcast_to(np.array(BACKGROUND, dtype=np.uint8), (1, SIZE, SIZE, 3))
    assert check(empty, specs[:1]).soft.tolist() == [0.0]


def test_dust_is_forgiven_and_a_fourth_pixel_is_an_object() -> None:
    spec = [Spec("counting", ("red",))]
    for pixels, strict in ((3, 1.0), (4, 0.0)):
        picture = one(1, 1)
        picture[0, 10, 8 : 8 + pixels] = COLOURS["white"]
        assert check(picture, spec).strict.tolist() == [strict]


def test_touching_pictures_of_a_batch_stay_apart() -> None:
    """The same place in neighbouring pictures is no connection."""
    seen = look(np.concatenate([one(1, 1), one(1, 1, colour="blue"), one(1, 1)]))
    assert seen.picture.tolist() == [0, 1, 2]
    assert len(set(seen.colour.tolist())) == 2


def test_noise_and_blur_fail() -> None:
    rng = np.random.default_rng(0)
    specs = EVERY
    noise = rng.integers(0, 256, (len(specs), SIZE, SIZE, 3), dtype=np.uint8)
    assert check(noise, specs).strict.max() == 0.0
    grey = render(specs, random.Random(3)) // 2 + 64  # washed out: no colour is near the palette
    assert check(grey, specs).strict.max() == 0.0


@pytest.mark.parametrize("right", range(-2, 3))
@pytest.mark.parametrize("down", range(-2, 3))
def test_at_most_one_relation_holds_and_the_opposite_swaps(right: int, down: int) -> None:
    holding = [name for name in RELATIONS if relation_holds(name, right, down, 1.0)]
    assert len(holding) == (abs(right) != abs(down))
    for name in holding:
        assert relation_holds(OPPOSITE[name], -right, -down, 1.0)


def test_words_mean_what_they_say() -> None:
    assert [phrase(spec) for spec in (EVERY[0], EVERY[1], Spec("pair", ("red", "blue")))] == [
        "one red square",
        "two red squares",
        "a red and a blue square",
    ]
    spec = Spec("position", ("red", "blue"), relation="left of")
    assert phrase(spec) == "a red square left of a blue square"
    seen = look(render([spec], random.Random(5)))
    x = dict(zip(seen.colour.tolist(), seen.x.tolist(), strict=True))
    assert x[list(COLOURS).index("red")] < x[list(COLOURS).index("blue")]


@pytest.mark.parametrize("category", CATEGORIES)
def test_training_never_asks_for_a_held_out_combination(category: Category) -> None:
    training, held = drawn("train", category, 2000), drawn("heldout", category, 200)
    assert not any(is_held_out(spec) for spec in training)
    assert all(is_held_out(spec) for spec in held)
    ways = {phrase(spec) for spec in EVERY if spec.category == category}
    assert {phrase(spec) for spec in training} | {phrase(spec) for spec in held} == ways
    assert 0.05 < len({phrase(spec) for spec in held}) / len(ways) < 0.2


def test_a_combination_is_held_out_however_it_is_said() -> None:
    for spec in EVERY:
        if spec.category != "counting":
            relation = spec.relation and OPPOSITE[spec.relation]
            assert is_held_out(spec) == is_held_out(replace(spec, colours=spec.colours[::-1], relation=relation))


def test_every_word_stays_in_training() -> None:
    specs = drawn("train", None, 3000)
    assert {colour for spec in specs for colour in spec.colours} == set(COLOURS)
    assert {spec.relation for spec in specs} == {None, *RELATIONS}
    assert {spec.count for spec in specs} == {1, 2, 3, 4}
    assert [spec.category for spec in specs[:6]] == [*CATEGORIES, *CATEGORIES]


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_depend_on_split_and_seed_only(split: Split) -> None:
    first = list(islice(prompts(split, seed=3), 60))
    assert first == list(islice(prompts(split, seed=3), 60))
    assert first != list(islice(prompts(split, seed=4), 60))


def test_rendering_depends_on_its_random_stream_only() -> None:
    assert (render(EVERY, random.Random(1)) == render(EVERY, random.Random(1))).all()
    assert (render(EVERY, random.Random(1)) != render(EVERY, random.Random(2))).any()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (("shapes", ("red",)), "'shapes' is unknown"),
        (("counting", ("red", "blue")), "do not suit counting"),
        (("pair", ("red", "red")), "do not suit pair"),
        (("counting", ("pink",)), "red, green"),
        (("counting", ("red",), 5), "count is 5"),
        (("pair", ("red", "blue"), 2), "count is 2"),
        (("pair", ("red", "blue"), 1, "above"), "'above' does not suit pair"),
        (("position", ("red", "blue")), "None does not suit position"),
    ],
)
def test_impossible_specifications_are_refused(values: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Spec(*values)


def test_bad_arguments_name_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="train, val, heldout"):
        next(prompts("test"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="counting, pair, position"):
        next(prompts("train", "colours"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 3\)"):
        look(np.zeros((1, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="2 pictures and 1 spec"):
        check(np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8), EVERY[:1])


def test_drawing_gives_the_category_that_is_asked_for() -> None:
    rng = random.Random(0)
    for category in CATEGORIES:
        assert draw(category, "train", rng).category == category


def test_checking_hundreds_takes_milliseconds() -> None:
    specs = EVERY * 2
    pictures = render(specs, random.Random(0))
    check(pictures, specs)
    started = time.process_time()
    check(pictures, specs)
    assert time.process_time() - started < 0.1  # about 10 ms for 348 pictures
