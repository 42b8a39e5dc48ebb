"""Text to tokens and back without transformers: tokenizer.json and the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.files import ArtifactFiles

REPLACEMENT = "\ufffd"  # what an unfinished multi-byte character decodes to
# A character has at most 4 byte tokens; more than this are not a character but bad bytes.
MAX_PENDING = 16

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class TextTokenizer:
    """The tokenizer of an artifact folder. Raises SourceError if the folder has none.

    With `files` what is read is checked first.
    """

    def __init__(self, folder: Path, files: ArtifactFiles | None = None) -> None:
        from tokenizers import Tokenizer

        self._files = files or ArtifactFiles(folder, check=False)
        path = self._files.require(folder / "tokenizer.json")
        if not path.is_file():
            raise SourceError(
                str(folder),
                "no tokenizer.json",
                "the tokenizer beside the model",
                "build from a base that has its tokenizer",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise SourceError(str(path), f"cannot be read ({error})", "a tokenizer") from error
        # Settings of some training run, not of the tokenizer.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._folder = folder

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own begin token where it has one."""
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode_chat(self, text: str) -> list[int]:
        """Ids of `text` as one user message, up to where the assistant's answer begins."""
        config = self._files.read("tokenizer_config.json")
        template = _chat_template(self._files, config)
        if template is None:
            raise SourceError(
                str(self._folder), "no chat template", "an instruct model", "prompt without chat"
            )
        messages = [{"role": "user", "content": text}]
        # The template writes the special tokens itself.
        rendered = render_chat(template, messages, _special_tokens(self._files, config))
        return self.encode(rendered, special_tokens=False)

    def stream(self, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
        """Text of `ids` piece by piece, as it would stand behind `prompt`.

        A piece is held back while it ends in an unfinished character. Each is decoded together
        with the one before, because what a token says can depend on whether it comes first
        (SentencePiece drops a leading space) and on the bytes beside it. The cut never falls
        inside a piece: half a character would turn the bytes that follow into nonsense.
        """
        window = list(prompt)
        shown, pending = len(self.decode(window)), 0
        for token in ids:
            window.append(token)
            pending += 1
            text = self.decode(window)
            if text.endswith(REPLACEMENT) and pending < MAX_PENDING:
                continue
            if len(text) > shown:
                yield text[shown:]
                window = window[-pending:]
                shown = len(self.decode(window))
            pending = 0
        rest = self.decode(window)
        if len(rest) > shown:
            yield rest[shown:]


def render_chat(
    template: str, messages: list[dict[str, str]], special_tokens: Mapping[str, str]
) -> str:
    """Render a chat template as transformers does: Jinja, sandboxed, with its extra functions."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_in_template
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **special_tokens
        )
    except TemplateError as error:
        raise SourceError("chat template", str(error), "one that renders a message") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # no HTML escapes in a prompt


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise_in_template(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _chat_template(files: ArtifactFiles, config: Mapping[str, Any]) -> str | None:
    """The default template, from wherever the versions of transformers put it."""
    file = files.require(files.folder / "chat_template.jinja")
    if file.is_file():
        return file.read_text(encoding="utf-8")
    stored = files.read("chat_template.json") or config
    template = stored.get("chat_template")
    if isinstance(template, list):  # several by name
        named = [entry for entry in template if isinstance(entry, Mapping)]
        template = next((n.get("template") for n in named if n.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _special_tokens(files: ArtifactFiles, config: Mapping[str, Any]) -> dict[str, str]:
    """Variables such as `bos_token` for the template; a token is a string or a description."""
    stored = {**files.read("special_tokens_map.json"), **config}
    tokens = {}
    for name in SPECIAL_TOKENS:
        token = stored.get(name)
        content = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(content, str):
            tokens[name] = content
    return tokens
