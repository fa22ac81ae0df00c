"""Proxy and gold reward against the KL from the start (book chapter 17; Gao et al. 2023).

    python benchmarks/over_optimisation.py --run runs/ppo_rm --reward-model runs/rm_bt/final

The curve of a run that trained on a reward model, with `kl`, `reward` and `gold_reward` in its
metrics, beside best of N on the same reward model: no training, KL = log N - (N - 1) / N (book
10.3). Proxy: the reward model's score, as z = (score - mean) / standard deviation over the first
policy's completions. Gold: the share of right answers. Needs matplotlib.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import generate
from plumbing import ROOT, load_model, load_reward, load_rows, load_tokenizer, with_ended
from plot import load
from rejection_sampling import best_of_n_kl, best_of_n_reward, verifier


@dataclass
class Args:
    run: str  # folder of the run
    reward_model: str  # folder of the reward model it trained on
    model: str = str(ROOT / "toy/model")  # policy that the run began with
    dataset: str = str(ROOT / "toy/problems_test.jsonl")  # rows with `prompt` and `answer`
    num_prompts: int = 150  # first rows of the dataset
    num_generations: int = 64  # completions a prompt: the largest N
    max_new_tokens: int = 48  # longest completion
    window: int = 3  # steps of the run's moving mean
    seed: int = 0  # of sampling
    out: str = "over_optimisation.png"  # file of the figure


def main(args: Args):
    from matplotlib.figure import Figure

    torch.manual_seed(args.seed)
    device = torch.device("cpu")
    rows = load_rows(args.dataset, "prompt", "answer")[: args.num_prompts]
    tokenizer = load_tokenizer(args.model)
    policy = load_model(AutoModelForCausalLM, args.model, device)
    G, texts, of_each = args.num_generations, [], []
    for row in rows:
        _, more, ended = generate(policy, tokenizer, [row["prompt"]], G, args.max_new_tokens)
        texts += more
        of_each += with_ended([row] * G, ended)
    score = load_reward("verifier", None, args.reward_model, device, micro_batch_size=256)
    proxy = torch.tensor(score([row["prompt"] for row in of_each], texts, of_each)).view(-1, G)
    gold = torch.tensor(verifier(None, texts, of_each)).view(-1, G)
    mean, std = proxy.mean(), proxy.std()
    sizes = [2**i for i in range(int(math.log2(G)) + 1)]
    kl = [best_of_n_kl(n) for n in sizes]
    bon = [
        [best_of_n_reward(proxy, n, x).item() for n in sizes] for x in ((proxy - mean) / std, gold)
    ]
    run = load(args.run, ("kl", "reward", "gold_reward"), args.window)
    run[1] = (run[1] - mean) / std

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for i, name in enumerate(("proxy: reward model's score (z)", "gold: share of right answers")):
        axes = figure.add_subplot(1, 2, i + 1, xlabel="sqrt(KL from the start, nats)", title=name)
        axes.plot(run[0].clamp(min=0).sqrt(), run[i + 1], label=Path(args.run).name)
        axes.plot([math.sqrt(x) for x in kl], bon[i], "o-", label=f"best of 1 to {G}")
        axes.legend()
    figure.savefig(args.out, dpi=110)
    for n, x, p, g in zip(sizes, kl, *bon, strict=True):
        print(f"best of {n}: KL {x:.3f}, proxy {p:.3f}, gold {g:.3f}")
    top = int(run[2].argmax())
    for name, i in (("first", 0), ("at the best gold", top), ("last", -1)):
        print(f"run, {name}: KL {run[0, i]:.3f}, proxy {run[1, i]:.3f}, gold {run[2, i]:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
