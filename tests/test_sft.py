"""sft.py against plain loops, every flag by value, and learning on the toy."""

import json
import subprocess
import sys
from pathlib import Path

import observe
import plain
import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import plumbing
import sft

SYSTEM = {"role": "system", "content": "be right"}
ASKED = {"role": "user", "content": "1+1"}
ANSWERED = {"role": "assistant", "content": "2"}
AGAIN = {"role": "user", "content": "2+2"}
FOUR = {"role": "assistant", "content": "4=4"}
CHAT = [SYSTEM, ASKED, ANSWERED, AGAIN, FOUR]
CONTEXT = 48  # --max-length of these runs
ROWS = [
    {"prompt": "1+2", "completion": "3"},
    {"prompt": "44+55", "completion": "4+5+0=09\n4+5+0=09\n99"},
    {"prompt": "7+7", "response": "1" * 42},  # as long as the room: its EOS is cut
    {"prompt": "7+8", "completion": "2" * 41},  # fits with its EOS, just
    {"messages": CHAT},
    {"prompt": "9" * 45, "completion": "x"},  # leaves no room
    {"prompt": "8" * 44, "completion": "yes"},  # leaves room for one token
    {"prompt": [{"role": "user", "content": "5+6"}], "completion": "11"},
    {"prompt": "30+4", "completion": "34", "response": "not this one"},
]
HELD = [
    {"messages": [AGAIN, FOUR, ASKED, {"role": "assistant", "content": "2 and no more"}]},
    {"prompt": "6" * 40, "completion": "too long for it"},  # leaves room for five tokens
    {"prompt": "21+3", "completion": "24"},
    {"prompt": "8+80", "completion": "8+0+0=08\n0+8+0=08\n88"},
]
# What the rows are as text: the toy's template by hand, and the completions with their ends.
BY_HAND = [
    ("<bos><user>1+2<assistant>", "3<eos>"),
    ("<bos><user>44+55<assistant>", "4+5+0=09\n4+5+0=09\n99<eos>"),
    ("<bos><user>7+7<assistant>", "1" * 42),
    ("<bos><user>7+8<assistant>", "2" * 41 + "<eos>"),
    ("<bos><system>be right<user>1+1<assistant>", "2<eos>"),
    ("<bos><system>be right<user>1+1<assistant>2<eos><user>2+2<assistant>", "4=4<eos>"),
    ("<bos><user>" + "8" * 44 + "<assistant>", "y"),
    ("<bos><user>5+6<assistant>", "11<eos>"),
    ("<bos><user>30+4<assistant>", "34<eos>"),
]
HELD_BY_HAND = [
    ("<bos><user>2+2<assistant>", "4=4<eos>"),
    ("<bos><user>2+2<assistant>4=4<eos><user>1+1<assistant>", "2 and no more<eos>"),
    ("<bos><user>" + "6" * 40 + "<assistant>", "too l"),
    ("<bos><user>21+3<assistant>", "24<eos>"),
    ("<bos><user>8+80<assistant>", "8+0+0=08\n0+8+0=08\n88<eos>"),
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count, start=0):
    """Rows of different prompts."""
    return [{"prompt": f"{i}+1", "completion": f"{i + 1}"} for i in range(start, start + count)]


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """-> run(**changes), which trains on ROWS in a folder of its own: 18 completions, 5 steps."""
    folder = tmp_path_factory.mktemp("data")
    values = dict(
        model=tiny, dataset=write(folder / "rows.jsonl", ROWS),
        eval_dataset=write(folder / "held.jsonl", HELD), device="cpu", num_epochs=2, batch_size=4,
        micro_batch_size=3, max_length=CONTEXT, learning_rate=1e-3, warmup_ratio=0.35,
        max_grad_norm=2.0, eval_every=3, log_samples=4, max_new_tokens=10,
    )  # fmt: skip

    def run(**changes):
        output_dir = str(tmp_path_factory.mktemp("sft") / "run")
        return observe.observe(sft, sft.Args(**values | dict(output_dir=output_dir) | changes))

    return run


