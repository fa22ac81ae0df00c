"""dpo_nll.py against hand values, closed forms, limiting cases, and learning on the toy."""

import json
import math
import random
import subprocess
import sys
import time

import observe
import plain
import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer
from policy_gradient import write_rows
from replay import (
    REWARD, adamw, checkpoint_parts, end_weights, flag_resume, flat_gradient, greedy,
    greedy_reward, model_with, moved, problems, resumed_without, reward_of, weights_of,
)  # fmt: skip
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common
import plumbing
import dpo_nll
import sft

pytestmark = pytest.mark.usefixtures("no_picture")


def toy_rows(n):
    return [json.loads(x) for x in (ROOT / "toy/pref_train.jsonl").read_text().splitlines()[:n]]


def tiny_args(tmp_path, **changes):
    """Args of a short run on 16 pairs of the toy."""
    rows = write_rows(tmp_path / "rows.jsonl", toy_rows(16))
    values = dpo_nll.TOY | dict(
        model=str(ROOT / "toy/model"), dataset=rows, eval_dataset=rows, eval_prompts="",
        batch_size=8, micro_batch_size=8, output_dir=str(tmp_path / "run"), device="cpu",
        lr_schedule="constant", warmup_ratio=0.0,
    )  # fmt: skip
    return dpo_nll.Args(**values | changes)


def test_each_of_several_processes_has_prompts_to_sample_for(tmp_path, monkeypatch):
    """With the defaults a micro-batch holds no more than one prompt's completions."""
    monkeypatch.setattr(dpo_nll, "process", lambda: (0, 3))
    reward = "def f(prompts, completions, rows):\n    return [len(text) for text in completions]\n"
    (tmp_path / "reward.py").write_text(reward)
    args = tiny_args(
        tmp_path, dataset=str(ROOT / "toy/problems_test.jsonl"), eval_dataset="", eval_size=0,
        iterations=1, num_prompts=6, num_pairs=4, num_generations=4, micro_batch_size=4,
        max_new_tokens=12, temperature=2.0, reward=f"{tmp_path}/reward.py:f",
    )  # fmt: skip
    seen = observe.observe(dpo_nll, args)
    assert [len(prompts) for prompts in seen.arguments("generate", "prompts")] == [3, 3]


