"""The measuring half of ASVD's search, streamed: the calibration loss with one linear compressed at a time.

For each layer the variants of its linears make as many copies of the hidden states behind it, which then go through the
later layers together: the layers are read ``layers^2 / 2`` times, one is in memory, and the disk holds one layer's variants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from calibration.replay import OpenLayer, opened
from calibration.structure import Linear
from calibration.sweep import Sweep
from calibration.windows import Windows
from checkpoint.progress import Stage
from checkpoint.workdir import WorkDirectory
from compress.allocations.sensitivity import RATIOS, at_ratio
from compress.install import module_for
from compress.plan import Plan
from compress.records import DENSE_STAGE, SEARCH_STAGE, part_of
from compress.sizes import curve_of


def search(plan: Plan, windows: Windows, work: WorkDirectory) -> Stage:
    """Record the mean loss (nats per token) of every linear at each of ``RATIOS``, over the first search tokens."""
    recipe, layers = plan.recipe, plan.structure.layers
    count = max(1, recipe.search_tokens // recipe.sequence_length)
    few = Windows(windows.ids[:count], windows.provenance)
    base = Sweep(plan.source, plan.structure, few, work.path / "hidden-search", recipe.micro_batch)
    done = work.leading(SEARCH_STAGE, len(layers))
    with Stage("searching", len(layers)) as stage:
        stage.step(done)
        if done < len(layers):
            base.embed()
        for layer in layers[done:]:
            factored = [linear for linear in layer.linears if recipe.storage.largest_rank(linear) >= 1]
            tried = [(linear, ratio) for linear in factored for ratio in RATIOS]
            copies = Windows(few.ids.repeat(len(tried), 1), {})
            directory = work.path / "hidden-variants"
            variants = Sweep(plan.source, plan.structure, copies, directory, recipe.micro_batch)
            record = work.get(DENSE_STAGE, layer.index)
            with opened(plan.source, layer) as open_layer:
                variants.vary(open_layer, base, _modules(plan, open_layer, record, tried))
                base.advance(open_layer)
            for later in layers[layer.index + 1 :]:
                with opened(plan.source, later) as open_later:
                    variants.advance(open_later)
                variants.forget(later.index)
            losses = torch.tensor(variants.losses(len(few.ids)), dtype=torch.float64).view(len(factored), len(RATIOS))
            variants.close()
            found = {f"{linear.local}.sensitivity": row for linear, row in zip(factored, losses, strict=True)}
            work.put(SEARCH_STAGE, layer.index, found, {})
            base.forget(layer.index)
            stage.step()
        base.close()
    return stage


def _modules(
    plan: Plan, open_layer: OpenLayer, record: Mapping[str, torch.Tensor], tried: Iterable[tuple[Linear, float]]
) -> Iterator[dict[str, torch.nn.Module]]:
    """One linear of the layer at one ratio after the other; the linear itself where that ratio has no rank."""
    for linear, ratio in tried:
        rank = at_ratio(curve_of(plan.recipe.storage, linear), ratio)
        if rank is None:
            yield {}
        else:
            yield {
                linear.local: module_for(
                    plan, open_layer, linear, part_of(record, linear, plan.recipe.storage.spec(linear, rank))
                )
            }