@pytest.fixture(scope="module")
def base(start):
    return start()


@pytest.fixture(scope="module")
def toy_tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "toy/model")


def ids_of(tokenizer, by_hand):
    """(prompt, completion) texts with their special tokens -> ids of both."""
    rows = []
    for texts in by_hand:
        prompt, completion = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows.append((prompt, completion))
    return rows


def trained_on(seen):
    """(prompt ids, completion ids) of every completion that the run trained on, by step."""
    rows = []
    for batch in seen.arguments("completion_logps", "batch"):
        rows += plain.unpadded(batch)
    size = seen.args.batch_size
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def prompts_of(seen, tokenizer):
    """Texts of the prompts that the run trained on, without the template, by step."""
    steps = []
    for rows in trained_on(seen):
        texts = tokenizer.batch_decode([prompt for prompt, _ in rows])
        words = [text.split("<user>")[-1].removesuffix("<assistant>") for text in texts]
        steps.append(words)
    return steps


def flat(model):
    return observe.flat(model.parameters())


def weights_at(seen, step):
    """All weights after this many steps, flat."""
    if step < len(seen.updates):
        return seen.updates[step].weights
    return flat(AutoModelForCausalLM.from_pretrained(seen.folder / "final"))


def model_at(seen, step):
    """The model after this many steps."""
    model = AutoModelForCausalLM.from_pretrained(seen.folder / "final").eval()
    torch.nn.utils.vector_to_parameters(weights_at(seen, step).clone(), model.parameters())
    model.zero_grad()
    return model


def mean_loss(model, rows):
    """-mean of log pi over all completion tokens of the rows, a row at a time."""
    total = 0.0
    count = 0
    for prompt, completion in rows:
        total = total - plain.token_logps(model, prompt, completion).sum()
        count += len(completion)
    return total / count


def greedy(model, tokenizer, prompt, most):
    """The greedy completion of a prompt's ids, a token at a time -> text."""
    written = []
    while len(written) < most and tokenizer.eos_token_id not in written:
        logits = model(torch.tensor([prompt + written])).logits[0, -1]
        written.append(logits.argmax().item())
    return tokenizer.decode(written, skip_special_tokens=True)


def adamw(updates, decay=0.0):
    """AdamW by its formula, from each step's gradient and rate -> weights after each step."""
    first = torch.zeros_like(updates[0].gradient)
    second = torch.zeros_like(first)
    after = []
    for t, update in enumerate(updates, 1):
        first = 0.9 * first + 0.1 * update.gradient
        second = 0.999 * second + 0.001 * update.gradient**2
        direction = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        after.append(update.weights * (1 - update.lr * decay) - update.lr * direction)
    return after


def rates(args, num_steps):
    """The learning rate of each step, by its formula."""
    warmup = round(args.warmup_ratio * num_steps)
    schedule = args.learning_rate, args.lr_schedule, warmup, num_steps
    return [plain.learning_rate(step, *schedule) for step in range(1, num_steps + 1)]


# --- The algorithm --------------------------------------------------------------------------------