def run(args):
    """Train -> rows of metrics."""
    dpo_nll.main(args)
    with open(f"{args.output_dir}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def steps(rows):
    return [row for row in rows if "loss" in row]


# --- The algorithm --------------------------------------------------------------------------------

HERE = [torch.tensor([x]) for x in (-1.0, -5.0, -2.0, -4.0)]  # delta = 1 - (-1) = 2


def test_dpo_by_hand():
    assert dpo_nll.log_ratio_difference(*HERE).item() == 2
    assert dpo_nll.dpo_loss(*HERE, 0.1).item() == pytest.approx(0.598139, abs=1e-6)
    same = [torch.tensor([-3.0, -7.0])] * 4
    assert dpo_nll.dpo_loss(*same, 0.1).item() == pytest.approx(math.log(2))
    assert dpo_nll.dpo_loss(*HERE, 0.1, margin=0.2).item() == pytest.approx(math.log(2))
    want = 0.9 * 0.598139 + 0.1 * 0.798139  # softplus(-0.2), softplus(0.2)
    assert dpo_nll.dpo_loss(*HERE, 0.1, 0.0, 0.1).item() == pytest.approx(want, abs=1e-6)


def test_dpo_with_a_soft_label_by_hand():
    """The mean of both ways round; at beta delta = logit of the label nothing pulls."""
    label = torch.tensor([0.7])
    want = 0.7 * 0.598139 + 0.3 * 0.798139  # softplus(-0.2), softplus(0.2)
    got = dpo_nll.dpo_loss(*HERE, 0.1, probability=label)
    assert got.item() == pytest.approx(want, abs=1e-6)
    both = dpo_nll.dpo_loss(*HERE, 0.1, 0.0, 0.1, label)  # wrong: 0.3 * 0.9 + 0.7 * 0.1 = 0.34
    assert both.item() == pytest.approx(0.66 * 0.598139 + 0.34 * 0.798139, abs=1e-6)
    turned = [HERE[1], HERE[0], HERE[3], HERE[2]]
    got = dpo_nll.dpo_loss(*turned, 0.1, probability=torch.zeros(1))
    assert got.item() == pytest.approx(0.598139, abs=1e-6)
    chosen = torch.tensor([10 * math.log(0.7 / 0.3)], requires_grad=True)
    zero = torch.zeros(1)
    dpo_nll.dpo_loss(chosen, zero, zero, zero, 0.1, probability=label).backward()
    assert chosen.grad.item() == pytest.approx(0, abs=1e-7)


def test_dpo_gradient_is_the_closed_form():
    """-beta sigmoid(-beta delta) for the chosen log-prob, the opposite for the rejected one."""
    torch.manual_seed(0)
    four = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    dpo_nll.dpo_loss(*four, 0.3).backward()
    c, r, ref_c, ref_r = (x.detach() for x in four)
    weight = 0.3 / (1 + torch.exp(0.3 * (c - ref_c - r + ref_r))) / 5
    assert torch.allclose(four[0].grad, -weight) and torch.allclose(four[1].grad, weight)


def test_ipo_and_rebel_by_hand_and_where_they_are_0():
    assert dpo_nll.ipo_loss(*HERE, 0.1).item() == pytest.approx((2 - 5) ** 2)
    assert dpo_nll.ipo_loss(*HERE, 0.25).item() == 0
    assert dpo_nll.rebel_loss(*HERE, 0.5, torch.tensor([3.0])).item() == pytest.approx(1)
    assert dpo_nll.rebel_loss(*HERE, 0.5, torch.tensor([4.0])).item() == 0


def test_rpo_is_a_kl_of_coins():
    """By the definition; 0 where beta delta = eta gap; sure of the winner, it is DPO."""
    p, q = (1 / (1 + math.exp(-x)) for x in (0.7 * 3.0, 0.1 * 2.0))
    want = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    got = dpo_nll.rpo_loss(*HERE, 0.1, 0.7, torch.tensor([3.0]))
    assert got.item() == pytest.approx(want, abs=1e-6)
    same = dpo_nll.rpo_loss(*HERE, 0.1, 0.2, torch.tensor([1.0]))
    assert same.item() == pytest.approx(0, abs=1e-7)
    sure = dpo_nll.rpo_loss(*HERE, 0.1, 1.0, torch.tensor([60.0]))
    assert sure.item() == pytest.approx(dpo_nll.dpo_loss(*HERE, 0.1).item(), abs=1e-6)


def test_log_probs_are_summed_unless_normalised():
    """Lengths 2 and 8 with -1 a token."""
    mask = torch.arange(8)[None] < torch.tensor([[2], [8]])
    logps = -1.0 * mask
    assert dpo_nll.sequence_logps(logps, mask).tolist() == [-2, -8]
    assert dpo_nll.sequence_logps(logps, mask, True).tolist() == [-1, -1]


def test_nll_is_the_mean_over_completions_of_a_mean_over_tokens():
    """On one row it is chapter 9's loss; of two rows each weighs the same, whatever its length."""
    torch.manual_seed(0)
    mask = torch.arange(8)[None] < torch.tensor([[2], [8]])
    logps = -torch.rand(2, 8) * mask
    each = [sft.sft_loss(logps[i : i + 1], mask[i : i + 1]).item() for i in range(2)]
    assert dpo_nll.nll_loss(logps[:1], mask[:1]).item() == pytest.approx(each[0])
    assert dpo_nll.nll_loss(logps, mask).item() == pytest.approx(sum(each) / 2)


# --- Training -------------------------------------------------------------------------------------


def test_it_begins_at_log_2_with_dropout_in_the_config(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")  # its config has dropout 0.1
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    row = steps(run(tiny_args(tmp_path, model=str(tmp_path / "gpt2"), alpha=0.0)))[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(row["reward_chosen"]) < 1e-4 and abs(row["reward_rejected"]) < 1e-4


def test_alpha_weighs_the_nll_and_0_is_plain_dpo(tmp_path):
    rows = [steps(run(tiny_args(tmp_path / str(a), alpha=a, learning_rate=0.0)))[0]
            for a in map(float, range(3)) if (tmp_path / str(a)).mkdir() is None]  # fmt: skip
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for a, row in enumerate(rows):
        assert row["nll"] == pytest.approx(rows[0]["nll"], rel=1e-4)
        assert row["loss"] == pytest.approx(math.log(2) + a * row["nll"], rel=1e-4)


def test_the_nll_is_that_of_the_chosen_completions(tmp_path):
    args = tiny_args(tmp_path, batch_size=16, normalize_length=True)
    tokenizer = plumbing.load_tokenizer(args.model)
    model = plumbing.load_model(dpo_nll.AutoModelForCausalLM, args.model, torch.device("cpu"))
    pairs = [dict(row, gap=0.0) for row in toy_rows(16)]
    want = -dpo_nll.all_logps(model, tokenizer, pairs, 64, args)[:, 0].mean().item()
    assert steps(run(args))[0]["nll"] == pytest.approx(want, rel=1e-4)


def test_log_probs_by_a_plain_forward_and_the_rejected_leaves_the_chosen():
    args = dpo_nll.Args(model="", dataset="")
    tokenizer = plumbing.load_tokenizer(ROOT / "toy/model")
    model = plumbing.load_model(
        dpo_nll.AutoModelForCausalLM, ROOT / "toy/model", torch.device("cpu")
    )
    pairs = [dict(row, gap=0.0) for row in toy_rows(5)]
    got = dpo_nll.all_logps(model, tokenizer, pairs, 64, args)
    for i, pair in enumerate(pairs):
        prompt = common.encode_prompt(tokenizer, pair["prompt"])
        for j, side in enumerate(("chosen", "rejected")):
            ids = tokenizer(pair[side], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + ids + [tokenizer.eos_token_id]])
            logps = model(ids).logits[0, :-1].log_softmax(-1)
            logps = logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            assert got[i, j].item() == pytest.approx(logps.sum().item(), abs=2e-3)
    pairs[2]["rejected"] = "12345"
    changed = dpo_nll.all_logps(model, tokenizer, pairs, 64, args)
    assert torch.allclose(changed[:, 0], got[:, 0], atol=1e-3)
    assert (changed[2, 1] - got[2, 1]).abs() > 0.1


@pytest.mark.parametrize(
    "changes",
    [dict(precompute_ref=False), dict(micro_batch_size=3), dict(share_prompts=False),
     dict(loss="ipo", micro_batch_size=3), dict(margin_scale=9.0, micro_batch_size=3, alpha=0.0),
     dict(loss="rpo", eta=3.0, micro_batch_size=3),
     dict(normalize_length=True, beta=5.0, micro_batch_size=3)],
)  # fmt: skip
def test_how_it_is_computed_changes_nothing(tmp_path, changes):
    """A kept reference, micro-batches, plain prompts; with margins and rewards of each row."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    rows = [row | {"score_chosen": i % 3, "score_rejected": -1, "margin": i % 5 / 5}
            for i, row in enumerate(toy_rows(16))]  # fmt: skip
    rows = write_rows(tmp_path / "scored.jsonl", rows)
    changes = changes | {"dataset": rows, "eval_dataset": rows}
    how = "precompute_ref", "micro_batch_size", "share_prompts"
    loss = {k: changes[k] for k in changes if k not in how}
    one = steps(run(tiny_args(tmp_path / "a", **loss)))
    two = steps(run(tiny_args(tmp_path / "b", **changes)))
    assert len(one) == 2 and one[1]["margin"] != 0
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "nll", "margin", "grad_norm", "logps_chosen", "logps_rejected"):
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-5), name


@pytest.mark.parametrize("loss", ["rpo", "rebel"])
def test_losses_with_rewards_in_the_rows(tmp_path, loss):
    rows = [row | {"score_chosen": 2.0, "score_rejected": 0.5} for row in toy_rows(8)]
    row = steps(run(tiny_args(tmp_path, dataset=write_rows(tmp_path / "r.jsonl", rows), loss=loss,
                              alpha=0.0, eval_dataset="", eval_size=0)))[0]  # fmt: skip
    p = 1 / (1 + math.exp(-1.5))
    coin = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))  # delta is 0
    assert row["loss"] == pytest.approx({"rpo": coin, "rebel": 2.25}[loss], rel=1e-3)
    with pytest.raises(ValueError, match="score_chosen"):
        dpo_nll.main(tiny_args(tmp_path, loss=loss, overwrite=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_short_last_step_by_a_plain_computation(tmp_path, normalize):
    """10 pairs, 8 and then 2, which weigh a half each; lengths normalised on both sides, or not."""
    rows = write_rows(tmp_path / "r.jsonl", toy_rows(10))
    changes = dict(normalize_length=normalize, beta=0.3, alpha=0.0, max_grad_norm=1e9)
    changes |= dict(eval_dataset="", eval_size=0, micro_batch_size=2)
    seen = observe.observe(dpo_nll, tiny_args(tmp_path, dataset=rows, **changes))
    assert len(pairs_of_step(seen, toy_rows(10), 2)) == 2 == len(seen.steps)
    is_the_plain_loop(seen, [2])


def test_the_implicit_rewards_of_rebel_are_scaled_by_its_eta(tmp_path):
    """(delta / eta - gap)^2 is least where the margin, as logged, is the gap."""
    rows = [row | {"score_chosen": 1.0, "score_rejected": 0.0} for row in toy_rows(8)]
    path = write_rows(tmp_path / "r.jsonl", rows)
    args = tiny_args(tmp_path, dataset=path, eval_dataset=path, loss="rebel", eta=2.0, alpha=0.0,
                     num_epochs=30, learning_rate=3e-4)  # fmt: skip
    rows = run(args)
    assert steps(rows)[-1]["margin"] == pytest.approx(1, abs=0.15)
    assert [row["eval_margin"] for row in rows if "eval_margin" in row][-1] == pytest.approx(
        steps(rows)[-1]["margin"], abs=0.1)  # fmt: skip


def test_a_margin_scale_that_has_nothing_to_scale_is_refused(tmp_path):
    (tmp_path / "i").mkdir()
    for args in (tiny_args(tmp_path, margin_scale=1.0, loss="ipo"),
                 iterate(tmp_path / "i", margin_scale=1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="--margin-scale"):
            dpo_nll.main(args)


def test_messages_that_would_be_lost_are_refused(tmp_path):
    user, other = {"role": "user", "content": "1"}, {"role": "user", "content": "2"}
    first, last = ({"role": "assistant", "content": x} for x in "34")
    good = {"prompt": "1", "chosen": [user, first], "rejected": [last]}
    path = write_rows(tmp_path / "good.jsonl", [good] * 8)
    run(tiny_args(tmp_path, dataset=path, eval_dataset=""))
    bad = good | {"chosen": [user, first, other, last]}
    path = write_rows(tmp_path / "bad.jsonl", [good, bad])
    with pytest.raises(ValueError, match="row 2.*earlier turns"):
        dpo_nll.main(tiny_args(tmp_path, dataset=path, eval_dataset="", overwrite=True))


def test_margins_of_the_rows_are_used(tmp_path):
    rows = write_rows(tmp_path / "r.jsonl", [row | {"margin": 0.5} for row in toy_rows(8)])
    changes = dict(dataset=rows, alpha=0.0, margin_scale=2.0, eval_dataset="", eval_size=0)
    row = steps(run(tiny_args(tmp_path, **changes)))[0]
    assert row["loss"] == pytest.approx(math.log(1 + math.e), rel=1e-4)


def test_equal_pairs_are_dropped_and_counted_and_empty_ones_refused(tmp_path, capsys):
    same = [{"prompt": "1+1", "chosen": "2", "rejected": "2"}]
    long = [{"prompt": "1+1", "chosen": "2" * 50 + "1", "rejected": "2" * 50 + "3"}]
    rows = write_rows(tmp_path / "r.jsonl", toy_rows(6) + same + long)
    rows = run(tiny_args(tmp_path, dataset=rows, max_length=50, eval_dataset="", eval_size=0))
    assert "of 8 pairs, dropped 2" in capsys.readouterr().out and len(steps(rows)) == 1
    for bad, words in (
        (same, "no pair of two different"),
        ([{"prompt": "1", "chosen": " ", "rejected": "2"}], "chosen"),
        ([{"prompt": "1", "chosen": "2", "rejected": "3", "margin": "x"}], "row 1"),
    ):
        path = write_rows(tmp_path / "bad.jsonl", bad)
        with pytest.raises(ValueError, match=words):
            dpo_nll.main(tiny_args(tmp_path, dataset=path, eval_dataset="", overwrite=True))


def iterate(tmp_path, **changes):
    """Args of two iterations, with a reward that differs between completions."""
    (tmp_path / "reward.py").write_text(
        "def f(prompts, completions, rows):\n    return [float(len(set(c))) for c in completions]"
    )
    values = dict(
        dataset=str(ROOT / "toy/problems_train.jsonl"), eval_dataset="", num_prompts=6,
        num_generations=4, num_pairs=8, batch_size=4, iterations=2, max_new_tokens=12,
        reward=f"{tmp_path}/reward.py:f", learning_rate=1e-3, temperature=3.0,
    )  # fmt: skip
    return tiny_args(tmp_path, **values | changes)


@pytest.mark.parametrize("kept", [False, True])
def test_each_iteration_has_pairs_and_a_reference_of_its_own(tmp_path, kept):
    rows = run(iterate(tmp_path, precompute_ref=not kept, alpha=0.0))
    losses = [row["loss"] for row in steps(rows)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) == losses[2]  # policy is reference
    assert abs(losses[1] - losses[0]) > 1e-3
    assert [row["iteration"] for row in rows if "iteration" in row] == [0, 1]
    pairs = [plumbing.load_rows(tmp_path / f"run/pairs/{i}.jsonl") for i in range(2)]
    for pair in pairs[0] + pairs[1]:
        assert len(set(pair["chosen"])) - len(set(pair["rejected"])) == pair["gap"] > 0
    assert pairs[0] != pairs[1] and len(pairs[0]) == 8
    assert len({pair["prompt"] for pair in pairs[0]}) > 1


@pytest.mark.filterwarnings("ignore:over 20")
def test_no_end_is_trained_that_the_policy_did_not_write(tmp_path, monkeypatch):
    """34 tokens: some completions end, some are cut off, on both sides of the pairs."""
    seen, collate, made, generate = [], dpo_nll.collate, {}, dpo_nll.generate

    def watched_generate(*args):
        _, texts, ended = out = generate(*args)
        made.update(zip(texts, ended.tolist(), strict=True))
        return out

    def watched(pairs, *rest):
        out = collate(pairs, *rest)
        for i, text in enumerate(pair[side] for pair in pairs for side in ("chosen", "rejected")):
            ids = out[0].completion_ids[i][out[0].completion_mask[i]]
            seen.append((made[text], ids[-1].item() == 2))
        return out

    monkeypatch.setattr(dpo_nll, "generate", watched_generate)
    monkeypatch.setattr(dpo_nll, "collate", watched)
    rows = run(iterate(tmp_path, max_new_tokens=34, num_pairs=32))  # hot: of a pair one may end
    assert set(seen) == {(True, True), (False, False)}
    assert all(0 < row["ended"] < 1 for row in rows if "iteration" in row)


def test_a_noisy_reward_pairs_no_text_with_itself(tmp_path):
    args = iterate(tmp_path, max_new_tokens=1, num_pairs=64, num_generations=32)
    (tmp_path / "reward.py").write_text(
        "import random\ndef f(p, c, r):\n    return [random.random() for _ in c]"
    )
    run(args)
    pairs = plumbing.load_rows(tmp_path / "run/pairs/0.jsonl")
    assert len(pairs) == 64 and all(pair["chosen"] != pair["rejected"] for pair in pairs)


def test_what_is_sampled_must_fit_in_training(tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        dpo_nll.main(iterate(tmp_path, max_length=20))


@pytest.mark.parametrize("at", [2, 3])  # at the beginning of the second iteration, and within it
@pytest.mark.parametrize("kept", [False, True])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, tiny, at, kept):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    changes = dict(checkpoint_every=1, precompute_ref=not kept, model=tiny)
    run(iterate(tmp_path / "a", **changes))
    rows = at + 1 + at // 2  # logged before the step in which it is killed: steps, iterations
    with observe.killed(plumbing.Run, "log", rows + 1):
        dpo_nll.main(iterate(tmp_path / "b", **changes))
    torch.manual_seed(9)
    run(iterate(tmp_path / "b", resume=True, **changes))
    one, two = (load_file(tmp_path / x / "run/final/model.safetensors") for x in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)
    rows = [[json.loads(x) for x in open(tmp_path / x / "run/metrics.jsonl")] for x in "ab"]
    for one, two in zip(*rows, strict=True):
        for row in (one, two):
            row.pop("tokens_per_second", 0), row.pop("seconds")
        assert one == two


def test_no_difference_of_reward_is_said(tmp_path):
    args = iterate(tmp_path)
    (tmp_path / "reward.py").write_text("def f(p, c, r):\n    return [1.0] * len(c)")
    with pytest.raises(ValueError, match="different reward"):
        dpo_nll.main(args)


# --- Every metric and flag, on a tiny model -------------------------------------------------------

VERIFIED = [
    ("1+1=2\n2", "2", 1.0), ("2 and 3", "2", 0.0), ("no number", "2", 0.0), ("-4", "-4", 1.0),
    ("it is 1,234.50", "1234.5", 1.0), ("12", "1,200", 0.0), ("1200", "1,200", 1.0),
    ("4", "-4", 0.0), ("4.", 4, 1.0),
]  # fmt: skip


def test_the_verifier_reads_the_last_number():
    for text, answer, right in VERIFIED:
        assert dpo_nll.verifier(["p"], [text], [{"answer": answer}]) == [right], text
    rows = [{"answer": "1"}, {"answer": "2"}]
    assert dpo_nll.verifier(["p", "p"], ["2", "2"], rows) == [0.0, 1.0]


def preferences(number, seed):
    """Pairs of several lengths, with margins and scores of many values."""
    draw = random.Random(seed)
    rows = problems(number, seed)
    for i, row in enumerate(rows):
        for side, length in (("chosen", 1 + i % 4), ("rejected", 7 - i % 5)):
            row[side] = "".join(draw.choices("0123456789+=", k=length)) + side[0]
        row |= {"margin": i % 4 / 2, "score_chosen": i % 3, "score_rejected": -(i % 5) / 2}
    return rows


class WithoutTies(observe.Seen):
    """A run, of which `untimed` leaves out the accuracy of steps in which the policy is the
    reference: what is right there is noise."""

    def untimed(self):
        rows = super().untimed()
        for row in rows:
            if abs(row.get("margin", 1)) < 1e-4:
                del row["accuracy"]
        return rows


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny):
    """look(**changes) -> Seen of a run of five steps: nine pairs, four a step, twice; in each step
    several micro-batches; a warm-up of two steps, and then a line."""
    data = tmp_path_factory.mktemp("data")
    (data / "reward.py").write_text(REWARD)
    values = dict(
        model=tiny, dataset=write_rows(data / "pairs.jsonl", preferences(9, 1)),
        eval_dataset=write_rows(data / "held.jsonl", preferences(5, 2)),
        eval_prompts=write_rows(data / "prompts.jsonl", problems(6, 3)), device="cpu",
        reward=f"{data}/reward.py:f", batch_size=4, micro_batch_size=4, num_epochs=2,
        learning_rate=0.02, lr_schedule="linear", warmup_ratio=0.4, max_grad_norm=1e9,
        max_new_tokens=10, eval_size=4, alpha=0.7, beta=0.3, log_samples=2,
    )  # fmt: skip

    def look(**changes):
        folder = str(tmp_path_factory.mktemp("run") / "run")
        args = dpo_nll.Args(**values | {"output_dir": folder} | changes)
        return WithoutTies(**vars(observe.observe(dpo_nll, args)))

    return look


@pytest.fixture(scope="module")
def base(small):
    return small()


SAMPLED = dict(
    iterations=2, num_prompts=5, num_generations=4, num_pairs=6, num_epochs=1, checkpoint_every=1,
    max_new_tokens=12, learning_rate=0.01, eval_dataset="", warmup_ratio=0.25, micro_batch_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def sampled(small, tmp_path_factory):
    """look(**changes): two iterations of two steps, six pairs each, of 5 of 12 prompts, two of
    them sampled at a time."""
    path = write_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", problems(12, 4))

    def look(**changes):
        return small(**SAMPLED | {"dataset": path} | changes)

    return look


@pytest.fixture(scope="module")
def twice(sampled):
    return sampled()


def tokenizer_of(seen):
    return plumbing.load_tokenizer(seen.args.model)


def side_ids(seen, pair, side):
    """Ids of a pair's prompt and of one of its completions, as --max-length cuts it."""
    tokenizer = tokenizer_of(seen)
    prompt = plain.toy_ids(tokenizer, pair["prompt"])
    completion = plain.toy_ids(tokenizer, "", pair[side])
    ended = pair.get("ended", [True, True])[side == "rejected"]
    completion = completion if ended else completion[:-1]
    return prompt, completion[: seen.args.max_length - len(prompt)]


def pair_loss(args, delta, pair):
    """The preference term of one pair, from the formulas."""
    gap = pair.get("gap", pair.get("score_chosen", 0) - pair.get("score_rejected", 0))
    if args.loss == "ipo":
        return (delta - 1 / (2 * args.beta)) ** 2
    if args.loss == "rebel":
        return (delta / args.eta - gap) ** 2
    z = args.beta * delta
    if args.loss == "rpo":
        p = torch.tensor(1 / (1 + math.exp(-args.eta * gap)))
        q = 1 / (1 + (-z).exp())
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    z = z - args.margin_scale * pair["margin"]
    smoothing, label = args.label_smoothing, pair.get("probability", 1)
    right = label * (1 - smoothing) + (1 - label) * smoothing
    return right * (1 + (-z).exp()).log() + (1 - right) * (1 + z.exp()).log()


def pair_logps(seen, model, pair):
    """Log-probs of a pair's two completions, and the mean one of the chosen one's tokens."""
    values = []
    for side in ("chosen", "rejected"):
        tokens = plain.token_logps(model, *side_ids(seen, pair, side))
        values.append(tokens.mean() if seen.args.normalize_length else tokens.sum())
        if side == "chosen":
            likelihood = tokens.mean()
    return *values, likelihood


def implicit_scale(args):
    return 1 / args.eta if args.loss == "rebel" else args.beta


def plain_step(seen, policy, ref, pairs):
    """One step, a completion a forward -> its metrics; its gradient stays in the policy."""
    scale = implicit_scale(seen.args)
    total = dict.fromkeys(
        ["loss", "nll", "margin", "accuracy", "reward_chosen", "reward_rejected", "logps_chosen",
         "logps_rejected"], 0.0)  # fmt: skip
    for pair in pairs:
        chosen, rejected, likelihood = pair_logps(seen, policy, pair)
        with torch.no_grad():
            ref_chosen, ref_rejected, _ = pair_logps(seen, ref, pair)
        delta = (chosen - ref_chosen) - (rejected - ref_rejected)
        loss = pair_loss(seen.args, delta, pair) - seen.args.alpha * likelihood
        (loss / len(pairs)).backward()
        of_pair = {
            "loss": loss, "nll": -likelihood, "margin": scale * delta, "accuracy": delta > 0,
            "reward_chosen": scale * (chosen - ref_chosen),
            "reward_rejected": scale * (rejected - ref_rejected),
            "logps_chosen": chosen, "logps_rejected": rejected,
        }  # fmt: skip
        for name, value in of_pair.items():
            total[name] += float(value) / len(pairs)
    total["grad_norm"] = plain.gradient_norm(policy)
    return total


def pairs_of_step(seen, pairs, step):
    """What a step draws: each epoch of each iteration has an order of its own."""
    args, number = seen.args, len(pairs)
    steps_each = len(seen.steps) // max(1, args.iterations)
    iteration, k = divmod(step - 1, steps_each)
    order = []
    for epoch in range(args.num_epochs):
        order += random.Random(f"{args.seed} {iteration} {epoch}").sample(range(number), number)
    return [pairs[i] for i in order[k * args.batch_size : (k + 1) * args.batch_size]]


def is_the_plain_loop(seen, steps=(3, 5)):
    """Metrics, gradient and rate of these steps are those of a plain loop."""
    args = seen.args
    steps_each = len(seen.steps) // max(1, args.iterations)
    warmup = round(args.warmup_ratio * len(seen.steps))
    for step in steps:
        iteration = (step - 1) // steps_each
        pairs = seen.read(f"pairs/{iteration}.jsonl")
        update = seen.updates[step - 1]
        policy = model_with(args.model, update.weights)
        ref = model_with(args.model, seen.updates[iteration * steps_each].weights)
        want = plain_step(seen, policy, ref, pairs_of_step(seen, pairs, step))
        rate = args.learning_rate, args.lr_schedule, warmup, len(seen.steps)
        want["lr"] = plain.learning_rate(step, *rate)
        row = seen.steps[step - 1]
        assert set(row) == {*want, "step", "seconds", "tokens_per_second"}
        if update.weights.equal(seen.updates[iteration * steps_each].weights):
            want.pop("accuracy")  # no difference but noise
        for name in want:
            assert row[name] == pytest.approx(want[name], rel=2e-3, abs=2e-5), (name, step)
        assert update.lr == pytest.approx(want["lr"])
        gradient = flat_gradient(policy)
        assert (update.gradient - gradient).norm() < 2e-3 * gradient.norm()


def plain_pairs_eval(seen, weights, pairs):
    """-> eval_pair_accuracy, eval_margin beside the weights that the run began with."""
    start = model_with(seen.args.model, seen.updates[0].weights)
    policy, deltas = model_with(seen.args.model, weights), []
    with torch.no_grad():
        for pair in pairs:
            chosen, rejected, _ = pair_logps(seen, policy, pair)
            start_chosen, start_rejected, _ = pair_logps(seen, start, pair)
            deltas.append(float(chosen - start_chosen - rejected + start_rejected))
    right = sum(delta > 0 for delta in deltas) / len(deltas)
    return right, implicit_scale(seen.args) * sum(deltas) / len(deltas)


def read(path):
    return plumbing.load_rows(path)


LOSSES = {
    "dpo with margins": dict(margin_scale=1.5),
    "dpo with smoothing": dict(label_smoothing=0.2, margin_scale=0.5),
    "dpo of means": dict(normalize_length=True, beta=4.0),
    "ipo": dict(loss="ipo"),
    "rpo": dict(loss="rpo", eta=0.7),
    "rebel": dict(loss="rebel", eta=3.0, alpha=0.0),
    "rebel of means": dict(loss="rebel", eta=0.5, normalize_length=True),
}


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_of_a_loss(small, name):
    """Each loss's metrics, gradient and rate in the third and the fifth, short, step."""
    changes = LOSSES[name] | dict(eval_dataset="", eval_size=0, eval_prompts="")
    is_the_plain_loop(small(**changes))


def test_metrics_of_soft_labels(small, tmp_path):
    """Of 0, of 1, and of what lies between, with margins and smoothing."""
    rows = preferences(9, 1)
    for i, row in enumerate(rows):
        row["probability"] = i / 8
    rows[4]["probability"] = None  # as good as none
    changes = dict(dataset=write_rows(tmp_path / "soft.jsonl", rows), label_smoothing=0.1)
    seen = small(**changes, margin_scale=0.5, eval_dataset="", eval_size=0, eval_prompts="")
    labels = [pair["probability"] for pair in seen.read("pairs/0.jsonl")]
    assert labels == [0, 1 / 8, 2 / 8, 3 / 8, 1, 5 / 8, 6 / 8, 7 / 8, 1]
    is_the_plain_loop(seen)


@pytest.mark.parametrize("loss", ["ipo", "rpo", "rebel"])
def test_soft_labels_go_with_dpo(tmp_path, loss):
    more = {"score_chosen": 1, "score_rejected": 0, "probability": 0.6}
    path = write_rows(tmp_path / "r.jsonl", [row | more for row in toy_rows(4)])
    with pytest.raises(ValueError, match="`probability` goes with --loss dpo"):
        dpo_nll.main(tiny_args(tmp_path, dataset=path, eval_dataset=path, loss=loss))


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf, "0.5", True, [0.5]])
def test_a_soft_label_that_is_no_probability_is_named(tmp_path, value):
    rows = toy_rows(4)
    rows[2]["probability"] = value
    path = write_rows(tmp_path / "r.jsonl", rows)
    with pytest.raises(ValueError, match="line 3: probability"):
        dpo_nll.main(tiny_args(tmp_path, dataset=path))


