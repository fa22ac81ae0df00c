"""REINFORCE with a baseline, and RLOO (Ahmadian et al. 2024, arXiv:2402.14740).

Sample completions, and raise the log-prob of each by how much better it is than a baseline; RLOO
(REINFORCE leave-one-out) compares it with the other completions of its prompt.

Read beside the RLHF Book, draft of January 2025 (the printed edition has chapter 11 as chapter 6
and chapter 8 as chapter 15):
    baseline_advantages   11.1.1 vanilla policy gradient, 11.1.2 REINFORCE: five baselines
    rloo_advantages       11.1.3 REINFORCE leave-one-out
    reward_to_go          11.1, the return of each token
    reinforce_loss        11.1.1, 11.1.2 the objective, and eq. 9
    kl_estimate           8.1, in common.py

How the code departs from the print:
    1. 11.1.3 leaves one out of the batch. It is one out of the completions of the same prompt.
    2. 11.1 writes the return with two different indices. Here a token's return begins with its own
       reward.
    3. 11.1.1 says that a baseline serves to "de-bias". It cannot: without one the gradient is not
       biased. It lowers the variance.
    4. The mask keeps the EOS (end of sequence) token: the policy learns when to stop.
    5. 11.2 scores only completions that reach an EOS, and leaves open what the others get. Here all
       are scored by default, as in Ahmadian et al.: see --missing-eos-penalty.

    python reinforce_rloo.py                                          # the toy, in a minute
    python reinforce_rloo.py --baseline none
    python reinforce_rloo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset math.jsonl

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
    deal_out,
    fixed_logps,
    generate,
    kl_estimate,
    masked_mean,
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

    output_dir: str = "runs/reinforce_rloo"
    """folder for metrics, samples, curves, checkpoint and final model"""
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
    completion; rows[i]["ended"] is False if completion i was cut off, and
    rows[i]["raw"] is its text with special tokens"""
    reward_model: str = ""  # folder or hub name of a reward model, used instead of --reward
    missing_eos_penalty: float | None = None
    """the reward of a completion that hits --max-new-tokens is set to minus this value (Huang et
    al. 2024: 1); None: score it like any other"""

    num_steps: int = 200  # number of steps, each on new completions
    num_prompts: int = 64  # P, prompts per step (Ahmadian et al.: 512 completions)
    num_generations: int = 4  # G, completions per prompt (Ahmadian et al.: 2 or 4)
    max_new_tokens: int = 256  # longest completion, in tokens
    generation_batch_size: int = 0
    """prompts whose completions are sampled at a time, to save memory; 0: all of a step. Another
    number gives other samples"""
    temperature: float = 1.0  # temperature of sampling, and of the log-probs

    micro_batch_size: int = 8  # completions per forward pass; changes memory, not the gradient
    learning_rate: float = 1e-6  # peak learning rate of AdamW (Ahmadian et al.: 1e-6)
    lora_rank: int = 0
    """rank of the adapters that are trained in place of the weights (LoRA), with about ten times
    the learning rate; 0: all weights are trained; see docs/models.md"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning-rate schedule; linear and cosine fall to 0"""
    max_grad_norm: float = 1.0  # maximum norm of the gradient; a larger one is scaled down to it
    baseline: Literal["none", "batch", "moving", "rloo", "remax"] = "rloo"
    """what is subtracted from the rewards: nothing; the mean of the step's rewards; a moving
    average of earlier steps' means; the mean of the prompt's other completions; the reward of the
    prompt's greedy completion (ReMax)"""
    moving_decay: float = 0.9  # share that the moving average keeps of itself at each step
    gamma: float = 1.0
    """discount per token; 1: the completion is one action, whose advantage all its tokens share"""
    beta: float = 0.05
    """weight of the KL (k1, summed over the completion) in the reward, before the baseline
    (Ahmadian et al.: 0.03 to 0.1); 0: no reference model is loaded"""

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
    num_generations=8,
    max_new_tokens=48,
    micro_batch_size=256,
    learning_rate=2e-4,
    lr_schedule="linear",
    beta=0.01,
    eval_size=500,
    eval_every=30,
)

# --- The algorithm --------------------------------------------------------------------------------


def rloo_advantages(rewards, num_generations):
    """Rewards (R,) of completions, prompt-major -> advantages (R,). Book 11.1.3.

    A_i = r_i - mean_{j != i} r_j over the completions of the same prompt: G / (G - 1) times r_i
    less the mean of all G.
    """
    groups = rewards.view(-1, num_generations)  # (P, G)
    mean_of_others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - mean_of_others).view(-1)


