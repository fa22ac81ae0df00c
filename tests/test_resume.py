"""A run that was stopped and resumed is the run that was not: rows, samples, weights, bit for bit.

With --num-steps changed between, so is the learning rate where it falls with the steps; these tests
keep it constant, so that 2 steps and 2 more are 4. sft.py has no --num-steps: it is interrupted.
"""

import json
import os
import random

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import common
import plumbing
import grpo
import prm
import reinforce_rloo
import rm_bt
import rm_kwise
import sft

pytestmark = pytest.mark.usefixtures("no_picture")

TOY = str(ROOT / "toy" / "model")
both = pytest.mark.parametrize("script", [grpo, sft], ids=["grpo", "sft"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen rows of the toy, and a reward that differs from completion to completion."""
    folder = tmp_path_factory.mktemp("data")
    for name in "sft", "problems":
        lines = (ROOT / "toy" / f"{name}_train.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:16]))
    (folder / "reward.py").write_text(
        "import random\n\n\n"
        "def digits(prompts, completions, rows):\n"
        "    digits = [sum(map(int, filter(str.isdigit, c))) for c in completions]\n"
        "    return [d / 10 + random.random() / 100 for d in digits]\n"
    )
    return folder


def some_args(script, data, output_dir, **changes):
    args = dict(model=TOY, output_dir=str(output_dir), eval_every=2, checkpoint_every=2)
    args |= dict(device="cpu", lr_schedule="constant", learning_rate=1e-3, max_new_tokens=10)
    if script is not sft:
        args |= dict(dataset=f"{data}/problems.jsonl", eval_dataset=f"{data}/problems.jsonl")
        args |= dict(reward=f"{data}/reward.py:digits", eval_size=3, num_steps=4, beta=0.01)
        args |= dict(num_prompts=2, num_generations=3, temperature=3.0)  # else all are alike
    else:
        args |= dict(dataset=f"{data}/sft.jsonl", eval_dataset=f"{data}/sft.jsonl")
        args |= dict(num_epochs=2, batch_size=8, micro_batch_size=4, max_length=64)
    return script.Args(**args | changes)


def metrics(run, untimed=True):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = {"seconds", "tokens_per_second"} if untimed else set()
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def weights(run):
    return AutoModelForCausalLM.from_pretrained(run / "final").state_dict()


def checkpoint(run):
    return torch.load(run / "checkpoint" / "state.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def learns(run):
    """Every step had a gradient: else equal weights would show nothing."""
    steps = [row for row in metrics(run) if "grad_norm" in row]
    assert len(steps) == 4 and all(row["grad_norm"] > 1e-4 for row in steps)
    toy = AutoModelForCausalLM.from_pretrained(TOY).state_dict()
    assert not any(torch.equal(w, toy[name]) for name, w in weights(run).items())


def same(run, other):
    """Rows, samples, weights, and the optimiser and random states of both are the same."""
    assert metrics(run) == metrics(other) and len(metrics(run)) > 4
    assert (run / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert equal(weights(run), weights(other))
    ours, theirs = checkpoint(run), checkpoint(other)
    unseeded = set() if "policy" in ours else {"random"}  # sft.py draws nothing from it
    for key in ours.keys() - {"seconds", "sizes"} - unseeded:
        assert equal(ours[key], theirs[key]), key


UNBROKEN = {
    "grpo": (grpo, {}),
    "grpo, minibatches": (grpo, dict(num_epochs=2, num_minibatches=2)),
    "grpo, schedule": (grpo, dict(lr_schedule="linear")),
    "reinforce, moving": (reinforce_rloo, dict(baseline="moving")),
    "sft": (sft, {}),
    "sft, schedule": (sft, dict(lr_schedule="cosine", warmup_ratio=0.5)),
}


@pytest.fixture(scope="module", params=UNBROKEN.values(), ids=UNBROKEN)
def unbroken(request, data, tmp_path_factory):
    """A script, flags, and the folder of its run of four steps that nothing interrupted."""
    script, changes = request.param
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing, "draw_curves", lambda rows, path: None)
        script.main(some_args(script, data, folder, **changes))
    learns(folder)
    return script, changes, folder


def interrupt(monkeypatch, script, name, call):
    """Raise KeyboardInterrupt, in place of a kill, at this call of a script's function."""
    function, calls = getattr(script, name), []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **more)

    monkeypatch.setattr(script, name, interrupted)


def stopped_run(script, args, name, call):
    module = script if hasattr(script, name) else plumbing
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, module, name, call)
        with pytest.raises(KeyboardInterrupt):
            script.main(args)


