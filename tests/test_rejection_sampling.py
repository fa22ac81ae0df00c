"""rejection_sampling.py: the book's example, enumeration, plain loops, and learning on the toy."""

import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import time

import observe
import plain
import pytest
import torch
from conftest import ROOT
from replay import (
    REWARD, adamw, checkpoint_parts, end_weights, flag_resume, flat_gradient, greedy,
    greedy_reward, model_with, moved, problems, resumed_without, reward_of, weights_of,
)  # fmt: skip
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import plumbing
import rejection_sampling as rs

pytestmark = pytest.mark.usefixtures("no_picture")


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
    return plumbing.load_rows(tmp_path / f"run/candidates/{i}.jsonl")


@pytest.mark.parametrize("select", ["per-prompt", "overall"])
def test_what_is_trained_on_and_what_is_reported(tmp_path, select):
    """The pairs of the gradient steps are the best ones, those of the control as many others."""
    changes = dict(num_epochs=1, top_k=9 * (select == "overall"))
    seen = observe.observe(rs, tiny_args(tmp_path, select=select, **changes))
    rows = seen.rows
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
    own, control = ([x[:2] for x in sum(steps, [])] for steps in trained(seen).values())
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
    samples = plumbing.load_rows(tmp_path / "run/samples.jsonl")
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
    tokenizer, found = plumbing.load_tokenizer(ROOT / "toy/model"), set()
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


def test_the_next_round_samples_from_the_new_policy_and_the_control_follows(tmp_path):
    """Both models are equal before the first step of each round, and only there."""
    seen = observe.observe(rs, tiny_args(tmp_path, rounds=2, learning_rate=3e-3))
    assert [row["round"] for row in seen.rows if "round" in row] == [0, 1]
    before = [update.weights for update in seen.updates]
    equal = [torch.equal(a, b) for a, b in zip(before[::2], before[1::2], strict=True)]
    assert equal == [True, False, True, False]  # two steps a round
    assert not torch.equal(before[0], before[4])
    first = {g["prompt"] for g in candidates(tmp_path, 0)}
    assert first != {g["prompt"] for g in candidates(tmp_path, 1)}


@pytest.mark.parametrize("rows", [10, 11])  # in the second round's first and second step
def test_a_resumed_run_is_the_unbroken_one(tmp_path, rows):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    changes = dict(rounds=2, checkpoint_every=1, learning_rate=3e-3)
    run(tiny_args(tmp_path / "a", **changes))
    with observe.killed(plumbing.Run, "log", rows + 1):  # of a round four rows, and its steps
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
    with pytest.raises(ValueError) as stopped:
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


# --- Every metric and flag, on a tiny model -------------------------------------------------------

VERIFIED = [
    ("1+1=2\n2", "2", 1.0), ("2 and 3", "2", 0.0), ("no number", "2", 0.0), ("-4", "-4", 1.0),
    ("it is 1,234.50", "1234.5", 1.0), ("12", "1,200", 0.0), ("1200", "1,200", 1.0),
    ("4", "-4", 0.0), ("4.", 4, 1.0),
]  # fmt: skip


def test_the_verifier_reads_the_last_number():
    for text, answer, right in VERIFIED:
        assert rs.verifier(["p"], [text], [{"answer": answer}]) == [right], text
    rows = [{"answer": "1"}, {"answer": "2"}]
    assert rs.verifier(["p", "p"], ["2", "2"], rows) == [0.0, 1.0]


