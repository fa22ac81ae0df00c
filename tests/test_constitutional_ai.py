"""constitutional_ai.py: hand values, scripted models, plain loops, a resumed run, and the toy."""

import itertools
import math
import random

import make
import plain
import pytest
import torch
from conftest import ROOT, make_tokenizer
from policy_gradient import read_rows, write_rows
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import constitutional_ai as cai
import plumbing
import rm_bt
import sft

pytestmark = pytest.mark.usefixtures("no_picture")

PROBLEM = " 587+  46"
RIGHT = "7+6+0=13\n8+4+1=13\n5+0+1=06\n633"
FORGOT = "7+6+0=13\n8+4+1=13\n5+0+0=05\n533"
ROWS = [{"prompt": f"{a:4d}+{b:4d}", "answer": str(a + b)} for a, b in enumerate(range(7), 11)]


def some_args(tmp_path, tiny, **changes):
    """Args of a run of three steps on seven prompts."""
    if "dataset" not in changes:
        changes["dataset"] = write_rows(tmp_path / "rows.jsonl", ROWS)
    values = dict(
        model=tiny, output_dir=str(tmp_path / "run"), device="cpu", num_revisions=2,
        max_new_tokens=30, batch_size=3, num_principles=2,
    )  # fmt: skip
    return cai.Args(**values | changes)


# --- The algorithm --------------------------------------------------------------------------------


def logps_of(*p_letter_a):
    """Probabilities of (A) against (B) -> unnormalised log-probs of both: most goes elsewhere."""
    return [[math.log(0.01 * p), math.log(0.01 * (1 - p))] for p in p_letter_a]


def test_the_soft_label_by_hand():
    """The first answer is (A) in the first order and (B) in the second."""
    one = torch.tensor([logps_of(0.8, 0.4)])
    assert cai.feedback_probability(one).item() == pytest.approx((0.8 + 0.6) / 2)
    two = torch.tensor([logps_of(0.8, 0.4), logps_of(0.1, 0.5)])
    want = (0.8 + 0.6 + 0.1 + 0.5) / 4
    assert cai.feedback_probability(two).item() == pytest.approx(want)
    both = cai.feedback_probability(torch.stack([two, two.flip(0)]))
    assert both.tolist() == pytest.approx([want, want])


def test_swapping_the_answers_gives_the_other_probability():
    torch.manual_seed(0)
    logps = torch.randn(5, 3, 2, 2)
    swapped = logps.flip(2)  # the orders trade places, the letters stay
    total = cai.feedback_probability(logps) + cai.feedback_probability(swapped)
    assert total.tolist() == pytest.approx([1.0] * 5)


def test_a_liking_for_a_place_is_found_and_cancels():
    always_a = torch.tensor([[logps_of(0.9, 0.9)], [logps_of(0.9, 0.9)]])
    assert cai.feedback_probability(always_a).tolist() == pytest.approx([0.5, 0.5])
    found = cai.order_metrics(always_a)
    assert found["first_place"].item() == pytest.approx(0.9) and found["contradictions"] == 1
    steady = torch.tensor([[logps_of(0.9, 0.3)], [logps_of(0.2, 0.6)]])
    found = cai.order_metrics(steady)
    assert found["first_place"].item() == pytest.approx(0.5) and found["contradictions"] == 0
    half = torch.tensor([[logps_of(0.9, 0.3)], [logps_of(0.1, 0.2)]])
    assert cai.order_metrics(half)["contradictions"] == 0.5


def test_principles_of_a_chain_are_drawn_independently():
    """All chains of two come up, equal ones too, and about equally often."""
    counts = dict.fromkeys(itertools.product("abc", repeat=2), 0)
    for seed in range(1800):
        counts[tuple(cai.draw_for_revisions(["a", "b", "c"], 2, f"0 {seed}"))] += 1
    assert all(140 < count < 260 for count in counts.values())
    assert cai.draw_for_revisions("abc", 9, "0 1") == cai.draw_for_revisions("abc", 9, "0 1")


def test_principles_of_a_comparison_are_different_ones():
    counts = dict.fromkeys(itertools.permutations("abc", 2), 0)
    for seed in range(1200):
        counts[tuple(cai.draw_for_comparison(["a", "b", "c"], 2, f"0 {seed}"))] += 1
    assert all(140 < count < 260 for count in counts.values())
    assert sorted(cai.draw_for_comparison(["a", "b", "c"], 9, "x")) == ["a", "b", "c"]


# --- What the feedback model is asked -------------------------------------------------------------


def said_by(chat):
    return [(message["role"], message["content"]) for message in chat]


