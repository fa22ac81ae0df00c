"""prm.py against hand values, plain loops, Transformers' own forward, and learning on the toy."""

import json
import math
import subprocess
import sys
from pathlib import Path

import observe
import plain
import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer
from test_sft import adamw, rates, write
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import common
import grpo
import plumbing
import prm

STEPS = [
    {"prompt": "1+2", "steps": ["1+2=3", "3"], "labels": [1, 1]},
    {"prompt": "1+2", "steps": ["1+2=4", "then 4", "no"], "labels": [-1, 0, -1]},
    {
        "prompt": "44+55",
        "steps": ["a long first step", "b"],
        "labels": [1, -1],
        "remaining_steps": ["c"],
    },  # fmt: skip
]
OUTCOMES = [
    {"prompt": "1+2", "completion": "3", "label": True},
    {"prompt": "1+2", "completion": "a long wrong answer", "label": False},
    {"prompt": "44+55", "completion": "9\n9", "label": 1},
]


def tiny_args(tiny, tmp_path, rows, **changes):
    """Args of one step on these rows, which tell the supervision."""
    values = prm.TOY | dict(
        model=tiny, dataset=write(tmp_path / "rows.jsonl", rows), eval_dataset="", eval_size=0,
        output_dir=str(tmp_path / "run"), device="cpu", num_epochs=1, batch_size=3,
        lr_schedule="constant", warmup_ratio=0.0, max_length=64,
        supervision="outcome" if "completion" in rows[0] else "process",
    )  # fmt: skip
    return prm.Args(**values | changes)


def run(args):
    """Train; -> rows of metrics."""
    return observe.observe(prm, args).rows


def logits_of(model, tokenizer, prompt, pieces):
    """One sequence, written out by hand -> logits of its completion tokens."""
    head = tokenizer(f"<bos><user>{prompt}<assistant>", add_special_tokens=False)["input_ids"]
    tail = tokenizer("".join(pieces) + "<eos>", add_special_tokens=False)["input_ids"]
    return model(torch.tensor([head + tail])).logits[0, len(head) :]


def fresh_model(args, labels):
    torch.manual_seed(args.seed)
    return plumbing.load_model(
        AutoModelForTokenClassification, args.model, torch.device("cpu"), new_head=labels
    )


# --- The algorithm --------------------------------------------------------------------------------


def test_step_labels_by_hand():
    labels = torch.tensor([[1, 0, -1], [-1, -100, -100]])
    ends = torch.tensor([[0, 2, 3], [1, 4, -1]])
    three = prm.step_labels(labels, ends, 5, 3)
    assert three.tolist() == [[2, -100, 1, 0, -100], [-100, 0, -100, -100, -100]]
    two = prm.step_labels(torch.tensor([[1, -1]]), torch.tensor([[1, 2]]), 3, 2)
    assert two.tolist() == [[-100, 1, 0]]


