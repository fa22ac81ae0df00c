"""REINFORCE with a baseline, and RLOO (Ahmadian et al. 2024, arXiv:2402.14740).

Read beside the RLHF Book (draft of January 2025; "Policy Gradient" in later editions):
    baseline_advantages   11.1.1 vanilla policy gradient, 11.1.2 REINFORCE: five baselines
    rloo_advantages       11.1.3 REINFORCE leave-one-out
    reward_to_go          11.1, the return of each token
    reinforce_loss        11.1.1, 11.1.2, the objective
    kl_estimate           8.1, in common.py

Differs from the print:
    1. 11.1.3 leaves one out of the batch; it is one out of the completions of the same prompt.
    2. 11.1 writes the return with two different indices. Here a token's return begins with its own
       reward.
    3. The mask keeps the EOS: the policy learns when to stop.

    python reinforce_rloo.py                                          # the toy, in two minutes
    python reinforce_rloo.py --baseline none
    python reinforce_rloo.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset math.jsonl

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
    output_dir: str = "runs/reinforce_rloo"  # folder of the run: metrics, curves, checkpoint, model
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
    prompts, completions, rows and returning a number for each; row["ended"]: not cut off"""
    reward_model: str = ""  # folder of a reward model, used in place of --reward
    missing_eos_penalty: float | None = None
    """minus this is the reward of a completion cut off (N+: 1); None: it is scored as it stands"""

    num_steps: int = 200  # steps, each on new completions
    num_prompts: int = 64  # P, prompts a step (RLOO: 512 completions)
    num_generations: int = 4  # G, completions a prompt (RLOO: 2 or 4)
    max_new_tokens: int = 256  # longest completion, in tokens
    temperature: float = 1.0  # of sampling, and of the log-probs
    micro_batch_size: int = 8  # completions a forward pass; changes the memory, not the gradient

    learning_rate: float = 1e-6  # peak of AdamW's (RLOO: 1e-6)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # linear, cosine: down to 0
    max_grad_norm: float = 1.0  # largest norm of the gradient; longer ones are scaled down to it
    baseline: Literal["none", "batch", "moving", "rloo", "remax"] = "rloo"
    """subtracted from the rewards: nothing; the mean of the step's; a moving average of earlier
    steps' means; the mean of the prompt's other completions; the score of its greedy completion"""
    moving_decay: float = 0.9  # of the moving average: its own share of the next one
    gamma: float = 1.0
    """discount a token; 1: the completion is one action, and all its tokens have its advantage"""
    beta: float = 0.05
    """weight of the KL (k1, summed over the completion) in the reward, before the baseline (RLOO:
    0.03 to 0.1); 0: no reference model is loaded"""

    eval_size: int = 64  # held-out prompts, at most a tenth of --dataset where from it; 0: none
    eval_every: int = 50  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 50  # steps between checkpoints
    log_samples: int = 4  # completions a step that go into samples.jsonl

TOY = dict(model="toy/model", dataset="toy/problems_train.jsonl",
           eval_dataset="toy/problems_test.jsonl", eval_size=500, eval_every=30, num_steps=60,
           num_prompts=32, num_generations=8, max_new_tokens=48, micro_batch_size=256,
           learning_rate=2e-4, lr_schedule="linear", beta=0.01)

# --- The algorithm --------------------------------------------------------------------------------

def rloo_advantages(rewards, num_generations):
    """Rewards (R,) of completions, prompt-major -> advantages (R,). Book 11.1.3.

    A_i = r_i - mean_{j != i} r_j over the completions of the same prompt.
    """
    groups = rewards.view(-1, num_generations)  # (P, G)
    others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - others).view(-1)

def baseline_advantages(rewards, num_generations, baseline, moving=0.0, greedy=None):
    """Rewards (R,), prompt-major -> advantages (R,): less a baseline. Book 11.1.1 to 11.1.3.

    No baseline depends on the completion that it judges (that of "batch" does, by 1/R: its
    gradient is (R - 1)/R of the others'), so none changes the expected gradient: E[grad log pi] is
    0. It changes the variance. moving: mean reward of earlier steps. greedy (P,): the score of each
    prompt's greedy completion (ReMax, arXiv:2310.10505).
    """
    if baseline == "rloo":
        return rloo_advantages(rewards, num_generations)
    return rewards - {"none": 0.0, "batch": rewards.mean(), "moving": moving,
                      "remax": greedy.repeat_interleave(num_generations)
                      if greedy is not None else None}[baseline]

def reward_to_go(advantages, mask, gamma):
    """Advantages (R,) of completions -> those of their tokens (R, T), 0 in padding. Book 11.1.

    G_t = sum_k gamma^k r_{t+k}, where only the last token has a reward: gamma^(tokens after t) r.
    """
    after = mask.sum(1, keepdim=True) - mask.cumsum(1)
    return advantages[:, None] * gamma**after * mask

def reinforce_loss(logps, advantages, mask):
    """All (R, T) -> loss: the mean over completions of -sum_t A_t log pi(y_t). Book 11.1.1, 11.1.2.

    The sum, not the mean, over tokens: a completion is one action, its log-prob that sum.
    """
    return -(advantages * logps * mask).sum(1).mean()

class MovingAverage:
    """Of the steps' mean rewards; 0 before the first."""
    def __init__(self, decay):
        self.decay, self.value, self.started = decay, 0.0, False

    def update(self, value):
        """Take one step's mean in; the first is the average."""
        share = self.decay if self.started else 0.0
        self.value, self.started = share * self.value + (1 - share) * value, True

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

