"""prm.py against hand values, plain loops, Transformers' own forward, and learning on the toy."""

import json
import math

import pytest
import test_rm_bt
import torch
from conftest import ROOT, make_tokenizer
from test_rm_bt import TOY, learned, run, write
from transformers import AutoModelForTokenClassification

import common
import grpo
import prm

STEPS = [
    {"prompt": "1+2", "steps": ["1+2=3", "3"], "labels": [1, 1]},
    {"prompt": "1+2", "steps": ["1+2=4", "then 4", "no"], "labels": [-1, 0, -1]},
    {"prompt": "44+55", "steps": ["a long first step", "b"], "labels": [1, -1],
     "remaining_steps": ["c"]},  # fmt: skip
]
OUTCOMES = [
    {"prompt": "1+2", "completion": "3", "label": True},
    {"prompt": "1+2", "completion": "a long wrong answer", "label": False},
    {"prompt": "44+55", "completion": "9\n9", "label": 1},
]


def tiny_args(tmp_path, rows, **changes):
    if "completion" in rows[0]:
        changes = dict(supervision="outcome") | changes
    return test_rm_bt.tiny_args(tmp_path, rows, prm, **changes)


def logits_of(model, tokenizer, prompt, pieces):
    """One sequence, written out by hand -> logits of its completion tokens."""
    head = tokenizer(f"<bos><user>{prompt}<assistant>", add_special_tokens=False)["input_ids"]
    tail = tokenizer("".join(pieces) + "<eos>", add_special_tokens=False)["input_ids"]
    return model(torch.tensor([head + tail])).logits[0, len(head):]


