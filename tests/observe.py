"""Run a script once, in this process, and keep what it did: rows, weights, calls, updates."""

import contextlib
import functools
import inspect
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SPIED = [
    "pick_device", "load_tokenizer", "load_model", "load_reward", "generate", "completion_logps",
    "completion_scores", "last_scores", "fixed_logps", "fixed_scores", "encode",
    "greedy_rewards", "kl_from_start", "get_scheduler",
]  # fmt: skip


@dataclass
class Update:
    """One optimiser step: of which optimiser, at what rate, from which gradient (after the clip)
    and weights (before the step), both flat."""

    optimizer: int
    lr: float
    gradient: torch.Tensor
    weights: torch.Tensor


@dataclass
class Seen:
    """What one run did."""

    args: object
    calls: dict = field(default_factory=dict)  # function name -> list of (arguments, result)
    optimizers: list = field(default_factory=list)  # torch.optim.AdamW instances, as made
    updates: list = field(default_factory=list)

    @property
    def folder(self):
        return Path(self.args.output_dir)

    def read(self, name):
        """Rows of a JSON Lines file of the run's folder; none where it is not there."""
        path = self.folder / name
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    @property
    def rows(self):
        return self.read("metrics.jsonl")

    @property
    def steps(self):
        """The metrics of gradient steps (of PPO's critic alone, too)."""
        return [row for row in self.rows if "tokens_per_second" in row]

    @property
    def evals(self):
        return [row for row in self.rows if any(key.startswith("eval_") for key in row)]

    @property
    def samples(self):
        """Rows of samples.jsonl that were sampled in training."""
        return [row for row in self.read("samples.jsonl") if "held_out" not in row]

    @property
    def held_out_samples(self):
        """Rows of samples.jsonl that answer held-out prompts at an evaluation."""
        return [row for row in self.read("samples.jsonl") if row.get("held_out") is True]

    def weights(self, name="final"):
        return load_file(self.folder / name / "model.safetensors")

    def arguments(self, name, key):
        """What each call of a function got for one of its arguments, defaults included."""
        return [arguments[key] for arguments, _ in self.calls.get(name, [])]

    def results(self, name):
        return [result for _, result in self.calls.get(name, [])]

    def untimed(self):
        """Rows of metrics without the times."""
        timed = {"seconds", "tokens_per_second"}
        return [{k: v for k, v in row.items() if k not in timed} for row in self.rows]


def flat(values):
    return torch.cat([x.detach().flatten() for x in values])


def spy(patch, seen, module, name):
    """Note the arguments by name, and the result, of each call of `module.name`."""
    function = getattr(module, name)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def noting(*args, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        result = function(*args, **options)
        seen.calls.setdefault(name, []).append((dict(bound.arguments), result))
        return result

    patch.setattr(module, name, noting)


def observe(script, args, picture=False):
    """Run script.main(args) -> Seen. Functions are spied on where the script has them by name."""
    import plumbing

    seen = Seen(args)
    adamw = torch.optim.AdamW

    def make(*options, **more):
        optimizer = adamw(*options, **more)
        number = len(seen.optimizers)
        seen.optimizers.append(optimizer)

        def before(optimizer, *_):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            lr = float(optimizer.param_groups[0]["lr"])
            update = Update(number, lr, flat(grads).clone(), flat(parameters).clone())
            seen.updates.append(update)

        optimizer.register_step_pre_hook(before)
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        for name in SPIED:
            if hasattr(script, name):
                spy(patch, seen, script, name)
        if not hasattr(script, "greedy_rewards"):
            spy(patch, seen, plumbing, "greedy_rewards")  # which report_greedy calls
        patch.setattr(torch.optim, "AdamW", make)
        if not picture:
            patch.setattr(plumbing, "draw_curves", lambda rows, path: None)
        script.main(args)
    return seen


# --- Flags that all scripts have ------------------------------------------------------------------
# Each takes run(**changes) -> Seen of a tiny run in a folder of its own; `base`, the Seen of the
# run without changes; and an empty folder. The base run has three steps or more, and evaluates
# before and after them.


def refused(run, *words, **changes):
    """The run ends with one line that has these words."""
    with pytest.raises(ValueError) as stopped:
        run(**changes)
    assert all(word in str(stopped.value) for word in words), stopped.value


def copy_of(seen, folder):
    """A copy of a run's folder, as if the run had been made there."""
    shutil.copytree(seen.folder, folder)
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | {"output_dir": str(folder)}))
    return str(folder)


