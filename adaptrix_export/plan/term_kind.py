"""What every kind of term answers, so that nothing needs to ask which kind it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from adaptrix_export.plan.tensor import Tensor

if TYPE_CHECKING:
    from adaptrix_export.plan.terms import Leaf

Size = tuple[str, int, int]  # what it is (with a {} for the number), the number, the expected


class TermKind:
    """What every kind of term answers. The defaults are those of a kind that only its layer or its
    method can evaluate; a kind overrides what it has."""

    @property
    def is_plain(self) -> bool:
        """Whether it is LoRA and nothing else."""
        return False

    @property
    def is_stacked(self) -> bool:
        """Whether it is on a parameter that stacks experts, and has factors for each of them."""
        return False

    @property
    def is_layer_made(self) -> bool:
        """Whether only PEFT's layer knows what it adds."""
        return False

    @property
    def reads_base(self) -> bool:
        """Whether what it adds depends on the values of the base."""
        return False

    @property
    def scaling(self) -> float | None:
        """The factor of the whole product."""
        return None

    @property
    def lora_rank(self) -> int | None:
        """The rank of its factors."""
        return None

    @property
    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """(a, b, scale) where it has `scale * b @ a` of one matrix in it."""
        return None

    @property
    def lora_magnitude(self) -> Tensor | None:
        """DoRA's magnitude."""
        return None

    @property
    def vanishes_with(self) -> tuple[Tensor, ...]:
        """Tensors of which one that is zero makes the whole term zero."""
        return ()

    @property
    def outputs(self) -> int | None:
        """How many outputs of the module it acts on, where these can be cut apart."""
        return None

    def with_outputs(self, cut: Callable[[Tensor], Tensor]) -> Leaf:
        """The same with `cut` of every tensor that has a row or an entry for each output."""
        raise TypeError(f"{type(self).__name__} has no outputs to cut apart")

    def scaled_by(self, weight: float) -> Leaf:
        """The term times a number."""
        raise TypeError(f"{type(self).__name__} has no scale")

    def sizes(self, outputs: int, inputs: int) -> list[Size]:
        """Every axis whose length the base decides, for a module of these outputs and inputs."""
        return []

    def peft_tensors(self, embedding: bool) -> Mapping[str, Tensor]:
        """How PEFT's keys end after the module's path -> tensor; empty where PEFT has no such keys.

        `embedding`: the module is looked up, and PEFT names its factors otherwise.
        """
        return {}
