"""Speed and memory beside TRL, and beside a plain form of our own: one table of ratios.

    pip install -e ".[bench]"
    python benchmarks/vs_trl.py                                               # the toy
    python benchmarks/vs_trl.py --model FOLDER --pairs preferences.jsonl      # a real model

Each case runs in processes of its own, alternating (ours, peer, ours, peer), both with the same
weights, tokens, micro-batches, dtype and threads. Before a time is believed, loss and gradient norm
of both on the same batch must be equal to 1e-4; sampled completions are replaced by given ones for
that. The peers:

    trl    the trainer of TRL; log-probs: its fused head, which both its GRPO and its DPO call
    hf     model.generate of Transformers, which TRL generates with
    plain  our script with --no-share-prompts, and model.generate in place of common.generate

Whatever TRL does by default and we do not is switched off: gradient checkpointing, bfloat16.
"""
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import (Batch, Run, completion_logps, encode, encode_prompt, generate,  # noqa: E402
                    load_model, load_rows, load_tokenizer, pad, parse_args, stop)

@dataclass
class Args:
    model: str = str(ROOT / "toy/model")  # folder of a causal model
    pairs: str = str(ROOT / "toy/pref_train.jsonl")  # rows `prompt`, `chosen`, `rejected`, for (c)
    cases: tuple[str, ...] = ()  # names of cases, of those that are printed; none: all
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    num_prompts: int = 2  # prompts of a step, 8 completions each
    num_pairs: int = 16  # pairs of a step, the first of --pairs
    num_steps: int = 3  # steps a process; the first warms up and is not timed
    rounds: int = 2  # processes a side, alternating
    out: str = ""  # file to which the results are added, JSON Lines
    child: str = ""  # (the program calls itself with this)

# name, kind, peer, tokens of the prompt and of the completion
CASES = [("log-probs (a) 192 + 64, 8 each", "logps", "trl", 192, 64),
         ("log-probs (b) 32 + 96, 8 each", "logps", "trl", 32, 96),
         ("log-probs (c) pairs", "logps", "trl", 0, 0),
         ("generate (d) lengths vary", "generate", "hf", 0, 192),
         ("generate, equal lengths", "generate", "hf", 32, 64),
         ("generate, equal lengths, 8 each", "generate", "hf", 192, 64),
         ("GRPO step (a)", "grpo", "trl", 192, 64),
         ("GRPO step (b)", "grpo", "trl", 32, 96),
         ("RLOO step (a)", "reinforce_rloo", "trl", 192, 64),
         ("DPO step (c)", "dpo_nll", "trl", 0, 0),
         ("reward model step (c)", "rm_bt", "trl", 0, 0),
         ("SFT step (c), chosen", "sft", "trl", 0, 0),
         ("PPO step (a)", "ppo", "plain", 192, 64),
         ("GRPO step (a)", "grpo", "plain", 192, 64),
         ("RLOO step (a)", "reinforce_rloo", "plain", 192, 64),
         ("K-wise step (a)", "rm_kwise", "plain", 192, 64),
         ("ORM step (a)", "prm", "plain", 192, 64),
         ("DPO step (c)", "dpo_nll", "plain", 0, 0),
         ("reward model step (c)", "rm_bt", "plain", 0, 0)]
G = 8  # completions a prompt

# --- What both sides get --------------------------------------------------------------------------

def reward(prompts, completions, rows=None, **columns):
    """Something that varies with the text and that all sides compute alike."""
    return [(text.count("e") + text.count("1")) / 10 for text in completions]

