"""Judge: a language model compares two answers to a prompt (Zheng et al. 2023, arXiv:2306.05685).

It is a reward model in words (a generative reward model), and an evaluation: of labelled pairs, as
RewardBench is, or of policies, as AlpacaEval and Chatbot Arena are. Each pair is shown in both
orders.

Read beside the RLHF Book, draft of January 2025 (the printed edition has chapter 7 as chapter 5):
    TEMPLATE            7.8: instructions, question, answer A, answer B, in words of our own
    parse_verdict       7.8: [[A]], [[B]] or [[C]] for a tie
    soft_preference     7.8, 13.2.2: the mean over both orders, a soft label
    outcomes            7.8: a win, a loss, or a tie, as where the two orders contradict each other
    pair_accuracy       7.9: agreement with the labels of pairs (RewardBench, Lambert et al. 2024)
    length_controlled_win_rate    17.1: the linear correction of AlpacaEval (Dubois et al. 2024)
    battle_ratings      16.1: strengths of more than two contestants (Chatbot Arena), 7.1, eq. 1

The draft prints a prompt and no formula here. Choices it leaves open:
    1. A contradiction is a tie in win rates, as in MT-Bench; the soft label is the plain mean.
    2. A pair without a verdict in one of its orders is counted, said, and part of no figure.
    3. The print of 7.8 asks for an explanation before the verdict: --verdict text. The probability
       of the verdict itself (--verdict logits) is that of chapter 13.2.2 for the letters.
    4. AlpacaEval's correction has more terms (the model, the difficulty of the prompt); here it is
       the difference of lengths alone.

    python judge.py                    # the toy's judge on labelled pairs, in some seconds
    python judge.py --contestants toy/model,runs/grpo/final --dataset toy/problems_test.jsonl
    python judge.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset preferences.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM

from common import encode, encode_answers, encode_prompt, fixed_logps, generate
from plumbing import (
    Run,
    answer_text,
    check_prompts,
    check_vocabulary,
    conversation_as_text,
    hold_as_computed,
    load_model,
    load_reward,
    load_rows,
    load_tokenizer,
    pick_device,
    run_script,
    show_rows,
    stop,
    stop_on_error,
)


@dataclass
class Args:
    model: str  # the judge, a causal model: a folder, or a name on the hub
    dataset: str = ""
    """rows to judge, JSON Lines or owner/name:split on the hub: `prompt`, `chosen`, `rejected`; for
    --contestants `prompt` alone (if empty, the prompts of the first file of completions)"""
    contestants: str = ""
    """two or more to compare, with commas between, each PATH or NAME=PATH: a policy's folder or hub
    name, or a file of rows with `prompt` and `completion`; if empty, the pairs of --dataset"""
    reward_model: str = ""
    """folder or hub name of a reward model that compares the same answers beside the judge"""
    template: str = ""
    """file with the judge's prompt, in which {question}, {answer_a} and {answer_b} stand; if empty,
    one in the manner of MT-Bench"""
    write_sft: bool = False
    """write rows for sft.py that train a judge, sft.jsonl, from the labelled pairs of --dataset;
    then the program ends"""
    show_rows: int = 0
    """number of pairs to print as the judge gets them; then the program ends; 0: judge"""
    max_rows: int = 1000  # most rows of --dataset that are judged, from the first on

    output_dir: str = "runs/judge"  # folder for judgements, preferences, results and checkpoint
    resume: bool = False  # continue from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed for shuffling and sampling
    device: str = "auto"  # torch device; auto: cuda if there is one, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the forward pass, while weights are float32; auto: bfloat16 if cuda supports it"""

    verdict: Literal["logits", "text"] = "logits"
    """logits: the probability of [[A]] against [[B]], without an explanation; text: sample an
    explanation and read the verdict in it"""
    max_explanation_tokens: int = 512  # longest explanation with its verdict, in tokens
    judge_temperature: float = 0.0  # temperature of the explanations; 0: greedy (MT-Bench: 0)
    max_new_tokens: int = 256  # longest answer of a policy among --contestants, in tokens
    temperature: float = 0.0  # temperature of the answers of --contestants; 0: greedy
    batch_size: int = 16
    """pairs per step, each shown in both orders, and answers sampled at a time; texts sampled at a
    temperature above 0 change with it"""

    num_resamples: int = 1000  # draws of the bootstrap that the intervals are made of
    checkpoint_every: int = 10  # steps between checkpoints