def test_sft_loss_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -50.0], [-3.0, -4.0, -5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert sft.sft_loss(logps, mask).item() == 3.0


def test_every_assistant_turn_is_a_completion():
    turns = [{"role": r, "content": str(i)} for i, r in enumerate(
        ["system", "user", "assistant", "user", "assistant", "user"])]  # fmt: skip
    assert sft.to_pairs({"messages": turns}) == [(turns[:2], "2"), (turns[:4], "4")]
    assert sft.to_pairs({"prompt": "a", "response": "b"}) == [("a", "b")]
    assert sft.to_pairs({"prompt": "a", "completion": "c"}) == [("a", "c")]


def test_a_conversation_that_the_assistant_opens_has_no_prompt_for_its_first_turn():
    assert sft.to_pairs({"messages": [ANSWERED, AGAIN, FOUR]}) == [([ANSWERED, AGAIN], "4=4")]


# --- Every step -----------------------------------------------------------------------------------


def test_it_trains_on_these_tokens(base, toy_tokenizer):
    """Every row with its template, each assistant turn, cut and dropped as --max-length says."""
    steps = trained_on(base)
    assert [len(rows) for rows in steps] == [4, 4, 4, 4, 2]
    rows = [row for step in steps for row in step]
    want = sorted(ids_of(toy_tokenizer, BY_HAND))
    assert sorted(rows) == sorted(want + want)
    assert sorted(rows[:8]) == [row for row in want if row in rows[:8]]
    assert [step["completion_length"] for step in base.steps] == pytest.approx(
        [sum(len(completion) for _, completion in rows) / len(rows) for rows in steps], rel=1e-5
    )


def test_loss_and_gradient_of_every_step_equal_a_plain_loop(base):
    """From the weights before each step: the mean over all tokens of its rows, then the clip."""
    clipped = 0
    for i, rows in enumerate(trained_on(base)):
        model = model_at(base, i)
        loss = mean_loss(model, rows)
        loss.backward()
        norm = plain.gradient_norm(model)
        assert base.steps[i]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert base.steps[i]["grad_norm"] == pytest.approx(norm, rel=1e-3)
        want = observe.flat([p.grad for p in model.parameters()]) * min(1, 2.0 / norm)
        assert torch.allclose(base.updates[i].gradient, want, atol=1e-4)
        clipped += norm > 2.0
    assert clipped > 0 and len(base.updates) == 5


def test_every_step_is_adamw(base):
    """With the rate and the gradient of each step, from no moments; and `final` is the last."""
    after = adamw(base.updates)
    for i in range(5):
        assert torch.allclose(weights_at(base, i + 1), after[i], atol=1e-6), i
    assert not torch.allclose(weights_at(base, 5), weights_at(base, 2), atol=1e-4)


def test_rows_of_metrics_have_these_figures(base):
    names = {"loss", "grad_norm", "lr", "completion_length", "tokens_per_second"}
    assert all(set(row) == names | {"step", "seconds"} for row in base.steps)
    assert all(set(row) == {"eval_loss", "step", "seconds"} for row in base.evals)
    assert [row["step"] for row in base.rows] == [0, 1, 2, 3, 3, 4, 5, 5]


def test_tokens_per_second_are_those_of_completions(base):
    """The seconds that it stands for are not over those between the rows, nor far below."""
    measured = elapsed = 0.0
    for before, row in zip(base.rows, base.rows[1:], strict=False):
        if "loss" in row and "loss" in before:
            size = 2 if row["step"] == 5 else 4
            seconds = row["completion_length"] * size / row["tokens_per_second"]
            assert 0 < seconds < row["seconds"] - before["seconds"] + 0.003
            measured += seconds
            elapsed += row["seconds"] - before["seconds"]
    assert measured > 0.1 * elapsed


SCHEDULES = [
    ("linear", 0.35), ("cosine", 0.35), ("constant", 0.35), ("linear", 0.0), ("cosine", 0.0),
    ("constant", 0.0), ("linear", 0.25),
]  # fmt: skip


@pytest.mark.parametrize("schedule, ratio", SCHEDULES)
def test_the_rate_of_every_step(start, schedule, ratio):
    """The rate used and the one logged, by the formula; 0.35 of 5 steps are 2, 0.25 are 1."""
    got = start(lr_schedule=schedule, warmup_ratio=ratio, eval_dataset="", eval_size=0)
    want = rates(got.args, 5)
    assert [update.lr for update in got.updates] == pytest.approx(want)
    assert [row["lr"] for row in got.steps] == pytest.approx(want, rel=1e-5)
    assert max(want) == 1e-3 and want.index(1e-3) == {0.35: 2, 0.25: 1, 0.0: 0}[ratio]


# --- Evaluation -----------------------------------------------------------------------------------


def test_eval_loss_is_a_mean_over_tokens_of_held_out_rows(base, toy_tokenizer):
    """At each evaluation, with the weights of then; not a mean of rows' or of batches' means."""
    rows = ids_of(toy_tokenizer, HELD_BY_HAND)
    assert [row["step"] for row in base.evals] == [0, 3, 5]
    for row in base.evals:
        with torch.no_grad():
            want = mean_loss(model_at(base, row["step"]), rows).item()
        assert row["eval_loss"] == pytest.approx(want, rel=1e-4)


def test_samples_are_greedy_answers_to_held_out_prompts(base, toy_tokenizer):
    """The first --log-samples prompts, --max-new-tokens at the most and no more than fit."""
    rows = ids_of(toy_tokenizer, HELD_BY_HAND)[:4]
    asked = [[AGAIN], [AGAIN, FOUR, ASKED], "6" * 40, "21+3"]
    want = []
    for step in (0, 3, 5):
        model = model_at(base, step)
        for prompt, (ids, _) in zip(asked, rows, strict=True):
            text = greedy(model, toy_tokenizer, ids, min(10, CONTEXT - len(ids)))
            want.append({"step": step, "prompt": prompt, "completion": text, "reward": None,
                         "held_out": True})  # fmt: skip
    assert base.read("samples.jsonl") == want
    assert {len(row["completion"]) for row in want if row["prompt"] == "6" * 40} == {5}
    assert len({row["completion"] for row in want}) > 4


def test_evaluate_equals_a_plain_loop_whatever_the_batch(tiny, toy_tokenizer):
    """Rows of unlike lengths: the means of completions and of batches would be other numbers."""
    model = sft.load_model(sft.AutoModelForCausalLM, tiny, torch.device("cpu"))
    pairs = [("1+2", "3"), ("44+55", "99 and so on and on"), ("7", "7777"), ("8", "88")]
    rows = []
    for prompt, text in pairs:
        ids = plain.toy_ids(toy_tokenizer, prompt), plain.toy_ids(toy_tokenizer, prompt, text)
        rows.append((ids[0], ids[1][: 20 - len(ids[0])]))
    with torch.no_grad():
        want = mean_loss(model, rows).item()
        each = [mean_loss(model, [row]).item() for row in rows]
    assert abs(sum(each) / 4 - want) > 0.01
    for size in (1, 3, 8):
        got = sft.evaluate(model, toy_tokenizer, pairs, 20, size)
        assert got == pytest.approx(want, rel=1e-5)


# --- Flags ----------------------------------------------------------------------------------------


def flag_model(run, base, folder):
    """Weights and tokenizer are those of the folder; a folder without a model is refused."""
    model = AutoModelForCausalLM.from_pretrained(base.args.model)
    assert torch.equal(base.updates[0].weights, flat(model))
    for p in model.parameters():
        p.data *= 0.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base.args.model).save_pretrained(folder)
    got = run(model=str(folder))
    assert torch.equal(got.updates[0].weights, flat(model))
    assert got.steps[0]["loss"] != pytest.approx(base.steps[0]["loss"], rel=1e-3)
    assert AutoTokenizer.from_pretrained(got.folder / "final").chat_template
    refused = str(folder / "nothing")
    observe.refused(run, refused, "no such tokenizer", model=refused)


