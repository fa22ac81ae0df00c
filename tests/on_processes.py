"""What each of several processes computes, written to FOLDER/NUMBER.json: see test_processes.py."""

import json
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM  # noqa: E402

import common  # noqa: E402
import plumbing  # noqa: E402


def sizes_of_parts(number, size):
    return [len(part) for part in common.micro_batches(torch.arange(number), size)]


def parts_of(number):
    """So many parts of two, the later ones of smaller numbers."""
    return list(torch.arange(2 * number).view(number, 2).flip(0))


def said_by(function, *inputs):
    """What a function that raises ValueError says."""
    try:
        function(*inputs)
    except ValueError as error:
        return str(error)


def draws(prompts, completions, rows):
    """A reward that moves torch's generator."""
    torch.rand(5)
    return [0.0] * len(completions)


def drawn_after_a_reward(device):
    score = plumbing.load_reward("verifier", draws, "", device)
    score(["1+1"], ["2"], [{}])
    return torch.rand(()).item()


def held_of_a_checkpoint(device):
    """Numbers of a sharded model's whole state that this process holds."""
    options = (AutoModelForCausalLM, str(ROOT / "toy/model"), device, "float32", True)
    model = plumbing.load_model(*options)
    return sum(tensor.numel() for tensor in plumbing._whole_state(model).values())


def stopped(folder):
    """A signal comes to the last process alone -> after which step this one ends, and its code."""
    number, count = common.process()
    flags = dict(output_dir=f"{folder}/run", resume=False, overwrite=False, checkpoint_every=10)
    run = plumbing.Run(Namespace(**flags))
    run.begin({}, 3)
    try:
        for _ in run.steps():
            if number == count - 1:
                os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit as end:
        return [run.step, end.code]
    return [run.step, 0]


def main(folder):
    torch.set_num_threads(1)
    plumbing.start_processes()
    plumbing.quieten_transformers()
    torch.manual_seed(3)
    device = torch.device("cpu")
    model = plumbing.load_model(AutoModelForCausalLM, str(ROOT / "toy/model"), device)
    tokenizer = plumbing.load_tokenizer(str(ROOT / "toy/model"))
    sampling = (model, tokenizer)
    prompts = ["12+34", "5+6", "777+8", "9+1"]
    batch, greedy, ended = common.generate(*sampling, prompts, 2, 20, temperature=0)
    after_greedy = torch.get_rng_state().sum().item()
    _, alone, _ = common.generate(*sampling, ["1+1"], 1, 20, temperature=0)
    _, sampled, _ = common.generate(*sampling, ["98+76"] * 4, 3, 20)
    _, parts, _ = common.generate(*sampling, ["98+76"] * 4, 3, 20, batch_size=1)
    number, count = common.process()
    result = {
        "greedy": greedy,
        "ids": batch.completion_ids.tolist(),
        "ended": ended.tolist(),
        "alone": alone,
        "after_greedy": after_greedy,
        "sampled": sampled,
        "parts": parts,
        "next": torch.rand(()).item(),
        "logps": common.fixed_logps(model, batch, micro_batch_size=4).tolist(),
        "dealt": common.deal_out(list(range(5))),
        "parts of an index": [sizes_of_parts(7, 100), sizes_of_parts(8, 1)],
        "sum": common.add_up(torch.tensor([1.0, float(number)])).tolist(),
        "gathered": common.gather([number, "x"]),
        "from first": plumbing.from_first(number),
        "after a reward": drawn_after_a_reward(device),
        "held": held_of_a_checkpoint(device) if count > 1 else 0,
        "other flags": said_by(plumbing._check_processes, Namespace(seed=number), {}),
        "few": said_by(common.deal_out, list(range(2)), True),
        "which": [part.tolist() for part in common.deal_out(parts_of(5), True)],
        "stopped": stopped(folder),
        "count": count,
    }
    (Path(folder) / f"{number}.json").write_text(json.dumps(result))
    plumbing.end_processes()


if __name__ == "__main__":
    main(sys.argv[1])
