"""Intervals and rank correlations against what is known in closed form."""

from __future__ import annotations

import math

import pytest

from lightning_optim.bench._statistics import paired, rank_correlation, student_quantile


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.995])
def test_quantiles_of_one_and_two_degrees_are_the_closed_forms(probability: float) -> None:
    assert student_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-12)
    within = 2 * probability - 1
    two = within * math.sqrt(2 / (1 - within**2))
    assert student_quantile(probability, 2) == pytest.approx(two, rel=1e-12)


def test_quantiles_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (*range(1, 12), 30, 101):
        assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)


def test_interval_of_three_pairs() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1, and t of two degrees is 4.3027 at 97.5%."""
    interval = paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert (interval.mean, interval.pairs) == (2.0, 3)
    assert (interval.low, interval.high) == pytest.approx((2 - half, 2 + half), rel=1e-12)
    assert not interval.excludes_zero
    assert paired([11.0, 22.0, 33.0, 42.0], [10.0, 20.0, 30.0, 40.0]).excludes_zero


def test_what_a_pair_shares_cancels() -> None:
    seeds = [0.5, 3.25, -7.0, 100.0]
    assert paired([value + 0.125 for value in seeds], seeds).low == 0.125


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    import torch

    draws = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    held = sum(not paired(values, [0.0] * 4, confidence=0.8).excludes_zero for values in draws)
    # Four standard deviations of a binomial.
    assert abs(held / 4000 - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 4000)


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [0.1, 5, 9]) == pytest.approx(1, abs=1e-5)
    assert rank_correlation([1, 2, 3], [9, 5, 0.1]) == pytest.approx(-1, abs=1e-5)
    # Ties share their mean rank: ranks 1.5, 1.5, 3 and 1, 2, 3 correlate by sqrt(3)/2.
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2, abs=1e-5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([], []) is None
