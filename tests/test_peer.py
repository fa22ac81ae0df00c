"""Whole steps beside TRL's trainers: oracles that nobody here wrote.

Both sides start from the same weights and take three steps on the same completions, so that the
policy differs from its reference from the second step on. Gradients of every update and the final
weights must agree. Our side goes in micro-batches that do not divide the step, TRL's in one go.
"""

import functools
import json
from dataclasses import dataclass

import pytest
import torch
from observe import observe
from plain import unpadded
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

pytest.importorskip("trl", reason="needs the extra `bench`: pip install -e '.[bench]'")

import peer_trl  # noqa: E402

import dpo_nll  # noqa: E402
import grpo  # noqa: E402
import reinforce_rloo  # noqa: E402
import rm_bt  # noqa: E402

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),  # theirs, and that completions of 16 tokens are cut off
]

SAME = 1e-5  # relative, of norms and weights
SAME_GRADIENT = 3e-5  # of a whole gradient, where most is clipped and little is left
STEPS, PROMPTS, GENERATIONS = 3, 4, 4
EPSILON = 1e-5  # of AdamW's, for sampled completions
LONGEST = 16  # of a completion, in tokens


def difference(a, b):
    """Length of a - b, in lengths of b."""
    return ((a - b).norm() / b.norm()).item()


