"""What later passes over a layer do not compute again is what they would have computed."""

from __future__ import annotations

import pytest
import torch
import zoo

from calibration.finished import Finished
from calibration.replay import opened
from calibration.structure import discover
from calibration.sweep import Sweep
from calibration.windows import Windows
from checkpoint.source import Source

LENGTH, WINDOWS, MICRO_BATCH = 24, 5, 2  # the last micro-batch is smaller


def sweep_of(directory, path) -> Sweep:
    source = Source(directory, torch.float32, separate_experts=True)
    ids = torch.randint(3, zoo.VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return Sweep(source, discover(source), Windows(ids, {}), path, micro_batch=MICRO_BATCH)


def walked(sweep: Sweep, finished_too: bool) -> tuple[list[torch.Tensor], bytes, list[str]]:
    """Moments of the second layer's groups in turn, its linears damaged as they are passed; its output; and what was stored."""
    found, stored = list[torch.Tensor](), list[str]()
    sweep.embed()
    first, second = sweep.structure.layers[:2]
    with opened(sweep.source, first) as open_layer:
        sweep.advance(open_layer)
    with opened(sweep.source, second) as open_layer, sweep.finished(open_layer) as finished:
        for group in second.groups:
            with finished.passing():
                moments = sweep.collect(
                    open_layer, group.linears, frozenset({"second", "mean_absolute"}), advance=False
                )
            found += [
                each for item in moments.values() for each in vars(item).values() if isinstance(each, torch.Tensor)
            ]
            for linear in group.linears:
                open_layer.linear(linear.local).weight.data.mul_(0.9)
            if finished_too:
                finished.has(linear.local for linear in group.linears)
        with finished.passing():
            sweep.advance(open_layer)
        stored = sorted(path.name for path in sweep.path(0).parent.glob("finished-*"))
    assert not list(sweep.path(0).parent.glob("finished-*")), "nothing is left behind"
    return found, sweep.path(2).read_bytes(), stored


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_stored_outputs_change_no_bit(models, name, tmp_path):
    plain, output, nothing = walked(sweep_of(models(name), tmp_path / "plain"), False)
    found, same_output, _ = walked(sweep_of(models(name), tmp_path / "stored"), True)
    assert not nothing and output == same_output
    assert len(plain) == len(found) and all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_attention_is_computed_by_two_passes_of_five(models, tmp_path):
    sweep = sweep_of(models("llama"), tmp_path / "hidden")
    calls = []
    attention = sweep.source.model.get_submodule(sweep.structure.layers[1].path).self_attn
    attention.o_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    *_, stored = walked(sweep, True)
    batches = -(-WINDOWS // MICRO_BATCH)
    assert stored == ["finished-self_attn.bin"]
    # its own group's pass stops there, that of gate and up stores what it gives
    assert len(calls) == 2 * batches


def test_what_an_unfinished_linear_goes_into_is_not_stored(models, tmp_path):
    """A module with nothing left to compress, behind one with something left, may still change."""
    sweep = sweep_of(models("llama"), tmp_path / "hidden")
    sweep.embed()
    layer = sweep.structure.layers[0]
    with (
        opened(sweep.source, layer) as open_layer,
        Finished(open_layer, tmp_path, WINDOWS, MICRO_BATCH, "cpu") as finished,
    ):
        finished.has(linear.local for linear in layer.linears if linear.local.startswith("mlp."))
        with finished.passing():
            sweep.advance(open_layer)
        assert [path for path in tmp_path.glob("finished-*") if path.stat().st_size] == []
        with finished.passing():  # and nothing is read
            sweep.advance(open_layer)
