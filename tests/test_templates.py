"""The ids of a conversation: what real chat templates render, tokenised once.

The templates are those that TRL ships, on a tiny byte tokenizer that knows their special tokens.
"""

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import common
import plumbing
from grpo import step_ends

TRL = find_spec("trl")
needs_trl = pytest.mark.skipif(TRL is None, reason="its chat templates come with trl")

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip
GEMMA = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
# template: special tokens, BOS, EOS, end of turn
TEMPLATES = {
    "qwen2_5": (CHATML, None, "<|im_end|>", "<|im_end|>"),
    "qwen3": ([*CHATML, "<think>", "</think>"], None, "<|im_end|>", "<|im_end|>"),
    "qwen3_5_think": ([*CHATML, "<think>", "</think>"], None, "<|im_end|>", "<|im_end|>"),
    "qwen3_5_nothink": ([*CHATML, "<think>", "</think>"], None, "<|im_end|>", "<|im_end|>"),
    "llama3": (LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "llama3_1": (LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "gemma": (GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "gemma3": (GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "phi3": (["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], None, "<|endoftext|>",
             "<|end|>"),
    "idefics3": (["<|im_start|>", "<end_of_utterance>", "<image>", "</s>"], "<|im_start|>", "</s>",
                 "<end_of_utterance>"),
    "deepseek_r1_distill": (
        ["<s>", "</s>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"], "<s>", "</s>",
        "</s>",
    ),
}  # fmt: skip


def with_template(name):
    """A byte tokenizer with a template of TRL and its special tokens."""
    special, bos, eos, _ = TEMPLATES[name]
    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.bos_token = bos
    tokenizer.eos_token = eos
    path = Path(TRL.origin).parent / "chat_templates" / f"{name}.jinja"
    tokenizer.chat_template = path.read_text()
    return tokenizer


def sentencepiece(template=None):
    """A tokenizer that puts a space before every text that it is given, as Llama 2's does."""
    letters = [chr(i) for i in range(33, 127)]
    words = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "\u2581", *letters]
    vocabulary = {word: i for i, word in enumerate([*words, *["\u2581" + c for c in letters]])}
    backend = Tokenizer(models.BPE(
        vocab=vocabulary, merges=[("\u2581", c) for c in letters], unk_token="<unk>",
        byte_fallback=True,
    ))  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(content=" ", left=1),
    ])  # fmt: skip
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendering(tokenizer, chat, parts=False, **options):
    if parts:
        chat = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
    return tokenizer.apply_chat_template(chat, tokenize=False, **options)


def chat_of(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


# --- What a template renders ----------------------------------------------------------------------


@needs_trl
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_completion_are_the_rendering(name):
    """Through the end of turn, where the rendering begins with that of the prompt."""
    tokenizer = with_template(name)
    end = TEMPLATES[name][3]
    parts = name == "idefics3"
    for chat in (chat_of("Say hi."), chat_of("Say hi.", "hi", "Again?")):
        begin = rendering(tokenizer, chat, parts, add_generation_prompt=True)
        whole = rendering(tokenizer, [*chat, *chat_of("", "Hello you.")[1:]], parts)
        prompt_ids, [ids] = common.encode_answers(tokenizer, chat, ["Hello you."])
        assert prompt_ids == ids_of(tokenizer, begin)
        assert "Say hi." in tokenizer.decode(prompt_ids)
        text = tokenizer.decode(ids)
        assert text.endswith("Hello you." + end)
        if whole.startswith(begin):
            assert begin + text == whole[: whole.rindex(end) + len(end)]
        else:
            assert text == "Hello you." + end
        assert tokenizer.convert_ids_to_tokens(common.end_of_turn(tokenizer)) == end


@needs_trl
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cut_off_answer_is_a_prefix_of_the_text(name):
    tokenizer = with_template(name)
    prompt_ids, [ids] = common.encode_answers(tokenizer, "Say hi.", ["Hello y"], [False])
    assert tokenizer.decode(ids) == "Hello y"
    batch = common.encode(tokenizer, ["Say hi."], [["Hello y", "Hi."]], ended=[False, True])
    assert batch.completion_mask.sum(1)[0] == len(ids)
    assert batch.prompt_ids[0].tolist() == prompt_ids


@needs_trl
def test_a_chain_of_thought_is_kept():
    """R1's template drops it, Qwen3's keeps it: it is in the completion of both, once."""
    thought = "<think>\nwell\n</think>\n\nHello."
    for name in ("qwen3", "deepseek_r1_distill", "qwen3_5_think", "qwen3_5_nothink"):
        tokenizer = with_template(name)
        prompt_ids, [ids] = common.encode_answers(tokenizer, "Say hi.", [thought])
        text = tokenizer.decode([*prompt_ids, *ids])
        assert text.count("well") == 1 and text.rstrip().endswith("Hello." + TEMPLATES[name][3])
        assert "<think>\n<think>" not in text, (name, text)


@needs_trl
def test_white_space_that_the_template_trims():
    tokenizer = with_template("llama3")
    _, [ids] = common.encode_answers(tokenizer, " Say hi.\n", ["hi \n"])
    assert tokenizer.decode(ids) == "hi<|eot_id|>"


# --- Messages -------------------------------------------------------------------------------------


@needs_trl
@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "idefics3"])
def test_contents_of_parts_of_none_and_with_more_keys(name):
    tokenizer = with_template(name)
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]
    plain = chat_of("Say hi.", "", "Well?")
    other = [
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "user", "content": "Well?", "id": None},
    ]
    assert common.encode_prompt(tokenizer, other) == common.encode_prompt(tokenizer, plain)
    assert "None" not in tokenizer.decode(common.encode_prompt(tokenizer, other))
    image = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(ValueError, match="no text"):
        common.encode_prompt(tokenizer, image)


