"""The manifest: complete, the same every time, and checked before it is believed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptrix_export.errors import MachineError, SourceError, VerificationError
from adaptrix_export.graph.expression import TensorRef, Transpose
from adaptrix_export.package import (
    InputHashes,
    build_manifest,
    check_hashes,
    hash_file,
    read_manifest,
    write_manifest,
)
from adaptrix_export.save.hashes import FileHash
from adaptrix_export.save.machine_paths import without_machine_paths
from adaptrix_export.targets.artifact import Artifact
from tests.artifacts import plan_of, save_base_with_tokenizer
from tests.tiny import save_adapter


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    base = save_base_with_tokenizer("llama", folder / "base")
    return base, save_adapter(base, folder / "adapter")


@pytest.fixture
def staged(tmp_path):
    """Two files, one of them hashed by lowering."""
    stage = tmp_path / "out"
    (stage / "sub").mkdir(parents=True)
    (stage / "model.bin").write_bytes(b"graph")
    (stage / "sub" / "x").write_bytes(b"")
    digest = hashlib.sha256(b"graph").hexdigest()
    weights = {"w": Transpose((1, 0), TensorRef("model.w"))}
    return Artifact(stage, "onnx", "fp32", {"model.bin": digest}, weights, (), {}, "native")


def manifest_of(artifact, sources, recipe=None):
    plan = plan_of(*sources)
    return build_manifest(
        artifact,
        plan,
        recipe=recipe or {},
        inputs=InputHashes(plan).result(),
        provider="cpu",
        parity="proved",
        report_sha256="ab",
    )


def test_a_manifest_names_inputs_outputs_versions_and_verdict(staged, sources):
    base, _ = sources
    manifest = manifest_of(staged, sources)
    inputs = {(i["spec"], i["file"]): i for i in manifest["inputs"]}
    assert set(inputs) == {
        ("path:base", "model.safetensors"),
        ("path:base", "config.json"),
        ("path:adapter", "adapter_model.safetensors"),
        ("path:adapter", "adapter_config.json"),
    }
    weights = (base / "model.safetensors").read_bytes()
    entry = inputs["path:base", "model.safetensors"]
    assert entry["sha256"] == hashlib.sha256(weights).hexdigest()
    assert entry["bytes"] == len(weights)
    assert sorted(manifest["outputs"]) == ["model.bin", "sub/x"]
    assert {"torch", "transformers", "numpy", "mobius-onnx"} <= manifest["versions"].keys()
    assert manifest["parity"] == {"verdict": "proved", "report_sha256": "ab"}
    assert len(manifest["sites"]) == 28 and manifest["weights"]["w"] == [
        "transpose",
        [1, 0],
        ["tensor", "model.w"],
    ]


def test_the_same_build_elsewhere_gives_the_same_bytes(staged, sources):
    texts = []
    for place in ("/home/a", "/srv/b"):
        recipe = {
            "base": f"{place}/base",
            "adapters": [{"source": f"{place}/adapter", "weight": 1.0}],
            "out": f"{place}/out",
        }
        write_manifest(staged.folder, manifest_of(staged, sources, recipe))
        texts.append((staged.folder / "manifest.json").read_text())
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["recipe"] == {
        "base": "path:base",
        "adapters": [{"source": "path:adapter", "weight": 1.0}],
    }
    assert str(sources[0].parent) not in texts[0] and str(staged.folder) not in texts[0]


@given(
    st.recursive(st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_no_absolute_path_survives(value):
    def strings(v):
        if isinstance(v, str):
            yield v
        for inner in v.values() if isinstance(v, dict) else v if isinstance(v, list) else ():
            yield from strings(inner)

    assert not [s for s in strings(without_machine_paths(value)) if s.startswith(("/", "~"))]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/a/b/c", "path:c"),
        ("~/b", "path:b"),
        ("C:\\models\\b", "path:b"),
        (Path("/a/b"), "path:b"),
        ("hf:org/name@main", "hf:org/name@main"),
        ("package:p/f.gguf", "package:p/f.gguf"),
        ("models/base", "models/base"),
        ("", ""),
    ],
)
def test_specs_keep_what_is_not_of_the_machine(given, kept):
    assert without_machine_paths(given) == kept


def test_hashes_run_beside_and_errors_arrive_at_the_end(sources):
    def broken(path):
        raise FileNotFoundError(2, "No such file", str(path))

    hashes = InputHashes(plan_of(*sources), hasher=broken)
    with pytest.raises(SourceError, match=r"model.safetensors: cannot be read any more"):
        hashes.result()


@given(st.binary(max_size=300))
def test_hash_file_is_sha256(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("h") / "f"
    path.write_bytes(content)
    assert hash_file(path) == FileHash(len(content), hashlib.sha256(content).hexdigest())


def test_hash_file_reads_past_one_block(tmp_path):
    content = bytes(range(256)) * 40_000  # 10 MB
    (tmp_path / "f").write_bytes(content)
    assert hash_file(tmp_path / "f").sha256 == hashlib.sha256(content).hexdigest()


def test_bytes_that_read_back_differently_are_the_machines_fault(staged, sources):
    (staged.folder / "model.bin").write_bytes(b"Graph")
    with pytest.raises(MachineError, match=r"model.bin: reads back as"):
        manifest_of(staged, sources)


def test_check_finds_what_is_missing_extra_and_changed(staged, sources):
    write_manifest(staged.folder, manifest_of(staged, sources))
    assert check_hashes(staged.folder) == []
    (staged.folder / "model.bin").write_bytes(b"grapH")
    (staged.folder / "sub" / "x").unlink()
    (staged.folder / "extra").touch()
    found = {p.file: str(p) for p in check_hashes(staged.folder)}
    assert set(found) == {"model.bin", "sub/x", "extra"}
    assert "missing" in found["sub/x"] and "no such file" in found["extra"]
    (staged.folder / "model.bin").write_bytes(b"longer")
    assert "model.bin: 6 bytes, expected 5 bytes" in map(str, check_hashes(staged.folder))


def test_any_flipped_bit_is_found(staged, sources):
    write_manifest(staged.folder, manifest_of(staged, sources))
    for bit in range(8 * len(b"graph")):
        content = bytearray(b"graph")
        content[bit // 8] ^= 1 << bit % 8
        (staged.folder / "model.bin").write_bytes(content)
        assert [p.file for p in check_hashes(staged.folder)] == ["model.bin"]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "C:/x", "a\\b", "", "a//b", "./a", "a\0b"]
)
def test_a_manifest_that_leads_elsewhere_is_refused(tmp_path, name):
    write_manifest(tmp_path, {"format": 1, "outputs": {name: {"bytes": 1, "sha256": ""}}})
    with pytest.raises(SourceError, match="relative file name"):
        check_hashes(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no manifest.json"),
        ("{", "not JSON"),
        ("[]", "manifest format None"),
        ('{"format": 99}', "manifest format 99"),
    ],
)
def test_a_folder_that_is_no_artifact_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        check_hashes(tmp_path)


def test_a_manifest_reads_back_as_written(staged, sources):
    manifest = manifest_of(staged, sources)
    write_manifest(staged.folder, manifest)
    assert read_manifest(staged.folder).as_dict() == json.loads(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"outputs": {"a": 3}}, "relative file name"),
        ({"outputs": []}, "no outputs"),
    ],
)
def test_a_manifest_whose_fields_have_other_types_is_refused(staged, sources, changed, message):
    write_manifest(staged.folder, {**manifest_of(staged, sources), **changed})
    with pytest.raises(SourceError, match=message):
        check_hashes(staged.folder)


def test_an_edited_manifest_is_refused(staged, sources):
    write_manifest(staged.folder, manifest_of(staged, sources))
    path = staged.folder / "manifest.json"
    for edited in (path.read_text().replace('"proved"', '"unverified"'), path.read_text() + " "):
        path.write_text(edited)
        with pytest.raises(VerificationError, match="not what its checksum says"):
            read_manifest(staged.folder)
