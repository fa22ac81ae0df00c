"""plumbing.py by hand: errors, flags, rows, tokenizers, models, gradient steps, a run's folder."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import common
import plain
import plumbing

CPU = torch.device("cpu")


def message(call, *args, **options):
    """The text with which ValueError is raised: run_script makes one line and exit code 1 of it."""
    with pytest.raises(ValueError) as stopped:
        call(*args, **options)
    return str(stopped.value)


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# --- Errors ---------------------------------------------------------------------------------------


def test_stop_says_one_line_after_the_name_of_the_program(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/grpo.py", "--model"])
    assert message(plumbing.stop, "a\n  b\t c") == "a b c"
    assert message(plumbing.stop, "x" * 900) == "x" * 500


def raise_error():
    raise ValueError("no\nsuch thing")


def test_stop_on_error_says_what_and_where(monkeypatch):
    """The file and line are those of the raise, not of the `with`."""
    monkeypatch.setattr("sys.argv", ["sft.py"])

    def inside():
        with plumbing.stop_on_error("cannot do it"):
            raise_error()

    line = raise_error.__code__.co_firstlineno + 1
    want = f"cannot do it (ValueError: no such thing; test_plumbing.py:{line})"
    assert message(inside) == want


def test_stop_on_error_leaves_the_rest_alone():
    """No error is none; an exit, and a kill by hand, go through as they are."""
    with plumbing.stop_on_error("never said"):
        value = 1
    assert value == 1
    for kind in (plumbing.UserError, SystemExit, KeyboardInterrupt):
        with pytest.raises(kind) as raised, plumbing.stop_on_error("never said"):
            raise kind("mine")
        assert str(raised.value) == "mine"


@pytest.mark.parametrize("where", ["parse_args", "main"])
def test_a_kill_by_hand_is_one_line(where, monkeypatch, capsys):
    """At any moment from the reading of the flags on."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["grpo.py"])
    main = interrupted
    if where == "parse_args":
        monkeypatch.setattr(plumbing, "parse_args", interrupted)
        main = None
    with pytest.raises(SystemExit) as raised:
        plumbing.run_script(main, Args, TOY)
    assert raised.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


# --- Flags ----------------------------------------------------------------------------------------


@dataclass
class Args:
    model: str  # a folder
    dataset: str  # a file
    num_steps: int = 200  # steps
    beta: float = 0.04  # a weight
    name: str = "mine"  # a name


TOY = dict(model="toy/model", dataset="toy/rows.jsonl", num_steps=7, name="some toy/thing")


def parsed(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["grpo.py", *flags])
    return plumbing.parse_args(Args, TOY)


def test_without_a_model_the_defaults_are_the_toys(monkeypatch):
    """Paths in toy/ count from the repository, whatever the folder one is in."""
    model, dataset = str(ROOT / "toy/model"), str(ROOT / "toy/rows.jsonl")
    assert parsed(monkeypatch) == Args(model, dataset, 7, 0.04, "some toy/thing")
    got = parsed(monkeypatch, "--num-steps", "3", "--dataset", "d")
    assert got == Args(model, "d", 3, 0.04, "some toy/thing")


@pytest.mark.parametrize("flags", [["--model", "m"], ["--model=m"]])
def test_with_a_model_no_default_is_the_toys(monkeypatch, flags, capsys):
    assert parsed(monkeypatch, *flags, "--dataset", "d") == Args("m", "d", 200, 0.04, "mine")
    with pytest.raises(SystemExit) as stopped:
        parsed(monkeypatch, *flags)
    assert stopped.value.code == 2 and "--dataset" in "".join(capsys.readouterr())


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_the_scripts_own_defaults_and_names_the_toys(monkeypatch, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(monkeypatch, flag)
    assert stopped.value.code == 0
    text = re.sub(r"[\s│|]+", " ", capsys.readouterr().out)
    assert "for the defaults below: --model toy/model --dataset toy/rows.jsonl" in text
    assert "--num-steps 7" in text and "(default: 200)" in text and "(default: 7)" not in text
    assert "(default: toy/model)" in text and "(required)" not in text


@dataclass
class Helped:
    first: int = 1  # what is behind a field
    second: int = 2
    """what is beneath it,
    over two lines"""
    third: int = 3


def test_help_is_what_stands_behind_or_beneath_a_field():
    wanted = {"first": "what is behind a field", "second": "what is beneath it, over two lines"}
    assert plumbing._help_texts(Helped) == wanted | {"third": ""}


# --- The entry ------------------------------------------------------------------------------------


def entered(monkeypatch, main):
    """run_script with a main of these tests."""
    quiet = []
    monkeypatch.setattr(plumbing, "quieten_transformers", lambda: quiet.append(True))
    monkeypatch.setattr("sys.argv", ["/some/where/grpo.py", "--model", "m", "--dataset", "d"])
    plumbing.run_script(main, Args, TOY)
    assert quiet == [True]


def test_main_gets_the_flags(monkeypatch):
    got = []
    entered(monkeypatch, got.append)
    assert got == [Args("m", "d", 200, 0.04, "mine")]


@pytest.mark.parametrize(
    "mistake, text",
    [
        (lambda args: plumbing.stop("no\n such file"), "grpo.py: no such file"),
        (lambda args: common.kl_estimate(torch.ones(1), torch.ones(1), "k9"), "grpo.py: No est"),
    ],
)
def test_a_mistake_ends_the_program_with_one_line(monkeypatch, mistake, text):
    """Whoever of our files raises it; a text as the code means exit code 1."""
    with pytest.raises(SystemExit) as stopped:
        entered(monkeypatch, mistake)
    assert stopped.value.code.startswith(text) and "\n" not in stopped.value.code


@pytest.mark.parametrize("fault", [ValueError, KeyError, RuntimeError])
def test_a_fault_keeps_its_traceback(monkeypatch, fault):
    """One that comes from elsewhere, here from this file, is no mistake of the user."""

    def broken(args):
        raise fault("a fault")

    with pytest.raises(fault, match="a fault"):
        entered(monkeypatch, broken)


def test_transformers_says_nothing_while_a_script_runs():
    """In a process of its own: it is a setting of the process."""
    code = (
        "import plumbing, transformers\n"
        "plumbing.quieten_transformers()\n"
        "logging = transformers.utils.logging\n"
        "print(logging.get_verbosity() == logging.ERROR, logging.is_progress_bar_enabled())"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout == "True False\n"


# --- Rows -----------------------------------------------------------------------------------------


def test_rows_are_those_of_the_lines_that_are_not_blank(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"a": 1}, "", "   ", {"a": "2", "b": [3]})
    assert plumbing.load_rows(path) == [{"a": 1}, {"a": "2", "b": [3]}]
    assert plumbing.load_rows(Path(path), "a") == plumbing.load_rows(path)


@pytest.mark.parametrize("line", ['{"a": ', "5", "null", "[1]", "text"])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    path = write(tmp_path / "rows.jsonl", {"a": 1}, "", line)
    assert f"{path}, line 3: no JSON object" in message(plumbing.load_rows, path)


@pytest.mark.parametrize("value", ["", "  \n", [], None])
def test_a_column_may_not_be_missing_or_empty(tmp_path, value):
    """The line and the columns that it has are said; all columns and all rows are looked at."""
    for bad in ({"a": "x", "b": value, "c": 1}, {"a": "x", "c": 1}):
        path = write(tmp_path / "rows.jsonl", {"a": "x", "b": "y"}, "", bad)
        text = message(plumbing.load_rows, path, "a", "b")
        assert f"{path}, line 3: no b, or an empty one; it has {', '.join(bad)}" in text
        assert len(plumbing.load_rows(path, "a")) == 2


def test_what_is_0_or_false_is_not_missing(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", {"a": 0, "b": False, "c": [0]}, {"a": "0", "b": 0, "c": 1}
    )
    assert len(plumbing.load_rows(path, "a", "b", "c")) == 2


def test_of_alternatives_one_is_enough(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"a": "x"}, {"b": "y"}, {"a": None, "b": "y"})
    assert len(plumbing.load_rows(path, ("a", "b"))) == 3
    write(tmp_path / "rows.jsonl", {"a": "x"}, {"b": ""}, {"c": "y"})
    assert "line 2: no a or b, or an empty one" in message(plumbing.load_rows, path, ("a", "b"))
    write(tmp_path / "rows.jsonl", {"a": "x"}, {"c": "y"})
    assert "line 2: no a or b, or an empty one" in message(plumbing.load_rows, path, ("a", "b"))


def test_a_file_without_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", "", " ")
    assert f"{path}: no rows" in message(plumbing.load_rows, path)