def test_prm_loss_by_hand_and_unlabelled_tokens_have_no_gradient():
    logits = torch.zeros(1, 3, 3, requires_grad=True)
    loss = prm.prm_loss(logits, torch.tensor([[-100, 2, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    assert (logits.grad[0, 0] == 0).all() and logits.grad[0, 1, 2] < 0 < logits.grad[0, 2, 2]
    assert prm.prm_loss(logits, torch.full((1, 3), -100)).item() == 0


def test_orm_loss_equals_a_slow_loop():
    logits = torch.randn(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    total = 0.0
    for row, m, o in zip(logits.tolist(), mask.tolist(), (1, 0, 1), strict=True):
        p = [1 / (1 + math.exp(-x)) for x, keep in zip(row, m, strict=True) if keep]
        total += sum(-math.log(q if o else 1 - q) for q in p) / len(p) / 3
    got = prm.orm_loss(logits, mask, torch.tensor([1.0, 0.0, 1.0]))
    assert got.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "how, values",
    [("product", [0.1, 0.9, 0]), ("minimum", [0.2, 0.9, 0]), ("last", [0.5, 0.9, 0]),
     ("mean", [1.7 / 3, 0.9, 0])],
)  # fmt: skip
def test_solution_scores_by_hand(how, values):
    probs = torch.tensor([[1.0, 0.2, 0.5], [0.9, 0.3, 0.3], [0.7, 0.7, 0.7]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    assert prm.solution_score(probs, mask, how).tolist() == pytest.approx(values)


def test_neutral_counts_as_positive():
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
    assert prm.positive_probs(logits).item() == pytest.approx(0.9)
    assert prm.positive_probs(torch.tensor([[0.2, 0.8]]).log()).item() == pytest.approx(0.8)
    assert prm.positive_probs(torch.tensor([[0.0]])).item() == 0.5


def test_evaluation_by_hand():
    predicted, labels = torch.tensor([0, 1, 1, 1, 2, 1]), torch.tensor([0, 0, 1, 1, -100, 1])
    assert prm.balanced_accuracy(predicted, labels) == 0.75
    first, true = torch.tensor([-1, 0, 1, -1, -1]), torch.tensor([-1, 0, 2, 1, -1])
    assert prm.processbench_f1(first, true) == pytest.approx(2 * (1 / 3) / (4 / 3))
    scores, right = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert prm.auc(scores, right) == pytest.approx((2 + 1.5) / 4)
    assert prm.auc(-scores, right) == pytest.approx(0.5 / 4)
    best, chance = prm.best_of_n(
        torch.tensor([0.9, 0.1, 0.2, 0.2, 0.5, 1.0]),
        torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, math.nan]), list("aabbca"),
    )  # fmt: skip
    assert best == 0.75 and chance == 0.5


# --- Steps ----------------------------------------------------------------------------------------


def test_a_separator_that_the_tokenizer_merges_into_the_step():
    """Encoded apart, a step still ends with tokens of its own."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<eos>", "a", "b", "\n", "\nb", "a\n"])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", "b"), ("a", "\n")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>")
    assert tokenizer("a\nb")["input_ids"] == [1, 4]  # no token ends the first step
    _, ids, ends = common.encode_steps(tokenizer, "a", ["a", "b"], "\n")
    assert ids == [5, 2, 3, 0] and ends == [0, 2]


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ки"])
def test_steps_end_at_the_last_token_of_their_separator(separator):
    tokenizer = make_tokenizer()
    _, ids, ends = common.encode_steps(tokenizer, "p", ["one", "two"], separator)
    for end, upto in zip(ends, ["one", "one" + separator + "two"], strict=True):
        assert tokenizer.decode(ids[: end + 1]) == upto + separator
    assert ids[-1] == tokenizer.eos_token_id and ends[-1] == len(ids) - 2


def test_labels_cut_off_drop_the_row_and_other_steps_are_cut(tiny, tmp_path, capsys):
    rows = [
        {"prompt": "1", "steps": ["a" * 30, "b" * 40], "labels": [1, 1]},  # the second is cut off
        {"prompt": "1", "steps": ["a" * 30], "labels": [1], "remaining_steps": ["b" * 40]},
        {"prompt": "1", "steps": ["a"], "labels": [None]},
        {"prompt": "1", "steps": ["a"], "labels": [False]},
    ]
    assert run(tiny_args(tiny, tmp_path, rows))[0]["completion_length"] == (60 + 3) / 2
    assert "of 4 rows, dropped 2" in capsys.readouterr().out


@pytest.mark.parametrize("labels", [[1], [1, -1]])
def test_a_row_is_cut_off_where_its_last_label_does_not_fit(labels):
    """At the last token of the last labelled step exactly, and one token before it."""
    tokenizer = plumbing.load_tokenizer(ROOT / "toy/model")
    examples = [{"prompt": "1", "texts": ["ab", "cde"], "labels": labels}]
    start = len(plain.toy_ids(tokenizer, "1"))
    last = [2, 6][len(labels) - 1]  # of "ab\ncde\n", with each letter a token
    kept = prm.encode_examples(examples, tokenizer, start + last + 1, "\n", "rows")
    assert len(kept) == 1 and len(kept[0]["ids"]) == last + 1
    assert kept[0]["ends"] == [2, 6][: len(labels)] and kept[0]["labels"] == labels
    with pytest.raises(ValueError, match="no row fits"):
        prm.encode_examples(examples, tokenizer, start + last, "\n", "rows")


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_step_on_step_labels_equals_a_plain_loop(tiny, tmp_path, size):
    row = run(args := tiny_args(tiny, tmp_path, STEPS, micro_batch_size=size))[0]
    model, tokenizer, losses = fresh_model(args, 3), plumbing.load_tokenizer(tiny), []
    for example in STEPS:
        pieces = [s + "\n" for s in example["steps"] + example.get("remaining_steps", [])]
        logits = logits_of(model, tokenizer, example["prompt"], pieces)
        for i, label in enumerate(example["labels"]):
            p = logits[len("".join(pieces[: i + 1])) - 1].softmax(-1)  # one token a character
            losses.append(-p[label + 1].log())
    loss = sum(losses) / len(losses)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_step_on_outcomes_equals_a_plain_loop(tiny, tmp_path, size):
    row = run(args := tiny_args(tiny, tmp_path, OUTCOMES, micro_batch_size=size))[0]
    model, tokenizer, loss = fresh_model(args, 1), plumbing.load_tokenizer(tiny), 0.0
    for example in OUTCOMES:
        p = logits_of(model, tokenizer, example["prompt"], [example["completion"]]).sigmoid()
        loss = loss - (p if example["label"] else 1 - p).log().mean() / 3
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_held_out_metrics_of_steps_equal_a_plain_loop(tiny, tmp_path):
    """In parts of two; the first two solutions have an error, at 0 and at 1, the third has none."""
    rows = [STEPS[1], STEPS[2] | {"remaining_steps": []}, STEPS[0], STEPS[1]]
    held = write(tmp_path / "held.jsonl", rows)
    row = run(args := tiny_args(tiny, tmp_path, STEPS, eval_dataset=held, micro_batch_size=2))[-1]
    model = AutoModelForTokenClassification.from_pretrained(f"{args.output_dir}/final").eval()
    tokenizer, losses, hits = plumbing.load_tokenizer(tiny), [], {}
    scores, found, right = [], [], []
    for example in rows:
        pieces = [s + "\n" for s in example["steps"]]
        logits = logits_of(model, tokenizer, example["prompt"], pieces)
        probs, first = [], -1
        for i, label in enumerate(example["labels"]):
            p = logits[len("".join(pieces[: i + 1])) - 1].softmax(-1).tolist()
            losses.append(-math.log(p[label + 1]))
            hits.setdefault(label, []).append(p.index(max(p)) == label + 1)
            probs.append(1 - p[0])
            first = i if first < 0 and probs[-1] < 0.5 else first
        scores.append(math.prod(probs))
        error = example["labels"].index(-1) if -1 in example["labels"] else -1
        found.append(first == error)
        right.append(error < 0)
    assert row["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    flat = sum(hits.values(), [])
    assert row["eval_accuracy"] == pytest.approx(sum(flat) / len(flat))
    shares = [sum(x) / len(x) for x in hits.values()]
    assert row["eval_balanced_accuracy"] == pytest.approx(sum(shares) / 3, rel=1e-4)
    good, bad = ([f for f, r in zip(found, right, strict=True) if r == x] for x in (True, False))
    good, bad = sum(good) / len(good), sum(bad) / len(bad)
    assert row["eval_f1"] == pytest.approx(2 * good * bad / (good + bad), rel=1e-4)
    wrong = [s for s, r in zip(scores, right, strict=True) if not r]
    best = scores[right.index(True)]
    assert row["eval_auc"] == pytest.approx(sum(best > s for s in wrong) / len(wrong), rel=1e-4)


def test_a_step_may_not_hold_the_separator(tiny, tmp_path):
    """Generated text would be split there. At its end it is no matter; a shell's \\n is known."""
    rows = [{"prompt": "1", "steps": ["a\nb", "c"], "labels": [1, -1]}]
    with pytest.raises(ValueError, match="--step-separator.*within a step"):
        run(tiny_args(tiny, tmp_path, rows))
    run(args := tiny_args(tiny, tmp_path, rows, step_separator="\\n\\n"))
    config = json.loads(open(f"{args.output_dir}/final/config.json").read())
    assert config["step_separator"] == "\n\n"
    ends = [{"prompt": "1", "steps": ["a\n", "c"], "labels": [1, -1]}]
    bare = [{"prompt": "1", "steps": ["a", "c"], "labels": [1, -1]}]
    ends = run(tiny_args(tiny, tmp_path / "ends", ends))[0]["loss"]
    assert ends == run(tiny_args(tiny, tmp_path / "bare", bare))[0]["loss"]


def test_zeros_and_ones_are_not_taken_for_neutral_and_right(tiny, tmp_path):
    rows = [{"prompt": "1", "steps": ["a", "b"], "labels": [1, 0]}]
    with pytest.raises(ValueError, match="neutral"):
        run(tiny_args(tiny, tmp_path, rows))


def test_the_lm_loss_is_of_right_completions(tiny, tmp_path):
    alone = run(tiny_args(tiny, tmp_path / "a", OUTCOMES))[0]
    both = run(tiny_args(tiny, tmp_path / "b", OUTCOMES, lm_coef=0.5, micro_batch_size=2))[0]
    model = plumbing.load_model(prm.AutoModelForCausalLM, tiny, torch.device("cpu"))
    tokenizer = plumbing.load_tokenizer(tiny)
    prompts, texts = zip(*[(r["prompt"], [r["completion"]]) for r in OUTCOMES if r["label"]],
                         strict=True)  # fmt: skip
    batch = common.encode(tokenizer, prompts, texts)
    nll = -common.completion_logps(model, batch).sum().item() / batch.completion_mask.sum().item()
    assert both["lm_loss"] == pytest.approx(nll, rel=1e-4)
    assert both["loss"] == pytest.approx(alone["loss"] + 0.5 * nll, rel=1e-4)


def score_with(folder, prompts, texts, by_step=False, micro_batch_size=2):
    score = plumbing.load_reward("verifier", None, folder, torch.device("cpu"), "auto",
                               micro_batch_size, by_step)  # fmt: skip
    return score(prompts, texts, [{}] * len(texts))


@pytest.mark.parametrize("how", ["product", "minimum", "last", "mean"])
def test_the_saved_prm_scores_text_as_it_was_trained(tiny, tmp_path, how):
    """load_reward beside the saved folder under plain Transformers."""
    run(args := tiny_args(tiny, tmp_path, STEPS * 4, solution_score=how, num_epochs=2))
    final = f"{args.output_dir}/final"
    model = AutoModelForTokenClassification.from_pretrained(final).eval()
    tokenizer = plumbing.load_tokenizer(final)
    assert model.config.id2label == {0: "wrong", 1: "neutral", 2: "right"}
    texts = ["1+2=3\n3", "1+2=4\n\nthen 4\nno\n", "x"]
    prompts = ["1+2", "1+2", "44+55"]
    steps = [[s for s in text.split("\n") if s] for text in texts]
    want = []
    for prompt, parts in zip(prompts, steps, strict=True):
        logits = logits_of(model, tokenizer, prompt, [s + "\n" for s in parts])
        ends = [len("\n".join(parts[: i + 1])) for i in range(len(parts))]
        want.append([1 - logits[end].softmax(-1)[0].item() for end in ends])
    by_step = score_with(final, prompts, texts, by_step=True)
    assert [len(x) for x in by_step] == [2, 3, 1]
    for got, row in zip(by_step, want, strict=True):
        assert got == pytest.approx(row, abs=1e-5)
    combine = {"product": math.prod, "minimum": min, "last": lambda x: x[-1],
               "mean": lambda x: sum(x) / len(x)}[how]  # fmt: skip
    got = score_with(final, prompts, texts)
    assert got == pytest.approx([combine(row) for row in want], abs=1e-5)
    assert score_with(final, ["1"], ["\n"]) == [0.0]


@pytest.mark.parametrize("head", ["linear", "cobbe"])
def test_the_saved_orm_reads_the_last_token(tiny, tmp_path, head):
    run(args := tiny_args(tiny, tmp_path, OUTCOMES * 4, head=head, num_epochs=2))
    final = f"{args.output_dir}/final"
    model = AutoModelForTokenClassification.from_pretrained(final).eval()
    tokenizer = plumbing.load_tokenizer(final)
    got = score_with(final, ["1+2", "44+55"], ["3", "9\n9 or so"])
    want = [logits_of(model, tokenizer, p, [t])[-1, 0].sigmoid().item()
            for p, t in (("1+2", "3"), ("44+55", "9\n9 or so"))]  # fmt: skip
    assert got == pytest.approx(want, abs=1e-5) and got[0] != got[1]


def test_cobbes_head_is_a_gain_and_a_bias_on_one_logit(tiny, tmp_path):
    lm = plumbing.load_model(prm.AutoModelForCausalLM, tiny, torch.device("cpu"))
    head, hidden = prm.CobbeHead(lm.get_output_embeddings()), torch.randn(2, 3, 32)
    assert torch.allclose(head(hidden)[..., 0], lm.lm_head(hidden)[..., -1], atol=1e-5)
    head.gain.data.fill_(3.0)
    head.bias.data.fill_(-1.0)
    want = 3 * lm.lm_head(hidden)[..., -1] - 1
    assert torch.allclose(head(hidden)[..., 0], want, atol=1e-4)
    assert torch.allclose(head.linear()(hidden)[..., 0], want, atol=1e-4)


def test_later_steps_do_not_change_earlier_scores(tiny, tmp_path):
    run(args := tiny_args(tiny, tmp_path, STEPS))
    final = f"{args.output_dir}/final"
    short, long = score_with(final, ["1+2"] * 2, ["1+2=3\nx", "1+2=3\nanother\nmore"], by_step=True)
    assert short[0] == pytest.approx(long[0], abs=1e-6) and short[1] != pytest.approx(long[1])


# --- Every step, of every kind of run -------------------------------------------------------------

CONTEXT = 48  # --max-length of these runs
CHAT = [{"role": "user", "content": "8+8"}]
PROCESS_ROWS = [
    {"prompt": "1+2", "steps": ["1+2=3", "3"], "labels": [1, 1]},
    {"prompt": "44+55", "steps": ["a long first step", "b"], "labels": [True, False],
     "remaining_steps": ["c"]},
    {"prompt": "1+2", "steps": ["1+2=4", "then 4", "no"], "labels": [-1, 0, -1]},
    {"prompt": "7", "steps": ["7"], "labels": [1]},
    {"prompt": "44+55", "steps": ["99"], "labels": [1]},
    {"prompt": "7", "steps": ["6", "so 6"], "labels": [None, -1]},
    {"prompt": CHAT, "steps": ["16", "x"], "labels": [1], "remaining_steps": ["y"]},
    {"prompt": "1+2", "steps": ["5"], "labels": [0]},
    {"prompt": "44+55", "steps": ["9", "w" * 50], "labels": [-1]},  # its second step is cut
    {"prompt": "7", "steps": ["z" * 60], "labels": [-1]},  # dropped
]  # fmt: skip
PROCESS_HELD = [
    {"prompt": "3+4", "steps": ["3+4=7", "7"], "labels": [1, 1]},
    {"prompt": "3+4", "steps": ["34", "so", "34"], "labels": [1, -1], "remaining_steps": ["!"]},
    {"prompt": "3+4", "steps": ["it is", "7"], "labels": [1, None]},  # not known whether right
    {"prompt": "9+9", "steps": ["18"], "labels": [1]},
    {"prompt": "9+9", "steps": ["9", "9+9=99", "99"], "labels": [1, -1, 0]},
    {"prompt": "9+9", "steps": ["99", "or 9"], "labels": [-1, -1]},
    {"prompt": "9+9", "steps": ["and 9 is", "18", "yes"], "labels": [0, 1, 1]},
    {"prompt": "60+6", "steps": ["66 or", "66"], "labels": [1, 1]},
    {"prompt": "60+6", "steps": ["606", "0", "1", "2"], "labels": [-1, 0, 0, -1]},
    {"prompt": "60+6", "steps": ["6"], "labels": [-1]},
    {"prompt": "5", "steps": ["5 5", "5"], "labels": [1, 0]},
]
OUTCOME_ROWS = [
    {"prompt": "1+2", "completion": "3", "label": True},
    {"prompt": "44+55", "completion": "9\n9", "label": 1},
    {"prompt": "1+2", "completion": "a long wrong answer", "label": False},
    {"prompt": "7", "completion": "8", "label": 0},
    {"prompt": CHAT, "completion": "88 and 88", "label": False},
    {"prompt": "44+55", "completion": "100", "label": False},
    {"prompt": "7", "completion": "it is 7", "label": True},
    {"prompt": "7", "completion": "9 or more", "label": False},
    {"prompt": "1+2", "completion": "or 3", "label": True},
    {"prompt": "7", "completion": "z" * 44, "label": False},  # dropped: 4 and 44 and its end
]
OUTCOME_HELD = [
    {"prompt": "3+4", "completion": "7", "label": True},
    {"prompt": "3+4", "completion": "34 34 34", "label": False},
    {"prompt": "9+9", "completion": "18 is it", "label": True},
    {"prompt": "9+9", "completion": "99", "label": False},
    {"prompt": "9+9", "completion": "9 and 9\n", "label": False},
    {"prompt": "60+6", "completion": "66", "label": True},
    {"prompt": "60+6", "completion": "sixty 6", "label": True},
    {"prompt": "60+6", "completion": "6", "label": False},
    {"prompt": "5", "completion": "the answer is 5", "label": True},
    {"prompt": "5", "completion": "4", "label": False},
    {"prompt": "2", "completion": "two", "label": False},
]


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """-> run(**changes), which trains in a folder of its own: nine completions in two epochs, in
    five steps. What would be drawn in the histogram is noted in `seen.histograms`."""
    folder = tmp_path_factory.mktemp("data")
    data = {"process": (PROCESS_ROWS, PROCESS_HELD), "outcome": (OUTCOME_ROWS, OUTCOME_HELD)}
    files = {}
    for name, (rows, held) in data.items():
        files[name] = dict(
            dataset=write(folder / name / "rows.jsonl", rows),
            eval_dataset=write(folder / name / "held.jsonl", held),
        )
    values = dict(
        model=tiny, device="cpu", num_epochs=2, batch_size=4, micro_batch_size=3,
        max_length=CONTEXT, learning_rate=3e-3, warmup_ratio=0.35, max_grad_norm=0.7, eval_every=3,
    )  # fmt: skip

    def run(**changes):
        kind = files[changes.get("supervision", "process")]
        output_dir = str(tmp_path_factory.mktemp("prm") / "run")
        args = prm.Args(**values | kind | dict(output_dir=output_dir) | changes)
        histograms = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plumbing.Run, "histogram", lambda self, x: histograms.append(x))
            seen = observe.observe(prm, args)
        seen.histograms = histograms
        return seen

    return run


KINDS = {
    "process": {},
    "two classes": dict(solution_score="mean"),
    "outcome": dict(supervision="outcome"),
    "lm": dict(supervision="outcome", lm_coef=0.7, solution_score="minimum"),
    "cobbe": dict(supervision="outcome", lm_coef=0.7, head="cobbe"),
    "cobbe alone": dict(supervision="outcome", head="cobbe", solution_score="product"),
    "tied": dict(supervision="outcome", head="cobbe", lm_coef=0.7),  # its embeddings are its head
}


def two_classes(rows):
    """The rows without those that have a neutral step."""
    return [row for row in rows if 0 not in [x for x in row["labels"] if x is not False]]


@pytest.fixture(scope="module")
def runs(start, tiny, tmp_path_factory):
    """A run of each kind, by name."""
    folder = tmp_path_factory.mktemp("two")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder / "tied")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "tied")
    more = {"tied": dict(model=str(folder / "tied"))}
    more["two classes"] = dict(
        dataset=write(folder / "rows.jsonl", two_classes(PROCESS_ROWS)),
        eval_dataset=write(folder / "held.jsonl", two_classes(PROCESS_HELD)),
    )
    made = {}
    for name, changes in KINDS.items():
        made[name] = start(**changes | more.get(name, {}))
    return made


@pytest.fixture(scope="module")
def base(runs):
    return runs["process"]


@pytest.fixture(scope="module")
def toy_tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "toy/model")


