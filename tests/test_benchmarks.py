"""What the benchmarks read."""

import importlib
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common import generate
from plumbing import Run, load_model, load_rows, load_tokenizer

sys.path.insert(0, str(ROOT / "benchmarks"))
import plot
import scaling
import sides
import vs_trl


def test_a_curve_is_read_in_moving_means(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"eval_accuracy": 0.5, "step": 0}\n{"kl": 1, "reward": 2, "step": 1}\n'
        '{"kl": 3, "reward": 4, "step": 2}\n{"kl": 5, "reward": 9, "step": 3}\n'
    )
    assert plot.load(tmp_path, ("kl", "reward"), 2).tolist() == [[2, 4], [3, 6.5]]
    assert plot.load(tmp_path, ("kl", "reward"), 1, num_steps=2).tolist() == [[1, 3], [2, 4]]


def curve(folder, *rows):
    folder.mkdir()
    lines = [f'{{"step": {step}, "kl": {kl}, "reward": {reward}}}' for step, kl, reward in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: (name of the call, its numbers as lists, label)."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    calls = []
    for name in "plot", "fill_between":
        function = getattr(Axes, name)

        def noting(axes, *values, name=name, function=function, **options):
            numbers = [torch.as_tensor(value).tolist() for value in values]
            calls.append((name, numbers, options.get("label")))
            return function(axes, *values, **options)

        monkeypatch.setattr(Axes, name, noting)
    return calls


def test_a_figure_has_means_and_bands_of_runs(tmp_path, drawn, capsys):
    """As many steps as the shortest run has; the band goes from the least to the greatest."""
    first = curve(tmp_path / "a", (1, 0, 1), (2, 2, 3), (3, 9, 9))
    second = curve(tmp_path / "b", (1, 2, 5), (2, 4, 9))
    out = tmp_path / "figure.png"
    plot.main(plot.Args((f"rloo={first},{second}",), ("reward",), out=str(out)))
    line, band = drawn
    assert line == ("plot", [[1.0, 2.0], [3.0, 6.0]], "rloo")
    assert band == ("fill_between", [[1.0, 2.0], [1.0, 3.0], [5.0, 9.0]], None)
    assert "rloo: last reward 6, step 2" in capsys.readouterr().out and out.exists()


def test_a_figure_of_metrics_against_each_other(tmp_path, drawn, capsys):
    """No band, where x is not the step; with several metrics each label names its own."""
    first = curve(tmp_path / "a", (1, 0, 1), (2, 2, 3))
    second = curve(tmp_path / "b", (1, 2, 5), (2, 4, 9))
    args = plot.Args((f"x={first},{second}",), ("reward", "kl"), "kl", str(tmp_path / "f.png"))
    plot.main(args)
    assert drawn == [
        ("plot", [[1.0, 3.0], [3.0, 6.0]], "x: reward"),
        ("plot", [[1.0, 3.0], [1.0, 3.0]], "x: kl"),
    ]


def test_evaluations_are_points_and_axes_have_units(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "eval_accuracy": 0.4, "eval_kl": 1.0}\n{"step": 1, "reward": 0.5}\n'
        '{"step": 2, "reward": 0.7}\n{"step": 2, "eval_accuracy": 0.9, "eval_kl": 2.0}\n'
    )
    drawn, labels = [], []
    real = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, *a, **o: drawn.append(o["marker"]) or real(axes, *a, **o)
    )
    monkeypatch.setattr(Axes, "set_xlabel", lambda axes, text: labels.append(text))
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, text: labels.append(text))
    figure = str(tmp_path / "f.png")
    plot.main(plot.Args((f"GRPO={tmp_path}",), ("reward", "eval_accuracy"), out=figure))
    assert drawn == ["", "o"]
    assert labels == ["step", "reward, eval_accuracy (share of greedy answers)"]
    plot.main(plot.Args((f"GRPO={tmp_path}",), ("eval_accuracy",), "eval_kl", figure))
    assert labels[2] == "eval_kl (nats per completion)"