def test_metrics_of_every_step(base, tiny):
    """The same of each step of the base run; weights by AdamW's formula without decay."""
    is_the_plain_loop(base, range(1, 6))
    first = base.steps[0]
    assert first["lr"] == base.updates[0].lr == 0 and first["margin"] == pytest.approx(0, abs=1e-5)
    begin = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert torch.equal(base.updates[0].weights, weights_of(begin))
    want = adamw(base.updates[0].weights, base.updates)
    assert torch.allclose(end_weights(base), want, atol=2e-4)
    final = AutoModelForCausalLM.from_pretrained(base.folder / "final", dtype=torch.float32)
    assert torch.equal(weights_of(final), end_weights(base))
    assert [row["step"] for row in base.steps] == [1, 2, 3, 4, 5]


def test_metrics_of_a_tie(small, tmp_path):
    """One pair, whose difference is 0 in the first step: half right, in training and evaluation."""
    path = write_rows(tmp_path / "one.jsonl", preferences(1, 1))
    seen = small(dataset=path, eval_prompts="", num_epochs=1, eval_dataset=path)
    assert seen.steps[0]["accuracy"] == 0.5
    assert seen.evals[0]["eval_pair_accuracy"] == 0.5 and seen.evals[0]["eval_margin"] == 0


def test_metrics_of_the_evaluations(small, base):
    """Before the first and after the last step, on held-out rows: pairs, rewards of greedy answers,
    KL of sampled ones from the start."""
    args = base.args
    held, prompts = read(args.eval_dataset), read(args.eval_prompts)[:4]
    both = [base.updates[0].weights, end_weights(base)]
    assert [row["step"] for row in base.evals] == [0, 5]
    start = model_with(args.model, both[0])
    for row, weights in zip(base.evals, both, strict=True):
        accuracy, margin = plain_pairs_eval(base, weights, held)
        assert row["eval_margin"] == pytest.approx(margin, rel=1e-3, abs=1e-5)
        if row["step"]:
            assert row["eval_pair_accuracy"] == pytest.approx(accuracy)
        model = model_with(args.model, weights)
        want = greedy_reward(model, args.model, prompts, 10)
        assert row["eval_reward"] == pytest.approx(want, rel=1e-5)
        model.autocast_dtype = start.autocast_dtype = None
        torch.manual_seed(args.seed)
        texts = [x["prompt"] for x in prompts]
        kl, _ = plumbing.kl_from_start(model, start, tokenizer_of(base), texts, 10, 4)
        assert row["eval_kl"] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-4)
    assert base.evals[1]["eval_kl"] > 0.01
    names = {"eval_margin", "eval_pair_accuracy", "eval_reward", "eval_kl", "step", "seconds"}
    assert set(base.evals[1]) == names