every_kind = pytest.mark.parametrize("kind", KINDS)


class Example:
    """A row as it should be read: ids, places of steps among the completion's tokens, their labels
    (None where there is none), and the outcome (None where it is not known)."""

    def __init__(self, tokenizer, row, separator="\n", length=CONTEXT):
        chat = isinstance(row["prompt"], list)
        question = row["prompt"][0]["content"] if chat else row["prompt"]
        prompt = f"<bos><user>{question}<assistant>"
        pieces = [row["completion"]] if "completion" in row else []
        for step in row.get("steps", []) + row.get("remaining_steps", []):
            pieces.append(step + separator)
        self.question = question
        self.prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        room = length - len(self.prompt)
        text = "".join(pieces) + "<eos>"
        self.completion = tokenizer(text, add_special_tokens=False)["input_ids"][:room]
        if "completion" in row:
            self.places = list(range(len(self.completion)))
            self.outcome = int(row["label"])
            return
        ends = [len("".join(pieces[: i + 1])) - 1 for i in range(len(pieces))]
        self.places = [end for end in ends if end < room]
        labels = [*row["labels"], *[None] * len(pieces)]
        labels = [2 * x - 1 if isinstance(x, bool) else x for x in labels]
        self.labels = labels[: len(self.places)]
        self.outcome = None if None in labels[: len(pieces)] else 1
        if -1 in self.labels:
            self.outcome = 0

    @property
    def ids(self):
        return self.prompt, self.completion


