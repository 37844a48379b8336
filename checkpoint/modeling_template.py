"""A model whose linear maps may be of low rank or have fewer channels; written by layerpress.

This one file, beside config.json, is all that transformers needs (``trust_remote_code=True``). The three base
classes below and ``model_type`` are filled in when the checkpoint is written; everything else is generic.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers import LlamaModel as BaseModel

FORMAT = 2


class LayerpressConfig(BaseConfig):
    """The base model's configuration plus ``layerpress``: the format, and form and rank of every linear of low rank."""

    model_type = "layerpress_llama"


class FactoredLinear(nn.Module):
    """``y = factor_out(factor_in(x))``: ``factor_in.weight`` is ``(r, d_in)``, ``factor_out.weight`` ``(d_out, r)``."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.factor_in = nn.Linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.factor_out = nn.Linear(rank, d_out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., d_in)`` to ``(..., d_out)``."""
        return self.factor_out(self.factor_in(x))


class PivotedLinear(nn.Module):
    """A product stored as r of its own rows (``factor_in``), from which the other rows follow (``factor_out``).

    ``factor_in.weight`` is ``(r, d_in)``, ``factor_out.weight`` ``(d_out - r, r)``; ``order`` (int32, ``(d_out,)``) says which of
    the r + (d_out - r) numbers so computed each output is.
    """

    order: torch.Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.factor_in = nn.Linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.factor_out = nn.Linear(rank, d_out - rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("order", torch.zeros(d_out, device=device, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(d_out, device=device, dtype=dtype)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., d_in)`` to ``(..., d_out)``."""
        kept = self.factor_in(x)
        y = torch.cat([kept, self.factor_out(kept)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias


def output_channels(d_in: int, d_out: int, rank: int, bias: bool, device: Any = None, dtype: Any = None) -> nn.Linear:
    """A linear of which only ``rank`` outputs are left."""
    return nn.Linear(d_in, rank, bias=bias, device=device, dtype=dtype)


def input_channels(d_in: int, d_out: int, rank: int, bias: bool, device: Any = None, dtype: Any = None) -> nn.Linear:
    """A linear of which only ``rank`` inputs are left."""
    return nn.Linear(rank, d_out, bias=bias, device=device, dtype=dtype)


MODULES: dict[str, Any] = {
    "factors": FactoredLinear,
    "pivoted": PivotedLinear,
    "output-channels": output_channels,
    "input-channels": input_channels,
}


def factorise(base: nn.Module, config: Any) -> None:
    """Replace the linears named in ``config.layerpress["linears"]`` (paths inside the base model) by modules of low rank.

    Raises ValueError for an unknown format or form, a path that is no linear map, or an impossible rank: before
    anything is allocated.
    """
    settings = getattr(config, "layerpress", None)
    if (
        not isinstance(settings, dict)
        or settings.get("format") != FORMAT
        or not isinstance(settings.get("linears"), dict)
    ):
        raise ValueError(
            f"config.json does not hold layerpress settings of format {FORMAT}; bring the checkpoint again"
        )
    modules = dict(base.named_modules())
    for path, item in settings["linears"].items():
        form, rank = (item.get("form"), item.get("rank")) if isinstance(item, dict) else (None, None)
        linear = modules.get(path)
        weight = getattr(linear, "weight", None)
        if linear is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise ValueError(f"config.json names {path!r} as compressed, which is no linear map of this model")
        if form not in MODULES:
            raise ValueError(f"config.json gives {path!r} the form {form!r}; known are {', '.join(MODULES)}")
        d_out, d_in = weight.shape if isinstance(linear, nn.Linear) else (weight.shape[1], weight.shape[0])
        largest = {"output-channels": d_out, "input-channels": d_in}.get(form, min(d_out, d_in))
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= largest:
            raise ValueError(f"config.json gives {path!r} the rank {rank!r}; it must be 1 to {largest}")
        bias = getattr(linear, "bias", None) is not None or item.get("bias") is True
        base.set_submodule(path, MODULES[form](d_in, d_out, rank, bias, weight.device, weight.dtype))


class LayerpressModel(BaseModel):
    """The decoder without a head, with linears of low rank."""

    config_class = LayerpressConfig

    def __init__(self, config: LayerpressConfig) -> None:
        super().__init__(config)
        factorise(self, config)


class LayerpressForCausalLM(BaseForCausalLM):
    """The language model, with linears of low rank."""

    config_class = LayerpressConfig

    def __init__(self, config: LayerpressConfig) -> None:
        super().__init__(config)
        factorise(getattr(self, self.base_model_prefix), config)
