"""Make the toy: column addition written out step by step, by demonstrators who make mistakes.

587+  46   ->   7+6+0=13      one column a line, from the right: digit + digit + carry = total
                   8+4+1=13
                   5+0+1=06
                   633           the answer

70 in 100 demonstrators forget carries from the third column on, and 2 per cent of all steps slip. A
model that imitates them learns the mistakes too; preferences and rewards can repair them.

    python toy/make.py               # SFT rows and problems, from a seed
    python toy/make.py --model       # toy/model with random weights, in place of the trained ones
    python sft.py --output-dir runs/toy-sft
    cp runs/toy-sft/final/* toy/model/
    python toy/make.py --sampled     # what raters say of the trained model's own completions

toy/judge learned from the pairs of these raters, in both orders, with toy/judge.txt as its prompt:

    python judge.py --write-sft --dataset toy/pref_train.jsonl --max-rows 2500 \
        --output-dir runs/toy-judge-rows
    python sft.py --model toy/model --dataset runs/toy-judge-rows/sft.jsonl --eval-size 0 \
        --num-epochs 5 --learning-rate 1e-3 --lr-schedule cosine --warmup-ratio 0.05 \
        --micro-batch-size 32 --output-dir runs/toy-judge
    cp runs/toy-judge/final/* toy/judge/

The critic of constitutional_ai.py learned from critics who make mistakes, too (see below). First it
learned to criticise and revise, then to compare two answers whose critiques it is shown:

    python toy/make.py --critic      # toy/critic with random weights, demonstrations in runs/
    python sft.py --model toy/critic --from-scratch --dataset runs/critic_train.jsonl \\
        --eval-dataset runs/critic_test.jsonl --num-epochs 1 --batch-size 16 \\
        --micro-batch-size 16 --learning-rate 2e-3 --lr-schedule cosine --max-new-tokens 48 \\
        --output-dir runs/toy-critic
    python sft.py --model runs/toy-critic/final --dataset runs/compare_train.jsonl \\
        --eval-dataset runs/compare_test.jsonl --num-epochs 1 --batch-size 32 \\
        --micro-batch-size 32 --learning-rate 5e-4 --lr-schedule cosine --max-new-tokens 48 \\
        --output-dir runs/toy-critic-compares
    cp runs/toy-critic-compares/final/* toy/critic/
"""

import itertools
import json
import random
import re
import sys
from pathlib import Path

TOY = Path(__file__).resolve().parent
SEED = 0


# --- The task: right solutions, demonstrations, and grading ---------------------------------------


def columns(prompt):
    """Digits of both numbers from the right, the shorter padded: 587+46 -> (7,6) (8,4) (5,0)."""
    a, b = (x.strip()[::-1] for x in prompt.split("+"))
    width = max(len(a), len(b))
    return [(int(x), int(y)) for x, y in zip(a.ljust(width, "0"), b.ljust(width, "0"), strict=True)]


def step_text(x, y, carry, total):
    return f"{x}+{y}+{carry}={total:02d}"


def answer_text(totals):
    """Column totals from the right -> the number written: last digits, and the whole last total."""
    digits = [str(t % 10) for t in totals[:-1]] + [str(totals[-1])]
    return "".join(reversed(digits)).lstrip("0") or "0"


def write_out(prompt, rng=None, forgets=False):
    """A solution; with `rng`, a demonstrator's, who may forget carries and slip."""
    totals, lines, carry = [], [], 0
    for i, (x, y) in enumerate(columns(prompt)):
        if forgets and i >= 2:
            carry = 0
        total = x + y + carry
        if rng and rng.random() < 0.02:
            total = max(0, total + rng.choice([-2, -1, 1, 2]))
        lines.append(step_text(x, y, carry, total))
        totals.append(total)
        carry = int(total >= 10)
    return "\n".join([*lines, answer_text(totals)])


