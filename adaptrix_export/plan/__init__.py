"""The plan: which parameters of a base change, and how, by reference to tensors on disk."""

from adaptrix_export.plan.adapter import Adapter, Adjustment, Delta, Prompt, Replacement
from adaptrix_export.plan.base import Base
from adaptrix_export.plan.gate import Gate, clamp_slope
from adaptrix_export.plan.loss import ApproximationLoss
from adaptrix_export.plan.plan import Change, Pass, Plan
from adaptrix_export.plan.site import Site
from adaptrix_export.plan.tensor import Array, Tensor
from adaptrix_export.plan.terms import (
    Composed,
    Dora,
    Experts,
    Leaf,
    LowRank,
    Part,
    Scaled,
    Term,
    Tuned,
    leaves,
    low_ranks,
    on_experts,
)

__all__ = [
    "Adapter",
    "Adjustment",
    "ApproximationLoss",
    "Array",
    "Base",
    "Change",
    "Composed",
    "Delta",
    "Dora",
    "Experts",
    "Gate",
    "Leaf",
    "LowRank",
    "Part",
    "Pass",
    "Plan",
    "Prompt",
    "Replacement",
    "Scaled",
    "Site",
    "Tensor",
    "Term",
    "Tuned",
    "clamp_slope",
    "leaves",
    "low_ranks",
    "on_experts",
]
