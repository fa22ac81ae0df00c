"""GRPO, group relative policy optimisation (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

Sample a group of completions for each prompt, and judge each by how much better it is than the mean
of its group: no critic.

Read beside the RLHF Book, draft of January 2025 (the printed edition has chapter 11 as chapter 6
and chapter 8 as chapter 15):
    group_advantages      11.1.5, eq. 10: outcome supervision
    process_advantages    11.1.5, the draft's TODO: process supervision (DeepSeekMath 4.1.3)
    token_weights         11.2.3, the mean over tokens, and two others
    clipped_losses        11.1.5, 11.2.3: the clipped ratio times the advantage
    grpo_loss             11.1.5 the objective, 11.2.3 the code, 11.2.2.1 eq. 11
    gspo_loss             one ratio per completion (Zheng et al. 2025, GSPO, arXiv:2507.18071)
    cispo_loss            a clipped weight of log pi (MiniMax-M1, CISPO, arXiv:2506.13585)
    groups_with_signal    dynamic sampling (DAPO, arXiv:2503.14476)
                          (the draft has neither this nor the two losses above it)
    kl_estimate           8.1, in common.py: its three forms and their gradients
    clip_frac, approx_kl  11.4; 11.2.3, the code; logged by main

How the code departs from the print:
    1. 11.2.3 prints r + beta KL and L_pg - beta KL. The KL is a cost: L_pg + beta KL.
    2. 11.2.1 calls the ratio a log-ratio to the reference model. It is the ratio pi / pi_old to the
       policy that generated the completions.
    3. 11.2.3 speaks of summed losses, and its code takes a mean. Here the mean over tokens is a sum
       with fixed weights, so that micro-batches add up to exactly the same gradient.
    4. The mask keeps the EOS (end of sequence) token: the policy learns when to stop.
    5. 11.2.3 has (difference)^2 / 2 for approx_kl. Here it is k3, which is unbiased.
    6. 11.2 scores only completions that reach an EOS, and leaves open what the others get. Here all
       are scored by default, as in DeepSeekMath: see --missing-eos-penalty.
    7. The 1e-4 added to the standard deviation of eq. 10 is from the code of 11.2.3.
    8. With several gradient steps on the same completions, the KL term has no importance weight.
    9. 11.1.5 and eq. 11 print the ratio of whole completions. Here, as in the code of 11.2.3, it is
       the ratio of each token.

    python grpo.py                                                     # the toy, in a minute
    python grpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset math.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import bisect
import functools
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
    fixed_logps,
    generate,
    kl_estimate,
    masked_mean,
    micro_batches,
)
from plumbing import (
    Run,
    check_finite,
    check_prompts,
    has_answers,
    hold_as_computed,
    is_verified,
    last_number,
    load_model,
    load_prompts,
    load_reward,
    load_tokenizer,
    one_number,
    pick_device,
    reference_of,
    report_greedy,
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

    output_dir: str = "runs/grpo"  # folder for metrics, samples, curves, checkpoint and final model
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

    reward: str = "verifier"
    """verifier: 1 if the last number of the completion is the row's `answer`, else 0; or
    FILE.py:function, which gets three lists (prompts, completions, rows) and returns one number per
    completion (a list of numbers with process supervision); rows[i]["ended"] is False if completion
    i was cut off, and rows[i]["raw"] is its text with special tokens"""
    reward_model: str = ""  # folder or hub name of a reward model, used instead of --reward
    missing_eos_penalty: float | None = None
    """the reward of a completion that hits --max-new-tokens is set to minus this value (Huang et
    al. 2024: 1); None: score it like any other"""
    supervision: Literal["outcome", "process"] = "outcome"
    """process: the reward gives each completion a list of numbers, one per step"""
    step_separator: str = r"\n"
    """text that ends a step with process supervision; blank ones do not count; \\n is a new line"""

    num_steps: int = 200  # number of steps, each on new completions
    num_prompts: int = 16  # P, prompts per step (DeepSeekMath: 16)
    num_generations: int = 8  # G, completions per prompt: the group of eq. 10 (DeepSeekMath: 64)
    oversample: int = 1
    """sample for this many times P prompts, and train on the first P groups whose rewards are not
    all equal (DAPO); where too few are left, others fill them up"""
    max_new_tokens: int = 256  # longest completion, in tokens (DeepSeekMath: 1024)
    generation_batch_size: int = 0
    """prompts whose completions are sampled at a time, to save memory; 0: all of a step. Another
    number gives other samples"""
    temperature: float = 1.0  # temperature of sampling, and of the log-probs

    num_epochs: int = 1  # passes over a step's completions, each in a new order (DeepSeekMath: 1)
    num_minibatches: int = 1
    """gradient steps per pass; with one gradient step in all, the ratio is 1 (eq. 11)"""
    micro_batch_size: int = 8  # completions per forward pass; changes memory, not the gradient
    learning_rate: float = 1e-6  # peak learning rate of AdamW (DeepSeekMath: 1e-6)
    lora_rank: int = 0
    """rank of the adapters that are trained in place of the weights (LoRA), with about ten times
    the learning rate; 0: all weights are trained; see docs/models.md"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning-rate schedule; linear and cosine fall to 0"""
    max_grad_norm: float = 1.0  # maximum norm of the gradient; a larger one is scaled down to it
    loss: Literal["grpo", "gspo", "cispo"] = "grpo"
    """grpo: the ratio of each token, clipped; gspo: one ratio per completion, the geometric mean of
    its tokens' (GSPO: --clip-eps 3e-4 --clip-eps-high 4e-4); cispo: log pi, weighed by each token's
    ratio, cut from above, without gradient (CISPO: --aggregate token)"""
    clip_eps: float = 0.2
    """epsilon: the ratio is clipped to 1 - epsilon .. 1 + epsilon; cispo has no lower bound"""
    clip_eps_high: float = 0.0
    """epsilon of the upper bound (DAPO: 0.28); 0: the same as --clip-eps"""
    beta: float = 0.04
    """weight of the KL in the loss (DeepSeekMath: 0.04); 0: no reference model is loaded"""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """estimator of the KL (DeepSeekMath: k3); gradients per token: k1 none on average, k2 that of
    KL(pi || ref), k3 that of KL(ref || pi)"""
    scale_by_std: bool = True
    """divide advantages by the group's standard deviation; Dr. GRPO (arXiv:2503.20783) does not"""
    aggregate: Literal["sequence", "token", "constant"] = "sequence"
    """sequence: mean over a completion's tokens, then over completions (DeepSeekMath); token: one
    mean over all tokens of the minibatch (DAPO); constant: sum over tokens divided by
    --max-new-tokens (Dr. GRPO)"""

    eval_size: int = 64
    """number of held-out prompts; without --eval-dataset they are taken from --dataset, at most a
    tenth of it; 0: no evaluation"""
    eval_every: int = 50  # steps between evaluations; also before the first and after the last step
    checkpoint_every: int = 50  # steps between checkpoints
    log_samples: int = 4
    """completions per step (of different prompts), and held-out answers per evaluation, that are
    written to samples.jsonl"""


