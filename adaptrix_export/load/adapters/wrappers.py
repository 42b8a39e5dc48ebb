"""Names that training wrappers insert into the paths of modules."""

from __future__ import annotations

from collections.abc import Callable

# Inserted name -> the wrapper.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
MODULE = "module"  # DistributedDataParallel's, but a module may be called so
_WHO = {**WRAPPERS, MODULE: "DistributedDataParallel"}


def strip_wrappers(key: str, is_known: Callable[[str], bool]) -> tuple[str, tuple[str, ...]]:
    """The key without wrapper names, and the names that were removed.

    `module` is removed only if the key is unknown with it and known without it.
    """
    words = key.split(".")
    remaining = [word for word in words if word not in WRAPPERS]
    stripped = [word for word in words if word in WRAPPERS]
    if MODULE in remaining and not is_known(".".join(remaining)):
        bare = [word for word in remaining if word != MODULE]
        if is_known(".".join(bare)):
            stripped += [MODULE] * (len(remaining) - len(bare))
            remaining = bare
    return ".".join(remaining), tuple(stripped)


def note_of(count: int, words: tuple[str, ...]) -> str:
    """A note for the user on the removed names."""
    shown = ", ".join(f"{word} ({_WHO[word]})" for word in sorted(set(words)))
    return f"names that wrappers left were stripped from {count} keys: {shown}"
