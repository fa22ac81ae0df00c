"""Reward model on whole rankings: K-wise maximum likelihood (Plackett-Luce; Zhu et al. 2023).

Read beside the RLHF Book (draft of January 2025; "Reward Modeling" in later editions):
    plackett_luce_loss    7.4.3: the likelihood of a ranking of K completions; K = 2 is eq. 3

The draft prints the probability of a ranking. Choices it leaves open:
    1. -log of it, mean over prompts; K may differ by prompt, and a longer ranking weighs no less.
    2. A model that places best first, then the best of the rest, has no ties: rows with tied ranks
       are refused. rm_bt.py takes those.
    3. The reward is read at the end of turn, which every completion has unless it was cut.

rm_bt.py trains on the same rows by their pairs (eq. 6), and reports the same figures.

    python rm_kwise.py                                                 # the toy, in half a minute
    python rm_kwise.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset rankings.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py.
"""
import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, get_scheduler

from common import (Run, answer_text, encode, encode_prompt, last_scores, load_model, load_rows,
                    load_splits, load_tokenizer, parse_args, pick_device, set_other_pad, stop,
                    stop_on_error, update)

@dataclass
class Args:
    model: str  # causal model to start from: a folder or a name on the hub
    dataset: str
    """JSON Lines or owner/name:split of the hub: `prompt`, `completions`, `ranks` (0 the best, no
    two equal); or `prompt`, `chosen`, `rejected`: a ranking of two"""
    eval_dataset: str = ""  # held-out rows of the same form; else --eval-size prompts of --dataset
    output_dir: str = "runs/rm_kwise"  # folder of the run: metrics, curves, checkpoint, final model
    resume: bool = False  # go on from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed of the data's order and of the new head
    device: str = "auto"  # torch device; auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward pass (autocast; the weights are float32); auto: bfloat16 where cuda has it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time (no shared prompts)"""
    share_prompts: bool = True  # a prompt is computed once for all its completions: same result

    num_epochs: int = 1  # passes over the data (InstructGPT: 1; more overfit)
    batch_size: int = 64  # prompts a step, each with all of its completions (InstructGPT: 64)
    micro_batch_size: int = 8  # completions a forward pass, in whole prompts; changes no gradient
    max_length: int = 1024  # tokens of prompt and completion; longer completions are cut
    learning_rate: float = 9e-6  # peak of AdamW's (InstructGPT: 9e-6)
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up
    warmup_ratio: float = 0.03  # share of the steps in which the learning rate rises from 0
    max_grad_norm: float = 1.0  # largest norm of the gradient; longer ones are scaled down to it

    eval_size: int = 64  # prompts held out where there is no --eval-dataset; 0: none
    eval_every: int = 50  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 50  # steps between checkpoints

TOY = dict(model="toy/model", dataset="toy/kwise_train.jsonl", eval_dataset="toy/kwise_test.jsonl",
           num_epochs=2, learning_rate=1e-3, batch_size=32, micro_batch_size=128,
           warmup_ratio=0.1)

# --- The algorithm --------------------------------------------------------------------------------

def plackett_luce_loss(scores, mask):
    """Scores, mask (P, K), the best completion first and padding last -> scalar, nats. Book 7.4.3:

    -log prod_k exp(r_k) / sum_{j >= k} exp(r_j) = sum_k [logsumexp_{j >= k} r_j - r_k],
    mean over prompts. arXiv:2301.11270.
    """
    scores = scores.masked_fill(~mask, -torch.inf)
    rest = scores.flip(1).logcumsumexp(1).flip(1)  # (P, K): of what is left when k is placed
    return torch.where(mask, rest - scores, 0.0).sum(1).mean()

def best_first(scores, ranks, prompt_of):
    """Scores, ranks, prompt_of (R,), prompt-major -> scores (P, K) by rank, and their mask."""
    groups = prompt_of.unique_consecutive(return_counts=True)[1].tolist()
    rows = [s[r.argsort()] for s, r in
            zip(scores.split(groups), ranks.split(groups), strict=True)]
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True, False)
    return pad_sequence(rows, batch_first=True), mask

# --- Evaluation -----------------------------------------------------------------------------------

def ranked_pairs(ranks, prompt_of):
    """Ranks, prompt_of (R,) -> better, worse (N,): every pair of completions of one prompt."""
    same = prompt_of[:, None] == prompt_of
    return (same & (ranks[:, None] < ranks)).nonzero(as_tuple=True)

def pair_accuracy(better, worse):
    """Share of pairs in which the better one has the higher score, ties half: (N,), (N,)."""
    return ((better > worse).float() + (better == worse).float() / 2).mean()

