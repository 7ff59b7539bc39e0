"""Rewards from published models, with random tiny ones of the same classes: formulas by hand, and what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tdm_finetune.rewards import load_reward
from tdm_finetune.rewards.aesthetic import predictor
from tdm_finetune.rewards.hpsv2 import fitted
from tdm_finetune.rewards.hub import CLIP_MEAN, CLIP_STD, device_of, pixels
from tdm_serve.errors import ConfigError

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "two dogs", "a red cat", "x" * 500]


@pytest.fixture
def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 40, 30, 3), dtype=np.uint8))


def cosines(folder: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of pictures with their prompts and the scale, by CLIPModel's own forward."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels(images, 28, CPU))
    return output.logits_per_image.diagonal() / model.logit_scale.exp(), model.logit_scale.exp().detach()


def test_clip_and_pickscore_by_hand(tiny_clip: Path, images: Tensor) -> None:
    wanted, scale = cosines(tiny_clip, images)
    assert wanted.std() > 0.01  # or the test would be blind
    batch = (images, PROMPTS, [{}] * 4)
    clip = load_reward(f"clip(model={tiny_clip},device=cpu)")(*batch)
    torch.testing.assert_close(clip, wanted * scale / 30)
    pick = load_reward(f"pickscore(model={tiny_clip},tokenizer={tiny_clip},device=cpu)")(*batch)
    torch.testing.assert_close(pick, wanted * scale / 26)


def test_scores_do_not_depend_on_the_company(tiny_clip: Path, images: Tensor) -> None:
    reward = load_reward(f"clip(model={tiny_clip})")
    together = reward(images, PROMPTS, [{}] * 4)
    for i in range(4):
        torch.testing.assert_close(reward(images[i : i + 1], PROMPTS[i : i + 1], [{}]), together[i : i + 1])


def test_aesthetic_by_hand(tiny_clip: Path, images: Tensor, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import CLIPModel

    torch.manual_seed(1)
    head = predictor(8)
    state = {f"layers.{name}": value for name, value in head.state_dict().items()}
    assert sorted({name.split(".")[1] for name in state}) == ["0", "2", "4", "6", "7"]  # as in the published file
    torch.save(state, tmp_path / "head.pth")
    save_file(state | {"vision_model.other": torch.zeros(1)}, tmp_path / "model.safetensors")
    tower = CLIPModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        seen = tower.get_image_features(pixels(images, 28, CPU)).pooler_output
        wanted = head.eval()(F.normalize(seen, dim=-1))[:, 0]
    for where in (tmp_path / "head.pth", tmp_path):  # LAION's file; a folder with model.safetensors
        scores = load_reward(f"aesthetic(model={tiny_clip},head={where},device=cpu)")(images, PROMPTS, [{}] * 4)
        torch.testing.assert_close(scores, wanted)


def test_hpsv2_from_a_folder_is_the_cosine_itself(tiny_clip: Path, images: Tensor) -> None:
    square = images[:, :28, :28]  # of the model's own size, so that nothing is resized
    wanted, _ = cosines(tiny_clip, square)
    scores = load_reward(f"hpsv2(model={tiny_clip},tokenizer={tiny_clip},device=cpu)")(square, PROMPTS, [{}] * 4)
    torch.testing.assert_close(scores, wanted)


def test_pictures_are_fitted_into_the_square_with_black_borders() -> None:
    white = torch.full((1, 20, 40, 3), 255, dtype=torch.uint8)
    seen = fitted(white, 28, CPU)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    shown = seen[0] * std + mean
    assert seen.shape == (1, 3, 28, 28)
    torch.testing.assert_close(shown[:, 7:21], torch.ones(3, 14, 28), atol=1e-5, rtol=0)
    torch.testing.assert_close(shown[:, :7], torch.zeros(3, 7, 28), atol=1e-5, rtol=0)


def test_clips_pixels_by_hand(images: Tensor) -> None:
    seen = pixels(images, 15, CPU)
    resized = Image.fromarray(images[0].numpy()).resize((15, 20), Image.Resampling.BICUBIC)
    centre = np.asarray(resized)[2:17]  # 5 rows too many: round(2.5) = 2 from the top
    wanted = (centre / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    torch.testing.assert_close(seen[0], torch.from_numpy(wanted.astype(np.float32)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("clip", "openai/clip-vit-large-patch14"),
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("aesthetic", "openai/clip-vit-large-patch14"),
        ("hpsv2", "xswu/HPSv2"),
        ("imagereward", "THUDM/ImageReward"),
        ("geneval", "facebook/mask2former-swin-small-coco-instance"),
    ],
)
def test_weights_that_are_not_here_say_how_to_get_them(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_reward(name)
    message = str(caught.value)
    assert f"the reward {name!r} cannot load {model!r}" in message
    assert "HF_HUB_OFFLINE is set, so nothing is downloaded" in message and f"hf download {model}" in message


def test_files_that_do_not_fit(tiny_clip: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_clip, half)
    from safetensors.torch import load_file, save_file

    state = load_file(half / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "text_projection" not in k}, half / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"lacks text_projection\.weight"):
        load_reward(f"clip(model={half})")
    torch.save({"layers.0.weight": torch.zeros(3, 3)}, tmp_path / "head.pth")
    with pytest.raises(ConfigError, match="'aesthetic' cannot use"):
        load_reward(f"aesthetic(model={tiny_clip},head={tmp_path / 'head.pth'})")
    torch.save(["no", "table"], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="it is no table of tensors"):
        load_reward(f"aesthetic(model={tiny_clip},head={tmp_path / 'list.pth'})")


def test_a_file_that_would_run_code_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    torch.save({"layers.0.weight": Path("x")}, tmp_path / "head.pth")
    with pytest.raises(ConfigError, match=r"cannot load .*head\.pth"):
        load_reward(f"aesthetic(model={tiny_clip},head={tmp_path / 'head.pth'})")


def test_devices() -> None:
    assert device_of("cpu") == CPU and device_of("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="'gpu' is unknown; choose auto, cpu"):
        device_of("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="finds no GPU"):
            device_of("cuda:0")
