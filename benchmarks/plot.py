"""Curves of runs: a metric of metrics.jsonl against the step, or against another metric.

    python benchmarks/plot.py --y reward --x kl --out figure.png rloo=runs/a,runs/b ppo=runs/c

Each LABEL=FOLDER,FOLDER,... is one curve: the mean over its runs, its band from their least to
their greatest. Needs matplotlib.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro


UNITS = {
    "kl": "nats per completion",
    "kl_per_token": "nats per token",
    "entropy": "nats per token",
    "completion_length": "tokens",
    "accuracy": "share of greedy answers",
    "ended": "share of completions",
    "logps_chosen": "nats per completion",
    "logps_rejected": "nats per completion",
    "seconds": "s",
    "tokens_per_second": "tokens per second",
}


@dataclass
class Args:
    curves: tyro.conf.Positional[tuple[str, ...]]
    """LABEL=FOLDER,FOLDER,... each"""
    y: tuple[str, ...]  # metric, or several: each has its curve
    x: str = "step"  # metric, or step
    out: str = "figure.png"  # file of the figure
    window: int = 1  # steps of the moving mean
    num_steps: int = 0  # the first ones only; 0: all
    log_y: bool = False  # logarithmic axis
    title: str = ""  # above the figure


def load(folder, names, window, num_steps=0):
    """Run folder -> (names, N): the steps that have all of these metrics, in moving means."""
    rows = [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]
    rows = [row for row in rows if not num_steps or row["step"] <= num_steps]
    rows = [[row[name] for name in names] for row in rows if all(name in row for name in names)]
    return torch.tensor(rows, dtype=torch.float32).T.unfold(1, window, 1).mean(-1)


def with_unit(name):
    """Name of a metric -> label of its axis."""
    kind = name.removeprefix("eval_").removesuffix("_control")
    return f"{name} ({UNITS[kind]})" if kind in UNITS else name


def main(args: Args):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(title=args.title)
    axes.set_xlabel(with_unit(args.x))
    axes.set_ylabel(", ".join(with_unit(name) for name in args.y))
    for curve, name in itertools.product(args.curves, args.y):
        label, _, folders = curve.partition("=")
        if len(args.y) > 1:
            label = f"{label}: {name}"
        runs = [
            load(folder, (args.x, name), args.window, args.num_steps)
            for folder in folders.split(",")
        ]
        n = min(run.shape[1] for run in runs)
        x, y = torch.stack([run[:, :n] for run in runs], dim=1)  # (runs, n) each
        marker = "o" if name.startswith("eval_") else ""  # evaluations are few: show where
        (line,) = axes.plot(x.mean(0), y.mean(0), label=label, marker=marker)
        if args.x == "step":
            axes.fill_between(
                x[0], y.min(0).values, y.max(0).values, alpha=0.2, color=line.get_color()
            )
        print(f"{label}: last {name} {y[:, -1].mean():.4g}, {args.x} {x[:, -1].mean():.4g}")
    axes.legend()
    if args.log_y:
        axes.set_yscale("log")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