TOY = dict(
    model="toy/judge",
    dataset="toy/pref_test.jsonl",
    template="toy/judge.txt",
    max_explanation_tokens=16,
    max_new_tokens=48,
)

TEMPLATE = """You are an impartial judge. Two assistants, A and B, were asked the same question. Say
which of the two answers is better: which is right, does what was asked, and helps more. Neither the
order in which the answers stand, nor their length, nor the confidence of their tone is a merit.

[Question]
{question}

[Answer of A]
{answer_a}
[End of A]

[Answer of B]
{answer_b}
[End of B]

"""
ENDINGS = {
    "text": "Compare the answers in a few sentences. Then give your verdict on a line of its own: "
    "[[A]] if A is better, [[B]] if B is better, [[C]] if neither is.",
    "logits": "Answer with your verdict alone: [[A]] if A is better, [[B]] if B is better.",
}

# --- The mathematics: verdicts --------------------------------------------------------------------


def parse_verdict(text):
    """The verdict of a judge's text -> "A", "B", "C" (a tie), or None where there is none.

    It is in the last line with a mark [[A]], [[B]] or [[C]]. Where that line has two different
    marks, or no line has one, there is no verdict, and none is guessed. Book 7.8.
    """
    for line in reversed(text.splitlines()):
        marks = set(re.findall(r"\[\[ ?([ABC]) ?\]\]", line))
        if len(marks) == 1:
            return marks.pop()
        if marks:
            return None
    return None


def soft_preference(in_order, swapped):
    """Probability that the first answer is the better one, the mean over both orders: (N,), (N,)
    -> (N,).

    in_order: probability of A where the first answer is shown as A; swapped: probability of A where
    the second one is. 1, 0.5 and 0 are the verdicts A, C and B. A preference for a place cancels.
    Book 7.8, 13.2.2.
    """
    return (in_order + 1 - swapped) / 2


def contradicts(in_order, swapped):
    """Where the two orders name different answers as the better one: as above -> (N,) bool. Book
    7.8."""
    return (in_order - 0.5) * (0.5 - swapped) < 0


def outcomes(in_order, swapped):
    """1 where the first answer wins, 0 where it loses, 0.5 for a tie: as above -> (N,).

    A contradiction is a tie (Zheng et al. 2023). Book 7.8.
    """
    preference = soft_preference(in_order, swapped)
    won = (preference > 0.5).double() + (preference == 0.5).double() / 2
    return won.where(~contradicts(in_order, swapped), torch.tensor(0.5, dtype=won.dtype))


def first_place(in_order, swapped):
    """Share of verdicts, in both orders, for the answer that is shown first; ties count half ->
    scalar.

    Each answer is shown first once: without a preference for a place it is 1/2. Book 7.8.
    """
    both = torch.cat([in_order, swapped])
    return ((both > 0.5).double() + (both == 0.5).double() / 2).mean()


def pair_accuracy(difference):
    """Share of pairs (N,) in which the difference is positive, zeros count half -> scalar.

    The difference of two scores, or of a probability and 1/2. Book 7.9 (RewardBench).
    """
    return ((difference > 0).double() + (difference == 0).double() / 2).mean()


# --- The mathematics: rates and ratings -----------------------------------------------------------


def logistic_regression(features, labels, ridge=1e-3):
    """Likeliest coefficients b of P = sigmoid(features @ b): (N, k), labels (N,) in 0..1 -> (k,).

    By Newton's method. The penalty ridge / 2 |b|^2 on the sum of the losses keeps finite what would
    not be (nothing but wins), and is far below the noise of ten labels.
    """
    features = features.double()
    labels = labels.double()
    identity = torch.eye(features.shape[1], dtype=torch.float64)
    coefficients = torch.zeros(features.shape[1], dtype=torch.float64)
    for _ in range(100):
        probs = (features @ coefficients).sigmoid()
        gradient = features.T @ (probs - labels) + ridge * coefficients
        curvature = features.T @ (features * (probs * (1 - probs))[:, None]) + ridge * identity
        step = torch.linalg.solve(curvature, gradient)
        coefficients = coefficients - step
        if step.abs().max() < 1e-9:
            break
    return coefficients


