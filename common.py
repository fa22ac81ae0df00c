"""What all scripts share: batches of prompts and completions, generation, log-probs, scores and KL.

One layout serves every chapter of the book. A batch is P prompts, each with a group of completions,
R completions in all. Prompts are padded on the left and completions on the right, so that a prompt
ends where each of its completions begins, and is computed once for all of them.

This file stands alone: it imports torch and transformers and nothing else. Its functions raise
ValueError where an input cannot be used.

Shapes: P prompts, R completions, Tp and Tc tokens of the longest prompt and completion, V tokens in
the vocabulary.
"""

import contextlib
import functools
import inspect
import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from torch.nn.functional import pad as pad_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer

# --- Batches --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """P prompts and the R completions that belong to them."""

    prompt_ids: torch.Tensor  # (P, Tp) long, left-padded
    prompt_mask: torch.Tensor  # (P, Tp) bool
    completion_ids: torch.Tensor  # (R, Tc) long, right-padded
    completion_mask: torch.Tensor  # (R, Tc) bool, True through the EOS, and only there
    prompt_of: torch.Tensor  # (R,) long, the prompt of each completion; when made: 0 0 0 1 1 1

    def rows(self, index):
        """Select completions with their prompts, and cut the padding that none of them needs.

        index: long tensor of completions -> Batch, its completions in the order of `index`.
        """
        prompts, prompt_of = self.prompt_of[index].unique(return_inverse=True)
        prompt_mask = self.prompt_mask[prompts]
        completion_mask = self.completion_mask[index]
        Tp = int(prompt_mask.sum(1).max())
        Tc = int(completion_mask.sum(1).max())
        return Batch(
            prompt_ids=self.prompt_ids[prompts][:, -Tp:],
            prompt_mask=prompt_mask[:, -Tp:],
            completion_ids=self.completion_ids[index][:, :Tc],
            completion_mask=completion_mask[:, :Tc],
            prompt_of=prompt_of,
        )

    def split(self, size, whole_prompts=False):
        """Divide the completions into micro-batches -> list of index tensors for `rows`.

        Prompts whose longest row (prompt and completion) is long go first, so that rows of like
        length share a micro-batch, and a lack of memory shows at once.
        size: completions per micro-batch; with several processes some are divided, so that each
        process gets as many as the others. whole_prompts: never divide the completions of one
        prompt; a prompt that has more than `size` of them is a micro-batch of its own.
        """
        prompt_lengths = self.prompt_mask.sum(1)
        row_lengths = prompt_lengths[self.prompt_of] + self.completion_mask.sum(1)
        longest = torch.zeros_like(prompt_lengths)
        longest = longest.scatter_reduce(0, self.prompt_of, row_lengths, "amax")[self.prompt_of]
        # Sort by falling length, and within one length by prompt
        order = (self.prompt_of - longest * len(prompt_lengths)).argsort()
        if whole_prompts:
            _, counts = self.prompt_of[order].unique_consecutive(return_counts=True)
            parts = _divide_for_processes(order.split(_pack(counts.tolist(), size)), self.prompt_of)
        else:
            parts = _divide_for_processes(order.split(size))
        return [part.sort().values for part in parts]  # completions of one prompt stay together

    def to(self, device):
        """The same batch on `device`."""
        return Batch(
            self.prompt_ids.to(device),
            self.prompt_mask.to(device),
            self.completion_ids.to(device),
            self.completion_mask.to(device),
            self.prompt_of.to(device),
        )


def _pack(counts, size):
    """Put neighbouring groups together while they have at most `size` members -> list of sizes."""
    sizes = []
    for count in counts:
        if sizes and sizes[-1] + count <= size:
            sizes[-1] += count
        else:
            sizes.append(count)
    return sizes


def pad(rows, side):
    """Lists of ids -> ids (N, T) long, mask (N, T) bool, padded on "left" or "right".

    The mask is made from lengths, never from `ids != pad`: many tokenizers use one id for pad and
    EOS, and such a mask would hide the EOS.
    """
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(row, dtype=torch.bool) for row in ids]
    padded = pad_sequence(ids, batch_first=True, padding_side=side)
    mask = pad_sequence(masks, batch_first=True, padding_side=side)
    if side == "left":
        # With each row's last id: the embedding of id 0 may be zeros, whose norm has no gradient
        # (Gemma 3n)
        padded = torch.where(mask, padded, padded[:, -1:])
    return padded, mask


# --- Several processes ----------------------------------------------------------------------------
# Under torchrun, every process runs the same program on the same rows and holds the whole of each
# step. Only what goes through a model is dealt out, and put together at once: advantages, means and
# metrics need no change, and are those of one process.


