"""grpo.py against hand values, plain loops, enumeration, and learning on the toy."""

import dataclasses
import json
import math
import subprocess
import sys

import observe
import plain
import policy_gradient
import pytest
import torch
from conftest import ROOT, other_weights

import common
import plumbing
import grpo

pytestmark = [pytest.mark.usefixtures("no_picture"), pytest.mark.filterwarnings("ignore:over 20")]


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


def quick_args(tmp_path, tiny, **changes):
    """The same with a random model, and a reward of more than two values."""
    (tmp_path / "kinds.py").write_text(
        "def f(p, c, r):\n    return [float(len(set(text))) for text in c]"
    )
    few = policy_gradient.write_rows(tmp_path / "few.jsonl", policy_gradient.problems(12, 100))
    quick = dict(model=tiny, dataset=few, max_new_tokens=14, reward=f"{tmp_path}/kinds.py:f")
    return tiny_args(tmp_path, **quick | changes)


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


@pytest.mark.parametrize("by_std", [True, False])
def test_a_lone_step_and_none_have_no_advantage(by_std):
    """Of the first group one completion has one step, of the second none has any."""
    ends = torch.tensor([[2, -1], [-1, -1], [-1, -1], [-1, -1], [1, 3], [3, -1]])
    rewards = torch.tensor([[5.0, 9.0], [9.0, 9.0], [9.0, 9.0], [9.0, 9.0], [0.0, 1.0], [2.0, 9.0]])
    got = grpo.process_advantages(rewards, ends, 4, 2, by_std)
    assert (got[:4] == 0).all()
    scale = 1 + 1e-4 if by_std else 1.0  # the steps 0, 1, 2 have mean 1 and deviation 1
    want = torch.tensor([[-1.0, -1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]) / scale
    assert torch.allclose(got[4:], want, atol=1e-6)


def test_the_constant_is_max_new_tokens_whatever_the_longest_completion(runs, monkeypatch):
    lengths = []
    weights = grpo.token_weights

    def noting(mask, aggregate, max_len):
        lengths.append((mask.shape[1], max_len))
        return weights(mask, aggregate, max_len)

    monkeypatch.setattr(grpo, "token_weights", noting)
    runs(aggregate="constant", max_new_tokens=180, num_prompts=2, num_steps=1)
    assert {max_len for _, max_len in lengths} == {180} and lengths[0][0] < 180


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


# What all three losses have in common: (logps, old_logps, ref_logps, advantages, weights, clip_eps,
# clip_eps_high, beta, kl) -> loss, where the clip is active.


def gradient_of(loss, logps, old_logps, advantages, weights, beta=0.0):
    """-> loss, its gradient for the log-probs, where the clip (0.8 to 1.3) is active."""
    logps = logps.clone().requires_grad_()
    value, active = loss(
        logps, old_logps, logps.detach() - 0.3, advantages, weights, 0.2, 0.3, beta, "k3"
    )
    value.backward()
    return value.item(), logps.grad, active


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize("name", ["gspo", "cispo"])
def test_at_the_ratio_1_all_losses_have_one_gradient(name, aggregate):
    """Ragged completions, also one of a single token, each with one advantage for all tokens."""
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    logps = -torch.rand(3, 5) * mask
    advantages = torch.tensor([[1.5], [-0.7], [0.2]]).expand(3, 5)
    weights = grpo.token_weights(mask, aggregate, 8)
    for beta in (0.0, 0.5):
        same = (logps, logps, advantages, weights, beta)
        value, wanted, active = gradient_of(grpo.grpo_loss, *same)
        other_value, got, other_active = gradient_of(grpo.LOSSES[name], *same)
        assert torch.allclose(got, wanted, atol=1e-7) and wanted.abs().max() > 0.05
        assert not (active & mask).any() and not (other_active & mask).any()
        assert (value == pytest.approx(other_value)) == (name == "gspo")


def test_gspo_by_hand():
    """Log-ratios 0.1 and 0.3 are a ratio of e^0.2, whatever stands in the padding."""
    weights = torch.tensor([[0.5, 0.5, 0.0]])
    logps = torch.tensor([[-1.0, -2.0, 0.0]])
    old_logps = torch.tensor([[-1.1, -2.3, -9.0]])
    up = torch.full((1, 3), 2.0)
    value, slope, active = gradient_of(grpo.gspo_loss, logps, old_logps, up, weights)
    assert value == pytest.approx(-2 * math.exp(0.2)) and not active.any()
    # d/d log pi_t of -A s is -A s / |y|, the same for both tokens
    assert slope[0].tolist() == pytest.approx([-math.exp(0.2), -math.exp(0.2), 0.0])
    value, _, _ = gradient_of(grpo.gspo_loss, logps, old_logps, up, weights, beta=0.5)
    kl = math.exp(-0.3) - 1 + 0.3
    assert value == pytest.approx(-2 * math.exp(0.2) + 0.5 * kl, rel=1e-5)


@pytest.mark.parametrize(
    "advantage, log_ratios, loss",
    [
        (1.0, [0.0, 0.8], -1.3), (1.0, [-1.0, 0.2], -math.exp(-0.4)),
        (-1.0, [0.0, 0.8], math.exp(0.4)), (-1.0, [-1.0, 0.2], 0.8),
    ],
)  # fmt: skip
def test_gspo_clips_whole_completions(advantage, log_ratios, loss):
    """By their mean: in the first case one of two tokens has not moved, in the others both have,
    to different sides of the bounds 0.8 and 1.3."""
    logps = torch.tensor([log_ratios])
    advantages = torch.full((1, 2), advantage)
    value, slope, active = gradient_of(
        grpo.gspo_loss, logps, 0 * logps, advantages, torch.full((1, 2), 0.5)
    )
    is_clipped = loss in (-1.3, 0.8)
    assert value == pytest.approx(loss) and active.tolist() == [[is_clipped] * 2]
    assert (slope == 0).all() == is_clipped


def test_gspo_with_one_token_is_grpo():
    logps = torch.linspace(-1, 1, 9)[:, None]
    advantages = torch.tensor([1.0, -1.0, 0.5] * 3)[:, None]
    same = (logps, 0 * logps, advantages, torch.full((9, 1), 1 / 9), 0.1)
    value, wanted, active = gradient_of(grpo.grpo_loss, *same)
    got_value, got, got_active = gradient_of(grpo.gspo_loss, *same)
    assert got_value == pytest.approx(value) and torch.allclose(got, wanted)
    assert torch.equal(got_active, active) and 0 < active.sum() < 9


def test_cispo_by_hand():
    """Ratios 0.5, 1, 2 with bounds 0.8 and 1.3: weights 0.5, 1, 1.3 of log pi, each kept in the
    gradient."""
    logps = torch.tensor([[0.5, 1.0, 2.0]]).log() - 1
    old_logps = torch.full((1, 3), -1.0)
    weights = torch.tensor([[0.2, 0.3, 0.5]])
    for sign in (1.0, -1.0):
        advantages = torch.full((1, 3), 2.0 * sign)
        value, slope, active = gradient_of(grpo.cispo_loss, logps, old_logps, advantages, weights)
        weighed = [0.2 * 0.5, 0.3 * 1.0, 0.5 * 1.3]
        terms = [w * p for w, p in zip(weighed, logps[0].tolist(), strict=True)]
        assert value == pytest.approx(-2 * sign * sum(terms))
        assert slope[0].tolist() == pytest.approx([-2 * sign * w for w in weighed])
        assert active.tolist() == [[False, False, True]]
        assert gradient_of(grpo.grpo_loss, logps, old_logps, advantages, weights)[1].eq(0).any()
    still, _, _ = gradient_of(grpo.cispo_loss, logps, old_logps, 0 * weights, weights, beta=0.5)
    assert still == pytest.approx(0.5 * (math.exp(-0.3) - 0.7), rel=1e-5)  # the KL is a cost


def test_groups_with_signal():
    """Groups of 2: level, 0 1, level, 1 0, 0 1. The first ones that are not level, in their order;
    where they are too few, the first level ones, too."""
    scores = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 0, 0, 1])
    for count, groups in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [0, 1, 3, 4])):
        wanted = [[2 * group, 2 * group + 1] for group in groups]
        assert grpo.groups_with_signal(scores, 2, count).view(-1, 2).tolist() == wanted
    assert grpo.groups_with_signal(scores, 2, 5).tolist() == list(range(10))
    assert grpo.groups_with_signal(torch.ones(6), 2, 2).tolist() == [0, 1, 2, 3]
    assert grpo.groups_with_signal(torch.tensor([5.0, 5, 5, 1, 1, 2]), 3, 1).tolist() == [3, 4, 5]


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
    assert grpo.step_ends(list("ab\ncd\nef") + [""], "\n", "".join) == [2, 5, 8]
    assert grpo.step_ends(list("ab\n\ncd\n"), "\n", "".join) == [2, 6]
    assert grpo.step_ends(["a\nb\n", "c", ""], "\n", "".join) == [0, 0, 2]
    assert grpo.step_ends(list("a\n\nb") + [""], "\n\n", "".join) == [2, 4]
    assert grpo.step_ends([""], "\n", "".join) == []


