"""rm_bt.py against hand values, plain loops and Transformers' own head, and learning on the toy."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

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


def run(args):
    """Train with the script that the Args are of; -> rows of metrics."""
    sys.modules[type(args).__module__].main(args)
    return [json.loads(line) for line in open(f"{args.output_dir}/metrics.jsonl")]


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
        AutoModelForSequenceClassification, TOY, torch.device("cpu"), new_head=1
    )


def text_of(side):
    return side if isinstance(side, str) else side[0]["content"]


@pytest.mark.parametrize("size", [1, 4, 6])
def test_a_step_on_pairs_equals_a_plain_loop(tmp_path, size):
    args = tiny_args(tmp_path, PAIRS, micro_batch_size=size, center_coef=0.1, margin_scale=2.0)
    row = run(args)[0]
    model, tokenizer, loss = fresh_model(args), rm_bt.load_tokenizer(TOY), 0.0
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
def test_a_step_on_rankings_equals_a_plain_loop(tmp_path, size):
    args = tiny_args(tmp_path, RANKED, micro_batch_size=size, share_prompts=size > 1)
    row = run(args)[0]
    model, tokenizer, loss = fresh_model(args), rm_bt.load_tokenizer(TOY), 0.0
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


def test_held_out_metrics_equal_a_plain_loop(tmp_path):
    """Two prompts at a time, so that a later one's completions must not be paired with others'."""
    held = write(tmp_path / "held.jsonl", RANKED + [PAIRS[1], *RANKED[::-1]])
    args = tiny_args(tmp_path, PAIRS[2:], eval_dataset=held, batch_size=2, micro_batch_size=5)
    row = run(args)[0]
    model, tokenizer = fresh_model(args), rm_bt.load_tokenizer(TOY)
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


def test_the_nll_term_is_of_the_chosen_completions(tmp_path):
    plain = run(tiny_args(tmp_path / "a", PAIRS))[0]["loss"]
    both = run(tiny_args(tmp_path / "b", PAIRS, nll_coef=0.5, micro_batch_size=2))[0]["loss"]
    model = common.load_model(rm_bt.AutoModelForCausalLM, TOY, torch.device("cpu"))
    tokenizer, nll = rm_bt.load_tokenizer(TOY), 0.0
    for pair in PAIRS:
        batch = common.encode(tokenizer, [pair["prompt"]], [[text_of(pair["chosen"])]])
        nll -= common.completion_logps(model, batch).sum().item() / batch.completion_mask.sum() / 3
    assert both - plain == pytest.approx(0.5 * nll.item(), rel=1e-3)


def test_micro_batches_change_nothing(tmp_path):
    """With every term of the loss, on rankings of 3, 2 and 4: prompts weigh alike, however cut."""
    got = [run(tiny_args(tmp_path / str(size), RANKED, micro_batch_size=size, center_coef=0.3,
                         nll_coef=0.5))[0] for size in (1, 5, 9)]  # fmt: skip
    for row in got[1:]:
        assert row["loss"] == pytest.approx(got[0]["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(got[0]["grad_norm"], rel=1e-3)


def test_ranks_may_begin_anywhere_and_skip(tmp_path):
    moved = [row | {"ranks": [10 + 3 * r for r in row["ranks"]]} for row in RANKED]
    got = []
    for rows in (RANKED, moved):
        folder = tmp_path / str(len(got))
        held_out = write(folder / "held_out.jsonl", rows)
        got.append(run(tiny_args(folder, rows, nll_coef=0.5, eval_dataset=held_out)))
    for a, b in zip(*got, strict=True):
        for name in a.keys() - {"seconds", "tokens_per_second"}:
            assert a[name] == pytest.approx(b[name]), name


def test_a_reward_model_trained_on_is_centred_anew(tmp_path):
    run(tiny_args(tmp_path / "a", PAIRS))
    again = tiny_args(tmp_path / "b", PAIRS, model=str(tmp_path / "a/run/final"), learning_rate=0.0)
    run(again)
    biases = [json.loads((tmp_path / x / "run/final/config.json").read_text())["reward_bias"]
              for x in "ab"]  # fmt: skip
    assert biases[0] == pytest.approx(biases[1], rel=1e-3) and biases[0] != 0


def test_margins_beside_rankings_are_refused(tmp_path):
    """Eq. 6 has no margin: to leave it out in silence would train another loss than was asked."""
    with pytest.raises(SystemExit, match="margin"):
        run(tiny_args(tmp_path, RANKED + PAIRS))


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
    score = common.load_reward("verifier", None, final, torch.device("cpu"))
    want = score(["7", "7"], ["8", "a much longer one"], [{}, {}])
    assert (got + model.config.reward_bias).tolist() == pytest.approx(want, abs=1e-4)


def test_the_saved_model_scores_the_same_and_is_centred(tmp_path, capsys):
    args = tiny_args(tmp_path, PAIRS * 4, num_epochs=3)
    run(args)
    final = f"{args.output_dir}/final"
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    prompts, texts = [], []
    for pair in PAIRS:
        prompts += [pair["prompt"]] * 2
        texts += [text_of(pair["chosen"]), text_of(pair["rejected"])]
    score = common.load_reward("verifier", None, final, torch.device("cpu"), micro_batch_size=4)
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


def test_resume_of_a_finished_run_keeps_the_bias(tmp_path):
    args = tiny_args(tmp_path, PAIRS)
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


def test_learning_as_a_user_would(tmp_path):
    first, *_, last = learned("rm_bt.py", tmp_path, "--num-epochs", "1")
    assert first["eval_accuracy"] < 0.65 and last["eval_accuracy"] > 0.78
    assert last["eval_loss"] < 0.45 < first["eval_loss"]


# --- Bad input ------------------------------------------------------------------------------------


def test_pairs_that_are_equal_or_become_so_are_dropped_and_counted(tmp_path, capsys):
    same = {"prompt": "1", "chosen": "x", "rejected": "x"}
    later = {"prompt": "1", "chosen": "y" * 80 + "1", "rejected": "y" * 80 + "2"}
    long = {"prompt": "9" * 80, "chosen": "1", "rejected": "2"}
    cut = {"prompt": "1", "chosen": "x" * 80, "rejected": "y"}
    run(tiny_args(tmp_path, [same, later, long, cut, *PAIRS]))
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
        ({"prompt": "1", "chosen": "a", "rejected": "a"}, "to compare"),
        ({"prompt": "1", "chosen": [PAIRS[2]["chosen"][0]] * 2, "rejected": "a"}, "earlier turns"),
    ],
)  # fmt: skip
def test_bad_rows_end_with_one_line(tmp_path, row, says):
    with pytest.raises(SystemExit) as stopped:
        run(tiny_args(tmp_path, [row]))
    assert says in stopped.value.code and "\n" not in stopped.value.code
    assert not (tmp_path / "run").exists()