def test_rows_of_the_hub(monkeypatch):
    """owner/name is its split `train`; owner/name:split that one; columns are looked at, too."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"a": "x"}, {"a": split, "b": [1, 2]}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert plumbing.load_rows("owner/name") == [{"a": "x"}, {"a": "train", "b": [1, 2]}]
    assert plumbing.load_rows("owner/name:test[:2]", "a")[1]["a"] == "test[:2]"
    assert asked == [("owner/name", "train"), ("owner/name", "test[:2]")]
    text = message(plumbing.load_rows, "owner/name", "b")
    assert "owner/name, line 1: no b" in text


def test_no_file_and_no_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = message(plumbing.load_rows, "here/missing.jsonl")
    assert text == "here/missing.jsonl: no such file"  # a name with this end is none of the hub
    text = message(plumbing.load_rows, "owner/name")
    assert "owner/name: no such file; a data set of the hub needs pip install" in text
    text = message(plumbing.load_rows, str(tmp_path))
    assert text == f"{tmp_path}: is a folder; it needs a file of JSON Lines"


def some_prompts(number, repeat=1):
    return [{"prompt": f"p{i}", "n": n} for n in range(repeat) for i in range(number)]


def splits(eval_dataset="", eval_size=4, seed=0):
    data = {"train": some_prompts(50), "held": some_prompts(3), "few": some_prompts(9)}
    args = SimpleNamespace(dataset="train", eval_dataset=eval_dataset)
    args.eval_size, args.seed = eval_size, seed
    return plumbing.load_splits(args, data.get)


def test_splits_of_two_files_are_as_they_are():
    """All rows of both, whatever --eval-size is."""
    assert splits("held") == (some_prompts(50), some_prompts(3))
    assert splits("held", eval_size=0) == (some_prompts(50), some_prompts(3))


@pytest.mark.parametrize("eval_size", [0, 2, 9])
def test_prompts_of_an_evaluation_file_are_at_most_eval_size(tmp_path, eval_size):
    """To answer them takes time: the first ones, and with 0 none."""
    rows = some_prompts(3)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = SimpleNamespace(dataset=str(path), eval_dataset=str(path), eval_size=eval_size, seed=0)
    args.reward, args.reward_model = "mine.py:score", ""
    assert plumbing.load_prompts(args) == (rows, rows[:eval_size])


def test_splits_of_one_file_by_size_and_seed(capsys):
    rows, held = splits()
    assert (
        len(held) == 4
        and len(rows) == 46
        and sorted(map(str, rows + held)) == sorted(map(str, some_prompts(50)))
    )
    assert splits() == (rows, held) and splits(seed=1)[1] != held
    assert splits(eval_size=0) == (some_prompts(50), [])
    assert capsys.readouterr().out == ""


def test_too_few_prompts_to_hold_any_out_is_said(capsys):
    args = SimpleNamespace(dataset="few", eval_dataset="", eval_size=4, seed=0)
    rows, held = plumbing.load_splits(args, lambda path: some_prompts(9))
    assert rows == some_prompts(9) and held == []
    assert "few: under ten prompts" in capsys.readouterr().out


def test_at_most_a_tenth_of_the_prompts_is_held_out():
    """Prompts are counted, not rows; all rows of a prompt are on one side, in their order."""
    rows = some_prompts(30, repeat=4)
    train, held = plumbing.hold_out(rows, 100, 0)
    assert len({row["prompt"] for row in held}) == 3 and len(held) == 12
    assert not {row["prompt"] for row in held} & {row["prompt"] for row in train}
    assert train == [row for row in rows if row not in held]
    assert held == [row for row in rows if row in held]


def test_who_is_held_out_depends_on_the_seed_and_not_on_the_order():
    rows = some_prompts(60)
    held = plumbing.hold_out(rows, 5, 3)[1]
    again = plumbing.hold_out(rows[::-1], 5, 3)[1]
    assert len(held) == 5 and again == held[::-1]
    assert plumbing.hold_out(rows, 5, 4)[1] != held


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_chats_are_split_by_the_first_turn_of_the_user(key):
    """Neither by a shared system message nor by a shared later turn."""
    rows = []
    for i in range(40):
        chat = [turn("system", f"s{i}"), turn("user", f"p{i // 2}")]
        rows.append({key: [*chat, turn("assistant", "a"), turn("user", f"l{i}")]})
    train, held = plumbing.hold_out(rows, 2, 0)
    assert len(held) == 4 and len({row[key][1]["content"] for row in held}) == 2
    first = {row[key][1]["content"] for row in held}
    assert not first & {row[key][1]["content"] for row in train}


def test_a_chat_without_a_user_is_split_by_itself():
    rows = [{"messages": [turn("assistant", str(i))]} for i in range(20)]
    assert len(plumbing.hold_out(rows, 2, 0)[1]) == 2


def test_answers_are_texts_or_the_last_message():
    user, answer = turn("user", "q"), turn("assistant", "a")
    for prompt in ("q", [user]):
        assert plumbing.answer_text("a", prompt) == "a"
        assert plumbing.answer_text([answer], prompt) == "a"
        assert plumbing.answer_text([user, answer], prompt) == "a"
    other = turn("user", "another")
    for lost in ([other, answer], [answer, answer], [user, user], [user], [user, user, answer]):
        with pytest.raises(ValueError, match="prompt"):
            plumbing.answer_text(lost, "q")
    longer = [turn("system", "s"), user, turn("assistant", "b"), other]
    assert plumbing.answer_text([*longer, answer], longer) == "a"


def test_answers_that_are_numbers():
    assert plumbing.has_answers([{"answer": "1,234,567"}, {"answer": 0}, {"answer": " -3.5 "}])
    for bad in ("12 apples", "", None, "inf", "nan", math.nan):
        assert not plumbing.has_answers([{"answer": "1"}, {"answer": bad}])
        assert not plumbing.has_answers([{"answer": bad}, {"answer": "1"}])
    assert not plumbing.has_answers([{"answer": "1"}, {"prompt": "p"}])


def test_ended_goes_to_its_row():
    rows = [{"a": 1}, {"a": 2, "ended": "old"}]
    got = plumbing.with_ended(rows, torch.tensor([True, False]))
    assert got == [{"a": 1, "ended": True}, {"a": 2, "ended": False}]
    assert got[1]["ended"] is False and rows == [{"a": 1}, {"a": 2, "ended": "old"}]
    with pytest.raises(ValueError):
        plumbing.with_ended(rows, torch.tensor([True]))


# --- Device, tokenizer and prompts ----------------------------------------------------------------


@pytest.mark.parametrize(
    "cuda, mps, asked, want",
    [
        (True, True, "auto", "cuda"),
        (True, False, "auto", "cuda"),
        (False, True, "auto", "mps"),
        (False, False, "auto", "cpu"),
        (True, True, "cpu", "cpu"),
        (True, True, "mps", "mps"),
        (True, False, "cuda:1", "cuda:1"),
    ],
)
def test_the_device_is_the_best_there_is_or_the_one_asked_for(monkeypatch, cuda, mps, asked, want):
    def empty(*shape, device=None, **more):
        return SimpleNamespace(device=torch.device(device))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.mps, "is_available", lambda: mps, raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert plumbing.pick_device(asked) == torch.device(want)
    if not cuda:  # gloo exchanges no tensors of a Mac's GPU
        monkeypatch.setattr(plumbing, "process", lambda: (0, 2))
        assert plumbing.pick_device(asked) == CPU


def test_a_device_that_is_not_there():
    assert plumbing.pick_device("cpu") == CPU
    assert "--device nowhere" in message(plumbing.pick_device, "nowhere")


def test_a_tokenizer_is_loaded_or_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "good")
    assert plumbing.load_tokenizer(str(tmp_path / "good")).get_vocab() == tokenizer.get_vocab()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    text = message(plumbing.load_tokenizer, str(tmp_path / "no_eos"))
    assert "no_eos" in text and "no EOS" in text
    text = message(plumbing.load_tokenizer, str(tmp_path / "missing"))
    assert text.endswith("missing: no such folder, and no such tokenizer on the hub")
    (tmp_path / "empty").mkdir()
    text = message(plumbing.load_tokenizer, str(tmp_path / "empty"))
    assert "empty: no tokenizer in it that can be loaded" in text
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    text = message(plumbing.load_tokenizer, str(tmp_path / "run"))
    assert text.endswith(f"run: no tokenizer in it; did you mean {tmp_path / 'run' / 'final'}?")


def closing(tokenizer, form):
    """The tokenizer writes this around every text that it reads with special tokens."""
    special = [("<bos>", 2), ("<eos>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=form, special_tokens=special
    )
    return tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_prompt_of_a_template_has_one_bos():
    """Also where the tokenizer writes one itself; nothing comes after where the answer begins."""
    tokenizer = closing(make_tokenizer(), "<bos> $A <eos>")
    assert tokenizer("q")["input_ids"] == [2, *ids_of(tokenizer, "q"), 1]
    want = ids_of(tokenizer, "<bos>[user]q<eos>[assistant]")
    assert want[0] == 2 and want.count(2) == 1
    assert plumbing.encode_prompt(tokenizer, "q") == want
    assert plumbing.encode_prompt(tokenizer, [turn("user", "q")]) == want
    chat = [turn("system", "s"), turn("user", "q")]
    want = ids_of(tokenizer, "<bos>[system]s<eos>[user]q<eos>[assistant]")
    assert plumbing.encode_prompt(tokenizer, chat) == want


def test_a_template_that_refuses_is_said():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    text = message(plumbing.encode_prompt, tokenizer, "q")
    assert "The chat template refuses" in text and "no system" in text


def test_a_prompt_without_a_template_is_the_text():
    """With the BOS that the tokenizer writes, without the EOS that it closes a text with."""
    tokenizer = make_tokenizer(chat=False)
    text = ids_of(tokenizer, "ab")
    assert plumbing.encode_prompt(tokenizer, "ab") == text
    assert plumbing.encode_prompt(closing(tokenizer, "<bos> $A"), "ab") == [2, *text]
    assert plumbing.encode_prompt(closing(tokenizer, "<bos> $A <eos>"), "ab") == [2, *text]
    assert plumbing.encode_prompt(closing(tokenizer, "$A <eos>"), "ab<eos>") == [*text, 1]
    chat = message(plumbing.encode_prompt, tokenizer, [turn("user", "q")])
    assert "no chat template" in chat


def turns(end, start=""):
    """A tokenizer whose template ends a turn with `end`; it knows <turn> and <more>, too."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<more>"]})
    tokenizer.chat_template = (
        start + "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("end", ["<turn>\\n", "<turn><eos>", "\\n", "<eos>", ""])
@pytest.mark.parametrize("start", ["", "<bos>@@"])
def test_what_comes_after_an_answer(end, start):
    tokenizer = turns("{{ '" + end + "' }}", start)
    end = end.replace("\\n", "\n")
    for again in (tokenizer, closing(tokenizer, "<bos> $A <eos>")):
        assert common.after_answer(again) == ids_of(tokenizer, end)
    closing_token = "<turn>" if end == "<turn>\n" else "<eos>"
    assert plumbing.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(closing_token)


def test_without_a_template_a_completion_ends_with_the_eos():
    tokenizer = make_tokenizer(chat=False)
    assert common.after_answer(tokenizer) == [] and plumbing.end_of_turn(tokenizer) == 1


def test_the_first_special_id_ends_a_turn_and_not_what_is_before_it():
    tokenizer = turns("x<more><turn>")
    assert plumbing.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<more>")


@pytest.mark.parametrize("pad", ["<turn>", "<eos>", None])
def test_a_pad_that_is_an_end_is_changed(pad):
    """To the first special token that is no end and not the BOS."""
    tokenizer = turns("<turn>")
    tokenizer.pad_token = pad
    plumbing.set_other_pad(tokenizer)
    assert tokenizer.pad_token == "<pad>"


def test_a_pad_that_is_no_end_is_kept():
    tokenizer = turns("<turn>")
    tokenizer.pad_token = "<more>"
    plumbing.set_other_pad(tokenizer)
    assert tokenizer.pad_token == "<more>"


def test_the_bos_is_no_pad():
    """Where there is none but ends and the BOS, the pad stays as it was."""
    tokenizer = make_tokenizer(pad_is_eos=True)
    assert set(tokenizer.added_tokens_decoder) == {1, 2}
    plumbing.set_other_pad(tokenizer)
    assert tokenizer.pad_token == "<eos>"


def test_a_prompt_has_to_fit_with_its_completion():
    tokenizer, model = make_tokenizer(chat=False), make_model("llama")
    model.context = 10
    check = plumbing.check_prompts
    check(tokenizer, model, [{"prompt": "abcd"}, {"prompt": "a"}], 6)
    text = message(check, tokenizer, model, [{"prompt": "a"}, {"prompt": "abcd"}], 7)
    assert (
        "a prompt of 4 tokens with --max-new-tokens 7" in text and "10 (at most 6): 'abcd'" in text
    )
    assert "a prompt of 0 tokens" in message(check, tokenizer, model, [{"prompt": ""}], 6)
    model.context = math.inf
    check(tokenizer, model, [{"prompt": "a" * 999}], 999)


def embedding(size):
    return SimpleNamespace(
        context=100, get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(size, 2))
    )