def ranking_metrics(scores, lengths, ranks, prompt_of):
    """Scores, lengths in tokens, ranks, prompt_of (R,) -> held-out metrics, of rankings and pairs.

    Kendall's tau: (pairs in order - pairs out of order) / pairs, mean over prompts; top-1: how
    often the best completion has the highest score, 1/m where m share it. Accuracy where the better
    completion is the longer one and where it is the shorter one: far apart, they tell a model that
    likes length.
    """
    better, worse = ranked_pairs(ranks, prompt_of)
    r_b, r_w, longer = scores[better], scores[worse], lengths[better] - lengths[worse]
    order, mask = best_first(scores, ranks, prompt_of)
    order = order.masked_fill(~mask, -torch.inf)
    best = order == order.max(1, keepdim=True).values
    tau = [(r_b - r_w)[prompt_of[better] == p].sign().mean() for p in prompt_of.unique()]
    spread = [scores[prompt_of == p].std() for p in prompt_of.unique()]
    return {"eval_loss": plackett_luce_loss(order, mask), "eval_accuracy": pair_accuracy(r_b, r_w),
            "eval_margin": (r_b - r_w).mean(), "eval_tau": torch.stack(tau).mean(),
            "eval_top1": (best[:, 0] / best.sum(1)).mean(),
            "eval_accuracy_better_longer": pair_accuracy(r_b[longer > 0], r_w[longer > 0]),
            "eval_accuracy_better_shorter": pair_accuracy(r_b[longer < 0], r_w[longer < 0]),
            "eval_reward": scores.mean(), "eval_reward_std": scores.std(),
            "eval_reward_std_prompt": torch.stack(spread).mean()}

# --- The task: change this for your own -----------------------------------------------------------

def to_ranking(row):
    """A row -> texts of K completions and their ranks, 0 the best."""
    if "completions" in row:
        return row["completions"], row["ranks"]
    pair = row["chosen"], row["rejected"]
    return [answer_text(x, row["prompt"]) for x in pair], [0, 1]

# --- Training -------------------------------------------------------------------------------------

def read_examples(path):
    """File -> list of {prompt, completions, ranks}."""
    examples = []
    columns = ("completions", "chosen"), ("ranks", "rejected")
    for n, row in enumerate(load_rows(path, "prompt", *columns), 1):
        with stop_on_error(f"{path}, row {n}: cannot be read"):
            texts, ranks = to_ranking(row)
            if len(texts) < 2 or len(ranks) != len(texts):
                raise ValueError(f"{len(texts)} completions and {len(ranks)} ranks")
            if not all(isinstance(x, int | float) and math.isfinite(x) for x in ranks):
                raise ValueError(f"ranks {ranks}: no numbers")
            if len(set(ranks)) < len(ranks):
                raise ValueError(f"ranks {ranks}: no ranking, some tie; rm_bt.py takes ties")
            if not all(text.strip() for text in texts):
                raise ValueError("an empty completion")
        examples.append({"prompt": row["prompt"], "completions": texts, "ranks": ranks})
    return examples

def keep_comparable(examples, tokenizer, max_length, name):
    """Leave out completions that are equal to another one, at the latest when cut to max_length,
    and then examples without a comparison, or whose prompt fills max_length; says how many, and how
    many completions are cut."""
    kept, cut = [], 0
    for e in examples:
        room = max_length - len(encode_prompt(tokenizer, e["prompt"]))
        ids = tokenizer(e["completions"], add_special_tokens=False)["input_ids"]
        first = {tuple(x[:room]): i for i, x in reversed([*enumerate(ids)])}.values()
        ranks = [e["ranks"][i] for i in first]
        ranks = [sorted(set(ranks)).index(rank) for rank in ranks]  # 0 the best, none left out
        if room > 0 and max(ranks, default=0) > 0:
            kept.append(e | {"ranks": ranks, "completions": [e["completions"][i] for i in first]})
            cut += sum(len(ids[i]) >= room for i in first)
    if cut or len(kept) < len(examples):
        print(f"{name}: of {len(examples)} rows, dropped {len(examples) - len(kept)}: nothing to "
              f"compare, also when cut to --max-length {max_length}; cut {cut} completions")
    return kept or (examples and stop(f"{name}: no row has two different completions to compare"))

def collate(examples, tokenizer, max_length):
    """-> Batch of all their completions, and ranks (R,)."""
    prompts, completions = ([e[k] for e in examples] for k in ("prompt", "completions"))
    ranks = torch.tensor([rank for e in examples for rank in e["ranks"]])
    return encode(tokenizer, prompts, completions, max_length), ranks