def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for a --reward of yours
    G, device = args.num_generations, pick_device(args.device)
    if not args.temperature or (args.baseline == "rloo" and G < 2):
        stop(f"--num-generations {G} --temperature {args.temperature}: completions must be "
             "sampled, and with --baseline rloo at least 2 a prompt")
    verified = args.reward == "verifier" and not args.reward_model
    columns = ("prompt", "answer") if verified else ("prompt",)
    rows, eval_rows = load_splits(args, lambda path: load_rows(path, *columns))
    eval_rows = eval_rows[:args.eval_size]
    gold = not verified and has_answers(rows)  # the verifier looks on while another reward trains
    score = load_reward(args.reward, verifier, args.reward_model, device, args.dtype,
                        args.micro_batch_size)
    tokenizer = load_tokenizer(args.model)
    policy = load_model(AutoModelForCausalLM, args.model, device, args.dtype,
                        args.gradient_checkpointing)
    ref = load_model(AutoModelForCausalLM, args.model, device, args.dtype) if args.beta else None
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0,
                                  fused=True)
    scheduler = get_scheduler(args.lr_schedule, optimizer, 0, args.num_steps)
    moving = MovingAverage(args.moving_decay)
    run.begin({"policy": policy, "optimizer": optimizer, "scheduler": scheduler,
               "moving": moving}, args.num_steps)

    def score_ended(rows, texts, ended):
        values = score([row["prompt"] for row in rows], texts, with_ended(rows, ended))
        scores = torch.tensor(values, device=device)
        if args.missing_eos_penalty is not None:
            scores[~ended] = -args.missing_eos_penalty
        return scores

    def report():
        if eval_rows:
            values = greedy_rewards(policy, tokenizer, score, eval_rows, args.max_new_tokens,
                                    args.num_prompts * G)
            run.log({"eval_accuracy" if verified else "eval_reward": torch.tensor(values).mean()},
                    "eval_accuracy", "eval_reward")

    if run.step == 0:
        report()
    for step in run.steps():
        start = time.time()
        # 1. Sample G completions of each of P prompts, and score them
        drawn = random.Random(f"{args.seed} {step}").sample(rows, min(args.num_prompts, len(rows)))
        batch, texts, ended = generate(policy, tokenizer, [row["prompt"] for row in drawn], G,
                                       args.max_new_tokens, args.temperature)
        of_each = [row for row in drawn for _ in range(G)]
        prompts = [row["prompt"] for row in of_each]
        scores = score_ended(of_each, texts, ended)
        mask, (R, T) = batch.completion_mask, batch.completion_ids.shape

        # 2. Log-probs under the reference, and under the policy that sampled: the KL is part of the
        #    reward. Without it these are the training forward's own values: no extra pass.
        ref_logps, policy_logps = torch.zeros(2, R, T, device=device)
        if args.beta:
            fixed = (args.temperature, args.micro_batch_size, args.share_prompts)
            ref_logps = fixed_logps(ref, batch, *fixed)
            policy_logps = fixed_logps(policy, batch, *fixed)
        kl = kl_estimate(policy_logps, ref_logps, "k1")  # 0 in padding
        rewards = scores - args.beta * kl.sum(1)

        # 3. Advantages of completions (R,), and of their tokens (R, T)
        greedy, baselines = None, ["none", "batch", "moving"] + ["rloo"] * (G > 1)
        if args.baseline == "remax":
            asked, baselines = [row["prompt"] for row in drawn], [*baselines, "remax"]
            answers = generate(policy, tokenizer, asked, 1, args.max_new_tokens, temperature=0)
            greedy = score_ended(drawn, *answers[1:])
        by_baseline = {b: baseline_advantages(rewards, G, b, moving.value, greedy)
                       for b in baselines}
        advantages = reward_to_go(by_baseline[args.baseline], mask, args.gamma)
        moving.update(rewards.mean().item())

        # 4. One gradient step
        loss = 0.0
        for mb in batch.split(args.micro_batch_size):
            part = batch.rows(mb)
            t = part.completion_ids.shape[1]  # the longest of these
            logps = completion_logps(policy, part, args.temperature, args.share_prompts)
            policy_logps[mb, :t] = logps.detach()
            mb_loss = reinforce_loss(logps, advantages[mb, :t], part.completion_mask)
            mb_loss = mb_loss * len(mb) / R  # so that these add up to the mean over all R
            mb_loss.backward()
            loss += mb_loss.item()
        lr = scheduler.get_last_lr()[0]
        grad_norm = update(optimizer, scheduler, loss, args.max_grad_norm)

        # 5. Log
        num_tokens = mask.sum().item()
        metrics = {
            "reward": scores.mean(), "reward_std": scores.std(correction=0),
            "ended": ended.float().mean(), "completion_length": num_tokens / R,
            "entropy": -masked_mean(policy_logps, mask),  # E[-log pi], from the tokens sampled
            "loss": loss, "grad_norm": grad_norm, "lr": lr,
            # The weights of grad log pi: the gradient's variance grows with their mean square
            **{f"advantage_ms_{b}": (a**2).mean() for b, a in by_baseline.items()},
            "tokens_per_second": num_tokens / (time.time() - start)}
        if args.beta:
            metrics |= {"kl": kl.sum(1).mean(), "kl_per_token": masked_mean(kl, mask)}
        if gold:
            metrics["gold_reward"] = torch.tensor(verifier(prompts, texts, of_each)).mean()
        run.log(metrics, "reward", "kl", "completion_length")
        run.samples(*(x[:args.log_samples] for x in (prompts, texts, scores.tolist())))
        if step % args.eval_every == 0 or step == args.num_steps:
            report()
    run.finish(tokenizer, {"final": policy})

if __name__ == "__main__":
    main(parse_args(Args, TOY))
