"""Speed and memory beside TRL, and beside a plain form of our own: one table of ratios.

    pip install -e ".[bench]"
    python benchmarks/vs_trl.py                                               # the toy
    python benchmarks/vs_trl.py --model FOLDER --pairs preferences.jsonl      # a real model

Each case runs in processes of its own, alternating (ours, peer, ours, peer), both with the same
weights, tokens, micro-batches, dtype and threads. Before a time is believed, loss and gradient norm
of both in the first and the third step must be equal to 1e-4, in bfloat16, whose step is 8e-3, to
1e-2; sampled completions are replaced by given ones in the first three steps for that. The peers:

    trl    the trainer of TRL; log-probs: its fused head, which both its GRPO and its DPO call
    hf     model.generate of Transformers, which TRL generates with
    plain  our script with --no-share-prompts, and model.generate in place of common.generate

TRL's gradient checkpointing and bfloat16, which are its defaults, are switched off. Its metrics,
such as entropy, accuracy of tokens and mean logits, are not: they are part of its step.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = Path(__file__).resolve().parents[1]
SIDES = ROOT / "benchmarks/sides.py"
sys.path.insert(0, str(ROOT))
from common import encode_prompt  # noqa: E402
from plumbing import load_rows, load_tokenizer, parse_args, stop  # noqa: E402


@dataclass
class Args:
    model: str = str(ROOT / "toy/model")  # folder of a causal model
    pairs: str = str(ROOT / "toy/pref_train.jsonl")  # rows `prompt`, `chosen`, `rejected`, for (c)
    device: Literal["cpu", "cuda"] = "cpu"  # where both sides run
    cases: tuple[str, ...] = ()  # names of cases, of those that are printed; none: all
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    num_prompts: int = 2  # prompts of a step, 8 completions each
    num_pairs: int = 16  # pairs of a step, the first of --pairs
    num_steps: int = 3  # steps a process; the first, of samplers the first three, are not timed
    rounds: int = 2  # processes a side, alternating
    keep_memory: bool = False  # both sides keep the memory that they free (Linux)
    out: str = ""  # file to which the results are added, JSON Lines


# name, kind, peer, tokens of the prompt and of the completion
CASES = [
    ("log-probs (a) 192 + 64, 8 each", "logps", "trl", 192, 64),
    ("log-probs (b) 32 + 96, 8 each", "logps", "trl", 32, 96),
    ("log-probs (c) pairs", "logps", "trl", 0, 0),
    ("generate (d) lengths vary", "generate", "hf", 0, 192),
    ("generate, equal lengths", "generate", "hf", 32, 64),
    ("generate, equal lengths, 8 each", "generate", "hf", 192, 64),
    ("GRPO step (a)", "grpo", "trl", 192, 64),
    ("GRPO step (b)", "grpo", "trl", 32, 96),
    ("RLOO step (a)", "reinforce_rloo", "trl", 192, 64),
    ("DPO step (c)", "dpo_nll", "trl", 0, 0),
    ("reward model step (c)", "rm_bt", "trl", 0, 0),
    ("SFT step (c), chosen", "sft", "trl", 0, 0),
    ("PPO step (a)", "ppo", "plain", 192, 64),
    ("GRPO step (a)", "grpo", "plain", 192, 64),
    ("RLOO step (a)", "reinforce_rloo", "plain", 192, 64),
    ("K-wise step (a)", "rm_kwise", "plain", 192, 64),
    ("ORM step (a)", "prm", "plain", 192, 64),
    ("DPO step (c)", "dpo_nll", "plain", 0, 0),
    ("reward model step (c)", "rm_bt", "plain", 0, 0),
]
G = 8  # completions a prompt
# glibc gives large blocks back to the system. On some machines taking them again costs as much as
# the computation: a gain for the side that needs less memory, us, that other machines do not see.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}

# --- What both sides get --------------------------------------------------------------------------


def texts_of_length(tokenizer, length, count):
    """Different texts of exactly `length` tokens, from this repository's own files."""
    files = sorted([*ROOT.glob("*.md"), *ROOT.glob("*.py")])
    if len(tokenizer) < 1000:  # the toy's alphabet
        files = sorted(ROOT.glob("toy/problems_*.jsonl"))
    ids = tokenizer("".join(f.read_text() for f in files))["input_ids"]
    found, start = [], 0
    while len(found) < count:
        if start + length > len(ids):
            stop(f"the repository's text is too short for {count} texts of {length} tokens")
        text = tokenizer.decode(ids[start : start + length])
        fits = len(tokenizer(text)["input_ids"]) == length and text.strip()
        found += [text] if fits else []
        start += length if fits else 1
    return found


