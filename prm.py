"""Outcome and process reward models: is the solution right, and is each of its steps?

Read beside the RLHF Book, draft of January 2025 (the printed edition has chapter 7 as chapter 5):
    orm_loss            7.5, outcome: binary cross-entropy at every completion token
    CobbeHead           7.5, the head of Cobbe et al. 2021, arXiv:2110.14168 (and --lm-coef)
    step_labels         7.6, process: where the label of a step stands; all else is -100
    prm_loss            7.6, cross-entropy over -1, 0, +1 (Lightman et al. 2023, arXiv:2305.20050)
    solution_score      7.6, one number for a solution, in plumbing.py with positive_probs

How the code departs from the print:
    1. 7.5 speaks of a head that predicts two classes per token. Here it is one logit and a sigmoid,
       which is the same model with half the parameters.

The draft prints no formula for either. Choices it leaves open:
    2. A step's label stands at its last token, that of the separator, which closes the last step
       too. Steps are tokenised apart: no tokenizer can merge a separator into the next step.
    3. There are three classes where a label 0 (neutral) occurs, else two. Neutral counts as
       positive, as in Lightman's product: the probability of a step is 1 - P(-1), in all four
       solution scores.

    python prm.py                                                      # the toy, by steps
    python prm.py --supervision outcome --dataset toy/orm_train.jsonl \\
        --eval-dataset toy/orm_test.jsonl --output-dir runs/orm        # by outcomes
    python prm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset steps.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import copy
import itertools
import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, get_scheduler

from common import (
    Batch,
    add_up,
    add_up_gradients,
    completion_logps,
    completion_scores,
    deal_out,
    encode_steps,
    gather,
    masked_mean,
    pad,
    whole,
)
from plumbing import (
    Run,
    answer_text,
    check_finite,
    check_texts,
    count_steps,
    load_model,
    load_rows,
    load_splits,
    load_tokenizer,
    pick_device,
    positive_probs,
    run_script,
    show_rows,
    solution_score,
    stop,
    stop_on_error,
)


@dataclass
class Args:
    model: str  # causal model to start from: a folder, or a name on the hub
    dataset: str
    """training rows, JSON Lines or owner/name:split on the hub: `prompt`, `steps`, `labels` (-1, 0,
    1, true, false or null); with outcome supervision: `prompt`, `completion`, `label`"""
    eval_dataset: str = ""
    """held-out rows of the same form; if empty, --eval-size prompts are taken from --dataset"""
    show_rows: int = 0
    """number of rows to print as the model gets them, with the places where the loss counts; then
    the program ends; 0: train"""

    output_dir: str = "runs/prm"  # folder for metrics, curves, checkpoint and final model
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

    supervision: Literal["process", "outcome"] = "process"
    """process: a label for each step (PRM); outcome: one for the whole completion (ORM)"""
    step_separator: str = r"\n"
    """text that ends a step and occurs nowhere else, in training and where generated text is
    scored; saved with the model; \\n is a new line"""
    solution_score: Literal["auto", "product", "minimum", "last", "mean"] = "auto"
    """score of a solution from the probabilities of its steps (with outcome: of its tokens), saved
    with the model; auto: the product (Lightman et al.), with outcome the last (Cobbe et al.)"""
    head: Literal["linear", "cobbe"] = "linear"
    """cobbe, with outcome: a gain and a bias on one logit, that of the vocabulary's last token"""
    lm_coef: float = 0.0
    """with outcome: weight of the language-model loss on right completions; takes twice the time"""

    num_epochs: int = 1  # passes over the data
    batch_size: int = 32  # completions per step; those of one prompt follow each other
    micro_batch_size: int = 8  # completions per forward pass; changes memory, not the gradient
    max_length: int = 1024
    """most tokens of a prompt and its completion together; unlabelled steps beyond are cut, other
    rows are dropped"""
    learning_rate: float = 1e-5  # peak learning rate of AdamW
    lora_rank: int = 0
    """rank of the adapters that are trained in place of the weights (LoRA), with about ten times
    the learning rate; 0: all weights are trained; see docs/models.md"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """learning-rate schedule after the warm-up; linear and cosine fall to 0"""
    warmup_ratio: float = 0.03  # fraction of the steps used for linear warm-up
    max_grad_norm: float = 1.0  # maximum norm of the gradient; a larger one is scaled down to it

    eval_size: int = 64
    """number of prompts held out of --dataset, at most a tenth, without --eval-dataset; 0: none"""
    eval_every: int = 100  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 100  # steps between checkpoints


TOY = dict(
    model="toy/model",
    dataset="toy/prm_train.jsonl",
    eval_dataset="toy/prm_test.jsonl",
    num_epochs=3,
    learning_rate=1e-3,
    lr_schedule="cosine",
    warmup_ratio=0.05,
    micro_batch_size=32,
)

# --- The algorithm --------------------------------------------------------------------------------


def step_labels(labels, ends, num_tokens, num_classes):
    """Where the label of a step stands: at its last token. Book 7.6, [-100] * (n - 1) + [label].

    labels (R, S): -1, 0, 1, or -100 for none. ends (R, S): the tokens at which the steps end, -1
    for no step -> classes (R, T): of three, wrong is 0, neutral 1 and right 2; of two, wrong is 0
    and right 1; -100 at all other tokens.
    """
    classes = torch.full((len(ends), num_tokens), -100, device=ends.device)
    if num_classes == 3:
        step_classes = labels + 1
    else:
        step_classes = (labels == 1).long()
    is_labelled = (ends >= 0) & (labels != -100)
    rows = is_labelled.nonzero()[:, 0]  # of each labelled step
    classes[rows, ends[is_labelled]] = step_classes[is_labelled]
    return classes


def prm_loss(logits, labels):
    """Cross-entropy at the ends of steps, mean where the label is not -100. Book 7.6.

    logits (R, T, classes), labels (R, T) -> scalar; 0 where there is no label.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return losses / (labels != -100).sum().clamp(min=1)