def grade_steps(prompt, completion):
    """Label of each line: 1 right, -1 wrong, 0 right given an earlier mistake.

    A step is judged by the problem and the line before it, the answer by all lines before it.
    """
    labels, totals, pairs = [], [], columns(prompt)
    for i, line in enumerate(filter(str.strip, completion.split("\n"))):
        if i < len(pairs):
            carry = int(i > 0 and totals[-1] >= 10)
            right = line == step_text(*pairs[i], carry, sum(pairs[i]) + carry)
            total = line.rpartition("=")[2]
            totals.append(int(total) if total.isdecimal() and len(total) == 2 else 0)
        else:
            right = i == len(pairs) and line == answer_text(totals)
        labels.append((0 if -1 in labels else 1) if right else -1)
    return labels


def step_rewards(prompts, completions, rows):
    """For `grpo.py --supervision process --reward toy/make.py:step_rewards`: 1 a right line."""
    pairs = zip(prompts, completions, strict=True)
    return [[float(label == 1) for label in grade_steps(p, c)] for p, c in pairs]


def quality(prompt, completion):
    """Likert score of an answer: 5 right, else by the digits of its distance to it: 4 to 1."""
    a, b = prompt.split("+")
    answer = completion.rpartition("\n")[2]
    off = abs(int(answer) - int(a) - int(b)) if answer.isdecimal() else 10**6
    return 5 if off == 0 else 5 - min(4, len(str(off)))


# --- Data -----------------------------------------------------------------------------------------


def problems(rng, number, taken):
    """Different problems of 2 to 4 digits each, none of those taken."""
    found = []
    while len(found) < number:
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in (rng.randint(2, 4), rng.randint(2, 4)))
        prompt = f"{a:4d}+{b:4d}"
        if prompt not in taken:
            taken.add(prompt)
            found.append(prompt)
    return found


def demonstrations(rng, prompts):
    """SFT rows: each problem by one demonstrator, 70 in 100 of whom forget carries."""
    return [{"prompt": p, "completion": write_out(p, rng, rng.random() < 0.7)} for p in prompts]


def with_answers(prompts):
    return [{"prompt": p, "answer": str(sum(map(int, p.split("+"))))} for p in prompts]


def make_data(seed=SEED):
    """{file name: rows} of all that needs no model."""
    rng, taken = random.Random(seed), set()
    return {
        "sft_train.jsonl": demonstrations(rng, problems(rng, 12000, taken)),
        "sft_test.jsonl": demonstrations(rng, problems(rng, 300, taken)),
        "problems_train.jsonl": with_answers(problems(rng, 4000, taken)),
        "problems_test.jsonl": with_answers(problems(rng, 500, taken)),
    }


# --- Data that raters make of the trained model's own completions ---------------------------------


def preferences(rng, prompt, completions):
    """A pair of different Likert scores; the margin is Llama 2's for their gap: 1/3, 2/3, 1."""
    graded = [(quality(prompt, c), c) for c in completions]
    pairs = [(x, y) for x, y in itertools.permutations(graded, 2) if x[0] > y[0]]
    if pairs:
        (high, chosen), (low, rejected) = rng.choice(pairs)
        margin = round(min(3, high - low) / 3, 4)
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}


def rankings(rng, prompt, completions):
    """Up to 6 completions and their ranks, 0 the best: by Likert score, then by lines not right."""
    rated = {}  # of completions rated alike the first, so that no ranks tie
    for c in completions:
        not_right = sum(label != 1 for label in grade_steps(prompt, c))
        rated.setdefault((-quality(prompt, c), not_right), c)
    order = list(rated)[: rng.randint(3, 6)]  # the likeliest are sampled first
    rng.shuffle(order)
    if len(order) > 1:
        ranks = [sorted(order).index(x) for x in order]
        yield {"prompt": prompt, "completions": [rated[x] for x in order], "ranks": ranks}