def test_tokens_without_an_embedding_are_refused():
    """The tokenizer has 261 tokens, of which <turn> is 259 and <more> 260."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<more>"]})
    check = plumbing.check_vocabulary
    rows = [{"prompt": "a"}, {"prompt": [turn("user", "b<more>")]}]
    check(tokenizer, embedding(261), rows)
    check(tokenizer, embedding(400), rows)
    check(tokenizer, embedding(260), rows[:1])
    text = message(check, tokenizer, embedding(260), rows)
    assert "'<more>' is beyond the model's 260 embeddings" in text and "b<more>" in text
    text = message(plumbing.check_prompts, tokenizer, embedding(260), rows, 4)
    assert "'<more>' is beyond the model's 260 embeddings" in text
    ends = turns("<more>")
    check(ends, embedding(261), rows[:1])
    text = message(check, ends, embedding(260), rows[:1])
    assert text == "the tokenizer's turns have tokens beyond the model's 260 embeddings"
    plain_end = make_tokenizer(chat=False)  # here only the completion has the end
    plain_end.add_special_tokens({"additional_special_tokens": ["<turn>", "<more>"]})
    plain_end.eos_token = "<more>"
    assert "turns have tokens" in message(check, plain_end, embedding(260), rows[:1])
    starts = turns("<eos>", start="<more>")
    assert "turns have tokens" in message(check, starts, embedding(260), rows[:1])


# --- Models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Folder of a small llama that is stored in bfloat16, with dropout in its config."""
    folder = tmp_path_factory.mktemp("half")
    model = make_model("llama").to(torch.bfloat16)
    model.config.attention_dropout = 0.5
    model.save_pretrained(folder)
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    return str(folder)


