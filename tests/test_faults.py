"""A run that is killed, ended, starved or whose source changes: nothing is lost, and the same command ends in the same bytes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import zoo
from test_pipeline import ROOT, flags
from zoo import content

import run_pipeline
from checkpoint.memory import out_of_memory
from checkpoint.workdir import WorkDirectory


@pytest.mark.parametrize(
    ("run", "every"), [("loss-aware", 83), ("half backward", 97), ("quantized", 131), ("llm-rom", 89)]
)
def test_faults_at_some_operations(run, every):
    """The short form of benchmarks/faults.py, which takes every operation and more kinds of runs."""
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--runs", run, "--every", str(every)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    name, _, faults, survived = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert name == run and int(faults) >= 6 and faults == survived


def interrupt(command: list[str], number: int, when: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Start the command, and send it the signal as soon as ``when`` holds."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not when() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    out, told = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, told)


def test_killed_and_ended_for_real(models, text, tmp_path):
    """SIGKILL while hidden states are kept, at the first record and while the output is written, SIGTERM in between."""
    arguments = flags(models("qwen2"), text, tmp_path / "out")
    command = [sys.executable, str(ROOT / "run_pipeline.py"), *arguments]
    work, records = tmp_path / "out.work", tmp_path / "out.work" / "factors"
    moments: list[tuple[int, int, Callable[[], bool]]] = [
        (signal.SIGKILL, -9, lambda: any(work.glob("hidden-*/*"))),
        (signal.SIGKILL, -9, lambda: any(records.glob("*.safetensors"))),
        (signal.SIGTERM, 143, lambda: any(records.glob("0001.*"))),
        (signal.SIGKILL, -9, lambda: (tmp_path / "out.partial").exists()),
    ]
    for number, code, when in moments:
        done = interrupt(command, number, when)
        assert done.returncode == code, done.stderr
        assert not (tmp_path / "out").exists()
        if number == signal.SIGTERM:
            assert done.stderr.splitlines()[-1].startswith("interrupted: the same command goes on")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run_pipeline.main(flags(models("qwen2"), text, tmp_path / "whole")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_source_that_changes_while_the_job_runs(text, tmp_path, monkeypatch, capsys):
    source = zoo.write_model(tmp_path / "source", "llama")
    shard = source / "model.safetensors"
    before = shard.read_bytes()
    arguments = flags(source, text, tmp_path / "out", "--recipe", "svd-llm")
    put = WorkDirectory.put

    def then_changed(self, stage, index, tensors, notes):
        put(self, stage, index, tensors, notes)
        shard.write_bytes(before[:-4] + b"\0\0\0\0")

    monkeypatch.setattr(WorkDirectory, "put", then_changed)
    assert run_pipeline.main(arguments) == 2
    assert "has changed since this run began" in capsys.readouterr().err
    monkeypatch.undo()
    assert run_pipeline.main(arguments) == 2
    assert "weights_sha256 was" in capsys.readouterr().err
    shard.write_bytes(before)
    assert run_pipeline.main(arguments) == 0


def test_a_calibration_text_that_disappears(models, tmp_path, monkeypatch, capsys):
    """What is finished waits for it: the tokens are part of what the records depend on."""
    text = zoo.write_text(tmp_path / "text.txt", 4000)
    arguments = flags(models("llama"), text, tmp_path / "out", "--recipe", "svd-llm")
    put = WorkDirectory.put

    def then_gone(self, stage, index, tensors, notes):
        put(self, stage, index, tensors, notes)
        text.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkDirectory, "put", then_gone)
    assert run_pipeline.main(arguments) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert run_pipeline.main(arguments) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: calibration text") and "text.txt is no file here" in told
    zoo.write_text(text, 4000)
    monkeypatch.setattr(WorkDirectory, "put", put)
    assert run_pipeline.main(arguments) == 0
    assert len(list((tmp_path / "out.work" / "factors").glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    "problem",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")],
    ids=["python", "torch"],
)
def test_no_more_memory(models, text, tmp_path, monkeypatch, capsys, problem):
    arguments = flags(models("llama"), text, tmp_path / "out", "--recipe", "svd-llm")
    put = WorkDirectory.put

    def starved(self, stage, index, tensors, notes):
        put(self, stage, index, tensors, notes)
        raise problem

    monkeypatch.setattr(WorkDirectory, "put", starved)
    assert run_pipeline.main(arguments) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: the system gave no more memory") and "Traceback" not in told
    monkeypatch.undo()
    assert run_pipeline.main(arguments) == 0


def test_what_onednn_says_counts_as_memory_where_that_is_limited(monkeypatch):
    """It gives no reason for having no kernel; with no limit it is a defect, of which everything is told."""
    problem = RuntimeError("could not create a primitive")
    for which, limited in (("RLIMIT_AS", True), ("RLIMIT_DATA", True), ("RLIMIT_STACK", False)):
        limits = {getattr(resource, which): 1 << 30}
        monkeypatch.setattr(
            resource, "getrlimit", lambda name, limits=limits: (limits.get(name, resource.RLIM_INFINITY),) * 2
        )
        assert out_of_memory(problem) == limited
        assert out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("shapes differ"))


def test_damaged_files_are_read_or_refused():
    """Twenty seconds of benchmarks/fuzz.py."""
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--seconds", "20"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert len(rows) >= 11 and all(int(runs) >= 25 and findings == "0" for _, runs, _, findings in rows)
