"""PPO in plain loops over tokens: one row a forward, no padding, no cache, no batches.

Written from Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031),
and the RLHF Book. It samples nothing: a rollout has the completions, their scores, the order of
every pass and the pretraining texts of every update. Models are in float64, so that rounding is all
on the other side. At the end: what a run of ppo.py did, handed to this program.
"""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from observe import observe
from plain import gradient_norm, head_outputs, learning_rate, token_logps, unpadded
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)


@dataclass
class Rollout:
    """What one step works on."""

    rows: list  # of (prompt ids, completion ids)
    scores: list  # a reward for each row, the penalty of those cut off included
    ended: list
    orders: list  # of each pass, a list of row numbers
    texts: list = field(default_factory=list)  # of each policy update, lists of ids


class Adam:
    """Adam by its formula (Kingma and Ba 2015), eps 1e-5 beside the root, no weight decay."""

    def __init__(self, model, peak, schedule, total):
        self.parameters = list(model.parameters())
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.peak = peak
        self.schedule = schedule
        self.total = total
        self.steps = 0

    def next_rate(self):
        return learning_rate(self.steps + 1, self.peak, self.schedule, 0, self.total)

    @torch.no_grad()
    def step(self):
        rate = self.next_rate()
        self.steps += 1
        for i, parameter in enumerate(self.parameters):
            gradient = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradient = parameter.grad
            self.first[i] = 0.9 * self.first[i] + 0.1 * gradient
            self.second[i] = 0.999 * self.second[i] + 0.001 * gradient**2
            mean = self.first[i] / (1 - 0.9**self.steps)
            square = self.second[i] / (1 - 0.999**self.steps)
            parameter -= rate * mean / (square.sqrt() + 1e-5)
            parameter.grad = None
        return rate


@dataclass
class Step:
    """One optimiser step: its rate, and the norm and direction of its gradient before the clip."""

    lr: float
    norm: float
    gradient: torch.Tensor


def clipped_step(optimizer, model, longest):
    """Scale a gradient longer than `longest` down to it, and go -> Step."""
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad.flatten().clone())
    norm = gradient_norm(model)
    if norm > longest:
        for parameter in model.parameters():
            parameter.grad *= longest / norm
    return Step(optimizer.step(), norm, torch.cat(gradients))


def token_rewards(kl, score, beta):
    """Each token pays for its KL; the last one gets the score."""
    rewards = [-beta * k for k in kl]
    rewards[-1] += score
    return rewards


def advantages_of(rewards, values, gamma, lam):
    """Generalised advantage estimation from the last token to the first; no value after the end."""
    advantages = [0.0] * len(rewards)
    after, next_value = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        after = delta + gamma * lam * after
        advantages[t] = after
        next_value = values[t]
    return advantages


def joined(lists):
    """The elements of all of them, in one list."""
    return list(itertools.chain.from_iterable(lists))


def mean_and_variance(lists):
    """Over the tokens of all rows together."""
    numbers = joined(lists)
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / len(numbers)
    return mean, variance


def whitened(lists):
    mean, variance = mean_and_variance(lists)
    std = math.sqrt(variance + 1e-8)
    rows = []
    for row in lists:
        rows.append([(x - mean) / std for x in row])
    return rows


def minibatches(order, count):
    """`count` parts in order, the first ones longer by one where they cannot be equal."""
    parts = []
    start = 0
    for i in range(count):
        size = len(order) // count
        if i < len(order) % count:
            size += 1
        parts.append(order[start : start + size])
        start += size
    return parts


@dataclass
class Targets:
    """Of each row, a number for each token, as they stand while the step's updates are done."""

    logps: list
    values: list
    kl: list
    advantages: list
    returns: list


