"""PPO, proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), for language models.

Sample completions. Each token's reward is -beta times its KL, and the last one's the score as well.
Raise the log-prob of tokens that did better than a critic, a learned value model, expected. GAE is
generalised advantage estimation; "N+" is Huang et al. 2024, "The N+ implementation details of RLHF
with PPO" (arXiv:2403.17031).

Read beside the RLHF Book, draft of January 2025 (the printed edition has chapter 11 as chapter 6
and chapter 8 as chapter 15):
    token_rewards         8.1, the KL in the reward, eq. 8 (kl_estimate is in common.py)
    gae                   11.1.4, 11.2.2, advantages (Schulman et al. 2015, arXiv:1506.02438);
                          the draft's section 11.1.4.1 on it is an empty heading
    whiten                11.2.2, advantages normalised, here over completion tokens alone
    ppo_policy_loss       11.2.2 the code, 11.2.2.1 eq. 11 (11.1.4 prints no objective)
    ppo_value_loss        11.2.2
    ptx_loss              8.2, pretraining gradients
    AdaptiveKLController  11.3, of which the draft has only the heading (Ziegler et al. 2019,
                          arXiv:1909.08593, section 2.2)
    clip_frac, approx_kl  11.4; 11.2.2, the code; logged by main

How the code departs from the print:
    1. 11.2.1 calls the ratio a log-ratio to the reference model. It is the ratio pi / pi_old to the
       policy that generated the completions.
    2. 11.2.2 uses reward - value as the advantage and regresses the value on the reward (no GAE, no
       returns), unsqueezes a (B, L) tensor to (B, 1, L), normalises over padding, and averages per
       completion. Here: GAE, returns, and one mean over all completion tokens. The clip of the
       value is not in 11.2; it is from OpenAI's own code of PPO (Baselines).
    3. 11.2.2 has (difference)^2 / 2 for approx_kl. Here it is k3, which is unbiased.
    4. The value of token t is read before it: a baseline that has seen the token is biased.
    5. 8.2 calls the weight of the pretraining loss gamma. Here it is --ptx-coef, and gamma is the
       discount. The weight of the KL, lambda in eq. 8 and 8.2, is --beta.
    6. 11.2 scores only completions that reach an EOS, and leaves open what the others get. Here
       they get minus --missing-eos-penalty (N+), and GAE treats the cut as an end, too.

    python ppo.py                                                      # the toy, in two minutes
    python ppo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset math.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    get_scheduler,
)

from common import (
    Batch,
    add_up,
    add_up_gradients,
    completion_logps,
    completion_scores,
    deal_out,
    fixed_logps,
    generate,
    kl_estimate,
    masked_mean,
    micro_batches,
    pad,
    whole,
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
    load_rows,
    load_tokenizer,
    one_number,
    pick_device,
    reference_of,
    report_greedy,
    run_script,
    stop,
    stop_on_error,
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

    output_dir: str = "runs/ppo"  # folder for metrics, samples, curves, checkpoint and final models
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
    missing_eos_penalty: float | None = 1.0
    """the reward of a completion that hits --max-new-tokens is set to minus this value (N+: 1);
    None: score it like any other"""
    critic_model: str = ""
    """folder or hub name that the critic starts from; if empty, --reward-model, or else the policy
    with a head of zeros"""

    num_steps: int = 200  # number of steps, each on new completions
    num_prompts: int = 64  # P, prompts per step (N+: 512)
    num_generations: int = 1  # G, completions per prompt
    max_new_tokens: int = 256  # longest completion, in tokens
    generation_batch_size: int = 0
    """prompts whose completions are sampled at a time, to save memory; 0: all of a step. Another
    number gives other samples"""
    temperature: float = 1.0  # temperature of sampling, and of the log-probs (N+: 0.7)

    num_epochs: int = 4  # passes over a step's completions, each in a new order (N+: 4)
    num_minibatches: int = 1
    """gradient steps per pass; with one gradient step in all, the ratio is 1 (eq. 11)"""
    micro_batch_size: int = 8  # completions per forward pass; changes memory, not the gradient
    learning_rate: float = 3e-6  # peak learning rate of the policy's AdamW, eps 1e-5 (N+: 3e-6)
    critic_learning_rate: float = 3e-6  # peak learning rate of the critic's AdamW
    critic_warmup: int = 0  # number of first steps in which only the critic learns
    lora_rank: int = 0
    """rank of the adapters that are trained in place of the weights (LoRA), with about ten times
    the learning rate; 0: all weights are trained; see docs/models.md"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """schedule of both learning rates; linear and cosine fall to 0"""
    max_grad_norm: float = 1.0  # maximum norm of the gradient; a larger one is scaled down to it
    gamma: float = 1.0  # discount per token
    lam: float = 0.95
    """lambda of GAE; 1: the whole return, 0: one reward and the next value (N+: 0.95)"""
    whiten_advantages: bool = True  # give the advantages of a step's tokens mean 0 and variance 1
    clip_eps: float = 0.2  # epsilon: the ratio is clipped to 1 - epsilon .. 1 + epsilon
    clip_eps_value: float = 0.2
    """values further than this from those before the step are clipped in the loss (N+: 0.2)"""
    vf_coef: float = 0.1
    """weight of the value loss (N+: 0.1); the critic has weights of its own, so this only
    matters relative to --max-grad-norm and AdamW's eps"""
    beta: float = 0.05
    """weight of the KL (k1, per token) in the reward (N+: 0.05); 0: no reference model is loaded"""
    kl_target: float = 0.0
    """KL in nats per completion at which beta aims (Ziegler et al.: 6); 0: beta is fixed"""
    kl_horizon: float = 10000.0
    """beta changes by at most about 20 % in this many completions (Ziegler et al.: 10000)"""
    pretrain_dataset: str = ""  # JSON Lines with `text`, for --ptx-coef
    ptx_coef: float = 0.0
    """weight of the pretraining loss (8.2), a mean over tokens (InstructGPT: 27.8, with sums)"""
    ptx_batch_size: int = 8  # texts per gradient step, each cut to --max-new-tokens tokens

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
    num_steps=40,
    num_prompts=256,
    max_new_tokens=48,
    num_epochs=2,
    num_minibatches=2,
    micro_batch_size=128,
    learning_rate=2e-4,
    critic_learning_rate=1e-3,
    lr_schedule="linear",
    beta=0.01,
    eval_size=500,
    eval_every=20,
)

