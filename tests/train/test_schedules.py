"""Learning-rate schedules in closed form."""

from __future__ import annotations

import math

import pytest

from spd_fast.train.schedules import learning_rate


def test_constant_stays():
    assert [learning_rate("constant", 0.3, t, 7) for t in range(7)] == [0.3] * 7


@pytest.mark.parametrize("step", range(7))
def test_quarter_cosine_is_a_quarter_wave_to_zero(step):
    expected = 0.3 * math.cos(0.5 * math.pi * step / 6)
    assert learning_rate("quarter_cosine", 0.3, step, 7) == pytest.approx(expected, abs=1e-16)


@pytest.mark.parametrize("step", range(7))
def test_cosine_is_a_half_wave_to_zero(step):
    expected = 0.3 * (1 + math.cos(math.pi * step / 6)) / 2
    assert learning_rate("cosine", 0.3, step, 7) == pytest.approx(expected, abs=1e-16)


@pytest.mark.parametrize("schedule", ["constant", "quarter_cosine", "cosine"])
def test_a_single_step_has_the_full_rate(schedule):
    assert learning_rate(schedule, 0.3, 0, 1) == 0.3


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="unknown schedule 'sine'"):
        learning_rate("sine", 0.3, 0, 1)