def flag_dataset(run, base, folder):
    got = run(dataset=write(folder / "rows.jsonl", sums(3)), num_epochs=1, batch_size=8)
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    assert [sorted(words) for words in prompts_of(got, tokenizer)] == [["0+1", "1+1", "2+1"]]


def flag_eval_dataset(run, base, folder):
    """Its rows are evaluated and never trained on, in addition to all rows of --dataset."""
    held = sums(3)
    got = run(eval_dataset=write(folder / "held.jsonl", held), num_epochs=1)
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    rows = ids_of(tokenizer, [(f"<bos><user>{i}+1<assistant>", f"{i + 1}<eos>") for i in range(3)])
    with torch.no_grad():
        want = mean_loss(model_at(got, 0), rows).item()
    assert got.evals[0]["eval_loss"] == pytest.approx(want, rel=1e-4)
    assert sum(len(step) for step in trained_on(got)) == 9


def flag_eval_size(run, base, folder):
    """As many prompts of --dataset, a tenth at the most, are evaluated and not trained on."""
    rows = write(folder / "rows.jsonl", sums(30))
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    kept = {}
    for size in (0, 2, 9):
        got = run(dataset=rows, eval_dataset="", eval_size=size, num_epochs=1, batch_size=8)
        kept[size] = {word for step in prompts_of(got, tokenizer) for word in step}
        held = sorted({f"{i}+1" for i in range(30)} - kept[size])
        assert bool(got.evals) == bool(size)
        if size:
            texts = [(f"<bos><user>{p}<assistant>", f"{int(p[:-2]) + 1}<eos>") for p in held]
            with torch.no_grad():
                want = mean_loss(model_at(got, 0), ids_of(tokenizer, texts)).item()
            assert got.evals[0]["eval_loss"] == pytest.approx(want, rel=1e-4)
    assert {size: 30 - len(kept[size]) for size in kept} == {0: 0, 2: 2, 9: 3}


