"""Rejection sampling: sample, keep the best by reward, fine-tune on them; and best of N.

Read beside the RLHF Book, draft of January 2025 (the printed edition has chapter 10 as chapter 9):
    select_top_per_prompt   10.2.2: the best completion of each prompt
    select_top_overall      10.2.2: the best K prompt and completion pairs
    select_random           the control: as many, picked blindly
    sft_loss                10.2.3 and chapter 9: what the selection is trained with
    best_of_n_reward        10.3: best-of-N sampling, which changes no weights
    best_of_n_kl            10.3: how far from the policy it is
    (10.2.4, completions of several models, is --completions; 10.2.4.1, scoring sorted by length, is
    in plumbing.py, _step_logits)

How the code departs from the print:
    1. 10.2.2's overall top 5 of 20 has index 19, of reward 0.6, where index 11, of 0.7, belongs.
    2. 10.2.2 counts the columns of the example from 1 in its text. The code counts from 0: the top
       per prompt is [0, 1, 0, 2, 3].

Choices that the print leaves open:
    3. Ties go to the lower index, so that a run repeats.
    4. A random selection of the same size is trained, too, as a control: in published runs the two
       were nearly equal.
    5. A completion that was cut off is trained without an end of turn: the policy wrote none.

    python rejection_sampling.py                                       # the toy, in a minute
    python rejection_sampling.py --no-train                            # best of N alone
    python rejection_sampling.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset prompts.jsonl --reward-model runs/rm_bt/final

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import copy
import json
import math
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
    deal_out,
    encode,
    generate,
    masked_mean,
    process,
)
from plumbing import (
    Run,
    answer_text,
    check_finite,
    check_prompts,
    count_steps,
    from_first,
    greedy_rewards,
    hold_as_computed,
    is_verified,
    kl_from_start,
    last_number,
    load_model,
    load_prompts,
    load_reward,
    load_rows,
    load_tokenizer,
    pick_device,
    reference_of,
    run_script,
    stop,
    with_ended,
)


@dataclass
class Args:
    model: str  # policy to train: a folder, or a name on the hub
    dataset: str
    """training rows, JSON Lines or owner/name:split on the hub: `prompt`, and `answer` for the
    verifier"""
    eval_dataset: str = ""
    """held-out rows of the same form; if empty, --eval-size prompts are taken from --dataset"""
    show_rows: int = 0
    """number of rows to print as the model gets them, with the places where the loss counts; then
    the program ends; 0: train"""

    output_dir: str = "runs/rejection_sampling"
    """folder for candidates, metrics, samples, curves, checkpoint and final model"""
    resume: bool = False
    """continue from the checkpoint in --output-dir, with the same flags; candidates that were
    sampled before are kept"""
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

    reward: str = "verifier"
    """verifier: 1 if the last number of the completion is the row's `answer`, else 0; or
    FILE.py:function, which gets three lists (prompts, completions, rows) and returns one number per
    completion; rows[i]["ended"] is False if completion i was cut off, and
    rows[i]["raw"] is its text with special tokens"""
    reward_model: str = ""  # folder or hub name of a reward model, used instead of --reward

    rounds: int = 1  # rounds of sampling and training, each from the policy of the one before
    num_prompts: int = 1024  # M, prompts per round, at most
    num_generations: int = 16  # N, completions per prompt (book: 10 to 30)
    completions: str = ""
    """JSON Lines with candidates of other models, which join the sampled ones: `prompt`,
    `completion` and, if it was cut off, `ended` false"""
    sample: bool = True  # sample from the policy; if false, --completions has all candidates
    max_new_tokens: int = 256  # longest completion, in tokens
    temperature: float = 1.0  # temperature of sampling (book: 0.7 to 1.0)

    select: Literal["per-prompt", "overall", "random-per-prompt", "random-overall"] = "per-prompt"
    """what is trained on: the best completion of each prompt; the best of all; or as many at
    random"""
    top_k: int = 0  # K, pairs that are selected overall; 0: as many as there are prompts

    train: bool = True  # if false, only run best-of-N and plot it
    control: bool = True  # train a second policy on as many completions picked at random
    num_epochs: int = 2  # passes over the selection of a round
    batch_size: int = 32  # completions per gradient step
    micro_batch_size: int = 8  # completions per forward pass; changes memory, not the gradient
    learning_rate: float = 5e-6  # peak learning rate of AdamW (Tulu 3's SFT: 5e-6)
    lora_rank: int = 0
    """rank of the adapters that are trained in place of the weights (LoRA), with about ten times
    the learning rate; 0: all weights are trained; see docs/models.md"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """learning-rate schedule; linear and cosine fall to 0"""
    max_grad_norm: float = 1.0  # maximum norm of the gradient; a larger one is scaled down to it

    eval_size: int = 64
    """number of held-out prompts; without --eval-dataset they are taken from --dataset, at most a
    tenth of it; 0: no evaluation"""
    eval_every: int = 100  # steps between evaluations; also before the first and after each round
    checkpoint_every: int = 50  # steps between checkpoints
    log_samples: int = 4
    """selected completions per round, and held-out answers per evaluation, that are written to
    samples.jsonl"""


TOY = dict(
    model="toy/model",
    dataset="toy/problems_train.jsonl",
    eval_dataset="toy/problems_test.jsonl",
    num_prompts=1000,
    num_generations=8,
    max_new_tokens=48,
    micro_batch_size=256,
    learning_rate=1e-3,
    eval_size=500,
)

# --- The algorithm --------------------------------------------------------------------------------
# rewards (M, N) of N completions for each of M prompts; -inf where a prompt has fewer.


def select_top_per_prompt(rewards):
    """(M, N) -> (M,): the column of each prompt's best completion. Book 10.2.2, argmax_j R_ij."""
    # Not argmax, which promises no order: of ties the stable sort takes the first
    best_first = rewards.sort(dim=1, descending=True, stable=True).indices
    return best_first[:, 0]


