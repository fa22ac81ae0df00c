"""grpo.py against hand values, plain loops, enumeration, and learning on the toy."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, other_weights

import grpo


def tiny_args(tmp_path, **changes):
    """Args of a short run on the toy."""
    values = grpo.TOY | dict(
        model=str(ROOT / "toy/model"),
        dataset=str(ROOT / "toy/problems_train.jsonl"),
        eval_dataset="",
        eval_size=0,
        num_steps=3,
        num_prompts=4,
        num_generations=4,
        micro_batch_size=16,
        output_dir=str(tmp_path / "run"),
        device="cpu",
    )
    return grpo.Args(**values | changes)


def metrics_of(args):
    with open(f"{args.output_dir}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def run(args):
    """Train; -> rows of metrics, final weights."""
    from safetensors.torch import load_file

    grpo.main(args)
    return metrics_of(args), load_file(f"{args.output_dir}/final/model.safetensors")


# --- The algorithm --------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    got = grpo.group_advantages(rewards, 4)
    assert torch.allclose(got, torch.tensor([-0.9258, -0.4629, 0.0, 1.3887]), atol=2e-4)
    got = grpo.group_advantages(rewards, 4, scale_by_std=False)
    assert got.tolist() == [-2.0, -1.0, 0.0, 3.0]


def test_advantages_stay_within_their_group():
    rewards = torch.cat([torch.randn(4), 100 + 5 * torch.randn(4)])
    got = grpo.group_advantages(rewards, 4).view(2, 4)
    assert torch.allclose(got.mean(1), torch.zeros(2), atol=1e-4)
    assert torch.allclose(got.std(1), torch.ones(2), atol=1e-2)
    swapped = grpo.group_advantages(rewards.view(2, 4).flip(0).reshape(-1), 4)
    assert torch.equal(swapped.view(2, 4).flip(0), got)


@pytest.mark.parametrize("size", [2, 3, 6, 7])
def test_equal_rewards_give_no_advantage(size):
    for value in (0.1, 1 / 3, 1e6 + 0.1):
        assert (grpo.group_advantages(torch.full((2 * size,), value), size) == 0).all()


@pytest.mark.parametrize("steps", range(2, 9))
def test_equal_step_rewards_give_no_advantage(steps):
    ends = torch.arange(steps).expand(4, -1).clone()
    ends[1::2, -1] = -1
    for value in (0.1, 1 / 3, 1e6 + 0.1):
        rewards = torch.full((4, steps), value) * (ends >= 0)
        assert (grpo.process_advantages(rewards, ends, steps, 2) == 0).all()


def slow_process_advantages(rewards, ends, num_tokens, size):
    """DeepSeekMath 4.1.3 as a plain loop over lists."""
    out = []
    for g in range(0, len(rewards), size):
        group = range(g, g + size)
        values = [r for i in group for r in rewards[i]]
        mean = sum(values) / len(values)
        std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        for i in group:
            normalised = [(r - mean) / (std + 1e-4) for r in rewards[i]]
            out.append(
                [sum(n for n, e in zip(normalised, ends[i], strict=True) if e >= t)
                 for t in range(num_tokens)]
            )  # fmt: skip
    return torch.tensor(out)


def test_process_advantages_equal_a_slow_loop():
    rewards = [[1.0, 0.0], [1.0, 1.0, 0.0], [0.5], [0.0, 1.0, 1.0]]
    ends = [[1, 4], [0, 2, 5], [3], [1, 1, 2]]
    S = 3
    r = torch.tensor([x + [77.0] * (S - len(x)) for x in rewards])  # junk where there is no step
    e = torch.tensor([x + [-1] * (S - len(x)) for x in ends])
    got = grpo.process_advantages(r, e, 6, 2)
    assert torch.allclose(got, slow_process_advantages(rewards, ends, 6, 2), atol=1e-5)
    assert got[2, 3] == got[2, 0] and (got[2, 4:] == 0).all()


def test_process_with_one_step_is_outcome():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    got = grpo.process_advantages(rewards[:, None], torch.full((4, 1), 4), 5, 4)
    want = grpo.group_advantages(rewards, 4)
    assert torch.allclose(got, want[:, None].expand(4, 5), atol=1e-5)


def test_the_mean_over_tokens_by_hand():
    mask = torch.tensor([[1] * 5 + [0] * 5, [1] * 10]).bool()
    loss = torch.tensor([[1.0, 1, 1, 1, 10, 9, 9, 9, 9, 9], [1.0] * 9 + [10]])
    for how, value in (("sequence", 2.35), ("token", 2.2), ("constant", 1.65)):
        assert torch.isclose((grpo.token_weights(mask, how, 10) * loss).sum(), torch.tensor(value))
    half = grpo.token_weights(mask, "constant", 20)
    assert torch.isclose((half * loss).sum(), torch.tensor(1.65 / 2))


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [  # slope: d loss / d ratio; 0 where clipping has cut the gradient
        (1, 0.5, -0.5, -1), (1, 1.0, -1.0, -1), (1, 1.5, -1.2, 0),
        (-1, 0.5, 0.8, 0), (-1, 1.0, 1.0, 1), (-1, 1.5, 1.5, 1),
    ],
)  # fmt: skip
def test_the_clips_truth_table(advantage, ratio, loss, slope):
    logps = torch.tensor([[float(ratio)]]).log().requires_grad_()
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    got, active = grpo.grpo_loss(logps, zero, zero, advantage * one, one, 0.2, 0.2, 0.0, "k3")
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert logps.grad.item() == pytest.approx(slope * ratio, abs=1e-6)  # d ratio / d logp = ratio
    assert active.item() == (slope == 0)


def test_the_upper_clip_is_its_own():
    logps, one = torch.tensor([[1.25]]).log(), torch.ones(1, 1)
    for high, loss in ((0.2, -1.2), (0.28, -1.25)):
        got, _ = grpo.grpo_loss(logps, 0 * one, 0 * one, one, one, 0.2, high, 0.0, "k3")
        assert got.item() == pytest.approx(loss)


def test_the_kl_is_a_cost():
    """A token likelier under the policy than the reference raises the loss, with A = 0."""
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    near = grpo.grpo_loss(zero - 1.0, zero - 1, zero - 1.1, zero, one, 0.2, 0.2, 0.5, "k1")[0]
    far = grpo.grpo_loss(zero - 1.0, zero - 1, zero - 3.0, zero, one, 0.2, 0.2, 0.5, "k1")[0]
    assert near.item() == pytest.approx(0.05) and far.item() == pytest.approx(1.0)


def test_eq_11_is_the_gradient_of_log_pi():
    logps = torch.randn(2, 3).requires_grad_()
    weights, advantages = torch.rand(2, 3), torch.randn(2, 3)
    loss, _ = grpo.grpo_loss(
        logps, logps.detach(), logps.detach(), advantages, weights, 0.2, 0.2, 0.0, "k3"
    )
    loss.backward()
    assert loss.item() == pytest.approx(-(weights * advantages).sum().item())
    assert torch.allclose(logps.grad, -weights * advantages)


# --- The task -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("The answer is 42", "42", 1), ("42", 42, 1), ("41", "42", 0), ("", "42", 0),
        ("no number", "42", 0), ("7, then 42.", "42", 1), ("42 or 7", "42", 0),
        ("-42", "42", 0), ("-42", "-42", 1), ("1,234", "1234", 1), ("1234", "1,234", 1),
        ("3.50", "3.5", 1), ("$18.", "18", 1), ("x=042", "42", 1), ("12 dollars", "12.0", 1),
    ],
)  # fmt: skip
def test_verifier(text, answer, right):
    assert grpo.verifier(["p"], [text], [{"answer": answer}]) == [right]


def test_step_ends():
    assert grpo.step_ends(list("ab\ncd\nef") + [""], "\n") == [2, 5, 8]
    assert grpo.step_ends(list("ab\n\ncd\n"), "\n") == [2, 6]
    assert grpo.step_ends(["a\nb\n", "c", ""], "\n") == [0, 0, 2]
    assert grpo.step_ends(list("a\n\nb") + [""], "\n\n") == [2, 4]
    assert grpo.step_ends([""], "\n") == []


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_lr_0_keeps_ratio_1_and_kl_0(tmp_path, temperature):
    args = tiny_args(tmp_path, learning_rate=0.0, num_epochs=2, num_minibatches=2,
                     temperature=temperature)  # fmt: skip
    for row in run(args)[0]:
        assert abs(row["kl"]) < 1e-4 and abs(row["kl_per_token"]) < 1e-5
        assert row["clip_frac"] == 0 and abs(row["approx_kl"]) < 1e-8
    args = tiny_args(tmp_path / "b", learning_rate=0.0)
    assert all(abs(row["kl"]) < 1e-4 and row["clip_frac"] == 0 for row in run(args)[0])


def test_bfloat16_trains(tmp_path):
    """What cuda takes by default. Policy and reference compute alike: a KL of 0, a ratio of 1."""
    changes = dict(dtype="bfloat16", num_epochs=2, num_minibatches=2)
    for row in run(tiny_args(tmp_path / "a", learning_rate=0.0, **changes))[0]:
        assert abs(row["kl"]) < 0.02 and row["clip_frac"] == 0 and row["approx_kl"] < 1e-4
    rows, weights = run(tiny_args(tmp_path / "b", **changes))
    assert rows[-1]["approx_kl"] > 0 and rows[0]["grad_norm"] > 0
    assert {x.dtype for x in weights.values()} == {torch.float32}


def test_later_minibatches_have_another_ratio(tmp_path):
    args = tiny_args(tmp_path, num_epochs=2, num_minibatches=2, learning_rate=1e-3, num_steps=1)
    assert run(args)[0][0]["approx_kl"] > 1e-5


def test_one_gradient_step_computes_no_old_logps(tmp_path, monkeypatch):
    calls = []
    fixed = grpo.fixed_logps
    monkeypatch.setattr(grpo, "fixed_logps", lambda *a: calls.append(1) or fixed(*a))
    run(tiny_args(tmp_path, num_steps=1))
    assert len(calls) == 1  # the reference
    run(tiny_args(tmp_path / "b", num_steps=1, beta=0.0))
    assert len(calls) == 1
    run(tiny_args(tmp_path / "c", num_steps=1, num_epochs=2))
    assert len(calls) == 3


def test_beta_0_loads_no_reference(tmp_path, monkeypatch):
    loads = []
    load = grpo.load_model
    monkeypatch.setattr(grpo, "load_model", lambda *a: loads.append(1) or load(*a))
    rows, _ = run(tiny_args(tmp_path, num_steps=1, beta=0.0))
    assert len(loads) == 1 and "kl" not in rows[0]


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_micro_batches_change_nothing(tmp_path, aggregate):
    got = []
    for size in (16, 3, 1):
        args = tiny_args(
            tmp_path / str(size), micro_batch_size=size, num_steps=1, aggregate=aggregate,
            beta=0.1, learning_rate=0.0,
        )  # fmt: skip
        got.append(run(args)[0][0])
    assert got[0]["grad_norm"] > 0
    for row in got[1:]:
        for name in ("loss", "grad_norm", "entropy", "kl"):
            assert row[name] == pytest.approx(got[0][name], rel=1e-3, abs=1e-5), name


def test_plain_prompts_train_alike(tmp_path):
    rows = [
        run(tiny_args(tmp_path / str(s), share_prompts=s, num_steps=1))[0][0] for s in (True, False)
    ]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("beta, size", [(0.0, 16), (0.5, 16), (0.5, 3)])
def test_the_gradient_is_that_of_the_textbook(tmp_path, monkeypatch, beta, size):
    """One step of main from the first weights, beside a plain loop over single sequences; with a
    reference that differs from the policy."""
    from safetensors.torch import load_file

    loaded = other_weights(grpo, monkeypatch)
    args = tiny_args(tmp_path, num_steps=1, beta=beta, max_grad_norm=1e-30, learning_rate=0.0,
                     micro_batch_size=size)  # fmt: skip
    row = run(args)[0][0]
    norm, ref = row["grad_norm"], loaded[-1]
    monkeypatch.undo()
    torch.manual_seed(args.seed)
    tokenizer = grpo.load_tokenizer(args.model)
    policy = grpo.load_model(grpo.AutoModelForCausalLM, args.model, torch.device("cpu"))
    rows = grpo.load_rows(args.dataset)
    drawn = grpo.random.Random(f"{args.seed} 1").sample(rows, 4)
    batch, texts, _ = grpo.generate(
        policy, tokenizer, [r["prompt"] for r in drawn], 4, args.max_new_tokens, 1.0
    )
    loss = advantages = penalty = 0.0
    for i in range(len(texts)):
        group = [float(texts[j].split("\n")[-1] == drawn[i // 4]["answer"])
                 for j in range(i // 4 * 4, i // 4 * 4 + 4)]  # fmt: skip
        mean = sum(group) / 4
        std = (sum((r - mean) ** 2 for r in group) / 3) ** 0.5
        prompt = batch.prompt_ids[i // 4][batch.prompt_mask[i // 4]].tolist()
        ids = batch.completion_ids[i][batch.completion_mask[i]].tolist()
        logp = policy(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        chosen = [logp[len(prompt) - 1 + t, token] for t, token in enumerate(ids)]
        # Its value is of no interest: log pi has the gradient of the ratio at 1
        loss = loss - (group[i % 4] - mean) / (std + 1e-4) * sum(chosen) / len(ids) / 16
        advantages += (group[i % 4] - mean) / (std + 1e-4) / 16
        if beta:
            logp = ref(torch.tensor([prompt + ids])).logits[0].log_softmax(-1).detach()
            for t, token in enumerate(ids):
                log_r = logp[len(prompt) - 1 + t, token] - chosen[t]
                kl = log_r.exp() - 1 - log_r
                loss = loss + beta * kl / len(ids) / 16
                penalty += beta * kl.item() / len(ids) / 16
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    assert norm == pytest.approx(want, rel=1e-3) and norm > 0
    assert row["loss"] == pytest.approx(penalty - advantages, rel=1e-3, abs=1e-5)
    assert (penalty > 0.01) == (beta > 0)
    assert load_file(f"{args.output_dir}/final/model.safetensors")


def test_equal_rewards_move_nothing(tmp_path):
    path = tmp_path / "flat.py"
    path.write_text("def f(prompts, completions, rows):\n    return [0.3] * len(prompts)")
    rows, weights = run(tiny_args(tmp_path, reward=f"{path}:f", beta=0.0, num_steps=2))
    start = grpo.load_model(grpo.AutoModelForCausalLM, ROOT / "toy/model", torch.device("cpu"))
    assert all(row["no_signal"] == 1 and row["grad_norm"] == 0 for row in rows)
    assert all(torch.equal(weights[n], p) for n, p in start.named_parameters() if n in weights)
    assert "gold_reward" in rows[0]


def test_answers_that_are_no_numbers_give_no_gold_reward(tmp_path):
    """Only a verifier that trains must be able to read them."""
    rows = [{"prompt": f"{i}+1", "answer": "Paris"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.py").write_text("def f(p, c, r):\n    return [float(len(x)) for x in c]")
    rows, _ = run(tiny_args(tmp_path, dataset=str(tmp_path / "rows.jsonl"), num_steps=1,
                            reward=f"{tmp_path}/one.py:f"))  # fmt: skip
    assert "gold_reward" not in rows[0] and rows[0]["reward"] > 0


@pytest.mark.filterwarnings("ignore:over 20")
def test_the_penalty_of_completions_that_were_cut_off(tmp_path):
    """Some end within 34 tokens. The reward is told which; with the penalty it is not heard."""
    (tmp_path / "told.py").write_text(
        "def f(p, c, rows):\n    return [float(row['ended']) for row in rows]"
    )
    same = dict(num_steps=1, max_new_tokens=34, reward=f"{tmp_path}/told.py:f", learning_rate=0.0)
    rows = [run(tiny_args(tmp_path / str(p), missing_eos_penalty=p, **same))[0][0]
            for p in (None, 2.0)]  # fmt: skip
    ended = rows[0]["ended"]
    assert 0 < ended < 1 and rows[1]["ended"] == ended
    assert rows[0]["reward"] == pytest.approx(ended)
    assert rows[1]["reward"] == pytest.approx(ended - 2 * (1 - ended))


def test_each_completion_is_scored_with_its_own_row(tmp_path):
    path = tmp_path / "check.py"
    path.write_text(
        "def f(prompts, completions, rows):\n"
        "    assert [r['prompt'] for r in rows] == prompts and len(prompts) == len(completions)\n"
        "    digit = lambda p: p.split('+')[0][-1]\n"
        "    return [float(c[:1] == digit(p)) for p, c in zip(prompts, completions)]"
    )
    rows, _ = run(tiny_args(tmp_path, reward=f"{path}:f", num_steps=1))
    assert rows[0]["reward"] > 0.9  # each solution begins with its own prompt's last digit


def test_learning_as_a_user_would(tmp_path):
    """`python grpo.py`, fewer steps; greedy accuracy starts below 0.65."""
    command = [sys.executable, ROOT / "grpo.py", "--output-dir", tmp_path / "run"]
    command += ["--num-steps", "25", "--eval-every", "25", "--eval-size", "200"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    with open(tmp_path / "run/metrics.jsonl") as f:
        rows = [json.loads(line) for line in f]
    accuracy = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    reward = [row["reward"] for row in rows if "reward" in row]
    assert accuracy[0] < 0.65 and accuracy[-1] > 0.8
    assert sum(reward[-5:]) / 5 > sum(reward[:2]) / 2 + 0.12
    for name in ("args.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "final"):
        assert (tmp_path / "run" / name).exists(), name
    names = {"reward", "reward_std", "kl", "kl_per_token", "entropy", "completion_length", "ended",
             "loss", "grad_norm", "lr", "clip_frac", "approx_kl", "tokens_per_second", "seconds",
             "no_signal", "step"}  # fmt: skip
    assert names <= set(rows[1])


def test_process_supervision_learns(tmp_path):
    args = tiny_args(
        tmp_path, supervision="process", reward=f"{ROOT}/toy/make.py:step_rewards", num_steps=20,
        num_prompts=16, num_generations=8, micro_batch_size=128,
    )  # fmt: skip
    gold = [row["gold_reward"] for row in run(args)[0]]
    assert sum(gold[-5:]) / 5 > sum(gold[:2]) / 2 + 0.12


@pytest.mark.real
def test_two_steps_of_a_real_model(tmp_path, real_model):
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = grpo.Args(
        model=real_model, dataset=str(path), output_dir=str(tmp_path / "run"), num_steps=2,
        num_prompts=2, num_generations=2, max_new_tokens=16, eval_size=0,
    )  # fmt: skip
    rows, weights = run(args)
    assert len(rows) == 2 and all(abs(row["kl"]) < 0.1 for row in rows)
    assert dataclasses.asdict(args) == json.loads((tmp_path / "run/args.json").read_text())
