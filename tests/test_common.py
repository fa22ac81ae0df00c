"""common.py against slow loops, enumeration and transformers' own generate."""

import math

import pytest
import torch
from conftest import make_model, make_tokenizer
from other_tokenizers import (
    ids_of,
    talking_model,
    with_bos,
    with_eos,
    with_merges,
    with_turns,
    with_word_at_zero,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForSequenceClassification,
)

import common
import plumbing
import plain

KINDS = ["llama", "qwen3", "gemma3", "gpt2", "neox"]
PROMPTS = ["short", "a much longer prompt than that", "mid-size one"]
COMPLETIONS = [["yes", "no, never", "x"], ["perhaps"], ["a", "b c d e f g h i j"]]


@pytest.fixture(scope="module")
def batch(tokenizer):
    return common.encode(tokenizer, PROMPTS, COMPLETIONS)


def sequences(batch):
    """(prompt ids, completion ids) of each completion without padding, as lists."""
    for i, p in enumerate(batch.prompt_of.tolist()):
        yield (
            batch.prompt_ids[p][batch.prompt_mask[p]].tolist(),
            batch.completion_ids[i][batch.completion_mask[i]].tolist(),
        )


# --- Batches --------------------------------------------------------------------------------------


def test_encode_pads_prompts_left_and_completions_right(batch):
    assert batch.prompt_of.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.prompt_mask[:, -1].all() and batch.completion_mask[:, 0].all()
    assert not batch.prompt_mask[0, 0] and not batch.completion_mask[0, -1]


def test_bos_once_and_end_of_turn_last(tokenizer, batch):
    for prompt, completion in sequences(batch):
        assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
        assert completion[-1] == tokenizer.eos_token_id
        assert completion.count(tokenizer.eos_token_id) == 1


def test_the_text_survives(tokenizer, batch):
    texts = [text for group in COMPLETIONS for text in group]
    for (prompt, completion), text in zip(sequences(batch), texts, strict=True):
        assert tokenizer.decode(completion[:-1]) == text
        assert tokenizer.decode(prompt).endswith("<eos>[assistant]")


@pytest.mark.parametrize("end", ["a", " ", "\n", "  \n\n"])
def test_no_token_straddles_prompt_and_completion(end):
    plain = make_tokenizer(chat=False)
    batch = common.encode(plain, ["text" + end], [[end + "more"]])
    prompt, completion = next(sequences(batch))
    assert plain.decode(prompt) == "text" + end
    assert plain.decode(completion[:-1]) == end + "more"


def test_without_a_template_text_is_taken_as_it_stands():
    plain = make_tokenizer(chat=False)
    assert common.encode_prompt(plain, "ab") == plain("ab")["input_ids"]
    with pytest.raises(ValueError, match="chat template"):
        common.encode_prompt(plain, [{"role": "user", "content": "ab"}])


def test_the_templates_own_end_of_turn_is_used():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "<turn>\n")
    assert common.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<turn>")


def test_a_cut_completion_has_no_end(tokenizer):
    prompt = len(common.encode_prompt(tokenizer, "p"))
    batch = common.encode(tokenizer, ["p"], [["abcdef", "ab"]], max_length=prompt + 4)
    assert batch.completion_mask.sum(1).tolist() == [4, 3]
    assert tokenizer.eos_token_id not in batch.completion_ids[0].tolist()
    assert batch.completion_ids[1, 2] == tokenizer.eos_token_id


def test_a_completion_that_did_not_end_gets_no_end(tokenizer):
    """One flag for each of the R completions, over prompts of several; without a text, an end."""
    ended = [True, False, True, False, False, False]
    batch = common.encode(tokenizer, PROMPTS, [*COMPLETIONS[:2], ["a", ""]], ended=ended)
    got = [ids for _, ids in sequences(batch)]
    assert [ids[-1] == tokenizer.eos_token_id for ids in got] == [*ended[:5], True]
    assert tokenizer.decode(got[1]) == "no, never" and got[5] == [tokenizer.eos_token_id]


def test_rows_keeps_each_completion_with_its_prompt(batch):
    all_rows = list(sequences(batch))
    for index in ([4], [5, 0, 3], [1, 1], [2, 4]):
        assert list(sequences(batch.rows(torch.tensor(index)))) == [all_rows[i] for i in index]


def test_micro_batches_of_whole_prompts():
    of = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3])
    ids = torch.zeros(12, 1)
    batch = common.Batch(torch.zeros(4, 1), torch.ones(4, 1), ids, ids > -1, of)
    parts = batch.split(5, whole_prompts=True)
    assert [p.tolist() for p in parts] == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11]]
    assert [len(p) for p in batch.split(4, whole_prompts=True)] == [2, 3, 2, 5]
    assert [len(p) for p in batch.split(100, whole_prompts=True)] == [12]
    assert [len(p) for p in batch.split(5)] == [5, 5, 2]


@pytest.mark.parametrize("whole", [False, True])
def test_micro_batches_hold_prompts_of_like_length(whole):
    """Two completions for each of 2, 9, 3, 8 tokens: long with long, each once, in order."""
    prompts, mask = common.pad([[7] * n for n in (2, 9, 3, 8)], "left")
    ids, completion_mask = common.pad([[5]] * 6 + [[5] * 4, [5]], "right")
    of = torch.arange(4).repeat_interleave(2)
    batch = common.Batch(prompts, mask, ids, completion_mask, of)
    parts = [mb.tolist() for mb in batch.split(4, whole_prompts=whole)]
    assert parts == [[2, 3, 6, 7], [0, 1, 4, 5]]  # 8 + 4 tokens come before 9 + 1
    assert [mb.tolist() for mb in batch.split(3, whole_prompts=whole)][:2] == (
        [[6, 7], [2, 3]] if whole else [[2, 6, 7], [3, 4, 5]]
    )
    assert [mb.tolist() for mb in batch.split(8)] == [[*range(8)]]


def test_pad_equal_to_eos_hides_no_eos():
    tokenizer = make_tokenizer(pad_is_eos=True)
    batch = common.encode(tokenizer, PROMPTS, COMPLETIONS)
    for (prompt, completion), text in zip(sequences(batch), sum(COMPLETIONS, []), strict=True):
        assert len(completion) == len(text) + 1 and completion[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id in prompt  # the template closes the user's turn with it


# --- Log-probs ------------------------------------------------------------------------------------


def slow_logps(model, prompt, completion, temperature):
    """One forward a token over the prefix, no padding, no cache."""
    out = []
    for t, token in enumerate(completion):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1]
        out.append((logits / temperature).log_softmax(-1)[token].item())
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("share", [True, False])
def test_logps_equal_a_slow_loop(kind, temperature, share, batch):
    model = make_model(kind)
    with torch.no_grad():
        logps = common.completion_logps(model, batch, temperature, share)
        for i, (prompt, completion) in enumerate(sequences(batch)):
            want = slow_logps(model, prompt, completion, temperature)
            got = logps[i, : len(want)].tolist()
            assert got == pytest.approx(want, abs=1e-4), (kind, i)
            assert (logps[i, len(want) :] == 0).all()
    assert logps.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_plain_form_equals_a_slow_loop(temperature, batch, llama):
    with torch.no_grad():
        logps = common.plain_logps(llama, batch, temperature)
        for row, (prompt, completion) in zip(logps, sequences(batch), strict=True):
            want = slow_logps(llama, prompt, completion, temperature)
            assert row[: len(want)].tolist() == pytest.approx(want, abs=1e-4)
            assert (row[len(want) :] == 0).all()
    assert logps.dtype == torch.float32 and logps.shape == batch.completion_ids.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False])
