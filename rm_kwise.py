"""Reward model on whole rankings: K-wise maximum likelihood (Plackett-Luce; Zhu et al. 2023).

Train a model to score the completions of a prompt in the order in which they were ranked.

Read beside the RLHF Book, draft of January 2025 (the printed edition has chapter 7 as chapter 5):
    plackett_luce_loss    7.4.3: the likelihood of a ranking of K completions; K = 2 is eq. 3

The draft prints the probability of a ranking. Choices it leaves open:
    1. -log of it, mean over prompts. K may differ per prompt; nothing is divided by K, so longer
       rankings weigh more.
    2. A model that places the best first, then the best of the rest, has no ties: rows with tied
       ranks are refused. rm_bt.py takes those.
    3. The reward is read at the end of turn, which every completion has unless it was cut.

rm_bt.py trains on the same rows by their pairs (eq. 6), and reports the same figures.

    python rm_kwise.py                                                 # the toy, in half a minute
    python rm_kwise.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset rankings.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, get_scheduler

from common import (
    add_up,
    add_up_gradients,
    deal_out,
    encode,
    encode_answers,
    fixed_scores,
    last_scores,
)
from plumbing import (
    Run,
    answer_text,
    check_finite,
    check_texts,
    count_steps,
    last_tokens,
    load_model,
    load_rows,
    load_splits,
    load_tokenizer,
    pick_device,
    run_script,
    set_other_pad,
    show_batch,
    stop,
    stop_on_error,
)


@dataclass
class Args:
    model: str  # causal model to start from: a folder, or a name on the hub
    dataset: str
    """training rows, JSON Lines or owner/name:split on the hub: `prompt`, `completions`, `ranks` (0
    is the best, no two are equal); or `prompt`, `chosen`, `rejected`: a ranking of two"""
    eval_dataset: str = ""
    """held-out rows of the same form; if empty, --eval-size prompts are taken from --dataset"""
    show_rows: int = 0
    """number of rows to print as the model gets them, with the places where the loss counts; then
    the program ends; 0: train"""

    output_dir: str = "runs/rm_kwise"  # folder for metrics, curves, checkpoint and final model
    resume: bool = False  # continue from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed for shuffling and sampling
    device: str = "auto"  # torch device; auto: cuda if there is one, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the forward pass, while weights are float32; auto: bfloat16 if cuda supports it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time, prompts are not shared"""
    shard: bool = False
    """divide weights, gradients and optimiser states among the processes of torchrun (FSDP)"""
    share_prompts: bool = True
    """compute a prompt once for all of its completions; the result is the same"""

    num_epochs: int = 1  # passes over the data (InstructGPT: 1; more overfit)
    batch_size: int = 64  # prompts per step, each with all of its completions (InstructGPT: 64)
    micro_batch_size: int = 8
    """completions per forward pass, in whole prompts; changes memory, not the gradient"""
    max_length: int = 1024
    """most tokens of a prompt and its completion together; longer completions are cut"""
    learning_rate: float = 9e-6  # peak learning rate of AdamW (InstructGPT: 9e-6)
    lora_rank: int = 0
    """rank of the adapters that are trained in place of the weights (LoRA), with about ten times
    the learning rate; 0: all weights are trained; see docs/models.md"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """learning-rate schedule after the warm-up; linear and cosine fall to 0"""
    warmup_ratio: float = 0.03  # fraction of the steps used for linear warm-up
    max_grad_norm: float = 1.0  # maximum norm of the gradient; a larger one is scaled down to it

    eval_size: int = 64
    """number of prompts held out of --dataset, at most a tenth, without --eval-dataset; 0: none"""
    eval_every: int = 50  # steps between evaluations; also before the first and after the last step
    checkpoint_every: int = 50  # steps between checkpoints


TOY = dict(
    model="toy/model",
    dataset="toy/kwise_train.jsonl",
    eval_dataset="toy/kwise_test.jsonl",
    num_epochs=2,
    learning_rate=1e-3,
    batch_size=32,
    micro_batch_size=128,
    warmup_ratio=0.1,
)

# --- The algorithm --------------------------------------------------------------------------------


def plackett_luce_loss(scores, mask):
    """Scores, mask (P, K), the best completion first and padding last -> scalar, nats. Book 7.4.3.

    -log prod_k exp(r_k) / sum_{j >= k} exp(r_j) = sum_k [logsumexp_{j >= k} r_j - r_k],
    mean over prompts. arXiv:2301.11270.
    """
    scores = scores.masked_fill(~mask, -torch.inf)
    # (P, K): log of the sum over what is left when the k-th is placed, added up from the last
    log_rest = scores.flip(1).logcumsumexp(1).flip(1)
    return torch.where(mask, log_rest - scores, 0.0).sum(1).mean()


def best_first(scores, ranks, prompt_of):
    """Scores, ranks, prompt_of (R,), prompt-major -> scores (P, K) by rank, and their mask."""
    rows = []
    for p in prompt_of.unique():
        of_prompt = prompt_of == p
        order = ranks[of_prompt].argsort()
        rows.append(scores[of_prompt][order])
    masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)


# --- Evaluation -----------------------------------------------------------------------------------


def ranked_pairs(ranks, prompt_of):
    """Ranks, 0 the best, and prompt_of (R,) -> better, worse (N,): places of completions.

    Every pair of completions of one prompt whose ranks differ, once.
    """
    same_prompt = prompt_of[:, None] == prompt_of
    is_better = ranks[:, None] < ranks
    return (same_prompt & is_better).nonzero(as_tuple=True)


def pair_accuracy(better, worse):
    """Share of pairs in which the better one has the higher score, ties count half: (N,), (N,)."""
    return ((better > worse).float() + (better == worse).float() / 2).mean()


def ranking_metrics(scores, lengths, ranks, prompt_of):
    """Scores, lengths in tokens, ranks, prompt_of (R,) -> held-out metrics, of rankings and pairs.

    Kendall's tau: (pairs in order - pairs out of order) / pairs, mean over prompts. top-1: how
    often the best completion has the highest score; 1/m where m completions share it. Accuracy
    where the better completion is the longer one, and where it is the shorter one: if they are far
    apart, the model likes length.
    """
    better, worse = ranked_pairs(ranks, prompt_of)
    r_better = scores[better]
    r_worse = scores[worse]
    longer = lengths[better] - lengths[worse]
    spread = torch.stack([scores[prompt_of == p].std() for p in prompt_of.unique()])
    ranked_scores, mask = best_first(scores, ranks, prompt_of)
    ranked_scores = ranked_scores.masked_fill(~mask, -torch.inf)
    is_highest = ranked_scores == ranked_scores.max(1, keepdim=True).values
    in_order = (r_better - r_worse).sign()
    tau = torch.stack([in_order[prompt_of[better] == p].mean() for p in prompt_of.unique()])
    return {
        "eval_loss": plackett_luce_loss(ranked_scores, mask),
        "eval_accuracy": pair_accuracy(r_better, r_worse),
        "eval_margin": (r_better - r_worse).mean(),
        "eval_tau": tau.mean(),
        "eval_top1": (is_highest[:, 0] / is_highest.sum(1)).mean(),
        "eval_accuracy_better_longer": pair_accuracy(r_better[longer > 0], r_worse[longer > 0]),
        "eval_accuracy_better_shorter": pair_accuracy(r_better[longer < 0], r_worse[longer < 0]),
        "eval_reward": scores.mean(),
        "eval_reward_std": scores.std(),
        "eval_reward_std_prompt": spread.mean(),
    }


# --- The task: change this for your own -----------------------------------------------------------


def to_ranking(row):
    """A row -> texts of K completions, and their ranks (0 the best)."""
    if "completions" in row:
        texts = [answer_text(answer, row["prompt"]) for answer in row["completions"]]
        return texts, row["ranks"]
    chosen = answer_text(row["chosen"], row["prompt"])
    rejected = answer_text(row["rejected"], row["prompt"])
    return [chosen, rejected], [0, 1]


# --- Rows -----------------------------------------------------------------------------------------


def read_examples(path):
    """File -> list of {prompt, completions, ranks}. Bad rows are named and stop the run."""
    examples = []
    num_soft = 0
    columns = ("completions", "chosen"), ("ranks", "rejected")
    for number, row in enumerate(load_rows(path, "prompt", *columns), 1):
        with stop_on_error(f"{path}, row {number}: cannot be read"):
            texts, ranks = to_ranking(row)
            if len(texts) < 2 or len(ranks) != len(texts):
                raise ValueError(f"{len(texts)} completions and {len(ranks)} ranks")
            for value in ranks:
                if not isinstance(value, int | float) or not math.isfinite(value):
                    raise ValueError(f"ranks {ranks}: no numbers")
            if len(set(ranks)) < len(ranks):
                raise ValueError(f"ranks {ranks}: no ranking, some tie; rm_bt.py takes ties")
            if not all(text.strip() for text in texts):
                raise ValueError("an empty completion")
        if row.get("probability") is not None:
            num_soft += 1
        examples.append({"prompt": row["prompt"], "completions": texts, "ranks": ranks})
    if num_soft:
        print(f"{path}: {num_soft} rows have a probability, which only rm_bt.py and dpo_nll.py use")
    return examples


def first_of_equals(rows):
    """Lists of ids -> places of those that are equal to no earlier one."""
    places = []
    seen = set()
    for i, ids in enumerate(rows):
        if tuple(ids) not in seen:
            seen.add(tuple(ids))
            places.append(i)
    return places


def keep_comparable(examples, tokenizer, max_length, name):
    """Leave out completions that are equal to another one, perhaps only when cut to max_length.

    Then leave out examples in which nothing is left to compare, or whose prompt fills max_length.
    Prints how many were dropped, and how many completions are cut.
    """
    kept = []
    num_cut = 0
    for example in examples:
        prompt_ids, ids = encode_answers(tokenizer, example["prompt"], example["completions"])
        room = max(0, max_length - len(prompt_ids))
        places = first_of_equals([row[:room] for row in ids])
        ranks = [example["ranks"][i] for i in places]
        levels = sorted(set(ranks))
        if len(levels) < 2:
            continue
        completions = [example["completions"][i] for i in places]
        ranks = [levels.index(rank) for rank in ranks]  # 0 is the best, and none is left out
        kept.append(example | {"completions": completions, "ranks": ranks})
        num_cut += sum(len(ids[i]) > room for i in places)
    num_dropped = len(examples) - len(kept)
    if num_cut or num_dropped:
        print(
            f"{name}: of {len(examples)} rows, dropped {num_dropped}: nothing to compare, also "
            f"when cut to --max-length {max_length}; cut {num_cut} completions"
        )
    if examples and not kept:
        stop(f"{name}: no row has two different completions to compare")
    return kept


def collate(examples, tokenizer, max_length):
    """-> Batch of all their completions, ranks (R,)."""
    prompts = [example["prompt"] for example in examples]
    completions = [example["completions"] for example in examples]
    ranks = []
    for example in examples:
        ranks += example["ranks"]
    return encode(tokenizer, prompts, completions, max_length), torch.tensor(ranks)


def score_all(model, tokenizer, examples, max_length, args):
    """-> scores, lengths in tokens, ranks, prompt_of of all completions, each (R,) on the CPU."""
    scores, lengths, ranks, prompt_of = [], [], [], []
    for start in range(0, len(examples), args.batch_size):
        part = examples[start : start + args.batch_size]
        batch, part_ranks = collate(part, tokenizer, max_length)
        how = (args.micro_batch_size, args.share_prompts)
        scores.append(fixed_scores(model, batch.to(model.device), *how).cpu())
        lengths.append(batch.completion_mask.sum(1))
        ranks.append(part_ranks)
        prompt_of.append(batch.prompt_of + start)
    return torch.cat(scores), torch.cat(lengths), torch.cat(ranks), torch.cat(prompt_of)


# --- Training -------------------------------------------------------------------------------------


def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.model)
    examples, eval_examples = load_splits(args, read_examples)
    options = (args.model, device, args.dtype, args.shard)
    options += (args.gradient_checkpointing, args.lora_rank)
    model = load_model(AutoModelForSequenceClassification, *options, new_head=1)
    set_other_pad(tokenizer)
    model.config.update({"pad_token_id": tokenizer.pad_token_id, "reward_bias": 0.0})
    max_length = min(args.max_length, model.context)
    check_texts(tokenizer, model, examples + eval_examples)
    examples = keep_comparable(examples, tokenizer, max_length, args.dataset)
    eval_name = args.eval_dataset or "held out"
    eval_examples = keep_comparable(eval_examples, tokenizer, max_length, eval_name)
    if args.show_rows:
        batch = collate(examples[: args.show_rows], tokenizer, max_length)[0]
        show_batch(tokenizer, batch, last_tokens(batch.completion_mask))

    order = []
    for epoch in range(args.num_epochs):  # each epoch in an order of its own
        shuffle = random.Random(f"{args.seed} {epoch}")
        order += shuffle.sample(range(len(examples)), len(examples))
    num_steps = count_steps(len(order), args)
    lr = args.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    warmup = round(args.warmup_ratio * num_steps)
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    run.begin({"model": model, "optimizer": optimizer, "scheduler": scheduler}, num_steps)
    run.describe(model, len(examples), len(eval_examples), f"{args.batch_size} prompts")

    def report():
        if not eval_examples:
            return
        scored = score_all(model, tokenizer, eval_examples, max_length, args)
        run.log(ranking_metrics(*scored), "eval_loss", "eval_accuracy", "eval_tau")
        scores, _, ranks, _ = scored
        run.histogram({"best": scores[ranks == 0], "others": scores[ranks > 0]})

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Draw the rankings of this step
        index = order[(step - 1) * args.batch_size : step * args.batch_size]
        drawn = [examples[i] for i in index]
        batch, ranks = collate(drawn, tokenizer, max_length)
        batch, ranks = batch.to(device), ranks.to(device)

        # 2. Rewards and loss; each micro-batch weighs as much as its share of the step's prompts
        loss = torch.zeros((), device=device)
        rewards = torch.zeros_like(ranks, dtype=torch.float32)
        for mb in deal_out(batch.split(args.micro_batch_size, whole_prompts=True), args.shard):
            part = batch.rows(mb)
            scores = last_scores(model, part, args.share_prompts)
            mb_loss = plackett_luce_loss(*best_first(scores, ranks[mb], part.prompt_of))
            mb_loss = mb_loss * len(part.prompt_ids) / len(drawn)
            mb_loss.backward()
            loss += mb_loss.detach()
            rewards[mb] = scores.detach()
        loss = add_up(loss).item()
        add_up(rewards)
        add_up_gradients(model)

        # 3. Gradient step
        lr = scheduler.get_last_lr()[0]
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        check_finite(loss, grad_norm.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # 4. Log
        better, worse = ranked_pairs(ranks, batch.prompt_of)
        metrics = {
            "loss": loss,
            "accuracy": pair_accuracy(rewards[better], rewards[worse]),
            "margin": (rewards[better] - rewards[worse]).mean(),
            "reward": rewards.mean(),
            "reward_std": rewards.std(correction=0),
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens_per_second": batch.completion_mask.sum().item() / (time.time() - start),
        }
        run.log(metrics, "loss", "accuracy")
        if step % args.eval_every == 0 or step == num_steps:
            report()

    # With a constant added to all rewards the loss stays the same. Choose the constant that makes
    # the mean reward of the training completions 0, as InstructGPT does for its demonstrations.
    # Heads have no bias in transformers, so it goes into config.json.
    run.checkpoint()  # the pass takes a while
    scores, _, _, _ = score_all(model, tokenizer, examples, max_length, args)
    model.config.reward_bias = -scores.mean().item()
    print(
        f"reward_bias {model.config.reward_bias:.4g} is added to every score, so that their mean "
        "over the training completions is 0"
    )
    run.finish(tokenizer, {"final": model})


if __name__ == "__main__":
    run_script(main, Args, TOY)
