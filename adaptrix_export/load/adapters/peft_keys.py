"""Parses the names of tensors in adapter files into PEFT's canonical keys.

PEFT writes `base_model.model.<module>.lora_A.weight`. Other forms come from raw state dicts
(`lora_A.default.weight`), from tools that add or drop a prefix, and from models whose modules were
renamed. PEFT silently ignores keys that it does not know; here each key belongs to one module, or
it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from adaptrix_export.errors import AdapterError
from adaptrix_export.load.adapters.wrappers import note_of, strip_wrappers
from adaptrix_export.load.files.views import FileTensor, renamed
from adaptrix_export.plan import Base

PREFIX = "base_model.model."
_PREFIX_WORDS = ("base_model", "model")
NAME = "<adapter name>"  # in a row below: any one word

# Endings with the adapter's name, which PEFT does not write, and PEFT's ending.
_ENDINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_A", NAME, "weight"), "lora_A.weight"),
    (("lora_B", NAME, "weight"), "lora_B.weight"),
    (("lora_B", NAME, "bias"), "lora_B.bias"),
    (("lora_embedding_A", NAME), "lora_embedding_A"),
    (("lora_embedding_B", NAME), "lora_embedding_B"),
    (("lora_embedding_A", NAME, "weight"), "lora_embedding_A"),
    (("lora_embedding_B", NAME, "weight"), "lora_embedding_B"),
    (("lora_magnitude_vector", NAME), "lora_magnitude_vector"),
    (("lora_magnitude_vector", NAME, "weight"), "lora_magnitude_vector"),
    (("token_adapter", "trainable_tokens_delta", NAME), "token_adapter.trainable_tokens_delta"),
    (("modules_to_save", NAME, "weight"), "weight"),
    (("modules_to_save", NAME, "bias"), "bias"),
)
# Endings without an adapter's name, and PEFT's ending.
_NAMELESS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_A", "weight"), "lora_A.weight"),
    (("lora_B", "weight"), "lora_B.weight"),
    (("lora_B", "bias"), "lora_B.bias"),
    (("lora_embedding_A",), "lora_embedding_A"),
    (("lora_embedding_B",), "lora_embedding_B"),
    (("lora_embedding_A", "weight"), "lora_embedding_A"),
    (("lora_embedding_B", "weight"), "lora_embedding_B"),
    (("lora_magnitude_vector",), "lora_magnitude_vector"),
    (("lora_magnitude_vector", "weight"), "lora_magnitude_vector"),
    (("token_adapter", "trainable_tokens_delta"), "token_adapter.trainable_tokens_delta"),
    (("modules_to_save", "weight"), "weight"),
    (("modules_to_save", "bias"), "bias"),
    (("base_layer", "weight"), "base_layer.weight"),
    (("base_layer", "bias"), "base_layer.bias"),
    (("weight",), "weight"),
    (("bias",), "bias"),
)

_SAVED_TWICE = ".modules_to_save."

Words = tuple[str, ...]
Rename = Callable[[Words], Words | None]


def _starts(old: Words, new: Words) -> Rename:
    def rename(words: Words) -> Words | None:
        return (*new, *words[len(old) :]) if words[: len(old)] == old else None

    return rename


# Other names of one module. A row counts only if the base has a module of the new name.
RENAMES: tuple[Rename, ...] = (
    lambda words: words,
    _starts((), ("model",)),  # trained on the bare model, without its head
    _starts((), ("transformer",)),
    # The llava family before and after transformers 5.
    _starts(("language_model", "model"), ("model", "language_model")),
    _starts(("model", "language_model"), ("language_model", "model")),
    _starts(("language_model", "lm_head"), ("lm_head",)),
    _starts(("language_model",), ()),
    # The text half of a vision-language model on a model of text alone, and the other way round.
    _starts(("model", "language_model"), ("model",)),
    _starts(("model",), ("model", "language_model")),
    _starts(("model", "text_model"), ("model",)),
    _starts(("model",), ("model", "text_model")),
)


@dataclass(frozen=True)
class Key:
    """A parsed key: module path as written, PEFT's ending, and the adapter's name if it has one."""

    words: Words
    ending: str
    name: str | None


def split_key(key: str) -> Key | None:
    """Split a key into module path and ending; None for an unknown ending.

    The longest endings are tried first, so that `lora_A.weight` is not the weight of a `lora_A`.
    """
    words = tuple(key.split("."))
    for size in (3, 2, 1):
        for rows in (_NAMELESS, _ENDINGS):
            for row, ending in rows:
                tail = words[-size:]
                if len(row) == size < len(words) and _fits(row, tail):
                    name = next((t for r, t in zip(row, tail, strict=True) if r is NAME), None)
                    return Key(words[:-size], ending, name)
    return None


def _fits(row: Words, tail: Words) -> bool:
    return all(r == t or (r is NAME and t) for r, t in zip(row, tail, strict=True))


def module_paths(base: Base) -> frozenset[str]:
    """Paths of all modules of the base, containers included, from the names of its tensors."""
    paths: set[str] = set()
    for name in (*base.tensors, *base.tied):
        words = name.split(".")[:-1]
        paths.update(".".join(words[:n]) for n in range(1, len(words) + 1))
    return frozenset(paths)


def sites_of(words: Words, modules: Set[str]) -> tuple[str, ...]:
    """The modules of the base that a path as written may mean, sorted."""
    matches = set()
    for start in range(0, len(words), len(_PREFIX_WORDS)):
        for rename in RENAMES:
            renamed = rename(words[start:])
            if renamed and ".".join(renamed) in modules:
                matches.add(".".join(renamed))
        if words[start : start + len(_PREFIX_WORDS)] != _PREFIX_WORDS:
            break
    return tuple(sorted(matches))


def one_site(place: str, key: str, words: Words, modules: Set[str]) -> str:
    """The one module of the base that `words` name, or AdapterError."""
    matches = sites_of(words, modules)
    if len(matches) == 1:
        return matches[0]
    raise AdapterError(
        f"{place}: {key}",
        f"could mean {' or '.join(matches)}" if matches else "no module of the base",
        "one module of the base", "was this adapter trained on another model?",
    )  # fmt: skip


@dataclass(frozen=True)
class Keys:
    """`tensors` under PEFT's keys; `notes` for the user; `written`: module of the base -> its path
    in the file, where the two differ."""

    tensors: tuple[FileTensor, ...]
    notes: tuple[str, ...]
    written: Mapping[str, str]


def canonical(
    place: str, stored: Iterable[FileTensor], base: Base
) -> tuple[tuple[FileTensor, ...], tuple[str, ...]]:
    """The tensors under PEFT's keys, and a note if any key was changed."""
    keys = read_keys(place, stored, base)
    return keys.tensors, keys.notes


