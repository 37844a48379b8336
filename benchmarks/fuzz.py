"""Broken and hostile input: every reader gets thousands of damaged files, and may only read them or refuse them in a line.

    python benchmarks/fuzz.py [--seconds 600] [--targets ...]

Hypothesis damages files of a tiny checkpoint, of a work directory and of a compressed checkpoint: bytes are turned, cut, doubled and
overwritten, JSON values exchanged for hostile ones. A finding is any exception but our own refusal, more memory than
``ALLOWANCE``, or more than ``LONGEST`` seconds. Prints runs, refusals and findings by target; exit code 1 with any finding.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pyarrow import ArrowException
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

# what a reader may come to raise of a file; TimeoutError is an OSError
FINDINGS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, SafetensorError, StrictDataclassError, ArrowException),
)
LONGEST, ALLOWANCE, ROUND = 20, 1 << 30, 25
HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**30,
    -(2**63),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    "",
    "x" * 300,
    "../x",
    "/etc/passwd",
]
HOSTILE += ["\0", "torch.float99", "__class__", [], [[]], {}, {"a": {}}, ["a"] * 50]  # type: ignore[list-item]


@st.composite
def damaged_bytes(draw: Any, good: bytes) -> bytes:
    """``good`` after one to four edits."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("turn", "cut", "double", "overwrite", "length")))
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if kind == "turn" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif kind == "overwrite":
            data[at : at + 8] = draw(st.binary(min_size=8, max_size=8))
        elif len(data) >= 8:
            data[:8] = draw(st.sampled_from((0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1))).to_bytes(8, "little")
    return bytes(data)