def test_metrics_of_a_verified_evaluation(small, tmp_path, tiny):
    """Some answers are the numbers that the untrained model writes last."""
    model = model_with(tiny, weights_of(AutoModelForCausalLM.from_pretrained(tiny)))
    rows, right = problems(40, 3), 0
    for row in rows:
        text = greedy(model, tiny, row["prompt"], 10)[0]
        last = plumbing.last_number(text)  # how it is read: test_numbers.py
        row["answer"] = "-99"
        if last is not None and last.denominator == 1 and row["number"] % 2:
            row["answer"] = str(last)
            right += 1
    path = write_rows(tmp_path / "answered.jsonl", rows)
    seen = small(eval_prompts=path, reward="verifier", eval_size=99, num_epochs=1, eval_dataset="")
    assert 0 < right < 40
    assert seen.evals[0]["eval_accuracy"] == pytest.approx(right / 40, rel=1e-5)
    assert "eval_reward" not in seen.evals[0]


def test_metrics_of_time(small, monkeypatch):
    """Tokens of both completions over the seconds of the step, on a clock that ticks when read."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    seen = small(num_epochs=1, eval_prompts="", eval_dataset="", eval_size=0)
    pairs = seen.read("pairs/0.jsonl")
    for step, row in enumerate(seen.steps, 1):
        drawn = pairs_of_step(seen, pairs, step)
        tokens = sum(len(side_ids(seen, p, s)[1]) for p in drawn for s in ("chosen", "rejected"))
        assert tokens / row["tokens_per_second"] == pytest.approx(1, rel=1e-4)


def test_metrics_are_of_the_files_pairs(base):
    """The run keeps the pairs that it trains on: those of its file, in order."""
    want = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preferences(9, 1)]
    got = [{k: row[k] for k in ("prompt", "chosen", "rejected")}
           for row in base.read("pairs/0.jsonl")]  # fmt: skip
    assert got == want


# --- Iterations -----------------------------------------------------------------------------------


def drawn_groups(seen, iteration):
    """What was sampled in an iteration: {prompt: [(text, ended), ...]}, in order."""
    groups, count = {}, 0
    for arguments, (_, texts, ended) in seen.calls["generate"]:
        for i, prompt in enumerate(arguments["prompts"]):
            here = slice(i * seen.args.num_generations, (i + 1) * seen.args.num_generations)
            if count // seen.args.num_prompts == iteration:
                groups[prompt] = list(zip(texts[here], ended[here].tolist(), strict=True))
            count += 1
    return groups


def iteration_rows(seen):
    return [row for row in seen.rows if "iteration" in row]


def has_a_signal(group, row):
    """Whether two completions with a text differ in it and in their reward."""
    group = [(text, ended) for text, ended in group if text.strip()]
    rewards = {reward_of(text, ended, row) for text, ended in group}
    return len(rewards) > 1 and len({text for text, _ in group}) > 1


def test_iterated_pairs(twice):
    """Pairs are a better and a worse completion of one prompt, prompts with a difference take
    turns; reward, no_signal and ended are of all that was sampled."""
    by_prompt = {row["prompt"]: row for row in problems(12, 4)}
    for i, logged in enumerate(iteration_rows(twice)):
        groups, pairs = drawn_groups(twice, i), twice.read(f"pairs/{i}.jsonl")
        assert len(groups) == 5 and len(pairs) == 6 and logged["iteration"] == i
        values = {p: [reward_of(*x, by_prompt[p]) for x in g] for p, g in groups.items()}
        signals = [p for p, g in groups.items() if has_a_signal(g, by_prompt[p])]
        for n, pair in enumerate(pairs):
            prompt = pair["prompt"]
            assert prompt == signals[n % len(signals)]
            chosen = groups[prompt].index((pair["chosen"], pair["ended"][0]))
            rejected = groups[prompt].index((pair["rejected"], pair["ended"][1]))
            gap = values[prompt][chosen] - values[prompt][rejected]
            assert pair["gap"] == pytest.approx(gap) and gap > 0
        every = [x for v in values.values() for x in v]
        ends = [ended for group in groups.values() for _, ended in group]
        assert logged["reward"] == pytest.approx(sum(every) / 20, rel=1e-5)
        assert logged["ended"] == pytest.approx(sum(ends) / 20)
        assert logged["no_signal"] == pytest.approx(1 - len(signals) / 5)
    assert {True, False} == {e for g in drawn_groups(twice, 0).values() for _, e in g}


def test_iterated_without_a_signal(sampled, tmp_path):
    """Prompts of odd numbers have one reward: they make no pair, and are counted."""
    (tmp_path / "reward.py").write_text(
        "def f(prompts, completions, rows):\n"
        "    return [len(set(c)) * (r['number'] % 2 == 0) for c, r in zip(completions, rows)]\n"
    )
    numbers = {row["prompt"]: row["number"] for row in problems(12, 4)}
    changes = dict(reward=f"{tmp_path}/reward.py:f", iterations=1, num_prompts=12, num_pairs=12)
    seen = sampled(**changes, eval_prompts="")
    pairs = seen.read("pairs/0.jsonl")
    assert [p for p in pairs if numbers[p["prompt"]] % 2] == []
    assert len({p["prompt"] for p in pairs}) == 6 and iteration_rows(seen)[0]["no_signal"] == 0.5


def test_iterated_metrics_are_the_plain_loops(sampled, twice):
    """Each iteration has the policy at its beginning as its reference; ends that were not written
    are not trained; rpo and rebel see the gap of the rewards."""
    is_the_plain_loop(twice, (2, 3, 4))
    is_the_plain_loop(sampled(loss="rpo", precompute_ref=False), (2, 4))
    is_the_plain_loop(sampled(loss="rebel", eta=5.0), (2, 4))
    ends = [e for i in range(2) for p in twice.read(f"pairs/{i}.jsonl") for e in p["ended"]]
    assert {True, False} == set(ends)
    start = twice.evals[-1]["eval_kl"]  # from the start of the run, not of the iteration
    assert start > 0.001 and twice.evals[0]["eval_kl"] == pytest.approx(0, abs=1e-4)


def test_iterated_prompts_and_seeds_differ(sampled, twice, tmp_path):
    """Iterations draw other prompts; of the same prompts and policy, other completions."""
    first, second = (set(drawn_groups(twice, i)) for i in range(2))
    assert first != second
    same = write_rows(tmp_path / "same.jsonl", problems(1, 4) * 2)
    seen = sampled(dataset=same, num_prompts=2, learning_rate=0.0, eval_prompts="")
    one, two = (texts for _, texts, _ in seen.results("generate"))
    assert len(one) == 8 and set(one) != set(two)
    assert seen.read("pairs/0.jsonl") != seen.read("pairs/1.jsonl")


def test_iterated_sampling_is_of_the_policy_as_it_is(twice):
    """The second iteration samples from the policy of its first step, at the temperature."""
    calls = twice.calls["generate"]
    models = {id(arguments["model"]) for arguments, _ in calls}
    assert len(models) == 1
    batch = calls[-1][1][0]
    policy = model_with(twice.args.model, twice.updates[2].weights)
    assert not torch.equal(twice.updates[2].weights, twice.updates[0].weights)
    torch.manual_seed(0)
    prompt, completion = plain.unpadded(batch)[0]
    assert torch.isfinite(plain.token_logps(policy, prompt, completion)).all()
    assert twice.arguments("generate", "temperature") == [1.0] * len(calls)


@pytest.fixture(scope="module")
def broken(sampled, tmp_path_factory):
    """A run with a kept reference, unbroken; and one that was killed in its fourth step, after the
    update: {kept: (unbroken, folder of the killed one)}."""
    made = {}
    for kept in (True, False):
        unbroken = sampled(precompute_ref=not kept)
        folder = tmp_path_factory.mktemp("killed") / "run"
        with observe.killed(plumbing.Run, "log", 7):
            sampled(precompute_ref=not kept, output_dir=str(folder))
        made[kept] = unbroken, folder
    return made


PARTS = ["policy", "optimizer", "scheduler", "ref"]


@pytest.mark.parametrize("kept, part", [(False, None), *((True, x) for x in [None, *PARTS])])
def test_resumed_with_a_schedule(broken, tmp_path, kept, part):
    """A run resumed in its second iteration is the unbroken one, unless a part of the checkpoint
    is left out."""
    unbroken, killed = broken[kept]
    assert checkpoint_parts(killed) == set(PARTS[: 3 + kept])
    values = vars(unbroken.args) | {"output_dir": moved(killed, tmp_path / "run"), "resume": True}
    seen = resumed_without(dpo_nll, dpo_nll.Args(**values), part)
    same = seen.untimed() == observe.Seen.untimed(unbroken)
    assert same == (part is None)
    if part is None:
        one, two = unbroken.weights(), seen.weights()
        assert all(torch.equal(one[name], two[name]) for name in one)
        for i in range(2):
            assert seen.read(f"pairs/{i}.jsonl") == unbroken.read(f"pairs/{i}.jsonl")


# --- Flags ----------------------------------------------------------------------------------------


def flag_model(run, base, folder):
    """Weights of another folder are what the first step begins with, and the start of the KL."""
    model = AutoModelForCausalLM.from_pretrained(base.args.model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "other")
    tokenizer_of(base).save_pretrained(folder / "other")
    seen = run(model=str(folder / "other"))
    assert torch.equal(seen.updates[0].weights, weights_of(model))
    assert seen.evals[0]["eval_kl"] == pytest.approx(0, abs=1e-4)
    is_the_plain_loop(seen, [3])


def flag_dataset(run, base, folder):
    rows = preferences(6, 9)
    seen = run(dataset=write_rows(folder / "other.jsonl", rows))
    pairs = seen.read("pairs/0.jsonl")
    assert [p["prompt"] for p in pairs] == [row["prompt"] for row in rows]
    assert [p["gap"] for p in pairs] == [0.0] * 6  # read for rpo and rebel only
    assert [p["margin"] for p in pairs] == [row["margin"] for row in rows]


def flag_eval_dataset(run, base, folder):
    """These rows; and without it, prompts of --dataset, which are not trained on."""
    rows = preferences(7, 9)
    seen = run(eval_dataset=write_rows(folder / "other.jsonl", rows))
    margin = plain_pairs_eval(seen, end_weights(seen), rows)[1]
    assert seen.evals[-1]["eval_margin"] == pytest.approx(margin, rel=1e-3)
    many = preferences(30, 1)
    seen = run(dataset=write_rows(folder / "many.jsonl", many), eval_dataset="", eval_size=2)
    trained = {pair["prompt"] for pair in seen.read("pairs/0.jsonl")}
    held = [row for row in many if row["prompt"] not in trained]
    assert len(trained) == 28 and len(held) == 2
    margin = plain_pairs_eval(seen, end_weights(seen), held)[1]
    assert seen.evals[-1]["eval_margin"] == pytest.approx(margin, rel=1e-3)


def flag_eval_prompts(run, base, folder):
    seen = run(eval_prompts="")
    assert all("eval_reward" not in row and "eval_kl" not in row for row in seen.evals)
    assert len(seen.evals) == 2 and seen.read("samples.jsonl") == []
    assert seen.steps[-1]["loss"] == base.steps[-1]["loss"]
    seen = run(eval_prompts=write_rows(folder / "p.jsonl", problems(3, 8)))
    assert seen.arguments("greedy_rewards", "rows") == [problems(3, 8)] * 2
    assert run(eval_dataset="", eval_prompts="", eval_size=0).evals == []


def flag_seed(run, base, folder):
    """Another order, by the formula; and other sampled answers of the evaluation."""
    seen = run(seed=3)
    is_the_plain_loop(seen, [3])
    assert seen.steps[2]["nll"] != base.steps[2]["nll"]
    assert seen.results("kl_from_start")[0][1] != base.results("kl_from_start")[0][1]


def flag_loss(run, base, folder):
    losses = {base.steps[0]["loss"]}
    for loss in ("ipo", "rpo", "rebel"):
        seen = run(loss=loss)
        is_the_plain_loop(seen, [3])
        losses.add(seen.steps[0]["loss"])
    assert len(losses) == 4


def flag_gap(run, base, folder):
    """rpo and rebel read the rows' scores, and refuse rows without."""
    seen = run(loss="rpo", eta=0.4)
    rows = preferences(9, 1)
    want = [row["score_chosen"] - row["score_rejected"] for row in rows]
    assert [pair["gap"] for pair in seen.read("pairs/0.jsonl")] == want
    is_the_plain_loop(seen, [3])