def test_a_file_in_bfloat16_becomes_float32_weights(half):
    """The weights are those of the file, the model evaluates and is not autocast on the CPU."""
    model = plumbing.load_model(AutoModelForCausalLM, half, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    stored = load_file(Path(half) / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in stored:
            assert torch.equal(value, stored[name].float()), name
    assert not model.training and model.autocast_dtype is None
    assert model.recompute is False and model.has_new_head is False


def test_weights_go_to_the_device(half, monkeypatch):
    monkeypatch.setattr(plumbing, "_probe", lambda model, path: None)  # meta computes nothing
    model = plumbing.load_model(AutoModelForCausalLM, half, torch.device("meta"))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_dropout_is_off_even_in_training_mode(half, tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, resid_pdrop=0.3)
    config.embd_pdrop, config.attn_pdrop, config.summary_first_dropout = 0.2, 0.4, 0.5
    config.drop_something = 3  # a number, but no probability
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    got = plumbing.load_model(AutoModelForCausalLM, str(tmp_path), CPU).config
    rates = [got.resid_pdrop, got.embd_pdrop, got.attn_pdrop, got.summary_first_dropout]
    assert rates == [0.0] * 4 and got.drop_something == 3
    for scratch in (False, True):
        model = plumbing.load_model(AutoModelForCausalLM, half, CPU, from_scratch=scratch)
        assert model.config.attention_dropout == 0.0
        model.train()
        ids = torch.arange(20)[None]
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_from_scratch_has_the_shape_and_weights_of_its_own(half):
    """Float32, by torch's seed; no file of weights is read."""
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(plumbing.load_model(AutoModelForCausalLM, half, CPU, from_scratch=True))
    first, same, other = (model.model.layers[0].mlp.up_proj.weight for model in models)
    stored = load_file(Path(half) / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.shape == stored.shape and not torch.allclose(first, stored.float(), atol=1e-2)
    assert first.dtype == torch.float32 and not models[0].training


@pytest.mark.parametrize("labels", [1, 3])
def test_a_new_head_may_be_made(half, tmp_path, labels):
    """It is said that it was made; once it is in the file, it is that one."""
    kind = AutoModelForSequenceClassification
    torch.manual_seed(0)
    made = plumbing.load_model(kind, half, CPU, new_head=labels)
    assert made.has_new_head is True and made.score.weight.shape == (labels, 32)
    make_tokenizer().save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    there = plumbing.load_model(kind, str(tmp_path), CPU, new_head=labels)
    assert there.has_new_head is False and torch.equal(there.score.weight, made.score.weight)
    assert plumbing.load_model(kind, str(tmp_path), CPU).score.weight.shape == (labels, 32)


def test_a_head_named_classifier_is_a_head(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = plumbing.load_model(AutoModelForTokenClassification, str(tmp_path), CPU, new_head=3)
    assert model.has_new_head is True and model.classifier.weight.shape == (3, 16)


def test_weights_that_are_not_there_are_not_made_up(half, tmp_path):
    kind = AutoModelForSequenceClassification
    assert "no weights for score.weight" in message(plumbing.load_model, kind, half, CPU)
    stored = load_file(Path(half) / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    (tmp_path / "config.json").write_text((Path(half) / "config.json").read_text())
    left = {name: value for name, value in stored.items() if name != gone}
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for auto, head in ((AutoModelForCausalLM, 0), (kind, 1)):
        text = message(plumbing.load_model, auto, str(tmp_path), CPU, new_head=head)
        assert f"{tmp_path}: no weights for {gone} in it" in text
    text = message(plumbing.load_model, AutoModelForCausalLM, str(tmp_path / "missing"), CPU)
    assert text.endswith("missing: no such folder, and no such model on the hub")
    (tmp_path / "empty").mkdir()
    text = message(plumbing.load_model, AutoModelForCausalLM, str(tmp_path / "empty"), CPU)
    assert "empty: no model in it that can be loaded" in text
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    text = message(plumbing.load_model, AutoModelForCausalLM, str(tmp_path / "run"), CPU)
    assert text.endswith(f"run: no model in it; did you mean {tmp_path / 'run' / 'final'}?")


@pytest.mark.parametrize(
    "dtype, device, hardware, want",
    [
        ("auto", "cuda", "real", torch.bfloat16),
        ("auto", "cuda", "emulated", None),
        ("auto", "cuda", "none", None),
        ("auto", "cpu", "real", None),
        ("auto", "mps", "real", None),
        ("float32", "cuda", "real", None),
        ("bfloat16", "cuda", "none", torch.bfloat16),
        ("bfloat16", "cpu", "none", torch.bfloat16),
    ],
)
def test_which_forwards_are_in_bfloat16(half, monkeypatch, dtype, device, hardware, want):
    """auto: on cuda that has it in hardware. The weights are float32 in any case."""

    def is_supported(including_emulation=True):
        return hardware == "real" or (hardware == "emulated" and including_emulation)

    moved = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, to: moved.append(to) or self)
    device = torch.device(device)
    model = plumbing.load_model(AutoModelForCausalLM, half, device, dtype)
    assert model.autocast_dtype == want and moved[-1] == device
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_context_is_what_the_config_says(half, tmp_path):
    assert plumbing.load_model(AutoModelForCausalLM, half, CPU).context == 512
    config = json.loads((Path(half) / "config.json").read_text())
    endless = LlamaConfig(**config)
    endless.max_position_embeddings = 64
    model = LlamaForCausalLM(endless)
    model.save_pretrained(tmp_path)
    assert plumbing.load_model(AutoModelForCausalLM, str(tmp_path), CPU).context == 64


def test_a_model_without_a_longest_text_has_no_end(tmp_path):
    """Bloom's positions have no limit."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    assert plumbing.load_model(AutoModelForCausalLM, str(tmp_path), CPU).context == math.inf


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_is_on_where_it_is_asked_for(half, checkpointing):
    """Without reentrance, which would need inputs with a gradient."""
    model = plumbing.load_model(AutoModelForCausalLM, half, CPU, checkpointing=checkpointing)
    assert model.recompute is checkpointing
    assert model.is_gradient_checkpointing is checkpointing
    if checkpointing:
        call = model.model.layers[0]._gradient_checkpointing_func
        assert call.keywords["use_reentrant"] is False


# --- Gradient steps -------------------------------------------------------------------------------


def parameter(*gradient):
    p = torch.nn.Parameter(torch.zeros(len(gradient)))
    p.grad = torch.tensor(gradient)
    return p


def schedule(optimizer, *rates):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step])


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (-math.inf, 1.0), (1.0, math.inf)])
def test_a_step_that_is_not_finite_is_refused(loss, norm):
    plumbing.check_finite(1.0, 2.0)
    text = message(plumbing.check_finite, loss, norm)
    assert f"the loss is {loss}" in text and f"the norm of the gradient {norm}" in text
    assert "--learning-rate" in text


# --- The folder of a run: what is refused ---------------------------------------------------------


def some_args(folder, **changes):
    args = dict(model="m", output_dir=str(folder), resume=False, overwrite=False, seed=0)
    args |= dict(num_steps=3, checkpoint_every=2, learning_rate=0.1)
    return SimpleNamespace(**args | changes)


def begun(folder, parts=None, num_steps=3, **changes):
    """A run that has begun, in this folder."""
    run = plumbing.Run(some_args(folder, num_steps=num_steps, **changes))
    run.begin(parts or {}, num_steps)
    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


COUNTS = [
    "num_steps", "max_new_tokens", "micro_batch_size", "batch_size", "eval_every", "max_length",
    "num_generations", "num_epochs", "ptx_batch_size", "rounds", "checkpoint_every",
]  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_at_least_one(tmp_path, name):
    folder = tmp_path / "run"
    for value in (0, -1):
        text = message(plumbing.Run, some_args(folder, **{name: value}))
        assert f"--{name.replace('_', '-')} {value}: must be at least 1" in text
    plumbing.Run(some_args(folder, **{name: 1}))
    assert not folder.exists()


def test_other_numbers_are_at_least_zero(tmp_path):
    """Also such as begin like a count and are none: a largest norm of 0.5."""
    folder = tmp_path / "run"
    zero = dict(eval_size=0, top_k=0, iterations=0, seed=0, beta=0.0)
    plumbing.Run(some_args(folder, **zero, max_grad_norm=0.5, penalty=None, reward="-1"))
    for name in [*zero, "max_grad_norm", "learning_rate"]:
        for value in (-1, -0.5):
            text = message(plumbing.Run, some_args(folder, **{name: value}))
            assert f"--{name.replace('_', '-')} {value}: must be at least" in text


LIMITS = {
    "seed": (0, 2**63 - 1, -1, 2**63),
    "learning_rate": (0.0, 1.0, -1e-9, 1.001),
    "critic_learning_rate": (0.0, 1.0, -1e-9, 1.001),
    "weight_decay": (0.0, 1.0, -0.1, 1.1),
    "warmup_ratio": (0.0, 1.0, -0.1, 1.1),
    "label_smoothing": (0.0, 0.5, -0.1, 0.51),
    "gamma": (0.0, 1.0, -0.1, 1.01),
    "lam": (0.0, 1.0, -0.1, 1.01),
    "moving_decay": (0.0, 1.0, -0.1, 1.01),
    "temperature": (0.0, 100.0, -0.1, 101.0),
    "judge_temperature": (0.0, 100.0, -0.1, 101.0),
    "feedback_temperature": (0.0, 100.0, -0.1, 101.0),
    "max_grad_norm": (1e-9, 1e300, 0.0, None),
    "eta": (1e-9, 1e300, 0.0, None),
    "kl_horizon": (1, 10**9, 0, None),
    "rounds": (1, 10**9, 0, None),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_flag_has_a_smallest_and_a_largest_value(tmp_path, name):
    assert plumbing.RANGES.keys() == LIMITS.keys()
    least, most, below, above = LIMITS[name]
    flag = f"--{name.replace('_', '-')}"
    for value in (least, most):
        plumbing.Run(some_args(tmp_path / "run", **{name: value}))
    text = message(plumbing.Run, some_args(tmp_path / "run", **{name: below}))
    assert text == f"{flag} {below}: must be at least {least:.4g}"
    if above is not None:
        text = message(plumbing.Run, some_args(tmp_path / "run", **{name: above}))
        assert text.startswith(f"{flag} {above}: must be at most {str(most).removesuffix('.0')}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["beta", "learning_rate", "eta", "max_grad_norm", "temperature"])
def test_a_flag_is_finite(tmp_path, name, value):
    text = message(plumbing.Run, some_args(tmp_path / "run", **{name: value}))
    assert text == f"--{name.replace('_', '-')} {value}: must be a finite number"


def test_a_temperature_is_none_or_not_tiny(tmp_path):
    """Logits divided by less than 0.01 overflow; 0 means the likeliest tokens."""
    for value in (0.0, 0, 0.01, 1.5):
        plumbing.Run(some_args(tmp_path / "run", temperature=value))
    text = message(plumbing.Run, some_args(tmp_path / "run", temperature=0.009))
    assert text.startswith("--temperature 0.009: must be at least 0.01, or 0")


def test_the_range_of_a_flag_is_in_its_help(monkeypatch, capsys):
    @dataclass
    class Ranged:
        model: str  # a folder
        dataset: str  # a file
        gamma: float = 1.0  # of the future
        rounds: int = 2  # of sampling
        penalty: float | None = None  # for no end
        num_steps: int = 3  # to do
        no_number: bool = False

    monkeypatch.setattr("sys.argv", ["grpo.py", "--help"])
    helps = {"gamma": "of the future", "rounds": "of sampling", "penalty": "for no end"}
    helps |= {"num_steps": "to do", "model": "", "dataset": "", "no_number": "no number"}
    monkeypatch.setattr(plumbing, "_help_texts", lambda Args: helps)
    with pytest.raises(SystemExit):
        plumbing.parse_args(Ranged, {"model": "toy/model", "dataset": "toy/rows.jsonl"})
    text = re.sub(r"[\s│|]+", " ", capsys.readouterr().out)
    assert "of the future [0 to 1]" in text and "of sampling [1 or more]" in text
    assert "for no end [0 or more]" in text and "to do [1 or more]" in text
    assert "no number [" not in text


def test_a_folder_that_is_there_is_not_begun_anew(tmp_path):
    folder = tmp_path / "run"
    begun(folder).log({"a": 1.0})
    text = message(plumbing.Run, some_args(folder))
    assert f"{folder} exists: use --resume or --overwrite, or another --output-dir" in text
    for flag in ("resume", "overwrite"):
        assert plumbing.Run(some_args(folder, **{flag: True})).step == 0
    assert "--resume: no run" in message(plumbing.Run, some_args(tmp_path / "no", resume=True))


@pytest.mark.parametrize("args", [None, "[]", "no json", '{"seed": 0}', '{"script": ""}'])
def test_a_folder_of_someone_else_is_left_alone(tmp_path, args):
    """One with files and without our args.json, whatever the flags."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("mine")
    if args is not None:
        (folder / "args.json").write_text(args)
    assert "exists: use" in message(plumbing.Run, some_args(folder))
    text = message(plumbing.Run, some_args(folder, overwrite=True))
    assert text == f"--overwrite: {folder} holds no run of these scripts: nothing in it is replaced"
    if args is None:
        assert "--resume: no run in" in message(plumbing.Run, some_args(folder, resume=True))
    assert (folder / "metrics.jsonl").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    begun(tmp_path / "empty")


@pytest.mark.parametrize("given", ["", " ", ".", "~", "here", "../here", "~/"])
def test_a_run_has_a_folder_of_its_own(tmp_path, monkeypatch, given):
    """Not the working folder, not the home folder; both with a run's marker in them, as if."""
    here, home = tmp_path / "here", tmp_path / "home"
    for folder in (here, home):
        folder.mkdir()
        (folder / "args.json").write_text('{"script": "grpo"}')
        (folder / "final").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    given = str(here) if given == "here" else given
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        text = message(plumbing.Run, some_args(given, **flags))
        assert text == f"--output-dir {given!r}: a run needs a folder of its own"
    plumbing.Run(some_args("~/run")).begin({}, 3)
    assert (home / "run" / "args.json").exists() and not (here / "~").exists()


def test_a_link_and_a_file_are_no_folder_of_a_run(tmp_path):
    begun(tmp_path / "run")
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(tmp_path / "run")
    file.write_text("mine")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        text = message(plumbing.Run, some_args(link, **flags))
        assert text == f"--output-dir {link} is a link: give the folder that it leads to"
    for flags in ({}, {"overwrite": True}):
        assert message(plumbing.Run, some_args(file, **flags)) == f"--output-dir {file} is a file"
    assert "--resume: no run" in message(plumbing.Run, some_args(file, resume=True))
    assert file.read_text() == "mine"


def test_a_start_that_failed_is_no_run_to_keep(tmp_path):
    """It left args.json and the lock, and nothing that took time."""
    folder = tmp_path / "run"
    begun(folder)
    assert {path.name for path in folder.iterdir()} == {"args.json", "lock"}
    (folder / "args.json.new").write_text("half")
    begun(folder, seed=5)
    assert json.loads((folder / "args.json").read_text())["seed"] == 5
    begun(folder, seed=5, resume=True)
    (folder / "notes.txt").write_text("mine")
    assert "exists: use" in message(plumbing.Run, some_args(folder))


HOLD = """
import sys, time, types
sys.path.insert(0, {root!r})
import plumbing
args = types.SimpleNamespace(output_dir={folder!r}, resume=False, overwrite=False)
run = plumbing.Run(args)
run.begin({{}}, 3)
print("begun", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    """While another process has begun there; once it is gone, even killed, the folder is free."""
    folder = tmp_path / "run"
    code = HOLD.format(root=str(ROOT), folder=str(folder))
    other = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "begun\n"
        before = (folder / "args.json").read_text()
        for flags in ({}, {"overwrite": True}):
            run = plumbing.Run(some_args(folder, **flags))
            assert message(run.begin, {}, 3) == f"another run is writing to {folder}"
        assert (folder / "args.json").read_text() == before
    finally:
        other.kill()
        other.communicate()
    begun(folder)
    assert json.loads((folder / "args.json").read_text())["model"] == "m"


def test_a_run_that_began_meanwhile_is_not_begun_anew(tmp_path):
    """Between the check of the flags and begin there are minutes of loading."""
    folder = tmp_path / "run"
    late = plumbing.Run(some_args(folder))
    begun(folder).log({"a": 1.0})
    assert "exists: use" in message(late.begin, {}, 3)
    assert read(folder / "metrics.jsonl")[0]["a"] == 1.0


@pytest.mark.parametrize("given", ["relative folder", "relative model", "both", "neither"])
def test_overwrite_does_not_delete_what_it_reads(tmp_path, monkeypatch, given):
    """However the paths of the folder and of the model in it are written."""
    monkeypatch.chdir(tmp_path)
    folder, model = tmp_path / "run", tmp_path / "run" / "final" / "deep"
    begun(folder).log({"a": 1.0})
    model.mkdir(parents=True)
    outside = tmp_path / "running"
    outside.mkdir()
    shown = "run" if given in ("relative folder", "both") else str(folder)
    start = Path("x/..") if given in ("relative model", "both") else tmp_path
    (tmp_path / "x").mkdir()
    inside = str(start / "run" / "final" / "deep")
    text = message(plumbing.Run, some_args(shown, model=inside, overwrite=True))
    wanted = f"--overwrite: the run in {shown} holds {inside}, which this command reads"
    assert text == wanted
    text = message(plumbing.Run, some_args(shown, eval_dataset=inside, overwrite=True))
    assert text == wanted
    (folder / "mine.py").write_text("")
    reward = str(start / "run" / "mine.py") + ":f"
    text = message(plumbing.Run, some_args(shown, reward=reward, overwrite=True))
    assert "mine.py, which this command reads" in text
    plumbing.Run(some_args(shown, model=str(outside), overwrite=True))
    plumbing.Run(some_args(shown, model=str(folder / "missing"), overwrite=True))
    assert model.exists()


def test_a_model_of_the_run_itself_may_be_read_where_nothing_is_deleted(tmp_path):
    folder = tmp_path / "run"
    args = some_args(folder, model=str(folder / "args.json"))
    plumbing.Run(args).begin({}, 3)
    args.resume = True
    plumbing.Run(args)


def test_resume_needs_the_same_flags(tmp_path, capsys):
    folder = tmp_path / "run"
    begun(folder)
    for name, value, old in (("seed", 1, 0), ("learning_rate", 0.2, 0.1), ("model", "n", "m")):
        text = message(plumbing.Run, some_args(folder, resume=True, **{name: value}))
        flag = f"--{name.replace('_', '-')}"
        assert f"began with {flag} {old}, not {value} (only --num-steps may change)" in text
    assert "--new None, not 1" in message(plumbing.Run, some_args(folder, resume=True, new=1))
    plumbing.Run(some_args(f"{folder}/", resume=True))
    folder = folder.rename(tmp_path / "moved")
    plumbing.Run(some_args(folder, resume=True))
    capsys.readouterr()
    plumbing.Run(some_args(folder, resume=True, overwrite=True))
    assert capsys.readouterr().out == ""
    plumbing.Run(some_args(folder, resume=True, num_steps=9))
    said = "--num-steps 9, begun with 3: from here on the learning rate is that of a run of 9 steps"
    assert capsys.readouterr().out == said + "\n"


def test_resume_needs_the_same_script(tmp_path):
    folder = tmp_path / "run"
    begun(folder)
    args = json.loads((folder / "args.json").read_text())
    assert args["script"] == "types"  # the module of these tests' args
    (folder / "args.json").write_text(json.dumps(args | {"script": "grpo"}))
    text = message(plumbing.Run, some_args(folder, resume=True))
    assert text == f"--resume: {folder} was begun by grpo.py"
    for name in ("script", "inputs"):  # of a run that is older than these
        del args[name]
    (folder / "args.json").write_text(json.dumps(args))
    plumbing.Run(some_args(folder, resume=True))
    (folder / "args.json").write_text("{")
    assert "--resume: cannot read" in message(plumbing.Run, some_args(folder, resume=True))


def test_resume_needs_the_same_files(tmp_path):
    """Files are compared by what is in them, also those of a reward; folders are not."""
    folder, data, mine = tmp_path / "run", tmp_path / "rows.jsonl", tmp_path / "mine.py"
    model = tmp_path / "model"
    model.mkdir()
    data.write_text("rows")
    mine.write_text("code")
    files = dict(dataset=str(data), reward=f"{mine}:f", model=str(model))
    begun(folder, **files)
    inputs = json.loads((folder / "args.json").read_text())["inputs"]
    assert inputs.keys() == {str(data), str(mine), str(model)} and inputs[str(model)] == ""
    data.write_text("rows")
    (model / "config.json").write_text("{}")
    plumbing.Run(some_args(folder, resume=True, **files))
    for path in (data, mine):
        text = path.read_text()
        path.write_text(text + "\n")
        said = message(plumbing.Run, some_args(folder, resume=True, **files))
        assert said == f"--resume: {path} is no longer what it was when the run began"
        path.write_text(text)
    plumbing.Run(some_args(folder, resume=True, **files))


# --- Begin, checkpoint and resume -----------------------------------------------------------------


def test_nothing_is_written_before_begin(tmp_path):
    folder = tmp_path / "deep" / "run"
    run = plumbing.Run(some_args(folder))
    assert not folder.parent.exists()
    run.begin({}, 3)
    more = {"script": "types", "inputs": {}}
    assert json.loads((folder / "args.json").read_text()) == vars(run.args) | more
    assert {path.name for path in folder.iterdir()} == {"args.json", "lock"}


WRITTEN = [
    "metrics.jsonl", "samples.jsonl", "curves.png", "reward_histogram.png", "best_of_n.png",
    "checkpoint/state.pt", "final/model.safetensors", "critic/config.json",
    "pairs/1.jsonl", "candidates/1.jsonl", "final.old/config.json", "checkpoint/state.pt.new",
    "final.new/config.json", "curves.png.new",
]  # fmt: skip


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    begun(folder).checkpoint()
    mine = ["notes.txt", "data.jsonl", "final2/model.safetensors", "figures/a.png"]
    for name in WRITTEN + mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("mine")
    shutil.rmtree(folder / "critic")
    (folder / "critic").symlink_to(elsewhere)  # the link goes, what it leads to stays
    run = begun(folder, overwrite=True, seed=4)
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
    assert left == {"args.json", "lock", *mine} and run.step == 0
    assert [(folder / name).read_text() for name in mine] == ["old"] * 4
    assert not (folder / "critic").is_symlink() and (elsewhere / "kept").read_text() == "mine"
    assert json.loads((folder / "args.json").read_text())["seed"] == 4


def make_parts(seed):
    """One of each kind: a model, its optimiser after a step, its scheduler, a plain object."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model(torch.rand(1, 2)).sum().backward()
    optimizer.step()
    for _ in range(seed):
        scheduler.step()
    plain = SimpleNamespace(mean=float(seed), seen=seed)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "plain": plain}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_a_checkpoint_brings_back_every_part(tmp_path):
    folder, parts = tmp_path / "run", make_parts(2)
    run = begun(folder, parts)
    list(run.steps())
    run.checkpoint()
    other = make_parts(5)
    run = begun(folder, other, resume=True)
    assert run.step == 3
    assert same(other["model"].state_dict(), parts["model"].state_dict())
    assert same(other["scheduler"].state_dict(), parts["scheduler"].state_dict())
    assert other["scheduler"].get_last_lr() == [1 / 3]
    ours, theirs = (x["optimizer"].state_dict() for x in (other, parts))
    assert same(ours["state"], theirs["state"]) and ours["param_groups"] == theirs["param_groups"]
    assert vars(other["plain"]) == {"mean": 2.0, "seen": 2}


def test_a_checkpoint_brings_back_the_random_numbers(tmp_path, monkeypatch):
    """Of torch, of Python, and of cuda, of which some are pretended."""
    put = []
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.tensor([7, 8])])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put.extend)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run = begun(tmp_path / "run")
    torch.manual_seed(11)
    random.seed(11)
    run.checkpoint()
    want = torch.rand(3).tolist(), random.random()
    torch.manual_seed(12)
    random.seed(12)
    begun(tmp_path / "run", resume=True)
    assert (torch.rand(3).tolist(), random.random()) == want
    assert [state.tolist() for state in put] == [[7, 8]]


