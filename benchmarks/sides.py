"""One side of one case of vs_trl.py, in a process of its own: what it took, as a line of JSON.

    python benchmarks/sides.py JOB        # JOB: the JSON that vs_trl.py makes

Each `run_...` returns the seconds of every step, of which the first is not counted; losses and
gradient norms of the steps of CHECKED, by which vs_trl.py sees that both sides computed the same;
and the tokens of a step.
"""

import importlib
import json
import re
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Batch, completion_logps, encode, encode_prompt, generate, pad  # noqa: E402
from plumbing import Run, load_model, load_rows, parse_args  # noqa: E402

G = 8  # completions a prompt
# Numbers of the steps that are compared. In the third, two updates have been made, and the policy
# has left its reference: in the first the KL is 0, and neither would be seen.
CHECKED = (1, 3)
GIVEN = max(CHECKED)  # first steps in which completions are given, not sampled; they are not timed
LEARNING_RATE = 1e-5  # large enough for a KL in the third step

# --- What the sides share -------------------------------------------------------------------------


def reward(prompts, completions, rows=None, **columns):
    """Something that varies with the text and that all sides compute alike."""
    return [(text.count("e") + text.count("1")) / 10 for text in completions]


def as_batch(rows, tokenizer, kind):
    """Rows -> Batch: all completions of each prompt; of pairs, for SFT, the chosen one alone."""
    groups = [
        row.get("completions") or [row["chosen"], row["rejected"]][: 2 - (kind == "sft")]
        for row in rows
    ]
    return encode(tokenizer, [row["prompt"] for row in rows], groups)