def fresh_model(args, labels):
    torch.manual_seed(args.seed)
    return common.load_model(
        AutoModelForTokenClassification, TOY, torch.device("cpu"), new_head=labels
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
        assert tokenizer.decode(ids[:end + 1]) == upto + separator
    assert ids[-1] == tokenizer.eos_token_id and ends[-1] == len(ids) - 2


def test_labels_cut_off_drop_the_row_and_other_steps_are_cut(tmp_path, capsys):
    rows = [
        {"prompt": "1", "steps": ["a" * 30, "b" * 40], "labels": [1, 1]},  # the second is cut off
        {"prompt": "1", "steps": ["a" * 30], "labels": [1], "remaining_steps": ["b" * 40]},
        {"prompt": "1", "steps": ["a"], "labels": [None]},
        {"prompt": "1", "steps": ["a"], "labels": [False]},
    ]
    assert run(tiny_args(tmp_path, rows))[0]["completion_length"] == (60 + 3) / 2
    assert "of 4 rows, dropped 2" in capsys.readouterr().out


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_step_on_step_labels_equals_a_plain_loop(tmp_path, size):
    row = run(args := tiny_args(tmp_path, STEPS, micro_batch_size=size))[0]
    model, tokenizer, losses = fresh_model(args, 3), common.load_tokenizer(TOY), []
    for example in STEPS:
        pieces = [s + "\n" for s in example["steps"] + example.get("remaining_steps", [])]
        logits = logits_of(model, tokenizer, example["prompt"], pieces)
        for i, label in enumerate(example["labels"]):
            p = logits[len("".join(pieces[:i + 1])) - 1].softmax(-1)  # one token a character
            losses.append(-p[label + 1].log())
    loss = sum(losses) / len(losses)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_step_on_outcomes_equals_a_plain_loop(tmp_path, size):
    row = run(args := tiny_args(tmp_path, OUTCOMES, micro_batch_size=size))[0]
    model, tokenizer, loss = fresh_model(args, 1), common.load_tokenizer(TOY), 0.0
    for example in OUTCOMES:
        p = logits_of(model, tokenizer, example["prompt"], [example["completion"]]).sigmoid()
        loss = loss - (p if example["label"] else 1 - p).log().mean() / 3
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_held_out_metrics_of_steps_equal_a_plain_loop(tmp_path):
    """In parts of two; the first two solutions have an error, at 0 and at 1, the third has none."""
    rows = [STEPS[1], STEPS[2] | {"remaining_steps": []}, STEPS[0], STEPS[1]]
    held = write(tmp_path / "held.jsonl", rows)
    row = run(args := tiny_args(tmp_path, STEPS, eval_dataset=held, micro_batch_size=2))[-1]
    model = AutoModelForTokenClassification.from_pretrained(f"{args.output_dir}/final").eval()
    tokenizer, losses, hits = common.load_tokenizer(TOY), [], {}
    scores, found, right = [], [], []
    for example in rows:
        pieces = [s + "\n" for s in example["steps"]]
        logits = logits_of(model, tokenizer, example["prompt"], pieces)
        probs, first = [], -1
        for i, label in enumerate(example["labels"]):
            p = logits[len("".join(pieces[:i + 1])) - 1].softmax(-1).tolist()
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


def test_a_step_may_not_hold_the_separator(tmp_path):
    """Generated text would be split there. At its end it is no matter; a shell's \\n is known."""
    rows = [{"prompt": "1", "steps": ["a\nb", "c"], "labels": [1, -1]}]
    with pytest.raises(SystemExit, match="--step-separator.*within a step"):
        run(tiny_args(tmp_path, rows))
    run(args := tiny_args(tmp_path, rows, step_separator="\\n\\n"))
    config = json.loads(open(f"{args.output_dir}/final/config.json").read())
    assert config["step_separator"] == "\n\n"
    ends = [{"prompt": "1", "steps": ["a\n", "c"], "labels": [1, -1]}]
    plain = [{"prompt": "1", "steps": ["a", "c"], "labels": [1, -1]}]
    got = [run(tiny_args(tmp_path / str(i), x))[0]["loss"] for i, x in enumerate((ends, plain))]
    assert got[0] == got[1]


def test_zeros_and_ones_are_not_taken_for_neutral_and_right(tmp_path):
    rows = [{"prompt": "1", "steps": ["a", "b"], "labels": [1, 0]}]
    with pytest.raises(SystemExit, match="neutral"):
        run(tiny_args(tmp_path, rows))


def test_the_lm_loss_is_of_right_completions(tmp_path):
    plain = run(tiny_args(tmp_path / "a", OUTCOMES))[0]
    both = run(tiny_args(tmp_path / "b", OUTCOMES, lm_coef=0.5, micro_batch_size=2))[0]
    model = common.load_model(prm.AutoModelForCausalLM, TOY, torch.device("cpu"))
    tokenizer = common.load_tokenizer(TOY)
    prompts, texts = zip(*[(r["prompt"], [r["completion"]]) for r in OUTCOMES if r["label"]],
                         strict=True)  # fmt: skip
    batch = common.encode(tokenizer, prompts, texts)
    nll = -common.completion_logps(model, batch).sum().item() / batch.completion_mask.sum().item()
    assert both["lm_loss"] == pytest.approx(nll, rel=1e-4)
    assert both["loss"] == pytest.approx(plain["loss"] + 0.5 * nll, rel=1e-4)


def score_with(folder, prompts, texts, by_step=False, micro_batch_size=2):
    score = common.load_reward("verifier", None, folder, torch.device("cpu"), "auto",
                               micro_batch_size, by_step)  # fmt: skip
    return score(prompts, texts, [{}] * len(texts))


@pytest.mark.parametrize("how", ["product", "minimum", "last", "mean"])
def test_the_saved_prm_scores_text_as_it_was_trained(tmp_path, how):
    """load_reward beside the saved folder under plain Transformers."""
    run(args := tiny_args(tmp_path, STEPS * 4, solution_score=how, num_epochs=2))
    final = f"{args.output_dir}/final"
    model = AutoModelForTokenClassification.from_pretrained(final).eval()
    tokenizer = common.load_tokenizer(final)
    assert model.config.id2label == {0: "wrong", 1: "neutral", 2: "right"}
    texts = ["1+2=3\n3", "1+2=4\n\nthen 4\nno\n", "x"]
    prompts = ["1+2", "1+2", "44+55"]
    steps = [[s for s in text.split("\n") if s] for text in texts]
    want = []
    for prompt, parts in zip(prompts, steps, strict=True):
        logits = logits_of(model, tokenizer, prompt, [s + "\n" for s in parts])
        ends = [len("\n".join(parts[:i + 1])) for i in range(len(parts))]
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
def test_the_saved_orm_reads_the_last_token(tmp_path, head):
    run(args := tiny_args(tmp_path, OUTCOMES * 4, head=head, num_epochs=2))
    final = f"{args.output_dir}/final"
    model = AutoModelForTokenClassification.from_pretrained(final).eval()
    tokenizer = common.load_tokenizer(final)
    got = score_with(final, ["1+2", "44+55"], ["3", "9\n9 or so"])
    want = [logits_of(model, tokenizer, p, [t])[-1, 0].sigmoid().item()
            for p, t in (("1+2", "3"), ("44+55", "9\n9 or so"))]  # fmt: skip
    assert got == pytest.approx(want, abs=1e-5) and got[0] != got[1]


def test_cobbes_head_is_a_gain_and_a_bias_on_one_logit(tmp_path):
    lm = common.load_model(prm.AutoModelForCausalLM, TOY, torch.device("cpu"))
    head, hidden = prm.CobbeHead(lm.get_output_embeddings()), torch.randn(2, 3, 128)
    assert torch.allclose(head(hidden)[..., 0], lm.lm_head(hidden)[..., -1], atol=1e-5)
    head.gain.data.fill_(3.0)
    head.bias.data.fill_(-1.0)
    want = 3 * lm.lm_head(hidden)[..., -1] - 1
    assert torch.allclose(head(hidden)[..., 0], want, atol=1e-4)
    assert torch.allclose(head.linear()(hidden)[..., 0], want, atol=1e-4)


def test_later_steps_do_not_change_earlier_scores(tmp_path):
    run(args := tiny_args(tmp_path, STEPS))
    final = f"{args.output_dir}/final"
    short, long = score_with(final, ["1+2"] * 2, ["1+2=3\nx", "1+2=3\nanother\nmore"], by_step=True)
    assert short[0] == pytest.approx(long[0], abs=1e-6) and short[1] != pytest.approx(long[1])


def test_process_rewards_of_a_prm_train_grpo(tmp_path):
    run(args := tiny_args(tmp_path, STEPS))
    rows = write(tmp_path / "p.jsonl", [{"prompt": f"{i}+1", "answer": i + 1} for i in range(4)])
    common_args = dict(
        model=str(TOY), dataset=rows, num_steps=1, num_prompts=2, num_generations=2, eval_size=0,
        max_new_tokens=24, reward_model=f"{args.output_dir}/final", device="cpu",
    )  # fmt: skip
    for supervision in ("process", "outcome"):
        folder = tmp_path / supervision
        grpo.main(grpo.Args(**common_args, supervision=supervision, output_dir=str(folder)))
        row = json.loads(open(folder / "metrics.jsonl").readline())
        assert row["grad_norm"] > 0 and "gold_reward" in row


def test_learning_as_a_user_would(tmp_path):
    first, *_, last = learned("prm.py", tmp_path, "--num-epochs", "1")
    assert first["eval_balanced_accuracy"] < 0.5 and last["eval_balanced_accuracy"] > 0.8
    assert last["eval_f1"] > 0.8


def test_outcomes_are_learned_as_a_user_would(tmp_path):
    first, *_, last = learned(
        "prm.py", tmp_path, "--num-epochs", "2", "--supervision", "outcome", "--dataset",
        str(ROOT / "toy/orm_train.jsonl"), "--eval-dataset", str(ROOT / "toy/orm_test.jsonl"),
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
def test_bad_rows_end_with_one_line(tmp_path, row, says):
    with pytest.raises(SystemExit) as stopped:
        run(tiny_args(tmp_path, [row]))
    assert says in stopped.value.code and "\n" not in stopped.value.code
    assert not (tmp_path / "run").exists()


def test_flags_that_do_not_go_together(tmp_path):
    for bad in (dict(head="cobbe"), dict(lm_coef=0.1), dict(step_separator="")):
        with pytest.raises(SystemExit, match="process"):
            run(tiny_args(tmp_path, STEPS, **bad))


def test_an_orm_cannot_reward_steps(tmp_path):
    run(args := tiny_args(tmp_path, OUTCOMES))
    with pytest.raises(SystemExit, match="process"):
        score_with(f"{args.output_dir}/final", ["1"], ["2"], by_step=True)
