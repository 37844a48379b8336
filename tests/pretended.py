"""A device that this machine has not: its tensors lie in the host's memory, and say that they do not.

What a GPU would refuse is refused: operations on tensors of two devices, and numbers read by numpy. So the path of
``--device cuda`` runs where there is none, to the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# a GPU takes indices from the host, and copies between the two
ACROSS = {aten.copy_.default, aten.index.Tensor}


class There(torch.Tensor):
    """A tensor on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        assert not isinstance(inner, There)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    def cpu(self) -> torch.Tensor:
        return self.inner.detach().clone()

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return self.cpu().to(dtype or self.dtype)
        return super().to(dtype or self.dtype, copy=copy)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of the pretended device to numpy")

    def __repr__(self) -> str:
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "device"}
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        here = [item for item in tensors if not isinstance(item, There) and item.dim()]
        if here and function not in ACROSS:
            raise RuntimeError(f"{function} of tensors on two devices: {[tuple(item.shape) for item in tensors]}")
        plain = function(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        if function is aten.copy_.default and not isinstance(args[0], There):
            return args[0]
        return return_and_correct_aliasing(function, args, kwargs, tree_map(_there, plain))


def _unwrapped(item: Any) -> Any:
    return item.inner if isinstance(item, There) else item


def _there(item: Any) -> Any:
    return There(item) if isinstance(item, torch.Tensor) and not isinstance(item, There) else item


class Pretended(TorchFunctionMode):
    """While it is entered, tensors that are sent to the device, or made there, are ``There``."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to and not isinstance(args[0], There):
            device, dtype, _, _ = torch._C._nn._parse_to(
                *args[1:], **{key: kwargs[key] for key in kwargs if key != "copy"}
            )
            if device == DEVICE:
                return There(args[0].detach().to(dtype or args[0].dtype))
        wanted = kwargs.get("device")
        makes = function not in (torch.Tensor.to, torch._C._nn._parse_to)
        if makes and wanted is not None and torch.device(wanted) == DEVICE:
            return tree_map(_there, function(*args, **{**kwargs, "device": "cpu"}))
        return function(*args, **kwargs)
