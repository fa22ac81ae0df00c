"""Outcome and process reward models: is the solution right, and is each of its steps?

Read beside the RLHF Book (draft of January 2025; "Reward Modeling" in later editions):
    orm_loss            7.5, outcome: binary cross-entropy at every completion token
    CobbeHead           7.5, the head of Cobbe et al. 2021, arXiv:2110.14168 (and --lm-coef)
    step_labels         7.6, process: where the label of a step stands; all else is -100
    prm_loss            7.6, cross-entropy over -1, 0, +1 (Lightman et al. 2023, arXiv:2305.20050)
    solution_score      7.6, one number for a solution (common.py)

The draft prints no formula for either. Choices it leaves open:
    1. A step's label stands at its last token, that of the separator, which closes the last step
       too. Steps are tokenised apart: no tokenizer can merge a separator into the next step.
    2. Three classes where a label 0 (neutral) occurs, else two. Neutral counts as positive, as in
       Lightman's product: the probability of a step is 1 - P(-1), in all four solution scores.

    python prm.py                                                      # the toy, by steps
    python prm.py --supervision outcome --dataset toy/orm_train.jsonl \\
        --eval-dataset toy/orm_test.jsonl --output-dir runs/orm        # by outcomes
    python prm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset steps.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py.
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

from common import (Batch, Run, completion_logps, completion_scores, encode_steps, load_model,
                    load_rows, load_splits, load_tokenizer, masked_mean, pad, parse_args,
                    pick_device, positive_probs, solution_score, stop, stop_on_error, update)

@dataclass
class Args:
    model: str  # causal model to start from: a folder or a name on the hub
    dataset: str
    """JSON Lines or owner/name:split of the hub: `prompt`, `steps`, `labels` (-1, 0, 1, True, False
    or null); with outcome: `prompt`, `completion`, `label`"""
    eval_dataset: str = ""  # held-out rows of the same form; else --eval-size prompts of --dataset
    output_dir: str = "runs/prm"  # folder of the run: metrics, curves, checkpoint, final model
    resume: bool = False  # go on from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed of the data's order and of the new head
    device: str = "auto"  # torch device; auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward pass (autocast; the weights are float32); auto: bfloat16 where cuda has it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time (no shared prompts)"""
    share_prompts: bool = True  # a prompt is computed once for all its completions: same result
    supervision: Literal["process", "outcome"] = "process"
    """process: a label for each step (PRM); outcome: one for the completion (ORM)"""
    step_separator: str = "\n"
    """what ends a step, and stands nowhere else, in training and where generated text is scored;
    saved with the model; \\n is a new line"""
    solution_score: Literal["auto", "product", "minimum", "last", "mean"] = "auto"
    """of the probabilities of a solution's steps (with outcome: of its tokens); saved with the
    model. auto: the product (Lightman); with outcome the last (Cobbe)"""
    head: Literal["linear", "cobbe"] = "linear"
    """cobbe, with outcome: a gain and a bias on one logit, that of the vocabulary's last token"""
    lm_coef: float = 0.0
    """with outcome: weight of the language-model loss on right completions (twice the time)"""
    num_epochs: int = 1  # passes over the data
    batch_size: int = 32  # completions a step; those of one prompt follow each other
    micro_batch_size: int = 8  # completions a forward pass; changes the memory, not the gradient
    max_length: int = 1024
    """tokens of prompt and completion; unlabelled steps beyond are cut, other rows are dropped"""
    learning_rate: float = 1e-5  # peak of AdamW's
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up
    warmup_ratio: float = 0.03  # share of the steps in which the learning rate rises from 0
    max_grad_norm: float = 1.0  # largest norm of the gradient; longer ones are scaled down to it
    eval_size: int = 64  # prompts held out where there is no --eval-dataset; 0: none
    eval_every: int = 100  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 100  # steps between checkpoints

TOY = dict(model="toy/model", dataset="toy/prm_train.jsonl", eval_dataset="toy/prm_test.jsonl",
           num_epochs=3, learning_rate=1e-3, lr_schedule="cosine", warmup_ratio=0.05,
           micro_batch_size=32)

# --- The algorithm --------------------------------------------------------------------------------

def step_labels(labels, ends, num_tokens, num_classes):
    """Labels of steps (R, S), -1, 0, 1 or -100, and the tokens at which the steps end (R, S), -1
    for no step -> classes (R, T): wrong 0, right 1; of three wrong 0, neutral 1, right 2; or -100.
    """
    classes = torch.full((len(ends), num_tokens), -100, device=ends.device)
    row, step = ((ends >= 0) & (labels != -100)).nonzero(as_tuple=True)
    classes[row, ends[row, step]] = (labels[row, step] + 1) // (4 - num_classes)  # 3 or 2 classes
    return classes

