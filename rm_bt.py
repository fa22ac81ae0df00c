"""Reward model on comparisons (Bradley-Terry; Stiennon et al. 2020, InstructGPT, Llama 2).

Read beside the RLHF Book (draft of January 2025; "Reward Modeling" in later editions):
    bradley_terry_loss    7.1, eq. 3; eq. 4 is the same number; eq. 5 with a margin (7.4.1, 8.3)
    ranked_pairs          7.4.2: all comparisons that a ranking of K completions makes
    ranking_loss          7.4.2, eq. 6: their mean by prompt
    center_loss           keeps rewards near 0 (Eisenstein et al. 2023, arXiv:2312.09244)

Differs from the print:
    1. Eq. 4 prints log(1 + e^(r_l) - e^(r_w)). It is log(1 + e^(r_l - r_w)).
    2. Section 8.3 prints the margin outside the sigmoid, where it has no gradient. It is inside.
    3. Of tied ranks no comparison is made, and the mean of eq. 6 is over those that are.
    4. The reward is read at the end of turn, which every completion has unless it was cut.

    python rm_bt.py                                                    # the toy, in half a minute
    python rm_bt.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset preferences.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py.
"""
import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, get_scheduler)

from common import (Run, answer_text, completion_logps, encode, encode_prompt, last_scores,
                    load_model, load_rows, load_splits, load_tokenizer, masked_mean, parse_args,
                    pick_device, set_other_pad, stop, stop_on_error, update)

@dataclass
class Args:
    model: str  # causal model to start from: a folder or a name on the hub
    dataset: str
    """JSON Lines or owner/name:split of the hub: `prompt`, `chosen`, `rejected` and, if you have
    it, `margin`; or `prompt`, `completions`, `ranks` (0 the best; equal ranks tie)"""
    eval_dataset: str = ""  # held-out rows of the same form; else --eval-size prompts of --dataset
    output_dir: str = "runs/rm_bt"  # folder of the run: metrics, curves, checkpoint, final model
    resume: bool = False  # go on from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed of the data's order and of the new head
    device: str = "auto"  # torch device; auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward pass (autocast; the weights are float32); auto: bfloat16 where cuda has it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time (no shared prompts)"""
    share_prompts: bool = True  # a prompt is computed once for all its completions: same result

    margin_scale: float = 1.0
    """factor of a row's `margin` (Llama 2, small: 1, 2/3, 1/3, 0; large: 3 times that); 0: eq. 3"""
    center_coef: float = 0.0  # weight of the squared sum of a pair's rewards (Eisenstein: 0.01)
    nll_coef: float = 0.0
    """weight of the language-model loss on the best completion (8.2), nats a token; costs a second
    pass"""

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

TOY = dict(model="toy/model", dataset="toy/pref_train.jsonl", eval_dataset="toy/pref_test.jsonl",
           num_epochs=3, learning_rate=1e-3, batch_size=32, micro_batch_size=64,
           warmup_ratio=0.1)

# --- The algorithm --------------------------------------------------------------------------------

def bradley_terry_loss(chosen, rejected, margin=0.0):
    """-log sigmoid(r_c - r_r - m), mean over pairs: rewards (N,), (N,), margin (N,) or a number.

    Book eq. 3 = log(1 + exp(r_r - r_c)), eq. 4; with the margin eq. 5 (Llama 2).
    """
    return -F.logsigmoid(chosen - rejected - margin).mean()

def ranked_pairs(ranks, prompt_of):
    """Ranks, 0 the best, and prompt_of (R,) -> better, worse (N,): every pair of completions of one
    prompt whose ranks differ, once."""
    same = prompt_of[:, None] == prompt_of
    return (same & (ranks[:, None] < ranks)).nonzero(as_tuple=True)

def prompt_mean(values, prompt):
    """Values and their prompts (N,) -> scalar: mean over each prompt, then over prompts."""
    count = prompt.bincount()
    return (values / count[prompt]).sum() / (count > 0).sum()

