"""Rejection sampling: sample, keep the best by reward, fine-tune on them; and best of N.

Read beside the RLHF Book (draft of January 2025; "Rejection Sampling" in later editions):
    select_top_per_prompt   10.2.2: the best completion of each prompt
    select_top_overall      10.2.2: the best K prompt and completion pairs
    select_random           the control: as many, picked blindly
    sft_loss                10.2.3 and chapter 9: what the selection is trained with
    best_of_n_reward        10.3: best-of-N sampling, which changes no weights
    best_of_n_kl            10.3: how far from the policy it is

Differs from the print:
    1. 10.2.2's overall top 5 of 20 has index 19, of reward 0.6, where index 11, of 0.7, belongs.
    2. Ties go to the lower index, so that a run repeats.
    3. A control of the same size is trained beside: published gains have vanished beside it.
    4. A completion that was cut off is trained without an end of turn, which nobody wrote.

    python rejection_sampling.py                                       # the toy, in two minutes
    python rejection_sampling.py --no-train                            # best of N alone
    python rejection_sampling.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset prompts.jsonl --reward-model runs/rm_bt/final

To use it elsewhere, copy this file, common.py and plumbing.py.
"""
import copy
import json
import math
import random
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, get_scheduler

from common import (Run, check_prompts, completion_logps, encode, generate,
                    greedy_rewards, kl_from_start, load_model, load_reward, load_rows, load_splits,
                    load_tokenizer, masked_mean, parse_args, pick_device, stop, update, with_ended)

@dataclass
class Args:
    model: str  # policy to sample from and to train: a folder or a name on the hub
    dataset: str  # JSON Lines or owner/name:split of the hub: `prompt`, and `answer` if verified
    eval_dataset: str = ""  # held-out rows of the same form; else --eval-size prompts of --dataset
    output_dir: str = "runs/rejection_sampling"  # folder of the run: candidates, metrics, models
    resume: bool = False  # go on from --output-dir, with the same flags; samples nothing again
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed of the data's order, of sampling and of the random selections
    device: str = "auto"  # torch device; auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward pass (autocast; the weights are float32); auto: bfloat16 where cuda has it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time (no shared prompts)"""
    share_prompts: bool = True  # a prompt is computed once for all its completions: same result

    reward: str = "verifier"
    """verifier: 1 if the last number is `answer`; or FILE.py:function, called with the lists
    prompts, completions, rows and returning a number for each; row["ended"]: not cut off"""
    reward_model: str = ""  # folder of a reward model, used in place of --reward
    rounds: int = 1  # of sampling and training, each from the policy of the one before
    num_prompts: int = 1024  # M, prompts a round, at most
    num_generations: int = 16  # N, completions a prompt (book: 10 to 30)
    completions: str = ""
    """file of candidates of other models, beside the sampled ones: `prompt`, `completion` and, if
    it was cut off, `ended` false"""
    sample: bool = True  # no: candidates of --completions alone
    max_new_tokens: int = 256  # longest completion, in tokens
    temperature: float = 1.0  # of sampling (book: 0.7 to 1.0)
    select: Literal["per-prompt", "overall", "random-per-prompt", "random-overall"] = "per-prompt"
    """what is trained on: each prompt's best completion, or the best of all; or a blind choice"""
    top_k: int = 0  # K, pairs selected overall; 0: as many as there are prompts

    train: bool = True  # no: best of N alone, with a figure
    control: bool = True  # train the matched blind choice beside, as a second policy
    num_epochs: int = 2  # passes over the selection of a round
    batch_size: int = 32  # completions a gradient step
    micro_batch_size: int = 8  # completions a forward pass; changes the memory, not the gradient
    learning_rate: float = 5e-6  # peak of AdamW's (Tulu 3's SFT: 5e-6)
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # down to 0
    max_grad_norm: float = 1.0  # largest norm of the gradient; longer ones are scaled down to it

    eval_size: int = 64  # held-out prompts, at most a tenth of --dataset where from it; 0: none
    eval_every: int = 100  # steps between evaluations; also before the first and after each round
    checkpoint_every: int = 50  # steps between checkpoints
    log_samples: int = 4  # selected completions a round that go into samples.jsonl

TOY = dict(model="toy/model", dataset="toy/problems_train.jsonl",
           eval_dataset="toy/problems_test.jsonl", eval_size=500, num_prompts=1000,
           num_generations=8, max_new_tokens=48, micro_batch_size=256, learning_rate=1e-3)

