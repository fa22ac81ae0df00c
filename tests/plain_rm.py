"""Training and evaluation of a reward model in plain form, for rm_bt.py and rm_kwise.py.

One completion a forward, loops over rows and pairs, numbers; nothing here calls the project.
"""

import itertools
import statistics

import plain
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def text_of(side):
    """An answer's text: a text, or its one message."""
    return side if isinstance(side, str) else side[0]["content"]


def texts_and_ranks(row):
    """The completions of a row of either form, and their ranks."""
    if "completions" in row:
        return row["completions"], row["ranks"]
    return [text_of(row["chosen"]), text_of(row["rejected"])], [0, 1]


def pairs_of(ranks):
    """Places of every two completions of which the first is the better one."""
    places = itertools.permutations(range(len(ranks)), 2)
    return [(i, j) for i, j in places if ranks[i] < ranks[j]]


class Rewards:
    """A reward model with a new head from the seed, and a language model on the same backbone."""

    def __init__(self, folder, seed, max_length):
        torch.manual_seed(seed)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        self.lm = AutoModelForCausalLM.from_pretrained(folder)
        self.lm.model = self.model.model
        if self.lm.config.tie_word_embeddings:
            self.lm.lm_head.weight = self.model.model.embed_tokens.weight
        self.parts = torch.nn.ModuleList([self.model, self.lm])
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_length = max_length

    def ids(self, prompt, text):
        """Ids of the prompt, and those of the completion that have room after it."""
        prompt_ids = plain.toy_ids(self.tokenizer, prompt)
        ids = plain.toy_ids(self.tokenizer, prompt, text)
        return prompt_ids, ids[: self.max_length - len(prompt_ids)]

    def scores(self, row):
        """The reward of each completion: the head at its last token."""
        texts, _ = texts_and_ranks(row)
        outputs = [plain.head_outputs(self.model, *self.ids(row["prompt"], t)) for t in texts]
        return [output[-1, 0] for output in outputs]

    def lengths(self, row):
        """Tokens of each completion, its end of turn among them."""
        texts, _ = texts_and_ranks(row)
        return [len(self.ids(row["prompt"], text)[1]) for text in texts]

    def nll(self, row):
        """Nats a token of the best completion; of several best ones the mean."""
        texts, ranks = texts_and_ranks(row)
        best = [text for text, rank in zip(texts, ranks, strict=True) if rank == min(ranks)]
        logps = [plain.token_logps(self.lm, *self.ids(row["prompt"], text)) for text in best]
        return sum(-x.mean() for x in logps) / len(best)


def pairwise(scores, ranks, margin, probability=1):
    """-log sigmoid(better - worse - margin), mean over the pairs of one row; where they are the
    right way round with this probability, the mean over both ways."""
    losses = []
    for i, j in pairs_of(ranks):
        odds = (scores[i] - scores[j] - margin).exp()
        right, wrong = odds / (1 + odds), 1 / (1 + odds)
        losses.append(-probability * right.log() - (1 - probability) * wrong.log())
    return sum(losses) / len(losses)


def kwise(scores, ranks, margin=0.0, probability=1):
    """-log of the chance to draw one completion after the other in their order."""
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    weights = [scores[i].exp() for i in order]
    return sum(-(weights[k] / sum(weights[k:])).log() for k in range(len(order)))


def center(scores, ranks):
    """(better + worse)^2, mean over the pairs of one row."""
    squares = [(scores[i] + scores[j]) ** 2 for i, j in pairs_of(ranks)]
    return sum(squares) / len(squares)


def step_loss(rewards, rows, args, row_loss):
    """Every term of the loss, mean over rows."""
    total = 0.0
    for row in rows:
        scores = rewards.scores(row)
        ranks = texts_and_ranks(row)[1]
        scale = getattr(args, "margin_scale", 0.0)
        probability = 1 if row.get("probability") is None else row["probability"]
        loss = row_loss(scores, ranks, scale * (row.get("margin") or 0.0), probability)
        if getattr(args, "center_coef", 0.0):
            loss = loss + args.center_coef * center(scores, ranks)
        if getattr(args, "nll_coef", 0.0):
            loss = loss + args.nll_coef * rewards.nll(row)
        total = total + loss / len(rows)
    return total


