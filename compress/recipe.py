"""The recipe: one frozen description of a run, which is command line, YAML and manifest at once."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from calibration.moments import OF_GRADIENTS
from calibration.structure import Linear, Structure
from checkpoint.errors import UserError
from checkpoint.forms import Grid
from compress.allocations import ALLOCATIONS
from compress.candidates import Quantization
from compress.menu import Storage
from compress.methods import METHODS, NATS
from compress.pivoting import PART_FORMS
from compress.quantizers import QUANTIZERS
from compress.refit import REFITS

CHOICES: dict[str, tuple[str, ...]] = {
    "decomposition": tuple(METHODS),
    "allocation": tuple(ALLOCATIONS),
    "feed_forward": ("decompose", "prune"),
    "mode": ("one-shot", "layerwise", "sequential"),
    "ratio_scope": ("model", "decoder"),
    "form": tuple(PART_FORMS),
    "export": ("factored", "dense", "adapter"),
    "runtime": ("dense", "packed"),
    "dtype": ("auto", "float32", "bfloat16"),
    "fisher": ("sampled", "empirical"),
    "refit": REFITS,
    "quantizer": ("none", *QUANTIZERS),
    "menu": ("low-rank", "packed", "all"),
    "zero_point": ("none", "stored"),
    "scales": ("float", "power-of-two"),
    "token_weights": ("equal", "gradient"),
}
NUMBERS = ("bits", "group_size", "correction_rank")  # fields of several numbers; YAML reads a single one as an integer
FROM_ANY_MENU = ("uniform", "pooled")  # allocations; the others choose ranks


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the model and the target ratio.

    ``mode`` says what the statistics see: the dense model (one-shot), the model whose earlier layers are compressed
    (layerwise), or earlier groups of the same layer too (sequential). ``feed_forward: prune`` drops channels there, and keeps
    the part ``least_kept`` of all that scores lowest (LoRAP's rule).

    ``form`` is how a product is stored: two factors, or some of its rows and the coefficients of the others. ``damping``
    is the multiple of the mean input power added to the second moment's diagonal; ``fisher`` says whose labels the loss
    gradient is of (drawn from the model, or the text's own), and at most ``gradient_tokens`` of the calibration tokens go
    backward; ``micro_batch_tokens`` run through a layer at a time; a sensitivity search measures on the first
    ``search_tokens``; ``refit`` refits each outer factor on the compressed model's inputs, ``refit_ridge`` holding it to
    what it was; ``calibration`` is a file, a dataset or ``offline``, or several by comma (each an equal share);
    ``evaluate`` is a preset, tasks, or ``none``.

    ``menu`` says what a linear may become: a product of low rank, packed integers (by ``quantizer``, on grids of each of ``bits`` and
    each ``group_size``, 0 being a row), or either. The decomposition then makes up for the quantization error with each
    of the ranks ``correction_rank``, its factors in ``factor_bits``. These are numbers by comma, and ranges: ``2-4,8``.
    ``token_weights: gradient`` counts tokens by the squared norm of their loss gradient wherever the input's moment is used for
    quantization; ``quantizer_damping`` is the multiple of its mean diagonal that is added to it; ``alternations`` is how many
    times the weight is quantized again without what the correction holds of it. ``runtime: packed`` has the written model keep its
    integers packed while it runs.
    """

    name: str
    decomposition: str
    mode: str
    summary: str = ""
    paper: str = ""
    allocation: str = "uniform"
    feed_forward: str = "decompose"
    least_kept: float = 0.01
    form: str = "factors"
    menu: str = "low-rank"
    quantizer: str = "none"
    bits: str = "4"
    group_size: str = "64"
    zero_point: str = "none"
    scales: str = "float"
    token_weights: str = "equal"
    quantizer_damping: float = 0.01
    correction_rank: str = "0"
    factor_bits: int = 16
    alternations: int = 0
    damping: float = 0.0
    fisher: str = "sampled"
    gradient_tokens: int = 65536
    search_tokens: int = 4096
    refit: str = "none"
    refit_ridge: float = 1e-3
    ratio_scope: str = "model"
    calibration: str = "offline"
    calibration_tokens: int = 65536
    sequence_length: int = 512
    micro_batch_tokens: int = 2048
    seed: int = 0
    evaluate: str = "quick"
    export: str = "factored"
    runtime: str = "dense"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind: Any = {"int": int, "float": (int, float), "str": str}[str(field.type)]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"recipe {self.name}: {field.name} must be {field.type}, is {value!r}")
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise UserError(f"recipe {self.name}: {field.name} {_not_known(str(value), CHOICES[field.name])}")
        method = METHODS[self.decomposition]
        if self.mode != "one-shot" and method.backward:
            raise UserError(
                f"recipe {self.name}: {self.decomposition} needs the whole dense model's statistics; say mode: one-shot"
            )
        removes = "influence" in ALLOCATIONS[self.allocation].reads
        if removes != (self.decomposition == "none") or (removes and (self.export, self.walks) != ("dense", False)):
            raise UserError(
                f"recipe {self.name}: whole layers are removed by decomposition: none, allocation: block-influence, "
                "mode: one-shot and export: dense together"
            )
        if self.feed_forward == "prune" and self.mode != "layerwise":
            raise UserError(
                f"recipe {self.name}: channels are pruned by a whole layer's statistics; say mode: layerwise"
            )
        if "sensitivity" in ALLOCATIONS[self.allocation].reads and not method.needs:
            raise UserError(
                f"recipe {self.name}: a sensitivity search needs calibration text, {self.decomposition} reads none"
            )
        if self.walks and not method.needs:
            raise UserError(
                f"recipe {self.name}: {self.decomposition} reads no text, so a walk or a refit has nothing to see"
            )
        if (
            self.sequence_length < 2
            or min(self.calibration_tokens, self.micro_batch_tokens, self.gradient_tokens, self.search_tokens) < 1
            or not 0 <= self.damping < 1
            or not 0 <= self.least_kept < 1
            or self.refit_ridge < 0
            or self.seed < 0
        ):
            raise UserError(
                f"recipe {self.name}: sequence_length must be at least 2, the numbers of tokens positive, "
                "seed and refit_ridge not negative, damping and least_kept from 0 to below 1"
            )

        self._check_quantization()

    def _check_quantization(self) -> None:
        ranks = numbers(self.correction_rank, f"recipe {self.name}: correction_rank", 0, 2**20)
        numbers(self.bits, f"recipe {self.name}: bits", 2, 8)
        numbers(self.group_size, f"recipe {self.name}: group_size", 0, 2**20)
        problem = None
        if (self.menu == "low-rank") != (self.quantizer == "none"):
            problem = "menu: packed or all goes with a quantizer, menu: low-rank with none"
        elif self.quantizer != "none" and self.allocation not in FROM_ANY_MENU:
            problem = (
                f"allocation {self.allocation} chooses ranks; with a quantizer say one of {', '.join(FROM_ANY_MENU)}"
            )
        elif self.quantizer != "none" and (self.refit != "none" or self.feed_forward == "prune"):
            problem = "refits and pruned channels do not go with a quantizer"
        elif self.quantizer != "none" and METHODS[self.decomposition].changes_bias:
            problem = (
                f"{self.decomposition} brings a bias, which a packed linear does not; choose another decomposition"
            )
        elif self.factor_bits not in (4, 8, 16):
            problem = f"factor_bits must be 4, 8 or 16, is {self.factor_bits}"
        elif self.menu == "all" and self.factor_bits < 16 and METHODS[self.decomposition].unit != NATS:
            problem = f"what rounding does to a product of {self.decomposition} is not measured; say factor_bits: 16, or menu: packed"
        elif self.zero_point == "stored" and self.scales == "power-of-two":
            problem = "scales that are powers of two have no zero point"
        elif self.alternations and len(ranks) != 1:
            problem = "alternations need one fixed correction_rank"
        elif self.alternations < 0 or not 0 <= self.quantizer_damping < 1:
            problem = "alternations must not be negative, and quantizer_damping from 0 to below 1"
        elif self.export == "adapter" and (self.menu != "packed" or self.scales != "float" or self.factor_bits != 16):
            problem = "--export adapter holds packed integers alone, scales and factors in 16 bits: say menu: packed"
        elif self.export == "adapter" and max(ranks) and len(self.grids) > 1:
            problem = "transformers loads a base of one grid under an adapter; give one number of --bits, or --correction-rank 0"
        elif self.runtime == "packed" and (self.quantizer == "none" or self.export != "factored"):
            problem = "runtime packed needs a quantizer and export: factored"
        elif self.backward and self.mode != "one-shot":
            problem = f"{self.quantizer} needs the whole dense model's statistics; say mode: one-shot"
        if problem:
            raise UserError(f"recipe {self.name}: {problem}")

    @property
    def quantization(self) -> Quantization:
        """How packed candidates are made."""
        return Quantization(
            self.quantizer,
            self.token_weights == "gradient",
            self.quantizer_damping,
            self.decomposition,
            self.damping,
            self.alternations,
        )

    @property
    def needs(self) -> frozenset[str]:
        """The moments that the recipe collects."""
        needs = METHODS[self.decomposition].needs
        return needs if self.quantizer == "none" else needs | self.quantization.needs

    @property
    def backward(self) -> bool:
        """Whether a backward pass is needed."""
        return bool(self.needs & (OF_GRADIENTS | {"samples"}))

    @property
    def calibration_texts(self) -> list[str]:
        """The calibration texts by name; an existing file may have a comma in its own."""
        if Path(self.calibration).expanduser().exists():
            return [self.calibration]
        return [name for name in self.calibration.split(",") if name] or [self.calibration]

    @property
    def walks(self) -> bool:
        """Whether a walk over the compressed model makes the parts; else they are slices of the dense sweep's."""
        return self.mode != "one-shot" or self.refit != "none"

    @property
    def storage(self) -> Storage:
        """How the low-rank linears are stored; a new bias has no place in a stock architecture."""
        adds_bias = METHODS[self.decomposition].changes_bias and self.export == "factored"
        return Storage(
            self.form,
            adds_bias,
            self.feed_forward == "prune",
            low_rank=self.menu != "packed",
            grids=self.grids if self.menu != "low-rank" else (),
            correction_ranks=numbers(self.correction_rank, "correction_rank", 0, 2**20),
            factor_grid=Grid(self.factor_bits) if self.factor_bits < 16 else None,
        )

    @property
    def packs_ends(self) -> bool:
        """Whether embedding and head are on the menu: where the ratio is the model's and losses are all in nats."""
        in_nats = METHODS[self.decomposition].unit == NATS
        possible = self.quantizer != "none" and self.scales == "float" and self.export != "adapter"
        return self.ratio_scope == "model" and possible and in_nats

    def units(self, structure: Structure) -> list[Linear]:
        """Everything that has a menu of its own: the decoder's linears, and perhaps embedding and head."""
        return structure.linears + (list(structure.ends) if self.packs_ends else [])

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids of packed weights."""
        symmetric, power_of_two = self.zero_point == "none", self.scales == "power-of-two"
        return tuple(
            Grid(bits, group, symmetric, power_of_two)
            for bits in numbers(self.bits, "bits", 2, 8)
            for group in numbers(self.group_size, "group_size", 0, 2**20)
        )

    @property
    def windows(self) -> int:
        """Windows that the calibration tokens make, if the text has as many."""
        return max(1, self.calibration_tokens // self.sequence_length)

    @property
    def gradient_windows(self) -> int:
        """Windows that go backward."""
        return max(1, min(self.windows, self.gradient_tokens // self.sequence_length))

    @property
    def micro_batch(self) -> int:
        """Windows that run through a layer at a time."""
        return max(1, self.micro_batch_tokens // self.sequence_length)

    def as_dict(self) -> dict[str, Any]:
        """All fields, for YAML or JSON."""
        return dataclasses.asdict(self)

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with the fields that are not None changed."""
        return dataclasses.replace(self, **{key: value for key, value in changes.items() if value is not None})


