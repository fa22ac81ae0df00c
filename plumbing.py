"""What the scripts share beside common.py: flags, rows, models, rewards, a run's folder.

It imports common.py, and the scripts import from both by name. No loss is here. Of the book it has
what reads a saved reward model: `positive_probs` and `solution_score` (7.6), `_step_logits`
(10.2.4.1). A mistake of the user is raised as ValueError where it is noticed, and becomes one line
and an exit code in `run_script`.
"""

import ast
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
import unicodedata
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import transformers
import tyro
from safetensors.torch import save_file
from torch.nn.functional import pad as pad_tensor
from tqdm import tqdm

from common import (
    Batch,
    _autocast,
    _call,
    add_up,
    completion_scores,
    content_text,
    conversation_text,
    deal_out,
    encode_prompt,
    encode_steps,
    end_of_turn,
    fixed_logps,
    gather,
    generate,
    is_rendered,
    kl_estimate,
    pad,
    process,
    text_ids,
    whole,
)

ROOT = Path(__file__).resolve().parent

# --- Errors ---------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user, said in one line: what is wrong, where, and what to do."""


def stop(message):
    """Raise UserError with `message` on one line."""
    raise UserError(" ".join(str(message).split())[:500])


@contextlib.contextmanager
def stop_on_error(saying):
    """Turn any other exception into UserError: `saying`, what it was, where in a user's file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"; {Path(last.filename).name}:{last.lineno}"
        of_library = last.filename.startswith(("<", sys.prefix, sys.base_prefix))
        if of_library or Path(last.filename).resolve().parent == ROOT:
            place = ""  # a line that the user did not write helps nobody
        stop(f"{saying} ({type(error).__name__}: {error}{place})")


def quieten_transformers():
    """Keep its warnings and progress bars out: load_model says itself what a folder lacks."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def run_script(main, Args, toy):
    """Read the command line and call main(args).

    A ValueError that our own files raise is a mistake of the user: it ends the program with one
    line and exit code 1. Any other exception is a fault of the code and keeps its traceback.
    """
    script = Path(sys.argv[0]).name
    try:
        start_processes()
        with _silence_of_others():
            args = parse_args(Args, toy)
        quieten_transformers()
        main(args)
    except KeyboardInterrupt:
        if fails_first():
            print(
                f"{script}: stopped at once; --resume goes on from the last checkpoint, where "
                "there is one",
                file=sys.stderr,
            )
        sys.exit(130)
    except Exception as error:
        if not fails_first():  # another process has said why
            sys.exit(1)
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not isinstance(error, ValueError) or raised_in.parent != ROOT:
            raise
        sys.exit(f"{script}: {error}")
    end_processes()


# --- Several processes ----------------------------------------------------------------------------


STORE = []  # of the processes that torchrun started, to count those that failed


def start_processes():
    """Join the other processes that torchrun started; the first alone prints and writes files."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or "RANK" not in os.environ:
        return
    number = int(os.environ["RANK"])
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    forever = datetime.timedelta(days=1)  # a judge of the user's may be slow
    # torchrun has a store for its processes; without torchrun the first process has it
    has_store = number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(*address, is_master=has_store, timeout=forever)
    # The store outlives the processes: those of --max-restarts must not read what these wrote
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    STORE.append(dist.PrefixStore(f"scripts, attempt {attempt}", store))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=STORE[0], rank=number, world_size=count, timeout=forever)
    if number:
        sys.stdout = open(os.devnull, "w")
        transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def _silence_of_others():
    """Inside, the first process alone writes its errors: all make the same mistake here."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def end_processes():
    """Leave together, where there are several: the last thing that a program calls."""
    if process()[1] == 1:
        return
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of Python's own end: a thread of PyTorch's that is still there would now and then
    # abort the process in it, and torchrun would say that the run has failed
    os._exit(0)


def fails_first():
    """Whether no other process has failed before this one: the first to fail says why."""
    if not STORE:
        return True
    try:
        return STORE[0].add("failed", 1) == 1
    except Exception:  # the others are gone
        return False


def is_first():
    """Whether this process is the one that prints, writes and calls a user's reward."""
    return process()[0] == 0


def from_first(value):
    """The first process's value, in all of them; it is sent, so it must be picklable."""
    if process()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


# --- Flags ----------------------------------------------------------------------------------------


# The flags of --help are grouped: a group begins at the flag that is named here
HEADINGS = {
    "model": "data",
    "output_dir": "run",
    "loss": "loss",
    "margin_scale": "loss",
    "supervision": "supervision",
    "reward": "reward",
    "rounds": "sampling",
    "iterations": "sampling",
    "num_steps": "sampling",
    "select": "selection",
    "verdict": "judging",
    "num_resamples": "evaluation",
    "train": "optimisation",
    "num_epochs": "optimisation",
    "micro_batch_size": "optimisation",
    "learning_rate": "optimisation",
    "eval_size": "evaluation",
}


# Smallest and largest value of these flags. All other numbers begin at 0, or at 1 where something
# is counted (COUNTS), and have no largest value.
RANGES = {
    "seed": (0, 2**63 - 1),
    "learning_rate": (0, 1),
    "critic_learning_rate": (0, 1),
    "weight_decay": (0, 1),
    "warmup_ratio": (0, 1),
    "label_smoothing": (0, 0.5),
    "gamma": (0, 1),
    "lam": (0, 1),
    "moving_decay": (0, 1),
    "temperature": (0, 100),
    "judge_temperature": (0, 100),
    "feedback_temperature": (0, 100),
    "max_grad_norm": (1e-9, math.inf),
    "eta": (1e-9, math.inf),
    "kl_horizon": (1, math.inf),
    "rounds": (1, math.inf),
}
COUNTS = ("num_", "max_", "micro_", "batch_", "ptx_batch_", "checkpoint_every", "eval_every")


def range_of(name, kind):
    """Smallest and largest value of a flag of type int or float."""
    if name in RANGES:
        return RANGES[name]
    if kind is int and name.startswith(COUNTS):
        return 1, math.inf
    return 0, math.inf


def check_flags(args):
    """Stop at a number that is not finite, or outside its range."""
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        flag = f"--{name.replace('_', '-')} {value}"
        least, most = range_of(name, type(value))
        if not math.isfinite(value):
            stop(f"{flag}: must be a finite number")
        if value < least:
            stop(f"{flag}: must be at least {least}")
        if value > most:
            stop(f"{flag}: must be at most {most}")
        if name.endswith("temperature") and 0 < value < 0.01:
            stop(f"{flag}: must be at least 0.01, or 0 for the likeliest tokens")


def parse_args(Args, toy):
    """Command line -> Args. Without --model the defaults are `toy`, its paths counted from here."""
    given = {argument.split("=")[0] for argument in sys.argv[1:]}
    toy_values = {}
    for name, value in toy.items():
        is_path = str(value).startswith("toy/")
        toy_values[name] = str(ROOT / value) if is_path else value
    defaults = {}
    for flag in dataclasses.fields(Args):
        if flag.default is not dataclasses.MISSING:
            defaults[flag.name] = flag.default
    if given & {"-h", "--help"}:
        defaults |= {"model": toy["model"], "dataset": toy["dataset"]}
    elif "--model" not in given:
        defaults |= toy_values
    lines = ["Without --model the toy is used, with these values for the defaults below:"]
    for name, value in toy.items():
        lines.append(f"  --{name.replace('_', '-')} {value}")
    grouped = tyro.cli(_grouped(Args, defaults), description="\n".join(lines))
    values = {}
    for group in vars(grouped).values():
        values |= vars(group)
    return Args(**values)


def _grouped(Args, defaults):
    """A dataclass of dataclasses, one for each heading, with the flags of Args and their help."""
    help_texts = _help_texts(Args)
    groups = {}
    heading = ""
    for flag in dataclasses.fields(Args):
        heading = HEADINGS.get(flag.name, heading)
        help_text = help_texts[flag.name]
        if flag.type in (int, float, float | None):
            least, most = range_of(flag.name, flag.type)
            help_text += f" [{least} or more]" if most > 1e9 else f" [{least} to {most}]"
        kind = Annotated[flag.type, tyro.conf.arg(help=help_text)]
        if flag.name in defaults:
            entry = (flag.name, kind, dataclasses.field(default=defaults[flag.name]))
        else:
            entry = (flag.name, kind)
        groups.setdefault(heading, []).append(entry)
    fields = []
    for heading, entries in groups.items():
        name = heading.replace("-", "_")
        fields.append((name, dataclasses.make_dataclass(name, entries, kw_only=True)))
    return tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass("flags", fields)]


def _help_texts(Args):
    """{flag: help}: the comment after a field of Args, or the text beneath it."""
    source = inspect.getsource(Args)
    lines = source.splitlines()
    help_texts = {}
    name = ""
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
            _, _, help_texts[name] = lines[node.end_lineno - 1].partition("  # ")
        elif isinstance(node, ast.Expr) and name:
            help_texts[name] = " ".join(node.value.value.split())
    return help_texts


# --- Rows -----------------------------------------------------------------------------------------


def load_rows(path, *columns):
    """JSON Lines file, or `owner/name:split` of the hub (needs `datasets`) -> list of dicts.

    columns: names that no row may lack or leave empty; a tuple names alternatives.
    """
    if os.path.isdir(path):
        stop(f"{path}: is a folder; it needs a file of JSON Lines")
    elif os.path.exists(path):
        content = Path(path).read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            stop(f"{path}: no JSON object per line, it is UTF-16; save it as UTF-8")
        lines = content.splitlines()
    elif "/" in str(path) and not str(path).endswith((".json", ".jsonl")):
        lines = _hub_lines(path)
    else:
        stop(f"{path}: no such file")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        with stop_on_error(f"{where}: no JSON object; it needs one per line"):
            row = {**json.loads(line)}
        _check_texts(row, where)
        if "chosen" in str(columns):
            _check_probability(row, where)
        for names in columns:
            _check_column(row, names, where)
        rows.append(_with_prompt_columns(row, where))
    if not rows:
        stop(f"{path}: no rows")
    _name_roles(rows, path)
    _warn_of_odd_rows(rows, path)
    in_prompt = [name for name in ("system", "tools") if any(row.get(name) for row in rows)]
    if in_prompt:
        print(f"{path}: the columns that go into the prompt: {', '.join(in_prompt)}")
    if "chosen" in str(columns):
        _cut_repeated_prompts(rows, path)
    return rows


def _hub_lines(path):
    """The rows of a data set of the hub as lines of JSON."""
    try:
        from datasets import load_dataset
    except ImportError:
        stop(f'{path}: no such file; a data set of the hub needs pip install -e ".[hub]"')
    with stop_on_error(f"{path}: no such file, and no such data set on the hub"):
        name, _, split = path.partition(":")
        return [json.dumps(row) for row in load_dataset(name, split=split or "train")]