def test_the_fast_form_equals_the_plain_one(kind, share, batch):
    """In values and gradients, at a temperature."""
    weights = torch.randn(batch.completion_ids.shape, generator=torch.manual_seed(0))
    values, grads = [], []
    for form, options in ((common.plain_logps, ()), (common.completion_logps, (share,))):
        model = make_model(kind)
        logps = form(model, batch, 0.7, *options)
        (weights * logps).sum().backward()
        values.append(logps.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert torch.allclose(*values, atol=1e-5) and grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        scale = grads[0][name].abs().max()
        assert torch.allclose(grads[0][name], grads[1][name], atol=1e-4 * scale), name


def logps_of_all_logits(model, batch, temperature):
    """`completion_logps` as it is in one part: the float32 copy of all logits, and its softmax."""
    ids = batch.completion_ids
    logits = common._outputs(model, model, batch, ids.shape[1] - 1, True)
    logits = logits.flatten(0, 1).float() / temperature
    nll = torch.nn.functional.cross_entropy(logits, ids.flatten(), reduction="none")
    return (-nll).view_as(ids).masked_fill(~batch.completion_mask, 0.0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [1, 259 * 7])  # one token, and 7 of the 108 in a part
def test_logits_in_parts_give_the_same_bits(at_once, temperature, dtype, batch, monkeypatch):
    """Values and gradients; without gradients the same values."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", at_once)
    weights = torch.randn(batch.completion_ids.shape, generator=torch.manual_seed(0))
    values, grads = [], []
    for form in (logps_of_all_logits, common.completion_logps):
        model = make_model("llama")
        model.autocast_dtype = dtype
        with torch.no_grad():
            values.append(form(model, batch, temperature))
        logps = form(model, batch, temperature)
        (weights * logps).sum().backward()
        values.append(logps.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert batch.completion_mask.numel() == 108
    assert torch.equal(values[0], values[2]) and torch.equal(values[1], values[3])
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def test_the_backward_pass_keeps_no_float32_logits(batch, monkeypatch):
    """In one part two nodes keep the log-softmax; in parts the bfloat16 logits alone are kept."""
    model = make_model("llama")
    model.autocast_dtype = torch.bfloat16
    kept = []

    def note(tensor):
        if tensor.shape[-1:] == (259,) and tensor.dtype == torch.float32:
            kept.append(tensor.numel() // 259)
        return tensor

    for at_once, want in ((10**9, [108, 108]), (259 * 20, [])):
        monkeypatch.setattr(common, "LOGITS_AT_ONCE", at_once)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            common.completion_logps(model, batch)
        assert kept == want


@pytest.mark.parametrize("tokens", [1, 2048])  # each prompt in a pass of its own, and together
@pytest.mark.parametrize("kind", KINDS)
def test_shared_and_plain_prompts_have_equal_gradients(kind, tokens, batch, monkeypatch):
    monkeypatch.setattr(common, "PASS_TOKENS", tokens)
    weights = torch.randn(batch.completion_ids.shape, generator=torch.manual_seed(0))
    grads = []
    for share in (True, False):
        model = make_model(kind)
        (weights * common.completion_logps(model, batch, 0.7, share)).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name in grads[0]:
        scale = grads[1][name].abs().max()
        assert torch.allclose(grads[0][name], grads[1][name], atol=1e-4 * scale), name


def test_a_prompt_is_really_computed_once(batch, llama, monkeypatch):
    seen = []
    forward = type(llama.model).forward

    def spy(self, input_ids, **options):  # the backbone's own keyword arguments
        seen.append(input_ids.numel())
        return forward(self, input_ids, **options)

    monkeypatch.setattr(type(llama.model), "forward", spy)
    with torch.no_grad():
        common.completion_logps(llama, batch)
    # Its last token is fed by each completion, which gives the first token's log-prob
    (P, Tp), (R, Tc) = batch.prompt_ids.shape, batch.completion_ids.shape
    assert seen == [P * (Tp - 1), R * Tc]
    saved = (R - P) * (Tp - 1)
    for worth, passes in ((saved - 1, 2), (saved, 1)):  # where it does not save more, one pass
        seen.clear()
        monkeypatch.setattr(common, "WORTH_SHARING", worth)
        with torch.no_grad():
            common.completion_logps(llama, batch)
        assert len(seen) == passes


def test_prompts_of_like_length_go_through_the_model_together(llama, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "PASS_TOKENS", 100)
    call = common._call

    def spy(model, net, ids, mask, *options, **more):
        seen.append((tuple(ids.shape), int(mask.sum())))
        return call(model, net, ids, mask, *options, **more)

    monkeypatch.setattr(common, "_call", spy)
    prompts = ["x" * n for n in (3, 60, 1, 20, 18, 2)]
    assert len(common.encode_prompt(tokenizer, "")) == 19  # beside the x
    common.generate(llama, tokenizer, prompts, 1, 1)
    # 79 and 39 would be 2 * 79; 39 and 37 fit into 100, with 22 not; 22, 21 and 20 do
    assert seen == [((1, 79), 79), ((2, 39), 76), ((3, 22), 63)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_changes_nothing(kind, batch):
    model = make_model(kind)
    wide = common.Batch(
        torch.nn.functional.pad(batch.prompt_ids, (5, 0), value=7),
        torch.nn.functional.pad(batch.prompt_mask, (5, 0)),
        torch.nn.functional.pad(batch.completion_ids, (0, 6), value=9),
        torch.nn.functional.pad(batch.completion_mask, (0, 6)),
        batch.prompt_of,
    )
    junk = common.Batch(
        batch.prompt_ids.where(batch.prompt_mask, torch.tensor(11)),
        batch.prompt_mask,
        batch.completion_ids.where(batch.completion_mask, torch.tensor(13)),
        batch.completion_mask,
        batch.prompt_of,
    )
    T = batch.completion_ids.shape[1]
    with torch.no_grad():
        for share in (True, False):
            want = common.completion_logps(model, batch, share_prompts=share)
            for other in (wide, junk):
                got = common.completion_logps(model, other, share_prompts=share)
                assert torch.allclose(got[:, :T], want, atol=1e-5)
                assert (got[:, T:] == 0).all()


def test_the_first_eos_is_trained_and_nothing_after_it():
    tokenizer, model = make_tokenizer(pad_is_eos=True), make_model("llama")
    batch = common.encode(tokenizer, ["p"], [["ab", "abcdef"]])
    logps = common.completion_logps(model, batch)
    assert (logps[0] != 0).tolist() == [True] * 3 + [False] * 4  # a b EOS, then padding


def test_fixed_logps_in_any_micro_batch(batch, llama):
    want = common.completion_logps(llama, batch).detach()
    for size in (1, 2, 4, 100):
        got = common.fixed_logps(llama, batch, micro_batch_size=size)
        assert torch.allclose(got, want, atol=1e-5) and not got.requires_grad


def test_bfloat16_autocast_still_gives_float32_logps(batch):
    model = make_model("llama")
    want = common.completion_logps(model, batch)
    model.autocast_dtype = torch.bfloat16
    got = common.completion_logps(model, batch)
    assert got.dtype == torch.float32 and 0 < (got - want).abs().max() < 1.0
    # log-softmax is taken in float32: the values are not all multiples of bfloat16's steps
    assert (got.detach() != got.detach().bfloat16().float()).any()
    got.sum().backward()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_prompts_at_a_time(tokenizer, llama, monkeypatch):
    """`batch_size` of them go through the model together, and the answers keep their order."""
    sizes = []
    fill = common._fill

    def watched(model, end_ids, batch, sampling):
        sizes.append(len(batch.prompt_ids))
        return fill(model, end_ids, batch, sampling)

    monkeypatch.setattr(common, "_fill", watched)
    _, want, _ = common.generate(llama, tokenizer, PROMPTS, 2, 5, temperature=0)
    _, texts, ended = common.generate(llama, tokenizer, PROMPTS, 2, 5, temperature=0, batch_size=2)
    assert texts == want and len(ended) == 6 and sizes == [3, 2, 1]


def test_generation_casts_the_weights_once(tokenizer, monkeypatch):
    """Autocast keeps its copies until its outermost block ends; they are as large as the model."""
    model, casts = make_model("llama"), []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0] is model.lm_head.weight:
                casts.append(kwargs["dtype"])
            return func(*args, **kwargs or {})

    for dtype, want in ((torch.bfloat16, [torch.bfloat16]), (None, [])):
        casts.clear()
        model.autocast_dtype = dtype
        with Count():
            batch, _, _ = common.generate(model, tokenizer, ["p"], 1, 8, temperature=0)
        assert batch.completion_ids.shape[1] > 3 and casts == want


def test_gradient_checkpointing_changes_no_gradient(batch, tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    grads = []
    for checkpointing in (False, True):
        model = plumbing.load_model(
            AutoModelForCausalLM, tmp_path, torch.device("cpu"), checkpointing=checkpointing
        )
        common.completion_logps(model, batch).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        _, texts, _ = common.generate(model, make_tokenizer(), PROMPTS, 2, 8, temperature=0)
        grads.append(texts)
    assert torch.allclose(grads[0], grads[2], atol=1e-4 * grads[0].abs().max())
    assert grads[1] == grads[3]


def test_dropout_in_the_config_stays_off(batch, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=259, resid_pdrop=0.5)
    config.attn_pdrop = config.embd_pdrop = 0.5
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for checkpointing in (False, True):
        model = plumbing.load_model(
            AutoModelForCausalLM, tmp_path, torch.device("cpu"), checkpointing=checkpointing
        )
        first, second = (common.completion_logps(model, batch) for _ in range(2))
        assert torch.equal(first, second)


def test_scores_at_each_token_alone_and_in_a_batch(batch, llama, tmp_path):
    torch.manual_seed(1)
    config = llama.config
    model = LlamaForSequenceClassification(type(config)(**config.to_dict() | {"num_labels": 1}))
    model = model.eval()
    with torch.no_grad():
        for share in (True, False):
            scores = common.completion_scores(model, batch, share)[..., 0]
            for i, (prompt, completion) in enumerate(sequences(batch)):
                hidden = model.model(torch.tensor([prompt + completion])).last_hidden_state
                want = model.score(hidden)[0, len(prompt) :, 0]
                assert torch.allclose(scores[i, : len(want)], want, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = plumbing.load_model(AutoModelForSequenceClassification, tmp_path, torch.device("cpu"))
    with torch.no_grad():
        assert torch.allclose(common.completion_scores(again, batch)[..., 0], scores, atol=1e-5)


def test_a_missing_head_is_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="score.weight"):
        plumbing.load_model(AutoModelForSequenceClassification, tmp_path, torch.device("cpu"))


# --- Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers_generate(kind, tokenizer):
    model = make_model(kind)
    batch, texts, ended = common.generate(model, tokenizer, PROMPTS, 2, 80, temperature=0)
    for i, (_, got) in enumerate(sequences(batch)):
        ids = common.encode_prompt(tokenizer, PROMPTS[i // 2])
        want = model.generate(
            torch.tensor([ids]), max_new_tokens=80, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
        assert got == want
        assert ended[i] == (want[-1] == tokenizer.eos_token_id)
    assert batch.prompt_of.tolist() == [0, 0, 1, 1, 2, 2]


def test_rows_end_at_their_own_time_and_are_dropped(tokenizer, llama, monkeypatch):
    """Force EOS at chosen times: rows keep their own tokens, the batch shrinks, the mask fits."""
    ends, widths, t = [1, 3, 3, 9, 20, 20], [], [0]
    order = torch.arange(6)

    def sample(logits, temperature, top_p, top_k):
        nonlocal order
        widths.append(len(logits))
        if len(logits) < len(order):
            order = torch.tensor([i for i in order.tolist() if ends[i] > t[0]])
        t[0] += 1
        # each row writes its own letter until its time has come
        return torch.tensor(
            [tokenizer.eos_token_id if t[0] == ends[i] else 100 + i for i in order.tolist()]
        )

    monkeypatch.setattr(common, "_sample", sample)
    batch, _, ended = common.generate(llama, tokenizer, PROMPTS, 2, 12)
    assert batch.completion_mask.sum(1).tolist() == [1, 3, 3, 9, 12, 12]
    assert ended.tolist() == [True] * 4 + [False] * 2
    for i, (_, ids) in enumerate(sequences(batch)):
        assert set(ids[:-1]) <= {100 + i}
    assert widths[0] == 6 and widths[-1] == 2


@pytest.mark.parametrize("tokens", [64, 2048])  # of prompts in one pass
@pytest.mark.parametrize("kind", KINDS)
def test_rows_left_after_a_drop_go_on_as_if_alone(kind, tokens, tokenizer, monkeypatch):
    """Every fifth id ends a row, so that rows are dropped again and again; each must have the
    tokens of a loop over whole sequences, without batch or cache."""
    monkeypatch.setattr(common, "PASS_TOKENS", tokens)
    model, prompts = make_model(kind), [f"{n} and {'x' * (5 * n % 12)}" for n in range(12)]
    if kind == "gemma3":  # its tied weights only repeat the last token
        model.lm_head = torch.nn.Linear(32, 259, bias=False)
    model.generation_config.eos_token_id = ends = list(range(0, 259, 5))
    batch, _, ended = common.generate(model, tokenizer, prompts, 1, 24, temperature=0)
    lengths = []
    for i, (prompt, got) in enumerate(sequences(batch)):
        ids = list(prompt)
        while len(ids) - len(prompt) < 24:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] in ends or ids[-1] == tokenizer.eos_token_id:
                break
        assert list(got) == ids[len(prompt) :]
        assert ended[i] == (ids[-1] in [*ends, tokenizer.eos_token_id])
        lengths.append(len(got))
    assert len(set(lengths)) >= 4  # else nothing was dropped twice


def test_every_eos_of_the_model_ends_a_completion(tokenizer):
    model = make_model("llama")
    _, texts, _ = common.generate(model, tokenizer, ["p"], 1, 6, temperature=0)
    batch, _, _ = common.generate(model, tokenizer, ["p"], 1, 6, temperature=0)
    third = batch.completion_ids[0, 2].item()
    model.generation_config.eos_token_id = [1, third]
    batch, texts, ended = common.generate(model, tokenizer, ["p"], 1, 6, temperature=0)
    ids = batch.completion_ids[0].tolist()
    assert ids[-1] == third and third not in ids[:-1] and ended.all()


def test_the_models_own_sampling_values_are_not_used(tokenizer):
    model = make_model("llama")
    torch.manual_seed(0)
    want, _, _ = common.generate(model, tokenizer, ["p"], 64, 4)
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01, top_p=0.1)
    torch.manual_seed(0)
    got, _, _ = common.generate(model, tokenizer, ["p"], 64, 4)
    assert torch.equal(got.completion_ids, want.completion_ids)
    assert len(set(got.completion_ids[:, 0].tolist())) > 5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_distribution(tokenizer, temperature):
    model = make_model("llama")
    torch.manual_seed(0)
    batch, _, _ = common.generate(model, tokenizer, ["p"], 4000, 1, temperature)
    ids = torch.tensor([common.encode_prompt(tokenizer, "p")])
    with torch.no_grad():
        probs = (model(ids).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(batch.completion_ids[:, 0], minlength=259) / 4000
    assert (counts - probs).abs().max() < 0.04


def test_top_k_and_top_p(tokenizer):
    model = make_model("llama")
    ids = torch.tensor([common.encode_prompt(tokenizer, "p")])
    with torch.no_grad():
        probs = model(ids).logits[0, -1].softmax(-1)
    order = probs.argsort(descending=True).tolist()
    nucleus = next(k for k in range(1, 259) if probs[order[:k]].sum() >= 0.3)
    for options, allowed in (({"top_k": 3}, 3), ({"top_p": 0.3}, nucleus)):
        torch.manual_seed(0)
        batch, _, _ = common.generate(model, tokenizer, ["p"], 500, 1, **options)
        assert set(batch.completion_ids[:, 0].tolist()) == set(order[:allowed])


# --- KL -------------------------------------------------------------------------------------------


def two_softmaxes():
    g = torch.Generator().manual_seed(3)
    return torch.randn(6, generator=g).double(), torch.randn(6, generator=g).double()


def test_kl_estimates_by_enumeration():
    logits, ref = two_softmaxes()
    logp, logq = logits.log_softmax(-1), ref.log_softmax(-1)
    p = logp.exp()
    exact = (p * (logp - logq)).sum()
    assert exact > 0.1
    for kind in ("k1", "k3"):  # unbiased
        assert (p * common.kl_estimate(logp, logq, kind)).sum() == pytest.approx(exact.item())
    assert common.exact_kl(logits, ref).item() == pytest.approx(exact.item(), rel=1e-5)
    assert (common.kl_estimate(logp, logq, "k3") >= 0).all()
    assert (common.kl_estimate(logp, logq, "k2") >= 0).all()
    rare = torch.tensor([math.log(0.2)]), torch.tensor([math.log(0.1)])
    assert common.kl_estimate(*rare, "k1").item() == pytest.approx(math.log(2))
    assert common.kl_estimate(*rare, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert common.kl_estimate(*rare, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))


def test_expected_gradients_of_the_kl_estimates():
    """As losses on samples from pi: k1 none, k2 that of KL(pi||ref), k3 that of KL(ref||pi)."""
    logits, ref = two_softmaxes()
    logits.requires_grad_()
    logq = ref.log_softmax(-1)

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    logp = logits.log_softmax(-1)
    forward = gradient((logp.exp() * (logp - logq)).sum())
    logp = logits.log_softmax(-1)
    reverse = gradient((logq.exp() * (logq - logp)).sum())
    for kind, want in (("k1", torch.zeros(6)), ("k2", forward), ("k3", reverse)):
        logp = logits.log_softmax(-1)
        got = gradient((logp.detach().exp() * common.kl_estimate(logp, logq, kind)).sum())
        assert torch.allclose(got, want.double(), atol=1e-9), kind


def test_masked_mean():
    x, mask = torch.tensor([[1.0, 2, 99], [4, 99, 99]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert common.masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert common.masked_mean(x, mask, 1).tolist() == [1.5, 4.0]
    assert common.masked_mean(x, mask & False).item() == 0.0


# --- Data -----------------------------------------------------------------------------------------


def test_hold_out_splits_by_prompt():
    rows = [{"prompt": f"p{i % 50}", "n": i} for i in range(200)]
    train, test = plumbing.hold_out(rows, 5, 0)
    assert len(train) + len(test) == 200 and len({r["prompt"] for r in test}) == 5
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert plumbing.hold_out(rows, 0, 0)[1] == []


def test_chats_are_held_out_by_what_the_user_says_first():
    """Not by the system message, which all may share; turns of one conversation stay together."""

    def chat(i, *more):
        system = {"role": "system", "content": "be good"}
        return [system, {"role": "user", "content": f"p{i}"}, *more]

    later = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]
    rows = [{"messages": chat(i)} for i in range(30)]
    train, test = plumbing.hold_out(rows, 5, 0)
    assert len(train) == 27 and len(test) == 3
    rows = [{"prompt": chat(i // 2, *later * (i % 2))} for i in range(40)]
    train, test = plumbing.hold_out(rows, 2, 0)
    assert len(test) == 4 and len({row["prompt"][1]["content"] for row in test}) == 2


def test_nothing_held_out_is_said(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    args = type("", (), dict(dataset=path, eval_dataset="", eval_size=4, seed=0))
    assert plumbing.load_splits(args, plumbing.load_rows)[1] == []
    assert "none is held out" in capsys.readouterr().out


def test_an_answer_may_be_messages_that_go_on_from_the_prompt():
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    for prompt in ("q", [user]):
        for form in ("a", [answer], [user, answer]):
            assert plumbing.answer_text(form, prompt) == "a"
        system = {"role": "system", "content": "s"}
        for lost in ([system, user, answer], [answer, user, answer], [user], [user, user]):
            with pytest.raises(ValueError, match="earlier turns|last"):
                plumbing.answer_text(lost, prompt)


def test_which_answers_a_verifier_can_read():
    assert plumbing.has_answers([{"answer": "1,200"}, {"answer": -3.5}])
    for answer in ("Paris", "#### 72", None, "nan", ""):
        assert not plumbing.has_answers([{"answer": "1"}, {"answer": answer}])
    assert not plumbing.has_answers([{"answer": "1"}, {}])


def test_the_kl_from_the_start_in_parts(tokenizer, llama):
    """It is sampled `batch_size` prompts at a time; of a policy from itself it is 0, and from
    another one it is, on average over many, the enumerated KL of one token."""
    other = make_model("llama", 1)
    torch.manual_seed(0)
    kl, texts = plumbing.kl_from_start(llama, llama, tokenizer, PROMPTS, 5, 2)
    assert kl.shape == (3,) and len(texts) == 3 and kl.abs().max() < 1e-4
    kl, _ = plumbing.kl_from_start(llama, other, tokenizer, ["p"] * 3000, 1, 500)
    ids = torch.tensor([common.encode_prompt(tokenizer, "p")])
    with torch.no_grad():
        want = common.exact_kl(*(model(ids).logits[0, -1] for model in (llama, other)))
    assert kl.mean().item() == pytest.approx(want.item(), rel=0.1)


def test_a_reward_file_and_its_values(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(prompts, completions, rows):\n    return [len(c) for c in completions]")
    score = plumbing.load_reward(f"{path}:f", None)
    assert score(["p", "p"], ["abc", ""], [{}, {}]) == [3, 0]  # 0 is a value, not a lack of one


# --- Reward models --------------------------------------------------------------------------------


TURN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"


@pytest.mark.parametrize("ours", [True, False], ids=["of rm_bt.py", "of another library"])
@pytest.mark.parametrize("pad_is_eos", [True, False])
@pytest.mark.parametrize("tail", ["\n", ""])
def test_where_a_reward_model_is_read(tmp_path, ours, pad_is_eos, tail):
    """Ours at the end of turn; another library's where Transformers pools: at the last id of the
    chat template's text that is not pad. A completion that was cut off has no end, in both."""
    tokenizer = make_tokenizer(pad_is_eos=pad_is_eos)
    tokenizer.chat_template = (
        TURN + tail + "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    make_model("llama").save_pretrained(tmp_path)
    torch.manual_seed(3)
    model = plumbing.load_model(
        AutoModelForSequenceClassification, tmp_path, torch.device("cpu"), new_head=1
    )
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = tokenizer.pad_token_id
    if ours:
        model.config.reward_bias = 0.5
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    score = plumbing.load_reward("verifier", None, str(tmp_path), torch.device("cpu"))
    got = score(["q", "q"], ["yes", "yes"], [{}, {"ended": False}])
    head = tokenizer(f"[user]q<eos>{tail}[assistant]", add_special_tokens=False)["input_ids"]
    text = tokenizer("yes", add_special_tokens=False)["input_ids"]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    whole = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    if ours:
        with torch.no_grad():
            hidden = model.model(torch.tensor([head + text + [1]]))[0][0, -1]
        want = (model.score(hidden) + 0.5).item()
    else:
        want = model(torch.tensor([whole])).logits[0, 0].item()  # Transformers' own pooling
    assert got[0] == pytest.approx(want, abs=1e-4)
    with torch.no_grad():
        cut = model.score(model.model(torch.tensor([head + text]))[0][0, -1]).item()
    assert got[1] == pytest.approx(cut + 0.5 * ours, abs=1e-4)
    assert (abs(got[0] - got[1]) < 1e-4) == (pad_is_eos and not tail and not ours)


def test_a_reward_model_gets_a_pad_token_that_ends_nothing():
    for pad in ("<eos>", None, "<other>"):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>", "<other>"]})
        tokenizer.pad_token = pad
        plumbing.set_other_pad(tokenizer)
        assert tokenizer.pad_token == ("<other>" if pad == "<other>" else "<pad>")
    tokenizer = make_tokenizer(pad_is_eos=True)  # it knows of no other
    plumbing.set_other_pad(tokenizer)
    assert tokenizer.pad_token == "<eos>"


# --- Batches by hand ------------------------------------------------------------------------------


def lengths_batch(prompts, completions, of):
    """A Batch of prompts and completions of these lengths."""
    prompt_ids, prompt_mask = common.pad([[7] * n for n in prompts], "left")
    ids, mask = common.pad([[5] * n for n in completions], "right")
    return common.Batch(prompt_ids, prompt_mask, ids, mask, torch.tensor(of))


def test_pad_by_hand():
    """On the side that is asked for, with masks from lengths: an id 0 is an id like others."""
    rows = [[0, 4, 0], [0]]
    ids, mask = common.pad(rows, "left")
    assert ids[:, -1].tolist() == [0, 0] and ids[0].tolist() == [0, 4, 0]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    assert ids[1].tolist() == [0, 0, 0]
    assert ids.dtype == torch.long and mask.dtype == torch.bool
    assert common.pad([[3, 4, 5], [6], [7, 8]], "left")[0][1:].tolist() == [[6] * 3, [8, 7, 8]]
    ids, mask = common.pad([[0], [3, 4]], "right")
    assert ids[1].tolist() == [3, 4] and ids[0, 0] == 0
    assert mask.tolist() == [[True, False], [True, True]]


def test_rows_are_cut_to_the_longest_of_them():
    """Prompts, as columns on the left, and completions, on the right; each prompt is there once."""
    batch = lengths_batch([2, 6, 4], [1, 5, 2, 3], [0, 1, 2, 2])
    part = batch.rows(torch.tensor([0, 2, 3]))
    assert part.prompt_ids.shape == part.prompt_mask.shape == (2, 4)
    assert part.completion_ids.shape == part.completion_mask.shape == (3, 3)
    assert part.prompt_of.tolist() == [0, 1, 1]
    assert part.prompt_mask.sum(1).tolist() == [2, 4] and part.prompt_mask[:, -1].all()
    assert part.completion_mask.sum(1).tolist() == [1, 2, 3]
    assert (part.prompt_ids == 7).all()  # padded with each row's last id
    assert (part.completion_ids == 5).equal(part.completion_mask)


def test_split_puts_the_longest_first():
    """By the longest completion of each prompt, prompt included, and never mixing the prompts."""
    batch = lengths_batch([3, 2, 9, 3], [1, 1, 9, 1, 1, 1, 7, 1], [0, 0, 1, 1, 2, 2, 3, 3])
    # The longest of prompts 0 to 3 are 4, 11, 10 and 10 tokens
    assert [mb.tolist() for mb in batch.split(2)] == [[2, 3], [4, 5], [6, 7], [0, 1]]
    assert [mb.tolist() for mb in batch.split(4)] == [[2, 3, 4, 5], [0, 1, 6, 7]]
    parts = [mb.tolist() for mb in batch.split(4, whole_prompts=True)]
    assert parts == [[2, 3, 4, 5], [0, 1, 6, 7]]
    parts = [mb.tolist() for mb in batch.split(3, whole_prompts=True)]
    assert parts == [[2, 3], [4, 5], [6, 7], [0, 1]]


def test_split_of_prompts_with_other_numbers_of_completions():
    """One, three and two of them; the longest prompt, which comes first, is not the first one."""
    batch = lengths_batch([2, 9, 5], [1] * 6, [0, 1, 1, 1, 2, 2])
    parts = [mb.tolist() for mb in batch.split(3, whole_prompts=True)]
    assert parts == [[1, 2, 3], [0, 4, 5]]
    parts = [mb.tolist() for mb in batch.split(2, whole_prompts=True)]
    assert parts == [[1, 2, 3], [4, 5], [0]]


def test_split_goes_by_prompts_and_completions_together():
    """A long prompt with short completions comes after a short one with longer completions."""
    batch = lengths_batch([5, 1, 3], [1, 8, 1], [0, 1, 2])
    assert [mb.tolist() for mb in batch.split(1)] == [[1], [0], [2]]
    batch = lengths_batch([5, 1, 3], [1, 3, 1], [0, 1, 2])
    assert batch.split(1)[0].tolist() == [0]


def test_to_moves_every_part():
    moved = lengths_batch([2, 3], [1, 2], [0, 1]).to("meta")
    assert isinstance(moved, common.Batch)
    assert [x.device.type for x in vars(moved).values()] == ["meta"] * 5


TOKENIZERS = {
    "bytes": make_tokenizer(),
    "pad is EOS": make_tokenizer(pad_is_eos=True),
    "adds BOS": with_bos(),
    "adds EOS": with_eos(),
    "word at 0": with_word_at_zero(),
    "turns": with_turns(),
    "merges": with_merges(),
}
BY_HAND = {"turns": ("<bos>[user]{}<turn>\n[assistant]", "<turn>")}
for name in ("bytes", "pad is EOS", "adds BOS"):
    BY_HAND[name] = ("<bos>[user]{}<eos>[assistant]", "<eos>")
for name in ("adds EOS", "word at 0", "merges"):
    BY_HAND[name] = ("{}", "<eos>")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_encode_makes_by_hand(kind):
    """Ids of prompts and completions, written out, of tokenizers of every kind; no token is of
    both, and none is added."""
    tokenizer, (template, end) = TOKENIZERS[kind], BY_HAND[kind]
    prompts, texts = ["xa", "a longer one a"], [["b", "aba a"], ["bab", "", "a"]]
    batch = common.encode(tokenizer, prompts, texts)
    got = list(sequences(batch))
    want = []
    for prompt, group in zip(prompts, texts, strict=True):
        for text in group:
            ids = ids_of(tokenizer, text) + ids_of(tokenizer, end)
            want.append((ids_of(tokenizer, template.format(prompt)), ids))
    assert got == want
    assert batch.prompt_of.tolist() == [0, 0, 1, 1, 1]
    assert batch.prompt_ids.dtype == batch.completion_ids.dtype == torch.long


def test_where_encode_cuts():
    """At `max_length` tokens, prompt included: what just fits keeps its end."""
    tokenizer = make_tokenizer(chat=False)
    texts = [["ab", "abc", "abcd"], ["ab"]]
    batch = common.encode(tokenizer, ["pp", "pppp"], texts, max_length=5)
    letters, end = ids_of(tokenizer, "abcd"), [tokenizer.eos_token_id]
    want = [letters[:2] + end, letters[:3], letters[:3], letters[:1]]
    assert [ids for _, ids in sequences(batch)] == want
    ended = [False, True, False, False]
    batch = common.encode(tokenizer, ["pp", "pppp"], texts, max_length=5, ended=ended)
    want = [letters[:2], letters[:3], letters[:3], letters[:1]]
    assert [ids for _, ids in sequences(batch)] == want
    for length in (3, 4):  # no room for one token
        with pytest.raises(ValueError, match=f"4 tokens leaves no room .* in {length}"):
            common.encode(tokenizer, ["pp", "pppp"], texts, max_length=length)
    with pytest.raises(ValueError):
        common.encode(tokenizer, ["pp"], texts)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_encode_steps_makes_by_hand(kind):
    """Ids and ends of steps: each with its separator, tokenised apart, then the end of turn."""
    tokenizer, (template, end) = TOKENIZERS[kind], BY_HAND[kind]
    letters = ids_of(tokenizer, "xa")[:2] + ids_of(tokenizer, "b") + ids_of(tokenizer, "\n")
    x, a, b, newline = letters
    prompt = ids_of(tokenizer, template.format("p"))
    end = ids_of(tokenizer, end)
    got = common.encode_steps(tokenizer, "p", ["xa", "b"], "\n")
    assert got == (prompt, [x, a, newline, b, newline, *end], [2, 4])
    got = common.encode_steps(tokenizer, "p", ["xa", "b"], "")
    assert got == (prompt, [x, a, b, *end], [0, 1, 2, 3])
    got = common.encode_steps(tokenizer, "p", ["xa", "b"], "\n", close=[])
    assert got == (prompt, [x, a, newline, b, newline], [2, 4])
    got = common.encode_steps(tokenizer, "p", ["b"], "", close=[b, x])
    assert got == (prompt, [b, b, x], [0, 1, 2])
    for close in (None, [], [x]):  # nothing to read: the end of turn, and no step but its own
        assert common.encode_steps(tokenizer, "p", [], "\n", close=close) == (prompt, end, [])
        assert common.encode_steps(tokenizer, "p", [""], "", close=close)[1] == end


# --- Log-probs and scores by plain loops ----------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2048])  # each prompt in a pass of its own, and together
def test_a_prompt_of_one_token_is_shared_like_others(tokens, monkeypatch):
    """What of it comes before its last token is nothing at all."""
    monkeypatch.setattr(common, "PASS_TOKENS", tokens)
    tokenizer, model = make_tokenizer(chat=False), make_model("gpt2")
    batch = common.encode(tokenizer, ["a", "a longer prompt"], [["b", "cde"], ["fg", "h"]])
    with torch.no_grad():
        logps = common.completion_logps(model, batch)
        for row, (prompt, completion) in zip(logps, plain.unpadded(batch), strict=True):
            want = plain.token_logps(model, prompt, completion)
            assert torch.allclose(row[: len(want)], want, atol=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_fixed_logps_at_a_temperature_equal_a_plain_loop(share, batch, llama, monkeypatch):
    """In micro-batches of the size that is asked for, and with prompts shared or not."""
    calls, real = [], common.completion_logps

    def spy(model, part, temperature, share_prompts):
        calls.append((len(part.prompt_of), share_prompts))
        return real(model, part, temperature, share_prompts)

    monkeypatch.setattr(common, "completion_logps", spy)
    got = common.fixed_logps(llama, batch, 0.6, 4, share)
    assert calls == [(4, share), (2, share)]
    for row, (prompt, completion) in zip(got, plain.unpadded(batch), strict=True):
        want = plain.token_logps(llama, prompt, completion, 0.6).detach()
        assert torch.allclose(row[: len(want)], want, atol=1e-4)
        assert (row[len(want) :] == 0).all()


def scoring_model(auto_class, kind="llama", **settings):
    """A model with a head of random weights that are not small."""
    config = type(make_model(kind).config)(**make_model(kind).config.to_dict() | settings)
    torch.manual_seed(2)
    model = auto_class.from_config(config).eval()
    head = model.score if hasattr(model, "score") else model.classifier
    torch.nn.init.normal_(head.weight)
    return model


HEADS = {
    "one label": (AutoModelForSequenceClassification, "llama", dict(num_labels=1)),
    "a bias": (AutoModelForSequenceClassification, "llama", dict(num_labels=1, reward_bias=0.7)),
    "three labels": (AutoModelForTokenClassification, "llama", dict(num_labels=3)),
    "a classifier": (AutoModelForTokenClassification, "gpt2", dict(num_labels=2)),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("share", [True, False])
def test_scores_equal_a_plain_loop(name, before, share, batch):
    """The head at each completion token, or at the token before it, of heads of every kind."""
    auto_class, kind, settings = HEADS[name]
    model = scoring_model(auto_class, kind, **settings)
    for part in (batch, batch.rows(torch.tensor([2, 4]))):  # of completions of two tokens, too
        with torch.no_grad():
            scores = common.completion_scores(model, part, share, before=before)
            assert scores.shape == (*part.completion_ids.shape, settings["num_labels"])
            for row, (prompt, completion) in zip(scores, plain.unpadded(part), strict=True):
                want = plain.head_outputs(model, prompt, completion, before)
                assert torch.allclose(row[: len(want)], want, atol=1e-4)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_scores_without_gradient_in_micro_batches(size, share, batch, monkeypatch):
    """Those of `last_scores`, of whole prompts and at most so many completions at a time."""
    model = scoring_model(AutoModelForSequenceClassification, num_labels=1)
    with torch.no_grad():
        want = common.last_scores(model, batch)
    told = []
    last_scores = common.last_scores

    def watched(model, part, share_prompts):
        told.append((len(part.prompt_ids), len(part.prompt_of), share_prompts))
        return last_scores(model, part, share_prompts)

    monkeypatch.setattr(common, "last_scores", watched)
    got = common.fixed_scores(model, batch, size, share)
    assert torch.allclose(got, want, atol=1e-4) and not got.requires_grad
    assert all(prompts == 1 or rows <= size for prompts, rows, _ in told)
    assert {shared for _, _, shared in told} == {share}
    assert sum(prompts for prompts, _, _ in told) == len(batch.prompt_ids)


@pytest.mark.parametrize("share", [True, False])
def test_scores_before_completions_of_one_token(share):
    """No completion token is fed then; the value is that of the prompt's end."""
    model = scoring_model(AutoModelForSequenceClassification, num_labels=1)
    tokenizer = make_tokenizer(chat=False)
    batch = common.encode(tokenizer, ["ab", "abcde"], [["", ""], ["", ""]])
    with torch.no_grad():
        scores = common.completion_scores(model, batch, share, before=True)
        assert scores.shape == (4, 1, 1)
        for row, (prompt, completion) in zip(scores, plain.unpadded(batch), strict=True):
            want = plain.head_outputs(model, prompt, completion, before=True)
            assert torch.allclose(row, want, atol=1e-4)


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_last_scores_equal_a_plain_loop(pad_is_eos):
    """The first label at the last token of each mask, whatever the pad id is."""
    model = scoring_model(AutoModelForTokenClassification, num_labels=3, reward_bias=0.7)
    tokenizer = make_tokenizer(pad_is_eos=pad_is_eos)
    ended = [True, False, True, False, True, True]
    batch = common.encode(tokenizer, PROMPTS, COMPLETIONS, ended=ended)
    with torch.no_grad():
        for share in (True, False):
            got = common.last_scores(model, batch, share)
            want = [plain.head_outputs(model, *row)[-1, 0] for row in plain.unpadded(batch)]
            assert torch.allclose(got, torch.stack(want), atol=1e-4)


def test_bfloat16_scores_have_a_float32_head(batch):
    model = scoring_model(AutoModelForSequenceClassification, num_labels=1)
    want = common.completion_scores(model, batch).detach()
    model.autocast_dtype = torch.bfloat16
    got = common.completion_scores(model, batch).detach()
    got, want = got[batch.completion_mask], want[batch.completion_mask]
    assert got.dtype == torch.float32 and 0 < (got - want).abs().max() < 1.0
    assert (got != got.bfloat16().float()).any()


@pytest.mark.parametrize("share", [True, False])
def test_the_head_is_computed_where_it_is_read(share, batch, monkeypatch):
    """A vocabulary of logits at each prompt token would take more memory than all else."""
    model, seen = make_model("llama"), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    length = batch.completion_ids.shape[1]
    common.completion_logps(model, batch, share_prompts=share)
    assert seen == ([1, length] if share else [length])


def test_one_pass_where_prompts_are_not_shared(batch, llama, monkeypatch):
    seen = []
    hook = llama.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape))
    )
    with torch.no_grad():
        common.completion_logps(llama, batch, share_prompts=False)
        common.fixed_logps(llama, batch, 1.0, 6, share_prompts=False)
    hook.remove()
    width = batch.prompt_ids.shape[1] + batch.completion_ids.shape[1] - 1
    assert seen == [(6, width)] * 2


def test_checkpointing_computes_layers_twice_and_shares_no_prompts(batch, tmp_path):
    """Only where there is a gradient; else the model is in evaluation mode and shares."""
    make_model("llama").save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    model = plumbing.load_model(AutoModelForCausalLM, tmp_path, cpu, checkpointing=True)
    passes = []
    norm = model.model.layers[0].input_layernorm
    norm.register_forward_pre_hook(lambda *_: passes.append(model.training))
    common.completion_logps(model, batch).sum().backward()
    assert passes == [True, True]
    passes.clear()
    common.fixed_logps(model, batch, 1.0, 6)
    assert passes == [False, False]  # prompts, then completions


@pytest.mark.parametrize("types", [["linear_attention", "full_attention"], ["full_attention"]])
def test_states_that_cannot_be_repeated_are_not_shared(batch, types):
    """A recurrent layer, or one of which the cache says nothing: one pass of whole rows."""
    model, rows = make_model("llama"), []
    want = common.completion_logps(model, batch)
    hook = lambda _, inputs: rows.append(len(inputs[0]))  # noqa: E731
    model.model.embed_tokens.register_forward_pre_hook(hook)
    common.completion_logps(model, batch)
    model.config.layer_types = types
    got = common.completion_logps(model, batch)
    assert rows[0] < 6 and rows[1:] == [6, 6]  # prompts and completions; then rows alone
    assert torch.allclose(got, want, atol=1e-4)


# --- Generation by hand ---------------------------------------------------------------------------


def test_ends_texts_and_the_last_allowed_token():
    """The model ends whatever it reads at its tenth token: prompts of 3 to 8 tokens each end at
    their own time, one at the very last allowed token; that one has ended, a longer one has not."""
    tokenizer = make_tokenizer(chat=False)
    letters = ids_of(tokenizer, "abcdefghijklmnopqrst")
    said = letters.copy()
    said[9] = tokenizer.eos_token_id
    model = talking_model(said, len(tokenizer))
    prompts = ["x" * n for n in (3, 6, 8, 5, 4)]
    for limit, whole in ((8, True), (7, False)):
        batch, texts, ended = common.generate(model, tokenizer, prompts, 2, limit, temperature=0)
        got = [ids for _, ids in sequences(batch)]
        want = []
        for prompt in prompts:
            want += [said[len(prompt) - 1 : 10][:limit]] * 2
        assert got == want
        assert ended.tolist() == [whole, whole] + [True] * 8
        assert batch.prompt_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in want]
        assert texts[4:6] == ["hi"] * 2 and batch.completion_ids.shape == (10, limit)
        prompt_ids = [ids for ids, _ in sequences(batch)][::2]
        assert prompt_ids == [ids_of(tokenizer, prompt) for prompt in prompts]
    batch, _, ended = common.generate(model, tokenizer, ["xxxxxxxx"], 3, 8, temperature=0)
    assert ended.all() and batch.completion_ids.shape == (3, 3)  # it is cut to the longest