def test_requests_by_hand():
    asked = "Criticise your answer by this principle: Be right."
    critique = [("user", "1+1"), ("assistant", "3"), ("user", asked)]
    assert said_by(cai.critique_request("1+1", "3", "Be right.")) == critique
    revision = [*critique, ("assistant", "It is 2."), ("user", "Now revise your answer.")]
    assert said_by(cai.revision_request("1+1", "3", "Be right.", "It is 2.")) == revision
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"text": "u"}]}]
    assert cai.critique_request(chat, "3", "{p}")[:2] == chat
    assert cai.critique_request(chat, "3", "{p}")[3]["content"].endswith(": {p}")


def test_a_comparison_by_hand():
    asked = "Which answer is better? Be right."
    want = "1+1\n\n" + asked + "\n(A) {first}\n(B) 2\nReply (A) or (B)."
    assert cai.comparison_request("1+1", "Be right.", "{first}", "2") == want
    chat = [{"role": "user", "content": "1+1"}]
    assert cai.comparison_request(chat, "Be right.", "{first}", "2") == want
    chat = [*chat, {"role": "assistant", "content": "3"}, {"role": "user", "content": "No."}]
    text = cai.comparison_request(chat, "p", "a", "b")
    assert text.startswith("user: 1+1\nassistant: 3\nuser: No.\n\nWhich")


def test_a_comparison_with_critiques_by_hand():
    entry = {"prompt": "1+1", "answers": ["3", "2"], "principles": ["Be right.", "Be short."]}
    entry["critiques"] = [["It is {2}.", "Good."], ["Short.", "Short, too."]]
    requests = cai.pair_requests(entry)
    want = "1+1\n\nWhich answer is better? Be right.\n(A) 3\nCritique: It is {2}.\n"
    assert requests[0] == want + "(B) 2\nCritique: Good.\nReply (A) or (B)."
    want = "1+1\n\nWhich answer is better? Be right.\n(A) 2\nCritique: Good.\n"
    assert requests[1] == want + "(B) 3\nCritique: It is {2}.\nReply (A) or (B)."
    want = "1+1\n\nWhich answer is better? Be short.\n(A) 3\nCritique: Short.\n"
    assert requests[2] == want + "(B) 2\nCritique: Short, too.\nReply (A) or (B)."
    assert len(requests) == 4


def test_letters_are_scored_as_a_plain_loop_scores_them(tiny):
    asked = cai.load_asked(tiny, torch.device("cpu"), "float32")
    model, tokenizer = asked
    requests = ["x", "a longer one\n(A) 1\n(B) 2", "y"]
    got = cai.letter_logps(asked, requests, 1)
    assert torch.allclose(got, cai.letter_logps(asked, requests, 8), atol=1e-5)
    for request, pair in zip(requests, got.tolist(), strict=True):
        prompt = plain.toy_ids(tokenizer, request)
        for letter, value in zip(["(A)", "(B)"], pair, strict=True):
            ids = tokenizer(letter, add_special_tokens=False)["input_ids"]  # no end of turn
            assert plain.token_logps(model, prompt, ids).sum().item() == pytest.approx(
                value, abs=1e-4
            )


# --- Chains, by models that say what a test wants -------------------------------------------------


class Scripted:
    """A model whose context is given; `generate` below answers for it by a function."""

    def __init__(self, answer, context=10**6):
        self.answer = answer
        self.context = context
        self.asked = []


