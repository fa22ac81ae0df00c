"""One run of a trainer of TRL, kept in the way in which observe.py keeps one of ours.

Nothing here calls common.py or a script: what is tokenised, padded, masked and averaged on this
side is TRL's own doing.
"""

from dataclasses import dataclass, field

import torch
from observe import flat
from plain import unpadded
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

RATE = 1e-3
LONGEST_GRADIENT = 0.5


def reward(prompts, completions, rows=None, **columns):
    """A number of many values, the same for both sides: TRL hands on messages, ours are texts.
    Whole 32nds: a group's mean is exact, and what equals it has the advantage 0 on both sides."""
    values = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[0]["content"]
        digits = [int(character) for character in text if character.isdigit()]
        values.append((sum(digits) % 7) / 4 + len(text) / 32)
    return values


@dataclass
class Peer:
    """What one trainer of TRL did."""

    gradients: list = field(default_factory=list)  # after the clip, flat, one an update
    logs: list = field(default_factory=list)  # one an update
    weights: dict = field(default_factory=dict)  # at the end

    def logged(self, name):
        return [log[name] for log in self.logs]


class Watch(TrainerCallback):
    """Notes each update's gradient and log."""

    def __init__(self, peer):
        self.peer = peer

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        grads = []
        for p in model.parameters():
            grads.append(torch.zeros_like(p) if p.grad is None else p.grad)
        self.peer.gradients.append(flat(grads).clone())

    def on_log(self, args, state, control, logs=None, **more):
        if "grad_norm" in logs:
            self.peer.logs.append(dict(logs))


def options(folder, size, **changes):
    """What all trainers here share: float32 on the CPU, `size` rows in one go, a constant rate."""
    return dict(
        output_dir=str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=1,
        learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, adam_epsilon=1e-8,
        max_grad_norm=LONGEST_GRADIENT, gradient_checkpointing=False, bf16=False, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    ) | changes  # fmt: skip


def train(trainer):
    """Train to the end -> Peer."""
    peer = Peer()
    trainer.add_callback(Watch(peer))
    trainer.train()
    peer.weights = {name: value.detach() for name, value in trainer.model.state_dict().items()}
    return peer


def message(role, text):
    return [{"role": role, "content": text}]


# --- On completions that were sampled elsewhere ---------------------------------------------------


def on_completions(name, model, folder, steps, changes):
    """Train by GRPO or RLOO on `steps`, a list of (prompts as texts, Batch) -> Peer. TRL is given
    the ids of the completions in place of what it would sample; its own ids of the prompts must be
    those that the completions were sampled from."""
    import trl
    from datasets import Dataset

    batch = steps[0][1]
    prompts = [message("user", text) for texts, _ in steps for text in texts]
    updates = changes.get("num_iterations", 1) * changes.get("steps_per_generation", 1)
    config = options(
        folder, len(batch.completion_ids), max_steps=len(steps) * updates, shuffle_dataset=False,
        num_generations=len(batch.completion_ids) // len(batch.prompt_ids),
    )  # fmt: skip
    trainer = getattr(trl, f"{name}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=getattr(trl, f"{name}Config")(**config | changes),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=reward,
    )
    sampled = iter([unpadded(batch) for _, batch in steps])

    def given(prompt_ids, *more):
        rows = next(sampled)
        assert [list(ids) for ids in prompt_ids] == [prompt for prompt, _ in rows]
        completions = [completion for _, completion in rows]
        return (completions, None) if name == "GRPO" else completions

    trainer._generate_single_turn = given
    peer = train(trainer)
    assert next(sampled, None) is None
    return peer


# --- On pairs -------------------------------------------------------------------------------------


def on_pairs(name, model, folder, pairs, size, changes):
    """Train by DPO or as a reward model on pairs, `size` a step in their order -> Peer."""
    import trl
    from datasets import Dataset

    rows = []
    for pair in pairs:
        row = {"prompt": message("user", pair["prompt"])}
        row["chosen"] = message("assistant", pair["chosen"])
        row["rejected"] = message("assistant", pair["rejected"])
        rows.append(row | {"margin": pair["margin"]} if "margin" in pair else row)
    kinds = {"DPO": AutoModelForCausalLM, "Reward": AutoModelForSequenceClassification}
    config = options(
        folder, size, num_train_epochs=1, max_length=256, train_sampling_strategy="sequential"
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=kinds[name].from_pretrained(model, dtype=torch.float32),
        args=getattr(trl, f"{name}Config")(**config | changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return train(trainer)