def texts_of_length(tokenizer, length, count):
    """Different texts of exactly `length` tokens, from this repository's own files."""
    files = sorted([*ROOT.glob("*.md"), *ROOT.glob("*.py")])
    if len(tokenizer) < 1000:  # the toy's alphabet
        files = sorted(ROOT.glob("toy/problems_*.jsonl"))
    ids = tokenizer("".join(f.read_text() for f in files))["input_ids"]
    found, start = [], 0
    while len(found) < count:
        if start + length > len(ids):
            stop(f"the repository's text is too short for {count} texts of {length} tokens")
        text = tokenizer.decode(ids[start:start + length])
        fits = len(tokenizer(text)["input_ids"]) == length and text.strip()
        found += [text] if fits else []
        start += length if fits else 1
    return found

def prepare(args, work):
    """In the folder `work`: the model without its chat template, so that both sides see the same
    text, and with a pad token that is not the EOS, because Transformers' pooling of a reward model
    would take another token there; the same as a reward model; the rows of every case."""
    tokenizer = load_tokenizer(args.model)
    pairs = []
    for row in load_rows(args.pairs, "prompt", "chosen", "rejected")[:args.num_pairs]:
        text = {k: v if isinstance(v, str) else v[-1]["content"] for k, v in row.items()
                if k in ("chosen", "rejected")}
        prompt = tokenizer.decode(encode_prompt(tokenizer, row["prompt"]))
        pairs.append({"prompt": prompt, "completion": text["chosen"], **text})
    tokenizer.chat_template = None
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    torch.manual_seed(0)
    rm = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1,
                                                            dtype=torch.float32)
    for m in model, rm:
        m.config.pad_token_id = tokenizer.pad_token_id
    for name, part in ("model", model), ("model", tokenizer), ("rm", rm), ("rm", tokenizer):
        part.save_pretrained(work / name)
    for length, tokens in {case[3:] for case in CASES}:
        rows = pairs
        if length:
            texts = texts_of_length(tokenizer, length, args.num_prompts)
            some = iter(texts_of_length(tokenizer, tokens - 1, args.num_prompts * G))
            rows = [{"prompt": t, "completions": [next(some) for _ in range(G)],
                     "ranks": [*range(G)]} for t in texts]
        elif tokens:  # as many prompts as the lengths need to vary, and greedy answers to them
            rows = [{"prompt": p} for p in {row["prompt"]: 0 for row in pairs}]
        (work / f"{length}_{tokens}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flat = [{"prompt": row["prompt"], "completion": c, "label": i % 2 == 0}
                for row in rows for i, c in enumerate(row.get("completions", []))]
        (work / f"{length}_{tokens}_flat.jsonl").write_text("\n".join(map(json.dumps, flat)))

def as_batch(rows, tokenizer, kind):
    """Rows -> Batch: all completions of each prompt; of pairs, for SFT, the chosen one alone."""
    groups = [row.get("completions") or [row["chosen"], row["rejected"]][:2 - (kind == "sft")]
              for row in rows]
    return encode(tokenizer, [row["prompt"] for row in rows], groups)

def plain_generate(model, tokenizer, prompts, num_generations, max_new_tokens, temperature=1.0,
                   top_p=1.0, top_k=0):
    """common.generate by model.generate: prompts repeated, all rows on to the longest one's end."""
    ids, mask = pad([encode_prompt(tokenizer, p) for p in prompts], "left")
    of = torch.arange(len(prompts)).repeat_interleave(num_generations)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or None,
        top_k=top_k, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        out = model.generate(input_ids=ids[of], attention_mask=mask[of].long(),
                             generation_config=config)[:, ids.shape[1]:]
    is_eos = out == tokenizer.eos_token_id
    keep = is_eos.cumsum(1) - is_eos.long() == 0
    texts = tokenizer.batch_decode([o[k] for o, k in zip(out, keep, strict=True)],
                                   skip_special_tokens=True)
    return Batch(ids, mask, out, keep, of), texts, is_eos.any(1)

# --- One side of one case, in a process of its own ------------------------------------------------