def changes_nothing(seen, base, tolerance=2e-3):
    """Every logged metric but the times is that of the base run."""
    got, want = seen.untimed(), base.untimed()
    assert len(got) == len(want) > 2
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-4), name


def flag_output_dir(run, base, folder):
    got = run(output_dir=str(folder / "here" / "run"))
    assert {"args.json", "metrics.jsonl", "checkpoint"} <= {p.name for p in got.folder.iterdir()}
    assert json.loads((got.folder / "args.json").read_text())["output_dir"] == str(got.folder)


def flag_resume(run, base, folder):
    """A finished run that is resumed does nothing more; a run that is there is not begun anew."""
    there = copy_of(base, folder / "copy")
    got = run(output_dir=there, resume=True)
    assert got.updates == [] and got.untimed() == base.untimed()
    refused(run, "exists", output_dir=there)


def flag_overwrite(run, base, folder):
    there = copy_of(base, folder / "copy")
    (Path(there) / "old.jsonl").write_text("{}\n")
    got = run(output_dir=there, overwrite=True, seed=5)
    assert len(got.updates) == len(base.updates) and got.untimed() != base.untimed()
    assert (got.folder / "old.jsonl").exists()  # no run writes it
    assert json.loads((got.folder / "args.json").read_text())["seed"] == 5


def flag_device(run, base, folder):
    """All models go to the device that pick_device makes of the flag."""
    got = run(device="cpu")
    assert got.arguments("pick_device", "device") == ["cpu"]
    assert {str(d) for d in got.arguments("load_model", "device")} == {"cpu"}
    refused(run, "--device", "nowhere", device="nowhere")


def flag_dtype(run, base, folder):
    """Forwards in bfloat16: near the base run and not equal to it; the weights stay float32."""
    got = run(dtype="bfloat16")
    assert all(m.autocast_dtype == torch.bfloat16 for m in got.results("load_model"))
    assert all(m.autocast_dtype is None for m in base.results("load_model"))
    for optimizer in got.optimizers:  # models that are not trained may be held in bfloat16
        for group in optimizer.param_groups:
            assert {parameter.dtype for parameter in group["params"]} == {torch.float32}
    assert not torch.equal(got.updates[0].gradient, base.updates[0].gradient)


def flag_gradient_checkpointing(run, base, folder):
    """The models that are trained recompute, and the metrics are the same."""
    got = run(gradient_checkpointing=True)
    trained = {id(p) for o in got.optimizers for group in o.param_groups for p in group["params"]}
    for model in got.results("load_model"):
        if any(id(p) in trained for p in model.parameters()):
            assert model.recompute and model.is_gradient_checkpointing
    changes_nothing(got, base)


def flag_share_prompts(run, base, folder):
    """Every forward is told, and the metrics are the same."""
    got = run(share_prompts=False)
    names = ("completion_logps", "completion_scores", "last_scores", "fixed_logps", "fixed_scores")
    told = [x for name in names for x in got.arguments(name, "share_prompts")]
    assert told and not any(told)
    assert all(x for name in names for x in base.arguments(name, "share_prompts"))
    changes_nothing(got, base)


def flag_show_rows(run, base, folder):
    """Rows are printed, and nothing is trained; test_templates.py looks at what is printed."""
    import pytest

    with pytest.raises(SystemExit) as ended:
        run(show_rows=1)
    assert ended.value.code == 0


