"""common.py's rewards beside plain loops: files, reward models, greedy rewards, the KL."""

import math
import os
import sys

import pytest
import torch
from conftest import make_model, make_tokenizer
from other_tokenizers import (
    ids_of,
    talking_model,
    with_bos,
    with_eos,
    with_turns,
    with_word_at_zero,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import common
import plumbing
import plain

CPU = torch.device("cpu")


def message(call, *args):
    """The text with which the program stops."""
    with pytest.raises(ValueError) as stopped:
        call(*args)
    assert isinstance(str(stopped.value), str)
    return str(stopped.value)


# --- Greedy rewards and the KL from the start -----------------------------------------------------


def pair(folder, noise):
    """The tiny model, one with other weights, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    start = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in start.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    return policy, start, tokenizer


def greedy(model, prompt, end, most):
    """Ids of the greedy completion of one prompt, by a forward a token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def test_greedy_rewards_equal_a_plain_loop(tiny):
    """Of each row the likeliest completion, with its own row and whether it ended, some at a time;
    what the rewards are comes back, in order."""
    policy, _, tokenizer = pair(tiny, 0.0)
    prompts = ["1+2", "33+4", "5+66", "77+88", "9+9", "12+3", "4+4"]
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(prompts)]
    calls = []

    def score(prompts, texts, given):
        calls.append((prompts, texts, given))
        return [100.0 * row["answer"] + len(text) for text, row in zip(texts, given, strict=True)]

    most = 12
    values, answers = plumbing.greedy_rewards(policy, tokenizer, score, rows, most, 3)
    assert [len(call[0]) for call in calls] == [3, 3, 1]
    texts = sum([call[1] for call in calls], [])
    assert answers == texts
    given = sum([call[2] for call in calls], [])
    assert sum([call[0] for call in calls], []) == prompts
    assert [row["answer"] for row in given] == list(range(7))
    ended = []
    for prompt, text, row in zip(prompts, texts, given, strict=True):
        ids = greedy(policy, plain.toy_ids(tokenizer, prompt), tokenizer.eos_token_id, most)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        ended.append(ids[-1] == tokenizer.eos_token_id)
        assert row["ended"] == ended[-1] and row["prompt"] == prompt
    assert 0 < sum(ended) < 7  # else nothing would be seen
    assert values == [100.0 * i + len(text) for i, text in enumerate(texts)]
    assert "ended" not in rows[0]


def test_greedy_rewards_of_a_model_that_stops_by_the_templates_end():
    """`ended` is that of each row: the end of turn that is not the EOS, or the tokens' end."""
    tokenizer = with_turns()
    said = ids_of(tokenizer, "a" * 60)
    said[41] = tokenizer.convert_tokens_to_ids("<turn>")
    model = talking_model(said, len(tokenizer))
    rows = [{"prompt": "p" * n} for n in (1, 9, 14)]

    def score(prompts, texts, given):
        return [float(row["ended"]) for row in given]

    lengths = [len(common.encode_prompt(tokenizer, row["prompt"])) for row in rows]
    most = 42 - lengths[1] + 1
    assert plumbing.greedy_rewards(model, tokenizer, score, rows, most, 2)[0] == [0.0, 1.0, 1.0]
    assert plumbing.greedy_rewards(model, tokenizer, score, rows, most - 1, 3)[0] == [0.0, 0.0, 1.0]


