"""PPO, proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), for language models.

Read beside the RLHF Book (draft of January 2025; "Policy Gradient" in later editions):
    token_rewards         8.1, the KL in the reward (kl_estimate in common.py)
    gae                   11.1.4 and 11.2.2, advantages (Schulman et al. 2015, arXiv:1506.02438)
    ppo_policy_loss       11.1.4 the objective, 11.2.2 the code, 11.2.2.1 eq. 11
    ppo_value_loss        11.2.2
    ptx_loss              8.2, pretraining gradients
    AdaptiveKLController  11.3 (Ziegler et al. 2019, arXiv:1909.08593)
    clip_frac, approx_kl  11.4; 11.2.2, the code

Differs from the print:
    1. 11.2.1 calls the ratio one to the reference model. It is one to the policy that sampled.
    2. 11.2.2 takes reward - value as the advantage, without a return, regresses the value on the
       reward, and takes means over padding and then over completions. Here: GAE, returns, and one
       mean over all tokens that the mask has. The clip of the value is from the PPO code, not 11.2.
    3. 11.2.2 has (difference)^2 / 2 for approx_kl. Here it is k3: unbiased.
    4. The value of token t is read before it: a baseline that has seen the token is biased.

    python ppo.py                                                      # the toy, in two minutes
    python ppo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset math.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py.
"""
import random
import re
import time
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, get_scheduler)

from common import (Batch, Run, check_prompts, completion_logps, completion_scores, fixed_logps,
                    generate, greedy_rewards, has_answers, kl_estimate, load_model, load_reward,
                    load_rows, load_splits, load_tokenizer, masked_mean, pad, parse_args,
                    pick_device, stop, update, with_ended)

@dataclass
class Args:
    model: str  # policy to train: a folder or a name on the hub
    dataset: str  # JSON Lines or owner/name:split of the hub: `prompt`, and `answer` if verified
    eval_dataset: str = ""  # held-out rows of the same form; else --eval-size prompts of --dataset
    output_dir: str = "runs/ppo"  # folder of the run: metrics, curves, checkpoint, final model
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
    critic_model: str = ""  # the critic's start; empty: --reward-model, or the policy, its head 0
    missing_eos_penalty: float | None = 1.0
    """minus this is the reward of a completion cut off (N+: 1); None: it is scored as it stands"""

    num_steps: int = 200  # steps, each on new completions
    num_prompts: int = 64  # P, prompts a step (N+: 512)
    num_generations: int = 1  # G, completions a prompt
    max_new_tokens: int = 256  # longest completion, in tokens
    temperature: float = 1.0  # of sampling, and of the log-probs (N+: 0.7)
    num_epochs: int = 4  # passes over a step's completions, in a new order each (N+: 4)
    num_minibatches: int = 1  # gradient steps a pass; where there is one in all, the ratio is 1
    micro_batch_size: int = 8  # completions a forward pass; changes the memory, not the gradient

    learning_rate: float = 3e-6  # peak of the policy's AdamW, eps 1e-5 (N+: 3e-6)
    critic_learning_rate: float = 3e-6  # the same of the critic
    critic_warmup: int = 0  # first steps, in which only the critic learns
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # linear, cosine: down to 0
    max_grad_norm: float = 1.0  # largest norm of the gradient; longer ones are scaled down to it
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # lambda of GAE: 1 Monte Carlo returns, 0 one-step TD (N+: 0.95)
    whiten_advantages: bool = True  # give the advantages of a step's tokens mean 0 and variance 1
    clip_eps: float = 0.2  # epsilon: the ratio is clipped to 1 - eps .. 1 + eps
    clip_eps_value: float = 0.2
    """how far a value may leave the rollout's before its loss is clipped"""
    vf_coef: float = 0.1  # of the value loss (N+: 0.1); felt by --max-grad-norm, not by Adam
    beta: float = 0.05  # weight of the KL (k1, a token) in the reward (N+: 0.05); 0: no reference
    kl_target: float = 0.0  # nats a completion to which beta adapts (Ziegler: 6); 0: beta is fixed
    kl_horizon: float = 10000.0  # completions in which beta changes 1.2-fold at most (Ziegler: 1e4)
    pretrain_dataset: str = ""  # JSON Lines with `text`, for --ptx-coef
    ptx_coef: float = 0.0  # weight of the pretraining loss, a mean over tokens (InstructGPT: 27.8)
    ptx_batch_size: int = 8  # texts a gradient step, each cut to --max-new-tokens

    eval_size: int = 64  # held-out prompts, at most a tenth of --dataset where from it; 0: none
    eval_every: int = 50  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 50  # steps between checkpoints
    log_samples: int = 4  # completions a step that go into samples.jsonl

