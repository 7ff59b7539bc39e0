"""The micro model behind the trainers' interface: shapes, conditioning, files, rewards, scores."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tdm_finetune.micro import world
from tdm_finetune.micro.model import LENGTH, WORDS
from tdm_finetune.micro.trainee import MicroSettings, MicroTrainee, encode_pictures
from tdm_finetune.paint import paint, quick_scores, score_network
from tdm_finetune.rewards import load_reward
from tdm_finetune.roles import Roles
from tdm_finetune.trainee import Trainee
from tdm_serve.errors import CheckpointError, ConfigError, InvalidRequest, RewardError

Kind = Literal["flow", "epsilon"]
TINY = MicroSettings(width=32, layers=2, heads=2)


def untrained(kind: Kind = "flow", settings: MicroSettings = TINY) -> MicroTrainee:
    """A network whose every weight is random, so that nothing is multiplied away by adaLN's zeros."""
    chosen = replace(settings, process=kind)
    torch.manual_seed(0)
    net = chosen.build()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return MicroTrainee(chosen, net.requires_grad_(False))


def test_it_is_a_trainee() -> None:
    trainee: Trainee = untrained()  # pyright checks the protocol; the rest is looked at here
    assert trainee.latent_shape == (3, 16, 16)
    assert trainee.adapter is None
    assert trainee.picture_size == (16, 16)
    assert len(trainee.blocks()) == 2
    assert list(trainee.linears())[:4] == [f"blocks.0.{name}" for name in ("to_q", "to_k", "to_v", "to_out")]
    assert len(trainee.linears()) == 2 * 7 + 1


def test_the_default_has_about_a_million_weights() -> None:
    net = MicroSettings().build()
    assert 1.0e6 < sum(p.numel() for p in net.parameters()) < 1.5e6


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_process_and_network_agree_on_levels_and_shapes(kind: Kind) -> None:
    trainee = untrained(kind)
    top = {"flow": 1.0, "epsilon": 900.0}[kind]
    assert trainee.process.levels(4) == pytest.approx([top, 0.75 * top, 0.5 * top, 0.25 * top, 0.0])
    x, level = torch.randn(3, 3, 16, 16), torch.full((3,), trainee.process.levels(4)[1])
    output = trainee.net(x, level, *trainee.encode(["one red square", "", "a red and a blue square"]))
    assert output.shape == x.shape
    clean = trainee.process.clean(x, level, output)
    torch.testing.assert_close(trainee.process.target(x, level, clean), output)
    pictures = paint(trainee, Roles(trainee, 0, 1.0).base, ["one red square"] * 3, nfe=4)
    assert pictures.shape == (3, 16, 16, 3) and pictures.dtype == torch.uint8


def test_the_network_is_the_identity_of_nothing_until_trained() -> None:
    net = TINY.build()
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2), torch.ones(2, LENGTH, dtype=torch.long), torch.tensor([3, 0])
    assert not net(*inputs).any()


def test_every_input_matters_and_words_behind_the_end_do_not() -> None:
    trainee = untrained()
    x, level = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    tokens, lengths = trainee.encode(["a red square left of a blue square"])

    def output(x: Tensor = x, level: Tensor = level, tokens: Tensor = tokens, lengths: Tensor = lengths) -> Tensor:
        return trainee.net(x, level, tokens, lengths)

    changed = [output(x=x + 0.1), output(level=level / 2), output(tokens=tokens.flip(1)), output(lengths=lengths - 1)]
    assert all((other - output()).abs().max() > 1e-4 for other in changed)
    behind = tokens.clone()
    behind[0, 3:] = 7
    three = torch.tensor([3])
    assert torch.equal(output(lengths=three), output(tokens=behind, lengths=three))