def test_a_checkpoint_of_more_gpus_than_there_are_now(tmp_path, monkeypatch):
    put = []
    monkeypatch.setattr(
        torch.cuda, "get_rng_state_all", lambda: [torch.tensor([i]) for i in (5, 6)]
    )
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put.extend)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    begun(tmp_path / "run").checkpoint()
    begun(tmp_path / "run", resume=True)
    assert [state.tolist() for state in put] == [[5]]


def test_a_checkpoint_cuts_off_what_came_after_it(tmp_path):
    folder = tmp_path / "run"
    run = begun(folder)
    run.append("metrics.jsonl", [{"a": 1}, {"a": 2}])
    run.append("samples.jsonl", [{"b": 1}])
    run.checkpoint()
    run.append("metrics.jsonl", [{"a": 3}])
    (folder / "samples.jsonl").open("a").write('{"b": ')
    (folder / "notes.jsonl").write_text("mine")
    begun(folder, resume=True)
    assert read(folder / "metrics.jsonl") == [{"a": 1}, {"a": 2}]
    assert read(folder / "samples.jsonl") == [{"b": 1}]
    assert (folder / "notes.jsonl").read_text() == "mine"


def test_a_log_that_began_after_the_checkpoint_is_emptied(tmp_path):
    folder = tmp_path / "run"
    run = begun(folder)
    run.checkpoint()
    run.append("samples.jsonl", [{"b": 1}])
    begun(folder, resume=True)
    assert (folder / "samples.jsonl").read_text() == ""
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("left", ["", '{"a"', None])
def test_a_log_shorter_than_at_the_checkpoint_is_said(tmp_path, name, left):
    """Cutting to a size cannot bring back what is gone: zeros would come in its place."""
    folder = tmp_path / "run"
    run = begun(folder)
    run.append(name, [{"a": 1}])
    run.checkpoint()
    (folder / name).unlink()
    if left is not None:
        (folder / name).write_text(left)
    text = message(begun, folder, resume=True)
    assert text == f"--resume: {folder / name} is shorter than it was at the checkpoint"
    assert left is None or (folder / name).read_text() == left


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_are_not_saved(tmp_path, bad):
    """The checkpoint before them stays."""
    model = torch.nn.Linear(2, 2)
    run = begun(tmp_path / "run", {"model": model, "plain": SimpleNamespace(a=math.nan)})
    run.step = 1
    run.checkpoint()
    run.step = 2
    model.bias.data[1] = bad
    text = message(run.checkpoint)
    assert text.startswith("step 2 broke the weights (model): lower --learning-rate")
    text = message(run.finish, Saved("tokenizer"), {"final": Saved("model")})
    assert "broke the weights" in text and not (tmp_path / "run" / "final").exists()
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 1 and state["model"]["bias"].isfinite().all()


