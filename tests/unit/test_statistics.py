import numpy as np
import pytest
from scipy import stats

from yuriiformer.report.statistics import holm, paired, paired_blocks, paired_documents, weighted_mean


def test_paired_t_by_hand():
    a, b = [3.1, 3.4, 3.2], [3.3, 3.5, 3.5]
    result = paired(a, b)
    assert result["mean_difference"] == pytest.approx(-0.2)
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5  # the differences' standard deviation is 0.1
    assert (result["low"], result["high"]) == pytest.approx((-0.2 - half, -0.2 + half))
    assert result["p_value"] == pytest.approx(2 * stats.t.cdf(-0.2 / (0.1 / 3**0.5), 2))


def test_one_seed_has_no_interval():
    assert paired([1.0], [2.0]) == {
        "mean_difference": -1.0,
        "low": None,
        "high": None,
        "p_value": None,
        "differences": [-1.0],
    }


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([None, 0.5, 0.9]) == [None, 1.0, 1.0]


def test_weighted_mean_by_hand_and_its_interval_covers():
    assert weighted_mean([1, 3], [5, 5]) == (2.0, 1.0)  # the standard deviation over sqrt(n): sqrt(2) / sqrt(2)
    centre, error = weighted_mean([1, 2, 4], [1, 2, 1])
    assert centre == pytest.approx(2.25)
    assert error == pytest.approx((1.5 * (0.3125**2 + 0.125**2 + 0.4375**2)) ** 0.5)
    generator, weights = np.random.default_rng(0), [256] * 40 + [17]
    samples = (weighted_mean(generator.normal(3, 0.5, 41), weights) for _ in range(2000))
    covered = np.mean([abs(centre - 3) < 1.96 * error for centre, error in samples])
    assert 0.93 < covered < 0.96


def test_paired_blocks_of_equal_weight_is_the_paired_t_test():
    a, b = [3.1, 3.4, 3.2, 3.0], [3.3, 3.5, 3.5, 2.9]
    known, found = paired(b, a), paired_blocks(a, b, [7] * 4)
    for mine, theirs in (("difference", "mean_difference"), ("low", "low"), ("high", "high"), ("p_value", "p_value")):
        assert found[mine] == pytest.approx(known[theirs])
    assert paired_blocks(a, a, [7] * 4)["p_value"] == 1


def test_mcnemar_by_hand():
    a = [1] * 20 + [1, 1] + [0] * 8 + [0] * 5
    b = [1] * 20 + [0, 0] + [1] * 8 + [0] * 5
    found = paired_documents(a, b)
    assert (found["only_a"], found["only_b"]) == (2, 8)
    assert found["p_value"] == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert found["difference"] == pytest.approx(6 / 35)
    assert found["low"] < 6 / 35 < found["high"]
    assert paired_documents(a, b) == found, "seeded"
    assert paired_documents(a, a)["p_value"] == 1
    assert "p_value" not in paired_documents([0.5, 1.0], [0.25, 1.0])


def test_bootstrap_interval_is_the_normal_one_for_many_documents():
    generator = np.random.default_rng(1)
    a, b = generator.normal(0, 1, 2000), generator.normal(0.1, 1, 2000)
    found, half = paired_documents(a, b), 1.96 * np.std(b - a) / 2000**0.5
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.05)
