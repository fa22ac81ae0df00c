"""The loop of chapter 13 on the toy, without a label of the verifier: accuracy after each stage.

    python benchmarks/constitutional_loop.py runs/loop          # about five minutes

The critic revises the policy's answers; the policy is fine-tuned on the revisions; the critic
compares two answers of each prompt; a reward model learns its soft labels; GRPO trains the policy
on that reward model. The verifier only measures. A stage that is done is not run again. So far
only the first two stages have been measured: see docs/toy.md.
"""

import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from transformers import AutoModelForCausalLM

from common import generate
from plumbing import (
    ROOT,
    greedy_rewards,
    last_number,
    load_model,
    load_rows,
    load_tokenizer,
    quieten_transformers,
)

PROBLEMS = "--dataset toy/problems_train.jsonl"
CRITIC = "--feedback-model toy/critic --constitution toy/constitution.txt --max-new-tokens 48"
SFT = "--learning-rate 5e-4 --lr-schedule cosine --micro-batch-size 32 --max-new-tokens 48"
RM = "--learning-rate 1e-3 --num-epochs 3 --batch-size 32 --micro-batch-size 64"
GRPO = (
    "--num-prompts 32 --num-generations 8 --num-steps 24 --max-new-tokens 48 "
    "--micro-batch-size 256 --learning-rate 5e-5 --beta 0.1 --lr-schedule linear "
    "--eval-size 500 --eval-every 24"
)
STAGES = {  # folder: command; {} is the folder of the loop
    "revise": "constitutional_ai.py",
    "sft": f"sft.py --model toy/model --dataset {{}}/revise/revisions.jsonl {SFT}",
    "compare": (
        f"constitutional_ai.py --stage compare --model {{}}/sft/final {PROBLEMS} {CRITIC} --seed 1 "
        "--num-prompts 2000 --num-principles 3 --batch-size 250"
    ),
    "rm": f"rm_bt.py --model {{}}/sft/final --dataset {{}}/compare/preferences.jsonl {RM}",
    "grpo": (
        f"grpo.py --model {{}}/sft/final --reward-model {{}}/rm/final {PROBLEMS} "
        f"--eval-dataset toy/problems_test.jsonl {GRPO}"
    ),
}


def is_right(prompts, completions, rows):
    """The verifier's rewards, as in the scripts."""
    pairs = zip(completions, rows, strict=True)
    return [float(last_number(text) == last_number(row["answer"])) for text, row in pairs]


def accuracies(folder):
    """Accuracy on the 500 test problems of greedy answers, and of sampled ones."""
    rows = load_rows(ROOT / "toy/problems_test.jsonl", "prompt", "answer")
    policy = load_model(AutoModelForCausalLM, folder, torch.device("cpu"))
    tokenizer = load_tokenizer(folder)
    greedy, _ = greedy_rewards(policy, tokenizer, is_right, rows, 48, 250)
    torch.manual_seed(0)
    prompts = [row["prompt"] for row in rows]
    _, texts, _ = generate(policy, tokenizer, prompts, 1, 48)
    sampled = is_right(prompts, texts, rows)
    return sum(greedy) / len(rows), sum(sampled) / len(rows)


def main(folder):
    folder = str(Path(folder).resolve())
    quieten_transformers()
    for name, command in STAGES.items():
        words = command.replace("{}", folder).split()
        output_dir = Path(folder) / name
        flags = [*words, "--output-dir", str(output_dir)]
        print("python", *flags, flush=True)
        made = ("final", "revisions.jsonl", "preferences.jsonl")
        if not any((output_dir / file).exists() for file in made):
            subprocess.run([sys.executable, *flags, "--overwrite"], cwd=ROOT, check=True)
    print("| policy | greedy | sampled |\n|---|---|---|")
    policies = {
        "start": ROOT / "toy/model",
        "fine-tuned on revisions": Path(folder) / "sft/final",
        "trained on the feedback's reward model": Path(folder) / "grpo/final",
    }
    for name, path in policies.items():
        greedy, sampled = accuracies(str(path))
        print(f"| {name} | {greedy:.3f} | {sampled:.3f} |")


if __name__ == "__main__":
    main(sys.argv[1])
