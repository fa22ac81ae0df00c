"""ppo.py against hand values, plain loops, limiting cases, and learning on the toy."""

import functools
import json
import random
import re
import shutil
import subprocess
import sys

import observe
import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer, other_weights
from plain import head_outputs, toy_ids
from plain_ppo import (
    drawn_texts,
    joined,
    make_critic,
    make_policy,
    observed,
    replay,
    same_metrics,
    same_updates,
    same_weights,
    sampled,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import common
import plumbing
import ppo


def tiny_args(tiny, tmp_path, **changes):
    """Args of a short run of the tiny model, with a reward of many values."""
    (tmp_path).mkdir(exist_ok=True)
    (tmp_path / "reward.py").write_text(REWARD)
    values = ppo.TOY | dict(
        model=tiny, dataset=str(ROOT / "toy/problems_train.jsonl"), eval_dataset="", eval_size=0,
        num_steps=2, num_prompts=8, micro_batch_size=16, output_dir=str(tmp_path / "run"),
        device="cpu", max_new_tokens=20, reward=f"{tmp_path}/reward.py:f",
    )  # fmt: skip
    return ppo.Args(**values | changes)


def run(args):
    """Train -> rows of metrics."""
    return observe.observe(ppo, args).rows


REWARD = """
def f(prompts, completions, rows):
    return [(sum(ord(x) for x in text) % 13) / 6 - 0.5 for text in completions]
"""

MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()

# --- The algorithm --------------------------------------------------------------------------------


def test_the_score_sits_on_the_last_real_token():
    kl = torch.full((3, 5), 0.5)
    got = ppo.token_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, MASK, 0.1)
    want = [[-0.05, 0.95, 0, 0, 0], [-0.05, -0.05, -0.05, -0.05, 1.95], [2.95, 0, 0, 0, 0]]
    assert torch.allclose(got, torch.tensor(want))


def test_gae_by_hand():
    one = torch.ones(1, 3, dtype=torch.bool)
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.5, 0.4]])
    advantages, returns = ppo.gae(rewards, values, one, 1.0, 0.95)
    assert torch.allclose(advantages, torch.tensor([[0.7465, 0.47, 0.6]]), atol=1e-6)
    assert torch.allclose(returns, torch.tensor([[0.9465, 0.97, 1.0]]), atol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 1.0), (0.9, 0.0), (0.9, 0.7)])
def test_gae_equals_the_double_sum_and_its_limits(gamma, lam):
    """With junk in padding. lam 1: Monte Carlo; lam 0: the TD residual."""
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    got, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    for i, n in enumerate(MASK.sum(1).tolist()):
        r, v = rewards[i, :n].tolist(), [*values[i, :n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            want = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert got[i, t].item() == pytest.approx(want, abs=1e-5)
            if lam == 1:
                monte_carlo = sum(gamma ** (k - t) * r[k] for k in range(t, n))
                assert got[i, t].item() == pytest.approx(monte_carlo - v[t], abs=1e-5)
            if lam == 0:
                assert got[i, t].item() == pytest.approx(delta[t], abs=1e-6)
            assert returns[i, t].item() == pytest.approx(want + v[t], abs=1e-5)
    assert (got[~MASK] == 0).all() and (returns[~MASK] == 0).all()


def test_padding_changes_no_advantage():
    rewards, values = torch.randn(1, 4), torch.randn(1, 4)
    mask = torch.ones(1, 4, dtype=torch.bool)
    short = ppo.gae(rewards, values, mask, 0.99, 0.95)[0]
    junk = torch.randn(1, 3)
    longer = [torch.cat([x, junk], 1) for x in (rewards, values)]
    mask = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)], 1)
    assert torch.allclose(ppo.gae(*longer, mask, 0.99, 0.95)[0][:, :4], short)


def test_whitening_sees_the_mask_only():
    x = torch.randn(3, 5) * 4 + 7
    got = ppo.whiten(x, MASK)
    assert got[MASK].mean().abs() < 1e-5
    assert got[MASK].var(correction=0) == pytest.approx(1, abs=1e-4)
    other = ppo.whiten(torch.where(MASK, x, torch.tensor(99.0)), MASK)
    assert torch.equal(got, other) and (got[~MASK] == 0).all()


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [  # slope: d loss / d ratio; 0 where clipping has cut the gradient
        (1, 0.5, -0.5, -1), (1, 1.0, -1.0, -1), (1, 1.5, -1.2, 0),
        (-1, 0.5, 0.8, 0), (-1, 1.0, 1.0, 1), (-1, 1.5, 1.5, 1),
    ],
)  # fmt: skip
def test_the_clips_truth_table(advantage, ratio, loss, slope):
    logps = torch.tensor([[float(ratio)]]).log().requires_grad_()
    one = torch.ones(1, 1)
    got, active = ppo.ppo_policy_loss(logps, 0 * one, advantage * one, one, 0.2)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert logps.grad.item() == pytest.approx(slope * ratio, abs=1e-6)
    assert active.item() == (slope == 0)


def test_the_value_loss_by_hand():
    one = torch.ones(1, 1)
    for value, old, target, want in [
        (1.0, 1.0, 3.0, 2.0),  # not clipped: 0.5 * 4
        (2.0, 1.0, 3.0, 0.5 * 1.8**2),  # clipped to 1.2: the larger of 1 and 3.24
        (0.0, 1.0, 3.0, 4.5),  # clipped to 0.8: the larger of 9 and 4.84
    ]:
        got = ppo.ppo_value_loss(value * one, old * one, target * one, one, 0.2)
        assert got.item() == pytest.approx(want, rel=1e-6)


def test_one_gradient_step_is_reinforce_with_the_same_advantages():
    logps, advantages = torch.randn(3, 5).requires_grad_(), torch.randn(3, 5)
    weights = MASK / MASK.sum()
    loss, active = ppo.ppo_policy_loss(logps, logps.detach(), advantages, weights, 0.2)
    loss.backward()
    other = logps.detach().clone().requires_grad_()
    (-(advantages * other)[MASK].mean()).backward()
    assert torch.allclose(logps.grad, other.grad) and not active.any()


def test_the_adaptive_controller_by_hand():
    controller = ppo.AdaptiveKLController(0.15, 6.0, 10000)
    controller.update(6.0, 512)
    assert controller.beta == 0.15
    controller.update(12.0, 512)
    assert controller.beta == pytest.approx(0.151536)
    controller.update(0.0, 512)
    assert controller.beta == pytest.approx(0.151536 * (1 - 0.2 * 0.0512))
    controller.beta = 0.15
    controller.update(6.6, 512)
    assert controller.beta == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
    fixed = ppo.AdaptiveKLController(0.15, 0.0, 10000)
    fixed.update(12.0, 512)
    assert fixed.beta == 0.15


def test_explained_variance():
    returns = torch.randn(3, 5)
    assert ppo.explained_variance(returns + 2, returns, MASK) == pytest.approx(1, abs=1e-5)
    assert ppo.explained_variance(torch.ones(3, 5), returns, MASK) == pytest.approx(0, abs=1e-5)
    worse = torch.where(MASK, -returns, torch.tensor(50.0))
    assert ppo.explained_variance(worse, returns, MASK) == pytest.approx(-3, abs=1e-4)


