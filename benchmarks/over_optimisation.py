"""Over-optimisation: proxy and gold reward against the root of the KL, and what they follow.

Read beside the RLHF Book, draft of January 2025, 17.2 (the printed edition has chapter 17 as
chapter 14). The draft prints no formula; these are Gao et al.'s (2023, arXiv:2210.10760), with
d = sqrt(KL(policy || start)) and R the gold reward above the start's:
    best_of_n_columns   R(d) = d (a - b d) for best of N
    rl_columns          R(d) = d (a - b log d) for RL
    least_squares       a, b and their standard errors
    best_of_n_peak      where the gold reward turns
    rl_peak

Reward models (rm_bt.py) of several sizes of the training set and several seeds; against each, best
of N on the start policy's completions, whose KL is log N - (N - 1) / N (book 10.3), and a run of
grpo.py without a weight on the KL. Proxy: the reward model's score, as z = (score - mean) /
standard deviation over the start policy's completions. Gold: the share of right answers.

    python benchmarks/over_optimisation.py                 # the toy: some twenty minutes

What is in --output-dir already, of the same flags, is not computed again: a run that was stopped
goes on, and one that is finished only fits and draws. Needs matplotlib.
"""

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo
import rm_bt
from common import generate
from plot import load
from plumbing import (
    ROOT,
    load_model,
    load_reward,
    load_rows,
    load_tokenizer,
    quieten_transformers,
    with_ended,
)
from rejection_sampling import best_of_n_kl, best_of_n_reward


@dataclass
class Args:
    sizes: tuple[int, ...] = (40, 320, 2500)  # pairs that the reward models are trained on
    seeds: tuple[int, ...] = (0, 1, 2)  # each draws its pairs, and trains a reward model and RL
    output_dir: str = "runs/over_optimisation"  # folder of all runs and their points
    out: str = "over_optimisation.png"  # file of the figure
    num_prompts: int = 100  # test problems of best of N
    num_generations: int = 64  # completions of each: the largest N
    start_prompts: int = 1000  # training problems, each with 4 completions, for the start of RL
    least_steps: int = 60  # gradient steps of a reward model, at least (and three epochs)
    rl_steps: int = 40  # steps of GRPO
    rl_prompts: int = 16  # prompts per step of GRPO, each with 8 completions
    rl_learning_rate: float = 5e-5  # constant
    window: int = 3  # steps of the moving mean of GRPO's metrics
    fit_until: float = 2.0
    """largest d of the points that are fitted: further out the share of right answers comes to its
    floor, 0, of which the forms know nothing"""


# --- The two forms --------------------------------------------------------------------------------
# Both are linear in a and b: R = columns @ (a, b).


def best_of_n_columns(d):
    """Roots of the KL (N,) -> (N, 2): d and -d^2, of which d (a - b d) is made. Gao et al. 2023."""
    return torch.stack([d, -d * d], dim=1)


def rl_columns(d):
    """Roots of the KL (N,) -> (N, 2): d and -d log d, of which d (a - b log d) is made; 0 at d = 0.

    Gao et al. 2023.
    """
    return torch.stack([d, -torch.xlogy(d, d)], dim=1)


def best_of_n_peak(a, b):
    """The d at which d (a - b d) is largest: a / 2b; nan where it has no such place above 0."""
    if a <= 0 or b <= 0:
        return math.nan
    return a / (2 * b)


def rl_peak(a, b):
    """The d at which d (a - b log d) is largest: exp(a / b - 1); nan where there is none (b <= 0),
    inf where it is beyond all measure."""
    if b <= 0:
        return math.nan
    if a / b > 100:
        return math.inf
    return math.exp(a / b - 1)


def least_squares(columns, values):
    """Columns (N, K), values (N,) -> parameters (K,), their standard errors (K,), R^2.

    Textbook: (X'X)^-1 X'y, and the root of the diagonal of s^2 (X'X)^-1 with s^2 the sum of squared
    residuals over N - K. It takes residuals for independent and of one size. R^2: the share of the
    values' variance that is explained; below 0 it is worse than their mean. All are nan where the
    points do not tell the parameters apart, such as two of which one is the start itself.
    """
    X = columns.double()
    y = values.double()
    if torch.linalg.matrix_rank(X) < X.shape[1]:
        unknown = torch.full((X.shape[1],), math.nan, dtype=X.dtype)
        return unknown, unknown, torch.tensor(math.nan)
    inverse = torch.linalg.inv(X.T @ X)
    parameters = inverse @ X.T @ y
    residuals = y - X @ parameters
    variance = (residuals**2).sum() / (len(y) - X.shape[1])
    errors = (variance * inverse.diagonal()).sqrt()
    explained = 1 - (residuals**2).sum() / ((y - y.mean()) ** 2).sum()
    return parameters, errors, explained


FORMS = {"best of N": (best_of_n_columns, best_of_n_peak), "RL": (rl_columns, rl_peak)}