def process():
    """Number of this process, and how many there are -> (int, int); (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def deal_out(parts, sharded=False):
    """A list, such as that of all micro-batches -> list of those that are this process's.

    A sharded model has to be called equally often in all processes: of parts too many, each is
    joined to the one before it. Raises ValueError where there are fewer parts than processes.
    """
    number, count = process()
    if sharded and len(parts) < count:
        raise ValueError(
            f"--shard: {len(parts)} micro-batches cannot be dealt out to {count} processes: choose "
            "a number of rows whose last step has at least one for each."
        )
    if sharded:
        parts = list(parts)
        for i in range(len(parts) % count):
            last = len(parts) - 1 - i  # none is joined twice
            joined = torch.cat(parts[last - 1 : last + 1])
            parts[last - 1 : last + 1] = [joined.sort().values]
    return parts[number::count]


def micro_batches(index, size):
    """Index tensor (N,) -> list of parts of at most `size`; see `_divide_for_processes`."""
    return _divide_for_processes(index.split(size))


def _divide_for_processes(parts, prompt_of=None):
    """Divide micro-batches until all processes get equally many -> list of parts.

    They are halved, the largest first; where all are of one member, some processes get one more.
    prompt_of: the prompt of each completion, where those of one prompt are one member.
    """
    count = process()[1]
    parts = list(parts)
    while len(parts) % count:
        members = parts
        if prompt_of is not None:
            members = [prompt_of[part].unique_consecutive() for part in parts]
        sizes = [len(one) for one in members]
        i = sizes.index(max(sizes))
        if sizes[i] == 1:
            break
        cut = sizes[i] // 2
        if prompt_of is not None:
            cut = int((prompt_of[parts[i]] == members[i][cut]).nonzero()[0])
        parts[i : i + 1] = [parts[i][:cut], parts[i][cut:]]
    return parts


def add_up(tensor):
    """Add the tensors of all processes, in place -> the same tensor, now equal in all of them."""
    if process()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def add_up_gradients(model):
    """Add the gradients of all processes: each has those of its own micro-batches."""
    count = process()[1]
    if count == 1:
        return
    for parameter in model.parameters():
        if hasattr(parameter, "full_tensor"):  # sharded: their mean is there already
            if parameter.grad is not None:
                parameter.grad *= count
        elif parameter.requires_grad:
            if parameter.grad is None:  # such as that of an expert which no token here has met
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


@contextlib.contextmanager
def whole(model):
    """Inside, a sharded model is whole in every process: for passes without gradient.

    Each process may then call it as often as it likes. Other models are whole as they are.
    """
    parts = []
    if getattr(model, "sharded", False):
        parts = [module for module in model.modules() if hasattr(module, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def gather(values):
    """Lists of all processes, in the order of these -> one list in all of them."""
    count = process()[1]
    if count == 1:
        return values
    lists = [None] * count
    dist.all_gather_object(lists, values)
    return list(itertools.chain.from_iterable(lists))


@contextlib.contextmanager
def _own_seed(temperature, device):
    """Inside, each process draws numbers of its own; after it, the generators are equal again."""
    number, count = process()
    if count == 1 or temperature == 0:  # greedy completions draw nothing
        yield
        return
    seed = int(torch.randint(2**62, ())) + number
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


# --- From text to tokens --------------------------------------------------------------------------


@dataclass
class Turns:
    """What a chat template writes around texts, and the id that ends an answer."""

    before: str  # before the text of a first user
    opening: str  # between the user's text and the answer: where an answer begins
    ending: str  # after an answer: the end of turn and perhaps a newline
    ending_ids: list
    end: int  # the id that ends an answer: see `end_of_turn`
    wants_parts: bool  # a content has to be a list of parts: a text would vanish


def turns_of(tokenizer):
    """Turns of the tokenizer's chat template; without a template all texts are empty."""
    # The cache tells tokenizers apart by identity: what may be set on one later is part of the key
    key = (str(tokenizer.chat_template), tokenizer.bos_token, tokenizer.eos_token)
    return _turns_of(tokenizer, *key, len(tokenizer))


@functools.lru_cache(maxsize=16)
def _turns_of(tokenizer, *_):
    if not tokenizer.chat_template:
        return Turns("", "", "", [], tokenizer.eos_token_id, False)
    user = [{"role": "user", "content": "@@"}]
    wants_parts = _wants_parts(tokenizer, user)
    before, _, opening = _render(tokenizer, user, None, wants_parts).rpartition("@@")
    answer = {"role": "assistant", "content": "@@"}
    question = [{"role": "user", "content": "?"}]
    _, found, ending = _render(tokenizer, question, answer, wants_parts).rpartition("@@")
    if not found:
        raise ValueError("The chat template leaves out what a message of role assistant says.")
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
    return Turns(before, opening, ending, ids, _end_in(tokenizer, ids), wants_parts)


