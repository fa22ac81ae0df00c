"""Tests, TRL, speed and memory on a GPU, as Markdown to paste: benchmarks/gpu.sh calls it.

    python benchmarks/gpu.py --model FOLDER          # on a machine with a GPU
    python benchmarks/gpu.py --device cpu            # the toy, on a CPU

1. tests/test_device.py: each script runs on the device.
2. benchmarks/vs_trl.py, where trl is installed.
3. Each training script, a few steps on short rows of toy/, in a process of its own: completion
   tokens per second (the median of the steps after the first), and the most memory that it used.
4. Where there are several GPUs, the same by torchrun, and with --shard; the memory is that of the
   first process. --processes 2 tries this on a CPU.
"""

import importlib
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from plumbing import Run, end_processes, run_script, start_processes, stop  # noqa: E402
from sides import peak_memory  # noqa: E402


@dataclass
class Args:
    model: str = str(ROOT / "toy/model")  # folder or hub name of a causal model
    device: Literal["cuda", "cpu"] = "cuda"  # where everything runs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # dtype of the scripts' forward passes
    scripts: tuple[str, ...] = ()  # names of scripts, such as grpo; none: all nine
    num_steps: int = 4  # steps per script, of which the first is not timed
    num_prompts: int = 4  # prompts per step of those that sample, 8 completions each
    batch_size: int = 8  # rows per step of the others
    max_new_tokens: int = 64  # longest completion that is sampled
    micro_batch_size: int = 8  # completions per forward pass
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    processes: int = 0  # processes of torchrun; 0: one for each GPU, and on a CPU none
    tests: bool = True  # run the tests that start each script on the device
    trl: bool = True  # compare with TRL, where it is installed


TOY = {"model": "toy/model", "dataset": ""}

# Script: its rows in toy/
SCRIPTS = {
    "sft": "sft_train",
    "rm_bt": "pref_train",
    "rm_kwise": "kwise_train",
    "prm": "prm_train",
    "rejection_sampling": "problems_train",
    "reinforce_rloo": "problems_train",
    "ppo": "problems_train",
    "grpo": "problems_train",
    "dpo_nll": "pref_train",
}

# --- One script, in a process of its own ----------------------------------------------------------


def flags_of(script, args, folder, shard):
    """Flags of a run of `args.num_steps` steps that neither evaluates nor saves -> dict."""
    flags = dict(
        model=args.model,
        dataset=f"{folder}/rows.jsonl",
        output_dir=f"{folder}/run",
        device=args.device,
        dtype=args.dtype,
        eval_size=0,
        micro_batch_size=args.micro_batch_size,
        checkpoint_every=10**6,
        gradient_checkpointing=args.gradient_checkpointing,
        shard=shard,
    )
    if SCRIPTS[script] != "problems_train":
        return flags | dict(num_epochs=1, batch_size=args.batch_size)
    flags |= dict(num_prompts=args.num_prompts, num_generations=8)
    flags |= dict(max_new_tokens=args.max_new_tokens)
    if script == "rejection_sampling":
        return flags | dict(batch_size=args.num_prompts, num_epochs=args.num_steps)
    return flags | dict(num_steps=args.num_steps)


def child(job):
    """Run a script, and print what it took as a line of JSON: of several processes, the first."""
    start_processes()
    script = importlib.import_module(job["script"])
    Run.finish = lambda *_: None  # saving is not what is measured
    before = 0.0 if job["flags"]["device"] == "cuda" else peak_memory("cpu")
    script.main(script.Args(**job["flags"]))
    peak = peak_memory(job["flags"]["device"])
    print("\n" + json.dumps({"peak": peak, "before": before}), flush=True)
    end_processes()


def failure(stderr):
    """What a process wrote -> the line of its error, without torchrun's report of it."""
    lines = re.findall(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception): .+)$", stderr, re.MULTILINE)
    lines = [line for line in lines if not line.startswith("torch.distributed.elastic")]
    return (lines or stderr.strip().splitlines() or ["it ended"])[-1][:200]