def flag_checkpoint_every(run, base, folder):
    """Checkpoints after these steps: a second run, killed after its last update, has step 1's."""
    import plumbing

    made = []
    save = plumbing.Run.checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.Run, "checkpoint", lambda self: made.append(self.step) or save(self))
        got = run(checkpoint_every=2)
    total = len(got.steps)
    at_the_end = [step for step in made if step == total]
    assert [step for step in made if step < total] == list(range(2, total, 2)) and at_the_end


def flag_eval_every(run, base, folder):
    """Before the first step, after every second one, and after the last; each once."""
    got = run(eval_every=2)
    total = len(got.steps)
    want = sorted({0, *range(2, total + 1, 2), total})
    assert [row["step"] for row in got.evals] == want


def flag_max_grad_norm(run, base, folder):
    """Longer gradients are scaled down to it, shorter ones are left; the norm logged is the one
    before."""
    small, large = run(max_grad_norm=0.01), run(max_grad_norm=1e9)
    norm = small.updates[0].gradient.norm().item()
    before = large.updates[0].gradient.norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3) and before > 0.02
    direction = torch.nn.functional.cosine_similarity(
        small.updates[0].gradient, large.updates[0].gradient, dim=0
    )
    assert direction.item() == pytest.approx(1, abs=1e-4)


def flag_learning_rate(run, base, folder):
    """The peak of the rate of the first optimiser's updates."""
    peak = 2 * base.args.learning_rate
    got = run(learning_rate=peak)
    mine = [u.lr for u in got.updates if u.optimizer == 0]
    theirs = [u.lr for u in base.updates if u.optimizer == 0]
    assert mine == pytest.approx([2 * lr for lr in theirs]) and max(mine) == pytest.approx(peak)


def flag_generation_batch_size(run, base, folder):
    """Prompts that are sampled at a time: with another number the samples are others."""
    got = run(generation_batch_size=1, num_steps=1)
    assert set(got.arguments("generate", "batch_size")) == {1}
    sampled, of_base = got.results("generate")[0][1], base.results("generate")[0][1]
    assert len(sampled) == len(of_base) and sampled != of_base
    assert sampled[:1] != sampled[-1:]
    # An evaluation answers as many prompts at a time as a step has completions
    G = base.args.num_generations
    assert set(got.arguments("greedy_rewards", "batch_size")) == {G}
    assert set(base.arguments("greedy_rewards", "batch_size")) == {base.args.num_prompts * G}


def flag_shard(run, base, folder):
    """What it does is seen in tests/test_processes.py: here is one process."""
    refused(run, "--shard divides a model among the processes of torchrun", shard=True)


def flag_lora_rank(run, base, folder):
    """Only adapters and heads have a gradient; tests/test_lora.py looks at what comes of them."""
    got = run(lora_rank=2)
    assert got.untimed() != base.untimed() and got.updates[-1].gradient.any()
    models = [m for m in got.results("load_model") if hasattr(m, "lora_config")]
    names = {}
    for model in models:
        names |= {id(p): name for name, p in model.named_parameters()}
    assert models
    for optimizer in got.optimizers:
        moved = [names[id(p)] for p in optimizer.state]
        assert any(".lora_B." in name for name in moved)
        assert all(".lora_" in name or "score" in name for name in moved)


def has_every_flag(script, table):
    """The table of a script has a row for each of its flags, and no other."""
    flags = set(script.Args.__dataclass_fields__)
    assert set(table) == flags, set(table) ^ flags


@contextlib.contextmanager
def killed(function, name, call):
    """Raise KeyboardInterrupt at this call of a module's or a class's function."""
    real, calls = getattr(function, name), []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


def without_raw(rows):
    """Rows that a reward was given, without the text with special tokens, which each has."""
    kept = []
    for row in rows:
        assert isinstance(row["raw"], str)
        kept.append({name: value for name, value in row.items() if name != "raw"})
    return kept
