"""Accuracy of the best of 8 completions on the toy's test problems, chosen by reward models.

    python benchmarks/best_of_n.py runs/rm_bt/final runs/rm_kwise/final runs/prm/final

Beside them: a random choice, which is the policy's accuracy, and the oracle: is any of the 8 right?
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import generate
from plumbing import ROOT, load_model, load_reward, load_rows, load_tokenizer, with_ended

N = 8


def main(folders):
    torch.manual_seed(0)
    rows = load_rows(ROOT / "toy/problems_test.jsonl", "prompt", "answer")
    policy = load_model(AutoModelForCausalLM, ROOT / "toy/model", torch.device("cpu"))
    tokenizer = load_tokenizer(ROOT / "toy/model")
    _, texts, ended = generate(policy, tokenizer, [row["prompt"] for row in rows], N, 48)
    of_each = with_ended([row for row in rows for _ in range(N)], ended)
    right = (
        torch.tensor(
            [t.rpartition("\n")[2] == row["answer"] for t, row in zip(texts, of_each, strict=True)]
        )
        .float()
        .view(-1, N)
    )
    print(f"| chosen by | accuracy of {len(rows)} problems |\n|---|---|")
    print(f"| chance | {right.mean():.3f} |")
    for folder in folders:
        score = load_reward("verifier", None, folder, torch.device("cpu"), micro_batch_size=256)
        values = score([row["prompt"] for row in of_each], texts, of_each)
        best = torch.tensor(values).view(-1, N).argmax(1)
        print(f"| {folder} | {right.gather(1, best[:, None]).mean():.3f} |")
    print(f"| oracle | {right.max(1).values.mean():.3f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