MESSAGES = ("prompt", "messages")  # a prompt may also be a text
ANSWERS = ("completion", "response", "chosen", "rejected")  # texts, or lists of messages
LISTS = ("completions", "ranks", "steps", "labels")
NUMBERS = ("margin", "score_chosen", "score_rejected")


def _check_texts(row, where):
    """Stop where a column that all scripts read alike has a value of the wrong kind."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        stop(
            f"{where}: half of a surrogate pair (\\ud800 to \\udfff) stands in it, which is no text"
        )
    for name in (*MESSAGES, *ANSWERS):
        value = row.get(name)
        if isinstance(value, list):
            _check_messages(value, name, where)
        elif value is not None and not (isinstance(value, str) and name != "messages"):
            stop(f"{where}: {name} is {str(value)[:80]!r}, not a text or a list of messages")
    for name in LISTS:
        if row.get(name) is not None and not isinstance(row[name], list):
            stop(f"{where}: {name} is {str(row[name])[:80]!r}, not a list")
    if not isinstance(row.get("text", ""), str | None):
        stop(f"{where}: text is {str(row['text'])[:80]!r}, not a text")
    for name in NUMBERS:
        value = row.get(name)
        if isinstance(value, int | float) and not abs(value) < 1e30:  # also where it is NaN
            stop(f"{where}: {name} is {value}, not a finite number")
    if isinstance(row.get("prompt"), str) and re.match(r'\s*\[\s*\{\s*"role"', row["prompt"]):
        stop(f"{where}: prompt is a list of messages written as a text; it needs the list itself")
    if isinstance(row.get("ended"), str | dict):  # of several completions it is a list
        stop(f"{where}: ended is {str(row['ended'])[:80]!r}, not true or false")


def _check_messages(messages, name, where):
    """Stop at what is no message: an object with a role and a content."""
    for message in messages:
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not is_message:
            stop(f"{where}: {name} has {str(message)[:80]!r}, where a message has role and content")
        if message["role"] == "user" and not message.get("content"):
            stop(f"{where}: {name} has a turn of the user without content")
        with stop_on_error(f"{where}: {name} cannot be read"):
            content_text(message.get("content"))


def _check_probability(row, where):
    """Stop where the soft label of a pair is not a number from 0 to 1."""
    value = row.get("probability")
    if value is None:
        return
    is_bool = isinstance(value, bool)
    if is_bool or not isinstance(value, int | float) or not 0 <= value <= 1:
        stop(f"{where}: probability is {str(value)[:80]!r}, not a number from 0 to 1")


def soft_label(row):
    """Probability that the chosen completion of a row is the better one: 1 where it has none."""
    value = row.get("probability")
    return 1.0 if value is None else float(value)


def _with_prompt_columns(row, where):
    """A row whose `system` and `tools` have gone into its prompt or messages.

    The system's text becomes the first message; the tools are a key of the first message.
    """
    system = row.get("system")
    tools = row.get("tools")
    if not (system or tools):
        return row
    if isinstance(tools, str):
        with stop_on_error(f"{where}: its tools are no JSON"):
            tools = json.loads(tools)
    if tools and not isinstance(tools, list):
        stop(f"{where}: its tools are no list")
    for name in MESSAGES:
        if row.get(name):
            row = row | {name: _with_system(row[name], name, system, tools, where)}
    return row


def _with_system(chat, name, system, tools, where):
    """A prompt, or messages, with the system's text and the tools in the first message."""
    if isinstance(chat, str):
        chat = [{"role": "user", "content": chat}]
    if system:
        if not isinstance(system, str) or chat[0]["role"] == "system":
            stop(f"{where}: its column system is no text, or {name} has a system message already")
        chat = [{"role": "system", "content": system}, *chat]
    if tools:
        chat = [chat[0] | {"tools": tools}, *chat[1:]]
    return chat


def _warn_of_odd_rows(rows, path):
    """Say what can be trained on, and is seldom meant."""
    negative = "a margin below 0, by which the rejected answer may win"
    reversed_scores = "a score_chosen below score_rejected"
    answered = "a prompt that ends with a turn of the assistant"
    unknown = "a turn whose role is not user, assistant, system or tool"
    odd = dict.fromkeys((negative, reversed_scores, answered, unknown), 0)
    for row in rows:
        scores = (row.get("score_chosen"), row.get("score_rejected"))
        are_numbers = all(isinstance(score, int | float) for score in scores)
        margin = row.get("margin")
        odd[negative] += isinstance(margin, int | float) and margin < 0
        odd[reversed_scores] += are_numbers and scores[0] < scores[1]
        chat = row.get("messages") or row.get("prompt")
        if isinstance(chat, list) and chat:
            odd[answered] += chat == row.get("prompt") and chat[-1]["role"] == "assistant"
            odd[unknown] += bool({message["role"] for message in chat} - set(KNOWN_ROLES))
    for what, number in odd.items():
        if number:
            print(f"warning: {path}: {number} of {len(rows)} rows have {what}", file=sys.stderr)


KNOWN_ROLES = ("user", "assistant", "system", "developer", "tool", "function", "ipython")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def _name_roles(rows, path):
    """Give roles the names that chat templates know, and say which were others."""
    others = set()
    for row in rows:
        for name in (*MESSAGES, *ANSWERS):
            if not isinstance(row.get(name), list):
                continue
            messages = []
            for message in row[name]:
                role = message["role"].strip().lower()
                role = ROLES.get(role, role)
                if role not in ("user", "assistant", "system"):
                    role = message["role"]
                if role != message["role"]:
                    others.add(f"{message['role']} as {role}")
                messages.append(message | {"role": role})
            row[name] = messages
    if others:
        print(f"{path}: roles are read so: {', '.join(sorted(others))}", file=sys.stderr)


def _cut_repeated_prompts(rows, path):
    """Cut the prompt off chosen and rejected where all of them begin with it, and say so."""
    cut = []
    for row in rows:
        prompt = row.get("prompt")
        texts = [row.get("chosen"), row.get("rejected")]
        for text in texts:
            if not isinstance(prompt, str) or not isinstance(text, str):
                return
            if not text.startswith(prompt) or text == prompt:
                return
        cut.append([text.removeprefix(prompt) for text in texts])
    if len(rows) < 8:
        return  # a few answers may begin so by chance
    for row, (chosen, rejected) in zip(rows, cut, strict=True):
        row |= {"chosen": chosen, "rejected": rejected}
    print(
        f"{path}: chosen and rejected repeat the prompt in each of the {len(rows)} rows: it is cut "
        "off there"
    )


def _check_column(row, names, where):
    """Stop where a row has none of these columns, or an empty one. A text names one column."""
    if isinstance(names, str):
        names = (names,)
    value = ""
    for name in names:
        if row.get(name) is not None:
            value = row[name]
            break
    if value == [] or not str(value).strip():
        stop(f"{where}: no {' or '.join(names)}, or an empty one; it has {', '.join(row)}")
    if names == ("answer",) and not is_number(value):
        stop(f"{where}: its answer {str(value)[:80]!r} is not one number, as the verifier needs it")


def load_splits(args, read):
    """Training rows and held-out rows; `read` maps a path to rows.

    The held-out rows are those of args.eval_dataset. Without one they are args.eval_size prompts of
    args.dataset, which are then no longer trained on.
    """
    rows = read(args.dataset)
    if args.eval_dataset:
        held_out = read(args.eval_dataset)
        if held_out == rows:
            print(f"{args.eval_dataset}: the rows of --dataset: evaluation says nothing of others")
        return rows, held_out
    rows, held_out = hold_out(rows, args.eval_size, args.seed)
    if args.eval_size and not held_out:
        print(f"{args.dataset}: under ten prompts, so none is held out and nothing evaluated")
    return rows, held_out


def is_verified(args):
    """Whether the script's own verifier gives the rewards."""
    return args.reward == "verifier" and not args.reward_model


def load_prompts(args):
    """Rows with prompts to sample from, and at most --eval-size held-out ones."""
    columns = ["prompt", "answer"] if is_verified(args) else ["prompt"]
    rows, held_out = load_splits(args, lambda path: load_rows(path, *columns))
    return rows, held_out[: args.eval_size]


