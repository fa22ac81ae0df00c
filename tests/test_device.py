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


@pytest.mark.parametrize(
    "script, flags",
    [
        ("grpo", ["--num-epochs", "2", "--num-minibatches", "2"]),
        ("grpo", ["--supervision", "process", "--reward", f"{ROOT}/toy/make.py:step_rewards"]),
        ("grpo", ["--no-share-prompts", "--micro-batch-size", "3", "--beta", "0"]),
        ("sft", ["--max-length", "30"]),
    ],
)
def test_a_script_runs_there(script, flags, tmp_path):
    small = ["--num-prompts", "2", "--num-generations", "2", "--max-new-tokens", "8"]
    small += ["--num-steps", "2", "--eval-size", "4", "--checkpoint-every", "1"]
    if script == "sft":
        rows = (ROOT / "toy/sft_train.jsonl").read_text().splitlines(True)[:40]
        (tmp_path / "d.jsonl").write_text("".join(rows))
        small = ["--dataset", tmp_path / "d.jsonl", "--eval-dataset", tmp_path / "d.jsonl"]
    command = [SIM, script, "--device", "sim", "--output-dir", tmp_path / "run", *small, *flags]
    out = run(*command)
    assert out.returncode == 0, out.stderr[-2000:]
