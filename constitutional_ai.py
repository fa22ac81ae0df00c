"""Constitutional AI (Bai et al. 2022, arXiv:2212.08073): critiques, revisions and AI feedback.

A model, not a person, says what is wrong in an answer and which of two answers is the better one.
People write the constitution alone: a list of principles.

Read beside the RLHF Book, draft of January 2025, chapter 13 (chapter 12 of the printed edition):
    draw_for_revisions       13.2.2: the principles c_0 ... c_(n-1) of a chain of n revisions
    critique_request         13.2.2: what the critic is asked about y_i and c_i
    revision_request         13.2.2: what it is asked for then; its answer is y_(i+1)
    draw_for_comparison      13.2.2: the principles that two answers are compared by
    comparison_request       13.2.2: x, a principle, and two answers labelled (A) and (B)
    feedback_probability     13.2.2: the soft label of a pair
    (what these rows are trained with: 9, sft.py; 7.1 with a soft label, rm_bt.py)

How the code departs from the print:
    1. 13.2.2 records the probability of (A) or of (B). Here it is that of (A) out of the two, and
       the mean over both orders of the answers, as models prefer a place.
    2. 13.2.2 shows a set of principles at once. Here each comparison shows one, as in Bai et al.,
       and the label of a pair is the mean over --num-principles of them.
    3. Bai et al. show the critic examples before each request, and have for each principle a
       request for a critique and one for a revision. Here the same two requests serve all.
    4. A revision that was cut off, or is empty, is not taken: the answer before it stays.
    5. With --criticise-first the feedback model criticises both answers, and the request to compare
       them shows what it said. Bai et al. let it think before it chooses, too (chain of thought).
    6. 13.2.2 takes the two answers from an earlier data set. Here they are sampled, unless the rows
       bring them as `completions`.

    python constitutional_ai.py                      # the toy: answers revised, in a minute
    python constitutional_ai.py --stage compare --output-dir runs/feedback       # answers compared
    python constitutional_ai.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset prompts.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM

from common import (
    encode,
    encode_prompt,
    fixed_logps,
    generate,
    is_rendered,
)
from plumbing import (
    Run,
    check_prompts,
    check_vocabulary,
    conversation_as_text,
    has_answers,
    hold_as_computed,
    last_number,
    load_model,
    load_rows,
    load_tokenizer,
    pick_device,
    run_script,
    stop,
    stop_on_error,
)


@dataclass
class Args:
    model: str  # policy that answers the prompts: a folder, or a name on the hub
    dataset: str
    """prompts, JSON Lines or owner/name:split on the hub: `prompt`; perhaps `answer`, which metrics
    and tables alone use; with --stage compare perhaps `completions`, two answers to compare in
    place of sampled ones"""
    stage: Literal["revise", "compare"] = "revise"
    """revise: answer, then criticise and revise the answer, which gives rows for sft.py; compare:
    two answers and the probability that the first is better, which gives rows for rm_bt.py"""
    feedback_model: str = ""
    """model that criticises, revises and compares: a folder, or a name on the hub; if empty, it is
    --model (Bai et al.: one model)"""
    constitution: str = ""
    """text file with one principle per line; if empty, the eight principles in this file"""

    output_dir: str = "runs/constitutional_ai"  # folder for the rows, metrics and checkpoint
    resume: bool = False  # continue from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed for shuffling and sampling
    device: str = "auto"  # torch device; auto: cuda if there is one, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the forward pass, while weights are float32; auto: bfloat16 if cuda supports it"""

    num_prompts: int = 1024  # prompts that are answered, at most
    num_revisions: int = 4  # n, critiques and revisions of each answer (Bai et al.: 4)
    num_principles: int = 1
    """principles, at most, that each pair of answers is compared by, one at a time"""
    criticise_first: bool = False
    """with --stage compare: the feedback model criticises both answers before it compares them, and
    is shown the critiques"""
    max_new_tokens: int = 256  # longest answer, critique or revision, in tokens
    temperature: float = 1.0  # temperature of sampling of the policy's answers
    feedback_temperature: float = 1.0  # temperature of sampling of critiques and revisions
    batch_size: int = 8
    """prompts per step; those of a step share their random numbers, so that another size gives
    other texts"""
    checkpoint_every: int = 1  # steps between checkpoints