TOY = dict(
    model="toy/model",
    dataset="toy/problems_train.jsonl",
    eval_dataset="toy/problems_test.jsonl",
    num_steps=60,
    num_prompts=32,
    max_new_tokens=48,
    micro_batch_size=256,
    learning_rate=2e-4,
    lr_schedule="linear",
    beta=0.01,
    eval_size=500,
    eval_every=30,
)

# --- The algorithm --------------------------------------------------------------------------------


def group_advantages(rewards, num_generations, scale_by_std=True):
    """Rewards (R,) of completions, prompt-major -> advantages (R,). Book 11.1.5, eq. 10.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4) over the group of one prompt, with the sample's standard
    deviation (G - 1). Without the division: Dr. GRPO.
    """
    groups = rewards.view(-1, num_generations)  # (P, G)
    # Counted from the first reward, equal rewards give exactly 0, not rounding noise over 1e-4
    groups = groups - groups[:, :1]
    advantages = groups - groups.mean(1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.view(-1)


def process_advantages(rewards, ends, num_tokens, num_generations, scale_by_std=True):
    """Step rewards (R, S) and the tokens at which the steps end (R, S), -1 for no step -> (R, T).

    A step's reward is normalised by the mean and the standard deviation of all steps of all
    completions of its group. The advantage of token t is the sum over the steps that end at t or
    later; an EOS after the last separator gets 0. DeepSeekMath 4.1.3.
    """
    is_step = ends >= 0
    normalised = torch.zeros_like(rewards)
    for start in range(0, len(rewards), num_generations):  # the completions of one prompt
        group = slice(start, start + num_generations)
        steps = rewards[group][is_step[group]]  # (number of steps in the group,)
        if len(steps) == 0:
            continue
        steps = steps - steps[0]  # equal rewards give exactly 0, as above
        centred = steps - steps.mean()
        if scale_by_std and len(steps) > 1:
            centred = centred / (steps.std() + 1e-4)
        normalised[group][is_step[group]] = centred  # group is a slice: this writes into the view
    tokens = torch.arange(num_tokens, device=ends.device)
    ends_later = ends[:, :, None] >= tokens  # (R, S, T)
    return (normalised[:, :, None] * ends_later).sum(1)


def token_weights(mask, aggregate, max_len):
    """Completion mask (R, T) -> weights (R, T): the loss is the sum of weights * per_token_loss.

    Book 11.2.3 (sequence), DAPO (token), Dr. GRPO (constant).
    """
    R = len(mask)
    if aggregate == "sequence":  # 1/R sum_i 1/|y_i| sum_t
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / R
    if aggregate == "token":  # 1/(sum_i |y_i|) sum_i sum_t
        return mask / mask.sum()
    return mask / max_len / R  # 1/R sum_i 1/L sum_t, L the same for all


def clipped_losses(ratio, advantages, clip_eps, clip_eps_high):
    """Ratios (R, T) or (R, 1), advantages (R, T) -> losses of the tokens, where the clip is active.

    -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A). Book 11.1.5; the code of 11.2.3.
    """
    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps_high)
    return torch.max(pg_losses1, pg_losses2), pg_losses2 > pg_losses1


