"""GenEval's formulas by hand, the published quirks included, over made-up objects, scenes and a tiny Mask2Former."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tdm_finetune.rewards import load_reward
from tdm_finetune.rewards.detectors import Found, Segmenter, clip_colours, cut_out, mask2former, own_colours
from tdm_finetune.rewards.geneval import grouped, relations, reward_from
from tdm_serve.errors import RewardError

PICTURE = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)


def thing(name: str, colour: str | None = None, x: float = 0, y: float = 0, score: float = 0.95) -> Found:
    """An object of 10 x 10 pixels with its centre at x, y."""
    return Found(name, score, (x - 5, y - 5, x + 5, y + 5), colour=colour)


def scored(found: Sequence[Found], metadata: dict[str, Any], score: Any) -> float:
    reward = reward_from(lambda _: found, own_colours, score)
    return reward(PICTURE, [""], [metadata]).item()


TWO = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}], "tag": "two_object"}
COUNT = {
    "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}], "tag": "counting",
}  # fmt: skip
COLOUR = {"include": [{"class": "cat", "count": 1, "color": "red"}], "tag": "colors"}
PLACE = {
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "tag": "position",
}
BOTH = {
    "include": [
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "color": "blue", "position": ["above", 0]},
    ],
    "tag": "position",
}
CAT, DOG = thing("cat", x=40), thing("dog", x=10)


@pytest.mark.parametrize(
    ("found", "metadata", "dense", "strict", "official"),
    [
        ([CAT, DOG], TWO, 1.0, 1, 1),
        ([CAT], TWO, 0.5, 0, 0),
        ([CAT, CAT, DOG], TWO, 0.5, 0, 1),  # one cat too many: (1 - 1/1 + 1) / 2; the benchmark allows more
        ([CAT] * 4 + [DOG], TWO, -0.5, 0, 1),  # (1 - 3/1 + 1) / 2: below 0 beyond twice the count
        ([], TWO, 0.0, 0, 0),
        ([CAT, CAT], COUNT, 1.0, 1, 1),
        ([CAT], COUNT, 0.5, 0, 0),
        ([CAT] * 3, COUNT, 0.5, 0, 0),  # excluded from three on
        ([thing("cat", score=0.8), CAT], COUNT, 0.5, 0, 0),  # counting needs more than 0.9
        ([thing("cat", "red")], COLOUR, 1.0, 1, 1),
        ([thing("cat", "blue")], COLOUR, 0.5, 0, 0),
        ([], COLOUR, 0.0, 0, 0),  # 0 for the count, another 0 for the colour
        ([thing("cat", "blue", score=0.9), thing("cat", "red", score=0.8)], COLOUR, 0.0, 0, 0),  # the surest is blue
        ([thing("cat", "red", score=0.9), thing("cat", "blue", score=0.8)], COLOUR, 0.0, 0, 1),
        ([CAT, DOG], PLACE, 1.0, 1, 1),  # 1, 1 and 1 for the place
        ([CAT, thing("dog", x=60)], PLACE, 0.75, 0, 0),  # the quirk: 1, 1, and both 0 and 1 for the violated place
        ([DOG], PLACE, 0.0 + 1 / 3, 0, 0),  # 0 for the cat, 1 for the dog, 0 for the place without a target
        ([CAT], PLACE, 1 / 3, 0, 0),  # 1 for the cat, 0 for the dog, 0 more because it asks for a place
        ([thing("cat", "red", y=40), thing("dog", "blue", y=10)], BOTH, 1.0, 1, 1),
        ([thing("cat", "red", y=10), thing("dog", "blue", y=40)], BOTH, 5 / 6, 0, 0),
        ([thing("cat", "red", y=40), thing("dog", "pink", y=10)], BOTH, 0.75, 0, 0),  # place not looked at: 1, 1, 1, 0
        ([thing("cat", "pink", y=40), thing("dog", "blue", y=10)], BOTH, 0.6, 0, 0),  # 1, 0, 1, 1, 0
    ],
)
def test_by_hand(found: list[Found], metadata: dict[str, Any], dense: float, strict: int, official: int) -> None:
    assert scored(found, metadata, "dense") == pytest.approx(dense)
    assert scored(found, metadata, "strict") == strict
    assert scored(found, metadata, "official") == official


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((40, 0), (0, 0), {"right of"}),
        ((0, 0), (40, 3), {"left of"}),
        ((0, 40), (0, 0), {"below"}),
        ((0, 0), (0, 40), {"above"}),
        ((40, 40), (0, 0), {"right of", "below"}),
        ((1.5, 0), (0, 0), set()),  # within a tenth of 10 + 10 pixels
        ((0, 0), (0, 0), set()),
        ((5, 40), (0, 0), {"below"}),
    ],
)
def test_relations(a: tuple[float, float], b: tuple[float, float], expected: set[str]) -> None:
    assert relations(thing("a", x=a[0], y=a[1]), thing("b", x=b[0], y=b[1])) == expected


def test_groups_are_cut_at_threshold_and_size() -> None:
    found = [thing("cat", score=i / 20) for i in range(21)]
    groups = grouped(found, 0.3)
    assert [item.score for item in groups["cat"]] == [i / 20 for i in range(20, 6, -1)]
    assert len(grouped([thing("cat")] * 30, 0.3)["cat"]) == 16


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "neither 'include' nor 'spec', only nothing"),
        ({"include": []}, "'include' is empty"),
        ({"include": [{"count": 1}]}, "KeyError: 'class'"),
        ({"include": [{"class": "cat", "count": 0}]}, "clause 0 has count 0"),
        ({"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "clause 0 has position"),
        ({"include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["near", 0]}]}, "'near'"),
    ],
)
def test_metadata_that_is_not_genevals(metadata: dict[str, Any], said: str) -> None:
    reward = load_reward("geneval(detector=scenes)")
    with pytest.raises(RewardError, match=r"'geneval' cannot judge sample 0 \('a prompt'\)") as caught:
        reward(torch.zeros(1, 128, 128, 3, dtype=torch.uint8), ["a prompt"], [metadata])
    assert said in str(caught.value)


@pytest.mark.parametrize("score", ["dense", "strict", "official"])
@pytest.mark.parametrize("category", ["one_object", "two_objects", "counting", "colours", "position", "attribution"])
def test_true_scenes_score_one_and_others_less(scenes_of, category: str, score: str) -> None:
    batch = scenes_of(12, category)
    reward = load_reward(f"geneval(detector=scenes,score={score})")
    assert reward(*batch).tolist() == [1.0] * 12
    shifted = batch.metadata[1:] + batch.metadata[:1]
    assert reward(batch.images, batch.prompts, shifted).mean() < 0.8


def test_scenes_with_words_have_no_clause(scenes_of) -> None:
    with pytest.raises(RewardError, match="GenEval has no clause for words"):
        load_reward("geneval(detector=scenes)")(*scenes_of(1, "text"))


@pytest.fixture(scope="module")
def tiny_mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    swin = SwinConfig(
        image_size=64, embed_dim=8, window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"], **stages
    )
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5,
        id2label={0: "cat", 1: "Keyboard", 2: "sofa"},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_mask2former_finds_objects_of_the_pictures_size(tiny_mask2former: Path) -> None:
    detector = mask2former(str(tiny_mask2former), "cpu")
    assert isinstance(detector, Segmenter) and detector.names == ["cat", "computer keyboard", "couch"]
    detector.short, detector.long = 64, 96
    found = detector(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    assert found and len(found) <= 15  # 5 queries and 3 classes
    for item in found:
        assert 0 <= item.score <= 1 and item.mask is not None and item.mask.shape == (40, 70)
        left, top, right, bottom = item.box
        assert 0 <= left < right <= 70 and 0 <= top < bottom <= 40


def test_objects_from_logits_by_hand(tiny_mask2former: Path) -> None:
    segmenter = mask2former(str(tiny_mask2former), "cpu")
    assert isinstance(segmenter, Segmenter)
    classes = torch.tensor([[10.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 10.0]])  # a cat, and nothing
    masks = torch.full((2, 8, 8), -4.0)
    masks[0, 2:5, 1:7] = 2.0
    found = segmenter._objects(classes, masks)
    assert [item.name for item in found[:1]] == ["cat"] and len(found) == 3  # the second query's mask is empty
    cat = torch.tensor([10.0, 0.0, 0.0, 0.0]).softmax(0)[0].item()
    assert found[0].score == pytest.approx(cat * torch.sigmoid(torch.tensor(2.0)).item(), rel=1e-5)
    assert found[0].box == (1.0, 2.0, 7.0, 5.0)
    assert found[0].mask is not None and found[0].mask.sum() == 18


def test_the_whole_reward_with_tiny_models(tiny_mask2former: Path, tiny_clip: Path) -> None:
    reward = load_reward(f"geneval(model={tiny_mask2former},colours={tiny_clip},device=cpu)")
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    scores = reward(images, ["a", "b"], [TWO, COLOUR])
    assert scores.shape == (2,) and scores.isfinite().all()


def test_colours_by_clip_are_the_nearest_direction(tiny_clip: Path) -> None:
    namer = clip_colours(str(tiny_clip), "cpu")
    picture = np.random.default_rng(1).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    mask = np.zeros((30, 30), dtype=bool)
    mask[5:20, 5:25] = True
    items = [Found("cat", 0.9, (5, 5, 25, 20), mask), Found("cat", 0.8, (0, 0, 30, 30))]
    named = namer(picture, items)
    assert len(named) == 2 and namer(picture, items[:1]) == named[:1] and namer(picture, []) == []


def test_an_object_is_cut_out_on_grey() -> None:
    picture = np.full((10, 10, 3), 200, dtype=np.uint8)
    mask = np.zeros((10, 10), dtype=bool)
    mask[2:4, 3:6] = True
    cut = cut_out(picture, Found("cat", 1.0, (3, 1, 6, 4), mask))
    assert cut.shape == (3, 3, 3)
    assert (cut[0] == 153).all() and (cut[1:] == 200).all()
    assert cut_out(picture, Found("cat", 1.0, (4, 4, 4, 4))).shape == (1, 1, 3)
