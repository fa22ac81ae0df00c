"""The loop of chapter 13 on the toy, without a label of the verifier: accuracy after each stage.

    python benchmarks/constitutional_loop.py runs/loop

The critic revises the policy's answers; the policy is fine-tuned on the revisions; the critic
compares two answers of each prompt; a reward model learns its soft labels; GRPO trains the policy
on that reward model. The verifier only measures. A stage that is done is not run again.

    python benchmarks/constitutional_loop.py --feedback runs/feedback

shows how the comparisons of a run of `constitutional_ai.py --stage compare` hang on its critiques.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from transformers import AutoModelForCausalLM

from common import generate
from constitutional_ai import comparison_metrics, feedback_probability
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
CRITIC = (
    "--feedback-model toy/critic --constitution toy/constitution.txt --criticise-first "
    "--max-new-tokens 48 --feedback-temperature 0.5"
)
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
        "--num-prompts 1000 --num-principles 3 --batch-size 250"
    ),
    "rm": f"rm_bt.py --model {{}}/sft/final --dataset {{}}/compare/preferences.jsonl {RM}",
    "grpo": (
        f"grpo.py --model {{}}/sft/final --reward-model {{}}/rm/final {PROBLEMS} "
        f"--eval-dataset toy/problems_test.jsonl {GRPO}"
    ),
}
NUM_SAMPLES = 4


def is_right(prompts, completions, rows):
    """The verifier's rewards, as in the scripts."""
    pairs = zip(completions, rows, strict=True)
    return [float(last_number(text) == last_number(row["answer"])) for text, row in pairs]


def accuracies(folder):
    """Accuracy on the 500 test problems of greedy answers, and of four sampled ones of each."""
    rows = load_rows(ROOT / "toy/problems_test.jsonl", "prompt", "answer")
    policy = load_model(AutoModelForCausalLM, folder, torch.device("cpu"))
    tokenizer = load_tokenizer(folder)
    greedy, _ = greedy_rewards(policy, tokenizer, is_right, rows, 48, 250)
    torch.manual_seed(0)
    prompts = [row["prompt"] for row in rows]
    _, texts, _ = generate(policy, tokenizer, prompts, NUM_SAMPLES, 48)
    rows_of_texts = []
    for row in rows:
        rows_of_texts += [row] * NUM_SAMPLES
    sampled = is_right(prompts, texts, rows_of_texts)
    return sum(greedy) / len(greedy), sum(sampled) / len(sampled)


def feedback_table(folder):
    """Print contradictions and accuracy by principle, and by the answers that were objected to."""
    rows = load_rows(ROOT / "toy/problems_train.jsonl", "prompt", "answer")
    row_of = {row["prompt"]: row for row in rows}
    parts = {}
    for entry in load_rows(f"{folder}/comparisons.jsonl", "prompt"):
        if entry["outcome"] != "compared":
            continue
        for i, principle in enumerate(entry["principles"]):
            objected = ["?" in critique for critique in entry["critiques"][i]]
            to = "neither or both" if objected[0] == objected[1] else "one answer"
            logps = entry["letter_logps"][i : i + 1]
            label = feedback_probability(torch.tensor(logps)).item()
            alone = entry | {"letter_logps": logps, "probability": label}
            parts.setdefault((principle, to), []).append(alone)
    print("| principle | objected to | comparisons | contradictions | accuracy |")
    print("|---|---|---|---|---|")
    for (principle, to), part in sorted(parts.items()):
        metrics = comparison_metrics(part, [row_of[entry["prompt"]] for entry in part])
        accuracy = metrics.get("accuracy", float("nan"))
        cells = [principle, to, str(len(part))]
        cells += [f"{metrics['contradictions'].item():.3f}", f"{accuracy:.3f}"]
        print("|", " | ".join(cells), "|")


def main(folder):
    folder = str(Path(folder).resolve())
    quieten_transformers()
    begun = time.time()
    for name, command in STAGES.items():
        words = command.replace("{}", folder).split()
        output_dir = Path(folder) / name
        flags = [*words, "--output-dir", str(output_dir)]
        print("python", *flags, flush=True)
        made = ("final", "revisions.jsonl", "preferences.jsonl")
        if any((output_dir / file).exists() for file in made):
            continue
        start = time.time()
        subprocess.run([sys.executable, *flags, "--overwrite"], cwd=ROOT, check=True)
        print(f"{name}: {(time.time() - start) / 60:.1f} minutes", flush=True)
    feedback_table(f"{folder}/compare")
    print("| policy | greedy | sampled |\n|---|---|---|")
    policies = {
        "start": ROOT / "toy/model",
        "fine-tuned on revisions": Path(folder) / "sft/final",
        "trained on the feedback's reward model": Path(folder) / "grpo/final",
    }
    for name, path in policies.items():
        greedy, sampled = accuracies(str(path))
        print(f"| {name} | {greedy:.3f} | {sampled:.3f} |")
    print(f"{(time.time() - begun) / 60:.1f} minutes in all")


if __name__ == "__main__":
    if sys.argv[1] == "--feedback":
        feedback_table(sys.argv[2])
    else:
        main(sys.argv[1])