def grpo_loss(logps, old_logps, ref_logps, advantages, weights, clip_eps, clip_eps_high, beta, kl):
    """All tensors (R, T) -> loss, and where the clip is active (R, T). Book 11.1.5, 11.2.3.

    Per token: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + beta KL, with ratio = pi / pi_old.
    With old_logps = logps.detach() the ratio is 1 and its gradient that of log pi: eq. 11.
    Losses of micro-batches add up when the weights are those of the whole minibatch.
    """
    ratio = torch.exp(logps - old_logps)
    per_token_loss, is_clipped = clipped_losses(ratio, advantages, clip_eps, clip_eps_high)
    if beta:
        per_token_loss = per_token_loss + beta * kl_estimate(logps, ref_logps, kl)
    return (weights * per_token_loss).sum(), is_clipped


def gspo_loss(logps, old_logps, ref_logps, advantages, weights, clip_eps, clip_eps_high, beta, kl):
    """As `grpo_loss`, with one ratio per completion (GSPO, Zheng et al. 2025, arXiv:2507.18071).

    s = exp(mean over the completion's tokens of log pi - log pi_old), the paper's eq. 7, in place
    of the ratio of each token; where it is clipped, the whole completion is. With --aggregate
    sequence the loss is the paper's eq. 5.
    The weights must be 0 in padding, and nowhere else.
    """
    log_ratio = masked_mean(logps - old_logps, weights > 0, dim=1)
    ratio = torch.exp(log_ratio)[:, None]  # (R, 1)
    per_token_loss, is_clipped = clipped_losses(ratio, advantages, clip_eps, clip_eps_high)
    if beta:
        per_token_loss = per_token_loss + beta * kl_estimate(logps, ref_logps, kl)
    return (weights * per_token_loss).sum(), is_clipped