TOY = dict(model="toy/model", dataset="toy/problems_train.jsonl",
           eval_dataset="toy/problems_test.jsonl", eval_size=500, eval_every=20, num_steps=40,
           num_prompts=256, num_epochs=2, num_minibatches=2, max_new_tokens=48,
           micro_batch_size=128, learning_rate=2e-4, critic_learning_rate=1e-3,
           lr_schedule="linear", beta=0.01)

# --- The algorithm --------------------------------------------------------------------------------

def token_rewards(scores, kl, mask, beta):
    """Scores (R,) of completions and the KL (R, T) of their tokens -> rewards (R, T). Book 8.1.

    -beta KL at every token, and the score at the last, which ended the completion or was cut off
    after: never at padding.
    """
    last = mask & (mask.sum(1, keepdim=True) == mask.cumsum(1))
    return (scores[:, None] * last - beta * kl) * mask

def gae(rewards, values, mask, gamma, lam):
    """Rewards and values (R, T) -> advantages, returns (R, T), 0 in padding. Book 11.1.4.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = sum_l (gamma lam)^l delta_{t+l}, return = A + V.
    V_t is the value before token t; after the last token there is none: 0.
    """
    values = values * mask  # so that V is 0 after the last token
    advantages, later = torch.zeros_like(values), 0.0
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        advantages[:, t] = later
    return advantages, advantages + values

def whiten(x, mask):
    """x (R, T) with mean 0 and variance 1 over the mask; 0 in padding."""
    x = x - masked_mean(x, mask)
    return x * (masked_mean(x**2, mask) + 1e-8).rsqrt() * mask

def ppo_policy_loss(logps, old_logps, advantages, weights, clip_eps):
    """All (R, T) -> loss, and where the clip is active (R, T). Book 11.1.4, 11.2.2.

    Per token: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = pi / pi_old.
    With old_logps = logps.detach(), the ratio is 1 and its gradient that of log pi: eq. 11.
    weights: mask / its sum over the whole minibatch, so that micro-batches add up.
    """
    ratio = torch.exp(logps - old_logps)
    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return (weights * torch.max(pg_losses1, pg_losses2)).sum(), pg_losses2 > pg_losses1

def ppo_value_loss(values, old_values, returns, weights, clip_eps_value):
    """All (R, T) -> loss. Book 11.2.2: 0.5 max((V - R)^2, (clip(V, V_old +- eps) - R)^2)."""
    clipped = old_values + (values - old_values).clamp(-clip_eps_value, clip_eps_value)
    return 0.5 * (weights * torch.max((values - returns)**2, (clipped - returns)**2)).sum()

def ptx_loss(logps, mask):
    """Log-probs (N, T) of pretraining text -> loss: -log pi, the mean over tokens. Book 8.2."""
    return -masked_mean(logps, mask)

def explained_variance(values, returns, mask):
    """1 - Var(return - V) / Var(return) over the mask: 1 for a perfect critic, 0 for a constant."""
    return 1 - (returns - values)[mask].var() / returns[mask].var().clamp(min=1e-8)

