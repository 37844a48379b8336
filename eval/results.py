"""What an evaluation is asked and what it finds: plain data, to JSON and back."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure. ``max_windows`` and ``limit`` None mean the whole text and every document.

    With ``where_available`` a text that cannot be had is left out, and named in the figures; else that is an error.
    """

    texts: tuple[str, ...] = ("boolq-validation", "sciq-validation")
    window: int = 1024
    max_windows: int | None = 16
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    online: bool = False  # take the seven offline tasks from the hub, as stock lm-eval does
    chat_template: bool = (
        False  # put the model's chat template around every document, as leaderboards do for chat models
    )
    where_available: bool = False


@dataclass(frozen=True)
class PerplexityResult:
    """Mean loss of ``tokens`` predicted tokens of a text, in nats per token, and its exponential.

    ``seconds`` are those of the forward passes, of one process where several share the windows.
    """

    text: str
    window: int
    stride: int
    windows: int
    tokens: int
    nats_per_token: float
    perplexity: float
    seconds: float
    cached: bool = False

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PerplexityResult":
        return cls(**data)


@dataclass(frozen=True)
class DivergenceResult:
    """KL(dense || compressed) and the loss over the dense model's, both in nats per predicted token.

    ``error_after_layer`` is how far the residual stream is off after each decoder layer, ``‖h' − h‖ / ‖h‖`` over the first
    window; empty where the models have different numbers of layers.
    """

    text: str
    window: int
    windows: int
    tokens: int
    kl_nats_per_token: float
    excess_nats_per_token: float
    error_after_layer: list[float]
    cached: bool = False

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "DivergenceResult":
        return cls(**data)


@dataclass(frozen=True)
class Metric:
    """A metric's mean over the documents and its standard error (None where lm-eval has none)."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class TaskResult:
    """An lm-eval task: metrics by name, and each document's own values, for paired comparisons."""

    task: str
    documents: int
    few_shot: int
    offline_copy: bool
    metrics: dict[str, Metric]
    per_document: dict[str, list[float]]
    seconds: float
    cached: bool = False

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TaskResult":
        metrics = {name: Metric(**metric) for name, metric in data["metrics"].items()}
        return cls(**{**data, "metrics": metrics})


@dataclass(frozen=True)
class Missing:
    """A text that could not be measured, and why."""

    text: str
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """All figures of one model directory; ``divergences`` only of a model compared with a dense one.

    ``lm_eval`` is what lm-eval itself would have written of the tasks, without the documents (empty without tasks).
    """

    model: str
    fingerprint: str
    dtype: str
    dtype_reason: str
    versions: dict[str, str]
    perplexities: tuple[PerplexityResult, ...]
    tasks: tuple[TaskResult, ...]
    divergences: tuple[DivergenceResult, ...] = ()
    missing: tuple[Missing, ...] = ()
    lm_eval: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, without what has a file of its own (eval/lm_eval_file.py)."""
        data = asdict(self)
        del data["lm_eval"]
        return data