def examples_of(path, tokenizer, **options):
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    dropped = ("z" * 60, "z" * 44)
    rows = [r for r in rows if r.get("completion", r.get("steps", [""])[0]) not in dropped]
    return [Example(tokenizer, row, **options) for row in rows]


def trained_on(seen):
    """(prompt ids, completion ids) of every completion that the run trained on, by step."""
    rows = []
    for arguments, scores in seen.calls["completion_scores"]:
        if scores.requires_grad:
            rows += plain.unpadded(arguments["batch"])
    size = seen.args.batch_size
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class Plain:
    """The models of a run after some of its steps, of plain parts of Transformers and torch."""

    def __init__(self, seen, step, num_classes=1):
        args = seen.args
        self.lm = AutoModelForCausalLM.from_pretrained(args.model).eval()
        self.cobbe = args.head == "cobbe"
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.head = torch.nn.Linear(self.lm.config.hidden_size, num_classes)
        if self.cobbe:
            self.parameters = [*self.lm.parameters(), self.gain, self.bias]
        else:
            self.parameters = [*self.lm.model.parameters(), *self.head.parameters()]
            self.parameters += [self.lm.lm_head.weight] if args.lm_coef else []
        if step < len(seen.updates):
            flat = seen.updates[step].weights
        else:
            flat = adamw(seen.updates)[-1]
        torch.nn.utils.vector_to_parameters(flat.clone(), self.parameters)

    def logits(self, example):
        """Of each completion token (T, classes)."""
        ids = torch.tensor([example.prompt + example.completion])
        hidden = self.lm.model(ids).last_hidden_state[0, len(example.prompt) :]
        if self.cobbe:
            return self.gain * (hidden @ self.lm.lm_head.weight[-1:].T) + self.bias
        return self.head(hidden)

    def step_probs(self, example, classes):
        """Log-probs of the classes at each step: a list of lists, and P(right) of each."""
        logits = self.logits(example)
        logps = [logits[place].log_softmax(-1).tolist() for place in example.places]
        if classes == 1:
            return logps, [logits[place, 0].sigmoid().item() for place in example.places]
        return logps, [1 - math.exp(row[0]) for row in logps]


def class_of(label, num_classes):
    """wrong, neutral, right of three; wrong, right of two."""
    return {-1: 0, 0: 1, 1: num_classes - 1}[label]


def process_loss(model, examples, num_classes):
    """Cross-entropy at the ends of labelled steps: mean over all of the examples'."""
    losses = []
    for example in examples:
        logps = model.logits(example).log_softmax(-1)
        for place, label in zip(example.places, example.labels, strict=True):
            if label is not None:
                losses.append(-logps[place, class_of(label, num_classes)])
    return sum(losses) / len(losses)


def outcome_loss(model, examples):
    """Binary cross-entropy: mean over a completion's tokens, then over completions."""
    total = 0.0
    for example in examples:
        p = model.logits(example)[:, 0].sigmoid()
        likely = p if example.outcome else 1 - p
        total = total - likely.log().mean() / len(examples)
    return total


def loss_of(model, examples, num_classes):
    if num_classes == 1:
        return outcome_loss(model, examples)
    return process_loss(model, examples, num_classes)


def lm_loss(model, examples):
    """-mean of log pi over the tokens of right completions; 0 without such."""
    right = [plain.token_logps(model.lm, *x.ids) for x in examples if x.outcome]
    return -torch.cat(right).mean() if right else torch.zeros(())


def num_classes_of(kind):
    return {"process": 3, "two classes": 2}.get(kind, 1)


def steps_of(seen, tokenizer):
    """Examples that each step trained on, found by their ids."""
    known = {str(x.ids): x for x in examples_of(seen.args.dataset, tokenizer)}
    return [[known[str(ids)] for ids in rows] for rows in trained_on(seen)]


@every_kind
def test_every_step_equals_a_plain_loop(runs, kind, toy_tokenizer):
    """Loss, gradient before and after the clip, the language model's loss and lengths, from the
    weights before each step; then AdamW by its formula."""
    seen, classes = runs[kind], num_classes_of(kind)
    after = adamw(seen.updates)
    clipped = 0
    for i, examples in enumerate(steps_of(seen, toy_tokenizer)):
        model, row = Plain(seen, i, classes), seen.steps[i]
        loss = loss_of(model, examples, classes)
        if seen.args.lm_coef:
            of_right = lm_loss(model, examples)
            loss = loss + 0.7 * of_right
            assert row["lm_loss"] == pytest.approx(of_right.item(), rel=1e-4)
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters]
        gradient = observe.flat(grads)
        norm = gradient.norm().item()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
        lengths = [len(x.completion) for x in examples]
        assert row["completion_length"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)
        want = gradient * min(1, 0.7 / norm)
        assert torch.allclose(seen.updates[i].gradient, want, atol=1e-4)
        if i + 1 < len(seen.updates):
            assert torch.allclose(seen.updates[i + 1].weights, after[i], atol=1e-6)
        clipped += norm > 0.7
    assert clipped and len(seen.steps) == len(seen.updates) == {"two classes": 4}.get(kind, 5)


@every_kind
def test_it_trains_on_every_row_once_an_epoch(runs, kind, toy_tokenizer):
    """The tokens of every row by hand, less those dropped; and a last short step."""
    seen = runs[kind]
    want = [x.ids for x in examples_of(seen.args.dataset, toy_tokenizer)]
    rows = [row for step in trained_on(seen) for row in step]
    assert sorted(rows) == sorted(want + want)
    assert len(want) == {"two classes": 7}.get(kind, 9)


@every_kind
def test_the_rate_of_every_step(runs, kind):
    """Two steps of warm-up from 0, then a line to 0: as used and as logged."""
    seen = runs[kind]
    want = rates(seen.args, len(seen.steps))
    assert [update.lr for update in seen.updates] == pytest.approx(want)
    assert [row["lr"] for row in seen.steps] == pytest.approx(want, rel=1e-5)


@every_kind
def test_rows_of_metrics_have_these_figures(runs, kind):
    seen = runs[kind]
    names = {"loss", "grad_norm", "lr", "completion_length", "tokens_per_second"}
    names |= {"lm_loss"} if seen.args.lm_coef else set()
    assert all(set(row) == names | {"step", "seconds"} for row in seen.steps)
    names = {"eval_auc", "eval_best_of_n", "eval_random_of_n", "eval_loss", "eval_accuracy"}
    if seen.args.supervision == "process":
        names |= {"eval_f1", "eval_balanced_accuracy"}
    assert all(set(row) == names | {"step", "seconds"} for row in seen.evals)
    last = len(seen.steps)
    assert [row["step"] for row in seen.evals] == [0, 3, last]
    assert [row["step"] for row in seen.steps] == list(range(1, last + 1))


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


# --- Evaluation -----------------------------------------------------------------------------------