def flag_resume(run, base, folder):
    """A finished run that is resumed does nothing more; one that is there is not begun anew, nor
    gone on with other flags."""
    there = run(num_epochs=1).args.output_dir
    before = (Path(there) / "metrics.jsonl").read_text()
    got = run(num_epochs=1, output_dir=there, resume=True)
    assert got.updates == [] and (got.folder / "metrics.jsonl").read_text() == before
    observe.refused(run, "exists", output_dir=there, num_epochs=1)
    observe.refused(run, "began with --num-epochs 1", output_dir=there, resume=True)


def flag_seed(run, base, folder):
    """Another order of the rows, other held-out prompts; the same seed gives the same run."""
    rows = dict(dataset=write(folder / "rows.jsonl", sums(30)), eval_dataset="", eval_size=3)
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    first, again, other = [prompts_of(run(seed=s, **rows), tokenizer) for s in (0, 0, 1)]
    assert first == again and first != other
    trained = [{word for step in steps for word in step} for steps in (first, other)]
    assert trained[0] != trained[1]
    assert trained_on(run(seed=1)) != trained_on(base)


def flag_from_scratch(run, base, folder):
    """Random weights of the model's shape, as its config spreads them, from the seed."""
    first, again, other = [
        run(from_scratch=True, seed=s, num_epochs=1).updates[0].weights for s in (0, 0, 1)
    ]
    saved = base.updates[0].weights
    assert torch.equal(first, again) and first.shape == saved.shape
    assert not torch.isclose(first, saved).all() and not torch.isclose(first, other).all()
    spread = AutoConfig.from_pretrained(base.args.model).initializer_range
    part = first[: 103 * 32]  # the embeddings but for the row of the pad token
    assert part[part != 0].std().item() == pytest.approx(spread, rel=0.1)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base.args.model)
    assert torch.equal(first, flat(AutoModelForCausalLM.from_config(config)))


def flag_num_epochs(run, base, folder):
    """Each row once an epoch, in an order of its own: three steps of three rows are one."""
    got = run(num_epochs=3, batch_size=3)
    steps = [sorted(step) for step in trained_on(got)]
    assert len(steps) == len(got.steps) == 9
    want = sorted(ids_of(AutoTokenizer.from_pretrained(base.args.model), BY_HAND))
    epochs = [steps[:3], steps[3:6], steps[6:]]
    for epoch in epochs:
        assert sorted(row for step in epoch for row in step) == want
    first, second, third = epochs
    assert first != second and second != third and first != third


def flag_batch_size(run, base, folder):
    got = run(batch_size=7)
    assert [len(step) for step in trained_on(got)] == [7, 7, 4]
    assert len(got.updates) == len(got.steps) == 3


def flag_micro_batch_size(run, base, folder):
    """So many rows a forward at the most, in training and evaluation; nothing else is changed."""
    got = run(micro_batch_size=2)
    sizes = [len(batch.prompt_of) for batch in got.arguments("completion_logps", "batch")]
    assert sizes == [2, 2, 2, 2, 2, 2, 2, 2, 2]
    sizes = [len(batch.prompt_of) for batch in base.arguments("completion_logps", "batch")]
    assert sizes == [3, 1, 3, 1, 3, 1, 3, 1, 2]
    held = [len(batch.prompt_of) for batch in got.arguments("fixed_logps", "batch")]
    assert max(held) == 2 and set(got.arguments("fixed_logps", "micro_batch_size")) == {2}
    observe.changes_nothing(got, base)
    for size in (1, 8):
        observe.changes_nothing(run(micro_batch_size=size), base)


