"""Bad input ends a script with one line that names it, and never costs an older run anything.

Most run in this process: ValueError with a text is what gives that text on stderr and exit code 1.
"""

import errno
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import plumbing
import dpo_nll
import grpo
import ppo
import reinforce_rloo
import rejection_sampling
import sft

pytestmark = pytest.mark.usefixtures("no_picture")

TOY = str(ROOT / "toy" / "model")
ROWS = [
    {"prompt": f"  {a}+ {b}", "answer": str(a + b), "completion": str(a + b)}
    for a, b in [(12, 345), (67, 890), (98, 765), (43, 210)]
]


def write_rows(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def some_args(script, tmp_path, **changes):
    """Args of a run of one small step on four rows; `changes` are the bad ones."""
    if "dataset" not in changes:
        changes["dataset"] = write_rows(tmp_path / "rows.jsonl", *ROWS)
    args = dict(model=TOY, output_dir=str(tmp_path / "run"), eval_size=0, max_new_tokens=8)
    args |= dict(device="cpu", checkpoint_every=1, learning_rate=1e-3)
    if script is not sft:
        args |= dict(num_steps=1, num_prompts=2, num_generations=2)
    else:
        args |= dict(num_epochs=1, batch_size=4, max_length=64)
    return script.Args(**args | changes)


def message(call, *args):
    """What ValueError says: one line, not too long; a text, so that the exit code is 1."""
    with pytest.raises(ValueError) as stopped:
        call(*args)
    text = str(stopped.value)
    assert isinstance(text, str) and text.strip() and "\n" not in text and len(text) < 700
    return text


def refused(script, tmp_path, *words, run_made=False, **changes):
    """The run stops with one line that has these words; early enough to leave no run folder."""
    text = message(script.main, some_args(script, tmp_path, **changes))
    for word in words:
        assert word in text
    assert (tmp_path / "run").exists() == run_made
    return text


both = pytest.mark.parametrize("script", [grpo, sft], ids=["grpo", "sft"])
RL = [grpo, reinforce_rloo, ppo]
every_rl = pytest.mark.parametrize("script", RL, ids=lambda x: x.__name__)


# --- The whole program, as a user sees it ---------------------------------------------------------


def command(*flags, cwd, script="grpo.py", limit=None):
    import resource

    before = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd, env=env, capture_output=True, text=True, preexec_fn=before,
    )  # fmt: skip