@st.composite
def damaged_json(draw: Any, good: Any) -> bytes:
    """``good`` with one to three values exchanged, keys lost or doubled; now and then no JSON any more."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.integers(0, 5)) == 0:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    text = json.dumps(value).encode()
    return draw(damaged_bytes(text)) if draw(st.integers(0, 9)) == 0 else text


def _places(value: Any) -> Any:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(item)


class Bench:
    """The good files, a directory to damage copies in, and one method a target: it raises what a user would see."""

    def __init__(self, directory: Path) -> None:
        import zoo

        from compress import pipeline
        from compress.recipe import load_recipe

        self.directory = directory
        self.text = zoo.write_text(directory / "text.txt", 2000)
        self.model = zoo.write_model(directory / "model", "llama", num_hidden_layers=1)
        self.sharded = zoo.write_model(directory / "sharded", "llama", shard_size="20KB", num_hidden_layers=1)
        changes = {"calibration": str(self.text), "calibration_tokens": 256, "sequence_length": 64, "evaluate": "none"}
        recipe = load_recipe("quantized").override({**changes, "group_size": "16", "ratio_scope": "model"})
        self.output, self.work = directory / "out", directory / "out.work"
        pipeline.run(pipeline.Request(str(self.model), (0.4,), recipe, self.output, self.work))
        self.recipe = recipe

    def copy(self, source: Path, name: str, data: bytes) -> Path:
        """A copy of a directory with other bytes in one file."""
        target = self.directory / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        (target / name).write_bytes(data)
        return target

    def read_source(self, directory: Path) -> None:
        """As the command reads its source, up to every weight."""
        from checkpoint.shards import verify_weights
        from compress.plan import make_plan, make_source

        source, structure, reason = make_source(directory, self.recipe, False)
        verify_weights({item.key: item for item in source.used_tensors()})
        make_plan(source, structure, self.recipe, 0.5, reason)

    def weights(self, data: bytes) -> None:
        """A source's shard."""
        self.read_source(self.copy(self.model, "model.safetensors", data))

    def index(self, data: bytes) -> None:
        """A source's index of shards."""
        self.read_source(self.copy(self.sharded, "model.safetensors.index.json", data))

    def config(self, data: bytes) -> None:
        """A source's config.json."""
        self.read_source(self.copy(self.model, "config.json", data))

    def recipe_file(self, data: bytes) -> None:
        """A recipe in YAML (of which JSON is a part)."""
        from compress.recipe import load_recipe

        path = self.directory / "recipe.yaml"
        path.write_bytes(data)
        load_recipe(str(path)).storage  # noqa: B018

    def calibration(self, data: bytes, ending: str) -> None:
        """A calibration text."""
        from calibration.windows import read_text

        path = self.directory / f"text{ending}"
        path.write_bytes(data)
        for _ in read_text(str(path), None):
            pass

    def record(self, data: bytes) -> None:
        """A record in the work directory, and what it is used for."""
        from checkpoint.workdir import WorkDirectory

        work = self.copy(self.work, "factors/0000.safetensors", data)
        opened = WorkDirectory(work, json.loads((work / "fingerprint.json").read_text()), False)
        try:
            opened.notes("factors", 0)
            opened.get("factors", 0)
        finally:
            opened.close()

    def fingerprint(self, data: bytes) -> None:
        """The work directory's fingerprint."""
        from checkpoint.workdir import WorkDirectory

        before = json.loads((self.work / "fingerprint.json").read_text())
        WorkDirectory(self.copy(self.work, "fingerprint.json", data), before, False).close()

    def report(self, data: bytes) -> None:
        """An output's report, which says whether the command was done already."""
        from compress.pipeline import already_done

        already_done(self.copy(self.output, "report.json", data), {"target_ratio": 0.4}, False)

    def compressed(self, data: bytes) -> None:
        """What config.json of a compressed checkpoint says under ``layerpress``; loading allocates by it."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        from checkpoint.errors import UserError

        config = json.loads((self.output / "config.json").read_text())
        try:
            config["layerpress"] = json.loads(data)
        except ValueError:
            return  # no JSON: transformers' to refuse
        directory = self.copy(self.output, "config.json", json.dumps(config).encode())
        loaded = AutoConfig.from_pretrained(directory, trust_remote_code=True)
        try:
            with init_empty_weights():
                AutoModelForCausalLM.from_config(loaded, trust_remote_code=True)
        except ValueError as problem:
            if "config.json" not in str(problem):
                raise
            raise UserError(str(problem)) from problem  # the shipped file knows no exception of ours


def targets(bench: Bench) -> dict[str, tuple[Any, Callable[[bytes], None]]]:
    """By name: what to damage and how, and who reads it."""
    import pyarrow
    import pyarrow.parquet
    import yaml

    parquet = bench.directory / "good.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two " * 9]}), parquet)
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    recipe = json.loads(json.dumps(bench.recipe.as_dict()))
    config = json.loads((bench.model / "config.json").read_text())
    index = json.loads((bench.sharded / "model.safetensors.index.json").read_text())
    fingerprint = json.loads((bench.work / "fingerprint.json").read_text())
    settings_of = json.loads((bench.output / "config.json").read_text())["layerpress"]
    shard, record = (
        (path).read_bytes() for path in (bench.model / "model.safetensors", bench.work / "factors" / "0000.safetensors")
    )
    return {
        "weights": (damaged_bytes(shard[:4000]).map(lambda data: data + shard[4000:]), bench.weights),
        "index": (damaged_json(index), bench.index),
        "config.json": (damaged_json(config), bench.config),
        "recipe": (damaged_json(recipe) | damaged_bytes(yaml.safe_dump(recipe).encode()), bench.recipe_file),
        "text": (damaged_bytes("höhere Töne\n".encode() * 9), lambda data: bench.calibration(data, ".txt")),
        "jsonl": (damaged_bytes(lines), lambda data: bench.calibration(data, ".jsonl")),
        "parquet": (damaged_bytes(parquet.read_bytes()), lambda data: bench.calibration(data, ".parquet")),
        "record": (damaged_bytes(record[:4000]).map(lambda data: data + record[4000:]), bench.record),
        "fingerprint": (damaged_json(fingerprint), bench.fingerprint),
        "report": (damaged_json({"fingerprint": {"target_ratio": 0.4}}), bench.report),
        "compressed config": (damaged_json(settings_of), bench.compressed),
    }


def fuzz(strategy: Any, read: Callable[[bytes], None], seconds: float) -> tuple[int, int, list[str]]:
    """Runs, refusals, and what else was raised (each kind once, with the input); what is not even among FINDINGS stops everything."""
    from checkpoint.errors import UserError

    counts = [0, 0]
    findings: dict[str, str] = {}

    def timed_out(*_: object) -> None:
        raise TimeoutError(f"more than {LONGEST} s")

    signal.signal(signal.SIGALRM, timed_out)

    def once(data: bytes) -> None:
        counts[0] += 1
        signal.alarm(LONGEST)
        try:
            read(data)
        except UserError as problem:
            counts[1] += 1
            if "\n" in str(problem).strip():
                findings.setdefault("several lines", f"{problem!r} of {data[:300]!r}")
        except FINDINGS as problem:
            findings.setdefault(f"{type(problem).__name__}: {str(problem)[:60]}", f"{problem!r} of {data[:300]!r}")
        finally:
            signal.alarm(0)

    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        checks = list(HealthCheck)
        quiet = settings(
            max_examples=ROUND, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=checks
        )
        seed(number)(quiet(given(strategy)(once)))()
        number += 1
    return counts[0], counts[1], [f"{kind}\n    {told}" for kind, told in findings.items()]


def main() -> None:
    """Every target for its share of the time."""
    from tables import line

    from eval.quiet import quiet_libraries

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="in all (%(default)g)")
    parser.add_argument("--targets", nargs="+", help="some of them")
    options = parser.parse_args()
    quiet_libraries()
    found: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        every = targets(Bench(Path(directory)))
        chosen = {name: every[name] for name in options.targets or every}
        resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + ALLOWANCE,) * 2)
        line(["target", "runs", "refused", "findings"])
        line(["---"] * 4)
        for name, (strategy, read) in chosen.items():
            runs, refused, findings = fuzz(strategy, read, options.seconds / len(chosen))
            line([name, runs, refused, len(findings)])
            found += [f"{name}: {item}" for item in findings]
    for item in found:
        print(item, file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
