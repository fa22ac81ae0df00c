"""sft.py against plain loops, and learning on the toy."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import sft


def tiny_args(tmp_path, **changes):
    values = sft.TOY | dict(
        model=str(ROOT / "toy/model"),
        dataset=str(ROOT / "toy/sft_train.jsonl"),
        eval_dataset="",
        eval_size=20,
        output_dir=str(tmp_path / "run"),
        device="cpu",
        from_scratch=False,
        max_new_tokens=8,
        batch_size=8,
    )
    return sft.Args(**values | changes)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(args):
    sft.main(args)
    with open(f"{args.output_dir}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def test_sft_loss_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -50.0], [-3.0, -4.0, -5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert sft.sft_loss(logps, mask).item() == 3.0


def test_every_assistant_turn_is_a_completion():
    turns = [{"role": r, "content": str(i)} for i, r in enumerate(
        ["system", "user", "assistant", "user", "assistant", "user"])]  # fmt: skip
    assert sft.to_pairs({"messages": turns}) == [(turns[:2], "2"), (turns[:4], "4")]
    assert sft.to_pairs({"prompt": "a", "response": "b"}) == [("a", "b")]
    assert sft.to_pairs({"prompt": "a", "completion": "c"}) == [("a", "c")]


def test_the_step_is_a_mean_over_completion_tokens(tmp_path):
    """Loss and gradient of main's first step beside a plain loop; for every micro-batch size."""
    data = [("1+2", "3"), ("44+55", "a much longer completion than the others"), ("7+7", "14\n14")]
    path = write(tmp_path / "d.jsonl", [{"prompt": p, "completion": c} for p, c in data])
    tokenizer = sft.load_tokenizer(ROOT / "toy/model")
    model = sft.load_model(sft.AutoModelForCausalLM, ROOT / "toy/model", torch.device("cpu"))
    total, count = 0.0, 0
    for prompt, completion in data:
        head = tokenizer(f"<bos><user>{prompt}<assistant>", add_special_tokens=False)["input_ids"]
        tail = tokenizer(f"{completion}<eos>", add_special_tokens=False)["input_ids"]
        logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        for t, token in enumerate(tail):
            total, count = total - logp[len(head) - 1 + t, token], count + 1
    (total / count).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    for size, batch_size in ((3, 3), (2, 3), (1, 3), (2, 8)):  # 8: a short step of 3
        folder = tmp_path / f"{size} {batch_size}"
        args = tiny_args(folder, dataset=path, eval_size=0, num_epochs=1, micro_batch_size=size,
                         lr_schedule="constant", batch_size=batch_size)  # fmt: skip
        row = run(args)[0]
        assert row["loss"] == pytest.approx(total.item() / count, rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_every_row_once_an_epoch_and_a_last_short_step(tmp_path, monkeypatch):
    path = write(tmp_path / "d.jsonl", [{"prompt": f"{i}+1", "completion": "x"} for i in range(10)])
    seen = []
    encode = sft.encode
    monkeypatch.setattr(sft, "encode", lambda t, p, *a: seen.append(list(p)) or encode(t, p, *a))
    run(tiny_args(tmp_path, dataset=path, eval_size=0, batch_size=6, num_epochs=2))
    assert [len(x) for x in seen] == [6, 6, 6, 2]
    flat = sum(seen, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == sorted(f"{i}+1" for i in range(10))
    assert flat[:10] != flat[10:]


def test_long_rows_are_cut_or_dropped_and_counted(tmp_path, capsys):
    rows = [{"prompt": "9" * 40, "completion": "x"}, {"prompt": "1+1", "completion": "y" * 40}]
    rows += [{"prompt": "1+2", "completion": "3"}]
    path = write(tmp_path / "d.jsonl", rows)
    run(tiny_args(tmp_path, dataset=path, eval_size=0, max_length=32))
    assert "of 3 completions, dropped 1" in capsys.readouterr().out


def test_learning_as_a_user_would_makes_the_toys_checkpoint(tmp_path):
    """`python sft.py`; 2.3 nats is what the frequency of characters alone gives. On the machine of
    toy/model the weights come out the same bit for bit, on another one near the same loss: 0.0251
    and 0.0268 were seen."""
    command = [sys.executable, ROOT / "sft.py", "--output-dir", tmp_path / "run"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[0] > 4 and losses[-1] < 0.03
    tokenizer = sft.load_tokenizer(ROOT / "toy/model")
    model = sft.load_model(sft.AutoModelForCausalLM, ROOT / "toy/model", torch.device("cpu"))
    data = [json.loads(line) for line in open(ROOT / "toy/sft_test.jsonl")]
    pairs = [(row["prompt"], row["completion"]) for row in data]
    assert sft.evaluate(model, tokenizer, pairs, 256, 32) == pytest.approx(losses[-1], rel=0.15)


@pytest.mark.real
def test_a_real_model_lowers_its_held_out_loss(tmp_path, real_model):
    rows = [{"prompt": f"Say the word number {i}.", "response": "Blue " * 3} for i in range(40)]
    args = sft.Args(
        model=real_model, dataset=write(tmp_path / "d.jsonl", rows), num_epochs=1, batch_size=8,
        learning_rate=1e-4, output_dir=str(tmp_path / "run"), max_new_tokens=8, log_samples=1,
    )  # fmt: skip
    losses = [row["eval_loss"] for row in run(args) if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.5