@pytest.mark.parametrize("what", ["dataset", "model", "folder"])
def test_the_program_says_one_line_and_exits_with_1(tmp_path, what):
    rows = write_rows(tmp_path / "rows.jsonl", *ROWS)
    run = tmp_path / "run"
    if what == "dataset":
        rows = word = str(tmp_path / "missing.jsonl")
    elif what == "folder":
        run.mkdir()
        (run / "photo.png").write_text("dear to me")
        word = str(run)
    (tmp_path / "empty").mkdir()
    model = TOY if what != "model" else (word := str(tmp_path / "empty"))
    done = command(
        "--model", model, "--dataset", rows, "--output-dir", run, "--device", "cpu",
        "--num-steps", 1, "--eval-size", 0, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("grpo.py: ") and word in line


def test_an_unknown_flag_exits_with_2(tmp_path):
    done = command("--num-stepps", 1, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--num-stepps" in done.stderr + done.stdout
    assert not (tmp_path / "runs").exists()


# --- Data -----------------------------------------------------------------------------------------


@both
def test_missing_dataset_file(script, tmp_path):
    path = str(tmp_path / "missing.jsonl")
    refused(script, tmp_path, path, "no such file", dataset=path)


@both
def test_missing_eval_dataset_file(script, tmp_path):
    path = str(tmp_path / "missing.jsonl")
    refused(script, tmp_path, path, "no such file", eval_dataset=path)


@both
@pytest.mark.parametrize(
    "line", ["{'prompt': 1}", '{"prompt": ', "text", "5", '"text"', "[1]", "null", "true"]
)
def test_a_line_that_is_no_json_object(script, tmp_path, line):
    path = write_rows(tmp_path / "bad.jsonl", ROWS[0], "", line, ROWS[1])
    refused(script, tmp_path, f"{path}, line 3", "JSON object", dataset=path)


@pytest.mark.parametrize("line", ["[]", '["ab", "cd"]', '[["prompt", "1+1"], ["answer", "2"]]'])
def test_a_list_is_no_json_object(tmp_path, line):
    path = write_rows(tmp_path / "bad.jsonl", ROWS[0], line)
    refused(grpo, tmp_path, f"{path}, line 2", "JSON object", dataset=path)


@both
def test_a_file_that_is_no_text(script, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\xf0\x28\x80\n")
    refused(script, tmp_path, f"{path}, line 1", dataset=str(path))


@both
def test_a_file_without_rows(script, tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", "", "  ")
    refused(script, tmp_path, path, "no rows", dataset=path)


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_a_row_without_a_column(tmp_path, column):
    row = {k: v for k, v in ROWS[1].items() if k != column} | {"other": 1}
    path = write_rows(tmp_path / "bad.jsonl", ROWS[0], row)
    refused(grpo, tmp_path, f"{path}, line 2", f"no {column}", ", ".join(row), dataset=path)


def test_a_reward_of_your_own_needs_no_answer(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "1+1"})
    reward = reward_file(tmp_path, "return [float(len(c)) for c in completions]")
    grpo.main(some_args(grpo, tmp_path, dataset=path, reward=reward))


@pytest.mark.parametrize("gone", ["prompt", "completion"])
def test_a_row_without_a_column_in_sft(tmp_path, gone):
    row = {k: v for k, v in ROWS[1].items() if k != gone}
    path = write_rows(tmp_path / "bad.jsonl", ROWS[0], row)
    text = refused(sft, tmp_path, f"{path}, line 2", gone, ", ".join(row), dataset=path)
    assert "messages" in text  # the other form that would do


@both
@pytest.mark.parametrize("prompt", ["", "  \n ", [], None])
def test_an_empty_prompt(script, tmp_path, prompt):
    path = write_rows(tmp_path / "bad.jsonl", *ROWS, ROWS[0] | {"prompt": prompt})
    refused(script, tmp_path, f"{path}, line 5", "prompt", dataset=path)


@both
@pytest.mark.parametrize("prompt", [5, {"a": 1}, [1], [{"role": "user"}], [{"content": "x"}]])
def test_a_prompt_that_is_neither_text_nor_chat(script, tmp_path, prompt):
    path = write_rows(tmp_path / "bad.jsonl", *ROWS, ROWS[0] | {"prompt": prompt})
    shown = repr(prompt[0]) if isinstance(prompt, list) else str(prompt)
    if prompt == [{"role": "user"}]:
        shown = "a turn of the user without content"
    text = refused(script, tmp_path, shown, dataset=path)
    assert f"{path}, line 5: prompt " in text


@pytest.mark.parametrize("length", [250, 400])
def test_a_prompt_longer_than_the_context(tmp_path, length):
    path = write_rows(tmp_path / "bad.jsonl", *ROWS, ROWS[0] | {"prompt": "1" * length})
    refused(grpo, tmp_path, "256", "prompt", "1111", str(length + 3), dataset=path)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    rows = write_rows(tmp_path / "rows.jsonl", *ROWS)
    refused(grpo, tmp_path, "256", "1111", dataset=rows, eval_dataset=path, eval_size=9)


def test_an_answer_that_is_no_number(tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", *ROWS, ROWS[0] | {"answer": "twelve"})
    refused(grpo, tmp_path, f"{path}, line 5: its answer 'twelve' is not one", dataset=path)
    reward = reward_file(tmp_path, "return [1.0] * len(rows)")
    grpo.main(some_args(grpo, tmp_path, dataset=path, reward=reward))  # it may be anything


# --- Rows of sft.py -------------------------------------------------------------------------------


@pytest.mark.parametrize("completion", ["", " \n", None])
def test_an_empty_completion(tmp_path, completion):
    path = write_rows(tmp_path / "bad.jsonl", ROWS[0], ROWS[1] | {"completion": completion})
    refused(sft, tmp_path, f"{path}, line 2", "completion", dataset=path)


@pytest.mark.parametrize("completion", [5, ["a"], {"a": 1}])
def test_a_completion_that_is_no_text(tmp_path, completion):
    path = write_rows(tmp_path / "bad.jsonl", ROWS[0], ROWS[1] | {"completion": completion})
    shown = repr(completion[0]) if isinstance(completion, list) else str(completion)
    refused(sft, tmp_path, f"{path}, line 2: completion ", shown, dataset=path)


WRONG_KINDS = {
    "messages": ["a text", 5, {"role": "user"}, ["a"], [{"role": 1, "content": "x"}]],
    "response": [5, {"a": 1}, ["a"]],
    "chosen": [5, True, [{"content": "x"}]],
    "rejected": [0, [[]]],
    "completions": ["a text", 5, {"a": 1}],
    "ranks": ["1, 2", 1],
    "steps": ["one\ntwo", 3],
    "labels": ["+", 1],
    "text": [5, ["a"]],
    "ended": ["no", {"a": 1}],
}


@pytest.mark.parametrize("column", WRONG_KINDS)
def test_a_column_that_all_read_alike_has_one_kind(tmp_path, column):
    """Whatever the script; null is as if it were not there."""
    for value in WRONG_KINDS[column]:
        path = write_rows(tmp_path / "bad.jsonl", ROWS[0], {column: None}, {column: value})
        text = message(plumbing.load_rows, path)
        assert text.startswith(f"{path}, line 3: {column} ")
    chat = [{"role": "user", "content": "x"}]
    good = {"messages": chat, "response": "a", "chosen": chat, "rejected": "", "completions": [1]}
    good |= {"ranks": [], "steps": ["a"], "labels": [1], "text": "a", "ended": 1, "mine": {"a": 1}}
    path = write_rows(tmp_path / "good.jsonl", good, {"ended": False}, {"ended": [True]})
    assert plumbing.load_rows(path)[0] == good


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, -1e30])
@pytest.mark.parametrize("column", ["margin", "score_chosen", "score_rejected"])
def test_a_number_beyond_float32_is_named_by_its_line(tmp_path, column, value):
    path = write_rows(tmp_path / "bad.jsonl", {column: 1.5}, {column: None}, {column: value})
    text = message(plumbing.load_rows, path)
    assert text == f"{path}, line 3: {column} is {value}, not a finite number"


def test_a_file_of_another_encoding_or_kind(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode("utf-16"))
    said = f"{path}: no JSON object per line, it is UTF-16; save it as UTF-8"
    assert message(plumbing.load_rows, str(path)) == said
    assert message(plumbing.load_rows, "/dev/null") == "/dev/null: no rows"


def test_tools_are_a_list(tmp_path):
    for tools in ({"type": "function"}, '{"type": "function"}'):
        path = write_rows(tmp_path / "bad.jsonl", ROWS[0], ROWS[1] | {"tools": tools})
        assert message(plumbing.load_rows, path) == f"{path}, line 2: its tools are no list"


def test_the_system_column_goes_into_prompt_and_messages(tmp_path):
    """A row may have both; each script reads one of them."""
    system = {"role": "system", "content": "Add."}
    row = {"prompt": "1+7", "messages": [USER], "system": "Add."}
    [got] = plumbing.load_rows(write_rows(tmp_path / "rows.jsonl", row))
    assert got["messages"] == [system, USER]
    assert got["prompt"] == [system, {"role": "user", "content": "1+7"}]


def test_a_list_of_messages_written_as_a_text_is_none(tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", ROWS[0], {"prompt": json.dumps([USER])})
    assert f"{path}, line 2: prompt is a list of messages" in message(plumbing.load_rows, path)
    path = write_rows(tmp_path / "good.jsonl", {"prompt": "[{1: 2}] is Python"})
    assert len(plumbing.load_rows(path)) == 1


def test_rows_that_are_seldom_meant_are_counted(tmp_path, capsys):
    answer = {"role": "assistant", "content": "2"}
    odd = [
        {"margin": -0.5}, {"margin": -1}, {"score_chosen": 0, "score_rejected": 1},
        {"prompt": [USER, answer]}, {"messages": [{"role": "usr", "content": "1"}, answer]},
    ]  # fmt: skip
    usual = [
        {"margin": 0}, {"score_chosen": 1, "score_rejected": 1}, {"prompt": [USER]},
        {"messages": [USER, answer]}, {"messages": [{"role": "tool", "content": "1"}, USER]},
    ]  # fmt: skip
    plumbing.load_rows(write_rows(tmp_path / "usual.jsonl", *usual))
    assert capsys.readouterr().err == ""
    path = write_rows(tmp_path / "odd.jsonl", *odd, *usual)
    plumbing.load_rows(path)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"warning: {path}: ") for line in lines)
    counts = [line.partition(f"{path}: ")[2].partition(" have a ")[0] for line in lines]
    assert counts == ["2 of 10 rows", "1 of 10 rows", "1 of 10 rows", "1 of 10 rows"]


def test_a_name_of_a_folder_that_is_too_long(tmp_path):
    text = message(plumbing.Run, some_args(grpo, tmp_path, output_dir="a" * 300))
    assert text.startswith("--output-dir aaa") and "OSError" in text


@pytest.mark.parametrize("row", [{"prompt": "a\ud800"}, {"other": ["\udfff"]}, {"\ud801": 1}])
def test_half_of_a_surrogate_pair_is_no_text(tmp_path, row):
    """No tokenizer takes it; JSON does."""
    path = write_rows(tmp_path / "bad.jsonl", {"prompt": "\U0001f600"}, row)
    text = message(plumbing.load_rows, path)
    assert text.startswith(f"{path}, line 2: half of a surrogate pair")


USER = {"role": "user", "content": "1+1"}


@pytest.mark.parametrize(
    "messages",
    [
        "text",
        ["text", "text"],
        [{"content": "1+1"}, {"content": "2"}],
        [{"role": "user"}, {"role": "assistant", "content": "2"}],
        [{"role": "user", "content": ""}, {"role": "assistant", "content": "2"}],
    ],
    ids=["text", "texts", "no role", "user without content", "empty user"],
)
def test_messages_of_another_shape(tmp_path, messages):
    path = write_rows(tmp_path / "bad.jsonl", ROWS[0], {"messages": messages})
    refused(sft, tmp_path, f"{path}, line 2", dataset=path)


@pytest.mark.parametrize("answer", [{}, {"content": None}, {"content": ""}])
def test_turns_of_the_assistant_without_content_are_counted(tmp_path, answer, capsys):
    """Logs of chats have such, where a tool was called or an answer cut out."""
    chat = [USER, {"role": "assistant"} | answer, USER, {"role": "assistant", "content": "2"}]
    path = write_rows(tmp_path / "rows.jsonl", ROWS[0], {"messages": chat})
    sft.main(some_args(sft, tmp_path, dataset=path))
    assert "of 3 completions, dropped 1 that are empty" in capsys.readouterr().out


def test_an_empty_message_of_the_system_is_one(tmp_path):
    """Whole data sets have it in each row."""
    chat = [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": "2"}]
    path = write_rows(tmp_path / "rows.jsonl", {"messages": chat})
    assert plumbing.load_rows(path) == [{"messages": chat}]


def test_messages_without_an_answer(tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", {"messages": [USER]}, {"messages": [USER, USER]})
    refused(sft, tmp_path, path, dataset=path)


def test_all_rows_dropped(tmp_path):
    rows = [ROWS[0] | {"prompt": "1" * 70}, ROWS[1] | {"prompt": "1" * 80}]
    path = write_rows(tmp_path / "bad.jsonl", *rows)
    refused(sft, tmp_path, path, "--max-length 64", dataset=path)


def test_some_rows_dropped_are_counted(tmp_path, capsys):
    rows = [*ROWS, ROWS[0] | {"prompt": "1" * 70}, ROWS[1] | {"completion": "2" * 70}]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    sft.main(some_args(sft, tmp_path, dataset=path))
    said = capsys.readouterr().out
    assert "of 6 completions, dropped 1" in said and "cut 1" in said


# --- Model and tokenizer --------------------------------------------------------------------------


def changed_toy(tmp_path, **changes):
    """A copy of the toy whose tokenizer has these attributes."""
    folder = tmp_path / "changed"
    shutil.copytree(TOY, folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


@both
@pytest.mark.parametrize("model", ["missing", "no-such-owner/no-such-model"])
def test_missing_model(script, tmp_path, model):
    model = str(tmp_path / model) if model == "missing" else model
    refused(script, tmp_path, model, model=model)


@both
def test_a_folder_that_is_no_model(script, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("no model")
    refused(script, tmp_path, str(tmp_path / "folder"), model=str(tmp_path / "folder"))


@both
@pytest.mark.parametrize("bad", ["no weights", "cut weights", "no config", "other config", "file"])
def test_a_folder_that_is_half_a_model(script, tmp_path, bad):
    folder = tmp_path / "folder"
    shutil.copytree(TOY, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if bad == "no weights":
        weights.unlink()
    elif bad == "cut weights":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif bad == "no config":
        config.unlink()
    elif bad == "other config":
        config.write_text(json.dumps({"model_type": "no-such-type"}))
    model = config if bad == "file" else folder
    refused(script, tmp_path, str(model), model=str(model))


@both
def test_a_model_that_lacks_weights_gets_no_random_ones(script, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(TOY, tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    weights = load_file(path)
    gone = next(name for name in weights if "layers.1" in name and "mlp" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, path, metadata={"format": "pt"})
    refused(script, tmp_path, gone, model=str(path.parent))


@both
def test_a_tokenizer_without_eos(script, tmp_path):
    model = changed_toy(tmp_path, eos_token=None)
    refused(script, tmp_path, model, "EOS", model=model)


@both
def test_chat_messages_without_a_chat_template(script, tmp_path):
    model = changed_toy(tmp_path, chat_template=None)
    path = write_rows(tmp_path / "chat.jsonl", ROWS[0] | {"prompt": [USER]})
    refused(script, tmp_path, "chat template", model=model, dataset=path)


def test_a_reward_model_that_is_none(tmp_path):
    (tmp_path / "folder").mkdir()
    for script in RL:
        refused(script, tmp_path, str(tmp_path / "folder"), reward_model=str(tmp_path / "folder"))
        refused(script, tmp_path, TOY, reward_model=TOY)  # a policy has no score head


# --- Values of flags ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 0])
def test_a_group_of_one(tmp_path, number):
    refused(grpo, tmp_path, f"num-generations {number}", num_generations=number)


COUNTS = ["max_new_tokens", "micro_batch_size", "checkpoint_every", "eval_every"]
COUNTS = [(grpo, flag) for flag in [*COUNTS, "num_prompts", "num_epochs", "num_minibatches"]] + [
    (sft, flag) for flag in [*COUNTS[1:], "batch_size", "num_epochs"]
]


@pytest.mark.parametrize("script, flag", COUNTS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("number", [0, -1])
def test_a_count_that_is_none(script, flag, number, tmp_path):
    text = refused(script, tmp_path, **{flag: number})
    assert flag in text.replace("-", "_")


@both
@pytest.mark.parametrize(
    "flag, value", [("device", "gpu"), ("learning_rate", -1.0), ("eval_size", -1)]
)
def test_a_value_that_cannot_be(script, tmp_path, flag, value):
    refused(script, tmp_path, str(value), **{flag: value})


@every_rl
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_sampling_needs_a_temperature(script, tmp_path, temperature):
    refused(script, tmp_path, "temperature", temperature=temperature)


def test_leaving_one_out_needs_two(tmp_path):
    refused(reinforce_rloo, tmp_path, "num-generations 1", num_generations=1)
    reinforce_rloo.main(some_args(reinforce_rloo, tmp_path, num_generations=1, baseline="batch"))


def test_a_critic_of_another_vocabulary(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=300)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    words = str(tmp_path / "gpt2"), "vocabulary", "--critic-model"
    refused(ppo, tmp_path, *words, critic_model=str(tmp_path / "gpt2"))


def test_more_minibatches_than_there_is_to_divide(tmp_path):
    refused(grpo, tmp_path, "--num-minibatches 3", num_minibatches=3)  # two groups
    ppo.main(some_args(ppo, tmp_path, num_minibatches=4))  # four completions
    shutil.rmtree(tmp_path / "run")
    refused(ppo, tmp_path, "--num-minibatches 5", num_minibatches=5)


def test_a_kl_target_without_a_kl(tmp_path):
    refused(ppo, tmp_path, "--kl-target", kl_target=6.0, beta=0.0)


def test_a_penalty_of_completions_beside_rewards_of_steps(tmp_path):
    changes = dict(missing_eos_penalty=1.0, supervision="process")
    refused(grpo, tmp_path, "--missing-eos-penalty", **changes)


def test_pretraining_gradients_need_text(tmp_path):
    refused(ppo, tmp_path, "no such file", ptx_coef=1.0)
    path = write_rows(tmp_path / "text.jsonl", {"text": "12"}, {"txt": "34"})
    refused(ppo, tmp_path, f"{path}, line 2", "no text", ptx_coef=1.0, pretrain_dataset=path)
    path = write_rows(tmp_path / "short.jsonl", {"text": "1"})
    refused(ppo, tmp_path, path, "two tokens", ptx_coef=1.0, pretrain_dataset=path)


@pytest.mark.parametrize("script", [*RL, sft, rejection_sampling], ids=lambda x: x.__name__)
def test_no_samples_is_no_mistake(script, tmp_path):
    path = write_rows(tmp_path / "held.jsonl", *ROWS)
    args = dict(model=TOY, dataset=path, eval_dataset=path, output_dir=str(tmp_path / "run"))
    args |= dict(log_samples=0, max_new_tokens=4)
    args |= dict(num_prompts=2, num_generations=2, eval_size=2) if script is not sft else {}
    args |= dict(num_steps=1) if script in RL else {}
    script.main(script.Args(**args))
    samples = tmp_path / "run" / "samples.jsonl"
    assert not samples.exists() or not samples.read_text()


@pytest.mark.parametrize("long", ["pair", "answer"])
def test_sft_keeps_within_the_context(tmp_path, long, capsys):
    """A model with learned positions has none beyond: longer rows and answers are cut, and it is
    said of rows."""
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(TOY).save_pretrained(tmp_path / "gpt2")
    row = ROWS[0] | ({"prompt": "1" * 40, "completion": "2" * 40} if long == "pair" else {})
    path = write_rows(tmp_path / "rows.jsonl", *ROWS, row)
    changes = dict(model=str(tmp_path / "gpt2"), dataset=path, eval_dataset=path)
    changes |= dict(max_length=1024 if long == "pair" else 64, max_new_tokens=128)
    sft.main(some_args(sft, tmp_path, **changes))
    said = "of 5 completions, dropped 0 whose prompt fills --max-length 64, cut 1 that pass it"
    assert (said in capsys.readouterr().out) == (long == "pair")
    samples = [json.loads(x) for x in open(tmp_path / "run" / "samples.jsonl")]
    assert len(samples) == 2 * 4  # before the first step and after the last


# --- The reward function --------------------------------------------------------------------------


def reward_file(tmp_path, body, name="reward"):
    path = tmp_path / "reward.py"
    path.write_text(f"import math\n\n\ndef {name}(prompts, completions, rows):\n    {body}\n")
    return f"{path}:reward"


def test_a_reward_file_that_is_not_there(tmp_path):
    reward = f"{tmp_path}/missing.py:reward"
    refused(grpo, tmp_path, reward, reward=reward)


def test_a_reward_file_without_the_function(tmp_path):
    reward = reward_file(tmp_path, "return [0.0] * len(rows)", name="another")
    refused(grpo, tmp_path, f"no function reward in {tmp_path}", reward=reward)


@pytest.mark.parametrize("reward", ["verify", "reward.py", "reward.py:", ":reward", ""])
def test_a_reward_that_is_not_file_and_function(tmp_path, reward):
    refused(grpo, tmp_path, f"--reward {reward}".strip(), reward=reward)


def test_a_reward_file_that_does_not_compile(tmp_path):
    reward = reward_file(tmp_path, "return ((")
    refused(grpo, tmp_path, reward, "SyntaxError", reward=reward)


BODIES = {
    "raises": ("raise ValueError('no such\\n thing')", "ValueError: no such thing"),
    "column": ("return [row['length'] for row in rows]", "KeyError: 'length'"),
    "count": ("return [0.0] * 3", "3 values for 4"),
    "one number": ("return 1.0", "TypeError"),
    "None": ("return None", "of type NoneType, not a list of numbers"),
    "Nones": ("return [None] * len(rows)", "TypeError"),
    "a None": ("return [1.0] * (len(rows) - 1) + [None]", "TypeError"),
    "nan": ("return [1.0] * (len(rows) - 1) + [math.nan]", "nan"),
    "inf": ("return [math.inf] * len(rows)", "inf"),
    "text": ("return 'good'", "of type str, not a list of numbers"),
    "texts": ("return ['good'] * len(rows)", "ValueError"),
    "dict": ("return dict.fromkeys('abcd', 1.0)", "of type dict, not a list of numbers"),
    "set": ("return {1.0, 2.0, 3.0, 4.0}", "of type set, not a list of numbers"),
    "exit": ("raise SystemExit(0)", "called sys.exit(0)"),
}


@every_rl
@pytest.mark.parametrize("body, words", BODIES.values(), ids=BODIES)
def test_a_reward_function_that_misbehaves(script, tmp_path, body, words):
    reward = reward_file(tmp_path, body)
    text = refused(script, tmp_path, reward, words, run_made=True, reward=reward)
    if "raise V" in body or "rows]" in body:
        assert "reward.py:5" in text  # where in the file


PROCESS = {
    "too many": ("return [[0.0] * 99 for _ in rows]", "99"),
    "none": ("return [[] for _ in rows]", "0 numbers"),
    "a nan": ("return [[math.nan] for _ in rows]", "nan"),
    "numbers": ("return [1.0 for _ in rows]", "--supervision"),
}


@pytest.mark.parametrize("body, words", PROCESS.values(), ids=PROCESS)
def test_step_rewards_that_do_not_fit_the_steps(tmp_path, body, words):
    reward = reward_file(tmp_path, body)
    changes = dict(run_made=True, supervision="process", reward=reward)
    refused(grpo, tmp_path, words, **changes)


def test_process_supervision_needs_a_reward_of_steps(tmp_path):
    text = message(grpo.main, some_args(grpo, tmp_path, supervision="process"))
    assert "--supervision process" in text


@pytest.mark.parametrize("counts", ["1", "i + 1", "i % 2"])
def test_step_rewards_without_process_supervision(tmp_path, counts):
    body = f"return [[1.0] * ({counts}) for i, _ in enumerate(rows)]"
    refused(grpo, tmp_path, "--supervision", run_made=True, reward=reward_file(tmp_path, body))


@pytest.mark.parametrize("when", ["evaluating", "training"])
@pytest.mark.parametrize(
    "script", [reinforce_rloo, ppo, rejection_sampling, dpo_nll], ids=lambda x: x.__name__
)
def test_rewards_of_steps_where_one_number_is_needed(script, tmp_path, when):
    """Lists of different lengths; nothing of them is kept for a --resume to find."""
    body = "return [[1.0] * (i % 2 + 1) for i, _ in enumerate(rows)]"
    changes = dict(reward=reward_file(tmp_path, body))
    if when == "evaluating":
        path = write_rows(tmp_path / "held.jsonl", *ROWS)
        changes |= dict(eval_size=4)
        changes |= {"eval_prompts" if script is dpo_nll else "eval_dataset": path}
    args = dict(model=TOY, output_dir=str(tmp_path / "run"), eval_size=0, max_new_tokens=8)
    args |= dict(num_prompts=2, num_generations=2, device="cpu")
    args |= dict(iterations=1) if script is dpo_nll else {}
    rows = write_rows(tmp_path / "rows.jsonl", *ROWS)
    text = message(script.main, script.Args(**args | dict(dataset=rows) | changes))
    assert "list" in text and "one number" in text
    kept = [*(tmp_path / "run").glob("*/0.jsonl")]
    assert not any(path.read_text() for path in kept)


@pytest.mark.parametrize("supervision", ["outcome", "process"])
def test_rewards_of_both_kinds(tmp_path, supervision):
    kinds = "[1.0] if i else 1.0" if supervision == "outcome" else "1.0 if i else [1.0]"
    body = f"return [{kinds} for i, _ in enumerate(rows)]"
    changes = dict(supervision=supervision, reward=reward_file(tmp_path, body))
    refused(grpo, tmp_path, "--supervision", run_made=True, **changes)


# --- A loss that is not finite --------------------------------------------------------------------


def test_rewards_so_large_that_the_gradient_is_not_finite(tmp_path):
    reward = reward_file(tmp_path, "return [(-1) ** i * 1e38 for i, _ in enumerate(rows)]")
    changes = dict(run_made=True, reward=reward, scale_by_std=False, beta=0.0)
    refused(grpo, tmp_path, "loss", "gradient", **changes)


def test_rewards_that_float32_cannot_hold(tmp_path):
    reward = reward_file(tmp_path, "return [(-1) ** i * 1e300 for i, _ in enumerate(rows)]")
    refused(grpo, tmp_path, "nan", run_made=True, reward=reward)


@both
def test_a_learning_rate_that_blows_up(script, tmp_path):
    """It is refused before anything is loaded; so is one that is no number."""
    refused(script, tmp_path, "--learning-rate 1e+30: must be at most 1", learning_rate=1e30)
    refused(script, tmp_path, "--learning-rate nan: must be a finite", learning_rate=math.nan)


@both
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_of_broken_weights(script, tmp_path, value):
    """One number is enough. Nothing is made."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(TOY, tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = value
    save_file(weights, path, metadata={"format": "pt"})
    refused(script, tmp_path, "not finite (model.norm.weight)", model=str(path.parent))


# --- The run folder -------------------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """A run of each script, finished."""
    folder = tmp_path_factory.mktemp("old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing, "draw_curves", lambda rows, path: None)
        for script in grpo, sft:
            (folder / script.__name__).mkdir()
            script.main(some_args(script, folder / script.__name__))
    return folder


@pytest.fixture(params=[grpo, sft], ids=["grpo", "sft"])
def script_and_run(request, old_run, tmp_path):
    """A script and the args of a copy of its old run."""
    script = request.param
    args = some_args(script, old_run / script.__name__)
    shutil.copytree(args.output_dir, tmp_path / "run")
    args.output_dir = str(tmp_path / "run")
    # Where a run began is one of its flags
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps(saved | {"output_dir": args.output_dir}))
    return script, args, tmp_path / "run"


def test_an_existing_run_is_refused(script_and_run):
    script, args, run = script_and_run
    before = contents(run)
    text = message(script.main, args)
    assert str(run) in text and "--resume" in text and "--overwrite" in text
    assert contents(run) == before


@both
@pytest.mark.parametrize("flag", ["resume", "overwrite", None])
def test_a_folder_that_is_no_run_is_left_alone(script, tmp_path, flag):
    run = tmp_path / "run"
    (run / "photos").mkdir(parents=True)
    (run / "photos" / "a.png").write_text("dear to me")
    args = some_args(script, tmp_path, **({flag: True} if flag else {}))
    assert str(run) in message(script.main, args)
    assert list(map(str, contents(run))) == ["photos/a.png"]


@both
@pytest.mark.parametrize("flag", ["resume", "overwrite", None])
def test_a_file_in_place_of_the_folder_is_left_alone(script, tmp_path, flag):
    (tmp_path / "run").write_text("dear to me")
    args = some_args(script, tmp_path, **({flag: True} if flag else {}))
    assert str(tmp_path / "run") in message(script.main, args)
    assert (tmp_path / "run").read_text() == "dear to me"


@both
def test_a_folder_that_cannot_be_made(script, tmp_path):
    (tmp_path / "file").write_text("")
    args = some_args(script, tmp_path, output_dir=str(tmp_path / "file" / "run"))
    text = message(script.main, args)
    assert "--output-dir" in text or str(tmp_path / "file") in text


@pytest.mark.parametrize("bad", ["dataset", "model"])
def test_overwrite_with_bad_input_leaves_the_old_run(script_and_run, tmp_path, bad):
    script, args, run = script_and_run
    before = contents(run)
    args.overwrite = True
    setattr(args, bad, str(tmp_path / "missing.jsonl"))
    message(script.main, args)
    assert contents(run) == before


def test_overwrite_does_not_delete_what_it_reads(script_and_run):
    script, args, run = script_and_run
    before = contents(run)
    args.overwrite, args.model = True, str(run / "final")
    assert f"holds {run / 'final'}, which this command reads" in message(script.main, args)
    args.model, args.dataset = TOY, str(run / "metrics.jsonl")
    assert f"holds {run / 'metrics.jsonl'}, which this" in message(script.main, args)
    assert contents(run) == before


def test_overwrite_replaces_the_old_run(script_and_run):
    script, args, run = script_and_run
    (run / "notes.txt").write_text("dear to me")
    (run / "final" / "left over").write_text("")
    args.overwrite, args.seed = True, 5
    script.main(args)
    assert not (run / "final" / "left over").exists()
    assert (run / "notes.txt").read_text() == "dear to me"
    assert json.loads((run / "args.json").read_text())["seed"] == 5


@pytest.mark.parametrize("flag, value", [("seed", 3), ("learning_rate", 0.5), ("model", "other")])
def test_resume_with_another_flag_is_refused(script_and_run, flag, value):
    script, args, run = script_and_run
    before, old = contents(run), getattr(args, flag)
    args.resume = True
    setattr(args, flag, value)
    text = message(script.main, args)
    assert flag in text.replace("-", "_") and str(old) in text and str(value) in text
    assert contents(run) == before


@both
def test_resume_with_nothing_there(script, tmp_path):
    refused(script, tmp_path, str(tmp_path / "run"), "resume", resume=True)


@pytest.mark.parametrize("name", ["args.json", "checkpoint/state.pt"])
def test_resume_from_a_broken_file(script_and_run, name):
    script, args, run = script_and_run
    args.resume = True
    (run / name).write_bytes((run / name).read_bytes()[:20])
    before = contents(run)
    text = message(script.main, args)
    assert "--output-dir" in text or str(run) in text
    assert contents(run) == before


# --- A full disk ----------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["torch.save", "os.replace"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_old(script_and_run, monkeypatch, where):
    script, args, run = script_and_run
    args.resume = True  # nothing left to do but to write the checkpoint and final/ again
    state = (run / "checkpoint" / "state.pt").read_bytes()
    real = torch.save if where == "torch.save" else os.replace

    def no_room(what, target):
        return full() if "checkpoint" in os.path.relpath(target, run) else real(what, target)

    monkeypatch.setattr(where, no_room)
    text = message(script.main, args)
    assert "state.pt" in text and "No space left" in text
    assert (run / "checkpoint" / "state.pt").read_bytes() == state


def test_metrics_that_cannot_be_written(script_and_run, monkeypatch):
    script, args, run = script_and_run
    args.overwrite, old_open = True, open

    def no_room(path, mode="r", *rest, **more):
        if "a" in mode and "jsonl" in str(path):
            full()
        return old_open(path, mode, *rest, **more)

    monkeypatch.setattr("builtins.open", no_room)
    text = message(script.main, args)
    assert ("--output-dir" in text or str(run) in text) and "No space left" in text


def test_a_final_model_that_cannot_be_written(script_and_run, monkeypatch):
    script, args, run = script_and_run
    args.resume = True
    final = contents(run / "final")
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    text = message(script.main, args)
    assert ("--output-dir" in text or "final" in text) and "No space left" in text
    assert contents(run / "final") == final


def test_a_final_model_is_there_at_every_moment(script_and_run, monkeypatch):
    """Killed before any move of a folder, the old model or the new one is whole."""
    script, args, run = script_and_run
    args.resume = True
    final, moves, replace = contents(run / "final"), [], os.replace
    for kill_at in range(2):

        def killed(a, b, at=kill_at):
            if "final" in str(a):
                moves.append(1)
                if len(moves) > at:
                    raise KeyboardInterrupt
            return replace(a, b)

        del moves[:]
        monkeypatch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            script.main(args)
        found = [contents(run / name) for name in ("final", "final.old") if (run / name).exists()]
        assert final.keys() in [x.keys() for x in found]
    monkeypatch.setattr("os.replace", replace)
    script.main(args)
    assert contents(run / "final") == final
    assert not (run / "final.old").exists() and not (run / "final.new").exists()


def test_the_program_on_a_full_disk(tmp_path):
    """Files may not pass 1 MB; a checkpoint of the toy has 5 MB."""
    rows = write_rows(tmp_path / "rows.jsonl", *ROWS)
    done = command(
        "--model", TOY, "--dataset", rows, "--output-dir", tmp_path / "run", "--device", "cpu",
        "--num-steps", 2, "--num-prompts", 2, "--num-generations", 2, "--max-new-tokens", 4,
        "--eval-size", 0, "--checkpoint-every", 1, cwd=tmp_path, limit=1_000_000,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("grpo.py: ") and "state.pt" in line
    assert not (tmp_path / "run" / "checkpoint" / "state.pt").exists()