# --- The runs -------------------------------------------------------------------------------------


def train(script, folder, **changes):
    """Run a script on the toy, unless its model is there already -> folder of the model."""
    if not (folder / "final").exists():
        values = {}
        for name, value in script.TOY.items():
            is_path = str(value).startswith("toy/")
            values[name] = str(ROOT / value) if is_path else value
        # What a stopped run left is replaced: these are short
        here = dict(output_dir=str(folder), overwrite=folder.exists())
        script.main(script.Args(**values | here | changes))
    return folder / "final"


def train_reward_model(folder, size, seed, least_steps):
    """A reward model on `size` pairs of the toy, drawn by the seed -> folder of the model."""
    rows = load_rows(str(ROOT / "toy/pref_train.jsonl"))
    drawn = random.Random(seed).sample(rows, size)
    path = folder / f"pairs_{size}_{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in drawn))
    epochs = max(3, math.ceil(least_steps * rm_bt.TOY["batch_size"] / size))
    flags = dict(dataset=str(path), num_epochs=epochs, seed=seed, eval_every=10**6)
    return train(rm_bt, folder / f"rm_{size}_{seed}", **flags)


def sample(name, num_prompts, num_generations):
    """The start policy's completions of the first problems of a file -> rows and texts,
    prompt-major, and gold rewards (P, N)."""
    torch.manual_seed(0)
    start = str(ROOT / "toy/model")
    problems = load_rows(str(ROOT / "toy" / name), "prompt", "answer")[:num_prompts]
    policy = load_model(AutoModelForCausalLM, start, torch.device("cpu"))
    tokenizer = load_tokenizer(start)
    texts = []
    rows = []
    together = max(1, 64 // num_generations)
    for first in range(0, len(problems), together):
        part = problems[first : first + together]
        prompts = [row["prompt"] for row in part]
        batch, answers, ended = generate(policy, tokenizer, prompts, num_generations, 48)
        texts += answers
        rows += with_ended(part, ended, batch, tokenizer)
    gold = grpo.verifier([row["prompt"] for row in rows], texts, rows)
    return rows, texts, torch.tensor(gold).view(-1, num_generations)


def best_of_n_points(proxy, gold):
    """Proxy and gold reward (P, N) of the same completions -> list of (KL, proxy, gold), one for
    each power of 2 up to N."""
    points = []
    for exponent in range(int(math.log2(proxy.shape[1])) + 1):
        n = 2**exponent
        chosen_proxy = best_of_n_reward(proxy, n).item()
        points.append((best_of_n_kl(n), chosen_proxy, best_of_n_reward(proxy, n, gold).item()))
    return points


def compute_points(args, folder, sampled, rl_start, size, seed):
    """Train one reward model, and RL against it -> rows with method, size, seed, accuracy (of
    held-out pairs), kl, proxy, gold, start (the gold reward of the start policy).

    sampled: what `sample` made of the test problems. rl_start: the start of RL, whose problems are
    others.
    """
    of_each, texts, gold = sampled
    model = train_reward_model(folder, size, seed, args.least_steps)
    score = load_reward("verifier", None, str(model), torch.device("cpu"), "auto", 256)
    scores = torch.tensor(score([row["prompt"] for row in of_each], texts, of_each)).view_as(gold)
    mean, std = scores.mean(), scores.std()
    rl = folder / f"rl_{size}_{seed}"
    flags = dict(
        reward_model=str(model), seed=seed, num_steps=args.rl_steps, num_prompts=args.rl_prompts,
        learning_rate=args.rl_learning_rate, lr_schedule="constant", beta=1e-9, eval_size=0,
    )  # fmt: skip
    train(grpo, rl, **flags)  # the KL is logged, and its weight is as good as 0
    curve = load(rl, ("kl", "reward", "gold_reward"), args.window, args.rl_steps)
    curve[1] = (curve[1] - mean) / std
    points = {"best of N": best_of_n_points((scores - mean) / std, gold), "RL": curve.T.tolist()}
    starts = {"best of N": gold.mean().item(), "RL": rl_start}
    accuracy = load(model.parent, ("eval_accuracy",), 1)[0, -1].item()
    rows = []
    for method, values in points.items():
        known = {"method": method, "size": size, "seed": seed, "accuracy": accuracy}
        for kl, proxy, right in values:
            point = {"kl": kl, "proxy": proxy, "gold": right, "start": starts[method]}
            rows.append(known | point)
    return rows


def all_points(args, folder):
    """Points of all sizes and seeds: what is in the folder is read, the rest computed."""
    rows = []
    sampled = None
    for seed in args.seeds:
        for size in args.sizes:
            path = folder / f"points_{size}_{seed}.jsonl"
            if not path.exists():
                if sampled is None:
                    sampled = sample("problems_test.jsonl", args.num_prompts, args.num_generations)
                    _, _, first = sample("problems_train.jsonl", args.start_prompts, 4)
                points = compute_points(args, folder, sampled, first.mean().item(), size, seed)
                path.write_text("".join(json.dumps(row) + "\n" for row in points))
            rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


# --- Fits and figure ------------------------------------------------------------------------------


def roots(rows):
    """Points -> d = sqrt(KL) (N,); an estimate of the KL below 0 counts as 0."""
    return torch.tensor([row["kl"] for row in rows]).clamp(min=0).sqrt()


def fit(rows, method, largest=math.inf):
    """Points of one method up to the d `largest` -> a, b, their errors (2,), R^2, peak in d."""
    columns, peak = FORMS[method]
    near = [row for row in rows if math.sqrt(max(row["kl"], 0)) <= largest]
    gain = torch.tensor([row["gold"] - row["start"] for row in near])
    parameters, errors, explained = least_squares(columns(roots(near)), gain)
    return parameters, errors, explained.item(), peak(*parameters.tolist())


def describe(rows, method, size, largest):
    """A line of the table: the fit to all seeds, and the range of the fits to single ones."""
    of_these = [row for row in rows if row["method"] == method and row["size"] == size]
    parameters, errors, explained, peak = fit(of_these, method, largest)
    single = []
    for seed in sorted({row["seed"] for row in of_these}):
        of_seed = [row for row in of_these if row["seed"] == seed]
        single.append(fit(of_seed, method, largest))
    accuracy = [row["accuracy"] for row in of_these]
    cells = [method, size, f"{min(accuracy):.3f} to {max(accuracy):.3f}"]
    for i in range(2):
        values = [result[0][i].item() for result in single]
        cells.append(
            f"{parameters[i]:.3f} ± {errors[i]:.3f} ({min(values):.3f} to {max(values):.3f})"
        )
    peaks = [result[3] for result in single]
    cells.append(f"{explained:.2f}")
    cells.append(f"{peak:.2f} ({min(peaks):.2f} to {max(peaks):.2f})")
    return cells


def seen_peak(rows):
    """Points of one run -> (d, gold) of the one with the highest gold reward."""
    best = max(rows, key=lambda row: row["gold"])
    return math.sqrt(max(best["kl"], 0)), best["gold"]


def draw(rows, largest, path):
    """Proxy above, gold below, of best of N and of RL; a colour for each size of training set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    sizes = sorted({row["size"] for row in rows})
    for column, method in enumerate(FORMS):
        proxy = figure.add_subplot(2, 2, 1 + column, title=method)
        gold = figure.add_subplot(2, 2, 3 + column, xlabel="sqrt(KL from the start, nats)")
        proxy.set_ylabel("proxy: reward model's score (z)")
        gold.set_ylabel("gold: share of right answers")
        for number, size in enumerate(sizes):
            of_these = [row for row in rows if row["method"] == method and row["size"] == size]
            d = roots(of_these)
            color = f"C{number}"
            options = dict(color=color, marker="o", markersize=3, linestyle="", alpha=0.35)
            proxy.plot(d, [row["proxy"] for row in of_these], label=f"{size} pairs", **options)
            gold.plot(d, [row["gold"] for row in of_these], **options)
            parameters, _, _, _ = fit(of_these, method, largest)
            grid = torch.linspace(0, min(d.max().item(), largest), 200)
            fitted = of_these[0]["start"] + FORMS[method][0](grid).double() @ parameters
            gold.plot(grid, fitted, color=color, label=f"{size} pairs, fit")
        gold.set_ylim(-0.02, 1.02)
        proxy.legend()
        gold.legend()
    figure.savefig(path, dpi=110)


def main(args: Args):
    quieten_transformers()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = all_points(args, folder)
    for method in FORMS:
        start = next(row["start"] for row in rows if row["method"] == method)
        print(f"gold reward of the start policy, on the problems of {method}: {start:.3f}")
    print("| method | pairs | accuracy | a (seeds) | b (seeds) | R^2 | peak of the fit (seeds) |")
    print("|---|---|---|---|---|---|---|")
    for method in FORMS:
        for size in sorted({row["size"] for row in rows}):
            print(
                "|",
                " | ".join(str(cell) for cell in describe(rows, method, size, args.fit_until)),
                "|",
            )
    print("| method | pairs | seed | highest gold reward | at d | last gold reward | at d |")
    print("|---|---|---|---|---|---|---|")
    for method in FORMS:
        for size, seed in sorted({(row["size"], row["seed"]) for row in rows}):
            key = (method, size, seed)
            run = [row for row in rows if (row["method"], row["size"], row["seed"]) == key]
            d, best = seen_peak(run)
            last = math.sqrt(max(run[-1]["kl"], 0))
            print(f"| {method} | {size} | {seed} | {best:.3f} | {d:.2f} |", end=" ")
            print(f"{run[-1]['gold']:.3f} | {last:.2f} |")
    draw(rows, args.fit_until, args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
