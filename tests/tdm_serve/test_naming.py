"""State dicts of the dense denoisers have diffusers' keys: before and after packing, shared by versions or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tdm_serve.models.families.sd3_denoiser import SD3Denoiser
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tests.tdm_serve.test_denoiser import random_transformer
from tests.tdm_serve.test_sd3_denoiser import SD35, transformer

Made = tuple[nn.Module, ZImageDenoiser | SD3Denoiser]


def zimage() -> Made:
    model = random_transformer(1)
    return model, ZImageDenoiser(model)


def sd35() -> Made:
    model = transformer(SD35)
    return model, SD3Denoiser(model)


@pytest.mark.parametrize("make", [zimage, sd35])
@pytest.mark.parametrize("shared", [False, True])
def test_keys_and_values_are_those_of_diffusers(make: Callable[[], Made], shared: bool) -> None:
    source, denoiser = make()
    expected = {name: value.clone() for name, value in source.state_dict().items()}
    if shared:
        names = {module: name for name, module in source.named_modules()}
        wanted = [name for name in names.values() if name.endswith(("to_q", "to_out.0"))]
        assert denoiser.share(names, wanted)
    for one in (denoiser, denoiser.pack()):
        found = one.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("make", [zimage, sd35])
def test_a_state_dict_of_diffusers_loads_into_a_packed_denoiser(make: Callable[[], Made]) -> None:
    source, _ = make()
    other, denoiser = make()
    for parameter in other.parameters():
        parameter.data.zero_()
    packed = denoiser.pack()
    holder = nn.ModuleDict({"inside": packed})  # keys under a prefix
    holder.load_state_dict({f"inside.{name}": value for name, value in source.state_dict().items()})
    assert all(torch.equal(packed.state_dict()[name], value) for name, value in source.state_dict().items())


def test_missing_and_unknown_keys_are_told() -> None:
    source, denoiser = zimage()
    state = source.state_dict()
    del state["layers.0.attention.to_k.weight"]
    state["layers.0.attention.to_z.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key.*to_z"):
        denoiser.pack().load_state_dict(state)