def cispo_loss(logps, old_logps, ref_logps, advantages, weights, clip_eps, clip_eps_high, beta, kl):
    """As `grpo_loss`: the ratio only weighs log pi (CISPO, MiniMax-M1 2025, arXiv:2506.13585).

    Per token: -sg(min(ratio, 1 + eps_high)) A log pi + beta KL, where sg stops the gradient. Where
    the ratio is 1, the gradient is that of `grpo_loss`. A clipped token keeps its gradient here,
    and loses it in `grpo_loss`. The authors set their lower bound so low that it never binds; here
    there is none, and clip_eps, which all three losses are given, is not used.
    """
    ratio = torch.exp(logps - old_logps).detach()
    weight = ratio.clamp(max=1 + clip_eps_high)
    per_token_loss = -weight * advantages * logps
    if beta:
        per_token_loss = per_token_loss + beta * kl_estimate(logps, ref_logps, kl)
    return (weights * per_token_loss).sum(), ratio > weight


LOSSES = {"grpo": grpo_loss, "gspo": gspo_loss, "cispo": cispo_loss}


def groups_with_signal(scores, num_generations, num_groups):
    """Rewards (R,), prompt-major -> long (num_groups * G,): the completions of the first groups
    whose rewards are not all equal. DAPO (Yu et al. 2025, arXiv:2503.14476, its eq. 11).

    Where there are fewer such groups, the first of the others fill them up: a batch keeps its size,
    and a token its weight. They have no advantage, and move the policy by the KL alone. DAPO
    samples until its batch is full; this takes what was sampled.
    """
    groups = scores.view(-1, num_generations)
    is_silent = (groups == groups[:, :1]).all(1)
    # A stable sort puts those with a signal first, and keeps the order in which they were drawn
    chosen = is_silent.long().argsort(stable=True)[:num_groups].sort().values
    members = torch.arange(num_generations, device=scores.device)
    return (chosen[:, None] * num_generations + members).flatten()


def minibatches(num_groups, num_generations, num_epochs, num_minibatches, device="cpu"):
    """Yield the completions of each gradient step: long tensors of places, in whole groups.

    A new order in each epoch. With one gradient step in all the order does not matter.
    """
    for _ in range(num_epochs):
        if num_epochs * num_minibatches > 1:
            order = torch.randperm(num_groups)
        else:
            order = torch.arange(num_groups)
        for groups in order.tensor_split(num_minibatches):
            members = groups[:, None] * num_generations + torch.arange(num_generations)
            yield members.flatten().to(device)


# --- The task: change this for your own -----------------------------------------------------------


def verifier(prompts, completions, rows):
    """1.0 where the last number of the completion equals the row's `answer`, else 0.0."""
    rewards = []
    for text, row in zip(completions, rows, strict=True):
        rewards.append(float(last_number(text) == last_number(str(row["answer"]))))
    return rewards


# --- Process supervision: where the steps are -----------------------------------------------------


def step_ends(ids, separator, decode):
    """Ids of a completion -> place of the last token of each step that is not blank.

    Steps are parts of the text, and may end within a token. The token is found by bisection: the
    first with which the text decoded so far reaches the end of the separator. decode: ids -> text.
    """

    def characters(i):
        return len(decode(ids[: i + 1]).rstrip("\ufffd"))  # half a character is none yet

    ends = []
    end = 0  # of a step, in characters
    steps = decode(ids).split(separator)
    for step in steps[:-1]:
        end += len(step + separator)
        if step.strip():
            place = bisect.bisect_left(range(len(ids)), end, key=characters)
            ends.append(min(place, len(ids) - 1))
    if steps[-1].strip():  # what has no separator after it ends with the completion
        ends.append(len(ids) - 1)
    return ends


def process_rewards(values, batch, tokenizer, separator):
    """R lists of step rewards -> rewards (R, S), and where the steps end (R, S), -1 for no step.

    Raises ValueError where a completion has another number of steps than of rewards.
    """
    most = max([1, *map(len, values)])
    rewards = torch.zeros(len(values), most)
    ends = torch.full((len(values), most), -1)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    for i, step_rewards in enumerate(values):
        ids = batch.completion_ids[i, batch.completion_mask[i]].tolist()
        places = step_ends(ids, separator, decode)
        if len(places) != len(step_rewards):
            stop(
                f"the reward gave {len(step_rewards)} numbers for the {len(places)} steps, by "
                f"--step-separator, of {decode(ids)[:80]!r}"
            )
        rewards[i, : len(places)] = torch.tensor(step_rewards)
        ends[i, : len(places)] = torch.tensor(places)
    return rewards.to(batch.prompt_of.device), ends.to(batch.prompt_of.device)