def length_controlled_win_rate(won, length_difference):
    """What the win rate would be between answers of one length: (N,), (N,) -> scalar.

    won: outcomes from 0 to 1 of the first answer; length_difference: its length less the other's.
    sigmoid(a) of the regression P = sigmoid(a + b difference), read at 0 (Dubois et al. 2024,
    arXiv:2404.04475, without the terms for models and prompts). Where all differences are equal,
    nothing can be told of them: the plain win rate. Book 17.1.
    """
    difference = length_difference.double()
    spread = difference.std(correction=0)
    if spread == 0:
        return won.double().mean()
    features = torch.stack([torch.ones_like(difference), difference / spread], dim=1)
    return logistic_regression(features, won)[0].sigmoid()


def battle_ratings(first, second, won, num_contestants):
    """Strengths of the contestants, in nats, of mean 0: first, second, won (N,) -> (K,).

    first, second: places of the two in a battle; won: 1, 0.5 or 0 for the first. The likeliest
    strengths of P(first wins) = sigmoid(s_first - s_second): Bradley-Terry, eq. 1. Book 16.1.
    """
    battles = torch.arange(len(won))
    features = torch.zeros(len(won), num_contestants, dtype=torch.float64)
    features[battles, first] += 1
    features[battles, second] -= 1
    return logistic_regression(features, won)


def arena_scale(ratings):
    """Strengths in nats -> points: 1000 on average; 400 more are odds of ten to one. Book 16.1."""
    return 1000 + 400 / math.log(10) * ratings


def bootstrap_interval(statistic, prompt_of, num_resamples, seed, level=0.95):
    """Interval of a statistic over prompts drawn anew: -> low, high, of the statistic's shape.

    statistic: function of places (M,) long -> tensor; prompt_of (N,) long: the prompt of each row.
    Prompts are drawn with replacement, each with all of its rows, as battles over one prompt are
    not independent (Efron 1979; Chatbot Arena, Chiang et al. 2024).
    """
    rows_of = [(prompt_of == p).nonzero()[:, 0] for p in prompt_of.unique()]
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_resamples):
        drawn = torch.randint(len(rows_of), (len(rows_of),), generator=generator)
        values.append(statistic(torch.cat([rows_of[i] for i in drawn.tolist()])))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.stack(values).double().nanquantile(ends, dim=0)
    return low, high


# --- The task: change this for your own -----------------------------------------------------------


def judge_prompt(template, prompt, answer_a, answer_b):
    """The template with its fields filled, book 7.8; what looks like a field in a text stays as it
    is."""
    texts = {"question": conversation_as_text(prompt), "answer_a": answer_a, "answer_b": answer_b}
    return re.sub(r"\{(question|answer_a|answer_b)\}", lambda found: texts[found[1]], template)


def load_template(args):
    """Text of --template, or our own; one that lacks a field is refused."""
    if not args.template:
        return TEMPLATE + ENDINGS[args.verdict]
    with stop_on_error(f"--template {args.template}: cannot be read"):
        template = Path(args.template).read_text()
    for field in ("{question}", "{answer_a}", "{answer_b}"):
        if template.count(field) != 1:
            stop(f"--template {args.template}: {field} must stand in it once")
    return template


# --- Pairs ----------------------------------------------------------------------------------------


def load_limited(path, max_rows, *columns):
    """The first `max_rows` rows of a file; says so where it has more."""
    rows = load_rows(path, *columns)
    if len(rows) > max_rows:
        print(f"{path}: the first {max_rows} of {len(rows)} rows (--max-rows)")
    return rows[:max_rows]


def labelled_pairs(args):
    """Rows of --dataset -> pairs {prompt, row, names, answers, ended}, the chosen answer first."""
    pairs = []
    rows = load_limited(args.dataset, args.max_rows, "prompt", "chosen", "rejected")
    for i, row in enumerate(rows):
        with stop_on_error(f"{args.dataset}, row {i + 1}: cannot be read"):
            answers = [answer_text(row[side], row["prompt"]) for side in ("chosen", "rejected")]
            if not all(text.strip() for text in answers):
                raise ValueError("an empty answer")
        names = ["chosen", "rejected"]
        pair = {"prompt": row["prompt"], "row": i, "names": names, "answers": answers}
        pairs.append(pair | {"ended": [True, True]})
    return pairs


