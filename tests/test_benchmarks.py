"""What the benchmarks compute, against enumeration."""

import itertools
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import over_optimisation
import plot


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices(n):
    torch.manual_seed(0)
    scores, gold = torch.randn(3, 5), torch.rand(3, 5)
    want = []
    for s, g in zip(scores.tolist(), gold.tolist(), strict=True):
        for choice in itertools.combinations(range(5), n):
            want.append(g[max(choice, key=lambda i, s=s: s[i])])
    got = over_optimisation.best_of(n, scores.argsort(1), gold)
    assert got == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_a_curve_is_read_in_moving_means(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"eval_accuracy": 0.5, "step": 0}\n{"kl": 1, "reward": 2, "step": 1}\n'
        '{"kl": 3, "reward": 4, "step": 2}\n{"kl": 5, "reward": 9, "step": 3}\n'
    )
    assert plot.load(tmp_path, ("kl", "reward"), 2).tolist() == [[2, 4], [3, 6.5]]
