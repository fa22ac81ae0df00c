"""rejection_sampling.py: the book's example, enumeration, plain loops, and learning on the toy."""

import itertools
import json
import math
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import common
import rejection_sampling as rs


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(common.Run, "_plot", lambda self: None)


def tiny_args(tmp_path, **changes):
    """Args of a short run on the toy, with a reward that differs between completions."""
    (tmp_path / "reward.py").write_text(
        "def f(prompts, completions, rows):\n    return [float(len(set(c))) for c in completions]"
    )
    values = rs.TOY | dict(
        model=str(ROOT / "toy/model"), dataset=str(ROOT / "toy/problems_train.jsonl"),
        eval_dataset="", eval_size=0, num_prompts=6, num_generations=4, batch_size=6, num_epochs=2,
        max_new_tokens=12, micro_batch_size=8, output_dir=str(tmp_path / "run"), device="cpu",
        reward=f"{tmp_path}/reward.py:f", temperature=3.0, lr_schedule="constant",
    )  # fmt: skip
    return rs.Args(**values | changes)


def run(args):
    """Train -> rows of metrics."""
    rs.main(args)
    with open(f"{args.output_dir}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


# --- The algorithm --------------------------------------------------------------------------------

BOOK = torch.tensor([[0.7, 0.3, 0.5, 0.2], [0.4, 0.8, 0.6, 0.5], [0.9, 0.3, 0.4, 0.7],
                     [0.2, 0.5, 0.8, 0.6], [0.5, 0.4, 0.3, 0.6]])  # fmt: skip


def test_the_books_example():
    assert rs.select_top_per_prompt(BOOK).tolist() == [0, 1, 0, 2, 3]
    assert rs.select_top_overall(BOOK, 5).tolist() == [8, 5, 14, 0, 11]
    assert [divmod(x, 4) for x in (8, 11)] == [(2, 0), (2, 3)]  # prompt 3 twice, prompt 5 never


def test_ties_go_to_the_lower_index_and_missing_ones_to_nobody():
    rewards = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, -math.inf], [-5.0, -math.inf, -math.inf]])
    assert rs.select_top_per_prompt(rewards).tolist() == [0, 1, 0]
    assert rs.select_top_overall(rewards, 6).tolist() == [0, 1, 4, 2, 3, 6]
    draws = [rs.select_random(rewards) for _ in range(200)]
    assert {tuple(d.tolist()) for d in draws} == {*itertools.product(range(3), range(2), [0])}
    for _ in range(20):
        assert sorted(rs.select_random(rewards, 6).tolist()) == [0, 1, 2, 3, 4, 6]


