"""Reward models of others give what AutoModelForSequenceClassification gives on their template.

Their own forward and pooling, alone and in a batch of texts of other lengths.
"""

import pytest
import torch
import transformers
from conftest import make_tokenizer
from test_templates import TEMPLATES, ZEPHYR, needs_trl, sentencepiece, with_template

import plumbing

PROMPTS = ["What is 2+2?", "Say hi.", [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]]  # fmt: skip
ANSWERS = ["It is 4.", "hi there, this is a longer answer", "x\n"]
SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=600, num_labels=1, initializer_range=0.3,
)  # fmt: skip
ENCODERS = ("Roberta", "DebertaV2", "Bert", "ModernBert", "Electra", "DistilBert")


def save(kind, tokenizer, folder, **more):
    """A random model of a family with one label, and its tokenizer, in a folder -> the model."""
    torch.manual_seed(0)
    options = SMALL | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | more
    if kind == "DistilBert":
        options |= {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
    if kind == "ModernBert":
        ends = ("bos", "eos", "cls", "sep")
        options |= {f"{name}_token_id": 1 for name in ends} | {"global_attn_every_n_layers": 1}
    config = getattr(transformers, f"{kind}Config")(**options)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def score_of(folder, micro_batch_size=8):
    device = torch.device("cpu")
    return plumbing.load_reward("", None, str(folder), device, "float32", micro_batch_size)


def theirs(model, tokenizer, prompt, answer, parts=False):
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    chat = [*chat, {"role": "assistant", "content": answer}]
    if parts:
        chat = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0, 0].item()


def check(model, tokenizer, folder, parts=False):
    rows = [{"ended": True}] * len(PROMPTS)
    want = [theirs(model, tokenizer, p, a, parts) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    for size in (1, 8):
        got = score_of(folder, size)(PROMPTS, ANSWERS, rows)
        assert got == pytest.approx(want, abs=1e-4)


@needs_trl
@pytest.mark.parametrize("name", TEMPLATES)
def test_scores_on_real_templates(name, tmp_path):
    tokenizer = with_template(name)
    model = save("Llama", tokenizer, tmp_path, num_key_value_heads=2)
    check(model, tokenizer, tmp_path, parts=name == "idefics3")


@needs_trl
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("name", ["qwen2_5", "llama3"])
def test_encoders_with_a_template(kind, name, tmp_path):
    tokenizer = with_template(name)
    check(save(kind, tokenizer, tmp_path), tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["Llama", "Roberta"])
def test_sentencepiece(kind, tmp_path):
    tokenizer = sentencepiece(ZEPHYR)
    tokenizer.pad_token = "<unk>"
    check(save(kind, tokenizer, tmp_path), tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_without_a_template_get_a_pair(kind, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[("<bos>", 2), ("<eos>", 1)],
    )  # fmt: skip
    tokenizer.cls_token = "<bos>"
    tokenizer.sep_token = "<eos>"
    if kind == "Roberta":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = save(kind, tokenizer, tmp_path)
    got = score_of(tmp_path)(PROMPTS[:2], ANSWERS[:2], [{}, {}])
    for prompt, answer, value in zip(PROMPTS, ANSWERS, got, strict=False):
        inputs = tokenizer(prompt, answer, return_tensors="pt")
        known = transformers.AutoTokenizer.from_pretrained(tmp_path).model_input_names
        inputs = {name: inputs[name] for name in inputs if name in known}
        if kind in ("DistilBert", "ModernBert"):
            inputs.pop("token_type_ids", None)
        with torch.no_grad():
            assert value == pytest.approx(model(**inputs).logits[0, 0].item(), abs=1e-4)


@pytest.mark.parametrize("kind, room", [("Llama", 64), ("Roberta", 63)])
def test_a_text_beyond_the_context_is_one_line(kind, room, tmp_path):
    """RoBERTa's first position is the one behind that of the pad."""
    tokenizer = make_tokenizer(chat=False)
    save(kind, tokenizer, tmp_path, max_position_embeddings=64)
    score = score_of(tmp_path)
    ends = 1 if kind == "Llama" else 3  # an EOS; BOS, a space and EOS
    assert len(score(["a"], ["b" * (room - 1 - ends)], [{}])) == 1
    with pytest.raises(plumbing.UserError, match=f"do not fit in the {room} of .*max-new-tokens"):
        score(["a"], ["b" * (room - ends)], [{}])


def test_a_cut_off_completion_has_no_end(tmp_path):
    tokenizer = make_tokenizer()
    model = save("Llama", tokenizer, tmp_path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text + "bc", add_special_tokens=False, return_tensors="pt")["input_ids"]
    [got] = score_of(tmp_path)(["a"], ["bc"], [{"ended": False}])
    with torch.no_grad():
        assert got == pytest.approx(model(input_ids=ids).logits[0, 0].item(), abs=1e-4)


def test_a_pad_id_that_no_token_has(tmp_path):
    """Old LLaMA conversions have -1: it finds no end of a text in a batch."""
    tokenizer = make_tokenizer()
    model = save("Llama", tokenizer, tmp_path, pad_token_id=-1)
    check(model, tokenizer, tmp_path)
