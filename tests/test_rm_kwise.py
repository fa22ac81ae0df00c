"""rm_kwise.py against hand values, enumeration and plain loops, and learning on the toy."""

import functools
import itertools
import math

import observe
import plain_rm
import plumbing
import pytest
import test_rm_bt
import torch
from test_rm_bt import RANKED, first_rows, fresh_model, learned, reward_of, run, write

import rm_bt
import rm_kwise

STRICT = [RANKED[0], RANKED[1], RANKED[2] | {"ranks": [3, 0, 1, 2]}]


tiny_args = functools.partial(test_rm_bt.tiny_args, script=rm_kwise)


def loss_of(*rows):
    width = max(map(len, rows))
    scores = torch.tensor([[*row, *[99.0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return rm_kwise.plackett_luce_loss(scores, mask).item()


def test_plackett_luce_by_hand():
    assert loss_of([2.0, 1.0, 0.0]) == pytest.approx(0.720868, abs=1e-6)
    assert loss_of([0.0, 1.0, 2.0]) > 2.5  # the worst order
    assert loss_of([1.0, 0.0]) == pytest.approx(0.313262, abs=1e-6)  # eq. 3
    assert loss_of([5.0]) == 0.0


def test_all_rankings_add_to_1():
    scores = [0.3, -1.2, 2.0, 0.7]
    total = sum(math.exp(-loss_of(list(order))) for order in itertools.permutations(scores))
    assert total == pytest.approx(1, abs=1e-5)


def test_a_constant_and_padding_change_nothing():
    rows = [[0.5, -1.0, 2.0], [1.0, 3.0], [0.1, 0.2, 0.3, 0.4, 0.5]]
    want = sum(loss_of(row) for row in rows) / 3
    assert loss_of(*rows) == pytest.approx(want, rel=1e-5)
    moved = [[x + 11 for x in row] for row in rows]
    assert loss_of(*moved) == pytest.approx(want, rel=1e-4)


def test_padding_has_no_gradient_and_the_rest_has_the_loops():
    scores = torch.tensor([[2.0, 1.0, 7.0], [0.5, 1.5, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rm_kwise.plackett_luce_loss(scores, mask).backward()
    s = scores.detach().clone().requires_grad_()
    loss = 0.0
    for row in (s[0, :2], s[1]):
        for k in range(len(row)):
            loss = loss - (row[k].exp() / row[k:].exp().sum()).log() / 2
    loss.backward()
    assert scores.grad[0, 2] == 0 and torch.allclose(scores.grad, s.grad, atol=1e-6)


def test_best_first():
    scores, of = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    got, mask = rm_kwise.best_first(scores, torch.tensor([2, 0, 1, 1, 0]), of)
    assert got[0].tolist() == [2, 3, 1] and got[1, :2].tolist() == [5, 4]
    assert mask.tolist() == [[True] * 3, [True, True, False]]


def test_metrics_by_hand():
    scores = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, 0.0, 5.0])
    ranks, of = torch.tensor([0, 2, 1, 0, 1, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    got = rm_kwise.ranking_metrics(scores, torch.ones(7), ranks, of)
    assert got["eval_tau"] == pytest.approx((1 / 3 + 0 - 1) / 3)
    assert got["eval_top1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert got["eval_accuracy"] == pytest.approx((2 + 0.5 + 0) / 5)


def test_pairs_are_counted_as_rm_bt_counts_them():
    scores, lengths = torch.randn(9), torch.arange(9.0)
    ranks, of = torch.tensor([1, 0, 2, 0, 1, 3, 0, 2, 1]), torch.arange(3).repeat_interleave(3)
    mine = rm_kwise.ranking_metrics(scores, lengths, ranks, of)
    theirs = rm_bt.pair_metrics(scores, lengths, ranks, of)
    for name in theirs.keys() - {"eval_loss"}:
        assert mine[name] == pytest.approx(theirs[name].item(), nan_ok=True), name


@pytest.mark.parametrize("size", [1, 5, 9])
def test_a_step_equals_a_plain_loop(tmp_path, size, tiny):
    changes = dict(micro_batch_size=size, share_prompts=size > 1)
    args = tiny_args(tmp_path, STRICT, model=tiny, **changes)
    row = run(args)[0]
    model, tokenizer, loss = fresh_model(args), plumbing.load_tokenizer(tiny), 0.0
    for ranking in STRICT:
        order = sorted(zip(ranking["ranks"], ranking["completions"], strict=True))
        s = [reward_of(model, tokenizer, ranking["prompt"], text).exp() for _, text in order]
        for k in range(len(s)):
            loss = loss - (s[k] / sum(s[k:])).log() / 3
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_held_out_metrics_equal_a_plain_loop(tmp_path, tiny):
    """Two prompts at a time, so that a later one's completions must not be ranked among others'."""
    rows = STRICT + STRICT[::-1]
    held = write(tmp_path / "held.jsonl", rows)
    changes = dict(eval_dataset=held, batch_size=2, micro_batch_size=5)
    args = tiny_args(tmp_path, STRICT, model=tiny, **changes)
    row = run(args)[0]
    model, tokenizer = fresh_model(args), plumbing.load_tokenizer(tiny)
    losses, taus, tops = [], [], []
    for ranking in rows:
        order = sorted(zip(ranking["ranks"], ranking["completions"], strict=True))
        s = [reward_of(model, tokenizer, ranking["prompt"], text).item() for _, text in order]
        K = len(s)
        losses.append(sum(math.log(sum(math.exp(x - s[k]) for x in s[k:])) for k in range(K)))
        signs = [1 if s[i] > s[j] else -1 for i in range(K) for j in range(i + 1, K)]
        taus.append(sum(signs) / len(signs))
        tops.append(s[0] == max(s))
    assert row["eval_loss"] == pytest.approx(sum(losses) / len(rows), rel=1e-4)
    assert row["eval_tau"] == pytest.approx(sum(taus) / len(rows), rel=1e-4, abs=1e-6)
    assert row["eval_top1"] == pytest.approx(sum(tops) / len(rows), rel=1e-4)


def test_the_saved_model_is_centred(tmp_path, tiny):
    args = tiny_args(tmp_path, STRICT * 3, model=tiny, num_epochs=2)
    run(args)
    final = f"{args.output_dir}/final"
    score = plumbing.load_reward("verifier", None, final, torch.device("cpu"))
    prompts = [row["prompt"] for row in STRICT for _ in row["completions"]]
    texts = [text for row in STRICT for text in row["completions"]]
    got = score(prompts, texts, [{}] * len(texts))
    assert sum(got) / len(got) == pytest.approx(0, abs=1e-3) and len(set(got)) == len(got)


def test_learning_as_a_user_would(tmp_path):
    flags = first_rows(tmp_path, "kwise", 800, 100)
    first, *_, last = learned("rm_kwise.py", tmp_path, "--num-epochs", "1", *flags)
    assert first["eval_accuracy"] < 0.65 and last["eval_accuracy"] > 0.8 and last["eval_tau"] > 0.6


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "1", "completions": ["a", "b", "c"], "ranks": [0, 1, 1]}, "tie"),
        ({"prompt": "1", "completions": ["a", "b"], "ranks": [0, None]}, "ranks"),
        ({"prompt": "1", "completions": ["a"], "ranks": [0]}, "1 completions"),
        ({"prompt": "1", "completions": ["a", "b"], "ranks": [0, 1, 2]}, "3 ranks"),
        ({"prompt": "1", "completions": ["a", ""], "ranks": [0, 1]}, "empty"),
        ({"prompt": "1", "completions": ["a", "a"], "ranks": [0, 1]}, "to compare"),
        ({"prompt": "1", "completions": ["a", "b"]}, "ranks"),
    ],
)  # fmt: skip
def test_bad_rows_end_with_one_line(tmp_path, row, says, tiny):
    with pytest.raises(ValueError) as stopped:
        run(tiny_args(tmp_path, [row], model=tiny))
    assert says in str(stopped.value) and "\n" not in str(stopped.value)
    assert not (tmp_path / "run").exists()


# --- Whole runs beside the plain form -------------------------------------------------------------

ORDERED = [
    {"prompt": "1+2", "completions": ["5", "3", "4=4+0"], "ranks": [2, 0, 1]},
    {"prompt": "44+55", "completions": ["9", "99=44+55"], "ranks": [1, 0]},
    {"prompt": "7+7+0", "completions": ["1", "14", "22", "13 13"], "ranks": [3, 0, 1, 2]},
    {"prompt": "3", "completions": ["3", "3=3 3", "0", "30", "33=3 3"], "ranks": [0, 4, 1, 3, 2]},
    {"prompt": "2+2+2", "chosen": "6", "rejected": "2+2=5"},
    {"prompt": "60+1", "completions": ["61", "16+1", "0"], "ranks": [4.5, 9, 7]},
    {"prompt": "9+9", "completions": ["9", "99", "18=9+9", "1"], "ranks": [3, 2, 0, 1]},
]
HELD_OUT = [
    {"prompt": "11", "completions": ["1", "11", "22", "33 33", "0=0"], "ranks": [2, 0, 1, 3, 4]},
    {"prompt": "21", "completions": ["2 2 2 2", "21=21"], "ranks": [1, 0]},
    {"prompt": "31+0", "completions": ["3", "4", "31"], "ranks": [2, 1, 0]},
    {"prompt": "41", "chosen": "41", "rejected": "14+41=41"},
    {"prompt": "51+51", "completions": ["102", "51", "2", "1"], "ranks": [0, 1, 2, 3]},
]
test_rm_bt.UNSEEN_OF["rm_kwise"] = HELD_OUT
WHOLE = {  # flags, steps of warm-up, of the five
    "cosine": (dict(lr_schedule="cosine", warmup_ratio=0.4, micro_batch_size=6), 2),
    "linear": (dict(lr_schedule="linear", warmup_ratio=0.15, micro_batch_size=9, seed=3), 1),
}


@pytest.fixture(scope="module", params=WHOLE)
def whole(request, tiny, tmp_path_factory):
    changes, warmup = WHOLE[request.param]
    folder = tmp_path_factory.mktemp("whole")
    return test_rm_bt.whole_run(rm_kwise, tiny, folder, ORDERED, plain_rm.kwise, warmup, changes)


def test_every_metric_of_every_step(whole):
    test_rm_bt.every_metric_is_logged(whole)


def test_every_update(whole):
    test_rm_bt.every_update_is_the_plain_one(whole)


def test_the_rows_of_every_step(whole):
    test_rm_bt.every_epoch_has_its_order(whole)


def test_what_the_histograms_show(whole):
    test_rm_bt.every_histogram_is_shown(whole)


def test_the_bias_is_that_of_the_training_completions(whole):
    test_rm_bt.the_mean_reward_is_0(whole)


def test_all_weights_are_trained(whole):
    count = sum(p.numel() for p in whole.plain.model.parameters())
    assert whole.updates[0].weights.numel() == count


# --- Flags and checkpoints ------------------------------------------------------------------------

FLAGS = test_rm_bt.SHARED_FLAGS


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs, and the Seen of the one without changes."""
    runs_of = test_rm_bt.Runs(rm_kwise, tiny, tmp_path_factory, ORDERED, plain_rm.kwise, 7)
    return runs_of, runs_of()


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(runs, tmp_path, flag):
    runs_of, base = runs
    FLAGS[flag](runs_of, base, tmp_path)


def test_every_flag_has_a_check():
    observe.has_every_flag(rm_kwise, FLAGS)


def test_defaults():
    toy = dict(
        dataset="toy/kwise_train.jsonl", eval_dataset="toy/kwise_test.jsonl", num_epochs=2,
        learning_rate=1e-3, batch_size=32, micro_batch_size=128, warmup_ratio=0.1,
    )  # fmt: skip
    test_rm_bt.has_defaults(rm_kwise, test_rm_bt.DEFAULTS, toy)


def test_a_resumed_run_is_the_unbroken_one_and_needs_every_part(runs, tmp_path):
    test_rm_bt.resumes(runs[0], tmp_path)


def test_a_run_killed_after_its_last_step_is_finished(runs, tmp_path):
    test_rm_bt.resumes_after_the_last_step(*runs, tmp_path)


# --- Rows and saved models ------------------------------------------------------------------------


def test_what_is_dropped_and_cut_is_said(tmp_path, tiny, capsys):
    rows = [row for row in test_rm_bt.COUNTED if row["prompt"] != "4"]  # the one with a tie
    rows = [rows[0] | {"prompt": "0"}, *rows]
    test_rm_bt.says_what_is_dropped(rm_kwise, rows, tmp_path, tiny, capsys, 5)


def test_ranks_are_counted_anew_where_equal_completions_are_left_out(tmp_path, tiny):
    test_rm_bt.ranks_are_counted_anew(rm_kwise, tmp_path, tiny)


def test_a_probability_that_is_not_used_is_said(tmp_path, capsys):
    pair = {"prompt": "1", "chosen": "a", "rejected": "b"}
    rows = [pair, pair | {"probability": None}, pair | {"probability": 0.0}]
    rm_kwise.read_examples(write(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl: 1 rows have a probability" in capsys.readouterr().out
    rm_kwise.read_examples(write(tmp_path / "rows.jsonl", rows[:2]))
    assert capsys.readouterr().out == ""


def test_completions_are_cut_to_the_models_context(tmp_path, tiny, capsys):
    test_rm_bt.keeps_within_the_context(rm_kwise, tmp_path, tiny, capsys)


def test_held_out_rows_without_a_comparison_are_refused(tmp_path, tiny):
    test_rm_bt.held_out_rows_need_a_comparison(rm_kwise, tmp_path, tiny)


def test_chats_are_read_as_their_texts(tmp_path, tiny):
    rows = [{"prompt": "1+2", "chosen": "3", "rejected": "4 4"}]
    rows += [{"prompt": "10", "chosen": "10=10", "rejected": "1"}]
    test_rm_bt.chats_are_read(rm_kwise, rows, tmp_path, tiny)


def test_a_reward_model_trained_on_is_centred_anew(tmp_path, tiny):
    test_rm_bt.is_centred_anew(rm_kwise, STRICT, tmp_path, tiny)


@pytest.mark.parametrize("pad", [None, 1, 0])
@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_the_pad_id_is_in_the_saved_config(tmp_path, pad, pad_is_eos):
    test_rm_bt.pad_id_is_saved(rm_kwise, STRICT, tmp_path, pad, pad_is_eos)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "1", "completions": ["a", "b"], "ranks": [0, math.nan]}, "row 2"),
        ({"prompt": "1", "completions": ["a", "b"], "ranks": [1, 1]}, "row 2.*rm_bt.py"),
        ({"prompt": "1", "chosen": "a", "rejected": " "}, "line 2"),
        ({"completions": ["a", "b"], "ranks": [0, 1]}, "prompt"),
        ({"prompt": "1", "rejected": "b"}, "completions or chosen"),
    ],
)
def test_a_bad_row_is_named(tmp_path, tiny, row, says):
    with pytest.raises(ValueError, match=says):
        run(tiny_args(tmp_path, [ORDERED[0], row], model=tiny))


def test_every_metric_by_hand():
    """Pairs of equal length are in neither accuracy by length; a tie at the top is half a hit."""
    scores = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, 0.0, 5.0])
    lengths = torch.tensor([4, 4, 2, 1, 9, 3, 2])
    ranks, of = torch.tensor([0, 2, 1, 0, 1, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    got = rm_kwise.ranking_metrics(scores, lengths, ranks, of)
    assert got["eval_accuracy_better_longer"] == pytest.approx((1 + 0) / 2)
    assert got["eval_accuracy_better_shorter"] == pytest.approx((0 + 0.5) / 2)
    assert got["eval_margin"] == pytest.approx((1 + 2 - 1 + 0 - 5) / 5)
    first = math.log(1 + math.exp(-2) + math.exp(-1)) + math.log(1 + math.exp(1))
    losses = [first, math.log(2), math.log(1 + math.exp(5))]
    assert got["eval_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert got["eval_reward"] == pytest.approx(13 / 7)
    assert got["eval_reward_std_prompt"] == pytest.approx((1 + 0 + 12.5**0.5) / 3)
