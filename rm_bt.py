"""Reward model on comparisons (Bradley-Terry; Stiennon et al. 2020, InstructGPT, Llama 2).

Train a model to give the better of two completions of a prompt the higher score.

Read beside the RLHF Book, draft of January 2025 (the printed edition has chapter 7 as chapter 5).
c and w (chosen, winner) are the better completion, r and l (rejected, loser) the worse one:
    bradley_terry_loss    7.1, eq. 1 to 3; eq. 4 is the same number; eq. 5 with a margin (7.4.1,
                          8.3); 13.2.2 with a soft label, such as a feedback model gives
    ranked_pairs          7.4.2: all comparisons that a ranking of K completions makes
    ranking_loss          7.4.2, eq. 6: their mean per prompt, then over prompts
    center_loss           keeps rewards near 0 (Eisenstein et al. 2023, arXiv:2312.09244)
    (8.2, the language model's loss in a reward model, is --nll-coef)

How the code departs from the print:
    1. Eq. 4 prints log(1 + e^(r_l) - e^(r_w)). It is log(1 + e^(r_l - r_w)).
    2. Section 8.3 prints the margin outside the sigmoid, where it has no gradient. It is inside.

Choices that the print leaves open:
    3. Tied completions are not compared; the mean of eq. 6 is taken over the remaining pairs.
    4. The reward is read at the end of turn, which every completion has unless it was cut.

    python rm_bt.py                                                    # the toy, in half a minute
    python rm_bt.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset preferences.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, get_scheduler

from common import (
    add_up,
    add_up_gradients,
    completion_logps,
    deal_out,
    encode,
    encode_answers,
    fixed_scores,
    last_scores,
    masked_mean,
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
    soft_label,
    stop,
    stop_on_error,
)


@dataclass
class Args:
    model: str  # causal model to start from: a folder, or a name on the hub
    dataset: str
    """training rows, JSON Lines or owner/name:split on the hub: `prompt`, `chosen`, `rejected` and,
    if you have them, `margin` and `probability` (that the chosen one is the better one); or
    `prompt`, `completions`, `ranks` (0 is the best, equal ones tie)"""
    eval_dataset: str = ""
    """held-out rows of the same form; if empty, --eval-size prompts are taken from --dataset"""
    show_rows: int = 0
    """number of rows to print as the model gets them, with the places where the loss counts; then
    the program ends; 0: train"""

    output_dir: str = "runs/rm_bt"  # folder for metrics, curves, checkpoint and final model
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

    margin_scale: float = 1.0
    """factor of a row's `margin` (Llama 2, small: 1, 2/3, 1/3, 0; large: 3 times that); 0: eq. 3"""
    center_coef: float = 0.0
    """weight of the squared sum of a pair's rewards (Eisenstein et al.: 0.01)"""
    nll_coef: float = 0.0
    """weight of the language-model loss on the best completion (8.2), in nats per token; needs a
    second pass"""

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
    dataset="toy/pref_train.jsonl",
    eval_dataset="toy/pref_test.jsonl",
    num_epochs=3,
    learning_rate=1e-3,
    batch_size=32,
    micro_batch_size=64,
    warmup_ratio=0.1,
)

# --- The algorithm --------------------------------------------------------------------------------


def bradley_terry_loss(chosen, rejected, margin=0.0, probability=1.0):
    """-log sigmoid(r_c - r_r - m), mean over pairs: rewards (N,), (N,), margin (N,) or a number.

    Book eq. 3 = log(1 + exp(r_r - r_c)), eq. 4; with the margin eq. 5 (Llama 2).
    With d = r_c - r_r - m and a soft label p (N,), the probability that the chosen completion is
    the better one: -p log sigmoid(d) - (1 - p) log sigmoid(-d), least where p = sigmoid(d). Book
    13.2.2 (Bai et al. 2022).
    """
    d = chosen - rejected - margin
    losses = -probability * F.logsigmoid(d) - (1 - probability) * F.logsigmoid(-d)
    return losses.mean()


def ranked_pairs(ranks, prompt_of):
    """Ranks, 0 the best, and prompt_of (R,) -> better, worse (N,): places of completions.

    Every pair of completions of one prompt whose ranks differ, once.
    """
    same_prompt = prompt_of[:, None] == prompt_of
    is_better = ranks[:, None] < ranks
    return (same_prompt & is_better).nonzero(as_tuple=True)


def prompt_mean(values, prompt):
    """Values and their prompts (N,) -> scalar: the mean over each prompt, then over the prompts.

    values [1, 3, 5] of prompts [0, 0, 1] -> (2 + 5) / 2.
    """
    means = [values[prompt == p].mean() for p in prompt.unique()]
    return torch.stack(means).mean()


