"""What the benchmarks read."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import plot


def test_a_curve_is_read_in_moving_means(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"eval_accuracy": 0.5, "step": 0}\n{"kl": 1, "reward": 2, "step": 1}\n'
        '{"kl": 3, "reward": 4, "step": 2}\n{"kl": 5, "reward": 9, "step": 3}\n'
    )
    assert plot.load(tmp_path, ("kl", "reward"), 2).tolist() == [[2, 4], [3, 6.5]]
    assert plot.load(tmp_path, ("kl", "reward"), 1, num_steps=2).tolist() == [[1, 3], [2, 4]]