def test_the_kl_from_the_start_equals_a_plain_loop(tiny, monkeypatch):
    """The sum over the tokens that the policy sampled, at temperature 1, of its log-prob minus the
    start's; one completion a prompt, some prompts at a time."""
    policy, start, tokenizer = pair(tiny, 0.05)
    prompts, parts, options, real = ["1+2", "33+4", "5+66", "77+88", "9+9"], [], [], common.generate

    def spy(*args, **named):
        parts.append(real(*args, **named))
        options.append((args, named))
        return parts[-1]

    monkeypatch.setattr(plumbing, "generate", spy)
    torch.manual_seed(0)
    kl, texts = plumbing.kl_from_start(policy, start, tokenizer, prompts, 9, 2)
    want, want_texts, lengths, likeliest = [], [], [], []
    for batch, said, _ in parts:
        want_texts += said
        for prompt, completion in plain.unpadded(batch):
            difference = plain.token_logps(policy, prompt, completion)
            difference = difference - plain.token_logps(start, prompt, completion)
            want.append(difference.sum().item())
            lengths.append(len(completion))
            end = tokenizer.eos_token_id
            likeliest.append(completion == greedy(policy, prompt, end, 9))
    assert [len(said) for _, said, _ in parts] == [2, 2, 1] and texts == want_texts
    assert kl.shape == (5,) and kl.tolist() == pytest.approx(want, abs=1e-4)
    assert max(map(abs, want)) > 0.05 and max(lengths) == 9 > min(lengths)
    assert all(args[0] is policy for args, _ in options) and not all(likeliest)
    got = [prompt for batch, _, _ in parts for prompt, _ in plain.unpadded(batch)]
    assert got == [plain.toy_ids(tokenizer, prompt) for prompt in prompts]


# --- Verifiers and files --------------------------------------------------------------------------


def write_reward(path, body):
    """A reward file whose function `f` has this body."""
    lines = "\n    ".join(body.splitlines())
    path.write_text(f"import torch\ndef f(prompts, completions, rows):\n    {lines}\n")
    return f"{path}:f"


def test_a_reward_is_called_with_what_it_is_given(tmp_path):
    """Prompts, completions and rows, in this order; its numbers of any kind become floats."""
    body = "global seen\nseen = prompts, completions, rows\nreturn [1, True, torch.tensor(0.5)]"
    folder = tmp_path / "with:colon"
    folder.mkdir()
    score = plumbing.load_reward(write_reward(folder / "mine.py", body), None)
    given = (["p", "p", "q"], ["a", "b", "c"], [{"n": 1}, {"n": 2}, {"n": 3}])
    values = score(*given)
    assert values == [1.0, 1.0, 0.5] and {type(value) for value in values} == {float}
    body = "for p, c, row in zip(prompts, completions, rows):\n"
    body += "    yield len(p) + 10 * len(c) + row['n']"
    score = plumbing.load_reward(write_reward(tmp_path / "sums.py", body), None)
    assert score(["pp", "p"], ["abc", ""], [{"n": 100}, {"n": 200}]) == [132.0, 201.0]


def test_the_verifier_is_the_scripts_own():
    def verifier(prompts, completions, rows):
        return [float(c == row["answer"]) for c, row in zip(completions, rows, strict=True)]

    score = plumbing.load_reward("verifier", verifier)
    assert score(["p", "p"], ["3", "4"], [{"answer": "3"}, {"answer": "3"}]) == [1.0, 0.0]


NOT_THERE = {
    "no-such.py:f": "no file no-such.py",
    "folder.py:f": "no file folder.py",
    "mine.py": "not of the form FILE.py:function",
    "mine.py:": "not of the form FILE.py:function",
    "mine.txt:f": "not of the form FILE.py:function",
    "verifer": "not of the form FILE.py:function",
    "mine.py:g": "no function g in mine.py",
    "wrong.py:f": "cannot be loaded from FILE.py:function (SyntaxError: ",
    "raises.py:f": "cannot be loaded from FILE.py:function (KeyError: 'x'; raises.py:2)",
}


@pytest.mark.parametrize("reward", NOT_THERE)
def test_a_reward_that_is_not_there_is_said_at_once(reward, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    write_reward(tmp_path / "mine.py", "return [0.0]")
    write_reward(tmp_path / "mine.txt", "return [0.0]")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("values = {}\nvalues['x']\n")
    said = message(plumbing.load_reward, reward, None)
    assert said.startswith(f"--reward {reward}: {NOT_THERE[reward]}")


def test_a_reward_file_has_neighbours(tmp_path, monkeypatch):
    """It imports what stands beside it, whatever the working folder is, also while it is called."""
    monkeypatch.setattr("sys.path", list(sys.path))
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "neighbour_17.py").write_text("HALF = 0.5\n")
    (folder / "later_17.py").write_text("def one():\n    return 1.0\n")
    (folder / "mine_17.py").write_text(
        "from neighbour_17 import HALF\n"
        "def f(prompts, completions, rows):\n"
        "    from later_17 import one\n"
        "    return [HALF + one()] * len(rows)\n"
    )
    score = plumbing.load_reward(f"{folder}/mine_17.py:f", None)
    assert score(["p"], ["c"], [{}]) == [1.5]
    monkeypatch.chdir(tmp_path)
    assert plumbing.load_reward("deep/mine_17.py:f", None)(["p"], ["c"], [{}]) == [1.5]