COMBINE = {
    "product": math.prod, "minimum": min, "last": lambda x: x[-1], "mean": lambda x: sum(x) / len(x)
}  # fmt: skip


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def auc_by_hand(scored):
    """scored: (score, outcome) -> share of pairs of right and wrong in their order, ties half."""
    right = [score for score, outcome in scored if outcome == 1]
    wrong = [score for score, outcome in scored if outcome == 0]
    return mean((a > b) + 0.5 * (a == b) for a in right for b in wrong)


def best_of_n_by_hand(examples, scores):
    """The accuracy of each prompt's best completion and of any, where several are known."""
    best, chance = [], []
    for question in sorted({x.question for x in examples}):
        known = [i for i, x in enumerate(examples)
                 if x.question == question and x.outcome is not None]  # fmt: skip
        if len(known) > 1:
            top = max(known, key=lambda i: scores[i])
            best.append(examples[top].outcome)
            chance.append(mean(examples[i].outcome for i in known))
    return mean(best), mean(chance)


def f1_by_hand(examples, probs):
    """Harmonic mean of the shares of wrong solutions whose first error is found, and of right ones
    in which none is."""
    hits = {0: [], 1: []}
    for example, row in zip(examples, probs, strict=True):
        if example.outcome is not None:
            doubted = [i for i, p in enumerate(row) if p < 0.5]
            errors = [i for i, label in enumerate(example.labels) if label == -1]
            hits[example.outcome].append(doubted[:1] == errors[:1])
    wrong, right = mean(hits[0]), mean(hits[1])
    return 2 * wrong * right / max(wrong + right, 1e-9)


def process_metrics_by_hand(model, examples, logps, probs, classes):
    """eval_loss, accuracy, balanced accuracy and F1 of the labelled steps."""
    hits = {}
    for example, rows in zip(examples, logps, strict=True):
        for row, label in zip(rows, example.labels, strict=True):
            if label is not None:
                hits.setdefault(label, []).append(row.index(max(row)) == class_of(label, classes))
    flat = [hit for label in hits for hit in hits[label]]
    return {
        "eval_loss": process_loss(model, examples, classes).item(),
        "eval_accuracy": mean(flat),
        "eval_balanced_accuracy": mean(mean(hits[label]) for label in hits),
        "eval_f1": f1_by_hand(examples, probs),
    }


def metrics_by_hand(seen, step, tokenizer, classes, how):
    """All held-out metrics after this step, and the scores of the examples."""
    examples = examples_of(seen.args.eval_dataset, tokenizer)
    model = Plain(seen, step, classes)
    with torch.no_grad():
        both = [model.step_probs(example, classes) for example in examples]
        logps, probs = [x for x, _ in both], [x for _, x in both]
        scores = [COMBINE[how](row) for row in probs]
        known = [(s, x.outcome) for s, x in zip(scores, examples, strict=True)
                 if x.outcome is not None]  # fmt: skip
        best, chance = best_of_n_by_hand(examples, scores)
        metrics = {"eval_auc": auc_by_hand(known), "eval_best_of_n": best}
        metrics["eval_random_of_n"] = chance
        if classes > 1:
            metrics |= process_metrics_by_hand(model, examples, logps, probs, classes)
        else:
            metrics["eval_loss"] = outcome_loss(model, examples).item()
            metrics["eval_accuracy"] = mean((s > 0.5) == bool(o) for s, o in known)
    return metrics, scores, [x.outcome for x in examples]


@every_kind
def test_held_out_metrics_equal_a_plain_loop(runs, kind, toy_tokenizer):
    """At each evaluation, with the weights of then: several prompts, several solutions each, some
    with steps that nobody rated, and the scores that are drawn."""
    seen, classes = runs[kind], num_classes_of(kind)
    how = seen.args.solution_score
    how = {"auto": "product" if classes > 1 else "last"}.get(how, how)
    assert len(seen.evals) == len(seen.histograms) == 3
    for row, drawn in zip(seen.evals, seen.histograms, strict=True):
        got = metrics_by_hand(seen, row["step"], toy_tokenizer, classes, how)
        want, scores, outcomes = got
        assert {name: row[name] for name in want} == pytest.approx(want, rel=2e-4)
        assert list(drawn) == ["wrong", "right"]
        for outcome, name in enumerate(drawn):
            mine = [s for s, o in zip(scores, outcomes, strict=True) if o == outcome]
            assert sorted(drawn[name].tolist()) == pytest.approx(sorted(mine), rel=1e-3)


def test_the_held_out_metrics_are_not_at_their_ends(runs):
    """Else the tests above would see little: of each metric, some evaluation is between 0 and 1."""
    names = ["eval_auc", "eval_best_of_n", "eval_random_of_n", "eval_accuracy"]
    for name in [*names, "eval_f1", "eval_balanced_accuracy"]:
        for supervision in ("process", "outcome"):
            found = [row[name] for kind in runs for row in runs[kind].evals
                     if runs[kind].args.supervision == supervision and name in row]  # fmt: skip
            assert not found or any(0.05 < x < 0.95 for x in found), name
            assert not found or len(set(found)) > 1 or name == "eval_random_of_n", name


def test_more_corners_of_the_metrics_by_hand():
    """Nothing known, one class, all found or none."""
    some, none = torch.tensor([0.5, 0.2]), torch.tensor([math.nan, math.nan])
    assert all(x.isnan() for x in prm.best_of_n(some, none, ["a", "a"]))
    assert all(x.isnan() for x in prm.best_of_n(some, torch.tensor([1.0, 0.0]), ["a", "b"]))
    first = torch.tensor([0, 1, -1])
    assert prm.processbench_f1(first, first) == 1.0
    assert prm.processbench_f1(torch.tensor([1, -1, 0]), first) == 0.0
    labels = torch.tensor([0, 0, 0, 1, -100])
    assert prm.balanced_accuracy(torch.tensor([0, 0, 0, 0, 0]), labels) == 0.5
    scores, right = torch.tensor([0.3, 0.3, 0.1]), torch.tensor([1.0, 0.0, 0.0])
    assert prm.auc(scores, right) == pytest.approx(0.75)


def test_a_neutral_label_of_a_held_out_row_alone_makes_three_classes(start, tmp_path):
    rows = write(tmp_path / "rows.jsonl", two_classes(PROCESS_ROWS))
    got = start(dataset=rows, num_epochs=1)
    config = json.loads((got.folder / "final" / "config.json").read_text())
    assert config["id2label"] == {"0": "wrong", "1": "neutral", "2": "right"}
    assert math.isfinite(got.evals[0]["eval_loss"])


# --- The order of the rows ------------------------------------------------------------------------


def test_completions_of_a_prompt_follow_each_other(start, toy_tokenizer):
    """In steps of one: each epoch has each row once, prompt by prompt, and an order of its own."""
    got = start(batch_size=1, num_epochs=3)
    rows = [row for step in trained_on(got) for row in step]
    want = sorted(x.ids for x in examples_of(got.args.dataset, toy_tokenizer))
    orders = []
    for epoch in (rows[:9], rows[9:18], rows[18:]):
        assert sorted(epoch) == want
        prompts = [str(prompt) for prompt, _ in epoch]
        changes = [a != b for a, b in zip(prompts, prompts[1:], strict=False)]
        assert sum(changes) == 3
        orders.append(prompts)
    assert len(rows) == 27 and len({str(order) for order in orders}) == 3


# --- What is saved --------------------------------------------------------------------------------