def test_ptx_loss_is_cross_entropy():
    logits, ids = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    want = torch.nn.functional.cross_entropy(logits[MASK], ids[MASK])
    assert ppo.ptx_loss(logps * MASK, MASK).item() == pytest.approx(want.item(), rel=1e-5)


# --- The critic -----------------------------------------------------------------------------------


def toy(args):
    tokenizer = ppo.load_tokenizer(args.model)
    critic = ppo.load_critic(args, tokenizer, torch.device("cpu"))
    return tokenizer, critic


def test_a_value_has_not_seen_its_token(tiny, tmp_path):
    """V_t is the head's output before y_t, by a plain forward; changing y_t changes V_{t+1} on."""
    tokenizer, critic = toy(tiny_args(tiny, tmp_path))
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.score.weight)
    batch = ppo.Batch(
        *ppo.pad([[5, 6, 7], [5, 6]], "left"), *ppo.pad([[8, 9, 10, 1], [11, 12], [9]], "right"),
        torch.tensor([0, 0, 1]),
    )  # fmt: skip
    values = ppo.fixed_values(critic, batch, 8, True)
    assert torch.allclose(values, ppo.fixed_values(critic, batch, 1, False), atol=1e-4)
    prompts, completions = [[5, 6, 7]] * 2 + [[5, 6]], [[8, 9, 10, 1], [11, 12], [9]]
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        out = critic.score(critic.model(torch.tensor([prompt + completion]))[0])[0, :, 0]
        want = out[len(prompt) - 1 : len(prompt) - 1 + len(completion)]
        assert torch.allclose(values[i, : len(completion)], want, atol=1e-4)
    batch.completion_ids[0, 1] = 13
    changed = ppo.fixed_values(critic, batch, 8, True)[0] - values[0]
    assert (changed[:2].abs() < 1e-5).all() and (changed[2:].abs() > 1e-4).all()


def test_the_critic_starts_at_0_or_as_the_reward_model(tiny, tmp_path):
    tokenizer, critic = toy(tiny_args(tiny, tmp_path))
    assert all((p == 0).all() for p in critic.score.parameters())
    reward_model = ppo.load_model(
        AutoModelForSequenceClassification, ROOT / "toy/model", torch.device("cpu"), new_head=1
    )
    reward_model.config.reward_bias = 0.25
    for part in (reward_model, tokenizer):
        part.save_pretrained(tmp_path / "rm")
    _, critic = toy(tiny_args(tiny, tmp_path, reward_model=str(tmp_path / "rm")))
    assert torch.equal(critic.score.weight, reward_model.score.weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = ppo.Batch(ids[:, :2], ids[:, :2] > 0, ids[:, 2:], ids[:, 2:] > 0, torch.tensor([0]))
    both = [ppo.completion_scores(m, batch).detach() for m in (critic, reward_model)]
    assert torch.allclose(*both, atol=1e-5)
    _, critic = toy(tiny_args(tiny, tmp_path, reward_model=str(tmp_path / "rm"),
                              critic_model=str(ROOT / "toy/model")))  # fmt: skip
    assert (critic.score.weight == 0).all()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2", "neox"])
def test_the_critic_of_every_architecture(tmp_path, kind):
    """From a policy its head is 0; from a reward model it is that model's, and its bias counts."""
    make_model(kind).save_pretrained(tmp_path / "policy")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "policy")
    device, model = torch.device("cpu"), str(tmp_path / "policy")
    args = ppo.Args(model=model, dataset="")
    batch = common.encode(tokenizer, ["a", "bcd"], [["xy"], ["z"]])
    assert (ppo.fixed_values(ppo.load_critic(args, tokenizer, device), batch, 8, True) == 0).all()
    torch.manual_seed(0)
    reward_model = ppo.load_model(AutoModelForSequenceClassification, model, device, new_head=1)
    torch.nn.init.normal_(reward_model.score.weight)
    reward_model.config.reward_bias = 0.25
    for part in (reward_model, tokenizer):
        part.save_pretrained(tmp_path / "rm")
    args.reward_model = str(tmp_path / "rm")
    critic = ppo.load_critic(args, tokenizer, device)
    both = [common.completion_scores(m, batch).detach()[batch.completion_mask]
            for m in (critic, reward_model)]  # fmt: skip
    assert torch.allclose(*both, atol=1e-4) and both[0].std() > 0.1
    if kind != "gemma3":  # which has no such class
        orm = ppo.load_model(AutoModelForTokenClassification, model, device, new_head=1)
        torch.nn.init.ones_((orm.score if hasattr(orm, "score") else orm.classifier).bias)
        for part in (orm, tokenizer):
            part.save_pretrained(tmp_path / "orm")
        args.critic_model = str(tmp_path / "orm")
        both = [common.completion_scores(m, batch).detach()[batch.completion_mask]
                for m in (ppo.load_critic(args, tokenizer, device), orm)]  # fmt: skip
        assert torch.allclose(*both, atol=1e-4)


def test_the_critic_learns_and_moves_no_policy(tiny, tmp_path):
    """With the policy held still, it explains a reward that the prompt decides, and only the
    critic's weights move."""
    (tmp_path / "r.py").write_text("def f(p, c, r):\n    return [x.count('1') for x in p]")
    rows = run(tiny_args(tiny, tmp_path, learning_rate=0.0, num_steps=6, num_prompts=32, beta=0.0,
                         critic_learning_rate=1e-2, lr_schedule="constant", clip_eps_value=9.0,
                         missing_eos_penalty=None, reward=f"{tmp_path}/r.py:f"))  # fmt: skip
    assert rows[-1]["explained_variance"] > rows[0]["explained_variance"] + 0.05
    assert rows[-1]["value_loss"] < 0.7 * rows[0]["value_loss"]
    start = load_file(f"{tiny}/model.safetensors")
    final = load_file(tmp_path / "run/final/model.safetensors")
    critic = load_file(tmp_path / "run/critic/model.safetensors")
    assert all(torch.equal(start[k], final[k]) for k in start)
    assert not torch.equal(start["model.layers.0.mlp.up_proj.weight"],
                           critic["model.layers.0.mlp.up_proj.weight"])  # fmt: skip
    assert critic["score.weight"].abs().max() > 0


def test_critic_warmup_leaves_the_policy(tiny, tmp_path):
    rows = run(tiny_args(tiny, tmp_path, critic_warmup=1, learning_rate=1e-3))
    assert "loss" not in rows[0] and rows[0]["value_loss"] > 0 and rows[0]["entropy"] > 0
    assert rows[1]["grad_norm"] > 0 and abs(rows[1]["kl"]) < 1e-4  # nothing moved in step 1


def test_the_entropy_of_critic_warmup_needs_no_reference(tiny, tmp_path):
    """Without a reference, and with one gradient step, no other pass gives the log-probs."""
    flags = dict(critic_warmup=1, learning_rate=0.0, num_epochs=1, num_minibatches=1)
    with_kl = run(tiny_args(tiny, tmp_path / "a", beta=1e-9, **flags))
    without = run(tiny_args(tiny, tmp_path / "b", beta=0.0, **flags))
    for row, other in zip(without, with_kl, strict=True):
        assert row["entropy"] == pytest.approx(other["entropy"], rel=1e-5) and row["entropy"] > 1


# --- Training -------------------------------------------------------------------------------------