def assert_same(seen, peer):
    """Every update's gradient after the clip, every step's norm before it, every final weight."""
    assert len(seen.updates) == len(peer.gradients) == len(peer.logs)
    for mine, theirs in zip(seen.updates, peer.gradients, strict=True):
        assert theirs.norm() > 1e-3
        assert difference(mine.gradient, theirs) < SAME_GRADIENT
    each = len(peer.logs) // len(seen.steps)
    for i, row in enumerate(seen.steps):  # of several updates, ours logs the largest norm
        norm = max(peer.logged("grad_norm")[i * each : (i + 1) * each])
        assert row["grad_norm"] == pytest.approx(norm, rel=SAME)
    mine = seen.weights()
    assert mine.keys() == peer.weights.keys()
    for name, theirs in peer.weights.items():
        assert difference(mine[name], theirs) < SAME, name


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- GRPO and RLOO --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tiny, tmp_path_factory):
    """Folder of a copy of `tiny` that ends sooner: most completions are shorter than LONGEST."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ours(policy, tmp_path_factory):
    """sample(script, **flags) -> Seen of three steps; each combination is run once."""
    folder = tmp_path_factory.mktemp("ours")
    prompts = [f"{7 ** (i % 6)}+{i}" for i in range(24)]  # of 3 to 8 characters
    dataset = write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    runs = {}

    def sample(script, **flags):
        key = script.__name__, *sorted(flags.items())
        if key not in runs:
            values = script.TOY | dict(
                model=policy, dataset=dataset, eval_dataset="", eval_size=0,
                output_dir=str(folder / str(len(runs))), device="cpu",
                num_steps=STEPS, num_prompts=PROMPTS, num_generations=GENERATIONS,
                max_new_tokens=LONGEST, micro_batch_size=5, learning_rate=peer_trl.RATE,
                lr_schedule="constant", max_grad_norm=peer_trl.LONGEST_GRADIENT, beta=0.1,
                reward=f"{peer_trl.__file__}:reward",
            )  # fmt: skip
            runs[key] = observe_with_epsilon(script, script.Args(**values | flags))
        return runs[key]

    return sample


def observe_with_epsilon(script, args):
    """Our run with another epsilon of AdamW's. With the usual 1e-8, the rounding of a gradient near
    0 decides on a step as long as any other's, and the two sides drift apart by 1e-4."""
    adamw = functools.partial(torch.optim.AdamW, eps=EPSILON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", adamw)
        return observe(script, args)


def sampled_steps(seen):
    """-> (prompts, Batch) of each step, as they were sampled: ragged, ended and cut off ones."""
    batches = [batch for batch, _, _ in seen.results("generate")]
    assert len(batches) == STEPS
    for batch in batches:
        assert len(batch.completion_mask.sum(1).unique()) > 2
        assert len(batch.prompt_mask.sum(1).unique()) > 1
    ended = torch.cat([ended for _, _, ended in seen.results("generate")])
    assert ended.any() and not ended.all()
    return list(zip(seen.arguments("generate", "prompts"), batches, strict=True))


def theirs(name, policy, folder, steps, **changes):
    shared = dict(beta=0.1, max_completion_length=LONGEST, temperature=1.0, adam_epsilon=EPSILON)
    shared |= dict(use_bias_correction_kl=False) if name == "GRPO" else {}
    return peer_trl.on_completions(name, policy, folder, steps, shared | changes)


# Our flags, and the same in TRL's words.
GRPO = {
    "sequence": ({}, dict(loss_type="grpo")),
    "token": (dict(aggregate="token"), dict(loss_type="dapo")),
    "dr grpo": (
        dict(aggregate="constant", scale_by_std=False),
        dict(loss_type="dr_grpo", scale_rewards="none"),
    ),
    "sequence, not scaled": (
        dict(scale_by_std=False),
        dict(loss_type="grpo", scale_rewards="none"),
    ),
    "two epochs": (
        dict(num_epochs=2, clip_eps=0.02, clip_eps_high=0.05),
        dict(loss_type="grpo", num_iterations=2, epsilon=0.02, epsilon_high=0.05),
    ),
    "two epochs, one bound, cooler": (
        dict(num_epochs=2, clip_eps=0.03, aggregate="token", temperature=0.7),
        dict(loss_type="bnpo", num_iterations=2, epsilon=0.03, temperature=0.7),
    ),
}
# GSPO's clip is of completions; TRL's epsilon_high of CISPO is the bound itself, not less 1.
OTHER_LOSSES = {
    "gspo": (
        dict(loss="gspo", num_epochs=2, clip_eps=0.002, clip_eps_high=0.003),
        dict(
            loss_type="grpo", importance_sampling_level="sequence", num_iterations=2, epsilon=0.002,
            epsilon_high=0.003,
        ),
    ),
    "gspo, one update": (
        dict(loss="gspo"),
        dict(loss_type="grpo", importance_sampling_level="sequence"),
    ),
    "cispo": (
        dict(loss="cispo", aggregate="token", num_epochs=2, clip_eps_high=0.02),
        dict(loss_type="cispo", num_iterations=2, epsilon_high=1.02),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_LOSSES)
def test_gspo_and_cispo(case, ours, policy, tmp_path):
    """As test_grpo. TRL counts clipped completions, or tokens of a positive advantage alone, where
    ours counts tokens: only that there are some is compared."""
    flags, words = OTHER_LOSSES[case]
    seen = ours(grpo, **flags)
    peer = theirs("GRPO", policy, tmp_path, sampled_steps(seen), **words)
    assert_same(seen, peer)
    assert any(row["kl"] != 0 for row in seen.steps[1:])
    name = "cispo_clip_ratio" if case == "cispo" else "clip_ratio/region_mean"
    for mine in (any(row["clip_frac"] > 0 for row in seen.steps), any(peer.logged(name))):
        assert mine == ("one update" not in case)


@pytest.mark.parametrize("case", GRPO)
def test_grpo(case, ours, policy, tmp_path):
    """Aggregations, scaling by the standard deviation, clip, a second epoch, temperature; k3 in the
    loss. TRL's default multiplies the KL by the ratio (use_bias_correction_kl); the book and
    DeepSeekMath do not, and it is switched off. The share of clipped tokens agrees, too."""
    flags, words = GRPO[case]
    seen = ours(grpo, **flags)
    peer = theirs("GRPO", policy, tmp_path, sampled_steps(seen), **words)
    assert_same(seen, peer)
    same_metric(seen, peer, "reward", "reward")
    same_metric(seen, peer, "clip_frac", "clip_ratio/region_mean")
    same_metric(seen, peer, "completion_length", "completions/mean_length")
    assert any(row["kl"] != 0 for row in seen.steps[1:])
    assert any(row["clip_frac"] > 0 for row in seen.steps) == ("two epochs" in case)


def same_metric(seen, peer, mine, theirs):
    """A metric of each step is the mean of TRL's over the step's updates that have it."""
    each = len(peer.logs) // len(seen.steps)
    for i, row in enumerate(seen.steps):
        logs = peer.logs[i * each : (i + 1) * each]
        values = [log[theirs] for log in logs if theirs in log]
        assert row[mine] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)


def test_grpo_in_minibatches(ours, policy, tmp_path, monkeypatch):
    """Two updates a step, each on half of the groups, with one mean over the half's tokens. Which
    groups came first is read off our training forwards; TRL's own shuffle is switched off."""
    from trl.trainer import grpo_trainer

    flags = dict(num_minibatches=2, aggregate="token", clip_eps=0.02, micro_batch_size=8)
    seen = ours(grpo, **flags)
    forwards = seen.arguments("completion_logps", "batch")
    assert len(forwards) == 2 * STEPS
    steps = []
    for i, (prompts, batch) in enumerate(sampled_steps(seen)):
        rows = unpadded(batch)
        first = [prompt for prompt, _ in unpadded(forwards[2 * i])]
        front = [j for j in range(PROMPTS) if rows[j * GENERATIONS][0] in first]
        order = front + [j for j in range(PROMPTS) if j not in front]
        assert len(front) == 2
        steps.append(([prompts[j] for j in order], groups_in_order(batch, order)))
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda values: values)
    peer = theirs(
        "GRPO", policy, tmp_path, steps, loss_type="bnpo", epsilon=0.02, steps_per_generation=2,
        per_device_train_batch_size=8,
    )  # fmt: skip
    assert_same(seen, peer)
    assert any(row["clip_frac"] > 0 for row in seen.steps)


