import pytest
from scipy import stats

from yuriiformer.report.statistics import holm, paired


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
