"""Whose tokenizer an artifact gets: the base's, or that of the adapter that changed it.

Tokens are added before training, and then the adapter's folder has a tokenizer and a chat template
of its own. With the base's the artifact would be proved, and of no use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrix_export.errors import AdapterError, RecipeError
from adaptrix_export.load.files.fields import (
    COUNT,
    LIST,
    OBJECT,
    TEXT,
    Kind,
    check_fields,
    list_of,
)
from adaptrix_export.load.files.tensors import read_json
from adaptrix_export.load.tokenizer_files import PROCESSOR_FILES, TOKENIZER_FILES
from adaptrix_export.plan import Adapter, Plan

AUTO, BASE, ADAPTER = "auto", "base", "adapter"
# Any of these holds the vocabulary itself.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
                 "tekken.json")  # fmt: skip
# What of these files is said by the library that wrote them, not by the tokenizer.
_SAVED_BY = (
    "name_or_path", "backend", "is_local", "local_files_only", "transformers_version",
    "processor_class", "tokenizer_class", "padding", "truncation", "padding_side",
)  # fmt: skip
_ADDED = Kind(
    "an object with an id and its content",
    lambda token: (
        isinstance(token, dict) and COUNT.fits(token.get("id")) and TEXT.fits(token.get("content"))
    ),
)
MAX_BYTES = 256 << 20  # Gemma's tokenizer.json has 33 MB
MAX_PARTS = 8_000_000  # and 3 million brackets and commas


@dataclass(frozen=True)
class TokenizerChoice:
    """`folder` has the tokenizer's files; None for the base's own. `note` says why."""

    folder: Path | None = None
    note: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.note,) if self.note else ()


def choose_tokenizer(plan: Plan, choice: str, switched: bool = False) -> TokenizerChoice:
    """The tokenizer of the recipe's `tokenizer`; with adapters to be switched it is the base's.

    Raises RecipeError where there is none or a choice, AdapterError for a tokenizer that knows
    more tokens than the merged model has rows.
    """
    if choice == BASE:
        return TokenizerChoice()
    changed = [a for a in plan.adapters if _has_own(a) and _differs(plan, a)]
    if choice == ADAPTER:
        changed = [adapter for adapter in plan.adapters if _has_own(adapter)]
        if not changed:
            raise RecipeError(
                "tokenizer", "adapter, and no tokenizer beside an adapter", "base or auto",
                "save the tokenizer into the adapter's folder",
            )  # fmt: skip
    if not changed:
        return TokenizerChoice()
    first, names = changed[0], ", ".join(adapter.name for adapter in changed)
    if any(_facts(a.folder) != _facts(first.folder) for a in changed[1:]):
        if switched:
            note = f"the tokenizer is the base's; {names} have others of their own"
            return TokenizerChoice(None, note)
        raise RecipeError(
            "tokenizer", f"a different one beside each of {names}", "one",
            "say `tokenizer: base`, or build with one of them",
        )  # fmt: skip
    if switched:
        return TokenizerChoice(None, f"the tokenizer is the base's; {names} came with another")
    check_rows(plan, first)
    note = f"tokenizer and chat template are those of adapter {first.name}"
    return TokenizerChoice(first.folder, note)


def _has_own(adapter: Adapter) -> bool:
    return any((adapter.folder / name).is_file() for name in _VOCABULARIES)


def _differs(plan: Plan, adapter: Adapter) -> bool:
    """Whether the adapter's tokenizer is another one, and not the base's saved once more."""
    base = plan.base
    same_rows = rows_of(plan) == base.architecture.vocab_size
    if adapter.folder.resolve() == base.folder.resolve() or (base.gguf_file and same_rows):
        return False
    theirs, ours = _facts(adapter.folder), _facts(base.folder)
    return any(theirs[name] != ours.get(name) for name in theirs)


def _facts(folder: Path) -> dict[str, Any]:
    """What a tokenizer's files say, by kind; without what says only who saved them."""
    facts: dict[str, Any] = {}
    tokens = highest_token(folder)
    if tokens is not None:
        facts["tokens"] = tokens
    if (folder / "tokenizer.json").is_file():
        whole = _read_tokenizer(folder / "tokenizer.json")
        facts["added"] = sorted((t["id"], t["content"]) for t in whole.get("added_tokens") or ())
        facts["vocabulary"] = (whole.get("model") or {}).get("vocab")
    template = _template(folder)
    if template is not None:
        facts["template"] = template
    return facts


def _template(folder: Path) -> str | None:
    """The chat template, in whichever file it is."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if template is not None:
                return (
                    template if isinstance(template, str) else json.dumps(template, sort_keys=True)
                )
    return None


def _read_tokenizer(path: Path) -> dict[str, Any]:
    """A tokenizer.json whose fields are of the types that are relied on here."""
    whole = read_json(path, MAX_BYTES, MAX_PARTS)
    check_fields(path.name, whole, {"added_tokens": list_of(_ADDED, 2_000_000), "model": OBJECT})
    check_fields(f"{path.name}: model", whole.get("model") or {}, {"vocab": OBJECT | LIST})
    return whole


def highest_token(folder: Path) -> int | None:
    """The highest token id of a tokenizer.json; None without one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    whole = _read_tokenizer(path)
    vocabulary = (whole.get("model") or {}).get("vocab") or {}
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [token["id"] for token in whole.get("added_tokens") or []]
    return max((n for n in (*ids, *added) if type(n) is int), default=None)


def rows_of(plan: Plan) -> int | None:
    """Tokens of the model that the plan makes: rows of its embedding."""
    base = plan.base
    name = f"{base.architecture.family.embedding}.weight"
    home = base.tied.get(name, name)
    change = plan.changes().get(name) or plan.changes().get(home)
    stored = base.tensors.get(home)
    return change.shape[0] if change else stored.shape[0] if stored else None


def check_rows(plan: Plan, adapter: Adapter) -> None:
    """Raise AdapterError for a tokenizer with tokens that the model has no row for."""
    highest, rows = highest_token(adapter.folder), rows_of(plan)
    if highest is not None and rows is not None and highest >= rows:
        raise AdapterError(
            f"{adapter.name}: tokenizer.json", f"token {highest}", f"ids below {rows}, the rows of "
            "the merged embedding", "save the adapter with save_embedding_layers=True, or say "
            "`tokenizer: base`",
        )  # fmt: skip


def missing_tokenizer(plan: Plan) -> str | None:
    """What is wrong where rows were added and no tokenizer came along; None where nothing is."""
    base, rows = plan.base, rows_of(plan)
    stored = base.tensors.get(f"{base.architecture.family.embedding}.weight")
    if rows is None or stored is None or rows == stored.shape[0]:
        return None
    if any(_has_own(adapter) for adapter in plan.adapters):
        return None
    return f"{rows} rows in place of the base's {stored.shape[0]}, and no tokenizer"


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The files of the tokenizer in a folder, and of the processor around it."""
    for pattern in (*TOKENIZER_FILES, *PROCESSOR_FILES):
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())