def _wants_parts(tokenizer, user):
    """Whether the template wants contents as lists of parts: a text would vanish, or be refused."""
    texts = []
    for wants_parts in (False, True):
        # A template that wants parts drops a text, or fails at it
        with contextlib.suppress(ValueError):
            texts.append(_render(tokenizer, user, None, wants_parts))
            if "@@" in texts[-1]:
                return wants_parts
    if not texts:
        _render(tokenizer, user, None, wants_parts=False)  # raises
    raise ValueError("The chat template leaves out what a message of role user says.")


def _end_in(tokenizer, ids):
    """Ids after an answer -> the one that ends it: see `end_of_turn`."""
    is_special = [token in tokenizer.added_tokens_decoder for token in ids]
    written = [token for token in ids if tokenizer.decode([token]).strip()]
    if any(is_special):
        first = is_special.index(True)
        last = first
        while last < len(ids) and is_special[last]:
            last += 1
        # Cohere's templates end an answer with one special token, and the turn with the EOS
        if tokenizer.eos_token_id in ids[first:last]:
            return tokenizer.eos_token_id
        return ids[first]
    if len(written) == 1:
        return written[0]
    return tokenizer.eos_token_id


def content_text(content):
    """Content of a message: a text, a list of text parts, or None -> text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"The content {str(content)[:80]!r} is no text.")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(f"The content has a part that is no text: {str(part)[:80]}.")
        texts.append(text)
    return "".join(texts)


def _render(tokenizer, prompt, answer, wants_parts):
    """The template's text of a prompt, up to where an answer begins, or of prompt and answer.

    The first message of a prompt may hold `tools`. Keys without a value are left out, as data sets
    fill them in where other rows have them.
    """
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    tools = chat[0].get("tools") if chat else None
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    if answer is not None:
        chat = [*chat, answer]
    messages = []
    for message in chat:
        kept = {key: value for key, value in message.items() if value is not None}
        kept.pop("tools", None)
        kept["content"] = content_text(message.get("content"))
        if wants_parts:
            kept["content"] = [{"type": "text", "text": kept["content"]}]
        messages.append(kept)
    begin = answer is None
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=begin, tokenize=False
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"The chat template refuses {str(chat)[:80]} ({reason}).") from error


def is_rendered(tokenizer, prompt):
    """Whether a text already went through the template: it holds the turns of user and answer."""
    turns = turns_of(tokenizer)
    opening = turns.opening.partition("<think>")[0].strip()
    if not opening or not isinstance(prompt, str):
        return False
    user = turns.before.removeprefix(tokenizer.bos_token or "").strip().rpartition("\n")[2]
    return user in prompt and opening in prompt


def prompt_text(tokenizer, prompt):
    """Text or list of chat messages -> text, up to where the completion begins."""
    if not tokenizer.chat_template:
        if not isinstance(prompt, str):
            raise ValueError(
                "The prompts are chat messages, but the tokenizer has no chat template: use plain "
                "text."
            )
        return prompt
    turns = turns_of(tokenizer)
    if not is_rendered(tokenizer, prompt):
        return _render(tokenizer, prompt, None, turns.wants_parts)
    bos = tokenizer.bos_token or ""
    if turns.before.startswith(bos):
        return bos + prompt.removeprefix(bos)
    return prompt


def conversation_text(tokenizer, prompt, answer, ended=True):
    """A prompt and its answer (a text, or a message) -> text, with the template's ending.

    ended: False where the answer was cut off, and nothing comes after it.
    """
    turns = turns_of(tokenizer)
    if tokenizer.chat_template and not is_rendered(tokenizer, prompt):
        text = _render(tokenizer, prompt, answer, turns.wants_parts)
    else:
        text = prompt_text(tokenizer, prompt) + _text_of(answer) + turns.ending
    return text if ended else text.removesuffix(turns.ending)


def _text_of(answer):
    """Text of an answer, which is a text or a message."""
    return answer if isinstance(answer, str) else content_text(answer.get("content"))


def text_ids(tokenizer, text):
    """Ids of a whole text. The template has written the BOS: a second one must not come."""
    if tokenizer.chat_template:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id]:
        return ids[:-1]  # some tokenizers close every text with the EOS
    return ids


def _ids_behind(tokenizer, text):
    """Ids of a text that goes on from another one.

    SentencePiece puts a space before a text that stands alone: it is tokenised after a newline.
    """
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not alone or not tokenizer.convert_ids_to_tokens(alone[0]).startswith(("\u2581", "\u0120")):
        return alone
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    joint = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    if joint[: len(newline)] == newline:
        return joint[len(newline) :]
    return alone


def encode_prompt(tokenizer, prompt):
    """Text or list of chat messages -> list of token ids, up to where the completion begins.

    With a chat template, a text is one user message, if it is not rendered already. Without one, a
    text is taken as it is. The first message of a list may hold `tools`.
    Raises ValueError where the template refuses the messages, or where there is no template.
    """
    return text_ids(tokenizer, prompt_text(tokenizer, prompt))


def after_answer(tokenizer):
    """Ids that the chat template puts after an answer: the end of turn and perhaps a newline."""
    return turns_of(tokenizer).ending_ids


def end_of_turn(tokenizer):
    """Id that closes a completion: the first special token of `after_answer`, or the EOS where that
    is among the special tokens right after it; without a special token the only token that is not
    blank; else the EOS."""
    return turns_of(tokenizer).end


def _without_end(tokenizer, answer):
    """An answer (a text or a message) without an end of turn that its text already has."""
    text = _text_of(answer)
    turns = turns_of(tokenizer)
    for mark in (turns.ending.strip(), tokenizer.decode([turns.end]), tokenizer.eos_token):
        if mark and text.rstrip().endswith(mark):
            text = text.rstrip().removesuffix(mark)
    return text if isinstance(answer, str) else answer | {"content": text}


def encode_answers(tokenizer, prompt, answers, ended=None):
    """A prompt and its answers (texts, or messages) -> prompt ids, list of completion ids.

    The template renders the whole conversation, which is tokenised once: a completion is what
    follows the prompt's ids, through the end of turn. Where a token spans the border between the
    two, the text after the prompt is tokenised on its own. Where the rendering does not begin with
    the prompt's, or has lost a part of the answer (a chain of thought), the answer's own text is
    tokenised.
    ended: a bool for each answer, False where the policy was cut off and wrote no end.
    """
    turns = turns_of(tokenizer)
    begin = prompt_text(tokenizer, prompt)
    prompt_ids = text_ids(tokenizer, begin)
    rows = []
    for i, given in enumerate(answers):
        answer = _without_end(tokenizer, given)
        has_end = ended is None or bool(ended[i])
        with_ending = has_end and turns.end in turns.ending_ids
        text = conversation_text(tokenizer, prompt, answer, with_ending)
        rest = text.removeprefix(begin)
        if not text.startswith(begin) or not _holds(rest, _text_of(answer), has_end):
            row = _ids_behind(tokenizer, _behind_think(begin, _text_of(answer)))
            with_ending = False
        else:
            row = text_ids(tokenizer, text)
            if row[: len(prompt_ids)] == prompt_ids:
                row = row[len(prompt_ids) :]
            else:
                row = _ids_behind(tokenizer, rest)
        if with_ending:  # without the newline that some templates put after it
            row = row[: len(row) - row[::-1].index(turns.end)]
        elif has_end or not row:
            row = [*row, turns.end]
        rows.append(row)
    return prompt_ids, rows


def _holds(rest, answer, has_end):
    """Whether a rendering holds an answer, but for white space; where it was cut off, as it is."""
    if not has_end:
        return rest.startswith(answer)
    return "".join(answer.split()) in "".join(rest.split())


def _behind_think(begin, answer):
    """An answer without its <think> where the prompt has opened that block."""
    if begin.rstrip().endswith("<think>") and answer.lstrip().startswith("<think>"):
        return answer.lstrip().removeprefix("<think>").lstrip("\n")
    return answer


def encode(tokenizer, prompts, completions, max_length=None, ended=None):
    """P prompts (texts or chats), and for each of them a list of completion texts -> Batch.

    The ids are those of `encode_answers`. Each completion gets the end of turn, except where
    `max_length` tokens (prompt included) cut it, or where `ended` (R booleans) is False: there the
    policy was cut off and wrote no end.
    Raises ValueError where a prompt fills max_length.
    """
    prompt_rows = []
    completion_rows = []
    prompt_of = []
    for i, (prompt, texts) in enumerate(zip(prompts, completions, strict=True)):
        first = len(completion_rows)
        of_these = None if ended is None else ended[first : first + len(texts)]
        prompt_row, rows = encode_answers(tokenizer, prompt, texts, of_these)
        room = None if max_length is None else max_length - len(prompt_row)
        if room is not None and room <= 0:
            raise ValueError(
                f"A prompt of {len(prompt_row)} tokens leaves no room for a completion in "
                f"{max_length} tokens."
            )
        prompt_rows.append(prompt_row)
        completion_rows += [row[:room] for row in rows]
        prompt_of += [i] * len(rows)
    return Batch(*pad(prompt_rows, "left"), *pad(completion_rows, "right"), torch.tensor(prompt_of))


def encode_steps(tokenizer, prompt, steps, separator, close=None):
    """A prompt and the texts of its solution's steps -> prompt ids, completion ids, step ends.

    The end of a step is the place, in the completion, of the last token of its separator. Steps are
    tokenised apart, so that no token belongs to two of them. Without a separator every token is a
    step, and one text has the ids of `encode_answers`.
    close: ids to put after the last step, [] where it was cut off; None: the end of turn.
    """
    has_end = close is None
    if not separator and len(steps) == 1:
        prompt_ids, [ids] = encode_answers(tokenizer, prompt, steps, [has_end])
        if steps[0] and not has_end:
            ids = ids + close
        return prompt_ids, ids, list(range(len(ids)))
    ids = []
    ends = []
    for text in steps:
        ids += _ids_behind(tokenizer, text + separator)
        ends.append(len(ids) - 1)
    if has_end or not ids:
        ids.append(end_of_turn(tokenizer))
    else:
        ids += close
    if not separator:
        ends = list(range(len(ids)))
    return encode_prompt(tokenizer, prompt), ids, ends


# --- One forward pass -----------------------------------------------------------------------------


def _autocast(model):
    dtype = getattr(model, "autocast_dtype", None)  # set by load_model
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype)


def _call(model, net, ids, mask, cache=None, keep=0):
    """Outputs of `net` (the model, or its backbone) on ids (N, T) that follow those in the cache.

    mask (N, T + cached tokens). keep: compute logits for this many last tokens only; 0: for all.
    """
    if getattr(model, "recompute", False):
        # In eval mode layers do not recompute, in train mode they fill no cache
        model.train(torch.is_grad_enabled())
    # Positions count the real tokens, so that left padding changes nothing
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options = {}
    if net is model:
        options["logits_to_keep"] = keep
    attention_mask = mask.long()
    if cache is not None and ids.shape[1] == 1:
        kinds = {type(layer).__name__ for layer in cache.layers}
        if kinds == {"LinearAttentionLayer"}:
            attention_mask = None  # a model without attention would mask the new token's state
    # Releases of transformers 5 differ in the name of this argument
    known = inspect.signature(net.forward).parameters
    names = [name for name in ("cache", "cache_params") if name in known]
    cache_name = names[0] if names else "past_key_values"
    options[cache_name] = cache
    with _autocast(model):
        return net(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=cache is not None,
            **options,
        )[0]


# --- A prompt is computed once for all of its completions -----------------------------------------

WORTH_SHARING = 200  # sharing needs a second pass, which costs about as much as this many tokens
PASS_TOKENS = 2048  # prompt tokens in one pass: more would take memory and not be faster


def _keeps_keys_only(model):
    """Whether the model's memory of a prompt is the keys and values of its tokens.

    Recurrent and convolution states (Mamba, Qwen3.5, LFM2 ...) are those of the last token: they
    cannot be joined from several passes, and are not extended by several tokens at once.
    """
    layers = transformers.DynamicCache(config=model.config).layers
    plain = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # Dummy: shares another's
    all_known = len(layers) >= model.config.get_text_config().num_hidden_layers
    return all_known and {type(layer).__name__ for layer in layers} <= plain


def _prompt_cache(model, net, batch, num_tokens):
    """Compute the first `num_tokens` columns of the prompts once.

    -> cache with one row for each completion (R), and the outputs at the last column (R, .).
    """
    ids = batch.prompt_ids[:, :num_tokens]
    mask = batch.prompt_mask[:, :num_tokens]
    lengths = mask.sum(1).clamp(min=1).tolist()

    # 1. Plan: prompts of like length share a pass. In one pass of all, most would be padding.
    if _keeps_keys_only(model):
        passes = _plan_passes(lengths)
    else:
        passes = [_longest_first(lengths)]

    # 2. Compute: one forward for each pass, without the columns that are padding in all of it
    caches = []
    outputs = []
    for prompts in passes:
        cache = transformers.DynamicCache(config=model.config)
        # The first pass, of the longest prompts, has all columns: the others are padded to it
        start = num_tokens - lengths[prompts[0]] if caches else 0
        rows = torch.tensor(prompts, device=ids.device)
        output = _call(model, net, ids[rows, start:], mask[rows, start:], cache, keep=1)
        caches.append(cache)
        outputs.append(output[:, -1])

    # 3. Join: the keys and values of all passes, padded on the left to the longest
    joined = caches[0]
    for i, layer in enumerate(joined.layers):
        if len(caches) > 1 and layer.is_initialized and layer.keys is not None:
            layer.keys = _join([cache.layers[i].keys for cache in caches])
            layer.values = _join([cache.layers[i].values for cache in caches])

    # 4. Repeat: from the order of the passes to that of the prompts, one copy for each completion
    order = torch.cat([torch.tensor(prompts, device=ids.device) for prompts in passes])
    place = order.argsort()[batch.prompt_of]  # argsort of a permutation is its inverse
    joined.reorder_cache(place)  # batch_select_indices has a far slower backward
    return joined, torch.cat(outputs)[place]


def _longest_first(lengths):
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _plan_passes(lengths):
    """Lengths of prompts -> lists of prompts, the longest first, that share a forward pass."""
    passes = []
    for i in _longest_first(lengths):
        if passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= PASS_TOKENS:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes


def _join(parts):
    """Keys or values (N, heads, T, size) of passes, T falling -> one tensor, padded on the left."""
    longest = parts[0].shape[2]
    padded = [parts[0]]
    for part in parts[1:]:
        padded.append(pad_tensor(part, (0, 0, longest - part.shape[2], 0)))
    return torch.cat(padded)


def _outputs(model, net, batch, num_tokens, share_prompts):
    """Outputs of `net` at the last token of the prompts and at the first `num_tokens` tokens of the
    completions -> (R, 1 + num_tokens, .)."""
    before = batch.prompt_ids.shape[1] - 1  # the last prompt token predicts the first of each row
    ids = torch.cat(
        [batch.prompt_ids[batch.prompt_of], batch.completion_ids[:, :num_tokens]], dim=1
    )
    mask = torch.cat(
        [batch.prompt_mask[batch.prompt_of], batch.completion_mask[:, :num_tokens]], dim=1
    )
    saved_tokens = (len(batch.prompt_of) - len(batch.prompt_ids)) * before
    # Recomputing activations in the backward pass allows no cache. A sharded model has to be called
    # equally often in all processes, and these may have prompts of other lengths.
    forbidden = getattr(model, "recompute", False) or getattr(model, "sharded", False)
    cache = None
    worth_it = share_prompts and saved_tokens > WORTH_SHARING
    if forbidden and torch.is_grad_enabled():
        worth_it = False
    if worth_it and _keeps_keys_only(model):
        cache, _ = _prompt_cache(model, net, batch, before)
        ids = ids[:, before:]
    outputs = _call(model, net, ids, mask, cache, keep=num_tokens + 1)
    return outputs[:, -num_tokens - 1 :]


# --- Log-probs and scores -------------------------------------------------------------------------

LOGITS_AT_ONCE = 2**24  # logits that are float32 at the same time: 64 MB, and as much for a softmax


def plain_logps(model, batch, temperature=1.0):
    """What `completion_logps` computes, in its simplest form: each row is prompt and completion.

    -> (R, Tc) float32, 0 in padding. For reading and for tests: it computes a prompt again for each
    of its completions.
    """
    ids = torch.cat([batch.prompt_ids[batch.prompt_of], batch.completion_ids], dim=1)
    mask = torch.cat([batch.prompt_mask[batch.prompt_of], batch.completion_mask], dim=1)
    logits = _call(model, model, ids, mask).float() / temperature
    logps = logits[:, :-1].log_softmax(-1)  # the logits at one token predict the next
    logps = logps.gather(-1, ids[:, 1:, None])[..., 0]
    completion_length = batch.completion_ids.shape[1]
    return logps[:, -completion_length:].masked_fill(~batch.completion_mask, 0.0)


def completion_logps(model, batch, temperature=1.0, share_prompts=True):
    """log pi(y_t | x, y_<t) of the completion tokens, in nats -> (R, Tc) float32.

    0 in padding, so that the sum over tokens is the log-prob of a completion. temperature: the one
    of sampling, as these are the probabilities that the tokens were drawn with.
    share_prompts: compute a prompt once for all of its completions, where that is less work. Values
    and gradients are those of `plain_logps`.
    """
    ids = batch.completion_ids
    logits = _outputs(model, model, batch, ids.shape[1] - 1, share_prompts).flatten(0, 1)
    num_tokens = max(1, LOGITS_AT_ONCE // logits.shape[1])
    logits_parts = logits.split(num_tokens)
    # The backward pass makes a part's float32 copy and its softmax anew, so that none is kept
    recompute = torch.is_grad_enabled() and len(logits_parts) > 1
    options = {"use_reentrant": False, "preserve_rng_state": False}
    logps = []
    for part in zip(logits_parts, ids.flatten().split(num_tokens), strict=True):
        if recompute:
            logps.append(checkpoint(_token_logps, *part, temperature, **options))
        else:
            logps.append(_token_logps(*part, temperature))
    return torch.cat(logps).view_as(ids).masked_fill(~batch.completion_mask, 0.0)


def _token_logps(logits, ids, temperature):
    """Logits (N, V) of any dtype and ids (N,) -> log-probs of the ids (N,) float32."""
    logits = logits.float()
    if temperature != 1:  # dividing by 1 would copy them
        logits = logits / temperature
    return -torch.nn.functional.cross_entropy(logits, ids, reduction="none")


@torch.no_grad()
def fixed_logps(model, batch, temperature=1.0, micro_batch_size=8, share_prompts=True):
    """`completion_logps` without gradient, in micro-batches -> (R, Tc)."""
    logps = torch.zeros_like(batch.completion_ids, dtype=torch.float32)
    with whole(model):
        for index in deal_out(batch.split(micro_batch_size)):
            part = completion_logps(model, batch.rows(index), temperature, share_prompts)
            logps[index, : part.shape[1]] = part
    return add_up(logps)


def completion_scores(model, batch, share_prompts=True, before=False):
    """Outputs of the classification head at each completion token -> (R, Tc, num_labels) float32.

    A reward model reads the last token, a process reward model the ends of the steps.
    before: at the token before each instead, as a critic needs it: the value of a state must not
    know the token that is chosen in it.
    Not transformers' own pooling, which takes the last id that is not pad: wrong where pad is EOS.
    `config.reward_bias` is added: transformers' heads have no bias to hold it.
    """
    length = batch.completion_ids.shape[1]
    if before:
        hidden = _outputs(model, model.base_model, batch, length - 1, share_prompts)
    else:
        hidden = _outputs(model, model.base_model, batch, length, share_prompts)[:, 1:]
    head = model.score if hasattr(model, "score") else model.classifier
    return head(hidden.float()) + getattr(model.config, "reward_bias", 0.0)


def last_scores(model, batch, share_prompts=True):
    """Rewards of the completions: `completion_scores` at the last token of each -> (R,)."""
    last = batch.completion_mask.sum(1, keepdim=True) - 1
    scores = completion_scores(model, batch, share_prompts)[..., 0]
    return scores.gather(1, last)[:, 0]


@torch.no_grad()
def fixed_scores(model, batch, micro_batch_size=8, share_prompts=True):
    """`last_scores` without gradient, in micro-batches of whole prompts -> (R,)."""
    scores = torch.zeros(len(batch.prompt_of), device=batch.prompt_of.device)
    with whole(model):
        for index in deal_out(batch.split(micro_batch_size, whole_prompts=True)):
            scores[index] = last_scores(model, batch.rows(index), share_prompts)
    return add_up(scores)


# --- Generation -----------------------------------------------------------------------------------


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for 64 more tokens.

    DynamicLayer copies all of them for each token, a third of the time of long completions.
    """

    def __init__(self, layer):
        super().__init__()
        self.is_initialized = True
        self.length = layer.keys.shape[-2]
        self.keys = layer.keys
        self.values = layer.values

    def get_seq_length(self):
        return self.length

    def update(self, key_states, value_states, *_, **__):  # models hand on more than these
        start = self.length
        self.length += key_states.shape[-2]
        if self.length > self.keys.shape[-2]:
            self.keys = pad_tensor(self.keys, (0, 0, 0, 64))
            self.values = pad_tensor(self.values, (0, 0, 0, 64))
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def _make_roomy(cache):
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = _RoomyLayer(layer)


