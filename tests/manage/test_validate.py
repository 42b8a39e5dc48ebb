"""`validate`: each check with an adapter that passes it and one that does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrix_export.cli import main
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.adapters.targets import is_targeted, modules
from adaptrix_export.manage.findings import ERROR, OK, WARNING, Finding
from adaptrix_export.manage.validate import CHECKS, validate
from adaptrix_export.merge.norms import delta_norm, tensor_norm
from tests.tiny import save_adapter, save_base

Q = "base_model.model.model.layers.1.self_attn.q_proj"
HOSTILE = "(([a-z_.0-9]|[a-z_.0-9])+)+[^a-z_.0-9]"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = save_base("llama", folder / "base", num_hidden_layers=2)
    return base, save_adapter(base, folder / "lora", target_modules=["q_proj", "up_proj"])


@pytest.fixture
def adapter(tmp_path: Path, models: tuple[Path, Path]) -> Path:
    return Path(shutil.copytree(models[1], tmp_path / "lora"))


def edit_config(folder: Path, **changed: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def edit_tensors(folder: Path, edit: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edited = edit(tensors) or tensors
    save_file({k: v.clone().contiguous() for k, v in edited.items()}, path, {"format": "pt"})


def found(base: Path, *adapters: Path) -> list[Finding]:
    return [finding for _, finding in validate(str(base), [str(a) for a in adapters]).findings]


def wrong(base: Path, adapter: Path) -> list[tuple[str, str, str, str]]:
    rows = found(base, adapter)
    return [(f.severity, f.check, f.place, f.found) for f in rows if f.severity != OK]


def test_a_good_adapter_has_one_row_a_check(models: tuple[Path, Path]) -> None:
    rows = found(*models)
    assert [f.check for f in rows] == [check.name for check in CHECKS]
    assert {f.severity for f in rows} == {OK}
    assert "4 sites, |delta| / |weight| 0." in next(f.found for f in rows if f.check == "size")
    result = validate(str(models[0]), [str(models[1])])
    assert (result.exit_code(), result.exit_code(strict=True)) == (0, 0)


def test_every_misfit_is_listed(models: tuple[Path, Path], adapter: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.lora_A.weight"] = torch.ones(4, 32)
        tensors[f"{Q}.lora_B.weight"] = torch.ones(63, 4)
        for x in "AB":
            old = f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight"
            tensors[old.replace("up_proj", "over_proj")] = tensors.pop(old)

    edit_tensors(adapter, edit)
    errors = [row for row in wrong(models[0], adapter) if row[1] == "fit"]
    assert [row[3] for row in errors] == [
        "no weight in the base",
        "lora_A with 32 columns",
        "lora_B with 63 rows",
    ]
    assert all(row[0] == ERROR for row in errors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values(models: tuple[Path, Path], adapter: Path, value: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.lora_B.weight"].view(-1)[:2] = value

    edit_tensors(adapter, poison)
    rows = [row for row in wrong(models[0], adapter) if row[1] == "values"]
    assert len(rows) == 1
    severity, _, place, text = rows[0]
    assert severity == ERROR and place.endswith("layers.1.self_attn.q_proj")
    assert text.startswith("2 NaN" if np.isnan(value) else "0 NaN and 2 infinite")


def test_an_adapter_that_does_nothing(models: tuple[Path, Path], adapter: Path) -> None:
    edit_tensors(adapter, lambda t: {k: v * (f"{Q}.lora_B" not in k) for k, v in t.items()})
    rows = wrong(models[0], adapter)  # one site of four: small, but the adapter does something
    assert [(row[0], row[1]) for row in rows] == [(WARNING, "size")]
    edit_tensors(adapter, lambda t: {k: v * ("lora_B" not in k) for k, v in t.items()})
    rows = wrong(models[0], adapter)
    assert [(row[0], row[1]) for row in rows] == [(WARNING, "zeros")]


@pytest.mark.parametrize(("factor", "many"), [(1e6, "drowns"), (1e-6, "lost")])
def test_unusual_sizes(models: tuple[Path, Path], adapter: Path, factor: float, many: str) -> None:
    edit_tensors(adapter, lambda t: {k: v * (factor if Q in k else 1) for k, v in t.items()})
    rows = [f for f in found(models[0], adapter) if f.severity != OK]
    assert [(f.severity, f.check, f.place) for f in rows] == [
        (WARNING, "size", "model.layers.1.self_attn.q_proj")
    ]
    assert many in rows[0].remedy


def test_norms_are_those_of_the_dense_matrices(models: tuple[Path, Path]) -> None:
    base = open_base(str(models[0]))
    for delta in open_adapter(str(models[1]), base).deltas:
        (term,) = delta.terms
        dense = np.linalg.norm(term.scale * term.b.read().astype(float) @ term.a.read())
        assert delta_norm(delta) == pytest.approx(dense, rel=1e-6)
        weight = base.tensors[delta.name]
        assert tensor_norm(weight) == pytest.approx(np.linalg.norm(weight.read()), rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"target_modules": ["q_proj", "up_proj", "gate_proj"]}, "names gate_proj"),
        ({"target_modules": r".*\.(q_proj|up_proj|v_proj)"}, "no tensors, like 1 more"),
    ],
)
def test_targets_without_tensors(
    models: tuple[Path, Path], adapter: Path, changed: dict[str, Any], expected: str
) -> None:
    edit_config(adapter, **changed)
    rows = wrong(models[0], adapter)
    assert len(rows) == 1
    assert rows[0][:2] == (WARNING, "targets") and expected in rows[0][3]


def test_a_layer_that_was_cut_from_the_file(models: tuple[Path, Path], adapter: Path) -> None:
    edit_tensors(adapter, lambda t: {k: v for k, v in t.items() if Q not in k})
    rows = wrong(models[0], adapter)
    assert [row[:3] for row in rows] == [(WARNING, "targets", "model.layers.1.self_attn.q_proj")]
    edit_config(adapter, target_modules=["q_proj"], layers_to_transform=[0])
    rows = wrong(models[0], adapter)  # now up_proj is in the file, and not targeted
    assert [(row[0], row[1]) for row in rows] == [(ERROR, "targets")] * 2
    assert rows[0][2] == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_hostile_pattern_ends_in_time(
    models: tuple[Path, Path], adapter: Path, field: str
) -> None:
    edit_config(adapter, **{field: HOSTILE}, layers_to_transform=[0, 1])
    rows = [row for row in wrong(models[0], adapter) if row[1] == "targets"]
    assert rows[0][0] == ERROR and "pattern" in rows[0][3]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": r".*\.layers\.1\..*_proj", "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    ],
)
def test_targeting_is_that_of_peft(
    tmp_path: Path, models: tuple[Path, Path], options: dict[str, Any]
) -> None:
    saved = save_adapter(models[0], tmp_path / "a", **options)
    config = json.loads((saved / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(models[0])
    peft = PeftModel.from_pretrained(model, saved)
    live = {
        name.removeprefix("base_model.model.")
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {p for p in modules(open_base(str(models[0]))) if is_targeted(config, p)} == live
    assert [row for row in wrong(models[0], saved) if row[1] == "targets"] == []


def test_dtypes(models: tuple[Path, Path], adapter: Path) -> None:
    edit_tensors(adapter, lambda t: {k: v.to(torch.bfloat16) for k, v in t.items()})
    assert wrong(models[0], adapter) == []
    edit_tensors(adapter, lambda t: {k: v.double() if "lora_A" in k else v for k, v in t.items()})
    rows = wrong(models[0], adapter)
    assert [row[:2] for row in rows] == [(WARNING, "dtypes")] * 2
    assert rows[0][3] == "tensors in 4 BF16, 4 F64"
    edit_tensors(adapter, lambda t: {k: v.to(torch.int8) for k, v in t.items()})
    assert (ERROR, "fit") in [row[:2] for row in wrong(models[0], adapter)]


@pytest.mark.parametrize(
    ("name", "same"),
    [("base", True), ("org/BASE", True), ("C:\\models\\base", True), ("org/other", False)],
)
def test_the_base_that_it_was_trained_on(
    models: tuple[Path, Path], adapter: Path, name: str, same: bool
) -> None:
    edit_config(adapter, base_model_name_or_path=name)
    rows = [row[:2] for row in wrong(models[0], adapter)]
    assert rows == ([] if same else [(WARNING, "origin")])


def test_the_revision_that_it_was_trained_on(
    tmp_path: Path, models: tuple[Path, Path], adapter: Path
) -> None:
    """As the hub's cache lays it out: models--org--name/snapshots/commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = tmp_path / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(models[0], base)
    edit_config(adapter, base_model_name_or_path="org/tiny", revision=commit)
    assert wrong(base, adapter) == []
    edit_config(adapter, revision="f" * 40)
    assert [row[:2] for row in wrong(base, adapter)] == [(WARNING, "origin")]