def ranking_loss(scores, ranks, prompt_of):
    """Scores, ranks, prompt_of (R,) -> scalar. Book eq. 6 (InstructGPT), K may differ by prompt:

    mean over prompts of  -1/C(K,2) sum over pairs, i better than j, of log sigmoid(r_i - r_j).
    A completion is in K - 1 pairs but goes through the model once. Ties: fewer than C(K,2) pairs.
    """
    better, worse = ranked_pairs(ranks, prompt_of)
    return prompt_mean(-F.logsigmoid(scores[better] - scores[worse]), prompt_of[better])

def center_loss(scores, ranks, prompt_of):
    """(r_c + r_r)^2, mean as in `ranking_loss`: the other losses leave a constant free, this draws
    it to 0."""
    better, worse = ranked_pairs(ranks, prompt_of)
    return prompt_mean((scores[better] + scores[worse]) ** 2, prompt_of[better])

# --- Evaluation -----------------------------------------------------------------------------------

def pair_accuracy(better, worse):
    """Share of pairs in which the better one has the higher score, ties half: (N,), (N,)."""
    return ((better > worse).float() + (better == worse).float() / 2).mean()

def pair_metrics(scores, lengths, ranks, prompt_of):
    """Scores, lengths in tokens, ranks, prompt_of (R,) -> held-out metrics of all ranked pairs.

    Accuracy where the better completion is the longer one and where it is the shorter one: far
    apart, they tell a model that likes length.
    """
    better, worse = ranked_pairs(ranks, prompt_of)
    r_b, r_w, longer = scores[better], scores[worse], lengths[better] - lengths[worse]
    spread = torch.stack([scores[prompt_of == p].std() for p in prompt_of.unique()])
    return {"eval_loss": ranking_loss(scores, ranks, prompt_of),
            "eval_accuracy": pair_accuracy(r_b, r_w), "eval_margin": (r_b - r_w).mean(),
            "eval_accuracy_better_longer": pair_accuracy(r_b[longer > 0], r_w[longer > 0]),
            "eval_accuracy_better_shorter": pair_accuracy(r_b[longer < 0], r_w[longer < 0]),
            "eval_reward": scores.mean(), "eval_reward_std": scores.std(),
            "eval_reward_std_prompt": spread.mean()}

# --- The task: change this for your own -----------------------------------------------------------

def to_comparison(row):
    """A row -> texts of K completions, their ranks (0 the best), and the margin of a pair."""
    if "completions" in row:
        return row["completions"], row["ranks"], 0.0
    pair = row["chosen"], row["rejected"]
    return [answer_text(x, row["prompt"]) for x in pair], [0, 1], float(row.get("margin") or 0.0)

# --- Training -------------------------------------------------------------------------------------

def read_examples(path):
    """File -> list of {prompt, completions, ranks, margin}."""
    examples = []
    columns = ("chosen", "completions"), ("rejected", "ranks")
    for n, row in enumerate(load_rows(path, "prompt", *columns), 1):
        with stop_on_error(f"{path}, row {n}: cannot be read"):
            texts, ranks, margin = to_comparison(row)
            if len(texts) < 2 or len(ranks) != len(texts):
                raise ValueError(f"{len(texts)} completions and {len(ranks)} ranks")
            if not all(isinstance(x, int | float) and math.isfinite(x) for x in (*ranks, margin)):
                raise ValueError(f"ranks {ranks}, margin {margin}: no numbers")
            if not all(text.strip() for text in texts):
                raise ValueError("an empty completion")
        examples.append(dict(prompt=row["prompt"], completions=texts, ranks=ranks, margin=margin))
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
    """-> Batch of all their completions, ranks (R,), margins (P,)."""
    prompts, completions = ([e[k] for e in examples] for k in ("prompt", "completions"))
    ranks = torch.tensor([rank for e in examples for rank in e["ranks"]])
    margins = torch.tensor([e["margin"] for e in examples])
    return encode(tokenizer, prompts, completions, max_length), ranks, margins