def ranking_loss(scores, ranks, prompt_of):
    """Scores, ranks, prompt_of (R,) -> scalar. Book eq. 6 (InstructGPT); K may differ per prompt.

    The mean over prompts of -1/C(K, 2) sum over pairs, i better than j, of log sigmoid(r_i - r_j).
    A completion is in K - 1 pairs but goes through the model once. With ties there are fewer than
    C(K, 2) pairs.
    """
    better, worse = ranked_pairs(ranks, prompt_of)
    return prompt_mean(-F.logsigmoid(scores[better] - scores[worse]), prompt_of[better])


def center_loss(scores, ranks, prompt_of):
    """(r_c + r_r)^2, mean as in `ranking_loss`.

    A constant added to all rewards changes no other loss; this one pulls it to 0.
    """
    better, worse = ranked_pairs(ranks, prompt_of)
    return prompt_mean((scores[better] + scores[worse]) ** 2, prompt_of[better])


# --- Evaluation -----------------------------------------------------------------------------------


def pair_accuracy(better, worse):
    """Share of pairs in which the better one has the higher score, ties count half: (N,), (N,)."""
    return ((better > worse).float() + (better == worse).float() / 2).mean()


def pair_metrics(scores, lengths, ranks, prompt_of):
    """Scores, lengths in tokens, ranks, prompt_of (R,) -> held-out metrics of all ranked pairs.

    Accuracy where the better completion is the longer one, and where it is the shorter one: if they
    are far apart, the model likes length.
    """
    better, worse = ranked_pairs(ranks, prompt_of)
    r_better = scores[better]
    r_worse = scores[worse]
    longer = lengths[better] - lengths[worse]
    spread = torch.stack([scores[prompt_of == p].std() for p in prompt_of.unique()])
    return {
        "eval_loss": ranking_loss(scores, ranks, prompt_of),
        "eval_accuracy": pair_accuracy(r_better, r_worse),
        "eval_margin": (r_better - r_worse).mean(),
        "eval_accuracy_better_longer": pair_accuracy(r_better[longer > 0], r_worse[longer > 0]),
        "eval_accuracy_better_shorter": pair_accuracy(r_better[longer < 0], r_worse[longer < 0]),
        "eval_reward": scores.mean(),
        "eval_reward_std": scores.std(),
        "eval_reward_std_prompt": spread.mean(),
    }


# --- The task: change this for your own -----------------------------------------------------------


def to_comparison(row):
    """A row -> texts of K completions, their ranks (0 the best), and the margin of a pair."""
    if "completions" in row:
        texts = [answer_text(answer, row["prompt"]) for answer in row["completions"]]
        return texts, row["ranks"], 0.0
    chosen = answer_text(row["chosen"], row["prompt"])
    rejected = answer_text(row["rejected"], row["prompt"])
    return [chosen, rejected], [0, 1], float(row.get("margin") or 0.0)


# --- Rows -----------------------------------------------------------------------------------------


def read_examples(path):
    """File -> list of {prompt, completions, ranks, margin, probability}.

    Bad rows are named and stop the run.
    """
    examples = []
    columns = ("chosen", "completions"), ("rejected", "ranks")
    for number, row in enumerate(load_rows(path, "prompt", *columns), 1):
        with stop_on_error(f"{path}, row {number}: cannot be read"):
            texts, ranks, margin = to_comparison(row)
            if len(texts) < 2 or len(ranks) != len(texts):
                raise ValueError(f"{len(texts)} completions and {len(ranks)} ranks")
            for value in (*ranks, margin):
                if not isinstance(value, int | float) or not math.isfinite(value):
                    raise ValueError(f"ranks {ranks}, margin {margin}: no numbers")
            if not all(text.strip() for text in texts):
                raise ValueError("an empty completion")
        example = {"prompt": row["prompt"], "completions": texts, "ranks": ranks, "margin": margin}
        examples.append(example | {"probability": soft_label(row)})
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
    """-> Batch of all their completions, ranks (R,), margins and probabilities (P,)."""
    prompts = [example["prompt"] for example in examples]
    completions = [example["completions"] for example in examples]
    ranks = []
    for example in examples:
        ranks += example["ranks"]
    margins = torch.tensor([example["margin"] for example in examples])
    probabilities = torch.tensor([example["probability"] for example in examples])
    batch = encode(tokenizer, prompts, completions, max_length)
    return batch, torch.tensor(ranks), margins, probabilities


def score_all(model, tokenizer, examples, max_length, args):
    """-> scores, lengths in tokens, ranks, prompt_of of all completions, each (R,) on the CPU."""
    scores, lengths, ranks, prompt_of = [], [], [], []
    for start in range(0, len(examples), args.batch_size):
        part = examples[start : start + args.batch_size]
        batch, part_ranks = collate(part, tokenizer, max_length)[:2]
        how = (args.micro_batch_size, args.share_prompts)
        scores.append(fixed_scores(model, batch.to(model.device), *how).cpu())
        lengths.append(batch.completion_mask.sum(1))
        ranks.append(part_ranks)
        prompt_of.append(batch.prompt_of + start)
    return torch.cat(scores), torch.cat(lengths), torch.cat(ranks), torch.cat(prompt_of)