def flag_max_length(run, base, folder):
    """Shorter: more is cut. Beyond the model's context of 256 it is the context that cuts."""
    got = run(max_length=20, num_epochs=1, eval_dataset="", eval_size=0)
    rows = [row for step in trained_on(got) for row in step]
    assert {len(prompt) + len(completion) for prompt, completion in rows} == {8, 9, 10, 17, 20}
    long = {"prompt": "1+2", "completion": "3" * 300}
    path = write(folder / "rows.jsonl", [long, {"prompt": "9" * 250, "completion": "x" * 9}])
    got = run(max_length=1024, dataset=path, eval_dataset=path)
    rows = [row for step in trained_on(got) for row in step]
    lengths = [(len(prompt), len(completion)) for prompt, completion in rows[:2]]
    assert sorted(lengths) == [(6, 250), (253, 3)]
    tokens = got.arguments("generate", "max_new_tokens")
    assert tokens == [10, 3] * (len(tokens) // 2)


def flag_lr_schedule(run, base, folder):
    """test_the_rate_of_every_step has each schedule by value."""
    ends = [run(lr_schedule=x).updates[-1].lr for x in ("constant", "cosine", "linear")]
    assert ends == pytest.approx([1e-3, 1e-3 * 0.25, 1e-3 / 3])


def flag_warmup_ratio(run, base, folder):
    """0.6 of 5 steps: three rise from 0."""
    got = run(warmup_ratio=0.6, lr_schedule="constant")
    want = [0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3]
    assert [update.lr for update in got.updates] == pytest.approx(want)


def flag_weight_decay(run, base, folder):
    """AdamW's formula with it, by value; the base run has none."""
    got = run(weight_decay=0.3, warmup_ratio=0.0)
    after, without = adamw(got.updates, 0.3), adamw(got.updates)
    for i in range(4):
        assert torch.allclose(got.updates[i + 1].weights, after[i], atol=1e-6)
    assert not torch.allclose(after[0], without[0], atol=1e-5)
    groups = got.optimizers[0].param_groups + base.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def flag_log_samples(run, base, folder):
    """So many rows of samples.jsonl at each evaluation; 0: none."""
    got = run(log_samples=2)
    want = [row for row in base.read("samples.jsonl") if row["prompt"] not in ("6" * 40, "21+3")]
    assert got.read("samples.jsonl") == want and len(want) == 6
    assert run(log_samples=0).read("samples.jsonl") == []


def flag_max_new_tokens(run, base, folder):
    """The longest samples have so many tokens, and begin as the base run's."""
    got = run(max_new_tokens=3)
    assert set(got.arguments("generate", "max_new_tokens")) == {3}
    pairs = list(zip(got.read("samples.jsonl"), base.read("samples.jsonl"), strict=True))
    assert all(len(a["completion"]) <= 3 for a, _ in pairs)
    assert all(b["completion"].startswith(a["completion"]) for a, b in pairs)
    assert any(len(b["completion"]) > 3 for _, b in pairs)


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
    "from_scratch": flag_from_scratch,
    "gradient_checkpointing": observe.flag_gradient_checkpointing,
    "num_epochs": flag_num_epochs,
    "batch_size": flag_batch_size,
    "micro_batch_size": flag_micro_batch_size,
    "max_length": flag_max_length,
    "learning_rate": observe.flag_learning_rate,
    "lora_rank": observe.flag_lora_rank,
    "lr_schedule": flag_lr_schedule,
    "warmup_ratio": flag_warmup_ratio,
    "weight_decay": flag_weight_decay,
    "max_grad_norm": observe.flag_max_grad_norm,
    "eval_size": flag_eval_size,
    "eval_every": observe.flag_eval_every,
    "checkpoint_every": observe.flag_checkpoint_every,
    "log_samples": flag_log_samples,
    "max_new_tokens": flag_max_new_tokens,
}


