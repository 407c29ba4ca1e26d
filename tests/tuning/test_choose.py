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


DEFAULT = (0.06, 30.0)


def test_quality_is_the_least_kl_whatever_it_costs():
    assert choose(POINTS, "quality", DEFAULT) == 4
    assert choose([(0.1, 9.0), (0.1, 8.0)], "quality") == 1


def test_balanced_is_the_least_kl_of_those_at_most_a_tenth_slower_than_the_default():
    assert choose(POINTS, "balanced", DEFAULT) == 1
    assert choose(POINTS, "balanced", (0.06, 22.0)) == 2
    edge = [(0.05, 110.0), (0.04, 110.1)]
    assert choose(edge, "balanced", (0.06, 100.0)) == 0
    # Worse than the default is no reason against a point: the default itself is one of the points.
    assert choose([(0.07, 5.0), DEFAULT], "balanced", DEFAULT) == 1


def test_speed_is_the_fastest_whose_kl_is_not_above_the_defaults():
    assert choose(POINTS, "speed", DEFAULT) == 2
    assert choose([(0.06, 30.0), (0.0601, 10.0)], "speed", DEFAULT) == 0
    assert choose([(0.06, 20.0), (0.05, 20.0)], "speed", DEFAULT) == 1


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_without_a_default_or_within_no_bound_of_it_the_least_kl_is_taken(prefer):
    assert choose(POINTS, prefer) == 4
    assert choose([(0.2, 5.0), (0.1, 6.0)], prefer, (0.05, 1.0)) == 1


@given(points, st.sampled_from(PREFERENCES), st.integers(0, 11))
def test_the_choice_is_on_the_front_and_keeps_its_rule(found, prefer, number):
    default = found[number % len(found)]
    chosen = choose(found, prefer, default)
    kl, time = found[chosen]
    assert not any(a <= kl and b <= time and (a, b) != (kl, time) for a, b in found)
    assert prefer != "balanced" or time <= 1.1 * default[1]
    assert prefer != "speed" or (kl <= default[0] and time <= default[1])


def test_without_points_there_is_nothing_to_choose():
    with pytest.raises(ValueError, match="got none"):
        choose([], "speed")