def plain_generate(
    model, tokenizer, prompts, num_generations, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0
):
    """common.generate by model.generate: prompts repeated, all rows on to the longest one's end."""
    ids, mask = pad([encode_prompt(tokenizer, p) for p in prompts], "left")
    of = torch.arange(len(prompts)).repeat_interleave(num_generations)
    ids, mask, of = ids.to(model.device), mask.to(model.device), of.to(model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=top_k,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    bfloat16 = getattr(model, "autocast_dtype", None) is not None
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        out = model.generate(
            input_ids=ids[of], attention_mask=mask[of].long(), generation_config=config
        )[:, ids.shape[1] :]
    is_eos = out == tokenizer.eos_token_id
    keep = is_eos.cumsum(1) - is_eos.long() == 0
    texts = tokenizer.batch_decode(
        [o[k] for o, k in zip(out, keep, strict=True)], skip_special_tokens=True
    )
    return Batch(ids, mask, out, keep, of), texts, is_eos.any(1)


def wait(device):
    """Until the device has computed what it was told to: a GPU does that on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """The most memory that was used, in GB: on cuda by tensors, else by the process.

    On Linux `ru_maxrss` would also hold the peak of the process that started this one.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def full_tokens(batch):
    """Tokens of all completions with their prompts, the prompt counted for each."""
    return int(batch.prompt_mask.sum(1)[batch.prompt_of].sum() + batch.completion_mask.sum())


# --- Log-probs and generation ---------------------------------------------------------------------


def run_logps(job, tokenizer):
    """Forward and backward of all completions' log-probs at once, weighted by given weights."""
    rows = load_rows(job["rows"])
    batch = as_batch(rows[: 1 if "ranks" in rows[0] else G // 2], tokenizer, "logps")
    weights = torch.rand(batch.completion_ids.shape, generator=torch.Generator().manual_seed(0))
    weights = weights * batch.completion_mask / batch.completion_mask.sum()
    model = load_model(
        AutoModelForCausalLM, job["model"], torch.device(job["device"]), job["dtype"]
    )
    batch = batch.to(model.device)
    weights = weights.to(model.device)
    if job["side"] == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
        of = batch.prompt_of
        both = [
            torch.cat([p[m], c[n]])
            for p, m, c, n in zip(
                batch.prompt_ids[of],
                batch.prompt_mask[of],
                batch.completion_ids,
                batch.completion_mask,
                strict=True,
            )
        ]
        starts = batch.prompt_mask.sum(1)[of]
        ids, mask = pad([x.tolist() for x in both], "right")  # as its DPO pads
        ids, mask = ids.to(model.device), mask.to(model.device)
        where = torch.arange(ids.shape[1], device=model.device) - starts[:, None]
        labels = ids.masked_fill((where < 0) | ~mask, -100)
        weights = weights.gather(1, where.clamp(0, weights.shape[1] - 1))[:, 1:]
    seconds = []
    for _ in range(job["num_steps"]):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        if job["side"] == "trl":
            in_bfloat16 = job["dtype"] == "bfloat16"
            with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bfloat16):
                logps = model(
                    input_ids=ids, attention_mask=mask.long(), labels=labels, fused_lm_head=True
                ).log_probs
        else:
            logps = completion_logps(model, batch, 1.0, job["side"] == "ours")
        loss = (logps * weights).sum()
        loss.backward()
        wait(model.device)
        seconds.append(time.perf_counter() - start)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    return seconds, [loss.item()], [norm], full_tokens(batch)


def run_generate(job, tokenizer):
    """Greedy, so that both sides must give the same: the sum of the token ids is compared, and the
    number of them."""
    rows = load_rows(job["rows"])
    model = load_model(
        AutoModelForCausalLM, job["model"], torch.device(job["device"]), job["dtype"]
    )
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
    return seconds, [float((batch.completion_ids * batch.completion_mask).sum())], [made], made


# --- Whole steps ----------------------------------------------------------------------------------


def run_script(job, tokenizer):
    """Our script, as a user runs it. Its first completions are the given ones of the rows."""
    script, name = importlib.import_module(job["kind"]), job["kind"]
    sampled = {"grpo", "reinforce_rloo", "ppo"} & {name}
    rows = load_rows(job["rows"])
    flags = dict(
        model=job["rm" if name == "rm_bt" else "model"],
        dataset=job["rows"],
        output_dir=job["output"],
        dtype=job["dtype"],
        device=job["device"],
        eval_size=0,
        micro_batch_size=G,
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        checkpoint_every=1000,
    )
    if sampled:
        flags |= dict(
            reward=f"{__file__}:reward",
            num_steps=job["num_steps"] + GIVEN - 1,
            beta=0.04,
            num_prompts=len(rows),
            num_generations=G,
            max_new_tokens=job["tokens"],
        )
    else:
        flags |= dict(num_epochs=job["num_steps"], warmup_ratio=0.0, batch_size=len(rows))
    flags |= {
        "dpo_nll": {"alpha": 0.0},
        "ppo": {"num_epochs": 1},
        "prm": {
            "supervision": "outcome",
            "dataset": job["rows"].replace(".j", "_flat.j"),
            "batch_size": G * len(rows),
        },
    }.get(name, {})
    sys.argv = [
        f"{name}.py",
        *(x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", str(v))),
    ]
    sys.argv += ["--no-share-prompts"] if job["side"] == "plain" else []
    make, calls = generate if job["side"] == "ours" else plain_generate, iter([True] * GIVEN)

    def generate_given_first(policy, tokenizer, prompts, *options, temperature, batch_size):
        if not next(calls, False):
            return make(policy, tokenizer, prompts, *options, temperature)
        given = {row["prompt"]: row["completions"] for row in rows}
        batch = encode(tokenizer, prompts, [given[p] for p in prompts]).to(policy.device)
        texts = [c for p in prompts for c in given[p]]
        return batch, texts, torch.ones_like(batch.prompt_of) > 0

    if sampled:
        script.generate = generate_given_first
    Run.finish = lambda *_: None  # saving is not what is measured
    write, ends = Run.log, []

    def log_with_clock(run, metrics, *show):  # the seconds in metrics.jsonl are rounded
        write(run, metrics, *show)
        ends.extend([time.perf_counter()] if "grad_norm" in metrics else [])

    Run.log = log_with_clock
    script.main(parse_args(script.Args, {}))
    log = [r for r in load_rows(Path(job["output"], "metrics.jsonl")) if "grad_norm" in r]
    tokens = full_tokens(as_batch(rows, tokenizer, name))
    return timed(ends, sampled), *checked(log), tokens


def timed(ends, sampled):
    """Times at which steps ended -> seconds of each, 0 for the first, without the given ones."""
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    skipped = GIVEN - 1 if sampled else 0
    return [0.0, *seconds[skipped:]]


def checked(log):
    """Logs of the steps -> losses, gradient norms of those of CHECKED that there are."""
    rows = [log[number - 1] for number in CHECKED if number <= len(log)]
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows]


def run_trl(job, tokenizer):
    """The trainer of TRL on the same rows; texts are tokenised by it, completions given as ids."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    name, rows = job["kind"], load_rows(job["rows"])
    trainer_name = {
        "grpo": "GRPO",
        "reinforce_rloo": "RLOO",
        "dpo_nll": "DPO",
        "rm_bt": "Reward",
        "sft": "SFT",
    }[name]
    pairs, sampled = name in ("dpo_nll", "rm_bt"), name in ("grpo", "reinforce_rloo")
    size = G // 2 if pairs else G
    total = len(rows) * (G if sampled else 1)
    options = dict(
        output_dir=job["output"],
        max_steps=job["num_steps"] + (GIVEN - 1 if sampled else 0),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=max(1, total // size),
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=job["dtype"] == "bfloat16",
        use_cpu=job["device"] == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset, keys = Dataset.from_list(rows), ("prompt", "chosen", "rejected")
    if sampled:
        options |= dict(
            num_generations=G, max_completion_length=job["tokens"], beta=0.04, temperature=1.0
        )
        if name == "grpo":  # its default multiplies the KL by the ratio: another gradient
            options |= dict(loss_type="grpo", use_bias_correction_kl=False)
        dataset = dataset.select_columns(["prompt"])
    elif pairs:
        options |= dict(max_length=1024)
        options |= dict(beta=0.1, precompute_ref_log_probs=True) if name == "dpo_nll" else {}
        dataset = dataset.select_columns(keys)
    else:
        batch = encode(tokenizer, [r["prompt"] for r in rows], [[r["completion"]] for r in rows])
        each = list(zip(*vars(batch).values(), strict=True))
        dataset = Dataset.from_list(
            [
                {
                    "input_ids": p[m].tolist() + c[n].tolist(),
                    "completion_mask": [0] * int(m.sum()) + [1] * int(n.sum()),
                }
                for p, m, c, n, _ in each
            ]
        )
        options |= dict(max_length=1024, completion_only_loss=True)
    model = (
        AutoModelForSequenceClassification if name == "rm_bt" else AutoModelForCausalLM
    ).from_pretrained(job["rm" if name == "rm_bt" else "model"], dtype=torch.float32)
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=model,
        args=getattr(trl, f"{trainer_name}Config")(**options),
        train_dataset=dataset,
        processing_class=tokenizer,
        **({"reward_funcs": reward} if sampled else {}),
    )
    ends, log = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs, **__):
            log.append(logs)

    trainer.add_callback(Clock)
    if sampled:
        original, calls = trainer._generate_single_turn, iter([True] * GIVEN)

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
    tokens = full_tokens(as_batch(rows, tokenizer, name))
    steps = [row for row in log if "grad_norm" in row]
    return timed(ends, sampled), *checked(steps), tokens


def main(job):
    """Run one side and print what it took as one line of JSON."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    run = {"logps": run_logps, "generate": run_generate}.get(
        job["kind"], run_trl if job["side"] == "trl" else run_script
    )
    seconds, loss, norm, tokens = run(job, tokenizer)
    peak = peak_memory(job["device"])
    print(
        "\n"
        + json.dumps(
            {"seconds": seconds[1:], "loss": loss, "norm": norm, "peak": peak, "tokens": tokens}
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