def baseline_advantages(rewards, num_generations, baseline, moving=0.0, greedy=None):
    """Rewards (R,), prompt-major -> advantages (R,): less a baseline. Book 11.1.1 to 11.1.3.

    A baseline that does not depend on the completion it judges changes no expected gradient, as
    E[grad log pi] = 0. It changes the variance. Only "batch" contains the completion's own reward,
    with weight 1/R: its expected gradient is (R - 1)/R times that of the others.
    moving: mean reward of earlier steps. greedy (P,): reward of each prompt's greedy completion
    (ReMax, arXiv:2310.10505).
    """
    if baseline == "none":
        return rewards
    if baseline == "batch":
        return rewards - rewards.mean()
    if baseline == "moving":
        return rewards - moving
    if baseline == "remax":
        return rewards - greedy.repeat_interleave(num_generations)
    return rloo_advantages(rewards, num_generations)


def reward_to_go(advantages, mask, gamma):
    """Advantages (R,) of completions -> those of their tokens (R, T), 0 in padding. Book 11.1.

    G_t = sum_k gamma^k r_{t+k}. Only the last token has a reward: gamma^(tokens after t) r. Here
    r is the advantage: the completion's reward less its baseline.
    """
    tokens_after = mask.sum(1, keepdim=True) - mask.cumsum(1)
    return advantages[:, None] * gamma**tokens_after * mask


def reinforce_loss(logps, advantages, mask):
    """All (R, T) -> loss: the mean over completions of -sum_t A_t log pi(y_t). Book 11.1.1, 11.1.2.

    The sum, not the mean, over tokens: a completion is one action, and its log-prob is that sum.
    """
    return -(advantages * logps * mask).sum(1).mean()


class MovingAverage:
    """Moving average of the steps' mean rewards: 0 before the first step, then that step's mean."""

    def __init__(self, decay):
        self.decay = decay
        self.value = 0.0
        self.started = False

    def update(self, value):
        """Take in the mean of one step."""
        if self.started:
            self.value = self.decay * self.value + (1 - self.decay) * value
        else:
            self.value = value
        self.started = True


# --- The task: change this for your own -----------------------------------------------------------


def verifier(prompts, completions, rows):
    """1.0 where the last number of the completion equals the row's `answer`, else 0.0."""
    rewards = []
    for text, row in zip(completions, rows, strict=True):
        rewards.append(float(last_number(text) == last_number(str(row["answer"]))))
    return rewards


# --- Training -------------------------------------------------------------------------------------


def check_args(args):
    """Stop where flags contradict each other."""
    if not args.temperature or (args.baseline == "rloo" and args.num_generations < 2):
        stop(
            f"--num-generations {args.num_generations} --temperature {args.temperature}: "
            "completions must be sampled, and with --baseline rloo at least 2 per prompt"
        )


def load_reference(policy, load_options, args):
    """The model that the KL is measured from: the policy as it began; None with --beta 0."""
    if not args.beta:
        return None
    return reference_of(policy) or hold_as_computed(load_model(*load_options))