def sft_rows(pairs, template):
    """Labelled pairs -> rows for sft.py that train a judge, two of each pair: one in each order."""
    rows = []
    for pair in pairs:
        chosen, rejected = pair["answers"]
        if chosen == rejected:
            continue
        in_order = judge_prompt(template, pair["prompt"], chosen, rejected)
        swapped = judge_prompt(template, pair["prompt"], rejected, chosen)
        rows.append({"prompt": in_order, "completion": "[[A]]"})
        rows.append({"prompt": swapped, "completion": "[[B]]"})
    if len(rows) < 2 * len(pairs):
        print(f"{len(pairs) - len(rows) // 2} of {len(pairs)} pairs are equal: they make no rows")
    return rows


def parse_contestants(text):
    """ "NAME=PATH,PATH" -> {name: path}."""
    paths = {}
    for part in text.split(","):
        name, is_named, path = part.strip().partition("=")
        if name in paths or not name or (is_named and not path):
            stop(f"--contestants {text}: each needs a path and a name of its own, NAME=PATH")
        paths[name] = path if is_named else name
    if len(paths) < 2:
        stop(f"--contestants {text}: a comparison needs two")
    return paths


def read_answers(path, prompts):
    """A file of completions -> the one of each prompt, and whether it ended."""
    waiting = {}
    for number, row in enumerate(load_rows(path, "prompt"), 1):
        answer = row.get("completion", row.get("response"))
        if answer is None:
            stop(f"{path}, row {number}: no completion; it has {', '.join(row)}")
        with stop_on_error(f"{path}, row {number}: cannot be read"):
            answer = (answer_text(answer, row["prompt"]), bool(row.get("ended", True)))
        waiting.setdefault(str(row["prompt"]), []).append(answer)
    answers = []
    for prompt in prompts:
        if not waiting.get(str(prompt)):
            stop(f"{path}: no completion for the prompt {str(prompt)[:80]!r}")
        answers.append(waiting[str(prompt)].pop(0))
    return answers


def sample_answers(path, prompts, device, args, seed):
    """A policy's folder or hub name -> one answer to each prompt, and whether it ended."""
    policy = hold_as_computed(load_model(AutoModelForCausalLM, path, device, args.dtype))
    tokenizer = load_tokenizer(path)
    rows = [{"prompt": prompt} for prompt in prompts]
    check_prompts(tokenizer, policy, rows, args.max_new_tokens)
    torch.manual_seed(seed)
    answers = []
    for start in range(0, len(prompts), args.batch_size):
        part = prompts[start : start + args.batch_size]
        sampling = (1, args.max_new_tokens, args.temperature)
        _, texts, ended = generate(policy, tokenizer, part, *sampling)
        answers += list(zip(texts, ended.tolist(), strict=True))
    return answers


def contest(args, device):
    """--contestants -> rows {prompt, answers: {name: [text, ended]}}."""
    paths = parse_contestants(args.contestants)
    files = [path for path in paths.values() if path.endswith((".jsonl", ".json"))]
    if not args.dataset and not files:
        stop("--dataset is empty: the policies need prompts to answer")
    source = args.dataset or files[0]
    prompts = [row["prompt"] for row in load_limited(source, args.max_rows, "prompt")]
    rows = [{"prompt": prompt, "answers": {}} for prompt in prompts]
    for i, (name, path) in enumerate(paths.items()):
        if path in files:
            answers = read_answers(path, prompts)
        else:  # seeds of their own: a policy against itself shall not be all ties
            answers = sample_answers(path, prompts, device, args, args.seed + i)
        num_cut = sum(not ended for _, ended in answers)
        if num_cut:
            print(f"{name}: {num_cut} of {len(answers)} answers were cut off")
        for row, answer in zip(rows, answers, strict=True):
            row["answers"][name] = list(answer)
    return rows


def pairs_of(rows):
    """Rows of `contest` -> pairs as of `labelled_pairs`: every two contestants on each prompt."""
    pairs = []
    for i, row in enumerate(rows):
        for names in itertools.combinations(row["answers"], 2):
            texts = [row["answers"][name][0] for name in names]
            ended = [row["answers"][name][1] for name in names]
            pair = {"prompt": row["prompt"], "row": i, "names": list(names), "answers": texts}
            pairs.append(pair | {"ended": ended})
    return pairs


