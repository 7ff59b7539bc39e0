"""The product's networks with their layers handed to the kernels, in Triton's interpreter, beside plain torch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdm_kernels.group_norm.ops as group_norm
import tdm_kernels.norm_rope.launch as norm_rope
import tdm_kernels.quantised.ops as quantised
from tdm_kernels.norm_rope import int8
from tdm_kernels.testing import cosine, relative_error
from tdm_serve import Pipeline
from tdm_serve.errors import BackendUnavailable
from tdm_serve.models.autoencoder import NormSiLU, decode, laid_out, with_kernels
from tdm_serve.models.families.zimage_denoiser import Block
from tdm_serve.models.kernel_choice import HeadPath
from tdm_serve.models.load import load
from tests.tdm_kernels.networks import HEAD_DIM, autoencoder, sd35, velocity, zimage
from tests.tdm_serve.tiny_folders import sd15

# Of whole networks in float32, whose kernels add in another order; plain torch is as far from float64.
TOLERANCE = 1e-5
# Of the velocity of a network whose every layer attends with int8 queries and keys, and the second with fp8 values.
LEAST_COSINE = {"16-bit": 0.9999, "fp8": 0.9998}


class Calls(list[str]):
    """Names of the launches, in order."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Kernels chosen, and a list of those that ran."""
    seen = Calls()

    def watch(module: object, name: str, called: str) -> None:
        launch = getattr(module, name)

        def launched(*args: object, **kwargs: object) -> object:
            seen.append(called)
            return launch(*args, **kwargs)

        monkeypatch.setattr(module, name, launched)

    watch(group_norm, "launch", "group_norm_silu")
    watch(norm_rope, "norm_rope", "qk_norm_rope")
    watch(int8.launch, "key_mean", "quantise_qk")
    watch(quantised, "launch", "quantised_attention")
    monkeypatch.setenv("TDM_SERVE_KERNELS", "triton")
    monkeypatch.setenv("TDM_SERVE_ATTENTION", "sdpa")
    return seen