def orm_loss(logits, mask, outcomes):
    """logits, mask (R, T), outcomes (R,) 1 or 0 -> scalar. Every token predicts the outcome.

    Book 7.5: 1/R sum_i 1/|y_i| sum_t -[o_i log p_it + (1 - o_i) log(1 - p_it)], p = sigmoid(logit).
    """
    targets = outcomes[:, None].expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return masked_mean(losses, mask, 1).mean()


class CobbeHead(torch.nn.Module):
    """gain * logit + bias, of the vocabulary's last token: (..., hidden) -> (..., 1). Book 7.5."""

    def __init__(self, embeddings):
        super().__init__()
        self.weight = embeddings.weight  # (V, hidden), the language model's own
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden):
        return self.gain * F.linear(hidden, self.weight[-1:].float()) + self.bias

    def linear(self):
        """The linear layer that is the same function, for saving."""
        layer = torch.nn.Linear(self.weight.shape[1], 1, device=self.weight.device)
        layer.load_state_dict({"weight": self.gain * self.weight[-1:], "bias": self.bias})
        return layer


# --- Evaluation -----------------------------------------------------------------------------------


def balanced_accuracy(predicted, labels):
    """Classes and labels, -100 for none -> recall of each class that occurs, mean over these."""
    shares = []
    for label in labels.unique():
        if label >= 0:
            shares.append((predicted[labels == label] == label).float().mean())
    return torch.stack(shares).mean()


def processbench_f1(predicted, labels):
    """Places of first errors (N,), (N,), -1 for none -> harmonic mean of two accuracies.

    Of solutions with an error, whose place must be found, and of those without one (Zheng et al.
    2024, ProcessBench, arXiv:2412.06559).
    """
    is_found = (predicted == labels).float()
    with_error = is_found[labels >= 0].mean()
    without = is_found[labels < 0].mean()
    return 2 * with_error * without / (with_error + without).clamp(min=1e-9)


def auc(scores, outcomes):
    """Chance that a right solution scores above a wrong one, ties count half: (N,), (N,)."""
    right = scores[outcomes == 1]
    wrong = scores[outcomes == 0].sort().values
    # Places in the sorted wrong scores, instead of comparing every right one with every wrong one
    num_below = torch.searchsorted(wrong, right)
    num_at_most = torch.searchsorted(wrong, right, right=True)
    return ((num_below + num_at_most) / 2 / len(wrong)).mean()


def best_of_n(scores, outcomes, prompts):
    """Accuracy of the best-scored completion of each prompt, and of a random one -> (2,).

    scores (N,), outcomes (N,) or nan where not known, prompts: list of N. If several share the
    best score, their mean counts. Prompts with fewer than two known outcomes are left out; nan
    where none is left.
    """
    groups = {}
    for i, prompt in enumerate(prompts):
        if not outcomes[i].isnan():
            groups.setdefault(prompt, []).append(i)
    best = []
    random_one = []
    for index in groups.values():
        if len(index) < 2:
            continue
        group_scores = scores[index]
        is_right = outcomes[index]
        best.append(is_right[group_scores == group_scores.max()].mean())
        random_one.append(is_right.mean())
    if not best:
        return torch.tensor([math.nan, math.nan])
    return torch.stack([torch.stack(best).mean(), torch.stack(random_one).mean()])


