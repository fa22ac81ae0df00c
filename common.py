"""What the scripts share: batched generation, log-probs and KL, and what loads rewards.

One layout serves every chapter: P prompts, each with a group of completions, R completions in all.
Prompts are padded on the left and completions on the right, so that a prompt ends where each of its
completions begins, and is computed once for all of them. Bad input ends the program with one line.
"""
import contextlib
import inspect
import math
import runpy
from dataclasses import dataclass

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from plumbing import (ROOT, Run, after_answer, answer_text, check_prompts,  # noqa: F401
                      encode_prompt, end_of_turn, has_answers, hold_out, load_model, load_rows,
                      load_splits, load_tokenizer, parse_args, pick_device, set_other_pad, stop,
                      stop_on_error, update, with_ended)  # for the scripts: all from one place

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # load_model says itself what is missing

# --- Batches --------------------------------------------------------------------------------------

@dataclass
class Batch:
    """P prompts and the R completions that belong to them."""
    prompt_ids: torch.Tensor  # (P, Tp) long, left-padded
    prompt_mask: torch.Tensor  # (P, Tp) bool
    completion_ids: torch.Tensor  # (R, Tc) long, right-padded
    completion_mask: torch.Tensor  # (R, Tc) bool, True through the EOS, and only there
    prompt_of: torch.Tensor  # (R,) long, the prompt of each completion, prompt-major: 0 0 0 1 1 1

    def rows(self, index):
        """The completions `index` (a long tensor) with their prompts, cut to the longest ones."""
        prompts, prompt_of = self.prompt_of[index].unique(return_inverse=True)
        prompt_mask, mask = self.prompt_mask[prompts], self.completion_mask[index]
        Tp, Tc = int(prompt_mask.sum(1).max()), int(mask.sum(1).max())
        prompt_ids, ids = self.prompt_ids[prompts][:, -Tp:], self.completion_ids[index][:, :Tc]
        return Batch(prompt_ids, prompt_mask[:, -Tp:], ids, mask[:, :Tc], prompt_of)

    def split(self, size, whole_prompts=False):
        """Index tensors of at most `size` completions each, for `rows`: the micro-batches, those
        of the longest prompts first, so that little is padding and memory runs out at once.
        whole_prompts: none divides a prompt; one with more completions than that goes alone."""
        of, lengths = self.prompt_of, self.prompt_mask.sum(1)
        both = lengths[of] + self.completion_mask.sum(1)
        longest = torch.zeros_like(lengths).scatter_reduce(0, of, both, "amax")[of]
        order, sizes = (of - longest * len(lengths)).argsort(), size
        if whole_prompts:
            sizes = []
            for count in of[order].unique_consecutive(return_counts=True)[1].tolist():
                fits = sizes and sizes[-1] + count <= size
                sizes = [*sizes[:-1], sizes[-1] + count] if fits else [*sizes, count]
        return [mb.sort().values for mb in order.split(sizes)]  # prompt-major, as `rows` wants it

    def to(self, device):
        """The same on `device`."""
        return Batch(*(x.to(device) for x in vars(self).values()))

def encode(tokenizer, prompts, completions, max_length=None, ended=None):
    """P prompts (texts or chats) and for each of them a list of completion texts -> Batch.
    The two are tokenised apart, so that a prompt has the tokens it has in generation. The end of
    turn is appended, but not where `max_length` tokens, prompt included, cut a completion, or where
    one of the R in `ended` is False: the policy was cut off there, and never wrote an end."""
    prompt_rows, rows = [encode_prompt(tokenizer, prompt) for prompt in prompts], []
    end, ended = end_of_turn(tokenizer), iter(ended or [True] * sum(map(len, completions)))
    for ids, texts in zip(prompt_rows, completions, strict=True):
        if max_length and len(ids) >= max_length:
            stop(f"a prompt of {len(ids)} tokens leaves no room for a completion in {max_length}")
        for text in texts:
            row = tokenizer(text, add_special_tokens=False)["input_ids"]
            row = [*row, end] if next(ended) or not row else row
            rows.append(row[:max_length and max_length - len(ids)])
    prompt_of = torch.tensor([i for i, texts in enumerate(completions) for _ in texts])
    return Batch(*pad(prompt_rows, "left"), *pad(rows, "right"), prompt_of)