# --- Training -------------------------------------------------------------------------------------


def add_policy_grad(policy, batch, index, policy_logps, ref_logps, advantages, weights, args):
    """Add the gradient of the loss of a minibatch, a micro-batch at a time.

    -> loss, number of clipped tokens, sum over tokens of the approximate KL. policy_logps (R, T):
    the log-probs of sampling. With one gradient step in all they are those of this pass (eq. 11),
    and are written there.
    """
    totals = torch.zeros(3, device=policy.device)  # loss, clipped tokens, approximate KL
    clips = (args.clip_eps, args.clip_eps_high or args.clip_eps)
    is_only_step = args.num_epochs * args.num_minibatches == 1
    for mb in deal_out(micro_batches(index, args.micro_batch_size), args.shard):
        part = batch.rows(mb)
        t = part.completion_ids.shape[1]  # the longest of these
        logps = completion_logps(policy, part, args.temperature, args.share_prompts)
        if is_only_step:
            policy_logps[mb, :t] = logps.detach()
        old_logps = policy_logps[mb, :t]
        fixed = (old_logps, ref_logps[mb, :t], advantages[mb, :t], weights[mb, :t])
        mb_loss, is_clipped = LOSSES[args.loss](logps, *fixed, *clips, args.beta, args.kl)
        mb_loss.backward()
        clipped = (is_clipped & part.completion_mask).sum()
        approx_kl = kl_estimate(old_logps, logps.detach(), "k3").sum()
        totals += torch.stack([mb_loss.detach(), clipped, approx_kl])
    if is_only_step:
        add_up(policy_logps)
    return add_up(totals).tolist()


def check_args(args, num_rows):
    """Stop where flags contradict each other."""
    if args.num_minibatches > min(args.num_prompts, num_rows):
        stop(f"--num-minibatches {args.num_minibatches}: more than there are groups in a step")
    if args.num_generations < 2 or not args.temperature:
        stop(
            f"--num-generations {args.num_generations} --temperature {args.temperature}: a group "
            "needs at least 2 sampled completions, to be compared with each other"
        )
    if args.supervision == "process" and not args.step_separator:
        stop("--step-separator is empty: --supervision process needs a text that ends each step")
    if args.missing_eos_penalty is not None and args.supervision == "process":
        stop("--missing-eos-penalty is one number per completion: not with --supervision process")
    if args.loss == "gspo" and args.supervision == "process":
        stop("--loss gspo has one ratio per completion: not with --supervision process")
    if args.oversample > 1 and args.supervision == "process":
        stop("--oversample compares one number per completion: not with --supervision process")


def load_reference(policy, load_options, args):
    """The model that the KL is measured from: the policy as it began; None with --beta 0."""
    if not args.beta:
        return None
    return reference_of(policy) or hold_as_computed(load_model(*load_options))


