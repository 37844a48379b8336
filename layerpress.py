"""layerpress from Python: what the command does, with the objects that it uses.

    from layerpress import compress

    result = compress("models/SmolLM2-135M-Instruct", target_ratio=0.5)
    print(result.output, result.sizes.model_bytes, result.predicted_loss)
    model = result.load()

Import it before torch, which reads how its threads shall wait as it loads. Progress goes to stderr, as on the command line. Every
function raises ``UserError`` with one line that names the remedy for what the caller can mend.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoint.environment  # noqa: F401  before anything that reads it
from checkpoint.device import find_device
from checkpoint.errors import UserError
from compress import pipeline
from compress.footprint import within
from compress.plan import Plan, make_plan, make_source
from compress.recipe import Recipe, load_recipe, recipe_names
from compress.sizes import Sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Plan", "Recipe", "Result", "Sizes", "UserError", "compress", "load_recipe", "plan", "recipe_names"]


@dataclass(frozen=True)
class Result:
    """A finished compression: a directory with a checkpoint, and what is known of it."""

    output: Path
    report: dict[str, Any]

    @property
    def sizes(self) -> Sizes:
        """Kept parts (kept / dense, 0 to 1), bytes of tensors before and after, bits per original decoder weight."""
        return Sizes(**self.report["sizes"])

    @property
    def predicted_loss(self) -> float | None:
        """Predicted KL(dense || compressed) in nats per token; None where the recipe's losses are in another unit."""
        return self.report["predicted_loss_nats_per_token"]

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The figures of ``evaluation.json``: ``model``, ``dense`` and ``paired``; None where nothing was evaluated."""
        return self.report["evaluation"]

    def load(self, **options: Any) -> PreTrainedModel:
        """The compressed model (``AutoModelForCausalLM``), by default in the dtype that it is stored in.

        ``options`` go to ``from_pretrained``. The factored format runs ``modeling_layerpress.py`` of the output directory.
        """
        from transformers import AutoModelForCausalLM

        trust = self.report["recipe"]["export"] == "factored"
        return AutoModelForCausalLM.from_pretrained(
            self.output, **{"dtype": "auto", "trust_remote_code": trust, **options}
        )


def compress(
    model_dir: str | Path,
    target_ratio: float = 0.5,
    recipe: str | Path | Recipe = "auto",
    *,
    output: str | Path | None = None,
    work_dir: str | Path | None = None,
    memory_limit: int | None = None,
    device: str = "cpu",
    fresh: bool = False,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Result:
    """Compress the checkpoint in ``model_dir`` (or a hub id) to ``target_ratio`` of its bytes, evaluate it, report.

    ``recipe`` is the name of one (``recipe_names()``), a YAML file, or a ``Recipe``; ``settings`` are fields of it that shall be
    otherwise, as ``evaluate="none"`` or ``calibration="mine.txt"``. ``memory_limit`` is in bytes; ``device`` is where layers run
    (``cpu``, ``cuda``, ``cuda:1``). The same call goes on where an
    interrupted one was, and returns at once where it was finished; the same ``work_dir`` serves any number of ratios.

    Raises UserError for bad input before anything is computed, RuntimeError if the written checkpoint does not load as it should.
    Sources: the paper of each recipe is ``Recipe.paper``; ``auto`` is docs/quantization.md.
    """
    chosen = _recipe(recipe, settings)
    request = pipeline.make_request(
        str(model_dir),
        [target_ratio],
        chosen,
        Path(output) if output else None,
        Path(work_dir) if work_dir else None,
        memory_limit=memory_limit,
        fresh=fresh,
        trust_remote_code=trust_remote_code,
        command=f"layerpress.compress({shlex.quote(str(model_dir))}, {target_ratio:g}, {chosen.name!r}, device={device!r}, **{settings!r})",
        device=find_device(device),
    )
    (written,) = pipeline.run(request)
    return Result(written, json.loads((written / "report.json").read_text(encoding="utf-8")))


def plan(
    model_dir: str | Path,
    target_ratio: float = 0.5,
    recipe: str | Path | Recipe = "auto",
    *,
    memory_limit: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    **settings: Any,
) -> Plan:
    """What ``compress`` would do, from headers alone: structure, sizes, and bytes of memory and disk (``.estimate``).

    Reads no weights. Raises UserError as ``compress`` does.
    """
    chosen = _recipe(recipe, settings)
    model = pipeline.find_model(str(model_dir))
    source, structure, reason = make_source(model, chosen, trust_remote_code, find_device(device))
    fitting, passes = within(source, structure, chosen, memory_limit)
    return make_plan(source, structure, fitting, target_ratio, reason, passes)


def _recipe(recipe: str | Path | Recipe, settings: dict[str, Any]) -> Recipe:
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    unknown = sorted(set(settings) - set(chosen.as_dict()))
    if unknown:
        raise UserError(f"recipe {chosen.name} has no field {unknown[0]!r} (there are: {', '.join(chosen.as_dict())})")
    return chosen.override(settings)
