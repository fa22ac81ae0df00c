"""Tiny random models of several shapes and a byte tokenizer, made in code: no network, CPU only."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # two threads each of two workers get into each other's way
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import common  # noqa: E402

common.WORTH_SHARING = 0  # for all: else no batch small enough for a test would share its prompts
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(chat=True, pad_is_eos=False):
    vocab = ["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def make_model(kind, seed=0):
    """Random weights large enough for log-probs to differ from token to token."""
    torch.manual_seed(seed)
    ids = dict(vocab_size=259, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    shape |= dict(max_position_embeddings=512, initializer_range=0.2)
    group = dict(num_key_value_heads=2, head_dim=8)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**ids, **shape, **group))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**ids, **shape, **group))
    elif kind == "gemma3":  # one sliding-window layer, with a window shorter than the prompts
        config = Gemma3TextConfig(**ids, **shape, **group, sliding_window=8)
        config.layer_types = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(config)
    elif kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **ids)
        model = GPT2LMHeadModel(config)  # its dropout is 0.1: eval mode must keep it off
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**ids, **shape))
    return model.eval()


def other_weights(module, monkeypatch):
    """The reference, which `module` loads as its second causal model, gets weights of its own."""
    load, loaded = module.load_model, []

    def loading(auto_class, *args, **more):
        model = load(auto_class, *args, **more)
        loaded.extend([model] if auto_class is module.AutoModelForCausalLM else [])
        if model in loaded[1:]:
            noise = torch.Generator().manual_seed(7)
            for p in model.parameters():
                p.data += 0.03 * torch.randn(p.shape, generator=noise)
        return model

    monkeypatch.setattr(module, "load_model", loading)
    return loaded


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a random model that takes milliseconds a step, with the toy's tokenizer of 20-odd
    tokens: about one token in twenty is an EOS, so that completions end at their own times."""
    folder = tmp_path_factory.mktemp("tiny")
    toy = AutoTokenizer.from_pretrained(ROOT / "toy" / "model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(toy), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=toy.bos_token_id, eos_token_id=toy.eos_token_id,
        pad_token_id=toy.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    toy.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama():
    return make_model("llama")


@pytest.fixture(scope="session")
def real_model():
    """Folder of a real chat model: $REAL_MODEL, else one in the cache; without either, skip."""
    default = Path.home() / ".cache" / "smollm2-135m-instruct"
    folder = Path(os.environ.get("REAL_MODEL", default))
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no real model in {folder}; name one with REAL_MODEL=FOLDER")
    return str(folder)


@pytest.fixture
def no_picture(monkeypatch):
    """Runs draw no curves: pictures take longer than the steps of a tiny model."""
    import plumbing

    monkeypatch.setattr(plumbing, "draw_curves", lambda rows, path: None)
