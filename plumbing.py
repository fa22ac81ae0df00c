"""What every script needs and no chapter explains: errors of one line, flags, rows, models, a run.

The scripts take these names from common.py. Nothing here knows what a loss is made of.
"""
import contextlib
import json
import math
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import transformers
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent

def stop(message):
    """Raise SystemExit: `message` as one line on stderr, exit code 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: " + " ".join(str(message).split())[:500])

@contextlib.contextmanager
def stop_on_error(saying):
    """Turn an exception into one line: `saying`, what it was, and where."""
    try:
        yield
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        stop(f"{saying} ({type(e).__name__}: {e}; {Path(at.filename).name}:{at.lineno})")

def parse_args(Args, toy):
    """Command line -> Args. Without --model the defaults are `toy`; paths in it count from here."""
    flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in toy.items())
    toy = {k: str(ROOT / v) if str(v).startswith("toy/") else v for k, v in toy.items()}
    given = {a.split("=")[0] for a in sys.argv[1:]}
    default = None if given & {"--model", "--help", "-h"} else Args(**toy)
    return tyro.cli(Args, default=default, description=f"Without --model the defaults are: {flags}")

# --- Rows -----------------------------------------------------------------------------------------

def load_rows(path, *columns):
    """JSON Lines file, or `owner/name:split` of the hub (needs `datasets`) -> list of dicts.
    columns: what no row may lack or leave empty; a tuple names alternatives."""
    rows, lines = [], Path(path).read_bytes().splitlines() if Path(path).is_file() else None
    if lines is None:
        with stop_on_error(f"{path}: no such file (the hub needs `datasets`)"):
            from datasets import load_dataset
            name, _, split = path.partition(":")
            lines = [json.dumps(row) for row in load_dataset(name, split=split or "train")]
    for where, line in [(f"{path}, line {n}", x) for n, x in enumerate(lines, 1) if x.strip()]:
        with stop_on_error(f"{where}: no JSON object; it needs one a line"):
            rows.append(row := {**json.loads(line)})
        for names in [(c,) if isinstance(c, str) else c for c in columns]:
            value = next((row[name] for name in names if row.get(name) is not None), "")
            if value == [] or not str(value).strip():
                stop(f"{where}: no {' or '.join(names)}, or an empty one; it has {', '.join(row)}")
    return rows or stop(f"{path}: no rows")

def load_splits(args, read):
    """-> rows of args.dataset, held-out rows; read: path -> rows. Those of args.eval_dataset, or,
    without one, of args.eval_size prompts of args.dataset, which then has these no more."""
    rows = read(args.dataset)
    if args.eval_dataset:
        return rows, read(args.eval_dataset)
    rows, held = hold_out(rows, args.eval_size, args.seed)
    if args.eval_size and not held:
        print(f"{args.dataset}: under ten prompts, so none is held out and nothing evaluated")
    return rows, held

def hold_out(rows, num_prompts, seed):
    """Rows -> (train, held out), by prompt, so that none is on both sides; at most a tenth. Chats
    go by what the user says first: many have one system message, or share their first turns."""
    keys = []
    for chat in (row.get("prompt") or row["messages"] for row in rows):
        turns = [turn for turn in (chat if isinstance(chat, list) else [])
                 if isinstance(turn, dict) and turn.get("role") == "user"]
        keys.append(str(turns[0] if turns else chat))
    prompts = sorted(set(keys))
    held = set(random.Random(seed).sample(prompts, min(num_prompts, len(prompts) // 10)))
    sides = [], []
    for row, key in zip(rows, keys, strict=True):
        sides[key in held].append(row)
    return sides

def answer_text(answer, prompt):
    """Text of an answer: a text, or the last of its messages, where the others are the prompt's.
    ValueError where they are not: they would be lost."""
    if isinstance(answer, str):
        return answer
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if answer[:-1] not in ([], chat) or answer[-1]["role"] != "assistant":
        raise ValueError("the answer's messages before its last are not those of the prompt, or "
                         "the last is not the assistant's: `prompt` needs all earlier turns")
    return answer[-1]["content"]

def has_answers(rows):
    """Whether every row has an `answer` that is a number, as a verifier needs it."""
    try:
        return all(math.isfinite(float(str(row["answer"]).replace(",", ""))) for row in rows)
    except (KeyError, ValueError):
        return False

def with_ended(rows, ended):
    """Rows (R), each with its `ended` (R,): False where a completion was cut off. For rewards."""
    return [row | {"ended": e} for row, e in zip(rows, ended.tolist(), strict=True)]

# --- Device, tokenizer and prompts ----------------------------------------------------------------

def pick_device(device="auto"):
    """auto -> cuda, else mps, else cpu."""
    found = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    with stop_on_error(f"--device {device}"):
        return torch.empty(0, device=found[0] if device == "auto" else device).device

def load_tokenizer(path):
    """Tokenizer of a model folder or hub name; one without an EOS is refused."""
    with stop_on_error(f"{path}: no tokenizer there, in a model folder or on the hub"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        stop(f"{path}: its tokenizer has no EOS, so no completion could end; set its eos_token")
    return tokenizer

def encode_prompt(tokenizer, prompt):
    """Text or chat messages -> list of token ids, up to where the completion begins.
    With a chat template, a text is one user message. Without one, it is taken as it stands."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        with stop_on_error(f"the chat template refuses {str(chat)[:80]}"):
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote the BOS
    if not isinstance(prompt, str):
        stop("the prompts are chat messages but the tokenizer has no chat template: use plain text")
    ids = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some close every text