def read_keys(place: str, stored: Iterable[FileTensor], base: Base) -> Keys:
    """Rename every key to the form that PEFT would write for this base.

    Raises AdapterError, naming both, if one key could mean two modules or two keys mean the same
    tensor. Unknown keys are not changed; the caller reports them.
    """
    modules = module_paths(base)
    named: list[FileTensor] = []
    names: dict[str, str] = {}
    written: dict[str, str] = {}
    stored, stripped = _strip_wrappers(tuple(stored), modules, base)
    stored_names = {tensor.name for tensor in stored}
    for tensor in stored:
        # A module of modules_to_save with a resized vocabulary is saved under both its names;
        # PEFT reads the plain one, and the check compares the other with that.
        if _SAVED_TWICE in tensor.name and tensor.name.replace(_SAVED_TWICE, ".") in stored_names:
            continue
        key, name = _canonical_key(place, tensor.name, modules, base)
        if key in written:
            raise AdapterError(
                f"{place}: {tensor.name}", f"the same tensor as {written[key]}", "each tensor once",
                "is this a file of two adapters, or saved twice?",
            )  # fmt: skip
        written[key] = tensor.name
        if name is not None:
            names[name] = tensor.name
        named.append(renamed(tensor, key))
    if len(names) > 1:
        first, second = sorted(names)[:2]
        raise AdapterError(
            f"{place}: {names[first]}", f"adapter {first!r}, beside adapter {second!r} in "
            f"{names[second]}", "one adapter a file", "save each adapter in a folder of its own",
        )  # fmt: skip
    changed = [(old, new) for new, old in written.items() if old != new]
    notes = ((_note(changed),) if changed else ()) + stripped
    return Keys(tuple(named), notes, dict(_renamed_modules(changed)))