# --- The judge ------------------------------------------------------------------------------------


def verdict_logits(judge, tokenizer, prompts):
    """Prompts of the judge -> probability of [[A]] against [[B]], and of both together: (N,), (N,).

    Where the second is near 0 the judge would write something else, and the first says little.
    """
    answers = [["[[A]]", "[[B]]"] for _ in prompts]
    cut_off = [False] * (2 * len(prompts))  # what would come after the verdict does not matter
    batch = encode(tokenizer, prompts, answers, None, cut_off).to(judge.device)
    logps = fixed_logps(judge, batch, 1.0, len(cut_off)).sum(1).view(-1, 2).double().cpu()
    return (logps[:, 0] - logps[:, 1]).sigmoid(), logps.exp().sum(1)


VALUES = {"A": 1.0, "C": 0.5, "B": 0.0, None: None}


def ask(judge, tokenizer, prompts, args):
    """Prompts of the judge -> probability of A for each, or None without a verdict; and what came
    with it: the explanation, or the probability of both verdicts together."""
    if args.verdict == "logits":
        values, mass = verdict_logits(judge, tokenizer, prompts)
        return values.tolist(), mass.tolist()
    sampling = (1, args.max_explanation_tokens, args.judge_temperature)
    _, texts, _ = generate(judge, tokenizer, prompts, *sampling)
    return [VALUES[parse_verdict(text)] for text in texts], texts


def why_not(pair, prompts, judge, tokenizer, args):
    """Why a pair is not shown to the judge: "equal", "too long", or "" where it is."""
    if pair["answers"][0] == pair["answers"][1]:
        return "equal"
    room = args.max_explanation_tokens
    if args.verdict == "logits":
        room = len(encode_answers(tokenizer, "", ["[[A]]"])[1][0])
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    return "too long" if longest + room > judge.context else ""


def judge_pairs(judge, tokenizer, template, pairs, args):
    """Pairs -> rows of judgements.jsonl: the pairs with what the judge says in both orders.

    `probabilities`: of A in each order, null where there is no verdict; `probability`: that the
    first answer is the better one, their soft label; `why_not`: why a pair was not judged.
    """
    rows = []
    prompts = []
    for pair in pairs:
        first, second = pair["answers"]
        both = [
            judge_prompt(template, pair["prompt"], first, second),
            judge_prompt(template, pair["prompt"], second, first),
        ]
        reason = why_not(pair, both, judge, tokenizer, args)
        rows.append(pair | {"why_not": reason, "probabilities": [None, None], "probability": None})
        if not reason:
            prompts += both
        elif reason == "equal":
            rows[-1] |= {"probabilities": [0.5, 0.5], "probability": 0.5}
    shown = [row for row in rows if not row["why_not"]]
    if not shown:
        return rows
    values, notes = ask(judge, tokenizer, prompts, args)
    note = "explanations" if args.verdict == "text" else "verdict_mass"
    for i, row in enumerate(shown):
        in_order, swapped = values[2 * i : 2 * i + 2]
        row |= {"probabilities": [in_order, swapped], note: notes[2 * i : 2 * i + 2]}
        if in_order is None or swapped is None:
            row["why_not"] = "no verdict"
        else:
            row["probability"] = soft_preference(in_order, swapped)
    return rows


def add_scores(rows, score):
    """Put the reward model's two scores into each row."""
    prompts, texts, given = [], [], []
    for row in rows:
        for text, ended in zip(row["answers"], row["ended"], strict=True):
            prompts.append(row["prompt"])
            texts.append(text)
            given.append({"ended": ended})
    scores = score(prompts, texts, given)
    for i, row in enumerate(rows):
        row["scores"] = scores[2 * i : 2 * i + 2]


def preference_rows(judgements):
    """Judgements -> rows for rm_bt.py and dpo_nll.py: the likelier answer is the chosen one.

    Equal answers, empty ones and pairs without a verdict make none. Book 13.2.2.
    """
    rows = []
    for row in judgements:
        answers = row["answers"]
        if row["why_not"] or not all(text.strip() for text in answers):
            continue
        probability = row["probability"]
        if probability < 0.5:
            answers = answers[::-1]
            probability = 1 - probability
        pair = {"prompt": row["prompt"], "chosen": answers[0], "rejected": answers[1]}
        rows.append(pair | {"probability": probability})
    return rows