def targets_of(policy, reference, critic, rollout, args, beta):
    """The policy's log-probs, KL, values, advantages and returns before the first update."""
    found = Targets([], [], [], [], [])
    for (prompt, completion), score in zip(rollout.rows, rollout.scores, strict=True):
        with torch.no_grad():
            logps = token_logps(policy, prompt, completion, args.temperature).tolist()
            values = head_outputs(critic, prompt, completion, before=True)[:, 0].tolist()
            kl = [0.0] * len(completion)
            if reference is not None:
                theirs = token_logps(reference, prompt, completion, args.temperature).tolist()
                kl = [a - b for a, b in zip(logps, theirs, strict=True)]
        rewards = token_rewards(kl, score, beta)
        advantages = advantages_of(rewards, values, args.gamma, args.lam)
        found.logps.append(logps)
        found.values.append(values)
        found.kl.append(kl)
        found.advantages.append(advantages)
        found.returns.append([a + v for a, v in zip(advantages, values, strict=True)])
    if args.whiten_advantages:
        found.advantages = whitened(found.advantages)
    return found


def value_term(value, old, target, eps):
    """Half the larger one of two squares: of the value, and of the value kept near the old one."""
    near = torch.clamp(value, old - eps, old + eps)
    return 0.5 * torch.max((value - target) ** 2, (near - target) ** 2)


def policy_term(logp, old, advantage, eps):
    """-> loss of a token, whether the clip took its gradient, and r - 1 - log r."""
    ratio = torch.exp(logp - old)
    inside = torch.clamp(ratio, 1 - eps, 1 + eps)
    loss = -torch.min(ratio * advantage, inside * advantage)
    active = bool(inside * advantage < ratio * advantage)
    return loss, active, (ratio - 1 - (logp - old)).item()


def critic_loss(critic, rollout, targets, part, eps):
    """The mean over the tokens of the minibatch `part`."""
    terms = []
    for i in part:
        prompt, completion = rollout.rows[i]
        values = head_outputs(critic, prompt, completion, before=True)[:, 0]
        for t in range(len(completion)):
            terms.append(value_term(values[t], targets.values[i][t], targets.returns[i][t], eps))
    return torch.stack(terms).mean()


def policy_loss(policy, rollout, targets, part, args, seen):
    """The mean over the tokens of the minibatch; what was clipped and the KL go into `seen`."""
    terms = []
    for i in part:
        prompt, completion = rollout.rows[i]
        logps = token_logps(policy, prompt, completion, args.temperature)
        for t in range(len(completion)):
            old, advantage = targets.logps[i][t], targets.advantages[i][t]
            loss, active, kl = policy_term(logps[t], old, advantage, args.clip_eps)
            terms.append(loss)
            seen["clipped"].append(active)
            seen["kl_old"].append(kl)
    return torch.stack(terms).mean()


def text_loss(policy, texts):
    """Minus the mean log-prob of all tokens of the texts but the first of each."""
    logps = [token_logps(policy, text[:1], text[1:]) for text in texts]
    return -torch.cat(logps).mean()


def mean(numbers):
    return sum(numbers) / len(numbers)


def metrics_of_rollout(rollout, targets):
    """What a step is logged with, apart from its updates."""
    spread = []
    for returns, values in zip(targets.returns, targets.values, strict=True):
        spread.append([r - v for r, v in zip(returns, values, strict=True)])
    lengths = [len(completion) for _, completion in rollout.rows]
    unexplained = mean_and_variance(spread)[1] / mean_and_variance(targets.returns)[1]
    score = mean(rollout.scores)
    return {
        "reward": score,
        "reward_std": math.sqrt(mean([(x - score) ** 2 for x in rollout.scores])),
        "ended": mean(rollout.ended),
        "completion_length": mean(lengths),
        "entropy": -mean_and_variance(targets.logps)[0],
        "value": mean_and_variance(targets.values)[0],
        "explained_variance": 1 - unexplained,
    }


def adapted(beta, kl, completions, args):
    """Ziegler et al. 2019: proportional to the relative error, which counts up to 0.2."""
    error = kl / args.kl_target - 1
    error = max(-0.2, min(0.2, error))
    return beta * (1 + error * completions / args.kl_horizon)


