import json

import numpy as np
import pytest
import record_routes
import torch
from drawn_recording import ROUTING, drawn
from recorded import Recording, lru_hits, nearest

from hga_compile.kernels.plan import plan_queries


def test_what_is_saved_is_read_again_and_small(tmp_path):
    made = drawn()
    made.save(tmp_path / "a.npz")
    found = Recording.load(tmp_path / "a.npz")
    assert np.array_equal(found.groups, made.groups)
    assert (found.tokens, found.routing, found.facts) == (1024, ROUTING, made.facts)
    assert (tmp_path / "a.npz").stat().st_size < made.groups.size


def test_a_layer_replays_what_was_recorded():
    made = drawn()
    steps = made.layer(0, 3, 1024)
    found = {tuple(own) for own in steps[5].lists}
    assert found <= {tuple(np.flatnonzero(marks)) for marks in made.groups[5]}
    assert len(found) == 3
    assert [step.length for step in steps] == [*range(1013, 1025)]
    start, end, window, chosen, last, first, tokens = steps[5].spans.unbind(1)
    assert (end - start + chosen + last - window).tolist() == [len(own) for own in steps[5].lists]
    assert first.tolist() == [0, 0, 0] and tokens.tolist() == [1018, 1018, 1018]
    other = made.layer(1, 3, 1024)
    assert not found & {tuple(own) for own in other[5].lists}, "another layer has other heads"


def test_a_longer_context_has_a_recorded_set_in_each_stretch():
    made = drawn()
    for step in made.layer(0, 2, 3072):
        plan = plan_queries(ROUTING, step.length - 1, 1, None)
        end, window = int(plan.sink_end), int(plan.window)
        for own, span in zip(step.lists, step.spans.tolist(), strict=True):
            assert bool((np.diff(own) > 0).all()) and own[-1] == (step.length - 1) // 4
            assert set(range(end)) | set(range(window, -(-step.length // 4))) <= set(own.tolist())
            assert span[3] == int(((own >= end) & (own < window)).sum())
            # As large a share as was recorded, less what lies in the larger window.
            assert 0.8 <= len(own) * 4 / step.length / 0.1 <= 1.1
            assert all(((own >= 256 * part) & (own < 256 * part + 256)).sum() >= 10 for part in range(3))


def test_only_multiples_of_the_recorded_length_can_be_made():
    made, longer = drawn(), drawn(2048)
    assert nearest([made, longer], 4096) is longer
    assert nearest([made, longer], 3072) is made
    assert nearest([made, longer], 100) is None
    with pytest.raises(ValueError, match="multiple of the 1024 recorded ones, got 300"):
        made.layer(0, 2, 300)


def test_a_cache_of_everything_misses_what_is_new_only():
    made = drawn()
    made.groups[1:] = made.groups[0]
    steps = made.layer(0, 2, 1024)
    # The window moves on: a group that has become complete is new to the cache, as is one that is not.
    new = len(steps[1:]) * 2
    listed = sum(step.listed for step in steps[1:])
    assert lru_hits(steps, 4, 1.0, 1) == pytest.approx(1 - new / listed, abs=0.05)
    assert lru_hits(steps, 4, 0.02, 1) < lru_hits(steps, 4, 0.1, 1) < lru_hits(steps, 4, 1.0, 1)


@pytest.mark.slow
def test_every_step_of_every_layer_is_recorded(tiny_model, tmp_path):
    ids = torch.randint(97, (1, 162))
    profile = tmp_path / "own.yaml"
    profile.write_text(
        "schema_version: 1\nname: own\nrouting: {budget: {fraction: 0.2, tokens: 16}, dense_below: 0, "
        "centre_tokens: 16}\noffload: {tier: gpu}\n"
    )
    found = record_routes.record(tiny_model, ids, 4, str(profile), {"why": "test"})
    assert found.groups.shape == (4, 4, 41)  # two layers of two KV heads
    assert found.facts == {"why": "test", "layers": [0, 1]}
    lengths = found.groups.sum(2) * 4
    assert bool((lengths >= 28).all()) and bool((lengths <= 44).all())
    assert bool(found.groups[:, :, 0].all()), "sinks"
    assert found.groups[2, :, 40].all() and not found.groups[1, :, 40].any()
    json.dumps(found.facts)
