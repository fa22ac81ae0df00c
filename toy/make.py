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
"""

import json
import random
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
    if not answer.isdecimal():
        return 1
    distance = abs(int(answer) - int(a) - int(b))
    return 5 if distance == 0 else 5 - min(4, len(str(distance)))


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


def write(name, rows):
    (TOY / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


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
        tokenizer_object=tok, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", extra_special_tokens=special[4:], model_max_length=256)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    return tokenizer


def make_config(tokenizer):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=256, initializer_range=0.08, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)


def make_model():
    """toy/model: tokenizer and a Llama of 0.6 million random weights, for `sft.py` to train."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    LlamaForCausalLM(make_config(tokenizer)).save_pretrained(TOY / "model")
    tokenizer.save_pretrained(TOY / "model")


def main():
    if sys.argv[1:] == ["--model"]:
        make_model()
    elif sys.argv[1:]:
        raise SystemExit("make.py: the only flag is --model")
    else:
        for name, rows in make_data().items():
            write(name, rows)


if __name__ == "__main__":
    main()
