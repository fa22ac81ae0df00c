"""SFT, supervised fine-tuning or instruction tuning: cross-entropy on the completions alone.

Read beside the RLHF Book, chapter 9, "Instruction Tuning", of the draft of January 2025 (chapter 4
of the printed edition):
    sft_loss    the loss over completion tokens; the prompt is masked, the EOS is not

The draft prints no formula here. Choices it leaves open:
    1. A step's loss is one mean over all completion tokens of its rows, whatever the micro-batches.
    2. In a conversation (`messages`) every assistant turn is a completion, and all that comes
       before it is its prompt.

    python sft.py                                    # the toy, from random weights
    python sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset instructions.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, get_scheduler

from common import (
    add_up,
    add_up_gradients,
    completion_logps,
    content_text,
    deal_out,
    encode,
    encode_answers,
    encode_prompt,
    fixed_logps,
    generate,
    masked_mean,
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
    run_script,
    show_batch,
    stop,
    stop_on_error,
)


@dataclass
class Args:
    model: str  # model to train: a folder, or a name on the hub
    dataset: str
    """training rows, JSON Lines or owner/name:split on the hub: `prompt` and `completion` (or
    `response`), or `messages`"""
    eval_dataset: str = ""
    """held-out rows of the same form; if empty, --eval-size prompts are taken from --dataset"""
    from_scratch: bool = False  # start from random weights of the model's shape
    show_rows: int = 0
    """number of rows to print as the model gets them, with the places where the loss counts; then
    the program ends; 0: train"""

    output_dir: str = "runs/sft"  # folder for metrics, samples, curves, checkpoint and final model
    resume: bool = False  # continue from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed for shuffling and sampling
    device: str = "auto"  # torch device; auto: cuda if there is one, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the forward pass, while weights are float32; auto: bfloat16 if cuda supports it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    shard: bool = False
    """divide weights, gradients and optimiser states among the processes of torchrun (FSDP)"""

    num_epochs: int = 2  # passes over the data (Tulu 3: 2)
    batch_size: int = 32  # completions per step (Tulu 3: 128)
    micro_batch_size: int = 8  # completions per forward pass; changes memory, not the gradient
    max_length: int = 1024
    """most tokens of a prompt and its completion together; longer completions are cut, and then
    have no EOS"""
    learning_rate: float = 5e-6
    """peak learning rate of AdamW (Tulu 3, 8B: 5e-6; small models take ten times that)"""
    lora_rank: int = 0
    """rank of the adapters that are trained in place of the weights (LoRA), with about ten times
    the learning rate; 0: all weights are trained; see docs/models.md"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """learning-rate schedule after the warm-up; linear and cosine fall to 0"""
    warmup_ratio: float = 0.03  # fraction of the steps used for linear warm-up (Tulu 3: 0.03)
    weight_decay: float = 0.0  # weight decay of AdamW
    max_grad_norm: float = 1.0  # maximum norm of the gradient; a larger one is scaled down to it

    eval_size: int = 64
    """number of prompts held out of --dataset, at most a tenth, without --eval-dataset; 0: none"""
    eval_every: int = 100  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 100  # steps between checkpoints
    log_samples: int = 4
    """held-out prompts answered greedily at each evaluation and written to samples.jsonl"""
    max_new_tokens: int = 128  # longest such answer, in tokens


TOY = dict(
    model="toy/model",
    dataset="toy/sft_train.jsonl",
    eval_dataset="toy/sft_test.jsonl",
    from_scratch=True,
    learning_rate=1e-3,
    lr_schedule="cosine",
    warmup_ratio=0.05,
    micro_batch_size=32,
    max_new_tokens=48,
)

# --- The algorithm --------------------------------------------------------------------------------


def sft_loss(logps, mask):
    """-mean of log pi(y_t | x, y_<t) over completion tokens: logps, mask (R, Tc) -> scalar, nats.

    Book chapter 9: logps has no prompt tokens, so they are not in the loss; the EOS is.
    """
    return -masked_mean(logps, mask)


# --- The task: change this for your own -----------------------------------------------------------


def to_pairs(row):
    """A row -> list of (prompt, completion): a text, or a message that is more than its text."""
    if not row.get("messages"):
        answer = row.get("completion") or row["response"]
        return [(row["prompt"], answer_text(answer, row["prompt"]))]
    chat = row["messages"]
    pairs = []
    for i, turn in enumerate(chat):
        if i > 0 and turn["role"] == "assistant":
            has_more = any(turn.get(key) for key in ("tool_calls", "reasoning_content"))
            answer = turn if has_more else content_text(turn.get("content"))
            pairs.append((chat[:i], answer))
    return pairs


# --- Rows -----------------------------------------------------------------------------------------


def load_pairs(rows, tokenizer, max_length, name):
    """Rows -> (prompt, completion) pairs, less those whose prompt leaves no room for a completion.

    Prints how many were dropped, and how many completions are cut.
    """
    pairs = []
    num_pairs, num_cut, num_empty, num_silent = 0, 0, 0, 0
    for row in rows:
        with stop_on_error(f"{name}: neither a prompt with a completion nor messages: {row}"):
            of_row = to_pairs(row)
            num_silent += not of_row
            for prompt, answer in of_row:
                num_pairs += 1
                if isinstance(answer, str) and not answer.strip():
                    num_empty += 1
                    continue
                prompt_ids, [ids] = encode_answers(tokenizer, prompt, [answer])
                room = max_length - len(prompt_ids)
                if room > 0:
                    pairs.append((prompt, answer))
                    num_cut += len(ids) > room
    num_dropped = num_pairs - num_empty - len(pairs)
    if num_cut or num_dropped:
        print(
            f"{name}: of {num_pairs} completions, dropped {num_dropped} whose prompt fills "
            f"--max-length {max_length}, cut {num_cut} that pass it"
        )
    if num_empty:
        print(f"{name}: of {num_pairs} completions, dropped {num_empty} that are empty")
    if num_silent:
        print(f"{name}: dropped {num_silent} of {len(rows)} rows, without an assistant's answer")
    if rows and not num_pairs:
        stop(f"{name}: no row has a turn of the role assistant that answers another one")
    if rows and num_pairs == num_empty:
        stop(f"{name}: an empty completion in every row")
    if rows and not pairs:
        stop(f"{name}: no completion fits in --max-length {max_length}")
    return pairs


def encode_pairs(tokenizer, pairs, max_length):
    """(prompt, completion) pairs -> Batch."""
    prompts = [prompt for prompt, _ in pairs]
    completions = [[text] for _, text in pairs]
    return encode(tokenizer, prompts, completions, max_length)


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate(model, tokenizer, pairs, max_length, micro_batch_size):
    """Mean loss over all completion tokens of the pairs, in nats."""
    total = 0.0
    num_tokens = 0
    for start in range(0, len(pairs), micro_batch_size):
        part = pairs[start : start + micro_batch_size]
        batch = encode_pairs(tokenizer, part, max_length).to(model.device)
        part_tokens = batch.completion_mask.sum().item()
        logps = fixed_logps(model, batch, micro_batch_size=micro_batch_size)
        total += sft_loss(logps, batch.completion_mask).item() * part_tokens
        num_tokens += part_tokens
    return total / num_tokens


def answer(model, tokenizer, prompt, max_length, max_new_tokens):
    """Greedy answer to one prompt -> text."""
    room = max_length - len(encode_prompt(tokenizer, prompt))
    most = min(max_new_tokens, room)
    _, texts, _ = generate(model, tokenizer, [prompt], 1, most, temperature=0)
    return texts[0]


# --- Training -------------------------------------------------------------------------------------


def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.model)
    columns = ("messages", "prompt"), ("messages", "completion", "response")
    rows, eval_rows = load_splits(args, lambda path: load_rows(path, *columns))
    options = (device, args.dtype, args.shard)
    options += (args.gradient_checkpointing, args.lora_rank, args.from_scratch)
    model = load_model(AutoModelForCausalLM, args.model, *options)
    max_length = min(args.max_length, model.context)
    check_texts(tokenizer, model, rows + eval_rows)
    pairs = load_pairs(rows, tokenizer, max_length, args.dataset)
    eval_pairs = load_pairs(eval_rows, tokenizer, max_length, args.eval_dataset or "held out")
    if args.show_rows:
        batch = encode_pairs(tokenizer, pairs[: args.show_rows], max_length)
        show_batch(tokenizer, batch, batch.completion_mask)

    order = []
    for epoch in range(args.num_epochs):  # each epoch in an order of its own
        shuffle = random.Random(f"{args.seed} {epoch}")
        order += shuffle.sample(range(len(pairs)), len(pairs))
    num_steps = count_steps(len(order), args)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    warmup = round(args.warmup_ratio * num_steps)
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    run.begin({"model": model, "optimizer": optimizer, "scheduler": scheduler}, num_steps)
    run.describe(model, len(pairs), len(eval_pairs), f"{args.batch_size} completions")

    def report():
        if not eval_pairs:
            return
        eval_loss = evaluate(model, tokenizer, eval_pairs, max_length, args.micro_batch_size)
        run.log({"eval_loss": eval_loss}, "eval_loss")
        asked = [prompt for prompt, _ in eval_pairs[: args.log_samples]]
        answers = []
        for prompt in asked:
            answers.append(answer(model, tokenizer, prompt, max_length, args.max_new_tokens))
        run.samples(asked, answers, held_out=True)

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Draw the rows of this step
        index = order[(step - 1) * args.batch_size : step * args.batch_size]
        batch = encode_pairs(tokenizer, [pairs[i] for i in index], max_length).to(device)
        num_tokens = batch.completion_mask.sum().item()

        # 2. Log-probs and loss; each micro-batch weighs as much as its share of the step's tokens
        loss = torch.zeros((), device=device)
        for mb in deal_out(batch.split(args.micro_batch_size), args.shard):
            part = batch.rows(mb)
            logps = completion_logps(model, part)
            share = part.completion_mask.sum() / num_tokens
            mb_loss = sft_loss(logps, part.completion_mask) * share
            mb_loss.backward()
            loss += mb_loss.detach()
        loss = add_up(loss).item()
        add_up_gradients(model)

        # 3. Gradient step
        lr = scheduler.get_last_lr()[0]
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        check_finite(loss, grad_norm.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # 4. Log
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "completion_length": num_tokens / len(index),
            "tokens_per_second": num_tokens / (time.time() - start),
        }
        run.log(metrics, "loss", "lr")
        if step % args.eval_every == 0 or step == num_steps:
            report()
    run.finish(tokenizer, {"final": model})


if __name__ == "__main__":
    run_script(main, Args, TOY)