def after_answer(tokenizer):
    """Ids that the chat template puts after an answer, say the end of turn and a newline."""
    if not tokenizer.chat_template:
        return []
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "@@"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("@@")[2]
    return tokenizer(text, add_special_tokens=False)["input_ids"]

def end_of_turn(tokenizer):
    """Id that closes a completion: the special one of `after_answer`, else the EOS."""
    special = [i for i in after_answer(tokenizer) if i in tokenizer.added_tokens_decoder]
    return (special or [tokenizer.eos_token_id])[0]

def set_other_pad(tokenizer):
    """Give the tokenizer a pad token that is no end, where it knows one. Transformers, and what is
    built on it, scores a text at its last id that is not pad: never at an end that is."""
    ends = {None, tokenizer.eos_token_id, end_of_turn(tokenizer)}
    others = set(tokenizer.added_tokens_decoder) - ends - {tokenizer.bos_token_id}
    if tokenizer.pad_token_id in ends and others:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(others))

def check_prompts(tokenizer, model, rows, max_new_tokens):
    """Stop where a prompt is empty, or with its completion would not fit in the model's context."""
    for row in rows:
        length = len(encode_prompt(tokenizer, row["prompt"]))
        if not 0 < length <= model.context - max_new_tokens:
            stop(f"a prompt of {length} tokens with --max-new-tokens {max_new_tokens} does not fit "
                 f"in the model's {model.context}: {str(row['prompt'])[:80]!r}")

# --- Models and gradient steps --------------------------------------------------------------------

def load_model(auto_class, path, device, dtype="auto", checkpointing=False, from_scratch=False,
               new_head=0):
    """Model of a Transformers auto class, from a folder or hub name, with float32 weights: in
    bfloat16, updates at these learning rates would be rounded away. dtype: "bfloat16" runs forwards
    in bfloat16 autocast, "auto" does so where cuda has it. new_head: labels of a head that need not
    be there yet; model.has_new_head says whether it was made."""
    with stop_on_error(f"{path}: no model there that {auto_class.__name__} loads"):
        config = transformers.AutoConfig.from_pretrained(path)
        config.num_labels = new_head or config.num_labels
        for key, value in vars(config).items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)  # else two forwards of one policy differ: no ratio is 1
        if from_scratch:
            model, missing = auto_class.from_config(config, dtype=torch.float32), []
        else:
            model, info = auto_class.from_pretrained(path, config=config, dtype=torch.float32,
                                                     output_loading_info=True)
            missing = info["missing_keys"]
    head = {key for key in missing if new_head and key.startswith(("score.", "classifier."))}
    lost = sorted(set(missing) - head)
    if lost:  # Transformers only warns, and makes up random weights
        stop(f"{path}: no weights for {', '.join(lost[:3])} in it")
    model.has_new_head = any(key.endswith("weight") for key in head)
    bfloat16 = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda" and
                                       torch.cuda.is_bf16_supported(including_emulation=False))
    model.autocast_dtype, model.recompute = torch.bfloat16 if bfloat16 else None, checkpointing
    model.context = getattr(config.get_text_config(), "max_position_embeddings", math.inf)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device).eval()