@pytest.fixture
def scripted(monkeypatch):
    """-> make(answer, context) of (model, tokenizer); answer: prompt -> (text, ended)."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/model")

    def generate(model, tokenizer, prompts, num_generations, max_new_tokens, temperature):
        model.asked += [(prompt, max_new_tokens, temperature) for prompt in prompts]
        said = [model.answer(prompt) for prompt in prompts for _ in range(num_generations)]
        ended = torch.tensor([done for _, done in said])
        return None, [text for text, _ in said], ended

    monkeypatch.setattr(cai, "generate", generate)
    return lambda answer, context=10**6: (Scripted(answer, context), tokenizer)


def last(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def test_a_chain_step_by_step(scripted, tmp_path):
    """Each revision is of the revision before it, by its own principle and critique."""
    policy = scripted(lambda prompt: (f"{prompt}:0", True))

    def answer(prompt):
        if last(prompt).startswith("Criticise"):
            return f"{prompt[-2]['content']} breaks {prompt[-1]['content'][-2:]}", True
        return f"{prompt[1]['content']},{prompt[3]['content'][-2:]}", True

    critic = scripted(answer)
    args = some_args(tmp_path, "", temperature=0.7, feedback_temperature=0.2)
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    chains = cai.revise(policy, critic, rows, [["c1", "c2"], ["d1", "d2"]], args)
    x, y = chains
    assert x["answers"] == ["x:0", "x:0,c1", "x:0,c1,c2"] and x["completion"] == "x:0,c1,c2"
    assert x["critiques"] == ["x:0 breaks c1", "x:0,c1 breaks c2"]
    assert y["answers"][-1] == "y:0,d1,d2" and y["principles"] == ["d1", "d2"]
    assert x["outcomes"] == ["taken"] * 3 and x["prompt"] == "x"
    assert {(most, t) for _, most, t in policy[0].asked} == {(30, 0.7)}
    assert {(most, t) for _, most, t in critic[0].asked} == {(30, 0.2)}
    assert len(critic[0].asked) == 8


def test_what_was_cut_off_or_empty_is_not_taken(scripted, tmp_path):
    revisions = {"a": ("new", False), "b": (" \n", True), "c": ("new", True)}

    def answer(prompt):
        if last(prompt).startswith("Criticise"):
            return "bad", False  # of a critique the cut does not matter
        return revisions[prompt[0]["content"]]

    policy = scripted(lambda prompt: (f"old {prompt}", prompt == "a"))
    args = some_args(tmp_path, "", num_revisions=1)
    rows = [{"prompt": name} for name in "abc"]
    chains = cai.revise(policy, scripted(answer), rows, [["p"]] * 3, args)
    assert [chain["completion"] for chain in chains] == ["old a", "old b", "new"]
    assert [chain["outcomes"] for chain in chains] == [
        ["taken", "cut off"], ["cut off", "empty"], ["cut off", "taken"],
    ]  # fmt: skip
    assert cai.trainable_rows(chains) == [chains[0], chains[2]]
    found = cai.chain_metrics(chains, rows)
    assert found == {"changed": 1 / 3, "ended": 1 / 3, "taken": 1 / 3}


def test_a_request_beyond_the_context_leaves_the_answer(scripted, tmp_path):
    request = cai.critique_request("x", "old", "p")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/model")
    length = len(cai.encode_prompt(tokenizer, request))
    args = some_args(tmp_path, "", num_revisions=1)
    policy = scripted(lambda prompt: ("old", True))

    for context, critique in ((length + 30, "new"), (length + 29, None)):
        critic = scripted(lambda prompt: ("new", True), context)
        [chain] = cai.revise(policy, critic, [{"prompt": "x"}], [["p"]], args)
        assert chain["critiques"] == [critique]
        assert chain["outcomes"] == ["taken", "no room"] and chain["completion"] == "old"


def test_tables_by_hand():
    def chain(*answers):
        outcomes = ["taken"] * len(answers)
        return {"answers": answers, "principles": ["p", "q"], "outcomes": outcomes}

    chains = [chain("1", "2", "2"), chain("22", "22", "1"), chain("3", "1", "2")]
    rows = [{"answer": "2"}, {"answer": "22"}, {"answer": "2"}]
    lines = cai.revision_table(chains, rows)
    assert [line.split() for line in lines[1:]] == [
        ["0", "0.000", "1.3", "0.333"],
        ["1", "0.667", "1.3", "0.667"],
        ["2", "0.667", "1.0", "0.667"],
    ]
    lines = cai.principle_table(chains, rows, ["p", "q", "r"])
    assert [line.split() for line in lines[1:]] == [
        ["3", "2", "1", "0", "p"], ["3", "2", "1", "1", "q"], ["0", "0", "0", "0", "r"],
    ]  # fmt: skip
    without = cai.revision_table(chains, [{}, {}, {}])
    assert without[1].split() == ["0", "0.000", "1.3"]
    found = cai.chain_metrics(chains, rows)
    assert found["accuracy_first"] == 1 / 3 and found["accuracy_revised"] == 2 / 3
    assert found["changed"] == 1


# --- Comparisons ----------------------------------------------------------------------------------


def test_pairs_that_cannot_be_compared(tiny, tmp_path):
    critic = cai.load_asked(tiny, torch.device("cpu"), "float32")
    pairs = [("1", "2"), ("1", "1"), ("1", " "), ("1", "2"), ("1" * 250, "2")]
    ended = [[True, True], [True, True], [True, True], [True, False], [True, True]]
    rows = [{"prompt": str(i)} for i in range(5)]
    drawn = [["p", "q"]] * 5
    args = some_args(tmp_path, tiny)
    compared = cai.compare(critic, rows, pairs, ended, drawn, args)
    outcomes = [entry["outcome"] for entry in compared]
    assert outcomes == ["compared", "equal", "empty", "cut off", "no room"]
    assert [("probability" in entry) for entry in compared] == [True] + [False] * 4
    assert cai.comparison_metrics(compared[1:], rows[1:]) == {"compared": 0.0}
    assert len(cai.preference_rows(compared)) == 1
    assert cai.outcome_line(["b", "a", "b"]) == "2 b, 1 a"


def test_a_pair_is_shown_in_both_orders_with_each_principle(monkeypatch, scripted, tmp_path):
    """A feedback model that likes the longer answer, and the letter A a little."""
    asked = []

    def letter_logps(critic, requests, batch_size):
        asked.extend(requests)
        logps = []
        for request in requests:
            first = request.split("(A) ")[1].split("\n")[0]
            logps += logps_of(0.9 if len(first) > 1 else 0.3)
        return torch.tensor(logps)

    monkeypatch.setattr(cai, "letter_logps", letter_logps)
    critic = scripted(None)
    rows = [{"prompt": "x", "answer": "22"}, {"prompt": "y", "answer": "1"}]
    args = some_args(tmp_path, "")
    compared = cai.compare(
        critic, rows, [("22", "1"), ("1", "22")], [[True, True]] * 2, [["p", "q"], ["q", "p"]], args
    )
    firsts = [(x[0], x.split("? ")[1][0], x.split("(A) ")[1].split("\n")[0]) for x in asked]
    assert firsts == [
        ("x", "p", "22"), ("x", "p", "1"), ("x", "q", "22"), ("x", "q", "1"),
        ("y", "q", "1"), ("y", "q", "22"), ("y", "p", "1"), ("y", "p", "22"),
    ]  # fmt: skip
    assert [entry["probability"] for entry in compared] == pytest.approx([0.8, 0.2])
    preferred = cai.preference_rows(compared)
    assert [(row["chosen"], row["rejected"]) for row in preferred] == [("22", "1")] * 2
    assert [row["probability"] for row in preferred] == pytest.approx([0.8, 0.8])
    found = cai.comparison_metrics(compared, rows)
    assert found["accuracy"] == 0.5 and found["confidence"].item() == pytest.approx(0.8)
    assert found["compared"] == 1 and found["contradictions"] == 0
    lines = cai.comparison_table(compared, rows, ["p", "q", "r"])
    assert [line.split()[-1] for line in lines[1:]] == ["p", "q", "them"]
    assert lines[1].split()[:5] == ["2", "0.800", "0.600", "0.000", "0.500"]


def test_answers_are_criticised_before_they_are_compared(monkeypatch, scripted, tmp_path):
    """Each by each principle, and once for both orders; pairs that are not compared are not."""
    asked = []

    def letter_logps(critic, requests, batch_size):
        asked.extend(requests)
        return torch.tensor(logps_of(*[0.8] * len(requests)))

    monkeypatch.setattr(cai, "letter_logps", letter_logps)
    critic = scripted(lambda chat: (f"{chat[1]['content']} by {chat[2]['content'][-2:]}", False))
    args = some_args(tmp_path, "", criticise_first=True, feedback_temperature=0.2)
    rows = [{"prompt": "x"}, {"prompt": "z"}, {"prompt": "y"}]
    pairs = [("1", "2"), ("1", "1"), ("3", "4")]
    drawn = [["c1", "c2"], ["c1", "c2"], ["c3", "c1"]]
    compared = cai.compare(critic, rows, pairs, [[True, True]] * 3, drawn, args)
    assert [entry["outcome"] for entry in compared] == ["compared", "equal", "compared"]
    assert compared[0]["critiques"] == [["1 by c1", "2 by c1"], ["1 by c2", "2 by c2"]]
    assert compared[2]["critiques"] == [["3 by c3", "4 by c3"], ["3 by c1", "4 by c1"]]
    assert asked == cai.pair_requests(compared[0]) + cai.pair_requests(compared[2])
    assert "(A) 4\nCritique: 4 by c1\n(B) 3\nCritique: 3 by c1\n" in asked[-1]
    requests = [request for request, _, _ in critic[0].asked]
    assert requests[1] == cai.critique_request("x", "2", "c1") and len(requests) == 8
    assert {(most, t) for _, most, t in critic[0].asked} == {(30, 0.2)}


def test_critiques_without_room(monkeypatch, scripted, tmp_path):
    """A pair has none where a critique of one answer does not fit, even if the comparison, whose
    reply is short, would; the others are compared."""
    monkeypatch.setattr(cai, "letter_logps", lambda *_: torch.tensor(logps_of(0.8, 0.3)))
    args = some_args(tmp_path, "", criticise_first=True, max_new_tokens=60)
    critic = scripted(lambda chat: ("good", True), 160)
    pairs = [("1", "2" * 60), ("1", "2")]
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    compared = cai.compare(critic, rows, pairs, [[True, True]] * 2, [["p"]] * 2, args)
    assert [entry["outcome"] for entry in compared] == ["no room", "compared"]
    assert compared[0]["critiques"] == [["good", None]]
    assert compared[1]["probability"] == pytest.approx(0.75) and "probability" not in compared[0]


def test_a_tie_counts_half():
    logps = [logps_of(0.5, 0.5)]
    entry = {"outcome": "compared", "answers": ["1", "2"], "probability": 0.5}
    for answer in ("1", "2"):
        found = cai.comparison_metrics([entry | {"letter_logps": logps}], [{"answer": answer}])
        assert found["accuracy"] == 0.5
    for answers in (["1", "1.0"], ["2", "3"]):  # both right, both wrong: nothing to agree with
        alike = entry | {"letter_logps": logps, "answers": answers}
        assert "accuracy" not in cai.comparison_metrics([alike], [{"answer": "1"}])


# --- Whole runs -----------------------------------------------------------------------------------


def test_a_run_of_revisions(tiny, tmp_path, capsys):
    cai.main(some_args(tmp_path, tiny, num_prompts=6))
    chains = read_rows(tmp_path / "run/chains.jsonl")
    rows = read_rows(tmp_path / "run/revisions.jsonl")
    assert len(chains) == 6 and len({chain["prompt"] for chain in chains}) == 6
    assert rows == cai.trainable_rows(chains) and 0 < len(rows)
    for chain in chains:
        assert len(chain["answers"]) == 3 and len(chain["critiques"]) == 2
        assert set(chain["principles"]) <= set(cai.PRINCIPLES)
    pairs = [pair for row in rows for pair in sft.to_pairs(row)]
    assert pairs == [(row["prompt"], row["answers"][-1]) for row in rows]
    metrics = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    out = capsys.readouterr().out
    assert "12 revisions: " in out and f"{len(rows)} of 6 rows for sft.py" in out


def test_a_run_of_comparisons(tiny, tmp_path):
    """Letters, labels and rows, from the models' weights by a plain loop."""
    (tmp_path / "constitution.txt").write_text("Be right.\nBe short.\nBe kind.\n")
    constitution = str(tmp_path / "constitution.txt")
    dataset = write_rows(tmp_path / "many.jsonl", [{"prompt": f"{i}"} for i in range(20)])
    changes = dict(max_new_tokens=60, num_principles=2, constitution=constitution, dataset=dataset)
    cai.main(some_args(tmp_path, tiny, stage="compare", batch_size=5, **changes))
    compared = read_rows(tmp_path / "run/comparisons.jsonl")
    labelled = [entry for entry in compared if entry["outcome"] == "compared"]
    assert len(compared) == 20 and len(labelled) > 2
    model, tokenizer = cai.load_asked(tiny, torch.device("cpu"), "float32")
    for entry in labelled[:2]:
        first, second = entry["answers"]
        wanted = []
        for principle in entry["principles"]:
            for a, b in ((first, second), (second, first)):
                request = cai.comparison_request(entry["prompt"], principle, a, b)
                prompt = plain.toy_ids(tokenizer, request)
                p = []
                for letter in "AB":
                    ids = tokenizer(f"({letter})", add_special_tokens=False)["input_ids"]
                    p.append(plain.token_logps(model, prompt, ids).sum().exp().item())
                p_a = p[0] / sum(p)
                wanted.append(p_a if a is first else 1 - p_a)
        assert len(wanted) == 4
        assert entry["probability"] == pytest.approx(sum(wanted) / 4, abs=1e-4)
    examples = rm_bt.read_examples(str(tmp_path / "run/preferences.jsonl"))
    assert len(examples) == len(labelled)
    assert all(0.5 <= example["probability"] <= 1 for example in examples)


