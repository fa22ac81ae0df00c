"""--lora-rank: adapters beside a plain loop, what is trained, saved and resumed, and what it is not
for. Runs are of two to four steps of a tiny model."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import ROOT
from families import make
from safetensors.torch import load_file
from test_families import plain_logps, random_batch
from test_resume import checkpoint, equal, metrics, resumed, stopped_run, weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import common
import observe
import plumbing
import dpo_nll
import grpo
import ppo
import prm
import reinforce_rloo
import rejection_sampling
import rm_bt
import rm_kwise
import sft

pytestmark = [pytest.mark.usefixtures("no_picture"), pytest.mark.slow]

CPU = torch.device("cpu")
POLICY = AutoModelForCausalLM


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "toy" / "model")


@pytest.fixture(scope="module")
def batch(tokenizer):
    return random_batch(tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve rows of each file of the toy, and a reward that differs from text to text."""
    folder = tmp_path_factory.mktemp("data")
    for path in (ROOT / "toy").glob("*_train.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[:12]))
    (folder / "reward.py").write_text(
        "def digits(prompts, completions, rows):\n"
        "    return [sum(map(int, filter(str.isdigit, text))) / 10 for text in completions]\n"
    )
    return folder


def move(model, seed=0):
    """Give the adapters weights as after many steps: B begins at 0."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)


def save(folder, family, dtype=torch.float32):
    make(family).to(dtype).save_pretrained(folder)
    return str(folder)


def load(path, rank=2, **options):
    return plumbing.load_model(POLICY, path, CPU, lora_rank=rank, **options)


def products(model):
    """{name of a weight of the plain model: alpha / rank B A}."""
    own = dict(model.named_parameters())
    found = {}
    for name, a in own.items():
        if ".lora_A." in name:
            b = own[name.replace("lora_A", "lora_B")]
            found[name.replace("lora_A.default.", "")] = plumbing.LORA_ALPHA / a.shape[0] * b @ a
    return found


# --- The model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "gemma3, window", "gpt2", "deepseek v3, latent attention"]
)
@pytest.mark.parametrize("way", ["shared prompts", "whole rows", "recomputed"])
def test_gradients_are_those_of_a_plain_loop(family, way, batch, tmp_path):
    """Of W + alpha / rank B A in a model without adapters, one row at a time."""
    path = save(tmp_path, family)
    policy = load(path, checkpointing=way == "recomputed")
    move(policy)
    factor = torch.randn(batch.completion_ids.shape, generator=torch.Generator().manual_seed(1))
    logps = common.completion_logps(policy, batch, share_prompts=way == "shared prompts")
    (factor * logps).sum().backward()
    got = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert set(got) == trained and all(".lora_" in name for name in got)

    plain = load(path, rank=0)
    policy.zero_grad()
    sums = {}
    for name, product in products(policy).items():
        transposed = product.T if family == "gpt2" else product  # Conv1D holds (in, out)
        sums[name] = plain.get_parameter(name).detach() + transposed
    total = 0.0

    def whole(ids, use_cache):
        return torch.func.functional_call(plain, sums, (ids,), {"use_cache": use_cache})

    for i, row in enumerate(plain_logps(whole, batch)):
        total = total + (factor[i, : len(row)] * row).sum()
        torch.testing.assert_close(logps[i, : len(row)], row, rtol=1e-4, atol=1e-4)
    total.backward()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert (got[name] - parameter.grad).norm() < 1e-3 * parameter.grad.norm()


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "mamba", "falcon h1, states", "olmoe, experts"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_adapters_it_is_the_start_model_bit_for_bit(family, dtype, batch, tmp_path):
    """Also before the first step, when B is 0; the reference holds the same tensors."""
    path = save(tmp_path, family)
    start = common.fixed_logps(load(path, rank=0, dtype=dtype), batch)
    policy = load(path, dtype=dtype)
    reference = plumbing.reference_of(policy)
    assert torch.equal(common.fixed_logps(policy, batch), start)
    move(policy)
    assert not torch.allclose(common.fixed_logps(policy, batch), start, atol=0.01)
    assert torch.equal(common.fixed_logps(reference, batch), start)
    ours = {parameter.data_ptr() for parameter in policy.parameters()}
    assert {parameter.data_ptr() for parameter in reference.parameters()} < ours
    assert not any("lora" in name for name, _ in reference.named_modules())


def test_a_model_without_adapters_has_no_such_reference(tiny):
    assert plumbing.reference_of(load(tiny, rank=0)) is None


def test_the_reference_of_a_policy_that_recomputes_does_not(tiny, batch):
    policy = load(tiny, checkpointing=True)
    reference = plumbing.reference_of(policy)
    assert policy.recompute and policy.is_gradient_checkpointing
    assert not reference.recompute and not reference.is_gradient_checkpointing


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_layers_are_held_in_the_dtype_of_the_forward_pass(saved, dtype, batch, tmp_path):
    """With the same log-probs; what is saved has lost nothing."""
    path = save(tmp_path, "llama", saved)
    policy = load(path, dtype=dtype)
    held = {name: p.dtype for name, p in policy.named_parameters()}
    frozen = {held[name] for name in held if name.endswith("base_layer.weight")}
    assert frozen == {held["lm_head.weight"]} == {getattr(torch, dtype)}
    others = {name for name in held if "base_layer" not in name and name != "lm_head.weight"}
    assert {held[name] for name in others} == {torch.float32}
    start = common.fixed_logps(load(path, rank=0, dtype=dtype), batch)
    assert torch.equal(common.fixed_logps(policy, batch), start)
    move(policy)
    want = load(path, rank=0).state_dict()
    for name, product in products(policy).items():
        want[name] = want[name] + product
    merged = plumbing._merged(policy)
    assert merged.state_dict().keys() == want.keys()
    for name, weight in merged.state_dict().items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, want[name], rtol=1e-6, atol=1e-6)
    exact = torch.equal(want["lm_head.weight"], merged.lm_head.weight)
    assert exact and policy.lm_head.weight.dtype == getattr(torch, dtype)


def test_which_layers_are_adapted(tmp_path):
    """All linear ones of the backbone, but those that fused kernels read themselves, and those that
    peft would take for experts; never the head."""
    adapted = {}
    for family in ("llama", "gpt2", "mamba", "deepseek v3, latent attention"):
        model = load(save(tmp_path / family, family))
        names = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
        adapted[family] = {name.split(".")[-2] for name in names}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted["llama"] == attention | {"gate_proj", "up_proj", "down_proj"}
    assert adapted["gpt2"] == {"c_attn", "c_proj", "c_fc"}
    assert adapted["mamba"] == {"in_proj"}
    latent = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert adapted["deepseek v3, latent attention"] == latent


@pytest.mark.parametrize("auto_class", [
    AutoModelForSequenceClassification, AutoModelForTokenClassification,
])  # fmt: skip
def test_a_head_is_trained_whole(auto_class, tiny):
    model = plumbing.load_model(auto_class, tiny, CPU, lora_rank=2, new_head=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {name for name in trained if name.startswith("score.")}
    assert head == {name for name, _ in model.named_parameters() if name.startswith("score.")}
    assert all(".lora_" in name for name in trained - head)


# --- Runs of every script -------------------------------------------------------------------------

SAMPLED = dict(num_steps=2, num_prompts=2, num_generations=3, max_new_tokens=8)
PAIRS = dict(batch_size=6)
BY_LM = dict(supervision="outcome", head="cobbe", lm_coef=0.1)
SCRIPTS = {
    "grpo": (grpo, "problems", SAMPLED),
    "ppo": (
        ppo, "problems",
        SAMPLED | dict(critic_learning_rate=0.01, num_epochs=1, num_minibatches=1),
    ),
    "reinforce_rloo": (reinforce_rloo, "problems", SAMPLED),
    "dpo_nll": (dpo_nll, "pref", PAIRS),
    "dpo_nll, iterations": (
        dpo_nll, "problems",
        dict(iterations=2, num_prompts=6, num_pairs=6, num_generations=4, max_new_tokens=8),
    ),
    "sft": (sft, "sft", dict(batch_size=6, num_epochs=1, max_new_tokens=8)),
    "rejection_sampling": (
        rejection_sampling, "problems",
        dict(num_prompts=4, num_generations=3, rounds=2, num_epochs=1, max_new_tokens=8),
    ),
    "rm_bt": (rm_bt, "pref", PAIRS | dict(nll_coef=0.1)),
    "rm_kwise": (rm_kwise, "kwise", PAIRS),
    "prm": (prm, "prm", PAIRS),
    "prm, cobbe": (prm, "orm", PAIRS | BY_LM),
    "prm, cobbe, bfloat16": (prm, "orm", PAIRS | BY_LM | dict(dtype="bfloat16")),
    "grpo, bfloat16": (grpo, "problems", SAMPLED | dict(dtype="bfloat16")),
}  # fmt: skip


def some_args(name, data, tiny, folder, **changes):
    script, rows, flags = SCRIPTS[name]
    path = str(data / f"{rows}_train.jsonl")
    args = dict(model=tiny, dataset=path, eval_dataset=path, output_dir=str(folder), device="cpu")
    args |= dict(lora_rank=2, learning_rate=0.01, lr_schedule="constant", eval_every=1)
    args |= dict(checkpoint_every=1) | flags | changes
    if hasattr(script.Args, "reward"):
        args["reward"] = f"{data}/reward.py:digits"
    return script.Args(**args)


def load_saved(folder, **options):
    """What a folder holds, by the class that its config names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, data, tiny, tmp_path_factory):
    """A script's name and the folder of its run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing, "draw_curves", lambda rows, path: None)
        SCRIPTS[request.param][0].main(some_args(request.param, data, tiny, folder))
    return request.param, folder


def test_final_is_base_and_product_and_peft_loads_the_adapter(finished, tiny):
    """final/ is W + alpha / rank B A, by hand, and all else as in the model that was adapted; peft
    puts the adapter on that model, and the outputs are those of final/."""
    name, run = finished
    for folder in [run / "final", *run.glob("critic")]:
        saved = load_saved(folder)
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        base = type(saved).from_pretrained(tiny, config=saved.config).eval()
        want = base.state_dict()
        num_adapted = 0
        for key, value in adapter.items():
            place = key.removeprefix("base_model.model.").replace("lora_A.", "")
            if "lora_A" in key:
                b = adapter[key.replace("lora_A", "lora_B")]
                assert b.any() and b.dtype == torch.float32
                want[place] = want[place] + plumbing.LORA_ALPHA / 2 * b @ value
                num_adapted += 1
            elif "lora_B" not in key and "cobbe" not in name:
                assert key.startswith("base_model.model.score.")
                want[place] = value
        assert num_adapted == 14
        for key, value in saved.state_dict().items():
            if "cobbe" not in name or not key.startswith("score."):
                torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-6)
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == tiny and config["r"] == 2
        ids = torch.arange(3, 13)[None]
        with torch.no_grad():
            outputs = saved(ids).logits
            before = base(ids).logits
            loaded = peft.PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
        torch.testing.assert_close(loaded, outputs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before, outputs, atol=1e-3)


def test_the_head_has_moved(finished, tiny):
    """All of it: that of a critic begins at 0."""
    _, run = finished
    for path in run.glob("*/adapter/adapter_model.safetensors"):
        heads = [value for key, value in load_file(path).items() if ".score." in key]
        config = json.loads((path.parent / "adapter_config.json").read_text())
        assert bool(heads) == (config["modules_to_save"] == ["score"])
        assert all(value.any() for value in heads)


def test_a_checkpoint_holds_what_is_trained(finished):
    """Of a model its adapters and head, and two moments of AdamW for each of these weights."""
    _, run = finished
    state = checkpoint(run)
    models = [
        value for key, value in state.items() if key in ("policy", "control", "critic", "model")
    ]
    optimizers = [value for key, value in state.items() if "optimizer" in key]
    assert models and len(models) == len(optimizers)
    for model, optimizer in zip(models, optimizers, strict=True):
        names = [name.removeprefix("0.").removeprefix("1.") for name in model]
        assert all(".lora_" in name or name.startswith("score.") for name in names)
        shapes = sorted(tuple(value.shape) for value in model.values())
        moments = sorted(tuple(of["exp_avg"].shape) for of in optimizer["state"].values())
        assert set(moments) == set(shapes)


def test_a_killed_run_goes_on_as_if_it_had_not_been(finished, data, tiny, tmp_path):
    name, run = finished
    script = SCRIPTS[name][0]
    args = some_args(name, data, tiny, tmp_path / "killed")
    updates = 2 if name in ("ppo", "rejection_sampling") else 1  # per step
    stopped_run(script, args, "check_finite", 2 * updates)
    assert checkpoint(tmp_path / "killed")["step"] == 1
    resumed(script, args)
    assert metrics(tmp_path / "killed") == metrics(run)
    for path in run.rglob("*.safetensors"):
        other = tmp_path / "killed" / path.relative_to(run)
        assert path.read_bytes() == other.read_bytes()
    ours, theirs = checkpoint(run), checkpoint(tmp_path / "killed")
    for key in ours.keys() - {"seconds", "sizes", "random"}:
        assert equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("name", ["grpo", "ppo", "reinforce_rloo"])
def test_the_first_kl_is_0(name, data, tiny, tmp_path):
    SCRIPTS[name][0].main(some_args(name, data, tiny, tmp_path / "run", beta=0.05))
    kl = [row["kl"] for row in metrics(tmp_path / "run") if "kl" in row]
    assert kl[0] == 0 and kl[1] != 0 and len(kl) == 2


@pytest.mark.parametrize("name", ["grpo", "reinforce_rloo", "dpo_nll"])
def test_only_one_model_is_loaded(name, data, tiny, tmp_path):
    """The reference is made of it; evaluations load no start model."""
    script = SCRIPTS[name][0]
    seen = observe.observe(script, some_args(name, data, tiny, tmp_path / "run"))
    assert len(seen.results("load_model")) == 1


@pytest.mark.parametrize("way", [dict(gradient_checkpointing=True), dict(share_prompts=False)])
def test_the_same_run_with_other_memory(way, data, tiny, tmp_path):
    for folder, changes in (("plain", {}), ("other", way)):
        grpo.main(some_args("grpo", data, tiny, tmp_path / folder, **changes))
    ours, theirs = metrics(tmp_path / "plain"), metrics(tmp_path / "other")
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)


def test_final_loads_without_peft(data, tiny, tmp_path, monkeypatch, tokenizer):
    grpo.main(some_args("grpo", data, tiny, tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "peft", None)
    model = POLICY.from_pretrained(tmp_path / "run" / "final")
    assert model.dtype == torch.float32 and not any("lora" in name for name in model.state_dict())
    again = load(str(tmp_path / "run" / "final"), rank=0)
    assert common.generate(again, tokenizer, ["12+ 345"], 1, 8, temperature=0)[1]
    assert equal(weights(tmp_path / "run"), again.state_dict())


def test_it_says_what_is_trained(data, tiny, tmp_path, capsys):
    grpo.main(some_args("grpo", data, tiny, tmp_path / "run"))
    policy = load(tiny)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert trained == 2048
    assert "parameters, 2,048 of them trained (--lora-rank 2)," in capsys.readouterr().out


# --- What cannot be -------------------------------------------------------------------------------


def refusal(name, *args, **changes):
    with pytest.raises(ValueError) as stopped:
        SCRIPTS[name][0].main(some_args(name, *args, **changes))
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def test_peft_is_missing(tiny, tmp_path, monkeypatch):
    """One line and exit code 1, before anything is loaded or written."""
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(grpo, "load_rows", None, raising=False)
    monkeypatch.setattr(grpo, "load_model", None)
    run = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["grpo.py", "--lora-rank", "4", "--output-dir", str(run)])
    with pytest.raises(SystemExit) as ended:
        plumbing.run_script(grpo.main, grpo.Args, grpo.TOY)
    line = 'grpo.py: --lora-rank needs the package peft: pip install -e ".[lora]"'
    assert ended.value.code == line  # which Python prints, and exits with 1
    assert not run.exists()
    with pytest.raises(ValueError, match="peft"):
        load(tiny)
    assert load(tiny, rank=0).config.model_type == "llama"


def test_another_rank_does_not_resume(data, tiny, tmp_path):
    grpo.main(some_args("grpo", data, tiny, tmp_path / "run"))
    for rank in (0, 3):
        changes = dict(lora_rank=rank, resume=True)
        text = refusal("grpo", data, tiny, tmp_path / "run", **changes)
        assert f"began with --lora-rank 2, not {rank}" in text


def test_what_does_not_go_with_it(data, tiny, tmp_path):
    text = refusal("dpo_nll", data, tiny, tmp_path / "a", precompute_ref=False)
    assert "--no-precompute-ref" in text
    text = refusal("sft", data, tiny, tmp_path / "b", from_scratch=True)
    assert "--no-from-scratch" in text
    assert "--lora-rank -1" in refusal("grpo", data, tiny, tmp_path / "c", lora_rank=-1)
    assert not any(Path(tmp_path).iterdir())


def test_a_model_without_linear_layers(tiny, monkeypatch):
    monkeypatch.setattr(plumbing, "_linear_layers", lambda backbone: {})
    with pytest.raises(ValueError, match="has no linear layer to adapt"):
        load(tiny)
