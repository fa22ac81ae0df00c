"""judge.py against hand values, enumeration, slow maximisation and plain forwards, and the toy."""

import itertools
import math
import os
import random
import subprocess
import sys

import plain
import pytest
import torch
from conftest import ROOT, make_tokenizer
from policy_gradient import read_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import plumbing
import dpo_nll
import judge
import rm_bt

pytestmark = pytest.mark.usefixtures("no_picture")

TEMPLATE = str(ROOT / "toy" / "judge.txt")
ROWS = [
    {"prompt": "1+2", "chosen": "3", "rejected": "12"},
    {"prompt": "4+5", "chosen": "4+5=9", "rejected": "8"},
    {"prompt": "7+1", "chosen": "8", "rejected": "9"},
    {"prompt": "6+6", "chosen": "12", "rejected": "66=66"},
    {"prompt": "9+1", "chosen": "10", "rejected": "91"},
]
IN_ORDER = ["[[A]]", "[[C]]", "[[B]]"]


def some_args(tmp_path, tiny, rows=ROWS, **changes):
    values = dict(
        model=tiny, dataset=write_rows(tmp_path / "rows.jsonl", rows), template=TEMPLATE,
        device="cpu", output_dir=str(tmp_path / "run"), batch_size=2, num_resamples=20,
        max_explanation_tokens=8, max_new_tokens=6, checkpoint_every=1,
    )  # fmt: skip
    return judge.Args(**values | changes)


def run(args):
    """Judge -> rows of judgements.jsonl, {what: row} of results.jsonl."""
    judge.main(args)
    folder = plumbing.Path(args.output_dir)
    results = {row["what"]: row for row in read_rows(folder / "results.jsonl")}
    return read_rows(folder / "judgements.jsonl"), results


def values(results):
    return {what: row["value"] for what, row in results.items()}


def says(monkeypatch, verdicts):
    """A judge whose texts are those of `verdicts`: a list, or a function of its prompts."""
    waiting = list(verdicts) if isinstance(verdicts, list) else None

    def generate(model, tokenizer, prompts, *rest):
        texts = [waiting.pop(0) for _ in prompts] if waiting is not None else verdicts(prompts)
        return None, texts, None

    monkeypatch.setattr(judge, "generate", generate)


# --- Verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "C"), ("", None), ("A", None), ("[A]", None),
        ("[[D]]", None), ("[[a]]", None), ("[[ B ]]", "B"), ("[[A]", None), ("[[AB]]", None),
        ("The first is right: 633. [[A]]", "A"), ("[[B]] because the carry is there.", "B"),
        ("[[A]] or [[B]]?", None), ("[[A]] and again [[A]]", "A"),
        ("At first [[A]] looked better.\nBut the carry is lost.\n[[B]]", "B"),
        ("[[B]]\n\nI hope that this helps!\n", "B"),
        ("Give [[A]] if A is better, [[B]] if B is, [[C]] for a tie.", None),
        ("Give [[A]], [[B]] or [[C]].\n\"[[C]]\"", "C"),
        ("[[B]]\n[[A]] or [[C]]", None),  # the last line decides, and does not
        ("**Verdict:** [[A]].", "A"), ("[[[B]]]", "B"), ("[[A\n]]", None),
        ("Assistant A wins", None),
    ],
)  # fmt: skip
def test_odd_texts(text, verdict):
    assert judge.parse_verdict(text) == verdict


VERDICTS = {"A": 1.0, "C": 0.5, "B": 0.0}
# Shown as A in order, shown as B when swapped: soft label, outcome, whether they contradict
BOTH = {
    "AB": (1.0, 1.0, False), "AC": (0.75, 1.0, False), "AA": (0.5, 0.5, True),
    "CB": (0.75, 1.0, False), "CC": (0.5, 0.5, False), "CA": (0.25, 0.0, False),
    "BB": (0.5, 0.5, True), "BC": (0.25, 0.0, False), "BA": (0.0, 0.0, False),
}  # fmt: skip


def test_every_two_verdicts():
    in_order = torch.tensor([VERDICTS[both[0]] for both in BOTH])
    swapped = torch.tensor([VERDICTS[both[1]] for both in BOTH])
    got = [
        judge.soft_preference(in_order, swapped),
        judge.outcomes(in_order, swapped),
        judge.contradicts(in_order, swapped),
    ]
    for i, want in enumerate(BOTH.values()):
        assert tuple(x[i].item() for x in got) == want, list(BOTH)[i]


def test_a_contradiction_of_probabilities_is_a_tie_and_its_label_the_mean():
    """For the first answer 0.9 and then 0.3; and where both orders are for it, but barely."""
    in_order = torch.tensor([0.9, 0.51, 0.2])
    swapped = torch.tensor([0.7, 0.49, 0.9])
    assert judge.soft_preference(in_order, swapped).tolist() == pytest.approx([0.6, 0.51, 0.15])
    assert judge.contradicts(in_order, swapped).tolist() == [True, False, False]
    assert judge.outcomes(in_order, swapped).tolist() == [0.5, 1.0, 0.0]