def hold_out(rows, num_prompts, seed):
    """Rows -> training rows, held-out rows: at most a tenth of the prompts.

    Rows are divided by prompt, so that none is on both sides. Chats go by what the user says first:
    many have one system message, or share their first turns.
    """
    keys = []
    for row in rows:
        chat = row.get("prompt") or row["messages"]
        keys.append(str(_first_user_turn(chat)))
    prompts = sorted(set(keys))
    count = min(num_prompts, len(prompts) // 10)
    held = set(random.Random(seed).sample(prompts, count))
    train = []
    held_out = []
    for row, key in zip(rows, keys, strict=True):
        if key in held:
            held_out.append(row)
        else:
            train.append(row)
    return train, held_out


def _first_user_turn(chat):
    """The first message of the user in a list of messages, or what there is instead."""
    if isinstance(chat, list):
        for turn in chat:
            if isinstance(turn, dict) and turn.get("role") == "user":
                return turn
    return chat


def answer_text(answer, prompt):
    """Text of an answer, which is a text, or a list of messages that ends with the assistant's.

    Messages before the last must be the prompt's, or they would be lost: ValueError.
    """
    if isinstance(answer, str):
        return answer
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    without_system = [message for message in chat if message["role"] != "system"]
    earlier = _said(answer[:-1])
    is_known = earlier in ([], _said(chat), _said(without_system))
    if not is_known or answer[-1]["role"] != "assistant":
        raise ValueError(
            "the answer's messages before its last are not those of the prompt, or the last is not "
            "the assistant's: `prompt` needs all earlier turns"
        )
    return content_text(answer[-1].get("content"))


def conversation_as_text(prompt):
    """A text, or the text of a single message; more messages with who says them, one per line.

    As a model reads it that is asked about a conversation, and does not take part in it.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return content_text(prompt[0].get("content"))
    lines = [f"{message['role']}: {content_text(message.get('content'))}" for message in prompt]
    return "\n".join(lines)


def _said(messages):
    """Who said what: messages may have more keys, which say nothing here."""
    return [(message["role"], content_text(message.get("content"))) for message in messages]


def has_answers(rows):
    """Whether every row has an `answer` that is a number, as a verifier needs it."""
    return all(is_number(row.get("answer")) for row in rows)


def with_ended(rows, ended, batch=None, tokenizer=None):
    """Rows -> R rows as rewards read them: with `ended`, False where one was cut off, and `raw`.

    batch: the completions. `rows` are then those of its P prompts, each of which is repeated for
    its completions; `raw` is the text of a completion with its special tokens. Without a batch
    there are R rows already, and they get no `raw`.
    """
    if batch is None:
        return [row | {"ended": end} for row, end in zip(rows, ended.tolist(), strict=True)]
    row_of_each = []
    for i, p in enumerate(batch.prompt_of.tolist()):
        raw = tokenizer.decode(batch.completion_ids[i, batch.completion_mask[i]].tolist())
        row_of_each.append(rows[p] | {"ended": bool(ended[i]), "raw": raw})
    return row_of_each


# --- Device, tokenizer and model ------------------------------------------------------------------


def pick_device(device="auto"):
    """Name of a device -> torch.device. auto: cuda where there is one, else mps, else cpu."""
    if device == "auto":
        device = "cpu"
        kinds = ["mps", "cuda"]
        if process()[1] > 1:  # which on a Mac cannot exchange tensors of its GPU
            kinds.remove("mps")
        for kind in kinds:
            if getattr(torch, kind).is_available():
                device = kind
    with stop_on_error(f"--device {device}"):
        if device == "cuda" and process()[1] > 1:  # one GPU for each process
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        return torch.empty(0, device=device).device


@contextlib.contextmanager
def _stop_without(kind, path):
    """Say what is missing in a folder, or on the hub, where a model or a tokenizer is loaded."""
    if os.path.exists(Path(path) / "final" / "config.json"):
        stop(f"{path}: no {kind} in it; did you mean {Path(path) / 'final'}?")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            stop(f"{path}: needs code of its own, and these scripts run none (trust_remote_code)")
        if not os.path.isdir(path):
            stop(f"{path}: no such folder, and no such {kind} on the hub")
        stop(f"{path}: no {kind} in it that can be loaded ({type(error).__name__}: {error})")


def load_tokenizer(path, needs_eos=True):
    """Tokenizer of a model folder or hub name. One without an EOS is refused where it needs one."""
    with _stop_without("tokenizer", path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if needs_eos and tokenizer.eos_token_id is None:
        stop(f"{path}: its tokenizer has no EOS, so no completion could end; set its eos_token")
    return tokenizer


def set_other_pad(tokenizer):
    """Give the tokenizer a pad token that ends no text, where it knows one.

    Transformers scores a text at its last id that is not pad: never at the end of a text where the
    end of turn is the pad token.
    """
    ends = {None, tokenizer.eos_token_id, end_of_turn(tokenizer)}
    others = set(tokenizer.added_tokens_decoder) - ends - {tokenizer.bos_token_id}
    if tokenizer.pad_token_id in ends and others:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(others))


def check_vocabulary(tokenizer, model, rows):
    """Stop at a row with a token that the model has no embedding for: it would fail later."""
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= size:
        return
    if max(encode_prompt(tokenizer, "x")) >= size or end_of_turn(tokenizer) >= size:
        stop(f"the tokenizer's turns have tokens beyond the model's {size} embeddings")
    unknown = [token for token, number in tokenizer.get_vocab().items() if number >= size]
    for row in rows:
        text = json.dumps(row, ensure_ascii=False, default=str)
        for token in unknown:
            if token in text:
                stop(f"{token!r} is beyond the model's {size} embeddings: {text[:80]}")


def check_texts(tokenizer, model, rows):
    """Stop at tokens the model does not know, and say which prompts are not put in the template."""
    check_vocabulary(tokenizer, model, rows)
    rendered = [row for row in rows if is_rendered(tokenizer, row.get("prompt"))]
    if rendered:
        print(
            f"{len(rendered)} of {len(rows)} prompts hold the turns of the chat template already: "
            "they are taken as they are (a reward model with another template needs the messages)"
        )
    chats = [row.get("messages") or row.get("prompt") for row in rows]
    has_tools = any(isinstance(chat, list) and chat[0].get("tools") for chat in chats)
    if has_tools and "tools" not in str(tokenizer.chat_template):
        print("warning: the chat template does not read tools: they are not in the prompts")


def check_prompts(tokenizer, model, rows, max_new_tokens, show=0):
    """Stop where a prompt is empty, or with its completion does not fit in the model's context.

    show: number of prompts to print as the model gets them, and then to stop.
    """
    check_texts(tokenizer, model, rows)
    for row in rows:
        length = len(encode_prompt(tokenizer, row["prompt"]))
        if not 0 < length <= model.context - max_new_tokens:
            stop(
                f"a prompt of {length} tokens with --max-new-tokens {max_new_tokens} does not fit "
                f"in the model's {model.context} (at most {model.context - length}): "
                f"{str(row['prompt'])[:80]!r}"
            )
    if show:
        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows[:show]]
        show_rows(tokenizer, [(prompt, [], []) for prompt in prompts])


def show_rows(tokenizer, rows):
    """Print prompts and completions as the model gets them, and end the program.

    rows: (prompt ids, completion ids, for each of these whether the loss counts there). A stretch
    in which it counts stands between >>> and <<<. Without a completion: it will be sampled.
    """
    for number, (prompt_ids, ids, counts) in enumerate(rows, 1):
        print(f"--- row {number}: prompt, {len(prompt_ids)} tokens")
        print(tokenizer.decode(prompt_ids))
        if not ids:
            print("--- completion: sampled from here on; the loss counts in all of its tokens")
            continue
        print(f"--- completion, {len(ids)} tokens; the loss counts in >>>...<<<")
        text = ""
        start = 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or counts[i] != counts[start]:
                part = tokenizer.decode(ids[start:i])
                text += f">>>{part}<<<" if counts[start] else part
                start = i
        print(text)
    raise SystemExit(0)


def show_batch(tokenizer, batch, counts):
    """`show_rows` of a Batch; counts (R, Tc) bool."""
    rows = []
    for i, p in enumerate(batch.prompt_of.tolist()):
        prompt_ids = batch.prompt_ids[p, batch.prompt_mask[p]].tolist()
        mask = batch.completion_mask[i]
        rows.append((prompt_ids, batch.completion_ids[i, mask].tolist(), counts[i, mask].tolist()))
    show_rows(tokenizer, rows)


def last_tokens(mask):
    """Completion mask (R, T) -> where the last token of each is, there a reward is read (R, T)."""
    return mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))


def load_model(
    auto_class,
    path,
    device,
    dtype="auto",
    shard=False,
    checkpointing=False,
    lora_rank=0,
    from_scratch=False,
    new_head=0,
):
    """Model of a transformers auto class, from a folder or hub name, on `device`, in eval mode.

    Weights are float32: in bfloat16, updates at these learning rates would be rounded away. dtype:
    "bfloat16" runs forward passes in bfloat16 autocast, "auto" does so where cuda supports it.
    shard: see `_shard`; lora_rank: see `_add_adapters`. checkpointing: recompute activations in the
    backward pass. from_scratch: random weights. new_head: labels of a classification head that the
    file need not have; model.has_new_head says whether it was made.
    """
    with _stop_without("model", path):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    is_policy = auto_class is transformers.AutoModelForCausalLM
    if is_policy and "Classification" in str(config.architectures):
        stop(f"{path}: is a reward model: it gives scores, and writes no text")
    with stop_on_error(f"{path}: no model there that {auto_class.__name__} loads"):
        has_generic_head = not is_policy and _register_head(auto_class, config)
        config.num_labels = new_head or config.num_labels
        _switch_off_dropout(config)
        model, missing = _read_weights(auto_class, path, config, from_scratch)
    head = {key for key in missing if new_head and key.startswith(("score.", "classifier."))}
    _check_loaded(model, sorted(set(missing) - head), path)
    model = model.to(device).eval()
    if is_policy:
        _probe(model, path)
    model.has_generic_head = has_generic_head
    model.has_new_head = any(key.endswith("weight") for key in head)
    model.autocast_dtype = torch.bfloat16 if _takes_bfloat16(dtype, device) else None
    model.recompute = checkpointing
    model.context = getattr(config.get_text_config(), "max_position_embeddings", math.inf)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _add_adapters(model, path, lora_rank)
    _shard(model, shard)
    return model


def _read_weights(auto_class, path, config, from_scratch):
    """-> model in float32, names of the weights that the file lacks."""
    if from_scratch:
        return auto_class.from_config(config, dtype=torch.float32), []
    model, info = auto_class.from_pretrained(
        path, config=config, dtype=torch.float32, output_loading_info=True
    )
    return model, info["missing_keys"]


def _register_head(auto_class, config):
    """Give a family without a class with a head transformers' own generic one -> was it needed?"""
    if type(config) in auto_class._model_mapping.keys():
        return hasattr(auto_class._model_mapping[type(config)], "is_generic")
    backbone = transformers.AutoModel._model_mapping[type(config)]
    base = backbone.__bases__[0]  # with the loading and the initial weights of the family
    kind = auto_class.__name__.removeprefix("AutoModel")
    generic = getattr(transformers.modeling_layers, f"Generic{kind}")
    attributes = {
        "config_class": type(config),
        "base_model_prefix": base.base_model_prefix,
        "is_generic": True,
    }
    name = backbone.__name__.removesuffix("Model") + kind
    auto_class.register(type(config), type(name, (generic, base), attributes), exist_ok=True)
    return True


def _check_loaded(model, lost, path):
    """Stop at weights that the file lacks (names `lost`), or that are nan or inf."""
    if lost:  # transformers only warns, and makes up random weights
        stop(f"{path}: no weights for {', '.join(lost[:3])} in it")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            stop(f"{path}: has weights that are not finite ({name})")


@torch.no_grad()
def _probe(model, path):
    """Stop at a model whose logits would be wrong here: a few tiny forward passes tell.

    The logits of a token must not depend on padding before the text, on whether earlier tokens come
    from the cache, or on later tokens.
    """
    embeddings = model.get_input_embeddings().weight
    ids = torch.arange(1, 9, device=embeddings.device)[None] % len(embeddings)
    mask = torch.ones_like(ids, dtype=torch.bool)
    other_end = ids.clone()
    other_end[0, -1] = ids[0, 0]
    with stop_on_error(f"{path}: a model of this kind cannot be used"):
        alone = _call(model, model, ids, mask)[0]
        changed = _call(model, model, other_end, mask)[0]
        ids = pad_tensor(ids, (5, 0), value=int(ids[0, 0]))
        mask = pad_tensor(mask, (5, 0))
        padded = _call(model, model, ids, mask)[0, 5:]
        cache = transformers.DynamicCache(config=model.config)
        _call(model, model, ids[:, :-1], mask[:, :-1], cache)
        cached = _call(model, model, ids[:, -1:], mask, cache)[0]
    largest = 0.001 * alone.std()  # a hundred times what rounding makes
    reasons = {
        "see later tokens": alone[:-1] - changed[:-1],
        "depend on the padding": alone - padded,
        "depend on the cache": alone[-1:] - cached,
    }
    for reason, difference in reasons.items():
        if difference.abs().max() > largest:
            stop(f"{path}: {type(model).__name__} cannot be trained here: its logits {reason}")


def _switch_off_dropout(config):
    """With dropout two forward passes of one policy would differ, and no ratio would be 1."""
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def _takes_bfloat16(dtype, device):
    if dtype == "auto" and torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype == "bfloat16"


def hold_as_computed(model):
    """Keep the weights of linear layers in the dtype in which they are multiplied -> the model.

    For models that are never trained. Autocast rounds these weights to bfloat16 in each forward
    pass: rounded once, they give the same bits in half the memory, and no copy is made. All others
    stay float32: embeddings, an output layer that shares theirs, norms, experts in one tensor, and
    the head of a reward model, which is computed in float32. Without autocast all weights do, and
    so do those of a sharded model, where tensors that are gathered together need one dtype.
    """
    if model.autocast_dtype is None or getattr(model, "sharded", False):
        return model
    holders = {}  # of each weight: tied ones have several
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(module)
    for module in [*model.base_model.modules(), model.get_output_embeddings()]:
        # Not those of a class of its own, which may use its weight otherwise
        if type(module) is torch.nn.Linear and len(holders[module.weight]) == 1:
            module.to(model.autocast_dtype)
    return model


def check_finite(loss, grad_norm):
    """Stop before a step that would break the weights."""
    if not math.isfinite(loss + grad_norm):
        stop(
            f"the loss is {loss}, the norm of the gradient {grad_norm}: lower --learning-rate, or "
            "look at the rewards; --resume goes on from the last checkpoint"
        )


# --- A model that is divided among processes ------------------------------------------------------


def _shard(model, wanted=True):
    """Divide the weights of a model, and with them gradients and optimiser states, by FSDP.

    A layer is gathered while it computes. Of a model with a classification head the backbone and
    the head are gathered apart, as `completion_scores` calls one without the other.
    """
    if not wanted:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (process()[1],))
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    sizes = [sum(p.numel() for p in module.parameters()) for module in lists]
    for layer in lists[sizes.index(max(sizes))]:
        fully_shard(layer, mesh=mesh)
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if model.get_output_embeddings() is not None or head is None:
        fully_shard(model, mesh=mesh)
    else:
        fully_shard(model.base_model, mesh=mesh)
        fully_shard(head, mesh=mesh)
    model.sharded = True


