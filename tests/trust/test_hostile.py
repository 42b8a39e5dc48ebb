"""Inputs made to cost are refused by name; what each costs is a row of `make trust`."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from adaptrix_export.cli import main
from adaptrix_export.errors import AdapterError, SourceError
from adaptrix_export.load.adapters import patterns
from adaptrix_export.load.files import tensors
from adaptrix_export.load.files.gguf_header import read_gguf
from tests.trust import measured
from tests.trust.fixtures import Inputs, copied, make_inputs
from tests.trust.hostile import ROOM, cases, safetensors
from tests.trust.malformed import Case, gguf

# Accepted as they are: what is hostile in them is read by nobody.
UNREAD = ("base/tokenizer.json: 9M objects", "patterns, recursive: _build",
          "patterns, 20k words: _build")  # fmt: skip
QUICK = ("160k", "twice", "1e12", "1e9 of", "recursive", "words", "10 MB", "a long text", "MARK")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def prepared(case: Case, inputs: Inputs, folder: Path) -> list[str]:
    copied(inputs.base, folder / "base")
    copied(inputs.adapter, folder / "adapter")
    return case.make(folder)


@pytest.mark.parametrize(
    "case",
    [case for case in cases() if any(word in case.name for word in QUICK)],
    ids=lambda case: case.name,
)
def test_each_is_refused_by_name(case: Case, inputs: Inputs, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, prepared(case, inputs, tmp_path))
    assert "internal error" not in done.output
    assert done.exit_code == (0 if case.name in UNREAD else 2), done.output
    shutil.rmtree(tmp_path)  # some are large


@pytest.mark.slow
def test_none_takes_much_memory(inputs: Inputs, tmp_path: Path) -> None:
    """In a process for each, beside the same command on the inputs as they were."""
    (tmp_path / "plain").mkdir()
    plain = cases()[0]
    usual = measured.run(prepared(Case("", _untouched), inputs, tmp_path / "plain"), tmp_path)
    assert plain.name and usual.code == 0, usual.said
    for number, case in enumerate(cases()):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = prepared(case, inputs, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        cost = measured.run(command, folder)
        assert cost.code == (0 if case.name in UNREAD else 2), f"{case.name}: {cost.said}"
        assert 0 < cost.peak < usual.peak + size + ROOM, f"{case.name}: {cost.peak / 1e6:.0f} MB"
        shutil.rmtree(folder)


def _untouched(folder: Path) -> list[str]:
    return ["build", "--base", str(folder / "base"), "--adapter", str(folder / "adapter"),
            "--target", "safetensors", "--parity", "off", "--out", str(folder / "out")]  # fmt: skip


def test_the_bounds_leave_room_for_what_is_real(tmp_path: Path) -> None:
    """The tensors of a LoRA on 6,144 experts, and the metadata of a vocabulary of 262,144."""
    entries = ", ".join(
        f'"base_model.model.model.layers.{n // 768}.mlp.experts.{n}.down_proj.lora_A.weight": '
        f'{{"dtype": "U8", "shape": [1], "data_offsets": [{n}, {n + 1}]}}'
        for n in range(36_864)
    )
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(f"{{{entries}}}".encode(), bytes(36_864)))
    assert len(tensors.read_safetensors(path).tensors) == 36_864
    count = 262_144
    texts = struct.pack("<IQ", 8, count) + (struct.pack("<Q", 4) + b"word") * count
    merges = struct.pack("<IQ", 8, 2 * count) + (struct.pack("<Q", 3) + b"a b") * 2 * count
    floats = struct.pack("<IQ", 6, count) + struct.pack("<f", 0.5) * count
    (tmp_path / "x.gguf").write_bytes(
        gguf(("tokens", 9, texts), ("merges", 9, merges), ("scores", 9, floats))
    )
    metadata = read_gguf(tmp_path / "x.gguf").metadata
    assert metadata["scores"] == [0.5] * count and metadata["tokens"][-1] == "word"
    assert len(metadata["merges"]) == 2 * count


def test_a_name_of_a_pattern_matches_as_its_regex_does() -> None:
    import regex

    paths = ["model.layers.1.q_proj", "q_proj", "layers.11.q_proj", "a.xq_proj", "a.q.proj", ""]
    names = ["q_proj", "layers.1.q_proj", "1.q_proj", ".", "model.layers.1.q_proj", "q.proj", "a."]
    for path in paths:
        for name in names:
            expected = bool(regex.match(rf"(.*\.)?({name})$", path))
            assert patterns.ends_with(name, path) is expected, (name, path)
    assert patterns.ends_with("q_(proj)", "q_proj") is None


def test_many_patterns_have_one_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    import regex

    monkeypatch.setattr(patterns, "SECONDS", 0.0)
    with (
        patterns.limited_patterns(),
        pytest.raises(AdapterError, match="the patterns of this adapter take too long"),
    ):
        patterns.search("place", regex.match, "%s", "a|b", "a")
    assert patterns.search("place", regex.match, "%s", "a|b", "a")  # outside each has its own


def test_lists_of_lists_count_as_values(tmp_path: Path) -> None:
    nested = struct.pack("<IQ", 9, 2) + 2 * (struct.pack("<IQ", 0, 1_500_000) + bytes(1_500_000))
    (tmp_path / "x.gguf").write_bytes(gguf(("x", 9, nested)))
    with pytest.raises(SourceError, match="3000002 values in arrays"):
        read_gguf(tmp_path / "x.gguf")
