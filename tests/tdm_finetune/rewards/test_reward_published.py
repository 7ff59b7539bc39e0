"""Published weights in transformers' classes: known answers from the published packages themselves.

They come from open_clip 3.3 and from ImageReward 1.5 on transformers 4.44, run once on weights that `waves` makes from
the tensors' names. A name or a shape that is not carried over rightly changes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_finetune.rewards import imagereward
from tdm_finetune.rewards.clip import Clip
from tdm_finetune.rewards.hpsv2 import FILE, from_open_clip, vit_h_14
from tdm_finetune.rewards.hub import weights

Waves = Callable[[str, tuple[int, ...]], Tensor]
CPU = torch.device("cpu")


@pytest.fixture
def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 40, 30, 3), dtype=np.uint8))


def open_clip_state(waves: Waves) -> dict[str, Tensor]:
    """The names and shapes of open_clip's CLIP with 2 layers of width 16 and 12."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 12), "text_projection": (12, 8), "logit_scale": (),
        "visual.class_embedding": (16,), "visual.positional_embedding": (5, 16), "visual.proj": (16, 8),
        "visual.conv1.weight": (16, 3, 14, 14), "token_embedding.weight": (50, 12),
    }  # fmt: skip
    for name, width in (("visual.ln_pre", 16), ("visual.ln_post", 16), ("ln_final", 12)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width in (("visual.transformer", 16), ("transformer", 12)):
        for layer in range(2):
            block = f"{tower}.resblocks.{layer}."
            shapes |= {f"{block}{ln}.{kind}": (width,) for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")}
            shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
            shapes |= {f"{block}attn.out_proj.weight": (width, width), f"{block}attn.out_proj.bias": (width,)}
            shapes |= {f"{block}mlp.c_fc.weight": (4 * width, width), f"{block}mlp.c_fc.bias": (4 * width,)}
            shapes |= {f"{block}mlp.c_proj.weight": (width, 4 * width), f"{block}mlp.c_proj.bias": (width,)}
    return {name: waves(name, shape) for name, shape in shapes.items()}


def tiny_vit() -> object:
    from transformers import CLIPConfig

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    return CLIPConfig(
        vision_config=sizes | {"hidden_size": 16, "intermediate_size": 64, "image_size": 28, "patch_size": 14},
        text_config=sizes
        | {"hidden_size": 12, "intermediate_size": 48, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49},
        projection_dim=8,
    )


def test_open_clip_weights_give_open_clips_answers(waves: Waves, tmp_path: Path) -> None:
    # as the published file: under "state_dict", with the mask that old versions saved
    saved = {"epoch": torch.tensor(1)} | {"state_dict": open_clip_state(waves) | {"attn_mask": torch.zeros(77, 77)}}
    torch.save(saved, tmp_path / FILE)
    model = from_open_clip(weights("hpsv2", str(tmp_path), FILE), tiny_vit(), FILE)
    clip = Clip(model, None, CPU)
    tokens = torch.zeros(2, 77, dtype=torch.long)
    tokens[0, :5], tokens[1, :3] = torch.tensor([48, 1, 2, 3, 49]), torch.tensor([48, 7, 49])
    with torch.no_grad():
        shown = clip.image_features(waves("pixels", (1, 3, 28, 28)))
        read = F.normalize(model.text_projection(model.text_model(input_ids=tokens).pooler_output), dim=-1)
    picture = [0.5091529, 0.3388138, 0.0091253, -0.3248549, -0.5060508, -0.4492431, -0.1811494, 0.1721418]
    texts = [
        [-0.2664515, -0.4550688, -0.4296599, -0.2021754, 0.1203953, 0.3863423, 0.4705864, 0.3335064],
        [0.0962536, -0.2464331, -0.4732184, -0.4774417, -0.2571168, 0.0841343, 0.3858156, 0.5060418],
    ]
    torch.testing.assert_close(shown, torch.tensor([picture]), atol=2e-6, rtol=0)
    torch.testing.assert_close(read, torch.tensor(texts), atol=2e-6, rtol=0)


def test_the_published_hpsv2_has_the_shapes_of_vit_h_14() -> None:
    from transformers import CLIPModel

    with torch.device("meta"):
        model = CLIPModel(vit_h_14())
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441  # as open_clip counts ViT-H-14
    assert model.vision_model.encoder.layers[0].self_attn.head_dim == 80


def image_reward_state(waves: Waves) -> dict[str, Tensor]:
    """The published file's names, with 2 layers of width 16 and 12."""
    eye, text = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{eye}cls_token": (1, 1, 16), f"{eye}pos_embed": (1, 5, 16),
        f"{eye}patch_embed.proj.weight": (16, 3, 16, 16), f"{eye}patch_embed.proj.bias": (16,),
        f"{text}embeddings.word_embeddings.weight": (50, 12), f"{text}embeddings.position_embeddings.weight": (64, 12),
        "blip.vision_proj.weight": (8, 16), "blip.vision_proj.bias": (8,),
        "blip.text_proj.weight": (8, 12), "blip.text_proj.bias": (8,),
    }  # fmt: skip

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    norm(f"{eye}norm", 16)
    norm(f"{text}embeddings.LayerNorm", 12)
    for layer in range(2):
        block = f"{eye}blocks.{layer}."
        norm(f"{block}norm1", 16)
        norm(f"{block}norm2", 16)
        for name, outputs, inputs in (
            ("attn.qkv", 48, 16),
            ("attn.proj", 16, 16),
            ("mlp.fc1", 64, 16),
            ("mlp.fc2", 16, 64),
        ):
            linear(block + name, outputs, inputs)
        block = f"{text}encoder.layer.{layer}."
        for name, width in (("attention", 12), ("crossattention", 16)):
            linear(f"{block}{name}.self.query", 12, 12)
            linear(f"{block}{name}.self.key", 12, width)
            linear(f"{block}{name}.self.value", 12, width)
            linear(f"{block}{name}.output.dense", 12, 12)
            norm(f"{block}{name}.output.LayerNorm", 12)
        linear(f"{block}intermediate.dense", 24, 12)
        linear(f"{block}output.dense", 12, 24)
        norm(f"{block}output.LayerNorm", 12)
    for layer, outputs, inputs in ((0, 1024, 12), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        linear(f"mlp.layers.{layer}", outputs, inputs)
    state = {name: waves(name, shape) for name, shape in shapes.items()}
    state |= {name: torch.zeros_like(v) for name, v in state.items() if name.startswith("mlp") and v.dim() == 1}
    return state | {f"{text}embeddings.position_ids": torch.arange(64)[None]}


def tiny_blip() -> tuple[object, object]:
    from transformers import BlipTextConfig, BlipVisionConfig

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = BlipVisionConfig(
        hidden_size=16, intermediate_size=64, image_size=32, patch_size=16, layer_norm_eps=1e-6, **sizes
    )
    text = BlipTextConfig(
        hidden_size=12, encoder_hidden_size=16, intermediate_size=24, vocab_size=50, max_position_embeddings=64,
        is_decoder=True, bos_token_id=1, sep_token_id=3, **sizes,
    )  # fmt: skip
    return vision, text


def test_image_reward_weights_give_image_rewards_answers(waves: Waves, tmp_path: Path) -> None:
    torch.save(image_reward_state(waves), tmp_path / imagereward.FILE)
    state = weights("imagereward", str(tmp_path / imagereward.FILE), imagereward.FILE)
    model = imagereward.from_published(state, *tiny_blip(), where="the file").eval()
    tokens = torch.tensor([[2, 5, 6, 3, 0], [2, 7, 3, 0, 0]])
    with torch.no_grad():
        scores = model(waves("pixels", (2, 3, 32, 32)), tokens, (tokens > 0).long())
    torch.testing.assert_close(scores, torch.tensor([-0.1870582, -0.1869204]), atol=1e-6, rtol=0)


def test_image_reward_reads_pictures_and_prompts(waves: Waves, tmp_path: Path, images: Tensor) -> None:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "two", "dogs"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    model = imagereward.from_published(image_reward_state(waves), *tiny_blip(), where="the file").eval()
    reward = imagereward.scored(model, tokenizer, CPU)
    with torch.no_grad():
        same = reward(images[[0, 0, 1]], ["a red cat", "two dogs", "a red cat"], [{}] * 3)
        alone = reward(images[:1], ["a red cat"], [{}])
    assert same.shape == (3,) and len({round(value, 7) for value in same.tolist()}) == 3
    torch.testing.assert_close(alone, same[:1])


def test_the_published_image_reward_fits_the_published_sizes() -> None:
    with torch.device("meta"):
        model = imagereward.ImageReward(*imagereward.blip_large())
    names = model.state_dict()
    assert names["vision.embeddings.position_embedding"].shape == (1, 197, 1024)
    assert names["text.encoder.layer.11.crossattention.self.key.weight"].shape == (768, 1024)
    assert names["head.0.weight"].shape == (1024, 768)
