"""grpo.py against hand values and identities."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import grpo  # noqa: E402


def test_group_advantages_by_hand():
    got = grpo.group_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]), 4)
    assert torch.allclose(got, torch.tensor([-0.9258, -0.4629, 0.0, 1.3887]), atol=2e-4)


def test_equal_rewards_give_no_advantage():
    assert (grpo.group_advantages(torch.full((6,), 0.1), 6) == 0).all()


def test_the_mean_over_tokens_by_hand():
    mask = torch.tensor([[1] * 5 + [0] * 5, [1] * 10]).bool()
    loss = torch.tensor([[1.0, 1, 1, 1, 10, 9, 9, 9, 9, 9], [1.0] * 9 + [10]])
    for how, value in (("sequence", 2.35), ("token", 2.2), ("constant", 1.65)):
        assert torch.isclose((grpo.token_weights(mask, how, 10) * loss).sum(), torch.tensor(value))
