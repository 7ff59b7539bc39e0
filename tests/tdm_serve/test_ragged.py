"""Texts of several lengths in one forward: every row as diffusers' class makes it, on a CPU bit by bit as alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from tdm_serve.models.families.attention import attend, ragged
from tdm_serve.models.families.sd3_denoiser import SD3Denoiser
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser, padded_length
from tests.tdm_serve.test_denoiser import random_transformer
from tests.tdm_serve.test_sd3_denoiser import SD3, SD35, transformer

SIZES = [(16, 16), (6, 10), (2, 2), (18, 4)]
TOKENS = (5, 64, 33, 1, 96)  # of the rows of a batch


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def whole(model: ZImageTransformer2DModel, latents: Tensor, sigma: Tensor, texts: list[Tensor]) -> Tensor:
    """diffusers' own ragged batch, with its masks; it returns the negative velocity and counts time backwards."""
    pictures = model(list(latents.unsqueeze(2)), 1.0 - sigma, texts, return_dict=False)[0]
    return -torch.stack([picture.squeeze(1) for picture in pictures])


def refined(denoiser: ZImageDenoiser, texts: list[Tensor]) -> list[Tensor]:
    """Each text by itself, padded to its own multiple of 32."""
    counts = [torch.tensor([len(text)]) for text in texts]
    padded = [torch.nn.functional.pad(text, (0, 0, 0, padded_length(len(text)) - len(text))) for text in texts]
    return [denoiser.refine_text(text[None], count) for text, count in zip(padded, counts, strict=True)]


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_zimage_equals_diffusers_ragged_batch(batch: int, height: int, width: int) -> None:
    model = random_transformer(batch + height)
    latents, sigma = torch.randn(batch, 4, height, width).double(), torch.linspace(1, 0.3, batch).double()
    texts = [torch.randn(count, 20).double() for count in TOKENS[:batch]]
    expected = whole(model, latents, sigma, texts)
    denoiser = ZImageDenoiser(model).pack()
    text, lengths = ragged(made := refined(denoiser, texts), [one.shape[1] for one in made])
    got = denoiser(latents, denoiser.modulation(sigma), text, (), lengths)
    assert relative(got, expected) <= 1e-5  # rotary tables are float32, as in diffusers
    wider = torch.nn.functional.pad(text, (0, 0, 0, 104 - text.shape[1]), value=9.0)  # room that nobody needs
    also = torch.tensor([one.shape[1] for one in made], dtype=torch.int32)
    assert relative(denoiser(latents, denoiser.modulation(sigma), wider, (), also), expected) <= 1e-5


def test_captions_are_refined_together_as_alone() -> None:
    denoiser = ZImageDenoiser(random_transformer(7)).pack()
    texts = [torch.randn(count, 20).double() for count in TOKENS]
    counts, longest = torch.tensor(TOKENS), padded_length(max(TOKENS))
    together = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, longest - len(text))) for text in texts])
    own = torch.tensor([padded_length(count) for count in TOKENS], dtype=torch.int32)
    got = denoiser.refine_text(together, counts, (), own)
    for row, alone in zip(got, refined(denoiser, texts), strict=True):
        assert relative(row[: alone.shape[1]], alone[0]) <= 1e-12


@pytest.mark.parametrize("dual", [SD3, SD35])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sd3_equals_diffusers_row_by_row(dual: tuple[int, ...], height: int, width: int) -> None:
    model = transformer(dual, height)
    batch, counts = 5, (9, 33, 1, 20, 33)
    latents, pooled, time = torch.randn(batch, 4, height, width), torch.randn(batch, 12), torch.linspace(999, 1, batch)
    texts = [torch.randn(1, count, 20) for count in counts]
    denoiser = SD3Denoiser(model).pack()
    made = [denoiser.refine_text(text, row) for text, row in zip(texts, pooled.split(1), strict=True)]
    text, lengths = ragged(made, counts)
    got = denoiser(latents, denoiser.modulation(time, text), text, (), lengths)
    for i, words in enumerate(texts):
        one = slice(i, i + 1)
        assert relative(got[one], model(latents[one], words, pooled[one], time[one], return_dict=False)[0]) <= 1e-5


def as_alone(denoiser: ZImageDenoiser | SD3Denoiser, made: list[Tensor], own: list[int], tables: list[Tensor]) -> None:
    latents = torch.randn(len(made), 4, 8, 8)
    text, lengths = ragged(made, own)
    together = denoiser(latents, torch.cat(tables), text, (), lengths)
    for i, (words, table) in enumerate(zip(made, tables, strict=True)):
        assert torch.equal(together[i : i + 1], denoiser(latents[i : i + 1], table, words))


def test_a_row_has_the_bits_that_it_has_alone_on_a_cpu() -> None:
    zimage = ZImageDenoiser(random_transformer(2).float()).pack()
    made = refined(zimage, [torch.randn(count, 20) for count in TOKENS])
    as_alone(zimage, made, [one.shape[1] for one in made], [zimage.modulation(torch.tensor([0.5]))] * len(made))
    sd35 = SD3Denoiser(transformer(SD35)).pack()
    texts = [sd35.refine_text(torch.randn(1, count, 20), torch.randn(1, 12)) for count in (64, 32, 96)]
    as_alone(sd35, texts, [64, 32, 96], [sd35.modulation(torch.tensor([500.0]), text) for text in texts])


