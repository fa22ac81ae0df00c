"""GRPO, group relative policy optimisation (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

Read beside the RLHF Book (draft of January 2025; "Policy Gradient" in later editions):
    group_advantages      11.1.5, eq. 10: outcome supervision
    process_advantages    11.1.5, the draft's TODO: process supervision (DeepSeekMath 4.1.3)
    token_weights         11.2.3, the mean over tokens, and two others
    grpo_loss             11.1.5 the objective, 11.2.3 the code, 11.2.2.1 eq. 11
    kl_estimate           8.1, in common.py: its three forms and their gradients

Differs from the print:
    1. 11.2.3 prints r + beta KL and L_pg - beta KL. The KL is a cost: L_pg + beta KL.
    2. 11.2.1 calls the ratio one to the reference model. It is one to the policy that sampled.
    3. The mean over tokens is a sum with fixed weights, so that micro-batches add up exactly.
    4. The mask keeps the EOS: the policy learns when to stop.
    5. 11.2.3 has (difference)^2 / 2 for approx_kl. Here it is k3: unbiased.

    python grpo.py                                                     # the toy, in two minutes
    python grpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset math.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py.
"""
import random
import re
import time
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, get_scheduler

from common import (Run, check_prompts, completion_logps, fixed_logps, generate, greedy_rewards,
                    has_answers, kl_estimate, load_model, load_reward, load_rows, load_splits,
                    load_tokenizer, masked_mean, parse_args, pick_device, stop, update, with_ended)

@dataclass
class Args:
    model: str  # policy to train: a folder or a name on the hub
    dataset: str  # JSON Lines or owner/name:split of the hub: `prompt`, and `answer` if verified
    eval_dataset: str = ""  # held-out rows of the same form; else --eval-size prompts of --dataset
    output_dir: str = "runs/grpo"  # folder of the run: metrics, curves, checkpoint, final model
    resume: bool = False  # go on from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed of the data's order and of sampling
    device: str = "auto"  # torch device; auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward pass (autocast; the weights are float32); auto: bfloat16 where cuda has it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time (no shared prompts)"""
    share_prompts: bool = True  # a prompt is computed once for all its completions: same result

    reward: str = "verifier"
    """verifier: 1 if the last number is `answer`; or FILE.py:function, called with the lists
    prompts, completions, rows and returning a number for each (a list of them with process);
    row["ended"]: not cut off"""
    reward_model: str = ""  # folder of a reward model, used in place of --reward
    missing_eos_penalty: float | None = None
    """minus this is the reward of a completion cut off (N+: 1); None: scored as it stands"""
    supervision: Literal["outcome", "process"] = "outcome"
    """process: the reward gives each completion a list of numbers, one a step"""
    step_separator: str = "\n"  # what ends a step, with process supervision; blank ones don't count

    num_steps: int = 200  # steps, each on new completions
    num_prompts: int = 16  # P, prompts a step (DeepSeekMath: 16)
    num_generations: int = 8  # G, completions a prompt: the group of eq. 10 (DeepSeekMath: 64)
    max_new_tokens: int = 256  # longest completion, in tokens (DeepSeekMath: 1024)
    temperature: float = 1.0  # of sampling, and of the log-probs
    num_epochs: int = 1  # passes over a step's completions (DeepSeekMath: 1)
    num_minibatches: int = 1  # gradient steps a pass; where there is one in all, the ratio is 1
    micro_batch_size: int = 8  # completions a forward pass; changes the memory, not the gradient

    learning_rate: float = 1e-6  # peak of AdamW's (DeepSeekMath: 1e-6)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # linear, cosine: down to 0
    max_grad_norm: float = 1.0  # largest norm of the gradient; longer ones are scaled down to it
    clip_eps: float = 0.2  # epsilon: the ratio is clipped to 1 - eps .. 1 + eps
    clip_eps_high: float = 0.0  # epsilon of the upper bound (DAPO: 0.28); 0: that of --clip-eps
    beta: float = 0.04  # weight of the KL in the loss (DeepSeekMath: 0.04); 0: no reference model
    kl: Literal["k1", "k2", "k3"] = "k3"
    """its estimator (DeepSeekMath: k3). Gradients: k1 none on average, k2 that of KL(pi || ref),
    k3 that of KL(ref || pi)"""
    scale_by_std: bool = True  # divide by the group's standard deviation; Dr. GRPO does not
    aggregate: Literal["sequence", "token", "constant"] = "sequence"
    """mean over a completion's tokens, then over completions (DeepSeekMath); one mean over all
    tokens (DAPO); sum over tokens divided by --max-new-tokens (Dr. GRPO)"""

    eval_size: int = 64  # held-out prompts, at most a tenth of --dataset where from it; 0: none
    eval_every: int = 50  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 50  # steps between checkpoints
    log_samples: int = 4  # completions a step that go into samples.jsonl