class LettersAtZero:
    """A tokenizer whose id 0, which stands in the padding, is a letter."""

    def decode(self, row, skip_special_tokens):
        assert skip_special_tokens
        return "".join("a\n"[token] for token in row)


def test_padding_is_no_step():
    ids = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    prompts = torch.zeros(2, 1, dtype=torch.long)
    batch = common.Batch(prompts, prompts == 0, ids, mask, torch.tensor([0, 1]))
    rewards, ends = grpo.process_rewards([[0.5, 2.0], [3.0]], batch, LettersAtZero(), "\n")
    assert rewards.tolist() == [[0.5, 2.0], [3.0, 0.0]] and ends.tolist() == [[2, 3], [1, -1]]


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_lr_0_keeps_ratio_1_and_kl_0(tmp_path, tiny, temperature):
    args = quick_args(tmp_path, tiny, learning_rate=0.0, num_epochs=2, num_minibatches=2,
                     temperature=temperature)  # fmt: skip
    for row in run(args)[0]:
        assert abs(row["kl"]) < 1e-4 and abs(row["kl_per_token"]) < 1e-5
        assert row["clip_frac"] == 0 and abs(row["approx_kl"]) < 1e-8
    args.output_dir = str(tmp_path / "b")
    args.num_epochs = args.num_minibatches = 1
    rows, _ = run(args)
    assert all(abs(row["kl"]) < 1e-4 and row["clip_frac"] == 0 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)