def by_value(**changes):
    """The check of a flag that stands in the formulas: the run is the plain loop with it."""

    def check(run, base, folder):
        seen = run(**changes)
        is_the_plain_loop(seen, [3, 4])
        assert seen.steps[2]["loss"] != base.steps[2]["loss"]

    return check


def flag_precompute_ref(run, base, folder):
    """The same metrics; the log-probs of the reference stand in the pairs, or in no place."""
    seen = run(precompute_ref=False)
    observe.changes_nothing(seen, base)
    kept = [pair["ref_logps"] for pair in base.read("pairs/0.jsonl")]
    assert not any("ref_logps" in pair for pair in seen.read("pairs/0.jsonl"))
    assert "ref" in checkpoint_parts(seen.folder)
    start = model_with(base.args.model, base.updates[0].weights)
    with torch.no_grad():
        for got, pair in zip(kept, base.read("pairs/0.jsonl"), strict=True):
            want = [x.item() for x in pair_logps(base, start, pair)[:2]]
            assert got == pytest.approx(want, rel=1e-3)
    assert len(seen.results("load_model")) == len(base.results("load_model")) + 1


def flag_reward(run, base, folder):
    (folder / "r.py").write_text("def g(p, c, rows):\n    return [float(r['ended']) for r in rows]")
    seen = run(reward=f"{folder}/r.py:g")
    model = model_with(base.args.model, end_weights(seen))
    rows = read(base.args.eval_prompts)[:4]
    ends = [greedy(model, base.args.model, row["prompt"], 10)[1] for row in rows]
    assert seen.evals[-1]["eval_reward"] == pytest.approx(sum(ends) / 4)