def select_top_overall(rewards, k):
    """(M, N) -> (k,): flat places of the k best of all, best first. Book 10.2.2, argsort(R_flat).

    divmod(place, N) is prompt and completion. A prompt may be there often or never.
    """
    best_first = rewards.flatten().sort(descending=True, stable=True).indices
    return best_first[:k]


def select_random(rewards, k=None, generator=None):
    """(M, N) -> (M,): a random column of each prompt; or with k -> (k,): random flat places.

    The control of the book's two rules (10.2.2): the same number, whatever the rewards, none twice.
    """
    is_there = (rewards > -math.inf).float()
    if k is None:
        return torch.multinomial(is_there, 1, generator=generator)[:, 0]
    return torch.multinomial(is_there.flatten(), k, generator=generator)


def best_of_n_reward(rewards, n, values=None):
    """Expected reward of the best of n completions, mean over prompts: (M, N) -> scalar. Book 10.3.

    The expectation is over all choices of n among a prompt's N completions: with these sorted from
    the worst (i = 0), the i-th is the best of C(i, n - 1) out of C(N, n) choices. Prompts with
    fewer than n completions are left out.
    values (M, N): what to average at the best by `rewards`, say a reward that did not choose.
    """
    if values is None:
        values = rewards
    means = []
    for row_rewards, row_values in zip(rewards, values, strict=True):
        is_there = row_rewards > -math.inf
        N = int(is_there.sum())
        if N < n:
            continue
        worst_first = row_values[is_there][row_rewards[is_there].argsort()]
        chances = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
        means.append((chances * worst_first).sum())
    return torch.stack(means).mean()


def best_of_n_kl(n):
    """KL(best of n || policy) = log n - (n - 1) / n in nats: a bound, exact without ties. 10.3."""
    return math.log(n) - (n - 1) / n


def sft_loss(logps, mask):
    """-mean of log pi over completion tokens: logps, mask (R, Tc) -> scalar, nats. Chapter 9."""
    return -masked_mean(logps, mask)


# --- The task: change this for your own -----------------------------------------------------------


def verifier(prompts, completions, rows):
    """1.0 where the last number of the completion equals the row's `answer`, else 0.0."""
    rewards = []
    for text, row in zip(completions, rows, strict=True):
        rewards.append(float(last_number(text) == last_number(str(row["answer"]))))
    return rewards


# --- Candidates -----------------------------------------------------------------------------------


def load_candidates(args, tokenizer, context):
    """--completions -> {prompt: [(text, ended), ...]}. Those that do not fit stop the run."""
    candidates = {}
    if not args.completions:
        return candidates
    for row in load_rows(args.completions, "prompt", "completion"):
        text = answer_text(row["completion"], row["prompt"])
        batch = encode(tokenizer, [row["prompt"]], [[text]])
        if batch.prompt_ids.shape[1] + batch.completion_ids.shape[1] > context:
            stop(
                f"{args.completions}: a completion with its prompt does not fit in the model's "
                f"{context} tokens: {text[:80]!r}"
            )
        of_prompt = candidates.setdefault(str(row["prompt"]), [])
        of_prompt.append((text, bool(row.get("ended", True))))
    return candidates


