"""Models that are not trained, stored in bfloat16; the count of memory beside what is taken."""

import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from families import FAMILIES, make
from observe import observe
from test_families import random_batch
from test_reward_models import ANSWERS, ENCODERS, PROMPTS, save
from conftest import make_tokenizer

import common
import dpo_nll
import grpo
import plumbing
import rejection_sampling

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import memory  # noqa: E402
import sides  # noqa: E402

CPU = torch.device("cpu")
POLICY = transformers.AutoModelForCausalLM

# --- Stored as computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_stored_in_bfloat16_gives_the_same_bits(family):
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "toy/model")
    model = make(family)
    model.autocast_dtype = torch.bfloat16
    batch = random_batch(tokenizer)
    found = []
    for stored in (False, True):
        if stored:
            plumbing.hold_as_computed(model)
        logps = [common.fixed_logps(model, batch, share_prompts=x) for x in (False, True)]
        sampled, _, _ = common.generate(model, tokenizer, ["1", "33+44="], 2, 6, temperature=0)
        found.append([*logps, sampled.completion_ids])
    for before, after in zip(*found, strict=True):
        assert torch.equal(before, after)


def dtypes_of(model):
    return {name: p.dtype for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_stored_in_which_dtype(tied, tmp_path):
    """Linear layers in half the bytes; a tied output layer is the embedding; in float32 nothing."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    plain = plumbing.load_model(POLICY, tmp_path, CPU, "float32")
    assert plumbing.hold_as_computed(plain) is plain
    assert set(dtypes_of(plain).values()) == {torch.float32}
    model = plumbing.hold_as_computed(plumbing.load_model(POLICY, tmp_path, CPU, "bfloat16"))
    halved = {name for name, dtype in dtypes_of(model).items() if dtype == torch.bfloat16}
    want = {name for name in dtypes_of(model) if "proj" in name}
    if not tied:
        want.add("lm_head.weight")
    assert halved == want and len(want) > 6
    assert model.lm_head.weight.dtype == (torch.float32 if tied else torch.bfloat16)


@pytest.mark.parametrize("auto", ["SequenceClassification", "TokenClassification"])
def test_the_head_of_a_reward_model_stays_float32(auto, tiny):
    load = getattr(transformers, f"AutoModelFor{auto}")
    model = plumbing.load_model(load, tiny, CPU, "bfloat16", new_head=1)
    kept = {n for n, d in dtypes_of(plumbing.hold_as_computed(model)).items() if "proj" not in n}
    assert "score.weight" in kept and model.score.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "kind, bias", [*((kind, False) for kind in ENCODERS), ("Llama", False), ("Llama", True)]
)
def test_reward_models_give_the_same_numbers(kind, bias, tmp_path, monkeypatch):
    """Those of others, and one of ours, which has a `reward_bias`."""
    tokenizer = make_tokenizer()
    model = save(kind, tokenizer, tmp_path)
    if bias:
        model.config.reward_bias = 0.25
        model.config.save_pretrained(tmp_path)
    rows = [{"ended": True}] * len(PROMPTS)
    found = []
    for store in (plumbing.hold_as_computed, lambda model: model):
        monkeypatch.setattr(plumbing, "hold_as_computed", store)
        score = plumbing.load_reward("", None, str(tmp_path), CPU, "bfloat16")
        found.append(score(PROMPTS, ANSWERS, rows))
    assert found[0] == found[1] and len(set(found[0])) == 3


SMALL = dict(learning_rate=1e-2, checkpoint_every=1, dtype="bfloat16", max_new_tokens=8)
RUNS = {
    "grpo": (grpo, "problems", dict(num_steps=2, num_prompts=2, num_generations=2)),
    "dpo": (dpo_nll, "pref", dict(precompute_ref=False, batch_size=3, max_length=99)),
    "dpo, iterations": (
        dpo_nll,
        "problems",
        dict(precompute_ref=False, batch_size=2, iterations=2, num_pairs=4, temperature=3.0),
    ),
    "rejection sampling": (
        rejection_sampling, "problems", dict(num_prompts=3, num_generations=2, batch_size=2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_with_its_reference_stored_as_computed(
    name, tiny, tmp_path, monkeypatch, no_picture
):
    """In every metric, bit for bit; in `dpo, iterations` the reference gets the policy's weights,
    which are rounded in it as autocast would round them."""
    script, file, flags = RUNS[name]
    lines = (ROOT / f"toy/{file}_train.jsonl").read_text().splitlines(keepends=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(lines[:6]))
    (tmp_path / "length.py").write_text(
        "def length(prompts, completions, rows):\n    return [len(set(x)) for x in completions]\n"
    )
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join((ROOT / "toy/problems_test.jsonl").open().readlines()[:4]))
    common_flags = SMALL | dict(
        model=tiny, dataset=str(rows), reward=f"{tmp_path}/length.py:length"
    )
    if script is dpo_nll:
        common_flags["eval_prompts"] = str(problems)
    else:
        common_flags["eval_dataset"] = str(problems)
    found = []
    stored = []
    for store in (script.hold_as_computed, lambda model: model):

        def noting(model, store=store):
            stored.append(store(model))
            return stored[-1]

        monkeypatch.setattr(script, "hold_as_computed", noting)
        folder = str(tmp_path / f"run{len(found)}")
        seen = observe(script, script.Args(**common_flags | flags | dict(output_dir=folder)))
        found.append(seen.untimed())
    dtypes = [model.lm_head.weight.dtype for model in stored]
    half = len(stored) // 2
    assert half and dtypes == [torch.bfloat16] * half + [torch.float32] * half
    assert found[0] == found[1] and len(found[0]) > 2


# --- The count ------------------------------------------------------------------------------------


def test_bytes_per_parameter_by_hand():
    """Weights 4, gradients 4, Adam 8; a second model 4, or 2 in bfloat16; autocast's copy 2."""
    count = memory.bytes_per_parameter
    assert count("sft.py", "float32") == 16 and count("sft.py", "bfloat16") == 18
    grpo_row = "grpo.py, reinforce_rloo.py"
    assert count(grpo_row, "float32") == count(grpo_row, "bfloat16") == 20
    assert count(grpo_row, "bfloat16", is_linear=False) == 20  # no copy, and the reference is 4
    assert count("ppo.py", "float32") == 36 and count("ppo.py with --beta 0", "bfloat16") == 34
    assert count(memory.LORA, "float32") == 4 and count(memory.LORA, "bfloat16") == 2


def test_parameters_and_logits_of_a_shape():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    for tied in (False, True):
        config.tie_word_embeddings = tied
        model = transformers.LlamaForCausalLM(config)
        shape = memory.shape_of(config)
        count = sum(p.numel() for p in model.parameters())
        assert shape.linear_parameters() + shape.other_parameters() == count
    # Of rank 2, on q, k, v, o, gate, up and down: rank times inputs and outputs
    layer = (16 + 32) + (16 + 16) + (16 + 16) + (32 + 16) + 3 * (16 + 24)
    assert shape.adapter_parameters(2) == 3 * 2 * layer
    assert memory.logit_bytes(shape, "bfloat16") == 50 * 4
    assert memory.cache_bytes(shape, "float32") == 3 * 2 * 16 * 4


def test_what_fits_grows_with_the_device_and_shrinks_with_the_work():
    big, small = memory.Work(micro_batch_size=64), memory.Work(micro_batch_size=1)
    assert memory.largest("sft.py", 1, small) == "none"
    assert float(memory.largest("sft.py", 80, small)) > float(memory.largest("sft.py", 24, small))
    for row in memory.ROWS:
        for shape in memory.SHAPES.values():
            few, many = (memory.total_bytes(row, shape, work) for work in (small, big))
            weights = 2 * (shape.linear_parameters() + shape.other_parameters())
            assert weights < few < many


def test_the_tables_of_the_documentation_are_the_program_s():
    out = subprocess.run(
        [sys.executable, ROOT / "benchmarks/memory.py"], capture_output=True, text=True
    )
    text = (ROOT / "docs/memory.md").read_text()
    tables = out.stdout.strip().split("\n\n")
    assert len(tables) == 2
    for table in tables:
        assert table in text


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_the_peak_of_a_process_is_its_own():
    """Not that of the process that started it."""
    mine = torch.ones(2 * 10**9, dtype=torch.uint8)
    program = "from sides import peak_memory; print(peak_memory('cpu'))"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "benchmarks"
    )
    assert mine.numel() / 1e9 <= sides.peak_memory("cpu")
    assert 0.05 < float(out.stdout) < 1.5


@pytest.mark.real
@pytest.mark.parametrize(
    "script, row",
    [("sft", "sft.py"), ("grpo", "grpo.py, reinforce_rloo.py"), ("dpo_nll", "dpo_nll.py")],
)
def test_the_count_is_what_a_real_model_takes(script, row, real_model):
    """Within a quarter, of the memory that the process takes beyond what its imports do."""
    args = gpu.Args(
        model=real_model, device="cpu", dtype="float32", num_steps=2, num_prompts=1, batch_size=4,
        max_new_tokens=32, micro_batch_size=4,
    )  # fmt: skip
    found = gpu.measure(script, args)
    shape = memory.shape_of(transformers.AutoConfig.from_pretrained(real_model))
    work = memory.Work("float32", micro_batch_size=4, prompt=40, completion=50, sampled=8)
    counted = memory.total_bytes(row, shape, work) / 1e9
    taken = found["peak"] - found["before"]
    print(f"{script}: counted {counted:.2f} GB, taken {taken:.2f} GB")
    assert counted == pytest.approx(taken, rel=0.25)