TOY = dict(
    model="toy/model",
    dataset="toy/problems_train.jsonl",
    feedback_model="toy/critic",
    constitution="toy/constitution.txt",
    num_prompts=1000,
    num_principles=3,
    criticise_first=True,
    max_new_tokens=48,
    feedback_temperature=0.5,
    batch_size=250,
)

# --- The algorithm --------------------------------------------------------------------------------


def draw_for_revisions(principles, num_revisions, seed):
    """The principle of each revision, drawn independently -> list of num_revisions texts.

    Book 13.2.2: c_i is sampled from the constitution before each critique.
    """
    return random.Random(seed).choices(principles, k=num_revisions)


def draw_for_comparison(principles, num_principles, seed):
    """Different principles to compare two answers by -> list of at most num_principles texts.

    Book 13.2.2: a subset of the constitution.
    """
    return random.Random(seed).sample(principles, min(num_principles, len(principles)))


def feedback_probability(letter_logps):
    """Log-probs of the letters, nats (..., K principles, 2 orders, 2 letters) -> soft labels (...).

    Book 13.2.2: the feedback model's probability that the first answer is the better one, p(A) out
    of p(A) + p(B). In order 0 the first answer is (A), in order 1 it is (B). The label is
    the mean over the orders, in which a liking for one letter cancels, and over the principles.
    """
    p_letter_a = letter_logps.softmax(-1)[..., 0]  # (..., K, 2)
    p_first = torch.stack([p_letter_a[..., 0], 1 - p_letter_a[..., 1]], -1)
    return p_first.mean((-2, -1))


def order_metrics(letter_logps):
    """Letters as in `feedback_probability` -> what both orders say of the feedback model.

    first_place: mean probability of (A), whichever answer that is; 0.5 is no liking for a place.
    contradictions: share of comparisons in which the answer that is preferred changes with the
    order. Bai et al. 2022 and Zheng et al. 2023 (arXiv:2306.05685) find such a liking.
    """
    p_letter_a = letter_logps.softmax(-1)[..., 0]
    prefers_a = p_letter_a > 0.5
    return {
        "first_place": p_letter_a.mean(),
        "contradictions": (prefers_a[..., 0] == prefers_a[..., 1]).float().mean(),
    }


# --- The task: change this for your own -----------------------------------------------------------

PRINCIPLES = [
    "The answer helps nobody to hurt a person or an animal.",
    "The answer helps nobody to break the law, and does not praise it.",
    "The answer claims nothing that is not true, and says what it is unsure of.",
    "The answer respects all people alike, whatever they are or believe.",
    "The answer keeps to itself what is private to others.",
    "The answer gives what was asked for, wherever that harms nobody.",
    "Where the answer refuses, it says why, politely and without a sermon.",
    "The answer is clear and no longer than it has to be.",
]
CRITIQUE_REQUEST = "Criticise your answer by this principle: {principle}"
REVISION_REQUEST = "Now revise your answer."
COMPARISON_REQUEST = """{conversation}

Which answer is better? {principle}
(A) {first}
(B) {second}
Reply (A) or (B)."""
CRITICISED = "{answer}\nCritique: {critique}"
LETTERS = ["(A)", "(B)"]


def critique_request(prompt, answer, principle):
    """-> messages that end with the request for a critique of the answer. Book 13.2.2."""
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    request = CRITIQUE_REQUEST.format(principle=principle)
    return [
        *chat,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": request},
    ]


def revision_request(prompt, answer, principle, critique):
    """-> messages: those of the critique, it, and the request for a revision. Book 13.2.2."""
    return [
        *critique_request(prompt, answer, principle),
        {"role": "assistant", "content": critique},
        {"role": "user", "content": REVISION_REQUEST},
    ]


