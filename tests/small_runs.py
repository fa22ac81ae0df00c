"""A short run of every training script, in this process or under torchrun, on given completions.

    python tests/small_runs.py FOLDER [CASE ...]
    torchrun --nproc-per-node 2 tests/small_runs.py FOLDER [--shard] [CASE ...]

Completions are given, as those that two processes sample are not those of one.
"""

import importlib
import json
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import plumbing  # noqa: E402

SAMPLING = dict(
    num_steps=3, num_prompts=4, num_generations=3, max_new_tokens=12, micro_batch_size=3,
    eval_dataset="", eval_size=4, eval_every=2,
)  # fmt: skip
ROWS = dict(batch_size=5, num_epochs=1, micro_batch_size=3, eval_every=2)
# case: script, its flags, number of its rows
CASES = {
    "sft": ("sft", ROWS, 13),
    "sft, nothing for one": ("sft", ROWS, 11),  # one row is left for the last step
    "rm_bt": ("rm_bt", ROWS, 13),
    "rm_bt nll": ("rm_bt", ROWS | dict(nll_coef=0.5, center_coef=0.1), 13),
    "rm_kwise": ("rm_kwise", ROWS, 13),
    "prm": ("prm", ROWS, 13),
    "orm": ("prm", ROWS | dict(supervision="outcome", lm_coef=0.3, dataset="toy/orm_train.jsonl",
                               eval_dataset="toy/orm_test.jsonl"), 13),
    "dpo_nll": ("dpo_nll", ROWS | dict(eval_prompts="", alpha=0.3, eval_dataset="", eval_size=0,
                                       micro_batch_size=4), 13),
    "rejection_sampling": (
        "rejection_sampling",
        dict(num_prompts=13, num_generations=3, max_new_tokens=12, batch_size=5, num_epochs=1,
             micro_batch_size=3, eval_dataset="", eval_size=0), 13),
    "reinforce_rloo": ("reinforce_rloo", SAMPLING | dict(beta=0.1), 13),
    "reinforce_rloo without KL": (
        "reinforce_rloo", SAMPLING | dict(beta=0.0, baseline="remax"), 13),
    "ppo": ("ppo", SAMPLING | dict(num_epochs=2, num_minibatches=2, beta=0.05, ptx_coef=0.3,
                                   ptx_batch_size=5, critic_warmup=1), 13),
    "ppo, one update": ("ppo", SAMPLING | dict(num_epochs=1, num_minibatches=1, beta=0.05), 13),
    "ppo, one update without KL": (
        "ppo", SAMPLING | dict(num_epochs=1, num_minibatches=1, beta=0.0), 13),
    "grpo": ("grpo", SAMPLING | dict(num_epochs=2, num_minibatches=2, beta=0.1), 13),
    "grpo, one update": ("grpo", SAMPLING | dict(num_epochs=1, num_minibatches=1, beta=0.1), 13),
    "grpo, lora": ("grpo", SAMPLING | dict(lora_rank=2, beta=0.1), 13),
    "rm_bt, lora": ("rm_bt", ROWS | dict(lora_rank=2), 13),
    "grpo, reward model": ("grpo", SAMPLING | dict(reward_model="rm_bt"), 13),
    "grpo, rewards of steps": (
        "grpo", SAMPLING | dict(reward_model="prm", supervision="process"), 13),
}  # fmt: skip

# Two models on one backbone, adapters, or a step with fewer rows than processes
NOT_SHARDED = ("rm_bt nll", "orm", "grpo, lora", "rm_bt, lora", "sft, nothing for one")


def given_completions(model, tokenizer, prompts, num_generations, *_, **__):
    """In place of `generate`: of each prompt some right and some wrong answers."""
    completions = []
    for prompt in prompts:
        rng = random.Random(prompt)
        texts = []
        for _ in range(num_generations):
            right = sum(int(number) for number in prompt.split("+"))
            texts.append(str(rng.choice([right, rng.randrange(10), rng.randrange(1000)])))
        completions.append(texts)
    batch = common.encode(tokenizer, prompts, completions)
    texts = [text for group in completions for text in group]
    return batch.to(model.device), texts, torch.ones(len(texts), dtype=torch.bool)


def first_rows(folder, path, number):
    """The first rows of one of the toy's files -> a file of their own."""
    new = folder / Path(path).name
    if common.process()[0] == 0 and not new.exists():
        lines = (ROOT / path).read_text().splitlines()[:number]
        new.write_text("\n".join(lines) + "\n")
    plumbing.from_first(None)  # wait for the file
    return str(new)


def make_args(folder, case, shard):
    name, changes, number = CASES[case]
    script = importlib.import_module(name)
    flags = script.TOY | changes | {"shard": shard}
    flags["model"] = str(ROOT / "toy/model")
    for flag, rows in (("dataset", number), ("eval_dataset", 5)):
        if flags.get(flag):
            flags[flag] = first_rows(folder, flags[flag], rows)
    if flags.get("ptx_coef"):
        flags["pretrain_dataset"] = str(folder / "texts.jsonl")
        rows = [{"text": f"{i}+{i * i}={i + i * i}"} for i in range(9)]
        if common.process()[0] == 0:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            Path(flags["pretrain_dataset"]).write_text(text)
        plumbing.from_first(None)
    if flags.get("reward_model"):
        flags["reward_model"] = str(folder / flags["reward_model"] / "final")
    return script, script.Args(**flags, output_dir=str(folder / case))


def main(folder, *cases):
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    common.WORTH_SHARING = 5  # some micro-batches share their prompts, and others do not
    shard = "--shard" in cases
    chosen = [case for case in cases if case in CASES] or list(CASES)
    if shard:
        chosen = [case for case in chosen if case not in NOT_SHARDED]
    for case in chosen:
        script, args = make_args(folder, case, shard)
        if hasattr(script, "generate"):
            script.generate = given_completions
        script.main(args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plumbing.start_processes()
    plumbing.quieten_transformers()
    main(*sys.argv[1:])
    plumbing.end_processes()