def rows_to_answer(rows, candidates, args):
    """The rows whose prompts are sampled for; without --sample those that have candidates."""
    known = {str(row["prompt"]) for row in rows}
    unused = set(candidates) - known
    if unused:
        print(f"{args.completions}: {len(unused)} of its prompts are not in {args.dataset}")
    if args.sample:
        return rows
    rows = [row for row in rows if str(row["prompt"]) in candidates]
    if not rows:
        stop(f"{args.completions}: none of its prompts is in {args.dataset}")
    return rows


def whole_chunks(path, num_rows, size):
    """Groups in a file of candidates, as far as it has whole chunks of `size` prompts.

    Each chunk was sampled from a seed of its own; a killed run leaves part of one, or of a line.
    """
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    count = len(lines) if len(lines) == num_rows else len(lines) // size * size
    return [json.loads(line) for line in lines[:count]]


def sample_groups(policy, tokenizer, rows, others, args):
    """Rows -> [{prompt, completions, ended}, ...]: --num-generations sampled, then `others`."""
    N = args.num_generations
    sampled, raw = [], []
    ended = torch.ones(0)
    if args.sample:
        prompts = [row["prompt"] for row in rows]
        sampling = (N, args.max_new_tokens, args.temperature)
        batch, sampled, ended = generate(policy, tokenizer, prompts, *sampling)
        raw = [row["raw"] for row in with_ended(rows, ended, batch, tokenizer)]
    groups = []
    for i, row in enumerate(rows):
        completions = sampled[i * N : (i + 1) * N]
        has_ended = ended[i * N : (i + 1) * N].tolist()
        with_special = raw[i * N : (i + 1) * N]
        for text, done in others.get(str(row["prompt"]), []):
            completions.append(text)
            has_ended.append(done)
            with_special.append(text)
        group = {"prompt": row["prompt"], "completions": completions, "ended": has_ended}
        groups.append(group | {"raw": with_special})
    return groups


def add_rewards(groups, rows, score):
    """Score the completions of all groups, and add `rewards` to each group."""
    texts = []
    row_of_each = []
    for group, row in zip(groups, rows, strict=True):
        texts += group["completions"]
        raw = group.pop("raw", group["completions"])  # for the reward alone: it is not kept
        for done, text in zip(group["ended"], raw, strict=True):
            row_of_each.append(row | {"ended": done, "raw": text})
    values = score([row["prompt"] for row in row_of_each], texts, row_of_each)
    start = 0
    for group in groups:
        stop_at = start + len(group["completions"])
        group["rewards"] = values[start:stop_at]
        start = stop_at