def first_true(mask):
    """mask (N, S) -> place of the first True of each row (N,), -1 where there is none."""
    return torch.where(mask.any(1), mask.int().argmax(1), -1)


# --- The task: change this for your own -----------------------------------------------------------


def to_steps(row):
    """A row -> texts of its steps, and the labels of the first ones: 1, -1 wrong, 0 neutral, None.

    True and False are read as 1 and -1. `remaining_steps` have no label.
    """
    labels = []
    for label in row["labels"]:
        if label is True:
            labels.append(1)
        elif label is False:
            labels.append(-1)
        else:
            labels.append(label)
    remaining = row.get("remaining_steps") or []
    return [*row["steps"], *remaining], labels


# --- Rows -----------------------------------------------------------------------------------------


def read_examples(path, separator):
    """File -> list of {prompt, texts of steps or of one completion, labels}, prompt by prompt.

    Without a separator the rows are completions. Bad rows are named and stop the run.
    """
    examples = []
    columns = ("steps", "labels") if separator else ("completion", "label")
    known = (-1, 0, 1, None) if separator else (0, 1)
    for number, row in enumerate(load_rows(path, "prompt", *columns), 1):
        with stop_on_error(f"{path}, row {number}: cannot be read"):
            if separator:
                texts, labels = to_steps(row)
                texts = [text.removesuffix(separator) for text in texts]
            else:
                texts = [answer_text(row["completion"], row["prompt"])]
                labels = [row["label"]]
            if separator and any(separator in text for text in texts):
                raise ValueError(
                    f"--step-separator {separator!r} stands within a step, which in generated text "
                    "would be several: choose another one"
                )
            if not all(text.strip() for text in texts):
                raise ValueError("an empty step or completion")
            if len(labels) > len(texts) or not all(label in known for label in labels):
                raise ValueError(f"labels {labels} of {len(texts)} steps; known are {known}")
        examples.append({"prompt": row["prompt"], "texts": texts, "labels": labels})
    return sorted(examples, key=lambda example: str(example["prompt"]))


def outcome_of(labels):
    """Labels of all steps, -100 for none -> is the solution right? 1.0, 0.0, or nan: not known."""
    if -1 in labels:
        return 0.0
    if -100 in labels:
        return math.nan
    return 1.0


def encode_examples(examples, tokenizer, max_length, separator, name):
    """Add token ids, and the tokens at which steps end.

    Unlabelled steps beyond max_length are cut. Rows whose labels do not all fit, or that have none,
    are dropped, and their number is printed.
    """
    kept = []
    for example in examples:
        prompt = example["prompt"]
        prompt_ids, ids, ends = encode_steps(tokenizer, prompt, example["texts"], separator)
        labels = [-100] * len(example["texts"])
        for i, label in enumerate(example["labels"]):
            if label is not None:
                labels[i] = int(label)
        if separator:
            outcome = outcome_of(labels)
        else:
            outcome = float(labels[0])
            labels = labels * len(ids)  # every token predicts the outcome
        room = max_length - len(prompt_ids)
        labelled = [end for end, label in zip(ends, labels, strict=True) if label != -100]
        if not labelled or max(labelled) >= room:
            continue
        ends = [end for end in ends if end < room]
        row = {"prompt": prompt, "prompt_ids": prompt_ids, "ids": ids[:room], "ends": ends}
        kept.append(row | {"labels": labels[: len(ends)], "outcome": outcome})
    if len(kept) < len(examples):
        print(
            f"{name}: of {len(examples)} rows, dropped {len(examples) - len(kept)}: no label, or "
            f"one beyond --max-length {max_length}"
        )
    if examples and not kept:
        stop(f"{name}: no row fits in --max-length {max_length}")
    return kept


def collate(examples):
    """-> Batch, ends and labels of steps (R, S), -1 and -100 for no step, outcomes (R,)."""
    prompt_rows = [tuple(example["prompt_ids"]) for example in examples]
    prompts = list(dict.fromkeys(prompt_rows))  # each of them once
    prompt_of = torch.tensor([prompts.index(row) for row in prompt_rows])
    completions = pad([example["ids"] for example in examples], "right")
    batch = Batch(*pad(prompts, "left"), *completions, prompt_of)
    ends, is_step = pad([example["ends"] for example in examples], "right")
    labels, _ = pad([example["labels"] for example in examples], "right")
    outcomes = torch.tensor([example["outcome"] for example in examples])
    return batch, ends.masked_fill(~is_step, -1), labels.masked_fill(~is_step, -100), outcomes