# --- The algorithm --------------------------------------------------------------------------------
# rewards (M, N) of N completions for each of M prompts; -inf where a prompt has fewer.

def select_top_per_prompt(rewards):
    """(M, N) -> (M,): the column of each prompt's best completion. 10.2.2, argmax_j R[i, j]."""
    return rewards.sort(dim=1, descending=True, stable=True).indices[:, 0]

def select_top_overall(rewards, k):
    """(M, N) -> (k,): flat places of the k best of all, best first; divmod(place, N) is prompt and
    completion. A prompt may be there often or never. Book 10.2.2, argsort(R_flat)."""
    return rewards.flatten().sort(descending=True, stable=True).indices[:k]

def select_random(rewards, k=None, generator=None):
    """(M, N) -> (M,): a random column of each prompt; or with k -> (k,): random flat places, no two
    alike. The control of the two above: the same number, whatever the rewards."""
    there = (rewards > -math.inf).float()
    if k is None:
        return torch.multinomial(there, 1, generator=generator)[:, 0]
    return torch.multinomial(there.flatten(), k, generator=generator)

def best_of_n_reward(rewards, n, values=None):
    """(M, N) -> mean over prompts of the expected best reward among n of the N completions; or of
    what `values` (M, N) has at it, say a reward that did not choose. Book 10.3.

    Over all choices of n, the i-th worst, from 0, is the best one in C(i, n - 1) / C(N, n). Prompts
    with fewer than n completions are left out."""
    values = (rewards if values is None else values).gather(1, rewards.argsort(1))  # worst first
    means = []
    for row, N in zip(values, (rewards > -math.inf).sum(1).tolist(), strict=True):
        weights = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)] if n <= N else []
        means += [(row[len(row) - N:] * torch.tensor(weights)).sum()] if weights else []
    return torch.stack(means).mean()

def best_of_n_kl(n):
    """KL(best of n || policy) = log n - (n - 1) / n, nats; a bound, exact without ties. 10.3."""
    return math.log(n) - (n - 1) / n

def sft_loss(logps, mask):
    """-mean of log pi over completion tokens: logps, mask (R, Tc) -> scalar, nats. Chapter 9."""
    return -masked_mean(logps, mask)

# --- The task: change this for your own -----------------------------------------------------------

def verifier(prompts, completions, rows):
    """1.0 where the last number of the completion equals the row's `answer`, else 0.0."""
    rewards = []
    for text, row in zip(completions, rows, strict=True):
        last = (re.findall(r"-?\d[\d,]*(?:\.\d+)?", text) or ["nan"])[-1]
        answer = str(row["answer"]).replace(",", "")
        rewards.append(float(float(last.replace(",", "")) == float(answer)))
    return rewards

# --- Training -------------------------------------------------------------------------------------

