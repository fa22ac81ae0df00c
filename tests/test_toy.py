"""The toy: grading by hand, files remade, and a policy that is right about half the time."""

import json
import random

import pytest
import torch
from conftest import ROOT
from make import (
    SAMPLED,
    answer_text,
    columns,
    grade_steps,
    labelled_steps,
    load_policy,
    make_config,
    make_data,
    make_tokenizer,
    outcomes,
    preferences,
    problems,
    quality,
    rankings,
    sampled_prompts,
    sampled_rows,
    step_rewards,
    write_out,
)

TOY = ROOT / "toy"
FILES = [*make_data(), *SAMPLED]


def read(name):
    return [json.loads(line) for line in open(TOY / name)]


@pytest.fixture(scope="module")
def policy():
    return load_policy()


RIGHT = "7+6+0=13\n8+4+1=13\n5+0+1=06\n633"


@pytest.mark.parametrize(
    "completion, labels, score",
    [
        (RIGHT, [1, 1, 1, 1], 5),
        ("7+6+0=13\n8+4+1=13\n5+0+0=05\n533", [1, 1, -1, 0], 2),  # the carry is forgotten
        ("7+6+0=14\n8+4+1=13\n5+0+1=06\n634", [-1, 0, 0, 0], 4),  # a slip, then consistent
        ("7+6+0=13\n8+4+1=13\n5+0+1=06\n643", [1, 1, 1, -1], 3),  # right steps, wrong answer
        ("7+6+0=13\n8+4+0=12\n5+0+1=06\n623", [1, -1, 0, 0], 3),
        ("7+6+0=03\n8+4+0=12\n5+0+1=06\n623", [-1, 0, 0, 0], 3),
        ("8+4+1=13\n7+6+0=13\n5+0+1=06\n633", [-1, -1, 0, 0], 5),  # columns swapped
        ("7+6+0=13\n\n8+4+1=13\n5+0+1=06\n633\n633", [1, 1, 1, 1, -1], 5),  # blank, one too many
        ("", [], 1), ("633", [-1], 5), ("7+6+0=13\nnonsense", [1, -1], 1),
    ],
)  # fmt: skip
def test_grading_by_hand(completion, labels, score):
    assert grade_steps(" 587+  46", completion) == labels
    assert quality(" 587+  46", completion) == score


def test_a_right_solution_by_hand():
    assert write_out(" 587+  46") == RIGHT
    assert write_out("  99+   1") == "9+1+0=10\n9+0+1=10\n100"
    assert write_out("9999+9999") == "9+9+0=18\n9+9+1=19\n9+9+1=19\n9+9+1=19\n19998"
    forgets = write_out("9999+9999", forgets=True)
    assert forgets == "9+9+0=18\n9+9+1=19\n9+9+0=18\n9+9+0=18\n18898"


def test_columns_and_answers_by_hand():
    assert columns(" 587+  46") == [(7, 6), (8, 4), (5, 0)]
    assert columns("   7+1234") == [(7, 4), (0, 3), (0, 2), (0, 1)]
    assert answer_text([13, 9, 15]) == "1593" and answer_text([5, 0]) == "5"
    assert answer_text([0, 0]) == "0"


# Of 587 + 46, from the best: right, off by 1, by 10, by 100, by 1000; each with right columns
STEPS = RIGHT.rpartition("\n")[0]
SCORED = {5: RIGHT, 4: f"{STEPS}\n634", 3: f"{STEPS}\n643", 2: f"{STEPS}\n733", 1: f"{STEPS}\n1633"}


def test_likert_scores_by_hand():
    assert {score: quality(" 587+  46", text) for score, text in SCORED.items()} == {
        score: score for score in SCORED
    }
    assert quality(" 587+  46", "nonsense") == 1


def test_outcomes_by_hand():
    """Only what is right is right, and not what nearly is; a blank one is left out."""
    rows = list(outcomes(None, " 587+  46", [*SCORED.values(), " \n", RIGHT]))
    assert [row["label"] for row in rows] == [True, False, False, False, False, True]
    assert [row["completion"] for row in rows] == [*SCORED.values(), RIGHT]
    assert {row["prompt"] for row in rows} == {" 587+  46"}


@pytest.mark.parametrize("high", [5, 4, 3, 2])
@pytest.mark.parametrize("low", [4, 3, 2, 1])
def test_preferences_by_hand(high, low):
    """The better one is chosen, wherever it stands; with equal ones there is no pair."""
    margins = {1: 0.3333, 2: 0.6667, 3: 1.0, 4: 1.0}
    for texts in ([SCORED[high], SCORED[low]], [SCORED[low], SCORED[high]]):
        rows = list(preferences(random.Random(0), " 587+  46", texts))
        if high == low:
            assert rows == []
            continue
        (row,) = rows
        assert row["chosen"] == SCORED[max(high, low)]
        assert row["rejected"] == SCORED[min(high, low)]
        assert row["margin"] == margins[abs(high - low)] and row["prompt"] == " 587+  46"


def test_rankings_by_hand():
    """Best first is rank 0; of those rated alike the first is kept; one alone is no ranking."""
    texts = [SCORED[2], SCORED[5], "7+6+0=14\n8+4+1=13\n5+0+1=06\n634", SCORED[4], RIGHT]
    texts.append(f"{STEPS}\n632")  # rated like 634
    wanted = {SCORED[5]: 0, SCORED[4]: 1, texts[2]: 2, SCORED[2]: 3}  # 634 twice, by lines right
    sizes = set()
    for seed in range(20):
        (row,) = rankings(random.Random(seed), " 587+  46", texts)
        sizes.add(len(row["completions"]))
        order = sorted(zip(row["ranks"], row["completions"], strict=True))
        places = [wanted[text] for _, text in order]
        assert places == sorted(places) and row["ranks"] != [] and len(set(places)) == len(places)
        assert sorted(row["ranks"]) == list(range(len(order)))
    assert sizes == {3, 4}
    assert list(rankings(random.Random(0), " 587+  46", [RIGHT, RIGHT])) == []


