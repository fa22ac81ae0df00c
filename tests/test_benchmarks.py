"""What the benchmarks read."""

import importlib
import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common import generate
from plumbing import Run, load_model, load_rows, load_tokenizer

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import over_optimisation
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
        name=kind, kind=kind, side=side, tokens=tokens, dtype="float32", num_steps=1, device="cpu",
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
    assert ours["norm"] == pytest.approx(plain["norm"], rel=1e-4) and min(ours["norm"]) > 1e-3
    assert len(ours["norm"]) == len(ours["loss"]) == (1 if kind == "rm_bt" else 2)
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4, abs=1e-6)
    assert ours["tokens"] == plain["tokens"] > 100


@pytest.mark.parametrize("length, tokens", [(32, 96), (0, 0)])
def test_log_probs_are_those_of_trl(prepared, length, tokens):
    pytest.importorskip("trl", reason="needs the extra `bench`")
    tokenizer = load_tokenizer(prepared / "model")
    work = job(prepared, "logps", "", length, tokens)
    found = []
    for side in ("ours", "trl"):
        _, loss, norm, _ = sides.run_logps(work | {"side": side}, tokenizer)
        found.append(loss + norm)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_time_is_believed_only_where_loss_and_gradient_agree():
    ours = [{"seconds": [1.0, 3.0], "peak": 2.0, "loss": [0.5], "norm": [7.0], "tokens": 60}]
    peer = [{"seconds": [4.0, 8.0], "peak": 5.0, "loss": [0.5], "norm": [7.0005], "tokens": 60}]
    row = ("2.00, 6.00", "30, 10", 3.0, "2.00, 5.00", 0.4)
    assert vs_trl.summary("grpo", ours, peer) == row
    assert "not the same: norm" in vs_trl.summary("grpo", ours, [peer[0] | {"norm": [7.01]}])[0]
    assert "not the same: loss" in vs_trl.summary("grpo", ours, [peer[0] | {"loss": [0.6]}])[0]
    third = [peer[0] | {"norm": [7.0, 7.01], "loss": [0.5, 0.5]}]
    first = [ours[0] | {"norm": [7.0, 7.0], "loss": [0.5, 0.5]}]
    assert "not the same: norm 7 and 7.01" in vs_trl.summary("grpo", first, third)[0]
    rounded, other = [peer[0] | {"norm": [7.05]}], [peer[0] | {"norm": [7.08]}]
    assert "not the same: norm" in vs_trl.summary("grpo", ours, rounded)[0]
    assert vs_trl.summary("grpo", ours, rounded, "bfloat16") == row
    assert "not the same: norm" in vs_trl.summary("grpo", ours, other, "bfloat16")[0]
    assert vs_trl.summary("generate", ours, [other[0] | {"loss": [9.0]}], "bfloat16") == row
    assert "not the same: norm" in vs_trl.summary("generate", ours, other)[0]
    assert (
        "not the same: norm"
        in vs_trl.summary("generate", ours, [{**other[0], "norm": [7.5]}], "bfloat16")[0]
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


# --- gpu.py ---------------------------------------------------------------------------------------


def test_the_report_of_a_gpu(monkeypatch, capsys):
    """A row for each script; what failed says so, and the others are there."""

    def measure(script, args, processes=1, shard=False):
        if script == "ppo":
            return {"error": "out of | memory"}
        return {"tokens": 123.4 * processes, "peak": 5.678 / (1 + shard), "before": 0.4}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "run_tests", lambda args: "14 passed")
    monkeypatch.setattr(gpu, "compare_with_trl", lambda args: "| case |")
    gpu.main(gpu.Args(device="cpu", scripts=("grpo", "ppo")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Commit {gpu.commit()}, a CPU, ") and "model model" in lines[0]
    assert lines[2:] == [
        "Tests of the device: 14 passed",
        "",
        "| script | tokens per second | peak memory, GB |",
        "|---|---|---|",
        "| grpo.py | 123 | 5.68 |",
        "| ppo.py | failed: out of / memory | |",
        "",
        "| case |",
    ]
    gpu.main(gpu.Args(device="cpu", scripts=("grpo",), processes=2))
    assert capsys.readouterr().out.splitlines()[6:] == [
        "| grpo.py | 123 | 5.68 |",
        "| torchrun --nproc-per-node 2 grpo.py | 247 | 5.68 |",
        "| torchrun --nproc-per-node 2 grpo.py --shard | 247 | 2.84 |",
        "",
        "| case |",
    ]


@pytest.mark.slow
def test_one_script_is_measured_in_two_processes():
    """They are one run: each alone would find the folder of the other there."""
    args = gpu.Args(device="cpu", num_steps=2, num_prompts=2, max_new_tokens=4)
    found = gpu.measure("grpo", args, processes=2, shard=True)
    assert found["tokens"] > 0 and 0 < found["before"] <= found["peak"] < 10
    args.num_prompts = 1
    assert gpu.measure("grpo", args, 2)["error"].endswith(
        "--num-prompts 1: fewer than the 2 processes, one would have nothing to do"
    )


def test_one_script_is_measured():
    args = gpu.Args(device="cpu", num_steps=2, num_prompts=1, max_new_tokens=4)
    found = gpu.measure("grpo", args)
    assert found["tokens"] > 0 and 0 < found["before"] <= found["peak"] < 10
    args.model = "no such folder"
    assert "no such folder" in gpu.measure("grpo", args)["error"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--scripts", "grpo", "judge"], "--scripts judge: not among sft, rm_bt"),
        (["--device", "cuda"], "--device cuda: PyTorch sees no GPU here"),
        (["--num-steps", "0"], "--num-steps"),
    ],
)
def test_what_the_gpu_report_refuses(words, said):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    program = [sys.executable, str(ROOT / "benchmarks/gpu.py"), *words]
    if "cuda" not in words:
        program += ["--device", "cpu", "--no-tests", "--no-trl"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1


# --- over_optimisation.py -------------------------------------------------------------------------

FORMS = {
    "best of N": lambda d, a, b: d * (a - b * d),
    "RL": lambda d, a, b: d * (a - b * math.log(d)) if d else 0.0,
}


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("a, b", [(0.5, 0.2), (1.0, -0.1), (-0.3, 0.4)])
def test_exact_data_gives_back_a_and_b(method, a, b):
    """Also with a point at d = 0, where both forms are 0; then nothing is left to be an error."""
    d = [0.0, 0.1, 0.5, 1.0, 1.7, 2.5, 6.0]
    values = torch.tensor([FORMS[method](x, a, b) for x in d])
    columns = over_optimisation.FORMS[method][0](torch.tensor(d))
    assert columns.shape == (7, 2) and columns[0].tolist() == [0, 0]
    parameters, errors, explained = over_optimisation.least_squares(columns, values)
    assert parameters.tolist() == pytest.approx([a, b], abs=1e-5)
    assert errors.max() < 1e-5 and explained == pytest.approx(1)


def test_points_that_do_not_tell_a_and_b_apart():
    """A run whose policy has not moved has all its points at d = 0, or but one."""
    for method in FORMS:
        rows = [{"kl": kl, "gold": 0.1, "start": 0.5} for kl in (0.0, -0.1, 0.3)]
        parameters, errors, explained, peak = over_optimisation.fit(rows, method)
        found = [*parameters.tolist(), *errors.tolist(), explained, peak]
        assert all(math.isnan(value) for value in found)


def plain_least_squares(x, z, y):
    """y = a x + b z without a constant, from sums: a, b, their standard errors, R^2."""
    xx = sum(v * v for v in x)
    zz = sum(v * v for v in z)
    xz = sum(v * w for v, w in zip(x, z, strict=True))
    xy = sum(v * w for v, w in zip(x, y, strict=True))
    zy = sum(v * w for v, w in zip(z, y, strict=True))
    det = xx * zz - xz * xz
    a, b = (zz * xy - xz * zy) / det, (xx * zy - xz * xy) / det
    left = sum((w - a * u - b * v) ** 2 for u, v, w in zip(x, z, y, strict=True))
    mean = sum(y) / len(y)
    variance = left / (len(y) - 2)
    errors = [(variance * zz / det) ** 0.5, (variance * xx / det) ** 0.5]
    return [a, b], errors, 1 - left / sum((w - mean) ** 2 for w in y)


def some_noise(d, seed):
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(len(d), generator=generator)


@pytest.mark.parametrize("method", FORMS)
def test_standard_errors_are_those_of_the_textbook(method):
    d = torch.linspace(0.2, 3, 12)
    exact = torch.tensor([FORMS[method](x, 0.6, 0.2) for x in d.tolist()])
    values = exact + some_noise(d, 1)
    columns = over_optimisation.FORMS[method][0](d)
    parameters, errors, explained = over_optimisation.least_squares(columns, values)
    x, z = columns.T.tolist()
    wanted = plain_least_squares(x, z, values.tolist())
    assert parameters.tolist() == pytest.approx(wanted[0], rel=1e-4)
    assert errors.tolist() == pytest.approx(wanted[1], rel=1e-4)
    assert explained.item() == pytest.approx(wanted[2], rel=1e-4)


@pytest.mark.parametrize("method", FORMS)
def test_standard_errors_are_the_spread_over_new_noise(method):
    """600 draws of the same noise: the parameters' deviation, and the mean of what is claimed."""
    d = torch.linspace(0.2, 3, 12)
    exact = torch.tensor([FORMS[method](x, 0.6, 0.2) for x in d.tolist()])
    columns = over_optimisation.FORMS[method][0](d)
    drawn, claimed = [], []
    for seed in range(600):
        values = exact + some_noise(d, seed)
        parameters, errors, _ = over_optimisation.least_squares(columns, values)
        drawn.append(parameters)
        claimed.append(errors**2)
    spread = torch.stack(drawn).std(0)
    assert torch.stack(drawn).mean(0).tolist() == pytest.approx([0.6, 0.2], abs=0.01)
    wanted = torch.stack(claimed).mean(0).sqrt()
    assert spread.tolist() == pytest.approx(wanted.tolist(), rel=0.1)


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("a, b", [(0.5, 0.2), (0.2, 0.3), (0.9, 0.8)])
def test_the_peak_is_that_of_a_grid(method, a, b):
    grid = [i / 10000 for i in range(1, 60000)]
    best = max(grid, key=lambda d: FORMS[method](d, a, b))
    assert over_optimisation.FORMS[method][1](a, b) == pytest.approx(best, abs=2e-4)


def test_a_form_without_a_peak_has_none():
    for a, b in ((0.5, -0.2), (0.5, 0.0), (-0.5, 0.2)):
        assert math.isnan(over_optimisation.best_of_n_peak(a, b))
    assert math.isnan(over_optimisation.rl_peak(0.5, -0.2))
    assert math.isnan(over_optimisation.rl_peak(0.5, 0.0))
    assert over_optimisation.rl_peak(1.0, 1e-9) == math.inf
    assert over_optimisation.rl_peak(-0.5, 0.5) == pytest.approx(math.exp(-2))


def test_best_of_n_points_are_an_enumeration():
    """Of each prompt every choice of n completions, its best by the proxy, and that one's gold."""
    torch.manual_seed(0)
    proxy = torch.randn(3, 8)
    gold = torch.rand(3, 8)
    points = over_optimisation.best_of_n_points(proxy, gold)
    assert len(points) == 4
    for n, point in zip((1, 2, 4, 8), points, strict=True):
        chosen = []
        for p in range(3):
            for choice in itertools.combinations(range(8), n):
                chosen.append((p, max(choice, key=lambda i: proxy[p, i].item())))
        means = [sum(x[p, i].item() for p, i in chosen) / len(chosen) for x in (proxy, gold)]
        wanted = [math.log(n) - (n - 1) / n, *means]
        assert list(point) == pytest.approx(wanted, abs=1e-5)


def test_completions_are_judged_by_their_own_problem():
    """Of 20 problems, 4 each, in two calls of generate; each first line adds its last digits."""
    rows, texts, gold = over_optimisation.sample("problems_train.jsonl", 20, 4)
    problems = load_rows(ROOT / "toy/problems_train.jsonl")[:20]
    assert gold.shape == (20, 4) and len(texts) == len(rows) == 80
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        assert row["prompt"] == problems[i // 4]["prompt"]
        is_right = text.split("\n")[-1] == problems[i // 4]["answer"]
        assert gold[i // 4, i % 4].item() == is_right
    assert 0 < gold.mean() < 1


def test_a_fit_is_of_what_is_above_the_start():
    """Points of R = 0.5 + d (0.4 - 0.1 d), given by their KL; one below 0 counts as 0. A point that
    is off is left out where it is too far."""
    rows = [{"kl": -0.01, "gold": 0.5, "start": 0.5}]
    for d in (0.5, 1.0, 2.0, 3.0):
        rows.append({"kl": d * d, "gold": 0.5 + d * (0.4 - 0.1 * d), "start": 0.5})
    off = {"kl": 16.0, "gold": 0.0, "start": 0.5}
    for given in (rows, [*rows, off]):
        parameters, errors, explained, peak = over_optimisation.fit(given, "best of N", 3.0)
        assert parameters.tolist() == pytest.approx([0.4, 0.1], abs=1e-5) and errors.max() < 1e-5
        assert explained == pytest.approx(1) and peak == pytest.approx(2, abs=1e-3)
    assert over_optimisation.fit([*rows, off], "best of N")[3] < 1.9
    assert over_optimisation.seen_peak(rows) == (2.0, pytest.approx(0.9))


def test_over_optimisation_from_the_reward_model_to_the_figure(tmp_path, monkeypatch, capsys):
    """One pair of sizes, one step of GRPO or two: points, table, figure; a second call computes
    nothing again."""
    pytest.importorskip("matplotlib")
    args = over_optimisation.Args(
        sizes=(20, 40), seeds=(3,), output_dir=str(tmp_path / "runs"), least_steps=1, rl_steps=3,
        rl_prompts=2, num_prompts=3, num_generations=4, window=2, start_prompts=5,
        fit_until=100.0, out=str(tmp_path / "figure.png"),
    )  # fmt: skip
    over_optimisation.main(args)
    for size in (20, 40):
        rows = load_rows(tmp_path / f"runs/points_{size}_3.jsonl")
        assert len(rows) == 3 + 2
        pairs = load_rows(tmp_path / f"runs/pairs_{size}_3.jsonl")
        assert len({json.dumps(row) for row in pairs}) == size
        of_these = [row for row in rows if row["method"] == "best of N"]
        assert [row["kl"] for row in of_these] == pytest.approx([0, math.log(2) - 0.5, 0.6362944])
        assert of_these[0]["proxy"] == pytest.approx(0, abs=1e-5)  # the start's mean is 0
        assert [row["start"] for row in of_these] == pytest.approx(3 * [of_these[0]["gold"]])
        flags = json.loads((tmp_path / f"runs/rl_{size}_3/args.json").read_text())
        assert flags["reward_model"] == str(tmp_path / f"runs/rm_{size}_3/final")
        metrics = load_rows(tmp_path / f"runs/rl_{size}_3/metrics.jsonl")
        of_these = [row for row in rows if row["method"] == "RL"]
        means = [(metrics[i]["gold_reward"] + metrics[i + 1]["gold_reward"]) / 2 for i in (0, 1)]
        assert [row["gold"] for row in of_these] == pytest.approx(means)
        share = over_optimisation.sample("problems_train.jsonl", 5, 4)[2].mean().item()
        assert [row["start"] for row in of_these] == [share] * 2 and 0 < share < 1
    printed = capsys.readouterr().out
    assert "| RL | 40 | 3 |" in printed and (tmp_path / "figure.png").exists()

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(over_optimisation, "train", refuse)
    (tmp_path / "figure.png").unlink()
    over_optimisation.main(args)
    assert (tmp_path / "figure.png").exists()
    table = printed[printed.index("gold reward of the start policy, on the problems of best") :]
    assert capsys.readouterr().out == table