def _sample(logits, temperature, top_p, top_k):
    """Logits (N, V) -> ids (N,). Temperature 0 is greedy, top_k 0 and top_p 1 leave all tokens."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        logits = transformers.TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = transformers.TopPLogitsWarper(top_p)(None, logits)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def _end_ids(model, tokenizer):
    """Ids that end a completion: all that the model or the tokenizer names."""
    named = model.generation_config.eos_token_id
    ids = set(named) if isinstance(named, list) else {named}
    ids |= {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return torch.tensor(list(ids - {None}), device=model.device)


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts,
    num_generations,
    max_new_tokens,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    batch_size=0,
):
    """Sample `num_generations` completions of each prompt (text or chat); temperature 0 is greedy.

    -> Batch on the model's device, R texts, ended (R,) bool: False where the tokens ran out.
    batch_size: prompts at a time, to save memory; 0: all. Another batch size, or another number of
    processes, gives other samples from the same seed.
    top_p, top_k: no script has a flag for them, as `completion_logps` knows the temperature alone.
    The sampling values of the model's own generation_config are not used: the log-probs of training
    would not know of them. Raises ValueError where the logits are nan.
    """
    prompt_rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    number, count = process()
    mine = prompt_rows
    if count > 1:  # neighbours, so that `gather` returns them in the order of the prompts
        places = torch.arange(len(prompts)).tensor_split(count)[number]
        mine = [prompt_rows[i] for i in places]
    size = batch_size or max(1, len(mine))
    sampling = (temperature, top_p, top_k)
    rows = []
    ended = []
    with whole(model), _own_seed(temperature, model.device):
        for start in range(0, len(mine), size):
            batch = _empty_batch(mine[start : start + size], num_generations, max_new_tokens)
            batch = batch.to(model.device)
            ended += _fill(model, _end_ids(model, tokenizer), batch, sampling)
            lengths = batch.completion_mask.sum(1).tolist()
            for ids, length in zip(batch.completion_ids.tolist(), lengths, strict=True):
                rows.append(ids[:length])
    rows = gather(rows)
    ended = torch.tensor(gather(ended), device=model.device)
    prompt_of = torch.arange(len(prompts)).repeat_interleave(num_generations)
    batch = Batch(*pad(prompt_rows, "left"), *pad(rows, "right"), prompt_of)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return batch.to(model.device), texts, ended


def _empty_batch(prompt_rows, num_generations, max_new_tokens):
    """A batch with room for the completions, of which no token is there yet."""
    prompt_of = torch.arange(len(prompt_rows)).repeat_interleave(num_generations)
    ids = torch.zeros(len(prompt_of), max_new_tokens, dtype=torch.long)
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    return Batch(*pad(prompt_rows, "left"), ids, nothing, prompt_of)


def _fill(model, end_ids, batch, sampling):
    """Sample the completions of a batch, in place -> for each whether it ended, a list of bools.

    sampling: temperature, top_p and top_k.
    """
    num_rows, max_new_tokens = batch.completion_ids.shape
    ended = torch.zeros(num_rows, dtype=torch.bool, device=model.device)
    rows = torch.arange(num_rows, device=model.device)  # those that still go through the model
    mask = batch.prompt_mask[batch.prompt_of]
    with _autocast(model):  # around the loop: inside, each token would cast the weights anew
        cache, logits = _prompt_cache(model, model, batch, mask.shape[1])
        _make_roomy(cache)
        if logits.isnan().any():
            raise ValueError(
                "The model's logits are nan: its weights are broken, or --dtype is too coarse for "
                "them."
            )
        for t in range(max_new_tokens):
            token = _sample(logits, *sampling)
            batch.completion_ids[rows, t] = token
            batch.completion_mask[:, t] = ~ended
            ended[rows] |= torch.isin(token, end_ids)
            keep = (~ended[rows]).nonzero()[:, 0]
            if len(keep) == 0 or t + 1 == max_new_tokens:
                break
            if len(keep) <= 0.75 * len(rows):  # not whenever one ends: each time copies the cache
                cache.reorder_cache(keep)
                rows = rows[keep]
                token = token[keep]
                mask = mask[keep]
            mask = pad_tensor(mask, (0, 1), value=True)
            logits = _call(model, model, token[:, None], mask, cache)[:, -1]
    return ended.tolist()


# --- KL and means ---------------------------------------------------------------------------------


def kl_estimate(logps, ref_logps, kind):
    """Estimate KL(pi || pi_ref) at tokens sampled from pi, in nats, same shape. Book 8.1.

    With log r = ref_logps - logps, the log of pi_ref / pi (mind the direction):
    k1 = -log r          unbiased, can be negative; as a loss its expected gradient is zero
    k2 = (log r)^2 / 2   biased, low variance; as a loss it has the gradient of KL(pi || pi_ref)
    k3 = r - 1 - log r   unbiased, never negative; as a loss: the gradient of KL(pi_ref || pi)

    What is said of gradients holds for one token given its prefix. Over a whole completion, the
    estimators as losses lack the term of how each token changes the later ones; and after the first
    gradient step on the same completions, none has an importance weight.

    The book's snippet (8.1.2) has three faults: it calls the models on the prompt alone; F.kl_div
    gets log-probs as its target, so it needs log_target=True; and by default it takes the mean over
    all elements, where the KL is a sum over the vocabulary. The order of its arguments is right:
    F.kl_div(input, target) is KL(target || input).
    """
    log_r = ref_logps - logps
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r**2 / 2
    if kind == "k3":
        return torch.expm1(log_r) - log_r
    raise ValueError(f"No estimator of the KL is called {kind!r}: k1, k2 or k3.")


def exact_kl(logits, ref_logits):
    """KL(pi || pi_ref) = sum_v pi(v) (log pi(v) - log pi_ref(v)) in nats: (..., V) -> (...).

    What `kl_estimate` estimates at one token (the book's kl_full, 8.1.2). Logits for each word of
    the vocabulary are too many to keep, so no script calls it; tests compare with it.
    """
    logps = logits.float().log_softmax(-1)
    ref_logps = ref_logits.float().log_softmax(-1)
    return (logps.exp() * (logps - ref_logps)).sum(-1)


def masked_mean(x, mask, dim=None):
    """Mean of x where mask is True, over `dim` or over all; 0 where mask is nowhere True."""
    return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1)