def falling(num_steps, model):
    """An optimiser and its schedule, whose rate falls from 1 to 0 over the steps of the run."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    share = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    return optimizer, share


def test_another_number_of_steps_has_the_rate_of_its_schedule(tmp_path):
    """After 2 of 4 steps the rate is 1 - 2/4; of a run of 8 it is 1 - 2/8, then 1 - 3/8."""
    folder, model = tmp_path / "run", torch.nn.Linear(1, 1)
    optimizer, scheduler = falling(4, model)
    run = begun(folder, {"optimizer": optimizer, "scheduler": scheduler}, num_steps=4)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    run.checkpoint()
    optimizer, scheduler = falling(8, model)
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    begun(folder, parts, num_steps=8, resume=True)
    assert optimizer.param_groups[0]["lr"] == 0.75 and scheduler.get_last_lr() == [0.75]
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.625


def test_without_a_checkpoint_a_resumed_run_begins_again(tmp_path):
    folder = tmp_path / "run"
    begun(folder).append("metrics.jsonl", [{"a": 1}])
    before = (folder / "args.json").stat().st_mtime_ns
    run = begun(folder, resume=True)
    assert run.step == 0 and (folder / "metrics.jsonl").read_text() == ""
    assert (folder / "args.json").stat().st_mtime_ns == before


def test_a_checkpoint_that_cannot_be_read(tmp_path):
    folder = tmp_path / "run"
    begun(folder).checkpoint()
    (folder / "checkpoint" / "state.pt").write_bytes(b"PK half")
    text = message(begun, folder, resume=True)
    assert "--resume: cannot read" in text and "state.pt" in text


def test_steps_are_counted_and_kept(tmp_path, monkeypatch):
    """After every second one, its body done, there is a checkpoint of it."""
    folder, plain = tmp_path / "run", SimpleNamespace(done=[])
    run = begun(folder, {"plain": plain}, num_steps=5)
    kept = []
    save = torch.save

    def saving(state, path):
        kept.append((state["step"], list(state["plain"]["done"])))
        save(state, path)

    monkeypatch.setattr(torch, "save", saving)
    for step in run.steps():
        assert step == run.step
        plain.done.append(step)
    assert plain.done == [1, 2, 3, 4, 5]
    assert kept == [(2, [1, 2]), (4, [1, 2, 3, 4])]
    again = SimpleNamespace(done=[])
    run = begun(folder, {"plain": again}, num_steps=6, resume=True)
    assert run.step == 4 and list(run.steps()) == [5, 6] and again.done == [1, 2, 3, 4]


def test_a_finished_run_has_no_steps_left(tmp_path):
    run = begun(tmp_path / "run", num_steps=2)
    assert list(run.steps()) == [1, 2] and list(run.steps()) == []


def test_seconds_are_those_since_the_run_began(tmp_path, monkeypatch):
    """A resumed run adds them to those of its checkpoint; the time between counts for nothing."""
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    run = begun(tmp_path / "run")
    now[0] = 112.34567
    run.log({"a": 1.0})
    assert read(tmp_path / "run" / "metrics.jsonl")[0]["seconds"] == 12.346
    run.checkpoint()
    now[0] = 900.0
    run = begun(tmp_path / "run", resume=True)
    now[0] = 901.0
    run.log({"a": 1.0})
    assert read(tmp_path / "run" / "metrics.jsonl")[1]["seconds"] == 13.346


# --- Log and samples ------------------------------------------------------------------------------


def test_a_row_of_metrics_has_six_figures_and_none_that_is_not_finite(tmp_path):
    run = begun(tmp_path / "run")
    run.step = 2
    values = {"a": 1.23456789, "b": torch.tensor(1234567.8), "c": 3, "d": 1.5e-12}
    run.log(values | {"e": math.nan, "f": torch.tensor(math.inf), "g": True, "h": -math.inf})
    row = read(tmp_path / "run" / "metrics.jsonl")[0]
    assert row.pop("seconds") < 60
    assert row == {"a": 1.23457, "b": 1234570.0, "c": 3.0, "d": 1.5e-12, "g": 1.0, "step": 2}


def lines_of(run, capsys, step, *show, **metrics):
    run.step = step
    run.log(metrics, *show)
    return capsys.readouterr().out.splitlines()


def test_which_rows_are_printed(tmp_path, capsys):
    """One in num_steps // 20, in a line of the figures to be shown; evaluations always."""
    run = begun(tmp_path / "run", num_steps=60)
    want = ["step 3/60  kl 0.1235  reward 2"]
    assert lines_of(run, capsys, 3, "kl", "reward", reward=2.0, kl=0.123456, lr=1.0) == want
    assert lines_of(run, capsys, 4, "kl", kl=1.0) == lines_of(run, capsys, 5, "kl", kl=1.0) == []
    assert lines_of(run, capsys, 6, "kl", "reward", kl=math.nan) == []
    want = ["step 4/60  eval_loss 0.5"]
    assert lines_of(run, capsys, 4, "eval_loss", eval_loss=0.5) == want
    assert lines_of(run, capsys, 0, "kl", kl=1.0) == ["step 0/60  kl 1"]
    few = begun(tmp_path / "few", num_steps=5)
    printed = [step for step in range(6) if lines_of(few, capsys, step, "kl", kl=1.0)]
    assert printed == [0, 1, 2, 3, 4, 5]