def test_exchanging_the_answers_turns_the_label_and_the_outcome_round():
    in_order, swapped = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)).double()
    label = judge.soft_preference(in_order, swapped)
    assert torch.allclose(judge.soft_preference(swapped, in_order), 1 - label)
    won = judge.outcomes(in_order, swapped)
    assert torch.equal(judge.outcomes(swapped, in_order), 1 - won)


def test_the_preference_for_a_place():
    ones, half = torch.ones(4), torch.full((4,), 0.5)
    assert judge.first_place(ones, ones) == 1 and judge.first_place(1 - ones, 1 - ones) == 0
    assert judge.first_place(ones, 1 - ones) == 0.5 == judge.first_place(half, half)
    assert judge.first_place(torch.tensor([0.9, 0.2]), torch.tensor([0.6, 0.5])) == 2.5 / 4


def test_pair_accuracy_by_hand():
    assert judge.pair_accuracy(torch.tensor([0.3, -0.1, 0.0, 2.0])) == 2.5 / 4


# --- Rates and ratings ----------------------------------------------------------------------------


def log_likelihood(features, labels, coefficients, ridge):
    """By a loop over rows, less the penalty."""
    total = -ridge / 2 * sum(b * b for b in coefficients)
    for row, label in zip(features, labels, strict=True):
        z = sum(x * b for x, b in zip(row, coefficients, strict=True))
        p = 1 / (1 + math.exp(-z))
        total += label * math.log(p) + (1 - label) * math.log(1 - p)
    return total


def slow_maximum(features, labels, ridge):
    """Coordinate by coordinate, in ever smaller steps."""
    best, step = [0.0] * len(features[0]), 0.5
    here = log_likelihood(features, labels, best, ridge)
    while step > 1e-5:
        moved = False
        for i, sign in itertools.product(range(len(best)), (1, -1)):
            other = [*best[:i], best[i] + sign * step, *best[i + 1 :]]
            there = log_likelihood(features, labels, other, ridge)
            if there > here:
                best, here, moved = other, there, True
        step = step if moved else step / 2
    return best


def test_logistic_regression_is_the_slow_maximum():
    draw = random.Random(0)
    features = [[1.0, draw.gauss(0, 1), draw.gauss(0, 2)] for _ in range(30)]
    labels = [draw.choice([0, 0.3, 0.5, 1]) for _ in features]
    got = judge.logistic_regression(torch.tensor(features), torch.tensor(labels), ridge=0.1)
    assert got.tolist() == pytest.approx(slow_maximum(features, labels, 0.1), abs=1e-4)


@pytest.mark.parametrize("number", [3, 200, 5000])
def test_nothing_but_wins_is_finite(number):
    """And at the place where the penalty balances the gradient."""
    (b,) = judge.logistic_regression(torch.ones(number, 1), torch.ones(number)).tolist()
    assert 4 < b < 20 and number * (1 - 1 / (1 + math.exp(-b))) == pytest.approx(1e-3 * b, rel=1e-6)


def test_the_length_controlled_rate_of_a_known_model():
    """Labels are the probabilities of sigmoid(0.4 + 0.02 difference): at 0 it is sigmoid(0.4)."""
    difference = torch.arange(-30, 200).double()
    won = (0.4 + 0.02 * difference).sigmoid()
    got = judge.length_controlled_win_rate(won, difference)
    assert got.item() == pytest.approx(1 / (1 + math.exp(-0.4)), abs=1e-4)
    assert won.mean() > 0.8  # the plain win rate is misled by the lengths
    turned = judge.length_controlled_win_rate(1 - won, -difference)
    assert turned.item() == pytest.approx(1 - got.item(), abs=1e-9)


def test_the_length_controlled_rate_of_drawn_labels():
    generator = torch.Generator().manual_seed(0)
    difference = 40 + 30 * torch.randn(4000, generator=generator).double()
    chance = (-0.5 + 0.03 * difference).sigmoid()
    won = (torch.rand(4000, generator=generator) < chance).double()
    got = judge.length_controlled_win_rate(won, difference).item()
    assert got == pytest.approx(1 / (1 + math.exp(0.5)), abs=0.04) and won.mean() > 0.6


def test_equal_lengths_leave_the_win_rate_as_it_is():
    won = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0])
    for length in (0.0, 12.0):
        got = judge.length_controlled_win_rate(won, torch.full((5,), length))
        assert got.item() == pytest.approx(0.7, abs=1e-3)