@torch.no_grad()
def score_all(model, tokenizer, examples, max_length, args):
    """-> scores, lengths in tokens, ranks, prompt_of of all completions, each (R,) on the CPU."""
    rows = []
    for i in range(0, len(examples), args.batch_size):
        batch, ranks = collate(examples[i:i + args.batch_size], tokenizer, max_length)
        for mb in batch.split(args.micro_batch_size, whole_prompts=True):
            scores = last_scores(model, batch.rows(mb).to(model.device), args.share_prompts).cpu()
            lengths = batch.completion_mask[mb].sum(1)
            rows.append(torch.stack([scores, lengths, ranks[mb], batch.prompt_of[mb] + i]))
    scores, lengths, ranks, prompt_of = torch.cat(rows, dim=1)
    return scores, lengths, ranks, prompt_of.long()

def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    device, tokenizer = pick_device(args.device), load_tokenizer(args.model)
    examples, eval_examples = load_splits(args, read_examples)
    model = load_model(AutoModelForSequenceClassification, args.model, device, args.dtype,
                       args.gradient_checkpointing, new_head=1)
    set_other_pad(tokenizer)
    model.config.update({"pad_token_id": tokenizer.pad_token_id, "reward_bias": 0.0})
    max_length = min(args.max_length, model.context)
    examples = keep_comparable(examples, tokenizer, max_length, args.dataset)
    eval_examples = keep_comparable(eval_examples, tokenizer, max_length,
                                    args.eval_dataset or "held out")

    order = [i for epoch in range(args.num_epochs)  # each epoch in an order of its own
             for i in random.Random(f"{args.seed} {epoch}").sample(range(len(examples)),
                                                                  len(examples))]
    num_steps = math.ceil(len(order) / args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0,
                                  fused=True)
    warmup = round(args.warmup_ratio * num_steps)
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    run.begin({"model": model, "optimizer": optimizer, "scheduler": scheduler}, num_steps)

    def report():
        if eval_examples:
            scored = score_all(model, tokenizer, eval_examples, max_length, args)
            run.log(ranking_metrics(*scored), "eval_loss", "eval_accuracy", "eval_tau")
            best = scored[2] == 0
            run.histogram({"best": scored[0][best], "others": scored[0][~best]})

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Draw the rankings of this step
        drawn = [examples[i] for i in order[(step - 1) * args.batch_size:step * args.batch_size]]
        batch, ranks = (x.to(device) for x in collate(drawn, tokenizer, max_length))

        # 2. Rewards and loss; each micro-batch weighs as much as its share of the step's prompts
        loss, rewards = 0.0, torch.zeros_like(ranks, dtype=torch.float32)
        for mb in batch.split(args.micro_batch_size, whole_prompts=True):
            part = batch.rows(mb)
            scores = last_scores(model, part, args.share_prompts)
            mb_loss = plackett_luce_loss(*best_first(scores, ranks[mb], part.prompt_of))
            mb_loss = mb_loss * len(part.prompt_ids) / len(drawn)
            mb_loss.backward()
            loss += mb_loss.item()
            rewards[mb] = scores.detach()

        # 3. Gradient step
        lr = scheduler.get_last_lr()[0]
        grad_norm = update(optimizer, scheduler, loss, args.max_grad_norm)

        # 4. Log
        better, worse = ranked_pairs(ranks, batch.prompt_of)
        run.log({"loss": loss, "accuracy": pair_accuracy(rewards[better], rewards[worse]),
                 "margin": (rewards[better] - rewards[worse]).mean(),
                 "reward": rewards.mean(), "reward_std": rewards.std(correction=0),
                 "grad_norm": grad_norm, "lr": lr,
                 "tokens_per_second": batch.completion_mask.sum().item() / (time.time() - start)},
                "loss", "accuracy")
        if step % args.eval_every == 0 or step == num_steps:
            report()

    # The loss does not see a constant. Choose the one that makes the mean reward of the training
    # completions 0, as InstructGPT does for its demonstrations. Heads have no bias in Transformers:
    # it goes into config.json.
    run.checkpoint()  # the pass takes a while
    mean = score_all(model, tokenizer, examples, max_length, args)[0].mean().item()
    model.config.reward_bias = -mean
    print(f"reward_bias {-mean:.4g}: the mean reward of the training completions is now 0")
    run.finish(tokenizer, {"final": model})

if __name__ == "__main__":
    main(parse_args(Args, TOY))