def test_a_reward_file_may_have_dataclasses(tmp_path):
    """Of texts as types they look up their module; pickle does, too, for worker processes."""
    (tmp_path / "typed_17.py").write_text(
        "from __future__ import annotations\n"
        "import pickle\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Part:\n"
        "    value: float\n"
        "def f(prompts, completions, rows):\n"
        "    return [pickle.loads(pickle.dumps(Part(2.0))).value for _ in rows]\n"
    )
    score = plumbing.load_reward(f"{tmp_path}/typed_17.py:f", None)
    assert score(["p"], ["c"], [{}]) == [2.0]


def test_a_reward_file_named_like_a_module_does_not_take_its_place(tmp_path):
    import json

    write_reward(tmp_path / "json.py", "return [3.0] * len(rows)")
    score = plumbing.load_reward(f"{tmp_path}/json.py:f", None)
    assert score(["p"], ["c"], [{}]) == [3.0] and sys.modules["json"] is json


@pytest.mark.parametrize("code", ["0", "'bye'", ""])
def test_an_exit_in_a_reward_is_no_end_of_the_run(tmp_path, code):
    """Neither while the file is read nor in the call: exit code 0 would say that all went well."""
    path = tmp_path / "exits.py"
    path.write_text(f"import sys\nsys.exit({code})\ndef f(p, c, r):\n    return [0.0]\n")
    called = f"called sys.exit({code.strip(chr(39)) or None})"
    assert message(plumbing.load_reward, f"{path}:f", None) == f"--reward {path}:f {called}"
    reward = write_reward(tmp_path / "mine.py", f"import sys\nsys.exit({code})")
    score = plumbing.load_reward(reward, None)
    assert message(score, ["p"], ["c"], [{}]) == f"--reward {reward} {called}"