@pytest.mark.parametrize("end", ["<turn>", "<eos>", "z", "y", "<bos>"])
@pytest.mark.parametrize("listed", [True, False])
def test_what_ends_a_completion(end, listed):
    """The template's end of turn, which is not the EOS; the EOS; each id that the model's
    generation_config names, in a list or alone; no other id."""
    tokenizer = with_turns()
    z, y = ids_of(tokenizer, "zy")
    said = ids_of(tokenizer, "a" * 60)
    prompt = len(ids_of(tokenizer, "<bos>[user]p<turn>\n[assistant]"))
    said[prompt + 1] = ids_of(tokenizer, end)[0]
    model = talking_model(said, len(tokenizer))
    model.generation_config.eos_token_id = [z, y] if listed else y
    ends = {"<turn>", "<eos>", "y"} | ({"z"} if listed else set())
    batch, texts, ended = common.generate(model, tokenizer, ["p"], 1, 6, temperature=0)
    assert ended.tolist() == [end in ends]
    assert batch.completion_mask.sum().item() == (3 if end in ends else 6)
    assert texts[0].startswith("aa") and "<" not in texts[0]


def test_a_model_that_names_no_eos():
    tokenizer = make_tokenizer(chat=False)
    said = ids_of(tokenizer, "a" * 20)
    said[5] = tokenizer.eos_token_id
    model = talking_model(said, len(tokenizer), eos=None)
    model.generation_config.eos_token_id = None
    batch, texts, ended = common.generate(model, tokenizer, ["xxx"], 1, 9, temperature=0)
    assert ended.tolist() == [True] and texts == ["aaa"]