def outcomes(rng, prompt, completions):
    for c in filter(str.strip, completions):
        yield {"prompt": prompt, "completion": c, "label": quality(prompt, c) == 5}


def labelled_steps(rng, prompt, completions):
    for c in dict.fromkeys(completions):
        steps = [line for line in c.split("\n") if line.strip()]
        if steps:
            yield {"prompt": prompt, "steps": steps, "labels": grade_steps(prompt, c)}


SAMPLED = {  # file: who rates, completions sampled of a prompt, their temperature, rows
    "pref_train.jsonl": (preferences, 4, 1.0, 2500),
    "pref_test.jsonl": (preferences, 4, 1.0, 300),
    "kwise_train.jsonl": (rankings, 16, 0.7, 1600),
    "kwise_test.jsonl": (rankings, 16, 0.7, 200),
    "orm_train.jsonl": (outcomes, 4, 1.0, 2600),
    "orm_test.jsonl": (outcomes, 8, 1.0, 400),
    "prm_train.jsonl": (labelled_steps, 2, 0.7, 2400),
    "prm_test.jsonl": (labelled_steps, 2, 0.7, 300),
}


def sampled_prompts(seed=SEED):
    """{file name of SAMPLED: prompts}: of each file its own, and none of those of make_data.

    Two for a row are enough, and not so many that the short problems run out.
    """
    taken = {row["prompt"] for rows in make_data(seed).values() for row in rows}
    rng = random.Random(f"{seed} sampled")
    return {name: problems(rng, 2 * number, taken) for name, (*_, number) in SAMPLED.items()}


def sampled_rows(name, prompts, policy, tokenizer, seed=SEED):
    """The rows of a file, one after the other, until its number is reached.

    Each chunk of 64 prompts has a seed of its own, so that a test can remake the first alone."""
    import torch

    from common import generate

    rate, num_generations, temperature, number = SAMPLED[name]
    rng, found = random.Random(f"{seed} {name}"), 0
    for start in range(0, len(prompts), 64):
        chunk = prompts[start : start + 64]
        torch.manual_seed(seed + start + 10**6 * list(SAMPLED).index(name))
        texts = iter(generate(policy, tokenizer, chunk, num_generations, 48, temperature)[1])
        for prompt in chunk:
            for row in rate(rng, prompt, list(itertools.islice(texts, num_generations))):
                yield row
                found += 1
                if found == number:
                    return


def load_policy():
    """toy/model and its tokenizer."""
    sys.path.insert(0, str(TOY.parent))
    import torch
    from transformers import AutoModelForCausalLM

    from plumbing import load_model, load_tokenizer

    policy = load_model(AutoModelForCausalLM, str(TOY / "model"), torch.device("cpu"))
    return policy, load_tokenizer(str(TOY / "model"))


def write(name, rows):
    path = TOY / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- Demonstrations for the critic of constitutional_ai.py ----------------------------------------
# A critic reads an answer line by line for faults of one kind, that of the principle: a line that
# keeps it gets a full stop, the first that breaks it a question mark, and is written anew:
#     7+6+0=13.8+4+1=13.5+0+0=05?5+0+1=06
# Critics overlook 15 in 100 faults and object to 1 in 200 good lines. To compare two answers they
# criticise both, and prefer one without an objection, but 10 times in 100 the other one.

PRINCIPLES = {  # principle: the kind of fault that breaks it
    "Carry every ten.": "carry",
    "Add each column right.": "sum",
    "Read the answer off the sums.": "answer",
}