@needs_trl
def test_tools_and_tool_calls():
    """The tools are in the prompt, a call is a completion."""
    tokenizer = with_template("qwen2_5")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = [{"role": "user", "content": "1+1?", "tools": tools}]
    prompt_ids, [ids] = common.encode_answers(tokenizer, prompt, [message])
    begin = rendering(tokenizer, chat_of("1+1?"), tools=tools, add_generation_prompt=True)
    assert tokenizer.decode(prompt_ids) == begin and '"name": "add"' in begin
    assert tokenizer.decode(ids).startswith("<tool_call>")
    assert tokenizer.decode(ids).endswith("</tool_call><|im_end|>")


@needs_trl
def test_a_refused_system_message_is_one_line():
    tokenizer = with_template("gemma")
    chat = [{"role": "system", "content": "Be kind."}, *chat_of("hi")]
    with pytest.raises(ValueError, match="System role not supported"):
        common.encode_prompt(tokenizer, chat)


@needs_trl
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendered_prompt_is_not_wrapped_again(name):
    tokenizer = with_template(name)
    prompt_ids = common.encode_prompt(tokenizer, "Say hi.")
    text = tokenizer.decode(prompt_ids)
    assert common.is_rendered(tokenizer, text) and not common.is_rendered(tokenizer, "Say hi.")
    assert common.encode_prompt(tokenizer, text) == prompt_ids
    got, [ids] = common.encode_answers(tokenizer, text, ["Hello."])
    assert got == prompt_ids and tokenizer.decode(ids) == "Hello." + TEMPLATES[name][3]
    bos = tokenizer.bos_token or ""
    assert common.encode_prompt(tokenizer, text.removeprefix(bos)) == prompt_ids


@needs_trl
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_end_of_turn_is_not_doubled(name):
    tokenizer = with_template(name)
    end = TEMPLATES[name][3]
    plain = common.encode_answers(tokenizer, "Say hi.", ["Hello."])
    for ending in (end, end + "\n", tokenizer.eos_token):
        assert common.encode_answers(tokenizer, "Say hi.", ["Hello." + ending]) == plain


# --- Other tokenizers -----------------------------------------------------------------------------


def test_sentencepiece_puts_no_space_before_an_answer_or_a_step():
    tokenizer = sentencepiece(ZEPHYR)
    prompt_ids, [ids] = common.encode_answers(tokenizer, "Say hi.", ["hi you"])
    whole = rendering(tokenizer, chat_of("Say hi.", "hi you"))
    assert ids_of(tokenizer, whole)[: len(prompt_ids + ids)] == prompt_ids + ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["h", "i", "\u2581y", "o", "u", "</s>"]
    _, ids, ends = common.encode_steps(tokenizer, "Sum?", ["a", "b"], "\n")
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<0x0A>", "b", "<0x0A>", "</s>"]
    assert ends == [1, 3]
    plain = sentencepiece()
    prompt_ids, [ids] = common.encode_answers(plain, "2+2=", ["4"])
    assert plain.convert_ids_to_tokens(prompt_ids + ids) == ["\u25812", "+", "2", "=", "4", "</s>"]