def numbers(text: str, what: str, low: int, high: int) -> tuple[int, ...]:
    """``2-4,8`` as (2, 3, 4, 8), rising; raises UserError naming ``what`` if it is not that, or not from ``low`` to ``high``."""
    found: set[int] = set()
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UserError(f"{what} must be numbers by comma, or ranges as 2-4, is {text!r}")
        found |= set(range(int(first), int(last or first) + 1))
    if not found or min(found) < low or max(found) > high:
        raise UserError(f"{what} must be from {low} to {high}, is {text!r}")
    return tuple(sorted(found))


def _not_known(value: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{value!r} is not known{hint} (there are: {', '.join(known)})"


def recipe_names() -> list[str]:
    """The recipes that come with layerpress."""
    return sorted(path.name.removesuffix(".yaml") for path in files("configs").iterdir() if path.name.endswith(".yaml"))


def load_recipe(name_or_file: str) -> Recipe:
    """A shipped recipe by name, or a YAML file of the same fields.

    Raises UserError for an unknown name (offering the nearest), broken YAML, or a field that does not exist.
    """
    if name_or_file.endswith((".yaml", ".yml")):
        path = Path(name_or_file).expanduser()
        if not path.is_file():
            raise UserError(f"no such recipe file: {path}")
        text = path.read_text(encoding="utf-8", errors="replace")
    elif name_or_file in recipe_names():
        text = (files("configs") / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    else:
        raise UserError(f"recipe {_not_known(name_or_file, tuple(recipe_names()))}")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise UserError(f"recipe {name_or_file} is not YAML ({' '.join(str(problem).split())})") from problem
    if not isinstance(raw, dict):
        raise UserError(f"recipe {name_or_file} must be a mapping of fields to values")
    known = tuple(field.name for field in dataclasses.fields(Recipe))
    for key in raw:
        if key not in known:
            raise UserError(f"recipe {name_or_file}: field {_not_known(str(key), known)}")
    missing = [key for key in ("name", "decomposition", "mode") if key not in raw]
    if missing:
        raise UserError(f"recipe {name_or_file} lacks the field {missing[0]}")
    fields: dict[str, Any] = {key: str(value) if key in NUMBERS else value for key, value in raw.items()}
    return Recipe(**fields)
