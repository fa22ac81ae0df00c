"""ppo.py against hand values, plain loops, limiting cases, and learning on the toy."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer, other_weights
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import common
import ppo


def tiny_args(tmp_path, **changes):
    """Args of a short run on the toy."""
    values = ppo.TOY | dict(
        model=str(ROOT / "toy/model"), dataset=str(ROOT / "toy/problems_train.jsonl"),
        eval_dataset="", eval_size=0, num_steps=2, num_prompts=8, micro_batch_size=16,
        output_dir=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    return ppo.Args(**values | changes)


def run(args):
    """Train -> rows of metrics."""
    ppo.main(args)
    with open(f"{args.output_dir}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


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


def test_a_value_has_not_seen_its_token(tmp_path):
    """V_t is the head's output before y_t, by a plain forward; changing y_t changes V_{t+1} on."""
    tokenizer, critic = toy(tiny_args(tmp_path))
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


def test_the_critic_starts_at_0_or_as_the_reward_model(tmp_path):
    tokenizer, critic = toy(tiny_args(tmp_path))
    assert all((p == 0).all() for p in critic.score.parameters())
    reward_model = ppo.load_model(
        AutoModelForSequenceClassification, ROOT / "toy/model", torch.device("cpu"), new_head=1
    )
    reward_model.config.reward_bias = 0.25
    for part in (reward_model, tokenizer):
        part.save_pretrained(tmp_path / "rm")
    _, critic = toy(tiny_args(tmp_path, reward_model=str(tmp_path / "rm")))
    assert torch.equal(critic.score.weight, reward_model.score.weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = ppo.Batch(ids[:, :2], ids[:, :2] > 0, ids[:, 2:], ids[:, 2:] > 0, torch.tensor([0]))
    both = [ppo.completion_scores(m, batch).detach() for m in (critic, reward_model)]
    assert torch.allclose(*both, atol=1e-5)
    _, critic = toy(tiny_args(tmp_path, reward_model=str(tmp_path / "rm"),
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


def test_the_critic_learns_and_moves_no_policy(tmp_path):
    """With the policy held still, the value loss falls, and only the critic's weights move."""
    rows = run(tiny_args(tmp_path, learning_rate=0.0, num_steps=8, num_prompts=32, beta=0.0,
                         critic_learning_rate=3e-3, lr_schedule="constant"))  # fmt: skip
    assert rows[-1]["explained_variance"] > rows[0]["explained_variance"] + 0.05
    start = load_file(ROOT / "toy/model/model.safetensors")
    final = load_file(tmp_path / "run/final/model.safetensors")
    critic = load_file(tmp_path / "run/critic/model.safetensors")
    assert all(torch.equal(start[k], final[k]) for k in start)
    assert not torch.equal(start["model.layers.0.mlp.up_proj.weight"],
                           critic["model.layers.0.mlp.up_proj.weight"])  # fmt: skip
    assert critic["score.weight"].abs().max() > 0


def test_critic_warmup_leaves_the_policy(tmp_path):
    rows = run(tiny_args(tmp_path, critic_warmup=1, learning_rate=1e-3))
    assert "loss" not in rows[0] and rows[0]["value_loss"] > 0 and rows[0]["entropy"] > 0
    assert rows[1]["grad_norm"] > 0 and abs(rows[1]["kl"]) < 1e-4  # nothing moved in step 1


# --- Training -------------------------------------------------------------------------------------


def test_bfloat16_trains(tmp_path):
    """What cuda takes by default. Policy and reference compute alike: a KL of 0, a ratio of 1."""
    for row in run(tiny_args(tmp_path / "a", learning_rate=0.0, dtype="bfloat16")):
        assert abs(row["kl"]) < 0.02 and row["clip_frac"] == 0 and row["approx_kl"] < 1e-4
    rows = run(tiny_args(tmp_path / "b", dtype="bfloat16"))
    assert rows[-1]["approx_kl"] > 0 and rows[0]["grad_norm"] > 0 and rows[0]["value_loss"] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_lr_0_keeps_ratio_1_and_kl_0(tmp_path, temperature):
    for row in run(tiny_args(tmp_path, learning_rate=0.0, temperature=temperature)):
        assert abs(row["kl"]) < 1e-4 and row["clip_frac"] == 0 and abs(row["approx_kl"]) < 1e-8


def test_returns_come_from_advantages_that_are_not_whitened(tmp_path, monkeypatch):
    """With gamma = lam = 1 and no KL, the return of every token is the completion's score."""
    seen, loss = [], ppo.ppo_value_loss
    monkeypatch.setattr(ppo, "ppo_value_loss", lambda *a: seen.append(a) or loss(*a))
    run(tiny_args(tmp_path, lam=1.0, beta=0.0, num_steps=1))
    for _, old_values, returns, weights, _ in seen:
        there = weights > 0
        assert (old_values[there] != returns[there]).any()
        assert ((returns[there] - returns[there].round()).abs() < 1e-5).all()
        assert set(returns[there].round().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("size", [16, 3])
def test_a_step_is_that_of_the_textbook(tmp_path, monkeypatch, size):
    """One pass in two minibatches, with a reference and a critic of other weights, beside plain
    loops over single sequences: KL in the reward, GAE, whitening, both losses, both gradients."""
    loaded, made, norms = other_weights(ppo, monkeypatch), [], []
    load, generate, update = ppo.load_critic, ppo.generate, ppo.update

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
    monkeypatch.setattr(ppo, "generate", lambda *a: seen(generate(*a), made))
    monkeypatch.setattr(ppo, "update", lambda *a: seen(update(*a), norms))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    row = run(tiny_args(
        tmp_path, num_steps=1, num_epochs=1, num_minibatches=2, beta=0.5, learning_rate=0.0,
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


def test_later_minibatches_have_another_ratio(tmp_path):
    assert run(tiny_args(tmp_path, learning_rate=1e-3, num_steps=1))[0]["approx_kl"] > 1e-5


def test_one_gradient_step_computes_no_old_logps(tmp_path, monkeypatch):
    calls, fixed = [], ppo.fixed_logps
    monkeypatch.setattr(ppo, "fixed_logps", lambda *a: calls.append(1) or fixed(*a))
    row = run(tiny_args(tmp_path, num_steps=1, beta=0.0, num_epochs=1, num_minibatches=1))[0]
    assert not calls and row["approx_kl"] == 0 and row["clip_frac"] == 0 and row["grad_norm"] > 0
    run(tiny_args(tmp_path / "b", num_steps=1, beta=0.0))
    assert len(calls) == 1


@pytest.mark.parametrize("changes", [{}, dict(share_prompts=False)])
def test_micro_batches_and_shared_prompts_change_nothing(tmp_path, changes):
    same = dict(num_steps=1, num_epochs=1, num_minibatches=1, beta=0.1, learning_rate=0.0,
                num_prompts=4, num_generations=3)  # fmt: skip
    whole = run(tiny_args(tmp_path / "a", **same))[0]
    split = run(tiny_args(tmp_path / "b", micro_batch_size=5, **same, **changes))[0]
    for name in ("loss", "value_loss", "grad_norm", "entropy", "explained_variance"):
        assert split[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


def test_a_cut_off_completion_is_not_scored(tmp_path):
    (tmp_path / "one.py").write_text("def f(p, c, r):\n    return [1.0] * len(c)")
    args = tiny_args(tmp_path, max_new_tokens=4, missing_eos_penalty=3.0, num_steps=1,
                     reward=f"{tmp_path}/one.py:f")  # fmt: skip
    with pytest.warns(UserWarning, match="max-new-tokens"):
        row = run(args)[0]
    assert row["ended"] == 0 and row["reward"] == -3


def test_beta_adapts_and_is_logged_as_used(tmp_path):
    rows = run(tiny_args(tmp_path, kl_target=6.0, kl_horizon=100.0, num_steps=3, beta=0.5))
    betas = [row["beta"] for row in rows]
    frozen = run(tiny_args(tmp_path / "w", kl_target=6.0, kl_horizon=100.0, num_steps=3, beta=0.5,
                           critic_warmup=2))  # fmt: skip
    assert [row["beta"] for row in frozen] == [0.5] * 3  # while only the critic learns
    assert betas[0] == 0.5  # KL 0 is under the target: beta falls by 0.2 * 8 / 100 a step
    assert betas[1] == pytest.approx(0.5 * 0.984, rel=1e-4)
    assert betas[2] == pytest.approx(0.5 * 0.984**2, rel=1e-3)


def test_pretraining_gradients_keep_the_pretraining_text(tmp_path):
    """The final policy's loss on a text far from the task, by Transformers' own loss."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "9876543210" * 3}) + "\n")
    ids = ppo.load_tokenizer(ROOT / "toy/model")("9876543210" * 3, return_tensors="pt").input_ids
    loss = []
    for coef in (0.0, 1.0):
        rows = run(tiny_args(tmp_path / str(coef), num_steps=6, ptx_coef=coef,
                             pretrain_dataset=str(tmp_path / "text.jsonl")))  # fmt: skip
        final = AutoModelForCausalLM.from_pretrained(tmp_path / str(coef) / "run/final")
        loss.append(final(ids, labels=ids).loss.item())
        assert ("ptx_loss" in rows[-1]) == bool(coef)
    assert loss[1] < loss[0] - 0.5 and rows[-1]["ptx_loss"] == pytest.approx(loss[1], abs=0.3)


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    same = dict(lr_schedule="constant", checkpoint_every=1, kl_target=6.0, learning_rate=1e-3)
    run(tiny_args(tmp_path / "a", num_steps=3, **same))
    run(tiny_args(tmp_path / "b", num_steps=1, **same))
    run(tiny_args(tmp_path / "b", num_steps=3, resume=True, **same))
    for name in ("final", "critic"):
        one, two = (load_file(tmp_path / x / "run" / name / "model.safetensors") for x in "ab")
        assert all(torch.equal(one[k], two[k]) for k in one)
    rows = [[json.loads(x) for x in open(tmp_path / x / "run/metrics.jsonl")] for x in "ab"]
    for one, two in zip(*rows, strict=True):
        for row in (one, two):
            del row["seconds"], row["tokens_per_second"]
        assert one == two


def test_learning_as_a_user_would(tmp_path):
    """`python ppo.py`, fewer steps; greedy accuracy starts below 0.65."""
    command = [sys.executable, ROOT / "ppo.py", "--output-dir", tmp_path / "run"]
    command += ["--num-steps", "12", "--eval-every", "12", "--eval-size", "200"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    accuracy = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    assert accuracy[0] < 0.65 and accuracy[-1] > 0.8
    names = {"reward", "reward_std", "kl", "kl_per_token", "beta", "entropy", "completion_length",
             "ended", "loss", "value_loss", "explained_variance", "grad_norm", "lr", "clip_frac",
             "approx_kl", "tokens_per_second", "seconds", "step"}  # fmt: skip
    assert names <= set(rows[1])