def _mine(parameter):
    """What this process holds of a parameter: a part of it, or all."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _whole_tensors(state):
    """A state_dict, of tensors in lists and dicts -> the same, where no tensor is divided.

    What was divided is whole in the first process alone, which writes it, and there in the CPU's
    memory: all of it together may not fit on a GPU. In the others it is empty.
    """
    if isinstance(state, dict):
        return {name: _whole_tensors(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_whole_tensors(value) for value in state]
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if is_first() else tensor.new_empty(0)


def _whole_state(model):
    """state_dict of a model, no tensor divided; tied weights are one tensor, as they are in it."""
    made = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            made[id(tensor)] = _whole_tensors(tensor.detach())
        state[name] = made[id(tensor)]
    return state


def _divide_like(tensor, parameter):
    """A whole tensor, divided as a parameter of its shape is; any other stays as it is."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def _load_whole(part, state):
    """`part.load_state_dict` of whole tensors, where the part may be divided among processes."""
    if isinstance(part, torch.nn.Module):
        now = part.state_dict()
        state = {name: _divide_like(tensor, now[name]) for name, tensor in state.items()}
    if isinstance(part, torch.optim.Optimizer):
        parameters = []
        for group in part.param_groups:
            parameters += group["params"]
        divided = {}
        for number, moments in state["state"].items():
            like = parameters[number]
            divided[number] = {name: _divide_like(x, like) for name, x in moments.items()}
        state = state | {"state": divided}
    part.load_state_dict(state)


# --- LoRA: low-rank adapters (Hu et al. 2021, arXiv:2106.09685) -----------------------------------

# An adapted layer computes W x + (alpha / rank) B A x. With an alpha that does not grow with the
# rank, a learning rate that suits one rank suits others (Hu et al., section 4.1); with 32, LoRA
# takes about ten times the learning rate of full fine-tuning (Schulman et al. 2025, "LoRA without
# regret").
LORA_ALPHA = 32


def _import_peft():
    """-> the package peft, which makes the adapters."""
    try:
        import peft
    except ImportError:
        stop('--lora-rank needs the package peft: pip install -e ".[lora]"')
    return peft


def _check_lora(args):
    """Stop, before anything is loaded, where --lora-rank cannot work."""
    if not getattr(args, "lora_rank", 0):
        return
    if getattr(args, "from_scratch", False):
        stop("--lora-rank adapts weights that were trained before: add --no-from-scratch")
    _import_peft()


def _add_adapters(model, path, rank):
    """Freeze a model and put an adapter on each linear layer of its backbone; rank 0: leave it.

    B begins at 0: the model computes what it did. The adapters are trained, in float32, and so is
    the head of a reward model or critic, but not that of a language model. Where the forward pass
    is in bfloat16, frozen linear layers are kept in it: autocast would round them in each pass.
    """
    if not rank:
        return
    peft = _import_peft()
    layers = _linear_layers(model.base_model)
    if not layers:
        stop(f"{path}: --lora-rank {rank}: {type(model).__name__} has no linear layer to adapt")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=LORA_ALPHA,
        target_modules=list(layers),
        fan_in_fan_out=not isinstance(next(iter(layers.values())), torch.nn.Linear),
        base_model_name_or_path=str(path),
    )
    with stop_on_error(f"{path}: --lora-rank {rank}: peft cannot adapt it"):
        peft.inject_adapter_in_model(config, model.base_model)
    for name, parameter in model.named_parameters():
        is_of_head = name.startswith(("score.", "classifier."))
        parameter.requires_grad_(".lora_" in name or is_of_head)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        layers["head"] = head
    if model.autocast_dtype:
        for layer in layers.values():
            _round(layer, model.autocast_dtype)
    model.lora_config = config


def _round(layer, dtype):
    """Hold the weight of a linear layer in dtype; what that loses stays on the CPU, for final/."""
    exact = layer.weight.data
    layer.weight.data = exact.to(dtype)
    if not torch.equal(layer.weight.float(), exact):
        layer.register_buffer("exact_weight", exact.cpu(), persistent=False)


def _has_adapters(model):
    return getattr(model, "lora_config", None) is not None


def _linear_layers(backbone):
    """{name: linear layer} of a backbone that an adapter can go on, GPT-2's Conv1D included.

    Of a layer with a convolution (Mamba and others) only what projects its input: fused kernels
    read the other weights themselves, without adapters. Of a model whose experts are in one tensor
    no feed-forward layer: peft would take a `gate_proj` beside the experts for one of theirs.
    """
    has_experts = any(name.endswith(".gate_up_proj") for name, _ in backbone.named_parameters())
    layers = {}
    for name, module in backbone.named_modules():
        is_linear = isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        parent = backbone.get_submodule(name.rpartition(".")[0])
        is_read_by_kernels = hasattr(parent, "conv1d") and "in_proj" not in name
        is_beside_experts = has_experts and name.endswith(("gate_proj", "up_proj", "down_proj"))
        if is_linear and not is_read_by_kernels and not is_beside_experts:
            layers[name] = module
    return layers


def reference_of(policy):
    """The policy without its adapters, which is the model that it began as.

    It is made of the same frozen weights and takes no memory of its own. None where the policy has
    no adapters: then its weights move, and a reference is a second model.
    """
    if not _has_adapters(policy):
        return None
    reference = _without_adapters(policy)
    if reference.recompute:
        reference.recompute = False
        reference.gradient_checkpointing_disable()
    return reference.eval()


def _without_adapters(model):
    """A model of the same tensors with plain layers in the place of the adapted ones."""
    tensors = [*model.parameters(), *model.buffers()]
    plain = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "base_layer"):
            plain.set_submodule(name, layer.base_layer)
    plain.lora_config = None
    return plain


def _merged(model):
    """A plain model with the weights W + (alpha / rank) B A, in float32, these on the CPU."""
    plain = _without_adapters(model)
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            weight = _exact(layer.base_layer) + layer.get_delta_weight("default").detach().cpu()
            plain.get_submodule(name).weight = torch.nn.Parameter(weight)
    head = plain.get_output_embeddings()
    if head is not None and head.weight.dtype != torch.float32:
        head.weight = torch.nn.Parameter(_exact(head))
    return plain


def _exact(layer):
    """Weight of a linear layer before `_round`, in float32 on the CPU."""
    return getattr(layer, "exact_weight", layer.weight).detach().float().cpu()


def _save_adapter(model, folder):
    """Write what was trained in the form of peft: `peft.PeftModel.from_pretrained` loads it."""
    config = copy.copy(model.lora_config)
    config.target_modules = sorted(config.target_modules)
    config.task_type = "CAUSAL_LM"
    for kind, task in (("SequenceClassification", "SEQ_CLS"), ("TokenClassification", "TOKEN_CLS")):
        if kind in type(model).__name__:
            config.task_type = task
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = "base_model.model." + name.replace(".default.", ".")
            weights[key] = parameter.detach().cpu().contiguous()
    heads = [name for name in ("score", "classifier") if hasattr(model, name)]
    config.modules_to_save = heads or None
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


def _frozen(part):
    """{name: tensor} of a part's frozen weights, which no checkpoint holds."""
    if not isinstance(part, torch.nn.Module):
        return {}
    frozen = {}
    for name, parameter in part.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            frozen[name] = parameter.detach()
    return frozen


# --- Numbers in texts -----------------------------------------------------------------------------

MINUS_SIGNS = "\u2212\u2013\u2010\u2011\ufe63\uff0d"  # what is written for -, the en dash included
SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
MOST_DIGITS = 4000  # Python reads no longer ones; no text means them