class PlainPPO:
    """A run: `metrics` a row a step; `policy_steps` and `critic_steps`, lists of Step."""

    def __init__(self, policy, critic, reference, args):
        self.policy = policy
        self.critic = critic
        self.args = args
        self.reference = None
        if args.beta:
            self.reference = reference
        updates = args.num_epochs * args.num_minibatches
        total = args.num_steps * updates
        learned = total - args.critic_warmup * updates
        self.policy_adam = Adam(policy, args.learning_rate, args.lr_schedule, learned)
        self.critic_adam = Adam(critic, args.critic_learning_rate, args.lr_schedule, total)
        self.beta = args.beta
        self.metrics = []
        self.policy_steps = []
        self.critic_steps = []

    def step(self, rollout):
        args = self.args
        warming = len(self.metrics) < args.critic_warmup
        targets = targets_of(self.policy, self.reference, self.critic, rollout, args, self.beta)
        row = metrics_of_rollout(rollout, targets)
        seen = {"clipped": [], "kl_old": [], "loss": [], "value_loss": [], "ptx": [], "norm": []}
        for order in rollout.orders:
            for part in minibatches(order, args.num_minibatches):
                self.update_critic(rollout, targets, part, seen)
                if not warming:
                    self.update_policy(rollout, targets, part, seen)
        row["value_loss"] = mean(seen["value_loss"])
        kl = mean([sum(tokens) for tokens in targets.kl])
        if args.beta:
            row |= {"kl": kl, "kl_per_token": mean_and_variance(targets.kl)[0], "beta": self.beta}
        if not warming:
            row |= {"loss": mean(seen["loss"]), "grad_norm": max(seen["norm"])}
            row |= {"clip_frac": mean(seen["clipped"]), "approx_kl": mean(seen["kl_old"])}
            row["lr"] = self.policy_steps[-1].lr
            if args.kl_target:
                self.beta = adapted(self.beta, kl, len(rollout.rows), args)
        if seen["ptx"]:
            row["ptx_loss"] = mean(seen["ptx"])
        self.metrics.append(row)

    def update_critic(self, rollout, targets, part, seen):
        loss = critic_loss(self.critic, rollout, targets, part, self.args.clip_eps_value)
        (self.args.vf_coef * loss).backward()
        seen["value_loss"].append(loss.item())
        self.critic_steps.append(
            clipped_step(self.critic_adam, self.critic, self.args.max_grad_norm)
        )

    def update_policy(self, rollout, targets, part, seen):
        loss = policy_loss(self.policy, rollout, targets, part, self.args, seen)
        loss.backward()
        if rollout.texts:
            ptx = text_loss(self.policy, rollout.texts[len(seen["loss"])])
            (self.args.ptx_coef * ptx).backward()
            seen["ptx"].append(ptx.item())
        seen["loss"].append(loss.item())
        step = clipped_step(self.policy_adam, self.policy, self.args.max_grad_norm)
        self.policy_steps.append(step)
        seen["norm"].append(step.norm)


# --- A run of ppo.py, done again ------------------------------------------------------------------


def make_policy(tiny, folder, noise=0.0):
    """The tiny model, which ends its completions more often, with noise -> its folder."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    generator = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 3.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_critic(tiny, folder, seed=11, bias=0.3):
    """A reward model with a head and a bias of its own, of the tiny model's shape -> its folder."""
    critic = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in critic.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    critic.score.weight.data.normal_(0, 0.2, generator=generator)
    critic.config.reward_bias = bias
    critic.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


def observed(script, args):
    """Run the script -> Seen, with `orders`: each permutation that it drew."""
    orders, draw = [], torch.randperm

    def noting(*arguments, **options):
        order = draw(*arguments, **options)
        orders.append(order.tolist())
        return order

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", noting)
        seen = observe(script, args)
    seen.orders = orders
    return seen