def test_the_loss_is_a_mean_over_tokens():
    """Lengths 2 and 8: ten tokens, each weighs the same."""
    mask = torch.arange(8)[None] < torch.tensor([[2], [8]])
    logps = torch.tensor([[-1.0], [-3.0]]) * mask
    assert rs.sft_loss(logps, mask).item() == pytest.approx((2 * 1 + 8 * 3) / 10)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny):
    """look(**changes) -> Seen of two rounds of two steps: 7 of 12 prompts, 2 at a time, 4
    completions each; 10 and 4 completions a step, in micro-batches of 8; a rate that falls."""
    data = tmp_path_factory.mktemp("data")
    (data / "reward.py").write_text(REWARD)
    values = dict(
        model=tiny, dataset=write(data / "train.jsonl", problems(12, 1)),
        eval_dataset=write(data / "held.jsonl", problems(5, 2)), device="cpu",
        reward=f"{data}/reward.py:f", rounds=2, num_prompts=7, num_generations=4, num_epochs=2,
        batch_size=10, micro_batch_size=8, learning_rate=0.02, max_grad_norm=1e9,
        max_new_tokens=12, eval_size=4, log_samples=3,
    )  # fmt: skip

    def look(**changes):
        folder = str(tmp_path_factory.mktemp("run") / "run")
        args = rs.Args(**values | {"output_dir": folder} | changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("matplotlib.figure.Figure.savefig", lambda *a, **b: None)
            return observe.observe(rs, args)

    return look


@pytest.fixture(scope="module")
def base(small):
    return small()


def groups_of(seen, i=0):
    return seen.read(f"candidates/{i}.jsonl")


def rounds_of(seen):
    return [row for row in seen.rows if "round" in row]


def every(groups):
    """All candidates of a round: (reward, prompt, text, ended), prompt by prompt."""
    found = []
    for group in groups:
        for reward, text, ended in zip(
            group["rewards"], group["completions"], group["ended"], strict=True
        ):
            found.append((reward, group["prompt"], text, ended))
    return found


def trained(seen, i=0):
    """What the steps of a round were given: {model: [(prompt, text, ended), ...] of each step}."""
    names = ["policy", "control"] if seen.args.control else ["policy"]
    found = {name: [] for name in names}
    calls = [arguments for arguments, _ in seen.calls["encode"] if arguments["ended"] is not None]
    for n, arguments in enumerate(calls):
        texts = [text for texts in arguments["completions"] for text in texts]
        step = list(zip(arguments["prompts"], texts, arguments["ended"], strict=True))
        found[names[n % len(names)]].append(step)
    each = len(seen.steps) // seen.args.rounds
    return {name: steps[i * each : (i + 1) * each] for name, steps in found.items()}


def best_of_each(groups):
    """The first best completion of each prompt."""
    chosen = []
    for group in groups:
        j = group["rewards"].index(max(group["rewards"]))
        chosen.append((group["prompt"], group["completions"][j], group["ended"][j]))
    return chosen


def drawn(seen, chosen, i):
    """The selection as the steps of a round draw it: an order of its own each epoch."""
    args, order = seen.args, []
    for epoch in range(args.num_epochs):
        order += random.Random(f"{args.seed} {i} {epoch}").sample(range(len(chosen)), len(chosen))
    size = args.batch_size
    return [[chosen[j] for j in order[k : k + size]] for k in range(0, len(order), size)]


def plain_step(seen, weights, rows):
    """One step on (prompt, text, ended), a completion a forward -> loss, model with gradient,
    number of tokens."""
    tokenizer = plumbing.load_tokenizer(seen.args.model)
    model, logps = model_with(seen.args.model, weights), []
    for prompt, text, ended in rows:
        ids = plain.toy_ids(tokenizer, "", text)
        ids = ids if ended or len(ids) == 1 else ids[:-1]
        logps.append(plain.token_logps(model, plain.toy_ids(tokenizer, prompt), ids))
    loss = -torch.cat(logps).mean()
    loss.backward()
    return loss.item(), model, len(torch.cat(logps))


def is_the_plain_loop(seen, i=1):
    """Loss, gradient and rate of each step of a round, of the policy and of the control."""
    args, names = seen.args, list(trained(seen, i))
    total = len(seen.steps)
    each = total // args.rounds
    for k in range(each):
        row, step = seen.steps[i * each + k], i * each + k + 1
        lr = plain.learning_rate(step, args.learning_rate, args.lr_schedule, 0, total)
        assert row["lr"] == pytest.approx(lr, rel=1e-5)
        for optimizer, name in enumerate(names):
            update = [u for u in seen.updates if u.optimizer == optimizer][step - 1]
            loss, model, _ = plain_step(seen, update.weights, trained(seen, i)[name][k])
            end = "_control" * optimizer
            assert row["loss" + end] == pytest.approx(loss, rel=1e-4)
            assert update.lr == pytest.approx(lr)
            gradient = flat_gradient(model)
            assert (update.gradient - gradient).norm() < 1e-3 * gradient.norm()
            if not optimizer:
                assert row["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)
        assert set(row) == {"step", "seconds", "tokens_per_second", "lr", "loss", "grad_norm"} | {
            "loss_control" for name in names if name == "control"}  # fmt: skip


def test_metrics_of_the_steps(base, tiny):
    """Loss, norm and rate of both models; they begin each round alike, and part after it."""
    is_the_plain_loop(base, 0)
    is_the_plain_loop(base, 1)
    assert len(base.steps) == 4 and [row["step"] for row in base.steps] == [1, 2, 3, 4]
    policy, control = ([u for u in base.updates if u.optimizer == i] for i in range(2))
    equal = [torch.equal(a.weights, b.weights) for a, b in zip(policy, control, strict=True)]
    assert equal == [True, False, True, False]
    begin = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert torch.equal(policy[0].weights, weights_of(begin))
    final = AutoModelForCausalLM.from_pretrained(base.folder / "final", dtype=torch.float32)
    assert torch.equal(weights_of(final), end_weights(base))


def test_metrics_of_the_optimisers(base, small):
    """AdamW's formula without decay. The control goes on in the second round from the policy's
    weights and its own copy of the policy's moments; the policy is what it is without a control."""
    policy, control = ([u for u in base.updates if u.optimizer == i] for i in range(2))
    start = policy[0].weights
    assert torch.allclose(end_weights(base), adamw(start, policy), atol=1e-3)
    ours = [*policy[:2], *control[2:]]
    assert torch.allclose(end_weights(base, 1), adamw(start, ours), atol=1e-3)
    assert not torch.allclose(end_weights(base, 1), adamw(start, control), atol=1e-3)
    pointers = [state["exp_avg"].data_ptr() for o in base.optimizers for state in o.state.values()]
    assert len(pointers) == len(set(pointers))
    alone = small(control=False)
    assert torch.equal(end_weights(alone), end_weights(base))


def test_metrics_of_a_round(base):
    """What was sampled, selected and drawn blindly; prompts, seeds and blind choices of rounds."""
    rows = {row["prompt"]: row for row in problems(12, 1)}
    for i, logged in enumerate(rounds_of(base)):
        groups = groups_of(base, i)
        found = every(groups)
        assert len(groups) == 7 == len({g["prompt"] for g in groups}) and len(found) == 28
        for reward, prompt, text, ended in found:
            assert reward == pytest.approx(reward_of(text, ended, rows[prompt]))
        best = best_of_each(groups)
        assert trained(base, i)["policy"] == drawn(base, best, i)
        control = trained(base, i)["control"]
        blind = {prompt: (prompt, text, ended) for prompt, text, ended in sum(control, [])}
        assert control == drawn(base, [blind[g["prompt"]] for g in groups], i)
        rewards = {x[1:]: x[0] for x in found}
        want = {
            "round": i, "reward": sum(x[0] for x in found) / 28,
            "reward_selected": sum(rewards[x] for x in best) / 7,
            "reward_random": sum(rewards[x] for x in blind.values()) / 7,
            "best_of_n": sum(max(g["rewards"]) for g in groups) / 7,
            "no_signal": sum(len(set(g["rewards"])) == 1 for g in groups) / 7,
            "ended": sum(x[3] for x in found) / 28,
        }  # fmt: skip
        assert set(logged) == {*want, "step", "seconds"}
        for name in want:
            assert logged[name] == pytest.approx(want[name], rel=1e-5), name
        assert 0 < want["ended"] < 1
        assert logged["step"] == 1 + 2 * i


def test_metrics_of_rewards_that_are_level(small, tmp_path):
    """Of prompts with odd numbers every completion has the same reward."""
    (tmp_path / "r.py").write_text(
        "def f(prompts, completions, rows):\n"
        "    return [len(set(c)) * (r['number'] % 2) for c, r in zip(completions, rows)]\n"
    )
    seen = small(reward=f"{tmp_path}/r.py:f", train=False, num_prompts=12, eval_size=0)
    level = [len(set(group["rewards"])) == 1 for group in groups_of(seen)]
    assert sum(level) >= 6
    assert rounds_of(seen)[0]["no_signal"] == pytest.approx(sum(level) / 12, rel=1e-5)


def test_metrics_of_the_best_of_n(base, small, monkeypatch):
    """By enumeration of all choices, of each round; and the picture's points are the same."""
    points = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, *a, **b: points.append(a[:2]))
    seen = small(num_generations=5, train=False, eval_size=0)
    for run_seen, sizes, rounds in ((base, [1, 2, 4], 2), (seen, [1, 2, 4, 5], 1)):
        curve = [row for row in run_seen.rows if "n" in row]
        assert [row["n"] for row in curve] == sizes * rounds
        for place, row in enumerate(curve):
            groups, n, total = groups_of(run_seen, place // len(sizes)), int(row["n"]), 0.0
            for group in groups:
                choices = [max(c) for c in itertools.combinations(group["rewards"], n)]
                total += sum(choices) / len(choices) / len(groups)
            assert row["reward_best_of_n"] == pytest.approx(total, rel=1e-5)
            assert row["kl_best_of_n"] == pytest.approx(math.log(n) - 1 + 1 / n, abs=1e-6)
    curve = [row for row in seen.rows if "n" in row]
    assert [*points[0][0]] == pytest.approx([row["kl_best_of_n"] for row in curve], abs=1e-6)
    assert [*points[0][1]] == pytest.approx([row["reward_best_of_n"] for row in curve], rel=1e-5)


def test_metrics_of_the_evaluations(base):
    """Before the first step and after each round: greedy rewards of held-out rows, KL from the
    start; of both models."""
    args, rows = base.args, plumbing.load_rows(base.args.eval_dataset)[:4]
    assert [row["step"] for row in base.evals] == [0, 2, 4]
    start = base.updates[0].weights
    policy = [u for u in base.updates if u.optimizer == 0]
    weights = [(start, start), (policy[2].weights, None), (end_weights(base), end_weights(base, 1))]
    for row, both in zip(base.evals, weights, strict=True):
        assert set(row) == {"eval_reward", "eval_reward_control", "eval_kl", "eval_kl_control",
                            "step", "seconds"}  # fmt: skip
        for end, flat in zip(("", "_control"), both, strict=True):
            if flat is None:
                continue
            model, begin = model_with(args.model, flat), model_with(args.model, start)
            want = greedy_reward(model, args.model, rows, 12)
            assert row["eval_reward" + end] == pytest.approx(want, rel=1e-5)
            model.autocast_dtype = begin.autocast_dtype = None
            torch.manual_seed(args.seed)
            tokenizer = plumbing.load_tokenizer(args.model)
            prompts = [x["prompt"] for x in rows]
            kl, _ = plumbing.kl_from_start(model, begin, tokenizer, prompts, 12, 8)
            assert row["eval_kl" + end] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-4)
    last = base.evals[-1]
    assert last["eval_kl"] > 0.01 and last["eval_kl"] != last["eval_kl_control"]


def test_metrics_of_a_verified_evaluation(small, tmp_path, tiny):
    """Some answers are the numbers that the untrained model writes last."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    rows, right = problems(40, 2), 0
    for row in rows:
        text = greedy(model, tiny, row["prompt"], 12)[0]
        last = plumbing.last_number(text)  # how it is read: test_numbers.py
        row["answer"] = "-99"
        if last is not None and last.denominator == 1 and row["number"] % 2:
            row["answer"] = str(last)
            right += 1
    path = write(tmp_path / "answered.jsonl", rows)
    seen = small(eval_dataset=path, reward="verifier", eval_size=99, train=False)
    assert 0 < right < 40
    assert seen.evals[0]["eval_accuracy"] == pytest.approx(right / 40, rel=1e-5)
    assert "eval_reward" not in seen.evals[0]


def test_metrics_of_time(small, monkeypatch):
    """The policy's tokens over the seconds of the step, on a clock that ticks when it is read."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    seen = small(rounds=1, eval_size=0, eval_dataset="")
    row, rows = seen.steps[1], trained(seen)["policy"][1]  # the first one samples as well
    _, _, tokens = plain_step(seen, seen.updates[0].weights, rows)
    assert tokens / row["tokens_per_second"] == pytest.approx(1, rel=1e-4)


def test_rounds_and_their_blocks_have_seeds_of_their_own(small, base, tmp_path):
    """Rounds draw other prompts, and other blind places; the same prompt gets other completions in
    each block of prompts, and in each round."""
    first, second = ({g["prompt"] for g in groups_of(base, i)} for i in range(2))
    assert first != second
    row = problems(1, 1)[0]
    same = write(tmp_path / "same.jsonl", [row] * 4)
    seen = small(dataset=same, num_prompts=4, learning_rate=0.0, eval_size=0, eval_dataset="")
    texts = [tuple(g["completions"]) for i in range(2) for g in groups_of(seen, i)]
    assert len(texts) == 8 == len(set(texts))
    other = small(num_prompts=12, learning_rate=0.0, eval_size=0, eval_dataset="")
    places = []
    for i in range(2):
        blind = {x[0]: x[1:] for x in sum(trained(other, i)["control"], [])}
        texts = [list(zip(g["completions"], g["ended"], strict=True)) for g in groups_of(other, i)]
        prompts = [g["prompt"] for g in groups_of(other, i)]
        places.append([t.index(blind[p]) for t, p in zip(texts, prompts, strict=True)])
    assert places[0] != places[1] and set(places[0]) == {0, 1, 2, 3}


def test_rounds_sample_from_the_policy(base):
    """Two prompts at a time, from the model that is trained; each prompt has its own texts."""
    calls = base.calls["generate"]
    assert len(calls) == 8  # blocks of 2, 2, 2 and 1 prompts, twice
    assert [len(x["prompts"]) for x, _ in calls] == [2, 2, 2, 1] * 2
    models = {id(arguments["model"]) for arguments, _ in calls}
    parameters = {id(p) for p in base.optimizers[0].param_groups[0]["params"]}
    assert len(models) == 1
    assert {id(p) for p in calls[0][0]["model"].parameters()} == parameters
    for i in range(2):
        sampled = [text for _, (_, texts, _) in calls[4 * i : 4 * i + 4] for text in texts]
        assert sampled == [text for group in groups_of(base, i) for text in group["completions"]]
        prompts = [prompt for x, _ in calls[4 * i : 4 * i + 4] for prompt in x["prompts"]]
        assert prompts == [group["prompt"] for group in groups_of(base, i)]


# --- Resume with a schedule -----------------------------------------------------------------------

PARTS = ["policy", "control"]
PARTS += [f"{model} {part}" for model in PARTS for part in ("optimizer", "scheduler")]


@pytest.fixture(scope="module")
def killed(small, tmp_path_factory):
    """Folder of a run of six steps that was killed in its fifth, before that was logged."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    rows = 1 + 1 + 3 + 3 + 1 + 1 + 3 + 1  # evaluation, round, curve, three steps; and again
    with observe.killed(plumbing.Run, "log", rows + 1):
        small(checkpoint_every=1, batch_size=5, output_dir=str(folder))
    return folder


@pytest.fixture(scope="module")
def unbroken(small):
    return small(checkpoint_every=1, batch_size=5)


@pytest.mark.parametrize("part", [None, *PARTS])
def test_resumed_with_a_schedule(unbroken, killed, tmp_path, part):
    """A run resumed in its second round is the unbroken one, unless a part is left out."""
    assert checkpoint_parts(killed) == set(PARTS)
    values = vars(unbroken.args) | {"output_dir": moved(killed, tmp_path / "run"), "resume": True}
    seen = resumed_without(rs, rs.Args(**values), part)
    assert (seen.untimed() == unbroken.untimed()) == (part is None)
    if part is None:
        one, two = unbroken.weights(), seen.weights()
        assert all(torch.equal(one[name], two[name]) for name in one)
        for name in ("candidates/0.jsonl", "candidates/1.jsonl", "samples.jsonl"):
            assert seen.read(name) == unbroken.read(name)


@pytest.mark.parametrize("lines, sampled", [(5, 3), (4, 3), (6, 1), (7, 0)])
def test_resumed_within_a_block(unbroken, killed, tmp_path, monkeypatch, lines, sampled):
    """A block of prompts of which only a part is there is sampled again, whole, with its seed; the
    last block has one prompt."""
    folder = tmp_path / "run"
    values = vars(unbroken.args) | {"output_dir": moved(killed, folder), "resume": True}
    seen, generate = [], rs.generate

    def noting(model, tokenizer, prompts, *rest):
        seen.extend(prompts)
        return generate(model, tokenizer, prompts, *rest)

    # as if it had been killed while it sampled for the first round
    shutil.rmtree(folder / "checkpoint")
    (folder / "candidates/1.jsonl").unlink()
    first = folder / "candidates/0.jsonl"
    whole = first.read_text()
    kept = whole.splitlines(keepends=True)
    first.write_text("".join(kept[:lines]) + kept[-1][:9] * (lines < 7))
    monkeypatch.setattr(rs, "generate", noting)
    resumed = resumed_without(rs, rs.Args(**values), None)
    assert first.read_text() == whole
    assert len(seen) == sampled + 7  # and those of the second round
    assert resumed.untimed() == unbroken.untimed()


# --- Flags ----------------------------------------------------------------------------------------

QUICK = dict(rounds=1, eval_size=0, eval_dataset="")


def flag_model(run, base, folder):
    """Weights of another folder: of both models, and of the start of the KL."""
    model = AutoModelForCausalLM.from_pretrained(base.args.model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "other")
    plumbing.load_tokenizer(base.args.model).save_pretrained(folder / "other")
    seen = run(model=str(folder / "other"), rounds=1)
    assert all(torch.equal(u.weights, weights_of(model)) for u in seen.updates[:2])
    assert seen.evals[0]["eval_kl"] == pytest.approx(0, abs=1e-4)
    assert seen.evals[0]["eval_reward"] == pytest.approx(
        greedy_reward(model, base.args.model, problems(5, 2)[:4], 12), rel=1e-5)  # fmt: skip


def flag_dataset(run, base, folder):
    seen = run(dataset=write(folder / "d.jsonl", problems(5, 7)), train=False, **QUICK)
    assert {g["prompt"] for g in groups_of(seen)} == {row["prompt"] for row in problems(5, 7)}
    assert {g["prompt"] for g in groups_of(base)} < {row["prompt"] for row in problems(12, 1)}
    refused(run(train=False, **QUICK).args, "exists")


def flag_eval_dataset(run, base, folder):
    """These rows; and without it, prompts of --dataset, which are not trained on."""
    seen = run(eval_dataset=write(folder / "e.jsonl", problems(3, 7)), rounds=1)
    model = model_with(base.args.model, end_weights(seen))
    want = greedy_reward(model, base.args.model, problems(3, 7), 12)
    assert seen.evals[-1]["eval_reward"] == pytest.approx(want, rel=1e-5)
    many = write(folder / "many.jsonl", problems(30, 7))
    seen = run(dataset=many, eval_dataset="", eval_size=2, num_prompts=99, train=False)
    held = [row["prompt"] for row in seen.arguments("greedy_rewards", "rows")[0]]
    sampled = [g["prompt"] for g in groups_of(seen)]
    assert len(held) == 2 and len(sampled) == 28
    assert {*held, *sampled} == {row["prompt"] for row in problems(30, 7)}


def flag_seed(run, base, folder):
    """Other prompts, other completions, other blind choices and order, other evaluation."""
    seen = run(seed=3)
    assert {g["prompt"] for g in groups_of(seen)} != {g["prompt"] for g in groups_of(base)}
    assert trained(seen)["policy"] == drawn(seen, best_of_each(groups_of(seen)), 0)
    mine, theirs = (run(seed=n, num_prompts=12, train=False, **QUICK) for n in (0, 3))
    texts = [{g["prompt"]: g["completions"] for g in groups_of(x)} for x in (mine, theirs)]
    assert all(texts[0][prompt] != texts[1][prompt] for prompt in texts[0])


def flag_reward(run, base, folder):
    """The opposite reward selects the worst; and evaluates with the opposite sign."""
    path = base.args.reward.replace(":f", ":negative")
    seen = run(reward=path, rounds=1)
    groups = groups_of(seen)
    assert [g["completions"] for g in groups] == [g["completions"] for g in groups_of(base)]
    for mine, theirs in zip(groups, groups_of(base), strict=True):
        assert mine["rewards"] == [-x for x in theirs["rewards"]]
    assert trained(seen)["policy"] == drawn(seen, best_of_each(groups), 0)
    assert trained(seen)["control"] == trained(base)["control"]  # it does not look at them
    assert seen.evals[0]["eval_reward"] == pytest.approx(-base.evals[0]["eval_reward"])


def flag_reward_model(run, base, folder):
    """A classifier's scores, of the candidates and of the greedy answers."""
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(base.args.model, num_labels=1)
    judge.save_pretrained(folder / "judge")
    plumbing.load_tokenizer(base.args.model).save_pretrained(folder / "judge")
    seen = run(reward_model=str(folder / "judge"), train=False)
    score = plumbing.load_reward("verifier", None, str(folder / "judge"), torch.device("cpu"))
    found = every(groups_of(seen))
    want = score([x[1] for x in found], [x[2] for x in found], [{"ended": x[3]} for x in found])
    assert [x[0] for x in found] == pytest.approx(want, rel=1e-3, abs=1e-4)
    assert "eval_reward" in seen.evals[0]


def flag_rounds(run, base, folder):
    seen = run(rounds=3, eval_size=0, eval_dataset="", control=False)
    assert len(seen.steps) == 6 and [row["round"] for row in rounds_of(seen)] == [0, 1, 2]
    assert len(list((seen.folder / "candidates").iterdir())) == 3 and len(base.steps) == 4


def flag_num_prompts(run, base, folder):
    for number, found in ((3, 3), (99, 12)):
        seen = run(num_prompts=number, train=False, **QUICK)
        assert len({g["prompt"] for g in groups_of(seen)}) == len(groups_of(seen)) == found


def flag_num_generations(run, base, folder):
    seen = run(num_generations=3, train=False, **QUICK)
    assert {len(g["completions"]) for g in groups_of(seen)} == {3}
    assert set(seen.arguments("generate", "num_generations")) == {3}


def others_file(folder):
    """Completions of another model, of which one was cut off."""
    two, five = (problems(12, 1)[i]["prompt"] for i in (2, 5))
    rows = [
        {"prompt": two, "completion": "0123456789"},  # without a word: it ended
        {"prompt": two, "completion": "11", "ended": False},
        {"prompt": five, "completion": "9876543210", "ended": False},
    ]
    return write(folder / "others.jsonl", rows)


def flag_completions(run, base, folder):
    """They join the sampled ones of their prompts, with rewards of the same kind and their ends."""
    path, rows = others_file(folder), problems(12, 1)
    seen = run(completions=path, num_prompts=12, **QUICK)
    groups = {g["prompt"]: g for g in groups_of(seen)}
    two, one = groups[rows[2]["prompt"]], groups[rows[5]["prompt"]]
    assert two["completions"][4:] == ["0123456789", "11"] and two["ended"][4:] == [True, False]
    assert one["completions"][4:] == ["9876543210"] and one["ended"][4:] == [False]
    assert two["rewards"][4:] == pytest.approx([10 + 0.5 + 0.02, 1 + 0.02])
    assert one["rewards"][4:] == pytest.approx([10 + 0.05])
    assert {len(g["rewards"]) for p, g in groups.items()} == {4, 5, 6}
    for name in ("policy", "control"):
        chosen = sum(trained(seen)[name], [])
        known = {x[1:] for x in every(groups_of(seen))}
        assert set(chosen) <= known and len(chosen) == 24
    is_the_plain_loop(seen, 0)
    row, found = rounds_of(seen)[0], every(groups_of(seen))
    assert row["reward"] == pytest.approx(sum(x[0] for x in found) / len(found), rel=1e-5)
    assert row["ended"] == pytest.approx(sum(x[3] for x in found) / len(found), rel=1e-5)


def flag_sample(run, base, folder):
    """The other models' candidates alone, of the prompts that have one."""
    seen = run(completions=others_file(folder), sample=False, **QUICK)
    assert seen.calls.get("generate", []) == []
    found = sorted(x[2] for x in every(groups_of(seen)))
    assert found == ["0123456789", "11", "9876543210"]
    chosen = set(sum(trained(seen)["policy"], []))
    prompts = [problems(12, 1)[i]["prompt"] for i in (2, 5)]
    assert chosen == {(prompts[0], "0123456789", True), (prompts[1], "9876543210", False)}
    is_the_plain_loop(seen, 0)


def flag_max_new_tokens(run, base, folder):
    seen = run(max_new_tokens=3, rounds=1)
    assert max(len(x[2]) for x in every(groups_of(seen))) == 3
    rows = problems(5, 2)[:4]
    want = greedy_reward(model_with(base.args.model, end_weights(seen)), base.args.model, rows, 3)
    assert seen.evals[-1]["eval_reward"] == pytest.approx(want, rel=1e-5)
    assert set(seen.arguments("kl_from_start", "max_new_tokens")) == {3}


def flag_temperature(run, base, folder):
    """Cold samples of a prompt are nearly one text; the greedy answers are as they were."""
    seen = run(temperature=0.01, train=False)
    many = [len(set(g["completions"])) for g in groups_of(seen)]
    assert sum(many) <= 1.5 * len(many)
    assert seen.evals[0]["eval_reward"] == base.evals[0]["eval_reward"]
    assert any(len(set(g["completions"])) > 1 for g in groups_of(base))


def flag_select(run, base, folder):
    """The four kinds; blind ones choose the same of opposite rewards."""
    opposite = base.args.reward.replace(":f", ":negative")
    for select in ("overall", "random-per-prompt", "random-overall"):
        seen = run(select=select, num_epochs=1, **QUICK)
        found = every(groups_of(seen))
        policy, control = (sum(trained(seen)[name], []) for name in ("policy", "control"))
        assert len(policy) == len(control) == 7
        if select == "overall":
            best = sorted(found, key=lambda x: -x[0])[:7]
            assert policy == sum(drawn(seen, [x[1:] for x in best], 0), [])
            assert sorted(policy) != sorted(control)
        else:
            other = run(select=select, num_epochs=1, reward=opposite, **QUICK)
            assert trained(other) == trained(seen)
            assert sorted(policy) != sorted(best_of_each(groups_of(seen)))
        if select == "random-per-prompt":
            prompts = sorted(g["prompt"] for g in groups_of(seen))
            assert sorted(x[0] for x in policy) == sorted(x[0] for x in control) == prompts
        for chosen in (policy, control):
            assert not set(chosen) - {x[1:] for x in found}
        rewards = {x[1:]: x[0] for x in found}
        row = rounds_of(seen)[0]
        for name, chosen in (("reward_selected", policy), ("reward_random", control)):
            assert row[name] == pytest.approx(sum(rewards[x] for x in chosen) / 7, rel=1e-5)


def flag_top_k(run, base, folder):
    """So many of all; as many as there are prompts without it; no meaning to per-prompt."""
    seen = run(select="overall", top_k=12, num_epochs=1, **QUICK)
    best = [x[1:] for x in sorted(every(groups_of(seen)), key=lambda x: -x[0])[:12]]
    assert trained(seen)["policy"] == drawn(seen, best, 0)
    control = sum(trained(seen)["control"], [])
    assert len(control) == 12 and len(seen.steps) == 2
    blind = run(select="random-overall", top_k=28, num_epochs=1, **QUICK)
    everything = sorted(x[1:] for x in every(groups_of(blind)))
    assert sorted(sum(trained(blind)["policy"], [])) == everything
    same = run(top_k=3, **QUICK)
    assert trained(same)["policy"] == trained(base)["policy"]


def flag_train(run, base, folder):
    """One round of candidates with its figures, and no step; the policy is not saved."""
    seen = run(train=False)
    assert seen.updates == [] and seen.steps == [] and not (seen.folder / "final").exists()
    assert len(rounds_of(seen)) == 1 and len(seen.evals) == 1
    assert groups_of(seen) == groups_of(base)
    assert "eval_reward_control" not in seen.evals[0]
    names = ("reward", "reward_selected", "best_of_n", "no_signal", "ended")
    for name in names:
        assert rounds_of(seen)[0][name] == rounds_of(base)[0][name]


def flag_control(run, base, folder):
    """Without it one model; what the policy does stays."""
    seen = run(control=False)
    assert len(seen.optimizers) == 1 and len(seen.updates) == 4
    assert not any("control" in name for row in seen.rows for name in row)
    for mine, theirs in zip(seen.untimed(), base.untimed(), strict=True):
        assert mine == {k: v for k, v in theirs.items() if "control" not in k}
    assert checkpoint_parts(seen.folder) == {"policy", "policy optimizer", "policy scheduler"}


def flag_num_epochs(run, base, folder):
    seen = run(num_epochs=3, batch_size=7, **QUICK)
    assert len(seen.steps) == 3
    parts = [sorted(step) for step in trained(seen)["policy"]]
    assert parts[0] == parts[1] == parts[2]
    assert trained(seen)["policy"][0] != trained(seen)["policy"][1]


def flag_batch_size(run, base, folder):
    seen = run(batch_size=4, **QUICK)
    assert [len(step) for step in trained(seen)["policy"]] == [4, 4, 4, 2]
    is_the_plain_loop(seen, 0)


def flag_micro_batch_size(run, base, folder):
    """No forward has more completions; of the same candidates the same metrics."""
    path = folder / "c.jsonl"
    rows = [{"prompt": p, "completion": text, "ended": ended}
            for _, p, text, ended in every(groups_of(base))]  # fmt: skip
    changes = dict(completions=write(path, rows), sample=False, num_epochs=1, **QUICK)
    seen, whole = run(micro_batch_size=3, **changes), run(micro_batch_size=99, **changes)
    sizes = [len(b.prompt_of) for b in seen.arguments("completion_logps", "batch")]
    assert max(sizes) == 3 and sum(sizes) == 14
    assert len(whole.arguments("completion_logps", "batch")) == 2
    observe.changes_nothing(seen, whole)
    small_blocks = run(micro_batch_size=4, train=False, **QUICK)
    assert [len(p) for p in small_blocks.arguments("generate", "prompts")] == [1] * 7


def test_each_of_several_processes_has_prompts_to_sample_for(tmp_path, monkeypatch):
    """With the defaults a micro-batch holds no more than one prompt's completions."""
    monkeypatch.setattr(rs, "process", lambda: (0, 3))
    changes = dict(micro_batch_size=4, num_generations=4, train=False)
    seen = observe.observe(rs, tiny_args(tmp_path, **changes))
    sizes = [len(p) for p in seen.arguments("generate", "prompts")]
    assert max(sizes) == 3 and min(sizes) > 0


def flag_lr_schedule(run, base, folder):
    """Both optimisers' rates of each step."""
    for schedule in ("constant", "cosine", "linear"):
        seen = base if schedule == "linear" else run(lr_schedule=schedule, eval_size=0)
        want = [plain.learning_rate(step, 0.02, schedule, 0, 4) for step in range(1, 5)]
        for optimizer in range(2):
            rates = [u.lr for u in seen.updates if u.optimizer == optimizer]
            assert rates == pytest.approx(want)
        assert [row["lr"] for row in seen.steps] == pytest.approx(want, rel=1e-5)


def flag_max_grad_norm(run, base, folder):
    """Of both models."""
    observe.flag_max_grad_norm(run, base, folder)
    seen = run(max_grad_norm=0.01, **QUICK)
    norms = [update.gradient.norm().item() for update in seen.updates]
    assert len(norms) == 4 and norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert seen.steps[0]["grad_norm"] == base.steps[0]["grad_norm"]


def flag_eval_size(run, base, folder):
    """First rows of --eval-dataset; none with 0."""
    seen = run(eval_size=2, rounds=1)
    assert all(rows == problems(5, 2)[:2] for rows in seen.arguments("greedy_rewards", "rows"))
    prompts = [row["prompt"] for row in problems(5, 2)[:2]]
    assert all(p == prompts for p in seen.arguments("kl_from_start", "prompts"))
    assert run(eval_size=0, rounds=1).evals == []


def flag_eval_every(run, base, folder):
    """After every so many steps, and after each round; each once."""
    seen = run(eval_every=3, batch_size=5, control=False)  # three steps a round
    assert [row["step"] for row in seen.evals] == [0, 3, 6]
    seen = run(eval_every=2, batch_size=5, control=False)
    assert [row["step"] for row in seen.evals] == [0, 2, 3, 4, 6]


def flag_log_samples(run, base, folder):
    """So many of the selected completions of each round, with their rewards; and so many of the
    policy's greedy answers at each evaluation."""
    for seen, count in ((run(log_samples=2), 2), (base, 3)):
        got = []
        for row in seen.samples:
            got.append((row["step"], row["prompt"], row["completion"], row["reward"]))
        answers = []
        for values, texts in seen.results("greedy_rewards")[::2]:  # the control's are between
            answers += list(zip(texts, values, strict=True))[:count]
        held_out = [(row["completion"], row["reward"]) for row in seen.held_out_samples]
        assert held_out == answers and len(answers) == count * len(seen.evals)
        assert len(got) == 2 * count
        for i in range(2):
            groups = groups_of(seen, i)
            for place, (prompt, text, _) in enumerate(best_of_each(groups)[:count]):
                best = pytest.approx(max(groups[place]["rewards"]), rel=1e-5)
                assert got[i * count + place] == (1 + 2 * i, prompt, text, best)


FLAGS = {
    "model": flag_model, "dataset": flag_dataset, "eval_dataset": flag_eval_dataset,
    "output_dir": observe.flag_output_dir, "resume": flag_resume,
    "overwrite": observe.flag_overwrite, "seed": flag_seed, "device": observe.flag_device,
    "dtype": observe.flag_dtype,
    "show_rows": observe.flag_show_rows,
    "gradient_checkpointing": observe.flag_gradient_checkpointing,
    "share_prompts": observe.flag_share_prompts, "reward": flag_reward,
    "reward_model": flag_reward_model, "rounds": flag_rounds, "num_prompts": flag_num_prompts,
    "num_generations": flag_num_generations, "completions": flag_completions,
    "sample": flag_sample, "max_new_tokens": flag_max_new_tokens,
    "temperature": flag_temperature, "select": flag_select, "top_k": flag_top_k,
    "train": flag_train, "control": flag_control, "num_epochs": flag_num_epochs,
    "batch_size": flag_batch_size, "micro_batch_size": flag_micro_batch_size,
    "learning_rate": observe.flag_learning_rate, "lora_rank": observe.flag_lora_rank,
    "shard": observe.flag_shard,
    "lr_schedule": flag_lr_schedule,
    "max_grad_norm": flag_max_grad_norm, "eval_size": flag_eval_size,
    "eval_every": flag_eval_every, "checkpoint_every": observe.flag_checkpoint_every,
    "log_samples": flag_log_samples,
}  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(small, base, tmp_path, flag):
    """The flag changes what its help says."""
    FLAGS[flag](small, base, tmp_path)


def test_flags_are_all_looked_at():
    observe.has_every_flag(rs, FLAGS)


def test_flags_by_default():
    """The values of the papers, and those that the help names."""
    args = rs.Args(model="m", dataset="d")
    want = dict(
        reward="verifier", reward_model="", rounds=1, num_prompts=1024, num_generations=16,
        completions="", sample=True, max_new_tokens=256, temperature=1.0, select="per-prompt",
        top_k=0, train=True, control=True, num_epochs=2, batch_size=32, micro_batch_size=8,
        learning_rate=5e-6, lr_schedule="linear", max_grad_norm=1.0, eval_size=64, eval_every=100,
        checkpoint_every=50, log_samples=4, seed=0, device="auto", dtype="auto",
        show_rows=0, resume=False,
        overwrite=False, gradient_checkpointing=False, share_prompts=True,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in want} == want


def test_learning_as_a_user_would(tmp_path):
    """`python rejection_sampling.py` on fewer prompts: far above its blind control."""
    command = [sys.executable, ROOT / "rejection_sampling.py", "--output-dir", tmp_path / "run"]
    command += ["--num-prompts", "250", "--eval-size", "100"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    before, after = (row for row in rows if "eval_accuracy" in row)
    assert before["eval_accuracy"] < 0.55
    assert after["eval_accuracy"] > 0.7 and after["eval_accuracy_control"] < 0.6
    assert before["eval_kl"] == pytest.approx(0, abs=1e-3) and 0.05 < after["eval_kl"] < 5
