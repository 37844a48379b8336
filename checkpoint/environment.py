"""What the libraries read from the environment as they load; whoever set it already is left alone. To be imported before them.

And how a process of our own loads them: three processor seconds, a quarter of which would be the search for garbage that
is not there, and another at the end, when all of it would be taken apart.
"""

import gc
import os
from pathlib import Path

WIDE = {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}  # what OpenBLAS's AVX-512 kernels are made of


def _openblas_is_wider() -> bool:
    """Whether torch's float32 and float64 products use half of this processor: Intel's MKL keeps to AVX2 on those of AMD."""
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return False
    fields = dict(line.split(":", 1) for line in described.read_text(errors="replace").splitlines() if ":" in line)
    of = {name.strip(): value.strip() for name, value in fields.items()}
    return of.get("vendor_id") == "AuthenticAMD" and set(of.get("flags", "").split()) >= WIDE


OPENBLAS_IS_WIDER = _openblas_is_wider()

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# threads that spin while they wait make everything several times slower as soon as a core has other work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but to sleep and be woken takes longer than to wait a microsecond
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles: the least that it takes
if OPENBLAS_IS_WIDER:
    # processors newer than it knows it takes for ones without AVX-512
    os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
# a layer's tensors are in memory when transformers places them: threads for that gain nothing, and one that cannot start for want
# of memory is waited for without end
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
# products compiled for shapes that are kept: a layer has fewer than this, and a thousand take 15 MB
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

USUALLY, SELDOM = gc.get_threshold(), (50_000, 20, 100)


def start_loading() -> None:
    """Collect garbage seldom, from the beginning of a process that is ours until ``end_loading``."""
    gc.set_threshold(*SELDOM)


def end_loading() -> None:
    """Leave what is in memory now alone until the process ends, and collect as usual; nothing without ``start_loading``."""
    if gc.get_threshold() == SELDOM:
        gc.freeze()
        gc.set_threshold(*USUALLY)