def prm_loss(logits, labels):
    """Cross-entropy at step ends: logits (R, T, classes), labels (R, T) -> mean where not -100."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return losses / (labels != -100).sum().clamp(min=1)

def orm_loss(logits, mask, outcomes):
    """logits, mask (R, T), outcomes (R,) 1 or 0 -> scalar. Every token predicts the outcome:

    1/R sum_i 1/|y_i| sum_t -[o_i log p_it + (1 - o_i) log(1 - p_it)], p = sigmoid(logit)"""
    targets = outcomes[:, None].expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return masked_mean(losses, mask, 1).mean()

class CobbeHead(torch.nn.Module):
    """gain * logit + bias, the logit of the vocabulary's last token: (..., hidden) -> (..., 1)."""

    def __init__(self, embeddings):
        super().__init__()
        self.weight = embeddings.weight  # (V, hidden), the language model's own
        self.gain, self.bias = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden):
        return self.gain * F.linear(hidden, self.weight[-1:]) + self.bias

    def linear(self):  # the same function, for saving
        layer = torch.nn.Linear(self.weight.shape[1], 1, device=self.weight.device)
        layer.load_state_dict({"weight": self.gain * self.weight[-1:], "bias": self.bias})
        return layer

# --- Evaluation -----------------------------------------------------------------------------------

def balanced_accuracy(predicted, labels):
    """Classes, and labels with -100 -> mean, over the classes, of the share of each recognised."""
    shares = [(predicted[labels == c] == c).float().mean() for c in labels.unique() if c >= 0]
    return torch.stack(shares).mean()

def processbench_f1(predicted, labels):
    """First errors (N,), (N,), -1 for none -> harmonic mean of the accuracy on solutions with an
    error, whose place must be found, and on those without (Zheng et al. 2024, arXiv:2412.06559)."""
    hit = (predicted == labels).float()
    wrong, right = hit[labels >= 0].mean(), hit[labels < 0].mean()
    return 2 * wrong * right / (wrong + right).clamp(min=1e-9)

def auc(scores, outcomes):
    """Chance that a right solution scores above a wrong one, ties half: (N,), (N,) -> number."""
    right, wrong = scores[outcomes == 1], scores[outcomes == 0].sort().values
    below, not_above = (torch.searchsorted(wrong, right, right=r) for r in (False, True))
    return (below + not_above).float().mean() / 2 / len(wrong)

def best_of_n(scores, outcomes, prompts):
    """(N,), (N,) or nan, list -> accuracy of each prompt's best-scored completion (of ties their
    mean) and of a random one, where several outcomes are known; nan without such."""
    groups, values = {}, [(math.nan, math.nan)]
    for i in (~outcomes.isnan()).nonzero()[:, 0].tolist():
        groups.setdefault(prompts[i], []).append(i)
    for index in groups.values():
        group, right = scores[index], outcomes[index]
        values += [(right[group == group.max()].mean(), right.mean())] * (len(index) > 1)
    return torch.tensor(values[1:] or values).mean(0)

# --- The task: change this for your own -----------------------------------------------------------

def to_steps(row):
    """A row -> texts of its steps; labels of the first ones: 1, -1 wrong, 0 neutral, None."""
    labels = [2 * x - 1 if isinstance(x, bool) else x for x in row["labels"]]
    return [*row["steps"], *(row.get("remaining_steps") or [])], labels

# --- Training -------------------------------------------------------------------------------------

def read_examples(path, separator):
    """File -> list of {prompt, texts of steps or of one completion, labels}, prompt by prompt.
    Without a separator: completions."""
    examples, columns = [], ("steps", "labels") if separator else ("completion", "label")
    known = (-1, 0, 1, None) if separator else (0, 1)
    for n, row in enumerate(load_rows(path, "prompt", *columns), 1):
        with stop_on_error(f"{path}, row {n}: cannot be read"):
            texts, labels = to_steps(row) if separator else ([row["completion"]], [row["label"]])
            texts = [text.removesuffix(separator) for text in texts]
            if separator and any(separator in text for text in texts):
                raise ValueError(f"--step-separator {separator!r} stands within a step, which in "
                                 "generated text would be several: choose another one")
            if not all(text.strip() for text in texts):
                raise ValueError("an empty step or completion")
            if len(labels) > len(texts) or not all(x in known for x in labels):
                raise ValueError(f"labels {labels} of {len(texts)} steps; known are {known}")
        examples.append({"prompt": row["prompt"], "texts": texts, "labels": labels})
    return sorted(examples, key=lambda e: str(e["prompt"]))