def flag_reward_model(run, base, folder):
    """A classifier's scores of the greedy answers."""
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(base.args.model, num_labels=1)
    judge.save_pretrained(folder / "judge")
    tokenizer_of(base).save_pretrained(folder / "judge")
    seen = run(reward_model=str(folder / "judge"))
    score = plumbing.load_reward("verifier", None, str(folder / "judge"), torch.device("cpu"))
    model, values = model_with(base.args.model, end_weights(seen)), []
    for row in read(base.args.eval_prompts)[:4]:
        text, ended = greedy(model, base.args.model, row["prompt"], 10)
        values += score([row["prompt"]], [text], [row | {"ended": ended}])
    assert seen.evals[-1]["eval_reward"] == pytest.approx(sum(values) / 4, rel=1e-3)


def flag_max_new_tokens(run, base, folder):
    """The longest answer of the evaluations; the sampled ones are looked at with --iterations."""
    seen = run(max_new_tokens=3)
    rows = read(base.args.eval_prompts)[:4]
    want = greedy_reward(model_with(base.args.model, end_weights(seen)), base.args.model, rows, 3)
    assert seen.evals[-1]["eval_reward"] == pytest.approx(want, rel=1e-5)
    assert seen.arguments("kl_from_start", "max_new_tokens") == [3, 3]
    assert max(len(row["completion"]) for row in seen.read("samples.jsonl")) <= 3


