"""How the cost of log-probs, forward and backward, grows: seconds and memory, beside what counting
operations predicts.

    python benchmarks/scaling.py --model FOLDER --out benchmarks/scaling.png     # needs matplotlib

Every point runs in a process of its own, on random tokens. The prediction: 6 operations (2 forward,
4 backward) a parameter and token, where a prompt's tokens are counted once, and the projection to
the vocabulary at completion tokens alone; divided by the rate at which this machine multiplies
large matrices, measured in the same processes. Attention's own products are not counted.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import Batch, completion_logps  # noqa: E402
from plumbing import load_model, parse_args, stop  # noqa: E402

from sides import peak_memory  # noqa: E402


@dataclass
class Args:
    model: str = str(ROOT / "toy/model")  # folder of a causal model
    out: str = ""  # file of the figure; the points go beside it, as JSON Lines
    child: str = ""  # (the program calls itself with this)


# (what varies, its values, the rest): prompts, completions of each, tokens of both
POINTS = [
    ("completions a prompt", (1, 2, 4, 8, 16, 32), dict(prompts=1, prompt=192, completion=64)),
    ("prompt, tokens", (32, 64, 128, 256, 512, 1024), dict(prompts=1, each=8, completion=64)),
    ("completion, tokens", (32, 64, 128, 256, 512), dict(prompts=1, each=8, prompt=64)),
    (
        "prompts, one completion each",
        (1, 2, 4, 8, 16, 32, 64),
        dict(each=1, prompt=64, completion=64),
    ),
]
NAMES = {
    "completions a prompt": "each",
    "prompt, tokens": "prompt",
    "completion, tokens": "completion",
    "prompts, one completion each": "prompts",
}


def operations(model, prompts, each, prompt, completion):
    """Of a forward and a backward pass, by counting: 6 a parameter and token."""
    head = model.get_output_embeddings().weight.numel()
    embeddings = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - embeddings - (0 if tied else head)
    tokens = prompts * prompt + prompts * each * completion
    return 6 * (body * tokens + head * prompts * each * completion)


def matmul_rate(size=2048):
    """Operations a second of a product of two square matrices: the best of 5."""
    a, best = torch.randn(size, size), 0.0
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def child(point, path):
    """One point: the faster of two passes, the peak of memory and the share of the limit."""
    model = load_model(AutoModelForCausalLM, path, torch.device("cpu"))
    P, G, Tp, Tc = (point[k] for k in ("prompts", "each", "prompt", "completion"))
    if Tp + Tc > model.context:
        return None
    top = model.config.vocab_size
    batch = Batch(
        torch.randint(top, (P, Tp)),
        torch.ones(P, Tp, dtype=torch.bool),
        torch.randint(top, (P * G, Tc)),
        torch.ones(P * G, Tc, dtype=torch.bool),
        torch.arange(P).repeat_interleave(G),
    )
    seconds = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        completion_logps(model, batch).sum().backward()
        seconds.append(time.perf_counter() - start)
    return point | {
        "seconds": min(seconds),
        "memory": peak_memory("cpu"),
        "predicted": operations(model, P, G, Tp, Tc) / matmul_rate(),
    }


def main(args):
    if args.child:
        print("\n" + json.dumps(child(json.loads(args.child), args.model)))
        return
    found = {}
    for what, values, rest in POINTS:
        for value in values:
            point = rest | {NAMES[what]: value}
            done = subprocess.run(
                [sys.executable, __file__, "--model", args.model, "--child", json.dumps(point)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                stop(f"{point}: {done.stderr.strip().splitlines()[-1]}")
            row = json.loads(done.stdout.strip().splitlines()[-1])
            if row:  # it fits in the model's context
                found.setdefault(what, []).append(row)
                print(
                    f"{what} {value}: {row['seconds']:.2f} s, predicted {row['predicted']:.2f}, "
                    f"share {row['predicted'] / row['seconds']:.2f}, {row['memory']:.2f} GB",
                    flush=True,
                )
    if args.out:
        Path(args.out).with_suffix(".jsonl").write_text(
            "".join(
                json.dumps({"varies": what, **row}) + "\n"
                for what, rows in found.items()
                for row in rows
            )
        )
        draw(found, args.out)


def draw(found, out):
    """{what varies: points} -> one figure: seconds above, with the prediction, memory below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for (what, rows), above, below in zip(found.items(), *axes, strict=True):
        x = [row[NAMES[what]] for row in rows]
        above.loglog(x, [row["seconds"] for row in rows], "o-", label="measured")
        above.loglog(x, [row["predicted"] for row in rows], "--", label="counted")
        for a, row in zip(x, rows, strict=True):
            above.annotate(
                f"{row['predicted'] / row['seconds']:.0%}",
                (a, row["seconds"]),
                textcoords="offset points",
                xytext=(0, 5),
                ha="center",
                fontsize=8,
            )
        below.semilogx(x, [row["memory"] for row in rows], "o-")
        for axis in above, below:
            axis.set_xticks(x, x)
            axis.set_xticks([], minor=True)
        above.set(ylabel="seconds")
        below.set(ylabel="peak memory, GB", xlabel=what)
    axes[0, 0].legend()
    figure.savefig(out)


if __name__ == "__main__":
    main(parse_args(Args, {}))