def test_labelled_steps_by_hand():
    """A completion that is there twice is one row; blank lines are no steps."""
    wrong = "7+6+0=14\n\n8+4+1=13"
    rows = list(labelled_steps(None, " 587+  46", [wrong, RIGHT, wrong, "\n"]))
    assert [row["labels"] for row in rows] == [[-1, 0], [1, 1, 1, 1]]
    assert rows[0]["steps"] == ["7+6+0=14", "8+4+1=13"] and rows[1]["steps"] == RIGHT.split("\n")


def test_step_rewards_by_hand():
    texts = [RIGHT, "7+6+0=14\n8+4+1=13", ""]
    assert step_rewards([" 587+  46"] * 3, texts, None) == [[1.0] * 4, [0.0, 0.0], []]


def test_problems_are_new_and_of_two_to_four_digits():
    taken = {"  12+ 345"}
    found = problems(random.Random(1), 300, taken)
    assert len(set(found)) == 300 and len(taken) == 301 and "  12+ 345" not in found
    assert not set(problems(random.Random(1), 300, taken)) & set(found)
    digits = {len(number.strip()) for prompt in found for number in prompt.split("+")}
    assert digits == {2, 3, 4} and {len(prompt) for prompt in found} == {9}


def test_the_data_remade_are_the_data_committed():
    for name, rows in make_data().items():
        assert rows == read(name), name


def test_problems_are_right_and_no_prompt_is_in_two_files():
    prompts = {name: {row["prompt"] for row in read(name)} for name in FILES}
    assert len(set().union(*prompts.values())) == sum(map(len, prompts.values()))
    for name in ("problems_train.jsonl", "problems_test.jsonl"):
        for row in read(name):
            a, b = row["prompt"].split("+")
            assert int(row["answer"]) == int(a) + int(b)


@pytest.mark.parametrize("side", ["train", "test"])
def test_what_raters_say_is_what_grading_says(side):
    for row in read(f"pref_{side}.jsonl"):
        gap = quality(row["prompt"], row["chosen"]) - quality(row["prompt"], row["rejected"])
        assert row["margin"] == {1: 0.3333, 2: 0.6667, 3: 1.0, 4: 1.0}[gap]
    for row in read(f"kwise_{side}.jsonl"):
        assert 2 <= len(row["completions"]) <= 6
        assert sorted(row["ranks"]) == list(range(len(row["completions"])))
        order = sorted(zip(row["ranks"], row["completions"], strict=True))
        rated = [(-quality(row["prompt"], text), -grade_steps(row["prompt"], text).count(1)
                  + len(text.split("\n"))) for _, text in order]  # fmt: skip
        assert all(x < y for x, y in zip(rated, rated[1:], strict=False))
    for row in read(f"orm_{side}.jsonl"):
        a, b = row["prompt"].split("+")
        assert row["label"] == (row["completion"].split("\n")[-1] == str(int(a) + int(b)))
    for row in read(f"prm_{side}.jsonl"):
        assert row["labels"] == grade_steps(row["prompt"], "\n".join(row["steps"]))


def test_enough_of_every_kind():
    labels = [label for row in read("prm_train.jsonl") for label in row["labels"]]
    assert all(labels.count(kind) > 0.1 * len(labels) for kind in (-1, 0, 1))
    assert {len(row["ranks"]) for row in read("kwise_train.jsonl")} >= {2, 3, 4, 5}
    ranks = [row["ranks"] for row in read("kwise_train.jsonl")]
    assert 0.3 < sum(r[0] < r[1] for r in ranks) / len(ranks) < 0.7  # place tells nothing of rank
    for name, (*_, number) in SAMPLED.items():
        assert len(read(name)) == number
    prompts = [row["prompt"] for row in read("orm_test.jsonl")]
    assert all(prompts.count(p) == 8 for p in prompts)


def test_the_policy_sampled_again_says_the_same(policy):
    """Sampling is repeatable on one machine; on another, rounding may turn a rare token."""
    prompts = sampled_prompts()
    for name in ("pref_test.jsonl", "kwise_test.jsonl", "orm_test.jsonl", "prm_test.jsonl"):
        again = list(sampled_rows(name, prompts[name][:64], *policy))
        same = [row in again for row in read(name)[: len(again)]]
        assert len(same) > 30 and sum(same) > 0.95 * len(same), name


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_policy_is_right_about_half_the_time(policy, temperature):
    from common import generate

    torch.manual_seed(0)
    rows = read("problems_test.jsonl")
    texts = generate(*policy, [row["prompt"] for row in rows], 1, 48, temperature)[1]
    right = [t.split("\n")[-1] == row["answer"] for t, row in zip(texts, rows, strict=True)]
    assert 0.35 < sum(right) / len(right) < 0.65


def test_the_checkpoint_is_small_and_of_makes_own_shape(policy):
    model, tokenizer = policy
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.chat_template == make_tokenizer().chat_template
    want, got = make_config(make_tokenizer()).to_dict(), model.config.to_dict()
    names = "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "eos_token_id"
    assert all(want[name] == got[name] for name in names)
    files = [path for path in TOY.rglob("*") if path.is_file() and "__pycache__" not in str(path)]
    assert sum(path.stat().st_size for path in files) < 10_000_000
