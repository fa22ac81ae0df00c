"""SFT, instruction tuning: next-token cross-entropy on the completions alone.

Read beside the RLHF Book, chapter 9, "Instruction Tuning" (draft of January 2025):
    sft_loss    the loss over completion tokens; the prompt is masked, the EOS is not

The draft prints no formula here. Choices it leaves open:
    1. A step's loss is one mean over all completion tokens of its rows, whatever the micro-batches.
    2. Of a conversation (`messages`) every assistant turn is a completion, with all that comes
       before it as its prompt.

    python sft.py                                    # the toy, from random weights
    python sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset instructions.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py.
"""

import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, get_scheduler

from common import (Run, completion_logps, encode, encode_prompt, fixed_logps, generate, load_model,
                    load_rows, load_splits, load_tokenizer, masked_mean, parse_args, pick_device,
                    stop, stop_on_error, update)

@dataclass
class Args:
    model: str  # model to train: a folder or a name on the hub
    dataset: str
    """JSON Lines file, or owner/name:split of the hub: `prompt` + `completion` (or `response`), or
    `messages`"""
    eval_dataset: str = ""  # held-out rows of the same form; else --eval-size prompts of --dataset
    output_dir: str = "runs/sft"  # folder of the run: metrics, curves, checkpoint, final model
    resume: bool = False  # go on from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed of the data's order, of sampling, and of the weights with --from-scratch
    device: str = "auto"  # torch device; auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward pass (autocast; the weights are float32); auto: bfloat16 where cuda has it"""
    from_scratch: bool = False  # start from random weights of the model's shape
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    num_epochs: int = 2  # passes over the data (Tulu 3: 2)
    batch_size: int = 32  # completions a step (Tulu 3: 128)
    micro_batch_size: int = 8  # completions a forward pass; changes the memory, not the gradient
    max_length: int = 1024
    """tokens of prompt and completion; longer completions are cut and then have no EOS"""
    learning_rate: float = 5e-6
    """peak of AdamW's (Tulu 3, 8B: 5e-6; small models take 10 times that)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up
    warmup_ratio: float = 0.03  # share of the steps with a rising learning rate (Tulu 3: 0.03)
    weight_decay: float = 0.0  # AdamW's weight decay
    max_grad_norm: float = 1.0  # largest norm of the gradient; longer ones are scaled down to it

    eval_size: int = 64  # prompts held out where there is no --eval-dataset; 0: none
    eval_every: int = 100  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 100  # steps between checkpoints
    log_samples: int = 4  # held-out prompts answered greedily into samples.jsonl at each evaluation
    max_new_tokens: int = 128  # longest such answer, in tokens

TOY = dict(model="toy/model", dataset="toy/sft_train.jsonl", eval_dataset="toy/sft_test.jsonl",
           from_scratch=True, learning_rate=1e-3, lr_schedule="cosine", warmup_ratio=0.05,
           micro_batch_size=32, max_new_tokens=48)

# --- The algorithm --------------------------------------------------------------------------------

def sft_loss(logps, mask):
    """-mean of log pi(y_t | x, y_<t) over completion tokens: logps, mask (R, Tc) -> scalar, nats.

    Book chapter 9: prompt tokens have no part in it (they are in no logps), the EOS has.
    """
    return -masked_mean(logps, mask)

# --- The task: change this for your own -----------------------------------------------------------

def to_pairs(row):
    """A row -> list of (prompt, completion text)."""
    if row.get("messages"):
        chat = row["messages"]
        turns = [i for i, turn in enumerate(chat) if i and turn["role"] == "assistant"]
        return [(chat[:i], chat[i]["content"]) for i in turns]
    return [(row["prompt"], row.get("completion") or row["response"])]

# --- Training -------------------------------------------------------------------------------------

def load_pairs(rows, tokenizer, max_length, name):
    """Rows -> (prompt, completion) pairs, less those whose prompt leaves no room; says how many."""
    pairs, total, cut = [], 0, 0
    for row in rows:
        with stop_on_error(f"{name}: neither a prompt with a completion nor messages: {row}"):
            for prompt, text in to_pairs(row):
                total += 1
                room = max_length - len(encode_prompt(tokenizer, prompt))
                if not text.strip():
                    stop(f"{name}: an empty completion of {prompt}")
                if room > 0:
                    pairs.append((prompt, text))
                    cut += len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= room
    if cut or total > len(pairs):
        print(f"{name}: of {total} completions, dropped {total - len(pairs)} whose prompt fills "
              f"--max-length {max_length}, cut {cut} that pass it")
    return pairs or (rows and stop(f"{name}: no completion fits in --max-length {max_length}"))

def evaluate(model, tokenizer, pairs, max_length, micro_batch_size):
    """Mean loss over all completion tokens of the pairs, nats."""
    total, tokens = 0.0, 0
    for i in range(0, len(pairs), micro_batch_size):
        prompts, texts = zip(*pairs[i:i + micro_batch_size], strict=True)
        batch = encode(tokenizer, prompts, [[t] for t in texts], max_length).to(model.device)
        num_tokens = batch.completion_mask.sum().item()
        logps = fixed_logps(model, batch, micro_batch_size=micro_batch_size)
        total += sft_loss(logps, batch.completion_mask).item() * num_tokens
        tokens += num_tokens
    return total / tokens

def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    device, tokenizer = pick_device(args.device), load_tokenizer(args.model)
    columns = ("messages", "prompt"), ("messages", "completion", "response")
    rows, eval_rows = load_splits(args, lambda path: load_rows(path, *columns))
    model = load_model(AutoModelForCausalLM, args.model, device, args.dtype,
                       args.gradient_checkpointing, args.from_scratch)
    max_length = min(args.max_length, model.context)
    pairs = load_pairs(rows, tokenizer, max_length, args.dataset)
    eval_pairs = load_pairs(eval_rows, tokenizer, max_length, args.eval_dataset or "held out")

    order = [i for epoch in range(args.num_epochs)  # each epoch in an order of its own
             for i in random.Random(f"{args.seed} {epoch}").sample(range(len(pairs)), len(pairs))]
    num_steps = math.ceil(len(order) / args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate,
                                  weight_decay=args.weight_decay, fused=True)
    warmup = round(args.warmup_ratio * num_steps)
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    run.begin({"model": model, "optimizer": optimizer, "scheduler": scheduler}, num_steps)

    def report():
        if not eval_pairs:
            return
        eval_loss = evaluate(model, tokenizer, eval_pairs, max_length, args.micro_batch_size)
        run.log({"eval_loss": eval_loss}, "eval_loss")
        for prompt, _ in eval_pairs[:args.log_samples]:
            room = max_length - len(encode_prompt(tokenizer, prompt))
            texts = generate(model, tokenizer, [prompt], 1, min(args.max_new_tokens, room), 0)[1]
            run.samples([prompt], texts)

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Draw the rows of this step
        index = order[(step - 1) * args.batch_size:step * args.batch_size]
        prompts, texts = zip(*[pairs[i] for i in index], strict=True)
        batch = encode(tokenizer, prompts, [[t] for t in texts], max_length).to(device)
        num_tokens = batch.completion_mask.sum().item()

        # 2. Log-probs and loss; each micro-batch weighs as much as its share of the step's tokens
        loss = 0.0
        for mb in batch.split(args.micro_batch_size):
            part = batch.rows(mb)
            logps = completion_logps(model, part)
            share = part.completion_mask.sum() / num_tokens
            mb_loss = sft_loss(logps, part.completion_mask) * share
            mb_loss.backward()
            loss += mb_loss.item()

        # 3. Gradient step
        lr = scheduler.get_last_lr()[0]
        grad_norm = update(optimizer, scheduler, loss, args.max_grad_norm)

        # 4. Log
        run.log({"loss": loss, "grad_norm": grad_norm, "lr": lr,
                 "completion_length": num_tokens / len(index),
                 "tokens_per_second": num_tokens / (time.time() - start)}, "loss", "lr")
        if step % args.eval_every == 0 or step == num_steps:
            report()
    run.finish(tokenizer, {"final": model})

if __name__ == "__main__":
    main(parse_args(Args, TOY))