def test_at_a_terminal_the_bar_shows_the_figures(tmp_path, capsys, monkeypatch):
    run = begun(tmp_path / "run")
    shown = []
    assert lines_of(run, capsys, 0, "kl", kl=1.0) == ["step 0/3  kl 1"] and shown == []
    run.bar = SimpleNamespace(set_postfix=shown.append, disable=False)
    assert lines_of(run, capsys, 1, "kl", "no", kl=0.123456) == [] and shown == [{"kl": "0.1235"}]


def test_many_completions_without_an_end_are_warned_of(tmp_path, capsys):
    """Once, in one line that names the remedy."""
    run = begun(tmp_path / "run")
    run.args.max_new_tokens = 7
    for metrics in ({}, {"ended": 0.8}, {"ended": torch.tensor(1.0)}):
        run.log(metrics)
    assert capsys.readouterr().err == ""
    run.log({"ended": torch.tensor(0.75)})
    run.log({"ended": torch.tensor(0.5)})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "25%" in lines[0] and "--max-new-tokens 7" in lines[0]


def test_three_steps_of_equal_rewards_are_warned_of(tmp_path, capsys):
    """In a row, once; rows without rewards, such as evaluations, do not count."""
    run = begun(tmp_path / "run")
    for std in (0.0, 0.0, 0.1, 0.0, torch.tensor(0.0)):
        run.log({"reward_std": std})
        run.log({"eval_reward": 1.0})
    assert capsys.readouterr().err == ""
    run.log({"reward_std": 0.0})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: all rewards of the last three steps")
    for _ in range(6):
        run.log({"reward_std": 0.0})
    run.log({"reward_std": 1.0})
    for _ in range(3):
        run.log({"reward_std": 0.0})
    assert capsys.readouterr().err == ""


def test_what_is_about_to_run_is_printed(tmp_path, capsys):
    run = begun(tmp_path / "run", num_steps=3)
    run.args.eval_dataset = ""
    model = SimpleNamespace(
        parameters=lambda: [torch.zeros(1000, 1234), torch.zeros(5)],
        autocast_dtype=None,
        device=CPU,
    )
    capsys.readouterr()
    run.describe(model, 40, 4, "2 prompts")
    lines = ["m: 1.2 million parameters, on cpu in float32"]
    lines += ["40 training rows, 4 held out; 3 steps of 2 prompts"]
    assert capsys.readouterr().out.splitlines() == lines
    run.args.from_scratch, run.args.eval_dataset, run.step = True, "e.jsonl", 1
    model.autocast_dtype = torch.bfloat16
    run.describe(model, 40, 4, "2 prompts")
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("drawn at random (--from-scratch), on cpu in bfloat16 autocast")
    assert "4 held out (e.jsonl);" in second and third.startswith("goes on after step 1 of ")
    run.step = 3
    run.describe(model, 40, 0, "2 prompts")
    _, second, third = capsys.readouterr().out.splitlines()
    assert "0 held out;" in second and third.startswith("all 3 steps of ") and "are done" in third


def test_samples_are_rows_of_their_step(tmp_path):
    run = begun(tmp_path / "run")
    run.args.log_samples = 2
    run.step = 2
    run.samples(["p", "q"], ["c", "d"], [1.0, 0.0])
    run.samples(["r"], ["e"])
    want = [(2, "p", "c", 1.0), (2, "q", "d", 0.0), (2, "r", "e", None)]
    names = ["step", "prompt", "completion", "reward"]
    rows = read(tmp_path / "run" / "samples.jsonl")
    assert rows == [dict(zip(names, row, strict=True)) for row in want]
    for bad in ((["p"], ["c", "d"], [1.0]), (["p"], ["c"], [1.0, 2.0]), (["p", "q"], ["c"])):
        with pytest.raises(ValueError):
            run.samples(*bad)


def test_rows_are_added_or_replaced(tmp_path):
    run = begun(tmp_path / "run")
    for number in (1, 2):
        run.append("a.jsonl", [{"n": number}, {"n": -number}])
        run.write_rows("pairs/b.jsonl", [{"n": number}])
    assert [row["n"] for row in read(tmp_path / "run" / "a.jsonl")] == [1, -1, 2, -2]
    assert read(tmp_path / "run" / "pairs" / "b.jsonl") == [{"n": 2}]
    assert [path.name for path in (tmp_path / "run" / "pairs").iterdir()] == ["b.jsonl"]
    text = message(run.append, "no/a.jsonl", [{}])
    assert "cannot write" in text and "no/a.jsonl" in text


# --- What a run leaves ----------------------------------------------------------------------------