def test_all_fields_that_are_not_understood(models: tuple[Path, Path], adapter: Path) -> None:
    edit_config(adapter, next_year=1, init_lora_weights="pissa")
    rows = wrong(models[0], adapter)
    assert [row[:2] for row in rows] == [(ERROR, "format")] * 2
    assert "next_year" in rows[1][3]


def test_a_module_that_stands_twice(models: tuple[Path, Path], adapter: Path) -> None:
    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.lora_magnitude_vector"] = torch.ones(64)
        tensors[f"{Q}.lora_magnitude_vector.weight"] = torch.ones(64)

    edit_tensors(adapter, twice)
    rows = wrong(models[0], adapter)
    assert [row[:2] for row in rows] == [(ERROR, "format")]
    assert rows[0][3].endswith("q_proj.lora_magnitude_vector")


def test_adjustments_are_shown(models: tuple[Path, Path], adapter: Path) -> None:
    edit_tensors(adapter, lambda t: {k: v.T for k, v in t.items()})
    rows = [f for f in found(models[0], adapter) if "transposed" in f.found]
    assert len(rows) == 4 and {f.severity for f in rows} == {OK}
    assert validate(str(models[0]), [str(adapter)]).exit_code(strict=True) == 0


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


def test_exit_codes_and_output(models: tuple[Path, Path], adapter: Path) -> None:
    base, good = models
    assert invoke(base, good).exit_code == 0
    edit_config(adapter, base_model_name_or_path="org/other")
    assert invoke(base, adapter).exit_code == 0
    assert invoke(base, adapter, "--strict").exit_code == 2
    edit_config(adapter, next_year=1)
    done = invoke(base, good, adapter)  # one good, one bad: both are looked at
    assert done.exit_code == 2
    assert done.stdout.endswith("1 errors, 0 warnings\n")
    assert "next_year" in done.stdout and "Traceback" not in done.output
    document = json.loads(invoke(base, good, adapter, "--json").stdout)
    assert (document["errors"], document["warnings"]) == (1, 0)
    assert document["findings"][0].keys() == {
        "adapter", "severity", "check", "place", "found", "expected", "remedy",
    }  # fmt: skip
    assert [f["severity"] for f in document["findings"]] == [OK] * len(CHECKS) + [ERROR]


def test_a_base_that_is_not_there_is_one_error(models: tuple[Path, Path]) -> None:
    done = invoke("nowhere", models[1])
    assert done.exit_code == 2
    assert done.stderr == (
        "error: nowhere: nothing there, expected a folder, a .gguf file, "
        "hf:org/name@revision or package:NAME/FILE; check the spelling\n"
    )
    assert invoke(models[0]).exit_code == 2  # no adapter: usage


def test_names_from_files_are_shown_not_obeyed(models: tuple[Path, Path], adapter: Path) -> None:
    edit_config(adapter, **{"[red]a\x1b[2J": 1})
    done = invoke(models[0], adapter)
    assert done.exit_code == 2 and "\x1b" not in done.stdout and "[red]a" in done.stdout
