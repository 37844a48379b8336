"""Memory that is planned: what is held, fewer windows and more passes, limits that are kept or refused."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import zoo
from test_pipeline import ROOT, flags
from zoo import content

import run_pipeline
from calibration.moments import GroupCollector, moment_bytes
from checkpoint.environment import end_loading, start_loading
from checkpoint.errors import UserError
from compress import pipeline
from compress.footprint import footprints, in_passes, within
from compress.plan import make_source
from compress.recipe import load_recipe, recipe_names

NEEDS = [load_recipe(name).needs for name in recipe_names()]
SIZES = [{"q": (8, 8), "k": (4, 8)}, {"gate": (12, 8), "up": (12, 8)}, {"down": (8, 12)}]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "+".join(sizes))
def test_moment_bytes_are_those_of_the_collector(sizes):
    """Counted over the tensors that a collector gives after one batch, shared ones once, for what every recipe needs."""
    for needs in set(NEEDS) - {frozenset({"influence"})}:
        collector = GroupCollector(sizes, list(sizes), needs, 6, range(1))
        width = next(iter(sizes.values()))[1]
        linears = {name: torch.nn.Linear(d_in, d_out, bias=False) for name, (d_out, d_in) in sizes.items()}
        handles = collector.hooks(linears)
        x = torch.randn(10, width, requires_grad=True)
        torch.autograd.grad(sum(linear(x).square().sum() for linear in linears.values()), x)
        for handle in handles:
            handle.remove()
        every = [item for moments in collector.moments(10).values() for item in vars(moments).values()]
        held = {item.data_ptr(): item.nbytes for item in every if isinstance(item, torch.Tensor)}
        assert sum(moment_bytes(sizes, needs, 6, 4).values()) == sum(held.values()), needs


@pytest.mark.parametrize(("recipe", "more"), [("svd-llm", ()), ("quantized", ("--group-size", "16"))])
def test_more_passes_over_a_layer_change_no_byte(models, text, tmp_path, monkeypatch, recipe, more):
    """As many passes as there are linears, whose groups go apart: each moment is summed as it was."""
    arguments = ("--recipe", recipe, *more)
    assert run_pipeline.main(flags(models("qwen2"), text, tmp_path / "one", *arguments)) == 0
    monkeypatch.setattr(pipeline, "within", lambda source, structure, recipe, limit: (recipe, 7))
    assert run_pipeline.main(flags(models("qwen2"), text, tmp_path / "seven", *arguments)) == 0
    assert content(tmp_path / "one") == content(tmp_path / "seven")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose layers take more than the process, so that a limit has something to bring down."""
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2, "num_attention_heads": 8}
    return zoo.write_model(tmp_path_factory.mktemp("wide") / "source", "llama", torch.bfloat16, **sizes)


def test_a_limit_takes_fewer_windows_then_more_passes_then_refuses(wide, monkeypatch):
    # with more threads what is solved at a time would be more than the windows take
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    recipe = replace(load_recipe("loss-aware"), sequence_length=64)
    source, structure, _ = make_source(wide, recipe, False)
    needed = max(item.nbytes for item in footprints(source, structure, recipe))
    assert within(source, structure, recipe, None) == (recipe, 1)
    assert within(source, structure, recipe, needed) == (recipe, 1)
    found = []
    for limit in range(needed - 1, 0, -5_000_000):
        try:
            smaller, passes = within(source, structure, recipe, limit)
        except UserError as problem:
            assert "backward at model.layers." in str(problem) and "moments" in str(problem)
            break
        assert max(item.nbytes for item in footprints(source, structure, smaller, passes)) <= limit
        found.append((-smaller.micro_batch, passes))
    assert found == sorted(found) and found[0] < (-1, 1) < found[-1], found
    layer = structure.layers[0]
    for passes in range(1, len(layer.linears) + 1):
        runs = in_passes(layer, recipe, passes)
        assert len(runs) <= passes and [linear for run in runs for linear in run] == list(layer.linears)
    assert len(runs) > len(layer.groups), "the linears of a group go apart"


@pytest.mark.parametrize("limit", ["0.65GB", "0.75GB"])
def test_the_measured_peak_stays_below_the_limit(wide, text, tmp_path, limit):
    """Within a tenth: what the process itself takes was measured on one machine, and others have more cores and other libraries."""
    arguments = flags(wide, text, tmp_path / "out", "--recipe", "loss-aware", "--memory-limit", limit)
    command = [sys.executable, str(ROOT / "run_pipeline.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    run = report["run"]
    assert run["peak_memory_bytes"] / 1.1 <= run["planned_memory_bytes"] <= float(limit[:-2]) * 1e9
    planned = {item["stage"]: item["planned_bytes"] for item in report["stages"]}
    assert {"forward", "loss gradient", "backward", "writing", "checking"} <= {
        name for name in planned if planned[name]
    }
    assert all(item["peak_bytes"] / 1.1 <= item["planned_bytes"] for item in report["stages"])


def test_limits_that_cannot_be_kept_are_refused_at_once(models, text, tmp_path, capsys):
    arguments = flags(models("llama"), text, tmp_path / "out", "--recipe", "svd-llm", "--memory-limit")
    assert run_pipeline.main([*arguments, "300MB"]) == 2
    told = capsys.readouterr().err
    assert "--memory-limit 0.30GB is too little" in told and "the process 515 MB" in told
    with pytest.raises(SystemExit) as stopped:
        run_pipeline.main([*arguments, "much"])
    assert stopped.value.code == 2 and "must be a size as 4GB" in capsys.readouterr().err
    assert not (tmp_path / "out.work").exists()


def test_a_limit_of_the_system_is_seen_at_once_or_met_and_survived(wide, text, tmp_path):
    """RLIMIT_DATA below the plan's need is refused; one that falls while the job runs ends it in one line, and it goes on."""
    arguments = flags(wide, text, tmp_path / "out", "--recipe", "loss-aware")
    command = [sys.executable, str(ROOT / "run_pipeline.py"), *arguments]
    low = 400_000_000
    for allowed, remedy in ((low, "raise that\n"), (700_000_000, "raise that, or plan for less with --memory-limit\n")):
        limit = ["bash", "-c", f'ulimit -d {allowed // 1024}; exec "$@"', "limited"]
        done = subprocess.run([*limit, *command], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.endswith(remedy), done.stderr
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not list((tmp_path / "out.work").glob("factors/*.safetensors")) and process.poll() is None:
            time.sleep(0.005)
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (low, low))
        told = process.communicate()[1]
    finally:
        process.kill()  # if it hung
    assert process.returncode == 2 and "the system gave no more memory" in told.splitlines()[-1], told
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = flags(wide, text, tmp_path / "whole", "--recipe", "loss-aware")
    subprocess.run(
        [sys.executable, str(ROOT / "run_pipeline.py"), *whole], check=True, env=dict(os.environ), capture_output=True
    )
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_garbage_is_collected_as_usual_once_everything_is_loaded():
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    end_loading()
    assert gc.get_freeze_count() == frozen, "of a process that is not ours nothing is frozen"
    start_loading()
    assert gc.get_threshold() > usual
    try:
        end_loading()
        assert gc.get_threshold() == usual and gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
