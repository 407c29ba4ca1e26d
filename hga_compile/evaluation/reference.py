"""The dense model on one sequence, and the two ways to set a candidate against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hga_compile.evaluation.candidates import Candidate, Outcome

MODES = ("decode", "all")
MODE_OPTIONS: Mapping[str, Mapping[str, object]] = {
    # As a decoded token is: routed by itself, whatever the profile does with queries that come together.
    "decode": {"routing.prefill": "routed", "routing.prefill_tile": 1},
    "all": {"routing.prefill": "routed"},
}
DENSE = "dense"


@dataclass(frozen=True)
class Reference:
    """The dense model on one text: logits and K/V of all tokens but the last, and the tokens themselves."""

    ids: Tensor
    logits: Tensor
    cache: DynamicCache

    @property
    def scored(self) -> int:
        """Number of tokens that are scored."""
        return len(self.logits)

    @property
    def targets(self) -> Tensor:
        """The scored tokens, `[tokens]`."""
        return self.ids[0, -self.scored :]


def dense_reference(model: PreTrainedModel, ids: Tensor, scored: int) -> Reference:
    """Run the uncompiled model once over `ids` `[1, tokens]`; predict the last `scored` of them."""
    cache = DynamicCache()  # without a config: transformers' own layers, whatever hooks are installed
    output = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=scored)
    return Reference(ids, output.logits[0], cache)


def run_mode(candidate: Candidate, mode: str, reference: Reference) -> Outcome:
    """Give the candidate's logits for the scored tokens in one of `MODES`.

    ``decode``: the dense model's K/V of all before, every scored query routed by itself. ``all``: every query
    of the text routed.
    """
    queries = reference.ids[:, :-1]
    if mode == "all":
        return candidate.whole(queries, reference.scored)
    prefix = queries.shape[1] - reference.scored
    return candidate.decode(reference.cache, prefix, queries[:, prefix:])