def test_the_word_at_id_zero_is_generated_like_others():
    tokenizer = with_word_at_zero()
    said = ids_of(tokenizer, "aaaaabaaaaaaaaaaaaaa")
    assert said[0] == 0
    said[8] = tokenizer.eos_token_id
    model = talking_model(said, len(tokenizer))
    batch, texts, ended = common.generate(model, tokenizer, ["a", "aaaa"], 1, 12, temperature=0)
    assert texts == ["aaaaabaa", "aabaa"] and ended.all()
    assert [ids for _, ids in sequences(batch)] == [said[:9], said[3:9]]
    with torch.no_grad():
        logps = common.completion_logps(model, batch)
    assert (logps != 0).equal(batch.completion_mask)


@pytest.mark.parametrize("kind", ["adds BOS", "adds EOS", "turns"])
def test_prompts_are_generated_from_as_they_are_trained_on(kind):
    """A prompt has the same ids in `generate` as in `encode`: one BOS at most, and no EOS last."""
    tokenizer, (template, _) = TOKENIZERS[kind], BY_HAND[kind]
    model = talking_model(ids_of(tokenizer, "a" * 60), len(tokenizer))
    batch, _, _ = common.generate(model, tokenizer, ["pq", "r"], 1, 3, temperature=0)
    got = [prompt for prompt, _ in sequences(batch)]
    assert got == [ids_of(tokenizer, template.format(prompt)) for prompt in ("pq", "r")]
    assert max(prompt.count(2) for prompt in got) <= 1


