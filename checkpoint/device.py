"""Where layers are loaded and run: the processor, or a GPU of this machine. What is written is made in the host's memory."""

from __future__ import annotations

import os

import torch

from checkpoint.errors import UserError
from checkpoint.memory import PROCESS_BYTES

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` (of several processes on a machine each has the GPU of its number) or ``cuda:1``.

    Raises UserError if this machine, or this build of torch, has it not.
    """
    kind, _, number = name.partition(":")
    if name == "cpu":
        return CPU
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise UserError(f"--device must be cpu, cuda or cuda:NUMBER, is {name!r}")
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees no GPU on this machine; leave it away to run on the processor"
        )
    count = torch.cuda.device_count()
    index = int(number) if number else int(os.environ.get("LOCAL_RANK", "0")) % count
    if index >= count:
        raise UserError(f"--device {name}: this machine has {count} GPUs, numbered from 0")
    return torch.device("cuda", index)


def check_free(device: torch.device, planned: int) -> None:
    """Raise UserError if a GPU has less free memory than is ``planned`` (bytes) for layers and what is made of them."""
    if device.type == "cpu":
        return
    needed, (free, _) = planned - PROCESS_BYTES, torch.cuda.mem_get_info(device)
    if free < needed:
        raise UserError(
            f"{needed / 1e9:.2f} GB are needed on {device}, {free / 1e9:.2f} GB are free; plan for less with --memory-limit"
        )


def name_of(device: torch.device) -> str:
    """As a person calls it."""
    return "cpu" if device.type == "cpu" else f"{device} ({kind_of(device)})"


def kind_of(device: torch.device) -> str:
    """What makes its sums differ from another's, if only in the last digits."""
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_name(device))


def peak_on(device: torch.device) -> int | None:
    """The most memory that tensors have taken on a GPU, in bytes; None for the processor."""
    return None if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
