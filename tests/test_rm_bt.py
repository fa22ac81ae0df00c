"""rm_bt.py against hand values, plain loops and Transformers' own head, and learning on the toy."""

import itertools
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import observe
import plain
import plain_rm
import plumbing
import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import common
import rm_bt

TOY = ROOT / "toy/model"
PAIRS = [
    {"prompt": "1+2", "chosen": "3", "rejected": "a longer one", "margin": 1.0},
    {"prompt": "44+55", "chosen": "99 and so on", "rejected": "9", "margin": 0.3333},
    {"prompt": "7", "chosen": [{"role": "assistant", "content": "7"}], "rejected": "8"},
]
RANKED = [
    {"prompt": "1+2", "completions": ["5", "3", "4 or 5"], "ranks": [2, 0, 1]},
    {"prompt": "44+55", "completions": ["9", "99"], "ranks": [1, 0]},
    {"prompt": "7+7", "completions": ["a", "14", "bb", "13"], "ranks": [1, 0, 1, 2]},
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tiny_args(tmp_path, rows, script=rm_bt, **changes):
    """Args of one step of a reward model's script on these rows."""
    values = script.TOY | dict(
        model=str(TOY), dataset=write(tmp_path / "rows.jsonl", rows), eval_dataset="", eval_size=0,
        output_dir=str(tmp_path / "run"), device="cpu", num_epochs=1, batch_size=3,
        lr_schedule="constant", warmup_ratio=0.0, max_length=64,
    )  # fmt: skip
    return script.Args(**values | changes)


def watched(script, args):
    """observe(), with what each histogram was given, on a clock that ticks once a look."""
    shown = []
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.Run, "histogram", lambda self, values: shown.append(values))
        patch.setattr(script, "time", SimpleNamespace(time=lambda: next(ticks)))
        seen = observe.observe(script, args)
    seen.shown = shown
    return seen


def run(args):
    """Train with the script that the Args are of; -> rows of metrics."""
    return watched(sys.modules[type(args).__module__], args).rows


# --- The algorithm --------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    assert rm_bt.bradley_terry_loss(one, zero).item() == pytest.approx(0.313262, abs=1e-6)
    assert rm_bt.bradley_terry_loss(one, zero, 1 / 3).item() == pytest.approx(0.414370, abs=1e-6)
    assert rm_bt.bradley_terry_loss(one, zero, one).item() == pytest.approx(math.log(2), abs=1e-6)
    far = rm_bt.bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert far.item() == 1000.0  # log(sigmoid()) would be -inf


def test_eq_4_is_the_same_number_and_a_constant_changes_nothing():
    chosen, rejected = torch.randn(2, 50, dtype=torch.float64)
    eq_4 = (1 + (rejected - chosen).exp()).log().mean()
    assert torch.isclose(rm_bt.bradley_terry_loss(chosen, rejected), eq_4)
    assert torch.isclose(rm_bt.bradley_terry_loss(chosen + 7, rejected + 7), eq_4)


def test_the_margin_has_a_gradient():
    """Inside the sigmoid it pushes the pair further apart; 8.3 as printed would not."""
    slopes = []
    for margin in (0.0, 1.0):
        chosen = torch.tensor([1.0], requires_grad=True)
        rm_bt.bradley_terry_loss(chosen, torch.zeros(1), margin).backward()
        slopes.append(chosen.grad.item())
    assert slopes == pytest.approx([-1 / (1 + math.e), -0.5])


def test_a_soft_label_by_hand():
    """The mean of both ways round; least where the model's probability is the label's."""
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    got = rm_bt.bradley_terry_loss(one, zero, 0.0, torch.tensor([0.7]))
    assert got.item() == pytest.approx(0.7 * 0.313262 + 0.3 * 1.313262, abs=1e-6)
    got = rm_bt.bradley_terry_loss(one, zero, 1 / 3, torch.tensor([0.7]))
    assert got.item() == pytest.approx(0.7 * 0.414370 + 0.3 * 1.081037, abs=1e-6)
    for label in (0.7, 0.5, 0.05):
        chosen = torch.tensor([math.log(label / (1 - label))], requires_grad=True)
        rm_bt.bradley_terry_loss(chosen, zero, 0.0, label).backward()
        assert chosen.grad.item() == pytest.approx(0, abs=1e-6)


def test_a_label_of_1_is_the_hard_one_and_of_0_the_pair_turned_round():
    chosen, rejected = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    hard = rm_bt.bradley_terry_loss(chosen, rejected)
    assert rm_bt.bradley_terry_loss(chosen, rejected, 0.0, torch.ones(50)) == hard
    turned = rm_bt.bradley_terry_loss(rejected, chosen, 0.0, torch.zeros(50))
    assert turned.item() == pytest.approx(hard.item())


def slow_ranking_loss(scores, ranks, prompt_of):
    losses = []
    for p in sorted(set(prompt_of)):
        mine = [i for i, q in enumerate(prompt_of) if q == p]
        logs = [-math.log(1 / (1 + math.exp(scores[j] - scores[i])))
                for i, j in itertools.permutations(mine, 2) if ranks[i] < ranks[j]]  # fmt: skip
        losses += [sum(logs) / len(logs)] if logs else []
    return sum(losses) / len(losses)