def test_what_a_reward_sets_ends_with_it(tmp_path, monkeypatch):
    """As judges do that load a model of their own, or run a program in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    body = "torch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\n"
    body += "import os\nos.chdir('/')\n"
    body += "return [1.0] * len(rows)"
    score = plumbing.load_reward(write_reward(tmp_path / "mine.py", body), None)
    assert score(["q"], ["a"], [{}]) == [1.0]
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert os.getcwd() == str(tmp_path)


@pytest.mark.parametrize("by_step", [False, True])
def test_what_a_reward_changes_does_not_reach_the_training(tmp_path, by_step):
    body = "prompts.clear()\nrows[0]['prompt'][0]['content'] = 'x'\nrows[1].clear()\n"
    body += f"completions.reverse()\nreturn [{'[1.0]' if by_step else '1.0'}] * 2"
    score = plumbing.load_reward(write_reward(tmp_path / "mine.py", body), None, by_step=by_step)
    chat = [{"role": "user", "content": "q"}]
    given = ([chat, "r"], ["a", "b"], [{"prompt": chat, "n": [1]}, {"prompt": "r"}])
    assert len(score(*given)) == 2
    chat = [{"role": "user", "content": "q"}]
    assert given == ([chat, "r"], ["a", "b"], [{"prompt": chat, "n": [1]}, {"prompt": "r"}])


BAD = {
    "too few": ("return [1.0]", False, "1 values for 2 completions"),
    "too many": ("return [1.0] * 3", False, "3 values for 2 completions"),
    "nan": ("return [1.0, float('nan')]", False, "nan for 'second': not finite"),
    "infinite": ("return [float('-inf'), 1.0]", False, "-inf for 'first': not finite"),
    "text": ("return ['good', 1.0]", False, "'good' is a text, not a number"),
    "a number as a text": ("return ['1', 1.0]", False, "'1' is a text, not a number"),
    "bytes": ("return [b'1', 1.0]", False, "b'1' is a text, not a number"),
    "none": ("return", False, "it returned a value of type NoneType, not a list of numbers"),
    "a dict": ("return {1.0: 0, 2.0: 0}", False, "type dict, not a list of numbers"),
    "a set": ("return {1.0, 2.0}", False, "type set, not a list of numbers"),
    "one text": ("return '12'", False, "type str, not a list of numbers"),
    "one number": ("return 1.0", False, "TypeError"),
    "a list": ("return [1.0, [2.0]]", False, "[2.0] for 'second': it needs one number"),
    "a number": (
        "return [[1.0], 2.0]",
        True,
        "2.0 for 'second': --supervision process needs a list",
    ),
    "nan in a list": ("return [[1.0], [2.0, float('nan')]]", True, "'second': not finite"),
    "error": ("return [rows[7]]", False, "IndexError"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_reward_may_not_return(name, tmp_path):
    body, by_step, said = BAD[name]
    reward = write_reward(tmp_path / "mine.py", body)
    score = plumbing.load_reward(reward, None, by_step=by_step)
    text = message(score, ["p", "p"], ["first", "second"], [{}, {}])
    assert f"--reward {reward} failed" in text and said in text


def test_numbers_for_steps(tmp_path):
    reward = write_reward(tmp_path / "mine.py", "return [[1, 0.5], []]")
    values = plumbing.load_reward(reward, None, by_step=True)(["p", "p"], ["a", "b"], [{}, {}])
    assert values == [[1.0, 0.5], []] and type(values[0][0]) is float
    reward = write_reward(tmp_path / "none.py", "return []")
    assert plumbing.load_reward(reward, None)([], [], []) == []


# --- Reward models --------------------------------------------------------------------------------

SEQUENCE, TOKEN = AutoModelForSequenceClassification, AutoModelForTokenClassification
HEAD = {"bytes": "<bos>[user]{}<eos>[assistant]", "turns": "<bos>[user]{}<turn>\n[assistant]"}


def save_model(folder, auto_class, tokenizer, labels, **settings):
    """A reward model with random weights and these settings in its config -> the model."""
    causal = make_model("llama")
    shape = {"vocab_size": len(tokenizer), "num_labels": labels}
    config = type(causal.config)(**causal.config.to_dict() | shape | settings)
    torch.manual_seed(4)
    model = auto_class.from_config(config).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def scores_of(folder, prompts, texts, rows=None, **options):
    """What `load_reward` makes of a folder's reward model."""
    score = plumbing.load_reward("verifier", None, str(folder), CPU, **options)
    return score(prompts, texts, rows or [{}] * len(texts))


def last_score(model, text, tokenizer):
    """The first label at the last token of a text in which all special tokens are written."""
    with torch.no_grad():
        return plain.head_outputs(model, [], ids_of(tokenizer, text))[-1, 0].item()


TEXTS = ["yes", "no, never in my life", "", "x", "a bit longer"]
ASKED = ["q", "q", "another question", "r", "s, t and u"]
ENDED = [{}, {"ended": False}, {"ended": True}, {"ended": False}, {}]


@pytest.mark.parametrize("kind", ["bytes", "turns", "pad is EOS", "pad is turn", "adds BOS"])
def test_a_reward_model_made_here_is_read_at_the_end_of_turn(kind, tmp_path):
    """Whatever the pad token is; at the last token of the text where it was cut off; its bias is
    added; in any micro-batch, and in the order of the completions."""
    tokenizer = {
        "bytes": make_tokenizer(), "turns": with_turns(), "adds BOS": with_bos(),
        "pad is EOS": make_tokenizer(pad_is_eos=True), "pad is turn": with_turns("<turn>"),
    }[kind]  # fmt: skip
    head = HEAD["turns" if "turn" in kind else "bytes"]
    end = "<turn>" if "turn" in kind else "<eos>"
    pad = tokenizer.pad_token_id
    model = save_model(tmp_path, SEQUENCE, tokenizer, 1, reward_bias=0.5, pad_token_id=pad)
    want = []
    for prompt, text, row in zip(ASKED, TEXTS, ENDED, strict=True):
        close = end if row.get("ended", True) else ""
        want.append(last_score(model, head.format(prompt) + text + close, tokenizer))
    assert len({round(value, 3) for value in want}) == 5
    for size in (1, 2, 8):
        got = scores_of(tmp_path, ASKED, TEXTS, ENDED, micro_batch_size=size)
        assert got == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("pad", ["<turn>", "\n", "<pad>", None])