def encode_steps(tokenizer, prompt, steps, separator, close=None):
    """Prompt and texts of steps -> ids of both, ends: the place of each step's last token, the end
    of its separator. Steps are tokenised apart, so that none merges with the next. Without a
    separator every token is a step. close: ids after the last; None: the end of turn."""
    ids, ends = [], []
    for text in steps:
        ids += tokenizer(text + separator, add_special_tokens=False)["input_ids"]
        ends.append(len(ids) - 1)
    ids += [end_of_turn(tokenizer)] if close is None or not ids else close
    return encode_prompt(tokenizer, prompt), ids, ends if separator else [*range(len(ids))]

def pad(rows, side):
    """Lists of ids -> ids (N, T) and mask (N, T), padded on this side. Masks come from lengths,
    never from `ids != pad`: many tokenizers use one id for pad and EOS."""
    rows = [torch.tensor(row) for row in rows]
    return [pad_sequence(x, batch_first=True, padding_side=side)
            for x in (rows, [torch.ones_like(row, dtype=torch.bool) for row in rows])]

# --- Generation and log-probs ---------------------------------------------------------------------

WORTH_SHARING = 200  # tokens that sharing prompts must save: its second pass costs about as much
PASS_TOKENS = 2048  # of prompts in one pass: more would take memory and not be faster

def _autocast(model):
    dtype = getattr(model, "autocast_dtype", None)
    return torch.autocast(model.device.type, dtype) if dtype else contextlib.nullcontext()

def _call(model, net, ids, mask, cache=None, keep=0):
    # One forward of `net`, which is `model` or its backbone, on ids that follow those in the cache.
    if getattr(model, "recompute", False):
        model.train(torch.is_grad_enabled())  # else layers neither checkpoint nor fill a cache
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]  # left padding does not count
    options = {"logits_to_keep": keep} if net is model else {}
    known = inspect.signature(net.forward).parameters  # Transformers 5.x renamed this one
    options["cache" if "cache" in known else "past_key_values"] = cache
    with _autocast(model):
        return net(input_ids=ids, attention_mask=mask.long(), position_ids=positions,
                   use_cache=cache is not None, **options)[0]

class _RoomyLayer(DynamicLayer):
    # DynamicLayer copies all keys and values for each token, a third of the time of long
    # completions. This one writes into places that it has, and makes 64 more when they are full.
    def __init__(self, layer):
        super().__init__()
        self.is_initialized, self.length = True, layer.keys.shape[-2]
        self.keys, self.values = layer.keys, layer.values

    def get_seq_length(self):
        return self.length

    def update(self, key_states, value_states, *_, **__):  # what models hand on
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.keys.shape[-2]:
            self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, 64))
                                      for x in (self.keys, self.values))
        self.keys[:, :, start:self.length] = key_states
        self.values[:, :, start:self.length] = value_states
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

def _prompt_cache(model, net, batch, n):
    # First n tokens of each prompt, once, repeated for its completions; and the last one's outputs.
    # Those of like length go together: in one pass of all, most would be padding to the longest.
    ids, mask = batch.prompt_ids[:, :n], batch.prompt_mask[:, :n]
    lengths, parts = mask.sum(1).clamp(min=1).tolist(), []
    for i in sorted(range(len(ids)), key=lambda i: -lengths[i]):
        fits = parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= PASS_TOKENS
        parts = [*parts[:-1], [*parts[-1], i]] if fits else [*parts, [i]]
    caches, last = [transformers.DynamicCache(config=model.config) for _ in parts], []
    if any(type(x) not in (DynamicLayer, DynamicSlidingWindowLayer) for x in caches[0].layers):
        stop("this model keeps states that cannot be repeated for the completions of a prompt")
    for part, cache in zip(parts, caches, strict=True):
        cut = n - lengths[part[0]] if cache is not caches[0] else 0
        part = torch.tensor(part, device=ids.device)
        last.append(_call(model, net, ids[part, cut:], mask[part, cut:], cache, 1)[:, -1])
    for longest, *others in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values") if others and longest.is_initialized else ():
            x, *rest = (getattr(layer, name) for layer in (longest, *others))
            rest = [torch.nn.functional.pad(y, (0, 0, x.shape[2] - y.shape[2], 0)) for y in rest]
            setattr(longest, name, torch.cat([x, *rest]))
    place = torch.tensor(sum(parts, []), device=ids.device).argsort()[batch.prompt_of]
    caches[0].reorder_cache(place)  # batch_select_indices has a far slower backward
    return caches[0], torch.cat(last)[place]