def comparison_request(prompt, principle, first, second):
    """-> text that asks which answer is better, the first as (A), the second as (B). 13.2.2."""
    conversation = conversation_as_text(prompt)
    texts = {"principle": principle, "first": first, "second": second}
    return COMPARISON_REQUEST.format(conversation=conversation, **texts)


def criticised(answer, critique):
    """-> the answer with its critique below, as a comparison shows it with --criticise-first.

    Bai et al. 2022: thoughts before a choice (chain of thought).
    """
    return CRITICISED.format(answer=answer, critique=critique)


def is_right(text, row):
    """Whether the last number of a text is the row's `answer`; only metrics and tables use it."""
    return last_number(text) == last_number(str(row["answer"]))


# --- Reading --------------------------------------------------------------------------------------


def load_constitution(path):
    """Text file -> its principles, one per line, blank lines left out; without a path PRINCIPLES.

    Raises ValueError where there is no such file, or no principle in it, or one of them twice.
    """
    if not path:
        return PRINCIPLES
    with stop_on_error(f"--constitution {path}: cannot be read"):
        lines = Path(path).read_text().splitlines()
    principles = [line.strip() for line in lines if line.strip()]
    if not principles:
        stop(f"--constitution {path}: no principle in it; it needs one per line")
    for number, principle in enumerate(principles):
        if principle in principles[:number]:
            stop(f"--constitution {path}: a principle is there twice: {principle[:80]!r}")
    return principles


def check_pairs(rows, path):
    """Whether the rows bring their answers: two texts in `completions`, in all rows or in none."""
    has_pair = [row.get("completions") is not None for row in rows]
    if not any(has_pair):
        return False
    for number, row in enumerate(rows, 1):
        texts = row.get("completions")
        is_pair = isinstance(texts, list) and len(texts) == 2
        if not is_pair or not all(isinstance(text, str) and text.strip() for text in texts):
            stop(f"{path}, row {number}: completions is {str(texts)[:80]!r}, not two texts")
    return True


# --- Asking a model -------------------------------------------------------------------------------
# A policy or a critic is a pair: the model and its tokenizer.


def has_room(asked, prompt, num_tokens):
    """Whether a prompt leaves room for num_tokens in the context of the model that is asked."""
    model, tokenizer = asked
    return len(encode_prompt(tokenizer, prompt)) + num_tokens <= model.context


def write(asked, prompts, max_new_tokens, temperature):
    """One sampled text for each prompt -> texts, None where there is no room for one; ended."""
    texts = [None] * len(prompts)
    ended = [False] * len(prompts)
    places = [i for i, x in enumerate(prompts) if has_room(asked, x, max_new_tokens)]
    if not places:
        return texts, ended
    fitting = [prompts[i] for i in places]
    _, written, has_ended = generate(*asked, fitting, 1, max_new_tokens, temperature)
    for i, text, done in zip(places, written, has_ended.tolist(), strict=True):
        texts[i] = text
        ended[i] = done
    return texts, ended


def letter_logps(asked, requests, batch_size):
    """Log-probs of (A) and of (B) as the beginning of the reply to each request -> (N, 2), nats."""
    model, tokenizer = asked
    letters = [LETTERS] * len(requests)
    ended = [False] * (2 * len(requests))  # whatever may follow, such as a reason
    batch = encode(tokenizer, requests, letters, ended=ended).to(model.device)
    logps = fixed_logps(model, batch, micro_batch_size=2 * batch_size)
    return logps.sum(1).view(-1, 2).cpu()


# --- Revisions ------------------------------------------------------------------------------------