# --- Results --------------------------------------------------------------------------------------


def counted(judgements):
    """Judgements that have an outcome, as columns: outcome (won), soft label, difference of lengths
    in characters, of scores, and the row; each (N,). Equal answers are ties."""
    kept = [row for row in judgements if row["probability"] is not None]
    both = [row["probabilities"] for row in kept]
    in_order, swapped = torch.tensor(both, dtype=torch.float64).view(-1, 2).T
    lengths = [len(row["answers"][0]) - len(row["answers"][1]) for row in kept]
    scores = [row["scores"][0] - row["scores"][1] for row in kept if "scores" in row]
    return {
        "won": outcomes(in_order, swapped),
        "soft": soft_preference(in_order, swapped),
        "length": torch.tensor(lengths, dtype=torch.float64),
        "score": torch.tensor(scores, dtype=torch.float64),
        "row": torch.tensor([row["row"] for row in kept]),
    }


def about_the_judge(judgements, verdict):
    """Metrics of the judge itself: contradictions, its preference for a place, what it left out."""
    asked = [row for row in judgements if row["why_not"] in ("", "no verdict")]
    shown = [row for row in judgements if not row["why_not"]]
    metrics = {"no_verdict": (len(asked) - len(shown)) / max(1, len(asked))}
    if shown:
        in_order, swapped = torch.tensor([row["probabilities"] for row in shown]).double().T
        metrics["contradictions"] = contradicts(in_order, swapped).double().mean().item()
        metrics["first_place"] = first_place(in_order, swapped).item()
    if shown and verdict == "logits":
        masses = [sum(row["verdict_mass"]) / 2 for row in shown]
        metrics["verdict_mass"] = sum(masses) / len(masses)
    return metrics


def with_interval(statistic, columns, args):
    """A statistic of columns (see `counted`) -> [value, low, high] of numbers or lists."""
    everything = torch.arange(len(columns["row"]))
    interval = bootstrap_interval(statistic, columns["row"], args.num_resamples, args.seed)
    return [value.tolist() for value in (statistic(everything), *interval)]


def label_results(columns, args):
    """Agreement with the labels of pairs, whose chosen answer is the first -> {name: [value, low,
    high]}."""
    soft = columns["soft"] - 0.5
    longer = columns["length"]
    statistics = {
        "agreement": lambda rows: columns["won"][rows].mean(),
        "agreement_soft": lambda rows: pair_accuracy(soft[rows]),
        "agreement_better_longer": lambda rows: pair_accuracy(soft[rows][longer[rows] > 0]),
        "agreement_better_shorter": lambda rows: pair_accuracy(soft[rows][longer[rows] < 0]),
    }
    if len(columns["score"]):
        score = columns["score"]
        statistics["reward_model_accuracy"] = lambda rows: pair_accuracy(score[rows])
        statistics["reward_model_less_judge"] = lambda rows: (
            pair_accuracy(score[rows]) - pair_accuracy(soft[rows])
        )
    return {name: with_interval(statistic, columns, args) for name, statistic in statistics.items()}


def contest_results(columns, args):
    """Win rates of the first of two contestants over the second -> {name: [value, low, high]}."""
    won = columns["won"]
    statistics = {
        "win_rate": lambda rows: won[rows].mean(),
        "lc_win_rate": lambda rows: length_controlled_win_rate(won[rows], columns["length"][rows]),
    }
    if len(columns["score"]):
        score = columns["score"]
        statistics["reward_model_win_rate"] = lambda rows: pair_accuracy(score[rows])
    return {name: with_interval(statistic, columns, args) for name, statistic in statistics.items()}


def rating_results(judgements, names, args):
    """Ratings of more than two contestants -> {"rating of NAME": [value, low, high]}."""
    kept = [row for row in judgements if row["probability"] is not None]
    first = torch.tensor([names.index(row["names"][0]) for row in kept])
    second = torch.tensor([names.index(row["names"][1]) for row in kept])
    columns = counted(judgements)
    won = columns["won"]

    def statistic(rows):
        return arena_scale(battle_ratings(first[rows], second[rows], won[rows], len(names)))

    of_all = with_interval(statistic, columns, args)
    results = {}
    for i, name in enumerate(names):
        results[f"rating of {name}"] = [values[i] for values in of_all]
    return results


