"""Routers on small tensors: what each promises, what the frame promises for all, and the model around it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from routers import compare
from routers.arkvale import ArkVale
from routers.attention import FOLLOWING, RoutedModel, received
from routers.centred import Centred
from routers.choice import attended
from routers.infllm import InfLLM
from routers.lowbit import LowBit
from routers.mean import Mean
from routers.oracle import Oracle
from routers.quest import Quest
from routers.router import Layer, Router
from routers.shadowkv import ShadowKV
from routers.window import Window
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.configs.routing import Window as WindowShare
from hga_compile.evaluation.candidates import RoutedCandidate
from hga_compile.evaluation.metrics import compare as distance
from hga_compile.evaluation.reference import MODE_OPTIONS, dense_reference

ROWS, HEADS, DIM, TOKENS = 2, 3, 16, 640
ALL = [
    Window(), Mean(16), Mean(4), Quest(16), ArkVale(32), InfLLM(128), InfLLM(32), ShadowKV(8), LowBit(4),
    Centred(4), Centred(1, block=64), Oracle(4), Oracle(1),
]  # fmt: skip


def routing(tokens: int, window: int = 16) -> Routing:
    return Routing(
        budget=Budget(tokens=tokens), window=WindowShare(tokens=window), dense_below=0, centre_tokens=32
    )


@pytest.fixture(params=range(2))
def layer(request: pytest.FixtureRequest) -> Layer:
    torch.manual_seed(request.param)
    # Neighbours are alike, as keys are, and a few channels stand out.
    keys = torch.randn(ROWS, TOKENS // 8, DIM).repeat_interleave(8, 1) + 0.7 * torch.randn(ROWS, TOKENS, DIM)
    keys[..., :2] *= 4
    return Layer(keys, torch.randn(ROWS, TOKENS))


def queries(count: int, seed: int = 5) -> Tensor:
    return torch.randn(ROWS, HEADS, count, DIM, generator=torch.Generator().manual_seed(seed))


def mask_of(router: Router, layer: Layer, query: Tensor, settings: Routing, bonus: float = 0.0) -> Tensor:
    return attended(router, router.index(layer), settings, query, TOKENS - query.shape[2], TOKENS, bonus)


@pytest.mark.parametrize("router", ALL, ids=repr)
def test_a_routed_set_is_causal_holds_sinks_and_window_and_keeps_the_budget(
    router: Router, layer: Layer
) -> None:
    settings, count = routing(200), 9
    mask = mask_of(router, layer, queries(count), settings)
    position = torch.arange(TOKENS - count, TOKENS)
    token = torch.arange(TOKENS)
    assert not mask[:, token > position[:, None]].any()
    recent = (token <= position[:, None]) & (token > position[:, None] - 16)
    assert mask[:, recent].all()
    assert mask[..., :4].all()
    taken = mask.sum(-1)
    assert (taken <= 200).all()
    # What is left would not hold one unit more.
    assert (taken > 200 - router.unit).all()


@pytest.mark.parametrize("router", ALL, ids=repr)
def test_full_budget_is_every_visible_token(router: Router, layer: Layer) -> None:
    mask = mask_of(router, layer, queries(5), routing(TOKENS))
    assert mask.equal(torch.ones(ROWS, 5, TOKENS, dtype=torch.bool).tril(TOKENS - 5))


@pytest.mark.parametrize("router", ALL, ids=repr)
def test_later_keys_do_not_change_what_a_query_is_routed_to(router: Router, layer: Layer) -> None:
    if isinstance(router, ShadowKV):
        pytest.skip("its outliers are ranked among all chunks, as its prefill does")
    query, middle = queries(1), 500
    index = router.index(layer)
    before = attended(router, index, routing(150), query, middle, TOKENS)
    keys, following = layer.keys.clone(), layer.received.clone()
    keys[:, middle + 1 :], following[:, middle + 1 :] = 9.0, 9.0
    # A bag of later tokens would still have the mean of the first ones as its centre.
    after = attended(router, router.index(Layer(keys, following)), routing(150), query, middle, TOKENS)
    assert after.equal(before)


def mass(layer: Layer, query: Tensor, mask: Tensor, start: int) -> Tensor:
    """Softmax mass of the tokens before the window that a set holds, over all heads, ``[rows, queries]``."""
    weights = (query @ layer.keys[:, None, :start].mT).softmax(-1)
    return (weights * mask[:, None, :, :start]).sum((1, 3))


@pytest.mark.parametrize("router", ALL, ids=repr)
def test_no_router_captures_more_mass_than_the_oracles(router: Router, layer: Layer) -> None:
    query, start, settings = queries(1), TOKENS - 128, routing(128 + 4 + 96, window=128)
    found = mass(layer, query, mask_of(router, layer, query, settings), start)
    tokens = mass(layer, query, mask_of(Oracle(1), layer, query, settings), start)
    assert (found <= tokens + 1e-5).all()
    if router.unit % 4 == 0:
        groups = mass(layer, query, mask_of(Oracle(4), layer, query, settings), start)
        assert (found <= groups + 1e-5).all()


def test_low_bit_keys_capture_more_than_means_and_the_window(layer: Layer) -> None:
    query, start, settings = queries(1), TOKENS - 16, routing(16 + 4 + 64)
    found = {
        name: float(mass(layer, query, mask_of(router, layer, query, settings), start).mean())
        for name, router in {"ours": LowBit(4), "mean": Mean(16), "window": Window()}.items()
    }
    assert found["ours"] > found["mean"] > found["window"]


def test_a_centre_that_follows_the_keys_makes_low_bit_scores_better(layer: Layer) -> None:
    drift = torch.linspace(0, 12, TOKENS)[:, None] * torch.linspace(-1, 1, DIM)
    drifting, query = Layer(layer.keys + drift, layer.received), queries(4)
    exact = query @ drifting.keys[:, None].mT

    def error(router: Router) -> float:
        off = router.index(drifting).score(query) - exact
        # What all tokens have in common the softmax cannot see.
        return float((off - off.mean(-1, keepdim=True)).square().mean())

    assert error(Centred(1, block=64)) < 0.5 * error(LowBit(1))


def test_quests_box_bounds_every_key_and_arkvale_is_tighter(layer: Layer) -> None:
    query = queries(7)
    best = (query @ layer.keys[:, None].mT).unflatten(-1, (-1, 16)).amax(-1)
    bound = Quest(16).index(layer).score(query)
    assert (bound >= best - 1e-5).all()
    assert (ArkVale(16).index(layer).score(query) <= bound + 1e-5).all()
    single = Quest(1).index(layer).score(query)
    torch.testing.assert_close(single, query @ layer.keys[:, None].mT)


def test_means_of_single_tokens_are_the_oracle(layer: Layer) -> None:
    query = queries(4)
    assert mask_of(Mean(1), layer, query, routing(100)).equal(mask_of(Oracle(1), layer, query, routing(100)))


def test_shadowkv_pins_the_chunk_that_its_mean_stands_for_worst(layer: Layer) -> None:
    keys = layer.keys.clone()
    keys[:, 80:88] = torch.randn(DIM)
    keys[:, 83] *= -1
    found = ShadowKV(8).index(Layer(keys, layer.received))
    assert found.pinned is not None
    assert found.pinned[:, 10].all()
    assert found.pinned.sum() == ROWS  # 0.3% of 80 chunks is less than one: one is pinned
    settings = routing(4 + 16 + 8)  # room for one chunk
    chosen = attended(ShadowKV(8), found, settings, queries(1), TOKENS - 1, TOKENS)
    assert chosen[..., 80:88].all()


def test_infllm_scores_by_the_keys_that_were_attended_to_most(layer: Layer) -> None:
    following = torch.zeros(ROWS, TOKENS)
    following[:, [3, 5, 8, 21]] = 1.0  # of the first block
    query = queries(2)
    score = InfLLM(32).index(Layer(layer.keys, following)).score(query)[..., 0]
    expected = (query @ layer.keys[:, None, [3, 5, 8, 21]].mT).sum(-1)
    torch.testing.assert_close(score, expected)


def test_received_is_the_mean_over_the_queries_that_follow_in_the_prefix() -> None:
    torch.manual_seed(0)
    tokens, prefix = FOLLOWING + 90, FOLLOWING + 60
    keys, query = torch.randn(1, tokens, DIM), torch.randn(1, tokens, DIM)
    found = received(keys, query.cumsum(1), prefix)
    for place in (0, 40, prefix - 3):
        behind = query[0, place + 1 : min(place + FOLLOWING, prefix - 1) + 1]
        torch.testing.assert_close(found[0, place], (behind @ keys[0, place]).mean(), rtol=1e-3, atol=1e-4)
    assert not found[0, prefix - 1 :].any()


def test_shares_of_bytes_are_those_of_16_bit_summaries() -> None:
    shares = {name: compare.index_share(router, 64) for name, router in compare.ROUTERS.items()}
    assert shares == {
        "window only": 0,
        "mean, 16": 1 / 32,
        "mean, 4": 1 / 8,
        "Quest, 16": 1 / 16,
        "ArkVale, 32": 1 / 32,
        "InfLLM, 128": 1 / 64,
        "InfLLM, 32": 1 / 16,
        "ShadowKV, 8": 1 / 16,
        "low-bit, 4 (ours)": 18 / 256,
        "low-bit, 2": 18 / 256,
        "low-bit, 1": 18 / 256,
        "low-bit, 4, centred by blocks": 19 / 256,
        "low-bit, 1, centred by blocks": 19 / 256,
        "oracle groups, 4": 1 / 2,
        "oracle tokens": 1 / 2,
    }


def test_equal_bytes_are_what_ours_reads(layer: Layer) -> None:
    extra = compare.bonuses("bytes", 64)
    for name, router in compare.ROUTERS.items():
        if not isinstance(router, Oracle):
            assert extra[name] + compare.index_share(router, 64) == pytest.approx(18 / 256)
    assert extra["oracle tokens"] == 0
    more = mask_of(Mean(4), layer, queries(1), routing(100), bonus=0.1).sum(-1)
    assert ((more > 160) & (more <= 164)).all()


@pytest.fixture
def reference(tiny_model: Any) -> Any:
    torch.compiler.reset()
    ids = torch.randint(97, (1, 401), generator=torch.Generator().manual_seed(1))
    try:
        routed = RoutedModel(tiny_model)
        with torch.no_grad():
            yield routed, dense_reference(tiny_model, ids, 30)
    finally:
        tiny_model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("router", ALL, ids=repr)
def test_a_model_at_full_budget_is_dense(router: Router, reference: Any) -> None:
    routed, dense = reference
    with torch.no_grad():
        found = routed.candidate(router, routing(500)).decode(dense.cache, 370, dense.ids[:, 370:-1])
    assert float(distance(dense.logits, found.logits, dense.targets).kl.max()) < 1e-5
    assert found.use.attended == 1.0


def test_the_plain_torch_frame_is_near_the_compiled_model(reference: Any, tiny_model: Any) -> None:
    """Both choose groups of 4 by the same codes; windows begin at other places."""
    routed, dense = reference
    budget = {"tokens": 60, "fraction": None}
    options = {"profile": "default", "inner": "eager", "routing.budget": budget, "routing.dense_below": 64}
    options |= {"routing.centre_tokens": 32, **MODE_OPTIONS["decode"]}
    settings = Routing(budget=Budget(tokens=60), dense_below=64, centre_tokens=32)
    with torch.no_grad():
        plain = routed.candidate(LowBit(4, centre_tokens=32), settings)
        first = plain.decode(dense.cache, 370, dense.ids[:, 370:-1])
        tiny_model.set_attn_implementation("sdpa")
        second = RoutedCandidate(tiny_model, options, dynamic=True).decode(
            dense.cache, 370, dense.ids[:, 370:-1]
        )
    assert first.use.attended == pytest.approx(second.use.attended, rel=0.05)
    assert first.use.summary_bytes == pytest.approx(second.use.summary_bytes * 2, rel=0.1)  # of 32-bit K/V
    apart = distance(second.logits, first.logits, dense.targets).kl.mean()
    assert float(apart) < 0.5 * float(distance(dense.logits, second.logits, dense.targets).kl.mean())


def test_the_command_measures_saves_and_goes_on(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({f"w{number}": number for number in range(97)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path / "model")
    tiny_model.save_pretrained(tmp_path / "model")
    text = " ".join(f"w{number * number % 89}" for number in range(1200))
    document = compare.corpora.Document("one", "one", "none", "made up", "0", len(text), text)
    monkeypatch.setattr(compare.corpora, "load", lambda name: document)
    out = tmp_path / "routers.json"
    arguments = ["--model", str(tmp_path / "model"), "--length", "1100", "--texts", "one", "--scored", "20"]
    arguments += ["--routers", "window only; Quest, 16; oracle tokens", "--json", str(out)]
    assert compare.main(arguments) == 0
    first = json.loads(out.read_text())
    assert [entry["row"] for entry in first["summary"]] == [
        "dense", "window only", "Quest, 16", "oracle tokens"
    ]  # fmt: skip
    for entry in first["summary"][1:]:
        assert 0.01 < entry["attended"]["mean"] < 0.0305  # 33 of 1,081 to 1,100 tokens, whole pages
        assert entry["kl"]["mean"] > 0
    monkeypatch.setattr(compare, "make_candidates", lambda *_: pytest.fail)
    assert compare.main([*arguments, "--resume"]) == 0
    assert json.loads(out.read_text())["runs"] == first["runs"]
    assert "oracle tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--routers", "nothing"], "--routers takes"),
        (["--scored", "4096"], "--scored must be"),
        (["--budget", "0"], "--budget must be"),
    ],
)
def test_bad_arguments_are_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err
