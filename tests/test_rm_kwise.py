"""rm_kwise.py against hand values, enumeration and plain loops, and learning on the toy."""

import functools
import itertools
import math

import pytest
import test_rm_bt
import torch
from test_rm_bt import RANKED, TOY, fresh_model, learned, reward_of, run, write

import common
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
def test_a_step_equals_a_plain_loop(tmp_path, size):
    args = tiny_args(tmp_path, STRICT, micro_batch_size=size, share_prompts=size > 1)
    row = run(args)[0]
    model, tokenizer, loss = fresh_model(args), common.load_tokenizer(TOY), 0.0
    for ranking in STRICT:
        order = sorted(zip(ranking["ranks"], ranking["completions"], strict=True))
        s = [reward_of(model, tokenizer, ranking["prompt"], text).exp() for _, text in order]
        for k in range(len(s)):
            loss = loss - (s[k] / sum(s[k:])).log() / 3
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_held_out_metrics_equal_a_plain_loop(tmp_path):
    """Two prompts at a time, so that a later one's completions must not be ranked among others'."""
    rows = STRICT + STRICT[::-1]
    held = write(tmp_path / "held.jsonl", rows)
    row = run(args := tiny_args(tmp_path, STRICT, eval_dataset=held, batch_size=2,
                                micro_batch_size=5))[0]  # fmt: skip
    model, tokenizer, losses, taus, tops = fresh_model(args), common.load_tokenizer(TOY), [], [], []
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


def test_the_saved_model_is_centred(tmp_path):
    args = tiny_args(tmp_path, STRICT * 3, num_epochs=2)
    run(args)
    final = f"{args.output_dir}/final"
    score = common.load_reward("verifier", None, final, torch.device("cpu"))
    prompts = [row["prompt"] for row in STRICT for _ in row["completions"]]
    texts = [text for row in STRICT for text in row["completions"]]
    got = score(prompts, texts, [{}] * len(texts))
    assert sum(got) / len(got) == pytest.approx(0, abs=1e-3) and len(set(got)) == len(got)


def test_learning_as_a_user_would(tmp_path):
    first, *_, last = learned("rm_kwise.py", tmp_path, "--num-epochs", "1")
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
def test_bad_rows_end_with_one_line(tmp_path, row, says):
    with pytest.raises(SystemExit) as stopped:
        run(tiny_args(tmp_path, [row]))
    assert says in stopped.value.code and "\n" not in stopped.value.code
    assert not (tmp_path / "run").exists()