def _outputs(model, net, batch, num_tokens, share_prompts):
    # Outputs of `net` at prompts' ends and the completions' first tokens: (R, 1 + num_tokens, .)
    of, cache, before = batch.prompt_of, None, batch.prompt_ids.shape[1] - 1
    saved = (len(of) - len(batch.prompt_ids)) * before  # tokens
    ids = torch.cat([batch.prompt_ids[of], batch.completion_ids[:, :num_tokens]], dim=1)
    mask = torch.cat([batch.prompt_mask[of], batch.completion_mask[:, :num_tokens]], dim=1)
    recompute = torch.is_grad_enabled() and getattr(model, "recompute", False)  # allows no cache
    if share_prompts and saved > WORTH_SHARING and not recompute:
        cache, ids = _prompt_cache(model, net, batch, before)[0], ids[:, before:]
    return _call(model, net, ids, mask, cache, keep=num_tokens + 1)[:, -num_tokens - 1:]

def completion_logps(model, batch, temperature=1.0, share_prompts=True):
    """log pi(y_t | x, y_<t) of completion tokens, at the sampling temperature -> (R, Tc) float32;
    0 in padding, so that the sum over tokens is the completion's log-prob.
    share_prompts: compute a prompt once for all of its completions, where that is less work; the
    value is the same."""
    ids, mask = batch.completion_ids, batch.completion_mask
    logits = _outputs(model, model, batch, ids.shape[1] - 1, share_prompts).flatten(0, 1).float()
    logits = logits / temperature if temperature != 1 else logits  # a copy, vocabulary wide
    nll = torch.nn.functional.cross_entropy(logits, ids.flatten(), reduction="none")
    return (-nll).view_as(ids).masked_fill(~mask, 0.0)

@torch.no_grad()
def fixed_logps(model, batch, temperature=1.0, micro_batch_size=8, share_prompts=True):
    """`completion_logps` without gradient, in micro-batches -> (R, Tc)."""
    logps = torch.zeros_like(batch.completion_ids, dtype=torch.float32)
    for mb in batch.split(micro_batch_size):
        part = completion_logps(model, batch.rows(mb), temperature, share_prompts)
        logps[mb, :part.shape[1]] = part
    return logps

def completion_scores(model, batch, share_prompts=True, before=False):
    """The classification head at each completion token -> (R, Tc, num_labels) float32.
    A reward model reads the last token of the mask, a process reward model the step ends. before:
    at the token before each, for a critic: the value of a state must not know the token chosen in
    it. Transformers' own pooling takes the last id that is not pad: wrong where pad is EOS.
    config.reward_bias, which rm_*.py save as heads have no bias, is added."""
    length = batch.completion_ids.shape[1] - before
    hidden = _outputs(model, model.base_model, batch, length, share_prompts)[:, 1 - before:]
    head = model.score if hasattr(model, "score") else model.classifier
    return head(hidden.float()) + getattr(model.config, "reward_bias", 0.0)

def last_scores(model, batch, share_prompts=True):
    """`completion_scores` at each completion's last token: a reward model's rewards -> (R,)."""
    last = batch.completion_mask.sum(1, keepdim=True) - 1
    return completion_scores(model, batch, share_prompts)[..., 0].gather(1, last)[:, 0]

def _sample(logits, temperature, top_p, top_k):
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    logits = transformers.TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    logits = transformers.TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]