def report(judgements, args):
    """Print a table of what was found -> its rows {what, value, low, high}."""
    why_not = [row["why_not"] for row in judgements]
    counts = [f"{why_not.count(reason)} {reason}" for reason in sorted(set(why_not) - {""})]
    said = ", ".join(counts) or "none"
    print(f"{len(judgements)} pairs, each in both orders; not judged: {said}")
    results = {name: [value] for name, value in about_the_judge(judgements, args.verdict).items()}
    names = []
    for row in judgements:
        names += [name for name in row["names"] if name not in names]
    for pair in itertools.combinations(names, 2):
        of_pair = counted([row for row in judgements if row["names"] == list(pair)])
        if not len(of_pair["row"]):
            print(f"no verdict on {pair[0]} and {pair[1]}: nothing to count")
        elif args.contestants:
            for name, values in contest_results(of_pair, args).items():
                results[f"{name} of {pair[0]} against {pair[1]}"] = values
        else:
            results |= label_results(of_pair, args)
    if len(names) > 2:
        results |= rating_results(judgements, names, args)
    if results["no_verdict"][0] > 0.1:
        print("many texts without a verdict: read them in judgements.jsonl; were they cut off?")
    rows = []
    for name, values in results.items():
        shown = [f"{value:.4g}" for value in values]
        interval = f"   ({shown[1]} to {shown[2]})" if len(shown) > 1 else ""
        print(f"    {name:<40} {shown[0]:>7}{interval}")
        rows.append(dict(zip(("what", "value", "low", "high"), (name, *values), strict=False)))
    return rows


# --- Judging --------------------------------------------------------------------------------------


def load_pairs(args, run, device):
    """-> pairs to judge; with --contestants also the rows of answers.jsonl, their source."""
    if not args.contestants:
        if not args.dataset:
            stop("--dataset is empty: there is nothing to judge")
        return labelled_pairs(args), []
    rows = run.read_rows("answers.jsonl") if args.resume else []
    rows = rows or contest(args, device)
    return pairs_of(rows), rows


def main(args: Args):
    run = Run(args)
    device = pick_device(args.device)
    template = load_template(args)
    if args.write_sft:
        if args.contestants:
            stop("--write-sft needs labelled pairs, and --contestants have none")
        rows = sft_rows(labelled_pairs(args), template)
        run.begin({}, 0)
        run.write_rows("sft.jsonl", rows)
        print(f"{len(rows)} rows that train a judge: sft.py --dataset {run.folder / 'sft.jsonl'}")
        return
    tokenizer = load_tokenizer(args.model)
    judge = hold_as_computed(load_model(AutoModelForCausalLM, args.model, device, args.dtype))
    score = None
    if args.reward_model:
        options = (args.reward_model, device, args.dtype, args.batch_size)
        score = load_reward("verifier", None, *options)
    pairs, answers = load_pairs(args, run, device)
    check_vocabulary(tokenizer, judge, pairs)
    if args.show_rows:
        shown = []
        for pair in pairs[: args.show_rows]:
            prompt = judge_prompt(template, pair["prompt"], *pair["answers"])
            shown.append((encode_prompt(tokenizer, prompt), [], []))
        show_rows(tokenizer, shown)

    num_steps = math.ceil(len(pairs) / args.batch_size)
    torch.manual_seed(args.seed)
    run.begin({}, num_steps)
    if answers:
        run.write_rows("answers.jsonl", answers)
    print(f"{len(pairs)} pairs to judge; {num_steps} steps of {args.batch_size} pairs")
    for step in run.steps():
        part = pairs[(step - 1) * args.batch_size : step * args.batch_size]
        rows = judge_pairs(judge, tokenizer, template, part, args)
        if score:
            add_scores(rows, score)
        run.append("judgements.jsonl", rows)
        run.log(about_the_judge(rows, args.verdict))
    judgements = run.read_rows("judgements.jsonl")
    preferences = preference_rows(judgements)
    run.write_rows("preferences.jsonl", preferences)
    print(f"{len(preferences)} soft labels for rm_bt.py: {run.folder / 'preferences.jsonl'}")
    run.write_rows("results.jsonl", report(judgements, args))
    run.finish(tokenizer, {})


if __name__ == "__main__":
    run_script(main, Args, TOY)