def test_a_random_choice_does_not_look_at_the_reward():
    torch.manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[rs.select_random(BOOK[2:3])] += 1
    assert (counts / 4000 - 0.25).abs().max() < 0.03


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_is_the_mean_over_all_choices(n):
    want = [max(choice) for row in BOOK.tolist() for choice in itertools.combinations(row, n)]
    assert rs.best_of_n_reward(BOOK, n).item() == pytest.approx(sum(want) / len(want), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_another_reward_at_the_best_of_n(n):
    torch.manual_seed(0)
    scores, gold = torch.randn(3, 5), torch.rand(3, 5)
    want = []
    for s, g in zip(scores.tolist(), gold.tolist(), strict=True):
        for choice in itertools.combinations(range(5), n):
            want.append(g[max(choice, key=lambda i, s=s: s[i])])
    got = rs.best_of_n_reward(scores, n, gold)
    assert got.item() == pytest.approx(sum(want) / len(want), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_where_prompts_have_fewer(n):
    """The mean over the prompts that have n."""
    inf = math.inf
    rewards = torch.tensor([[0.3, -inf, -inf, -inf], [0.1, 0.9, 0.5, -inf], [4.0, 1.0, 3.0, 2.0]])
    want = []
    for row in rewards.tolist():
        there = [x for x in row if x > -inf]
        if len(there) >= n:
            best = [max(choice) for choice in itertools.combinations(there, n)]
            want.append(sum(best) / len(best))
    assert rs.best_of_n_reward(rewards, n).item() == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_the_kl_of_best_of_n():
    """The hand value; and for a policy of many equal answers, by the definition."""
    assert rs.best_of_n_kl(16) == pytest.approx(1.835089, abs=1e-6)
    assert rs.best_of_n_kl(1) == 0
    V, n = 20000, 4  # P(best of n is the k-th of V) = (k / V)^n - ((k - 1) / V)^n
    p = [((k / V) ** n - ((k - 1) / V) ** n) for k in range(1, V + 1)]
    kl = sum(x * math.log(x * V) for x in p if x)
    assert rs.best_of_n_kl(n) == pytest.approx(kl, abs=1e-3)


def test_a_table_of_candidates_has_no_reward_where_there_is_none():
    groups = [{"rewards": [1.0]}, {"rewards": [2.0, 3.0, 4.0]}]
    assert rs.reward_table(groups).tolist() == [[1, -math.inf, -math.inf], [2, 3, 4]]


# --- Training -------------------------------------------------------------------------------------


def candidates(tmp_path, i=0):
    return common.load_rows(tmp_path / f"run/candidates/{i}.jsonl")


@pytest.mark.parametrize("select", ["per-prompt", "overall"])
def test_what_is_trained_on_and_what_is_reported(tmp_path, monkeypatch, select):
    """The pairs of the gradient steps are the best ones, those of the control as many others."""
    seen, step = [], rs.gradient_step
    monkeypatch.setattr(rs, "gradient_step", lambda *a: seen.append(a[2]) or step(*a))
    rows = run(tiny_args(tmp_path, select=select, num_epochs=1, top_k=9 * (select == "overall")))
    groups = candidates(tmp_path)
    flat = [(r, g["prompt"], c) for g in groups
            for r, c in zip(g["rewards"], g["completions"], strict=True)]  # fmt: skip
    assert len(flat) == 24 and all(r == len(set(c)) for r, _, c in flat)
    if select == "per-prompt":
        best = [max(zip(g["rewards"], g["completions"], strict=True), key=lambda x: x[0])
                for g in groups]  # fmt: skip
        want = sorted((g["prompt"], c) for g, (_, c) in zip(groups, best, strict=True))
        mean = sum(r for r, _ in best) / 6
    else:
        top = sorted(flat, key=lambda x: -x[0])[:9]
        want, mean = sorted(x[1:] for x in top), sum(x[0] for x in top) / 9
    own, control = ([x[:2] for x in sum(seen[i::2], [])] for i in range(2))
    assert sorted(own) == want and len(control) == len(own)
    if select == "per-prompt":
        assert sorted(p for p, _ in control) == sorted(p for p, _ in own)
    assert set(control) <= {x[1:] for x in flat} and sorted(control) != want
    row = next(row for row in rows if "reward" in row)
    reward = {x[1:]: x[0] for x in flat}
    assert row["reward"] == pytest.approx(sum(x[0] for x in flat) / 24, rel=1e-5)
    assert row["reward_selected"] == pytest.approx(mean, rel=1e-5)
    assert row["reward_random"] == pytest.approx(
        sum(reward[x] for x in control) / len(control), rel=1e-5)  # fmt: skip
    ceiling = sum(max(g["rewards"]) for g in groups) / 6
    assert row["best_of_n"] == pytest.approx(ceiling, rel=1e-5)
    curve = [row for row in rows if "n" in row]
    assert [row["n"] for row in curve] == [1, 2, 4]
    assert curve[0]["reward_best_of_n"] == row["reward"] and curve[0]["kl_best_of_n"] == 0
    assert curve[-1]["reward_best_of_n"] == row["best_of_n"]
    samples = common.load_rows(tmp_path / "run/samples.jsonl")
    assert len(samples) == 4 and {(x["prompt"], x["completion"]) for x in samples} <= set(want)
    assert all(x["reward"] == len(set(x["completion"])) for x in samples)
    level = [len(set(g["rewards"])) == 1 for g in groups]
    assert row["no_signal"] == pytest.approx(sum(level) / 6) and row["ended"] < 1


@pytest.mark.filterwarnings("ignore:over 20")
def test_no_end_is_trained_that_the_policy_did_not_write(tmp_path, monkeypatch):
    """34 tokens: some completions end, some are cut off, and only the former teach an EOS."""
    seen, encode = [], rs.encode
    monkeypatch.setattr(rs, "encode", lambda *a, **b: seen.append(encode(*a, **b)) or seen[-1])
    run(tiny_args(tmp_path, max_new_tokens=34, temperature=1.0, num_prompts=12))
    ended = {c: e for g in candidates(tmp_path)
             for c, e in zip(g["completions"], g["ended"], strict=True)}  # fmt: skip
    assert {True, False} == set(ended.values())
    tokenizer, found = common.load_tokenizer(ROOT / "toy/model"), set()
    for batch in seen:
        for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True):
            text = tokenizer.decode(ids[mask], skip_special_tokens=True)
            assert (ids[mask][-1] == tokenizer.eos_token_id) == ended[text]
            found.add(ended[text])
    assert found == {True, False}


def test_micro_batches_and_plain_prompts_change_nothing(tmp_path):
    """On the same candidates, which the second and third run are given."""
    losses = []
    for i, changes in enumerate([{}, dict(micro_batch_size=4), dict(share_prompts=False)]):
        (tmp_path / str(i)).mkdir()
        args = tiny_args(tmp_path / str(i), **changes)
        if i:
            args.sample, args.completions = False, str(tmp_path / "c.jsonl")
        losses.append([row for row in run(args) if "loss" in row])
        rows = [{"prompt": g["prompt"], "completion": c, "ended": e}
                for g in candidates(tmp_path / str(i))
                for c, e in zip(g["completions"], g["ended"], strict=True)]  # fmt: skip
        (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(losses[0]) == 2
    for other in losses[1:]:
        for a, b in zip(losses[0], other, strict=True):
            for name in ("loss", "grad_norm"):
                assert b[name] == pytest.approx(a[name], rel=1e-3), name


def test_completions_of_other_models_join(tmp_path):
    rows = [json.loads(x) for x in (ROOT / "toy/problems_train.jsonl").read_text().splitlines()[:6]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = {"prompt": rows[3]["prompt"], "completion": "0123456789+="}
    (tmp_path / "others.jsonl").write_text(json.dumps(other))
    metrics = run(tiny_args(tmp_path, dataset=str(tmp_path / "rows.jsonl"),
                            completions=str(tmp_path / "others.jsonl")))  # fmt: skip
    groups = {g["prompt"]: g for g in candidates(tmp_path)}
    assert len(groups[other["prompt"]]["completions"]) == 5
    assert groups[other["prompt"]]["rewards"][4] == 12  # the best there is
    assert groups[other["prompt"]]["ended"][4] is True
    curve = {row["n"]: row["reward_best_of_n"] for row in metrics if "n" in row}
    assert [*curve] == [1, 2, 4, 5] and curve[5] == 12


def test_no_training_is_best_of_n_alone(tmp_path):
    rows = run(tiny_args(tmp_path, train=False))
    assert [r["n"] for r in rows if "n" in r] == [1, 2, 4] and not any("loss" in r for r in rows)
    assert not (tmp_path / "run/final").exists()


def test_the_next_round_samples_from_the_new_policy_and_the_control_follows(tmp_path, monkeypatch):
    """Both models are equal before the first step of each round, and only there."""
    before, step = [], rs.gradient_step

    def watched(model, *rest):
        before.append(model.model.embed_tokens.weight.detach().clone())
        return step(model, *rest)

    monkeypatch.setattr(rs, "gradient_step", watched)
    rows = run(tiny_args(tmp_path, rounds=2, learning_rate=3e-3))
    assert [row["round"] for row in rows if "round" in row] == [0, 1]
    equal = [torch.equal(a, b) for a, b in zip(before[::2], before[1::2], strict=True)]
    assert equal == [True, False, True, False]  # two steps a round
    assert not torch.equal(before[0], before[4])
    first = {g["prompt"] for g in candidates(tmp_path, 0)}
    assert first != {g["prompt"] for g in candidates(tmp_path, 1)}


@pytest.mark.parametrize("calls", [3, 5])  # in the second round's first and second step
def test_a_resumed_run_is_the_unbroken_one(tmp_path, monkeypatch, calls):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    changes = dict(rounds=2, checkpoint_every=1, learning_rate=3e-3)
    run(tiny_args(tmp_path / "a", **changes))
    done, update = [], rs.update

    def stopping(*args):
        done.append(1)
        if len(done) == 2 + calls:
            raise KeyboardInterrupt
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rs, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            rs.main(tiny_args(tmp_path / "b", **changes))
    torch.manual_seed(9), random.seed(9)
    run(tiny_args(tmp_path / "b", resume=True, **changes))
    one, two = (load_file(tmp_path / x / "run/final/model.safetensors") for x in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)
    rows = [[json.loads(x) for x in open(tmp_path / x / "run/metrics.jsonl")] for x in "ab"]
    for one, two in zip(*rows, strict=True):
        for row in (one, two):
            row.pop("tokens_per_second", 0), row.pop("seconds")
        assert one == two


def test_what_was_sampled_is_not_sampled_again(tmp_path, monkeypatch):
    """Stopped in the third of three blocks, with a line cut in two: two blocks are kept."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    run(tiny_args(tmp_path / "a"))
    calls, generate = [], rs.generate

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rs, "generate", stopping)
        with pytest.raises(KeyboardInterrupt):
            rs.main(tiny_args(tmp_path / "b"))
    path = tmp_path / "b/run/candidates/0.jsonl"
    assert len(path.read_text().splitlines()) == 4
    with open(path, "a") as f:
        f.write('{"prompt": "12')
    del calls[:]
    monkeypatch.setattr(rs, "generate", lambda *a: calls.append(1) or generate(*a))
    run(tiny_args(tmp_path / "b", resume=True))
    assert len(calls) == 1
    assert path.read_text() == (tmp_path / "a/run/candidates/0.jsonl").read_text()


def refused(args, *words):
    with pytest.raises(SystemExit) as stopped:
        rs.main(args)
    assert all(word in str(stopped.value) for word in words), stopped.value


def test_bad_input_is_one_line(tmp_path):
    refused(tiny_args(tmp_path, temperature=0.0), "--temperature 0")
    refused(tiny_args(tmp_path, sample=False), "--completions")
    refused(tiny_args(tmp_path, top_k=25, select="overall"), "--top-k 25")
    (tmp_path / "c.jsonl").write_text('{"prompt": "x", "completion": "y"}')
    args = tiny_args(tmp_path, completions=str(tmp_path / "c.jsonl"), sample=False)
    args.overwrite = True
    refused(args, "none of its prompts")
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "x", "completion": "1" * 300}))
    refused(args, "256 tokens", "111")


def test_learning_as_a_user_would(tmp_path):
    """`python rejection_sampling.py` on fewer prompts: far above its blind control."""
    command = [sys.executable, ROOT / "rejection_sampling.py", "--output-dir", tmp_path / "run"]
    command += ["--num-prompts", "500", "--eval-size", "200"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    before, after = (row for row in rows if "eval_accuracy" in row)
    assert before["eval_accuracy"] < 0.55
    assert after["eval_accuracy"] > 0.7 and after["eval_accuracy_control"] < 0.6
    assert before["eval_kl"] == pytest.approx(0, abs=1e-3) and 0.05 < after["eval_kl"] < 5
