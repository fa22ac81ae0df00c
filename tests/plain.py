"""Plain forms that the tests compare with: one row a forward, no padding, no cache, no batching.

Nothing here calls common.py or plumbing.py, so that a fault there cannot be in both.
"""

import math

import torch


def unpadded(batch):
    """A Batch -> list of (prompt ids, completion ids) of its R completions, as lists."""
    rows = []
    for i, p in enumerate(batch.prompt_of.tolist()):
        prompt = batch.prompt_ids[p][batch.prompt_mask[p]].tolist()
        completion = batch.completion_ids[i][batch.completion_mask[i]].tolist()
        rows.append((prompt, completion))
    return rows


def toy_ids(tokenizer, prompt, completion=None):
    """The toy's template by hand: ids of a prompt, or of a completion with its end of turn."""
    text = f"<bos><user>{prompt}<assistant>" if completion is None else f"{completion}<eos>"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def token_logps(model, prompt, completion, temperature=1.0):
    """log pi of each completion token (T,), with gradient, from the ids of one row."""
    logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
    logps = logits.log_softmax(-1)
    chosen = [logps[len(prompt) - 1 + t, token] for t, token in enumerate(completion)]
    return torch.stack(chosen)


def head_outputs(model, prompt, completion, before=False):
    """The classification head at each completion token, or at the token before each (T, labels),
    from the backbone's last hidden states of one row."""
    hidden = model.base_model(torch.tensor([prompt + completion])).last_hidden_state[0]
    start = len(prompt) - before
    head = model.score if hasattr(model, "score") else model.classifier
    bias = getattr(model.config, "reward_bias", 0.0)
    return head(hidden[start : start + len(completion)]) + bias


def gradient_norm(*models):
    """Norm of all gradients together, as a number."""
    grads = [p.grad.flatten() for m in models for p in m.parameters() if p.grad is not None]
    return torch.cat(grads).norm().item()


def learning_rate(step, peak, schedule, warmup, total):
    """The rate of step 1, 2, ... of `total`, by its formula: it rises from 0 in `warmup` steps and
    then stays, or falls to 0 in a line or in half a cosine."""
    done = step - 1
    if done < warmup:
        return peak * done / warmup
    progress = (done - warmup) / (total - warmup)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    return peak