class Saved:
    """A model or tokenizer that writes a file of this name into the folder it is saved to."""

    def __init__(self, name, text="new"):
        self.name, self.text = name, text

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(self.text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_finish_saves_each_model_with_the_tokenizer(tmp_path, capsys):
    folder = tmp_path / "run"
    run = begun(folder)
    run.log({"a": 1.0})
    run.step = 3
    run.log({"a": 2.0})
    capsys.readouterr()
    run.finish(Saved("tokenizer"), {"final": Saved("model", "1"), "critic": Saved("model", "2")})
    assert contents(folder / "final") == {"tokenizer": "new", "model": "1"}
    assert contents(folder / "critic") == {"tokenizer": "new", "model": "2"}
    assert torch.load(folder / "checkpoint" / "state.pt")["step"] == 3
    out = capsys.readouterr().out
    assert f"saved {folder} after" in out
    assert (folder / "curves.png").stat().st_size > 1000


def test_a_folder_is_replaced_whole(tmp_path):
    """What an older model had and what a killed run left are gone; so are .new and .old."""
    folder = tmp_path / "run"
    run = begun(folder)
    run.log({"a": 1.0})
    for name in ("final", "final.new", "final.old"):
        (folder / name).mkdir()
        (folder / name / "left").write_text("old")
    run.finish(Saved("tokenizer"), {"final": Saved("model")})
    assert contents(folder / "final") == {"tokenizer": "new", "model": "new"}
    assert not (folder / "final.new").exists() and not (folder / "final.old").exists()


def test_what_cannot_be_written_leaves_the_old(tmp_path):
    folder = tmp_path / "run"
    run = begun(folder)
    run.log({"a": 1.0})
    run.finish(Saved("tokenizer"), {"final": Saved("model")})

    class Full:
        def save_pretrained(self, folder):
            raise OSError("No space left")

    text = message(run.finish, Saved("tokenizer"), {"final": Full()})
    assert f"cannot write {folder / 'final'}; what was there is left" in text
    assert "No space left" in text and contents(folder / "final")["model"] == "new"


def test_at_every_moment_the_old_folder_or_the_new_one_is_there(tmp_path, monkeypatch):
    """Also when a kill comes between the two moves, and then another run, killed there again."""
    folder = tmp_path / "run"
    run = begun(folder)
    run.log({"a": 1.0})
    run.finish(Saved("tokenizer"), {"final": Saved("model", "old")})
    move = os.replace

    def killed(source, target):
        if str(source).endswith("final.new"):
            raise KeyboardInterrupt
        move(source, target)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                run.finish(Saved("tokenizer"), {"final": Saved("model", "newer")})
        there = [folder / name for name in ("final", "final.old", "final.new")]
        whole = [contents(path) for path in there if path.exists()]
        assert any(x.keys() == {"model", "tokenizer"} for x in whole)


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = tmp_path / "run"
    run = begun(folder)
    run.log({"a": 1.0})
    run.finish(Saved("tokenizer"), {"final": Saved("model")})
    run.histogram({"a": [1.0]})
    assert not list(folder.glob("*.png")) and (folder / "final").exists()


def test_curves_are_metrics_against_the_step(tmp_path, monkeypatch):
    """Metrics that vary, each with its axes, the important ones first; evaluations marked."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []

    def plot(axes, x, y, marker):
        place = axes.get_subplotspec().num1
        drawn.append((place, axes.get_title(), list(x), list(y), marker, axes.get_xlabel()))

    monkeypatch.setattr(Axes, "plot", plot)
    run = begun(tmp_path / "run")
    rows = {0: {"eval_loss": 0.5}, 1: {"kl": 1.0, "a": 0.1}, 2: {"kl": 4.0, "a": 0.2}}
    for step, row in rows.items():
        run.step = step
        run.log(row | {"constant": 3.0})
    run.step = 7
    run.log({"eval_loss": 0.75, "once": 1.0})
    run.finish(Saved("tokenizer"), {})
    assert sorted(drawn) == [
        (0, "eval_loss", [0, 7], [0.5, 0.75], "o", "step"),
        (1, "kl", [1, 2], [1.0, 4.0], "", "step"),
        (2, "a", [1, 2], [0.1, 0.2], "", "step"),
    ]
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_histogram_of_labelled_values(tmp_path, monkeypatch):
    """One over the other, each with its label, in the same bins."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []

    def hist(axes, x, *args, **options):
        drawn.append((options["label"], torch.as_tensor(x).tolist(), options["range"]))

    monkeypatch.setattr(Axes, "hist", hist)
    run = begun(tmp_path / "run")
    run.histogram({"chosen": torch.tensor([1.0, 2.0]), "rejected": torch.tensor([-1.0])})
    assert drawn == [("chosen", [1.0, 2.0], (-1, 2)), ("rejected", [-1.0], (-1, 2))]
    assert (tmp_path / "run" / "reward_histogram.png").stat().st_size > 1000


def test_tokenizers_and_models_that_were_saved_load_again(tmp_path, tiny):
    """finish() with real ones: the same weights and words come back."""
    run = begun(tmp_path / "run")
    run.log({"a": 1.0})
    model = plumbing.load_model(AutoModelForCausalLM, tiny, CPU)
    run.finish(AutoTokenizer.from_pretrained(tiny), {"final": model})
    again = plumbing.load_model(AutoModelForCausalLM, str(tmp_path / "run" / "final"), CPU)
    assert same(again.state_dict(), model.state_dict())
    tokenizer = plumbing.load_tokenizer(str(tmp_path / "run" / "final"))
    assert plumbing.encode_prompt(tokenizer, "1+2")[-1] == tokenizer.convert_tokens_to_ids(
        "<assistant>"
    )


# --- Signals --------------------------------------------------------------------------------------


@pytest.fixture
def usual_signals():
    """Handlers as of a program in the foreground: one in the background may ignore both."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def terminated(number, frame):
        raise ChildProcessError("SIGTERM")  # in place of the end of the process that runs the tests

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminated)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves_a_checkpoint(tmp_path, capsys, number, usual_signals):
    before = signal.getsignal(number)
    counter = SimpleNamespace(steps_done=0)
    run = begun(tmp_path / "run", {"counter": counter}, num_steps=5, checkpoint_every=100)
    with pytest.raises(SystemExit) as stopped:
        for step in run.steps():
            if step == 2:
                os.kill(os.getpid(), number)
            counter.steps_done = step  # the rest of the step
    assert stopped.value.code == 130
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 2 and state["counter"] == {"steps_done": 2}
    out = capsys.readouterr().out
    assert f"stopped by {number.name} after step 2" in out and "--resume" in out
    assert signal.getsignal(number) is before


def test_a_run_leaves_the_signals_as_they_were(tmp_path, usual_signals):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = begun(tmp_path / "run", num_steps=2)
    for _ in run.steps():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_it_at_once(tmp_path, usual_signals):
    before = signal.getsignal(signal.SIGINT)
    run = begun(tmp_path / "run", num_steps=5)
    reached = []
    with pytest.raises(KeyboardInterrupt):
        for step in run.steps():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(step)
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(step)
    assert reached == [1] and not (tmp_path / "run/checkpoint").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_waits_as_the_first(tmp_path, usual_signals, capsys):
    """torchrun hands on a SIGTERM that has come to all processes of its job already."""
    run = begun(tmp_path / "run", num_steps=5)
    with pytest.raises(SystemExit):
        for _ in run.steps():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
    assert (tmp_path / "run/checkpoint").exists() and run.step == 1
    assert capsys.readouterr().err.count("this step ends") == 1


def test_a_signal_that_was_ignored_stays_ignored(tmp_path, usual_signals):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = begun(tmp_path / "run", num_steps=3)
    reached = []
    for step in run.steps():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(step)
    assert reached == [1, 2, 3]


def test_steps_outside_the_main_thread_wait_for_no_signal(tmp_path):
    run = begun(tmp_path / "run", num_steps=3)
    reached = []
    thread = threading.Thread(target=lambda: reached.extend(run.steps()))
    thread.start()
    thread.join()
    assert reached == [1, 2, 3]


# --- Talking to a model ---------------------------------------------------------------------------


def test_talk_answers_greedily_until_an_empty_line(tiny, monkeypatch, capsys):
    said = iter(["12+ 34", "5+6", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    monkeypatch.setattr(plumbing, "quieten_transformers", lambda: None)
    plumbing.talk(tiny)
    model = plumbing.load_model(transformers.AutoModelForCausalLM, tiny, CPU)
    tokenizer = plumbing.load_tokenizer(tiny)
    wanted = ""
    for prompt in ("12+ 34", "5+6"):
        ids = plain.toy_ids(tokenizer, prompt)
        room = 256 - len(ids)  # of the model's context
        out = model.generate(torch.tensor([ids]), max_new_tokens=room, do_sample=False)
        wanted += tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True) + "\n"
    _, got = capsys.readouterr().out.split("\n", 1)
    assert got == wanted


def test_talk_says_what_does_not_fit(tiny, monkeypatch, capsys):
    said = iter(["1" * 300, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    monkeypatch.setattr(plumbing, "quieten_transformers", lambda: None)
    plumbing.talk(tiny)
    assert "does not fit in the model's 256 tokens" in capsys.readouterr().out


def test_talk_ends_with_the_input(tiny, monkeypatch, capsys):
    def nothing(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", nothing)
    monkeypatch.setattr(plumbing, "quieten_transformers", lambda: None)
    plumbing.talk(tiny)
    assert len(capsys.readouterr().out.splitlines()) == 1


# --- Steps of several processes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_rows, batch_size, steps", [(8, 4, 2), (9, 4, 3), (11, 4, 3), (3, 4, 1), (0, 4, 0)]
)
def test_the_last_step_has_what_is_left(num_rows, batch_size, steps):
    args = SimpleNamespace(batch_size=batch_size, shard=False)
    assert plumbing.count_steps(num_rows, args) == steps


@pytest.mark.parametrize("num_rows, enough", [(8, True), (9, False), (10, True), (1, False)])
def test_the_last_step_of_shard_has_a_row_for_each_process(num_rows, enough, monkeypatch):
    """Before the run: at its end all that was trained would be lost."""
    monkeypatch.setattr(plumbing, "process", lambda: (0, 2))
    assert plumbing.count_steps(num_rows, SimpleNamespace(batch_size=4, shard=False))
    args = SimpleNamespace(batch_size=4, shard=True)
    if enough:
        assert plumbing.count_steps(num_rows, args) == math.ceil(num_rows / 4)
        return
    with pytest.raises(plumbing.UserError, match=f"{num_rows} rows .* leave 1 to the last step"):
        plumbing.count_steps(num_rows, args)