def test_attention_reads_nothing_behind_a_rows_length() -> None:
    q, k, v = torch.randn(3, 2, 4, 40, 8).unbind(0)
    lengths = torch.tensor([40, 7], dtype=torch.int32)
    k[1, :, 7:], v[1, :, 7:] = 1e9, -1e9
    got = attend(q, k, v, lengths)
    short = torch.nn.functional.scaled_dot_product_attention(q[1:], k[1:, :, :7], v[1:, :, :7])
    assert torch.equal(got[1:], short)
    assert torch.equal(got[:1], attend(q[:1], k[:1], v[:1]))


def inputs_of(family: str) -> tuple[ZImageDenoiser | SD3Denoiser, tuple[Tensor, ...]]:
    """A packed denoiser, and latents, modulation, text and lengths of three rows."""
    if family == "zimage":
        zimage = ZImageDenoiser(random_transformer(3).float()).pack()
        made = refined(zimage, [torch.randn(count, 20) for count in TOKENS[:3]])
        text, lengths = ragged(made, [one.shape[1] for one in made])
        table = zimage.modulation(torch.tensor([1.0, 0.75, 0.5]))
    else:
        sd35 = SD3Denoiser(transformer(SD35)).pack()
        made = [sd35.refine_text(torch.randn(1, count, 20), torch.randn(1, 12)) for count in (7, 64, 33)]
        text, lengths = ragged(made, (7, 64, 33))
        table, zimage = sd35.modulation(torch.tensor([999.0, 750.0, 500.0]), text), sd35
    assert lengths is not None
    return zimage, (torch.randn(3, 4, 8, 12), table, text, lengths)


@pytest.mark.parametrize("family", ["zimage", "sd35"])
def test_an_exported_graph_takes_any_lengths(family: str) -> None:
    """Nothing in the forward waits for a value: what CUDA graphs and exporters rely on."""
    denoiser, (latents, table, text, lengths) = inputs_of(family)
    exported = torch.export.export(denoiser, (latents, table, text, (), lengths)).module()
    for counts in (lengths, lengths.flip(0), torch.full_like(lengths, text.shape[1] - (family == "sd35"))):
        expected = denoiser(latents, table, text, (), counts)
        assert relative(exported(latents, table, text, (), counts), expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zimage", "sd35"])
def test_a_compiled_forward_is_one_graph(family: str) -> None:
    denoiser, (latents, table, text, lengths) = inputs_of(family)
    compiled = torch.compile(denoiser, dynamic=False, fullgraph=True)
    with torch.inference_mode():
        for counts in (None, lengths, lengths.flip(0)):
            expected = denoiser(latents, table, text, (), counts)
            assert relative(compiled(latents, table, text, (), counts), expected) <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["zimage", "sd35"])
def test_rows_on_a_gpu_are_those_of_a_cpu(family: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    denoiser, (latents, table, text, lengths) = inputs_of(family)
    expected = denoiser(latents, table, text, (), lengths)
    latents, table, text, lengths = (one.cuda() for one in (latents, table, text, lengths))
    assert relative(denoiser.cuda()(latents, table, text, (), lengths).cpu(), expected) <= 1e-4


def float64_error(half: Tensor, exact: Tensor) -> float:
    return float((half.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", ["zimage", "sd3", "sd35"])
def test_bfloat16_is_as_near_to_float64_as_diffusers_own(family: str) -> None:
    """Both round 8 bits at other places; we are no further off than they, but for chance."""
    ours, theirs = zip(*(BFLOAT16[family](seed) for seed in range(4)), strict=True)
    assert sum(ours) <= 1.25 * sum(theirs)
    assert sum(theirs) / 4 > 1e-3  # the measure notices bfloat16


def zimage_errors(seed: int) -> tuple[float, float]:
    model = random_transformer(seed)
    latents, sigma = torch.randn(3, 4, 8, 12).bfloat16(), torch.tensor([1.0, 0.75, 0.5])
    texts = [torch.randn(count, 20).bfloat16() for count in TOKENS[:3]]
    exact = whole(model, latents.double(), sigma.double(), [text.double() for text in texts])
    half = model.to(torch.bfloat16)
    theirs = whole(half, latents, sigma, texts)
    denoiser = ZImageDenoiser(half).pack()
    text, lengths = ragged(made := refined(denoiser, texts), [one.shape[1] for one in made])
    ours = denoiser(latents, denoiser.modulation(sigma), text, (), lengths)
    return float64_error(ours, exact), float64_error(theirs, exact)


def sd3_errors(dual: tuple[int, ...], seed: int) -> tuple[float, float]:
    model = transformer(dual, seed).double()
    latents, text, pooled = torch.randn(3, 4, 8, 12).bfloat16(), torch.randn(3, 9, 20).bfloat16(), torch.randn(3, 12)
    pooled, time = pooled.bfloat16(), torch.tensor([900.0, 500.0, 3.0])
    exact = model(latents.double(), text.double(), pooled.double(), time, return_dict=False)[0]
    half = model.to(dtype=torch.bfloat16)
    theirs = half(latents, text, pooled, time, return_dict=False)[0]
    denoiser = SD3Denoiser(half).pack()
    words = denoiser.refine_text(text, pooled)
    ours = denoiser(latents, denoiser.modulation(time, words), words)
    return float64_error(ours, exact), float64_error(theirs, exact)


BFLOAT16 = {
    "zimage": zimage_errors,
    "sd3": lambda seed: sd3_errors(SD3, seed),
    "sd35": lambda seed: sd3_errors(SD35, seed),
}