def gaps_of(rewards, rows):
    """Of all pairs: better less worse in reward, and in length."""
    gaps = []
    longer = []
    for row in rows:
        scores = [x.item() for x in rewards.scores(row)]
        lengths = rewards.lengths(row)
        for i, j in pairs_of(texts_and_ranks(row)[1]):
            gaps.append(scores[i] - scores[j])
            longer.append(lengths[i] - lengths[j])
    return gaps, longer


def share_right(gaps):
    return sum((gap > 0) + (gap == 0) / 2 for gap in gaps) / len(gaps)


def all_scores(rewards, rows):
    """Rewards of all completions of all rows, as numbers."""
    return [score.item() for row in rows for score in rewards.scores(row)]


@torch.no_grad()
def step_metrics(rewards, rows):
    """What is logged of the rewards of a step's rows."""
    gaps, longer = gaps_of(rewards, rows)
    scores = all_scores(rewards, rows)
    return {
        "accuracy": share_right(gaps),
        "margin": statistics.mean(gaps),
        "reward": statistics.mean(scores),
        "reward_std": statistics.pstdev(scores),
        "tokens_per_second": sum(sum(rewards.lengths(row)) for row in rows),  # in one second
    }


@torch.no_grad()
def held_out_metrics(rewards, rows, row_loss):
    """What is logged of the held-out rows; of rm_kwise.py alone: tau and top1."""
    gaps, longer = gaps_of(rewards, rows)
    where_longer = [gap for gap, more in zip(gaps, longer, strict=True) if more > 0]
    where_shorter = [gap for gap, more in zip(gaps, longer, strict=True) if more < 0]
    scores = all_scores(rewards, rows)
    losses = []
    spreads = []
    taus = []
    tops = []
    for row in rows:
        mine = rewards.scores(row)
        ranks = texts_and_ranks(row)[1]
        losses.append(row_loss(mine, ranks, 0.0).item())
        spreads.append(statistics.stdev(x.item() for x in mine))
        signs = [1 if mine[i] > mine[j] else -1 for i, j in pairs_of(ranks)]
        taus.append(statistics.mean(signs))
        tops.append(mine[ranks.index(min(ranks))] == max(mine))
    return {
        "eval_loss": statistics.mean(losses),
        "eval_accuracy": share_right(gaps),
        "eval_margin": statistics.mean(gaps),
        "eval_accuracy_better_longer": share_right(where_longer),
        "eval_accuracy_better_shorter": share_right(where_shorter),
        "eval_reward": statistics.mean(scores),
        "eval_reward_std": statistics.stdev(scores),
        "eval_reward_std_prompt": statistics.mean(spreads),
        "eval_tau": statistics.mean(taus),
        "eval_top1": statistics.mean(float(top) for top in tops),
    }


@torch.no_grad()
def histogram_of(rewards, rows):
    """Rewards of the best completions and of the others, sorted."""
    best = []
    others = []
    for row in rows:
        ranks = texts_and_ranks(row)[1]
        for score, rank in zip(rewards.scores(row), ranks, strict=True):
            side = best if rank == min(ranks) else others
            side.append(score.item())
    return {"best": sorted(best), "others": sorted(others)}


def train(args, batches, held, row_loss, warmup):
    """AdamW on the rows of each step -> the Rewards, rows as they should be logged, and what the
    histogram should show at each evaluation."""
    rewards = Rewards(args.model, args.seed, args.max_length)
    optimizer = torch.optim.AdamW(rewards.parts.parameters(), weight_decay=0.0)
    logged = [{"step": 0} | held_out_metrics(rewards, held, row_loss)]
    shown = [histogram_of(rewards, held)]
    for step, rows in enumerate(batches, 1):
        peak = args.learning_rate
        lr = plain.learning_rate(step, peak, args.lr_schedule, warmup, len(batches))
        metrics = {"step": step} | step_metrics(rewards, rows)
        loss = step_loss(rewards, rows, args, row_loss)
        optimizer.zero_grad()
        loss.backward()
        norm = plain.gradient_norm(rewards.parts)
        torch.nn.utils.clip_grad_norm_(rewards.parts.parameters(), args.max_grad_norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        logged.append(metrics | {"loss": loss.item(), "grad_norm": norm, "lr": lr})
        if step % args.eval_every == 0 or step == len(batches):
            logged.append({"step": step} | held_out_metrics(rewards, held, row_loss))
            shown.append(histogram_of(rewards, held))
    return rewards, logged, shown