@pytest.mark.parametrize("ragged", [False, True])
def test_zimage_with_fused_norms_is_plain_zimage(ragged: bool, calls: Calls) -> None:
    denoiser = zimage()
    plain = velocity(denoiser, ragged=ragged)
    assert calls == []
    assert relative_error(velocity(denoiser.use_kernels(), ragged=ragged), plain) <= TOLERANCE
    assert calls == ["qk_norm_rope"] * 4  # every block


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("values", ["16-bit", "fp8"])
def test_quantised_zimage_stays_close(
    values: HeadPath, ragged: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an explicit word; text is refined exactly, and a row does not depend on the other's length."""
    denoiser = zimage()
    plain = velocity(denoiser, ragged=ragged)
    monkeypatch.setenv("TDM_SERVE_ATTENTION", "quantised")
    monkeypatch.setenv("TDM_SERVE_KERNELS", "torch")  # the word for attention is enough
    denoiser.use_kernels()
    for block in denoiser.modules():
        if isinstance(block, Block) and block.path == "16-bit":  # the interpreter counts as a card without fp8
            block.path = values
    found = velocity(denoiser, ragged=ragged)
    assert calls == ["quantise_qk", "quantised_attention"] * 3
    for row in range(2):
        assert cosine(found[row], plain[row]) >= LEAST_COSINE[values]


def test_rows_are_alone_in_a_quantised_batch(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_ATTENTION", "quantised")
    attention = zimage().use_kernels().blocks[0]
    assert isinstance(attention, Block)
    x, angles = torch.randn(2, 70, 2 * HEAD_DIM), torch.rand(2, 70, 1, HEAD_DIM // 2)
    kv_len = torch.tensor([70, 33], dtype=torch.int32)
    together = attention.attend(x, (angles.cos(), angles.sin()), (), kv_len)
    own = angles[1:, :33]
    alone = attention.attend(x[1:, :33], (own.cos(), own.sin()), (), None)
    torch.testing.assert_close(together[1:, :33], alone, rtol=1e-4, atol=1e-4)  # torch's product rounds by size
    assert len(calls) == 4


def test_quantised_attention_says_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_ATTENTION", "quantised")
    why = "TDM_SERVE_ATTENTION=quantised cannot run quantised_attention: the head dimension is 32"
    with pytest.raises(BackendUnavailable, match=why):
        zimage(32).use_kernels()


def test_quantised_attention_is_refused_for_a_family_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_ATTENTION", "quantised")
    with pytest.raises(BackendUnavailable, match="is for the family zimage, and this model is of sd15"):
        load(sd15(tmp_path / "sd15"), device="cpu")


def test_sd35_with_fused_norms_is_plain_sd35(calls: Calls) -> None:
    denoiser, given = sd35()
    plain = denoiser(*given)
    assert relative_error(denoiser.use_kernels()(*given), plain) <= TOLERANCE
    assert calls == ["qk_norm_rope"] * 5  # image and text of two blocks, and the dual one


@pytest.mark.parametrize("channels", [(32, 64), (16, 48)])
def test_a_decoder_with_fused_norms_is_the_plain_one(channels: tuple[int, int], calls: Calls) -> None:
    """Groups of 4 and 8 channels, and of 2 and 6; with the attention in its middle, which must keep the layout."""
    vae = autoencoder(channels)
    plain, fused = laid_out(copy.deepcopy(vae)), with_kernels(laid_out(vae))
    latents = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    expected = decode(plain, latents)
    assert relative_error(decode(fused, latents), expected) <= TOLERANCE
    norms = [one for one in fused.decoder.modules() if isinstance(one, NormSiLU)]
    assert calls == ["group_norm_silu"] * len(norms)
    assert len(norms) == 2 * 6 + 1  # two of every block, and the last one
    assert fused.state_dict().keys() == plain.state_dict().keys()


def test_graphs_hold_plain_layers(calls: Calls) -> None:
    """An exporter finds no operation of ours, whatever was chosen."""
    block = zimage().use_kernels().blocks[0]
    table = torch.rand(32, 1, HEAD_DIM // 2)
    given = torch.randn(1, 32, 2 * HEAD_DIM), (table.cos(), table.sin()), torch.rand(1, 4, 1, 2 * HEAD_DIM)
    norm = NormSiLU(nn.GroupNorm(4, 8).requires_grad_(False))
    for module, arguments in ((block, given), (norm, (torch.randn(1, 8, 4, 4),))):
        exported = torch.export.export(module, arguments)
        names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert not [name for name in names if name.startswith("tdm")]
        torch.testing.assert_close(exported.module()(*arguments), module(*arguments), rtol=1e-5, atol=1e-5)
    assert set(calls) == {"qk_norm_rope", "group_norm_silu"}


@pytest.mark.parametrize("attention", ["sdpa", "quantised"])
def test_networks_with_kernels_compile_as_one_graph(
    attention: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDM_SERVE_ATTENTION", attention)
    block = zimage().use_kernels().blocks[0]
    table = torch.rand(40, 1, HEAD_DIM // 2)
    given = torch.randn(2, 40, 2 * HEAD_DIM), (table.cos(), table.sin()), torch.rand(2, 4, 1, 2 * HEAD_DIM)
    kv_len = torch.tensor([40, 20], dtype=torch.int32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*given, (), kv_len), block(*given, (), kv_len))
    norm = torch.compile(NormSiLU(nn.GroupNorm(4, 8)), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert norm(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)
    assert calls


@pytest.mark.slow
def test_a_loaded_model_draws_the_same_picture(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default checkpoint, from its files to pixels; its decoder has groups of 12 channels, too."""

    def drawn_by(kernels: str) -> Tensor:
        monkeypatch.setenv("TDM_SERVE_KERNELS", kernels)
        [made] = Pipeline.from_pretrained(device="cpu", backend="eager")("two red circles", seed=3, size="64x64")
        return torch.frombuffer(bytearray(made.image.tobytes()), dtype=torch.uint8).int()

    plain = drawn_by("torch")
    assert calls == []
    assert (drawn_by("triton") - plain).abs().max() <= 1  # where rounding falls on the other side
    assert set(calls) == {"qk_norm_rope", "group_norm_silu"}
