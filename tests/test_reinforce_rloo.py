"""reinforce_rloo.py against hand values, enumeration, plain loops, and learning on the toy."""

import json
import plumbing
import subprocess
import sys

import observe
import plain
import policy_gradient
import pytest
import torch
from conftest import ROOT

import reinforce_rloo as rr

pytestmark = [pytest.mark.usefixtures("no_picture"), pytest.mark.filterwarnings("ignore:over 20")]

BASELINES = ["none", "batch", "moving", "rloo", "remax"]


def tiny_args(tmp_path, **changes):
    """Args of a short run on the toy."""
    values = rr.TOY | dict(
        model=str(ROOT / "toy/model"), dataset=str(ROOT / "toy/problems_train.jsonl"),
        eval_dataset="", eval_size=0, num_steps=2, num_prompts=4, num_generations=4,
        micro_batch_size=16, output_dir=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    return rr.Args(**values | changes)


def quick_args(tmp_path, tiny, **changes):
    """The same with a random model, few rows, and a reward of more than two values."""
    (tmp_path / "kinds.py").write_text(
        "def f(p, c, r):\n    return [float(len(set(text))) for text in c]"
    )
    few = policy_gradient.write_rows(tmp_path / "few.jsonl", policy_gradient.problems(12, 100))
    quick = dict(model=tiny, dataset=few, max_new_tokens=14, reward=f"{tmp_path}/kinds.py:f")
    return tiny_args(tmp_path, **quick | changes)


def run(args):
    """Train -> rows of metrics."""
    rr.main(args)
    with open(f"{args.output_dir}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


# --- The algorithm --------------------------------------------------------------------------------


def test_rloo_by_hand():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    want = torch.tensor([-8 / 3, -4 / 3, 0.0, 4.0])
    assert torch.allclose(rr.rloo_advantages(rewards, 4), want, atol=1e-6)
    centred = rewards - rewards.mean()
    assert torch.allclose(rr.rloo_advantages(rewards, 4), 4 / 3 * centred, atol=1e-6)


def test_rloo_leaves_one_out_of_its_own_prompt():
    """A plain loop over two prompts whose rewards are far apart."""
    rewards = [0.0, 1.0, 5.0, 100.0, 102.0, 107.0]
    want = []
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j // 3 == i // 3 and j != i]
        want.append(r - sum(others) / len(others))
    assert rr.rloo_advantages(torch.tensor(rewards), 3).tolist() == pytest.approx(want)


def test_baselines_by_hand():
    rewards, greedy = torch.tensor([1.0, 3.0, 0.0, 4.0]), torch.tensor([1.0, 2.0])
    want = {
        "none": [1, 3, 0, 4], "batch": [-1, 1, -2, 2], "moving": [0.5, 2.5, -0.5, 3.5],
        "rloo": [-2, 2, -4, 4], "remax": [0, 2, -2, 2],
    }  # fmt: skip
    for baseline, values in want.items():
        got = rr.baseline_advantages(rewards, 2, baseline, 0.5, greedy)
        assert got.tolist() == values, baseline


def test_the_moving_average_by_hand():
    average = rr.MovingAverage(0.9)
    assert average.value == 0
    for value, want in ((2.0, 2.0), (4.0, 2.2), (0.0, 1.98)):
        average.update(value)
        assert average.value == pytest.approx(want)


def test_reward_to_go_equals_a_loop():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    got = rr.reward_to_go(torch.tensor([2.0, -1.0]), mask, 0.5)
    want = torch.zeros(2, 4)
    for i, (last, reward) in enumerate([(2, 2.0), (3, -1.0)]):
        for t in range(last + 1):
            rewards = [reward if k == last else 0.0 for k in range(last + 1)]
            want[i, t] = sum(0.5 ** (k - t) * rewards[k] for k in range(t, last + 1))
    assert torch.equal(got, want)
    assert torch.equal(rr.reward_to_go(torch.tensor([2.0, -1.0]), mask, 1.0)[:, 0],
                       torch.tensor([2.0, -1.0]))  # fmt: skip


def test_the_loss_by_hand_and_its_gradient():
    logps = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, -0.5, -1.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    advantages = rr.reward_to_go(torch.tensor([2.0, -1.0]), mask, 1.0)
    loss = rr.reinforce_loss(logps, advantages, mask)
    assert loss.item() == pytest.approx((2 * 3 - 2) / 2)  # -(2 * -3) and -(-1 * -2)
    loss.backward()
    assert logps.grad.tolist() == [[-1, -1, 0], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_expected_gradient_is_the_same_under_every_baseline(baseline):
    """Two tokens, two completions a prompt, one prompt: all 4 draws, weighted by their chance."""
    logits = torch.tensor([0.3, -0.4], requires_grad=True)
    reward = torch.tensor([1.0, 5.0])
    true = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)[0]
    expected = torch.zeros(2)
    for a in (0, 1):
        for b in (0, 1):
            logps = logits.log_softmax(0)
            chance = (logps[a] + logps[b]).exp().item()
            drawn = torch.tensor([a, b])
            advantages = rr.baseline_advantages(
                reward[drawn], 2, baseline, moving=2.0, greedy=reward[:1]
            )
            one = torch.ones(2, 1, dtype=torch.bool)
            tokens = rr.reward_to_go(advantages, one, 1.0)
            loss = rr.reinforce_loss(logps[drawn][:, None], tokens, one)
            gradient = -torch.autograd.grad(loss, logits)[0]
            expected += chance * gradient
    share = 1 / 2 if baseline == "batch" else 1.0  # its own reward is half of the mean
    assert torch.allclose(expected, share * true, atol=1e-6)


def test_a_baseline_lowers_the_variance():
    rewards = 5 + torch.randn(400, generator=torch.manual_seed(0))
    size = [(rr.baseline_advantages(rewards, 4, b, 5.0) ** 2).mean() for b in ("none", "rloo")]
    assert size[0] > 15 * size[1]


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_gradient_is_that_of_the_textbook(tmp_path, temperature):
    """One step of main from the first weights, beside a loop over single sequences, plain RLOO."""
    args = tiny_args(tmp_path, num_steps=1, beta=0.0, learning_rate=0.0, temperature=temperature)
    row = run(args)[0]
    torch.manual_seed(args.seed)
    tokenizer = rr.load_tokenizer(args.model)
    policy = rr.load_model(rr.AutoModelForCausalLM, args.model, torch.device("cpu"))
    drawn = rr.random.Random(f"{args.seed} 1").sample(plumbing.load_rows(args.dataset), 4)
    prompts = [r["prompt"] for r in drawn]
    batch, texts, _ = rr.generate(policy, tokenizer, prompts, 4, args.max_new_tokens, temperature)
    right = [float(t.split("\n")[-1] == drawn[i // 4]["answer"]) for i, t in enumerate(texts)]
    loss = 0.0
    for i in range(len(texts)):
        others = [right[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        prompt = batch.prompt_ids[i // 4][batch.prompt_mask[i // 4]].tolist()
        ids = batch.completion_ids[i][batch.completion_mask[i]].tolist()
        logp = (policy(torch.tensor([prompt + ids])).logits[0] / temperature).log_softmax(-1)
        chosen = sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(ids))
        loss = loss - (right[i] - sum(others) / 3) * chosen / 16
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    assert row["grad_norm"] == pytest.approx(want, rel=1e-3) and want > 0
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert row["reward"] == pytest.approx(sum(right) / 16)


@pytest.mark.parametrize("changes", [{}, dict(share_prompts=False)])
def test_micro_batches_and_shared_prompts_change_nothing(tmp_path, tiny, changes):
    same = dict(num_steps=1, beta=0.1, learning_rate=0.0)
    whole = run(quick_args(tmp_path, tiny, **same))[0]
    folder = str(tmp_path / "b")
    split = quick_args(tmp_path, tiny, micro_batch_size=3, output_dir=folder, **same, **changes)
    split = run(split)[0]
    assert whole["grad_norm"] > 0
    for name in ("loss", "grad_norm", "entropy", "kl"):
        assert split[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


def test_the_kl_costs_reward(tmp_path, tiny, monkeypatch):
    """From its second step on the policy has left the reference; the rewards fall by beta KL."""
    seen, advantages = [], rr.baseline_advantages
    monkeypatch.setattr(rr, "baseline_advantages",
                        lambda *a: seen.append(a[0].mean().item()) or advantages(*a))  # fmt: skip
    changes = dict(reward=reward_file(tmp_path), learning_rate=1e-3, baseline="none")
    rows = run(quick_args(tmp_path, tiny, beta=10.0, **changes))
    assert abs(rows[1]["kl"]) > 1e-3
    per_step = len(seen) // 2
    for row, reward in zip(rows, seen[::per_step], strict=True):
        assert reward == pytest.approx(1 - 10 * row["kl"], rel=1e-3, abs=1e-3)
    assert "kl" not in run(quick_args(tmp_path, tiny, beta=0.0, overwrite=True, **changes))[0]


def reward_file(tmp_path):
    """A reward of 1 for all."""
    (tmp_path / "one.py").write_text("def f(p, c, r):\n    return [1.0] * len(c)")
    return f"{tmp_path}/one.py:f"


@pytest.mark.parametrize("penalty", [None, 2.0])
def test_the_penalty_of_completions_that_were_cut_off(tmp_path, monkeypatch, penalty):
    """Of sampled and of greedy ones alike; without it the reward is heard, and told which ended."""
    (tmp_path / "told.py").write_text(
        "def f(p, c, rows):\n    return [1 + float(row['ended']) for row in rows]"
    )
    seen, baseline, made, generate = [], rr.baseline_advantages, [], rr.generate
    monkeypatch.setattr(rr, "baseline_advantages", lambda *a: seen.append(a) or baseline(*a))
    monkeypatch.setattr(rr, "generate", lambda *a, **b: made.append(generate(*a, **b)) or made[-1])
    changes = dict(reward=f"{tmp_path}/told.py:f", missing_eos_penalty=penalty, baseline="remax")
    row = run(tiny_args(tmp_path, num_steps=1, max_new_tokens=34, beta=0.0, **changes))[0]
    cut = 1.0 if penalty is None else -penalty
    for (_, _, ended), scores in zip(made, (seen[0][0], seen[0][4]), strict=True):
        assert scores.tolist() == [2.0 if e else cut for e in ended.tolist()]
        assert 0 < ended.float().mean() < 1
    assert row["reward"] == pytest.approx(seen[0][0].mean().item())


def test_equal_rewards_move_nothing_under_rloo(tmp_path, tiny):
    rows = run(quick_args(tmp_path, tiny, beta=0.0, reward=reward_file(tmp_path)))
    assert all(row["grad_norm"] == 0 and "gold_reward" in row for row in rows)


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_runs_and_is_logged(tmp_path, tiny, baseline):
    rows = run(quick_args(tmp_path, tiny, baseline=baseline, gamma=0.99))
    names = {"none", "batch", "moving", "rloo"} | {baseline}
    assert {k for k in rows[1] if "_ms_" in k} == {f"advantage_ms_{b}" for b in names}
    assert rows[0]["advantage_ms_moving"] == rows[0]["advantage_ms_none"]
    assert rows[1]["advantage_ms_moving"] != rows[1]["advantage_ms_none"]
    assert rows[0]["grad_norm"] > 0


# --- A recorded run beside a plain loop -----------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs of reinforce_rloo with the random model; runs(**changes) -> what one did."""
    return policy_gradient.Runs(rr, tmp_path_factory.mktemp("reinforce"), tiny, beta=0.1)


@pytest.fixture(scope="module")
def base(runs):
    return runs()


def plain_baseline(baseline, rewards, i, G, moving, greedy):
    """What is subtracted from the reward of completion i."""
    if baseline == "none":
        return 0.0
    if baseline == "batch":
        return sum(rewards) / len(rewards)
    if baseline == "moving":
        return moving
    if baseline == "remax":
        return greedy[i // G]
    first = i // G * G
    others = [rewards[j] for j in range(first, first + G) if j != i]
    return sum(others) / len(others)


def greedy_scores(seen, step, call):
    """Scores of the greedy completions of a step's prompts; the reward was told of each."""
    args = seen.args
    drawn = policy_gradient.drawn_rows(args, step)
    texts, ended = policy_gradient.greedy_rows(seen, step - 1, drawn)
    assert call["prompts"] == [row["prompt"] for row in drawn]
    assert call["completions"] == texts
    want = [row | {"ended": end} for row, end in zip(drawn, ended, strict=True)]
    assert observe.without_raw(call["rows"]) == want
    scores = []
    for value, end in zip(call["values"], ended, strict=True):
        if args.missing_eos_penalty is not None and not end:
            value = -args.missing_eos_penalty
        scores.append(value)
    return scores


def plain_advantages(args, rows, moving, greedy):
    """-> advantages of the completions by each baseline, the mean of the rewards less the KL."""
    rewards = []
    for row in rows:
        cost = 0.0
        if args.beta:
            cost = args.beta * (row.old - row.ref).sum().item()
        rewards.append(row.value - cost)
    baselines = ["none", "batch", "moving"]
    if args.num_generations > 1:
        baselines.append("rloo")
    if args.baseline == "remax":
        baselines.append("remax")
    advantages = {}
    for baseline in baselines:
        of_each = []
        for i, reward in enumerate(rewards):
            less = plain_baseline(baseline, rewards, i, args.num_generations, moving, greedy)
            of_each.append(reward - less)
        advantages[baseline] = of_each
    return advantages, sum(rewards) / len(rewards)


def plain_loss(args, policy, rows, advantages):
    """-1/R sum_i sum_t gamma^(tokens after t) A_i log pi."""
    loss = 0.0
    for row, advantage in zip(rows, advantages, strict=True):
        logps = plain.token_logps(policy, row.prompt, row.completion, args.temperature)
        last = len(row.completion) - 1
        for t in range(last + 1):
            loss = loss - advantage * args.gamma ** (last - t) * logps[t] / len(rows)
    return loss


def every_completion_once(seen, steps):
    """What went through the policy in each step: its completions, at most a micro-batch at once."""
    left = []
    for batch in seen.arguments("completion_logps", "batch"):
        left += [plain.unpadded(batch)]
        assert len(left[-1]) <= seen.args.micro_batch_size
    for rows in steps:
        forwarded = []
        while len(forwarded) < len(rows):
            forwarded += left.pop(0)
        assert sorted(forwarded) == sorted((row.prompt, row.completion) for row in rows)
    assert left == []


def plain_run(seen):
    """Train on a recorded run's completions -> metrics of each step, rows of each, the trainer."""
    args = seen.args
    remax = args.baseline == "remax"
    calls = policy_gradient.calls_of(seen, greedy=remax)
    trainer = policy_gradient.Trainer(seen)
    metrics = []
    steps = []
    moving = 0.0
    greedy = None
    for step in range(1, args.num_steps + 1):
        rows = policy_gradient.rows_of_step(seen, step, calls["train", step], 1 + remax)
        policy_gradient.set_fixed(args, rows, trainer.model, seen.reference)
        if remax:
            greedy = greedy_scores(seen, step, calls["greedy", step])
        advantages, average = plain_advantages(args, rows, moving, greedy)
        loss = plain_loss(args, trainer.model, rows, advantages[args.baseline])
        wanted = {"loss": loss.item(), "grad_norm": trainer.step(loss), "lr": trainer.rates[-1]}
        for baseline, values in advantages.items():
            square = sum(value**2 for value in values) / len(values)
            wanted[f"advantage_ms_{baseline}"] = square
        decay = args.moving_decay
        if step == 1:
            decay = 0.0
        moving = decay * moving + (1 - decay) * average
        metrics.append(wanted | policy_gradient.shared_metrics(args, rows))
        steps.append(rows)
    every_completion_once(seen, steps)
    return metrics, steps, trainer


def by_hand(seen):
    """Everything that a run logged and did is a plain loop's."""
    metrics, steps, trainer = plain_run(seen)
    for row, wanted in zip(seen.steps, metrics, strict=True):
        policy_gradient.same_metrics(row, wanted)
    policy_gradient.same_training(seen, trainer)
    calls = policy_gradient.calls_of(seen, greedy=seen.args.baseline == "remax")
    policy_gradient.check_samples(seen, steps, calls)
    return metrics


CASES = {
    "rloo": dict(gamma=0.9, lr_schedule="linear", eval_every=1),
    "none": dict(baseline="none", gamma=0.95, temperature=0.7, max_grad_norm=0.5),
    "batch": dict(baseline="batch", beta=0.0, lr_schedule="cosine", num_generations=4),
    "moving": dict(baseline="moving", gamma=0.9, moving_decay=0.6, beta=0.3),
    "remax": dict(baseline="remax", gamma=0.9, missing_eos_penalty=1.5, num_steps=2),
    "remax, no penalty": dict(baseline="remax", num_prompts=5, beta=0.5, num_steps=2),
    "one a prompt": dict(baseline="batch", num_generations=1, num_prompts=7, num_steps=2),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request, runs):
    """A run, and what a plain loop over single rows, with an AdamW of its own, makes of it."""
    seen = runs(**request.param)
    return seen, *plain_run(seen)


def test_every_metric_is_a_plain_loops(case):
    seen, metrics, _, _ = case
    for row, wanted in zip(seen.steps, metrics, strict=True):
        policy_gradient.same_metrics(row, wanted)
    assert any(0 < row["ended"] < 1 for row in seen.steps)
    assert all(row["grad_norm"] > 0.1 and row["reward_std"] > 0.1 for row in seen.steps)


def test_every_update_is_a_plain_loops(case):
    seen, _, _, trainer = case
    policy_gradient.same_training(seen, trainer)


def test_evaluations_and_samples_are_a_plain_loops(case):
    seen, _, steps, _ = case
    calls = policy_gradient.calls_of(seen, greedy=seen.args.baseline == "remax")
    policy_gradient.check_evaluations(seen, calls)
    policy_gradient.check_samples(seen, steps, calls)


def test_the_reference_stays_and_the_last_policy_is_saved(base, tiny):
    start = rr.load_model(rr.AutoModelForCausalLM, tiny, torch.device("cpu"))
    assert torch.equal(base.updates[0].weights, observe.flat(start.parameters()))
    noise = torch.Generator().manual_seed(7)
    for p in start.parameters():
        p.data += 0.03 * torch.randn(p.shape, generator=noise)
    policy, reference = base.results("load_model")
    end = policy_gradient.end_weights(base)
    assert torch.equal(observe.flat(reference.parameters()), observe.flat(start.parameters()))
    assert torch.equal(observe.flat(policy.parameters()), end)
    saved = rr.load_model(rr.AutoModelForCausalLM, base.folder / "final", torch.device("cpu"))
    assert torch.equal(observe.flat(saved.parameters()), end)
    assert rr.load_tokenizer(base.folder / "final").chat_template


def test_without_a_reference_there_is_one_forward_of_each(runs):
    """The log-probs of the entropy are the training forward's own."""
    seen = runs(beta=0.0, num_steps=1)
    assert len(seen.results("load_model")) == 1 and seen.results("fixed_logps") == []
    assert len(runs(num_steps=1).results("fixed_logps")) == 2


def test_speed_is_that_of_each_step(runs):
    policy_gradient.check_speed(runs)


def test_gold_reward_beside_a_reward_of_the_opposite(runs, base, tmp_path):
    policy_gradient.check_gold(runs, base, tmp_path)


def test_what_is_shown_while_it_runs(runs, capsys):
    runs(num_steps=1)
    policy_gradient.check_output(capsys.readouterr().out)


# --- Resuming -------------------------------------------------------------------------------------

SCHEDULE = dict(lr_schedule="linear", num_steps=4, eval_every=2, baseline="moving")


@pytest.fixture(scope="module")
def unbroken(runs):
    return runs(**SCHEDULE)


@pytest.fixture(scope="module")
def killed(runs, tmp_path_factory):
    return policy_gradient.Killed(runs, tmp_path_factory.mktemp("killed"), **SCHEDULE)


def test_a_resumed_run_is_the_unbroken_one(killed, unbroken):
    got = killed.resume()
    assert policy_gradient.same_run(got, unbroken)
    assert [u.lr for u in got.updates] == [u.lr for u in unbroken.updates[2:]]
    assert [row["step"] for row in got.evals] == [0, 2, 4]


PARTS = ["policy", "optimizer", "scheduler", "moving", "torch", "random"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_checkpoint_is_needed(killed, unbroken, part):
    """With one part as it was a step before, the resumed run is another one."""
    assert not policy_gradient.same_run(killed.resume(part), unbroken)


# --- Flags ----------------------------------------------------------------------------------------


def other_than(base, got, *names):
    """These metrics of the first step differ from the base run's; what was sampled does not."""
    assert got.steps[0]["reward"] == base.steps[0]["reward"]
    for name in names:
        assert got.steps[0][name] != pytest.approx(base.steps[0][name], rel=1e-3, abs=1e-6), name


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
    zero = run(missing_eos_penalty=0.0, num_steps=1)
    assert by_hand(zero)[0]["reward"] != pytest.approx(base.steps[0]["reward"])


def flag_temperature(run, base, folder):
    """Of sampling and of the log-probs of policy and reference."""
    got = run(temperature=0.5, num_steps=1)
    assert set(got.arguments("generate", "temperature")) == {0.5}
    told = got.arguments("completion_logps", "temperature")
    assert set(told + got.arguments("fixed_logps", "temperature")) == {0.5}
    by_hand(got)
    observe.refused(run, "--temperature 0", "sampled", temperature=0.0)


def flag_num_generations(run, base, folder):
    """So many completions of each prompt; one alone has no others to be compared with."""
    policy_gradient.flag_num_generations(run, base, folder)
    alone = run(num_generations=1, baseline="none", num_steps=1)
    by_hand(alone)
    assert "advantage_ms_rloo" not in alone.steps[0]


def flag_baseline(run, base, folder):
    for baseline in ("none", "batch", "remax"):
        got = run(baseline=baseline, num_steps=1)
        by_hand(got)
        other_than(base, got, "loss", "grad_norm")
    assert run(baseline="rloo").untimed() == base.untimed()


def flag_moving_decay(run, base, folder):
    """Its own share of the next average: 0 is the last step's mean alone."""
    got = run(moving_decay=0.0, baseline="moving")
    high = run(moving_decay=0.95, baseline="moving")
    by_hand(high)
    low_square = got.steps[2]["advantage_ms_moving"]
    assert low_square != pytest.approx(high.steps[2]["advantage_ms_moving"])


def flag_gamma(run, base, folder):
    got = run(gamma=0.5, num_steps=1)
    other_than(base, got, "loss", "grad_norm")
    assert got.steps[0]["advantage_ms_rloo"] == base.steps[0]["advantage_ms_rloo"]
    by_hand(got)


def flag_beta(run, base, folder):
    """Weight of the KL in the reward; with 0 no reference is loaded."""
    got = run(beta=2.0, num_steps=1)
    other_than(base, got, "loss", "grad_norm", "advantage_ms_none")
    by_hand(got)
    none = run(beta=0.0, num_steps=1)
    by_hand(none)
    assert len(none.results("load_model")) == 1 and "kl" not in none.steps[0]


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
    "num_steps": policy_gradient.flag_num_steps,
    "num_prompts": policy_gradient.flag_num_prompts,
    "num_generations": flag_num_generations,
    "generation_batch_size": observe.flag_generation_batch_size,
    "max_new_tokens": policy_gradient.flag_max_new_tokens,
    "temperature": flag_temperature,
    "micro_batch_size": policy_gradient.flag_micro_batch_size,
    "learning_rate": observe.flag_learning_rate,
    "lora_rank": observe.flag_lora_rank,
    "shard": observe.flag_shard,
    "lr_schedule": policy_gradient.flag_lr_schedule,
    "max_grad_norm": observe.flag_max_grad_norm,
    "baseline": flag_baseline,
    "moving_decay": flag_moving_decay,
    "gamma": flag_gamma,
    "beta": flag_beta,
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
    observe.has_every_flag(rr, FLAGS)


def test_defaults():
    """Those of RLOO where the help says so, and what a machine at home can bear."""
    policy_gradient.the_same_defaults(
        rr,
        dict(
            eval_dataset="", output_dir="runs/reinforce_rloo", resume=False, overwrite=False,
            seed=0, device="auto", dtype="auto",
            show_rows=0, gradient_checkpointing=False, share_prompts=True,
            reward="verifier", reward_model="", missing_eos_penalty=None, num_steps=200,
            num_prompts=64, num_generations=4, max_new_tokens=256, temperature=1.0,
            micro_batch_size=8, learning_rate=1e-6, lr_schedule="constant", max_grad_norm=1.0,
            baseline="rloo", moving_decay=0.9, gamma=1.0, beta=0.05, eval_size=64, eval_every=50,
            checkpoint_every=50, log_samples=4,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("The answer is 42", "42", 1), ("41", "42", 0), ("", "42", 0), ("7, then 42.", "42", 1),
        ("42 or 7", 42, 0), ("-42", "42", 0), ("1,234", "1234", 1), ("1234", "1,234", 1),
        ("3.50", "3.5", 1),
    ],
)  # fmt: skip
def test_verifier(text, answer, right):
    rows = [{"answer": "0"}, {"answer": answer}]
    assert rr.verifier(["p", "p"], ["1", text], rows) == [0.0, right]


# --- Learning -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_learning_as_a_user_would(tmp_path):
    """`python reinforce_rloo.py`, fewer steps; greedy accuracy starts below 0.65."""
    command = [sys.executable, ROOT / "reinforce_rloo.py", "--output-dir", tmp_path / "run"]
    command += ["--num-steps", "12", "--eval-every", "12", "--eval-size", "100"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    accuracy = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    assert accuracy[0] < 0.65 and accuracy[-1] > 0.75
    for name in ("args.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "final"):
        assert (tmp_path / "run" / name).exists(), name
    names = {"reward", "reward_std", "kl", "kl_per_token", "entropy", "completion_length", "ended",
             "loss", "grad_norm", "lr", "tokens_per_second", "seconds", "step"}  # fmt: skip
    assert names <= set(rows[1])