@pytest.mark.parametrize("after", ["\n", "", "<turn>"])
def test_a_reward_model_not_made_here_is_read_where_transformers_reads_it(pad, after, tmp_path):
    """At the last id of the template's text that is not the config's pad, of which there may be
    several; the template's end of turn is not the EOS."""
    tokenizer = with_turns("<pad>", after)
    model = save_model(tmp_path, SEQUENCE, tokenizer, 1)
    pad_id = ids_of(tokenizer, pad)[0] if pad else None
    model.config.pad_token_id = pad_id
    model.save_pretrained(tmp_path)
    got = scores_of(tmp_path, ["q", "q"], ["yes", "yes"], [{}, {"ended": False}])
    head = f"<bos>[user]q<turn>{after}[assistant]yes"
    whole = ids_of(tokenizer, head + "<turn>" + after)
    while whole[-1] == pad_id:
        whole.pop()
    with torch.no_grad():
        want = plain.head_outputs(model, [], whole)[-1, 0].item()
        pooled = model(torch.tensor([ids_of(tokenizer, head + "<turn>" + after)])).logits[0, 0]
    assert got[0] == pytest.approx(want, abs=1e-4)
    assert pooled.item() == pytest.approx(want, abs=1e-4)
    assert got[1] == pytest.approx(last_score(model, head, tokenizer), abs=1e-4)


@pytest.mark.parametrize("kind", ["plain", "adds EOS", "word at 0"])
def test_a_reward_model_not_made_here_without_a_template(kind, tmp_path):
    """Read at the EOS, or before it where it is the pad id. The word at id 0 is a word."""
    tokenizer = {
        "plain": make_tokenizer(chat=False), "adds EOS": with_eos(),
        "word at 0": with_word_at_zero(),
    }[kind]  # fmt: skip
    pad = tokenizer.pad_token_id
    model = save_model(tmp_path, SEQUENCE, tokenizer, 1, pad_token_id=pad)
    end = "" if tokenizer.pad_token == "<eos>" else "<eos>"
    prompts, texts = ["aa", "qab", "b"], ["aba", "ba", "aaa"]
    want = []
    for prompt, text in zip(prompts, texts, strict=True):
        want.append(last_score(model, prompt + text + end, tokenizer))
    assert scores_of(tmp_path, prompts, texts) == pytest.approx(want, abs=1e-4)


SOLUTIONS = ["first\nsecond one\nc", "one", "\n\nx\n  \ny\n", "", "longer than the others\nb"]
STEPS = [["first", "second one", "c"], ["one"], ["x", "y"], [], ["longer than the others", "b"]]


def step_probs(model, tokenizer, prompt, steps, separator):
    """1 - P(wrong) at the end of each step's separator."""
    prompt_ids = ids_of(tokenizer, HEAD["bytes"].format(prompt))
    ids, ends = [], []
    for step in steps:
        ids += ids_of(tokenizer, step + separator)
        ends.append(len(ids) - 1)
    if not ids:
        return []
    with torch.no_grad():
        logits = plain.head_outputs(model, prompt_ids, ids)
    return [1 - logits[end].softmax(-1)[0].item() for end in ends]


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    """Folder of a process reward model of three classes, the model, and its probabilities of
    SOLUTIONS by a plain loop."""
    folder, tokenizer = tmp_path_factory.mktemp("prm"), make_tokenizer()
    settings = {"step_separator": "\n", "solution_score": "minimum", "reward_bias": 0.0}
    model = save_model(folder, TOKEN, tokenizer, 3, **settings)
    want = []
    for prompt, steps in zip(ASKED, STEPS, strict=True):
        want.append(step_probs(model, tokenizer, prompt, steps, "\n"))
    return folder, model, want


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_process_reward_model_by_step_equals_a_plain_loop(size, prm):
    """A number for each step that is not blank, in any micro-batch, whether it ended or not."""
    folder, _, want = prm
    for rows in (None, [{"ended": False}] * 5):
        got = scores_of(folder, ASKED, SOLUTIONS, rows, micro_batch_size=size, by_step=True)
        assert [len(values) for values in got] == [3, 1, 2, 0, 2]
        for values, probs in zip(got, want, strict=True):
            assert values == pytest.approx(probs, abs=1e-5)