def faulty(rng, prompt):
    """A solution, mostly with faults of one kind; all that comes after a fault follows from it."""
    kind = rng.choice(["carry", "carry", "carry", "sum", "sum", "answer", "none"])
    pairs = columns(prompt)
    forgets_from = rng.choice([1, 2, 2, 3]) if kind == "carry" else len(pairs)
    slips_at = rng.randrange(len(pairs)) if kind == "sum" else len(pairs)
    totals, lines, carry = [], [], 0
    for i, (x, y) in enumerate(pairs):
        if i >= forgets_from:
            carry = 0
        total = x + y + carry
        if i == slips_at:
            total = max(0, total + rng.choice([-10, -2, -1, 1, 2, 10]))
        lines.append(step_text(x, y, carry, total))
        totals.append(total)
        carry = int(total >= 10)
    answer = answer_text(totals)
    if kind == "answer":
        place = rng.randrange(len(answer))
        answer = answer[:place] + str(rng.randrange(10)) + answer[place + 1 :]
    return "\n".join([*lines, answer])


def mended_lines(completion, kind):
    """For each line of an answer: how it should be if it has a fault of this kind, else None.

    A step is judged by the line before it, its sum by its own digits, the answer by all lines.
    """
    *lines, answer = completion.split("\n")
    mended, totals = [], []
    for i, line in enumerate(lines):
        x, y, carry, total = map(int, re.split(r"[+=]", line))
        right = int(i > 0 and totals[-1] >= 10)
        better = line
        if kind == "carry" and carry != right:
            better = step_text(x, y, right, x + y + right)
        if kind == "sum" and total != x + y + carry:
            better = step_text(x, y, carry, x + y + carry)
        mended.append(None if better == line else better)
        totals.append(total)
    has_fault = kind == "answer" and answer != answer_text(totals)
    return [*mended, answer_text(totals) if has_fault else None]


def has_fault(completion, kind):
    return any(mended_lines(completion, kind))


def critique(rng, completion, kind):
    """What a critic says of an answer -> (text, place of the line to mend or None, mended line)."""
    said = ""
    lines = completion.split("\n")
    for place, (line, mended) in enumerate(zip(lines, mended_lines(completion, kind), strict=True)):
        if mended and rng.random() < 0.15:
            mended = None
        elif not mended and rng.random() < 0.005:
            mended = line[:-1] + str(rng.randrange(10))
        if mended:
            return f"{said}{line}?{mended}", place, mended
        said += line + "."
    return said, None, ""


def revision(rng, prompt, completion, place, mended):
    """The answer with a line mended, and all lines after it written anew; 1 in 100 steps slips."""
    if place is None:
        return completion
    pairs = columns(prompt)
    if place == len(pairs):
        return "\n".join([*completion.split("\n")[:-1], mended])
    lines = [*completion.split("\n")[:place], mended]
    totals = [int(line.rpartition("=")[2]) for line in lines]
    for x, y in pairs[place + 1 :]:
        carry = int(totals[-1] >= 10)
        total = x + y + carry
        if rng.random() < 0.01:
            total = max(0, total + rng.choice([-1, 1]))
        lines.append(step_text(x, y, carry, total))
        totals.append(total)
    return "\n".join([*lines, answer_text(totals)])


def preferred(rng, objected):
    """Which of two answers a critic prefers, 0 or 1: the one not objected to; either, if alike."""
    if objected[0] == objected[1]:
        return rng.randrange(2)
    better = objected.index(False)
    if rng.random() < 0.1:
        return 1 - better
    return better


def principle_for(rng, answers):
    """A principle, nine times in ten one that exactly one answer breaks, if there is one."""
    telling = []
    for principle, kind in PRINCIPLES.items():
        if sum(has_fault(text, kind) for text in answers) == 1:
            telling.append(principle)
    if telling and rng.random() < 0.9:
        return rng.choice(telling)
    return rng.choice(list(PRINCIPLES))


def import_requests():
    """constitutional_ai.py, which words what a critic is asked."""
    sys.path.insert(0, str(TOY.parent))
    import constitutional_ai

    return constitutional_ai