@every_kind
def test_the_saved_model_is_the_last_step(runs, kind, toy_tokenizer):
    """Its logits under plain Transformers are those of the last weights, with a linear head; and
    its config says how to read it."""
    seen, classes = runs[kind], num_classes_of(kind)
    final = seen.folder / "final"
    model = AutoModelForTokenClassification.from_pretrained(final).eval()
    last = Plain(seen, len(seen.updates), classes)
    for example in examples_of(seen.args.eval_dataset, toy_tokenizer)[:3]:
        logits = model(torch.tensor([example.prompt + example.completion])).logits[0]
        assert torch.allclose(logits[len(example.prompt) :], last.logits(example), atol=1e-4)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    config = json.loads((final / "config.json").read_text())
    names = {1: ["right"], 2: ["wrong", "right"], 3: ["wrong", "neutral", "right"]}[classes]
    assert config["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert config["label2id"] == {name: i for i, name in enumerate(names)}
    assert config["step_separator"] == ("\n" if classes > 1 else "")
    said = {"auto": "product" if classes > 1 else "last"}
    how = seen.args.solution_score
    assert config["solution_score"] == said.get(how, how)
    assert config["reward_bias"] == 0.0 and config["classifier_dropout"] == 0.0
    assert config["architectures"] == ["LlamaForTokenClassification"]
    assert AutoTokenizer.from_pretrained(final).chat_template


@pytest.mark.parametrize("supervision", ["process", "outcome"])
def test_a_saved_model_whose_pad_is_its_eos_is_read_at_its_eos(tmp_path, supervision):
    """By load_reward, as it was trained: it is not taken for a model made elsewhere, which would
    be read at the last id that is not pad."""
    model = make_model("llama")
    model.config.pad_token_id = 1
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(pad_is_eos=True).save_pretrained(tmp_path / "model")
    rows = STEPS if supervision == "process" else OUTCOMES
    run(args := tiny_args(str(tmp_path / "model"), tmp_path, rows, learning_rate=1e-2))
    final = f"{args.output_dir}/final"
    trained = AutoModelForTokenClassification.from_pretrained(final).eval()
    tokenizer = make_tokenizer()
    want = []
    for text in ("3", "ab"):
        ids = tokenizer(f"<bos>[user]1+2<eos>[assistant]{text}" + "\n" * (rows is STEPS) + "<eos>")
        logits = trained(torch.tensor([ids["input_ids"]])).logits[0]
        wrong = logits[-2].softmax(-1)[0].item()
        want.append(1 - wrong if rows is STEPS else logits[-1, 0].sigmoid().item())
    got = score_with(final, ["1+2", "1+2"], ["3", "ab"])
    assert got == pytest.approx(want, abs=1e-5) and abs(got[0] - got[1]) > 1e-3


def test_the_histogram_is_drawn(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    held = write(tmp_path / "held.jsonl", OUTCOMES)
    run(args := tiny_args(tiny, tmp_path, OUTCOMES, eval_dataset=held))
    assert (Path(args.output_dir) / "reward_histogram.png").stat().st_size > 1000


# --- Flags ----------------------------------------------------------------------------------------


def simple(numbers):
    """Rows of different prompts, one right step and one wrong one."""
    return [{"prompt": f"{i}+1", "steps": [f"{i + 1}", "x"], "labels": [1, -1]} for i in numbers]


def prompts_of(seen):
    """Texts of the prompts that a run trained on, without the template, in their order."""
    tokenizer = AutoTokenizer.from_pretrained(seen.args.model)
    rows = [prompt for step in trained_on(seen) for prompt, _ in step]
    texts = tokenizer.batch_decode(rows)
    return [text.split("<user>")[-1].removesuffix("<assistant>") for text in texts]


def flag_model(run, base, folder):
    """The backbone and the tokenizer are those of the folder, and the head is new."""
    model = AutoModelForCausalLM.from_pretrained(base.args.model)
    backbone = observe.flat(model.model.parameters())
    assert torch.equal(base.updates[0].weights[: len(backbone)], backbone)
    assert len(base.updates[0].weights) == len(backbone) + 3 * 32 + 3
    for p in model.parameters():
        p.data *= 0.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base.args.model).save_pretrained(folder)
    got = run(model=str(folder), num_epochs=1)
    assert torch.equal(got.updates[0].weights[: len(backbone)], backbone * 0.5)
    observe.refused(run, "nothing there", "no such tokenizer", model=str(folder / "nothing there"))


def flag_dataset(run, base, folder):
    got = run(dataset=write(folder / "rows.jsonl", simple(range(3))), num_epochs=1)
    assert sorted(prompts_of(got)) == ["0+1", "1+1", "2+1"]


def flag_eval_dataset(run, base, folder):
    """Its rows are evaluated and not trained on, in addition to all rows of --dataset."""
    path = write(folder / "held.jsonl", simple(range(3)))
    got = run(eval_dataset=path, num_epochs=1)
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    with torch.no_grad():
        want = process_loss(Plain(got, 0, 3), examples_of(path, tokenizer), 3).item()
    assert got.evals[0]["eval_loss"] == pytest.approx(want, rel=1e-4)
    assert len(prompts_of(got)) == 9


def flag_eval_size(run, base, folder):
    """As many prompts of --dataset, a tenth at the most, with all their rows; 0: none."""
    rows = simple(range(30)) + [row | {"steps": ["y", "z"]} for row in simple(range(30))]
    path = write(folder / "rows.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    for size, held_out in ((0, 0), (2, 2), (9, 3)):
        got = run(dataset=path, eval_dataset="", eval_size=size, num_epochs=1, batch_size=20)
        trained = prompts_of(got)
        assert len(trained) == 60 - 2 * held_out and len(set(trained)) == 30 - held_out
        assert bool(got.evals) == bool(size)
        if size:
            held = [x for x in examples_of(path, tokenizer) if x.question not in trained]
            with torch.no_grad():
                want = process_loss(Plain(got, 0, 2), held, 2).item()
            assert got.evals[0]["eval_loss"] == pytest.approx(want, rel=1e-4)


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
    """Another order of the prompts and another head; the same seed gives the same run."""
    rows = dict(dataset=write(folder / "rows.jsonl", simple(range(12))), eval_dataset="")
    rows |= dict(eval_size=1, batch_size=1, num_epochs=1)
    first, again, other = [run(seed=seed, **rows) for seed in (0, 0, 1)]
    assert prompts_of(first) == prompts_of(again) != prompts_of(other)
    assert set(prompts_of(first)) != set(prompts_of(other))
    heads = [x.updates[0].weights[-66:] for x in (first, again, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert first.untimed() == again.untimed()
    backbones = [x.updates[0].weights[:-66] for x in (first, other)]
    assert torch.equal(*backbones)
    assert prompts_of(run(seed=1)) != prompts_of(base)


def flag_supervision(run, base, folder):
    """test_every_step_... has both by value; the files of one are not those of the other."""
    outcome = run(supervision="outcome", num_epochs=1)
    assert outcome.results("completion_scores")[0].shape[-1] == 1
    assert base.results("completion_scores")[0].shape[-1] == 3
    path = outcome.args.dataset
    observe.refused(run, path, "steps", dataset=path)


def flag_step_separator(run, base, folder):
    """It ends each step, in what is trained on and in the saved config."""
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    got = run(step_separator=" # ", num_epochs=1, eval_dataset="", eval_size=0, batch_size=9)
    want = examples_of(got.args.dataset, tokenizer, separator=" # ")
    assert sorted(trained_on(got)[0]) == sorted(x.ids for x in want)
    loss = process_loss(Plain(got, 0, 3), want, 3).item()
    assert got.steps[0]["loss"] == pytest.approx(loss, rel=1e-4)
    config = json.loads((got.folder / "final" / "config.json").read_text())
    assert config["step_separator"] == " # "
    shell, default = run(step_separator="\\n", num_epochs=1), run(num_epochs=1)
    assert shell.untimed() == default.untimed()
    observe.refused(run, "--step-separator", "within a step", step_separator="+")


def flag_solution_score(run, base, folder):
    """Of held-out scores and in the config; KINDS has more of them with outcomes."""
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    kinds = [("process", 3, how) for how in COMBINE] + [("outcome", 1, "mean")]
    scores = set()
    for supervision, classes, how in kinds:
        got = run(supervision=supervision, solution_score=how, num_epochs=1, eval_every=50)
        config = json.loads((got.folder / "final" / "config.json").read_text())
        assert config["solution_score"] == how
        want, values, outcomes = metrics_by_hand(got, 0, tokenizer, classes, how)
        assert got.evals[0]["eval_auc"] == pytest.approx(want["eval_auc"], rel=1e-4)
        right = [s for s, o in zip(values, outcomes, strict=True) if o == 1]
        drawn = sorted(got.histograms[0]["right"].tolist())
        assert drawn == pytest.approx(sorted(right), rel=1e-3)
        scores.add(str(right))
    assert len(scores) == 5


def flag_head(run, base, folder):
    """cobbe begins as the logit of the vocabulary's last token; only with outcomes."""
    tokenizer = AutoTokenizer.from_pretrained(base.args.model)
    got = run(supervision="outcome", head="cobbe", num_epochs=1)
    lm = AutoModelForCausalLM.from_pretrained(base.args.model).eval()
    example = examples_of(got.args.eval_dataset, tokenizer)[0]
    logits = lm(torch.tensor([example.prompt + example.completion])).logits[0, -1, -1]
    assert got.histograms[0]["right"][0].item() == pytest.approx(logits.sigmoid().item(), rel=1e-4)
    observe.refused(run, "--supervision process", head="cobbe")


def flag_lm_coef(run, base, folder):
    """The weight of the language model's loss in the first step's, which is the same one."""
    rows = []
    for coef in (0.0, 0.5, 2.0):
        got = run(supervision="outcome", lm_coef=coef, num_epochs=1)
        rows.append(got.steps[0])
    alone, half, twice = rows
    assert "lm_loss" not in alone and half["lm_loss"] == twice["lm_loss"] > 1
    assert half["loss"] == pytest.approx(alone["loss"] + 0.5 * half["lm_loss"], rel=1e-4)
    assert twice["loss"] == pytest.approx(alone["loss"] + 2 * half["lm_loss"], rel=1e-4)
    observe.refused(run, "--lm-coef", lm_coef=0.5)


def flag_num_epochs(run, base, folder):
    """test_completions_of_a_prompt_... has the order of three."""
    got = run(num_epochs=3)
    assert len(prompts_of(got)) == 27 and len(got.steps) == 7


def flag_batch_size(run, base, folder):
    got = run(batch_size=7)
    assert [len(step) for step in trained_on(got)] == [7, 7, 4]
    assert len(got.updates) == len(got.steps) == 3


def flag_micro_batch_size(run, base, folder):
    """So many rows a forward at the most, in training and evaluation; nothing else is changed."""
    for seen, size in ((run(micro_batch_size=2), 2), (base, 3)):
        calls = seen.calls["completion_scores"]
        trained = [len(x["batch"].prompt_of) for x, scores in calls if scores.requires_grad]
        held = [len(x["batch"].prompt_of) for x, scores in calls if not scores.requires_grad]
        assert max(trained) == max(held) == size
        assert len(trained) == {2: 9, 3: 9}[size] and len(held) == {2: 18, 3: 12}[size]
        if size == 2:
            observe.changes_nothing(seen, base)


def flag_max_length(run, base, folder):
    """Rows whose labels do not fit are dropped, and of others the unlabelled steps beyond are cut;
    past the model's context of 256 it is the context that counts."""
    rows = [
        {"prompt": "1", "steps": ["a" * 20, "b" * 9], "labels": [1, -1]},  # 4 + 21 + 10, and an end
        {"prompt": "2", "steps": ["a" * 20, "b" * 9], "labels": [-1]},
        {"prompt": "3", "steps": ["c" * 300], "labels": [1]},
        {"prompt": "4", "steps": ["c", "d" * 300], "labels": [1]},
    ]
    path = write(folder / "rows.jsonl", rows)
    lengths = {}
    for most in (24, 25, 34, 35, 36, 1024):
        got = run(dataset=path, max_length=most, num_epochs=1, eval_dataset="", eval_size=0)
        trained = [row for step in trained_on(got) for row in step]
        lengths[most] = sorted(len(prompt) + len(completion) for prompt, completion in trained)
    assert lengths == {
        24: [24], 25: [25, 25], 34: [34, 34], 35: [35, 35, 35], 36: [36, 36, 36],
        1024: [36, 36, 256],
    }  # fmt: skip
    long = [{"prompt": "1", "completion": "a" * n, "label": n == 9} for n in (9, 19, 20)]
    path = write(folder / "long.jsonl", long)
    got = run(supervision="outcome", dataset=path, max_length=24, num_epochs=1, eval_dataset="")
    trained = [row for step in trained_on(got) for row in step]
    assert sorted(len(completion) for _, completion in trained) == [10, 20]


def flag_lr_schedule(run, base, folder):
    """The rate of every step, used and logged, by formula, for each schedule."""
    for schedule in ("constant", "cosine", "linear"):
        got = run(lr_schedule=schedule, eval_dataset="", eval_size=0)
        want = rates(got.args, 5)
        assert [update.lr for update in got.updates] == pytest.approx(want)
        assert [row["lr"] for row in got.steps] == pytest.approx(want, rel=1e-5)


def flag_warmup_ratio(run, base, folder):
    """0.35 of five steps are two, 0.6 three, 0 none."""
    for ratio, warmup in ((0.0, 0), (0.25, 1), (0.35, 2), (0.6, 3)):
        got = run(warmup_ratio=ratio, lr_schedule="constant", eval_dataset="", eval_size=0)
        want = [3e-3 * min(1, i / max(1, warmup)) if warmup else 3e-3 for i in range(5)]
        assert [update.lr for update in got.updates] == pytest.approx(want)


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
    "gradient_checkpointing": observe.flag_gradient_checkpointing,
    "share_prompts": observe.flag_share_prompts,
    "supervision": flag_supervision,
    "step_separator": flag_step_separator,
    "solution_score": flag_solution_score,
    "head": flag_head,
    "lm_coef": flag_lm_coef,
    "num_epochs": flag_num_epochs,
    "batch_size": flag_batch_size,
    "micro_batch_size": flag_micro_batch_size,
    "max_length": flag_max_length,
    "learning_rate": observe.flag_learning_rate,
    "lora_rank": observe.flag_lora_rank,
    "lr_schedule": flag_lr_schedule,
    "warmup_ratio": flag_warmup_ratio,
    "max_grad_norm": observe.flag_max_grad_norm,
    "eval_size": flag_eval_size,
    "eval_every": observe.flag_eval_every,
    "checkpoint_every": observe.flag_checkpoint_every,
}


def test_every_flag_is_in_the_table():
    observe.has_every_flag(prm, FLAGS)


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(flag, start, base, tmp_path):
    FLAGS[flag](start, base, tmp_path)


def test_flags_of_the_language_model(start, runs):
    """It has the dtype, recomputes, and shares prompts, or not, like the reward model."""
    changes = dict(KINDS["lm"], num_epochs=1)
    got = start(**changes, dtype="bfloat16", gradient_checkpointing=True, share_prompts=False)
    models = got.results("load_model")
    assert len(models) == 2 and all(model.recompute for model in models)
    assert all(model.autocast_dtype == torch.bfloat16 for model in models)
    assert set(got.arguments("completion_logps", "share_prompts")) == {False}
    assert set(runs["lm"].arguments("completion_logps", "share_prompts")) == {True}


def test_defaults():
    """What the help says of auto, and what the toy is trained with."""
    args = prm.Args(model="m", dataset="d")
    assert (args.supervision, args.step_separator, args.solution_score) == (
        "process",
        r"\n",
        "auto",
    )
    assert (args.head, args.lm_coef, args.num_epochs, args.seed) == ("linear", 0.0, 1, 0)
    assert (args.batch_size, args.micro_batch_size, args.max_length) == (32, 8, 1024)
    assert (args.learning_rate, args.lr_schedule, args.warmup_ratio) == (1e-5, "linear", 0.03)
    assert (args.max_grad_norm, args.eval_size) == (1.0, 64)
    assert (args.eval_every, args.checkpoint_every) == (100, 100)
    assert (args.device, args.dtype, args.output_dir) == ("auto", "auto", "runs/prm")
    assert args.share_prompts and not args.gradient_checkpointing
    assert not (args.resume or args.overwrite)
    toy = prm.Args(**prm.TOY)
    assert (toy.model, toy.dataset) == ("toy/model", "toy/prm_train.jsonl")
    assert (toy.eval_dataset, toy.num_epochs) == ("toy/prm_test.jsonl", 3)
    assert (toy.learning_rate, toy.lr_schedule, toy.warmup_ratio) == (1e-3, "cosine", 0.05)
    assert toy.micro_batch_size == 32


# --- The checkpoint -------------------------------------------------------------------------------


def killed_and_resumed(start, folder, leave_out="", **changes):
    """A run that dies in its fourth step, and goes on from the checkpoint of the second; without
    one of the parts. -> Seen of the second half."""
    begin = plumbing.Run.begin

    def without(self, parts, num_steps):
        left = {name: part for name, part in parts.items() if name != leave_out}
        begin(self, left, num_steps)

    changes |= dict(output_dir=str(folder / (leave_out or "all")), checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.Run, "begin", without)
        with observe.killed(plumbing.Run, "log", 6):  # of steps 0 (evaluation), 1, 2, 3, 3, 4
            start(**changes)
        return start(**changes, resume=True)


def last_weights(seen):
    return observe.flat(seen.weights().values())


@pytest.mark.parametrize("kind", ["process", "cobbe", "lm"])
def test_a_resumed_run_is_the_unbroken_one(start, runs, tmp_path, kind):
    """Weights, rates, metrics, bit for bit, with a schedule that warms up and falls."""
    got, whole = killed_and_resumed(start, tmp_path, **KINDS[kind]), runs[kind]
    assert len(got.updates) == 3
    for mine, theirs in zip(got.updates, whole.updates[2:], strict=True):
        assert mine.lr == theirs.lr and torch.equal(mine.weights, theirs.weights)
        assert torch.equal(mine.gradient, theirs.gradient)
    assert got.untimed() == whole.untimed()
    assert torch.equal(last_weights(got), last_weights(whole))


def test_each_part_of_the_checkpoint_is_needed(start, base, tmp_path):
    """Left out, the resumed run is another one: of all parts there are."""
    state = torch.load(base.folder / "checkpoint" / "state.pt", weights_only=True)
    parts = set(state) - {"torch", "cuda", "random", "step", "seconds", "sizes"}
    assert len(parts) == 3 and state["step"] == 5
    for name in parts:
        got = killed_and_resumed(start, tmp_path, leave_out=name)
        assert not torch.equal(last_weights(got), last_weights(base)), name


# --- What is said ---------------------------------------------------------------------------------


def test_what_is_printed(start, tmp_path, capsys):
    """Rows dropped, of which file, and the figures of steps and evaluations."""
    got = start()
    lines = capsys.readouterr().out.splitlines()
    said = f"of 10 rows, dropped 1: no label, or one beyond --max-length {CONTEXT}"
    assert f"{got.args.dataset}: {said}" in lines
    lines = [line.split() for line in lines if line.startswith("step")]
    shown = {line[1]: set(line[2::2]) for line in lines if "eval_loss" not in line}
    assert shown == {f"{i}/5": {"loss", "lr"} for i in range(1, 6)}
    held = [set(line[2::2]) for line in lines if "eval_loss" in line]
    assert held == [{"eval_loss", "eval_balanced_accuracy", "eval_f1", "eval_auc"}] * 3
    path = write(tmp_path / "held.jsonl", simple([1]) + [PROCESS_ROWS[-1]])
    start(eval_dataset=path, num_epochs=1)
    assert f"{path}: of 2 rows, dropped 1" in capsys.readouterr().out
    none = write(tmp_path / "none.jsonl", [PROCESS_ROWS[-1]])
    observe.refused(start, none, "no row fits in --max-length", eval_dataset=none)


# --- Rewards of what was trained ------------------------------------------------------------------


def grpo_run(tmp_path, supervision, reward_model):
    """One step of GRPO on the toy, two prompts of two completions -> Seen."""
    rows = write(tmp_path / "p.jsonl", [{"prompt": f"{i}+1", "answer": i + 1} for i in range(4)])
    return observe.observe(grpo, grpo.Args(
        model=str(ROOT / "toy/model"), dataset=rows, num_steps=1, num_prompts=2, num_generations=2,
        eval_size=0, max_new_tokens=24, reward_model=reward_model, device="cpu",
        supervision=supervision, output_dir=str(tmp_path / supervision), log_samples=4,
    ))  # fmt: skip


@pytest.mark.filterwarnings("ignore:over 20 %")
def test_process_rewards_of_a_prm_train_grpo(tiny, tmp_path):
    """Each completion's rewards are P(right) of its steps by plain Transformers, or the product of
    them; the step's metrics are made of these, and the policy moves."""
    run(args := tiny_args(tiny, tmp_path, STEPS, learning_rate=1e-2))
    final = f"{args.output_dir}/final"
    model = AutoModelForTokenClassification.from_pretrained(final).eval()
    tokenizer = plumbing.load_tokenizer(final)
    for supervision in ("process", "outcome"):
        seen = grpo_run(tmp_path, supervision, final)
        row, values, right = seen.steps[0], [], []
        batch, texts, _ = seen.results("generate")[0]
        asked = seen.arguments("generate", "prompts")[0]
        logged = {sample["completion"]: sample["reward"] for sample in seen.samples}
        assert len(logged) == 2 and len(texts) == 4
        for i, text in zip(batch.prompt_of.tolist(), texts, strict=True):
            steps = [x for x in text.split("\n") if x.strip()]
            logits = logits_of(model, tokenizer, asked[i], [x + "\n" for x in steps])
            ends = [len("\n".join(steps[: i + 1])) for i in range(len(steps))]
            probs = [1 - logits[end].softmax(-1)[0].item() for end in ends]
            by_step = supervision == "process"
            want = probs if by_step else math.prod(probs)
            if text in logged:
                assert logged[text] == pytest.approx(want, abs=1e-5)
            right += grpo.verifier(None, [text], [{"answer": int(asked[i][0]) + 1}])
            values.append(mean(probs) if by_step else want)
        assert len(set(values)) > 1
        assert row["reward"] == pytest.approx(mean(values), rel=1e-4)
        assert row["gold_reward"] == pytest.approx(mean(right)) and row["grad_norm"] > 0
        assert seen.updates[0].gradient.norm() > 0


# --- Learning -------------------------------------------------------------------------------------


def learned(tmp_path, *flags):
    """The held-out metrics of `python prm.py`, as a user would run it."""
    command = [sys.executable, ROOT / "prm.py", "--output-dir", tmp_path / "run", *flags]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    return [row for row in rows if "eval_loss" in row]


def test_learning_as_a_user_would(tmp_path):
    first, *_, last = learned(tmp_path, "--num-epochs", "1")
    assert first["eval_balanced_accuracy"] < 0.5 and last["eval_balanced_accuracy"] > 0.8
    assert last["eval_f1"] > 0.8


@pytest.mark.slow
def test_outcomes_are_learned_as_a_user_would(tmp_path):
    lines = (ROOT / "toy/orm_train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:1800]))
    first, *_, last = learned(
        tmp_path, "--num-epochs", "2", "--supervision", "outcome", "--dataset",
        str(tmp_path / "rows.jsonl"), "--eval-dataset", str(ROOT / "toy/orm_test.jsonl"),
        "--eval-every", "1000",
    )  # fmt: skip
    assert first["eval_auc"] < 0.7 and last["eval_auc"] > 0.85


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "1", "steps": ["a", "b"], "labels": [1, 2]}, "labels [1, 2]"),
        ({"prompt": "1", "steps": ["a"], "labels": [1, -1]}, "1 steps"),
        ({"prompt": "1", "steps": ["a", " "], "labels": [1, -1]}, "empty"),
        ({"prompt": "1", "steps": ["a"]}, "labels"),
        ({"prompt": "1", "steps": ["a"], "labels": [None]}, "no row fits"),
        ({"prompt": "1", "completion": "a", "label": "yes"}, "yes"),
        ({"prompt": "1", "completion": "a", "label": -1}, "-1"),
        ({"prompt": "1", "completion": " ", "label": True}, "completion"),
    ],
)  # fmt: skip
def test_bad_rows_end_with_one_line(tiny, tmp_path, row, says):
    with pytest.raises(ValueError) as stopped:
        run(tiny_args(tiny, tmp_path, [row]))
    assert says in str(stopped.value) and "\n" not in str(stopped.value)
    assert not (tmp_path / "run").exists()


def test_flags_that_do_not_go_together(tiny, tmp_path):
    for bad in (dict(head="cobbe"), dict(lm_coef=0.1), dict(step_separator="")):
        with pytest.raises(ValueError, match="process"):
            run(tiny_args(tiny, tmp_path, STEPS, **bad))


def test_an_orm_cannot_reward_steps(tiny, tmp_path):
    run(args := tiny_args(tiny, tmp_path, OUTCOMES))
    with pytest.raises(ValueError, match="process"):
        score_with(f"{args.output_dir}/final", ["1"], ["2"], by_step=True)