@pytest.mark.parametrize("how", ["minimum", "product", "last", "mean"])
def test_a_solution_is_scored_as_the_config_says(how, prm, tmp_path):
    _, model, want = prm
    model.config.solution_score = how
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    combine = {
        "product": math.prod, "minimum": min, "last": lambda x: x[-1],
        "mean": lambda x: sum(x) / len(x),
    }[how]  # fmt: skip
    expected = []
    for probs in want:
        expected.append(combine(probs) if probs else 0.0)
    assert scores_of(tmp_path, ASKED, SOLUTIONS) == pytest.approx(expected, abs=1e-5)


def test_an_outcome_reward_model_without_steps(tmp_path):
    """Of one logit the sigmoid, at every token, the end of turn included, if it ended."""
    tokenizer = make_tokenizer()
    settings = {"step_separator": "", "solution_score": "mean", "reward_bias": 0.0}
    model = save_model(tmp_path, TOKEN, tokenizer, 1, **settings)
    want = []
    for prompt, text, row in zip(ASKED, TEXTS, ENDED, strict=True):
        close = "<eos>" if row.get("ended", True) else ""
        ids = ids_of(tokenizer, text + close)
        prompt_ids = ids_of(tokenizer, HEAD["bytes"].format(prompt))
        with torch.no_grad():
            probs = plain.head_outputs(model, prompt_ids, ids)[:, 0].sigmoid()
        want.append(probs.mean().item())
    assert scores_of(tmp_path, ASKED, TEXTS, ENDED) == pytest.approx(want, abs=1e-5)


def test_a_micro_batch_holds_completions_of_like_length(tmp_path, monkeypatch):
    """At most so many at a time, eight without a word of it, the short ones together; and how the
    model is loaded is as asked for."""
    tokenizer = make_tokenizer()
    save_model(tmp_path, SEQUENCE, tokenizer, 1, reward_bias=0.0, pad_token_id=0)
    loads, sizes = [], []
    real_load, real_scores = plumbing.load_model, common.completion_scores

    def load(auto_class, path, device, dtype, *more):
        loads.append((auto_class, str(path), device, dtype))
        return real_load(auto_class, path, device, dtype, *more)

    def completion_scores(model, batch, *more):
        sizes.append(tuple(batch.completion_ids.shape))
        assert not torch.is_grad_enabled() and not model.training
        return real_scores(model, batch, *more)

    monkeypatch.setattr(plumbing, "load_model", load)
    monkeypatch.setattr(plumbing, "completion_scores", completion_scores)
    texts = ["x" * n for n in (1, 9, 2, 8, 3, 7, 4, 6, 5)]
    want = scores_of(tmp_path, ["q"] * 9, texts)
    assert sizes == [(8, 9), (1, 10)]
    sizes.clear()
    got = scores_of(tmp_path, ["q"] * 9, texts, dtype="bfloat16", micro_batch_size=4)
    assert sizes == [(4, 5), (4, 9), (1, 10)]
    assert loads[0] == (SEQUENCE, str(tmp_path), CPU, "auto") and loads[1][3] == "bfloat16"
    differences = [abs(one - other) for one, other in zip(got, want, strict=True)]
    assert 0 < max(differences) < 1.0