# --- vs_trl.py: both sides must have computed the same before a time is believed ------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder with the toy's model and rows, as vs_trl.py hands them to both sides."""
    work = tmp_path_factory.mktemp("work")
    vs_trl.prepare(vs_trl.Args(num_pairs=8), work)
    return work


def job(work, kind, side, length, tokens):
    return dict(
        name=kind, kind=kind, side=side, tokens=tokens, dtype="float32", num_steps=1,
        keep_memory=False, model=f"{work}/model", rm=f"{work}/rm",
        rows=f"{work}/{length}_{tokens}.jsonl",
    )  # fmt: skip


def test_texts_have_the_length_asked_for_and_differ():
    tokenizer = load_tokenizer(ROOT / "toy/model")
    texts = vs_trl.texts_of_length(tokenizer, 31, 20)
    assert {len(tokenizer(text)["input_ids"]) for text in texts} == {31}
    assert len(set(texts)) == 20


def test_rows_of_the_cases(prepared):
    """Of their lengths, in groups of eight; pairs with what they were; no template, a pad."""
    tokenizer = load_tokenizer(prepared / "model")
    assert tokenizer.chat_template is None and tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = load_rows(prepared / "192_64.jsonl")
    assert len(rows) == 2 and {len(row["completions"]) for row in rows} == {8}
    assert {len(tokenizer(row["prompt"])["input_ids"]) for row in rows} == {192}
    texts = [text for row in rows for text in row["completions"]]
    assert {len(tokenizer(text)["input_ids"]) for text in texts} == {63} and len(set(texts)) == 16
    flat = load_rows(prepared / "192_64_flat.jsonl")
    assert [row["completion"] for row in flat] == texts
    assert [row["label"] for row in flat] == [True, False] * 8
    pairs, given = load_rows(prepared / "0_0.jsonl"), load_rows(ROOT / "toy/pref_train.jsonl")
    assert len(pairs) == 8
    for row, old in zip(pairs, given[:8], strict=True):
        assert row["completion"] == row["chosen"] == old["chosen"]
        assert row["rejected"] == old["rejected"] and old["prompt"] in row["prompt"]


def test_what_both_sides_share(prepared):
    """A reward by hand; pairs as two completions, for SFT one; tokens with a prompt for each."""
    assert sides.reward(None, ["e1", "12", ""]) == [0.2, 0.1, 0.0]
    tokenizer = load_tokenizer(prepared / "model")
    rows = [{"prompt": "12", "chosen": "345", "rejected": "6"}]
    pair, chosen = (sides.as_batch(rows, tokenizer, kind) for kind in ("dpo_nll", "sft"))
    assert pair.completion_mask.sum(1).tolist() == [4, 2]
    assert chosen.completion_mask.sum(1).tolist() == [4]
    assert sides.full_tokens(pair) == 2 + 4 + 2 + 2 and sides.full_tokens(chosen) == 6
    group = sides.as_batch([{"prompt": "1", "completions": ["2", "3", "4"]}], tokenizer, "grpo")
    assert len(group.prompt_of) == 3


def test_a_point_of_scaling_is_timed_and_counted():
    """None, where it does not fit in the model's context."""
    point = dict(prompts=1, each=2, prompt=8, completion=4)
    got = scaling.child(point, str(ROOT / "toy/model"))
    assert {name: got[name] for name in point} == point
    assert got["seconds"] > 0 and got["predicted"] > 0 and got["memory"] > 0
    assert scaling.child(point | {"prompt": 253}, str(ROOT / "toy/model")) is None


def test_the_plain_generation_gives_the_same_greedy_completions(prepared):
    tokenizer = load_tokenizer(prepared / "model")
    model = load_model(AutoModelForCausalLM, prepared / "model", torch.device("cpu"))
    prompts = ["  31+ 580", "7777+9999", " 2+ 2"]
    plain, texts, ended = sides.plain_generate(model, tokenizer, prompts, 2, 24, 0.0)
    batch, same_texts, same_ended = generate(model, tokenizer, prompts, 2, 24, 0.0)
    assert texts == same_texts and ended.tolist() == same_ended.tolist()
    assert plain.completion_mask.tolist() == batch.completion_mask.tolist()
    assert len(set(batch.completion_mask.sum(1).tolist())) > 1  # else dropping rows is not seen


