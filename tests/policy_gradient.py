"""What the tests of grpo.py and reinforce_rloo.py share: rows, a reward that writes down what it is
asked, what a recorded step was made of, and checks of the flags that both scripts have."""

import inspect
import itertools
import json
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import plain
import plumbing
import pytest
import torch
from conftest import ROOT, other_weights
from observe import changes_nothing, observe, refused, without_raw
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

REWARD = '''
"""Rewards that write down each call: what they were asked, and what they said."""
import json
import random
from pathlib import Path


def note(prompts, completions, rows, values):
    line = dict(prompts=prompts, completions=completions, rows=rows, values=values)
    with open(Path(__file__).with_suffix(".jsonl"), "a") as file:
        file.write(json.dumps(line) + "\\n")
    return values


def value_of(i, text, row):
    """One value for rows of the kind `equal`, 0, 1, 2 in turn for `levels`, many for others."""
    if row["kind"] == "equal":
        return 0.3
    if row["kind"] == "levels":
        return float(i % 3)
    return len(set(text)) / 4 + 0.5 * row["ended"] + random.random() / 10


def mixed(prompts, completions, rows):
    values = []
    for i, text in enumerate(completions):
        values.append(value_of(i, text, rows[i]))
    return note(prompts, completions, rows, values)


def negative(prompts, completions, rows):
    values = [-float(len(text)) for text in completions]
    return note(prompts, completions, rows, values)


def of_steps(prompts, completions, rows, separator):
    values = []
    for i, text in enumerate(completions):
        steps = [step for step in text.split(separator) if step.strip()]
        values.append([value_of(i + k, step, rows[i]) for k, step in enumerate(steps)])
    return note(prompts, completions, rows, values)


def lines(prompts, completions, rows):
    return of_steps(prompts, completions, rows, "\\n")


def summands(prompts, completions, rows):
    return of_steps(prompts, completions, rows, "+")


def wrong(prompts, completions, rows):
    """The opposite of the verifier: 1 where the last number is not the answer."""
    values = []
    from plumbing import last_number
    for text, row in zip(completions, rows, strict=True):
        values.append(1.0 - float(last_number(text) == int(row["answer"])))
    return note(prompts, completions, rows, values)
'''


@dataclass
class Row:
    """One completion of a step, and what a plain loop finds out about it."""

    prompt: list  # ids
    completion: list  # ids
    text: str
    ended: bool
    row: dict  # of the data
    value: object  # the reward: a number, or a list of them
    group: int  # which of the step's prompts
    old: torch.Tensor = None  # log-probs under the policy that sampled (T,)
    ref: torch.Tensor = None  # and under the reference
    advantages: torch.Tensor = None  # of its tokens (T,)