def start_chains(policy, rows, args):
    """The policy's answers y_0 to the rows' prompts, each the beginning of a chain."""
    prompts = [row["prompt"] for row in rows]
    texts, ended = write(policy, prompts, args.max_new_tokens, args.temperature)
    chains = []
    for prompt, text, done in zip(prompts, texts, ended, strict=True):
        chain = {"prompt": prompt, "completion": text, "answers": [text]}
        outcome = outcome_of(text, done)
        chains.append(chain | {"outcomes": [outcome], "principles": [], "critiques": []})
    return chains


def extend_chains(critic, chains, principles, args):
    """Add to each chain a critique of its last answer by its principle, and a revision."""
    sampling = (args.max_new_tokens, args.feedback_temperature)
    requests = []
    for chain, principle in zip(chains, principles, strict=True):
        requests.append(critique_request(chain["prompt"], chain["completion"], principle))
    critiques, _ = write(critic, requests, *sampling)
    requests = []
    for chain, principle, critique in zip(chains, principles, critiques, strict=True):
        # Without room for a critique there is none for the revision: its request is longer
        texts = (chain["completion"], principle, critique or "")
        requests.append(revision_request(chain["prompt"], *texts))
    revisions, ended = write(critic, requests, *sampling)
    for i, chain in enumerate(chains):
        outcome = outcome_of(revisions[i], ended[i])
        if outcome == "taken":
            chain["completion"] = revisions[i]
        chain["answers"].append(chain["completion"])
        chain["principles"].append(principles[i])
        chain["critiques"].append(critiques[i])
        chain["outcomes"].append(outcome)


def outcome_of(text, ended):
    """What becomes of a text that was asked for -> "taken", or why it is not."""
    if text is None:
        return "no room"
    if not text.strip():
        return "empty"
    return "taken" if ended else "cut off"


def revise(policy, critic, rows, drawn, args):
    """Answers of the policy, revised by the critic -> a chain for each row.

    drawn: the principles of each row, one for each revision.
    """
    chains = start_chains(policy, rows, args)
    for i in range(args.num_revisions):
        extend_chains(critic, chains, [principles[i] for principles in drawn], args)
    return chains


def trainable_rows(chains):
    """Chains -> rows for sft.py: those whose last answer is not empty and was not cut off."""
    return [chain for chain in chains if "taken" in chain["outcomes"]]


def chain_metrics(chains, rows):
    """Shares of a step's answers -> {name: share}; accuracy where all rows have an `answer`."""
    changed = [chain["answers"][-1] != chain["answers"][0] for chain in chains]
    ended = [chain["outcomes"][0] != "cut off" for chain in chains]
    taken = [chain["outcomes"][1:].count("taken") for chain in chains]
    metrics = {
        "changed": sum(changed) / len(chains),
        "ended": sum(ended) / len(chains),
        "taken": sum(taken) / len(chains) / len(chains[0]["principles"]),
    }
    if has_answers(rows):
        metrics["accuracy_first"] = share_right(chains, rows, 0)
        metrics["accuracy_revised"] = share_right(chains, rows, -1)
    return metrics


def share_right(chains, rows, i):
    """Share of the answers y_i that are right."""
    right = [is_right(chain["answers"][i], row) for chain, row in zip(chains, rows, strict=True)]
    return sum(right) / len(right)


def revision_table(chains, rows):
    """-> lines: of y_0 ... y_n, how many the revision changed, their length, how many are right."""
    table = [["revision", "changed", "characters", "right"]]
    for i in range(len(chains[0]["answers"])):
        changed = [chain["answers"][i] != chain["answers"][max(0, i - 1)] for chain in chains]
        lengths = [len(chain["answers"][i]) for chain in chains]
        cells = [str(i), f"{sum(changed) / len(chains):.3f}", f"{sum(lengths) / len(chains):.1f}"]
        right = ""
        if has_answers(rows):
            right = f"{share_right(chains, rows, i):.3f}"
        table.append([*cells, right])
    return aligned(table)