# --- The algorithm --------------------------------------------------------------------------------


def token_rewards(scores, kl, mask, beta):
    """Scores (R,) of completions and the KL (R, T) of their tokens -> rewards (R, T). Book 8.1.

    -beta KL at every token, and the score at the last one (which ended the completion, or was the
    last before the cut), never at padding.
    """
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return (scores[:, None] * is_last - beta * kl) * mask


def gae(rewards, values, mask, gamma, lam):
    """Rewards and values (R, T) -> advantages, returns (R, T), 0 in padding. Book 11.1.4.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = sum_l (gamma lam)^l delta_{t+l}, return = A + V.
    V_t is the value before token t. After the last token there is no state: its value is 0.
    """
    values = values * mask  # so that V is 0 after the last token
    advantages = torch.zeros_like(values)
    later = 0.0  # A_{t+1}
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        advantages[:, t] = later
    return advantages, advantages + values


def whiten(x, mask):
    """x (R, T) with mean 0 and variance 1 over the mask; 0 in padding."""
    centred = x - masked_mean(x, mask)
    return centred * (masked_mean(centred**2, mask) + 1e-8).rsqrt() * mask


def ppo_policy_loss(logps, old_logps, advantages, weights, clip_eps):
    """All (R, T) -> loss, and where the clip is active (R, T). Book 11.1.4, 11.2.2.

    Per token: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), with ratio = pi / pi_old.
    With old_logps = logps.detach() the ratio is 1 and its gradient that of log pi: eq. 11.
    weights: mask / its sum over the whole minibatch, so that losses of micro-batches add up.
    """
    ratio = torch.exp(logps - old_logps)
    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return (weights * torch.max(pg_losses1, pg_losses2)).sum(), pg_losses2 > pg_losses1


def ppo_value_loss(values, old_values, returns, weights, clip_eps_value):
    """All (R, T) -> loss: 0.5 max((V - return)^2, (clip(V, V_old +- eps) - return)^2).

    Book 11.2.2, which has no clip, and the reward in place of the return.
    """
    clipped = old_values + (values - old_values).clamp(-clip_eps_value, clip_eps_value)
    vf_losses1 = (values - returns) ** 2
    vf_losses2 = (clipped - returns) ** 2
    return 0.5 * (weights * torch.max(vf_losses1, vf_losses2)).sum()