def flag_num_epochs(run, base, folder):
    assert [len(run(num_epochs=n).steps) for n in (1, 3)] == [3, 7]  # of nine pairs, four a step


def flag_batch_size(run, base, folder):
    seen = run(batch_size=9, warmup_ratio=0.0)
    assert len(seen.steps) == 2
    is_the_plain_loop(seen, [2])
    nll = [row["nll"] for row in run(batch_size=3, learning_rate=0.0).steps]
    assert len(nll) == 6 and sum(nll[:3]) / 3 == pytest.approx(seen.steps[0]["nll"], rel=1e-4)


def flag_micro_batch_size(run, base, folder):
    """No forward has more completions; a pair is never divided."""
    seen = run(micro_batch_size=2)
    sizes = {len(b.prompt_of) for b in seen.arguments("completion_logps", "batch")}
    assert sizes == {2}
    assert {len(b.prompt_of) for b in base.arguments("completion_logps", "batch")} == {4}
    assert set(seen.arguments("fixed_logps", "micro_batch_size")) == {2}
    got, want = seen.untimed(), base.untimed()
    for a, b in zip(got, want, strict=True):
        for name in set(b) - {"eval_kl"}:  # sampled in other blocks
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-4), name


def flag_max_length(run, base, folder):
    """Completions are cut, without an end; pairs that are then equal, or without room, go."""
    rows = preferences(9, 1)
    longest = max(len(row["prompt"]) + 3 for row in rows)  # of the template's tokens: three
    seen = run(max_length=longest + 3, max_new_tokens=1)
    is_the_plain_loop(seen, [2, 3])
    lengths = [len(side_ids(seen, p, "rejected")[1]) for p in seen.read("pairs/0.jsonl")]
    assert 3 in lengths and len(lengths) == 9
    for batch in seen.arguments("completion_logps", "batch"):
        sums = batch.prompt_mask.sum(1)[batch.prompt_of] + batch.completion_mask.sum(1)
        assert sums.max() <= longest + 3
    short = dict(eval_dataset="", eval_size=0, eval_prompts="")
    seen = run(max_length=longest, max_new_tokens=1, **short)
    fitting = [row["prompt"] for row in rows if len(row["prompt"]) + 3 < longest]
    got = [pair["prompt"] for pair in seen.read("pairs/0.jsonl")]
    assert len(fitting) < 9 and set(got) <= set(fitting)


def lr_is(seen, schedule, warmup):
    want = [plain.learning_rate(step, 0.02, schedule, warmup, 5) for step in range(1, 6)]
    assert [update.lr for update in seen.updates] == pytest.approx(want)
    assert [row["lr"] for row in seen.steps] == pytest.approx(want, rel=1e-5)


