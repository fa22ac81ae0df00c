"""Every script on the simulated accelerator, and the simulation itself."""

import subprocess
import sys

import pytest
from conftest import ROOT

SIM = ROOT / "tests" / "simulated_device.py"


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
        "import sys, torch, simulated_device, common\n"
        "if sys.argv[1] == 'sim': simulated_device.enable()\n"
        "torch.manual_seed(0)\n"
        "args = common.transformers.AutoModelForSequenceClassification, sys.argv[2]\n"
        "m = common.load_model(*args, torch.device(sys.argv[1]), new_head=1)\n"
        "print(m.score.weight.cpu().tolist(), m.model.rotary_emb.inv_freq.cpu().tolist())"
    )
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(SIM.parent)!r}]\n"
    outs = [run("-c", path + code, device, ROOT / "toy/model") for device in ("cpu", "sim")]
    assert outs[0].returncode == outs[1].returncode == 0, outs[1].stderr
    assert outs[0].stdout == outs[1].stdout


@pytest.mark.parametrize(
    "script, flags",
    [
        ("grpo", ["--num-epochs", "2", "--num-minibatches", "2"]),
        ("grpo", ["--supervision", "process", "--reward", f"{ROOT}/toy/make.py:step_rewards"]),
        ("grpo", ["--no-share-prompts", "--micro-batch-size", "3", "--beta", "0"]),
        ("reinforce_rloo", ["--baseline", "remax"]),
        ("ppo", ["--num-minibatches", "2", "--micro-batch-size", "2", "--kl-target", "6"]),
        ("ppo", ["--num-epochs", "1", "--critic-warmup", "1", "--ptx-coef", "1", "--beta", "0"]),
        ("rejection_sampling", ["--select", "overall", "--top-k", "3", "--rounds", "2"]),
        ("dpo_nll", ["--iterations", "2", "--num-pairs", "4", "--temperature", "3"]),
        ("dpo_nll", ["--no-precompute-ref", "--loss", "ipo", "--micro-batch-size", "5"]),
        ("sft", ["--max-length", "30"]),
        ("rm_bt", ["--nll-coef", "0.1", "--center-coef", "0.1"]),
        ("rm_kwise", ["--no-share-prompts"]),
        ("prm", ["--solution-score", "minimum"]),
        ("prm", ["--supervision", "outcome", "--head", "cobbe", "--lm-coef", "0.1"]),
    ],
)
def test_a_script_runs_there(script, flags, tmp_path):
    small = ["--num-prompts", "2", "--num-generations", "2", "--max-new-tokens", "8"]
    small += ["--num-steps", "2", "--eval-size", "4", "--checkpoint-every", "1"]
    if "--ptx-coef" in flags:
        (tmp_path / "text.jsonl").write_text('{"text": "12345"}\n{"text": "6"}\n{"text": "123"}')
        small += ["--pretrain-dataset", tmp_path / "text.jsonl"]
    if script == "rejection_sampling":
        small = [*small[:6], *small[8:]]
    if "--iterations" in flags:
        (tmp_path / "len.py").write_text("def f(p, c, r):\n    return [len(set(x)) for x in c]")
        small = [*small[:6], "--dataset", ROOT / "toy/problems_train.jsonl"]
        small += ["--reward", f"{tmp_path}/len.py:f", "--eval-size", "4"]
    elif script not in ("grpo", "reinforce_rloo", "ppo", "rejection_sampling"):
        name = {"rm_bt": "pref", "rm_kwise": "kwise", "dpo_nll": "pref"}.get(script, script)
        name = "orm" if "outcome" in flags else name
        rows = (ROOT / f"toy/{name}_train.jsonl").read_text().splitlines(True)[:40]
        (tmp_path / "d.jsonl").write_text("".join(rows))
        small = ["--dataset", tmp_path / "d.jsonl", "--eval-dataset", tmp_path / "d.jsonl"]
    command = [SIM, script, "--device", "sim", "--output-dir", tmp_path / "run", *small, *flags]
    out = run(*command)
    assert out.returncode == 0, out.stderr[-2000:]
