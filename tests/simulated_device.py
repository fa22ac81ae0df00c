# ruff: noqa: E501
"""A pretend accelerator: device "sim" computes on the CPU, but refuses to mix with CPU tensors.

It finds the commonest bug of code written without a GPU, a tensor made on the CPU that meets one on
the accelerator. It says nothing of speed, memory, kernels or bfloat16 on a real GPU. Run as a
program, it enables itself and calls scripts, one after the other, by a JSON file of {name of a run:
[script, {flag: value}]}: python tests/simulated_device.py runs.json. It says of each how it ended.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.utils.backend_registration as registration
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

CROSS_DEVICE = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense", "aten::set_"}
INDEXING = (
    "aten::index",
    "aten::_index",
    "aten::_unsafe_index",
)  # CUDA takes CPU index tensors too


def _is_sim(x) -> bool:
    return isinstance(x, torch.device) and x.type == "sim"


class SimTensor(torch.Tensor):
    """Wraps a CPU tensor and says that it lives on sim:0."""

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device("sim", 0),
            requires_grad=False,
        )

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self):
        return f"sim({self.raw})"

    def tolist(self):
        return self.raw.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert sim:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    name = func._schema.name
    flat, spec = pytree.tree_flatten((args, kwargs))
    sims = [x for x in flat if isinstance(x, SimTensor)]
    if not sims and not any(_is_sim(x) for x in flat):
        return func(*args, **kwargs)
    if sims and name not in CROSS_DEVICE and not name.startswith(INDEXING):
        for x in flat:
            if isinstance(x, torch.Tensor) and not isinstance(x, SimTensor) and x.dim() > 0:
                raise RuntimeError(
                    f"{name}: Expected all tensors to be on the same device, "
                    f"but found sim:0 and cpu (the CPU tensor has shape {tuple(x.shape)})"
                )
    wrapped = {id(x.raw): x for x in sims}
    raw = [
        x.raw if isinstance(x, SimTensor) else torch.device("cpu") if _is_sim(x) else x
        for x in flat
    ]
    cpu_args, cpu_kwargs = pytree.tree_unflatten(raw, spec)
    out = func(*cpu_args, **cpu_kwargs)
    if name == "aten::copy_":
        return args[0]
    target = kwargs.get("device")
    if isinstance(target, torch.device) and not _is_sim(target):
        return out

    def wrap(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, SimTensor):
            return x
        return (
            wrapped[id(x)] if id(x) in wrapped else SimTensor(x)
        )  # an in-place operation returns its own argument

    return pytree.tree_map(wrap, out)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _DeviceModule(registration._DummyBackendModule):
    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed):
        pass

    def _is_in_bad_fork(self):
        return False

    def synchronize(self, *args):
        pass


def _accept_sim_device(name):
    plain = getattr(torch, name)

    def maker(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "sim":
            kwargs.pop("device")
            return plain(*args, **kwargs).to("sim")
        return plain(*args, **kwargs)

    setattr(torch, name, maker)


def _attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the operation would add 0 and 1
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(
            ~attn_mask, torch.finfo(q.dtype).min
        )
    return torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def enable() -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # module.to("sim") swaps parameters for wrappers
    registration._setup_privateuseone_for_python_backend("sim", backend_module=_DeviceModule())
    # Fills a cache of the functions that `with torch.device("meta")` governs. With the wrappers in it,
    # models are not built on meta, and what no file has, heads and frequencies, stays uninitialised.
    _device_constructors()
    _accept_sim_device("tensor")
    _accept_sim_device("as_tensor")
    torch.nn.functional.scaled_dot_product_attention = _attention
    _Mode().__enter__()


def run_all(path) -> None:
    """Print a line for each run of the file: RUN and, as JSON, its name and what went wrong."""
    import common
    from transformers import PreTrainedModel

    common.WORTH_SHARING = 0
    common.LOGITS_AT_ONCE = 500  # several parts
    # It looks for shared storage, which wrappers have none of.
    PreTrainedModel.save_pretrained = lambda self, folder: None
    for name, (script, flags) in json.loads(Path(path).read_text()).items():
        module = importlib.import_module(script)
        wrong = ""
        try:
            module.main(module.Args(**flags))
        except (Exception, ValueError):
            wrong = traceback.format_exc()
        print("\nRUN", json.dumps([name, wrong]), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if sys.argv[2:] != ["cuda"]:  # the runs are on a GPU: nothing is simulated
        enable()
    run_all(sys.argv[1])