BATTLES = [(0, 1), (0, 2), (1, 2)] * 20 + [(2, 0), (1, 0)] * 5


def battles_of(strengths):
    """All of BATTLES with their expected outcomes."""
    first, second = torch.tensor(BATTLES).T
    strengths = torch.tensor(strengths).double()
    return first, second, (strengths[first] - strengths[second]).sigmoid()


def test_known_strengths_are_found():
    """The best of three first; a constant added to all of them changes nothing."""
    strengths = [1.2, -0.7, -0.5]
    got = judge.battle_ratings(*battles_of(strengths), 3)
    assert got.tolist() == pytest.approx(strengths, abs=1e-3) and got.argmax() == 0
    moved = judge.battle_ratings(*battles_of([x + 5 for x in strengths]), 3)
    assert torch.allclose(moved, got)


def test_ratings_are_the_slow_maximum():
    draw = random.Random(1)
    outcomes = [draw.choice([0, 0.5, 1]) for _ in BATTLES]
    first, second = torch.tensor(BATTLES).T
    got = judge.battle_ratings(first, second, torch.tensor(outcomes), 3)
    features = []
    for i, j in BATTLES:  # the first contestant is the zero of the scale
        features.append([float(k == i) - float(k == j) for k in (1, 2)])
    want = slow_maximum(features, outcomes, 0)
    assert (got[1:] - got[0]).tolist() == pytest.approx(want, abs=1e-3)
    assert got.sum().item() == pytest.approx(0, abs=1e-9)


def test_400_points_are_odds_of_ten():
    points = judge.arena_scale(torch.tensor([0.0, math.log(10)]))
    assert points.tolist() == pytest.approx([1000, 1400])


def test_an_interval_of_a_mean_is_about_that_of_the_normal_law():
    values = (torch.arange(400) % 5 == 0).double()  # one in five
    low, high = judge.bootstrap_interval(lambda i: values[i].mean(), torch.arange(400), 2000, 0)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 400)
    assert low.item() == pytest.approx(0.2 - half, abs=0.006)
    assert high.item() == pytest.approx(0.2 + half, abs=0.006)
    again = judge.bootstrap_interval(lambda i: values[i].mean(), torch.arange(400), 2000, 0)
    assert (low, high) == again
    other = judge.bootstrap_interval(lambda i: values[i].mean(), torch.arange(400), 2000, 1)
    assert (low, high) != other


def test_rows_of_one_prompt_are_drawn_together():
    """Four times the same rows say no more than once."""
    values = (torch.arange(100) % 2).double()
    once = judge.bootstrap_interval(lambda i: values[i].mean(), torch.arange(100), 500, 0)
    four = values.repeat_interleave(4)
    prompt_of = torch.arange(100).repeat_interleave(4)
    often = judge.bootstrap_interval(lambda i: four[i].mean(), prompt_of, 500, 0)
    assert torch.tensor(once).tolist() == pytest.approx(torch.tensor(often).tolist())


def test_an_interval_of_several_numbers_and_of_what_is_not_always_there():
    values = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    low, high = judge.bootstrap_interval(lambda i: values[i].mean(0), torch.arange(50), 200, 0)
    assert low.shape == high.shape == (2,) and (low < values.mean(0)).all()
    few = torch.zeros(6)
    few[0] = 1
    low, high = judge.bootstrap_interval(
        lambda i: i[few[i] > 0].double().mean(), torch.arange(6), 50, 0
    )
    assert (low, high) == (0, 0)


# --- What the judge reads -------------------------------------------------------------------------


def test_a_prompt_of_the_judge_by_hand():
    got = judge.judge_prompt(
        "Q {question} 1 {answer_a} 2 {answer_b} {x}", "{answer_b}?", "{a}", "é"
    )
    assert got == "Q {answer_b}? 1 {a} 2 é {x}"


def test_questions_that_are_chats():
    user, system = {"role": "user", "content": "1+2"}, {"role": "system", "content": "be right"}
    assert judge.conversation_as_text([user]) == "1+2" == judge.conversation_as_text("1+2")
    assert judge.conversation_as_text([system, user]) == "system: be right\nuser: 1+2"


@pytest.mark.parametrize("verdict", ["text", "logits"])
def test_our_own_template(verdict):
    template = judge.load_template(judge.Args(model="", verdict=verdict))
    filled = judge.judge_prompt(template, "why?", "so", "not so")
    for text in ("why?", "[Answer of A]\nso\n", "[Answer of B]\nnot so\n", "[[A]]", "[[B]]"):
        assert text in filled
    assert ("[[C]]" in filled) == (verdict == "text") and "{" not in filled