def test_bfloat16_trains(tiny, tmp_path):
    """What cuda takes by default. Policy and reference compute alike: a KL of 0, a ratio of 1."""
    for row in run(tiny_args(tiny, tmp_path / "a", learning_rate=0.0, dtype="bfloat16")):
        assert abs(row["kl"]) < 0.02 and row["clip_frac"] == 0 and row["approx_kl"] < 1e-4
    rows = run(tiny_args(tiny, tmp_path / "b", dtype="bfloat16"))
    assert rows[-1]["approx_kl"] > 0 and rows[0]["grad_norm"] > 0 and rows[0]["value_loss"] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_lr_0_keeps_ratio_1_and_kl_0(tiny, tmp_path, temperature):
    for row in run(tiny_args(tiny, tmp_path, learning_rate=0.0, temperature=temperature)):
        assert abs(row["kl"]) < 1e-4 and row["clip_frac"] == 0 and abs(row["approx_kl"]) < 1e-8


def test_returns_come_from_advantages_that_are_not_whitened(tiny, tmp_path, monkeypatch):
    """With gamma = lam = 1 and no KL, the return of every token is the completion's score."""
    seen, loss = [], ppo.ppo_value_loss
    monkeypatch.setattr(ppo, "ppo_value_loss", lambda *a: seen.append(a) or loss(*a))
    (tmp_path / "bit.py").write_text("def f(p, c, r):\n    return [len(x) % 2 for x in c]")
    run(tiny_args(tiny, tmp_path, lam=1.0, beta=0.0, num_steps=1, missing_eos_penalty=None,
                  reward=f"{tmp_path}/bit.py:f"))  # fmt: skip
    for _, old_values, returns, weights, _ in seen:
        there = weights > 0
        assert (old_values[there] != returns[there]).any()
        assert ((returns[there] - returns[there].round()).abs() < 1e-5).all()
        assert set(returns[there].round().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("size", [16, 3])
def test_a_step_is_that_of_the_textbook(tiny, tmp_path, monkeypatch, size):
    """One pass in two minibatches, with a reference and a critic of other weights, beside plain
    loops over single sequences: KL in the reward, GAE, whitening, both losses, both gradients."""
    loaded, made, norms = other_weights(ppo, monkeypatch), [], []
    load, generate = ppo.load_critic, ppo.generate

    def load_critic(*args):
        critic = load(*args)
        torch.manual_seed(1)
        torch.nn.init.normal_(critic.score.weight, std=0.3)
        made.append(critic)
        return critic

    def seen(result, where):
        where.append(result)
        return result

    (tmp_path / "r.py").write_text("def f(p, c, r):\n    return [len(set(x)) / 10 for x in c]")
    monkeypatch.setattr(ppo, "load_critic", load_critic)
    monkeypatch.setattr(ppo, "generate", lambda *a, **b: seen(generate(*a, **b), made))
    monkeypatch.setattr(ppo, "check_finite", lambda loss, norm: norms.append(norm))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    row = run(tiny_args(
        tiny, tmp_path, num_steps=1, num_epochs=1, num_minibatches=2, beta=0.5, learning_rate=0.0,
        critic_learning_rate=0.0, micro_batch_size=size, gamma=0.9, lam=0.8, vf_coef=0.3,
        missing_eos_penalty=None, max_grad_norm=1e9, num_prompts=7, reward=f"{tmp_path}/r.py:f",
    ))[0]  # fmt: skip
    monkeypatch.undo()
    (policy, ref), (critic, (batch, texts, _)) = loaded, made
    completions, kls = [], []  # log-probs, values, advantages, returns of each
    for i, text in enumerate(texts):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i]].tolist()
        ids = batch.completion_ids[i][batch.completion_mask[i]].tolist()
        both, n = torch.tensor([prompt + ids]), len(ids)
        here = slice(len(prompt) - 1, len(prompt) - 1 + n)
        logps, ref_logps = (
            m(both).logits[0].log_softmax(-1)[here].gather(1, torch.tensor(ids)[:, None])[:, 0]
            for m in (policy, ref)
        )
        values = critic.score(critic.model(both)[0])[0, here, 0]
        kl, v = (logps - ref_logps).tolist(), [*values.tolist(), 0.0]
        r = [-0.5 * k for k in kl]
        r[-1] += len(set(text)) / 10
        delta = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(n)]
        advantages = [sum(0.72 ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        returns = [a + b for a, b in zip(advantages, v, strict=False)]
        completions.append((logps, values, advantages, returns))
        kls.append(sum(kl))
    flat = [a for c in completions for a in c[2]]
    mean = sum(flat) / len(flat)
    std = (sum((a - mean) ** 2 for a in flat) / len(flat)) ** 0.5
    losses, value_losses, want = [], [], []
    for minibatch in ([6, 5, 4, 3], [2, 1, 0]):
        loss = value_loss = total = 0.0
        count = sum(len(completions[i][2]) for i in minibatch)
        for i in minibatch:
            for logp, value, a, target in zip(*completions[i], strict=True):
                loss = loss - (a - mean) / std * logp / count
                total -= (a - mean) / std / count
                value_loss = value_loss + 0.5 * (value - target) ** 2 / count
        for model, x in ((critic, 0.3 * value_loss), (policy, loss)):
            gradient = torch.autograd.grad(x, [*model.parameters()], retain_graph=True)
            want.append(torch.cat([p.flatten() for p in gradient]).norm().item())
        losses.append(total)
        value_losses.append(value_loss.item())
    assert norms == pytest.approx(want, rel=2e-3)
    assert row["grad_norm"] == pytest.approx(max(norms[1::2]), rel=1e-4)
    assert row["kl"] == pytest.approx(sum(kls) / 7, rel=1e-3) and abs(row["kl"]) > 0.1
    assert row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-3, abs=1e-5)
    assert row["value_loss"] == pytest.approx(sum(value_losses) / 2, rel=1e-3)


def test_later_minibatches_have_another_ratio(tiny, tmp_path):
    assert run(tiny_args(tiny, tmp_path, learning_rate=1e-3, num_steps=1))[0]["approx_kl"] > 1e-5


def test_each_gradient_step_draws_pretraining_texts_of_its_own(tiny, tmp_path, monkeypatch):
    drawn = []
    encode = ppo.encode_texts

    def noting(tokenizer, texts, max_length):
        drawn.append(tuple(texts))
        return encode(tokenizer, texts, max_length)

    monkeypatch.setattr(ppo, "encode_texts", noting)
    texts = write(tmp_path / "texts.jsonl", [{"text": str(1000 + i)} for i in range(60)])
    changes = dict(num_steps=2, num_epochs=1, num_minibatches=2, ptx_coef=1.0, ptx_batch_size=4)
    run(tiny_args(tiny, tmp_path, pretrain_dataset=texts, **changes))
    assert len(drawn) == len(set(drawn)) == 4


def test_one_gradient_step_computes_no_old_logps(tiny, tmp_path, monkeypatch):
    calls, fixed = [], ppo.fixed_logps
    monkeypatch.setattr(ppo, "fixed_logps", lambda *a: calls.append(1) or fixed(*a))
    row = run(tiny_args(tiny, tmp_path, num_steps=1, beta=0.0, num_epochs=1, num_minibatches=1))[0]
    assert not calls and row["approx_kl"] == 0 and row["clip_frac"] == 0 and row["grad_norm"] > 0
    run(tiny_args(tiny, tmp_path / "b", num_steps=1, beta=0.0))
    assert len(calls) == 1


@pytest.mark.parametrize("changes", [{}, dict(share_prompts=False)])
def test_micro_batches_and_shared_prompts_change_nothing(tiny, tmp_path, changes):
    same = dict(num_steps=1, num_epochs=1, num_minibatches=1, beta=0.1, learning_rate=0.0,
                num_prompts=4, num_generations=3)  # fmt: skip
    whole = run(tiny_args(tiny, tmp_path / "a", **same))[0]
    split = run(tiny_args(tiny, tmp_path / "b", micro_batch_size=5, **same, **changes))[0]
    for name in ("loss", "value_loss", "grad_norm", "entropy", "explained_variance"):
        assert split[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


def test_a_cut_off_completion_is_not_scored(tiny, tmp_path):
    (tmp_path / "one.py").write_text("def f(p, c, r):\n    return [1.0] * len(c)")
    args = tiny_args(tiny, tmp_path, max_new_tokens=4, missing_eos_penalty=3.0, num_steps=1,
                     reward=f"{tmp_path}/one.py:f")  # fmt: skip
    row = run(args)[0]
    assert row["ended"] == 0 and row["reward"] == -3


def test_beta_adapts_and_is_logged_as_used(tiny, tmp_path):
    rows = run(tiny_args(tiny, tmp_path, kl_target=6.0, kl_horizon=100.0, num_steps=3, beta=0.5))
    betas = [row["beta"] for row in rows]
    frozen = run(tiny_args(tiny, tmp_path / "w", kl_target=6.0, kl_horizon=100.0, num_steps=3,
                           beta=0.5, critic_warmup=2))  # fmt: skip
    assert [row["beta"] for row in frozen] == [0.5] * 3  # while only the critic learns
    assert betas[0] == 0.5  # KL 0 is under the target: beta falls by 0.2 * 8 / 100 a step
    assert betas[1] == pytest.approx(0.5 * 0.984, rel=1e-4)
    assert betas[2] == pytest.approx(0.5 * 0.984**2, rel=1e-3)


def test_pretraining_gradients_keep_the_pretraining_text(tiny, tmp_path):
    """The final policy's loss on a text far from the task, by Transformers' own loss."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "9876543210" * 3}) + "\n")
    ids = ppo.load_tokenizer(tiny)("9876543210" * 3, return_tensors="pt").input_ids
    loss = []
    for coef in (0.0, 1.0):
        rows = run(tiny_args(tiny, tmp_path / str(coef), num_steps=6, ptx_coef=coef,
                             pretrain_dataset=str(tmp_path / "text.jsonl")))  # fmt: skip
        final = AutoModelForCausalLM.from_pretrained(tmp_path / str(coef) / "run/final")
        loss.append(final(ids, labels=ids).loss.item())
        assert ("ptx_loss" in rows[-1]) == bool(coef)
    assert loss[1] < loss[0] - 0.5 and rows[-1]["ptx_loss"] == pytest.approx(loss[1], abs=0.3)


def test_a_resumed_run_is_the_unbroken_one(tiny, tmp_path):
    same = dict(lr_schedule="constant", checkpoint_every=1, kl_target=6.0, learning_rate=1e-3)
    run(tiny_args(tiny, tmp_path / "a", num_steps=3, **same))
    run(tiny_args(tiny, tmp_path / "b", num_steps=1, **same))
    run(tiny_args(tiny, tmp_path / "b", num_steps=3, resume=True, **same))
    for name in ("final", "critic"):
        one, two = (load_file(tmp_path / x / "run" / name / "model.safetensors") for x in "ab")
        assert all(torch.equal(one[k], two[k]) for k in one)
    rows = [[json.loads(x) for x in open(tmp_path / x / "run/metrics.jsonl")] for x in "ab"]
    for one, two in zip(*rows, strict=True):
        for row in (one, two):
            del row["seconds"], row["tokens_per_second"]
        assert one == two


# --- Runs that note what the reward was asked -----------------------------------------------------

NOTING = """
import json
from pathlib import Path


def f(prompts, completions, rows):
    values = [(sum(ord(x) for x in text) % 13) / 6 - 0.5 for text in completions]
    with open(Path(__file__).parent / "asked.jsonl", "a") as file:
        for prompt, text, row, value in zip(prompts, completions, rows, values):
            asked = {"prompt": prompt, "text": text, "row": row, "value": value}
            file.write(json.dumps(asked) + "\\\\n")
    return values
""".replace("\\\\", "\\")


def of_text(text):
    """The reward of NOTING."""
    return (sum(ord(x) for x in text) % 13) / 6 - 0.5


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(first, count):
    """Rows of the toy's form, each with another prompt."""
    pairs = [(first + 7 * i, first + 3 * i) for i in range(count)]
    return [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a, b in pairs]


TRAIN, HELD = sums(100, 12), sums(5000, 6)
SHORT = dict(num_steps=2, num_prompts=2, eval_size=0, max_new_tokens=10)


class Runs:
    """Short runs of tiny models on rows of their own, each in a folder of its own."""

    def __init__(self, tiny, folder):
        self.folder, self.count = folder, 0
        (folder / "r.py").write_text(NOTING)
        texts = [{"text": text} for text in ("12+34=46", "9", "0+1+2+3+4+5+6+7+8", "5=5 5=5")]
        self.values = dict(
            model=make_policy(tiny, folder / "policy"), device="cpu",
            critic_model=make_critic(tiny, folder / "critic"),
            dataset=write(folder / "train.jsonl", TRAIN), num_steps=3, num_prompts=3,
            eval_dataset=write(folder / "held.jsonl", HELD), eval_size=4, num_generations=2,
            num_epochs=2, num_minibatches=2, micro_batch_size=6, max_new_tokens=14, beta=0.2,
            learning_rate=4e-3, critic_learning_rate=3e-3, max_grad_norm=0.5, clip_eps=0.05,
            clip_eps_value=0.05, log_samples=3, reward=f"{folder}/r.py:f", seed=1,
            pretrain_dataset=write(folder / "texts.jsonl", texts), ptx_batch_size=2,
        )  # fmt: skip

    @functools.cached_property
    def short(self):
        return self(**SHORT)

    def args(self, **changes):
        self.count += 1
        values = dict(output_dir=str(self.folder / f"run{self.count}"))
        return ppo.Args(**self.values | values | changes)

    def __call__(self, **changes):
        """-> Seen, with `asked`: what the reward was asked, in order."""
        asked = self.folder / "asked.jsonl"
        asked.write_text("")
        seen = observed(ppo, self.args(**changes))
        seen.asked = read(asked)
        return seen


@pytest.fixture(scope="module")
def run_tiny(tiny, tmp_path_factory):
    return Runs(tiny, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def base(run_tiny):
    return run_tiny()


def training(seen):
    """What the reward was asked of the steps, apart from the held-out rows."""
    held = {row["prompt"] for row in HELD}
    return [asked for asked in seen.asked if asked["prompt"] not in held]


def first_weights(seen, optimizer):
    return next(u.weights for u in seen.updates if u.optimizer == optimizer)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- Every flag -----------------------------------------------------------------------------------


def by_plain(**changes):
    """The flag's other value gives the metrics, gradients, rates and weights of the plain program
    with that value, and not those of the base run."""

    def check(run, base, folder):
        got = run(**SHORT | changes)
        plain = replay(got, of_text)
        same_metrics(got, plain)
        same_updates(got, plain)
        same_weights(got, plain)
        assert got.untimed() != run.short.untimed()

    return check


def by_both(*checks):
    def check(run, base, folder):
        for one in checks:
            one(run, base, folder)

    return check


def flag_model(run, base, folder):
    """Policy and reference begin as it."""
    path = make_policy(base.args.model, folder / "other", noise=0.1)
    other = AutoModelForCausalLM.from_pretrained(path)
    got = run(model=path, num_steps=1)
    assert torch.equal(first_weights(got, 0), weights_of(other))
    assert not torch.equal(first_weights(base, 0), weights_of(other))
    assert abs(got.steps[0]["kl"]) < 1e-4 and len(got.results("load_model")) == 3
    refused(run, "nowhere", model="nowhere")


def refused(run, *words, **changes):
    observe.refused(run, *words, **changes)


def flag_dataset(run, base, folder):
    """Its prompts are trained on; where they are fewer than --num-prompts, each once a step."""
    rows = sums(40, 2)
    got = run(dataset=write(folder / "two.jsonl", rows), num_steps=2)
    prompts = [asked["prompt"] for asked in training(got)]
    assert len(prompts) == 2 * 2 * 2 and set(prompts) == {row["prompt"] for row in rows}
    assert len(set(prompts[:4])) == 2 and got.steps[0]["completion_length"] > 0
    long = write(folder / "long.jsonl", [*rows, {"prompt": "1" * 250}])
    refused(run, "does not fit", dataset=long)


def flag_eval_dataset(run, base, folder):
    """Its first --eval-size rows are what is evaluated, and nothing else of it is."""
    rows = sums(7000, 5)
    path = write(folder / "held.jsonl", rows)
    got = run(eval_dataset=path, num_steps=1, eval_size=4)
    mine = [row["prompt"] for row in rows[:4]]
    assert [asked["prompt"] for asked in got.asked[:4]] == mine
    assert [asked["prompt"] for asked in got.asked[-4:]] == mine
    assert len(got.asked) == 4 + 6 + 4
    trained = {row["prompt"] for row in TRAIN}
    assert {asked["prompt"] for asked in got.asked[4:-4]} <= trained
    long = write(folder / "long.jsonl", [*rows[:2], {"prompt": "1" * 250}])
    refused(run, "does not fit", eval_dataset=long)


def flag_resume(run, base, folder):
    """A finished run that is resumed does nothing more; a run that is there is not begun anew."""
    args = run.args(num_steps=1)
    done = observed(ppo, args)
    again = run(num_steps=1, output_dir=args.output_dir, resume=True)
    assert again.updates == [] and again.untimed() == done.untimed() and len(done.evals) == 2
    refused(run, "exists", num_steps=1, output_dir=args.output_dir)


def flag_seed(run, base, folder):
    """It decides the order of the prompts, what is sampled, the orders of the passes and what a
    reward draws: whatever stood in the generators before."""
    (folder / "dice.py").write_text(
        "import random\ndef f(p, c, r):\n    return [random.random() for _ in c]"
    )
    runs = []
    for before, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(before)
        random.seed(before)
        runs.append(run(seed=seed, num_steps=2, reward=f"{folder}/dice.py:f"))
    one, same, other = runs
    assert one.untimed() == same.untimed() and one.orders == same.orders
    for name in ("prompt", "completion", "reward"):
        logged = []
        for seen in runs:
            logged.append([row[name] for row in seen.samples])
        assert logged[0] == logged[1] != logged[2]
    assert one.orders != other.orders
    alone = dict(dataset=write(folder / "one.jsonl", sums(40, 1)), num_generations=6, num_steps=1)
    assert sampled(run(seed=5, **alone)) != sampled(run(seed=6, **alone))


def flag_reward(run, base, folder):
    """The function's values, or 1 for the right answer: then the evaluation counts the right."""
    assert base.steps[0]["reward"] != 0 and "eval_reward" in base.evals[0]
    got = run(reward="verifier", missing_eos_penalty=None, num_steps=1)
    assert "eval_accuracy" in got.evals[0] and "eval_reward" not in got.evals[0]
    assert "gold_reward" not in got.steps[0] and got.asked == []
    unanswered = write(folder / "no_answer.jsonl", [{"prompt": "1+1"}] * 12)
    refused(run, "answer", reward="verifier", dataset=unanswered)
    assert "gold_reward" not in run(dataset=unanswered, num_steps=1).steps[0]
    refused(run, "--reward", reward="nowhere.py:f")


def flag_reward_model(run, base, folder):
    """Its head at the last token is the reward, and the critic begins as it is."""
    path = make_critic(base.args.model, folder / "rm", seed=4, bias=0.7)
    got = run(reward_model=path, critic_model="", missing_eos_penalty=None, num_steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    want = []
    rows, texts = sampled(got)[0]
    for (prompt, completion), text in zip(rows, texts, strict=True):
        ids = toy_ids(tokenizer, "", text)[len(toy_ids(tokenizer, "", "")) - 1 : -1]
        if completion[-1] == tokenizer.eos_token_id or not ids:
            ids = [*ids, tokenizer.eos_token_id]
        want.append(head_outputs(model, prompt, ids)[-1].item())
    assert got.steps[0]["reward"] == pytest.approx(sum(want) / len(want), rel=1e-4)
    spread = torch.tensor(want).std(correction=0).item()
    assert got.steps[0]["reward_std"] == pytest.approx(spread, rel=1e-3) and spread > 0.05
    assert torch.equal(first_weights(got, 1), weights_of(model)) and got.asked == []
    assert "gold_reward" in got.steps[0] and "eval_reward" in got.evals[0]


def flag_critic_model(run, base, folder):
    """The critic begins as it, whatever the reward model is; without both as the policy, value 0;
    one of another vocabulary is refused."""
    path = make_critic(base.args.model, folder / "rm", seed=4)
    got = run(reward_model=path, num_steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(base.args.critic_model)
    assert torch.equal(first_weights(got, 1), weights_of(model))
    got = run(critic_model="", num_steps=1)
    assert got.steps[0]["value"] == 0 and got.steps[0]["explained_variance"] == pytest.approx(0)
    start = load_file(f"{base.args.model}/model.safetensors")
    size = sum(start[key].numel() for key in start if key != "lm_head.weight")
    assert len(first_weights(got, 1)) == size + 32
    assert first_weights(got, 1)[-32:].abs().max() == 0
    make_model("llama").save_pretrained(folder / "bytes")
    make_tokenizer().save_pretrained(folder / "bytes")
    refused(run, "vocabulary", critic_model=str(folder / "bytes"))
    lost = folder / "lost"
    AutoTokenizer.from_pretrained(base.args.model).save_pretrained(lost)
    refused(run, str(lost), "no model there", critic_model=str(lost))


def flag_missing_eos_penalty(run, base, folder):
    """Minus it is the reward of those cut off; None leaves them their own."""
    for penalty in (2.5, 0.0, None):
        got = run(missing_eos_penalty=penalty, num_steps=1, eval_size=0)
        want = []
        for asked in got.asked:
            cut = penalty is not None and not asked["row"]["ended"]
            want.append(-penalty if cut else asked["value"])
        assert 0 < got.steps[0]["ended"] < 1
        assert got.steps[0]["reward"] == pytest.approx(sum(want) / len(want), abs=1e-5)
        first = want[:: got.args.num_generations][:3]
        assert [row["reward"] for row in got.samples] == pytest.approx(first)


def flag_num_steps(run, base, folder):
    assert [row["step"] for row in base.steps] == [1, 2, 3] and len(base.updates) == 3 * 2 * 4
    got = run(num_steps=1)
    assert [row["step"] for row in got.steps] == [1] and len(got.updates) == 2 * 4


def flag_num_prompts(run, base, folder):
    """So many prompts a step, none twice in it, others in the next."""
    got = run(num_prompts=5, num_generations=1)
    steps = [arguments["prompts"] for arguments, _ in got.calls["generate"]]
    assert [len(set(prompts)) for prompts in steps] == [5, 5, 5] == [len(x) for x in steps]
    assert len({str(sorted(prompts)) for prompts in steps}) == 3


def flag_num_generations(run, base, folder):
    """So many completions a prompt, each scored and logged with its own prompt and row."""
    got = run(num_generations=3, num_prompts=4, log_samples=100, num_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(got.args.model)
    asked, answers = training(got), {row["prompt"]: row["answer"] for row in TRAIN}
    assert len(asked) == 2 * 4 * 3
    of_rows = joined(rows for rows, _ in sampled(got))
    for (prompt, completion), one in zip(of_rows, asked, strict=True):
        assert prompt == toy_ids(tokenizer, one["prompt"])
        assert one["text"] == tokenizer.decode(completion, skip_special_tokens=True)
        assert one["row"]["prompt"] == one["prompt"]
        assert one["row"]["answer"] == answers[one["prompt"]]
        assert one["row"]["ended"] == (completion[-1] == tokenizer.eos_token_id)
    for sample, one in zip(got.samples, asked[::3], strict=True):  # one of each prompt
        assert (sample["prompt"], sample["completion"]) == (one["prompt"], one["text"])
    assert len({one["text"] for one in asked[:3]}) > 1


def flag_max_new_tokens(run, base, folder):
    """The longest completion has so many tokens, in evaluation as well."""
    for length in (5, 9):
        got = run(max_new_tokens=length, num_steps=2)
        lengths = [len(completion) for _, completion in joined(rows for rows, _ in sampled(got))]
        assert max(lengths) == length
        assert max(len(asked["text"]) for asked in got.asked[:4]) <= length
    assert set(got.arguments("greedy_rewards", "max_new_tokens")) == {9}


def flag_num_minibatches(run, base, folder):
    """By the plain program; as many as there are completions, and not one more."""
    by_plain(num_minibatches=4)(run, base, folder)
    few = dict(dataset=write(folder / "two.jsonl", sums(40, 2)), num_generations=1, num_steps=1)
    assert len(run(num_minibatches=2, **few).updates) == 2 * 2 * 2
    refused(run, "--num-minibatches 3", num_minibatches=3, **few)


def flag_temperature(run, base, folder):
    """Sampling and log-probs have it; evaluation and pretraining have not."""
    by_plain(temperature=1.5, ptx_coef=1.0)(run, base, folder)
    got = run(temperature=1.5, num_steps=1)
    assert got.arguments("generate", "temperature") == [1.5]
    refused(run, "--temperature", temperature=0.0)


def flag_micro_batch_size(run, base, folder):
    """No forward has more rows, and the metrics are the same."""
    names = ("completion_logps", "completion_scores")
    for size in (1, 2):
        got = run(micro_batch_size=size)
        batches = joined(got.arguments(name, "batch") for name in names)
        sizes = {len(batch.prompt_of) for batch in batches}
        assert max(sizes) == size
        assert set(got.arguments("fixed_logps", "micro_batch_size")) == {size}
        assert set(got.arguments("load_reward", "micro_batch_size")) == {size}
        observe.changes_nothing(got, base)


def flag_whiten_advantages(run, base, folder):
    """By the plain program; with it, the loss of a single update over all tokens is 0."""
    by_plain(whiten_advantages=False)(run, base, folder)
    one = dict(num_epochs=1, num_minibatches=1, num_steps=1)
    assert abs(run(**one).steps[0]["loss"]) < 1e-5
    assert abs(run(whiten_advantages=False, **one).steps[0]["loss"]) > 0.01


def flag_beta(run, base, folder):
    """By the plain program; at 0 there is no reference and no KL is logged."""
    by_plain(beta=1.5)(run, base, folder)
    got = run(beta=0.0, num_steps=2)
    assert len(got.results("load_model")) == 2
    assert not {"kl", "kl_per_token", "beta"} & set(got.steps[0])


def flag_kl_target(run, base, folder):
    """By the plain program, with a KL above it and below it."""
    by_plain(kl_target=0.01, kl_horizon=30.0, num_steps=3, learning_rate=8e-3)(run, base, folder)
    got = run(kl_target=0.01, kl_horizon=30.0, learning_rate=8e-3)
    kl = [row["kl"] for row in got.steps]
    beta = [row["beta"] for row in got.steps]
    assert abs(kl[0]) < 1e-4 and kl[1] > 0.02 and beta[0] == 0.2
    assert beta[1] == pytest.approx(0.2 * (1 - 0.2 * 6 / 30), rel=1e-5)
    assert beta[2] == pytest.approx(beta[1] * (1 + 0.2 * 6 / 30), rel=1e-5)
    near = run(kl_target=kl[1] / 1.1, kl_horizon=30.0, learning_rate=8e-3)  # nats a completion
    betas = [row["beta"] for row in near.steps]
    assert near.steps[1]["kl"] == kl[1]
    assert betas[2] == pytest.approx(betas[1] * (1 + 0.1 * 6 / 30), rel=1e-4)
    refused(run, "--kl-target", "--beta", kl_target=6.0, beta=0.0)


def flag_kl_horizon(run, base, folder):
    for horizon in (30.0, 300.0):
        got = run(kl_target=6.0, kl_horizon=horizon, num_steps=2)
        assert got.steps[1]["beta"] == pytest.approx(0.2 * (1 - 0.2 * 6 / horizon), rel=1e-5)


def flag_ptx_coef(run, base, folder):
    """The gradient is that of the policy's loss and of so many times the texts' loss."""
    gradients = []
    for coef in (0.0, 1.0, 10.0):
        got = run(ptx_coef=coef, num_steps=1, eval_size=0, max_grad_norm=1e9)
        gradients.append(next(u.gradient for u in got.updates if u.optimizer == 0))
        assert ("ptx_loss" in got.steps[0]) == bool(coef)
    without, once, ten = gradients
    assert (ten - without - 10 * (once - without)).norm() < 1e-4 * ten.norm()
    assert (once - without).norm() > 0.1
    by_plain(ptx_coef=10.0)(run, base, folder)


def flag_pretrain_dataset(run, base, folder):
    """Texts of two tokens or more are drawn from it; it is read only where they have a weight."""
    path = write(folder / "texts.jsonl", [{"text": text} for text in ("4", "77777", "88+8")])
    got = run(pretrain_dataset=path, ptx_coef=1.0, num_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(got.args.model)
    drawn = {tokenizer.decode(ids) for ids in joined(drawn_texts(got))}
    assert drawn == {"77777", "88+8"}
    assert run(pretrain_dataset="nowhere", num_steps=1).steps
    refused(run, "nowhere", pretrain_dataset="nowhere", ptx_coef=1.0)


def flag_ptx_batch_size(run, base, folder):
    by_plain(ptx_coef=1.0, ptx_batch_size=5)(run, base, folder)
    for size in (1, 3):
        got = run(ptx_coef=1.0, ptx_batch_size=size, num_steps=1)
        assert [len(texts) for texts in drawn_texts(got)] == [size] * 4


def flag_eval_size(run, base, folder):
    """So many held-out rows; 0: none is evaluated. Without a file, they are not trained on."""
    got = run(eval_size=2, num_steps=1)
    assert [asked["prompt"] for asked in got.asked[:2]] == [row["prompt"] for row in HELD[:2]]
    assert len(got.asked) == 2 + 6 + 2
    got = run(eval_size=0, num_steps=1)
    assert got.evals == [] and len(got.asked) == 6
    rows = write(folder / "thirty.jsonl", sums(300, 30))
    got = run(dataset=rows, eval_dataset="", eval_size=2, num_steps=2, num_prompts=28)
    held = {asked["prompt"] for asked in got.asked[:2]}
    assert len(held) == 2 and len(got.evals) == 2
    assert not held & {asked["prompt"] for asked in got.asked[2:-2]}


def flag_log_samples(run, base, folder):
    """A completion of each of the first prompts of every step, with prompt and reward, and as many
    held-out prompts at every evaluation."""
    for count in (1, 2):
        got = run(log_samples=count, missing_eos_penalty=None, num_steps=2)
        asked, samples = training(got), got.samples
        assert [row["step"] for row in samples] == [1] * count + [2] * count
        assert [row["step"] for row in got.held_out_samples] == [0] * count + [2] * count
        for row, one in zip(
            samples, asked[: 2 * count : 2] + asked[6 : 6 + 2 * count : 2], strict=True
        ):
            assert row["prompt"] == one["prompt"] and row["completion"] == one["text"]
            assert row["reward"] == pytest.approx(one["value"], rel=1e-6)


FLAGS = {
    "model": flag_model,
    "dataset": flag_dataset,
    "eval_dataset": flag_eval_dataset,
    "output_dir": observe.flag_output_dir,
    "resume": flag_resume,
    "overwrite": observe.flag_overwrite,
    "seed": flag_seed,
    "device": observe.flag_device,
    "dtype": observe.flag_dtype,
    "show_rows": observe.flag_show_rows,
    "gradient_checkpointing": observe.flag_gradient_checkpointing,
    "share_prompts": observe.flag_share_prompts,
    "reward": flag_reward,
    "reward_model": flag_reward_model,
    "critic_model": flag_critic_model,
    "missing_eos_penalty": by_both(by_plain(missing_eos_penalty=3.0), flag_missing_eos_penalty),
    "num_steps": flag_num_steps,
    "num_prompts": flag_num_prompts,
    "num_generations": flag_num_generations,
    "generation_batch_size": observe.flag_generation_batch_size,
    "max_new_tokens": flag_max_new_tokens,
    "temperature": flag_temperature,
    "num_epochs": by_plain(num_epochs=3),
    "num_minibatches": flag_num_minibatches,
    "micro_batch_size": flag_micro_batch_size,
    "learning_rate": by_both(by_plain(learning_rate=1e-3), observe.flag_learning_rate),
    "lora_rank": observe.flag_lora_rank,
    "shard": observe.flag_shard,
    "critic_learning_rate": by_plain(critic_learning_rate=1e-3),
    "critic_warmup": by_plain(critic_warmup=2, num_steps=3, lr_schedule="cosine"),
    "lr_schedule": by_both(by_plain(lr_schedule="linear"), by_plain(lr_schedule="cosine")),
    "max_grad_norm": by_both(by_plain(max_grad_norm=0.02), observe.flag_max_grad_norm),
    "gamma": by_plain(gamma=0.8),
    "lam": by_plain(lam=0.3),
    "whiten_advantages": flag_whiten_advantages,
    "clip_eps": by_plain(clip_eps=0.004),
    "clip_eps_value": by_plain(clip_eps_value=0.004),
    "vf_coef": by_plain(vf_coef=0.9),
    "beta": flag_beta,
    "kl_target": flag_kl_target,
    "kl_horizon": flag_kl_horizon,
    "pretrain_dataset": flag_pretrain_dataset,
    "ptx_coef": flag_ptx_coef,
    "ptx_batch_size": flag_ptx_batch_size,
    "eval_size": flag_eval_size,
    "eval_every": observe.flag_eval_every,
    "checkpoint_every": observe.flag_checkpoint_every,
    "log_samples": flag_log_samples,
}


def test_every_flag_is_looked_at():
    observe.has_every_flag(ppo, FLAGS)


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(flag, run_tiny, base, tmp_path):
    FLAGS[flag](run_tiny, base, tmp_path)


def test_the_defaults_are_those_of_the_papers():
    """Huang et al. 2024, table of hyperparameters; Ziegler et al. 2019, the adaptive beta."""
    args = ppo.Args(model="m", dataset="d")
    assert (args.learning_rate, args.critic_learning_rate, args.lr_schedule) == (
        3e-6, 3e-6, "constant",
    )  # fmt: skip
    assert (args.gamma, args.lam, args.beta, args.vf_coef) == (1.0, 0.95, 0.05, 0.1)
    assert (args.clip_eps, args.clip_eps_value, args.whiten_advantages) == (0.2, 0.2, True)
    assert (args.num_epochs, args.num_minibatches, args.missing_eos_penalty) == (4, 1, 1.0)
    assert (args.kl_target, args.kl_horizon, args.ptx_coef) == (0.0, 10000.0, 0.0)
    assert (args.temperature, args.critic_warmup, args.num_generations) == (1.0, 0, 1)
    assert (args.reward, args.reward_model, args.critic_model) == ("verifier", "", "")
    assert (args.device, args.dtype, args.seed, args.max_grad_norm) == ("auto", "auto", 0, 1.0)
    assert (args.num_steps, args.num_prompts, args.max_new_tokens) == (200, 64, 256)
    assert (args.micro_batch_size, args.ptx_batch_size, args.log_samples) == (8, 8, 4)
    assert (args.eval_size, args.eval_every, args.checkpoint_every) == (64, 50, 50)
    assert args.share_prompts and not args.gradient_checkpointing
    assert not args.resume and not args.overwrite and args.output_dir == "runs/ppo"


# --- Evaluation, gold reward, checkpoint ----------------------------------------------------------


def greedy(model, prompt, length, eos):
    """The likeliest token each time, one forward a token, until the end or the length."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length and eos not in ids[len(prompt) :]:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [14, 60])
def test_evaluation_is_greedy_on_the_held_out_rows(run_tiny, length):
    """Before the first step with the policy's weights, after the last with the final ones."""
    seen = run_tiny(max_new_tokens=length, num_steps=1, missing_eos_penalty=5.0)
    tokenizer = AutoTokenizer.from_pretrained(seen.args.model)
    folders, parts = (seen.args.model, seen.folder / "final"), (seen.asked[:4], seen.asked[-4:])
    assert [row["step"] for row in seen.evals] == [0, 1]
    for folder, asked, row in zip(folders, parts, seen.evals, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for one, held in zip(asked, HELD, strict=False):
            ids = greedy(model, toy_ids(tokenizer, held["prompt"]), length, tokenizer.eos_token_id)
            assert one["text"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert observe.without_raw([one["row"]])[0] == held | {
                "ended": ids[-1] == tokenizer.eos_token_id
            }
        want = sum(one["value"] for one in asked) / 4
        assert row["eval_reward"] == pytest.approx(want, rel=1e-5)


def last_number(text):
    return plumbing.last_number(text)  # how it is read: test_numbers.py


def test_gold_reward_beside_a_reward_that_says_the_opposite(run_tiny, tmp_path):
    """It is the share of right answers, each by its own row, whatever trains; cut off or not."""
    (tmp_path / "wrong.py").write_text(
        "from plumbing import last_number\n"
        "def f(prompts, completions, rows):\n"
        "    last = [last_number(text) for text in completions]\n"
        "    return [float(x != int(row['answer'])) for x, row in zip(last, rows)]\n"
    )
    rows = [{"prompt": f"{i}+0", "answer": str(i)} for i in range(10)]
    changes = dict(num_prompts=10, num_generations=12, max_new_tokens=4, num_steps=1)
    changes |= dict(num_epochs=1, num_minibatches=1, micro_batch_size=60, eval_size=0)
    seen = run_tiny(
        dataset=write(tmp_path / "digits.jsonl", rows), reward=f"{tmp_path}/wrong.py:f",
        missing_eos_penalty=None, **changes,
    )  # fmt: skip
    right = []
    tokenizer = AutoTokenizer.from_pretrained(seen.args.model)
    for prompt, completion in joined(rows for rows, _ in sampled(seen)):
        texts = tokenizer.batch_decode([prompt, completion], skip_special_tokens=True)
        right.append(float(last_number(texts[1]) == int(re.findall(r"\d+", texts[0])[0])))
    share = sum(right) / 120
    assert len(right) == 120 and 0.02 < share < 0.4
    assert seen.steps[0]["gold_reward"] == pytest.approx(share, rel=1e-5)
    assert seen.steps[0]["reward"] == pytest.approx(1 - share, rel=1e-5)
    verified = run_tiny(
        dataset=str(tmp_path / "digits.jsonl"), reward="verifier", missing_eos_penalty=None,
        **changes,
    )  # fmt: skip
    assert verified.steps[0]["reward"] == pytest.approx(share, rel=1e-5)
    punished = run_tiny(
        dataset=str(tmp_path / "digits.jsonl"), reward=f"{tmp_path}/wrong.py:f",
        missing_eos_penalty=9.0, **changes,
    )  # fmt: skip
    assert punished.steps[0]["gold_reward"] == pytest.approx(share, rel=1e-5)


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
    assert ppo.verifier(["p", "p"], ["0", text], [{"answer": 1}, {"answer": answer}]) == [0, right]


def test_what_is_in_the_rows_of_metrics(base):
    """No reward but the verifier is beside gold; the time is that of the step."""
    names = {
        "reward", "reward_std", "ended", "completion_length", "entropy", "value_loss", "value",
        "explained_variance", "tokens_per_second", "loss", "grad_norm", "lr", "clip_frac",
        "approx_kl", "kl", "kl_per_token", "beta", "gold_reward", "step", "seconds",
    }  # fmt: skip
    before = next(row["seconds"] for row in base.rows if row["step"] == 0)
    for row, (rows, _) in zip(base.steps, sampled(base), strict=True):
        assert set(row) == names
        tokens = sum(len(completion) for _, completion in rows)
        assert row["completion_length"] == pytest.approx(tokens / 6, rel=1e-5)
        passed = row["seconds"] - before + 0.001
        assert tokens / passed < row["tokens_per_second"] < 5 * tokens / max(passed - 0.002, 0.001)
        before = row["seconds"]


RESUMED = dict(
    num_steps=4, checkpoint_every=2, lr_schedule="cosine", kl_target=0.01, kl_horizon=30.0,
    critic_warmup=1, ptx_coef=0.5, num_epochs=1, eval_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def broken(run_tiny):
    """An unbroken run of four steps, one killed in its third, and the names of what it keeps."""
    whole, args, names = run_tiny(**RESUMED), run_tiny.args(**RESUMED), []
    begin = ppo.Run.begin

    def noting(self, parts, num_steps):
        names.extend(parts)
        begin(self, parts, num_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.Run, "begin", noting)
        with observe.killed(ppo, "generate", 3):
            ppo.main(args)
    return whole, args, names


def resumed(broken, folder, without=None):
    """The killed run taken up again, one of its parts left as it is made -> Seen."""
    _, args, _ = broken
    shutil.copytree(args.output_dir, folder)
    text = (folder / "args.json").read_text()
    (folder / "args.json").write_text(text.replace(args.output_dir, str(folder)))
    begin = ppo.Run.begin

    def leaving_out(self, parts, num_steps):
        begin(self, {k: v for k, v in parts.items() if k != without}, num_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.Run, "begin", leaving_out)
        values = vars(args) | dict(output_dir=str(folder), resume=True)
        return observed(ppo, ppo.Args(**values))


def same_run(one, two):
    """Rows of metrics, samples, and both models, bit for bit."""
    for name in ("final", "critic"):
        mine, theirs = one.weights(name), two.weights(name)
        if not all(torch.equal(mine[key], theirs[key]) for key in mine):
            return False
    return one.untimed() == two.untimed() and one.read("samples.jsonl") == two.read("samples.jsonl")


def test_a_killed_run_resumed_is_the_unbroken_one(broken, tmp_path):
    """Both learning rates on their cosines, beta adapted, texts drawn, the critic warmed up."""
    whole = broken[0]
    got = resumed(broken, tmp_path / "run")
    assert same_run(got, whole)
    rates = [update.lr for update in whole.updates]
    assert len(rates) == 4 * 4 - 2 and [update.lr for update in got.updates] == rates[-8:]
    assert len({row["beta"] for row in whole.steps}) > 2 and rates[-1] < rates[-5] < rates[-9]


def test_every_part_of_the_checkpoint_is_needed(broken, tmp_path):
    """Each left out gives another run."""
    whole, _, names = broken
    assert len(set(names)) == 7
    for name in set(names):
        assert not same_run(resumed(broken, tmp_path / name, without=name), whole), name


def test_learning_as_a_user_would(tmp_path):
    """`python ppo.py`, fewer steps; greedy accuracy starts below 0.65."""
    command = [sys.executable, ROOT / "ppo.py", "--output-dir", tmp_path / "run"]
    command += ["--num-steps", "3", "--eval-every", "3", "--eval-size", "100"]
    command += ["--num-prompts", "128"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    accuracy = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    assert accuracy[0] < 0.65 and accuracy[-1] > 0.8
    names = {"reward", "reward_std", "kl", "kl_per_token", "beta", "entropy", "completion_length",
             "ended", "loss", "value_loss", "explained_variance", "grad_norm", "lr", "clip_frac",
             "approx_kl", "tokens_per_second", "seconds", "step"}  # fmt: skip
    assert names <= set(rows[1])