def test_a_reward_model_is_taken_before_a_reward(tmp_path):
    """And is what the message of a failure names."""
    reward = write_reward(tmp_path / "mine.py", "return [7.0] * len(rows)")
    folder, tokenizer = tmp_path / "model", make_tokenizer()
    model = save_model(folder, SEQUENCE, tokenizer, 1, reward_bias=0.0, pad_token_id=0)
    score = plumbing.load_reward(reward, None, str(folder))  # on the CPU, if nothing is said
    want = last_score(model, HEAD["bytes"].format("q") + "yes<eos>", tokenizer)
    assert score(["q"], ["yes"], [{}]) == pytest.approx([want], abs=1e-4)
    assert f"--reward-model {folder} failed" in message(score, ["q", "q"], ["yes"], [{}])
    model.score.weight.data = model.score.weight.data.sign() * 3e38  # their sum is beyond float32
    model.save_pretrained(folder)
    score = plumbing.load_reward(reward, None, str(folder), CPU)
    assert "not finite" in message(score, ["q"], ["yes"], [{}])


UNSAID = (
    "its config.json does not say how to read the steps: make it with prm.py, for steps with "
    "--supervision process"
)
REFUSED = {
    "two labels": (SEQUENCE, 2, {}, False, "has 2 labels, not 1"),
    "steps of one without": (SEQUENCE, 1, {}, True, UNSAID),
    "tokens unsaid": (TOKEN, 2, {}, False, UNSAID),
    "no separator": (TOKEN, 1, {"solution_score": "last"}, True, UNSAID),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reward_models_that_are_refused(name, tmp_path):
    auto_class, labels, settings, by_step, said = REFUSED[name]
    save_model(tmp_path, auto_class, make_tokenizer(), labels, pad_token_id=0, **settings)
    load = plumbing.load_reward
    text = message(load, "verifier", None, str(tmp_path), CPU, "auto", 8, by_step)
    assert f"--reward-model {tmp_path}: " in text and said in text


def test_a_language_model_is_no_reward_model_and_the_other_way_round(tmp_path, tiny):
    text = message(plumbing.load_reward, "verifier", None, tiny, CPU)
    assert (
        text == f"--reward-model {tiny}: is a language model; rm_bt.py makes a reward model of one"
    )
    for auto_class in (SEQUENCE, TOKEN):
        save_model(tmp_path, auto_class, make_tokenizer(), 1, pad_token_id=0)
        text = message(plumbing.load_model, AutoModelForCausalLM, str(tmp_path), CPU)
        assert text == f"{tmp_path}: is a reward model: it gives scores, and writes no text"
        assert message(plumbing.talk, str(tmp_path)) == text


def test_a_folder_without_a_reward_model(tmp_path):
    text = message(plumbing.load_reward, "verifier", None, str(tmp_path / "none"), CPU)
    assert text.endswith("none: no such folder, and no such model on the hub")


# --- Scores of solutions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, values",
    [("product", [0.3, 0.06, 0.5, 0.0]), ("minimum", [0.5, 0.2, 0.5, 0.0]),
     ("last", [0.5, 0.3, 0.5, 0.0]), ("mean", [0.55, 1.5 / 3, 0.5, 0.0])],
)  # fmt: skip
def test_solution_scores_of_ragged_steps(how, values):
    """What stands behind a row's last step, larger or smaller than its steps, does not count."""
    probs = torch.tensor([[0.6, 0.5, 0.1], [1.0, 0.2, 0.3], [0.5, 0.9, 0.01], [0.7, 0.8, 0.9]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    assert plumbing.solution_score(probs, mask, how).tolist() == pytest.approx(values)
    empty = torch.zeros(2, 0)
    assert plumbing.solution_score(empty, empty.bool(), how).tolist() == [0.0, 0.0]


def test_a_solution_score_of_another_name_is_refused():
    with pytest.raises(ValueError, match="'median'"):
        plumbing.solution_score(torch.ones(1, 2), torch.ones(1, 2).bool(), "median")


def test_positive_probs_of_any_number_of_classes():
    logits = torch.tensor([[[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]]).log() + 3
    assert plumbing.positive_probs(logits)[0].tolist() == pytest.approx([0.8, 0.3])
    assert plumbing.positive_probs(logits[..., :1]).shape == (1, 2)
    one = torch.tensor([[math.log(3)], [-math.log(3)]])
    assert plumbing.positive_probs(one).tolist() == pytest.approx([0.75, 0.25])