def test_answers_that_the_rows_bring(tiny, tmp_path):
    rows = [
        {"prompt": "1+1", "completions": ["2", "3"]},
        {"prompt": "2", "completions": ["4", "4"]},
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    cai.main(some_args(tmp_path, tiny, stage="compare", dataset=path, temperature=0.0))
    compared = read_rows(tmp_path / "run/comparisons.jsonl")
    assert sorted(entry["answers"] for entry in compared) == [["2", "3"], ["4", "4"]]
    assert {entry["outcome"] for entry in compared} == {"compared", "equal"}


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", ["revise", "compare"])
@pytest.mark.parametrize("when", ["before the rows", "after the rows"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tiny, tmp_path, monkeypatch, stage, when):
    (tmp_path / "constitution.txt").write_text("Be right.\nBe short.\nBe kind.\n")
    dataset = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}"} for i in range(14)])
    common = dict(dataset=dataset, stage=stage, batch_size=5, max_new_tokens=60)
    common["constitution"] = str(tmp_path / "constitution.txt")
    cai.main(some_args(tmp_path, tiny, output_dir=str(tmp_path / "whole"), **common))
    append = plumbing.Run.append
    torch.manual_seed(99)
    random.seed(99)

    def dies(self, name, rows):
        if name != "metrics.jsonl" and self.step == 2:
            if when == "after the rows":
                append(self, name, rows)
                with open(self.folder / name, "a") as file:
                    file.write('{"prompt": "to')
            raise Killed
        append(self, name, rows)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(plumbing.Run, "append", dies)
        cai.main(some_args(tmp_path, tiny, **common))
    generate = cai.generate
    calls = []
    monkeypatch.setattr(cai, "generate", lambda *args: calls.append(args) or generate(*args))
    cai.main(some_args(tmp_path, tiny, resume=True, **common))
    assert len(calls) == 2 * (5 if stage == "revise" else 1)  # the two steps that were left
    names = {"revise": ["chains", "revisions"], "compare": ["comparisons", "preferences"]}[stage]
    for name in names:
        whole = (tmp_path / f"whole/{name}.jsonl").read_bytes()
        assert (tmp_path / f"run/{name}.jsonl").read_bytes() == whole and whole
    untimed = []
    for folder in ("whole", "run"):
        rows = read_rows(tmp_path / folder / "metrics.jsonl")
        untimed.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert untimed[0] == untimed[1] and len(untimed[0]) == 3


def chains_of(tmp_path, tiny, name, **changes):
    cai.main(some_args(tmp_path, tiny, output_dir=str(tmp_path / name), **changes))
    return {chain["prompt"]: chain for chain in read_rows(tmp_path / name / "chains.jsonl")}


def test_what_the_draws_depend_on(tiny, tmp_path):
    """Principles on the seed and the row alone, whatever else is done beside it."""
    base = chains_of(tmp_path, tiny, "base")
    other = chains_of(tmp_path, tiny, "other", batch_size=7, max_new_tokens=5, num_prompts=4)
    assert len(base) == 7 and len(other) == 4
    for prompt, chain in other.items():
        assert chain["principles"] == base[prompt]["principles"]
    seed = chains_of(tmp_path, tiny, "seed", seed=1)
    assert any(seed[x]["principles"] != base[x]["principles"] for x in base)
    assert any(seed[x]["answers"] != base[x]["answers"] for x in base)
    assert len({tuple(chain["principles"]) for chain in base.values()}) > 3
    same = write_rows(tmp_path / "same.jsonl", [{"prompt": "1+1"}] * 6)
    cai.main(some_args(tmp_path, tiny, dataset=same, output_dir=str(tmp_path / "same")))
    firsts = [chain["answers"][0] for chain in read_rows(tmp_path / "same/chains.jsonl")]
    assert len(set(firsts)) == 6  # no step begins with the random numbers of another


def test_flags_by_what_they_change(tiny, tmp_path):
    (tmp_path / "constitution.txt").write_text("\n  One. \n\nTwo.\n")
    path = str(tmp_path / "constitution.txt")
    base = chains_of(tmp_path, tiny, "base", temperature=0.0)
    greedy = chains_of(tmp_path, tiny, "greedy", temperature=0.0, feedback_temperature=0.0)
    for prompt, chain in greedy.items():
        assert chain["answers"][0] == base[prompt]["answers"][0]
    assert any(greedy[x]["critiques"] != base[x]["critiques"] for x in base)
    other = chains_of(
        tmp_path, tiny, "toy", temperature=0.0, feedback_model=str(ROOT / "toy/model")
    )
    assert [x["answers"][0] for x in other.values()] == [x["answers"][0] for x in base.values()]
    assert all(other[x]["critiques"] != base[x]["critiques"] for x in base)
    chains = chains_of(tmp_path, tiny, "n", num_revisions=3, constitution=path, num_prompts=2)
    assert [len(chain["answers"]) for chain in chains.values()] == [4, 4]
    assert {x for chain in chains.values() for x in chain["principles"]} == {"One.", "Two."}


# --- Mistakes of the user -------------------------------------------------------------------------


def refused(args, *words):
    with pytest.raises(ValueError) as stopped:
        cai.main(args)
    text = str(stopped.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    "content, word",
    [
        (None, "cannot be read"),
        ("", "no principle"),
        (" \n\n", "no principle"),
        ("a\nb\n a", "twice"),
    ],
)
def test_a_constitution_that_is_none(tiny, tmp_path, content, word):
    path = tmp_path / "constitution.txt"
    if content is not None:
        path.write_text(content)
    refused(some_args(tmp_path, tiny, constitution=str(path)), str(path), word)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("completions", [["1"], ["1", "2", "3"], ["1", 2], ["1", " "], None])
def test_answers_that_are_no_pair(tiny, tmp_path, completions):
    rows = [{"prompt": "1", "completions": ["1", "2"]}, {"prompt": "2", "completions": completions}]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    args = some_args(tmp_path, tiny, stage="compare", dataset=path)
    refused(args, path, "row 2", "not two texts")


def test_pairs_without_sampling(tiny, tmp_path):
    refused(some_args(tmp_path, tiny, stage="compare", temperature=0.0), "--temperature 0")
    refused(some_args(tmp_path, tiny, feedback_temperature=0.001), "--feedback-temperature 0.001")


def test_a_critic_that_cannot_be_asked(tiny, tmp_path):
    folder = str(tmp_path / "base")
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        folder
    )
    make_tokenizer(chat=False).save_pretrained(folder)
    refused(some_args(tmp_path, tiny, feedback_model=folder), folder, "no chat template")
    path = write_rows(tmp_path / "rendered.jsonl", [{"prompt": "<bos><user>1+1<assistant>"}])
    refused(some_args(tmp_path, tiny, dataset=path), path, "already")