def measure(script, args, processes=1, shard=False):
    """Run a script in a process of its own, or by torchrun in several.

    -> {"tokens": tokens per second, "peak": GB, "before": GB of the process without a model, on the
    CPU; "error": what it said, where it failed}.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines = (ROOT / f"toy/{SCRIPTS[script]}.jsonl").read_text().splitlines(keepends=True)
        num_rows = args.num_steps * args.batch_size
        if SCRIPTS[script] == "problems_train":
            num_rows = args.num_steps * args.num_prompts
        Path(folder, "rows.jsonl").write_text("".join(lines[:num_rows]))
        job = {"script": script, "flags": flags_of(script, args, folder, shard)}
        launcher = [sys.executable]
        if processes > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(processes)]
        command = [*launcher, __file__, "child", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            return {"error": failure(done.stderr)}
        found = json.loads(done.stdout.strip().splitlines()[-1])
        rows = map(json.loads, Path(folder, "run/metrics.jsonl").read_text().splitlines())
        speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        return found | {"tokens": statistics.median(speeds[1:] or speeds)}


# --- The report -----------------------------------------------------------------------------------


def commit():
    """The commit of this folder, with a mark where files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def heading(args):
    """What was run, on what, in which versions -> one line."""
    device = f"a CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    versions = f"PyTorch {torch.__version__}, Transformers {transformers.__version__}"
    return (
        f"Commit {commit()}, {device}, {versions}, model {Path(args.model).name}, dtype "
        f"{args.dtype}, {args.num_steps} steps."
    )


def table_row(name, result):
    """Name of a script, what `measure` found -> a line of the table."""
    if "error" in result:
        return f"| {name} | failed: {result['error'].replace('|', '/')} | |"
    return f"| {name} | {result['tokens']:.0f} | {result['peak']:.2f} |"


def run_tests(args):
    """Start each script on the device as the tests do -> the last line of pytest."""
    where = "cuda" if args.device == "cuda" else "sim"
    command = [sys.executable, "-m", "pytest", "-m", "slow", "tests/test_device.py", "-k", where]
    command += ["-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1].strip("= ")


def compare_with_trl(args):
    """The table of vs_trl.py -> text, or why there is none."""
    if importlib.util.find_spec("trl") is None:
        return 'trl is not installed: pip install -e ".[bench]"'
    command = [sys.executable, str(ROOT / "benchmarks/vs_trl.py"), "--device", args.device]
    command += ["--model", args.model, "--rounds", "1"]
    if args.device == "cpu":  # to see that it works; all of them take a quarter of an hour
        command += ["--dtypes", "float32", "--num-pairs", "8", "--cases", "DPO step (c) trl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return f"failed: {done.stderr.strip()[-300:]}\n{done.stdout.strip()}"
    return done.stdout.strip()


def main(args):
    """Print the report, each part when it is there."""
    unknown = set(args.scripts) - set(SCRIPTS)
    if unknown:
        stop(f"--scripts {' '.join(sorted(unknown))}: not among {', '.join(SCRIPTS)}")
    if args.num_steps < 2 or min(args.num_prompts, args.batch_size, args.micro_batch_size) < 1:
        stop("--num-steps has to be 2 or more, and the sizes 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: PyTorch sees no GPU here; --device cpu tries the command itself")
    print(f"{heading(args)}\n", flush=True)
    if args.tests:
        print(f"Tests of the device: {run_tests(args)}\n", flush=True)
    print("| script | tokens per second | peak memory, GB |\n|---|---|---|", flush=True)
    for script in args.scripts or SCRIPTS:
        print(table_row(f"{script}.py", measure(script, args)), flush=True)
    processes = args.processes
    if not processes and args.device == "cuda":
        processes = torch.cuda.device_count()
    if processes > 1:
        for script in args.scripts or SCRIPTS:
            for shard in (False, True):
                name = f"torchrun --nproc-per-node {processes} {script}.py{' --shard' * shard}"
                found = measure(script, args, processes, shard)
                print(table_row(name, found), flush=True)
    if args.trl:
        print(f"\n{compare_with_trl(args)}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(json.loads(sys.argv[2]))
    else:
        run_script(main, Args, TOY)
