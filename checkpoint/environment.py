"""What the libraries read from the environment as they load; whoever set it already is left alone. To be imported before them."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# threads that spin while they wait make everything several times slower as soon as a core has other work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# a layer's tensors are in memory when transformers places them: threads for that gain nothing, and one that cannot start for want
# of memory is waited for without end
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
# products compiled for shapes that are kept: a layer has fewer than this, and a thousand take 15 MB
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