def groups_in_order(batch, order):
    """The same Batch with its groups in another order."""
    groups = torch.tensor(order)
    rows = (groups[:, None] * GENERATIONS + torch.arange(GENERATIONS)).flatten()
    parts = batch.prompt_ids[groups], batch.prompt_mask[groups]
    parts += batch.completion_ids[rows], batch.completion_mask[rows]
    return type(batch)(*parts, batch.prompt_of)


def test_rloo(ours, policy, tmp_path):
    """Leave-one-out over rewards less beta times the KL (k1, summed over the completion), as it is
    in both; TRL's is the ratio's gradient at the ratio 1, and its advantages are not normalised."""
    seen = ours(reinforce_rloo)
    peer = theirs("RLOO", policy, tmp_path, sampled_steps(seen), normalize_advantages=False)
    assert_same(seen, peer)
    same_metric(seen, peer, "reward", "reward")
    same_metric(seen, peer, "kl_per_token", "kl")
    assert abs(seen.steps[-1]["kl"]) > 1e-3


# --- DPO and reward models ------------------------------------------------------------------------

SUMS = ["1+1=2", "12+30=42", "5", "7+7+7=21\n21", "99\n98+1=99", "4+4=8", "6", "31+2=33\n33"]


def some_pairs():
    """Twelve pairs of ragged lengths; the chosen ones have 8 characters, which are as many tokens,
    so that a mean over all of their tokens is the mean of the means over each."""
    pairs = []
    for i in range(STEPS * PROMPTS):
        prompt = f"{3 * i}+{7 * i * i}"
        chosen = f"{i}+{i + 2}=12345678"[:8]
        margin = 0.25 * (i % 4)
        rejected = SUMS[i % len(SUMS)]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin})
    return pairs