def ptx_loss(logps, mask):
    """Log-probs (N, T) of pretraining text and their mask -> loss: -log pi, the mean over tokens.

    Book 8.2 prints the whole objective, to be maximised: E_{(x,y) ~ pi}[r(x, y) - lambda r_reg]
    + gamma E_{x ~ pretraining}[log pi(x)]. Its first part, with beta KL for lambda r_reg, is
    `ppo_policy_loss` on advantages of `token_rewards`; the second is minus this loss, and its gamma
    is --ptx-coef.
    """
    return -masked_mean(logps, mask)


def explained_variance(values, returns, mask):
    """1 - Var(return - V) / Var(return) over the mask: 1 for a perfect critic, 0 for a constant."""
    return 1 - (returns - values)[mask].var() / returns[mask].var().clamp(min=1e-8)


class AdaptiveKLController:
    """beta, moved so that the KL comes to a target. Book 11.3; Ziegler et al. 2019, section 2.2."""

    def __init__(self, beta, target, horizon):
        self.beta = beta
        self.target = target
        self.horizon = horizon

    def update(self, kl, num_completions):
        """kl: mean over these completions, in nats per completion. Without a target beta stays."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * num_completions / self.horizon


def minibatches(num_completions, num_epochs, num_minibatches, device="cpu"):
    """Yield the completions of each gradient step: long tensors of places, on `device`.

    A new order in each epoch. With one gradient step in all the order does not matter.
    """
    for _ in range(num_epochs):
        if num_epochs * num_minibatches > 1:
            order = torch.randperm(num_completions)
        else:
            order = torch.arange(num_completions)
        yield from order.to(device).tensor_split(num_minibatches)


# --- The task: change this for your own -----------------------------------------------------------


def verifier(prompts, completions, rows):
    """1.0 where the last number of the completion equals the row's `answer`, else 0.0."""
    rewards = []
    for text, row in zip(completions, rows, strict=True):
        rewards.append(float(last_number(text) == last_number(str(row["answer"]))))
    return rewards


# --- The critic -----------------------------------------------------------------------------------


def load_critic(args, tokenizer, device):
    """The model that estimates values: a reward model whose head is read before every token.

    If the folder has no head, it gets one of zeros: every value begins at 0.
    """
    path = args.critic_model or args.reward_model or args.model
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        stop(f"{path} has another vocabulary than the policy: give a --critic-model that has it")
    auto_class = AutoModelForSequenceClassification
    with stop_on_error(f"{path}: no model there"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if "ForTokenClassification" in str(config.architectures):
        auto_class = AutoModelForTokenClassification  # an outcome reward model; its head has a bias
    options = (args.dtype, args.shard, args.gradient_checkpointing, args.lora_rank)
    critic = load_model(auto_class, path, device, *options, new_head=1)
    if critic.has_new_head:
        critic.score.weight.data.zero_()
        critic.config.reward_bias = 0.0
    return critic


def token_values(critic, batch, share_prompts):
    """Values before each completion token -> (R, T)."""
    return completion_scores(critic, batch, share_prompts, before=True)[..., 0]


@torch.no_grad()
def fixed_values(critic, batch, micro_batch_size, share_prompts):
    """`token_values` without gradient, in micro-batches -> (R, T), 0 in padding."""
    values = torch.zeros_like(batch.completion_ids, dtype=torch.float32)
    with whole(critic):
        for mb in deal_out(batch.split(micro_batch_size)):
            part = token_values(critic, batch.rows(mb), share_prompts)
            values[mb, : part.shape[1]] = part
    return add_up(values) * batch.completion_mask


# --- Pretraining texts ----------------------------------------------------------------------------


def load_texts(args, tokenizer):
    """Texts of at least two tokens: one is predicted from the other."""
    if not args.ptx_coef:
        return []
    texts = []
    for row in load_rows(args.pretrain_dataset, "text"):
        if len(tokenizer(row["text"])["input_ids"]) > 1:
            texts.append(row["text"])
    if not texts:
        stop(f"{args.pretrain_dataset}: no text has two tokens, one to be predicted from the other")
    return texts


def encode_texts(tokenizer, texts, max_length):
    """Texts -> Batch with the first token of each as its prompt, the others as completion."""
    ids, mask = pad([tokenizer(text)["input_ids"][:max_length] for text in texts], "right")
    return Batch(ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:], torch.arange(len(ids)))


