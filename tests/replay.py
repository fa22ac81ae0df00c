"""What a recorded run implies, in plain forms: weights by AdamW's formula, greedy answers, lr."""

import json
import random
import shutil

import plain
import pytest
import torch
from observe import Seen, refused
from transformers import AutoModelForCausalLM, AutoTokenizer

REWARD = '''
def f(prompts, completions, rows):
    """Kinds of characters, half a point for an end, and a little of the prompt's own number."""
    values = []
    for prompt, text, row in zip(prompts, completions, rows, strict=True):
        if row["prompt"] != prompt:
            raise ValueError("a row of another prompt")
        values.append(len(set(text)) + 0.5 * row["ended"] + 0.01 * row["number"])
    return values


def negative(prompts, completions, rows):
    return [-value for value in f(prompts, completions, rows)]
'''


def reward_of(text, ended, row):
    """`f` of the above, of one completion."""
    return len(set(text)) + 0.5 * ended + 0.01 * row["number"]


def problems(number, seed=0):
    """Rows with prompts of several lengths, no two alike, an answer, and a number."""
    draw = random.Random(seed)
    rows = []
    for i in range(number):
        prompt = f"{seed}{i}" + "+" * (i % 3) + str(draw.randrange(10 ** (1 + i % 5)))
        rows.append({"prompt": prompt, "answer": "7", "number": i})
    return rows


def model_with(folder, weights):
    """A model of a folder with these weights, flat as observe.py keeps them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.nn.utils.vector_to_parameters(weights.clone(), model.parameters())
    return model


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def end_weights(seen, optimizer=0):
    """The weights of an optimiser's model as the run left them, flat."""
    groups = seen.optimizers[optimizer].param_groups
    return torch.cat([p.detach().flatten() for group in groups for p in group["params"]])


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def adamw(start, updates):
    """AdamW by its formula, without weight decay: weights after these updates' gradients, each at
    its own rate, from `start`."""
    weights = start.double()
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    for t, update in enumerate(updates, 1):
        gradient = update.gradient.double()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean = first / (1 - 0.9**t)
        size = (second / (1 - 0.999**t)).sqrt() + 1e-8
        weights = weights - update.lr * mean / size
    return weights.float()


@torch.no_grad()
def greedy(model, folder, prompt, max_new_tokens):
    """The most likely token again and again -> text, whether it came to its end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = plain.toy_ids(tokenizer, prompt)
    completion = []
    while len(completion) < max_new_tokens:
        logits = model(torch.tensor([ids + completion])).logits[0, -1]
        completion.append(logits.argmax().item())
        if completion[-1] == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(completion, skip_special_tokens=True)
    return text, completion[-1] == tokenizer.eos_token_id


def greedy_reward(model, folder, rows, max_new_tokens):
    """Mean of REWARD's f over greedy answers to the rows' prompts."""
    total = 0.0
    for row in rows:
        text, ended = greedy(model, folder, row["prompt"], max_new_tokens)
        total += reward_of(text, ended, row)
    return total / len(rows)


def resumed_without(script, args, part):
    """Resume a run whose checkpoint does not give this part back; None: all do."""
    import plumbing

    begin = plumbing.Run.begin

    def leaving_out(self, parts, num_steps):
        assert part is None or part in parts
        begin(self, {name: x for name, x in parts.items() if name != part}, num_steps)

    torch.manual_seed(12345)  # the state of a new process is another one
    random.seed(12345)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.Run, "begin", leaving_out)
        patch.setattr(plumbing, "draw_curves", lambda rows, path: None)
        script.main(args)
    return Seen(args)


def checkpoint_parts(folder):
    """Names of the parts in a run's checkpoint."""
    state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
    return set(state) - {"torch", "cuda", "random", "step", "seconds", "sizes"}


def moved(folder, to):
    """A copy of a run's folder, as if the run had been begun there."""
    shutil.copytree(folder, to)
    args = json.loads((to / "args.json").read_text())
    (to / "args.json").write_text(json.dumps(args | {"output_dir": str(to)}))
    return str(to)


def flag_resume(run, base, folder):
    """A finished run that is resumed does nothing more; a run that is there is not begun anew."""
    there = moved(base.folder, folder / "copy")
    got = run(output_dir=there, resume=True)
    assert got.updates == [] and got.untimed() == base.untimed()
    refused(run, "exists", output_dir=there)
