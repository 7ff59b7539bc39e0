"""Tiny diffusers folders of every family: the real classes with random weights, and tokenizers that really split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'!-"


def randomised(module: Any, seed: int, std: float = 0.15) -> Any:
    """Every weight drawn anew, so that none is zero and nothing cancels; norms stay near one."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        spread = torch.randn_like(parameter) * std
        parameter.data = 1 + spread if "norm" in name and name.endswith("weight") else spread
    return module.eval().requires_grad_(False)


def clip_tokenizer(pad: str = "<|endoftext|>", length: int = 24) -> CLIPTokenizer:
    """Letters and their word-final forms with a few merges, as CLIP's own but small."""
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "re", "red</w>", "st", "ar</w>", "star</w>"]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("r", "e"), ("re", "d</w>"), ("s", "t"), ("a", "r</w>"), ("st", "ar</w>")]
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=length)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram pieces with `</s>` at the end, as T5's."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    inner = Tokenizer(models.Unigram([*pieces, ("▁a", -1.0), ("▁red", -1.0), ("▁star", -1.0)], unk_id=2))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=64
    )


def clip_encoder(width: int, seed: int, kind: Any = CLIPTextModelWithProjection, act: str = "quick_gelu") -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=24,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomised(kind(config), seed)


def t5_encoder(width: int, seed: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return randomised(T5EncoderModel(config), seed)


def autoencoder(channels: int, scale: float, shift: float | None, quant: bool) -> AutoencoderKL:
    config: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        "latent_channels": channels,
        "layers_per_block": 1,
        "scaling_factor": scale,
        "shift_factor": shift,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
    }
    return randomised(AutoencoderKL(**config), 3)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter, and a chat template with a beginning and an end, as Qwen's."""
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", " ", *LETTERS]
    inner = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, "<|endoftext|>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    turn = "<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>"
    tokenizer.chat_template = "{% for message in messages %}" + turn + "{% endfor %}<|im_start|>me "
    return tokenizer


def zimage(folder: Path) -> Path:
    """Z-Image's kind: one stream, Qwen3 for text, 16 latent channels."""
    tokenizer = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 32, 32],
    )
    encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
    )
    ZImagePipeline(
        transformer=randomised(transformer, 0, 0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, 0.3611, 0.1159, quant=False),
        text_encoder=randomised(Qwen3Model(encoder), 1),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


def sd3(folder: Path, *, t5: bool = True, dual: bool = True) -> Path:
    """SD3.5's kind where `dual`, else SD3's; without T5 its parts are null in `model_index.json`."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    StableDiffusion3Pipeline(
        transformer=randomised(transformer, 0),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, final_sigmas_type="zero"
        ),
        vae=autoencoder(16, 1.5305, 0.0609, quant=False),
        text_encoder=clip_encoder(16, 1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(24, 2, act="gelu"),
        tokenizer_2=clip_tokenizer(pad="!"),
        text_encoder_3=t5_encoder(48, 4) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    ).save_pretrained(folder)
    return folder


def sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5's kind: a UNet that predicts the noise, CLIP-L, four latent channels."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    StableDiffusionPipeline(
        unet=randomised(unet, 0, 0.05),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", final_sigmas_type="zero"
        ),
        vae=autoencoder(4, 0.18215, None, quant=True),
        text_encoder=clip_encoder(16, 1, CLIPTextModel),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def pixart(folder: Path, sample_size: int = 64) -> Path:
    """PixArt-alpha's kind; a `sample_size` of 128 is its 1024 pixels."""
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
    )
    PixArtAlphaPipeline(
        transformer=randomised(transformer, 0, 0.1),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, final_sigmas_type="zero"),
        vae=autoencoder(4, 0.18215, None, quant=True),
        text_encoder=t5_encoder(16, 1),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder
