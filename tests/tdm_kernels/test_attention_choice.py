"""Who computes an attention: TDM_SERVE_ATTENTION, the committed table, and what is said about it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tdm_kernels import KernelUnavailable, choices, dispatch, joint_attention, joint_attention_lse
from tdm_kernels.attention import backends, table, variants
from tdm_kernels.attention import choose as choosing
from tdm_kernels.attention.choose import BACKENDS, VARIABLE, Choice, choose, obstacle
from tdm_serve.errors import BackendUnavailable
from tdm_serve.models.kernel_choice import check_quantised
from tdm_serve.models.load import load

H200 = "NVIDIA H200"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Tensor]:
    """A tensor that says it is on an H200, for the questions that need no real one. Meta tensors hold no data."""

    class OnCard(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: H200)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    clear()
    yield torch.empty(1, 30, 1024, 128, dtype=torch.bfloat16, device="meta").as_subclass(OnCard)
    clear()


def clear() -> None:
    table.lookup.cache_clear()
    choosing._say_once.cache_clear()


def row(**changes: object) -> dict[str, object]:
    plain = {"device": H200, "head_dim": 128, "keys": 1024, "streams": 30, "ragged": False, "backend": "cudnn"}
    return plain | changes


def use_rows(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, object]) -> None:
    monkeypatch.setattr(table, "_rows", lambda: table.parse(json.dumps({"rows": rows})))


def test_the_committed_table_is_valid() -> None:
    for one in table.parse(table.PATH.read_text()):
        assert one.backend in BACKENDS
        assert one.shape.head_dim in variants.HEAD_DIMS or one.backend != "triton"


def test_auto_takes_what_was_measured(card: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    use_rows(monkeypatch, row(), row(keys=4096, backend="triton", variant="tma-128x128-s2"))
    assert choose(card, card, None) == Choice("cudnn")
    longer = card[:, :, :1, :].expand(1, 30, 4608, 128)
    assert choose(longer, longer, None) == Choice("triton", "tma-128x128-s2")


def test_auto_says_once_that_nothing_was_measured(
    card: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_rows(monkeypatch, row(device="NVIDIA L40S"), row(ragged=True), row(head_dim=64), row(keys=4096))
    with caplog.at_level(logging.INFO, "tdm_kernels"):
        assert [choose(card, card, None) for _ in range(3)] == [Choice("sdpa")] * 3
    assert [record.message for record in caplog.records] == [
        "attention with head dimension 128 on cuda:0 runs on sdpa: this shape was not measured on it"
    ]


def test_auto_says_why_it_cannot_take_the_fastest(
    card: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_rows(monkeypatch, row(backend="triton", variant="tma-128x128-s2"))
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    with caplog.at_level(logging.INFO, "tdm_kernels"):
        assert choose(card, card, None) == Choice("sdpa")
    assert "triton is faster but cannot run here: triton is not installed" in caplog.text


def test_explicit_triton_takes_the_tables_variant_or_the_default(
    card: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(VARIABLE, "triton")
    use_rows(monkeypatch, row())
    assert choose(card, card, None) == Choice("triton", "pointer-128x64-w8-s3")
    table.lookup.cache_clear()
    use_rows(monkeypatch, row(backend="triton", variant="tma-128x64-s3"))
    assert choose(card, card, None) == Choice("triton", "tma-128x64-s3")


def test_obstacles_on_a_card(card: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert all(obstacle(backend, card, ragged=False) is None for backend in BACKENDS)
    assert "has no masks" in str(obstacle("flash", card, ragged=True))
    assert "float32, and it takes float16 or bfloat16" in str(obstacle("cudnn", card.float(), ragged=False))
    assert "head dimension is 40, and it takes 64 or 128" in str(obstacle("triton", card[..., :40], ragged=False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "compute capability 7.5, and it needs 8.0" in str(obstacle("triton", card, ragged=False))


def test_quantised_attention_needs_an_explicit_word(card: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast it was measured; what the networks do not hand to it is chosen as by auto."""
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "measured", lambda *_: True)
    use_rows(monkeypatch, row())
    assert choices.quantised_attention(card) is None
    for value in ("triton", "sdpa"):
        monkeypatch.setenv(VARIABLE, value)
        assert choices.quantised_attention(card) is None
    monkeypatch.setenv(VARIABLE, "quantised")
    assert choices.quantised_attention(card) == "fp8"
    assert choose(card, card, None) == Choice("cudnn")
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.takes_triton("quantise_qk", card, None)
    assert not dispatch.takes_triton("qk_norm_rope", card, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert choices.quantised_attention(card) == "16-bit"
    for like, why in ((card.float(), "the dtype is float32"), (card[..., :40], "the head dimension is 40")):
        with pytest.raises(KernelUnavailable, match=f"{VARIABLE}=quantised cannot run quantised_attention: {why}"):
            choices.quantised_attention(like)


@pytest.mark.parametrize("backend", ["triton", "cudnn", "flash"])
def test_an_explicit_choice_that_cannot_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv(VARIABLE, backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(1, 1, 4, 64)
    for operation in (joint_attention, joint_attention_lse):
        with pytest.raises(KernelUnavailable, match=f"{VARIABLE}={backend} cannot run .*: the tensors are on cpu"):
            operation(x, x, x)


def test_an_unknown_choice_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fast")
    x = torch.randn(1, 1, 4, 64)
    with pytest.raises(KernelUnavailable, match="'fast'; allowed: auto, triton, cudnn, flash, sdpa"):
        joint_attention(x, x, x)


def test_sdpa_runs_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sdpa")
    x = torch.randn(1, 1, 4, 64)
    assert torch.equal(joint_attention(x, x, x), torch.nn.functional.scaled_dot_product_attention(x, x, x))


def test_a_table_with_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"variant 'tma-1x1'.*known: pointer-128x64-w4-s3"):
        table.parse(json.dumps({"rows": [row(backend="triton", variant="tma-1x1")]}))


def test_triton_is_not_imported_until_a_kernel_starts(environment: dict[str, str]) -> None:
    code = "import sys, tdm_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_a_backend_that_refuses_is_unavailable() -> None:
    x = torch.randn(1, 1, 4, 64)
    with pytest.raises(KernelUnavailable, match=r"torch's cudnn attention refuses queries \(1, 1, 4, 64\)"):
        backends.attend("cudnn", x, x, x, None)


def test_masks_are_the_lengths() -> None:
    q, k, v = torch.randn(3, 2, 1, 6, 8).unbind(0)
    kv_len = torch.tensor([6, 2], dtype=torch.int32)
    torch.testing.assert_close(backends.attend("sdpa", q, k, v, kv_len), joint_attention(q, k, v, kv_len))


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("TDM_SERVE_ATTENTION", "cudnn", "needs a CUDA device, but the model is on cpu; allowed there: auto, sdpa"),
        ("TDM_SERVE_KERNELS", "triton", "needs a CUDA device, but the model is on cpu; allowed there: auto, torch"),
        ("TDM_SERVE_ATTENTION", "quantised", "needs a CUDA device, but the model is on cpu; allowed there: auto, sdpa"),
        ("TDM_SERVE_ATTENTION", "fastest", "allowed: auto, triton, cudnn, flash, sdpa, quantised"),
    ],
)
def test_a_choice_that_cannot_be_had_is_told_when_a_model_loads(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BackendUnavailable, match=says):
        load("default", device="cpu")


def test_quantised_attention_is_refused_for_families_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "quantised")
    check_quantised("zimage", quantisable=True)
    with pytest.raises(BackendUnavailable, match="is for the family zimage, and this model is of sd15; allowed there"):
        check_quantised("sd15", quantisable=False)