def resumed(script, args):
    torch.manual_seed(12345)  # the state of a new process is another one
    random.seed(12345)
    args.resume = True
    script.main(args)


# --- Resume ---------------------------------------------------------------------------------------


def test_four_steps_are_two_and_two(data, tmp_path):
    script, straight, two = grpo, tmp_path / "straight", tmp_path / "two"
    script.main(some_args(script, data, straight))
    learns(straight)
    script.main(some_args(script, data, two, num_steps=2))
    assert not equal(weights(two), weights(straight))
    # Evaluated after its last step, as the straight run is after each second step
    resumed(script, some_args(script, data, two))
    same(two, straight)


@pytest.mark.parametrize("step", [1, 3])
def test_a_kill_in_the_middle_of_a_step(unbroken, data, tmp_path, step):
    """In the last gradient step of step 1, where no checkpoint is yet, or of step 3."""
    script, changes, whole = unbroken
    args = some_args(script, data, tmp_path / "run", **changes)
    each = getattr(args, "num_minibatches", 1) * (args.num_epochs if script is grpo else 1)
    stopped_run(script, args, "check_finite", step * each)
    assert (tmp_path / "run" / "checkpoint" / "state.pt").exists() == (step > 2)
    assert len(metrics(tmp_path / "run")) < len(metrics(whole))
    resumed(script, args)
    same(tmp_path / "run", whole)


def test_a_kill_in_an_evaluation(unbroken, data, tmp_path):
    script, changes, whole = unbroken
    args = some_args(script, data, tmp_path / "run", **changes)
    name = "evaluate" if script is sft else "greedy_rewards"
    stopped_run(script, args, name, 3)  # after the fourth step
    resumed(script, args)
    same(tmp_path / "run", whole)


def test_two_kills(unbroken, data, tmp_path):
    script, changes, whole = unbroken
    args = some_args(script, data, tmp_path / "run", checkpoint_every=1, **changes)
    each = getattr(args, "num_minibatches", 1) * (args.num_epochs if script is grpo else 1)
    stopped_run(script, args, "check_finite", 2 * each)
    args.resume = True
    stopped_run(script, args, "check_finite", 2 * each)
    assert checkpoint(tmp_path / "run")["step"] == 2
    resumed(script, args)
    same(tmp_path / "run", whole)


def test_a_finished_run_resumed_stays_as_it_is(unbroken, data, tmp_path):
    script, changes, whole = unbroken
    args = some_args(script, data, tmp_path / "run", **changes)
    script.main(args)
    before = metrics(tmp_path / "run", untimed=False)
    resumed(script, args)
    assert metrics(tmp_path / "run", untimed=False) == before
    same(tmp_path / "run", whole)


def test_half_a_row_at_the_end_is_cut_off(unbroken, data, tmp_path):
    script, changes, whole = unbroken
    args = some_args(script, data, tmp_path / "run", **changes)
    stopped_run(script, args, "check_finite", 3 * getattr(args, "num_minibatches", 1) ** 2)
    for name in "metrics.jsonl", "samples.jsonl":
        with open(tmp_path / "run" / name, "a") as f:
            f.write('{"step": 3, "lo')
    resumed(script, args)
    same(tmp_path / "run", whole)


def test_seconds_go_on_from_the_checkpoint(data, tmp_path):
    run = tmp_path / "run"
    stopped_run(grpo, some_args(grpo, data, run), "check_finite", 3)
    state = checkpoint(run)
    torch.save(state | {"seconds": 1000.0}, run / "checkpoint" / "state.pt")
    resumed(grpo, some_args(grpo, data, run))
    assert all(row["seconds"] > 1000 for row in metrics(run, untimed=False) if row["step"] > 2)