def run_logps(job, tokenizer):
    """Forward and backward of all completions' log-probs at once, weighted by given weights."""
    rows = load_rows(job["rows"])
    batch = as_batch(rows[:1 if "ranks" in rows[0] else G // 2], tokenizer, "logps")
    weights = torch.rand(batch.completion_ids.shape, generator=torch.Generator().manual_seed(0))
    weights = weights * batch.completion_mask / batch.completion_mask.sum()
    model = load_model(AutoModelForCausalLM, job["model"], torch.device("cpu"), job["dtype"])
    if job["side"] == "trl":
        from trl.trainer.utils import add_fused_lm_head
        add_fused_lm_head(model)
        of = batch.prompt_of
        both = [torch.cat([p[m], c[n]]) for p, m, c, n in zip(
            batch.prompt_ids[of], batch.prompt_mask[of], batch.completion_ids,
            batch.completion_mask, strict=True)]
        starts = batch.prompt_mask.sum(1)[of]
        ids, mask = pad([x.tolist() for x in both], "right")  # as its DPO pads
        where = torch.arange(ids.shape[1]) - starts[:, None]
        labels = ids.masked_fill((where < 0) | ~mask, -100)
        weights = weights.gather(1, where.clamp(0, weights.shape[1] - 1))[:, 1:]
    seconds = []
    for _ in range(job["num_steps"]):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        if job["side"] == "trl":
            with torch.autocast("cpu", torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
                logps = model(input_ids=ids, attention_mask=mask.long(), labels=labels,
                              fused_lm_head=True).log_probs
        else:
            logps = completion_logps(model, batch, 1.0, job["side"] == "ours")
        loss = (logps * weights).sum()
        loss.backward()
        seconds.append(time.perf_counter() - start)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    return seconds, loss.item(), norm, full_tokens(batch)

def full_tokens(batch):
    """Tokens of all completions with their prompts, the prompt counted for each."""
    return int(batch.prompt_mask.sum(1)[batch.prompt_of].sum() + batch.completion_mask.sum())

def run_generate(job, tokenizer):
    """Greedy, so that both sides must give the same: the sum of the token ids is compared, and the
    number of them."""
    rows = load_rows(job["rows"])
    model = load_model(AutoModelForCausalLM, job["model"], torch.device("cpu"), job["dtype"])
    prompts, each = [row["prompt"] for row in rows], G if "8 each" in job["name"] else 1
    if "equal" in job["name"]:
        prompts = prompts if each > 1 else prompts * (G // 2)
        tokenizer.eos_token_id = model.generation_config.eos_token_id = tokenizer.pad_token_id
    seconds, make = [], generate if job["side"] == "ours" else plain_generate
    for _ in range(job["num_steps"]):
        start = time.perf_counter()
        batch = make(model, tokenizer, prompts, each, job["tokens"], 0.0)[0]
        seconds.append(time.perf_counter() - start)
    made = int(batch.completion_mask.sum())
    return seconds, float((batch.completion_ids * batch.completion_mask).sum()), made, made

def run_script(job, tokenizer):
    """Our script, as a user runs it. Its first completions are the given ones of the rows."""
    script, name = importlib.import_module(job["kind"]), job["kind"]
    sampled = {"grpo", "reinforce_rloo", "ppo"} & {name}
    rows = load_rows(job["rows"])
    flags = dict(model=job["rm" if name == "rm_bt" else "model"], dataset=job["rows"],
                 output_dir=job["output"], dtype=job["dtype"], eval_size=0, micro_batch_size=G,
                 learning_rate=1e-6, lr_schedule="constant", checkpoint_every=1000)
    if sampled:
        flags |= dict(reward=f"{__file__}:reward", num_steps=job["num_steps"], beta=0.04,
                      num_prompts=len(rows), num_generations=G, max_new_tokens=job["tokens"])
    else:
        flags |= dict(num_epochs=job["num_steps"], warmup_ratio=0.0, batch_size=len(rows))
    flags |= {"dpo_nll": {"alpha": 0.0}, "ppo": {"num_epochs": 1},
              "prm": {"supervision": "outcome", "dataset": job["rows"].replace(".j", "_flat.j"),
                      "batch_size": G * len(rows)}}.get(name, {})
    sys.argv = [f"{name}.py", *(x for k, v in flags.items()
                                for x in (f"--{k.replace('_', '-')}", str(v)))]
    sys.argv += ["--no-share-prompts"] if job["side"] == "plain" else []
    make, calls = generate if job["side"] == "ours" else plain_generate, iter([True])

    def generate_given_first(policy, tokenizer, prompts, *options):
        if not next(calls, False):
            return make(policy, tokenizer, prompts, *options)
        given = {row["prompt"]: row["completions"] for row in rows}
        batch = encode(tokenizer, prompts, [given[p] for p in prompts])
        return batch, [c for p in prompts for c in given[p]], torch.ones(len(batch.prompt_of)) > 0
    if sampled:
        script.generate = generate_given_first
    Run.finish = lambda *_: None  # saving is not what is measured
    script.main(parse_args(script.Args, {}))
    log = [r for r in load_rows(Path(job["output"], "metrics.jsonl")) if "grad_norm" in r]
    ends = [r["seconds"] for r in log]
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    tokens = full_tokens(as_batch(rows, tokenizer, name))
    return [0.0, *seconds], log[0]["loss"], log[0]["grad_norm"], tokens

def run_trl(job, tokenizer):
    """The trainer of TRL on the same rows; texts are tokenised by it, completions given as ids."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback
    name, rows = job["kind"], load_rows(job["rows"])
    trainer_name = {"grpo": "GRPO", "reinforce_rloo": "RLOO", "dpo_nll": "DPO", "rm_bt": "Reward",
                    "sft": "SFT"}[name]
    pairs, sampled = name in ("dpo_nll", "rm_bt"), name in ("grpo", "reinforce_rloo")
    size = G // 2 if pairs else G
    total = len(rows) * (G if sampled else 1)
    options = dict(
        output_dir=job["output"], max_steps=job["num_steps"], per_device_train_batch_size=size,
        gradient_accumulation_steps=max(1, total // size), learning_rate=1e-6, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=1.0, gradient_checkpointing=False,
        bf16=job["dtype"] == "bfloat16", use_cpu=True, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True)
    dataset, keys = Dataset.from_list(rows), ("prompt", "chosen", "rejected")
    if sampled:
        options |= dict(num_generations=G, max_completion_length=job["tokens"], beta=0.04,
                        temperature=1.0)
        options |= dict(loss_type="grpo") if name == "grpo" else {}
        dataset = dataset.select_columns(["prompt"])
    elif pairs:
        options |= dict(max_length=1024)
        options |= dict(beta=0.1, precompute_ref_log_probs=True) if name == "dpo_nll" else {}
        dataset = dataset.select_columns(keys)
    else:
        batch = encode(tokenizer, [r["prompt"] for r in rows], [[r["completion"]] for r in rows])
        each = list(zip(*vars(batch).values(), strict=True))
        dataset = Dataset.from_list([
            {"input_ids": p[m].tolist() + c[n].tolist(),
             "completion_mask": [0] * int(m.sum()) + [1] * int(n.sum())} for p, m, c, n, _ in each])
        options |= dict(max_length=1024, completion_only_loss=True)
    model = (AutoModelForSequenceClassification if name == "rm_bt" else AutoModelForCausalLM
             ).from_pretrained(job["rm" if name == "rm_bt" else "model"], dtype=torch.float32)
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=model, args=getattr(trl, f"{trainer_name}Config")(**options), train_dataset=dataset,
        processing_class=tokenizer, **({"reward_funcs": reward} if sampled else {}))
    ends, log = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs, **__):
            log.append(logs)
    trainer.add_callback(Clock)
    if sampled:
        original, calls = trainer._generate_single_turn, iter([True])

        def given_first(prompt_ids, *options, **more):
            if not next(calls, False):
                return original(prompt_ids, *options, **more)
            done, out = {}, []
            given = {tuple(tokenizer(r["prompt"])["input_ids"]): r["completions"] for r in rows}
            for ids in map(tuple, prompt_ids):
                done[ids] = done.get(ids, -1) + 1
                text = given[ids][done[ids]]
                out.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
            return (out, None) if name == "grpo" else out
        trainer._generate_single_turn = given_first
    trainer.train()
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    tokens = full_tokens(as_batch(rows, tokenizer, name))
    return [0.0, *seconds], log[0]["loss"], log[0]["grad_norm"], tokens

def child(job):
    """Run one side and print what it took as one line of JSON."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    run = {"logps": run_logps, "generate": run_generate}.get(
        job["kind"], run_trl if job["side"] == "trl" else run_script)
    seconds, loss, norm, tokens = run(job, tokenizer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print("\n" + json.dumps({"seconds": seconds[1:], "loss": loss, "norm": norm, "peak": peak,
                             "tokens": tokens}))

# --- The table ------------------------------------------------------------------------------------

def measure(job, side, work):
    """Start a process for one side -> its line, as a dictionary."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        job = job | {"side": side, "output": f"{folder}/run"}
        done = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)],
                              capture_output=True, text=True, cwd=folder,
                              env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hf"})
    if done.returncode:
        stop(f"{job['name']}, {side}: {' '.join(done.stderr.strip().splitlines()[-3:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])

def main(args):
    if args.child:
        return child(json.loads(args.child))
    print("| case | dtype | peer | seconds: ours, peer | tokens a second | times as fast "
          "| memory, GB: ours, peer | share |\n|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        prepare(args, Path(work))
        for dtype in args.dtypes:
            for name, kind, peer, length, tokens in CASES:
                if args.cases and not any(c in f"{name} {peer}" for c in args.cases):
                    continue
                job = dict(name=name, kind=kind, tokens=tokens, dtype=dtype, model=f"{work}/model",
                           rm=f"{work}/rm", rows=f"{work}/{length}_{tokens}.jsonl",
                           num_steps=args.num_steps)
                sides = {"ours": [], peer: []}
                for _ in range(args.rounds):
                    for side, results in sides.items():
                        results.append(measure(job, side, work))
                row = summary(kind, sides["ours"], sides[peer])
                line = " | ".join(f"{x:.2f}" if isinstance(x, float) else x for x in row)
                print(f"| {name} | {dtype} | {peer} | {line} |", flush=True)
                if args.out:
                    with open(args.out, "a") as f:
                        f.write(json.dumps({**job, "peer": peer, "sides": sides}) + "\n")

def summary(kind, ours, peer):
    """Results of both sides -> the cells of a row; where they did not compute the same, it says so.
    RLOO's losses are compared by their gradient alone: TRL's has the ratio in place of its log."""
    medians = [statistics.median(s for r in side for s in r["seconds"]) for side in (ours, peer)]
    peaks = [max(r["peak"] for r in side) for side in (ours, peer)]
    a, b = ours[0], peer[0]
    for what in ("norm", "loss")[:1 if kind == "reinforce_rloo" else 2]:
        if abs(a[what] - b[what]) > 1e-4 * max(abs(a[what]), abs(b[what])) + 1e-6:
            return (f"not the same: {what} {a[what]:.6g} and {b[what]:.6g}", "", "", "", "")
    digits = 2 if medians[0] > 1 else 3
    return (", ".join(f"{m:.{digits}f}" for m in medians),
            ", ".join(f"{a['tokens'] / m:.0f}" for m in medians), medians[1] / medians[0],
            f"{peaks[0]:.2f}, {peaks[1]:.2f}", peaks[0] / peaks[1])

if __name__ == "__main__":
    main(parse_args(Args, {}))
