"""Text piece by piece must be the text at once; templates render as in transformers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.tokenizer import TextTokenizer, render_chat
from tests.artifacts import save_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    save_tokenizer(folder)
    return TextTokenizer(folder)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """As LLaMA 2's: spaces as ▁, bytes as fallback, the first space stripped on decoding."""
    folder = tmp_path_factory.mktemp("sp")
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["<unk>", *bytes_, "▁", *"abcdefgh", "▁a", "▁b", "▁ab"]
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


# Without the replacement character itself, which a decoder also says for broken bytes.
texts = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd")
    | st.sampled_from("ab é東😀"),
    max_size=40,
)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@given(prompt=texts, answer=texts)
def test_pieces_join_to_the_whole(request, kind, prompt, answer):
    tokenizer = request.getfixturevalue(kind)
    both, ids = tokenizer.encode(prompt + answer), tokenizer.encode(prompt)
    if both[: len(ids)] != ids:  # the cut falls into a token; take the cut that exists
        ids = both[: len(both) // 2]
        if "\ufffd" in tokenizer.decode(ids):
            return
    rest = both[len(ids) :]
    pieces = list(tokenizer.stream(ids, rest))
    assert tokenizer.decode(ids) + "".join(pieces) == tokenizer.decode(both)
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_out_whole(byte_level):
    ids = byte_level.encode("😀é")
    assert len(ids) == 6
    assert list(byte_level.stream([], ids)) == ["😀", "é"]


def test_a_leading_space_behind_the_prompt_is_kept(sentencepiece):
    prompt, answer = sentencepiece.encode("a"), sentencepiece.encode("a ab b")[1:]
    assert list(sentencepiece.stream(prompt, answer)) == [" ab", " b"]


def test_broken_bytes_are_said_after_a_while_and_at_the_end(byte_level):
    broken = byte_level.encode("é")[:1]
    pieces = list(byte_level.stream([], broken * 40))
    assert len(pieces) == 3 and set("".join(pieces)) == {"\ufffd"}


def test_special_tokens_are_not_said(byte_level):
    assert list(byte_level.stream([0], [1, 2, *byte_level.encode("a"), 1])) == ["a"]


@pytest.mark.parametrize("place", ["jinja", "config", "named", "json"])
def test_a_template_is_found_where_any_version_puts_it(tmp_path, place):
    save_tokenizer(tmp_path)
    template = "{{ messages[0].content }}!"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text(template)
    elif place == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    else:
        named = [{"name": "tool", "template": "no"}, {"name": "default", "template": template}]
        config["chat_template"] = template if place == "config" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat("hey")) == "hey!"


def test_templates_have_the_functions_of_transformers_and_no_others():
    message = [{"role": "user", "content": "<é>"}]
    render = (
        "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    assert render_chat(render, message, {}).startswith('{"role": "user", "content": "<é>"}20')
    with pytest.raises(SourceError, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", message, {})
    with pytest.raises(SourceError, match="unsafe"):
        render_chat("{{ messages.__class__.__mro__ }}", message, {})
    with pytest.raises(SourceError, match="chat template"):
        render_chat("{% if %}", message, {})


def test_a_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="cannot be read"):
        TextTokenizer(tmp_path)