TOY = dict(model="toy/model", dataset="toy/problems_train.jsonl",
           eval_dataset="toy/problems_test.jsonl", eval_size=500, eval_every=30, num_steps=60,
           num_prompts=32, max_new_tokens=48, micro_batch_size=256, learning_rate=2e-4,
           lr_schedule="linear", beta=0.01)

# --- The algorithm --------------------------------------------------------------------------------

def group_advantages(rewards, num_generations, scale_by_std=True):
    """Rewards (R,) of completions, prompt-major -> advantages (R,). Book eq. 10.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4) over the group of one prompt; the std is that of a
    sample (G - 1). Without the division: Dr. GRPO (arXiv:2503.20783).
    """
    groups = rewards.view(-1, num_generations)  # (P, G)
    groups = groups - groups[:, :1]  # rounding of equal rewards would be scaled up: now exactly 0
    advantages = groups - groups.mean(1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.view(-1)

def process_advantages(rewards, ends, num_tokens, num_generations, scale_by_std=True):
    """Step rewards (R, S) and the tokens at which the steps end (R, S), -1 for none -> (R, T).

    Rewards are normalised over all steps of all completions of a group; a token's advantage is the
    sum over the steps that end at it or later. DeepSeekMath 4.1.3.
    """
    is_step = (ends >= 0).view(-1, num_generations * ends.shape[1])  # (P, G * S)
    groups = rewards.view(is_step.shape)
    groups = groups - groups.gather(1, is_step.int().argmax(1, keepdim=True))  # as above
    count = is_step.sum(1, keepdim=True)
    groups = (groups - masked_mean(groups, is_step, 1)[:, None]) * is_step
    if scale_by_std:
        variance = (groups**2).sum(1, keepdim=True) / (count - 1).clamp(min=1)
        groups = groups / (variance.sqrt() + 1e-4)
    later = ends[:, :, None] >= torch.arange(num_tokens, device=ends.device)  # (R, S, T)
    return (groups.view(ends.shape)[:, :, None] * later).sum(1)

def token_weights(mask, aggregate, max_len):
    """Completion mask (R, T) -> weights (R, T): the loss is the sum of weights * per_token_loss."""
    R = len(mask)
    if aggregate == "sequence":  # 1/R sum_i 1/|y_i| sum_t
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / R
    if aggregate == "token":  # 1/sum_i |y_i| sum_i sum_t
        return mask / mask.sum()
    return mask / max_len / R  # 1/R sum_i 1/L sum_t, L the same for all

def grpo_loss(logps, old_logps, ref_logps, advantages, weights, clip_eps, clip_eps_high, beta, kl):
    """All tensors (R, T) -> loss, and where the clip is active (R, T). Book 11.1.5, 11.2.3.

    Per token: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + beta KL, ratio = pi / pi_old.
    With old_logps = logps.detach(), the ratio is 1 and its gradient that of log pi: eq. 11.
    Results add up over micro-batches when the weights are those of the whole step.
    """
    ratio = torch.exp(logps - old_logps)
    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps_high)
    per_token_loss = torch.max(pg_losses1, pg_losses2)
    if beta:
        per_token_loss = per_token_loss + beta * kl_estimate(logps, ref_logps, kl)
    return (weights * per_token_loss).sum(), pg_losses2 > pg_losses1

# --- The task: change this for your own -----------------------------------------------------------