def encode_examples(examples, tokenizer, max_length, separator, name):
    """Add token ids, and the tokens at which steps end. Unlabelled steps beyond max_length are cut;
    rows whose labels do not all fit, or that have none, are dropped, and counted."""
    kept = []
    for e in examples:
        prompt_ids, ids, ends = encode_steps(tokenizer, e["prompt"], e["texts"], separator)
        labels = [-100 if x is None else int(x) for x in e["labels"]]
        labels += [-100] * (len(e["texts"]) - len(labels))
        outcome = 0.0 if -1 in labels else math.nan if -100 in labels else 1.0  # nan: not known
        if not separator:
            labels, outcome = labels * len(ids), float(labels[0])
        room = max_length - len(prompt_ids)
        if max((t for t, x in zip(ends, labels, strict=True) if x != -100), default=room) < room:
            ends = [end for end in ends if end < room]
            kept.append({"prompt": e["prompt"], "prompt_ids": prompt_ids, "ids": ids[:room],
                         "ends": ends, "labels": labels[:len(ends)], "outcome": outcome})
    if len(kept) < len(examples):
        print(f"{name}: of {len(examples)} rows, dropped {len(examples) - len(kept)}: no label, or "
              f"one beyond --max-length {max_length}")
    return kept or (examples and stop(f"{name}: no row fits in --max-length {max_length}"))

def collate(examples):
    """-> Batch, ends and labels of steps (R, S), -1 and -100 for none, outcomes (R,)."""
    prompts = list(dict.fromkeys(tuple(e["prompt_ids"]) for e in examples))  # each of them once
    prompt_of = torch.tensor([prompts.index(tuple(e["prompt_ids"])) for e in examples])
    batch = Batch(*pad(prompts, "left"), *pad([e["ids"] for e in examples], "right"), prompt_of)
    ends, is_step = pad([e["ends"] for e in examples], "right")
    labels, _ = pad([e["labels"] for e in examples], "right")
    outcomes = torch.tensor([e["outcome"] for e in examples])
    return batch, ends.masked_fill(~is_step, -1), labels.masked_fill(~is_step, -100), outcomes

@torch.no_grad()
def evaluate(model, examples, how, args):
    """-> held-out metrics, scores and outcomes of the examples (N,), these nan where not known."""
    rows = []
    for i in range(0, len(examples), args.micro_batch_size):
        part = examples[i:i + args.micro_batch_size]
        logits = completion_scores(model, collate(part)[0].to(model.device), args.share_prompts)
        rows += [x[e["ends"]] for x, e in zip(logits.cpu(), part, strict=True)]
    logits = pad_sequence(rows, batch_first=True)  # (N, S, classes)
    _, ends, labels, outcomes = collate(examples)
    is_step, probs, known = ends >= 0, positive_probs(logits), ~outcomes.isnan()
    scores = solution_score(probs, is_step, how)
    best, chance = best_of_n(scores, outcomes, [str(e["prompt"]) for e in examples])
    metrics = {"eval_auc": auc(scores[known], outcomes[known]),
               "eval_best_of_n": best, "eval_random_of_n": chance}
    if args.supervision == "outcome":
        return metrics | {"eval_loss": orm_loss(logits[..., 0], is_step, outcomes), "eval_accuracy":
                          ((scores > 0.5) == outcomes).float().mean()}, scores, outcomes
    places = torch.arange(ends.shape[1]).masked_fill(~is_step, -1)
    targets, predicted = step_labels(labels, places, *logits.shape[1:]), logits.argmax(-1)
    first = [torch.where(x.any(1), x.int().argmax(1), -1)[known]
             for x in (is_step & (probs < 0.5), labels == -1)]
    right = (predicted == targets)[targets != -100]
    return metrics | {"eval_loss": prm_loss(logits, targets), "eval_f1": processbench_f1(*first),
                      "eval_accuracy": right.float().mean(), "eval_balanced_accuracy":
                      balanced_accuracy(predicted, targets)}, scores, outcomes

