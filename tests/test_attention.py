"""Attention by products against torch's kernel, forwards and backwards, and what goes to that kernel."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

from calibration import attention
from calibration.structure import discover
from checkpoint.source import Source


@pytest.mark.parametrize(("heads", "shared"), [(6, 6), (6, 2), (4, 1)])
def test_products_are_as_exact_as_the_kernel(heads, shared):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 256, 16), (2, shared, 256, 16), (2, shared, 256, 16))
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    upstream = torch.randn(2, 256, heads, 16, generator=generator).bfloat16()

    def results(attend, dtype):
        inputs = [item.to(dtype).requires_grad_() for item in given]
        found = attend(*inputs)
        return [found, *torch.autograd.grad(found, inputs, upstream.to(dtype))]

    def kernel(query, key, value):
        options = {"is_causal": True, "scale": 0.3, "enable_gqa": True}
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    exact = results(kernel, torch.float64)
    ours = results(lambda *inputs: attention.causal_attention(*inputs, 0.3), torch.bfloat16)
    theirs = results(kernel, torch.bfloat16)
    for true, found, other in zip(exact, ours, theirs, strict=True):
        error, usual = ((item.double() - true).norm() / true.norm() for item in (found, other))
        assert found.shape == true.shape and error < max(2.5 * usual, 0.006)


def test_with_gradients_and_without_is_the_same():
    # without, there are more blocks, and probabilities take the place of the scores
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, 512, 64, generator=generator).bfloat16() for heads in (9, 3, 3)]
    with torch.no_grad():
        alone = attention.causal_attention(*given, 0.125).double()
    differs = (attention.causal_attention(*given, 0.125).double() - alone).norm() / alone.norm()
    assert float(differs) < 0.002  # where they do, products of other sizes are summed in another order


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma3", "falcon"])
def test_a_model_gives_the_same_logits_with_it(models, name, monkeypatch):
    calls = []
    own = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *given: calls.append(1) or own(*given))
    model = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.bfloat16)
    monkeypatch.setattr(attention, "SHORTEST", 64)
    ids = torch.randint(zoo.VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits.float()
        attention.use(model)
        after = model(ids).logits.float()
    # every layer of this gemma3 slides, which takes a mask; falcon calls torch's kernel itself
    assert len(calls) == (0 if name in ("gemma3", "falcon") else 3)
    assert float((after - before).norm() / before.norm()) < 0.03


def test_the_attention_is_not_written(models):
    source = Source(models("llama"), torch.bfloat16)
    discover(source)
    attention.use(source.model)
    assert attention.NAME not in source.config.to_json_string()