def verifier(prompts, completions, rows):
    """1.0 where the last number of the completion equals the row's `answer`, else 0.0."""
    rewards = []
    for text, row in zip(completions, rows, strict=True):
        last = (re.findall(r"-?\d[\d,]*(?:\.\d+)?", text) or ["nan"])[-1]
        answer = str(row["answer"]).replace(",", "")
        rewards.append(float(float(last.replace(",", "")) == float(answer)))
    return rewards

def step_ends(pieces, separator):
    """Texts of a completion's tokens -> index of the last token of each step that is not blank."""
    ends, text = [], ""
    for i, piece in enumerate(pieces):
        *done, text = (text + piece).split(separator)
        ends += [i for step in done if step.strip()]
    return ends + [len(pieces) - 1] * bool(text.strip())

def process_rewards(values, batch, tokenizer, separator):
    """R lists of step rewards -> rewards (R, S), and where the steps end (R, S), -1 for none."""
    S = max(1, *map(len, values))
    rewards, ends = torch.zeros(len(values), S), torch.full((len(values), S), -1)
    for i, mask in enumerate(batch.completion_mask):
        ids = batch.completion_ids[i, mask].tolist()
        pieces = tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=True)
        where = step_ends(pieces, separator)
        if len(where) != len(values[i]):
            stop(f"the reward gave {len(values[i])} numbers for the {len(where)} steps, by "
                 f"--step-separator, of {''.join(pieces)[:80]!r}")
        rewards[i, :len(where)], ends[i, :len(where)] = torch.tensor(values[i]), torch.tensor(where)
    return rewards.to(batch.prompt_of.device), ends.to(batch.prompt_of.device)

# --- Training -------------------------------------------------------------------------------------

def one_number(values):
    """Rewards of completions (R,); where they are lists of step rewards, the means of these."""
    return torch.tensor([sum(v) / max(1, len(v)) if isinstance(v, list) else v for v in values])