def show_labelled(tokenizer, examples):
    """Print examples as the model gets them, the tokens with a label marked, and stop."""
    rows = []
    for example in examples:
        counts = [False] * len(example["ids"])
        for end, label in zip(example["ends"], example["labels"], strict=True):
            counts[end] = label != -100
        rows.append((example["prompt_ids"], example["ids"], counts))
    show_rows(tokenizer, rows)


@torch.no_grad()
def step_logits(model, examples, args):
    """Outputs of the head at the ends of the examples' steps -> (N, S, classes) on the CPU."""
    found = []
    with whole(model):
        for start in deal_out(range(0, len(examples), args.micro_batch_size)):
            part = examples[start : start + args.micro_batch_size]
            batch, _, _, _ = collate(part)
            logits = completion_scores(model, batch.to(model.device), args.share_prompts).cpu()
            for i, (row, example) in enumerate(zip(logits, part, strict=True), start):
                found.append((i, row[example["ends"]]))
    rows = dict(gather(found))
    return pad_sequence([rows[i] for i in range(len(examples))], batch_first=True)


def evaluate(model, examples, how, args):
    """-> held-out metrics; scores of the examples (N,); outcomes (N,), nan where not known."""
    logits = step_logits(model, examples, args)
    _, ends, labels, outcomes = collate(examples)
    is_step = ends >= 0
    is_known = ~outcomes.isnan()
    probs = positive_probs(logits)
    scores = solution_score(probs, is_step, how)
    prompts = [str(example["prompt"]) for example in examples]
    best, random_one = best_of_n(scores, outcomes, prompts)
    metrics = {
        "eval_auc": auc(scores[is_known], outcomes[is_known]),
        "eval_best_of_n": best,
        "eval_random_of_n": random_one,
    }
    if args.supervision == "outcome":
        metrics["eval_loss"] = orm_loss(logits[..., 0], is_step, outcomes)
        metrics["eval_accuracy"] = ((scores > 0.5) == outcomes).float().mean()
        return metrics, scores, outcomes
    # `logits` are those of the steps alone: step i stands at place i, not at its token
    places = torch.arange(ends.shape[1]).masked_fill(~is_step, -1)
    targets = step_labels(labels, places, logits.shape[1], logits.shape[2])
    predicted = logits.argmax(-1)
    found = first_true(is_step & (probs < 0.5))
    errors = first_true(labels == -1)
    metrics["eval_loss"] = prm_loss(logits, targets)
    metrics["eval_f1"] = processbench_f1(found[is_known], errors[is_known])
    metrics["eval_accuracy"] = (predicted == targets)[targets != -100].float().mean()
    metrics["eval_balanced_accuracy"] = balanced_accuracy(predicted, targets)
    return metrics, scores, outcomes


# --- Training -------------------------------------------------------------------------------------


def check_args(args):
    """Stop where flags contradict each other."""
    if args.supervision == "process":
        if args.head == "cobbe" or args.lm_coef or not args.step_separator:
            stop("--supervision process needs a --step-separator, and no --head cobbe or --lm-coef")


def class_names(args, examples):
    """Names of the head's classes: with process supervision two, or three with neutral steps."""
    if args.supervision == "outcome":
        return ["right"]
    labels = set()
    for example in examples:
        labels |= set(example["labels"])
    if 0 not in labels:
        return ["wrong", "right"]
    if -1 not in labels:
        stop(f"{args.dataset}: a label 0 is neutral, and none is -1 or false, for a wrong step")
    return ["wrong", "neutral", "right"]