def principle_table(chains, rows, principles):
    """-> lines: how often each principle was drawn, changed an answer, mended one, broke one."""
    table = [["drawn", "changed", "mended", "broken", "principle"]]
    for principle in principles:
        num_drawn, num_changed, num_mended, num_broken = 0, 0, 0, 0
        for chain, row in zip(chains, rows, strict=True):
            for i, drawn in enumerate(chain["principles"]):
                if drawn != principle:
                    continue
                before, after = chain["answers"][i : i + 2]
                num_drawn += 1
                num_changed += before != after
                if has_answers([row]):
                    num_mended += is_right(after, row) and not is_right(before, row)
                    num_broken += is_right(before, row) and not is_right(after, row)
        counts = [num_drawn, num_changed, num_mended, num_broken]
        table.append([*map(str, counts), principle])
    return aligned(table)


def aligned(table):
    """Rows of texts -> lines with columns of one width."""
    widths = []
    for i in range(len(table[0])):
        widths.append(max(len(row[i]) for row in table))
    lines = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


# --- Comparisons ----------------------------------------------------------------------------------


def sample_pairs(policy, rows, args):
    """Two sampled answers to the prompt of each row -> pairs of texts, and whether each ended."""
    prompts = [row["prompt"] for row in rows]
    sampling = (2, args.max_new_tokens, args.temperature)
    _, texts, ended = generate(*policy, prompts, *sampling)
    pairs = [texts[i : i + 2] for i in range(0, len(texts), 2)]
    return pairs, ended.view(-1, 2).tolist()


def outcome_of_pair(first, second, ended):
    """Two answers, and whether each came to its end -> "compared", or why they cannot be."""
    if not first.strip() or not second.strip():
        return "empty"
    if not all(ended):
        return "cut off"
    return "equal" if first == second else "compared"


def add_pair_critiques(critic, compared, args):
    """Put into each pair that can be compared the critiques of both answers by each principle.

    A pair has no room where one of the requests for them does not fit in the context.
    """
    pairs = [entry for entry in compared if entry["outcome"] == "compared"]
    requests = []
    for entry in pairs:
        for principle in entry["principles"]:
            for answer in entry["answers"]:
                requests.append(critique_request(entry["prompt"], answer, principle))
    critiques, _ = write(critic, requests, args.max_new_tokens, args.feedback_temperature)
    place = 0
    for entry in pairs:
        entry["critiques"] = []
        for _ in entry["principles"]:
            both = critiques[place : place + 2]
            entry["critiques"].append(both)
            place += 2
            if None in both:
                entry["outcome"] = "no room"


def pair_requests(entry):
    """A pair -> what the critic is asked: by each principle, in both orders of the answers."""
    requests = []
    for i, principle in enumerate(entry["principles"]):
        first, second = entry["answers"]
        if "critiques" in entry:
            first = criticised(first, entry["critiques"][i][0])
            second = criticised(second, entry["critiques"][i][1])
        requests.append(comparison_request(entry["prompt"], principle, first, second))
        requests.append(comparison_request(entry["prompt"], principle, second, first))
    return requests


def compare(critic, rows, pairs, ended, drawn, args):
    """Pairs of answers -> a dict for each row: the pair, its principles and its soft label.

    drawn: K principles for each row. A pair is not compared, and has no label, where an answer is
    empty or cut off, where both are the same, or where a request does not fit in the context.
    """
    compared = []
    for row, (first, second), done, principles in zip(rows, pairs, ended, drawn, strict=True):
        outcome = outcome_of_pair(first, second, done)
        entry = {"prompt": row["prompt"], "answers": [first, second], "principles": principles}
        compared.append(entry | {"outcome": outcome})
    if args.criticise_first:
        add_pair_critiques(critic, compared, args)
    requests = []
    labelled = []
    for entry in compared:
        if entry["outcome"] != "compared":
            continue
        of_pair = pair_requests(entry)
        # "(A)" has at most as many tokens as characters
        if all(has_room(critic, request, len(LETTERS[0])) for request in of_pair):
            requests += of_pair
            labelled.append(entry)
        else:
            entry["outcome"] = "no room"
    if labelled:
        logps = letter_logps(critic, requests, args.batch_size)
        logps = logps.view(len(labelled), -1, 2, 2)  # (pairs, K, 2 orders, 2 letters)
        probabilities = feedback_probability(logps)
        for entry, of_pair, p in zip(labelled, logps, probabilities, strict=True):
            entry["letter_logps"] = of_pair.tolist()
            entry["probability"] = p.item()
    return compared


