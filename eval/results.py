"""What an evaluation is asked and what it finds: plain data, to JSON and back."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure. ``max_windows`` and ``limit`` None mean the whole text and every document."""

    texts: tuple[str, ...] = ("boolq-validation", "sciq-validation")
    window: int = 1024
    max_windows: int | None = 16
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    online: bool = False  # take the seven offline tasks from the hub, as stock lm-eval does


QUICK = EvaluationSettings(tasks=("arc_easy", "piqa"), limit=50)


@dataclass(frozen=True)
class PerplexityResult:
    """Mean loss of ``tokens`` predicted tokens of a text, in nats per token, and its exponential."""

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
    """KL(dense || compressed) and the loss over the dense model's, both in nats per predicted token."""

    text: str
    window: int
    windows: int
    tokens: int
    kl_nats_per_token: float
    excess_nats_per_token: float
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
class Evaluation:
    """All figures of one model directory; ``divergences`` only of a model compared with a dense one."""

    model: str
    fingerprint: str
    dtype: str
    dtype_reason: str
    versions: dict[str, str]
    perplexities: tuple[PerplexityResult, ...]
    tasks: tuple[TaskResult, ...]
    divergences: tuple[DivergenceResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)
