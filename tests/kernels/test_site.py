import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.routing import Routing
from hga_compile.kernels.site import SiteConfig


@given(
    layer=st.integers(0, 200),
    tier=st.sampled_from(["gpu", "host"]),
    fraction=st.floats(1e-6, 1.0),
    group_size=st.sampled_from([1, 4, 16]),
    bits=st.sampled_from([1, 2, 4, 8]),
    tail=st.sampled_from(["drop", "estimate"]),
    layers=st.lists(st.integers(-5, 5), max_size=3),
    kernels=st.sampled_from(["auto", "triton", "native", "reference"]),
)
def test_comes_back_from_its_text(
    layer: int,
    tier: str,
    fraction: float,
    group_size: int,
    bits: int,
    tail: str,
    layers: list[int],
    kernels: str,
) -> None:
    routing = Routing(
        budget=Budget(fraction=fraction),
        window=Window(fraction=fraction),
        group_size=group_size,
        bits=bits,
        tail=tail,
        dense_layers=tuple(layers),
    )
    site = SiteConfig(layer, tier, routing, kernels)
    text = site.to_text()
    again = SiteConfig.from_text(text)
    assert again == site and again.to_text() == text
    assert text.isascii() and "\n" not in text


def test_every_setting_changes_the_text() -> None:
    texts = {
        SiteConfig(layer, tier, routing, kernels).to_text()
        for kernels in ("auto", "reference")
        for layer in (0, 1)
        for tier in ("gpu", "host")
        for routing in (
            Routing(),
            Routing(bits=4),
            Routing(sinks=5),
            Routing(vote="mass_max"),
            Routing(budget=Budget(fraction=0.03000001, tokens=256)),
            Routing(centre_tokens=255),
        )
    }
    assert len(texts) == 48
    assert SiteConfig(0, "host", Routing()).to_text() == SiteConfig(0, "host", Routing()).to_text()


def test_text_of_another_version_is_refused() -> None:
    fields = json.loads(SiteConfig(0, "host", Routing()).to_text())
    fields["version"] = "0"
    with pytest.raises(ValueError, match=r"another version of hga-compile .*clear the compile cache"):
        SiteConfig.from_text(json.dumps(fields))


def test_text_with_unknown_routing_is_refused() -> None:
    fields = json.loads(SiteConfig(0, "host", Routing()).to_text())
    fields["routing"]["shiny"] = 1
    with pytest.raises(ValueError, match="shiny"):
        SiteConfig.from_text(json.dumps(fields))