def add_ptx_grad(policy, tokenizer, texts, args, seed):
    """Add the gradient of the pretraining loss on --ptx-batch-size random texts -> loss."""
    drawn = random.Random(seed).choices(texts, k=args.ptx_batch_size)
    batch = encode_texts(tokenizer, drawn, args.max_new_tokens).to(policy.device)
    num_tokens = batch.completion_mask.sum()
    loss = torch.zeros((), device=policy.device)
    # One micro-batch, or with several processes one for each
    for mb in deal_out(batch.split(args.ptx_batch_size), args.shard):
        part = batch.rows(mb)
        share = part.completion_mask.sum() / num_tokens
        mb_loss = ptx_loss(completion_logps(policy, part), part.completion_mask) * share
        (args.ptx_coef * mb_loss).backward()
        loss += mb_loss.detach()
    return add_up(loss).item()


# --- Training -------------------------------------------------------------------------------------


def make_optimizer(model, learning_rate, args, after=0):
    """-> AdamW and its learning-rate schedule. after: steps before the model begins to learn."""
    adam = dict(eps=1e-5, weight_decay=0.0, fused=True)  # eps as in N+
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, **adam)
    num_updates = (args.num_steps - after) * args.num_epochs * args.num_minibatches
    return optimizer, get_scheduler(args.lr_schedule, optimizer, 0, max(1, num_updates))


def add_value_grad(critic, batch, index, old_values, returns, weights, args):
    """Add the gradient of the value loss of a minibatch, a micro-batch at a time -> loss.

    index: the completions of the minibatch. old_values, returns, weights (R, T).
    """
    loss = torch.zeros((), device=critic.device)
    for mb in deal_out(micro_batches(index, args.micro_batch_size), args.shard):
        part = batch.rows(mb)
        t = part.completion_ids.shape[1]  # the longest of these
        values = token_values(critic, part, args.share_prompts)
        fixed = (old_values[mb, :t], returns[mb, :t], weights[mb, :t])
        mb_loss = ppo_value_loss(values, *fixed, args.clip_eps_value)
        (args.vf_coef * mb_loss).backward()
        loss += mb_loss.detach()
    return add_up(loss).item()


def add_policy_grad(policy, batch, index, policy_logps, advantages, weights, args):
    """Add the gradient of the policy loss of a minibatch, a micro-batch at a time.

    -> loss, number of clipped tokens, sum over tokens of the approximate KL. policy_logps (R, T):
    the log-probs of sampling. With one gradient step in all they are those of this pass (eq. 11),
    and are written there.
    """
    totals = torch.zeros(3, device=policy.device)  # loss, clipped tokens, approximate KL
    is_only_step = args.num_epochs * args.num_minibatches == 1
    if is_only_step:
        policy_logps.zero_()  # each process writes those of its own rows
    for mb in deal_out(micro_batches(index, args.micro_batch_size), args.shard):
        part = batch.rows(mb)
        t = part.completion_ids.shape[1]  # the longest of these
        logps = completion_logps(policy, part, args.temperature, args.share_prompts)
        if is_only_step:
            policy_logps[mb, :t] = logps.detach()
        old_logps = policy_logps[mb, :t]
        fixed = (old_logps, advantages[mb, :t], weights[mb, :t])
        mb_loss, is_clipped = ppo_policy_loss(logps, *fixed, args.clip_eps)
        mb_loss.backward()
        clipped = (is_clipped & part.completion_mask).sum()
        approx_kl = kl_estimate(old_logps, logps.detach(), "k3").sum()
        totals += torch.stack([mb_loss.detach(), clipped, approx_kl])
    if is_only_step:
        add_up(policy_logps)
    return add_up(totals).tolist()