def prepare(args, work):
    """In the folder `work`: the model without its chat template, so that both sides see the same
    text, and with a pad token that is not the EOS, because Transformers' pooling of a reward model
    would take another token there; the same as a reward model; the rows of every case."""
    tokenizer = load_tokenizer(args.model)
    pairs = []
    read = load_rows(args.pairs, "prompt", "chosen", "rejected")
    for row in read[: args.num_pairs]:
        text = {
            k: v if isinstance(v, str) else v[-1]["content"]
            for k, v in row.items()
            if k in ("chosen", "rejected")
        }
        prompt = tokenizer.decode(encode_prompt(tokenizer, row["prompt"]))
        pairs.append({"prompt": prompt, "completion": text["chosen"], **text})
    prompts = {
        tokenizer.decode(encode_prompt(tokenizer, row["prompt"])): 0
        for row in read[: 4 * args.num_pairs]
    }
    tokenizer.chat_template = None
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    torch.manual_seed(0)
    rm = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, dtype=torch.float32
    )
    for m in model, rm:
        m.config.pad_token_id = tokenizer.pad_token_id
    for name, part in ("model", model), ("model", tokenizer), ("rm", rm), ("rm", tokenizer):
        part.save_pretrained(work / name)
    for length, tokens in {case[3:] for case in CASES}:
        rows = pairs
        if length:
            texts = texts_of_length(tokenizer, length, args.num_prompts)
            some = iter(texts_of_length(tokenizer, tokens - 1, args.num_prompts * G))
            rows = [
                {"prompt": t, "completions": [next(some) for _ in range(G)], "ranks": [*range(G)]}
                for t in texts
            ]
        elif tokens:  # more prompts, so that the lengths of the greedy answers vary
            rows = [{"prompt": p} for p in prompts]
        (work / f"{length}_{tokens}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flat = [
            {"prompt": row["prompt"], "completion": c, "label": i % 2 == 0}
            for row in rows
            for i, c in enumerate(row.get("completions", []))
        ]
        (work / f"{length}_{tokens}_flat.jsonl").write_text("\n".join(map(json.dumps, flat)))


# --- The table ------------------------------------------------------------------------------------


def measure(job, side, work):
    """Start a process for one side -> its line, as a dictionary."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        job = job | {"side": side, "output": f"{folder}/run"}
        done = subprocess.run(
            [sys.executable, str(SIDES), json.dumps(job)],
            capture_output=True,
            text=True,
            cwd=folder,
            env={
                **(KEEP_MEMORY if job["keep_memory"] else {}),
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": f"{folder}/hf",
            },
        )
    if done.returncode:
        stop(f"{job['name']}, {side}: {' '.join(done.stderr.strip().splitlines()[-3:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(args):
    print(
        "| case | dtype | peer | seconds: ours, peer | tokens a second | times as fast "
        "| memory, GB: ours, peer | share |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as work:
        prepare(args, Path(work))
        for dtype in args.dtypes:
            for name, kind, peer, length, tokens in CASES:
                if args.cases and not any(c in f"{name} {peer}" for c in args.cases):
                    continue
                job = dict(
                    name=name,
                    kind=kind,
                    tokens=tokens,
                    dtype=dtype,
                    device=args.device,
                    model=f"{work}/model",
                    rm=f"{work}/rm",
                    rows=f"{work}/{length}_{tokens}.jsonl",
                    num_steps=args.num_steps,
                    keep_memory=args.keep_memory,
                )
                sides = {"ours": [], peer: []}
                for _ in range(args.rounds):
                    for side, results in sides.items():
                        results.append(measure(job, side, work))
                row = summary(kind, sides["ours"], sides[peer], dtype)
                line = " | ".join(f"{x:.2f}" if isinstance(x, float) else x for x in row)
                print(f"| {name} | {dtype} | {peer} | {line} |", flush=True)
                if args.out:
                    with open(args.out, "a") as f:
                        f.write(json.dumps({**job, "peer": peer, "sides": sides}) + "\n")


def summary(kind, ours, peer, dtype="float32"):
    """Results of both sides -> the cells of a row; where they did not compute the same, it says so.
    RLOO's losses are compared by their gradient alone: TRL's has the ratio in place of its log.
    Of greedy completions in bfloat16 the number of tokens is: a rounding changes a word, and all
    that follow."""
    medians = [statistics.median(s for r in side for s in r["seconds"]) for side in (ours, peer)]
    peaks = [max(r["peak"] for r in side) for side in (ours, peer)]
    a, b, coarse = ours[0], peer[0], dtype != "float32"
    greedy = kind == "generate" and coarse
    tolerance = 5e-2 if greedy else 1e-2 if coarse else 1e-4
    for what in ("norm", "loss")[: 1 if greedy or kind == "reinforce_rloo" else 2]:
        for x, y in zip(a[what], b[what], strict=True):
            if abs(x - y) > tolerance * max(abs(x), abs(y)) + tolerance / 100:
                return (f"not the same: {what} {x:.6g} and {y:.6g}", "", "", "", "")
    digits = 2 if medians[0] > 1 else 3
    return (
        ", ".join(f"{m:.{digits}f}" for m in medians),
        ", ".join(f"{a['tokens'] / m:.0f}" for m in medians),
        medians[1] / medians[0],
        f"{peaks[0]:.2f}, {peaks[1]:.2f}",
        peaks[0] / peaks[1],
    )


if __name__ == "__main__":
    main(parse_args(Args, {}))
