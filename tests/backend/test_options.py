"""Options of torch.compile: refused with one clear line, or taking effect."""

import pytest
import torch
from tiny import FULL, ROUTED, make, prompt

import hga_compile


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgt": 0.1}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"profile": "defualt"}, "default"),
        ({"tier": "nvme"}, "offload.tier"),
        ({"offload.hot_cache": 0.1}, "offload.hot_cache"),
        ({"routing.group_size": 24}, "group_size must divide chunk_size"),
    ],
)
def test_bad_options_are_one_clear_line(options, words):
    compiled = torch.compile(make("llama"), backend="hga", options=options)
    with pytest.raises(Exception, match=words), torch.no_grad():
        compiled(prompt(20))


@torch.no_grad()
def run(model, **more):
    torch._dynamo.reset()
    hga_compile.reset_report(sites=True)
    compiled = torch.compile(model, backend="hga", options=ROUTED | more)
    compiled(prompt(300))
    return hga_compile.report()


def test_dense_layers_and_overrides_take_effect():
    model = make("llama")
    report = run(model, **{"routing.dense_layers": [-1]})
    assert [site.routed for site in report.sites] == [True, False]
    assert report.sites[1].reason == "configured dense"
    override = [{"layers": [1], "budget": {"fraction": 0.5}}]
    first, second = run(model, **{"routing.overrides": override}).layers
    assert first.attended_fraction < 0.5 * second.attended_fraction


def test_strict_turns_a_dense_site_into_an_error():
    model = make("llama")
    compiled = torch.compile(model, backend="hga", options={"inner": "eager", "strict": True})
    mask = torch.zeros(1, 1, 20, 20)
    with pytest.raises(Exception, match="stays dense"), torch.no_grad():
        compiled(prompt(20), attention_mask=mask)


def test_two_models_keep_their_own_settings():
    small, large = make("llama"), make("llama")
    a = torch.compile(small, backend="hga", options=ROUTED)
    b = torch.compile(large, backend="hga", options=FULL)
    ids = prompt(300)
    with torch.no_grad():
        a(ids)
        less = hga_compile.report().totals().attended
        hga_compile.reset_report()
        b(ids)
        more = hga_compile.report().totals()
        assert less < more.attended == more.visible
        hga_compile.reset_report()
        a(ids)
        assert hga_compile.report().totals().attended == less


def test_a_float_mask_from_outside_stays_dense_and_right():
    model, ids = make("llama"), prompt(40)
    mask = torch.full((40, 40), -torch.inf).triu(1)[None, None] + 0.25 * torch.randn(1, 1, 40, 40)
    compiled = torch.compile(model, backend="hga", options=ROUTED)
    with torch.no_grad():
        got = compiled(ids, attention_mask=mask).logits
        torch.testing.assert_close(got, model(ids, attention_mask=mask).logits, atol=1e-4, rtol=0)
    assert {site.reason for site in hga_compile.report().sites} == {"additive or learned mask"}