# --- Checkpoints ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("where", ["torch.save", "os.replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_old(
    script, data, tmp_path, monkeypatch, where
):
    """The second checkpoint, after step 4: killed half written, or written and not yet renamed."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    script.main(some_args(script, data, whole))
    real, calls = (torch.save if where == "torch.save" else os.replace), []

    def killed(*args, **more):
        target = str(args[1])
        if os.path.basename(target).startswith("state"):
            calls.append(target)
            if len(calls) == 2:
                if where == "torch.save":  # half of a file, wherever it goes
                    with open(args[1], "wb") as f:
                        f.write(b"half")
                raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(where, killed)
        with pytest.raises(KeyboardInterrupt):
            script.main(some_args(script, data, run))
    assert checkpoint(run)["step"] == 2
    resumed(script, some_args(script, data, run))
    assert checkpoint(run)["step"] == 4
    same(run, whole)


@both
def test_a_kill_while_the_final_model_is_written(script, data, tmp_path, monkeypatch):
    args = some_args(script, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt(patch, PreTrainedModel, "save_pretrained", 1)
        with pytest.raises(KeyboardInterrupt):
            script.main(args)
    assert checkpoint(tmp_path / "run")["step"] == 4 and not (tmp_path / "run" / "final").exists()
    before = metrics(tmp_path / "run")
    resumed(script, args)
    assert metrics(tmp_path / "run") == before and weights(tmp_path / "run")


@both
def test_resuming_leaves_the_args_as_they_are(script, data, tmp_path):
    """Were they written anew, a kill there would leave a run of no known flags."""
    args = some_args(script, data, tmp_path / "run")
    stopped_run(script, args, "check_finite", 3)
    file = tmp_path / "run" / "args.json"
    before = file.read_bytes(), file.stat().st_mtime_ns
    resumed(script, args)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


# --- Seeds, and what is left ----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run(unbroken, data, tmp_path):
    script, changes, whole = unbroken
    torch.rand(11)
    script.main(some_args(script, data, tmp_path / "run", **changes))
    same(tmp_path / "run", whole)


@both
def test_another_seed_gives_another_run(script, data, tmp_path):
    for seed in 0, 1:
        script.main(some_args(script, data, tmp_path / str(seed), seed=seed))
    ours, theirs = (metrics(tmp_path / str(seed)) for seed in (0, 1))
    assert len(ours) == len(theirs) and ours != theirs
    assert not equal(weights(tmp_path / "0"), weights(tmp_path / "1"))


@both
def test_the_final_model_loads_and_generates(script, data, tmp_path):
    run = tmp_path / "run"
    script.main(some_args(script, data, run))
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert model.dtype == torch.float32 and tokenizer.chat_template
    state = next(v for k, v in checkpoint(run).items() if k in ("policy", "model"))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "  12+ 345"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    out = model.generate(ids, max_new_tokens=10, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    again = common.generate(
        plumbing.load_model(AutoModelForCausalLM, str(run / "final"), torch.device("cpu")),
        plumbing.load_tokenizer(str(run / "final")), ["  12+ 345"], 1, 10, temperature=0,
    )[1][0]  # fmt: skip
    assert text and text == again
    names = {p.name for p in run.iterdir()}
    assert {"args.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "final"} <= names
    assert not any(name.endswith(".new") for name in names | set(os.listdir(run / "checkpoint")))


@pytest.mark.parametrize(
    "script, name, changes",
    [(rm_bt, "pref", dict(nll_coef=0.1)), (rm_kwise, "kwise", {}), (prm, "prm", {}),
     (prm, "orm", dict(supervision="outcome", head="cobbe", lm_coef=0.1))],
    ids=["rm_bt", "rm_kwise", "prm", "orm"],
)  # fmt: skip
def test_a_reward_models_killed_run_goes_on_as_if_it_had_not_been(
    script, name, changes, tmp_path, monkeypatch
):
    lines = (ROOT / "toy" / f"{name}_train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:24]))
    rows = str(tmp_path / "rows.jsonl")

    def args(folder):
        return script.Args(
            model=TOY, dataset=rows, eval_dataset=rows, output_dir=str(tmp_path / folder),
            device="cpu", batch_size=8, num_epochs=2, eval_every=2, checkpoint_every=2,
            learning_rate=1e-3, **changes,
        )  # fmt: skip

    script.main(args("straight"))
    stopped_run(script, args("killed"), "check_finite", 4)
    resumed(script, args("killed"))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert metrics(straight) == metrics(killed)
    assert sum("grad_norm" in row for row in metrics(straight)) == 6
    for file in ("config.json", "model.safetensors"):
        assert (straight / "final" / file).read_bytes() == (killed / "final" / file).read_bytes()
