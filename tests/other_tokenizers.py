"""Tokenizers of special kinds, and a model that says what it is told to, for the tests.

What real tokenizers do and the plain byte tokenizer of conftest.py does not: add a BOS or an EOS
by themselves, have a word at id 0, end a turn with an id that is not the EOS, merge letters.
"""

import torch
from conftest import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def ids_of(tokenizer, text):
    """Ids of a text in which the special tokens are written out; nothing is added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def with_bos():
    """It adds a BOS by itself, as Llama 3's does, and its template writes one too."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def with_eos():
    """It has no template and closes every text with an EOS, as T5's does."""
    tokenizer = make_tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def with_turns(pad="<pad>", after="\n"):
    """Its template ends a turn with <turn>, an id that is not the EOS, and writes `after` then."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "<turn>" + after)
    tokenizer.pad_token = pad
    return tokenizer


def from_vocabulary(words, merges, pad):
    """A byte tokenizer of these words, without a template."""
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token="<eos>", bos_token="<bos>"
    )


def with_word_at_zero():
    """The letter a has id 0, and the pad token is the EOS."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"a"})
    return from_vocabulary(["a", "<eos>", "<bos>", *letters], [], "<eos>")


def with_merges():
    """The letters a and b, one after the other, are one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return from_vocabulary(["<pad>", "<eos>", "<bos>", *letters, "ab"], [("a", "b")], "<pad>")


def talking_model(said, vocabulary, eos=1):
    """A GPT-2 whose most likely token after n tokens, whatever they are, is said[n - 1]; it has
    about one chance in six at temperature 1, so that a sample is seldom what is said."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=4, n_positions=64, vocab_size=vocabulary, bos_token_id=2,
        eos_token_id=eos, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if "wte" in name or "c_proj" in name:
            parameter.data.zero_()  # so that the hidden state is of the position alone
    with torch.no_grad():
        hidden = model.transformer.ln_f(model.transformer.wpe.weight[: len(said)])
        wanted = torch.nn.functional.one_hot(torch.tensor(said), vocabulary) * 4.0
        model.lm_head.weight.copy_((torch.linalg.pinv(hidden) @ wanted).T)
    return model