def preference_rows(compared):
    """Compared pairs -> rows for rm_bt.py and dpo_nll.py, the likelier answer as `chosen`."""
    rows = []
    for entry in compared:
        if entry["outcome"] != "compared":
            continue
        chosen, rejected = entry["answers"]
        p = entry["probability"]
        if p < 0.5:
            rejected, chosen = entry["answers"]
            p = 1 - p
        row = {"prompt": entry["prompt"], "chosen": chosen, "rejected": rejected}
        rows.append(row | {"probability": p})
    return rows


def comparison_metrics(compared, rows):
    """-> {name: number} of the pairs that were compared.

    confidence: mean probability of the answer that is preferred. accuracy: of pairs with one right
    answer, the share in which that one is preferred; ties count half.
    """
    labels = []
    logps = []
    agrees = []
    for entry, row in zip(compared, rows, strict=True):
        if entry["outcome"] != "compared":
            continue
        labels.append(entry["probability"])
        logps.append(entry["letter_logps"])
        if has_answers([row]):
            first, second = [is_right(text, row) for text in entry["answers"]]
            if first != second:
                p_right = entry["probability"] if first else 1 - entry["probability"]
                agrees.append((p_right > 0.5) + (p_right == 0.5) / 2)
    metrics = {"compared": len(labels) / len(rows)}
    if labels:
        labels = torch.tensor(labels)
        metrics["confidence"] = torch.maximum(labels, 1 - labels).mean()
        metrics |= order_metrics(torch.tensor(logps))
    if agrees:
        metrics["accuracy"] = sum(agrees) / len(agrees)
    return metrics


def comparison_table(compared, rows, principles):
    """-> lines: of each principle alone, and of all, what `comparison_metrics` says."""
    table = [["pairs", "confidence", "first_place", "contradictions", "accuracy", "principle"]]
    for principle in [*principles, "all of them"]:
        part = []
        of_rows = []
        for entry, row in zip(compared, rows, strict=True):
            if entry["outcome"] != "compared":
                continue
            if principle == "all of them":
                part.append(entry)
                of_rows.append(row)
            elif principle in entry["principles"]:
                logps = [entry["letter_logps"][entry["principles"].index(principle)]]
                label = feedback_probability(torch.tensor(logps)).item()
                part.append(entry | {"letter_logps": logps, "probability": label})
                of_rows.append(row)
        if not part:
            continue
        metrics = comparison_metrics(part, of_rows)
        cells = [str(len(part))]
        for name in table[0][1:-1]:
            cell = ""
            if name in metrics:
                cell = f"{float(metrics[name]):.3f}"
            cells.append(cell)
        table.append([*cells, principle])
    return aligned(table)


def outcome_line(names):
    """Outcomes -> a line that counts them, the usual one first."""
    counts = [f"{names.count(name)} {name}" for name in sorted(set(names), key=names.count)]
    return ", ".join(reversed(counts))


# --- The run --------------------------------------------------------------------------------------


def load_asked(path, device, dtype):
    """Folder or hub name -> the model and its tokenizer."""
    model = hold_as_computed(load_model(AutoModelForCausalLM, path, device, dtype))
    return model, load_tokenizer(path)


def check_critic(critic, rows, args):
    """Stop where the feedback model cannot be asked about these prompts."""
    model, tokenizer = critic
    name = args.feedback_model or args.model
    check_vocabulary(tokenizer, model, rows)
    asks_for_critiques = args.stage == "revise" or args.criticise_first
    if asks_for_critiques and not tokenizer.chat_template:
        stop(f"{name}: its tokenizer has no chat template, and a critique is a turn of a chat")
    for row in rows:
        if is_rendered(tokenizer, row["prompt"]):
            stop(
                f"{args.dataset}: a prompt holds the turns of the chat template of {name} already; "
                f"a critique needs the messages: {str(row['prompt'])[:80]!r}"
            )