@torch.no_grad()
def generate(model, tokenizer, prompts, num_generations, max_new_tokens, temperature=1.0,
             top_p=1.0, top_k=0):
    """`num_generations` completions of each prompt (text or chat); temperature 0 is greedy.
    -> Batch on the model's device, R texts, ended (R,) bool: False where the tokens ran out.
    Stops at every EOS id that the model or the tokenizer names. The sampling values of the model's
    own generation_config are not used: the log-probs of training would not know of them."""
    eos = model.generation_config.eos_token_id
    eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    eos = torch.tensor([*eos, end_of_turn(tokenizer)], device=model.device)
    prompt_of = torch.arange(len(prompts)).repeat_interleave(num_generations)
    ids = torch.zeros(len(prompt_of), max_new_tokens, dtype=torch.long)
    prompts = pad([encode_prompt(tokenizer, p) for p in prompts], "left")
    batch = Batch(*prompts, ids, ids < 0, prompt_of).to(model.device)
    rows, mask = torch.arange(len(ids), device=model.device), batch.prompt_mask[batch.prompt_of]
    ended = torch.zeros_like(rows, dtype=torch.bool)
    with _autocast(model):  # around all, else the weights are cast anew for each token
        cache, logits = _prompt_cache(model, model, batch, mask.shape[1])
        cache.layers = [_RoomyLayer(x) if type(x) is DynamicLayer and x.is_initialized else x
                        for x in cache.layers]
        if logits.isnan().any():
            stop("the model's logits are nan: broken weights, or a --dtype too coarse for it")
        for t in range(max_new_tokens):
            token = _sample(logits, temperature, top_p, top_k)
            batch.completion_ids[rows, t] = token
            batch.completion_mask[:, t] = ~ended
            ended[rows] |= torch.isin(token, eos)
            keep = (~ended[rows]).nonzero()[:, 0]
            if not len(keep) or t + 1 == max_new_tokens:
                break
            if len(keep) <= 0.75 * len(rows):  # not whenever one ends: each time copies the cache
                cache.batch_select_indices(keep)
                rows, token, mask = rows[keep], token[keep], mask[keep]
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)
            logits = _call(model, model, token[:, None], mask, cache)[:, -1]
    batch = batch.rows(torch.arange(len(ids), device=model.device))
    ids = [batch.completion_ids[i, m].tolist() for i, m in enumerate(batch.completion_mask)]
    return batch, tokenizer.batch_decode(ids, skip_special_tokens=True), ended

def greedy_rewards(policy, tokenizer, score, rows, max_new_tokens, batch_size):
    """Rewards of the greedy completions of the rows' prompts, `batch_size` at a time -> list."""
    values = []
    for part in (rows[i:i + batch_size] for i in range(0, len(rows), batch_size)):
        prompts = [row["prompt"] for row in part]
        _, texts, ended = generate(policy, tokenizer, prompts, 1, max_new_tokens, temperature=0)
        values += score(prompts, texts, with_ended(part, ended))
    return values

def kl_from_start(policy, start, tokenizer, prompts, max_new_tokens, batch_size):
    """One completion of each prompt from the policy, `batch_size` at a time -> KL(policy || start)
    of each in nats (k1, N), texts."""
    kl, texts = [], []
    for i in range(0, len(prompts), batch_size):
        part = generate(policy, tokenizer, prompts[i:i + batch_size], 1, max_new_tokens)
        kl.append(kl_estimate(*(fixed_logps(model, part[0], 1.0, batch_size)
                                for model in (policy, start)), "k1").sum(1))
        texts += part[1]
    return torch.cat(kl), texts

# --- KL and means ---------------------------------------------------------------------------------

def kl_estimate(logps, ref_logps, kind):
    """Estimate of KL(pi || pi_ref) at tokens sampled from pi, in nats, same shape (book 8.1).
    With log r = ref_logps - logps, the log of pi_ref / pi (the direction matters):
    k1 = -log r          unbiased, can be negative; as a loss its expected gradient is zero
    k2 = (log r)^2 / 2   biased, low variance; as a loss it has the gradient of KL(pi || pi_ref)
    k3 = r - 1 - log r   unbiased, never negative; as a loss: the gradient of KL(pi_ref || pi)"""
    log_r = ref_logps - logps
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": torch.expm1(log_r) - log_r}[kind]

def exact_kl(logits, ref_logits):
    """KL(pi || pi_ref) = sum_v pi(v) (log pi(v) - log pi_ref(v)): (..., V) -> (...), nats."""
    logps, ref_logps = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logps.exp() * (logps - ref_logps)).sum(-1)

def masked_mean(x, mask, dim=None):
    """Mean of x where mask is True, over `dim` or over all; 0 where nothing is."""
    return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1)

# --- Rewards --------------------------------------------------------------------------------------