def main(args: Args):
    # A shell passes \n as two characters
    args.step_separator = args.step_separator.replace("\\n", "\n")
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for rewards that draw random numbers
    device = pick_device(args.device)
    rows, eval_rows = load_prompts(args)
    check_args(args, len(rows))
    has_gold = not is_verified(args) and has_answers(rows)  # log the verifier beside the reward
    P = min(args.num_prompts, len(rows))
    G = args.num_generations
    by_step = args.supervision == "process"
    model_options = (args.reward_model, device, args.dtype, args.micro_batch_size)
    score = load_reward(args.reward, verifier, *model_options, by_step, args.shard)
    tokenizer = load_tokenizer(args.model)
    load_options = (AutoModelForCausalLM, args.model, device, args.dtype, args.shard)
    policy = load_model(*load_options, args.gradient_checkpointing, args.lora_rank)
    ref = load_reference(policy, load_options, args)
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens, args.show_rows)
    lr = args.learning_rate
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)
    updates = args.num_epochs * args.num_minibatches  # gradient steps per step of the loop
    scheduler = get_scheduler(args.lr_schedule, optimizer, 0, args.num_steps * updates)
    run.begin({"policy": policy, "optimizer": optimizer, "scheduler": scheduler}, args.num_steps)
    run.describe(policy, len(rows), len(eval_rows), f"{P} prompts x {G} completions")

    def report():
        report_greedy(run, policy, tokenizer, score, eval_rows)

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Sample G completions of each of P prompts, and score them
        num_drawn = min(P * args.oversample, len(rows))
        drawn = random.Random(f"{args.seed} {step}").sample(rows, num_drawn)
        asked = [row["prompt"] for row in drawn]
        sampling = dict(temperature=args.temperature, batch_size=args.generation_batch_size)
        batch, texts, ended = generate(policy, tokenizer, asked, G, args.max_new_tokens, **sampling)
        row_of_each = with_ended(drawn, ended, batch, tokenizer)
        prompts = [row["prompt"] for row in row_of_each]
        returned = score(prompts, texts, row_of_each)
        scores = one_number(returned).to(device)
        if args.missing_eos_penalty is not None:
            scores[~ended] = -args.missing_eos_penalty
        kept = groups_with_signal(scores, G, P)  # all, without --oversample
        batch = batch.rows(kept)
        mask = batch.completion_mask
        R, T = mask.shape

        # 2. Log-probs under the reference, and under the policy that sampled. With one gradient
        #    step the latter come from the training pass below (eq. 11): no extra pass.
        ref_logps = torch.zeros(R, T, device=device)
        policy_logps = torch.zeros(R, T, device=device)
        forward = (args.temperature, args.micro_batch_size, args.share_prompts)
        if args.beta:
            ref_logps = fixed_logps(ref, batch, *forward)
        if updates > 1:
            policy_logps = fixed_logps(policy, batch, *forward)

        # 3. Advantages of the tokens (R, T)
        if by_step:
            step_rewards, ends = process_rewards(returned, batch, tokenizer, args.step_separator)
            advantages = process_advantages(step_rewards, ends, T, G, args.scale_by_std)
        else:
            advantages = group_advantages(scores[kept], G, args.scale_by_std)
            advantages = advantages[:, None].expand(R, T)

        # 4. Gradient steps, each on whole groups
        losses, grad_norms = [], []
        num_clipped, sum_approx_kl = 0, 0.0
        for index in minibatches(P, G, args.num_epochs, args.num_minibatches, device):
            weights = torch.zeros(R, T, device=device)
            weights[index] = token_weights(mask[index], args.aggregate, args.max_new_tokens)
            fixed = (policy_logps, ref_logps, advantages, weights)
            loss, clipped, sum_kl = add_policy_grad(policy, batch, index, *fixed, args)
            num_clipped += clipped
            sum_approx_kl += sum_kl
            add_up_gradients(policy)
            lr = scheduler.get_last_lr()[0]
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            check_finite(loss, grad_norm.item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss)
            grad_norms.append(grad_norm.item())

        # 5. Log
        num_tokens = mask.sum().item()
        has_no_signal = (advantages.reshape(P, -1) == 0).all(1)  # all rewards of a group equal
        metrics = {
            "reward": scores.mean(),
            "reward_std": scores.std(correction=0),
            "no_signal": has_no_signal.float().mean(),
            "ended": ended.float().mean(),
            "completion_length": num_tokens / R,
            "entropy": -masked_mean(policy_logps, mask),  # E[-log pi], from the sampled tokens
            "loss": sum(losses) / updates,
            "grad_norm": max(grad_norms),
            "lr": lr,
            "clip_frac": num_clipped / num_tokens / args.num_epochs,
            "approx_kl": sum_approx_kl / num_tokens / args.num_epochs,
            "tokens_per_second": num_tokens / (time.time() - start),
        }
        if args.beta:
            kl = kl_estimate(policy_logps, ref_logps, "k1")
            metrics |= {"kl": kl.sum(1).mean(), "kl_per_token": masked_mean(kl, mask)}
        if has_gold:
            metrics["gold_reward"] = torch.tensor(verifier(prompts, texts, row_of_each)).mean()
        run.log(metrics, "reward", "gold_reward", "kl", "completion_length")
        shown = returned if by_step else scores.tolist()
        run.samples(prompts[::G], texts[::G], shown[::G])
        if step % args.eval_every == 0 or step == args.num_steps:
            report()
    run.finish(tokenizer, {"final": policy})


if __name__ == "__main__":
    run_script(main, Args, TOY)