# --- The toy's critic -----------------------------------------------------------------------------


class Careful(random.Random):
    """A demonstrator who makes no mistakes: no chance comes up."""

    def random(self):
        return 0.9999


def test_faults_by_hand():
    none = [None] * 4
    assert make.mended_lines(RIGHT, "carry") == none and make.mended_lines(RIGHT, "sum") == none
    assert make.mended_lines(RIGHT, "answer") == none
    assert make.mended_lines(FORGOT, "carry") == [None, None, "5+0+1=06", None]
    assert make.mended_lines(FORGOT, "sum") == none and make.mended_lines(FORGOT, "answer") == none
    once = "9+9+0=18\n1+1+1=03\n5+0+0=05\n538"
    assert make.mended_lines(once, "carry") == none
    slip = "7+6+0=12\n8+4+0=12\n5+0+1=06\n623"
    assert make.mended_lines(slip, "sum") == ["7+6+0=13", None, None, None]
    assert make.mended_lines(slip, "carry") == [None, "8+4+1=13", None, None]
    assert make.mended_lines(slip, "answer") == [None, None, None, "622"]


def test_critiques_and_revisions_by_hand():
    said = make.critique(Careful(0), FORGOT, "carry")
    assert said == ("7+6+0=13.8+4+1=13.5+0+0=05?5+0+1=06", 2, "5+0+1=06")
    assert make.revision(Careful(0), PROBLEM, FORGOT, *said[1:]) == RIGHT
    said = make.critique(Careful(0), FORGOT, "sum")
    assert said == ("7+6+0=13.8+4+1=13.5+0+0=05.533.", None, "")
    assert make.revision(Careful(0), PROBLEM, FORGOT, *said[1:]) == FORGOT
    early = "7+6+0=12\n8+4+1=13\n5+0+0=05\n532"  # all lines after the mended one are written anew
    said = make.critique(Careful(0), early, "sum")
    assert make.revision(Careful(0), PROBLEM, early, *said[1:]) == RIGHT
    wrong = RIGHT[:-3] + "643"
    said = make.critique(Careful(0), wrong, "answer")
    assert said[0].endswith(".643?633")
    assert make.revision(Careful(0), PROBLEM, wrong, *said[1:]) == RIGHT


