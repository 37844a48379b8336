"""Several processes on one job: the moments of one, the same checkpoint when repeated or resumed, and a clean end when one dies."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from accelerate.state import AcceleratorState

import run_pipeline
from calibration.replay import opened
from calibration.structure import discover
from calibration.sweep import Sweep
from calibration.windows import Windows
from checkpoint import processes
from checkpoint.source import Source
from eval import __main__ as evaluation

ROOT = Path(run_pipeline.__file__).parent
SMALL = ["--calibration-tokens", "5120", "--sequence-length", "64", "--evaluate", "none", "--dtype", "float32"]
LOW_RANK = ["--ratio-scope", "decoder", "--target-ratio", "0.7"]


# gloo would look for the machine's own name, which need not be known to it
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}


def together(count: int, work: Callable[[int], Any], directory: Path) -> list[Any]:
    """What ``work(index)`` gives in each of ``count`` forked processes that a launcher might have started."""
    port, children = processes.free_port(), []
    for index in range(count):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        code = 1
        try:
            place = {"RANK": index, "WORLD_SIZE": count, "LOCAL_RANK": index, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1} | LOOPBACK
            os.environ.update({name: str(value) for name, value in place.items()})
            torch.set_num_threads(1)  # a forked child has no threads but its own
            AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier test left was of a single process
            (directory / f"{index}.pickle").write_bytes(pickle.dumps(work(index)))
            code = 0
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * count
    return [pickle.loads((directory / f"{index}.pickle").read_bytes()) for index in range(count)]


def test_sums_and_what_each_has_reach_all(tmp_path):
    def work(index: int) -> Any:
        processes.join()
        total = torch.full((2, 3), index + 1.0)
        processes.add_up([total])
        rows = processes.rows_of_all(torch.full((index + 1, 2), index, dtype=torch.bfloat16))
        united = processes.united(
            {f"of-{index}": torch.tensor(index, dtype=torch.int8), f"none-{index}": torch.empty(0, 4)}
        )
        share = processes.own_share([5.0, 4.0, 3.0, 3.0, 3.0], lambda item: item)
        found = total, processes.added_up([index, 1]), rows, united, share, processes.own_batches(7, 2).tolist()
        return *found, processes.of_main(lambda: index), processes.notes_of_all({index: "here"})

    found = together(3, work, tmp_path)
    for total, sums, rows, united, _, _, of_main, notes in found:
        assert torch.equal(total, torch.full((2, 3), 6.0)) and sums == [3, 3]
        assert rows[:, 0].tolist() == [0, 1, 1, 2, 2, 2] and rows.dtype == torch.bfloat16
        assert {name: item.tolist() for name, item in united.items() if name.startswith("of")} == {
            f"of-{index}": index for index in range(3)
        }
        assert united["none-1"].shape == (0, 4) and of_main == 0 and notes == dict.fromkeys(range(3), "here")
    assert [item[4] for item in found] == [[5.0], [4.0, 3.0], [3.0, 3.0]]
    assert [item[5] for item in found] == [[0, 1, 6], [2, 3], [4, 5]]


NEEDS = frozenset({"second", "mean_absolute", "gradient", "row_fisher", "weighted", "samples"})


def moments(model: Path, directory: Path) -> dict[str, Any]:
    """Forward and backward through the last layer of a model, on 7 windows in micro-batches of 2; 5 windows go backward."""
    processes.join()
    source = Source(model, torch.float32)
    structure = discover(source)
    ids = torch.randint(zoo.VOCABULARY, (7, 32), generator=torch.Generator().manual_seed(0))
    directory.mkdir(exist_ok=True)
    sweep = Sweep(source, structure, Windows(ids, {}), directory / "hidden", 2, 5)
    sweep.embed()
    for layer in structure.layers:
        with opened(source, layer) as open_layer:
            sweep.advance_and_sum(open_layer, [layer.linears], NEEDS)
    sweep.start_backward("sampled", 0)
    with opened(source, structure.layers[-1]) as open_layer:
        found = sweep.collect_backward(open_layer, structure.layers[-1].linears, NEEDS)
    whole = Sweep(source, structure, Windows(ids, {}), directory / "whole", 2)
    whole.embed()
    with opened(source, structure.layers[0]) as open_layer:
        whole.advance(open_layer)
    return {name: vars(item) for name, item in found.items()} | {"turning": {"last": whole.turning(0)}}


@pytest.mark.parametrize("count", [2, 3])
def test_the_moments_are_those_of_one_process(models, tmp_path, count):
    alone = moments(models("llama"), tmp_path / "alone")
    every = together(count, lambda _: moments(models("llama"), tmp_path / "shared"), tmp_path)
    for shared in every:
        assert shared.keys() == alone.keys()
        for linear, expected in alone.items():
            for name, value in expected.items():
                other = shared[linear][name]
                if value is None:
                    assert other is None, name
                elif not isinstance(value, torch.Tensor):
                    assert other == pytest.approx(value, rel=1e-6), name
                elif name.endswith("samples"):  # the same tokens, in another order
                    assert torch.allclose(other.square().sum(0), value.square().sum(0), rtol=1e-4, atol=1e-7)
                else:
                    assert float((other - value).abs().max()) <= 1e-6 * float(value.abs().max()), (linear, name)


def run_together(count: int, arguments: list[str], directory: Path) -> None:
    assert together(count, lambda _: run_pipeline.main(arguments), directory) == [0] * count


@pytest.mark.parametrize(
    ("recipe", "architecture", "count"),
    [
        ("svd-llm", "qwen2", 2),
        ("loss-aware", "llama", 3),
        ("llm-rom", "llama", 2),
        ("lorap", "llama", 2),
        ("auto", "gpt2", 2),
    ],
)
def test_a_checkpoint_of_several_processes_is_that_of_one(
    models, text, tmp_path, monkeypatch, recipe, architecture, count
):
    monkeypatch.setattr("checkpoint.sink.SHARD_BYTES", 100_000)  # several files, with a writer each
    more = ["--target-ratio", "0.5", "--group-size", "16"] if recipe == "auto" else LOW_RANK
    given = ["--model", str(models(architecture)), "--calibration", str(text), "--recipe", recipe, *SMALL, *more]
    outputs = [tmp_path / "alone", tmp_path / "shared", tmp_path / "again"]
    assert run_pipeline.main([*given, "--output", str(outputs[0])]) == 0
    for output in outputs[1:]:
        run_together(count, [*given, "--output", str(output)], tmp_path)
    assert zoo.content(outputs[1]) == zoo.content(outputs[2]), "the same flags give the same bytes"
    reports = [json.loads((output / "report.json").read_text()) for output in outputs[:2]]
    assert reports[1]["run"]["processes"] == count
    if reports[0]["predicted_loss_nats_per_token"] is not None:
        assert reports[1]["predicted_loss_nats_per_token"] == pytest.approx(
            reports[0]["predicted_loss_nats_per_token"], rel=1e-3, abs=1e-6
        )
    files = [sorted(path.name for path in output.glob("model-*.safetensors")) for output in outputs[:2]]
    assert len(files[0]) > 1 and files[0] == files[1]


def test_when_one_dies_the_others_end_cleanly_and_the_job_goes_on(models, text, tmp_path, capfd):
    arguments = [
        "--model",
        str(models("llama")),
        "--calibration",
        str(text),
        "--recipe",
        "loss-aware",
        *SMALL,
        *LOW_RANK,
    ]
    run_together(2, [*arguments, "--output", str(tmp_path / "whole")], tmp_path)
    capfd.readouterr()
    given = [*arguments, "--output", str(tmp_path / "out")]

    def dying(index: int) -> int:
        calls, notes_of_all = iter(range(2)), processes.notes_of_all

        def second_is_the_last(notes: Any) -> Any:
            if index == 1 and next(calls) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return notes_of_all(notes)

        processes.notes_of_all = second_is_the_last
        return run_pipeline.main(given)

    with pytest.raises(AssertionError, match="-9"):
        together(2, dying, tmp_path)
    told = capfd.readouterr().err
    assert "error: another process of this job has ended; the same command goes on" in told and "Traceback" not in told
    assert pickle.loads((tmp_path / "0.pickle").read_bytes()) == 2 and not (tmp_path / "out").exists()
    run_together(2, given, tmp_path)
    assert "backward           1/3" not in capfd.readouterr().err, "the finished layer is not done again"
    assert zoo.content(tmp_path / "out") == zoo.content(tmp_path / "whole")
    with pytest.raises(AssertionError, match="2"):
        run_together(3, [*given, "--fresh", "--recipe", "asvd-search"], tmp_path)
    assert "one process does alone" in capfd.readouterr().err


@pytest.mark.checks_in_fresh_processes
def test_a_launcher_starts_them_and_they_share_the_evaluation(models, text, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERPRESS_CACHE", str(tmp_path / "cache"))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(processes.free_port()),
    ]
    given = ["--model", str(models("llama")), "--calibration", str(text), "--recipe", "svd-llm", *SMALL, *LOW_RANK]
    done = subprocess.run(
        [*launch, str(ROOT / "run_pipeline.py"), *given, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("written:") == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["run"]["processes"] == 2
    arguments = ["--model", str(tmp_path / "out"), "--trust-remote-code", "--text", str(text), "--windows", "3"]
    assert evaluation.main([*arguments, "--evaluate", "texts", "--output", str(tmp_path / "alone.json")]) == 0
    done = subprocess.run(
        [*launch, "-m", "eval", *arguments, "--evaluate", "texts", "--output", str(tmp_path / "shared.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    figures = [json.loads((tmp_path / f"{name}.json").read_text())["model"] for name in ("alone", "shared")]
    assert not figures[1]["perplexities"][0]["cached"]
    values = [item["perplexities"][0]["perplexity"] for item in figures]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
