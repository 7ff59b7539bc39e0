"""The service loads its model as its memory settings say."""

from __future__ import annotations

import pytest

from tdm_app.server import engine_of
from tdm_app.settings import Settings
from tdm_app.settings_sources import load
from tdm_serve.errors import ConfigError


def test_a_model_without_a_download_is_served() -> None:
    engine = engine_of(Settings(model=("sd3-medium-tdm:tiny:no-t5",), random_weights=True, offload="text"))
    assert list(engine.infos) == ["sd3-medium-tdm"]
    assert "random weights: its pictures are noise" in engine.infos["sd3-medium-tdm"].description


def test_a_bound_is_kept() -> None:
    with pytest.raises(ConfigError, match=r"default needs .* and 10\.2 MB may be taken"):
        engine_of(Settings(max_memory=0.01))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("offload", "vae", "none, text"),
        ("quantise", "int8", "none, fp8"),
        ("max_memory", "0", "a number above 0 or none"),
    ],
)
def test_what_is_refused(name: str, value: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"allowed: {allowed}"):
        load({name: value})