def load_reward(reward, verifier, model="", device="cpu", dtype="auto", micro_batch_size=8,
                by_step=False):
    """-> score(prompts, completions, rows) -> list of R numbers, or of R lists, a number a step.
    reward: "verifier" for the function `verifier`, or "FILE.py:function", called with three lists
    of length R, prompts and rows repeated for each completion, rows with `ended` (`with_ended`).
    model: a reward model, in its place. by_step: a number for each step of a completion, from a
    process reward model P(right), not one for the solution."""
    name = f"--reward-model {model}" if model else f"--reward {reward}"
    path, _, attribute = reward.rpartition(":")
    if model:
        function = _model_reward(model, device, dtype, micro_batch_size, by_step)
    else:
        with stop_on_error(f"{name}: not FILE.py:function"):
            function = verifier if reward == "verifier" else runpy.run_path(path)[attribute]

    def score(prompts, completions, rows):
        with stop_on_error(f"{name} failed"):
            values = [[float(x) for x in v] if isinstance(v, list) else float(v)
                      for v in function(prompts, completions, rows)]
            if len(values) != len(completions):
                raise ValueError(f"{len(values)} values for {len(completions)} completions")
            for value, text in zip(values, completions, strict=True):
                if isinstance(value, list) != by_step:
                    raise ValueError(f"{value} for {text[:60]!r}: it needs " + (
                        "a list, a number a step" if by_step else "one number; a list of steps'")
                        + " with --supervision process")
                if not math.isfinite(sum(value) if isinstance(value, list) else value):
                    raise ValueError(f"{value} for {text[:60]!r}: not finite")
        return values
    return score

def _model_reward(path, device, dtype, micro_batch_size, by_step):
    with stop_on_error(f"--reward-model {path}: no model there"):
        config = transformers.AutoConfig.from_pretrained(path)
    token = "ForTokenClassification" in str(config.architectures)
    name = f"AutoModelFor{'Token' if token else 'Sequence'}Classification"
    model = load_model(getattr(transformers, name), path, device, dtype)
    tokenizer, separator = load_tokenizer(path), getattr(config, "step_separator", "")
    close = None
    if not hasattr(config, "reward_bias"):  # not made here: Transformers reads the last id not pad
        close = after_answer(tokenizer) or [end_of_turn(tokenizer)]
        while close[-1:] == [getattr(config, "pad_token_id", None)]:
            close.pop()
    how = getattr(config, "solution_score", "" if token else "last")
    if not token and config.num_labels != 1:
        stop(f"--reward-model {path}: has {config.num_labels} labels, not 1")
    if not how or by_step and not separator:
        stop(f"--reward-model {path}: its config.json does not say how to read the steps: make it "
             "with prm.py" + " --supervision process" * by_step)

    @torch.no_grad()
    def function(prompts, completions, rows):
        # From the texts: the reward model may have another tokenizer and template.
        texts = [[x for x in c.split(separator) if x.strip()] if separator else [c]
                 for c in completions]
        encoded = [encode_steps(tokenizer, prompt, steps, separator,
                                close if row.get("ended", True) else [])
                   for prompt, steps, row in zip(prompts, texts, rows, strict=True)]
        values, lengths = [0.0] * len(encoded), torch.tensor([len(ids) for _, ids, _ in encoded])
        for mb in lengths.argsort().split(micro_batch_size):  # by length: little padding
            prompt_rows, ids, ends = zip(*[encoded[i] for i in mb], strict=True)
            batch = Batch(*pad(prompt_rows, "left"), *pad(ids, "right"), torch.arange(len(mb)))
            scores = completion_scores(model, batch.to(device)).cpu()
            for i, score, end in zip(mb.tolist(), scores, ends, strict=True):
                steps = positive_probs(score[end]) if token else score[end, 0]
                whole = torch.ones(1, len(end), dtype=torch.bool)
                values[i] = (steps.tolist() if by_step else
                             solution_score(steps[None], whole, how).item())
        return values
    return function

def positive_probs(logits):
    """Of steps: logits (..., classes) -> (...): 1 - P(wrong), so neutral is positive, as it is for
    Lightman 2023; of one logit the sigmoid."""
    one = logits.shape[-1] == 1
    return logits[..., 0].sigmoid() if one else logits.softmax(-1)[..., 1:].sum(-1)

def solution_score(step_probs, step_mask, how):
    """Probabilities and mask of steps (R, S) -> (R,): their product (Lightman 2023: the chance that
    every step is right), minimum, last or mean (book 7.6). Without a step 0, not the empty
    product's 1."""
    step_probs, step_mask = (torch.nn.functional.pad(x, (0, 1)) for x in (step_probs, step_mask))
    if how == "last":
        places = step_mask * torch.arange(step_mask.shape[1], device=step_mask.device)
        scores = step_probs.gather(1, places.max(1, keepdim=True).values)[:, 0]
    elif how == "mean":
        scores = masked_mean(step_probs, step_mask, 1)
    else:
        probs = step_probs.masked_fill(~step_mask, 1.0)
        scores = {"product": probs.prod(1), "minimum": probs.min(1).values}[how]
    return scores * step_mask.any(1)