def test_rows_are_dropped_when_a_quarter_has_ended():
    """Of eight rows, one that ends stays in the batch, two do not; no gradient is kept, and only
    the last token's logits are made."""
    tokenizer = make_tokenizer(chat=False)
    said = ids_of(tokenizer, "abcdefghijklmnopqrst")
    said[10] = tokenizer.eos_token_id
    model = talking_model(said, len(tokenizer))
    rows, logits = [], []
    model.transformer.wte.register_forward_pre_hook(lambda _, x: rows.append(tuple(x[0].shape)))
    model.lm_head.register_forward_pre_hook(
        lambda _, x: logits.append((x[0].shape[1], torch.is_grad_enabled()))
    )
    prompts = ["x" * n for n in (11, 10, 9, 9, 8, 8, 8, 8)]  # of each the 12th token ends it
    common.generate(model, tokenizer, prompts, 1, 9, temperature=0)
    assert rows == [(8, 11), (8, 1), (6, 1), (4, 1)]
    assert set(logits) == {(1, False)}
    rows.clear()
    common.generate(model, tokenizer, prompts, 1, 2, temperature=0)
    assert rows == [(8, 11), (8, 1)]  # the last token is not fed


def test_broken_weights_are_said(tokenizer):
    model = make_model("llama")
    model.lm_head.weight.data[5, 5] = float("nan")
    with pytest.raises(ValueError, match="logits are nan"):
        common.generate(model, tokenizer, ["p"], 1, 4)