# Thousands in groups, 1,234 or 1,00,000 or 1'234 or 1_234; or digits
WHOLE = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d{1,3}(?:['\u2019_]\d{3})+(?!\d)|\d+)"
NUMBER = re.compile(
    r"(?P<european>\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,})(?!\d)"  # 1.234,5 and 1.234.567
    r"|10\^(?P<power>[-+]?\d+)"
    rf"|(?:(?P<whole>\d+) )?(?P<top>{WHOLE}) ?/ ?(?P<bottom>{WHOLE})"  # 3/4 and 1 3/4
    rf"|(?P<decimal>{WHOLE}(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d+)(?!\w)| ?[*xX] ?10\^(?P<times>[-+]?\d+))?"
)


def last_number(text):
    """The last number of a text, exact -> Fraction, or None where there is none or it is unclear.

    It reads signs (also in Unicode), thousands, decimals, exponents, fractions, currencies, units:
    "-1,234.50", ".5", "1.5e3", "2 x 10^3", "3/4", "$5", "12 cm", "50%" (50). A hyphen after a word
    or a number is no minus ("10-12" ends with 12). Digits within a word ("m2", "H2O") do not count.
    A number that runs on into another one is unclear ("3,5", "10:30", "2^10", "1.2.3").
    """
    text = _simplify(text)
    last = None
    for match in NUMBER.finditer(text):
        if not _is_in_word(text, match.start()):
            last = match
    if last is None or _goes_on(text, last):
        return None
    value = _value_of(last)
    if value is not None and _is_negative(text[: last.start()]):
        return -value
    return value


def is_number(answer):
    """Whether an answer (a number, or a text of one) is one number and nothing else.

    Digits, with a sign, thousands, decimals, an exponent: no unit, currency, fraction, percent.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return False
    text = _simplify(str(answer)).strip()
    match = NUMBER.fullmatch(re.sub("^[-+]", "", text))
    return match is not None and match["decimal"] is not None and last_number(text) is not None


def _simplify(text):
    """LaTeX and Unicode forms of numbers -> what NUMBER reads."""
    text = re.sub(f"[{MINUS_SIGNS}]", "-", text)
    text = text.replace("\\!", "")  # no space, as in 12,\!345
    text = text.replace("\u066c", ",").replace("\u066b", ".")  # Arabic thousands and decimals
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\{-\}(?=\d)", "-", text)
    text = re.sub(r"-\{(\d[\d.,]*)\}", r"-\1", text)
    text = re.sub(r"-\((\d[\d.,]*)\)", r"-\1", text)
    text = re.sub(r"\^\{?\\circ\}?", "\u00b0", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|[\u00a0\u2009\u202f])(?=\d{3})", ",", text)  # thousands
    text = re.sub(r"\\[cdt]?frac(\d)(\d)", r" \1/\2", text)
    text = re.sub(r"\\[cdt]?frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", text)
    text = re.sub(r"\\times|\\cdot|[\u00d7\u00b7\u22c5]", "*", text)
    text = re.sub(r"\^\{([-+]?\d+)\}", r"^\1", text)
    text = re.sub(r"(?<=\d)\*\*(?=[-+]?\d)", "^", text)
    text = re.sub(f"[{SUPERSCRIPTS}]+", lambda found: "^" + _lowered(found[0]), text)
    return re.sub(r"[\u00bc-\u00be\u2150-\u215e]", lambda found: _written_out(found[0]), text)


def _lowered(superscripts):
    return "".join(str(SUPERSCRIPTS.index(sign)) for sign in superscripts)


def _written_out(sign):
    """One character of a fraction, such as \u00bd -> " 1/2"."""
    value = Fraction(unicodedata.numeric(sign)).limit_denominator(10)
    return f" {value.numerator}/{value.denominator}"


def _is_in_word(text, start):
    """Whether the digits belong to a word, or are the exponent of a unit: m2, H2O, m^2.

    A currency's code of three capitals is no such word: USD42.
    """
    before = text[:start]  # its end is \Z: $ would also be before a last newline
    if before.endswith("^"):
        return before[-2:-1].isalpha()
    is_code = re.search(r"(?<![A-Za-z])[A-Z]{3}\Z", before)
    # Chinese and Japanese write digits straight after words
    is_letter = re.search(r"[A-Za-z\u00c0-\u024f\u0370-\u052f]\Z", before)
    return bool(is_letter) and not is_code


def _goes_on(text, match):
    """Whether the number is part of something longer: a list, a time, a power, a version."""
    before = re.search(r"(?:\d[,.:^]|\)\^|/ ?-?|sqrt\{?|\d\.\()\Z", text[: match.start()])
    behind = re.match(r"[,.:/]\d|\^|[eE][-+]?\d| ?\\(?:pi|sqrt)", text[match.end() :])
    return bool(before or behind)


def _is_negative(before):
    """Whether what stands before a number ends with its minus, perhaps with a currency between."""
    before = re.sub(r"\\?[$\u20ac\u00a3\u00a5] ?\Z", "", before)
    sign = re.search(r"(.?)-( *)\Z", before, re.DOTALL)
    if not sign:
        return False
    earlier = before[: sign.start()] + sign[1]
    if sign[2]:  # "= - 5" is a number below 0, "10 - 5" and "so - 5" are not
        earlier = earlier.rstrip(" ")
        return not earlier or earlier[-1] in "=:([{"
    return not earlier or not (earlier[-1].isalnum() or earlier[-1] in ")]}%")


def _value_of(match):
    """Value of a match of NUMBER -> Fraction; None where it is beyond all measure, or n / 0."""
    exponent = int(match["power"] or match["exponent"] or match["times"] or 0)
    if len(match[0]) > MOST_DIGITS or abs(exponent) > MOST_DIGITS:
        return None
    if match["power"]:
        return Fraction(10) ** exponent
    if match["european"]:
        return Fraction(match["european"].replace(".", "").replace(",", "."))
    if match["top"]:
        top = int(_without_groups(match["top"]))
        bottom = int(_without_groups(match["bottom"]))
        if bottom == 0:
            return None
        return int(match["whole"] or 0) + Fraction(top, bottom)
    return Fraction(_without_groups(match["decimal"])) * Fraction(10) ** exponent


def _without_groups(digits):
    return re.sub(r"[,'\u2019_]", "", digits)


# --- Rewards --------------------------------------------------------------------------------------


def load_reward(
    reward,
    verifier,
    model="",
    device="cpu",
    dtype="auto",
    micro_batch_size=8,
    by_step=False,
    shard=False,
):
    """-> score(prompts, completions, rows) -> list of R numbers, or with by_step of R lists.

    reward: "verifier" for the function `verifier`, or "FILE.py:function", which is called with
    three lists of length R: prompts and rows repeated for each completion, the rows with `ended`
    and `raw` (see `with_ended`): the completions themselves are without special tokens.
    model: folder or hub name of a reward model, in place of `reward`. by_step: one number for each
    step of a completion (a process reward model's P(right)), not one for the whole. shard: divide
    the reward model among the processes.
    Raises ValueError where a reward cannot be loaded, fails, or returns what is no finite number.
    """
    if model:
        name = f"--reward-model {model}"
        function = _model_reward(model, device, dtype, micro_batch_size, by_step, shard)
    elif reward == "verifier":
        name = "--reward verifier"
        function = verifier
    else:
        name = f"--reward {reward}"
        function = _load_function(reward)

    def score(prompts, completions, rows):
        values = None
        if model or is_first():  # a function may ask a judge over a network, or run programs
            # Copies: nothing that a reward does to its lists may reach the training
            given = copy.deepcopy((prompts, completions, rows))
            with _no_exit(name), stop_on_error(f"{name} failed"):
                values = _numbers_of(function, given, completions, by_step)
        if model:
            return values
        # What a function draws at random moves the generator of the first process alone
        values, drawn = from_first((values, torch.get_rng_state()))
        torch.set_rng_state(drawn)
        return values

    return score


def _numbers_of(function, given, completions, by_step):
    """What a reward function returns for the lists it is given, as numbers that were looked at.

    completions: as they are, since the function may do anything to those it is given.
    """
    has_grad = torch.is_grad_enabled()
    dtype = torch.get_default_dtype()
    folder = os.getcwd()
    returned = function(*given)
    torch.set_grad_enabled(has_grad)  # a judge may have switched it off for good,
    torch.set_default_dtype(dtype)  # have loaded its model in another dtype,
    os.chdir(folder)  # or have run programs in a folder of their own
    if returned is None or isinstance(returned, dict | set | str):
        kind = type(returned).__name__
        raise ValueError(f"it returned a value of type {kind}, not a list of numbers")
    values = [_as_numbers(value) for value in returned]
    if len(values) != len(completions):
        raise ValueError(f"{len(values)} values for {len(completions)} completions")
    for value, text in zip(values, completions, strict=True):
        _check_reward(value, text, by_step)
    return values


def _load_function(reward):
    """ "FILE.py:function" -> the function. Its folder is where it finds its neighbours."""
    path, _, attribute = reward.rpartition(":")
    if not path.endswith(".py") or not attribute:
        stop(f"--reward {reward}: not of the form FILE.py:function")
    file = Path(path).resolve()
    if not os.path.isfile(file):
        stop(f"--reward {reward}: no file {path}")
    with _no_exit(f"--reward {reward}"):
        with stop_on_error(f"--reward {reward}: cannot be loaded from FILE.py:function"):
            spec = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(file.parent))
            sys.modules.setdefault(file.stem, module)  # so that worker processes can import it
            spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        stop(f"--reward {reward}: no function {attribute} in {path}")
    return getattr(module, attribute)


@contextlib.contextmanager
def _no_exit(name):
    """Turn sys.exit in a user's file into UserError: a run must not end as if it were done."""
    try:
        yield
    except SystemExit as error:
        stop(f"{name} called sys.exit({error.code})")


def _as_numbers(value):
    if isinstance(value, str | bytes):
        raise ValueError(f"{value!r} is a text, not a number")
    if isinstance(value, list):
        return [float(x) for x in value]
    return float(value)


def _check_reward(value, text, by_step):
    """ValueError where a reward is not a finite number, or with by_step a list of such."""
    if by_step and not isinstance(value, list):
        raise ValueError(
            f"{value} for {text[:60]!r}: --supervision process needs a list with a number per step"
        )
    if not by_step and isinstance(value, list):
        raise ValueError(
            f"{value} for {text[:60]!r}: it needs one number; lists go with --supervision process"
        )
    total = sum(value) if by_step else value
    if not math.isfinite(total):
        raise ValueError(f"{value} for {text[:60]!r}: not finite")


def _model_reward(path, device, dtype, micro_batch_size, by_step, shard):
    """Reward function of a saved reward model: of the last token, of steps, or of outcomes."""
    with _stop_without("model", path):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    of_tokens = "ForTokenClassification" in str(config.architectures)
    separator = getattr(config, "step_separator", "")
    unknown = "" if of_tokens else "last"
    how = getattr(config, "solution_score", unknown)
    lacks_steps = not how or (by_step and not separator)
    _check_reward_config(config, path, of_tokens, lacks_steps)
    auto_class = transformers.AutoModelForSequenceClassification
    if of_tokens:
        auto_class = transformers.AutoModelForTokenClassification
    model = hold_as_computed(load_model(auto_class, path, device, dtype, shard))
    if not of_tokens and not hasattr(config, "reward_bias"):  # not made by these scripts
        return _foreign_reward(path, model, micro_batch_size)
    tokenizer = load_tokenizer(path)

    @torch.no_grad()
    def function(prompts, completions, rows):
        # From the texts, as the reward model may have another tokenizer and template
        encoded = []
        for prompt, text, row in zip(prompts, completions, rows, strict=True):
            steps = [text]
            if separator:
                steps = [step for step in text.split(separator) if step.strip()]
            close = None if row.get("ended", True) else []
            encoded.append(encode_steps(tokenizer, prompt, steps, separator, close))
            _check_room(len(encoded[-1][0]) + len(encoded[-1][1]), model.context, path)
        values = []
        with whole(model):
            outputs = _step_logits(model, encoded, micro_batch_size)
        for logits in outputs:
            probs = positive_probs(logits) if of_tokens else logits[:, 0]
            everywhere = torch.ones(1, len(probs), dtype=torch.bool)
            if by_step:
                values.append(probs.tolist())
            else:
                values.append(solution_score(probs[None], everywhere, how).item())
        return values

    return function


def _check_reward_config(config, path, of_tokens, lacks_steps):
    """Stop at a model that gives no rewards, or not those that are asked for."""
    if "ForCausalLM" in str(config.architectures):
        stop(f"--reward-model {path}: is a language model; rm_bt.py makes a reward model of one")
    if not of_tokens and config.num_labels != 1:
        stop(f"--reward-model {path}: has {config.num_labels} labels, not 1")
    if lacks_steps:
        stop(
            f"--reward-model {path}: its config.json does not say how to read the steps: make it "
            "with prm.py, for steps with --supervision process"
        )


def _check_room(length, room, path):
    if length > room:
        stop(
            f"a prompt and its completion of {length} tokens do not fit in the {room} of "
            f"--reward-model {path}: lower --max-new-tokens, or leave out the longest prompts"
        )


def _foreign_reward(path, model, micro_batch_size):
    """Reward function of a model made elsewhere: its template, its own forward and its pooling."""
    tokenizer = load_tokenizer(path, needs_eos=False)
    room = min(model.context, tokenizer.model_max_length)
    first_position = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
    if first_position is not None:  # RoBERTa counts positions from the one after this
        room = min(model.context - first_position - 1, tokenizer.model_max_length)
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is not None and not 0 <= pad_id < len(model.get_input_embeddings().weight):
        pad_id = None  # such as the -1 of old LLaMA conversions
    size = 1 if pad_id is None else micro_batch_size  # it finds ends of texts by their padding

    @torch.no_grad()
    def function(prompts, completions, rows):
        encoded = []
        for prompt, text, row in zip(prompts, completions, rows, strict=True):
            ended = row.get("ended", True)
            encoded.append(_foreign_inputs(tokenizer, model, prompt, text, ended))
            _check_room(len(encoded[-1]["input_ids"]), room, path)
        scores = torch.zeros(len(encoded))
        lengths = torch.tensor([len(one["input_ids"]) for one in encoded])
        with whole(model):
            for index in deal_out(lengths.argsort().split(size)):
                part = [encoded[i] for i in index]
                scores[index] = _foreign_scores(model, part, pad_id)
        return add_up(scores).tolist()

    return function


def _foreign_scores(model, part, pad_id):
    """Inputs of some texts, as `_foreign_inputs` gives them -> their scores (N,) on the CPU."""
    ids, mask = pad([one["input_ids"] for one in part], "right")
    if pad_id is not None:
        ids = ids.masked_fill(~mask, pad_id)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if "token_type_ids" in part[0]:
        inputs["token_type_ids"] = pad([one["token_type_ids"] for one in part], "right")[0]
    inputs = {name: values.to(model.device) for name, values in inputs.items()}
    with _autocast(model):
        return model(**inputs).logits[:, 0].float().cpu()


def _foreign_inputs(tokenizer, model, prompt, text, ended):
    """Prompt and completion as the authors of a reward model encode them -> {name: ids}.

    With a chat template its rendering of the whole conversation. Without one: encoders get a pair
    of texts, other models one text with an EOS, where that is not the pad token.
    """
    if tokenizer.chat_template or not isinstance(prompt, str):
        conversation = conversation_text(tokenizer, prompt, text, ended)
        return {"input_ids": tokenizer(conversation, add_special_tokens=False)["input_ids"]}
    if hasattr(model, "score"):  # the head of models that read from left to right
        ids = text_ids(tokenizer, prompt + text)
        eos = tokenizer.eos_token_id
        if ended and eos not in (None, model.config.get_text_config().pad_token_id):
            ids = [*ids, eos]
        return {"input_ids": ids}
    if tokenizer.sep_token_id is not None:
        return dict(tokenizer(prompt, text))
    ids = tokenizer(f"{prompt} {text}", add_special_tokens=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return {"input_ids": [token for token in ids if token is not None]}


def _step_logits(model, encoded, micro_batch_size):
    """Outputs of the head at the step ends of each completion -> list of R tensors (S, labels).

    encoded: prompt ids, ids and step ends of each, from `encode_steps`. They are taken in the order
    of their lengths: book 10.2.4.1.
    """
    found = []
    lengths = torch.tensor([len(ids) for _, ids, _ in encoded])
    # By length, so that little is padding
    for index in deal_out(lengths.argsort().split(micro_batch_size)):
        part = [encoded[i] for i in index]
        prompts = pad([prompt_ids for prompt_ids, _, _ in part], "left")
        completions = pad([ids for _, ids, _ in part], "right")
        batch = Batch(*prompts, *completions, torch.arange(len(part)))
        logits = completion_scores(model, batch.to(model.device)).cpu()
        for i, row, (_, _, ends) in zip(index.tolist(), logits, part, strict=True):
            found.append((i, row[ends]))
    outputs = dict(gather(found))
    return [outputs[i] for i in range(len(encoded))]


def positive_probs(logits):
    """Logits of steps (..., classes) -> probability that a step is not wrong (...).

    Of two or three classes 1 - P(wrong), so that neutral counts as positive, as in Lightman et al.
    2023; of one logit the sigmoid. Book 7.6.
    """
    if logits.shape[-1] == 1:
        return logits[..., 0].sigmoid()
    return logits.softmax(-1)[..., 1:].sum(-1)


def solution_score(step_probs, step_mask, how):
    """Probabilities of steps and their mask (R, S) -> scores of solutions (R,). Book 7.6.

    product: the chance that every step is right (Lightman et al. 2023); or the minimum, the last or
    the mean. A solution without a step has 0, not the empty product's 1.
    """
    scores = []
    for all_probs, mask in zip(step_probs, step_mask, strict=True):
        probs = all_probs[mask]
        if len(probs) == 0:
            scores.append(all_probs.new_zeros(()))
        elif how == "product":
            scores.append(probs.prod())
        elif how == "minimum":
            scores.append(probs.min())
        elif how == "last":
            scores.append(probs[-1])
        elif how == "mean":
            scores.append(probs.mean())
        else:
            raise ValueError(f"No score of a solution is called {how!r}.")
    return torch.stack(scores)


# --- Evaluation -----------------------------------------------------------------------------------


def one_number(values):
    """Rewards of completions -> (R,) float32; of lists of step rewards their means."""
    numbers = []
    for value in values:
        if isinstance(value, list):
            numbers.append(sum(value) / max(1, len(value)))
        else:
            numbers.append(value)
    return torch.tensor(numbers, dtype=torch.float32)


def greedy_rewards(policy, tokenizer, score, rows, max_new_tokens, batch_size):
    """Answer the rows' prompts greedily, `batch_size` at a time -> rewards, texts (lists)."""
    values = []
    texts = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompts = [row["prompt"] for row in part]
        sampled = generate(policy, tokenizer, prompts, 1, max_new_tokens, temperature=0)
        batch, answers, ended = sampled
        values += score(prompts, answers, with_ended(part, ended, batch, tokenizer))
        texts += answers
    return values, texts


def report_greedy(run, policy, tokenizer, score, rows):
    """Answer held-out prompts, if there are any, and log their mean reward and the first answers.

    Answers are greedy, as many at a time as a step samples. The mean is called eval_accuracy where
    the script's verifier rewards them.
    """
    if not rows:
        return
    prompts_at_once = run.args.generation_batch_size or run.args.num_prompts
    sizes = (run.args.max_new_tokens, prompts_at_once * run.args.num_generations)
    values, texts = greedy_rewards(policy, tokenizer, score, rows, *sizes)
    rewards = one_number(values)
    name = "eval_accuracy" if is_verified(run.args) else "eval_reward"
    run.log({name: rewards.mean()}, name)
    run.samples([row["prompt"] for row in rows], texts, rewards.tolist(), held_out=True)


def kl_from_start(policy, start, tokenizer, prompts, max_new_tokens, batch_size):
    """Sample one completion of each prompt from the policy, `batch_size` at a time.

    -> KL(policy || start) of each completion in nats (k1, N), texts.
    """
    kl = []
    texts = []
    for i in range(0, len(prompts), batch_size):
        part = prompts[i : i + batch_size]
        batch, sampled, _ = generate(policy, tokenizer, part, 1, max_new_tokens)
        logps = fixed_logps(policy, batch, micro_batch_size=batch_size)
        start_logps = fixed_logps(start, batch, micro_batch_size=batch_size)
        kl.append(kl_estimate(logps, start_logps, "k1").sum(1))
        texts += sampled
    return torch.cat(kl), texts


# --- The folder of a run --------------------------------------------------------------------------

# Panels of curves.png: these first, then the others by name
IMPORTANT = [
    "eval_accuracy", "eval_reward", "eval_loss", "reward", "gold_reward", "accuracy", "loss", "kl",
    "eval_kl", "completion_length", "ended", "entropy", "grad_norm",
]  # fmt: skip


GENERIC_HEAD = """Transformers has no class with a head for this family: outside these scripts
AutoModelForSequenceClassification and AutoModelForTokenClassification do not load this folder.
`plumbing.load_model` does; it puts transformers.modeling_layers.GenericForSequenceClassification
(or GenericForTokenClassification) on the family's backbone.
"""
LOGS = (  # they grow from step to step
    "metrics.jsonl", "samples.jsonl", "judgements.jsonl", "chains.jsonl", "comparisons.jsonl",
)  # fmt: skip
RUN_FILES = (
    *LOGS, "args.json", "curves.png", "reward_histogram.png", "best_of_n.png", "checkpoint",
    "final", "critic", "pairs", "candidates", "answers.jsonl", "preferences.jsonl",
    "results.jsonl", "sft.jsonl", "revisions.jsonl",
)  # fmt: skip
BEFORE_A_START = {"args.json", "args.json.new", "lock"}  # what a start that failed may leave


class Run:
    """The folder of a run: args.json, metrics.jsonl, samples.jsonl, curves.png, checkpoint, final.

    Nothing is written before `begin`. A file is replaced in one move: a run that is killed at any
    moment, or fills the disk, has the old file or the new one; of a folder at least NAME.old or
    NAME.new.
    """

    def __init__(self, args):
        check_flags(args)
        _check_lora(args)
        self.args = args
        self.folder = Path(args.output_dir).expanduser()
        self.step = 0
        self.bar = None
        self.shown = []  # names of the figures for the closing line
        self.warned = set()  # what was warned of
        self.equal_steps = 0  # steps in a row whose rewards were all equal
        self.stopped_by = ""
        self.inputs = {str(path): _digest(path) for path in _input_files(args)}
        _check_processes(args, self.inputs)
        if getattr(args, "show_rows", 0):
            return  # nothing will be written
        if is_first():
            self._check_folder()
        if args.resume:
            self._check_resume()

    def _check_folder(self):
        """Stop where a run must not begin, or --overwrite would touch what is not a run's."""
        folder = self.folder
        with stop_on_error(f"--output-dir {folder}"):  # such as a name that is too long
            with contextlib.suppress(FileNotFoundError):
                folder.lstat()
        if not self.args.output_dir.strip() or folder.resolve() in (Path.cwd(), Path.home()):
            stop(f"--output-dir {self.args.output_dir!r}: a run needs a folder of its own")
        if folder.is_symlink():
            stop(f"--output-dir {folder} is a link: give the folder that it leads to")
        if not os.path.exists(folder) or self.args.resume:
            return
        if not folder.is_dir():
            stop(f"--output-dir {folder} is a file")
        has_begun = {path.name for path in folder.iterdir()} - BEFORE_A_START
        if has_begun and not self.args.overwrite:
            stop(f"{folder} exists: use --resume or --overwrite, or another --output-dir")
        if has_begun and not self._marker():
            stop(f"--overwrite: {folder} holds no run of these scripts: nothing in it is replaced")
        for path in self.inputs:
            if folder.resolve() in Path(path).resolve().parents:
                stop(f"--overwrite: the run in {folder} holds {path}, which this command reads")

    def _marker(self):
        """Name of the script that made the run in the folder; empty where none of ours did."""
        try:
            return json.loads((self.folder / "args.json").read_text())["script"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _check_resume(self):
        """Stop where flags, or files that are read, are not those the run began with."""
        if not (self.folder / "args.json").exists():
            stop(f"--resume: no run in {self.folder}")
        with stop_on_error(f"--resume: cannot read {self.folder / 'args.json'}"):
            old = json.loads((self.folder / "args.json").read_text())
        for name, value in vars(self.args).items():
            # The folder may have been moved, or be spelt in another way
            may_change = ("resume", "overwrite", "output_dir", "num_steps", "show_rows")
            if old.get(name) != value and name not in may_change:
                flag = f"--{name.replace('_', '-')}"
                stop(
                    f"--resume: {self.folder} began with {flag} {old.get(name)}, not {value} "
                    "(only --num-steps may change)"
                )
        if old.get("script", self._script()) != self._script():
            stop(f"--resume: {self.folder} was begun by {old['script']}.py")
        for path, digest in old.get("inputs", {}).items():
            if self.inputs.get(path, digest) != digest:
                stop(f"--resume: {path} is no longer what it was when the run began")
        num_steps = getattr(self.args, "num_steps", None)
        if old.get("num_steps") != num_steps:
            print(
                f"--num-steps {num_steps}, begun with {old.get('num_steps')}: from here on the "
                f"learning rate is that of a run of {num_steps} steps"
            )

    def _script(self):
        module = sys.modules[type(self.args).__module__]
        return Path(getattr(module, "__file__", "run")).stem

    def begin(self, parts, num_steps):
        """Make the folder, or load its checkpoint.

        parts: {name: model, optimiser, scheduler, or a plain object whose attributes are its
        state}: all that a checkpoint has to hold.
        """
        self.parts = parts
        self.num_steps = num_steps
        self.start = time.time()
        if is_first():
            with stop_on_error(f"cannot make {self.folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = _locked(self.folder)
        if not self.args.resume:
            if is_first():
                self._check_folder()  # another run may have begun there since
                self._delete_run()
            content = vars(self.args) | {"script": self._script(), "inputs": self.inputs}
            text = json.dumps(content, indent=1)
            self._replace("args.json", lambda new: new.write_text(text))
        elif (self.folder / "checkpoint" / "state.pt").exists():
            self._cut_logs(self._load_checkpoint())
        else:
            self._cut_logs({})

    def _delete_run(self):
        """Delete what a run writes, and nothing else."""
        for name in RUN_FILES:
            for path in (
                self.folder / name,
                self.folder / f"{name}.new",
                self.folder / f"{name}.old",
            ):
                with stop_on_error(f"--overwrite: cannot delete {path}"):
                    if path.is_symlink() or path.is_file():
                        path.unlink()
                    elif path.exists():
                        shutil.rmtree(path)

    def _cut_logs(self, sizes):
        """Cut the logs to their sizes at the checkpoint: what came after it comes again."""
        if not is_first():
            return
        for name in LOGS:
            path = self.folder / name
            size = sizes.get(name, 0)
            if not path.exists() and not size:
                continue
            if not path.exists() or path.stat().st_size < size:
                stop(f"--resume: {path} is shorter than it was at the checkpoint")
            with stop_on_error(f"--resume: cannot write {path}"):
                os.truncate(path, size)

    def _load_checkpoint(self):
        """Load the parts, the random states and the step -> sizes of the logs at that time."""
        path = self.folder / "checkpoint" / "state.pt"
        with stop_on_error(f"--resume: cannot read {path}"):
            # Of several processes that read one file, mmap lets all share its pages
            options = {"map_location": "cpu", "weights_only": True, "mmap": process()[1] > 1}
            state = torch.load(path, **options)
        for name, part in self.parts.items():
            if hasattr(part, "load_state_dict"):
                state[name].update(_frozen(part))
                _load_whole(part, state[name])
            else:
                vars(part).update(state[name])
            if hasattr(part, "lr_lambdas"):
                _set_rate(part)
        torch.set_rng_state(state["torch"])
        # One for each GPU; there may be fewer now
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
        random.setstate(state["random"])
        self.step = state["step"]
        self.start = time.time() - state["seconds"]
        return state["sizes"]

    def describe(self, model, num_rows, num_held_out, work):
        """Print what is about to run. work: what a step consists of, in words."""
        args = self.args
        parameters = sum(p.numel() for p in model.parameters())
        size = f"{parameters / 1e6:.1f} million parameters"
        if getattr(args, "from_scratch", False):
            size += ", drawn at random (--from-scratch)"
        if _has_adapters(model):
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            size += f", {trained:,} of them trained (--lora-rank {args.lora_rank})"
        dtype = "bfloat16 autocast" if model.autocast_dtype else "float32"
        where = model.device
        if process()[1] > 1:
            where = f"{process()[1]} processes ({model.device.type})"
        print(f"{_near(args.model)}: {size}, on {where} in {dtype}")
        held_out = f"{num_held_out} held out"
        if num_held_out and args.eval_dataset:
            held_out += f" ({_near(args.eval_dataset)})"
        print(f"{num_rows} training rows, {held_out}; {self.num_steps} steps of {work}")
        if self.step >= self.num_steps:
            print(f"all {self.num_steps} steps of {self.folder} are done")
        elif self.step:
            print(f"goes on after step {self.step} of {self.folder}")

    def steps(self):
        """Yield the numbers of the steps still to do; a checkpoint after every --checkpoint-every.

        Ctrl-C and SIGTERM let the step come to its end, save a checkpoint and end the program; a
        second Ctrl-C ends it at once.
        """
        has_bar = is_first() and sys.stderr.isatty()
        self.bar = tqdm(total=self.num_steps, initial=self.step, disable=not has_bar)
        with self.bar, self._signals_wait():
            while self.step < self.num_steps:
                self.step += 1
                yield self.step
                self.bar.update()
                # A signal may come to one process before a step's end, to another after it
                self.stopped_by = max(gather([self.stopped_by]))
                if self.stopped_by:
                    self.checkpoint()
                    print(
                        f"stopped by {self.stopped_by} after step {self.step}: a checkpoint is "
                        "saved, and the same command with --resume goes on from here"
                    )
                    raise SystemExit(130)
                if self.step % self.args.checkpoint_every == 0:
                    self.checkpoint()

    @contextlib.contextmanager
    def _signals_wait(self):
        """Inside, Ctrl-C and SIGTERM only set `stopped_by`; a second Ctrl-C stops at once."""
        before = {}

        def note(number, frame):
            is_second = self.stopped_by
            self.stopped_by = signal.Signals(number).name
            # A second SIGTERM is not the user's: torchrun hands on one that came to all processes
            if number == signal.SIGINT:
                signal.signal(number, before[number])
            if is_second or not is_first():
                return
            print(
                f"{self.stopped_by}: this step ends and a checkpoint is saved; a second Ctrl-C "
                "stops at once, without",
                file=sys.stderr,
            )

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as of a program in the background
                    before[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread: signals do not come here
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def log(self, metrics, *show, always=False):
        """Add a row to metrics.jsonl. What is not finite is left out.

        show: names of the figures to print: of evaluations (eval_...) always, of steps in the
        progress bar, or in about twenty lines where the output is no terminal.
        """
        row = {}
        for name, value in metrics.items():
            if math.isfinite(value):
                row[name] = float(f"{float(value):.6g}")
        row["step"] = self.step
        row["seconds"] = round(time.time() - self.start, 3)
        self.append("metrics.jsonl", [row])
        figures = {name: f"{row[name]:.4g}" for name in show if name in row}
        self.shown += [name for name in figures if name not in self.shown]
        is_evaluation = any(name.startswith("eval_") for name in metrics)
        if figures and (is_evaluation or always):
            self._print_figures(figures)
        elif figures and self.bar is not None and not self.bar.disable:
            self.bar.set_postfix(figures)
        elif figures and self.step % max(1, self.num_steps // 20) == 0:
            self._print_figures(figures)
        self._warn(metrics)

    def _warn(self, metrics):
        """Say once what a person should look at: cut completions, rewards that are all equal."""
        if metrics.get("ended", 1) < 0.8:
            share = f"{1 - float(metrics['ended']):.0%}"
            self._warn_once(
                f"{share} of the completions ran into --max-new-tokens "
                f"{self.args.max_new_tokens}; raise it, or the model never learns to end",
                "ended",
            )
        if "reward_std" in metrics:
            self.equal_steps = self.equal_steps + 1 if metrics["reward_std"] == 0 else 0
        if self.equal_steps == 3:
            self._warn_once(
                "all rewards of the last three steps were equal, and nothing can be learned from "
                "that; see docs/metrics.md",
                "reward_std",
            )

    def _warn_once(self, text, about):
        if about not in self.warned and is_first():
            self.warned.add(about)
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def _print_figures(self, figures):
        """A line above the progress bar."""
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        tqdm.write(f"step {self.step}/{self.num_steps}  {text}")

    def samples(self, prompts, completions, rewards=None, held_out=False):
        """Add the first --log-samples completions to samples.jsonl, for a person to read.

        held_out: these prompts are answered at every evaluation; `finish` prints before and after.
        """
        rewards = rewards or [None] * len(prompts)
        rows = []
        for prompt, completion, reward in zip(prompts, completions, rewards, strict=True):
            row = {"step": self.step, "prompt": prompt, "completion": completion, "reward": reward}
            if held_out:
                row["held_out"] = True
            rows.append(row)
        self.append("samples.jsonl", rows[: self.args.log_samples])

    def append(self, name, rows):
        """Add rows to a file of JSON Lines in the run's folder."""
        if not is_first():
            return
        with stop_on_error(f"cannot write {self.folder / name}"):
            with open(self.folder / name, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def write_rows(self, name, rows):
        """Write a file of JSON Lines in the run's folder, in one move."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self._replace(name, lambda new: new.write_text(text))

    def read_rows(self, name):
        """Rows of a file of JSON Lines in the run's folder; none where there is no such file."""
        path = self.folder / name
        rows = []
        if is_first() and path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        return from_first(rows)

    def _sizes_of_logs(self):
        sizes = {}
        for name in LOGS:
            if (self.folder / name).exists():
                sizes[name] = (self.folder / name).stat().st_size
        return sizes

    def _check_weights(self):
        """Stop before broken weights are saved: a last step is followed by no loss to show them."""
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                is_whole = all(_mine(p).isfinite().all() for p in part.parameters())
                if not all(gather([is_whole])):
                    stop(
                        f"step {self.step} broke the weights ({name}): lower --learning-rate; "
                        "--resume goes on from the last checkpoint"
                    )

    def checkpoint(self):
        """Save the parts, the random states and the step, so that --resume goes on bit for bit."""
        self._check_weights()
        state = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "random": random.getstate(),
            "step": self.step,
            "seconds": time.time() - self.start,
            "sizes": self._sizes_of_logs(),
        }
        for name, part in self.parts.items():
            has_state = hasattr(part, "state_dict")
            state[name] = _whole_tensors(part.state_dict()) if has_state else vars(part)
            for frozen in _frozen(part):
                del state[name][frozen]
        self._replace("checkpoint/state.pt", lambda new: torch.save(state, new))

    def finish(self, tokenizer, models):
        """Save {folder name: model} with the tokenizer, draw curves.png, print what came of it."""
        self.checkpoint()
        for name, model in models.items():
            self._save_model(name, model, tokenizer)
        rows = self.read_rows("metrics.jsonl")
        self.draw("curves.png", draw_curves, rows)
        self._print_answers()
        self._print_changes(rows)
        print(f"saved {self.folder} after {time.time() - self.start:.0f} s")
        if (self.folder / "samples.jsonl").exists():
            print(f"completions to read: {self.folder / 'samples.jsonl'}")
        if (self.folder / "final" / "generation_config.json").exists():
            program = _near(ROOT / "plumbing.py")
            print(f"to talk to the model: python {program} {self.folder / 'final'}")
        elif (self.folder / "final").exists():
            print(f"to train on it: python grpo.py --reward-model {self.folder / 'final'}")

    def _save_model(self, name, model, tokenizer):
        given = {}
        if getattr(model, "sharded", False):
            given["state_dict"] = _whole_state(model)

        def write(new):
            if _has_adapters(model):
                _merged(model).save_pretrained(new)
                _save_adapter(model, new / "adapter")
            else:
                model.save_pretrained(new, **given)
            tokenizer.save_pretrained(new)
            if getattr(model, "has_generic_head", False):
                (new / "README.md").write_text(GENERIC_HEAD)

        self._replace(name, write)

    def _print_changes(self, rows):
        """A line such as: eval_accuracy 0.442 -> 0.982, of the evaluations where there are such."""
        names = [name for name in self.shown if name.startswith("eval_")] or self.shown
        changes = []
        for name in names:
            values = [row[name] for row in rows if name in row]
            if len(values) > 1:
                changes.append(f"{name} {values[0]:.4g} -> {values[-1]:.4g}")
        if changes:
            print("first -> last: " + ", ".join(changes))

    def _print_answers(self, most=2):
        """The same held-out prompts answered at the first and at the last evaluation."""
        rows = [row for row in self.read_rows("samples.jsonl") if row.get("held_out")]
        if not rows or rows[0]["step"] == rows[-1]["step"]:
            return
        first = [row for row in rows if row["step"] == rows[0]["step"]]
        last = [row for row in rows if row["step"] == rows[-1]["step"]]
        for before, after in list(zip(first, last, strict=False))[:most]:
            print(f"prompt: {_short(before['prompt'])}")
            for word, row in (("before", before), ("after", after)):
                reward = "" if row["reward"] is None else f" (reward {row['reward']:.4g})"
                print(f"    {word}{reward}: {_short(row['completion'])}")

    def histogram(self, values):
        """Draw reward_histogram.png of {label: numbers (N,)}, where matplotlib is there."""
        self.draw("reward_histogram.png", draw_histogram, values)

    def draw(self, name, function, *values):
        """Let function(*values, path) draw a picture; without matplotlib there is none."""
        if not is_first():
            return
        with stop_on_error(f"cannot write {self.folder / name}"):
            with contextlib.suppress(ImportError):
                function(*values, self.folder / name)

    def _replace(self, name, write):
        """Let `write(path)` write NAME.new, and put that in the place of NAME in one move."""
        if not is_first():
            return
        path = self.folder / name
        new = self.folder / f"{name}.new"
        old = self.folder / f"{name}.old"
        with stop_on_error(f"cannot write {path}; what was there is left"):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(new, ignore_errors=True)  # what a killed run left of a folder
            write(new)
            _flush(new)
            if path.is_dir():  # no call replaces a folder: for a moment there is only .old
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(new, path)
            shutil.rmtree(old, ignore_errors=True)


def _check_processes(args, inputs):
    """Stop where several processes have too little to do, or do not see the same flags and files.

    inputs: {path: its digest}, of the files that the flags name.
    """
    number, count = process()
    if getattr(args, "shard", False):
        _check_shard(args, count)
    if count == 1:
        return
    seen = gather([vars(args) | inputs])
    for other, values in enumerate(seen):
        for name in seen[0].keys() | values.keys():
            if values.get(name) != seen[0].get(name):
                stop(f"process {other} does not have the same {name} as process 0")
    for name in ("num_prompts", "batch_size"):
        size = getattr(args, name, count)
        if size < count:
            flag = f"--{name.replace('_', '-')}"
            stop(f"{flag} {size}: fewer than the {count} processes, one would have nothing to do")


def count_steps(num_rows, args):
    """Steps that take --batch-size rows each, the last one what is left -> how many there are.

    Stops where that leaves the last step of --shard fewer rows than there are processes.
    """
    left = num_rows % args.batch_size
    count = process()[1]
    if args.shard and 0 < left < count:
        stop(
            f"--shard: {num_rows} rows in steps of --batch-size {args.batch_size} leave {left} to "
            f"the last step, fewer than the {count} processes"
        )
    return math.ceil(num_rows / args.batch_size)


def _check_shard(args, count):
    """Stop where --shard cannot work."""
    if count == 1:
        stop("--shard divides a model among the processes of torchrun, and there is one process")
    for flag in ("lora_rank", "nll_coef", "lm_coef"):
        if getattr(args, flag, 0):
            stop(f"--shard does not go with --{flag.replace('_', '-')}")
    if getattr(args, "head", "") == "cobbe":
        stop("--shard does not go with --head cobbe")


def _input_files(args):
    """The files and folders that the flags name, that of a reward function included."""
    paths = []
    for name, value in vars(args).items():
        if name == "output_dir" or not isinstance(value, str):
            continue
        for path in (value, value.rpartition(":")[0]):
            if path and os.path.exists(path):
                paths.append(Path(path))
    return paths


def _digest(path):
    """SHA-256 of a file; of a folder, which is not read for it, nothing."""
    if path.is_dir():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locked(folder):
    """Keep a second run out of the folder until this process ends -> the open lock file."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(folder / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stop(f"another run is writing to {folder}")
    return file


def _set_rate(scheduler):
    """Set the learning rate of the next step: the schedule may be longer than when it was saved."""
    rates = []
    for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        rates.append(rate * factor(scheduler.last_epoch))
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _flush(path):
    """Have the disk hold a file, or all files of a folder, before it takes the place of another."""
    files = [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _near(path):
    """A path below the working folder, without that folder."""
    text = str(path)
    here = str(Path.cwd()) + os.sep
    return text.removeprefix(here)


def _short(text, length=160):
    """A text, or the last message of a chat, on one line of at most `length` characters."""
    if isinstance(text, list):
        text = text[-1].get("content")
    line = str(text).replace("\n", " / ")
    return line if len(line) <= length else line[:length] + " ..."


# --- Pictures -------------------------------------------------------------------------------------


def draw_curves(rows, path):
    """Draw each metric of metrics.jsonl by step: the important ones first, constants left out."""
    from matplotlib.figure import Figure

    names = set()
    for row in rows:
        names |= set(row)
    names -= {"step", "seconds"}
    points = {}
    for name in sorted(names, key=_importance):
        steps = [row["step"] for row in rows if name in row]
        values = [row[name] for row in rows if name in row]
        if len(set(values)) > 1:
            points[name] = (steps, values)
    if not points:
        return
    num_lines = math.ceil(len(points) / 4)
    figure = Figure(figsize=(14, 2.5 * num_lines), layout="constrained")
    for place, (name, (steps, values)) in enumerate(points.items(), 1):
        axes = figure.add_subplot(num_lines, 4, place, title=name, xlabel="step")
        marker = "o" if name.startswith("eval_") else ""
        axes.plot(steps, values, marker=marker)
    figure.savefig(path)


def _importance(name):
    """Sort key: the place in IMPORTANT, and after those the name."""
    if name in IMPORTANT:
        return IMPORTANT.index(name), ""
    return len(IMPORTANT), name


def draw_histogram(values, path):
    """Draw the numbers of each label in {label: numbers (N,)} over each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="score", ylabel="held-out completions")
    lowest = min(float(numbers.min()) for numbers in values.values() if len(numbers))
    highest = max(float(numbers.max()) for numbers in values.values() if len(numbers))
    if highest - lowest < 1e-6 * max(1, abs(highest)):  # too little to be divided into bins
        lowest -= 0.5
        highest += 0.5
    for label, numbers in values.items():
        axes.hist(numbers, bins=30, range=(lowest, highest), label=label, alpha=0.5)
    axes.legend()
    figure.savefig(path)


# --- Talk to a model ------------------------------------------------------------------------------


def talk(path):
    """Read prompts from the terminal and print the greedy answers of the model in a folder."""
    quieten_transformers()
    model = load_model(transformers.AutoModelForCausalLM, path, pick_device())
    tokenizer = load_tokenizer(path)
    print("one prompt per line; an empty line ends this")
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return
        if not prompt:
            return
        room = model.context - len(encode_prompt(tokenizer, prompt))
        if room < 1:
            print(f"that does not fit in the model's {model.context} tokens")
            continue
        _, texts, _ = generate(model, tokenizer, [prompt], 1, min(room, 256), temperature=0)
        print(texts[0])


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("to talk to a model, give its folder: python plumbing.py runs/grpo/final")
    try:
        talk(sys.argv[1])
    except ValueError as error:
        sys.exit(f"plumbing.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