def test_comparisons_by_hand():
    assert make.preferred(Careful(0), [True, False]) == 1
    assert make.preferred(Careful(0), [False, True]) == 0
    for alike in ([True, True], [False, False]):
        assert {make.preferred(random.Random(seed), alike) for seed in range(20)} == {0, 1}


def test_a_comparison_is_shown_in_both_orders(monkeypatch):
    """With the same critiques, and the letter of the same answer."""
    texts = itertools.cycle([FORGOT, RIGHT])
    principle = "Carry every ten."
    monkeypatch.setattr(make, "faulty", lambda rng, prompt: next(texts))
    monkeypatch.setattr(make, "principle_for", lambda rng, answers: principle)
    first, second = make.comparison_pair(Careful(0), PROBLEM)
    shown = [cai.criticised(FORGOT, "7+6+0=13.8+4+1=13.5+0+0=05?5+0+1=06")]
    shown.append(cai.criticised(RIGHT, "7+6+0=13.8+4+1=13.5+0+1=06.633."))
    assert first["prompt"] == cai.comparison_request(PROBLEM, principle, *shown)
    assert second["prompt"] == cai.comparison_request(PROBLEM, principle, *shown[::-1])
    assert (first["completion"], second["completion"]) == ("(B)", "(A)")


def test_how_often_critics_err():
    rng = random.Random(0)
    missed = sum(make.critique(rng, FORGOT, "carry")[1] != 2 for _ in range(2000))
    assert 0.12 < missed / 2000 < 0.19
    objected = sum(make.critique(rng, RIGHT, "carry")[1] is not None for _ in range(2000))
    assert 0.01 < objected / 2000 < 0.035
    swapped = sum(make.preferred(rng, [True, False]) == 0 for _ in range(2000))
    assert 0.08 < swapped / 2000 < 0.12