def in_order_of(batches, model, pairs):
    """The pairs in the order in which these batches first have their prompts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = []
    for batch in batches:
        for prompt, _ in unpadded(batch):
            text = tokenizer.decode(prompt)
            prompts.extend([text] if text not in prompts else [])
    by_prompt = {f"<bos><user>{pair['prompt']}<assistant>": pair for pair in pairs}
    assert prompts != list(by_prompt)  # ours shuffles
    return [by_prompt[prompt] for prompt in prompts]


@dataclass
class Pairs:
    """Our run on pairs, and these in the order in which it took them."""

    seen: object
    pairs: list


def our_pairs(script, model, folder, forward, **flags):
    """Run a script on some_pairs, four a step in micro-batches of three and one -> Pairs."""
    pairs = some_pairs()
    values = script.TOY | dict(
        model=model, dataset=write(folder / "pairs.jsonl", pairs), eval_dataset="", eval_size=0,
        output_dir=str(folder / "run"), device="cpu", num_epochs=1, batch_size=PROMPTS,
        micro_batch_size=6, learning_rate=peer_trl.RATE, lr_schedule="constant", warmup_ratio=0.0,
        max_grad_norm=peer_trl.LONGEST_GRADIENT,
    )  # fmt: skip
    seen = observe(script, script.Args(**values | flags))
    batches = seen.arguments(forward, "batch")
    return Pairs(seen, in_order_of(batches, model, pairs))


# Our flags, and the same in TRL's words.
DPO = {
    "dpo": ({}, dict(loss_type="sigmoid")),
    "dpo, normalised": (dict(normalize_length=True), dict(loss_type="sigmoid_norm")),
    "dpo and nll": (dict(alpha=0.5), dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])),
    "ipo, normalised": (dict(loss="ipo", normalize_length=True), dict(loss_type="ipo")),
}


@pytest.mark.parametrize("case", DPO)
def test_dpo(case, tiny, tmp_path):
    """DPO on sums and on means of log-probs, with the NLL, and IPO. TRL's IPO takes means over the
    tokens, and so does ours with --normalize-length. TRL's NLL is one mean over all tokens, ours a
    mean of completions' means: the same here, where the chosen ones are equally long."""
    flags, words = DPO[case]
    flags = dict(beta=0.1, alpha=0.0, eval_prompts="") | flags
    mine = our_pairs(dpo_nll, tiny, tmp_path, "completion_logps", **flags)
    pairs = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in mine.pairs]
    folder = tmp_path / "theirs"
    peer = peer_trl.on_pairs("DPO", tiny, folder, pairs, PROMPTS, dict(beta=0.1) | words)
    assert_same(mine.seen, peer)
    if "normalised" not in case:
        same_metric(mine.seen, peer, "reward_chosen", "rewards/chosen")
        same_metric(mine.seen, peer, "reward_rejected", "rewards/rejected")


@pytest.fixture(scope="module")
def scorer(tiny, tmp_path_factory):
    """Folder of a reward model to start from, with a head: both sides' would be random."""
    folder = tmp_path_factory.mktemp("scorer")
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


CENTRED = {"center_rewards_coefficient": 0.1}
# Our flags, whether TRL sees the margins, and its words.
REWARD = {
    "plain": (dict(margin_scale=0.0), False, {}),
    "margin": (dict(margin_scale=1.0), True, {}),
    "centred": (dict(margin_scale=0.0, center_coef=0.1), False, CENTRED),
    "both": (dict(margin_scale=1.0, center_coef=0.1), True, CENTRED),
}


@pytest.mark.parametrize("case", REWARD)
def test_reward_model(case, scorer, tmp_path):
    """Bradley-Terry, with a margin, and with the rewards drawn to 0. Both start from one head."""
    flags, has_margin, words = REWARD[case]
    mine = our_pairs(rm_bt, scorer, tmp_path, "last_scores", **flags)
    keys = ["prompt", "chosen", "rejected"] + ["margin"] * has_margin
    pairs = [{key: pair[key] for key in keys} for pair in mine.pairs]
    peer = peer_trl.on_pairs("Reward", scorer, tmp_path / "theirs", pairs, PROMPTS, words)
    assert_same(mine.seen, peer)
    same_metric(mine.seen, peer, "margin", "margin")
    same_metric(mine.seen, peer, "accuracy", "accuracy")
    same_metric(mine.seen, peer, "reward", "mean_reward")
