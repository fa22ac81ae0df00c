"""dpo_nll.py against hand values, closed forms, limiting cases, and learning on the toy."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer
from safetensors.torch import load_file

import common
import dpo_nll
import sft


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(common.Run, "_plot", lambda self: None)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def toy_rows(n):
    return [json.loads(x) for x in (ROOT / "toy/pref_train.jsonl").read_text().splitlines()[:n]]


def tiny_args(tmp_path, **changes):
    """Args of a short run on 16 pairs of the toy."""
    rows = write(tmp_path / "rows.jsonl", toy_rows(16))
    values = dpo_nll.TOY | dict(
        model=str(ROOT / "toy/model"), dataset=rows, eval_dataset=rows, eval_prompts="",
        batch_size=8, micro_batch_size=8, output_dir=str(tmp_path / "run"), device="cpu",
        lr_schedule="constant", warmup_ratio=0.0,
    )  # fmt: skip
    return dpo_nll.Args(**values | changes)


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
    tokenizer = common.load_tokenizer(args.model)
    model = common.load_model(dpo_nll.AutoModelForCausalLM, args.model, torch.device("cpu"))
    pairs = [dict(row, gap=0.0) for row in toy_rows(16)]
    want = -dpo_nll.all_logps(model, tokenizer, pairs, 64, args)[:, 0].mean().item()
    assert steps(run(args))[0]["nll"] == pytest.approx(want, rel=1e-4)


def test_log_probs_by_a_plain_forward_and_the_rejected_leaves_the_chosen():
    args = dpo_nll.Args(model="", dataset="")
    tokenizer = common.load_tokenizer(ROOT / "toy/model")
    model = common.load_model(dpo_nll.AutoModelForCausalLM, ROOT / "toy/model", torch.device("cpu"))
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
    rows = write(tmp_path / "scored.jsonl", rows)
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
    row = steps(run(tiny_args(tmp_path, dataset=write(tmp_path / "r.jsonl", rows), loss=loss,
                              alpha=0.0, eval_dataset="", eval_size=0)))[0]  # fmt: skip
    p = 1 / (1 + math.exp(-1.5))
    coin = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))  # delta is 0
    assert row["loss"] == pytest.approx({"rpo": coin, "rebel": 2.25}[loss], rel=1e-3)
    with pytest.raises(SystemExit, match="score_chosen"):
        dpo_nll.main(tiny_args(tmp_path, loss=loss, overwrite=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_short_last_step_by_a_plain_computation(tmp_path, normalize):
    """10 pairs, 8 and then 2, which weigh a half each; lengths normalised on both sides, or not."""
    rows = write(tmp_path / "r.jsonl", toy_rows(10))
    args = tiny_args(tmp_path, dataset=rows, eval_dataset="", eval_size=0, micro_batch_size=2,
                     normalize_length=normalize, beta=0.3, alpha=0.0)  # fmt: skip
    kept, update = [], dpo_nll.update

    def keeping(optimizer, *rest):  # the second step's policy is that of the first one's update
        kept.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
        return update(optimizer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_nll, "update", keeping)
        row = steps(run(args))[1]
    tokenizer, device = common.load_tokenizer(args.model), torch.device("cpu")
    ref, policy = (common.load_model(dpo_nll.AutoModelForCausalLM, args.model, device)
                   for _ in range(2))  # fmt: skip
    for p, value in zip(policy.parameters(), kept[1], strict=True):
        p.data = value
    order = dpo_nll.random.Random(f"{args.seed} 0 0").sample(range(10), 10)
    loss = 0.0
    for pair in [toy_rows(10)[i] for i in order[8:]]:
        prompt, ratios = common.encode_prompt(tokenizer, pair["prompt"]), []
        for side in ("chosen", "rejected"):
            ids = tokenizer(pair[side], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + ids + [tokenizer.eos_token_id]])
            pi, pi_ref = (m(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                          [len(prompt) - 1:].sum() for m in (policy, ref))  # fmt: skip
            ratios.append((pi - pi_ref) / (ids.shape[1] - len(prompt) if normalize else 1))
        loss = loss + (1 + (-0.3 * (ratios[0] - ratios[1])).exp()).log() / 2
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_the_implicit_rewards_of_rebel_are_scaled_by_its_eta(tmp_path):
    """(delta / eta - gap)^2 is least where the margin, as logged, is the gap."""
    rows = [row | {"score_chosen": 1.0, "score_rejected": 0.0} for row in toy_rows(8)]
    path = write(tmp_path / "r.jsonl", rows)
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
        with pytest.raises(SystemExit, match="--margin-scale"):
            dpo_nll.main(args)


def test_messages_that_would_be_lost_are_refused(tmp_path):
    user, other = {"role": "user", "content": "1"}, {"role": "user", "content": "2"}
    first, last = ({"role": "assistant", "content": x} for x in "34")
    good = {"prompt": "1", "chosen": [user, first], "rejected": [last]}
    path = write(tmp_path / "good.jsonl", [good] * 8)
    run(tiny_args(tmp_path, dataset=path, eval_dataset=""))
    bad = good | {"chosen": [user, first, other, last]}
    path = write(tmp_path / "bad.jsonl", [good, bad])
    with pytest.raises(SystemExit, match="row 2.*earlier turns"):
        dpo_nll.main(tiny_args(tmp_path, dataset=path, eval_dataset="", overwrite=True))


def test_margins_of_the_rows_are_used(tmp_path):
    rows = write(tmp_path / "r.jsonl", [row | {"margin": 0.5} for row in toy_rows(8)])
    changes = dict(dataset=rows, alpha=0.0, margin_scale=2.0, eval_dataset="", eval_size=0)
    row = steps(run(tiny_args(tmp_path, **changes)))[0]
    assert row["loss"] == pytest.approx(math.log(1 + math.e), rel=1e-4)


def test_equal_pairs_are_dropped_and_counted_and_empty_ones_refused(tmp_path, capsys):
    same = [{"prompt": "1+1", "chosen": "2", "rejected": "2"}]
    long = [{"prompt": "1+1", "chosen": "2" * 50 + "1", "rejected": "2" * 50 + "3"}]
    rows = write(tmp_path / "r.jsonl", toy_rows(6) + same + long)
    rows = run(tiny_args(tmp_path, dataset=rows, max_length=50, eval_dataset="", eval_size=0))
    assert "of 8 pairs, dropped 2" in capsys.readouterr().out and len(steps(rows)) == 1
    for bad, words in (
        (same, "no pair of two different"),
        ([{"prompt": "1", "chosen": " ", "rejected": "2"}], "chosen"),
        ([{"prompt": "1", "chosen": "2", "rejected": "3", "margin": "x"}], "row 1"),
    ):
        path = write(tmp_path / "bad.jsonl", bad)
        with pytest.raises(SystemExit, match=words):
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
    pairs = [common.load_rows(tmp_path / f"run/pairs/{i}.jsonl") for i in range(2)]
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
    with pytest.warns(UserWarning, match="max-new-tokens"):
        run(args)
    pairs = common.load_rows(tmp_path / "run/pairs/0.jsonl")
    assert len(pairs) == 64 and all(pair["chosen"] != pair["rejected"] for pair in pairs)


def test_what_is_sampled_must_fit_in_training(tmp_path):
    with pytest.raises(SystemExit, match="does not fit"):
        dpo_nll.main(iterate(tmp_path, max_length=20))


@pytest.mark.parametrize("at", [2, 3])  # at the beginning of the second iteration, and within it
@pytest.mark.parametrize("kept", [False, True])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, monkeypatch, at, kept):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    changes = dict(checkpoint_every=1, precompute_ref=not kept)
    run(iterate(tmp_path / "a", **changes))
    calls, update = [], dpo_nll.update

    def stopping(*args):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dpo_nll, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
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
    with pytest.raises(SystemExit, match="different reward"):
        dpo_nll.main(args)


def test_learning_as_a_user_would(tmp_path):
    """`python dpo_nll.py` on half of its pairs; with the sides exchanged it fails."""
    write(tmp_path / "half.jsonl", toy_rows(1280))
    command = [sys.executable, ROOT / "dpo_nll.py", "--output-dir", tmp_path / "run"]
    command += ["--dataset", tmp_path / "half.jsonl", "--eval-size", "200"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    before, after = (row for row in rows if "eval_accuracy" in row)
    assert before["eval_accuracy"] < 0.55 and before["eval_pair_accuracy"] == 0.5
    assert after["eval_accuracy"] > 0.7 and after["eval_pair_accuracy"] > 0.75
    assert before["eval_kl"] == pytest.approx(0, abs=1e-3) and 0.1 < after["eval_kl"] < 10
