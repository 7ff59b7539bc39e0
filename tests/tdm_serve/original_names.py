"""diffusers' weights under the names of original checkpoints: what its converters for single files read."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]

UNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_PARTS = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def zimage(state: State) -> dict[str, Tensor]:
    """Z-Image's: one matrix for query, key and value."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".to_q." in key:
            parts = [state[key.replace("to_q", name)] for name in ("to_q", "to_k", "to_v")]
            out[key.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".to_k." not in key and ".to_v." not in key:
            renamed = key.replace("to_out.0", "out").replace("norm_q", "q_norm").replace("norm_k", "k_norm")
            renamed = renamed.replace("all_final_layer.2-1", "final_layer").replace("all_x_embedder.2-1", "x_embedder")
            out[renamed] = value
    return {f"model.diffusion_model.{key}": value for key, value in out.items()}


def unet(state: State, layers: int) -> dict[str, Tensor]:
    """SD1.5's, of blocks with `layers` layers each; up blocks have one more."""
    return {f"model.diffusion_model.{_unet_key(key, layers + 1)}": value.clone() for key, value in state.items()}


def _unet_key(key: str, stride: int) -> str:
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return theirs + _inner(key.removeprefix(ours), UNET_PARTS if "resnets" in ours else {})
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+?)s\.(\d+)(\..+)", key)
    assert found is not None, key
    way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsampler":
        return f"input_blocks.{(block + 1) * stride}.0.op{rest.removeprefix('.conv')}"
    if kind == "upsampler":
        return f"output_blocks.{block * stride + stride - 1}.1{rest}"  # of a block without attention
    place = block * stride + layer + (1 if way == "down" else 0)
    where = f"{'input' if way == 'down' else 'output'}_blocks.{place}.{0 if kind == 'resnet' else 1}"
    return where + _inner(rest, UNET_PARTS if kind == "resnet" else {})


def vae(state: State, blocks: int) -> dict[str, Tensor]:
    """The autoencoder's, of as many resolutions."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        attention = ".attentions." in key and "group_norm" not in key and value.dim() == 2
        out[f"first_stage_model.{_vae_key(key, blocks)}"] = value[..., None, None] if attention else value.clone()
    return out


def _vae_key(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{blocks - 1 - int(found[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample", key)
    if "mid_block.attentions.0" in key:
        start, rest = key.split("mid_block.attentions.0")
        return f"{start}mid.attn_1{_inner(rest, VAE_PARTS)}"
    return key


def _inner(rest: str, parts: Mapping[str, str]) -> str:
    for ours, theirs in parts.items():
        if rest.startswith(f".{ours}."):
            return f".{theirs}.{rest.removeprefix(f'.{ours}.')}"
    return rest


def clip(state: State) -> dict[str, Tensor]:
    """SD1.5's text encoder."""
    bare = {key.removeprefix("text_model."): value.clone() for key, value in state.items()}
    return {f"cond_stage_model.transformer.text_model.{key}": value for key, value in bare.items()}