def test_demonstrations_are_repeatable_and_fit():
    """In the critic's context, with room for what is written."""
    taken = {row["prompt"] for row in make.make_data()["problems_test.jsonl"]}
    prompts = make.problems(random.Random(1), 200, taken)
    rows = make.revision_rows(random.Random(2), prompts)
    assert rows == make.revision_rows(random.Random(2), prompts) and len(rows) == 800
    rows += make.comparison_rows(random.Random(2), prompts)
    assert rows[800:] == make.comparison_rows(random.Random(2), prompts) and len(rows) == 1600
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/critic")
    for row in rows:
        room = 320 - len(cai.encode_prompt(tokenizer, row["prompt"]))
        assert room >= 48 or row["completion"] in ("(A)", "(B)") and room >= 4
        assert len(row["completion"]) < 48
    letters = [row["completion"] for row in rows].count
    assert letters("(A)") == letters("(B)") == 200
    faults = [text for text in (make.faulty(random.Random(i), prompts[i]) for i in range(200))]
    broken = [
        any(make.has_fault(text, kind) for kind in ("carry", "sum", "answer")) for text in faults
    ]
    assert 0.5 < sum(broken) / 200 < 0.9


def test_the_toys_constitution_and_critic():
    principles = cai.load_constitution(str(ROOT / "toy/constitution.txt"))
    assert principles == list(make.PRINCIPLES)
    model, tokenizer = cai.load_asked(str(ROOT / "toy/critic"), torch.device("cpu"), "float32")
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert tokenizer.get_vocab() == make.make_tokenizer().get_vocab()
    want = make.make_config(tokenizer, **make.CRITIC_SHAPE).to_dict()
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    assert model.context == tokenizer.model_max_length == make.CRITIC_SHAPE["context"]
    assert all(model.config.to_dict()[name] == want[name] for name in names)
    files = sum(path.stat().st_size for path in (ROOT / "toy/critic").iterdir())
    assert files < 2_100_000