def revision_row(rng, prompt, task):
    """A row for sft.py: a "critique" or a "revision", as `task` says."""
    requests = import_requests()
    answer = faulty(rng, prompt)
    principle = principle_for(rng, [answer])
    said, place, mended = critique(rng, answer, PRINCIPLES[principle])
    if task == "critique":
        request = requests.critique_request(prompt, answer, principle)
        return {"prompt": request, "completion": said}
    request = requests.revision_request(prompt, answer, principle, said)
    return {"prompt": request, "completion": revision(rng, prompt, answer, place, mended)}


def comparison_pair(rng, prompt):
    """Rows for sft.py: two answers with their critiques, compared, in both orders."""
    requests = import_requests()
    answers = [faulty(rng, prompt), faulty(rng, prompt)]
    principle = principle_for(rng, answers)
    shown = []
    objected = []
    for answer in answers:
        said, place, _ = critique(rng, answer, PRINCIPLES[principle])
        shown.append(requests.criticised(answer, said))
        objected.append(place is not None)
    better = preferred(rng, objected)
    rows = []
    for first, second in ((0, 1), (1, 0)):
        request = requests.comparison_request(prompt, principle, shown[first], shown[second])
        rows.append({"prompt": request, "completion": "(A)" if better == first else "(B)"})
    return rows


def revision_rows(rng, prompts):
    """SFT rows: of each problem two critiques and two revisions."""
    tasks = ["critique", "revision"] * 2
    return [revision_row(rng, prompt, task) for prompt in prompts for task in tasks]


def comparison_rows(rng, prompts):
    """SFT rows: of each problem a comparison in both orders, and, so that they are not forgotten, a
    critique and a revision."""
    rows = []
    for prompt in prompts:
        rows += comparison_pair(rng, prompt)
        rows += [revision_row(rng, prompt, task) for task in ("critique", "revision")]
    return rows


def make_critic_data(seed=SEED):
    """{file name: rows} of the critic's demonstrations, of problems that no other file has."""
    taken = {row["prompt"] for rows in make_data(seed).values() for row in rows}
    for prompts in sampled_prompts(seed).values():
        taken |= set(prompts)
    rng = random.Random(f"{seed} critic")
    return {
        "critic_train.jsonl": revision_rows(rng, problems(rng, 6000, taken)),
        "critic_test.jsonl": revision_rows(rng, problems(rng, 50, taken)),
        "compare_train.jsonl": comparison_rows(rng, problems(rng, 1500, taken)),
        "compare_test.jsonl": comparison_rows(rng, problems(rng, 50, taken)),
    }


# --- Tokenizer and model --------------------------------------------------------------------------


def make_tokenizer():
    """One token a character (printable ASCII and newline), with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocab = {t: i for i, t in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tok.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=special[4:],
        model_max_length=256,
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def make_config(
    tokenizer, context=256, hidden_size=128, intermediate_size=384, num_hidden_layers=2
):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=context,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


CRITIC_SHAPE = {
    "context": 320,  # two answers and their critiques
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
}


def make_model(name, **shape):
    """toy/NAME: tokenizer and a Llama of under 0.5 million random weights, for sft.py to train."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, **shape)
    tokenizer.model_max_length = config.max_position_embeddings
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).save_pretrained(TOY / name)
    tokenizer.save_pretrained(TOY / name)


def main():
    if sys.argv[1:] == ["--model"]:
        make_model("model")
    elif sys.argv[1:] == ["--critic"]:
        make_model("critic", **CRITIC_SHAPE)
        for name, rows in make_critic_data().items():
            write(f"../runs/{name}", rows)
    elif sys.argv[1:] == ["--sampled"]:
        loaded = load_policy()
        for name, prompts in sampled_prompts().items():
            write(name, list(sampled_rows(name, prompts, *loaded)))
    elif sys.argv[1:]:
        raise SystemExit("make.py: the flags are --model, --sampled and --critic, one at a time")
    else:
        for name, rows in make_data().items():
            write(name, rows)


if __name__ == "__main__":
    main()