def sample_candidates(policy, tokenizer, score, rows, others, run, name):
    """-> [{prompt, completions, ended, rewards}, ...], one for each row.

    They are written to the file `name` of the run's folder as they come, and what is there is not
    sampled again. others: {prompt: [(text, ended), ...]}, which join them.
    """
    args = run.args
    # Prompts at a time, so many for each process
    size = max(1, args.micro_batch_size // args.num_generations) * process()[1]
    groups = from_first(whole_chunks(run.folder / name, len(rows), size))
    run.write_rows(name, groups)
    for start in range(len(groups), len(rows), size):
        part = rows[start : start + size]
        torch.manual_seed(random.Random(f"{args.seed} {name} {start}").getrandbits(32))
        new = sample_groups(policy, tokenizer, part, others, args)
        add_rewards(new, part, score)
        run.append(name, new)
        groups += new
    return groups


def reward_table(groups):
    """Groups of candidates -> rewards (M, N), -inf where a prompt has fewer."""
    rows = [group["rewards"] for group in groups]
    N = max(map(len, rows))
    return torch.tensor([row + [-math.inf] * (N - len(row)) for row in rows])


def choose(how, rewards, k, generator):
    """Way of selecting (--select) -> flat places (K,) in the table (M, N) of rewards."""
    if how == "overall":
        return select_top_overall(rewards, k)
    if how == "random-overall":
        return select_random(rewards, k, generator)
    if how == "per-prompt":
        columns = select_top_per_prompt(rewards)
    else:
        columns = select_random(rewards, generator=generator)
    M, N = rewards.shape
    return torch.arange(M) * N + columns


def look_up(places, groups, N):
    """Flat places in the table of rewards -> [(prompt, completion, ended), ...]."""
    chosen = []
    for place in places.tolist():
        i, j = divmod(place, N)
        group = groups[i]
        chosen.append((group["prompt"], group["completions"][j], group["ended"][j]))
    return chosen


def selection_metrics(groups, rewards, places, control_places):
    """Mean rewards of all candidates, of the selection, of the control and of the best of N."""
    is_level = [len(set(group["rewards"])) < 2 for group in groups]  # nothing to choose by
    ended = []
    for group in groups:
        ended += group["ended"]
    return {
        "reward": rewards[rewards > -math.inf].mean(),
        "reward_selected": rewards.flatten()[places].mean(),
        "reward_random": rewards.flatten()[control_places].mean(),
        "best_of_n": rewards.max(1).values.mean(),
        "no_signal": sum(is_level) / len(is_level),
        "ended": sum(ended) / len(ended),
    }


def log_best_of_n(run, rewards):
    """Log the reward and the KL of the best of n, n = 1, 2, 4 ... N, and draw best_of_n.png."""
    N = rewards.shape[1]
    sizes = sorted({min(2**i, N) for i in range(N.bit_length() + 1)})
    kls = [best_of_n_kl(n) for n in sizes]
    means = [best_of_n_reward(rewards, n).item() for n in sizes]
    for n, kl, reward in zip(sizes, kls, means, strict=True):
        metrics = {"n": n, "kl_best_of_n": kl, "reward_best_of_n": reward}
        run.log(metrics, "n", "kl_best_of_n", "reward_best_of_n", always=True)
    run.draw("best_of_n.png", draw_best_of_n, sizes, kls, means)


def draw_best_of_n(sizes, kls, means, path):
    """Draw the mean reward of the best of n by its KL, n beside each point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="KL from the policy (nats)", ylabel="reward of best of n")
    axes.plot(kls, means, "o-")
    for n, kl, reward in zip(sizes, kls, means, strict=True):
        axes.annotate(f"n = {n}", (kl, reward), textcoords="offset points", xytext=(4, -10))
    figure.savefig(path)


# --- Training -------------------------------------------------------------------------------------


def add_sft_grad(model, tokenizer, chosen, args):
    """Add the gradient of the loss on (prompt, completion, ended) rows -> loss, token count."""
    prompts = [prompt for prompt, _, _ in chosen]
    completions = [[text] for _, text, _ in chosen]
    ended = [done for _, _, done in chosen]
    batch = encode(tokenizer, prompts, completions, ended=ended).to(model.device)
    num_tokens = batch.completion_mask.sum().item()
    loss = torch.zeros((), device=model.device)
    for mb in deal_out(batch.split(args.micro_batch_size), args.shard):
        part = batch.rows(mb)
        logps = completion_logps(model, part, 1.0, args.share_prompts)
        share = part.completion_mask.sum() / num_tokens
        mb_loss = sft_loss(logps, part.completion_mask) * share
        mb_loss.backward()
        loss += mb_loss.detach()
    return add_up(loss).item(), num_tokens


def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for rewards that draw random numbers
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.model)
    if not args.temperature or not (args.sample or args.completions):
        stop("--temperature 0, or no candidates: they must be sampled, or be in --completions")
    rows, eval_rows = load_prompts(args)
    model_options = (args.reward_model, device, args.dtype, args.micro_batch_size)
    score = load_reward(args.reward, verifier, *model_options, shard=args.shard)
    load_options = (AutoModelForCausalLM, args.model, device, args.dtype, args.shard)
    policy = load_model(*load_options, args.gradient_checkpointing, args.lora_rank)
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens, args.show_rows)
    others = load_candidates(args, tokenizer, policy.context)
    rows = rows_to_answer(rows, others, args)
    M = min(args.num_prompts, len(rows))
    K = args.top_k if args.top_k and args.select.endswith("overall") else M
    if not others and K > M * args.num_generations:
        stop(f"--top-k {K}: there are {M * args.num_generations} candidates")
    steps_per_round = count_steps(K * args.num_epochs, args) if args.train else 0
    num_steps = steps_per_round * args.rounds
    models = {"policy": policy}
    if args.train and args.control:
        control = load_model(*load_options, args.gradient_checkpointing, args.lora_rank)
        models["control"] = control
    optimizers, schedulers, parts = {}, {}, {}
    for name, model in models.items():
        lr = args.learning_rate
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        optimizers[name] = optimizer
        schedulers[name] = get_scheduler(args.lr_schedule, optimizer, 0, num_steps)
        parts[name] = model
        parts[f"{name} optimizer"] = optimizer
        parts[f"{name} scheduler"] = schedulers[name]
    run.begin(parts, num_steps)
    run.describe(policy, len(rows), len(eval_rows), f"{args.batch_size} completions")

    def report():
        if not eval_rows:
            return
        start_model = reference_of(policy) or hold_as_computed(load_model(*load_options))
        prompts = [row["prompt"] for row in eval_rows]
        sizes = (args.max_new_tokens, args.micro_batch_size)
        metrics = {}
        for name, model in models.items():
            values, texts = greedy_rewards(model, tokenizer, score, eval_rows, *sizes)
            torch.manual_seed(args.seed)
            kl, _ = kl_from_start(model, start_model, tokenizer, prompts, *sizes)
            metric = "eval_accuracy" if is_verified(args) else "eval_reward"
            suffix = "_control" if name == "control" else ""
            metrics[metric + suffix] = sum(values) / len(values)
            metrics["eval_kl" + suffix] = kl.mean()
            if name == "policy":
                run.samples(prompts, texts, values, held_out=True)
        run.log(metrics, *metrics)

    def select(i, log):
        """Candidates of round i -> {model's name: [(prompt, completion, ended), ...]}."""
        drawn = random.Random(f"{args.seed} {i}").sample(rows, M)
        file = f"candidates/{i}.jsonl"
        groups = sample_candidates(policy, tokenizer, score, drawn, others, run, file)
        rewards = reward_table(groups)
        num_candidates = (rewards > -math.inf).sum()
        if K > num_candidates:
            stop(f"--top-k {K}: there are {num_candidates} candidates")
        generator = torch.Generator().manual_seed(args.seed + i)
        blind = args.select if args.select.startswith("random") else f"random-{args.select}"
        places = choose(args.select, rewards, K, generator)
        control_places = choose(blind, rewards, K, generator)
        N = rewards.shape[1]
        selected = look_up(places, groups, N)
        if log:
            metrics = {"round": i} | selection_metrics(groups, rewards, places, control_places)
            shown = ("reward", "reward_selected", "reward_random", "best_of_n")
            run.log(metrics, *shown, always=True)
            log_best_of_n(run, rewards)
            prompts = [prompt for prompt, _, _ in selected]
            texts = [text for _, text, _ in selected]
            run.samples(prompts, texts, rewards.flatten()[places].tolist())
        return {"policy": selected, "control": look_up(control_places, groups, N)}

    if run.step == 0:
        report()
    selected = None
    if not args.train:
        select(0, log=True)
    for step in run.steps():
        start = time.time()
        # 1. A new round: sample N completions of each of M prompts, score them, select
        i, step_of_round = divmod(step - 1, steps_per_round)
        is_new = step_of_round == 0
        if is_new or not selected:  # nothing is selected yet where the run was resumed
            selected = select(i, log=is_new)
        if is_new and "control" in models:  # it begins each round as the policy does
            control.load_state_dict(policy.state_dict())
            state = copy.deepcopy(optimizers["policy"].state_dict())
            optimizers["control"].load_state_dict(state)

        # 2. Draw the pairs of this step, the same places of both selections
        order = []
        for epoch in range(args.num_epochs):
            order += random.Random(f"{args.seed} {i} {epoch}").sample(range(K), K)
        first = step_of_round * args.batch_size
        drawn = order[first : first + args.batch_size]

        # 3. Gradient steps of the policy and of the control
        metrics = {"lr": schedulers["policy"].get_last_lr()[0]}
        for name, model in models.items():
            chosen = [selected[name][j] for j in drawn]
            loss, num_tokens = add_sft_grad(model, tokenizer, chosen, args)
            add_up_gradients(model)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            check_finite(loss, grad_norm.item())
            optimizers[name].step()
            schedulers[name].step()
            optimizers[name].zero_grad()
            if name == "control":
                metrics["loss_control"] = loss
                continue
            metrics["loss"] = loss
            metrics["grad_norm"] = grad_norm.item()
            metrics["tokens_per_second"] = num_tokens / (time.time() - start)

        # 4. Log
        run.log(metrics, "loss", "loss_control")
        if step % args.eval_every == 0 or step_of_round == steps_per_round - 1:
            report()
    saved = {"final": policy} if args.train else {}
    run.finish(tokenizer, saved)


if __name__ == "__main__":
    run_script(main, Args, TOY)