def measure_here(work, side, output):
    """What vs_trl.measure gives, without a process of its own; what it replaces is put back."""
    tokenizer = load_tokenizer(work["model"])
    script = importlib.import_module(work["kind"])
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((script, "generate"), (Run, "finish"), (Run, "log"), (sys, "argv")):
            if hasattr(owner, name):
                patch.setattr(owner, name, getattr(owner, name))
        given = work | {"side": side, "output": str(output / side)}
        _, loss, norm, tokens = sides.run_script(given, tokenizer)
    return {"loss": loss, "norm": norm, "tokens": tokens}


@pytest.mark.parametrize("kind", ["grpo", "ppo", "rm_bt"])
def test_a_script_and_its_plain_form_have_one_loss_and_gradient(prepared, kind, tmp_path):
    """One of them in processes of their own, as the program measures them."""
    length, tokens = (0, 0) if kind == "rm_bt" else (32, 96)
    work = job(prepared, kind, "", length, tokens)
    if kind == "rm_bt":
        ours, plain = (vs_trl.measure(work, side, prepared) for side in ("ours", "plain"))
    else:
        ours, plain = (measure_here(work, side, tmp_path) for side in ("ours", "plain"))
    assert ours["norm"] == pytest.approx(plain["norm"], rel=1e-4) and ours["norm"] > 1e-3
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4, abs=1e-6)
    assert ours["tokens"] == plain["tokens"] > 100


@pytest.mark.parametrize("length, tokens", [(32, 96), (0, 0)])
def test_log_probs_are_those_of_trl(prepared, length, tokens):
    pytest.importorskip("trl", reason="needs the extra `bench`")
    tokenizer = load_tokenizer(prepared / "model")
    ours, theirs = (
        sides.run_logps(job(prepared, "logps", side, length, tokens), tokenizer)[1:3]
        for side in ("ours", "trl")
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_time_is_believed_only_where_loss_and_gradient_agree():
    ours = [{"seconds": [1.0, 3.0], "peak": 2.0, "loss": 0.5, "norm": 7.0, "tokens": 60}]
    peer = [{"seconds": [4.0, 8.0], "peak": 5.0, "loss": 0.5, "norm": 7.0005, "tokens": 60}]
    row = ("2.00, 6.00", "30, 10", 3.0, "2.00, 5.00", 0.4)
    assert vs_trl.summary("grpo", ours, peer) == row
    assert "not the same: norm" in vs_trl.summary("grpo", ours, [peer[0] | {"norm": 7.01}])[0]
    assert "not the same: loss" in vs_trl.summary("grpo", ours, [peer[0] | {"loss": 0.6}])[0]
    rounded, other = [peer[0] | {"norm": 7.05}], [peer[0] | {"norm": 7.08}]
    assert "not the same: norm" in vs_trl.summary("grpo", ours, rounded)[0]
    assert vs_trl.summary("grpo", ours, rounded, "bfloat16") == row
    assert "not the same: norm" in vs_trl.summary("grpo", ours, other, "bfloat16")[0]
    assert vs_trl.summary("generate", ours, [other[0] | {"loss": 9.0}], "bfloat16") == row
    assert "not the same: norm" in vs_trl.summary("generate", ours, other)[0]
    assert (
        "not the same: norm"
        in vs_trl.summary("generate", ours, [{**other[0], "norm": 7.5}], "bfloat16")[0]
    )


# --- scaling.py -----------------------------------------------------------------------------------


def test_operations_are_counted_by_hand():
    config = LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=2,
                         tie_word_embeddings=True)  # fmt: skip
    body = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6 + 3 * 4  # q, k and v, o, the MLP, three norms
    tokens, completion_tokens = 2 * 5 + 2 * 3 * 7, 2 * 3 * 7
    expected = 6 * (body * tokens + 10 * 4 * completion_tokens)
    for tied in True, False:
        config.tie_word_embeddings = tied
        assert scaling.operations(LlamaForCausalLM(config), 2, 3, 5, 7) == expected
