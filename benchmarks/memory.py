"""Memory of training, counted: bytes per parameter and per token, and the largest model that fits.

    python benchmarks/memory.py                # the tables of docs/memory.md

Nothing is measured here. tests/test_memory.py compares the count with what three scripts take on a
real model. B is a billion parameters, GB is 10^9 bytes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import LOGITS_AT_ONCE

# --- Models ---------------------------------------------------------------------------------------


@dataclass
class Shape:
    """What of a Llama-like model its memory depends on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool  # the output layer is the embedding

    def linear_parameters(self):
        """Parameters of linear layers that are no embedding."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate
        head = 0 if self.is_tied else self.vocabulary * self.hidden
        return self.layers * layer + head

    def other_parameters(self):
        """Parameters of the embedding and the norms."""
        return self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    def adapter_parameters(self, rank):
        """Parameters of adapters of this rank on all linear layers but the output layer."""
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))


# Sizes of Qwen2.5-0.5B and of Qwen3-1.7B, 4B and 8B
SHAPES = {
    "0.5": Shape(896, 24, 14, 2, 64, 4864, 151936, True),
    "1.7": Shape(2048, 28, 16, 8, 128, 6144, 151936, True),
    "4": Shape(2560, 36, 32, 8, 128, 9728, 151936, True),
    "8": Shape(4096, 36, 32, 8, 128, 12288, 151936, False),
}


def shape_of(config):
    """Configuration of a Llama-like model of transformers -> Shape."""
    return Shape(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size,
        config.tie_word_embeddings,
    )


# --- Bytes per parameter --------------------------------------------------------------------------

BESIDE = "--reward-model, beside these"
# Row of the table: models that are trained, models that are not, all of the policy's size. What is
# loaded while a script evaluates takes no more than the gradients, which are not there then.
ROWS = {
    "sft.py": (1, 0),
    "rm_bt.py, rm_kwise.py, prm.py": (1, 0),
    "dpo_nll.py": (1, 0),
    "dpo_nll.py with --no-precompute-ref": (1, 1),
    "grpo.py, reinforce_rloo.py": (1, 1),
    "grpo.py, reinforce_rloo.py with --beta 0": (1, 0),
    "ppo.py": (2, 1),
    "ppo.py with --beta 0": (2, 0),
    "rejection_sampling.py": (2, 0),
    "rejection_sampling.py with --no-control": (1, 0),
    BESIDE: (0, 1),
}
LORA = "--lora-rank 16, without a second model"
SAMPLERS = ("grpo.py", "ppo.py", "rejection_sampling.py")
ADAM = 8  # two averages, in float32


def bytes_per_parameter(row, dtype, is_linear=True):
    """Bytes for each parameter of a model, with its gradients.

    row: of ROWS, or LORA, whose adapters are not counted here. dtype: of the forward pass.
    is_linear: whether the parameter belongs to a linear layer that is no embedding.
    """
    in_bfloat16 = dtype == "bfloat16" and is_linear
    stored = 2 if in_bfloat16 else 4  # of a model that is not trained
    if row == LORA:
        return stored
    num_trained, num_fixed = ROWS[row]
    count = num_trained * (4 + 4 + ADAM) + num_fixed * stored
    if in_bfloat16 and num_trained:
        count += 2  # autocast's copy, of one model at a time, until the backward pass is over
    return count


# --- Bytes per token ------------------------------------------------------------------------------


def activation_bytes(shape, dtype, checkpointing=False):
    """Bytes that the backward pass needs for each token of a micro-batch, prompts included.

    What a layer keeps: of its two norms the input and the normalised input in float32, the inputs
    of the linear layers, queries, keys, values and the output of the attention, and in the MLP both
    projections, the activation and the product. With checkpointing one layer does, at a time, and
    of the others the input is kept.
    """
    size = 2 if dtype == "bfloat16" else 4
    queries = shape.heads * shape.head_dim
    attention = size * 5 * queries  # keys and values are repeated to as many heads
    mlp = size * 4 * shape.intermediate
    norms = 2 * 2 * 4 * shape.hidden + 2 * size * shape.hidden
    layer = attention + mlp + norms
    if checkpointing:
        return layer + shape.layers * 4 * shape.hidden
    return shape.layers * layer


def logit_bytes(shape, dtype):
    """Bytes of the logits and of their gradient, for each completion token of a micro-batch."""
    size = 2 if dtype == "bfloat16" else 4
    return 2 * size * shape.vocabulary


def cache_bytes(shape, dtype):
    """Bytes of keys and values, for each token of all completions that are being sampled."""
    size = 2 if dtype == "bfloat16" else 4
    return 2 * size * shape.layers * shape.kv_heads * shape.head_dim


# --- All together ---------------------------------------------------------------------------------


@dataclass
class Work:
    """What one step of a script is made of."""

    dtype: str = "bfloat16"
    micro_batch_size: int = 8  # completions
    prompt: int = 256  # tokens
    completion: int = 256  # tokens
    sampled: int = 128  # completions that are sampled at the same time
    checkpointing: bool = False
    rank: int = 16  # of the adapters, in the row LORA


def total_bytes(row, shape, work):
    """Bytes of the larger of two moments: the backward pass, and sampling.

    A prompt is counted for each of its completions, as if none were shared.
    """
    linear = shape.linear_parameters()
    other = shape.other_parameters()
    weights = bytes_per_parameter(row, work.dtype) * linear
    weights += bytes_per_parameter(row, work.dtype, is_linear=False) * other
    if row == LORA:
        weights += (4 + 4 + ADAM) * shape.adapter_parameters(work.rank)
    rows = work.micro_batch_size
    training = 0
    if not row.startswith("rm_bt.py"):
        training = rows * work.completion * logit_bytes(shape, work.dtype)
        in_parts = min(LOGITS_AT_ONCE, rows * work.completion * shape.vocabulary)
        training += 3 * 4 * in_parts  # the float32 copy of one part, its softmax and its gradient
    tokens = rows * (work.prompt + work.completion)
    training += tokens * activation_bytes(shape, work.dtype, work.checkpointing)
    if not row.startswith(SAMPLERS) and row != LORA:
        return weights + training
    tokens = work.sampled * (work.prompt + work.completion)
    sampling = tokens * cache_bytes(shape, work.dtype)
    if row == LORA:
        return weights + max(training, sampling)
    num_trained, _ = ROWS[row]
    without_gradients = weights - num_trained * 4 * (linear + other)
    return max(weights + training, without_gradients + sampling)


# --- The tables -----------------------------------------------------------------------------------

FREE = 0.9  # share of a device's memory that is used: the rest is the driver's, or in fragments
CARDS = (24, 80)  # GB


def largest(row, gigabytes, work):
    """The largest model of SHAPES that fits -> its size in billions of parameters, or "none".

    Empty for a reward model, which is never alone.
    """
    if row == BESIDE:
        return ""
    fits = "none"
    for name, shape in SHAPES.items():
        if total_bytes(row, shape, work) <= FREE * gigabytes * 1e9:
            fits = name
    return fits


def parameter_table():
    """Lines of a Markdown table: bytes per parameter of each row, and the largest that fits."""
    small = Work(micro_batch_size=1, checkpointing=True, sampled=32)
    lines = [
        "| script | float32 | bfloat16 | largest on 24 GB, in B | on 80 GB | "
        "on 24 GB, saving | on 80 GB, saving |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [*ROWS, LORA]:
        cells = [f"`{row}`"]
        cells += [str(bytes_per_parameter(row, dtype)) for dtype in ("float32", "bfloat16")]
        for work in (Work(), small):
            for gigabytes in CARDS:
                cells.append(largest(row, gigabytes, work))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def token_table():
    """Lines of a Markdown table: kilobytes per token of each model of SHAPES, in bfloat16."""
    lines = [
        "| billion parameters | logits | activations | with `--gradient-checkpointing` | keys and "
        "values |",
        "|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        counts = [
            logit_bytes(shape, "bfloat16"),
            activation_bytes(shape, "bfloat16"),
            activation_bytes(shape, "bfloat16", checkpointing=True),
            cache_bytes(shape, "bfloat16"),
        ]
        lines.append(f"| {name} | " + " | ".join(f"{x / 1e3:.0f}" for x in counts) + " |")
    return lines


def main():
    """Print both tables."""
    print("\n".join([*parameter_table(), "", *token_table()]))


if __name__ == "__main__":
    main()
