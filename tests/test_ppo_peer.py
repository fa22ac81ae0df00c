"""ppo.py beside a plain PPO program (plain_ppo.py): every metric, gradient, rate and weight."""

import pytest
from conftest import ROOT
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
from transformers import AutoTokenizer

import ppo

TEXTS = ["12+34=46", "7", "999", "0+1+2+3+4+5+6+7+8+9=45" * 2, "5=5 5=5"]


def reward(text):
    """Many values, which have nothing to do with what is right."""
    return (sum(ord(x) for x in text) % 13) / 6 - 0.5


RUNS = {
    "all at once": dict(
        num_prompts=5, num_generations=2, num_epochs=2, num_minibatches=3, temperature=0.8,
        gamma=0.97, lam=0.8, clip_eps=0.04, clip_eps_value=0.05, vf_coef=0.4, beta=0.3,
        kl_target=0.02, kl_horizon=40.0, ptx_coef=3.0, lr_schedule="cosine",
    ),
    "warm-up of the critic": dict(
        num_prompts=7, num_epochs=1, num_minibatches=2, beta=0.2, critic_warmup=1,
        lr_schedule="linear", whiten_advantages=False, missing_eos_penalty=None, clip_eps=0.02,
        kl_target=5.0, kl_horizon=50.0,
    ),
    "one update, no reference": dict(
        num_prompts=3, num_generations=2, num_epochs=1, num_minibatches=1, beta=0.0, vf_coef=1.0,
        lr_schedule="constant", critic_warmup=1,
    ),
    "one update, a reference": dict(
        num_prompts=6, num_epochs=1, num_minibatches=1, beta=0.5, max_grad_norm=1e9,
        lr_schedule="linear", clip_eps_value=0.01,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=RUNS)
def both(request, tiny, tmp_path_factory):
    """A run of three steps, and the plain program's on the same completions."""
    folder = tmp_path_factory.mktemp("ppo")
    lines = [f'{{"text": "{text}"}}\n' for text in TEXTS]
    (folder / "texts.jsonl").write_text("".join(lines))
    (folder / "r.py").write_text(
        "def f(prompts, completions, rows):\n"
        "    return [(sum(ord(x) for x in text) % 13) / 6 - 0.5 for text in completions]\n"
    )
    values = dict(
        model=make_policy(tiny, folder / "policy"), eval_size=0, num_steps=3,
        critic_model=make_critic(tiny, folder / "critic"),
        dataset=str(ROOT / "toy/problems_train.jsonl"), output_dir=str(folder / "run"),
        device="cpu", max_new_tokens=20, micro_batch_size=2, learning_rate=6e-3, seed=3,
        critic_learning_rate=2e-3, max_grad_norm=0.05, missing_eos_penalty=0.7, ptx_batch_size=3,
        reward=f"{folder}/r.py:f", pretrain_dataset=str(folder / "texts.jsonl"),
    )  # fmt: skip
    seen = observed(ppo, ppo.Args(**values | RUNS[request.param]))
    return seen, replay(seen, reward)


def test_every_metric(both):
    same_metrics(*both)


def test_every_gradient_and_rate(both):
    same_updates(*both)


def test_the_weights_at_the_end(both):
    same_weights(*both)


def test_the_runs_exercise_it(both):
    """Ragged rows that ended and that were cut off, different scores, a policy that moved."""
    seen, plain = both
    lengths = {len(completion) for _, completion in joined(rows for rows, _ in sampled(seen))}
    assert len(lengths) > 5 and any(0 < row["ended"] < 1 for row in plain.metrics)
    assert max(row["reward_std"] for row in plain.metrics) > 0.3
    learning = [row for row in plain.metrics if "loss" in row]
    assert len(learning) == 3 - seen.args.critic_warmup
    if seen.args.num_epochs * seen.args.num_minibatches > 1:
        assert all(row["clip_frac"] > 0.02 and row["approx_kl"] > 1e-4 for row in learning)
    if seen.args.beta:
        assert max(abs(row["kl"]) for row in plain.metrics) > 0.02
    if seen.args.kl_target == 0.02:
        first, second, third = (row["beta"] for row in seen.steps)
        assert second < first and third == pytest.approx(second * (1 + 0.2 * 10 / 40), rel=1e-5)
    if seen.args.kl_target == 5:
        assert seen.steps[1]["beta"] == seen.steps[0]["beta"] > seen.steps[2]["beta"]


def test_the_pretraining_texts(both):
    """Each update draws its own of those that have two tokens, cut to --max-new-tokens."""
    seen, _ = both
    drawn = drawn_texts(seen)
    if not seen.args.ptx_coef:
        assert drawn == []
        return
    tokenizer = AutoTokenizer.from_pretrained(seen.args.model)
    possible = [tokenizer(text)["input_ids"][:20] for text in TEXTS if len(text) > 1]
    assert len(drawn) == 3 * 6 and {len(texts) for texts in drawn} == {3}
    assert all(text in possible for text in joined(drawn))
    assert len({str(texts) for texts in drawn}) > 12
    assert len({len(text) for text in joined(drawn)}) > 2


def test_the_orders(both):
    """Every pass of every step has an order of its own, over all completions."""
    seen, _ = both
    count = seen.args.num_epochs * seen.args.num_steps
    if seen.args.num_epochs * seen.args.num_minibatches == 1:
        return
    assert len(seen.orders) == count and len({str(order) for order in seen.orders}) == count
    size = seen.args.num_prompts * seen.args.num_generations
    assert all(sorted(order) == list(range(size)) for order in seen.orders)