def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for rewards that draw random numbers
    device = pick_device(args.device)
    rows, eval_rows = load_prompts(args)
    check_args(args)
    has_gold = not is_verified(args) and has_answers(rows)  # log the verifier beside the reward
    P = min(args.num_prompts, len(rows))
    G = args.num_generations
    model_options = (args.reward_model, device, args.dtype, args.micro_batch_size)
    score = load_reward(args.reward, verifier, *model_options, shard=args.shard)
    tokenizer = load_tokenizer(args.model)
    load_options = (AutoModelForCausalLM, args.model, device, args.dtype, args.shard)
    policy = load_model(*load_options, args.gradient_checkpointing, args.lora_rank)
    ref = load_reference(policy, load_options, args)
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens, args.show_rows)
    lr = args.learning_rate
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)
    scheduler = get_scheduler(args.lr_schedule, optimizer, 0, args.num_steps)
    moving = MovingAverage(args.moving_decay)
    parts = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler, "moving": moving}
    run.begin(parts, args.num_steps)
    run.describe(policy, len(rows), len(eval_rows), f"{P} prompts x {G} completions")

    def report():
        report_greedy(run, policy, tokenizer, score, eval_rows)

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Sample G completions of each of P prompts, and score them
        drawn = random.Random(f"{args.seed} {step}").sample(rows, P)
        asked = [row["prompt"] for row in drawn]
        sampling = dict(temperature=args.temperature, batch_size=args.generation_batch_size)
        batch, texts, ended = generate(policy, tokenizer, asked, G, args.max_new_tokens, **sampling)
        row_of_each = with_ended(drawn, ended, batch, tokenizer)
        prompts = [row["prompt"] for row in row_of_each]
        returned = score(prompts, texts, row_of_each)
        scores = one_number(returned).to(device)
        if args.missing_eos_penalty is not None:
            scores[~ended] = -args.missing_eos_penalty
        mask = batch.completion_mask
        R, T = mask.shape

        # 2. Log-probs under the reference, and under the policy that sampled: the KL is part of the
        #    reward. With --beta 0 the latter come from the training pass below: no extra pass.
        ref_logps = torch.zeros(R, T, device=device)
        policy_logps = torch.zeros(R, T, device=device)
        forward = (args.temperature, args.micro_batch_size, args.share_prompts)
        if args.beta:
            ref_logps = fixed_logps(ref, batch, *forward)
            policy_logps = fixed_logps(policy, batch, *forward)

        # 3. Rewards, and advantages of completions (R,) and of their tokens (R, T)
        kl = kl_estimate(policy_logps, ref_logps, "k1")  # 0 in padding
        rewards = scores - args.beta * kl.sum(1)
        baselines = ["none", "batch", "moving"]
        if G > 1:
            baselines.append("rloo")
        greedy_scores = None
        if args.baseline == "remax":
            baselines.append("remax")
            # Its reward has no KL in it: a baseline may be all that does not depend on the samples
            greedily = sampling | {"temperature": 0}
            greedy, answers, done = generate(
                policy, tokenizer, asked, 1, args.max_new_tokens, **greedily
            )
            greedy_rows = with_ended(drawn, done, greedy, tokenizer)
            greedy_scores = torch.tensor(score(asked, answers, greedy_rows), device=device)
            if args.missing_eos_penalty is not None:
                greedy_scores[~done] = -args.missing_eos_penalty
        by_baseline = {}
        for name in baselines:
            by_baseline[name] = baseline_advantages(rewards, G, name, moving.value, greedy_scores)
        advantages = reward_to_go(by_baseline[args.baseline], mask, args.gamma)
        moving.update(rewards.mean().item())

        # 4. One gradient step
        loss = torch.zeros((), device=device)
        for mb in deal_out(batch.split(args.micro_batch_size), args.shard):
            part = batch.rows(mb)
            t = part.completion_ids.shape[1]  # the longest of these
            logps = completion_logps(policy, part, args.temperature, args.share_prompts)
            if not args.beta:
                policy_logps[mb, :t] = logps.detach()
            mb_loss = reinforce_loss(logps, advantages[mb, :t], part.completion_mask)
            mb_loss = mb_loss * len(mb) / R  # so that these add up to the mean over all R
            mb_loss.backward()
            loss += mb_loss.detach()
        if not args.beta:
            add_up(policy_logps)
        loss = add_up(loss).item()
        add_up_gradients(policy)
        lr = scheduler.get_last_lr()[0]
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        check_finite(loss, grad_norm.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # 5. Log
        num_tokens = mask.sum().item()
        metrics = {
            "reward": scores.mean(),
            "reward_std": scores.std(correction=0),
            "ended": ended.float().mean(),
            "completion_length": num_tokens / R,
            "entropy": -masked_mean(policy_logps, mask),  # E[-log pi], from the sampled tokens
            "loss": loss,
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens_per_second": num_tokens / (time.time() - start),
        }
        for name, weights in by_baseline.items():
            # They weigh grad log pi: the gradient's variance grows with their mean square
            metrics[f"advantage_ms_{name}"] = (weights**2).mean()
        if args.beta:
            metrics |= {"kl": kl.sum(1).mean(), "kl_per_token": masked_mean(kl, mask)}
        if has_gold:
            metrics["gold_reward"] = torch.tensor(verifier(prompts, texts, row_of_each)).mean()
        run.log(metrics, "reward", "gold_reward", "kl", "completion_length")
        run.samples(prompts[::G], texts[::G], scores[::G].tolist())
        if step % args.eval_every == 0 or step == args.num_steps:
            report()
    run.finish(tokenizer, {"final": policy})


if __name__ == "__main__":
    run_script(main, Args, TOY)
