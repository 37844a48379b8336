"""What a linear does in its layer, by the name its module has in transformers: a table of data, read by some allocations.

To add an architecture with names of its own: lines here. A linear that is not in the table has the role ``other``, which every
allocation can treat.
"""

from __future__ import annotations

# the longest matching end of the module's path decides
ROLES: dict[str, str] = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "qkv_proj": "query key value",
    "c_attn": "query key value",
    "query_key_value": "query key value",
    "o_proj": "attention output",
    "out_proj": "attention output",
    "attn.c_proj": "attention output",
    "self_attn.dense": "attention output",
    "attention.dense": "attention output",
    "self_attention.dense": "attention output",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate and up",
    "fc1": "up",
    "mlp.c_fc": "up",
    "dense_h_to_4h": "up",
    "down_proj": "down",
    "fc2": "down",
    "mlp.c_proj": "down",
    "dense_4h_to_h": "down",
    "router": "router",
    "router.proj": "router",
    "gate": "router",
}
OTHER = "other"
ROUTER = "router"  # of a layer with experts: it stays dense
ENDS = ("embedding", "head")  # not of a layer
PRODUCERS = ("gate", "up", "gate and up")  # make the intermediate channels of the feed-forward network
CONSUMER = "down"  # reads them


def role_of(local: str) -> str:
    """The role of a linear by its path in the layer."""
    ends = [end for end in ROLES if local == end or local.endswith("." + end)]
    return ROLES[max(ends, key=len)] if ends else OTHER