def flag_lr_schedule(run, base, folder):
    short = dict(eval_prompts="", eval_dataset="", eval_size=0)
    for schedule in ("constant", "cosine"):
        lr_is(run(lr_schedule=schedule, **short), schedule, 2)
    lr_is(base, "linear", 2)


def flag_warmup_ratio(run, base, folder):
    short = dict(eval_prompts="", eval_dataset="", eval_size=0)
    for ratio, warmup in ((0.0, 0), (0.6, 3), (0.75, 4)):
        lr_is(run(warmup_ratio=ratio, **short), "linear", warmup)


def flag_eval_size(run, base, folder):
    """First rows of --eval-prompts; prompts held out are looked at with --eval-dataset."""
    seen = run(eval_size=2)
    assert seen.arguments("greedy_rewards", "rows") == [problems(6, 3)[:2]] * 2
    prompts = [row["prompt"] for row in problems(6, 3)[:2]]
    assert seen.arguments("kl_from_start", "prompts") == [prompts] * 2
    assert len(base.arguments("greedy_rewards", "rows")[0]) == 4


def flag_log_samples(run, base, folder):
    """So many greedy answers of each evaluation, with their prompts and rewards."""
    for seen, count in ((run(log_samples=3), 3), (base, 2)):
        prompts = [row["prompt"] for row in problems(6, 3)]
        want = []
        for step, (values, texts) in zip((0, 5), seen.results("greedy_rewards"), strict=True):
            want += [(step, prompts[i], texts[i], values[i]) for i in range(count)]
        got = []
        for row in seen.held_out_samples:
            got.append((row["step"], row["prompt"], row["completion"], row["reward"]))
        assert got == want and seen.samples == []


def of_iterations(check):
    """A check whose runs sample."""
    check.sampled = True
    return check


@of_iterations
def flag_iterations(run, base, folder):
    seen = run(iterations=3, eval_prompts="")
    assert len(seen.steps) == 6 and [row["iteration"] for row in iteration_rows(seen)] == [0, 1, 2]
    assert len(list((seen.folder / "pairs").iterdir())) == 3 and len(base.steps) == 4
    losses = [row["loss"] - 0.7 * row["nll"] for row in seen.steps]
    assert losses[::2] == pytest.approx([math.log(2)] * 3, rel=1e-4)


@of_iterations
def flag_num_prompts(run, base, folder):
    """So many different prompts of the file an iteration; at most all."""
    for number, found in ((3, 3), (99, 12)):
        seen = run(num_prompts=number, iterations=1, eval_prompts="")
        prompts = [p for part in seen.arguments("generate", "prompts") for p in part]
        assert len(prompts) == len(set(prompts)) == found


@of_iterations
def flag_num_generations(run, base, folder):
    seen = run(num_generations=6, iterations=1, eval_prompts="")
    assert set(seen.arguments("generate", "num_generations")) == {6}
    assert sum(len(texts) for _, texts, _ in seen.results("generate")) == 30


@of_iterations
def flag_num_pairs(run, base, folder):
    seen = run(num_pairs=9, eval_prompts="")
    assert [len(seen.read(f"pairs/{i}.jsonl")) for i in range(2)] == [9, 9]
    assert len(seen.steps) == 6


@of_iterations
def flag_temperature(run, base, folder):
    """Of sampling: cold completions of a prompt are one text, hot ones another draw; the greedy
    answers are the same."""
    observe.refused(run, "needs two sampled completions of a prompt", temperature=0.0)
    hot = run(temperature=3.0, iterations=1)
    assert set(hot.arguments("generate", "temperature")) == {3.0}
    assert hot.evals[0]["eval_reward"] == base.evals[0]["eval_reward"]
    assert drawn_groups(hot, 0) != drawn_groups(base, 0)


FLAGS = {
    "model": flag_model, "dataset": flag_dataset, "eval_dataset": flag_eval_dataset,
    "eval_prompts": flag_eval_prompts, "output_dir": observe.flag_output_dir,
    "resume": flag_resume, "overwrite": observe.flag_overwrite, "seed": flag_seed,
    "device": observe.flag_device, "dtype": observe.flag_dtype,
    "show_rows": observe.flag_show_rows,
    "gradient_checkpointing": observe.flag_gradient_checkpointing,
    "share_prompts": observe.flag_share_prompts, "loss": flag_loss,
    "beta": by_value(beta=0.9), "alpha": by_value(alpha=2.0),
    "margin_scale": by_value(margin_scale=2.0), "label_smoothing": by_value(label_smoothing=0.3),
    "eta": flag_gap, "normalize_length": by_value(normalize_length=True),
    "precompute_ref": flag_precompute_ref, "iterations": flag_iterations, "reward": flag_reward,
    "reward_model": flag_reward_model, "num_prompts": flag_num_prompts,
    "num_generations": flag_num_generations, "num_pairs": flag_num_pairs,
    "max_new_tokens": flag_max_new_tokens, "temperature": flag_temperature,
    "num_epochs": flag_num_epochs, "batch_size": flag_batch_size,
    "micro_batch_size": flag_micro_batch_size, "max_length": flag_max_length,
    "learning_rate": observe.flag_learning_rate, "lora_rank": observe.flag_lora_rank,
    "shard": observe.flag_shard,
    "lr_schedule": flag_lr_schedule,
    "warmup_ratio": flag_warmup_ratio, "max_grad_norm": observe.flag_max_grad_norm,
    "eval_size": flag_eval_size, "eval_every": observe.flag_eval_every,
    "checkpoint_every": observe.flag_checkpoint_every, "log_samples": flag_log_samples,
}  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(small, base, sampled, twice, tmp_path, flag):
    """The flag changes what its help says."""
    check = FLAGS[flag]
    if hasattr(check, "sampled"):
        check(sampled, twice, tmp_path)
    else:
        check(small, base, tmp_path)


def test_flags_are_all_looked_at():
    observe.has_every_flag(dpo_nll, FLAGS)


def test_flags_by_default():
    """The values of the papers, and those that the help names."""
    args = dpo_nll.Args(model="m", dataset="d")
    want = dict(
        beta=0.1, alpha=1.0, margin_scale=0.0, label_smoothing=0.0, eta=1.0, loss="dpo", seed=0,
        normalize_length=False, precompute_ref=True, share_prompts=True, iterations=0,
        reward="verifier", num_prompts=1024, num_generations=8, num_pairs=1024, temperature=1.0,
        max_new_tokens=256, num_epochs=1, batch_size=64, micro_batch_size=8, max_length=1024,
        learning_rate=7e-7, lr_schedule="linear", warmup_ratio=0.1, max_grad_norm=1.0,
        eval_size=64, eval_every=100, checkpoint_every=100, log_samples=4, device="auto",
        dtype="auto", show_rows=0, gradient_checkpointing=False, resume=False, overwrite=False,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in want} == want


@pytest.mark.slow
def test_learning_as_a_user_would(tmp_path):
    """`python dpo_nll.py` on half of its pairs; with the sides exchanged it fails."""
    write_rows(tmp_path / "half.jsonl", toy_rows(1280))
    command = [sys.executable, ROOT / "dpo_nll.py", "--output-dir", tmp_path / "run"]
    command += ["--dataset", tmp_path / "half.jsonl", "--eval-size", "100"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    before, after = (row for row in rows if "eval_accuracy" in row)
    assert before["eval_accuracy"] < 0.55 and before["eval_pair_accuracy"] == 0.5
    assert after["eval_accuracy"] > 0.7 and after["eval_pair_accuracy"] > 0.75
    assert before["eval_kl"] == pytest.approx(0, abs=1e-3) and 0.1 < after["eval_kl"] < 10
