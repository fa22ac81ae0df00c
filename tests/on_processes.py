"""What each of several processes computes, written to FOLDER/NUMBER.json: see test_processes.py."""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM  # noqa: E402

import common  # noqa: E402
import plumbing  # noqa: E402


def main(folder):
    torch.set_num_threads(1)
    plumbing.start_processes()
    plumbing.quieten_transformers()
    torch.manual_seed(3)
    device = torch.device("cpu")
    model = plumbing.load_model(AutoModelForCausalLM, str(ROOT / "toy/model"), device)
    tokenizer = plumbing.load_tokenizer(str(ROOT / "toy/model"))
    sampling = (model, tokenizer)
    prompts = ["12+34", "5+6", "777+8"]
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
        "parts of an index": [len(part) for part in common.micro_batches(torch.arange(7), 100)],
        "sum": common.add_up(torch.tensor([1.0, float(number)])).tolist(),
        "gathered": common.gather([number, "x"]),
        "from first": plumbing.from_first(number),
        "count": count,
    }
    (Path(folder) / f"{number}.json").write_text(json.dumps(result))
    plumbing.end_processes()


if __name__ == "__main__":
    main(sys.argv[1])