@torch.no_grad()
def score_all(model, tokenizer, examples, max_length, args):
    """-> scores, lengths in tokens, ranks, prompt_of of all completions, each (R,) on the CPU."""
    rows = []
    for i in range(0, len(examples), args.batch_size):
        batch, ranks, _ = collate(examples[i:i + args.batch_size], tokenizer, max_length)
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
    load = args.model, device, args.dtype, args.gradient_checkpointing
    model = load_model(AutoModelForSequenceClassification, *load, new_head=1)
    set_other_pad(tokenizer)
    model.config.update({"pad_token_id": tokenizer.pad_token_id, "reward_bias": 0.0})
    parts = torch.nn.ModuleList([model])
    if args.nll_coef:  # a language model on the same backbone
        parts.append(lm := load_model(AutoModelForCausalLM, *load))
        setattr(lm, lm.base_model_prefix, model.base_model)
        lm.tie_weights()
    max_length = min(args.max_length, model.context)
    examples = keep_comparable(examples, tokenizer, max_length, args.dataset)
    eval_examples = keep_comparable(eval_examples, tokenizer, max_length,
                                    args.eval_dataset or "held out")
    ranked = any(len(e["ranks"]) > 2 for e in examples)
    if ranked and args.margin_scale and any(e["margin"] for e in examples):
        stop(f"{args.dataset}: margins go with pairs (eq. 5), but some rows rank more than two: "
             "train on these apart, or with --margin-scale 0")

    order = [i for epoch in range(args.num_epochs)  # each epoch in an order of its own
             for i in random.Random(f"{args.seed} {epoch}").sample(range(len(examples)),
                                                                  len(examples))]
    num_steps = math.ceil(len(order) / args.batch_size)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=args.learning_rate, weight_decay=0.0,
                                  fused=True)
    warmup = round(args.warmup_ratio * num_steps)
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    run.begin({"model": parts, "optimizer": optimizer, "scheduler": scheduler}, num_steps)

    def report():
        if eval_examples:
            scored = score_all(model, tokenizer, eval_examples, max_length, args)
            run.log(pair_metrics(*scored), "eval_loss", "eval_accuracy")
            best = scored[2] == 0
            run.histogram({"best": scored[0][best], "others": scored[0][~best]})

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Draw the comparisons of this step
        drawn = [examples[i] for i in order[(step - 1) * args.batch_size:step * args.batch_size]]
        batch, ranks, margins = (x.to(device) for x in collate(drawn, tokenizer, max_length))

        # 2. Rewards and loss; each micro-batch weighs as much as its share of the step's prompts
        loss, rewards = 0.0, torch.zeros_like(ranks, dtype=torch.float32)
        for mb in batch.split(args.micro_batch_size, whole_prompts=True):
            part, prompts = batch.rows(mb), batch.prompt_of[mb].unique()
            scores = last_scores(model, part, args.share_prompts)
            if ranked:
                mb_loss = ranking_loss(scores, ranks[mb], part.prompt_of)
            else:
                better, worse = ranked_pairs(ranks[mb], part.prompt_of)
                margin = args.margin_scale * margins[prompts]
                mb_loss = bradley_terry_loss(scores[better], scores[worse], margin)
            if args.center_coef:
                mb_loss = mb_loss + args.center_coef * center_loss(scores, ranks[mb],
                                                                   part.prompt_of)
            if args.nll_coef:
                best = part.rows((ranks[mb] == 0).nonzero()[:, 0])
                logps = completion_logps(lm, best, share_prompts=args.share_prompts)
                nll = -masked_mean(logps, best.completion_mask, 1)  # (R,) nats a token
                mb_loss = mb_loss + args.nll_coef * prompt_mean(nll, best.prompt_of)
            mb_loss = mb_loss * len(prompts) / len(drawn)
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
