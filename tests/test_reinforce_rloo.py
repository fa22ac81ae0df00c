"""reinforce_rloo.py against hand values, enumeration, plain loops, and learning on the toy."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import reinforce_rloo as rr

BASELINES = ["none", "batch", "moving", "rloo", "remax"]


def tiny_args(tmp_path, **changes):
    """Args of a short run on the toy."""
    values = rr.TOY | dict(
        model=str(ROOT / "toy/model"), dataset=str(ROOT / "toy/problems_train.jsonl"),
        eval_dataset="", eval_size=0, num_steps=2, num_prompts=4, num_generations=4,
        micro_batch_size=16, output_dir=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    return rr.Args(**values | changes)


def run(args):
    """Train -> rows of metrics."""
    rr.main(args)
    with open(f"{args.output_dir}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


# --- The algorithm --------------------------------------------------------------------------------


def test_rloo_by_hand():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    want = torch.tensor([-8 / 3, -4 / 3, 0.0, 4.0])
    assert torch.allclose(rr.rloo_advantages(rewards, 4), want, atol=1e-6)
    centred = rewards - rewards.mean()
    assert torch.allclose(rr.rloo_advantages(rewards, 4), 4 / 3 * centred, atol=1e-6)


def test_rloo_leaves_one_out_of_its_own_prompt():
    """A plain loop over two prompts whose rewards are far apart."""
    rewards = [0.0, 1.0, 5.0, 100.0, 102.0, 107.0]
    want = []
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j // 3 == i // 3 and j != i]
        want.append(r - sum(others) / len(others))
    assert rr.rloo_advantages(torch.tensor(rewards), 3).tolist() == pytest.approx(want)


def test_baselines_by_hand():
    rewards, greedy = torch.tensor([1.0, 3.0, 0.0, 4.0]), torch.tensor([1.0, 2.0])
    want = {
        "none": [1, 3, 0, 4], "batch": [-1, 1, -2, 2], "moving": [0.5, 2.5, -0.5, 3.5],
        "rloo": [-2, 2, -4, 4], "remax": [0, 2, -2, 2],
    }  # fmt: skip
    for baseline, values in want.items():
        got = rr.baseline_advantages(rewards, 2, baseline, 0.5, greedy)
        assert got.tolist() == values, baseline


def test_the_moving_average_by_hand():
    average = rr.MovingAverage(0.9)
    assert average.value == 0
    for value, want in ((2.0, 2.0), (4.0, 2.2), (0.0, 1.98)):
        average.update(value)
        assert average.value == pytest.approx(want)


def test_reward_to_go_equals_a_loop():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    got = rr.reward_to_go(torch.tensor([2.0, -1.0]), mask, 0.5)
    want = torch.zeros(2, 4)
    for i, (last, reward) in enumerate([(2, 2.0), (3, -1.0)]):
        for t in range(last + 1):
            rewards = [reward if k == last else 0.0 for k in range(last + 1)]
            want[i, t] = sum(0.5 ** (k - t) * rewards[k] for k in range(t, last + 1))
    assert torch.equal(got, want)
    assert torch.equal(rr.reward_to_go(torch.tensor([2.0, -1.0]), mask, 1.0)[:, 0],
                       torch.tensor([2.0, -1.0]))  # fmt: skip


def test_the_loss_by_hand_and_its_gradient():
    logps = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, -0.5, -1.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    advantages = rr.reward_to_go(torch.tensor([2.0, -1.0]), mask, 1.0)
    loss = rr.reinforce_loss(logps, advantages, mask)
    assert loss.item() == pytest.approx((2 * 3 - 2) / 2)  # -(2 * -3) and -(-1 * -2)
    loss.backward()
    assert logps.grad.tolist() == [[-1, -1, 0], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_expected_gradient_is_the_same_under_every_baseline(baseline):
    """Two tokens, two completions a prompt, one prompt: all 4 draws, weighted by their chance."""
    logits = torch.tensor([0.3, -0.4], requires_grad=True)
    reward = torch.tensor([1.0, 5.0])
    true = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)[0]
    expected = torch.zeros(2)
    for a in (0, 1):
        for b in (0, 1):
            logps = logits.log_softmax(0)
            chance = (logps[a] + logps[b]).exp().item()
            drawn = torch.tensor([a, b])
            advantages = rr.baseline_advantages(
                reward[drawn], 2, baseline, moving=2.0, greedy=reward[:1]
            )
            one = torch.ones(2, 1, dtype=torch.bool)
            tokens = rr.reward_to_go(advantages, one, 1.0)
            loss = rr.reinforce_loss(logps[drawn][:, None], tokens, one)
            gradient = -torch.autograd.grad(loss, logits)[0]
            expected += chance * gradient
    share = 1 / 2 if baseline == "batch" else 1.0  # its own reward is half of the mean
    assert torch.allclose(expected, share * true, atol=1e-6)


def test_a_baseline_lowers_the_variance():
    rewards = 5 + torch.randn(400, generator=torch.manual_seed(0))
    size = [(rr.baseline_advantages(rewards, 4, b, 5.0) ** 2).mean() for b in ("none", "rloo")]
    assert size[0] > 15 * size[1]


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_gradient_is_that_of_the_textbook(tmp_path, temperature):
    """One step of main from the first weights, beside a loop over single sequences, plain RLOO."""
    args = tiny_args(tmp_path, num_steps=1, beta=0.0, learning_rate=0.0, temperature=temperature)
    row = run(args)[0]
    torch.manual_seed(args.seed)
    tokenizer = rr.load_tokenizer(args.model)
    policy = rr.load_model(rr.AutoModelForCausalLM, args.model, torch.device("cpu"))
    drawn = rr.random.Random(f"{args.seed} 1").sample(rr.load_rows(args.dataset), 4)
    prompts = [r["prompt"] for r in drawn]
    batch, texts, _ = rr.generate(policy, tokenizer, prompts, 4, args.max_new_tokens, temperature)
    right = [float(t.split("\n")[-1] == drawn[i // 4]["answer"]) for i, t in enumerate(texts)]
    loss = 0.0
    for i in range(len(texts)):
        others = [right[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        prompt = batch.prompt_ids[i // 4][batch.prompt_mask[i // 4]].tolist()
        ids = batch.completion_ids[i][batch.completion_mask[i]].tolist()
        logp = (policy(torch.tensor([prompt + ids])).logits[0] / temperature).log_softmax(-1)
        chosen = sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(ids))
        loss = loss - (right[i] - sum(others) / 3) * chosen / 16
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    assert row["grad_norm"] == pytest.approx(want, rel=1e-3) and want > 0
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert row["reward"] == pytest.approx(sum(right) / 16)


@pytest.mark.parametrize("changes", [{}, dict(share_prompts=False)])
def test_micro_batches_and_shared_prompts_change_nothing(tmp_path, changes):
    same = dict(num_steps=1, beta=0.1, learning_rate=0.0)
    whole = run(tiny_args(tmp_path / "a", **same))[0]
    split = run(tiny_args(tmp_path / "b", micro_batch_size=3, **same, **changes))[0]
    for name in ("loss", "grad_norm", "entropy", "kl"):
        assert split[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


def test_the_kl_costs_reward(tmp_path, monkeypatch):
    """From its second step on the policy has left the reference; the rewards fall by beta KL."""
    seen, advantages = [], rr.baseline_advantages
    monkeypatch.setattr(rr, "baseline_advantages",
                        lambda *a: seen.append(a[0].mean().item()) or advantages(*a))  # fmt: skip
    changes = dict(reward=reward_file(tmp_path), learning_rate=1e-3, baseline="none")
    rows = run(tiny_args(tmp_path, beta=10.0, **changes))
    assert abs(rows[1]["kl"]) > 1e-3
    per_step = len(seen) // 2
    for row, reward in zip(rows, seen[::per_step], strict=True):
        assert reward == pytest.approx(1 - 10 * row["kl"], rel=1e-3, abs=1e-3)
    assert "kl" not in run(tiny_args(tmp_path / "b", beta=0.0, **changes))[0]


def reward_file(tmp_path):
    """A reward of 1 for all."""
    (tmp_path / "one.py").write_text("def f(p, c, r):\n    return [1.0] * len(c)")
    return f"{tmp_path}/one.py:f"


@pytest.mark.filterwarnings("ignore:over 20")
@pytest.mark.parametrize("penalty", [None, 2.0])
def test_the_penalty_of_completions_that_were_cut_off(tmp_path, monkeypatch, penalty):
    """Of sampled and of greedy ones alike; without it the reward is heard, and told which ended."""
    (tmp_path / "told.py").write_text(
        "def f(p, c, rows):\n    return [1 + float(row['ended']) for row in rows]"
    )
    seen, baseline, made, generate = [], rr.baseline_advantages, [], rr.generate
    monkeypatch.setattr(rr, "baseline_advantages", lambda *a: seen.append(a) or baseline(*a))
    monkeypatch.setattr(rr, "generate", lambda *a, **b: made.append(generate(*a, **b)) or made[-1])
    changes = dict(reward=f"{tmp_path}/told.py:f", missing_eos_penalty=penalty, baseline="remax")
    row = run(tiny_args(tmp_path, num_steps=1, max_new_tokens=34, beta=0.0, **changes))[0]
    cut = 1.0 if penalty is None else -penalty
    for (_, _, ended), scores in zip(made, (seen[0][0], seen[0][4]), strict=True):
        assert scores.tolist() == [2.0 if e else cut for e in ended.tolist()]
        assert 0 < ended.float().mean() < 1
    assert row["reward"] == pytest.approx(seen[0][0].mean().item())


def test_equal_rewards_move_nothing_under_rloo(tmp_path):
    rows = run(tiny_args(tmp_path, beta=0.0, reward=reward_file(tmp_path)))
    assert all(row["grad_norm"] == 0 and "gold_reward" in row for row in rows)


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_runs_and_is_logged(tmp_path, baseline):
    rows = run(tiny_args(tmp_path, baseline=baseline, gamma=0.99))
    names = {"none", "batch", "moving", "rloo"} | {baseline}
    assert {k for k in rows[1] if "_ms_" in k} == {f"advantage_ms_{b}" for b in names}
    assert rows[0]["advantage_ms_moving"] == rows[0]["advantage_ms_none"]
    assert rows[1]["advantage_ms_moving"] != rows[1]["advantage_ms_none"]
    assert rows[0]["grad_norm"] > 0


def test_learning_as_a_user_would(tmp_path):
    """`python reinforce_rloo.py`, fewer steps; greedy accuracy starts below 0.65."""
    command = [sys.executable, ROOT / "reinforce_rloo.py", "--output-dir", tmp_path / "run"]
    command += ["--num-steps", "25", "--eval-every", "25", "--eval-size", "200"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    accuracy = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    assert accuracy[0] < 0.65 and accuracy[-1] > 0.75
    for name in ("args.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "final"):
        assert (tmp_path / "run" / name).exists(), name
    names = {"reward", "reward_std", "kl", "kl_per_token", "entropy", "completion_length", "ended",
             "loss", "grad_norm", "lr", "tokens_per_second", "seconds", "step"}  # fmt: skip
    assert names <= set(rows[1])
