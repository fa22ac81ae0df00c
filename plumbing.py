"""What every script needs and no chapter explains: errors of one line, flags, rows, a run's folder.

The scripts take these names from common.py. Nothing here knows of a model's inside or of a loss.
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
    return hold_out(rows, args.eval_size, args.seed)

def hold_out(rows, num_prompts, seed):
    """Rows -> (train, held out), by prompt, so that none is on both sides; at most a tenth."""
    keys = [str(row.get("prompt") or row["messages"][0]) for row in rows]
    prompts = sorted(set(keys))
    held = set(random.Random(seed).sample(prompts, min(num_prompts, len(prompts) // 10)))
    sides = [], []
    for row, key in zip(rows, keys, strict=True):
        sides[key in held].append(row)
    return sides

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

def end_of_turn(tokenizer):
    """Id that closes a completion: what the chat template puts after an answer, else the EOS."""
    ids = []
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "@@"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("@@")[2]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)

def check_prompts(tokenizer, model, rows, max_new_tokens):
    """Stop where a prompt is empty, or with its completion would not fit in the model's context."""
    for row in rows:
        length = len(encode_prompt(tokenizer, row["prompt"]))
        if not 0 < length <= model.context - max_new_tokens:
            stop(f"a prompt of {length} tokens with --max-new-tokens {max_new_tokens} does not fit "
                 f"in the model's {model.context}: {str(row['prompt'])[:80]!r}")

# --- The folder of a run --------------------------------------------------------------------------

class Run:
    """args.json, metrics.jsonl, samples.jsonl, curves.png, checkpoint/, final/, and the progress.
    Nothing is written before `begin`. What is replaced is replaced in one move: a run killed at any
    moment, or on a full disk, has the old file or the new one."""

    def __init__(self, args):
        self.args, self.folder, self.step = args, Path(args.output_dir), 0
        old = self.folder / "args.json"
        for name, value in vars(args).items():
            count = name.startswith(("num_", "max_", "micro_", "batch_")) or name.endswith("_every")
            least = int(count and isinstance(value, int))
            if isinstance(value, int | float) and value < least:
                stop(f"--{name.replace('_', '-')} {value}: must be at least {least}")
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
            write(new)
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(new, path)

    def _plot(self):
        from matplotlib.figure import Figure
        rows = [json.loads(line) for line in open(self.folder / "metrics.jsonl")]
        names = sorted({k for row in rows for k in row} - {"step", "seconds"})
        figure = Figure(figsize=(14, 2.5 * math.ceil(len(names) / 4)), layout="constrained")
        for i, name in enumerate(names, 1):
            axes = figure.add_subplot(math.ceil(len(names) / 4), 4, i, title=name)
            axes.plot(*zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True))
        figure.savefig(self.folder / "curves.png")