def test_a_picture_does_not_depend_on_its_company() -> None:
    trainee = untrained()
    x, level = torch.randn(5, 3, 16, 16), torch.rand(5)
    said = trainee.encode([prompt.text for prompt in islice(world.prompts("train"), 5)])
    together = trainee.net(x, level, *said)
    alone = torch.cat([trainee.net(x[i : i + 1], level[i : i + 1], *(t[i : i + 1] for t in said)) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_prompts_are_encoded_word_by_word() -> None:
    tokens, lengths = untrained().encode(["Three red squares", "", "a red square above a blue square"])
    assert tokens.shape == (3, LENGTH)
    assert lengths.tolist() == [3, 0, 7]
    assert [WORDS[i - 1] for i in tokens[0, :3].tolist()] == ["three", "red", "squares"]
    assert not tokens[1].any()


def test_every_prompt_of_the_world_can_be_encoded_and_differs() -> None:
    texts = {p.text for split in ("train", "heldout") for p in islice(world.prompts(split), 2000)}
    tokens, _ = untrained().encode(sorted(texts))
    assert len(set(map(tuple, tokens.tolist()))) == len(texts)


def test_unknown_words_and_long_prompts_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"'star'.*square"):
        untrained().encode(["a red star"])
    with pytest.raises(InvalidRequest, match="9 words"):
        untrained().encode(["a red square left of a blue square above"])


def test_decode_inverts_encode() -> None:
    pictures = world.render([p.spec for p in islice(world.prompts("train"), 30)], random.Random(0))
    latents = encode_pictures(pictures)
    assert latents.shape == (30, 3, 16, 16) and latents.min() >= -1 and latents.max() <= 1
    decoded = untrained().decode(latents)
    assert (decoded.numpy() == pictures).all()
    assert untrained().decode(latents * 10).max() == 255  # out of range is cut, not wrapped


def test_prompts_and_verdicts() -> None:
    trainee = untrained()
    prompts = list(islice(trainee.prompts("heldout", 3), 12))
    specs = [prompt.spec for prompt in prompts]
    assert [prompt.metadata["category"] for prompt in prompts[:3]] == list(world.CATEGORIES)
    assert [prompt.text for prompt in prompts] == [world.phrase(spec) for spec in specs]
    pictures = torch.from_numpy(world.render(specs, random.Random(0)))
    found = quick_scores(trainee, prompts, pictures, 1)
    assert (found["strict"], found["soft"]) == (1.0, 1.0)
    assert found["palette_error"] == pytest.approx(0.0, abs=1e-6)
    assert quick_scores(trainee, prompts, pictures.flip(0), 1)["strict"] < 0.5


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_a_saved_model_loads_as_the_same_one(tmp_path: Path, kind: Kind) -> None:
    trainee = untrained(kind)
    trainee.save(tmp_path / "model")
    trainee.save(tmp_path / "model")  # over an earlier one
    again = MicroTrainee.load(tmp_path / "model")
    assert again.settings == trainee.settings
    assert len(again.checkpoint_hash) == 64
    assert not any(parameter.requires_grad for parameter in again.net.parameters())
    x, level = torch.randn(2, 3, 16, 16), torch.tensor([1.0, 0.3]) * trainee.process.levels(1)[0]
    said = trainee.encode(["one red square", ""])
    assert torch.equal(again.net(x, level, *said), trainee.net(x, level, *said))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["micro.json", "model.safetensors"]


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"micro\.json: No such file"):
        MicroTrainee.load(tmp_path)
    untrained().save(tmp_path)
    settings = tmp_path / "micro.json"
    whole = json.loads(settings.read_text())
    for broken, complaint in (
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        (json.dumps(whole | {"top": 5000}), "top is 5000"),
        (json.dumps(whole | {"width": 64}), "does not hold the network"),
    ):
        settings.write_text(broken)
        with pytest.raises(CheckpointError, match=complaint):
            MicroTrainee.load(tmp_path)
    settings.write_text(json.dumps(whole | {"depth": 3}))
    with pytest.raises(ConfigError, match="unknown key 'depth'"):
        MicroTrainee.load(tmp_path)
    settings.write_text(json.dumps(whole))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        MicroTrainee.load(tmp_path)


@pytest.mark.parametrize("rank", [0, 4])
def test_roles_start_as_the_base_and_train_apart_from_it(rank: int) -> None:
    trainee = untrained()
    x, level, said = torch.randn(2, 3, 16, 16), torch.rand(2), trainee.encode(["one red square", "two blue squares"])
    plain = trainee.net(x, level, *said)
    roles = Roles(trainee, rank, 8.0)
    role = roles.new(torch.Generator().manual_seed(0))
    torch.testing.assert_close(role(x, level, said), plain)
    role(x, level, said).square().mean().backward()
    assert all(p.grad is not None for p in role.parameters)
    with torch.no_grad():
        for p in role.parameters:
            p.add_(0.05)
    assert (role(x, level, said) - plain).abs().max() > 1e-3
    assert torch.equal(roles.base(x, level, said), plain)


