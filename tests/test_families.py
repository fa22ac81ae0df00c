"""Model families: tokens, log-probs and gradients beside loops over single rows, unpadded."""

import pytest
import torch
import transformers
from conftest import ROOT
from families import FAMILIES, make

import common
import plumbing

CPU = torch.device("cpu")
PROMPTS = ["1", "33+44=", "5+6", "7+88+9+10+11+12+13+14+15"]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "toy" / "model")


def plain_greedy(model, ids, end, most):
    """The likeliest token again and again, the whole text through the model each time."""
    made = []
    while len(made) < most and (not made or made[-1] != end):
        made.append(
            model(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax().item()
        )
    return made


def random_batch(tokenizer):
    """Two completions of unlike lengths for each prompt."""
    draw = torch.Generator().manual_seed(1)
    prompts = [common.encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    rows = []
    for length in (3, 9, 1, 12, 7, 5, 10, 2):
        rows.append(torch.randint(3, len(tokenizer), (length,), generator=draw).tolist())
    prompt_of = torch.arange(4).repeat_interleave(2)
    return common.Batch(*common.pad(prompts, "left"), *common.pad(rows, "right"), prompt_of)


def plain_logps(model, batch):
    """Each row alone, without padding and without a cache -> list of (T,)."""
    found = []
    for i, prompt in enumerate(batch.prompt_of.tolist()):
        ids = batch.prompt_ids[prompt][batch.prompt_mask[prompt]]
        completion = batch.completion_ids[i][batch.completion_mask[i]]
        both = torch.cat([ids, completion])[None]
        logps = model(both, use_cache=False).logits[0].log_softmax(-1)
        places = torch.arange(len(ids) - 1, len(ids) - 1 + len(completion))
        found.append(logps[places, completion])
    return found


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_computed_as_row_by_row(family, tokenizer, monkeypatch):
    monkeypatch.setattr(common, "WORTH_SHARING", 0)
    model = make(family)
    plumbing._probe(model, family)
    end = tokenizer.eos_token_id
    model.generation_config.eos_token_id = end
    with torch.no_grad():
        batch, _, ended = common.generate(model, tokenizer, PROMPTS, 2, 8, temperature=0)
        for i, prompt in enumerate(batch.prompt_of.tolist()):
            ids = common.encode_prompt(tokenizer, PROMPTS[prompt])
            want = plain_greedy(model, ids, end, 8)
            got = batch.completion_ids[i][batch.completion_mask[i]].tolist()
            assert got == want and ended[i] == (want[-1] == end)

    batch = random_batch(tokenizer)
    weights = torch.randn(batch.completion_ids.shape, generator=torch.manual_seed(2))
    plain = plain_logps(model, batch)
    loss = sum((row * weights[i, : len(row)]).sum() for i, row in enumerate(plain))
    wanted = gradients(model, loss)
    for share in (True, False):
        logps = common.completion_logps(model, batch, 1.0, share)
        for i, row in enumerate(plain):
            assert torch.allclose(logps[i, : len(row)], row, atol=5e-4), (share, i)
        got = gradients(model, (logps * weights).sum())
        largest = max(gradient.abs().max() for gradient in wanted.values())
        for name, gradient in wanted.items():
            assert torch.allclose(got[name], gradient, atol=2e-3 * largest), (share, name)


@pytest.mark.parametrize(
    "family, shares", [("llama", True), ("gemma3n, shared keys", True), ("mamba", False)]
)
def test_what_keeps_states_is_not_shared(family, shares, tokenizer, monkeypatch):
    """Of keys and values one pass of the prompts is enough; a state takes the plain way."""
    monkeypatch.setattr(common, "WORTH_SHARING", 0)
    rows = []
    real = common._call

    def call(model, net, ids, *options, **more):
        rows.append(len(ids))
        return real(model, net, ids, *options, **more)

    monkeypatch.setattr(common, "_call", call)
    common.completion_logps(make(family), random_batch(tokenizer))
    assert rows == ([4, 8] if shares else [8])


class Leaky(torch.nn.Module):
    """A model whose logits have one fault."""

    def __init__(self, model, fault):
        super().__init__()
        self.model = model
        self.fault = fault
        self.config = model.config

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, **options):
        if self.fault == "see later tokens":
            shift = input_ids[:, -1:, None].float()
        elif self.fault == "depend on the padding":
            shift = (attention_mask == 0).any(1)[:, None, None].float()
        else:
            shift = torch.tensor(float(input_ids.shape[1] == 1))
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=options.get("use_cache"),
        )  # fmt: skip
        return (out.logits + shift * torch.arange(out.logits.shape[-1]),)

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()


@pytest.mark.parametrize(
    "fault", ["see later tokens", "depend on the padding", "depend on the cache"]
)
def test_the_probe_refuses_what_would_be_computed_wrongly(fault):
    with pytest.raises(plumbing.UserError, match=fault):
        plumbing._probe(Leaky(make("llama"), fault), "there")


def test_an_encoder_given_as_a_policy_is_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.4,
    )  # fmt: skip
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(plumbing.UserError, match=str(tmp_path)):
        plumbing.load_model(transformers.AutoModelForCausalLM, tmp_path, CPU)


HEADS = [
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForTokenClassification,
]


@pytest.mark.parametrize("family", ["granite", "lfm2, convolutions", "qwen3.5, linear attention"])
@pytest.mark.parametrize("auto_class", HEADS)
def test_a_head_on_a_family_without_a_class_is_saved_and_loaded(family, auto_class, tmp_path):
    make(family).save_pretrained(tmp_path / "causal")
    model = plumbing.load_model(auto_class, tmp_path / "causal", CPU, new_head=1)
    assert model.has_new_head
    model.save_pretrained(tmp_path / "head")
    again = plumbing.load_model(auto_class, tmp_path / "head", CPU)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        # Not bit for bit: memory that is aligned otherwise is added up in another order
        torch.testing.assert_close(model(ids).logits, again(ids).logits, rtol=1e-5, atol=1e-6)
    assert not again.has_new_head and again.config.num_labels == 1