def test_every_flag_is_in_the_table():
    observe.has_every_flag(sft, FLAGS)


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(flag, start, base, tmp_path):
    FLAGS[flag](start, base, tmp_path)


def test_defaults():
    """Those of Tulu 3 where the help names it, and what the toy is trained with."""
    args = sft.Args(model="m", dataset="d")
    assert (args.num_epochs, args.batch_size, args.micro_batch_size) == (2, 32, 8)
    assert (args.learning_rate, args.lr_schedule, args.warmup_ratio) == (5e-6, "linear", 0.03)
    assert (args.weight_decay, args.max_grad_norm, args.max_length) == (0.0, 1.0, 1024)
    assert (args.eval_size, args.eval_every, args.checkpoint_every) == (64, 100, 100)
    assert (args.log_samples, args.max_new_tokens, args.seed) == (4, 128, 0)
    assert (args.device, args.dtype, args.output_dir) == ("auto", "auto", "runs/sft")
    assert not (args.resume or args.overwrite or args.from_scratch or args.gradient_checkpointing)
    toy = sft.Args(**sft.TOY)
    assert (toy.model, toy.dataset) == ("toy/model", "toy/sft_train.jsonl")
    assert (toy.eval_dataset, toy.from_scratch) == ("toy/sft_test.jsonl", True)
    assert (toy.learning_rate, toy.lr_schedule, toy.warmup_ratio) == (1e-3, "cosine", 0.05)
    assert (toy.micro_batch_size, toy.max_new_tokens) == (32, 48)


# --- The checkpoint -------------------------------------------------------------------------------


def killed_and_resumed(start, folder, leave_out=""):
    """A run that dies in its fourth step, and goes on from the checkpoint of the second; without
    one of the parts. -> Seen of the second half, or None where it cannot be resumed."""
    begin = plumbing.Run.begin

    def without(self, parts, num_steps):
        left = {name: part for name, part in parts.items() if name != leave_out}
        begin(self, left, num_steps)

    changes = dict(output_dir=str(folder / (leave_out or "all")), checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.Run, "begin", without)
        with observe.killed(plumbing.Run, "log", 6):  # of steps 0 (evaluation), 1, 2, 3, 3, 4
            start(**changes)
        return start(**changes, resume=True)


def test_a_resumed_run_is_the_unbroken_one(start, base, tmp_path):
    """Weights, rates, metrics, samples, bit for bit, with a schedule that warms up and falls."""
    got = killed_and_resumed(start, tmp_path)
    assert len(got.updates) == 3
    for mine, theirs in zip(got.updates, base.updates[2:], strict=True):
        assert mine.lr == theirs.lr and torch.equal(mine.weights, theirs.weights)
        assert torch.equal(mine.gradient, theirs.gradient)
    assert got.untimed() == base.untimed()
    assert got.read("samples.jsonl") == base.read("samples.jsonl")
    assert torch.equal(weights_at(got, 3), weights_at(base, 5))


def test_each_part_of_the_checkpoint_is_needed(start, base, tmp_path):
    """Left out, the resumed run is another one: of all parts there are."""
    state = torch.load(base.folder / "checkpoint" / "state.pt", weights_only=True)
    bookkeeping = {"torch", "cuda", "random", "step", "seconds", "sizes"}
    parts = set(state) - bookkeeping
    assert len(parts) == 3
    for name in parts:
        got = killed_and_resumed(start, tmp_path, leave_out=name)
        assert not torch.equal(weights_at(got, 3), weights_at(base, 5)), name