def main(args: Args):
    args.step_separator = args.step_separator.replace("\\n", "\n")  # as a shell hands it on
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for a --reward of yours
    G, device = args.num_generations, pick_device(args.device)
    if G < 2 or not args.temperature:
        stop(f"--num-generations {G} --temperature {args.temperature}: a group needs at least 2, "
             "sampled, to be compared with each other")
    if args.missing_eos_penalty is not None and args.supervision == "process":
        stop("--missing-eos-penalty is one number a completion: not with --supervision process")
    verified = args.reward == "verifier" and not args.reward_model
    columns = ("prompt", "answer") if verified else ("prompt",)
    rows, eval_rows = load_splits(args, lambda path: load_rows(path, *columns))
    eval_rows = eval_rows[:args.eval_size]
    if args.num_minibatches > min(args.num_prompts, len(rows)):
        stop(f"--num-minibatches {args.num_minibatches}: more than there are groups in a step")
    gold = not verified and has_answers(rows)  # the verifier looks on while another reward trains
    score = load_reward(args.reward, verifier, args.reward_model, device, args.dtype,
                        args.micro_batch_size, by_step=args.supervision == "process")
    tokenizer = load_tokenizer(args.model)
    policy = load_model(AutoModelForCausalLM, args.model, device, args.dtype,
                        args.gradient_checkpointing)
    ref = load_model(AutoModelForCausalLM, args.model, device, args.dtype) if args.beta else None
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0,
                                  fused=True)
    updates = args.num_epochs * args.num_minibatches  # gradient steps on the same completions
    scheduler = get_scheduler(args.lr_schedule, optimizer, 0, args.num_steps * updates)
    run.begin({"policy": policy, "optimizer": optimizer, "scheduler": scheduler}, args.num_steps)

    def report():
        if eval_rows:
            values = greedy_rewards(policy, tokenizer, score, eval_rows, args.max_new_tokens,
                                    args.num_prompts * G)
            run.log({"eval_accuracy" if verified else "eval_reward": one_number(values).mean()},
                    "eval_accuracy", "eval_reward")

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Sample G completions of each of P prompts, and score them
        drawn = random.Random(f"{args.seed} {step}").sample(rows, min(args.num_prompts, len(rows)))
        batch, texts, ended = generate(policy, tokenizer, [row["prompt"] for row in drawn], G,
                                       args.max_new_tokens, args.temperature)
        of_each = with_ended([row for row in drawn for _ in range(G)], ended)
        prompts = [row["prompt"] for row in of_each]
        values = score(prompts, texts, of_each)
        if args.missing_eos_penalty is not None:
            values = [value if row["ended"] else -args.missing_eos_penalty
                      for value, row in zip(values, of_each, strict=True)]
        mask, (R, T) = batch.completion_mask, batch.completion_ids.shape

        # 2. Advantages of the tokens (R, T)
        if args.supervision == "outcome":
            rewards = torch.tensor(values, dtype=torch.float32, device=device)
            advantages = group_advantages(rewards, G, args.scale_by_std)[:, None].expand(R, T)
        else:
            rewards, ends = process_rewards(values, batch, tokenizer, args.step_separator)
            advantages = process_advantages(rewards, ends, T, G, args.scale_by_std)

        # 3. Log-probs under the reference, and under the policy that sampled. With one gradient
        #    step these are the training forward's own values (eq. 11): no extra pass.
        ref_logps, policy_logps = torch.zeros(2, R, T, device=device)
        fixed = (args.temperature, args.micro_batch_size, args.share_prompts)
        if args.beta:
            ref_logps = fixed_logps(ref, batch, *fixed)
        if updates > 1:
            policy_logps = fixed_logps(policy, batch, *fixed)

        # 4. Gradient steps, each on whole groups
        losses, grad_norm, clipped, kl_old = [], 0.0, 0.0, 0.0
        for _ in range(args.num_epochs):
            order = torch.randperm(len(drawn)) if updates > 1 else torch.arange(len(drawn))
            for groups in order.tensor_split(args.num_minibatches):
                index = (groups[:, None] * G + torch.arange(G)).flatten().to(device)
                weights = token_weights(mask[index], args.aggregate, args.max_new_tokens)
                loss = 0.0
                for i in range(0, len(index), args.micro_batch_size):
                    mb = index[i:i + args.micro_batch_size]
                    part = batch.rows(mb)
                    t = part.completion_ids.shape[1]  # the longest of these
                    logps = completion_logps(policy, part, args.temperature, args.share_prompts)
                    if updates == 1:
                        policy_logps[mb, :t] = logps.detach()
                    mb_loss, active = grpo_loss(
                        logps, policy_logps[mb, :t], ref_logps[mb, :t], advantages[mb, :t],
                        weights[i:i + args.micro_batch_size, :t], args.clip_eps,
                        args.clip_eps_high or args.clip_eps, args.beta, args.kl)
                    mb_loss.backward()
                    loss += mb_loss.item()
                    clipped += (active & part.completion_mask).sum().item()
                    kl_old += kl_estimate(policy_logps[mb, :t], logps.detach(), "k3").sum().item()
                lr = scheduler.get_last_lr()[0]
                norm = update(optimizer, scheduler, loss, args.max_grad_norm)
                grad_norm = max(grad_norm, norm)
                losses.append(loss)

        # 5. Log
        num_tokens = mask.sum().item()
        level = (advantages.reshape(len(drawn), -1) == 0).all(1)  # all rewards of a group equal
        metrics = {
            "reward": one_number(values).mean(), "reward_std": one_number(values).std(correction=0),
            "no_signal": level.float().mean(),
            "ended": ended.float().mean(), "completion_length": num_tokens / R,
            "entropy": -masked_mean(policy_logps, mask),  # E[-log pi], from the tokens sampled
            "loss": sum(losses) / updates, "grad_norm": grad_norm, "lr": lr,
            "clip_frac": clipped / num_tokens / args.num_epochs,
            "approx_kl": kl_old / num_tokens / args.num_epochs,
            "tokens_per_second": num_tokens / (time.time() - start)}
        if args.beta:
            kl = kl_estimate(policy_logps, ref_logps, "k1")
            metrics |= {"kl": kl.sum(1).mean(), "kl_per_token": masked_mean(kl, mask)}
        if gold:
            metrics["gold_reward"] = one_number(verifier(prompts, texts, of_each)).mean()
        run.log(metrics, "reward", "kl", "completion_length")
        run.samples(*(x[:args.log_samples] for x in (prompts, texts, values)))
        if step % args.eval_every == 0 or step == args.num_steps:
            report()
    run.finish(tokenizer, {"final": policy})

if __name__ == "__main__":
    main(parse_args(Args, TOY))