def test_an_end_of_turn_that_is_no_special_token():
    """A token of its own in the vocabulary ends a turn; a longer text does not: the EOS does."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "~")
    assert common.end_of_turn(tokenizer) == ids_of(tokenizer, "~")[0]
    _, [ids] = common.encode_answers(tokenizer, "p", ["a"])
    assert ids == ids_of(tokenizer, "a~")
    tokenizer.chat_template = tokenizer.chat_template.replace("~", "[end]\n")
    assert common.end_of_turn(tokenizer) == tokenizer.eos_token_id
    _, [ids] = common.encode_answers(tokenizer, "p", ["a"])
    assert ids == [*ids_of(tokenizer, "a"), tokenizer.eos_token_id]


def test_a_turn_that_ends_with_two_special_tokens():
    """Cohere's templates close an answer, then the turn; the EOS is the second of these."""
    tokenizer = make_tokenizer(chat=False)
    special = ["<|user|>", "<|answer|>", "<|end_answer|>", "<|end_turn|>"]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.eos_token = "<|end_turn|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|user|>' + m['content'] + '<|end_turn|>' }}{% else %}"
        "{{ '<|answer|>' + m['content'] + '<|end_answer|><|end_turn|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
    )
    prompt_ids, [ids] = common.encode_answers(tokenizer, "Say hi.", ["Hello."])
    whole = ids_of(tokenizer, rendering(tokenizer, chat_of("Say hi.", "Hello.")))
    assert prompt_ids + ids == whole and ids[-1] == tokenizer.eos_token_id
    for ending in ("<|end_turn|>", "<|end_answer|><|end_turn|>"):
        _, [same] = common.encode_answers(tokenizer, "Say hi.", ["Hello." + ending])
        assert same == ids


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_leaves_a_role_out_is_refused(role):
    """Such as one that knows the roles human and gpt alone: the question would vanish."""
    tokenizer = make_tokenizer(chat=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'ROLE' %}{{ m['role'] + ':' + m['content'] }}"
        "{% endif %}{% endfor %}".replace("ROLE", role)
    )
    with pytest.raises(ValueError, match=f"leaves out what a message of role {role} says"):
        common.encode_answers(tokenizer, "Say hi.", ["Hello."])


@pytest.mark.parametrize("separator", ["\n", "\n\n", "\u043a\u0438", "\u3002", ". "])
def test_steps_end_in_the_text(separator):
    """With as many ends as steps, each at the token that ends its separator."""
    for tokenizer in (make_tokenizer(), sentencepiece()):
        ids = ids_of(tokenizer, separator.join(["one", "two", "three"]))
        ends = step_ends(ids, separator, tokenizer.decode)
        assert len(ends) == 3 and ends[-1] == len(ids) - 1
        for end, text in zip(ends, ("one", "one" + separator + "two"), strict=False):
            assert tokenizer.decode(ids[: end + 1]).startswith(text + separator)
            assert not tokenizer.decode(ids[:end]).startswith(text + separator)


# --- Rows -----------------------------------------------------------------------------------------


def rows_of(tmp_path, rows, *columns):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return plumbing.load_rows(str(path), *columns)


def test_columns_that_go_into_the_prompt(tmp_path, capsys):
    tools = [{"type": "function"}]
    [row] = rows_of(tmp_path, [{"prompt": "q", "system": "s", "tools": json.dumps(tools)}])
    first = {"role": "system", "content": "s", "tools": tools}
    assert row["prompt"] == [first, {"role": "user", "content": "q"}]
    [row] = rows_of(tmp_path, [{"messages": chat_of("q", "a"), "tools": tools}])
    assert row["messages"][0]["tools"] == tools and row["messages"][1:] == chat_of("q", "a")[1:]
    assert "system, tools" in capsys.readouterr().out


def test_names_of_roles(tmp_path, capsys):
    chat = [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]
    [row] = rows_of(tmp_path, [{"messages": chat}])
    assert row["messages"] == chat_of("q", "a")
    assert "gpt as assistant" in capsys.readouterr().err


def test_answers_that_repeat_the_prompt(tmp_path, capsys):
    rows = [{"prompt": f"{i}=", "chosen": f"{i}={i}", "rejected": f"{i}=x"} for i in range(9)]
    got = rows_of(tmp_path, rows, "prompt", "chosen", "rejected")
    assert got[3] == {"prompt": "3=", "chosen": "3", "rejected": "x"}
    assert "repeat the prompt" in capsys.readouterr().out
    rows[4]["chosen"] = "4"
    assert rows_of(tmp_path, rows, "prompt", "chosen", "rejected") == rows


@pytest.mark.parametrize(
    "script, marked",
    [
        ("sft", ">>>1+5+0=06"), ("rm_bt", ">>><eos><<<"), ("rm_kwise", ">>><eos><<<"),
        ("dpo_nll", "<eos><<<"), ("prm", ">>>\n<<<"), ("grpo", "sampled"), ("ppo", "sampled"),
        ("reinforce_rloo", "sampled"), ("rejection_sampling", "sampled"),
    ],
)  # fmt: skip
def test_rows_are_shown_and_nothing_is_written(tmp_path, script, marked, monkeypatch, capsys):
    module = importlib.import_module(script)
    flags = ["--show-rows", "1", "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    monkeypatch.setattr(plumbing, "quieten_transformers", lambda: None)
    with pytest.raises(SystemExit) as end:
        plumbing.run_script(module.main, module.Args, module.TOY)
    assert not end.value.code
    out = capsys.readouterr().out
    assert "<bos><user>" in out and marked in out
    assert not (tmp_path / "run").exists()