def main(args: Args):
    args.step_separator = args.step_separator.replace("\\n", "\n")  # as a shell hands it on
    run = Run(args)
    torch.manual_seed(args.seed)
    process, how = args.supervision == "process", args.solution_score
    how = {"auto": "product" if process else "last"}.get(how, how)
    if process and (args.head == "cobbe" or args.lm_coef or not args.step_separator):
        stop("--supervision process needs a --step-separator, and no --head cobbe or --lm-coef")
    device, tokenizer = pick_device(args.device), load_tokenizer(args.model)
    separator = args.step_separator * process
    examples, eval_examples = load_splits(args, lambda path: read_examples(path, separator))
    labels = {label for e in examples + eval_examples for label in e["labels"]}
    if process and 0 in labels and -1 not in labels:
        stop(f"{args.dataset}: a label 0 is neutral, and none is -1 or false, for a wrong step")
    neutral = ["neutral"] * (0 in labels)
    names = ["wrong", *neutral, "right"] if process else ["right"]
    load, num_classes = (args.model, device, args.dtype, args.gradient_checkpointing), len(names)
    model = load_model(AutoModelForTokenClassification, *load, new_head=num_classes)
    model.config.update({
        "id2label": dict(enumerate(names)), "label2id": {c: i for i, c in enumerate(names)},
        "reward_bias": 0.0, "step_separator": separator, "solution_score": how,
        "classifier_dropout": 0.0})  # where nothing is said, transformers has 0.1
    if args.lm_coef or args.head == "cobbe":  # a language model on the same backbone
        lm = load_model(AutoModelForCausalLM, *load)
        setattr(lm, lm.base_model_prefix, model.base_model)
        lm.tie_weights()
    name = "score" if hasattr(model, "score") else "classifier"
    if args.head == "cobbe":
        setattr(model, name, CobbeHead(lm.get_output_embeddings()).to(device))
    parts = torch.nn.ModuleList([model, lm] if args.lm_coef else [model])
    encoding = tokenizer, min(args.max_length, model.context), separator
    examples = encode_examples(examples, *encoding, args.dataset)
    eval_examples = encode_examples(eval_examples, *encoding, args.eval_dataset or "held out")

    groups = [[*group] for _, group in itertools.groupby(examples, lambda e: e["prompt"])]
    order = [example for epoch in range(args.num_epochs)  # each epoch in an order of its own
             for group in random.Random(f"{args.seed} {epoch}").sample(groups, len(groups))
             for example in group]
    num_steps = math.ceil(len(order) / args.batch_size)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=args.learning_rate, weight_decay=0.0,
                                  fused=True)
    warmup = round(args.warmup_ratio * num_steps)
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    run.begin({"model": parts, "optimizer": optimizer, "scheduler": scheduler}, num_steps)

    def report():
        if eval_examples:
            metrics, scores, outcomes = evaluate(model, eval_examples, how, args)
            run.log(metrics, "eval_loss", "eval_balanced_accuracy", "eval_f1", "eval_auc")
            run.histogram({"wrong": scores[outcomes == 0], "right": scores[outcomes == 1]})

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Draw the completions of this step, and their labels
        drawn = order[(step - 1) * args.batch_size:step * args.batch_size]
        batch, ends, labels, outcomes = (x.to(device) for x in collate(drawn))
        mask = batch.completion_mask
        classes = step_labels(labels, ends, mask.shape[1], num_classes) if process else None
        right = mask & (outcomes == 1)[:, None]  # what the language model should write

        # 2. Loss; each micro-batch weighs as much as its share of the step's labels
        loss = lm_total = 0.0
        for mb in batch.split(args.micro_batch_size):
            part = batch.rows(mb)
            logits = completion_scores(model, part, args.share_prompts)  # (R, T, classes)
            if process:
                share = (classes[mb] != -100).sum() / (classes != -100).sum()
                mb_loss = prm_loss(logits, classes[mb, :logits.shape[1]]) * share
            else:
                share = len(mb) / len(drawn)
                mb_loss = orm_loss(logits[..., 0], part.completion_mask, outcomes[mb]) * share
            if args.lm_coef:
                logps = completion_logps(lm, part, share_prompts=args.share_prompts)
                share = right[mb].sum() / right.sum().clamp(min=1)
                lm_loss = -masked_mean(logps, right[mb, :logps.shape[1]]) * share
                lm_total += lm_loss.item()
                mb_loss = mb_loss + args.lm_coef * lm_loss
            mb_loss.backward()
            loss += mb_loss.item()

        # 3. Gradient step
        lr = scheduler.get_last_lr()[0]
        grad_norm = update(optimizer, scheduler, loss, args.max_grad_norm)

        # 4. Log
        num_tokens = mask.sum().item()
        run.log({"loss": loss, "lm_loss": lm_total if args.lm_coef else math.nan,
                 "grad_norm": grad_norm, "lr": lr, "completion_length": num_tokens / len(drawn),
                 "tokens_per_second": num_tokens / (time.time() - start)}, "loss", "lr")
        if step % args.eval_every == 0 or step == num_steps:
            report()
    final = copy.copy(model)
    if args.head == "cobbe":  # saved as the linear head that it equals
        final._modules = model._modules | {name: getattr(model, name).linear()}
    run.finish(tokenizer, {"final": final})
if __name__ == "__main__":
    main(parse_args(Args, TOY))