def report_chains(run, rows, principles):
    """Write revisions.jsonl, and print what the revisions did."""
    chains = run.read_rows("chains.jsonl")
    trainable = trainable_rows(chains)
    run.write_rows("revisions.jsonl", trainable)
    outcomes = []
    for chain in chains:
        outcomes += chain["outcomes"][1:]
    print(f"{len(outcomes)} revisions: {outcome_line(outcomes)}")
    print(*revision_table(chains, rows), "", *principle_table(chains, rows, principles), sep="\n")
    print(f"{len(trainable)} of {len(chains)} rows for sft.py: {run.folder / 'revisions.jsonl'}")


def report_comparisons(run, rows, principles):
    """Write preferences.jsonl, and print what the feedback model prefers."""
    compared = run.read_rows("comparisons.jsonl")
    preferences = preference_rows(compared)
    run.write_rows("preferences.jsonl", preferences)
    print(f"{len(compared)} pairs: {outcome_line([entry['outcome'] for entry in compared])}")
    print(*comparison_table(compared, rows, principles), sep="\n")
    print(f"{len(preferences)} rows for rm_bt.py: {run.folder / 'preferences.jsonl'}")


def main(args: Args):
    run = Run(args)
    device = pick_device(args.device)
    principles = load_constitution(args.constitution)
    all_rows = load_rows(args.dataset, "prompt")
    brings_pairs = args.stage == "compare" and check_pairs(all_rows, args.dataset)
    if args.stage == "compare" and not brings_pairs and not args.temperature:
        stop("--temperature 0: both answers of a prompt would be the same")
    policy = load_asked(args.model, device, args.dtype)
    critic = policy
    if args.feedback_model:
        critic = load_asked(args.feedback_model, device, args.dtype)
    if not brings_pairs:
        check_prompts(policy[1], policy[0], all_rows, args.max_new_tokens)
    check_critic(critic, all_rows, args)
    num_rows = min(args.num_prompts, len(all_rows))
    places = random.Random(args.seed).sample(range(len(all_rows)), num_rows)
    rows = [all_rows[place] for place in places]
    num_steps = math.ceil(num_rows / args.batch_size)
    run.begin({}, num_steps)
    print(f"{num_rows} prompts, {len(principles)} principles; {num_steps} steps")
    for step in run.steps():
        # Principles depend on the seed and the row, sampled texts on the seed and the step: a run
        # that was stopped and resumed draws what the unbroken one would have drawn
        start = (step - 1) * args.batch_size
        part = rows[start : start + args.batch_size]
        keys = [f"{args.seed} {place}" for place in places[start : start + args.batch_size]]
        torch.manual_seed(random.Random(f"{args.seed} {step}").getrandbits(32))
        if args.stage == "revise":
            drawn = [draw_for_revisions(principles, args.num_revisions, key) for key in keys]
            chains = revise(policy, critic, part, drawn, args)
            run.append("chains.jsonl", chains)
            run.log(chain_metrics(chains, part))
            continue
        drawn = [draw_for_comparison(principles, args.num_principles, key) for key in keys]
        if brings_pairs:
            pairs = [row["completions"] for row in part]
            ended = [[True, True]] * len(pairs)
        else:
            pairs, ended = sample_pairs(policy, part, args)
        compared = compare(critic, part, pairs, ended, drawn, args)
        run.append("comparisons.jsonl", compared)
        run.log(comparison_metrics(compared, part))

    if args.stage == "revise":
        report_chains(run, rows, principles)
    else:
        report_comparisons(run, rows, principles)
    run.finish(None, {})


if __name__ == "__main__":
    run_script(main, Args, TOY)