def sampled(seen):
    """Of each step, prompt and completion ids of its rows, and the texts."""
    steps = []
    for arguments, (batch, texts, _) in seen.calls["generate"]:
        if arguments["temperature"]:
            steps.append((unpadded(batch), texts))
    return steps


def drawn_texts(seen):
    """Ids of the pretraining texts of each policy update: the batches of one-token prompts."""
    updates = []
    for batch in seen.arguments("completion_logps", "batch"):
        if batch.prompt_ids.shape[1] == 1:
            updates.append([first + rest for first, rest in unpadded(batch)])
    return updates


def rollouts_of(seen, reward):
    """What each step of a run worked on; reward: text -> number."""
    args, eos = seen.args, AutoTokenizer.from_pretrained(seen.args.model).eos_token_id
    rollouts, texts = [], drawn_texts(seen)
    updates = args.num_epochs * args.num_minibatches
    for number, (rows, completions) in enumerate(sampled(seen)):
        ended = [completion[-1] == eos for _, completion in rows]
        scores = [reward(text) for text in completions]
        if args.missing_eos_penalty is not None:
            for i in range(len(rows)):
                if not ended[i]:
                    scores[i] = -args.missing_eos_penalty
        orders = [list(range(len(rows)))]
        if updates > 1:
            orders = seen.orders[number * args.num_epochs : (number + 1) * args.num_epochs]
        rollout = Rollout(rows, scores, ended, orders)
        if number >= args.critic_warmup:
            begin = (number - args.critic_warmup) * updates
            rollout.texts = texts[begin : begin + updates]
        rollouts.append(rollout)
    return rollouts


def replay(seen, reward):
    """The steps of a run by the plain program, from the same models -> PlainPPO."""
    args = seen.args
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.model).double() for _ in "ab")
    critic = AutoModelForSequenceClassification.from_pretrained(args.critic_model).double()
    plain = PlainPPO(policy, critic, reference, args)
    for rollout in rollouts_of(seen, reward):
        plain.step(rollout)
    return plain


def same_metrics(seen, plain, tolerance=2e-4):
    """Every metric of every step is the plain program's, and no other is logged but the times."""
    assert len(seen.steps) == len(plain.metrics) > 0
    for got, want in zip(seen.steps, plain.metrics, strict=True):
        others = {"step", "seconds", "tokens_per_second", "gold_reward"}
        assert got.keys() - others == want.keys()
        for name in want:
            rounding = 3e-5 if name == "kl" else 3e-6  # a sum over tokens, near 0
            assert got[name] == pytest.approx(want[name], rel=tolerance, abs=rounding), name


def same_updates(seen, plain, tolerance=2e-4):
    """Rate and clipped gradient of every update are the plain program's, the critic's first."""
    both = {0: plain.policy_steps, 1: plain.critic_steps}
    longest = seen.args.max_grad_norm
    for number, steps in both.items():
        updates = [update for update in seen.updates if update.optimizer == number]
        assert [u.lr for u in updates] == pytest.approx([s.lr for s in steps], rel=1e-6, abs=1e-12)
        for update, step in zip(updates, steps, strict=True):
            want = step.gradient * longest / max(step.norm, longest)
            assert (update.gradient - want).norm() < tolerance * want.norm() + 1e-6


def same_weights(seen, plain, tolerance=1e-5):
    """The models at the end are the plain program's, and so is how far they came."""
    starts = {"final": seen.args.model, "critic": seen.args.critic_model}
    for name, model in {"final": plain.policy, "critic": plain.critic}.items():
        saved, want = seen.weights(name), model.state_dict()
        start = load_file(f"{starts[name]}/model.safetensors")
        assert saved.keys() == want.keys() == start.keys()
        off = torch.cat([(saved[key] - want[key]).flatten() for key in want])
        moved = torch.cat([(start[key] - want[key]).flatten() for key in want])
        size = torch.cat([want[key].flatten() for key in want]).norm()
        assert off.norm() < tolerance * size and off.norm() < 2e-3 * moved.norm()