def toy_args(tmp_path, **changes):
    values = dict(cai.TOY, output_dir=str(tmp_path / "run"), device="cpu", num_prompts=100)
    for name in ("model", "dataset", "feedback_model", "constitution"):
        values[name] = str(ROOT / values[name])
    return cai.Args(**values | dict(batch_size=100) | changes)


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["critic", "model"])
def test_the_critic_mends_the_toys_answers(tmp_path, critic):
    """And a model that never learned to criticise does not."""
    model = str(ROOT / "toy" / critic)
    cai.main(toy_args(tmp_path, feedback_model=model, num_revisions=3))
    [row] = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "accuracy_first" in row]
    gain = row["accuracy_revised"] - row["accuracy_first"]
    assert 0.35 < row["accuracy_first"] < 0.7
    assert gain > 0.1 if critic == "critic" else gain < 0.05


@pytest.mark.slow
def test_the_critic_prefers_right_answers(tmp_path):
    cai.main(toy_args(tmp_path, stage="compare", num_prompts=250, batch_size=250))
    [row] = read_rows(tmp_path / "run/metrics.jsonl")
    assert row["accuracy"] > 0.65 and 0.4 < row["first_place"] < 0.6
    for row in read_rows(tmp_path / "run/preferences.jsonl"):
        assert row["chosen"] != row["rejected"] and row["probability"] >= 0.5