def test_the_final_model_is_the_last_step_and_loads(base):
    """Float32, with its tokenizer, in the form of Transformers."""
    model = AutoModelForCausalLM.from_pretrained(base.folder / "final")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.allclose(flat(model), adamw(base.updates)[-1], atol=1e-6)
    state = torch.load(base.folder / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 5


# --- Rows that do not fit, and what is said of them -----------------------------------------------


def test_what_is_cut_and_dropped_is_said(start, capsys):
    """Ten completions in ROWS: one whose prompt leaves no room, two that pass the length."""
    got = start(num_epochs=1)
    out = capsys.readouterr().out
    said = f"dropped 1 whose prompt fills --max-length {CONTEXT}, cut 2 that pass it"
    assert f"{got.args.dataset}: of 10 completions, {said}" in out
    assert f"{got.args.eval_dataset}: of 5 completions, dropped 0" in out and "cut 1 that" in out


def test_nothing_is_said_where_all_fit(start, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", sums(30))
    start(dataset=rows, eval_dataset="", eval_size=2, num_epochs=1)
    assert "--max-length" not in capsys.readouterr().out


def test_held_out_rows_that_do_not_fit_are_called_so(start, tmp_path):
    """And rows of which none fits end the run."""
    long = [{"prompt": "9" * 60 + str(i), "completion": "x"} for i in range(20)]
    path = write(tmp_path / "rows.jsonl", long)
    observe.refused(start, path, f"no completion fits in --max-length {CONTEXT}", dataset=path)
    short = write(tmp_path / "short.jsonl", sums(3))
    observe.refused(start, path, "no completion fits", dataset=short, eval_dataset=path)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "1", "completion": " "}, "completion"),
        ({"messages": [ASKED, {"role": "assistant", "content": " \n"}]}, "empty completion"),
        ({"prompt": "1"}, "completion or response"),
        ({"messages": [{"content": "no role"}, {}]}, "messages has"),
    ],
)
def test_bad_rows_end_with_one_line(start, tmp_path, row, says):
    path = write(tmp_path / "rows.jsonl", [row])
    observe.refused(start, path, says, dataset=path, output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_printed(start, capsys):
    start()
    lines = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in lines if line.startswith("step")]
    shown = {line[1]: set(line[2::2]) for line in lines if "eval_loss" not in line}
    assert shown == {f"{i}/5": {"loss", "lr"} for i in range(1, 6)}
    assert [line[1] for line in lines if "eval_loss" in line] == ["0/5", "3/5", "5/5"]


# --- Learning -------------------------------------------------------------------------------------


def learned(tmp_path, *flags):
    """The losses of held-out rows of `python sft.py`, as a user would run it."""
    command = [sys.executable, ROOT / "sft.py", "--output-dir", tmp_path / "run", *flags]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


def test_learning_for_a_few_steps(tmp_path):
    """The toy from random weights: 2.3 nats is what the frequency of characters alone gives."""
    lines = (ROOT / "toy/sft_train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:960]))
    losses = learned(tmp_path, "--dataset", str(tmp_path / "rows.jsonl"), "--num-epochs", "1")
    assert losses[0] > 4 and losses[-1] < 1.5


@pytest.mark.slow
def test_learning_as_a_user_would_makes_the_toys_checkpoint(tmp_path):
    """`python sft.py`. On the machine of toy/model the weights come out the same bit for bit, on
    another one near the same loss: 0.0251 and 0.0268 were seen."""
    losses = learned(tmp_path)
    assert losses[0] > 4 and losses[-1] < 0.03
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/model")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "toy/model").eval()
    rows = []
    for line in (ROOT / "toy/sft_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = plain.toy_ids(tokenizer, row["prompt"])
        rows.append((prompt, plain.toy_ids(tokenizer, row["prompt"], row["completion"])))
    with torch.no_grad():
        assert mean_loss(model, rows).item() == pytest.approx(losses[-1], rel=0.15)


@pytest.mark.real
def test_a_real_model_lowers_its_held_out_loss(tmp_path, real_model):
    rows = [{"prompt": f"Say the word number {i}.", "response": "Blue " * 3} for i in range(40)]
    args = sft.Args(
        model=real_model, dataset=write(tmp_path / "d.jsonl", rows), num_epochs=1, batch_size=8,
        learning_rate=1e-4, output_dir=str(tmp_path / "run"), max_new_tokens=8, log_samples=1,
    )  # fmt: skip
    losses = [row["eval_loss"] for row in observe.observe(sft, args).evals]
    assert losses[-1] < losses[0] - 0.5