# --- Training -------------------------------------------------------------------------------------


def add_language_model(model, args, device):
    """A causal model on the backbone of the reward model, for --nll-coef."""
    options = (args.dtype, args.shard, args.gradient_checkpointing, args.lora_rank)
    lm = load_model(AutoModelForCausalLM, args.model, device, *options)
    setattr(lm, lm.base_model_prefix, model.base_model)
    lm.tie_weights()
    return lm


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
    trained = torch.nn.ModuleList([model])
    if args.nll_coef:
        lm = add_language_model(model, args, device)
        trained.append(lm)
    max_length = min(args.max_length, model.context)
    check_texts(tokenizer, model, examples + eval_examples)
    examples = keep_comparable(examples, tokenizer, max_length, args.dataset)
    eval_name = args.eval_dataset or "held out"
    eval_examples = keep_comparable(eval_examples, tokenizer, max_length, eval_name)
    if args.show_rows:
        batch = collate(examples[: args.show_rows], tokenizer, max_length)[0]
        show_batch(tokenizer, batch, last_tokens(batch.completion_mask))
    is_ranked = any(len(example["ranks"]) > 2 for example in examples)
    if is_ranked and args.margin_scale and any(example["margin"] for example in examples):
        stop(
            f"{args.dataset}: margins go with pairs (eq. 5), but some rows rank more than two: "
            "train on these apart, or with --margin-scale 0"
        )
    if is_ranked and any(example["probability"] != 1 for example in examples):
        stop(f"{args.dataset}: probabilities go with pairs, but some rows rank more than two")

    order = []
    for epoch in range(args.num_epochs):  # each epoch in an order of its own
        shuffle = random.Random(f"{args.seed} {epoch}")
        order += shuffle.sample(range(len(examples)), len(examples))
    num_steps = count_steps(len(order), args)
    lr = args.learning_rate
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    warmup = round(args.warmup_ratio * num_steps)
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    run.begin({"model": trained, "optimizer": optimizer, "scheduler": scheduler}, num_steps)
    run.describe(model, len(examples), len(eval_examples), f"{args.batch_size} prompts")

    def report():
        if not eval_examples:
            return
        scored = score_all(model, tokenizer, eval_examples, max_length, args)
        run.log(pair_metrics(*scored), "eval_loss", "eval_accuracy")
        scores, _, ranks, _ = scored
        run.histogram({"best": scores[ranks == 0], "others": scores[ranks > 0]})

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Draw the comparisons of this step
        index = order[(step - 1) * args.batch_size : step * args.batch_size]
        drawn = [examples[i] for i in index]
        batch, ranks, margins, probabilities = collate(drawn, tokenizer, max_length)
        batch, ranks = batch.to(device), ranks.to(device)
        margins, probabilities = margins.to(device), probabilities.to(device)

        # 2. Rewards and loss; each micro-batch weighs as much as its share of the step's prompts
        loss = torch.zeros((), device=device)
        rewards = torch.zeros_like(ranks, dtype=torch.float32)
        for mb in deal_out(batch.split(args.micro_batch_size, whole_prompts=True), args.shard):
            part = batch.rows(mb)
            prompts = batch.prompt_of[mb].unique()
            scores = last_scores(model, part, args.share_prompts)
            if is_ranked:
                mb_loss = ranking_loss(scores, ranks[mb], part.prompt_of)
            else:
                better, worse = ranked_pairs(ranks[mb], part.prompt_of)
                pair_scores = (scores[better], scores[worse])  # one pair per prompt, in their order
                margin = args.margin_scale * margins[prompts]
                mb_loss = bradley_terry_loss(*pair_scores, margin, probabilities[prompts])
            if args.center_coef:
                centering = center_loss(scores, ranks[mb], part.prompt_of)
                mb_loss = mb_loss + args.center_coef * centering
            if args.nll_coef:
                best = part.rows((ranks[mb] == 0).nonzero()[:, 0])
                logps = completion_logps(lm, best, share_prompts=args.share_prompts)
                nll = -masked_mean(logps, best.completion_mask, 1)  # (R,) nats per token
                mb_loss = mb_loss + args.nll_coef * prompt_mean(nll, best.prompt_of)
            mb_loss = mb_loss * len(prompts) / len(drawn)
            mb_loss.backward()
            loss += mb_loss.detach()
            rewards[mb] = scores.detach()
        loss = add_up(loss).item()
        add_up(rewards)
        add_up_gradients(trained)

        # 3. Gradient step
        lr = scheduler.get_last_lr()[0]
        grad_norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), args.max_grad_norm)
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

    # With a constant added to all rewards the losses (but center_loss) stay the same. Choose the
    # constant that makes the mean reward of the training completions 0, as InstructGPT does for its
    # demonstrations. Heads have no bias in transformers, so it goes into config.json.
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
