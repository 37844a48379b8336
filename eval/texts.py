"""The texts that perplexity is measured on: a few by name, offline, and any UTF-8 file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from checkpoint.errors import UserError
from eval.offline import ensure

NAMED_TEXTS = ("boolq-validation", "sciq-validation")


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
    """A named text, or the file at that path; UserError where it is neither, or not UTF-8."""
    path = ensure("texts") / f"{name}.txt" if name in NAMED_TEXTS else Path(name)
    if not path.is_file():
        raise UserError(f"no text {name!r}: name {' or '.join(NAMED_TEXTS)}, or a UTF-8 file")
    try:
        return Text(name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): convert it first") from error