def sample_candidates(policy, tokenizer, score, rows, others, run, name):
    """-> [{prompt, completions, ended, rewards}, ...], one for each row: --num-generations sampled,
    and those of `others`, {prompt: [(text, ended)]}. They go into the file `name` of the run's
    folder as they come, and what is there is not sampled again."""
    args, path, N = run.args, run.folder / name, run.args.num_generations
    size = max(1, args.micro_batch_size // N)  # prompts at a time
    text = path.read_text() if path.exists() else ""
    lines = text[:text.rfind("\n") + 1].splitlines()  # a kill leaves a line without an end
    whole = len(lines) if len(lines) == len(rows) else len(lines) // size * size
    groups = [json.loads(line) for line in lines[:whole]]
    run.write_rows(name, groups)
    for i in range(len(groups), len(rows), size):
        part = rows[i:i + size]
        torch.manual_seed(random.Random(f"{args.seed} {name} {i}").getrandbits(32))
        _, sampled, ended = generate(
            policy, tokenizer, [row["prompt"] for row in part], N, args.max_new_tokens,
            args.temperature) if args.sample else (None, [], torch.ones(0))
        new, of_each = [], []
        for j, row in enumerate(part):
            here, more = slice(j * N, (j + 1) * N), others.get(str(row["prompt"]), [])
            new.append({"prompt": row["prompt"],
                        "completions": sampled[here] + [text for text, _ in more],
                        "ended": ended[here].tolist() + [done for _, done in more]})
            of_each += with_ended([row] * len(new[-1]["ended"]), torch.tensor(new[-1]["ended"]))
        flat = [text for group in new for text in group["completions"]]
        values = iter(score([row["prompt"] for row in of_each], flat, of_each))
        for group in new:
            group["rewards"] = [*islice(values, len(group["completions"]))]
        run.append(name, new)
        groups += new
    return groups

def draw_best_of_n(run, rewards):
    """Log the best of n's reward and KL, n = 1, 2, 4 ... N, and draw best_of_n.png."""
    N = rewards.shape[1]
    sizes = sorted({min(2**i, N) for i in range(N.bit_length() + 1)})
    points = [(best_of_n_kl(n), best_of_n_reward(rewards, n).item()) for n in sizes]
    for n, (kl, reward) in zip(sizes, points, strict=True):
        run.log({"n": n, "kl_best_of_n": kl, "reward_best_of_n": reward})
    with suppress(ImportError):  # no matplotlib, no picture
        from matplotlib.figure import Figure
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot(xlabel="KL from the policy (nats)", ylabel="reward of best of n")
        axes.plot(*zip(*points, strict=True), "o-")
        figure.savefig(run.folder / "best_of_n.png")

def reward_table(groups):
    """Groups of candidates -> rewards (M, N), -inf where a prompt has fewer."""
    rows = [group["rewards"] for group in groups]
    N = max(map(len, rows))
    return torch.tensor([row + [-math.inf] * (N - len(row)) for row in rows])

def choose(how, rewards, k, generator):
    """Way of selecting -> flat places (K,) in the table (M, N) of rewards."""
    if how == "overall":
        return select_top_overall(rewards, k)
    if how == "random-overall":
        return select_random(rewards, k, generator)
    columns = (select_top_per_prompt(rewards) if how == "per-prompt"
               else select_random(rewards, generator=generator))
    return torch.arange(len(rewards)) * rewards.shape[1] + columns

def gradient_step(model, tokenizer, chosen, optimizer, scheduler, args):
    """One step on (prompt, completion, ended) -> loss, norm of the gradient, number of tokens."""
    prompts, texts, ended = zip(*chosen, strict=True)
    batch = encode(tokenizer, prompts, [[text] for text in texts], ended=ended).to(model.device)
    loss, num_tokens = 0.0, batch.completion_mask.sum().item()
    for mb in batch.split(args.micro_batch_size):
        part = batch.rows(mb)
        logps = completion_logps(model, part, 1.0, args.share_prompts)
        mb_loss = sft_loss(logps, part.completion_mask) * part.completion_mask.sum() / num_tokens
        mb_loss.backward()
        loss += mb_loss.item()
    return loss, update(optimizer, scheduler, loss, args.max_grad_norm), num_tokens

def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for a --reward of yours
    device, tokenizer = pick_device(args.device), load_tokenizer(args.model)
    if not args.temperature or not (args.sample or args.completions):
        stop("--temperature 0, or no candidates: they must be sampled, or be in --completions")
    verified = args.reward == "verifier" and not args.reward_model
    columns = ("prompt", "answer") if verified else ("prompt",)
    rows, eval_rows = load_splits(args, lambda path: load_rows(path, *columns))
    eval_rows = eval_rows[:args.eval_size]
    score = load_reward(args.reward, verifier, args.reward_model, device, args.dtype,
                        args.micro_batch_size)
    load = AutoModelForCausalLM, args.model, device, args.dtype
    policy = load_model(*load, args.gradient_checkpointing)
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens)
    others = {}
    for row in load_rows(args.completions, "prompt", "completion") if args.completions else []:
        ids = encode(tokenizer, [row["prompt"]], [[row["completion"]]])
        if ids.prompt_ids.shape[1] + ids.completion_ids.shape[1] > policy.context:
            stop(f"{args.completions}: a completion with its prompt does not fit in the model's "
                 f"{policy.context} tokens: {row['completion'][:80]!r}")
        others.setdefault(str(row["prompt"]), []).append(
            (row["completion"], bool(row.get("ended", True))))
    if not args.sample:  # only prompts that others have answered
        rows = [row for row in rows if str(row["prompt"]) in others] or stop(
            f"{args.completions}: none of its prompts is in {args.dataset}")
    M = min(args.num_prompts, len(rows))
    K = args.top_k if args.top_k and args.select.endswith("overall") else M
    steps_each = math.ceil(K * args.num_epochs / args.batch_size) if args.train else 0  # of a round
    num_steps = steps_each * args.rounds
    models = {"policy": policy}
    if args.train and args.control:
        models["control"] = load_model(*load, args.gradient_checkpointing)
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=args.learning_rate,
                                          weight_decay=0.0, fused=True)
                  for name, model in models.items()}
    schedulers = {name: get_scheduler(args.lr_schedule, optimizer, 0, num_steps)
                  for name, optimizer in optimizers.items()}
    run.begin({**models, **{f"{name} optimizer": x for name, x in optimizers.items()},
               **{f"{name} scheduler": x for name, x in schedulers.items()}}, num_steps)

    def report():
        if not eval_rows:
            return
        metrics, start = {}, load_model(*load)
        for name, model in models.items():
            prompts, end = [row["prompt"] for row in eval_rows], "_control" * (name == "control")
            values = greedy_rewards(model, tokenizer, score, eval_rows, args.max_new_tokens,
                                    args.micro_batch_size)
            torch.manual_seed(args.seed)
            kl, _ = kl_from_start(model, start, tokenizer, prompts, args.max_new_tokens,
                                  args.micro_batch_size)
            metrics["eval_accuracy" + end if verified else "eval_reward" + end] = (
                sum(values) / len(values))
            metrics["eval_kl" + end] = kl.mean()
        run.log(metrics, *metrics)

    def selections(i, log):
        """Candidates of round i -> {model's name: [(prompt, completion, ended), ...]}."""
        drawn = random.Random(f"{args.seed} {i}").sample(rows, M)
        groups = sample_candidates(policy, tokenizer, score, drawn, others, run,
                                   f"candidates/{i}.jsonl")
        rewards = reward_table(groups)
        there = rewards > -math.inf
        if K > there.sum():
            stop(f"--top-k {K}: there are {there.sum()} candidates")
        generator = torch.Generator().manual_seed(args.seed + i)
        blind = args.select if args.select.startswith("random") else f"random-{args.select}"
        places = {"policy": choose(args.select, rewards, K, generator),
                  "control": choose(blind, rewards, K, generator)}
        N = rewards.shape[1]
        chosen = {name: [(group["prompt"], group["completions"][j], group["ended"][j])
                         for group, j in ((groups[x // N], x % N) for x in where.tolist())]
                  for name, where in places.items()}
        if log:
            of = {name: rewards.flatten()[x].mean() for name, x in places.items()}
            level = [len(set(group["rewards"])) < 2 for group in groups]  # the choice says nothing
            ended = [x for group in groups for x in group["ended"]]
            run.log({"round": i, "reward": rewards[there].mean(), "reward_selected": of["policy"],
                     "reward_random": of["control"], "best_of_n": rewards.max(1).values.mean(),
                     "no_signal": sum(level) / len(level), "ended": sum(ended) / len(ended)},
                    "reward", "reward_selected", "reward_random", "best_of_n", "eval")
            draw_best_of_n(run, rewards)
            shown = places["policy"][:args.log_samples]
            prompts, texts = ([x[k] for x in chosen["policy"][:len(shown)]] for k in (0, 1))
            run.samples(prompts, texts, rewards.flatten()[shown].tolist())
        return chosen

    if run.step == 0:
        report()
    selected = selections(0, log=True) if not args.train else None
    for step in run.steps():
        start = time.time()
        # 1. A new round: sample N completions of each of M prompts, score them, select
        i, k = divmod(step - 1, steps_each)
        if k == 0 or not selected:
            selected = selections(i, log=k == 0)
        if k == 0 and "control" in models:  # it begins each round as the policy does
            models["control"].load_state_dict(policy.state_dict())
            optimizers["control"].load_state_dict(copy.deepcopy(optimizers["policy"].state_dict()))

        # 2. Draw the pairs of this step, the same places of both selections
        order = [j for epoch in range(args.num_epochs)
                 for j in random.Random(f"{args.seed} {i} {epoch}").sample(range(K), K)]
        drawn = order[k * args.batch_size:(k + 1) * args.batch_size]

        # 3. Gradient steps of the policy and of the control
        metrics = {"lr": schedulers["policy"].get_last_lr()[0]}
        for name, model in models.items():
            loss, grad_norm, num_tokens = gradient_step(
                model, tokenizer, [selected[name][j] for j in drawn], optimizers[name],
                schedulers[name], args)
            if name == "policy":
                metrics |= {"loss": loss, "grad_norm": grad_norm, "tokens_per_second":
                            num_tokens / (time.time() - start)}
            else:
                metrics["loss_control"] = loss

        # 4. Log
        run.log(metrics, "loss", "loss_control")
        if step % args.eval_every == 0 or k == steps_each - 1:
            report()
    run.finish(tokenizer, {"final": policy} if args.train else {})

if __name__ == "__main__":
    main(parse_args(Args, TOY))