def test_bfloat16_trains(tmp_path, tiny):
    """What cuda takes by default. Policy and reference compute alike: a KL of 0, a ratio of 1."""
    changes = dict(dtype="bfloat16", num_epochs=2, num_minibatches=2)
    still = quick_args(tmp_path, tiny, learning_rate=0.0, **changes)
    for row in run(still)[0]:
        assert abs(row["kl"]) < 0.02 and row["clip_frac"] == 0 and row["approx_kl"] < 1e-4
    changes |= dict(output_dir=str(tmp_path / "b"))
    rows, weights = run(quick_args(tmp_path, tiny, **changes))
    assert rows[-1]["approx_kl"] > 0 and rows[0]["grad_norm"] > 0
    assert {x.dtype for x in weights.values()} == {torch.float32}


def test_later_minibatches_have_another_ratio(tmp_path, tiny):
    changes = dict(num_epochs=2, num_minibatches=2, learning_rate=1e-3, num_steps=1)
    args = quick_args(tmp_path, tiny, **changes)
    assert run(args)[0][0]["approx_kl"] > 1e-5


def test_one_gradient_step_computes_no_old_logps(tmp_path, tiny, monkeypatch):
    calls = []
    fixed = grpo.fixed_logps
    monkeypatch.setattr(grpo, "fixed_logps", lambda *a: calls.append(1) or fixed(*a))
    run(quick_args(tmp_path, tiny, num_steps=1))
    assert len(calls) == 1  # the reference
    same = dict(num_steps=1, overwrite=True)
    run(quick_args(tmp_path, tiny, beta=0.0, **same))
    assert len(calls) == 1
    run(quick_args(tmp_path, tiny, num_epochs=2, **same))
    assert len(calls) == 3


def test_beta_0_loads_no_reference(tmp_path, tiny, monkeypatch):
    loads = []
    load = grpo.load_model
    monkeypatch.setattr(grpo, "load_model", lambda *a: loads.append(1) or load(*a))
    rows, _ = run(quick_args(tmp_path, tiny, num_steps=1, beta=0.0))
    assert len(loads) == 1 and "kl" not in rows[0]


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_micro_batches_change_nothing(tmp_path, tiny, aggregate):
    got = []
    for size in (16, 3, 1):
        args = quick_args(
            tmp_path, tiny, output_dir=str(tmp_path / str(size)), micro_batch_size=size,
            num_steps=1, aggregate=aggregate, beta=0.1, learning_rate=0.0,
        )  # fmt: skip
        got.append(run(args)[0][0])
    assert got[0]["grad_norm"] > 0
    for row in got[1:]:
        for name in ("loss", "grad_norm", "entropy", "kl"):
            assert row[name] == pytest.approx(got[0][name], rel=1e-3, abs=1e-5), name


def test_plain_prompts_train_alike(tmp_path, tiny):
    rows = []
    for share in (True, False):
        folder = str(tmp_path / str(share))
        args = quick_args(tmp_path, tiny, share_prompts=share, num_steps=1, output_dir=folder)
        rows.append(run(args)[0][0])
    assert rows[0]["grad_norm"] > 0
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("beta, size", [(0.0, 16), (0.5, 16), (0.5, 3)])
def test_the_gradient_is_that_of_the_textbook(tmp_path, monkeypatch, beta, size):
    """One step of main from the first weights, beside a plain loop over single sequences; with a
    reference that differs from the policy."""
    loaded = other_weights(grpo, monkeypatch)
    args = tiny_args(tmp_path, num_steps=1, beta=beta, max_grad_norm=1e-9, learning_rate=0.0,
                     micro_batch_size=size)  # fmt: skip
    rows, weights = run(args)
    row = rows[0]
    norm, ref = row["grad_norm"], loaded[-1]
    monkeypatch.undo()
    torch.manual_seed(args.seed)
    tokenizer = grpo.load_tokenizer(args.model)
    policy = grpo.load_model(grpo.AutoModelForCausalLM, args.model, torch.device("cpu"))
    rows = plumbing.load_rows(args.dataset)
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
    start = dict(policy.named_parameters())
    assert all(torch.equal(weight, start[name]) for name, weight in weights.items())  # no rate


def test_equal_rewards_move_nothing(tmp_path, tiny):
    path = tmp_path / "flat.py"
    path.write_text("def f(prompts, completions, rows):\n    return [0.3] * len(prompts)")
    changes = dict(reward=f"{path}:f", beta=0.0, num_steps=2)
    rows, weights = run(quick_args(tmp_path, tiny, **changes))
    start = grpo.load_model(grpo.AutoModelForCausalLM, tiny, torch.device("cpu"))
    assert all(row["no_signal"] == 1 and row["grad_norm"] == 0 for row in rows)
    assert all(torch.equal(weights[n], p) for n, p in start.named_parameters() if n in weights)
    assert "gold_reward" in rows[0]