def nucleus(probs, share):
    """The fewest of the likeliest ids that have this share, with their probabilities among them."""
    order, total, chosen = probs.argsort(descending=True).tolist(), 0.0, {}
    for i in order:
        chosen[i] = probs[i].item()
        total += chosen[i]
        if total >= share:
            break
    return {i: p / total for i, p in chosen.items()}


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(0.5, 0, 0.9), (2.0, 0, 0.5), (2.0, 8, 0.7), (1.5, 5, 1.0)]
)
def test_temperature_then_top_k_then_top_p(tokenizer, llama, temperature, top_k, top_p):
    """Each acts on what the one before has left, made to sum to one again."""
    with torch.no_grad():
        logits = llama(torch.tensor([common.encode_prompt(tokenizer, "p")])).logits[0, -1]
    probs = (logits / temperature).softmax(-1)
    if top_k:
        kept = probs.argsort(descending=True)[:top_k]
        probs = torch.zeros_like(probs).index_copy(0, kept, probs[kept] / probs[kept].sum())
    want = nucleus(probs, min(top_p, 0.999999))
    torch.manual_seed(0)
    n = 3000
    batch, _, _ = common.generate(llama, tokenizer, ["p"], n, 1, temperature, top_p, top_k)
    counts = torch.bincount(batch.completion_ids[:, 0], minlength=259) / n
    assert set(counts.nonzero()[:, 0].tolist()) <= set(want)
    for i, p in want.items():
        assert counts[i].item() == pytest.approx(p, abs=0.04)


