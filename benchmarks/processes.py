"""Short runs of every script in one process, in two and in two --shard: how far they are apart.

    python benchmarks/processes.py           # a minute or two

Prints a table: in each cell two processes, and after the comma two with --shard. The runs are those
of tests/small_runs.py, whose completions are given, as two processes sample others than one.
tests/test_processes.py asserts what is printed here.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
HOW = {"one": [], "two": TORCHRUN, "sharded": TORCHRUN}
NOT_COMPARED = ("seconds", "tokens_per_second", "step", "eval_kl", "eval_kl_control")


def distance(ours, theirs):
    """Norm of the difference of two {name: tensor}, by the norm of the second."""
    square = sum(((ours[name] - theirs[name]) ** 2).sum().item() for name in theirs)
    size = sum((theirs[name] ** 2).sum().item() for name in theirs)
    return math.sqrt(square / size)


def read(folder):
    """metrics.jsonl of a run -> list of dicts."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest(ours, theirs, names):
    """Largest difference of the metrics of these names, of two lists of dicts, relative to their
    size or, where that is smaller, to 1e-3."""
    worst = 0.0
    for our, their in zip(ours, theirs, strict=True):
        compared = names & their.keys()
        if abs(their.get("margin", 1)) < 1e-5:
            compared -= {"accuracy"}  # all margins of a first step are rounding errors
        for name in compared:
            worst = max(worst, abs(our[name] - their[name]) / max(abs(their[name]), 1e-3))
    return worst


def compare(folder, other):
    """Two folders of one run -> largest differences of loss, gradient norm and other metrics, and
    the distance of the weights."""
    ours, theirs = read(folder), read(other)
    others = set().union(*theirs) - {"loss", "grad_norm", *NOT_COMPARED}
    weights = [load_file(one / "final/model.safetensors") for one in (folder, other)]
    metrics = [largest(ours, theirs, names) for names in ({"loss"}, {"grad_norm"}, others)]
    return [*metrics, distance(*weights)]


def main():
    folder = Path(tempfile.mkdtemp())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for how, launcher in HOW.items():
        flags = [str(folder / how)]
        if how == "sharded":
            flags.append("--shard")
        command = [sys.executable, *launcher, "tests/small_runs.py", *flags]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    print("| run of three steps | loss | gradient norm | other metrics | weights |")
    print("|---|---|---|---|---|")
    for case in sorted(path.name for path in (folder / "one").iterdir() if path.is_dir()):
        cells = [[] for _ in range(4)]
        for how in ("two", "sharded"):
            if (folder / how / case).exists():
                found = compare(folder / how / case, folder / "one" / case)
                for cell, value in zip(cells, found, strict=True):
                    cell.append(f"{value:.0e}" if value else "0")
        print("|", " | ".join([case, *[", ".join(cell) for cell in cells]]), "|")


if __name__ == "__main__":
    main()