def _renamed_modules(changed: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for old, new in changed:
        before, after = split_key(old), split_key(new)
        if before and after:
            words = before.words
            while words[: len(_PREFIX_WORDS)] == _PREFIX_WORDS:
                words = words[len(_PREFIX_WORDS) :]
            here = ".".join(after.words[len(_PREFIX_WORDS) :])
            if ".".join(words) != here:
                yield here, ".".join(words)


def _strip_wrappers(
    stored: tuple[FileTensor, ...], modules: Set[str], base: Base
) -> tuple[tuple[FileTensor, ...], tuple[str, ...]]:
    """The tensors without wrapper names in their keys, and a note if there were any."""

    def is_known(key: str) -> bool:
        parsed = split_key(key)
        return parsed is not None and bool(_sites(parsed.words, modules, base))

    plain: list[FileTensor] = []
    words: list[str] = []
    count = 0
    for tensor in stored:
        name, stripped = strip_wrappers(tensor.name, is_known)
        plain.append(renamed(tensor, name) if stripped else tensor)
        words += stripped
        count += bool(stripped)
    return tuple(plain), ((note_of(count, tuple(words)),) if count else ())


def _sites(words: Words, modules: Set[str], base: Base) -> tuple[str, ...]:
    """`sites_of`, else the module by the renames of newer versions of transformers."""
    return sites_of(words, modules) or _sites_by_live_name(words, modules, base)


def _sites_by_live_name(words: Words, modules: Set[str], base: Base) -> tuple[str, ...]:
    skeleton = getattr(base, "skeleton", None)
    for start in range(0, len(words), len(_PREFIX_WORDS)):
        path = f"{'.'.join(words[start:])}.weight"
        if skeleton is not None:
            name = skeleton.live_name(path)[0]
        else:
            family = getattr(getattr(base, "architecture", None), "family", None)
            name = family.live_name(path) if family is not None else path
        if name.removesuffix(".weight") in modules:
            return (name.removesuffix(".weight"),)
        if words[start : start + len(_PREFIX_WORDS)] != _PREFIX_WORDS:
            break
    return ()


def _canonical_key(place: str, key: str, modules: Set[str], base: Base) -> tuple[str, str | None]:
    parsed = split_key(key)
    if parsed is None:
        return key, None
    plain = ".".join(parsed.words[2:])
    if parsed.words[:2] == _PREFIX_WORDS and plain in modules:
        return f"{PREFIX}{plain}.{parsed.ending}", parsed.name  # as PEFT itself reads it
    matches = _sites(parsed.words, modules, base)
    if len(matches) > 1:
        raise AdapterError(
            f"{place}: {key}", f"could mean {' or '.join(matches)}", "one module of the base",
            f"rename the key to the form {PREFIX}{matches[0]}.{parsed.ending}",
        )  # fmt: skip
    return (
        f"{PREFIX}{matches[0]}.{parsed.ending}" if matches else key
    ), parsed.name if matches else None


def _note(changed: list[tuple[str, str]]) -> str:
    old, new = changed[0]
    return f"{len(changed)} keys are not as PEFT writes them, which PEFT would drop: {old} is {new}"


def saved_by(path: str, modules_to_save: Iterable[str] | None) -> str | None:
    """The entry of `modules_to_save` that matches this module or one that contains it, by PEFT's
    rule: a path matches if it ends with the entry, so `norm` matches `input_layernorm`."""
    words = path.split(".")
    holders = [".".join(words[:count]) for count in range(len(words), 0, -1)]
    names = list(modules_to_save or ())
    return next((name for holder in holders for name in names if holder.endswith(name)), None)
