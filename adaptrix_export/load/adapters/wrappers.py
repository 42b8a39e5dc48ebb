"""Words that training wrappers leave in the names of modules, and that never mean a module."""

from __future__ import annotations

from collections.abc import Callable

# Word -> who wraps so.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
MODULE = "module"  # DistributedDataParallel's, but a module may be called so
_WHO = {**WRAPPERS, MODULE: "DistributedDataParallel"}


def unwrapped(key: str, is_known: Callable[[str], bool]) -> tuple[str, tuple[str, ...]]:
    """The key without wrappers, and the words that were stripped from it.

    `module` goes only where the key means something without it and nothing with it.
    """
    words = key.split(".")
    kept = [word for word in words if word not in WRAPPERS]
    stripped = [word for word in words if word in WRAPPERS]
    if MODULE in kept and not is_known(".".join(kept)):
        bare = [word for word in kept if word != MODULE]
        if is_known(".".join(bare)):
            stripped += [MODULE] * (len(kept) - len(bare))
            kept = bare
    return ".".join(kept), tuple(stripped)


def note_of(count: int, words: tuple[str, ...]) -> str:
    """What a user should know of stripped words."""
    shown = ", ".join(f"{word} ({_WHO[word]})" for word in sorted(set(words)))
    return f"names that wrappers left were stripped from {count} keys: {shown}"