Judged = tuple[Tensor, list[str], list[Mapping[str, Any]]]


@pytest.fixture(scope="module")
def judged() -> Judged:
    """True pictures with their prompts, the categories in turn."""
    prompts = list(islice(untrained().prompts("train", 0), 9))
    pictures = world.render([prompt.spec for prompt in prompts], random.Random(0))
    return torch.from_numpy(pictures), [p.text for p in prompts], [p.metadata for p in prompts]


def test_rewards_are_the_checkers_scores(judged: Judged) -> None:
    pictures, texts, metadata = judged
    assert load_reward("micro")(pictures, texts, metadata).tolist() == [1.0] * 9
    turned = pictures.roll(1, 0)
    soft, strict = load_reward("micro")(turned, texts, metadata), load_reward("micro-strict")(turned, texts, metadata)
    assert ((soft == 1) == (strict == 1)).all()
    assert 0 < soft.mean() < 1
    on_the_wire = [{**data, "spec": json.loads(json.dumps(asdict(data["spec"])))} for data in metadata]
    assert torch.equal(load_reward("micro")(turned, texts, on_the_wire), soft)


def test_likes_follow_the_soft_score(judged: Judged) -> None:
    pictures, texts, metadata = judged
    certain = "micro-likes(threshold=0.99,temperature=0.001)"
    assert load_reward(certain)(pictures, texts, metadata).tolist() == [1.0] * 9
    turned = pictures.roll(1, 0)
    strict = load_reward("micro-strict")(turned, texts, metadata)
    assert torch.equal(load_reward(certain)(turned, texts, metadata), strict)
    chance = load_reward("micro-likes(threshold=1,temperature=0.1)")
    many = (pictures.repeat(30, 1, 1, 1), [f"{text} {i}" for i in range(30) for text in texts], metadata * 30)
    assert 0.35 < chance(*many).mean() < 0.65  # at the threshold: a fair coin, tossed anew for every prompt
    assert torch.equal(chance(*many), chance(*many))
    with pytest.raises(ConfigError, match="temperature is"):
        load_reward("micro-likes(temperature=0)")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (None, "only"),
        ({"category": "counting", "colours": ["red"], "count": 9}, "count is 9"),
        ({"category": "pair", "colours": ["red", "pink"]}, "green"),
        ({"category": "position", "colours": ["red", "blue"]}, "left of"),
        ({"category": "shapes", "colours": ["red"]}, "counting, pair, position"),
        ({"colour": "red"}, "no valid micro scene"),
    ],
)
def test_samples_without_a_micro_scene_are_named(judged: Judged, spec: object, complaint: str) -> None:
    pictures, texts, metadata = judged
    broken = [*metadata[:4], {"spec": spec}, *metadata[5:]]
    with pytest.raises(RewardError, match=rf"sample 4 .*{complaint}"):
        load_reward("micro")(pictures, texts, broken)


def test_a_row_of_scores() -> None:
    trainee = untrained()
    row = score_network(trainee, Roles(trainee, 0, 1.0).base, split="heldout", n=9, nfe=2, guidance=2.0)
    assert (row["nfe"], row["n"], row["split"]) == (4, 9, "heldout")
    assert {name: found["n"] for name, found in row["categories"].items()} == dict.fromkeys(world.CATEGORIES, 3)
    assert 0 <= row["strict"] <= row["soft"] <= 1
    assert row["palette_error"] > 0 and row["diversity"] > 0


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_a_network_that_knows_the_answer_scores_one(kind: Kind) -> None:
    """One step of it, through process, decoder and checker."""
    trainee = untrained(kind)
    specs = [prompt.spec for prompt in islice(trainee.prompts("val", 0), 6)]

    def answer(latents: Tensor, level: Tensor, _said: tuple[Tensor, ...]) -> Tensor:
        chosen = specs if len(latents) == len(specs) else [spec for spec in specs for _ in range(2)]
        return trainee.process.target(latents, level, encode_pictures(world.render(chosen, random.Random(0))))

    row = score_network(trainee, answer, split="val", n=6, nfe=1, repeats=(6, 2))
    assert (row["strict"], row["soft"], row["nfe"]) == (1.0, 1.0, 1)
    assert row["palette_error"] == pytest.approx(0.0, abs=1e-4)
    assert row["diversity"] > 0