def test_answers_that_are_no_numbers_give_no_gold_reward(tmp_path, tiny):
    """Only a verifier that trains must be able to read them."""
    rows = [{"prompt": f"{i}+1", "answer": "Paris"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.py").write_text("def f(p, c, r):\n    return [float(len(x)) for x in c]")
    rows, _ = run(quick_args(tmp_path, tiny, dataset=str(tmp_path / "rows.jsonl"), num_steps=1,
                             reward=f"{tmp_path}/one.py:f"))  # fmt: skip
    assert "gold_reward" not in rows[0] and rows[0]["reward"] > 0


def test_the_penalty_of_completions_that_were_cut_off(tmp_path, tiny):
    """Some end within 14 tokens. The reward is told which; with the penalty it is not heard."""
    (tmp_path / "told.py").write_text(
        "def f(p, c, rows):\n    return [float(row['ended']) for row in rows]"
    )
    same = dict(num_steps=1, reward=f"{tmp_path}/told.py:f", learning_rate=0.0)
    rows = []
    for penalty in (None, 2.0):
        folder = str(tmp_path / str(penalty))
        args = quick_args(tmp_path, tiny, missing_eos_penalty=penalty, output_dir=folder, **same)
        rows.append(run(args)[0][0])
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


# --- A recorded run beside a plain loop -----------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs of grpo with the random model; runs(**changes) -> what one did."""
    return policy_gradient.Runs(
        grpo, tmp_path_factory.mktemp("grpo"), tiny, dict(num_epochs=1, num_minibatches=1),
        num_epochs=2, num_minibatches=2, beta=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(runs):
    return runs()


def plain_outcome_advantages(args, group):
    """(r - mean) / (std + 1e-4) of the completions of one prompt; 0 where all are equal."""
    values = [row.value for row in group]
    centre = sum(values) / len(values)
    std = (sum((v - centre) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    for row in group:
        advantage = row.value - centre
        if args.scale_by_std:
            advantage /= std + 1e-4
        if len(set(values)) == 1:
            advantage = 0.0
        row.advantages = torch.full((len(row.completion),), advantage)


def plain_step_ends(row, separator, tokenizer):
    """The token with which each step that is not blank ends; the last one: the last token."""
    ends = []
    text = ""
    for t, token in enumerate(row.completion):
        text += tokenizer.decode([token], skip_special_tokens=True)
        if text.endswith(separator):
            if text[: -len(separator)].strip():
                ends.append(t)
            text = ""
    if text.strip():
        ends.append(len(row.completion) - 1)
    return ends


def plain_process_advantages(args, group, tokenizer):
    """DeepSeekMath 4.1.3 of one prompt's completions: the sum over steps that end later."""
    values = sum([row.value for row in group], [])
    centre = sum(values) / max(1, len(values))
    std = (sum((v - centre) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
    scale = 1.0
    if args.scale_by_std:
        scale = 1 / (std + 1e-4)
    if len(set(values)) < 2:
        scale = 0.0
    for row in group:
        ends = plain_step_ends(row, args.step_separator, tokenizer)
        row.advantages = torch.zeros(len(row.completion))
        for end, value in zip(ends, row.value, strict=True):
            row.advantages[: end + 1] += (value - centre) * scale


def set_advantages(args, rows):
    tokenizer = grpo.load_tokenizer(args.model)
    for number in {row.group for row in rows}:
        group = [row for row in rows if row.group == number]
        if args.supervision == "outcome":
            plain_outcome_advantages(args, group)
        else:
            plain_process_advantages(args, group, tokenizer)


def sizes_of_minibatches(groups, number):
    """How many groups each has: as equal as can be, the first ones larger."""
    return [groups // number + (i < groups % number) for i in range(number)]


def groups_of_updates(seen, steps):
    """The groups of each gradient step, from what went through the policy. They are whole: each
    completion of a group once, with its own prompt. steps: a list of Rows for each."""
    left = []
    for batch in seen.arguments("completion_logps", "batch"):
        left += [plain.unpadded(batch)]
        assert len(left[-1]) <= seen.args.micro_batch_size
    updates = []
    for rows in steps:
        number = {tuple(row.prompt): row.group for row in rows}
        sizes = sizes_of_minibatches(len(number), seen.args.num_minibatches)
        for size in sizes * seen.args.num_epochs:
            forwarded = []
            while len(forwarded) < size * seen.args.num_generations:
                forwarded += left.pop(0)
            groups = {number[tuple(prompt)] for prompt, _ in forwarded}
            wanted = [(row.prompt, row.completion) for row in rows if row.group in groups]
            assert sorted(forwarded) == sorted(wanted) and len(groups) == size
            updates.append(groups)
    assert left == []
    return updates


def kl_of(kind, logps, ref):
    """k1, k2, k3 of KL(pi || ref), from log-probs of a row's tokens."""
    if kind == "k1":
        return logps - ref
    if kind == "k2":
        return (logps - ref) ** 2 / 2
    return (ref - logps).exp() - 1 - (ref - logps)


def weight_of(args, row, rows):
    """What each token of a row counts for in a minibatch of these rows."""
    if args.aggregate == "sequence":
        return 1 / len(row.completion) / len(rows)
    if args.aggregate == "token":
        return 1 / sum(len(other.completion) for other in rows)
    return 1 / args.max_new_tokens / len(rows)


def plain_policy_loss(args, logps, row):
    """The loss of each token of a row without the KL, and whether its clip is active."""
    high = args.clip_eps_high or args.clip_eps
    ratio = (logps - row.old).exp()
    if args.loss == "cispo":
        weight = [min(r.item(), 1 + high) for r in ratio]
        return -torch.tensor(weight) * row.advantages * logps, ratio.detach() > 1 + high
    if args.loss == "gspo":
        ratio = ratio.prod() ** (1 / len(row.completion)) * torch.ones_like(ratio)
    free = -ratio * row.advantages
    bound = -ratio.clamp(1 - args.clip_eps, 1 + high) * row.advantages
    return torch.where(bound > free, bound, free), bound > free


def plain_minibatch(args, policy, rows):
    """-> loss, tokens at which the clip is active, and the sum of k3 of KL(old || new)."""
    loss = 0.0
    clipped = 0
    moved = 0.0
    for row in rows:
        logps = plain.token_logps(policy, row.prompt, row.completion, args.temperature)
        tokens, active = plain_policy_loss(args, logps, row)
        if args.beta:
            tokens = tokens + args.beta * kl_of(args.kl, logps, row.ref)
        loss = loss + tokens.sum() * weight_of(args, row, rows)
        clipped += active.sum().item()
        difference = (logps - row.old).detach()
        moved += (difference.exp() - 1 - difference).sum().item()
    return loss, clipped, moved


def plain_step(args, trainer, rows, updates):
    """The gradient steps on one step's completions -> what is logged of them."""
    losses = []
    norms = []
    clipped = 0
    moved = 0.0
    for groups in updates:
        chosen = [row for row in rows if row.group in groups]
        loss, active, difference = plain_minibatch(args, trainer.model, chosen)
        norms.append(trainer.step(loss))
        losses.append(loss.item())
        clipped += active
        moved += difference
    tokens = args.num_epochs * sum(len(row.completion) for row in rows)
    return {
        "loss": sum(losses) / len(losses), "grad_norm": max(norms), "lr": trainer.rates[-1],
        "clip_frac": clipped / tokens, "approx_kl": moved / tokens,
    }  # fmt: skip


def plain_run(seen):
    """Train on a recorded run's completions -> metrics of each step, rows of each, the trainer."""
    args = seen.args
    calls = policy_gradient.calls_of(seen)
    steps = []
    for step in range(1, args.num_steps + 1):
        rows = policy_gradient.rows_of_step(seen, step, calls["train", step])
        set_advantages(args, rows)
        steps.append(rows)
    updates = groups_of_updates(seen, steps)
    each = args.num_epochs * args.num_minibatches
    assert len(updates) == each * args.num_steps
    trainer = policy_gradient.Trainer(seen)
    metrics = []
    for i, rows in enumerate(steps):
        policy_gradient.set_fixed(args, rows, trainer.model, seen.reference)
        wanted = plain_step(args, trainer, rows, updates[i * each : (i + 1) * each])
        groups = {row.group for row in rows}
        silent = set(groups)
        for row in rows:
            if row.advantages.abs().max() > 0:
                silent.discard(row.group)
        wanted["no_signal"] = len(silent) / len(groups)
        metrics.append(wanted | policy_gradient.shared_metrics(args, rows))
    return metrics, steps, trainer


def by_hand(seen):
    """Everything that a run logged and did is a plain loop's."""
    metrics, steps, trainer = plain_run(seen)
    for row, wanted in zip(seen.steps, metrics, strict=True):
        policy_gradient.same_metrics(row, wanted)
    policy_gradient.same_training(seen, trainer)
    policy_gradient.check_samples(seen, steps, policy_gradient.calls_of(seen))
    return metrics


HARD = dict(clip_eps=0.03, clip_eps_high=0.06, num_prompts=5, num_steps=2)
CASES = {
    "sequence, k3": HARD | dict(lr_schedule="linear", eval_every=1),
    "token, k2, no std": HARD
    | dict(aggregate="token", kl="k2", scale_by_std=False, temperature=0.7, max_grad_norm=0.5),
    "constant, k1": HARD | dict(aggregate="constant", kl="k1", beta=0.5, missing_eos_penalty=1.5),
    "process": HARD | dict(supervision="process", num_generations=4, num_minibatches=1),
    "process, no std": HARD | dict(supervision="process", scale_by_std=False, num_epochs=1),
    "one update": dict(num_epochs=1, num_minibatches=1, temperature=1.3, lr_schedule="cosine"),
    "no reference": HARD | dict(beta=0.0, num_epochs=3, clip_eps_high=0.0),
    "gspo": HARD | dict(loss="gspo", clip_eps=0.005, clip_eps_high=0.003),
    "cispo": HARD | dict(loss="cispo", aggregate="token", lr_schedule="linear"),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request, runs):
    """A run, and what a plain loop over single rows, with an AdamW of its own, makes of it."""
    changes = dict(request.param)
    if changes.get("supervision") == "process":
        changes["reward"] = runs.values["reward"].replace("mixed", "lines")
    seen = runs(**changes)
    return seen, *plain_run(seen)


def test_every_metric_is_a_plain_loops(case):
    seen, metrics, _, _ = case
    for row, wanted in zip(seen.steps, metrics, strict=True):
        policy_gradient.same_metrics(row, wanted)
    assert any(0 < row["no_signal"] < 1 for row in seen.steps)
    assert 0 < seen.steps[0]["ended"] < 1
    if len(seen.updates) > 3:
        assert seen.steps[0]["clip_frac"] > 0.02 and seen.steps[0]["approx_kl"] > 1e-4


def test_every_update_is_a_plain_loops(case):
    seen, _, _, trainer = case
    policy_gradient.same_training(seen, trainer)


def test_evaluations_and_samples_are_a_plain_loops(case):
    seen, _, steps, _ = case
    policy_gradient.check_evaluations(seen, policy_gradient.calls_of(seen))
    policy_gradient.check_samples(seen, steps, policy_gradient.calls_of(seen))


def test_a_level_group_among_others_has_a_member_without_advantage(base):
    """Rewards 0, 1, 2: the middle one has no advantage, the group has a signal."""
    _, steps, _ = plain_run(base)
    middle = [row for rows in steps for row in rows if row.row["kind"] == "levels"]
    assert {row.value for row in middle} == {0.0, 1.0, 2.0}
    for row in middle:
        assert (row.advantages == 0).all() == (row.value == 1.0)


def test_minibatches_are_shuffled_and_cover_each_epoch(runs):
    seen = runs(num_prompts=7, num_minibatches=3, num_steps=3)
    _, steps, _ = plain_run(seen)
    updates = groups_of_updates(seen, steps)
    epochs = [updates[i : i + 3] for i in range(0, len(updates), 3)]
    assert all(set.union(*epoch) == set(range(7)) for epoch in epochs)
    orders = {str([sorted(groups) for groups in epoch]) for epoch in epochs}
    assert len(orders) > 4 and str([[0, 1, 2], [3, 4], [5, 6]]) not in orders


def test_the_reference_stays_and_the_last_policy_is_saved(base, tiny):
    start = grpo.load_model(grpo.AutoModelForCausalLM, tiny, torch.device("cpu"))
    assert torch.equal(base.updates[0].weights, observe.flat(start.parameters()))
    policy, reference = base.results("load_model")
    assert torch.equal(observe.flat(policy.parameters()), policy_gradient.end_weights(base))
    other_start = grpo.load_model(grpo.AutoModelForCausalLM, tiny, torch.device("cpu"))
    noise = torch.Generator().manual_seed(7)
    for p in other_start.parameters():
        p.data += 0.03 * torch.randn(p.shape, generator=noise)
    assert torch.equal(observe.flat(reference.parameters()), observe.flat(other_start.parameters()))
    saved = grpo.load_model(grpo.AutoModelForCausalLM, base.folder / "final", torch.device("cpu"))
    assert torch.equal(observe.flat(saved.parameters()), policy_gradient.end_weights(base))
    assert grpo.load_tokenizer(base.folder / "final").chat_template


def test_speed_is_that_of_each_step(runs):
    policy_gradient.check_speed(runs)


def test_gold_reward_beside_a_reward_of_the_opposite(runs, base, tmp_path):
    policy_gradient.check_gold(runs, base, tmp_path)


def test_what_is_shown_while_it_runs(runs, capsys):
    runs(num_steps=1)
    policy_gradient.check_output(capsys.readouterr().out)


# --- Resuming -------------------------------------------------------------------------------------

SCHEDULE = dict(lr_schedule="linear", num_steps=4, eval_every=2)


@pytest.fixture(scope="module")
def unbroken(runs):
    return runs(**SCHEDULE)


@pytest.fixture(scope="module")
def killed(runs, tmp_path_factory):
    return policy_gradient.Killed(runs, tmp_path_factory.mktemp("killed"), **SCHEDULE)


def test_a_resumed_run_is_the_unbroken_one(killed, unbroken):
    got = killed.resume()
    assert policy_gradient.same_run(got, unbroken)
    assert [u.lr for u in got.updates] == [u.lr for u in unbroken.updates[8:]]
    assert [row["step"] for row in got.evals] == [0, 2, 4]


def test_a_resumed_run_that_samples_more_is_the_unbroken_one(runs, tmp_path_factory):
    """Which groups are drawn, and which are kept, hangs on the seed and the step alone."""
    changes = SCHEDULE | dict(oversample=3, loss="gspo")
    whole = runs(**changes)
    killed = policy_gradient.Killed(runs, tmp_path_factory.mktemp("more"), **changes)
    assert policy_gradient.same_run(killed.resume(), whole)
    assert not policy_gradient.same_run(killed.resume("torch"), whole)


def test_groups_without_any_signal_move_nothing(tmp_path, tiny):
    """Not one of those that are sampled has one: the batch is full, no_signal 1, no gradient."""
    path = tmp_path / "flat.py"
    path.write_text("def f(prompts, completions, rows):\n    return [0.3] * len(prompts)")
    changes = dict(reward=f"{path}:f", beta=0.0, num_steps=1, oversample=3)
    for loss in grpo.LOSSES:
        folder = str(tmp_path / loss)
        rows, _ = run(quick_args(tmp_path, tiny, loss=loss, output_dir=folder, **changes))
        assert rows[0]["no_signal"] == 1 and rows[0]["grad_norm"] == 0


@pytest.mark.parametrize("part", ["policy", "optimizer", "scheduler", "torch", "random"])
def test_every_part_of_the_checkpoint_is_needed(killed, unbroken, part):
    """With one part as it was a step before, the resumed run is another one."""
    assert not policy_gradient.same_run(killed.resume(part), unbroken)


# --- Flags ----------------------------------------------------------------------------------------


def flag_missing_eos_penalty(run, base, folder):
    """Minus this is the reward of what was cut off, whatever the reward says; not in evaluation."""
    got = run(missing_eos_penalty=3.0, num_steps=1)
    by_hand(got)
    call = policy_gradient.calls_of(got)["train", 1]
    heard = []
    for value, row in zip(call["values"], call["rows"], strict=True):
        if not row["ended"]:
            value = -3.0
        heard.append(value)
    assert 0 < heard.count(-3.0) < len(heard)
    assert got.steps[0]["reward"] == pytest.approx(policy_gradient.mean(heard), rel=1e-5)
    assert got.evals[0] | {"seconds": 0} == base.evals[0] | {"seconds": 0}
    process = dict(supervision="process", missing_eos_penalty=1.0)
    observe.refused(run, "--missing-eos-penalty", "process", **process)
    zero = run(missing_eos_penalty=0.0, num_steps=1)
    assert by_hand(zero)[0]["reward"] != pytest.approx(base.steps[0]["reward"])


def flag_supervision(run, base, folder):
    """process: step rewards, and a list is what the reward must give; outcome: a number."""
    reward = base.args.reward.replace("mixed", "lines")
    by_hand(run(supervision="process", reward=reward, num_steps=1))
    observe.refused(run, "needs one number", reward=reward)
    observe.refused(run, "needs a list", supervision="process")


def flag_step_separator(run, base, folder):
    """What ends a step; a backslash and an n from a shell is a newline."""
    summands = base.args.reward.replace("mixed", "summands")
    process = dict(supervision="process", num_steps=1, reward=summands)
    by_hand(run(step_separator="+", **process))
    lines = process | dict(reward=base.args.reward.replace("mixed", "lines"))
    shell = run(step_separator="\\n", **lines)
    assert shell.untimed() == run(**lines).untimed()
    observe.refused(run, "--step-separator", "numbers for the", **process)
    observe.refused(run, "--step-separator is empty", step_separator="", **process)


def flag_temperature(run, base, folder):
    """Of sampling and of the log-probs of policy and reference."""
    got = run(temperature=0.5, num_steps=1)
    assert set(got.arguments("generate", "temperature")) == {0.5}
    told = got.arguments("completion_logps", "temperature")
    assert set(told + got.arguments("fixed_logps", "temperature")) == {0.5}
    by_hand(got)
    observe.refused(run, "--temperature 0", "sampled", temperature=0.0)


def flag_num_epochs(run, base, folder):
    got = run(num_epochs=3, num_steps=1)
    by_hand(got)
    assert len(got.updates) == 6 and len(base.updates) == 12


def flag_num_minibatches(run, base, folder):
    got = run(num_minibatches=3, num_steps=1)
    by_hand(got)
    assert len(got.updates) == 6
    observe.refused(run, "--num-minibatches 5", "groups", num_minibatches=5)
    few = policy_gradient.write_rows(folder / "few.jsonl", policy_gradient.problems(2, 100))
    observe.refused(run, "--num-minibatches 3", dataset=few, num_minibatches=3)
    run(dataset=few, num_minibatches=2, num_steps=1)


def other_than(base, got, *names):
    """These metrics of the first step differ from the base run's; what was sampled does not."""
    assert got.steps[0]["reward"] == base.steps[0]["reward"]
    for name in names:
        assert got.steps[0][name] != pytest.approx(base.steps[0][name], rel=1e-3, abs=1e-6), name


def flag_loss(run, base, folder):
    """Which loss: each is another one's, and a plain loop's; CISPO has no lower bound."""
    for loss in ("gspo", "cispo"):
        got = run(loss=loss, num_steps=1)
        other_than(base, got, "loss", "grad_norm")
        by_hand(got)
    wide = run(loss="cispo", clip_eps=0.9, clip_eps_high=0.1, num_steps=1)
    narrow = run(loss="cispo", clip_eps=0.01, clip_eps_high=0.1, num_steps=1)
    assert narrow.untimed() == wide.untimed()
    one = dict(num_epochs=1, num_minibatches=1, num_steps=1)
    norms = [run(loss=loss, **one).steps[0]["grad_norm"] for loss in grpo.LOSSES]
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=1e-4)
    reward = base.args.reward.replace("mixed", "lines")
    observe.refused(
        run, "--loss gspo", "process", loss="gspo", supervision="process", reward=reward
    )
    by_hand(run(loss="cispo", supervision="process", reward=reward, num_steps=1))


def flag_oversample(run, base, folder):
    """So many times the prompts are sampled and scored, and each group that is trained on has a
    signal, if there are enough; metrics of rewards are of all that were sampled."""
    one = dict(num_epochs=1, num_minibatches=1, num_steps=1)
    got = run(oversample=4, **one)
    call = got.asked[1]
    assert len(set(call["prompts"])) == 16 and len(call["prompts"]) == 48
    level = {}
    for prompt, value in zip(call["prompts"], call["values"], strict=True):
        level.setdefault(prompt, set()).add(value)
    loud = [prompt for prompt, values in level.items() if len(values) > 1]
    assert 4 < len(loud) < 16
    assert forwarded_prompts(got) == sorted(loud[:4] * 3)
    row = got.steps[0]
    assert row["no_signal"] == 0
    assert row["reward"] == pytest.approx(policy_gradient.mean(call["values"]), rel=1e-5)
    lengths = [
        batch.completion_mask.sum().item() for batch in got.arguments("completion_logps", "batch")
    ]
    assert row["completion_length"] == pytest.approx(sum(lengths) / 12, rel=1e-5)
    every = run(oversample=50, num_prompts=24, **one)
    assert len(set(every.asked[1]["prompts"])) == 24 and every.steps[0]["no_signal"] > 0
    once = run(oversample=1, num_steps=1)
    assert once.steps[0]["loss"] == base.steps[0]["loss"]
    reward = base.args.reward.replace("mixed", "lines")
    process = dict(supervision="process", reward=reward)
    observe.refused(run, "--oversample", "process", oversample=2, **process)


def forwarded_prompts(seen):
    """The prompts of all completions that went through the policy with a gradient, sorted."""
    tokenizer = grpo.load_tokenizer(seen.args.model)
    texts = []
    for batch in seen.arguments("completion_logps", "batch"):
        for prompt, _ in plain.unpadded(batch):
            texts.append(tokenizer.decode(prompt))
    return sorted(text.removeprefix("<bos><user>").removesuffix("<assistant>") for text in texts)


def flag_clip_eps(run, base, folder):
    """A narrow one is active more often; it is the upper bound's too."""
    got = run(clip_eps=0.01, num_steps=1)
    other_than(base, got, "clip_frac", "loss")
    metrics = by_hand(got)
    assert metrics[0]["clip_frac"] > base.steps[0]["clip_frac"]
    both = run(clip_eps=0.01, clip_eps_high=0.01, num_steps=1)
    assert both.untimed() == got.untimed()


def flag_clip_eps_high(run, base, folder):
    got = run(clip_eps_high=0.01, num_steps=1)
    other_than(base, got, "clip_frac", "loss")
    by_hand(got)


def flag_beta(run, base, folder):
    """Weight of the KL in the loss; with 0 no reference is loaded."""
    got = run(beta=2.0, num_steps=1)
    other_than(base, got, "loss", "grad_norm")
    by_hand(got)
    none = run(beta=0.0, num_steps=1)
    by_hand(none)
    assert len(none.results("load_model")) == 1 and "kl" not in none.steps[0]


def flag_kl(run, base, folder):
    for kind in ("k1", "k2"):
        got = run(kl=kind, beta=1.0, num_steps=1)
        by_hand(got)
        other_than(base, got, "loss")
    default = run(kl="k3", num_steps=1)
    assert default.steps[0]["loss"] == base.steps[0]["loss"]


def flag_scale_by_std(run, base, folder):
    got = run(scale_by_std=False, num_steps=1)
    other_than(base, got, "loss", "grad_norm")
    by_hand(got)


def flag_aggregate(run, base, folder):
    for aggregate in ("token", "constant"):
        got = run(aggregate=aggregate, num_steps=1)
        other_than(base, got, "loss", "grad_norm")
        by_hand(got)
    by_hand(base)


FLAGS = {
    "model": policy_gradient.flag_model,
    "dataset": policy_gradient.flag_dataset,
    "eval_dataset": policy_gradient.flag_eval_dataset,
    "output_dir": observe.flag_output_dir,
    "resume": policy_gradient.flag_resume,
    "overwrite": observe.flag_overwrite,
    "seed": policy_gradient.flag_seed,
    "device": observe.flag_device,
    "dtype": observe.flag_dtype,
    "show_rows": observe.flag_show_rows,
    "gradient_checkpointing": observe.flag_gradient_checkpointing,
    "share_prompts": observe.flag_share_prompts,
    "reward": policy_gradient.flag_reward,
    "reward_model": policy_gradient.flag_reward_model,
    "missing_eos_penalty": flag_missing_eos_penalty,
    "supervision": flag_supervision,
    "step_separator": flag_step_separator,
    "num_steps": policy_gradient.flag_num_steps,
    "num_prompts": policy_gradient.flag_num_prompts,
    "num_generations": policy_gradient.flag_num_generations,
    "oversample": flag_oversample,
    "generation_batch_size": observe.flag_generation_batch_size,
    "max_new_tokens": policy_gradient.flag_max_new_tokens,
    "temperature": flag_temperature,
    "num_epochs": flag_num_epochs,
    "num_minibatches": flag_num_minibatches,
    "micro_batch_size": policy_gradient.flag_micro_batch_size,
    "learning_rate": observe.flag_learning_rate,
    "lora_rank": observe.flag_lora_rank,
    "shard": observe.flag_shard,
    "lr_schedule": policy_gradient.flag_lr_schedule,
    "max_grad_norm": observe.flag_max_grad_norm,
    "loss": flag_loss,
    "clip_eps": flag_clip_eps,
    "clip_eps_high": flag_clip_eps_high,
    "beta": flag_beta,
    "kl": flag_kl,
    "scale_by_std": flag_scale_by_std,
    "aggregate": flag_aggregate,
    "eval_size": policy_gradient.flag_eval_size,
    "eval_every": observe.flag_eval_every,
    "checkpoint_every": observe.flag_checkpoint_every,
    "log_samples": policy_gradient.flag_log_samples,
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(flag, runs, base, tmp_path):
    """Every flag does what its help says."""
    FLAGS[flag](runs, base, tmp_path)


def test_no_flag_is_without_a_check():
    observe.has_every_flag(grpo, FLAGS)


def test_defaults():
    """Those of DeepSeekMath where the help says so, and what a machine at home can bear."""
    policy_gradient.the_same_defaults(
        grpo,
        dict(
            eval_dataset="", output_dir="runs/grpo", resume=False, overwrite=False, seed=0,
            device="auto", dtype="auto",
            show_rows=0, gradient_checkpointing=False, share_prompts=True,
            reward="verifier", reward_model="", missing_eos_penalty=None, supervision="outcome",
            step_separator=r"\n", num_steps=200, num_prompts=16, num_generations=8,
            oversample=1, loss="grpo",
            max_new_tokens=256, temperature=1.0, num_epochs=1, num_minibatches=1,
            micro_batch_size=8, learning_rate=1e-6, lr_schedule="constant", max_grad_norm=1.0,
            clip_eps=0.2, clip_eps_high=0.0, beta=0.04, kl="k3", scale_by_std=True,
            aggregate="sequence", eval_size=64, eval_every=50, checkpoint_every=50, log_samples=4,
        ),
    )  # fmt: skip


# --- Learning -------------------------------------------------------------------------------------


def test_learning_as_a_user_would(tmp_path):
    """`python grpo.py`, fewer steps; greedy accuracy starts below 0.65."""
    command = [sys.executable, ROOT / "grpo.py", "--output-dir", tmp_path / "run"]
    command += ["--num-steps", "12", "--eval-every", "12", "--eval-size", "100"]
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


@pytest.mark.slow
def test_process_supervision_learns(tmp_path):
    args = tiny_args(
        tmp_path, supervision="process", reward=f"{ROOT}/toy/make.py:step_rewards", num_steps=12,
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
    written = json.loads((tmp_path / "run/args.json").read_text())
    assert written.pop("script") == "grpo"
    assert set(written.pop("inputs")) == {real_model, str(path)}
    assert written == dataclasses.asdict(args)