def check_args(args, num_rows):
    """Stop where flags contradict each other."""
    if not args.temperature:
        stop("--temperature 0: completions must be sampled")
    if args.kl_target and not args.beta:
        stop("--kl-target needs a --beta to begin with: it adapts by factors")
    if args.num_minibatches > min(args.num_prompts, num_rows) * args.num_generations:
        stop(f"--num-minibatches {args.num_minibatches}: more than there are completions in a step")


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
    check_args(args, len(rows))
    has_gold = not is_verified(args) and has_answers(rows)  # log the verifier beside the reward
    P = min(args.num_prompts, len(rows))
    G = args.num_generations
    model_options = (args.reward_model, device, args.dtype, args.micro_batch_size)
    score = load_reward(args.reward, verifier, *model_options, shard=args.shard)
    tokenizer = load_tokenizer(args.model)
    pretrain_texts = load_texts(args, tokenizer)
    load_options = (AutoModelForCausalLM, args.model, device, args.dtype, args.shard)
    policy = load_model(*load_options, args.gradient_checkpointing, args.lora_rank)
    ref = load_reference(policy, load_options, args)
    critic = load_critic(args, tokenizer, device)
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens, args.show_rows)
    updates = args.num_epochs * args.num_minibatches  # gradient steps per step of the loop
    optimizer, scheduler = make_optimizer(policy, args.learning_rate, args, args.critic_warmup)
    critic_optimizer, critic_scheduler = make_optimizer(critic, args.critic_learning_rate, args)
    controller = AdaptiveKLController(args.beta, args.kl_target, args.kl_horizon)
    parts = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler, "critic": critic}
    parts |= {"critic_optimizer": critic_optimizer, "critic_scheduler": critic_scheduler}
    run.begin(parts | {"controller": controller}, args.num_steps)
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

        # 2. Log-probs under the reference, and under the policy that sampled. With one gradient
        #    step and --beta 0 the latter come from the training pass below (eq. 11): no extra pass.
        is_warmup = step <= args.critic_warmup  # in which the policy stands still
        ref_logps = torch.zeros(R, T, device=device)
        policy_logps = torch.zeros(R, T, device=device)
        forward = (args.temperature, args.micro_batch_size, args.share_prompts)
        if args.beta:
            ref_logps = fixed_logps(ref, batch, *forward)
        if args.beta or updates > 1 or is_warmup:
            policy_logps = fixed_logps(policy, batch, *forward)

        # 3. Rewards, values, advantages and returns of the tokens (R, T)
        kl = kl_estimate(policy_logps, ref_logps, "k1")  # 0 in padding
        rewards = token_rewards(scores, kl, mask, controller.beta)
        old_values = fixed_values(critic, batch, args.micro_batch_size, args.share_prompts)
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
        if args.whiten_advantages:  # after the returns: the critic learns those as they are
            advantages = whiten(advantages, mask)

        # 4. Gradient steps of the critic and, after its warm-up, of the policy
        losses, value_losses, ptx_losses, grad_norms = [], [], [], []
        num_clipped, sum_approx_kl = 0, 0.0
        for index in minibatches(R, args.num_epochs, args.num_minibatches, device):
            weights = mask / mask[index].sum()
            value_loss = add_value_grad(critic, batch, index, old_values, returns, weights, args)
            add_up_gradients(critic)
            grad_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            check_finite(value_loss, grad_norm.item())
            critic_optimizer.step()
            critic_scheduler.step()
            critic_optimizer.zero_grad()
            value_losses.append(value_loss)
            if is_warmup:
                continue
            fixed = (policy_logps, advantages, weights)
            loss, clipped, sum_kl = add_policy_grad(policy, batch, index, *fixed, args)
            num_clipped += clipped
            sum_approx_kl += sum_kl
            if pretrain_texts:
                seed = f"{args.seed} {step} {len(losses)}"
                ptx_losses.append(add_ptx_grad(policy, tokenizer, pretrain_texts, args, seed))
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
        metrics = {
            "reward": scores.mean(),
            "reward_std": scores.std(correction=0),
            "ended": ended.float().mean(),
            "completion_length": num_tokens / R,
            "entropy": -masked_mean(policy_logps, mask),  # E[-log pi], from the sampled tokens
            "value_loss": sum(value_losses) / updates,
            "value": masked_mean(old_values, mask),
            "explained_variance": explained_variance(old_values, returns, mask),
            "tokens_per_second": num_tokens / (time.time() - start),
        }
        if losses:
            metrics |= {"loss": sum(losses) / updates, "grad_norm": max(grad_norms), "lr": lr}
            metrics["clip_frac"] = num_clipped / num_tokens / args.num_epochs
            metrics["approx_kl"] = sum_approx_kl / num_tokens / args.num_epochs
        metrics["ptx_loss"] = sum(ptx_losses) / updates if ptx_losses else math.nan  # nan: no row
        if args.beta:
            metrics |= {"kl": kl.sum(1).mean(), "kl_per_token": masked_mean(kl, mask)}
            metrics["beta"] = controller.beta
        if has_gold:
            metrics["gold_reward"] = torch.tensor(verifier(prompts, texts, row_of_each)).mean()
        run.log(metrics, "reward", "gold_reward", "kl", "completion_length")
        run.samples(prompts[::G], texts[::G], scores[::G].tolist())
        if not is_warmup:
            controller.update(kl.sum(1).mean().item(), R)
        if step % args.eval_every == 0 or step == args.num_steps:
            report()
    run.finish(tokenizer, {"final": policy, "critic": critic})


if __name__ == "__main__":
    run_script(main, Args, TOY)