def problems(number, first):
    """Rows with prompts of several lengths, no two alike, an answer, and a kind."""
    rows = []
    for i in range(first, first + number):
        prompt = f"{i}+" + "12345"[: i % 5] + "="
        kind = ["many", "equal", "many", "levels"][i % 4]
        rows.append({"prompt": prompt, "answer": "7", "kind": kind, "number": i})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class Runs:
    """Runs of a script in folders of their own, all with one reward file; run(**changes) -> Seen
    with `asked`, the calls of the reward, and `reference`, which has weights of its own."""

    def __init__(self, script, folder, model, one_update=None, **values):
        self.script = script
        self.one_update = one_update or {}  # flags with which one prompt is enough
        self.folder = folder
        self.count = 0
        (folder / "reward.py").write_text(REWARD)
        self.values = dict(
            model=model, dataset=write_rows(folder / "train.jsonl", problems(24, 100)),
            eval_dataset=write_rows(folder / "held_out.jsonl", problems(7, 1000)),
            reward=f"{folder / 'reward.py'}:mixed", device="cpu", num_steps=3, num_prompts=4,
            num_generations=3, max_new_tokens=14, micro_batch_size=5, learning_rate=2e-3,
            eval_size=5, eval_every=50, log_samples=4,
        ) | values  # fmt: skip

    def args(self, **changes):
        self.count += 1
        here = dict(output_dir=str(self.folder / f"{self.count}" / "run"))
        return self.script.Args(**self.values | here | changes)

    def __call__(self, **changes):
        log = self.folder / "reward.jsonl"
        log.unlink(missing_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            signature = inspect.signature(self.script.load_model)
            loaded = other_weights(self.script, patch)
            self.script.load_model.__signature__ = signature  # arguments are noted by name
            seen = observe(self.script, self.args(**changes))
        seen.asked = read_rows(log) if log.exists() else []
        seen.reference = None
        if len(loaded) > 1:
            seen.reference = loaded[1]
        return seen


# --- What a recorded run was made of --------------------------------------------------------------


def model_with(folder, weights):
    """The model of a folder with these weights, flat as observe.py keeps them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.nn.utils.vector_to_parameters(weights.clone(), model.parameters())
    return model


def end_weights(seen):
    """The policy's weights after the last step, flat."""
    group = seen.optimizers[0].param_groups[0]
    return torch.cat([p.detach().flatten() for p in group["params"]])


def weights_after(seen, step):
    """The policy's weights after this many steps, flat."""
    number = step * len(seen.updates) // seen.args.num_steps
    if number == len(seen.updates):
        return end_weights(seen)
    return seen.updates[number].weights


def evaluated_steps(args):
    steps = {0, args.num_steps}
    for step in range(1, args.num_steps):
        if step % args.eval_every == 0:
            steps.add(step)
    return steps


def held_out(args):
    return read_rows(args.eval_dataset)[: args.eval_size]


def calls_of(seen, greedy=False):
    """The reward's calls in the order in which they must come -> {("train", 1): call, ...}; those
    of an evaluation, of num_prompts * num_generations rows at most, are put together."""
    args = seen.args
    left = list(seen.asked)
    calls = {}
    for step in range(args.num_steps + 1):
        if step:
            calls["train", step] = left.pop(0)
        if step and greedy:
            calls["greedy", step] = left.pop(0)
        if step in evaluated_steps(args):
            whole = dict(prompts=[], completions=[], rows=[], values=[])
            while len(whole["values"]) < len(held_out(args)):
                part = left.pop(0)
                assert len(part["values"]) <= args.num_prompts * args.num_generations
                for name in whole:
                    whole[name] += part[name]
            calls["eval", step] = whole
    assert left == []
    return calls


def drawn_rows(args, step):
    """The rows of a step, by the rule: a sample of their own for each seed and step."""
    rows = read_rows(args.dataset)
    return random.Random(f"{args.seed} {step}").sample(rows, min(args.num_prompts, len(rows)))


def rows_of_step(seen, step, call, generations=1):
    """The completions of a step -> list of Row. What generate made, the data and the reward's call
    must agree. generations: calls of generate a step."""
    args = seen.args
    batch, texts, ended = seen.results("generate")[(step - 1) * generations]
    drawn = drawn_rows(args, step)
    G = args.num_generations
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    assert len(texts) == G * len(drawn)
    rows = []
    for i, (prompt, completion) in enumerate(plain.unpadded(batch)):
        row = drawn[i // G]
        assert prompt == plain.toy_ids(tokenizer, row["prompt"])
        assert bool(ended[i]) == (completion[-1] == tokenizer.eos_token_id)
        assert tokenizer.decode(completion, skip_special_tokens=True) == texts[i]
        rows.append(Row(prompt, completion, texts[i], bool(ended[i]), row, None, i // G))
    if call is not None:
        check_call(call, rows)
        for row, value in zip(rows, call["values"], strict=True):
            row.value = value
    penalty = args.missing_eos_penalty
    for row in rows:
        if penalty is not None and not row.ended:
            row.value = -penalty
    return rows


def check_call(call, rows):
    """Each completion was scored with its own prompt and row, and told whether it ended."""
    assert call["prompts"] == [row.row["prompt"] for row in rows]
    assert call["completions"] == [row.text for row in rows]
    assert without_raw(call["rows"]) == [row.row | {"ended": row.ended} for row in rows]


@torch.no_grad()
def set_fixed(args, rows, policy, reference):
    """The log-probs under the policy that sampled, and under the reference."""
    for row in rows:
        row.old = plain.token_logps(policy, row.prompt, row.completion, args.temperature)
        if reference is not None:
            row.ref = plain.token_logps(reference, row.prompt, row.completion, args.temperature)


def one_number(value):
    """A reward, or the mean of its steps'; 0 where there are none."""
    if not isinstance(value, list):
        return value
    return sum(value) / max(1, len(value))


def last_number(text):
    """The last number of a text, as a text; none: empty. How it is read: test_numbers.py."""
    number = plumbing.last_number(text)
    return "" if number is None else str(number)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def shared_metrics(args, rows):
    """What both scripts log of a step's completions."""
    rewards = [one_number(row.value) for row in rows]
    centre = mean(rewards)
    tokens = sum(len(row.completion) for row in rows)
    metrics = {
        "reward": centre,
        "reward_std": mean((x - centre) ** 2 for x in rewards) ** 0.5,
        "ended": mean(float(row.ended) for row in rows),
        "completion_length": tokens / len(rows),
        "entropy": -sum(row.old.sum().item() for row in rows) / tokens,
    }
    if args.beta:
        kl = sum((row.old - row.ref).sum().item() for row in rows)
        metrics |= {"kl": kl / len(rows), "kl_per_token": kl / tokens}
    if args.reward != "verifier" or args.reward_model:
        right = [float(last_number(row.text) == row.row["answer"]) for row in rows]
        metrics["gold_reward"] = mean(right)
    return metrics


def same_metrics(row, wanted, tolerance=2e-3):
    """A logged row has these values, and no others but the times."""
    assert row.keys() == wanted.keys() | {"step", "seconds", "tokens_per_second"}
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, rel=tolerance, abs=2e-5), name


class Trainer:
    """A plain policy of a recorded run's first weights, with an AdamW of its own."""

    def __init__(self, seen):
        self.args = seen.args
        self.model = model_with(seen.args.model, seen.updates[0].weights)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0)
        self.total = len(seen.updates)
        self.gradients = []  # after the clip
        self.rates = []

    def step(self, loss):
        """One update -> the gradient's norm before the clip."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = plain.gradient_norm(self.model)
        number = len(self.gradients) + 1
        rate = plain.learning_rate(
            number, self.args.learning_rate, self.args.lr_schedule, 0, self.total
        )
        self.optimizer.param_groups[0]["lr"] = rate
        for parameter in self.model.parameters():
            parameter.grad *= min(1.0, self.args.max_grad_norm / max(norm, 1e-12))
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        self.rates.append(rate)
        self.optimizer.step()
        return norm

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def near(got, want, tolerance):
    """The difference of two vectors, beside the length of the wanted one."""
    assert (got - want).norm() <= tolerance * want.norm() + 1e-9


def same_training(seen, trainer):
    """Gradients, rates and the way from the first weights to the last are the plain loop's."""
    assert len(seen.updates) == len(trainer.gradients)
    for update, gradient, rate in zip(seen.updates, trainer.gradients, trainer.rates, strict=True):
        near(update.gradient, gradient, 5e-3)
        assert update.lr == pytest.approx(rate, rel=1e-6, abs=1e-12)
    start = seen.updates[0].weights
    near(end_weights(seen) - start, trainer.weights() - start, 0.02)
    group = seen.optimizers[0].param_groups[0]
    assert len(seen.optimizers) == 1 and group["weight_decay"] == 0
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8


@torch.no_grad()
def greedy(model, tokenizer, prompt, max_new_tokens):
    """The likeliest token again and again -> text, whether it came to its end."""
    ids = plain.toy_ids(tokenizer, prompt)
    completion = []
    while len(completion) < max_new_tokens:
        token = model(torch.tensor([ids + completion])).logits[0, -1].argmax().item()
        completion.append(token)
        if token == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(completion, skip_special_tokens=True)
    return text, completion[-1] == tokenizer.eos_token_id


def greedy_rows(seen, step, rows):
    """Greedy answers of the policy as it was after this many steps -> texts, ended."""
    args = seen.args
    model = model_with(args.model, weights_after(seen, step))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = []
    ended = []
    for row in rows:
        text, end = greedy(model, tokenizer, row["prompt"], args.max_new_tokens)
        texts.append(text)
        ended.append(end)
    return texts, ended


def check_evaluations(seen, calls):
    """Held-out prompts, greedy answers, `ended` of each, and the mean of the rewards."""
    args = seen.args
    rows = held_out(args)
    assert [row["step"] for row in seen.evals] == sorted(evaluated_steps(args))
    for logged in seen.evals:
        call = calls["eval", logged["step"]]
        texts, ended = greedy_rows(seen, logged["step"], rows)
        assert call["prompts"] == [row["prompt"] for row in rows]
        assert call["completions"] == texts
        told = [row | {"ended": end} for row, end in zip(rows, ended, strict=True)]
        assert without_raw(call["rows"]) == told
        value = mean(one_number(value) for value in call["values"])
        assert logged["eval_reward"] == pytest.approx(value, rel=1e-4)
        assert logged.keys() == {"eval_reward", "step", "seconds"}


def check_samples(seen, steps, calls):
    """samples.jsonl has a completion of each of the first prompts of a step, and the answers to the
    first held-out prompts at each evaluation; steps: a list of Rows for each."""
    args = seen.args
    wanted = []
    for step, rows in enumerate(steps, 1):
        for row in rows[:: args.num_generations][: args.log_samples]:
            wanted.append((step, row.row["prompt"], row.text, pytest.approx(row.value)))
    got = seen.samples
    assert [(x["step"], x["prompt"], x["completion"], x["reward"]) for x in got] == wanted
    wanted = []
    for step in sorted(evaluated_steps(args)):
        call = calls["eval", step]
        answers = zip(call["prompts"], call["completions"], call["values"], strict=True)
        for prompt, text, value in list(answers)[: args.log_samples]:
            wanted.append((step, prompt, text, pytest.approx(one_number(value))))
    got = seen.held_out_samples
    assert [(x["step"], x["prompt"], x["completion"], x["reward"]) for x in got] == wanted


def check_output(out):
    """What a run of one step prints: what it is, its figures in order, what came of it."""
    wanted = [
        r".*tiny.*: 0.0 million parameters, on cpu in float32",
        r"\d+ training rows, \d+ held out \(.*\.jsonl\); 1 steps of \d+ prompts x \d+ completions",
        r"step 0/1  eval_reward \S+",
        r"step 1/1  reward \S+  gold_reward \S+  kl \S+  completion_length \S+",
        r"step 1/1  eval_reward \S+",
        r"prompt: .*",
        r"    before \(reward \S+\): .*",
        r"    after \(reward \S+\): .*",
        r"prompt: .*",
        r"    before \(reward \S+\): .*",
        r"    after \(reward \S+\): .*",
        r"first -> last: eval_reward \S+ -> \S+",
        r"saved .* after \d+ s",
        r"completions to read: .*samples.jsonl",
        r"to talk to the model: python .*plumbing.py .*final",
    ]
    for line, pattern in zip(out.splitlines(), wanted, strict=True):
        assert re.fullmatch(pattern, line), line


def check_speed(run):
    """tokens_per_second is the tokens without padding over the time of each step alone; by a clock
    that goes on by a second whenever it is asked."""
    clock = itertools.count(1000.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: next(clock))
        seen = run()
    before = seen.evals[0]["seconds"]
    assert any(not batch.completion_mask.all() for batch, _, _ in seen.results("generate"))
    for row, (batch, _, _) in zip(seen.steps, seen.results("generate"), strict=True):
        tokens = sum(len(completion) for _, completion in plain.unpadded(batch))
        seconds = tokens / row["tokens_per_second"]
        assert seconds == pytest.approx(round(seconds), rel=1e-3)
        assert 1 <= seconds < row["seconds"] - before
        before = row["seconds"]


# --- Resuming -------------------------------------------------------------------------------------


def killed_run(runs, args, step):
    """A run with a checkpoint after each step, killed when it is about to log this one."""
    import plumbing

    def log(self, metrics, *show):
        if self.step == step and "tokens_per_second" in metrics:
            raise KeyboardInterrupt
        real(self, metrics, *show)

    real = plumbing.Run.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.Run, "log", log)
        other_weights(runs.script, patch)
        with pytest.raises(KeyboardInterrupt):
            runs.script.main(args)
    return Path(args.output_dir)


def resumed(runs, args):
    """Go on with a killed run in another random state -> Seen."""
    torch.manual_seed(12345)
    random.seed(12345)
    args.resume = True
    with pytest.MonkeyPatch.context() as patch:
        other_weights(runs.script, patch)
        return observe(runs.script, args)


def same_run(seen, whole):
    """Whether rows, samples and weights are those of the unbroken run, bit for bit."""
    if seen.untimed() != whole.untimed():
        return False
    if seen.read("samples.jsonl") != whole.read("samples.jsonl"):
        return False
    ours = seen.weights()
    theirs = whole.weights()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Killed:
    """A run with a checkpoint after each of its steps, killed in its third; to be resumed again and
    again, as it is or with one part of the checkpoint as it was after step 1."""

    def __init__(self, runs, folder, **changes):
        self.runs = runs
        self.args = runs.args(checkpoint_every=1, **changes)
        self.state = Path(self.args.output_dir) / "checkpoint" / "state.pt"
        killed_run(runs, self.args, 2)
        self.first = torch.load(self.state, weights_only=True)
        shutil.rmtree(self.args.output_dir)
        killed_run(runs, self.args, 3)
        self.second = torch.load(self.state, weights_only=True)
        self.copy = folder / "killed"
        shutil.copytree(self.args.output_dir, self.copy)

    def resume(self, part=None):
        """-> Seen of the last two steps."""
        shutil.rmtree(self.args.output_dir)
        shutil.copytree(self.copy, self.args.output_dir)
        if part is not None:
            torch.save(self.second | {part: self.first[part]}, self.state)
        return resumed(self.runs, self.args)


# --- The flags that both scripts have -------------------------------------------------------------
# As in observe.py; `run` is a Runs. The base run has no penalty, a constant rate, temperature 1.


def flag_model(run, base, folder):
    """Policy, reference and tokenizer come from the folder."""
    other = folder / "other"
    model = AutoModelForCausalLM.from_pretrained(base.args.model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(base.args.model).save_pretrained(other)
    got = run(model=str(other), num_steps=1)
    want = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(got.updates[0].weights, want)
    assert set(got.arguments("load_model", "path")) == {str(other)}
    assert len(got.arguments("load_model", "path")) == 2
    assert got.arguments("load_tokenizer", "path") == [str(other)]


def prompts_of(seen):
    """The prompts of each training step."""
    return [prompts for prompts in seen.arguments("generate", "prompts")]


def flag_dataset(run, base, folder):
    """Prompts are of its rows; without an answer it is refused only where it is verified."""
    rows = problems(12, 500)
    path = write_rows(folder / "other.jsonl", rows)
    got = run(dataset=path)
    known = {row["prompt"] for row in rows}
    assert all(set(prompts) <= known for prompts in prompts_of(got))
    bare = [{"prompt": row["prompt"], "kind": "many"} for row in rows]
    path = write_rows(folder / "bare.jsonl", bare)
    assert "gold_reward" not in run(dataset=path, num_steps=1).steps[0]
    refused(run, "answer", dataset=path, reward="verifier")
    path = write_rows(folder / "empty.jsonl", [{"prompt": "", "answer": "1"}])
    refused(run, "no prompt", dataset=path)


def flag_eval_dataset(run, base, folder):
    """Held-out rows are its own; without it they are rows of --dataset, which trains without."""
    assert base.asked[0]["prompts"] == [row["prompt"] for row in problems(5, 1000)]
    got = run(eval_dataset="", num_steps=1, num_prompts=22)
    held = set(got.asked[0]["prompts"])
    trained = set(sum(prompts_of(got), []))
    assert len(held) == 2 and not held & trained
    assert held | trained == {row["prompt"] for row in read_rows(base.args.dataset)}


def flag_seed(run, base, folder):
    """It decides on prompts, completions and the reward's own random numbers, and all at once."""
    torch.manual_seed(99)
    random.seed(99)
    again = run()
    assert again.untimed() == base.untimed() and again.asked == base.asked
    other = run(seed=1)
    assert other.asked[0]["values"] != base.asked[0]["values"]
    assert prompts_of(other) != prompts_of(base)
    assert other.asked[0]["completions"] == base.asked[0]["completions"]  # greedy ones
    one = write_rows(folder / "one.jsonl", problems(1, 100))
    alone = dict(dataset=one, num_steps=1) | run.one_update
    calls = [run(seed=seed, **alone).asked[1] for seed in (0, 1)]
    assert calls[0]["prompts"] == calls[1]["prompts"]
    assert calls[0]["completions"] != calls[1]["completions"]


def flag_reward(run, base, folder):
    """The function named trains; a verifier's reward is called accuracy, and has no gold."""
    got = run(reward=base.args.reward.replace("mixed", "negative"))
    call = calls_of(got)["train", 1]
    lengths = [-len(text) for text in call["completions"]]
    assert got.steps[0]["reward"] == pytest.approx(mean(lengths), rel=1e-5)
    path = answered(base, folder)
    verified = run(reward="verifier", dataset=path, eval_dataset=path, num_steps=1)
    row = verified.steps[0]
    assert 0 < row["reward"] < 1 and "gold_reward" not in row
    texts = verified.results("generate")[0][1]
    answers = [x["answer"] for x in drawn_rows(verified.args, 1) for _ in range(3)]
    right = [last_number(text) == answer for text, answer in zip(texts, answers, strict=True)]
    assert row["reward"] == pytest.approx(mean(right), rel=1e-5)
    rows = held_out(verified.args)
    texts, _ = greedy_rows(verified, 0, rows)
    right = [last_number(text) == row["answer"] for text, row in zip(texts, rows, strict=True)]
    assert verified.evals[0]["eval_accuracy"] == pytest.approx(mean(right))
    assert "eval_reward" not in verified.evals[0]


def answered(base, folder):
    """The base run's data, in which each row of its first step has the last number of its first
    completion for an answer: as many are right with the same seed."""
    rows = read_rows(base.args.dataset)
    call = calls_of(base)["train", 1]
    G = base.args.num_generations
    answers = {}
    for i in range(0, len(call["prompts"]), G):
        numbers = [last_number(text) for text in call["completions"][i : i + G]]
        answers[call["prompts"][i]] = [x for x in numbers + ["7"] if x.isdigit()][0]
    for row in rows:
        row["answer"] = answers.get(row["prompt"], row["answer"])
    first = [row for row in rows if row["prompt"] in answers]
    texts, _ = greedy_rows(base, 0, rows[:1])
    greedy_number = last_number(texts[0])
    rows[0]["answer"] = greedy_number if greedy_number.isdigit() else "7"
    assert len(first) == base.args.num_prompts
    return write_rows(folder / "answered.jsonl", rows)


def check_gold(run, base, folder):
    """gold_reward is the verifier's, beside a reward that says the opposite of it."""
    path = answered(base, folder)
    got = run(dataset=path, reward=base.args.reward.replace("mixed", "wrong"), num_steps=1)
    row = got.steps[0]
    assert 0 < row["gold_reward"] < 0.5 or 0.5 < row["gold_reward"] < 1
    assert row["reward"] == pytest.approx(1 - row["gold_reward"], rel=1e-5)


def reward_model(folder, model):
    """Folder of a reward model with random weights and a bias."""
    torch.manual_seed(5)
    policy = AutoModelForCausalLM.from_pretrained(model)
    scorer = LlamaForSequenceClassification.from_pretrained(model, num_labels=1)
    scorer.score.weight.data = torch.randn(scorer.score.weight.shape)
    scorer.config.reward_bias = 0.25
    scorer.config.pad_token_id = policy.config.pad_token_id
    scorer.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return scorer.eval()


@torch.no_grad()
def model_values(scorer, tokenizer, rows):
    """The head at the last token of each completion's text, its end of turn where it has one."""
    values = []
    for row in rows:
        ids = plain.toy_ids(tokenizer, row.row["prompt"], row.text)
        if row.text and not row.ended:
            ids.pop()
        values.append(plain.head_outputs(scorer, row.prompt, ids)[-1, 0].item())
    return values


def flag_reward_model(run, base, folder):
    """Its scores are the rewards, in place of --reward; it runs as the other models do."""
    scorer = reward_model(folder / "rm", base.args.model)
    got = run(reward_model=str(folder / "rm"), num_steps=1, micro_batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    rows = rows_of_step(got, 1, None)
    values = model_values(scorer, tokenizer, rows)
    assert got.asked == [] and "gold_reward" in got.steps[0]
    assert got.steps[0]["reward"] == pytest.approx(mean(values), rel=1e-3)
    samples = [row["reward"] for row in got.samples]
    G = got.args.num_generations
    assert samples == pytest.approx(values[::G][:4], rel=1e-3)
    assert got.evals[0].keys() == {"eval_reward", "step", "seconds"}
    assert got.arguments("load_reward", "micro_batch_size") == [4]
    assert got.arguments("load_reward", "dtype") == ["auto"]
    assert str(got.arguments("load_reward", "device")[0]) == "cpu"


def flag_num_steps(run, base, folder):
    """Steps of training: rows 1 to the last, and the length of the schedule."""
    assert [row["step"] for row in base.steps] == [1, 2, 3]
    got = run(num_steps=2, lr_schedule="linear")
    assert [row["step"] for row in got.steps] == [1, 2]
    assert [row["step"] for row in got.evals] == [0, 2]
    peak = base.args.learning_rate
    assert got.updates[0].lr == pytest.approx(peak)
    assert got.updates[len(got.updates) // 2].lr == pytest.approx(peak / 2)


def flag_num_prompts(run, base, folder):
    """So many different prompts a step, new ones in each; never more than there are."""
    for prompts in prompts_of(base):
        assert len(set(prompts)) == len(prompts) == 4
    assert len({tuple(sorted(prompts)) for prompts in prompts_of(base)}) == 3
    got = run(num_prompts=6, num_steps=1)
    assert len(set(prompts_of(got)[0])) == 6 and len(calls_of(got)["train", 1]["values"]) == 18
    every = run(num_prompts=50, num_steps=1)
    assert sorted(prompts_of(every)[0]) == sorted(
        row["prompt"] for row in read_rows(every.args.dataset)
    )


def flag_num_generations(run, base, folder):
    """So many completions of each prompt, one after another."""
    got = run(num_generations=5, num_steps=1)
    call = calls_of(got)["train", 1]
    wanted = []
    for row in drawn_rows(got.args, 1):
        wanted += 5 * [row["prompt"]]
    assert call["prompts"] == wanted
    assert set(got.arguments("generate", "num_generations")) == {5}
    refused(run, "--num-generations 1", "at least 2", num_generations=1)


def flag_max_new_tokens(run, base, folder):
    """The longest completion, in training and in evaluation; with the prompt it must fit."""
    got = run(max_new_tokens=5, num_steps=1)
    longest = [max(len(text) for text in call["completions"]) for call in got.asked]
    assert 4 <= min(longest) and max(longest) <= 5
    assert got.results("generate")[0][0].completion_ids.shape[1] == 5
    refused(run, "--max-new-tokens 250", "256", max_new_tokens=250)
    long = write_rows(folder / "long.jsonl", [{"prompt": "1" * 250, "kind": "many"}])
    refused(run, "does not fit", eval_dataset=long)


def flag_micro_batch_size(run, base, folder):
    """Completions a forward; the metrics are the same."""
    got = run(micro_batch_size=3)
    sizes = [len(batch.prompt_of) for batch in got.arguments("completion_logps", "batch")]
    assert max(sizes) == 3
    assert set(got.arguments("fixed_logps", "micro_batch_size")) == {3}
    changes_nothing(got, base)


def flag_lr_schedule(run, base, folder):
    """The rate that is used in every gradient step, and the one that is logged: the last of a
    step."""
    assert {update.lr for update in base.updates} == {base.args.learning_rate}
    for schedule in ("linear", "cosine"):
        got = run(lr_schedule=schedule)
        total = len(got.updates)
        peak = got.args.learning_rate
        rates = []
        for number in range(1, total + 1):
            rates.append(plain.learning_rate(number, peak, schedule, 0, total))
        assert [update.lr for update in got.updates] == pytest.approx(rates)
        each = total // 3
        assert [row["lr"] for row in got.steps] == pytest.approx(rates[each - 1 :: each], rel=1e-4)


def flag_eval_size(run, base, folder):
    """So many of the held-out rows, the first ones; with 0 nothing is evaluated."""
    got = run(eval_size=2, num_steps=1)
    assert [call["prompts"] for call in got.asked[::2]] == 2 * [["1000+=", "1001+1="]]
    assert run(eval_size=0, num_steps=1).evals == []
    assert len(run(eval_size=50, num_steps=1).asked[0]["prompts"]) == 7
    small = run(eval_size=7, num_prompts=2, num_generations=2, num_steps=1)
    assert [len(call["prompts"]) for call in small.asked] == [4, 3, 4, 4, 3]


def flag_log_samples(run, base, folder):
    """So many completions a step in samples.jsonl."""
    got = run(log_samples=2)
    assert [row["step"] for row in got.samples] == [1, 1, 2, 2, 3, 3]
    assert [row["step"] for row in got.held_out_samples] == [0, 0, 3, 3]
    assert run(log_samples=0, num_steps=1).read("samples.jsonl") == []
    changes_nothing(got, base)


def flag_resume(run, base, folder):
    """A finished run that is resumed does nothing more; a run that is there is not begun anew."""
    there = folder / "copy"
    shutil.copytree(base.folder, there)
    args = json.loads((there / "args.json").read_text())
    (there / "args.json").write_text(json.dumps(args | {"output_dir": str(there)}))
    got = run(output_dir=str(there), resume=True)
    assert got.updates == [] and got.untimed() == base.untimed()
    refused(run, "exists", output_dir=str(there))


def the_same_defaults(script, wanted):
    """Defaults of the flags, by a table; those of the toy beside them."""
    fields = script.Args.__dataclass_fields__
    for name, value in wanted.items():
        assert fields[name].default == value, name
    assert (ROOT / script.TOY["model"]).exists() and (ROOT / script.TOY["dataset"]).exists()
