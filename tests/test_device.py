"""Every script on the simulated accelerator and on a GPU if there is one; the simulation."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForSequenceClassification

from plumbing import load_model

SIM = ROOT / "tests" / "simulated_device.py"
pytestmark = pytest.mark.slow  # a minute altogether: every script starts in a process of its own


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


def test_the_simulation_refuses_to_mix():
    code = f"import sys; sys.path.insert(0, {str(SIM.parent)!r})\n" + (
        "import simulated_device, torch; simulated_device.enable()\n"
        "print(torch.ones(2, device='sim') + torch.ones(2))"
    )
    out = run("-c", code)
    assert out.returncode == 1 and "same device" in out.stderr


def test_the_simulation_leaves_no_weight_uninitialised():
    """What no file has, a new head and the rotary frequencies, is what it is on the CPU."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(SIM.parent)!r}]\n"
        "import torch, transformers, simulated_device, plumbing\n"
        "simulated_device.enable()\n"
        "torch.manual_seed(0)\n"
        "args = transformers.AutoModelForSequenceClassification, sys.argv[1]\n"
        "m = plumbing.load_model(*args, torch.device('sim'), new_head=1)\n"
        "print(m.score.weight.cpu().tolist(), m.model.rotary_emb.inv_freq.cpu().tolist())"
    )
    out = run("-c", code, ROOT / "toy/model")
    assert out.returncode == 0, out.stderr
    torch.manual_seed(0)
    model = load_model(
        AutoModelForSequenceClassification, ROOT / "toy/model", torch.device("cpu"), new_head=1
    )
    frequencies = model.model.rotary_emb.inv_freq.tolist()
    assert out.stdout == f"{model.score.weight.tolist()} {frequencies}\n"


# --- The scripts ----------------------------------------------------------------------------------


RUNS = {
    "grpo": ("grpo", dict(num_epochs=2, num_minibatches=2)),
    "grpo, process": (
        "grpo",
        dict(supervision="process", reward=f"{ROOT}/toy/make.py:step_rewards"),
    ),
    "grpo, plain": ("grpo", dict(share_prompts=False, micro_batch_size=3, beta=0.0)),
    "grpo, lora": ("grpo", dict(lora_rank=2)),
    "reinforce": ("reinforce_rloo", dict(baseline="remax")),
    "ppo": ("ppo", dict(num_epochs=2, num_minibatches=2, micro_batch_size=2, kl_target=6.0)),
    "ppo, ptx": ("ppo", dict(num_epochs=1, critic_warmup=1, ptx_coef=1.0, beta=0.0)),
    "rejection sampling": ("rejection_sampling", dict(select="overall", top_k=3, rounds=2)),
    "dpo, iterations": ("dpo_nll", dict(iterations=2, num_pairs=4, temperature=3.0)),
    "dpo": ("dpo_nll", dict(precompute_ref=False, loss="ipo", micro_batch_size=5)),
    "sft": ("sft", dict(max_length=30)),
    "bt": ("rm_bt", dict(nll_coef=0.1, center_coef=0.1)),
    "bt, lora": ("rm_bt", dict(lora_rank=2, nll_coef=0.1)),
    "kwise": ("rm_kwise", dict(share_prompts=False)),
    "prm": ("prm", dict(solution_score="minimum")),
    "orm": ("prm", dict(supervision="outcome", head="cobbe", lm_coef=0.1)),
}
FILES = {
    "bt": "pref",
    "bt, lora": "pref",
    "kwise": "kwise",
    "dpo": "pref",
    "prm": "prm",
    "orm": "orm",
    "sft": "sft",
}
SAMPLING = dict(num_prompts=2, num_generations=2, max_new_tokens=6, reward="REWARD", eval_size=3)


def flags_of(name, folder, tiny):
    """Flags of one small run on six rows, with evaluations and checkpoints."""
    script, flags = RUNS[name]
    file = FILES.get(name, "problems")
    lines = (ROOT / f"toy/{file}_train.jsonl").read_text().splitlines(keepends=True)
    rows = folder / f"{file}.jsonl"
    rows.write_text("".join(lines[:6]))
    small = dict(model=tiny, dataset=str(rows), eval_dataset=str(rows), learning_rate=1e-3)
    small |= dict(checkpoint_every=1, eval_every=2)
    if file == "problems":
        small |= SAMPLING | dict(reward=f"{folder}/digits.py:digits")
        small |= dict(num_steps=2) if script in ("grpo", "reinforce_rloo", "ppo") else {}
    else:
        small |= dict(batch_size=3, num_epochs=1, eval_size=3)
    if script == "dpo_nll":
        small |= dict(eval_prompts=str(folder / "problems.jsonl"), max_new_tokens=8)
        small |= dict(eval_dataset="") if "iterations" in name else {}
    if "ptx" in name:
        small |= dict(pretrain_dataset=str(folder / "text.jsonl"))
    return script, small | flags


@pytest.fixture(scope="module", params=["sim", "cuda"])
def runs(request, tmp_path_factory, tiny):
    """All runs on a device, in one process: their folder, {name: what went wrong}, output."""
    device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.jsonl").write_text('{"text": "12345"}\n{"text": "6"}\n{"text": "123"}')
    (folder / "digits.py").write_text(
        "def digits(prompts, completions, rows):\n"
        "    return [float(len(set(text))) for text in completions]\n"
    )
    todo = {}
    for name in RUNS:
        script, flags = flags_of(name, folder, tiny)
        todo[name] = script, flags | dict(device=device, output_dir=str(folder / "runs" / name))
    (folder / "runs.json").write_text(json.dumps(todo))
    out = run(SIM, folder / "runs.json", device)
    said = [line[4:] for line in out.stdout.splitlines() if line.startswith("RUN ")]
    return folder, dict(map(json.loads, said)), out.stderr


@pytest.mark.parametrize("name", RUNS)
def test_a_script_runs_there(name, runs):
    """It comes to its end, with the metrics of its evaluations and steps."""
    folder, wrong, errors = runs
    assert wrong.get(name, "it was not begun: " + errors[-2000:]) == ""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "tokens_per_second" in row]
    assert len(steps) >= 2 and len(rows) > len(steps)
    assert any(name.startswith("eval_") for row in rows for name in row)
