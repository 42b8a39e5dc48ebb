"""The methods of composition, one row each: what they act on, and the options they read.

D_i is the delta (out, in) of adapter i at one parameter, as its live layer computes it with no
other adapter active; w_i is its weight there. All methods except `peft-*` act on the D_i and not on
LoRA factors, so the result does not depend on the factorization.

| method | result |
|---|---|
| cat | sum of w_i D_i; LoRA ranks add up; with weights of 1 what PEFT runs with all active |
| linear | sum of w_i D_i: on deltas the same as a weighted cat |
| svd | the best approximation of that sum of a given rank |
| magnitude_prune | sum of w_i top(D_i): the largest `density` of the values, the rest zero |
| ties | trim as above, elect a sign for each value, mean of the w_i D_i that agree with it |
| dare_linear | sum of w_i M_i D_i / density; M_i keeps a value with probability `density` |
| dare_ties | the same drop, then the election and the mean of ties |
| *_svd | any of these four, then the best approximation of a given rank |
| knots | ties in a common basis: [D_1 ... D_n] = U S [V_1 ... V_n]^T, ties of the w_i V_i |
| tsv | the strongest singular vectors of each D_i, made orthogonal across adapters |
| peft-* | PEFT's formulas, which act on A and B apart; peft-svd and peft-cat are svd and cat |

Sources: TIES https://arxiv.org/abs/2306.01708, DARE https://arxiv.org/abs/2311.03099, KnOTS
https://arxiv.org/abs/2410.19735, TSV-Merge https://arxiv.org/abs/2412.00081, PEFT's
`LoraModel.add_weighted_adapter`. Elections are held on w_i D_i (PEFT's: before weighting).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sparsify = Literal["", "magnitude", "random"]
Shape = Literal["elements", "matrix", "factors"]
Basis = Literal["", "common", "orthogonal"]


@dataclass(frozen=True)
class Method:
    """`sparsify`: values are dropped first; `elects`: the result is the mean of the values with the
    elected sign, else the sum; `low_rank`: the result has `rank`, or the sum of the ranks.

    `acts_on` "elements": single values; "matrix": singular vectors (biases are summed); "factors":
    LoRA's A and B.
    """

    acts_on: Shape = "elements"
    basis: Basis = ""  # of singular vectors: one for all adapters, or one each, made orthogonal
    sparsify: Sparsify = ""
    elects: bool = False
    truncates: bool = False  # to `rank`
    low_rank: bool = False

    @property
    def needs_rank(self) -> bool:
        """Whether it must be given a rank: with an orthogonal basis it can choose one itself."""
        return self.truncates and self.basis != "orthogonal"

    @property
    def options(self) -> tuple[str, ...]:
        """The options that this method reads, beside weights."""
        named = {
            "density": bool(self.sparsify),
            "election": self.elects,
            "seed": self.sparsify == "random",
            "rank": self.truncates,
        }
        return tuple(name for name, read in named.items() if read)


SUMS = ("cat", "linear", "peft-cat")  # w_1 D_1 + ... + w_n D_n
METHODS: dict[str, Method] = {
    "cat": Method(),
    "linear": Method(),
    "svd": Method("matrix", truncates=True, low_rank=True),
    "magnitude_prune": Method(sparsify="magnitude"),
    "ties": Method(sparsify="magnitude", elects=True),
    "dare_linear": Method(sparsify="random"),
    "dare_ties": Method(sparsify="random", elects=True),
    "magnitude_prune_svd": Method(sparsify="magnitude", truncates=True, low_rank=True),
    "ties_svd": Method(sparsify="magnitude", elects=True, truncates=True, low_rank=True),
    "dare_linear_svd": Method(sparsify="random", truncates=True, low_rank=True),
    "dare_ties_svd": Method(sparsify="random", elects=True, truncates=True, low_rank=True),
    "knots": Method("matrix", "common", sparsify="magnitude", elects=True, low_rank=True),
    "tsv": Method("matrix", "orthogonal", truncates=True, low_rank=True),
    "peft-cat": Method("factors"),
    "peft-svd": Method("factors", truncates=True, low_rank=True),
    "peft-linear": Method("factors", low_rank=True),
    "peft-magnitude-prune": Method("factors", sparsify="magnitude", low_rank=True),
    "peft-ties": Method("factors", sparsify="magnitude", elects=True, low_rank=True),
    "peft-dare-linear": Method("factors", sparsify="random", low_rank=True),
    "peft-dare-ties": Method("factors", sparsify="random", elects=True, low_rank=True),
}
DENSITY = 0.5  # of a method that drops values, unless the recipe says another
PEFT_ALIASES = {"peft-cat": "cat", "peft-svd": "svd"}  # already act on the delta
