"""Linears that versions share: every place that is adapted, in mixed batches, against adapters in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from tdm_serve.backends.base import by_version
from tdm_serve.errors import CheckpointError
from tdm_serve.models.adapters import fuse_adapters, read_adapters
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tdm_serve.models.lora import base_of
from tdm_serve.models.routed import Variant, route_of
from tdm_serve.models.spec import Adapter
from tdm_serve.models.versions import Adapters, Versions

EVERYWHERE = (
    "layers.0.attention.to_k",
    "layers.1.attention.to_out.0",
    "layers.1.feed_forward.w3",
    "layers.0.feed_forward.w2",
    "layers.1.adaLN_modulation.0",
    "noise_refiner.0.attention.to_q",
    "context_refiner.0.feed_forward.w1",
    "cap_embedder.1",
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
)


def transformer() -> ZImageTransformer2DModel:
    torch.manual_seed(1)
    model = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=20,
        axes_dims=[8, 8, 8], axes_lens=[64, 32, 32],
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def adapter(path: Path, seed: int, names: tuple[str, ...] = EVERYWHERE) -> Path:
    random, model = torch.Generator().manual_seed(seed), transformer()
    tensors: dict[str, Tensor] = {}
    for name in names:
        out, into = model.get_submodule(name).weight.shape
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(3, into, generator=random) * 0.2
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 3, generator=random) * 0.2
    save_file(tensors, path)
    return path


def predict(denoiser: ZImageDenoiser, versions: Sequence[str | Variant]) -> Tensor:
    """Velocities of a fixed batch whose row i is of `versions[i]`."""
    random = torch.Generator().manual_seed(5)
    count = len(versions)
    latents, text = torch.randn(4, 4, 8, 8, generator=random)[:count], torch.randn(4, 32, 20, generator=random)[:count]
    sigma = torch.tensor([1.0, 0.7, 0.4, 0.1])[:count]
    route = route_of([one if isinstance(one, Variant) else Variant(one) for one in versions])
    with torch.inference_mode():
        refined = denoiser.refine_text(text, torch.tensor([32, 9, 32, 20])[:count], route)
        return denoiser(latents, denoiser.modulation(sigma, route), refined, route)


def shared(paths: dict[str, Path | None], adapters: Adapters) -> tuple[ZImageDenoiser, Versions]:
    model = transformer()
    denoiser = ZImageDenoiser(model)
    base = base_of(model, "tiny")
    given = {version: () if path is None else (Adapter(path),) for version, path in paths.items()}
    wanted = {name for own in given.values() if (lora := read_adapters(own, base)) for name in lora.modules}
    routed = denoiser.share({module: name for name, module in model.named_modules()}, wanted)
    versions = Versions(base, routed, given, adapters)
    for version in paths:
        versions.use(version)
    return denoiser.pack(), versions


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path | None]:
    one, other = adapter(tmp_path / "one.safetensors", 1), adapter(tmp_path / "other.safetensors", 2, EVERYWHERE[:4])
    return {"plain": None, "one": one, "other": other}


@pytest.mark.parametrize("adapters", ["fused", "separate"])
def test_mixed_rows_equal_adapters_in_the_weights(paths: dict[str, Path | None], adapters: Adapters) -> None:
    denoiser, _ = shared(paths, adapters)
    rows = ["one", "plain", "other", "one"]
    mixed = predict(denoiser, rows)
    for version, path in paths.items():
        alone = transformer()
        if path is not None:
            fuse_adapters(alone, (Adapter(path),))
        expected = predict(ZImageDenoiser(alone).pack(), [""] * 4)
        mine = torch.tensor([row == version for row in rows])
        assert torch.allclose(mixed[mine], expected[mine], atol=2e-5 * float(expected.abs().max()))
        assert not torch.allclose(mixed[~mine], expected[~mine], atol=1e-2)


def test_one_forward_a_version_equals_one_forward(paths: dict[str, Path | None]) -> None:
    """What backends do that cannot mix versions."""
    denoiser, _ = shared(paths, "fused")
    latents, modulation = torch.randn(3, 4, 8, 8), torch.randn(3, 4 * 3 + 1, 48)
    text, route = torch.randn(3, 32, 48), ((Variant("one"), 2), (Variant("other"), 1))
    with torch.inference_mode():
        split = by_version(denoiser, latents, modulation, text, route)
        assert torch.allclose(split, denoiser(latents, modulation, text, route), atol=1e-5)


def test_an_unloaded_version_leaves_nothing(paths: dict[str, Path | None]) -> None:
    denoiser, versions = shared(paths, "fused")
    before = predict(denoiser, ["other"])
    versions.limit_bytes = 0
    versions.trim(())
    assert versions.stats().bytes == 0
    assert torch.equal(predict(denoiser, ["other"]), predict(denoiser, ["plain"]))
    versions.use("other")
    assert torch.equal(predict(denoiser, ["other"]), before)


def test_what_no_route_reaches_is_refused(tmp_path: Path) -> None:
    """The time embedding calls its linears itself; adapted silently by the base's weight, pictures would be wrong."""
    for name, why in (
        ("t_embedder.mlp.0", "versions of one base cannot share"),
        ("nowhere.at.all", "the base does not"),
    ):
        path = tmp_path / "a.safetensors"
        a, b = torch.ones(3, 256), torch.ones(1024, 3)
        save_file({f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}, path)
        with pytest.raises(CheckpointError, match=rf"{name}, which {why}"):
            shared({"x": path}, "fused")


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    name, path = "layers.0.attention.to_k", tmp_path / "a.safetensors"
    a, b = torch.zeros(3, 7), torch.zeros(48, 3)
    save_file({f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}, path)
    with pytest.raises(CheckpointError, match=r"to_k by \(48, 7\), but the base has \(48, 48\)"):
        shared({"x": path}, "fused")


def test_neighbours_of_one_version_are_one_run() -> None:
    a, b, weak = Variant("a"), Variant("b"), Variant("a", 0.5)
    assert route_of([a, a, b, a, weak]) == ((a, 2), (b, 1), (a, 1), (weak, 1))
    assert route_of([]) == ()