def main(args: Args):
    # A shell passes \n as two characters
    args.step_separator = args.step_separator.replace("\\n", "\n")
    check_args(args)
    run = Run(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.model)
    is_process = args.supervision == "process"
    separator = args.step_separator if is_process else ""
    how = args.solution_score
    if how == "auto":
        how = "product" if is_process else "last"
    examples, eval_examples = load_splits(args, lambda path: read_examples(path, separator))
    names = class_names(args, examples + eval_examples)
    load_options = (args.model, device, args.dtype, args.shard)
    load_options += (args.gradient_checkpointing, args.lora_rank)
    model = load_model(AutoModelForTokenClassification, *load_options, new_head=len(names))
    settings = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "reward_bias": 0.0,
        "step_separator": separator,
        "solution_score": how,
        "classifier_dropout": 0.0,  # transformers' default is 0.1
    }
    model.config.update(settings)
    trained = torch.nn.ModuleList([model])
    head_name = "score" if hasattr(model, "score") else "classifier"
    if args.lm_coef or args.head == "cobbe":  # a language model on the same backbone
        lm = load_model(AutoModelForCausalLM, *load_options)
        setattr(lm, lm.base_model_prefix, model.base_model)
        lm.tie_weights()
    if args.head == "cobbe":
        setattr(model, head_name, CobbeHead(lm.get_output_embeddings()).to(device))
    if args.lm_coef:
        trained.append(lm)
    check_texts(tokenizer, model, examples + eval_examples)
    encoding = (tokenizer, min(args.max_length, model.context), separator)
    examples = encode_examples(examples, *encoding, args.dataset)
    eval_examples = encode_examples(eval_examples, *encoding, args.eval_dataset or "held out")
    if args.show_rows:
        show_labelled(tokenizer, examples[: args.show_rows])

    groups = [list(group) for _, group in itertools.groupby(examples, lambda e: e["prompt"])]
    order = []
    for epoch in range(args.num_epochs):  # each epoch in an order of its own
        for group in random.Random(f"{args.seed} {epoch}").sample(groups, len(groups)):
            order += group
    num_steps = count_steps(len(order), args)
    lr = args.learning_rate
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    warmup = round(args.warmup_ratio * num_steps)
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    run.begin({"model": trained, "optimizer": optimizer, "scheduler": scheduler}, num_steps)
    run.describe(model, len(examples), len(eval_examples), f"{args.batch_size} completions")

    def report():
        if not eval_examples:
            return
        metrics, scores, outcomes = evaluate(model, eval_examples, how, args)
        run.log(metrics, "eval_loss", "eval_balanced_accuracy", "eval_f1", "eval_auc")
        run.histogram({"wrong": scores[outcomes == 0], "right": scores[outcomes == 1]})

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Draw the completions of this step, and their labels
        drawn = order[(step - 1) * args.batch_size : step * args.batch_size]
        batch, ends, labels, outcomes = collate(drawn)
        batch, ends, labels = batch.to(device), ends.to(device), labels.to(device)
        outcomes = outcomes.to(device)
        mask = batch.completion_mask
        if is_process:
            classes = step_labels(labels, ends, mask.shape[1], len(names))
        is_right = mask & (outcomes == 1)[:, None]  # what the language model should write

        # 2. Loss; each micro-batch weighs as much as its share of the step's labels
        totals = torch.zeros(2, device=device)  # loss, loss of the language model
        for mb in deal_out(batch.split(args.micro_batch_size), args.shard):
            part = batch.rows(mb)
            logits = completion_scores(model, part, args.share_prompts)  # (R, T, classes)
            t = logits.shape[1]  # the longest of these
            if is_process:
                share = (classes[mb] != -100).sum() / (classes != -100).sum()
                mb_loss = prm_loss(logits, classes[mb, :t]) * share
            else:
                share = len(mb) / len(drawn)
                mb_loss = orm_loss(logits[..., 0], part.completion_mask, outcomes[mb]) * share
            if args.lm_coef:
                logps = completion_logps(lm, part, share_prompts=args.share_prompts)
                share = is_right[mb].sum() / is_right.sum().clamp(min=1)
                lm_loss = -masked_mean(logps, is_right[mb, :t]) * share
                totals[1] += lm_loss.detach()
                mb_loss = mb_loss + args.lm_coef * lm_loss
            mb_loss.backward()
            totals[0] += mb_loss.detach()
        loss, lm_total = add_up(totals).tolist()
        add_up_gradients(trained)

        # 3. Gradient step
        lr = scheduler.get_last_lr()[0]
        grad_norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), args.max_grad_norm)
        check_finite(loss, grad_norm.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # 4. Log
        num_tokens = mask.sum().item()
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "completion_length": num_tokens / len(drawn),
            "tokens_per_second": num_tokens / (time.time() - start),
        }
        if args.lm_coef:
            metrics["lm_loss"] = lm_total
        run.log(metrics, "loss", "lr")
        if step % args.eval_every == 0 or step == num_steps:
            report()
    final = copy.copy(model)
    if args.head == "cobbe":  # saved as the linear head that is the same function
        linear = getattr(model, head_name).linear()
        final._modules = model._modules | {head_name: linear}
    run.finish(tokenizer, {"final": final})


if __name__ == "__main__":
    run_script(main, Args, TOY)
