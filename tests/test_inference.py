"""What makes a written model faster changes none of its numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from checkpoint.modeling_template import PivotedLinear
from checkpoint.tensorfile import ALIGNMENT, write_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(), (1, 1), (2, 3), (0,)])
@pytest.mark.parametrize(("rank", "bias"), [(5, True), (24, False)])
def test_pivoted_outputs_are_selected_exactly(rank, bias, rows, dtype):
    """Against a selection number by number, forwards and backwards; of full rank, no row is left to follow."""
    generator = torch.Generator().manual_seed(0)
    module = PivotedLinear(16, 24, {"rank": rank}, bias, dtype=dtype)
    module.order.copy_(torch.randperm(24, generator=generator))
    x = torch.randn(*rows, 16, generator=generator).to(dtype).requires_grad_()
    kept = module.factor_in(x)
    computed = torch.cat([kept, module.factor_out(kept)], dim=-1)
    wanted = torch.stack([computed[..., index] for index in module.order.tolist()], dim=-1)
    if module.bias is not None:
        wanted = wanted + torch.nn.init.normal_(module.bias, generator=generator)
    found = module(x)
    assert torch.equal(found, wanted) and found.is_contiguous()
    upstream = torch.randn(found.shape, generator=generator).to(dtype)
    changes = [torch.autograd.grad(y, x, upstream)[0] for y in (found, wanted)]
    assert torch.allclose(*changes, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_mapped_tensors_begin_where_cache_lines_do(tmp_path):
    """Whatever the length of the header, up to the first tensor of an odd size."""
    for length in range(1, 12):
        tensors = {"a" * length: torch.ones(3, 64), "b": torch.ones(5, 32), "c": torch.ones(3)}
        write_tensors(tmp_path / "file.safetensors", tensors, {"format": "pt"})
        with safe_open(tmp_path / "file.safetensors", "pt") as file:
            for name, tensor in tensors.items():
                assert torch.equal(file.get_tensor(name), tensor)
                assert file.get_tensor(name).data_ptr() % ALIGNMENT == 0