def update(optimizer, scheduler, loss, max_grad_norm):
    """One step on the gradients that stand in the parameters -> their norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(loss + norm):  # a step skipped in silence would look like slow learning
        stop(f"the loss is {loss}, the gradient's norm {norm}: lower --learning-rate, or look at "
             "the rewards; --resume goes on from the last checkpoint")
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return norm

# --- The folder of a run --------------------------------------------------------------------------

class Run:
    """args.json, metrics.jsonl, samples.jsonl, curves.png, checkpoint/, final/, and the progress.
    Nothing is written before `begin`. Files are replaced in one move: a run killed at any moment,
    or on a full disk, has the old one or the new one; of a folder at least NAME.old or NAME.new.
    """

    def __init__(self, args):
        self.args, self.folder, self.step = args, Path(args.output_dir), 0
        old = self.folder / "args.json"
        for name, value in vars(args).items():
            count = name.startswith(("num_", "max_", "micro_", "batch_")) or name.endswith("_every")
            least = int(count and isinstance(value, int))
            if isinstance(value, int | float) and value < least:
                stop(f"--{name.replace('_', '-')} {value}: must be at least {least}")
            path = Path(value if isinstance(value, str) else "")
            if args.overwrite and path.exists() and self.folder.resolve() in path.resolve().parents:
                stop(f"--overwrite would delete --{name.replace('_', '-')} {value}")
        if self.folder.exists() and not (old.exists() and (args.resume or args.overwrite)):
            stop(f"{self.folder} exists: use --resume or --overwrite, or another --output-dir")
        if args.resume:
            with stop_on_error(f"--resume: no run in {self.folder}"):
                old = json.loads(old.read_text())
            for key, value in vars(args).items():
                if old.get(key) != value and key not in ("resume", "overwrite", "num_steps"):
                    stop(f"--resume: {self.folder} began with {key} {old.get(key)}, not {value}")

    def begin(self, parts, num_steps):
        """Make the folder, or load its checkpoint into parts: {name: model, optimiser, or a plain
        object, whose attributes are its state}."""
        self.parts, self.num_steps, self.start = parts, num_steps, time.time()
        path, state = self.folder / "checkpoint" / "state.pt", {"sizes": {}}
        if not self.args.resume:
            shutil.rmtree(self.folder, ignore_errors=True)
            text = json.dumps(vars(self.args), indent=1)
            self._replace("args.json", lambda new: new.write_text(text))
        elif path.exists():
            with stop_on_error(f"--resume: cannot read {path}"):
                state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                load = getattr(part, "load_state_dict", vars(part).update)
                load(state[name])
            torch.set_rng_state(state["torch"])
            torch.cuda.set_rng_state_all(state["cuda"])
            random.setstate(state["random"])
            self.step, self.start = state["step"], time.time() - state["seconds"]
        for path in self.folder.glob("*.jsonl"):  # what came after the checkpoint comes again
            os.truncate(path, state["sizes"].get(path.name, 0))

    def steps(self):
        """The numbers of the steps still to do; a checkpoint after every --checkpoint-every."""
        quiet = not sys.stderr.isatty()
        with tqdm(total=self.num_steps, initial=self.step, disable=quiet) as self.bar:
            while self.step < self.num_steps:
                self.step += 1
                yield self.step
                self.bar.update()
                if self.step % self.args.checkpoint_every == 0:
                    self.checkpoint()

    def log(self, metrics, *show):
        """A row of metrics.jsonl; `show` names the figures of the progress bar or printed lines."""
        row = {k: float(f"{float(v):.6g}") for k, v in metrics.items() if math.isfinite(v)}
        row |= {"step": self.step, "seconds": round(time.time() - self.start, 3)}
        self.append("metrics.jsonl", [row])
        figures = {k: f"{row[k]:.4g}" for k in show if k in row}
        if sys.stderr.isatty() and self.step:
            self.bar.set_postfix(figures)
        elif self.step % max(1, self.num_steps // 20) == 0 or "eval" in str(show):
            print(f"step {self.step}/{self.num_steps}", *map(" ".join, figures.items()), sep="  ")
        if metrics.get("ended", 1) < 0.8:
            warnings.warn("over 20 % of completions ran into --max-new-tokens", stacklevel=2)

    def samples(self, prompts, completions, rewards=()):
        """Rows of samples.jsonl: what a person should read now and then."""
        for p, c, r in zip(prompts, completions, rewards or [None] * len(prompts), strict=True):
            self.append("samples.jsonl", [{"step": self.step, "prompt": p, "completion": c,
                                           "reward": r}])

    def append(self, name, rows):
        """Add rows to a file of JSON Lines in the run's folder."""
        with stop_on_error(f"cannot write {self.folder / name}"):
            with open(self.folder / name, "a") as f:
                f.write("".join(json.dumps(row) + "\n" for row in rows))

    def write_rows(self, name, rows):
        """A file of JSON Lines in the run's folder, in one move; name may have a folder in it."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self._replace(name, lambda new: new.write_text(text))

    def checkpoint(self):
        """Save the parts, the random states and the step, so that --resume goes on bit for bit."""
        state = {name: part.state_dict() if hasattr(part, "state_dict") else vars(part)
                 for name, part in self.parts.items()} | {
            "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all(),
            "random": random.getstate(), "step": self.step, "seconds": time.time() - self.start,
            "sizes": {p.name: p.stat().st_size for p in self.folder.glob("*.jsonl")}}
        self._replace("checkpoint/state.pt", lambda new: torch.save(state, new))

    def finish(self, tokenizer, models):
        """Save {folder name: model} with the tokenizer, for `from_pretrained`; draw curves.png."""
        self.checkpoint()
        for name, model in models.items():
            self._replace(name, lambda new, model=model: [
                part.save_pretrained(new) for part in (model, tokenizer)])
            print(f"saved {self.folder / name} after {time.time() - self.start:.0f} s")
        with contextlib.suppress(ImportError):  # no matplotlib, no picture
            self._plot()

    def histogram(self, values):
        """reward_histogram.png of {label: numbers (N,)}, where matplotlib is there."""
        with contextlib.suppress(ImportError):
            from matplotlib.figure import Figure
            figure = Figure(figsize=(5, 3), layout="constrained")
            axes = figure.add_subplot(xlabel="score", ylabel="held-out completions")
            axes.hist([*values.values()], bins=30, label=[*values], stacked=True)
            axes.legend()
            figure.savefig(self.folder / "reward_histogram.png")

    def _replace(self, name, write):
        path, new = self.folder / name, self.folder / f"{name}.new"
        with stop_on_error(f"cannot write {path}; what was there is left"):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(new, ignore_errors=True)  # what a killed run left of a folder
            write(new)
            old = self.folder / f"{name}.old"
            if path.is_dir():  # no call replaces a folder: for a moment there is only .old
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(new, path)
            shutil.rmtree(old, ignore_errors=True)

    def _plot(self):
        from matplotlib.figure import Figure
        rows = [json.loads(line) for line in open(self.folder / "metrics.jsonl")]
        names = sorted({k for row in rows for k in row} - {"step", "seconds"})
        figure = Figure(figsize=(14, 2.5 * math.ceil(len(names) / 4)), layout="constrained")
        for i, name in enumerate(names, 1):
            axes = figure.add_subplot(math.ceil(len(names) / 4), 4, i, title=name)
            axes.plot(*zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True))
        figure.savefig(self.folder / "curves.png")
