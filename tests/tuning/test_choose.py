"""One profile from the Pareto front."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hga_compile.tuning.choose import PREFERENCES, choose, front

POINTS = [(0.10, 20.0), (0.03, 30.0), (0.05, 22.0), (0.20, 25.0), (0.029, 60.0)]
points = st.lists(st.tuples(st.floats(0.001, 1), st.floats(1, 100)), min_size=1, max_size=12)


def test_the_front_is_what_nothing_beats():
    assert front(POINTS) == [0, 1, 2, 4]
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [0]


@given(points)
def test_nothing_on_the_front_is_dominated_and_all_else_is(found):
    chosen = front(found)
    assert chosen
    for point in found:
        better = any(all(a <= b for a, b in zip(o, point, strict=True)) and o != point for o in found)
        assert better is (point not in [found[index] for index in chosen])


@pytest.mark.parametrize(("prefer", "number"), [("quality", 4), ("speed", 0), ("balanced", 1)])
def test_preferences(prefer, number):
    assert choose(POINTS, prefer) == number


def test_against_the_default_speed_is_not_worse_and_balanced_at_most_a_quarter_slower():
    default = (0.06, 30.0)
    assert choose(POINTS, "quality", default) == 4
    assert choose(POINTS, "speed", default) == 2
    assert choose(POINTS, "balanced", default) == 1
    assert choose(POINTS, "balanced", (0.06, 22.0)) == 2


def test_a_default_that_nothing_beats_limits_nothing():
    assert choose([(0.1, 5.0)], "balanced", (0.05, 1.0)) == 0


@given(points, st.sampled_from(PREFERENCES))
def test_the_choice_is_on_the_front(found, prefer):
    assert choose(found, prefer) in front(found)


def test_without_points_there_is_nothing_to_choose():
    with pytest.raises(ValueError, match="got none"):
        choose([], "speed")
