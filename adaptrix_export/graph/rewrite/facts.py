"""Facts that a runtime needs about a graph, as one JSON object in the model's metadata.

`shared_cache`: the cache may be updated in place; `slots`, `rows`, `row_slots` and
`model_version`: the adapter slots, see `slots.py`. A runtime reads the metadata from its ONNX
Runtime session and needs no other file.
"""

from __future__ import annotations

import json

import onnx_ir as ir

from adaptrix_export.runtime.stamps import FACTS

_CACHE_INPUTS = (3, 4)  # of GroupQueryAttention: past_key, past_value


def shares_cache(model: ir.Model) -> bool:
    """Whether past and present may be one buffer: every cache goes through GroupQueryAttention.

    That operator takes the number of tokens from the mask, not from the size of the cache, and
    writes new keys and values in place where past and present are the same memory.
    """
    past = [v for v in model.graph.inputs if str(v.name).startswith("past_key_values.")]
    outputs = set(map(id, model.graph.outputs))
    for value in past:
        uses = list(value.uses())
        if len(uses) != 1:
            return False
        node, index = uses[0].node, uses[0].idx
        if node.op_type != "GroupQueryAttention" or index not in _CACHE_INPUTS:
            return False
        if id(node.outputs[index - 2]) not in outputs:
            return False
    return bool(past)


def state_facts(model: ir.Model, **facts: object) -> None:
    """Write the facts into the model's metadata."""
    facts["shared_cache"] = shares_cache(model)
    model.metadata_props[FACTS] = json.dumps(facts, sort_keys=True)