class AdaptiveKLController:
    """beta, moved so that the KL comes to target. Book 11.3; Ziegler et al. 2019, 2.2."""
    def __init__(self, beta, target, horizon):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl, num_completions):
        """kl: nats a completion, the mean over these. Without a target beta stays."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * num_completions / self.horizon

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

def load_critic(args, tokenizer, device):
    """A reward model's class, of which every token is read, not the last; its head is 0 where there
    was none."""
    path = args.critic_model or args.reward_model or args.model
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        stop(f"{path} has another vocabulary than the policy: give a --critic-model that has it")
    load = path, device, args.dtype, args.gradient_checkpointing, False, 1
    critic = load_model(AutoModelForSequenceClassification, *load)
    if "ForTokenClassification" in str(critic.config.architectures):  # an outcome reward model,
        critic = load_model(AutoModelForTokenClassification, *load)  # whose head has a bias
    if critic.has_new_head:
        critic.score.weight.data.zero_()
        critic.config.reward_bias = 0.0
    return critic

@torch.no_grad()
def fixed_values(critic, batch, micro_batch_size, share_prompts):
    """Values before each completion token, without gradient, in micro-batches -> (R, T)."""
    values = torch.zeros_like(batch.completion_ids, dtype=torch.float32)
    for mb in batch.split(micro_batch_size):
        part = completion_scores(critic, batch.rows(mb), share_prompts, before=True)[..., 0]
        values[mb, :part.shape[1]] = part
    return values * batch.completion_mask

def encode_texts(tokenizer, texts, max_length):
    """Texts -> Batch with the first token of each as its prompt, the next ones as completion."""
    ids, mask = pad([tokenizer(text)["input_ids"][:max_length] for text in texts], "right")
    return Batch(ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:], torch.arange(len(ids)))

def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for a --reward of yours
    G, device = args.num_generations, pick_device(args.device)
    if not args.temperature:
        stop("--temperature 0: completions must be sampled")
    if args.kl_target and not args.beta:
        stop("--kl-target needs a --beta to begin with: it adapts by factors")
    verified = args.reward == "verifier" and not args.reward_model
    columns = ("prompt", "answer") if verified else ("prompt",)
    rows, eval_rows = load_splits(args, lambda path: load_rows(path, *columns))
    eval_rows = eval_rows[:args.eval_size]
    if args.num_minibatches > min(args.num_prompts, len(rows)) * G:
        stop(f"--num-minibatches {args.num_minibatches}: more than there are completions in a step")
    gold = not verified and has_answers(rows)  # the verifier looks on while another reward trains
    score = load_reward(args.reward, verifier, args.reward_model, device, args.dtype,
                        args.micro_batch_size)
    tokenizer = load_tokenizer(args.model)
    pretrain_texts = [row["text"] for row in load_rows(args.pretrain_dataset, "text")
                      if len(tokenizer(row["text"])["input_ids"]) > 1] if args.ptx_coef else []
    if args.ptx_coef and not pretrain_texts:
        stop(f"{args.pretrain_dataset}: no text has two tokens, one to be predicted from the other")
    load = device, args.dtype, args.gradient_checkpointing
    policy = load_model(AutoModelForCausalLM, args.model, *load)
    ref = load_model(AutoModelForCausalLM, args.model, *load[:2]) if args.beta else None
    critic = load_critic(args, tokenizer, device)
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens)
    updates = args.num_epochs * args.num_minibatches  # gradient steps on the same completions
    optimizer, critic_optimizer = (
        torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-5, weight_decay=0.0, fused=True)
        for model, lr in ((policy, args.learning_rate), (critic, args.critic_learning_rate)))
    total, warm_up = (n * updates for n in (args.num_steps, args.critic_warmup))
    scheduler = get_scheduler(args.lr_schedule, optimizer, 0, max(1, total - warm_up))
    critic_scheduler = get_scheduler(args.lr_schedule, critic_optimizer, 0, total)
    controller = AdaptiveKLController(args.beta, args.kl_target, args.kl_horizon)
    run.begin({"policy": policy, "optimizer": optimizer, "scheduler": scheduler, "critic": critic,
               "critic_optimizer": critic_optimizer, "critic_scheduler": critic_scheduler,
               "controller": controller}, args.num_steps)

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
        of_each = with_ended([row for row in drawn for _ in range(G)], ended)
        prompts = [row["prompt"] for row in of_each]
        scores = torch.tensor(score(prompts, texts, of_each), device=device)
        if args.missing_eos_penalty is not None:
            scores[~ended] = -args.missing_eos_penalty
        mask, (R, T) = batch.completion_mask, batch.completion_ids.shape

        # 2. Log-probs under the reference, and under the policy that sampled. With one gradient
        #    step and no KL these are the training forward's own values (eq. 11): no extra pass.
        ref_logps, policy_logps = torch.zeros(2, R, T, device=device)
        fixed = (args.temperature, args.micro_batch_size, args.share_prompts)
        if args.beta:
            ref_logps = fixed_logps(ref, batch, *fixed)
        if args.beta or updates > 1 or step <= args.critic_warmup:
            policy_logps = fixed_logps(policy, batch, *fixed)
        kl, beta = kl_estimate(policy_logps, ref_logps, "k1"), controller.beta  # 0 in padding

        # 3. Rewards, values, advantages and returns of the tokens (R, T)
        rewards = token_rewards(scores, kl, mask, beta)
        old_values = fixed_values(critic, batch, args.micro_batch_size, args.share_prompts)
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
        if args.whiten_advantages:  # not before the returns: the critic learns those as they are
            advantages = whiten(advantages, mask)

        # 4. Gradient steps of the critic and, after its warm-up, of the policy
        losses, value_losses, ptx_losses, grad_norms, clipped, kl_old = [], [], [], [], 0.0, 0.0
        for _ in range(args.num_epochs):
            order = torch.randperm(R) if updates > 1 else torch.arange(R)
            for index in order.to(device).tensor_split(args.num_minibatches):
                weights, loss, value_loss = mask / mask[index].sum(), 0.0, 0.0
                for mb in index.split(args.micro_batch_size):
                    part = batch.rows(mb)
                    t = part.completion_ids.shape[1]  # the longest of these
                    values = completion_scores(critic, part, args.share_prompts, before=True)
                    mb_loss = ppo_value_loss(values[..., 0], old_values[mb, :t], returns[mb, :t],
                                             weights[mb, :t], args.clip_eps_value)
                    (args.vf_coef * mb_loss).backward()
                    value_loss += mb_loss.item()
                    if step <= args.critic_warmup:
                        continue
                    logps = completion_logps(policy, part, args.temperature, args.share_prompts)
                    if updates == 1:
                        policy_logps[mb, :t] = logps.detach()
                    mb_loss, active = ppo_policy_loss(
                        logps, policy_logps[mb, :t], advantages[mb, :t], weights[mb, :t],
                        args.clip_eps)
                    mb_loss.backward()
                    loss += mb_loss.item()
                    clipped += (active & part.completion_mask).sum().item()
                    kl_old += kl_estimate(policy_logps[mb, :t], logps.detach(), "k3").sum().item()
                update(critic_optimizer, critic_scheduler, value_loss, args.max_grad_norm)
                value_losses.append(value_loss)
                if step <= args.critic_warmup:
                    continue
                if pretrain_texts:
                    drawn_texts = random.Random(f"{args.seed} {step} {len(losses)}").choices(
                        pretrain_texts, k=args.ptx_batch_size)
                    part = encode_texts(tokenizer, drawn_texts, args.max_new_tokens).to(device)
                    ptx = ptx_loss(completion_logps(policy, part), part.completion_mask)
                    (args.ptx_coef * ptx).backward()
                    ptx_losses.append(ptx.item())
                lr = scheduler.get_last_lr()[0]
                grad_norms.append(update(optimizer, scheduler, loss, args.max_grad_norm))
                losses.append(loss)
        if losses:  # before, the policy stands still
            controller.update(kl.sum(1).mean().item(), R)

        # 5. Log
        num_tokens = mask.sum().item()
        metrics = {
            "reward": scores.mean(), "reward_std": scores.std(correction=0),
            "ended": ended.float().mean(), "completion_length": num_tokens / R,
            "entropy": -masked_mean(policy_logps, mask),  # E[-log pi], from the tokens sampled
            "value_loss": sum(value_losses) / updates, "value": masked_mean(old_values, mask),
            "explained_variance": explained_variance(old_values, returns, mask),
            "tokens_per_second": num_tokens / (time.time() - start)}
        if losses:
            metrics |= {"loss": sum(losses) / updates, "grad_norm": max(grad_norms), "lr": lr,
                        "clip_frac": clipped / num_tokens / args.num_epochs,
                        "approx_kl": kl_old / num_tokens / args.num_epochs}
        if ptx_losses:
            metrics["ptx_loss"] = sum(ptx_losses) / updates
        if args.beta:
            metrics |= {"kl": kl.sum(1).mean(), "kl_per_token": masked_mean(kl, mask), "beta": beta}
        if gold:
            metrics["gold_reward"] = torch.tensor(verifier(prompts, texts, of_each)).mean()
        run.log(metrics, "reward", "kl", "completion_length")
        run.samples(*(x[:args.log_samples] for x in (prompts, texts, scores.tolist())))
        if step % args.eval_every == 0 or step == args.num_steps:
            report()
    run.finish(tokenizer, {"final": policy, "critic": critic})

if __name__ == "__main__":
    main(parse_args(Args, TOY))
