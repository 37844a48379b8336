"""Shared by all tests: quiet libraries, and the tiny models made once a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "benchmarks")]

import checkpoint.environment  # noqa: E402, F401  before anything that reads it
from eval.quiet import quiet_libraries  # noqa: E402

quiet_libraries()

import pytest  # noqa: E402
import zoo  # noqa: E402
from faults import check_in_this_process  # noqa: E402

from compress import children  # noqa: E402


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory):
    """A function: architecture -> directory of its tiny checkpoint, made at first use."""
    root = tmp_path_factory.mktemp("zoo")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = zoo.write_model(root / name, name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of 6000 tokens of the tiny tokenizer."""
    return zoo.write_text(tmp_path_factory.mktemp("text") / "text.txt", 6000)


@pytest.fixture(autouse=True)
def checks_in_this_process(request, monkeypatch):
    """Every run ends with a check in a fresh process, of four seconds; those that are marked have them so, the others do not wait."""
    if request.node.get_closest_marker("checks_in_fresh_processes") is None:
        monkeypatch.setattr(children, "run_check", check_in_this_process)
