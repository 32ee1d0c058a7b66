"""Imported at a process's start: operations on the stub's memory run natively, then are computed by the host in place.

The native call checks devices and shapes and allocates; its kernels do nothing. What has no kernel on a CPU is written
out in `attention.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.stub_gpu.attention import OF_ATTENTION

# Sizes, places and scalars: the native call is all there is.
METADATA = frozenset(
    "empty empty_strided empty_like new_empty new_empty_strided detach alias set_ resize_ record_stream is_pinned"
    " _pin_memory lift_fresh _local_scalar_dense _unsafe_view _reshape_alias is_same_size is_set_to".split()
)
# Natively these count what kernels wrote, so they are computed on the host alone.
SIZED_BY_VALUES = frozenset(
    "nonzero masked_select masked_scatter_backward _unique2 unique_dim unique_consecutive repeat_interleave bincount"
    " multinomial index index_put _unsafe_index_put".split()
)
HOSTS_OWN = ("generator", "pin_memory", "non_blocking")  # arguments that the host's call has no use for


def on_host(value: Any) -> Any:
    """The same memory as the host's tensor; the host for the device."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, torch.Generator):
        return None
    if not isinstance(value, Tensor) or not value.is_cuda:
        return value
    storage = value.untyped_storage()
    if not value.numel():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    block = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(block, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=value.dtype).set_(flat, value.storage_offset(), value.size(), value.stride())


def on_device(value: Any) -> Any:
    return value.to("cuda") if isinstance(value, Tensor) else value


def wide_product(*arguments: Any, out: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """`mm` and `addmm` into another dtype, which CPUs do not have."""
    *factors, dtype = arguments
    product = alpha * (factors[-2].double() @ factors[-1].double())
    if len(factors) == 3:
        product = product + beta * factors[0].double()
    return product.to(dtype) if out is None else out.copy_(product)


def log_sigmoid_backward(upstream: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    """A CPU's own wants the buffer that its forward filled."""
    return (upstream.double() * torch.sigmoid(-x.double())).to(x.dtype)


def histc(x: Tensor, *of_bins: Any) -> Tensor:
    """A CPU's own takes no integers, in which the experts of tokens are counted."""
    return torch.histc(x.double(), *of_bins).to(x.dtype)


WRITTEN_OUT: Mapping[str, Callable[..., Any]] = OF_ATTENTION | {
    "histc": histc,
    "log_sigmoid_backward": log_sigmoid_backward,
}


class Values(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        name = func.name().partition("::")[2].partition(".")[0]
        if not _on_the_stub(leaves, tensors) or name in METADATA or func.is_view:
            return func(*args, **kwargs)
        by_host = func
        if name in WRITTEN_OUT:
            by_host = WRITTEN_OUT[name]
        elif name in ("mm", "addmm") and func.name().endswith((".dtype", ".dtype_out")):
            by_host = wide_product
        given = tree_map(on_host, args)
        named = {key: tree_map(on_host, value) for key, value in kwargs.items() if key not in HOSTS_OWN}
        if name in SIZED_BY_VALUES:
            return tree_map(on_device, by_host(*given, **named))
        native = None if name == "index_put_" else func(*args, **kwargs)
        computed = by_host(*given, **named)
        if name == "index_put_":
            return args[0]
        returns = func._schema.returns
        if all(one.alias_info is not None and one.alias_info.is_write for one in returns):  # in place, or nothing
            return native
        return _filled(native, computed)


def _on_the_stub(leaves: list[Any], tensors: list[Tensor]) -> bool:
    if any(isinstance(one, (FakeTensor, FunctionalTensor)) or one.is_meta for one in tensors):
        return False  # a compiler's
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    return any(one.is_cuda for one in tensors) or any(device.type == "cuda" for device in devices)


def _filled(native: Any, computed: Any) -> Any:
    """What was allocated, with what was computed in it."""
    if not isinstance(native, (Tensor, list, tuple)):
        return computed
    for place, value in zip(tree_leaves(native), tree_leaves(computed), strict=False):
        if isinstance(place, Tensor) and isinstance(value, Tensor) and place.numel():
            on_host(place).copy_(value)
    return native


Values().__enter__()