@pytest.mark.parametrize(
    "text", ["{question} {answer_a}", "", "{question}{answer_a}{answer_b}{answer_b}"]
)
def test_a_template_without_its_fields_is_refused(tmp_path, tiny, text):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=r"t.txt: \{.*\} must stand in it once"):
        judge.main(some_args(tmp_path, tiny, template=str(tmp_path / "t.txt")))
    assert not (tmp_path / "run").exists()


def test_probabilities_are_those_of_plain_forwards(tiny):
    """One row a forward: P([[A]]) against P([[B]]), without what would come behind."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    loaded = plumbing.load_model(AutoModelForCausalLM, tiny, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompts = ["1+2\n[A]\n3\n[B]\n12\n", "7", "9+9=18"]
    got, mass = judge.verdict_logits(loaded, tokenizer, prompts)
    for i, prompt in enumerate(prompts):
        ids = plain.toy_ids(tokenizer, prompt)
        both = []
        for text in ("[[A]]", "[[B]]"):
            marks = tokenizer(text, add_special_tokens=False)["input_ids"]
            both.append(plain.token_logps(model, ids, marks).sum().exp().item())
        assert got[i].item() == pytest.approx(both[0] / sum(both), rel=1e-3)
        assert mass[i].item() == pytest.approx(sum(both), rel=1e-3)


# --- Whole runs -----------------------------------------------------------------------------------


def test_a_run_by_hand(tmp_path, tiny, monkeypatch, capsys):
    """Five pairs: right, wrong, contradiction (always A), right and tie, no verdict."""
    texts = ["[[A]]", "[[B]]", "[[B]]", "[[A]]", "[[A]]", "[[A]]", "[[A]]", "[[C]]", "[[A]]", "?"]
    says(monkeypatch, texts)
    rows, results = run(some_args(tmp_path, tiny, verdict="text"))
    assert [row["why_not"] for row in rows] == ["", "", "", "", "no verdict"]
    assert [row["probability"] for row in rows] == [1, 0, 0.5, 0.75, None]
    assert rows[4]["probabilities"] == [1.0, None] and rows[4]["explanations"] == ["[[A]]", "?"]
    got = values(results)
    assert got["no_verdict"] == 0.2 and got["contradictions"] == 0.25
    assert got["first_place"] == (1 + 0 + 0 + 1 + 1 + 1 + 1 + 0.5) / 8
    assert got["agreement"] == 2.5 / 4 == got["agreement_soft"]
    assert got["agreement_better_longer"] == 0  # the second pair alone
    assert got["agreement_better_shorter"] == 1  # the first and the fourth
    assert "5 pairs, each in both orders; not judged: 1 no verdict" in capsys.readouterr().out
    made = read_rows(tmp_path / "run/preferences.jsonl")
    assert [row["probability"] for row in made] == [1, 1, 0.5, 0.75]
    assert made[1] == {"prompt": "4+5", "chosen": "8", "rejected": "4+5=9", "probability": 1}


def test_each_answer_is_shown_as_a_once(tmp_path, tiny, monkeypatch):
    seen = []

    def verdicts(prompts):
        seen.extend(prompts)
        return ["[[C]]" for _ in prompts]

    says(monkeypatch, verdicts)
    run(some_args(tmp_path, tiny, verdict="text"))
    want = []
    for row in ROWS:
        for a, b in ((row["chosen"], row["rejected"]), (row["rejected"], row["chosen"])):
            want.append(f"{row['prompt']}\n[A]\n{a}\n[B]\n{b}\n")
    assert seen == want


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_judge_that_always_names_one_place_is_found_and_cancels(
    tmp_path, tiny, monkeypatch, place
):
    says(monkeypatch, lambda prompts: [f"[[{place}]]" for _ in prompts])
    rows, results = run(some_args(tmp_path, tiny, verdict="text"))
    got = values(results)
    assert got["first_place"] == (place == "A") and got["contradictions"] == 1
    assert got["agreement"] == got["agreement_soft"] == 0.5
    assert {row["probability"] for row in rows} == {0.5}


def test_a_verdict_that_never_comes_is_counted_and_not_guessed(tmp_path, tiny, monkeypatch, capsys):
    says(monkeypatch, lambda prompts: ["Both are good." for _ in prompts])
    rows, results = run(some_args(tmp_path, tiny, verdict="text"))
    assert (
        values(results) == {"no_verdict": 1} and read_rows(tmp_path / "run/preferences.jsonl") == []
    )
    assert {row["probability"] for row in rows} == {None}
    said = capsys.readouterr().out
    assert "no verdict on chosen and rejected" in said and "were they cut off?" in said


def test_equal_answers_are_ties_and_long_ones_are_left_out(tmp_path, tiny, capsys):
    rows = [
        ROWS[0],
        {"prompt": "1", "chosen": "22", "rejected": "22"},
        {"prompt": "1", "chosen": "2" * 300, "rejected": "3"},
    ]
    got, results = run(some_args(tmp_path, tiny, rows))
    assert [row["why_not"] for row in got] == ["", "equal", "too long"]
    assert got[1]["probability"] == 0.5 and got[2]["probability"] is None
    assert len(read_rows(tmp_path / "run/preferences.jsonl")) == 1
    said = capsys.readouterr().out
    assert "not judged: 1 equal, 1 too long" in said
    first = float(got[0]["probability"] > 0.5)
    assert values(results)["agreement_soft"] == (first + 0.5) / 2


def test_what_fits_just_is_judged(tmp_path, tiny):
    """The tiny model has 256 tokens; a verdict takes six, with its end."""
    tokenizer = plumbing.load_tokenizer(tiny)
    template = judge.load_template(some_args(tmp_path, tiny))
    around = len(common.encode_prompt(tokenizer, judge.judge_prompt(template, "1", "", "3")))
    for number, why_not in ((250 - around, ""), (251 - around, "too long")):
        rows = [{"prompt": "1", "chosen": "2" * number, "rejected": "3"}]
        got, _ = run(some_args(tmp_path, tiny, rows, overwrite=True))
        assert got[0]["why_not"] == why_not


def test_the_labels_are_read_by_reward_models_and_dpo(tmp_path, tiny):
    rows, _ = run(some_args(tmp_path, tiny))
    path = str(tmp_path / "run/preferences.jsonl")
    examples = rm_bt.read_examples(path)
    labels = [max(row["probability"], 1 - row["probability"]) for row in rows]
    assert [example["probability"] for example in examples] == pytest.approx(labels)
    assert min(labels) > 0.5 and max(labels) < 1
    for row, pair in zip(rows, dpo_nll.read_pairs(path, "dpo"), strict=True):
        likelier = row["answers"][int(row["probability"] < 0.5)]
        assert pair["chosen"] == likelier and pair["probability"] > 0.5


@pytest.fixture(scope="module")
def reward_model(tiny, tmp_path_factory):
    """A reward model of one step on ROWS."""
    folder = tmp_path_factory.mktemp("rewards")
    args = rm_bt.Args(
        model=tiny, dataset=write_rows(folder / "rows.jsonl", ROWS), output_dir=str(folder / "run"),
        eval_size=0, device="cpu", learning_rate=0.01,
    )  # fmt: skip
    rm_bt.main(args)
    return str(folder / "run" / "final")


def test_a_reward_model_compares_the_same_pairs(tmp_path, tiny, reward_model):
    rows, results = run(some_args(tmp_path, tiny, reward_model=reward_model))
    score = plumbing.load_reward("verifier", None, reward_model, torch.device("cpu"))
    right = 0
    for row, pair in zip(ROWS, rows, strict=True):
        answers = [row["chosen"], row["rejected"]]
        want = score([row["prompt"]] * 2, answers, [{}, {}])
        assert pair["scores"] == pytest.approx(want, abs=1e-4)
        right += want[0] > want[1]
    got = values(results)
    assert got["reward_model_accuracy"] == right / 5
    assert got["reward_model_less_judge"] == pytest.approx(right / 5 - got["agreement_soft"])


# --- Contestants ----------------------------------------------------------------------------------


def completions(path, answers, prompts=("1+2", "4+5", "7+1", "1+2")):
    rows = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
    return write_rows(path, rows)


def longer(prompts):
    """Verdicts of a judge that likes length."""
    verdicts = []
    for prompt in prompts:
        _, a, b = prompt.replace("\n[B]\n", "\n[A]\n").split("\n[A]\n")
        verdicts.append(IN_ORDER[(len(a) < len(b.strip("\n"))) + (len(a) <= len(b.strip("\n")))])
    return verdicts


def test_files_of_completions_are_matched_by_prompt(tmp_path, tiny, monkeypatch):
    """In another order, one prompt twice; the judge likes length."""
    one = completions(tmp_path / "a.jsonl", ["333", "99", "8", "3"])
    two = completions(tmp_path / "b.jsonl", ["8888", "3", "9", "44"], ("7+1", "1+2", "4+5", "1+2"))
    says(monkeypatch, longer)
    flags = dict(contestants=f"old={one},new={two}", dataset="", verdict="text")
    rows, results = run(some_args(tmp_path, tiny, **flags))
    assert [row["answers"] for row in rows] == [
        ["333", "3"], ["99", "9"], ["8", "8888"], ["3", "44"],
    ]  # fmt: skip
    assert {tuple(row["names"]) for row in rows} == {("old", "new")}
    got = values(results)
    assert got["win_rate of old against new"] == 0.5
    assert 0 < got["lc_win_rate of old against new"] < 1
    made = read_rows(tmp_path / "run/preferences.jsonl")
    assert [row["chosen"] for row in made] == ["333", "99", "8888", "44"]


def test_three_contestants_have_ratings(tmp_path, tiny, monkeypatch):
    """By length: the middle one beats the short one always, and never the long one."""
    paths = []
    for name, text in (("short", "1"), ("long", "333"), ("middle", "22")):
        path = completions(tmp_path / f"{name}.jsonl", [text] * 4)
        paths.append(f"{name}={path}")
    says(monkeypatch, longer)
    flags = dict(contestants=",".join(paths), dataset="", verdict="text")
    rows, results = run(some_args(tmp_path, tiny, **flags))
    assert len(rows) == 12 and {row["row"] for row in rows} == {0, 1, 2, 3}
    got = values(results)
    assert (
        got["win_rate of short against long"] == 0 and got["win_rate of long against middle"] == 1
    )
    ratings = [got[f"rating of {name}"] for name in ("long", "middle", "short")]
    assert ratings == sorted(ratings, reverse=True) and sum(ratings) == pytest.approx(3000)
    assert ratings[1] == pytest.approx(1000)
    assert results["rating of long"]["low"] <= ratings[0] <= results["rating of long"]["high"]


def test_policies_answer_and_are_judged(tmp_path, tiny):
    """A policy against its own file of greedy answers is all ties; sampled ones repeat."""
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    policy = plumbing.load_model(AutoModelForCausalLM, tiny, torch.device("cpu"))
    tokenizer = plumbing.load_tokenizer(tiny)
    texts = []
    for row in rows:
        texts += common.generate(policy, tokenizer, [row["prompt"]], 1, 6, temperature=0)[1]
    path = completions(tmp_path / "greedy.jsonl", texts, [row["prompt"] for row in rows])
    flags = dict(contestants=f"policy={tiny},file={path}")
    judged, results = run(some_args(tmp_path, tiny, rows, **flags))
    assert [row["why_not"] for row in judged] == ["equal"] * 5
    assert values(results)["win_rate of policy against file"] == 0.5
    (tmp_path / "other").mkdir()
    hot = [
        run(some_args(tmp_path / "other", tiny, rows, temperature=1.0, overwrite=True, **flags))[0]
        for _ in range(2)
    ]
    assert hot[0] == hot[1] != judged
    other, _ = run(
        some_args(tmp_path / "other", tiny, rows, temperature=1.0, overwrite=True, seed=5, **flags)
    )
    assert [row["answers"] for row in other] != [row["answers"] for row in hot[0]]


def test_a_policy_against_itself_is_sampled_twice(tmp_path, tiny):
    flags = dict(contestants=f"a={tiny},b={tiny}", temperature=1.0)
    judged, _ = run(some_args(tmp_path, tiny, **flags))
    assert any(row["answers"][0] != row["answers"][1] for row in judged)


def test_an_empty_answer_is_judged_and_makes_no_preference(tmp_path, tiny):
    """rm_bt.py refuses a file with one."""
    one = completions(tmp_path / "a.jsonl", ["", "9", "8", "3"])
    two = completions(tmp_path / "b.jsonl", ["3", "99", "88", "33"])
    flags = dict(contestants=f"{one},{two}", dataset="")
    rows, _ = run(some_args(tmp_path, tiny, **flags))
    assert [row["why_not"] for row in rows] == [""] * 4
    assert len(rm_bt.read_examples(str(tmp_path / "run/preferences.jsonl"))) == 3


def test_what_was_cut_off_is_said_and_has_no_end_for_the_reward_model(
    tmp_path, tiny, reward_model, capsys
):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"prompt": "1", "completion": "22", "ended": False}])
    other = completions(tmp_path / "b.jsonl", ["22+"], ["1"])
    flags = dict(contestants=f"a={path},b={other}", dataset="", reward_model=reward_model)
    rows, _ = run(some_args(tmp_path, tiny, **flags))
    assert "a: 1 of 1 answers were cut off" in capsys.readouterr().out
    score = plumbing.load_reward("verifier", None, reward_model, torch.device("cpu"))
    want = score(["1", "1"], ["22", "22+"], [{"ended": False}, {"ended": True}])
    assert rows[0]["scores"] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    "contestants, words",
    [
        ("one.jsonl", "needs two"), ("a=x,a=y", "name of its own"), ("a=,b=x", "needs a path"),
        ("x,,y", "needs a path"), ("missing/a,missing/b", "no such folder"),
    ],
)  # fmt: skip
def test_contestants_that_cannot_be(tmp_path, tiny, contestants, words):
    with pytest.raises(ValueError, match=words):
        judge.main(some_args(tmp_path, tiny, contestants=contestants))
    assert not (tmp_path / "run").exists()


def test_a_file_without_a_prompts_completion_is_named(tmp_path, tiny):
    one = completions(tmp_path / "a.jsonl", ["1"] * 4)
    two = completions(tmp_path / "b.jsonl", ["1"] * 3, ("1+2", "4+5", "7+1"))
    with pytest.raises(ValueError, match="b.jsonl: no completion for the prompt '1.2'"):
        judge.main(some_args(tmp_path, tiny, contestants=f"{one},{two}", dataset=""))
    bad = write_rows(tmp_path / "c.jsonl", [{"prompt": "1+2", "text": "3"}])
    with pytest.raises(ValueError, match="c.jsonl, row 1: no completion"):
        judge.main(some_args(tmp_path, tiny, contestants=f"{one},{bad}", dataset=""))


def test_policies_need_prompts_and_pairs_need_rows(tmp_path, tiny):
    for contestants in (f"{tiny},b={tiny}", ""):
        with pytest.raises(ValueError, match="--dataset is empty"):
            judge.main(some_args(tmp_path, tiny, contestants=contestants, dataset=""))


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "1", "chosen": "a"}, "line 2: no rejected"),
        ({"prompt": "1", "chosen": " ", "rejected": "b"}, "line 2: no chosen"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "line 2: no prompt"),
        ({"prompt": "1", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "row 2"),
    ],
)
def test_bad_rows_are_named(tmp_path, tiny, row, words):
    with pytest.raises(ValueError, match=words):
        judge.main(some_args(tmp_path, tiny, [ROWS[0], row]))
    assert not (tmp_path / "run").exists()


# --- Resume ---------------------------------------------------------------------------------------


class Killed(Exception):
    pass


HOT = dict(verdict="text", judge_temperature=1.0)


@pytest.mark.parametrize("flags, dies_at, left", [({}, 3, 4), (HOT, 3, 4), (HOT, 1, 0)])
def test_resume_in_the_middle_is_the_unbroken_run(
    tmp_path, tiny, monkeypatch, flags, dies_at, left
):
    """Killed in a step behind a checkpoint, or in the first one, before there is any."""
    (tmp_path / "b").mkdir()
    policies = f"old={tiny},new={write_rows(tmp_path / 'n.jsonl', [])}"
    completions(
        tmp_path / "n.jsonl", [row["rejected"] for row in ROWS], [r["prompt"] for r in ROWS]
    )
    flags = flags | dict(contestants=policies, temperature=1.0, max_explanation_tokens=20)
    run(some_args(tmp_path, tiny, **flags))
    ask, calls = judge.ask, []

    def dies(*args):
        calls.append(args)
        if len(calls) == dies_at:
            raise Killed
        return ask(*args)

    args = some_args(tmp_path, tiny, output_dir=str(tmp_path / "b"), checkpoint_every=2, **flags)
    monkeypatch.setattr(judge, "ask", dies)
    with pytest.raises(Killed):
        judge.main(args)
    path = tmp_path / "b/judgements.jsonl"
    assert (len(read_rows(path)) if path.exists() else 0) == left
    path.open("a").write('{"half": 1}\n')  # written after the checkpoint
    args.resume = True
    judge.main(args)
    assert len(calls) == dies_at + (3 if left == 0 else 1)  # no step is done twice
    for name in ("judgements.jsonl", "preferences.jsonl", "results.jsonl", "answers.jsonl"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "run" / name).read_text(), name


# --- Rows that train a judge ----------------------------------------------------------------------


def test_rows_for_sft_by_hand(tmp_path, tiny, capsys):
    rows = [ROWS[0], {"prompt": "5", "chosen": "5", "rejected": "5"}]
    judge.main(some_args(tmp_path, "no model is loaded", rows, write_sft=True))
    assert read_rows(tmp_path / "run/sft.jsonl") == [
        {"prompt": "1+2\n[A]\n3\n[B]\n12\n", "completion": "[[A]]"},
        {"prompt": "1+2\n[A]\n12\n[B]\n3\n", "completion": "[[B]]"},
    ]
    assert "1 of 2 pairs are equal" in capsys.readouterr().out
    with pytest.raises(ValueError, match="labelled pairs"):
        flags = dict(write_sft=True, contestants="a,b", overwrite=True)
        judge.main(some_args(tmp_path, tiny, **flags))


def test_the_toys_judge_tells_right_from_wrong(tmp_path):
    """It agrees with raters whose pairs it has not seen; turned round, it disagrees."""
    rows = read_rows(ROOT / "toy/pref_test.jsonl")[:80]
    judged, results = run(some_args(tmp_path, str(ROOT / "toy/judge"), rows, batch_size=40))
    got = values(results)
    assert got["agreement_soft"] > 0.7 and got["agreement"] > 0.7 and got["verdict_mass"] > 0.98
    assert 0.35 < got["first_place"] < 0.65
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    args = some_args(tmp_path, str(ROOT / "toy/judge"), turned, batch_size=40, overwrite=True)
    again, results = run(args)
    for one, two in zip(judged, again, strict=True):
        assert one["probability"] == pytest.approx(1 - two["probability"], abs=1e-3)
    assert values(results)["agreement_soft"] == pytest.approx(1 - got["agreement_soft"])


def test_the_toys_judge_writes_the_verdict_that_its_logits_say(tmp_path):
    rows = read_rows(ROOT / "toy/pref_test.jsonl")[:24]
    model = str(ROOT / "toy/judge")
    flags = dict(batch_size=24, max_explanation_tokens=16)
    by_logits, _ = run(some_args(tmp_path, model, rows, **flags))
    by_text, _ = run(some_args(tmp_path, model, rows, verdict="text", overwrite=True, **flags))
    for one, two in zip(by_logits, by_text, strict=True):
        assert [round(p) for p in one["probabilities"]] == two["probabilities"]


# --- Flags ----------------------------------------------------------------------------------------


def test_max_rows(tmp_path, tiny, capsys):
    rows, _ = run(some_args(tmp_path, tiny, max_rows=3))
    assert [row["prompt"] for row in rows] == ["1+2", "4+5", "7+1"]
    assert "the first 3 of 5 rows" in capsys.readouterr().out


def test_batch_size_changes_nothing(tmp_path, tiny):
    one, _ = run(some_args(tmp_path, tiny))
    two, _ = run(some_args(tmp_path, tiny, batch_size=5, overwrite=True))
    assert [r["probability"] for r in one] == pytest.approx(
        [r["probability"] for r in two], abs=1e-5
    )
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 1


def test_flags_of_sampling(tmp_path, tiny, monkeypatch):
    seen = []

    def generate(model, tokenizer, prompts, *sampling):
        seen.append(sampling)
        return None, ["1" for _ in prompts], torch.ones(len(prompts)).bool()

    monkeypatch.setattr(judge, "generate", generate)
    other = completions(tmp_path / "b.jsonl", ["22"], ["1"])
    flags = dict(verdict="text", judge_temperature=0.3, max_explanation_tokens=11, max_new_tokens=7)
    flags |= dict(contestants=f"{tiny},{other}", dataset=other, temperature=0.6)
    judge.main(some_args(tmp_path, tiny, **flags))
    assert seen == [(1, 7, 0.6), (1, 11, 0.3)]


def test_num_resamples_and_seed_are_those_of_the_intervals(tmp_path, tiny, monkeypatch):
    seen = []
    interval = judge.bootstrap_interval

    def noting(statistic, prompt_of, *rest):
        seen.append((prompt_of.tolist(), rest))
        return interval(statistic, prompt_of, *rest)

    monkeypatch.setattr(judge, "bootstrap_interval", noting)
    run(some_args(tmp_path, tiny, num_resamples=7, seed=3))
    assert set(map(str, seen)) == {str(([0, 1, 2, 3, 4], (7, 3)))}


def test_show_rows_prints_what_the_judge_gets(tmp_path, tiny, capsys):
    with pytest.raises(SystemExit) as ended:
        judge.main(some_args(tmp_path, tiny, show_rows=1))
    assert ended.value.code == 0 and not (tmp_path / "run").exists()
    assert "<bos><user>1+2\n[A]\n3\n[B]\n12\n<assistant>" in capsys.readouterr().out


def test_the_dtype_is_handed_on(tmp_path, tiny):
    one, _ = run(some_args(tmp_path, tiny))
    two, _ = run(some_args(tmp_path, tiny, dtype="bfloat16", overwrite=True))
    gaps = [abs(a["probability"] - b["probability"]) for a, b in zip(one, two, strict=True)]
    assert 0 < max(gaps) < 0.05


def test_defaults():
    args = judge.Args(model="m")
    assert (args.verdict, args.judge_temperature, args.temperature) == ("logits", 0, 0)
    assert (args.max_rows, args.num_resamples, args.batch_size) == (1000, 1000, 16)
    assert judge.TOY["model"] == "toy/judge" and judge.TOY["dataset"] == "toy/pref_test.jsonl"


def test_a_tokenizer_of_other_shape_reads_the_verdicts(llama):
    """Bytes, and a template with an end behind every turn."""
    tokenizer = make_tokenizer()
    llama.context, llama.autocast_dtype, llama.recompute = 512, None, False
    got, mass = judge.verdict_logits(llama, tokenizer, ["1+2", "which one?"])
    assert ((got > 0) & (got < 1) & (mass > 0)).all()


def test_as_a_user_would(tmp_path):
    """A template without its fields: one line, exit code 1, nothing made."""
    (tmp_path / "t.txt").write_text("{question}")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "judge.py"), "--template", "t.txt", "--device", "cpu"],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line == "judge.py: --template t.txt: {answer_a} must stand in it once"
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]
