"""Calibration text to windows of tokens, with a record of how.

Policy: documents are joined by a blank line, tokenised without special tokens as one stream, cut into
windows of equal length that do not overlap, and the asked number of windows is drawn by the seed from
the first ``POOL`` times as many (or from all there are). Nothing is padded and no BOS is inserted; conversations are written
out by the chat template first.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch

from checkpoint.errors import UserError, told

POOL = 8
# some chat templates write the date, and then no two days would have the same calibration text
TODAY = "{%- macro strftime_now(format) -%}01 Jan 2026{%- endmacro -%}"
PIECE_CHARACTERS = 1 << 18
POLICY = "documents joined by a blank line, no BOS, packed without padding, windows drawn by seed"


@dataclass(frozen=True)
class Windows:
    """Token ids ``(windows, length)`` int64, and where they came from."""

    ids: torch.Tensor
    provenance: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return self.ids.numel()


def read_text(calibration: str, tokenizer: Any) -> Iterator[str]:
    """Pieces of text from a UTF-8 file, a .jsonl or .parquet file with a field ``text`` or ``messages``, or a dataset.

    A dataset is named ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT`` (split ``train`` by default). ``messages`` are
    conversations, lists of ``{"role": ..., "content": ...}``, which the tokenizer's chat template writes out. Raises UserError
    where that cannot be read as text.
    """
    path = Path(calibration).expanduser()
    if path.is_dir():
        raise UserError(f"calibration text {calibration} is a directory; name a .txt, .jsonl or .parquet file")
    if not path.exists():
        return _documents(_dataset(calibration), calibration, tokenizer)
    if path.suffix == ".jsonl":
        return _documents(_json_lines(path), calibration, tokenizer)
    if path.suffix == ".parquet":
        return _documents(_parquet(path), calibration, tokenizer)
    return _plain(path)


def _plain(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as handle:
            while lines := handle.readlines(PIECE_CHARACTERS):
                yield "".join(lines)
    except UnicodeDecodeError as problem:
        raise UserError(
            f"calibration text {path} is not UTF-8 ({problem.reason} at byte {problem.start}); convert it"
        ) from problem


def _json_lines(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as problem:
                        raise UserError(
                            f"line {number} of {path} is not JSON ({problem}); mend or remove it"
                        ) from problem
    except UnicodeDecodeError as problem:
        raise UserError(f"calibration text {path} is not UTF-8 ({problem.reason}); convert it") from problem


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as problem:
        if getattr(problem, "errno", None):  # the disk's trouble, not the file's
            raise
        raise UserError(f"{path} cannot be read as parquet ({told(problem)})") from problem


def _dataset(name: str) -> Iterator[Any]:
    import datasets

    parts = name.split(":")
    config, split = parts[1] if len(parts) > 1 else None, parts[2] if len(parts) > 2 else "train"
    try:
        yield from datasets.load_dataset(parts[0], config or None, split=split, streaming=True)
    except (FileNotFoundError, ValueError, ConnectionError, OSError) as problem:
        raise UserError(
            f"calibration text {name} is no file here, and no dataset could be loaded by that name ({told(problem)}); "
            "name a .txt, .jsonl or .parquet file, a dataset as NAME:CONFIG:SPLIT, or offline"
        ) from problem


def _documents(records: Iterator[Any], name: str, tokenizer: Any) -> Iterator[str]:
    for record in records:
        fields = record if isinstance(record, dict) else {}
        text = fields.get("text")
        if text is None and isinstance(fields.get("messages"), list):
            text = _conversation(fields["messages"], name, tokenizer)
        if not isinstance(text, str):
            told_fields = ", ".join(fields) or type(record).__name__
            raise UserError(
                f"a record of {name} has no field 'text' or 'messages' (it has {told_fields}); rename the field that holds the text"
            )
        if text:
            yield text + "\n\n"


def _conversation(messages: list[Any], name: str, tokenizer: Any) -> str:
    """A conversation as the model's chat template writes it out; special tokens are in its text."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{name} holds conversations, but the tokenizer has no chat template; give a field 'text' instead"
        )
    if not all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in messages):
        raise UserError(f"a conversation of {name} is no list of {{role, content}}; give its messages so")
    try:
        template = TODAY + tokenizer.get_chat_template()
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except (jinja2.TemplateError, KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(
            f"the chat template cannot write out a conversation of {name} ({told(problem)}); "
            "give messages as a list of {role, content}"
        ) from problem


def make_windows(tokenizer: Any, texts: Sequence[str], tokens: int, length: int, seed: int, vocabulary: int) -> Windows:
    """``tokens // length`` windows of ``length`` tokens, an equal share (to one window) from each of the texts.

    Raises UserError if a text gives fewer tokens, or ids outside the model's vocabulary.
    """
    wanted = tokens // length
    if wanted < len(texts):
        raise UserError(
            f"--calibration-tokens {tokens} is less than one window of {length} for each text; ask for more tokens"
        )
    shares = [wanted // len(texts) + (index < wanted % len(texts)) for index in range(len(texts))]
    drawn = [_draw(tokenizer, text, share, length, seed) for text, share in zip(texts, shares, strict=True)]
    # in turn, so that the first windows, which alone go backward where gradients use fewer tokens, are of every text
    turns = [(index, text) for text, share in enumerate(shares) for index in range(share)]
    ids = torch.stack([drawn[text].ids[index] for index, text in sorted(turns)])
    if int(ids.max()) >= vocabulary:
        raise UserError(
            f"the tokenizer gives id {int(ids.max())}, the model has {vocabulary}; they do not belong together"
        )
    provenance = {
        "texts": [one.provenance for one in drawn],
        "policy": POLICY,
        "windows": wanted,
        "sequence_length": length,
        "tokens": wanted * length,
        "seed": seed,
        "token_ids_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    return Windows(ids, provenance)


def _draw(tokenizer: Any, text: str, wanted: int, length: int, seed: int) -> Windows:
    """``wanted`` windows of one text."""
    stream = array("q")  # a list would take four times as much
    text_hash = hashlib.sha256()
    characters = 0
    for piece in read_text(text, tokenizer):
        stream.extend(tokenizer(piece, add_special_tokens=False, return_attention_mask=False)["input_ids"])
        text_hash.update(piece.encode())
        characters += len(piece)
        if len(stream) >= POOL * wanted * length:
            break
    if not stream:
        raise UserError(
            f"the tokenizer gives no token for {text}; is the text empty, or are the tokenizer's files missing?"
        )
    available = len(stream) // length
    if available < wanted:
        raise UserError(
            f"calibration text {text} gives {len(stream):,} tokens, {wanted * length:,} are asked for; "
            f"bring more text or say --calibration-tokens {available * length}"
        )
    pool = min(available, POOL * wanted)
    drawn = torch.randperm(pool, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
    ids = torch.frombuffer(stream, dtype=torch.int64)[: pool * length].view(pool, length)[drawn].clone()
    told = {
        "text": text,
        "windows": wanted,
        "drawn_from_windows": pool,
        "characters_read": characters,
        "text_sha256": text_hash.hexdigest(),
    }
    return Windows(ids, told)