def test_ranking_loss_equals_a_slow_loop():
    ranks, prompt_of = [2, 0, 1, 0, 1, 1, 0, 1, 2, 5, 3, 3], [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    of = torch.tensor(prompt_of)
    got = rm_bt.ranking_loss(scores, torch.tensor(ranks), of)
    assert got.item() == pytest.approx(slow_ranking_loss(scores.tolist(), ranks, prompt_of))
    assert rm_bt.ranking_loss(scores + 3, torch.tensor(ranks), of).item() == pytest.approx(got)
    order = torch.tensor([1, 0, 2, 4, 3, 9, 8, 7, 6, 5, 10, 11])
    again = rm_bt.ranking_loss(scores[order], torch.tensor(ranks)[order], of)
    assert again.item() == pytest.approx(got.item())


def test_a_ranking_of_two_is_eq_3():
    scores = torch.randn(8)
    got = rm_bt.ranking_loss(scores, torch.tensor([0, 1] * 4), torch.arange(4).repeat_interleave(2))
    assert torch.isclose(got, rm_bt.bradley_terry_loss(scores[::2], scores[1::2]))


def test_every_pair_once_and_none_across_prompts():
    ranks, prompt_of = torch.tensor([1, 0, 2, 0, 0, 3]), torch.tensor([0, 0, 0, 1, 1, 1])
    better, worse = rm_bt.ranked_pairs(ranks, prompt_of)
    got = set(zip(better.tolist(), worse.tolist(), strict=True))
    assert len(better) == 5 and got == {(0, 2), (1, 0), (1, 2), (3, 5), (4, 5)}


def test_metrics_by_hand():
    scores, lengths = torch.tensor([1.0, 0.0, 2.0, 2.0, 0.0, 3.0]), torch.tensor([5, 3, 2, 4, 9, 1])
    ranks, prompt_of = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    got = rm_bt.pair_metrics(scores, lengths, ranks, prompt_of)
    assert got["eval_accuracy"] == 0.5  # right, tie, wrong
    assert got["eval_margin"] == pytest.approx((1 + 0 - 3) / 3)
    assert got["eval_accuracy_better_longer"] == 0.5 and got["eval_accuracy_better_shorter"] == 0.5
    assert got["eval_reward_std_prompt"] == pytest.approx((0.5**0.5 + 0 + 4.5**0.5) / 3)


# --- Training -------------------------------------------------------------------------------------


def reward_of(model, tokenizer, prompt, text):
    """One sequence, written out by hand; with Transformers' own pooling, which is right here."""
    ids = tokenizer(f"<bos><user>{prompt}<assistant>{text}<eos>", add_special_tokens=False)
    return model(torch.tensor([ids["input_ids"]])).logits[0, 0]


def fresh_model(args):
    """The model that main starts from: the head comes from the seed."""
    torch.manual_seed(args.seed)
    return rm_bt.load_model(
        AutoModelForSequenceClassification, args.model, torch.device("cpu"), new_head=1
    )


def text_of(side):
    return side if isinstance(side, str) else side[0]["content"]


@pytest.mark.parametrize("size", [1, 4, 6])
def test_a_step_on_pairs_equals_a_plain_loop(tmp_path, size, tiny):
    changes = dict(micro_batch_size=size, center_coef=0.1, margin_scale=2.0)
    args = tiny_args(tmp_path, PAIRS, model=tiny, **changes)
    row = run(args)[0]
    model, tokenizer, loss = fresh_model(args), rm_bt.load_tokenizer(tiny), 0.0
    for pair in PAIRS:
        c, r = (reward_of(model, tokenizer, pair["prompt"], text_of(pair[side]))
                for side in ("chosen", "rejected"))  # fmt: skip
        margin = 2 * pair.get("margin", 0.0)
        loss = loss + (1 + (r - c + margin).exp()).log() / 3 + 0.1 * (c + r) ** 2 / 3
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("size", [1, 5, 9])
def test_a_step_on_rankings_equals_a_plain_loop(tmp_path, size, tiny):
    changes = dict(micro_batch_size=size, share_prompts=size > 1)
    args = tiny_args(tmp_path, RANKED, model=tiny, **changes)
    row = run(args)[0]
    model, tokenizer, loss = fresh_model(args), rm_bt.load_tokenizer(tiny), 0.0
    for ranking in RANKED:
        scores = [reward_of(model, tokenizer, ranking["prompt"], text)
                  for text in ranking["completions"]]  # fmt: skip
        pairs = [(i, j) for i, j in itertools.permutations(range(len(scores)), 2)
                 if ranking["ranks"][i] < ranking["ranks"][j]]  # fmt: skip
        for i, j in pairs:
            loss = loss + (1 + (scores[j] - scores[i]).exp()).log() / len(pairs) / 3
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_held_out_metrics_equal_a_plain_loop(tmp_path, tiny):
    """Two prompts at a time, so that a later one's completions must not be paired with others'."""
    held = write(tmp_path / "held.jsonl", RANKED + [PAIRS[1], *RANKED[::-1]])
    changes = dict(eval_dataset=held, batch_size=2, micro_batch_size=5)
    args = tiny_args(tmp_path, PAIRS[2:], model=tiny, **changes)
    row = run(args)[0]
    model, tokenizer = fresh_model(args), rm_bt.load_tokenizer(tiny)
    rewards, margins, losses = [], [], []
    for example in RANKED + [PAIRS[1], *RANKED[::-1]]:
        texts = example.get("completions") or [example["chosen"], example["rejected"]]
        ranks = example.get("ranks", [0, 1])
        scores = [reward_of(model, tokenizer, example["prompt"], t).item() for t in texts]
        pairs = itertools.permutations(range(len(texts)), 2)
        gaps = [scores[i] - scores[j] for i, j in pairs if ranks[i] < ranks[j]]
        rewards, margins = rewards + scores, margins + gaps
        losses.append(sum(math.log(1 + math.exp(-x)) for x in gaps) / len(gaps))
    assert row["eval_reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-4)
    assert row["eval_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-3, abs=1e-6)
    assert row["eval_accuracy"] == pytest.approx(sum(x > 0 for x in margins) / len(margins))
    assert row["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_nll_term_is_of_the_chosen_completions(tmp_path, tiny):
    plain = run(tiny_args(tmp_path / "a", PAIRS, model=tiny))[0]["loss"]
    changes = dict(model=tiny, nll_coef=0.5, micro_batch_size=2)
    both = run(tiny_args(tmp_path / "b", PAIRS, **changes))[0]["loss"]
    model = plumbing.load_model(rm_bt.AutoModelForCausalLM, tiny, torch.device("cpu"))
    tokenizer, nll = rm_bt.load_tokenizer(tiny), 0.0
    for pair in PAIRS:
        batch = common.encode(tokenizer, [pair["prompt"]], [[text_of(pair["chosen"])]])
        nll -= common.completion_logps(model, batch).sum().item() / batch.completion_mask.sum() / 3
    assert both - plain == pytest.approx(0.5 * nll.item(), rel=1e-3)


def test_the_nll_term_is_a_mean_per_prompt_where_two_are_best(tmp_path, tiny):
    """A prompt with two best completions weighs no more than one with one."""
    rows = [
        {"prompt": "1", "completions": ["11", "2222222", "3"], "ranks": [0, 0, 1]},
        {"prompt": "9+9", "completions": ["18", "0"], "ranks": [0, 1]},
    ]
    plain = run(tiny_args(tmp_path / "a", rows, model=tiny))[0]["loss"]
    both = run(tiny_args(tmp_path / "b", rows, model=tiny, nll_coef=0.5))[0]["loss"]
    model = plumbing.load_model(rm_bt.AutoModelForCausalLM, tiny, torch.device("cpu"))
    tokenizer = rm_bt.load_tokenizer(tiny)
    nll = []
    for prompt, text in (("1", "11"), ("1", "2222222"), ("9+9", "18")):
        batch = common.encode(tokenizer, [prompt], [[text]])
        total = common.completion_logps(model, batch).sum().item()
        nll.append(-total / batch.completion_mask.sum().item())
    want = ((nll[0] + nll[1]) / 2 + nll[2]) / 2
    assert abs(sum(nll) / 3 - want) > 0.01
    assert both - plain == pytest.approx(0.5 * want, rel=1e-3)


def test_micro_batches_change_nothing(tmp_path, tiny):
    """With every term of the loss, on rankings of 3, 2 and 4: prompts weigh alike, however cut."""
    got = [run(tiny_args(tmp_path / str(size), RANKED, model=tiny, micro_batch_size=size,
                         center_coef=0.3, nll_coef=0.5))[0] for size in (1, 5, 9)]  # fmt: skip
    for row in got[1:]:
        assert row["loss"] == pytest.approx(got[0]["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(got[0]["grad_norm"], rel=1e-3)


def test_ranks_may_begin_anywhere_and_skip(tmp_path, tiny):
    moved = [row | {"ranks": [10 + 3 * r for r in row["ranks"]]} for row in RANKED]
    got = []
    for rows in (RANKED, moved):
        folder = tmp_path / str(len(got))
        held_out = write(folder / "held_out.jsonl", rows)
        changes = dict(model=tiny, nll_coef=0.5, eval_dataset=held_out)
        got.append(run(tiny_args(folder, rows, **changes)))
    for a, b in zip(*got, strict=True):
        for name in a.keys() - {"seconds", "tokens_per_second"}:
            assert a[name] == pytest.approx(b[name]), name


def test_a_reward_model_trained_on_is_centred_anew(tmp_path, tiny):
    is_centred_anew(rm_bt, PAIRS, tmp_path, tiny)


def is_centred_anew(script, rows, tmp_path, tiny):
    """Its old bias is no part of its rewards: without a change in weights the bias is the same."""
    run(tiny_args(tmp_path / "a", rows, script, model=tiny))
    flags = dict(model=str(tmp_path / "a/run/final"), learning_rate=0.0)
    run(tiny_args(tmp_path / "b", rows, script, **flags))
    biases = [json.loads((tmp_path / x / "run/final/config.json").read_text())["reward_bias"]
              for x in "ab"]  # fmt: skip
    assert biases[0] == pytest.approx(biases[1], rel=1e-3) and biases[0] != 0


def test_margins_beside_rankings_are_refused(tmp_path, tiny):
    """Eq. 6 has no margin: to leave it out in silence would train another loss than was asked."""
    with pytest.raises(ValueError, match="margin"):
        run(tiny_args(tmp_path, RANKED + PAIRS, model=tiny))


def test_transformers_reads_a_saved_model_at_the_end_of_turn(tmp_path):
    """Also one made from a policy whose pad is its EOS, in a padded batch; less the bias."""
    policy, tokenizer = str(tmp_path / "policy"), make_tokenizer(pad_is_eos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    make_model("llama").save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    run(args := tiny_args(tmp_path, PAIRS, model=policy, learning_rate=1e-3))
    final = f"{args.output_dir}/final"
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    chats = [[{"role": "user", "content": "7"}, {"role": "assistant", "content": text}]
             for text in ("8", "a much longer one")]  # fmt: skip
    loaded = AutoTokenizer.from_pretrained(final)
    texts = [loaded.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = loaded(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        got = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    score = plumbing.load_reward("verifier", None, final, torch.device("cpu"))
    want = score(["7", "7"], ["8", "a much longer one"], [{}, {}])
    assert (got + model.config.reward_bias).tolist() == pytest.approx(want, abs=1e-4)


def test_the_saved_model_scores_the_same_and_is_centred(tmp_path, capsys, tiny):
    args = tiny_args(tmp_path, PAIRS * 4, model=tiny, num_epochs=3)
    run(args)
    final = f"{args.output_dir}/final"
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    prompts, texts = [], []
    for pair in PAIRS:
        prompts += [pair["prompt"]] * 2
        texts += [text_of(pair["chosen"]), text_of(pair["rejected"])]
    score = plumbing.load_reward("verifier", None, final, torch.device("cpu"), micro_batch_size=4)
    got = score(prompts, texts, [{}] * 6)
    want = [reward_of(model, tokenizer, p, t).item() + model.config.reward_bias
            for p, t in zip(prompts, texts, strict=True)]  # fmt: skip
    assert got == pytest.approx(want, abs=1e-4) and len(set(got)) == 6
    assert sum(got) / 6 == pytest.approx(0, abs=1e-3)
    assert model.config.num_labels == 1 and tokenizer.chat_template


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_neither_padding_nor_place_changes_a_reward(tmp_path, kind, pad_is_eos):
    tokenizer, folder = make_tokenizer(pad_is_eos=pad_is_eos), str(tmp_path / "policy")
    make_model(kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    model = rm_bt.load_model(
        AutoModelForSequenceClassification, folder, torch.device("cpu"), new_head=1
    )
    prompts, texts = ["a", "a longer prompt", "b"], ["x", "a much longer completion", "yy"]
    alone = [common.last_scores(model, common.encode(tokenizer, [p], [[t]])).item()
             for p, t in zip(prompts, texts, strict=True)]  # fmt: skip
    for order in ([0, 1, 2], [2, 1, 0]):
        batch = common.encode(tokenizer, [prompts[i] for i in order], [[texts[i]] for i in order])
        got = common.last_scores(model, batch).tolist()
        assert got == pytest.approx([alone[i] for i in order], abs=1e-5)
    assert len({round(x, 4) for x in alone}) == 3


def test_resume_of_a_finished_run_keeps_the_bias(tmp_path, tiny):
    args = tiny_args(tmp_path, PAIRS, model=tiny)
    run(args)
    before = json.loads((tmp_path / "run/final/config.json").read_text())["reward_bias"]
    args.resume = True
    run(args)
    after = json.loads((tmp_path / "run/final/config.json").read_text())["reward_bias"]
    assert before == pytest.approx(after) and before != 0


def learned(script, tmp_path, *flags):
    """The last held-out metrics of `python SCRIPT`, as a user would run it."""
    command = [sys.executable, ROOT / script, "--output-dir", tmp_path / "run", *flags]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    return [row for row in rows if "eval_loss" in row]


def first_rows(folder, name, train, test):
    """Flags of a shorter run: so many rows of the toy's files."""
    flags = ["--eval-every", "1000"]
    for flag, kind, count in (("--dataset", "train", train), ("--eval-dataset", "test", test)):
        lines = (ROOT / "toy" / f"{name}_{kind}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{kind}.jsonl").write_text("".join(lines[:count]))
        flags += [flag, folder / f"{kind}.jsonl"]
    return flags


def test_learning_as_a_user_would(tmp_path):
    flags = first_rows(tmp_path, "pref", 1000, 120)
    first, *_, last = learned("rm_bt.py", tmp_path, "--num-epochs", "1", *flags)
    assert first["eval_accuracy"] < 0.65 and last["eval_accuracy"] > 0.78
    assert last["eval_loss"] < 0.45 < first["eval_loss"]


# --- Bad input ------------------------------------------------------------------------------------


def test_pairs_that_are_equal_or_become_so_are_dropped_and_counted(tmp_path, capsys, tiny):
    same = {"prompt": "1", "chosen": "x", "rejected": "x"}
    later = {"prompt": "1", "chosen": "y" * 80 + "1", "rejected": "y" * 80 + "2"}
    long = {"prompt": "9" * 80, "chosen": "1", "rejected": "2"}
    cut = {"prompt": "1", "chosen": "x" * 80, "rejected": "y"}
    run(tiny_args(tmp_path, [same, later, long, cut, *PAIRS], model=tiny))
    out = capsys.readouterr().out
    assert "of 7 rows, dropped 3" in out and "cut 1 completions" in out


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "1", "chosen": " ", "rejected": "x"}, "line 1"),
        ({"prompt": "1", "chosen": "x"}, "rejected"),
        ({"prompt": "1", "completions": ["a", " "], "ranks": [0, 1]}, "empty"),
        ({"prompt": "1", "completions": ["a"], "ranks": [0]}, "1 completions"),
        ({"prompt": "1", "completions": ["a", "b"], "ranks": [0]}, "1 ranks"),
        ({"prompt": "1", "completions": ["a", "b"], "ranks": ["best", "worst"]}, "ranks"),
        ({"prompt": "1", "completions": ["a", "b"], "ranks": [1, 1]}, "to compare"),
        ({"prompt": "1", "chosen": "a", "rejected": "b", "margin": "much"}, "row 1"),
        ({"prompt": "1", "chosen": "a", "rejected": "b", "probability": "high"}, "line 1"),
        ({"prompt": "1", "chosen": "a", "rejected": "b", "probability": 1.01}, "from 0 to 1"),
        ({"prompt": "1", "chosen": "a", "rejected": "b", "probability": -0.01}, "from 0 to 1"),
        ({"prompt": "1", "chosen": "a", "rejected": "b", "probability": math.nan}, "from 0 to 1"),
        ({"prompt": "1", "chosen": "a", "rejected": "b", "probability": True}, "from 0 to 1"),
        ({"prompt": "1", "chosen": "a", "rejected": "a"}, "to compare"),
        ({"prompt": "1", "chosen": [PAIRS[2]["chosen"][0]] * 2, "rejected": "a"}, "earlier turns"),
    ],
)  # fmt: skip
def test_bad_rows_end_with_one_line(tmp_path, row, says, tiny):
    with pytest.raises(ValueError) as stopped:
        run(tiny_args(tmp_path, [row], model=tiny))
    assert says in str(stopped.value) and "\n" not in str(stopped.value)
    assert not (tmp_path / "run").exists()


# --- Whole runs beside the plain form -------------------------------------------------------------

MIXED = [
    {"prompt": "1+2", "chosen": "3", "rejected": "12+7=19", "margin": 1.0},
    {"prompt": "44+55", "chosen": "44+55=99", "rejected": "9", "margin": 0.3, "probability": 0.8},
    {"prompt": "7", "chosen": [{"role": "assistant", "content": "7"}], "rejected": "8"},
    {"prompt": "100+200", "completions": ["400", "300"], "ranks": [1, 0]},
    {"prompt": "5+5+5+5", "chosen": "5+5=10\n10+10=20\n20", "rejected": "5", "margin": 0.6667},
    {"prompt": "8+0", "chosen": "8", "rejected": "80 80", "margin": None, "probability": 0},
    {"prompt": "6+6", "chosen": "12=12", "rejected": "66=66", "margin": 2, "probability": None},
]
TIED = [
    {"prompt": "1+2", "completions": ["5", "3", "4=4+0"], "ranks": [2, 0, 1]},
    {"prompt": "44+55", "completions": ["9", "99=44+55"], "ranks": [1, 0]},
    {"prompt": "7+7+0", "completions": ["1", "14", "22", "13 13"], "ranks": [1, 0, 1, 2]},
    {"prompt": "3", "completions": ["3", "3=3 3", "0", "30", "33=3 3"], "ranks": [0, 0, 1, 3, 3]},
    {"prompt": "2+2+2", "chosen": "6", "rejected": "2+2=5", "margin": 1.0},
    {"prompt": "60+1", "completions": ["61", "16+1", "0"], "ranks": [4.5, 7, 7]},
    {"prompt": "9+9", "completions": ["9", "99", "18=9+9", "1"], "ranks": [3, 2, 0, 1]},
]
UNSEEN = [
    {"prompt": "11", "completions": ["1", "11", "22", "33 33", "0=0"], "ranks": [2, 0, 1, 2, 4]},
    {"prompt": "21", "completions": ["2 2 2 2", "21=21"], "ranks": [1, 0]},
    {"prompt": "31+0", "completions": ["3", "4", "31"], "ranks": [2, 1, 0]},
    {"prompt": "41", "chosen": "41", "rejected": "14+41=41"},
    {"prompt": "51+51", "completions": ["102", "51", "2", "1"], "ranks": [0, 1, 2, 2]},
]
PAIRED_RUN = dict(margin_scale=1.5, center_coef=0.05, lr_schedule="cosine", warmup_ratio=0.4)
RANKED_RUN = dict(margin_scale=0.0, center_coef=0.1, nll_coef=0.3, lr_schedule="linear")
RUNS = {  # name: rows, flags, steps of warm-up, of the five
    "pairs": (MIXED, PAIRED_RUN | dict(micro_batch_size=4), 2),
    "pairs with nll": (MIXED, PAIRED_RUN | dict(micro_batch_size=2, nll_coef=2.0), 2),
    "rankings": (TIED, RANKED_RUN | dict(micro_batch_size=6, warmup_ratio=0.15), 1),
}


def drawn(seen, rows):
    """The rows of each step, in their order, by the prompts that were encoded."""
    row_of = {row["prompt"]: row for row in rows}
    encoded = seen.arguments("encode", "prompts")
    training = [prompts for prompts in encoded if prompts[0] in row_of]
    return [[row_of[p] for p in prompts] for prompts in training[: len(seen.steps)]]


def not_drawn(seen, rows):
    """The rows of the first evaluation; none of them may be among `rows`, those of training."""
    known = {row["prompt"] for row in rows}
    return [p for prompts in seen.arguments("encode", "prompts") for p in prompts if p not in known]


def whole_run(script, model, folder, rows, row_loss, warmup, changes):
    """Five steps on seven rows, the last step short -> Seen and what plain_rm makes of it."""
    held = write(folder / "held.jsonl", UNSEEN_OF[script.__name__])
    flags = dict(num_epochs=2, eval_every=2, eval_dataset=held, max_grad_norm=2.0, dtype="float32")
    args = tiny_args(folder, rows, script, model=model, **flags | changes)
    seen = watched(script, args)
    seen.batches = drawn(seen, rows)
    held = UNSEEN_OF[script.__name__]
    seen.plain, seen.expected, seen.to_show = plain_rm.train(
        args, seen.batches, held, row_loss, warmup
    )
    seen.row_list = rows
    seen.warmup = warmup
    return seen


UNSEEN_OF = {"rm_bt": UNSEEN}


@pytest.fixture(scope="module")
def tied(tiny, tmp_path_factory):
    """The tiny model with one matrix for its first and last layer, and no pad id in its config."""
    folder = tmp_path_factory.mktemp("tied")
    config = AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = True
    config.pad_token_id = None
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=RUNS)
def whole(request, tiny, tied, tmp_path_factory):
    rows, changes, warmup = RUNS[request.param]
    model = tied if rows is TIED else tiny
    folder = tmp_path_factory.mktemp("whole")
    return whole_run(rm_bt, model, folder, rows, plain_rm.pairwise, warmup, changes)


def every_metric_is_logged(seen, leave_out=()):
    """Each row of metrics.jsonl has the names and the values of the plain form, and no other."""
    got = seen.rows
    assert len(got) == len(seen.expected) == 5 + 4
    for row, want in zip(got, seen.expected, strict=True):
        want = {name: value for name, value in want.items() if name not in leave_out}
        assert row.keys() == want.keys() | {"seconds"}
        for name, value in want.items():
            assert row[name] == pytest.approx(value, rel=2e-3, abs=2e-5), (row["step"], name)


def every_update_is_the_plain_one(seen):
    """Rates used and logged, weights at the end, and AdamW without weight decay."""
    args = seen.args
    rates = [
        plain.learning_rate(step, args.learning_rate, args.lr_schedule, seen.warmup, 5)
        for step in range(1, 6)
    ]
    assert [update.lr for update in seen.updates] == pytest.approx(rates)
    assert [row["lr"] for row in seen.steps] == pytest.approx(rates, rel=1e-5)
    assert len(seen.optimizers) == 1
    assert [group["weight_decay"] for group in seen.optimizers[0].param_groups] == [0.0]
    want = seen.plain.model.state_dict()
    got = seen.weights()
    assert got.keys() == want.keys()
    for name, weight in want.items():
        assert torch.allclose(got[name], weight, atol=2e-5), name


def every_epoch_has_its_order(seen):
    """Each row once an epoch; steps of three prompts, the last one of two."""
    assert [len(rows) for rows in seen.batches] == [3, 3, 3, 3, 2]
    prompts = [row["prompt"] for rows in seen.batches for row in rows]
    everything = sorted(row["prompt"] for row in seen.row_list)
    assert sorted(prompts[:7]) == sorted(prompts[7:]) == everything
    assert prompts[:7] != prompts[7:]


def every_histogram_is_shown(seen):
    """Held-out rewards at each evaluation: the best of each prompt, and the others."""
    assert len(seen.shown) == len(seen.to_show) == 4
    for shown, want in zip(seen.shown, seen.to_show, strict=True):
        got = {name: sorted(float(x) for x in values) for name, values in shown.items()}
        assert got.keys() == want.keys()
        for name, values in want.items():
            assert got[name] == pytest.approx(values, rel=1e-3, abs=1e-4)


def the_mean_reward_is_0(seen):
    """The saved bias is less the mean reward of all training completions, by completion."""
    with torch.no_grad():
        scores = plain_rm.all_scores(seen.plain, seen.row_list)
    config = json.loads((seen.folder / "final" / "config.json").read_text())
    mean = sum(scores) / len(scores)
    assert config["reward_bias"] == pytest.approx(-mean, abs=1e-4) and abs(mean) > 0.01


def test_every_metric_of_every_step(whole):
    every_metric_is_logged(whole, leave_out=("eval_tau", "eval_top1"))


def test_every_update(whole):
    every_update_is_the_plain_one(whole)


def test_the_rows_of_every_step(whole):
    every_epoch_has_its_order(whole)


def test_what_the_histograms_show(whole):
    every_histogram_is_shown(whole)


def test_the_bias_is_that_of_the_training_completions(whole):
    the_mean_reward_is_0(whole)


def test_what_is_trained(whole):
    """The reward model, and with nll_coef the language model's own last layer, each weight once."""
    model = whole.plain.model
    count = sum(p.numel() for p in model.parameters())
    untied = not model.config.tie_word_embeddings
    if whole.args.nll_coef and untied:
        count += whole.plain.lm.lm_head.weight.numel()
    assert whole.updates[0].weights.numel() == count


@pytest.mark.parametrize("kind", ["gpt2", "neox", "qwen3"])
def test_the_language_model_shares_any_backbone(tmp_path, kind):
    """Whatever its name in the model: besides the reward model only a last layer is trained."""
    policy = str(tmp_path / "policy")
    model = make_model(kind)
    model.save_pretrained(policy)
    make_tokenizer().save_pretrained(policy)
    seen = watched(rm_bt, tiny_args(tmp_path, PAIRS, model=policy, nll_coef=0.5))
    reward_model, lm = seen.results("load_model")
    assert lm.base_model is reward_model.base_model
    last = 0 if model.config.tie_word_embeddings else model.get_output_embeddings().weight.numel()
    count = sum(p.numel() for p in reward_model.parameters())
    assert seen.updates[0].weights.numel() == count + last


# --- Flags ----------------------------------------------------------------------------------------


class Runs:
    """run(**changes) -> Seen of a run of three steps on seven rows, in a folder of its own."""

    def __init__(self, script, model, folders, rows, row_loss, micro_batch_size):
        self.script = script
        self.rows = rows
        self.row_loss = row_loss
        self.folders = folders
        self.held = UNSEEN_OF[script.__name__]
        folder = folders.mktemp("rows")
        held = write(folder / "held.jsonl", self.held)
        self.flags = dict(model=model, eval_dataset=held, eval_every=100)
        self.flags |= dict(micro_batch_size=micro_batch_size)
        self.flags |= dict(lr_schedule="cosine", warmup_ratio=0.4, dtype="float32")
        self.flags |= dict(dataset=write(folder / "rows.jsonl", rows))

    def __call__(self, **changes):
        folder = self.folders.mktemp("flags")
        args = tiny_args(folder, self.rows, self.script, **self.flags | changes)
        return watched(self.script, args)

    def plain(self, seen):
        """The model that a run starts from."""
        return plain_rm.Rewards(seen.args.model, seen.args.seed, min(seen.args.max_length, 256))

    def starts_right(self, seen, rows=None, held=None):
        """Loss, norm of the gradient, and first evaluation are those of the plain form; -> loss."""
        rewards = self.plain(seen)
        first = drawn(seen, rows or self.rows)[0]
        loss = plain_rm.step_loss(rewards, first, seen.args, self.row_loss)
        loss.backward()
        row = seen.steps[0]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-3)
        assert row["grad_norm"] == pytest.approx(plain.gradient_norm(rewards.parts), rel=2e-3)
        want = plain_rm.held_out_metrics(rewards, held or self.held, self.row_loss)
        for name in ("eval_loss", "eval_reward", "eval_reward_std", "eval_accuracy"):
            assert seen.evals[0][name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), name
        return row["loss"]


def differ(numbers):
    """No two of the numbers are near each other."""
    numbers = sorted(numbers)
    return all(b - a > 1e-3 for a, b in itertools.pairwise(numbers))


def flag_model(run, base, folder):
    """Weights and tokenizer are those of the folder."""
    model = AutoModelForCausalLM.from_pretrained(base.args.model)
    torch.manual_seed(8)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape)
    model.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(base.args.model).save_pretrained(folder / "other")
    got = run(model=str(folder / "other"))
    assert differ([run.starts_right(got), run.starts_right(base)])
    assert got.arguments("load_tokenizer", "path") == [str(folder / "other")]


def flag_dataset(run, base, folder):
    """Trained on these rows, and on no others."""
    rows = [row | {"prompt": f"0+{row['prompt']}"} for row in run.rows[:4]]
    got = run(dataset=write(folder / "rows.jsonl", rows))
    run.starts_right(got, rows)
    prompts = [row["prompt"] for batch in drawn(got, rows) for row in batch]
    assert sorted(prompts) == sorted(row["prompt"] for row in rows)


def flag_eval_dataset(run, base, folder):
    """Evaluated on these rows; training is the same."""
    rows = run.held[1:4]
    got = run(eval_dataset=write(folder / "rows.jsonl", rows))
    run.starts_right(got, held=rows)
    assert set(not_drawn(got, run.rows)) == {row["prompt"] for row in rows}
    assert [row["loss"] for row in got.steps] == [row["loss"] for row in base.steps]


def flag_seed(run, base, folder):
    """Another order of the rows, and another head."""
    got = run(seed=7)
    run.starts_right(got)
    assert drawn(got, run.rows) != drawn(base, run.rows)
    heads = [run.plain(seen).model.score.weight for seen in (got, base)]
    assert not torch.equal(*heads)


def flag_margin_scale(run, base, folder):
    runs = [run(margin_scale=scale) for scale in (0.0, 2.0, 3.0)]
    assert differ([run.starts_right(seen) for seen in runs])


def flag_center_coef(run, base, folder):
    runs = [run(center_coef=weight) for weight in (0.0, 0.2, 3.0)]
    assert differ([run.starts_right(seen) for seen in runs])


def flag_nll_coef(run, base, folder):
    runs = [run(nll_coef=weight) for weight in (0.0, 0.2, 3.0)]
    assert differ([run.starts_right(seen) for seen in runs])
    assert [len(seen.results("load_model")) for seen in runs] == [1, 2, 2]


def flag_num_epochs(run, base, folder):
    """Every row once an epoch, each time in another order."""
    got = run(num_epochs=3)
    assert [len(base.steps), len(got.steps)] == [3, 7]
    prompts = [row["prompt"] for batch in drawn(got, run.rows) for row in batch]
    epochs = [prompts[:7], prompts[7:14], prompts[14:]]
    everything = sorted(row["prompt"] for row in run.rows)
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def flag_batch_size(run, base, folder):
    """Prompts a step, the last step with what is left."""
    got = run(batch_size=2)
    run.starts_right(got)
    assert [len(batch) for batch in drawn(base, run.rows)] == [3, 3, 1]
    assert [len(batch) for batch in drawn(got, run.rows)] == [2, 2, 2, 1]


def flag_micro_batch_size(run, base, folder):
    """Completions a forward, whole prompts; the same metrics."""
    got = run(micro_batch_size=1)
    prompts = [len(batch.prompt_ids) for batch in got.arguments("last_scores", "batch")]
    assert set(prompts) == {1}
    assert set(got.arguments("fixed_scores", "micro_batch_size")) == {1}
    several = base.arguments("last_scores", "batch")
    several = [len(batch.prompt_of) for batch in several if len(batch.prompt_ids) > 1]
    assert several and max(several) <= base.args.micro_batch_size
    observe.changes_nothing(got, base)


def flag_max_length(run, base, folder):
    """Tokens of prompt and completion, in training and evaluation; the end is cut off."""
    got = run(max_length=14)
    lengths = []
    for batch in got.results("encode"):
        lengths += [len(prompt + completion) for prompt, completion in plain.unpadded(batch)]
    assert max(lengths) == 14
    assert differ([run.starts_right(got), run.starts_right(base)])


def rates_are(seen, warmup):
    """The rates used and logged are those of the formula."""
    args = seen.args
    total = len(seen.steps)
    rates = [
        plain.learning_rate(step, args.learning_rate, args.lr_schedule, warmup, total)
        for step in range(1, total + 1)
    ]
    assert [update.lr for update in seen.updates] == pytest.approx(rates)
    assert [row["lr"] for row in seen.steps] == pytest.approx(rates, rel=1e-5)


def flag_lr_schedule(run, base, folder):
    for schedule in ("constant", "linear", "cosine"):
        rates_are(run(lr_schedule=schedule, num_epochs=2), 2)


def flag_warmup_ratio(run, base, folder):
    """Shares of five steps, to the nearest step."""
    for ratio, warmup in ((0.0, 0), (0.25, 1), (0.55, 3)):
        rates_are(run(warmup_ratio=ratio, num_epochs=2, lr_schedule="linear"), warmup)


def flag_eval_size(run, base, folder):
    """So many prompts are held out, at most a tenth; they are evaluated and not trained on."""
    rows = []
    for i in range(24):
        like = run.rows[i % 7]
        rows.append(like | {"prompt": f"{i}+{i}"})
    dataset = write(folder / "rows.jsonl", rows)
    for size, count in ((0, 0), (1, 1), (2, 2), (9, 2)):
        got = run(dataset=dataset, eval_dataset="", eval_size=size)
        calls = got.arguments("encode", "prompts")
        evaluated = calls.pop(0) if count else []
        trained = [prompt for prompts in calls[: len(got.steps)] for prompt in prompts]
        assert len(evaluated) == count and len(got.evals) == 2 * (count > 0)
        assert sorted(evaluated + trained) == sorted(row["prompt"] for row in rows)


def flag_resume(run, base, folder):
    """A finished run that is resumed does nothing more; a run that is there is not begun anew."""
    there = str(folder / "run")
    run(output_dir=there)
    got = run(output_dir=there, resume=True)
    assert got.updates == [] and equal_runs(got, base)
    observe.refused(run, "exists", output_dir=there)
    observe.refused(run, "seed", output_dir=there, resume=True, seed=1)


def flag_share_prompts(run, base, folder):
    """As for all scripts, and in the language model's pass."""
    observe.flag_share_prompts(run, base, folder)
    if hasattr(base.args, "nll_coef"):
        got = run(share_prompts=False, nll_coef=0.5)
        assert got.arguments("completion_logps", "share_prompts")
        assert not any(got.arguments("completion_logps", "share_prompts"))


def flag_gradient_checkpointing(run, base, folder):
    """As for all scripts, and in the language model."""
    observe.flag_gradient_checkpointing(run, base, folder)
    if hasattr(base.args, "nll_coef"):
        got = run(gradient_checkpointing=True, nll_coef=0.5)
        assert [model.recompute for model in got.results("load_model")] == [True, True]


def flag_dtype(run, base, folder):
    """As for all scripts, and in the language model."""
    observe.flag_dtype(run, base, folder)
    if hasattr(base.args, "nll_coef"):
        got = run(dtype="bfloat16", nll_coef=0.5)
        dtypes = [model.autocast_dtype for model in got.results("load_model")]
        assert dtypes == [torch.bfloat16] * 2


SHARED_FLAGS = {
    "model": flag_model,
    "dataset": flag_dataset,
    "eval_dataset": flag_eval_dataset,
    "output_dir": observe.flag_output_dir,
    "resume": flag_resume,
    "overwrite": observe.flag_overwrite,
    "seed": flag_seed,
    "device": observe.flag_device,
    "dtype": flag_dtype,
    "show_rows": observe.flag_show_rows,
    "gradient_checkpointing": flag_gradient_checkpointing,
    "share_prompts": flag_share_prompts,
    "num_epochs": flag_num_epochs,
    "batch_size": flag_batch_size,
    "micro_batch_size": flag_micro_batch_size,
    "max_length": flag_max_length,
    "learning_rate": observe.flag_learning_rate,
    "lora_rank": observe.flag_lora_rank,
    "shard": observe.flag_shard,
    "lr_schedule": flag_lr_schedule,
    "warmup_ratio": flag_warmup_ratio,
    "max_grad_norm": observe.flag_max_grad_norm,
    "eval_size": flag_eval_size,
    "eval_every": observe.flag_eval_every,
    "checkpoint_every": observe.flag_checkpoint_every,
}
FLAGS = SHARED_FLAGS | {
    "margin_scale": flag_margin_scale,
    "center_coef": flag_center_coef,
    "nll_coef": flag_nll_coef,
}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs, and the Seen of the one without changes."""
    run = Runs(rm_bt, tiny, tmp_path_factory, MIXED, plain_rm.pairwise, 4)
    return run, run()


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(runs, tmp_path, flag):
    run, base = runs
    FLAGS[flag](run, base, tmp_path)


def test_every_flag_has_a_check():
    observe.has_every_flag(rm_bt, FLAGS)


DEFAULTS = dict(
    eval_dataset="", resume=False, overwrite=False, seed=0, device="auto", dtype="auto",
    show_rows=0,
    gradient_checkpointing=False, shard=False, share_prompts=True, lora_rank=0, num_epochs=1,
    batch_size=64,
    micro_batch_size=8, max_length=1024, learning_rate=9e-6, lr_schedule="cosine",
    warmup_ratio=0.03, max_grad_norm=1.0, eval_size=64, eval_every=50, checkpoint_every=50,
)  # fmt: skip


def has_defaults(script, defaults, toy):
    """Without flags the run is InstructGPT's; the toy's held-out rows are not those of training."""
    got = vars(script.Args("a model", "a dataset"))
    own = {"model": "a model", "dataset": "a dataset", "output_dir": f"runs/{script.__name__}"}
    assert got == defaults | own
    assert script.TOY == toy | {"model": "toy/model"}


def test_defaults():
    toy = dict(
        dataset="toy/pref_train.jsonl", eval_dataset="toy/pref_test.jsonl", num_epochs=3,
        learning_rate=1e-3, batch_size=32, micro_batch_size=64, warmup_ratio=0.1,
    )  # fmt: skip
    own = dict(margin_scale=1.0, center_coef=0.0, nll_coef=0.0)
    has_defaults(rm_bt, DEFAULTS | own, toy)


# --- Checkpoints ----------------------------------------------------------------------------------


def interrupted(run, folder, part=None):
    """Five steps, killed in the fourth and resumed from the second; `part` is not loaded."""
    flags = dict(num_epochs=2, checkpoint_every=2, lr_schedule="linear", warmup_ratio=0.2)
    flags |= dict(output_dir=str(folder / "run"))
    with observe.killed(plumbing.Run, "log", 5):
        run(**flags)
    begin = plumbing.Run.begin

    def without(self, parts, num_steps):
        begin(self, {name: x for name, x in parts.items() if name != part}, num_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.Run, "begin", without)
        return run(resume=True, **flags)


def parts_of(script, run):
    """A run of five steps, and the names of the parts that its checkpoints have."""
    names = []
    begin = plumbing.Run.begin

    def noting(self, parts, num_steps):
        names.extend(parts)
        begin(self, parts, num_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.Run, "begin", noting)
        unbroken = run(num_epochs=2, lr_schedule="linear", warmup_ratio=0.2)
    return unbroken, names


def equal_runs(a, b):
    """Whether two runs logged the same and ended with the same weights."""
    same = [torch.equal(x, b.weights()[name]) for name, x in a.weights().items()]
    return all(same) and a.untimed() == b.untimed()


def resumes(run, folder):
    """A resumed run is the unbroken one, and is not where a part of its checkpoint is left out."""
    unbroken, names = parts_of(run.script, run)
    resumed = interrupted(run, folder / "whole")
    assert len(resumed.updates) == 3 and equal_runs(resumed, unbroken)
    rates_are_last = [update.lr for update in unbroken.updates[2:]]
    assert [update.lr for update in resumed.updates] == rates_are_last
    assert len(names) >= 3
    for name in names:
        assert not equal_runs(interrupted(run, folder / name, name), unbroken), name


def resumes_after_the_last_step(run, base, folder):
    """A run killed while the bias is made has a checkpoint of its last step, and then the bias."""
    flags = dict(output_dir=str(folder / "run"), checkpoint_every=100)
    calls = len(base.calls["fixed_scores"])
    with observe.killed(run.script, "fixed_scores", calls):
        run(**flags)
    assert not (folder / "run" / "final").exists()
    resumed = run(resume=True, **flags)
    assert resumed.updates == [] and equal_runs(resumed, base)
    read = [json.loads((seen.folder / "final/config.json").read_text()) for seen in (resumed, base)]
    assert read[0] == read[1] and read[0]["reward_bias"] != 0


def test_a_resumed_run_is_the_unbroken_one_and_needs_every_part(runs, tmp_path):
    resumes(runs[0], tmp_path)


def test_a_run_killed_after_its_last_step_is_finished(runs, tmp_path):
    resumes_after_the_last_step(*runs, tmp_path)


def test_the_language_models_last_layer_is_in_the_checkpoint(runs, tmp_path):
    """With nll_coef it is trained, too."""
    run = runs[0]

    def with_nll(**changes):
        return run(nll_coef=2.0, **changes)

    unbroken = with_nll(num_epochs=2, lr_schedule="linear", warmup_ratio=0.2)
    assert equal_runs(interrupted(with_nll, tmp_path), unbroken)


# --- Rows and saved models ------------------------------------------------------------------------

COUNTED = [  # a prompt of 4 tokens: with max_length 10 a completion has 5 tokens and its end
    {"prompt": "1", "completions": ["1", "1"], "ranks": [0, 1]},
    {"prompt": "2", "completions": ["1234567", "1234568"], "ranks": [0, 1]},
    {"prompt": "9" * 7, "completions": ["1", "2"], "ranks": [0, 1]},
    {"prompt": "9" * 9, "completions": ["1234", "5678"], "ranks": [0, 1]},
    {"prompt": "4", "completions": ["1", "2"], "ranks": [1, 1]},
    {"prompt": "5", "completions": ["12345", "2"], "ranks": [0, 1]},
    {"prompt": "6", "completions": ["123456", "2"], "ranks": [0, 1]},
    {"prompt": "7", "completions": ["1234567", "2234567"], "ranks": [0, 1]},
    {"prompt": "8", "completions": ["4", "4", "5"], "ranks": [1, 0, 2]},
]


def says_what_is_dropped(script, rows, tmp_path, tiny, capsys, dropped):
    """Rows without a comparison are counted and not trained on, completions without their end are
    counted; of the held-out rows likewise, under their own name."""
    held = write(tmp_path / "held.jsonl", rows[:1] + UNSEEN_OF[script.__name__][1:2])
    flags = dict(model=tiny, max_length=10, eval_dataset=held, batch_size=2)
    seen = watched(script, tiny_args(tmp_path, rows, script, **flags))
    out = capsys.readouterr().out
    said = re.findall(r"(\S+): of (\d+) rows, dropped (\d+).*--max-length (\d+); cut (\d+) c", out)
    assert said == [
        (seen.args.dataset, str(len(rows)), str(dropped), "10", "3"),
        (held, "2", "1", "10", "2"),
    ]
    prompts = [row["prompt"] for batch in drawn(seen, rows) for row in batch]
    assert sorted(prompts) == ["5", "6", "7", "8"]
    assert len(seen.steps) == 2
    watched(script, tiny_args(tmp_path / "none", rows[-4:-3], script, model=tiny, max_length=11))
    assert "rows, dropped" not in capsys.readouterr().out


def test_what_is_dropped_and_cut_is_said(tmp_path, tiny, capsys):
    says_what_is_dropped(rm_bt, COUNTED, tmp_path, tiny, capsys, 5)


def ranks_are_counted_anew(script, tmp_path, tiny, **changes):
    """Of equal completions the first stays, with its rank; the rest is a ranking from 0 up."""
    twice = {"prompt": "4", "completions": ["44", "5+5", "44", "6"], "ranks": [2, 1, 0, 3]}
    once = {"prompt": "4", "completions": ["44", "5+5", "6"], "ranks": [1, 0, 2]}
    got = []
    for row in (twice, once):
        folder = tmp_path / str(len(got))
        held = write(folder / "held.jsonl", [row | {"prompt": "3"}])
        flags = changes | dict(model=tiny, eval_dataset=held)
        got.append(watched(script, tiny_args(folder, [row], script, **flags)))
    observe.changes_nothing(*got)
    for a, b in zip(got[0].shown, got[1].shown, strict=True):
        assert len(a["best"]) == 1 and len(a["others"]) == 2
        assert float(a["best"][0]) == pytest.approx(float(b["best"][0]), rel=1e-4)


def test_ranks_are_counted_anew_where_equal_completions_are_left_out(tmp_path, tiny):
    ranks_are_counted_anew(rm_bt, tmp_path, tiny, nll_coef=0.5)


def keeps_within_the_context(script, tmp_path, tiny, capsys):
    """No more tokens than the model has places for, 256, though --max-length allows them."""
    rows = [{"prompt": "1", "completions": ["7" * 300, "2"], "ranks": [0, 1]}]
    args = tiny_args(tmp_path, rows, script, model=tiny, max_length=1024)
    seen = watched(script, args)
    assert "--max-length 256; cut 1 completions" in capsys.readouterr().out
    lengths = [len(p + c) for p, c in plain.unpadded(seen.results("encode")[0])]
    assert max(lengths) == 256


def test_completions_are_cut_to_the_models_context(tmp_path, tiny, capsys):
    keeps_within_the_context(rm_bt, tmp_path, tiny, capsys)


def held_out_rows_need_a_comparison(script, tmp_path, tiny):
    held = write(tmp_path / "held.jsonl", COUNTED[:1])
    rows = STRICT_ROW if script.__name__ == "rm_kwise" else PAIRS
    with pytest.raises(ValueError, match="held.jsonl.*to compare"):
        run(tiny_args(tmp_path, rows, script, model=tiny, eval_dataset=held))


STRICT_ROW = RANKED[:1]


def test_held_out_rows_without_a_comparison_are_refused(tmp_path, tiny):
    held_out_rows_need_a_comparison(rm_bt, tmp_path, tiny)


def test_soft_labels_beside_rankings_are_refused(tmp_path, tiny):
    """Eq. 6 has none: to read them as 1 in silence would train another loss than was asked."""
    rows = RANKED + [{"prompt": "8", "chosen": "8", "rejected": "9", "probability": 0.9}]
    with pytest.raises(ValueError, match="probabilities"):
        run(tiny_args(tmp_path, rows, model=tiny))


def test_margins_beside_rankings_are_left_out_where_it_is_asked(tmp_path, tiny):
    """With --margin-scale 0; and rankings that are held out alone do not make training one."""
    both = RANKED + PAIRS[2:] + [PAIRS[0] | {"prompt": "0"}]
    seen = watched(rm_bt, tiny_args(tmp_path / "a", both, model=tiny, margin_scale=0.0))
    assert seen.steps
    held = write(tmp_path / "held.jsonl", RANKED)
    seen = watched(rm_bt, tiny_args(tmp_path / "b", PAIRS, model=tiny, eval_dataset=held))
    assert seen.steps


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "1", "chosen": "a", "rejected": "b", "margin": math.inf}, "line 2: margin"),
        ({"prompt": "1", "completions": ["a", "b"], "ranks": [0, math.nan]}, "row 2"),
        ({"prompt": "1", "chosen": "a", "rejected": "b", "probability": 2}, "line 2: probability"),
        ({"prompt": "1", "chosen": "a", "rejected": " "}, "line 2"),
        ({"chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "1", "rejected": "b"}, "chosen or completions"),
    ],
)
def test_a_bad_row_is_named(tmp_path, tiny, row, says):
    with pytest.raises(ValueError, match=says):
        run(tiny_args(tmp_path, [PAIRS[0], row], model=tiny))


def chats_are_read(script, rows, tmp_path, tiny):
    """Rows of messages are the rows of their texts."""
    chats = []
    for row in rows:
        user = {"role": "user", "content": row["prompt"]}
        sides = {}
        for side in ("chosen", "rejected"):
            sides[side] = [user, {"role": "assistant", "content": row[side]}]
        chats.append({"prompt": [user]} | sides)
    got = watched(script, tiny_args(tmp_path / "a", rows, script, model=tiny))
    want = watched(script, tiny_args(tmp_path / "b", chats, script, model=tiny))
    assert got.steps[0]["loss"] == pytest.approx(want.steps[0]["loss"])
    assert got.steps[0]["grad_norm"] == pytest.approx(want.steps[0]["grad_norm"])


def test_chats_are_read_as_their_texts(tmp_path, tiny):
    rows = [{"prompt": "1+2", "chosen": "3", "rejected": "4 4"}]
    rows += [{"prompt": "10", "chosen": "10=10", "rejected": "1"}]
    chats_are_read(rm_bt, rows, tmp_path, tiny)


@pytest.mark.parametrize("pad", [None, 1, 0])
@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_the_pad_id_is_in_the_saved_config(tmp_path, pad, pad_is_eos):
    pad_id_is_saved(rm_bt, PAIRS, tmp_path, pad, pad_is_eos)


def pad_id_is_saved(script, rows, tmp_path, pad, pad_is_eos):
    """Whatever the policy's config says, Transformers reads a padded batch as single texts."""
    tokenizer = make_tokenizer(pad_is_eos=pad_is_eos)
    if pad_is_eos:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    model = make_model("llama")
    model.config.pad_token_id = pad
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    args = tiny_args(tmp_path, rows, script, model=str(tmp_path / "policy"))
    final = watched(script, args).folder / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    texts = ["<bos>[user]7<eos>[assistant]8<eos>", "<bos>[user]7<eos>[assistant]88 and 8<eos>"]
    options = dict(return_tensors="pt", add_special_tokens=False)
    batch = tokenizer(texts, padding=True, **options)
    with torch.no_grad():
        got = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].tolist()
        alone = [model(tokenizer(text, **options).input_ids).logits[0, 0].item() for text in texts]
    assert got == pytest.approx(alone, abs=1e-4)


def test_the_picture_of_rewards_is_drawn(tmp_path, tiny):
    pytest.importorskip("matplotlib")
    held = write(tmp_path / "held.jsonl", UNSEEN)
    args = tiny_args(tmp_path, PAIRS, model=tiny, eval_dataset=held)
    observe.observe(rm_bt, args)
    assert (tmp_path / "run" / "reward_histogram.png").stat().st_size > 1000


def test_equal_lengths_and_ties_by_hand():
    """Pairs of equal length are in neither accuracy by length; ties count half in each."""
    scores = torch.tensor([1.0, 0.0, 2.0, 2.0, 0.0, 3.0, 5.0, 5.0, 1.0])
    lengths = torch.tensor([5, 3, 2, 4, 9, 9, 6, 1, 1])
    ranks = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1])
    prompt_of = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3])
    got = rm_bt.pair_metrics(scores, lengths, ranks, prompt_of)
    assert got["eval_accuracy"] == pytest.approx((1 + 0.5 + 0 + 0.5 + 1) / 5)
    assert got["eval_accuracy_better_longer"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert got["eval_accuracy_better_shorter"] == pytest.approx(0.5)
    assert got["eval_reward"] == pytest.approx(19 / 9)


def test_center_loss_by_hand():
    """Mean over the pairs of each prompt, then over prompts."""
    scores, ranks = torch.tensor([1.0, 2.0, 4.0, 3.0, -1.0]), torch.tensor([0, 1, 2, 1, 0])
    got = rm_bt.center_loss(scores, ranks, torch.tensor([0, 0, 0, 1, 1]))
    assert got.item() == pytest.approx(((9 + 25 + 36) / 3 + 4) / 2)


def test_prompt_mean_by_hand():
    """Prompts without a value do not count."""
    got = rm_bt.prompt_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]))
    assert got.item() == pytest.approx((2 + 5) / 2)