# --- KL and means by hand -------------------------------------------------------------------------


def test_exact_kl_of_many_positions_and_in_float32():
    """The last dimension is the vocabulary; logits of a coarse type do not make a coarse KL."""
    one = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    other = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    want = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.25 * math.log(0.5) + 0.75 * math.log(1.5)]
    assert common.exact_kl(one, other).tolist() == pytest.approx(want, rel=1e-5)
    coarse, start = torch.randn(7, 50).bfloat16(), torch.randn(7, 50).bfloat16()
    got = common.exact_kl(coarse, start)
    assert got.dtype == torch.float32
    assert torch.allclose(got, common.exact_kl(coarse.double(), start.double()), atol=1e-5)


def test_kl_estimates_keep_their_shape_and_a_small_k3_its_digits():
    logps, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    assert common.kl_estimate(logps, ref, "k1").tolist() == [[0.5, -1.0]]
    assert common.kl_estimate(logps, ref, "k2").tolist() == [[0.125, 0.5]]
    want = [[math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1]]
    assert common.kl_estimate(logps, ref, "k3")[0].tolist() == pytest.approx(want[0], rel=1e-5)
    near = torch.tensor([-1.0]), torch.tensor([-1.0 + 2.0**-12])
    assert common.kl_estimate(*near, "k3").item() == pytest.approx(2.0**-25, rel=0.1)
    with pytest.raises(ValueError, match="'k4': k1, k2 or k3"):
        common.kl_estimate(logps, ref, "k4")


def test_masked_mean_of_rows_and_columns():
    x = torch.tensor([[1.0, 2, 9], [4, 9, 9], [9, 9, 9]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert common.masked_mean(x, mask, 0).tolist() == [2.5, 2.0, 0.0]
    assert common.masked_mean(x, mask, 1).tolist() == [1.5, 4.0, 0.0]
    assert common.masked_mean(-x, mask).item() == pytest.approx(-7 / 3)


def test_an_end_of_turn_may_be_an_added_token_that_is_not_special():
    """As a fine-tune may have added it: completions end with it, and so does generation."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<turn>"])
    end = tokenizer.convert_tokens_to_ids("<turn>")
    assert end not in tokenizer.all_special_ids
    template = tokenizer.chat_template
    for ending in ("<turn>\n", "<turn>a", "a<turn>"):  # what is no added token is passed over
        tokenizer.chat_template = template.replace("{{ eos_token }}", ending)
        assert common.end_of_turn(tokenizer) == end
    tokenizer.chat_template = template.replace("{{ eos_token }}", "<turn>\n")
    batch = common.encode(tokenizer, ["ab"], [["cd"]])
    assert batch.completion_ids[0, -1] == end
