"""A right artifact passes, and every wrong one that was thought of fails."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adaptrix_export.errors import CheckerError, ParityError
from adaptrix_export.package.documents import ReportDocument
from adaptrix_export.progress import Silent
from adaptrix_export.prove.child import run
from adaptrix_export.prove.parity import prove
from adaptrix_export.prove.report import summary
from tests.prove.bench import ALPHA, RANK, Bench, merged
from tests.tiny import save_adapter

NATIVE_PADDING = {"left-padded batch"}  # wrong in a bare native graph: field notes 5a
SITE = "model.layers.1.self_attn.v_proj.weight"


def failed(report: dict[str, Any]) -> set[str]:
    names = {case["name"] for case in report["cases"] if not case["passed"]}
    return names if report["replay"]["passed"] else names | {"replay"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_native_graph_is_right_except_on_left_padding(
    bench: Callable[[str], Bench], kind: str
) -> None:
    report = run(bench(kind).job(), Silent())
    assert failed(report) == NATIVE_PADDING
    padded = next(c for c in report["cases"] if c["name"] == "left-padded batch")
    assert padded["max_abs"] > 0.1
    assert not report["passed"]
    assert [c["name"] for c in report["cases"]] == [
        "prefill",
        "chunked prefill",
        "greedy decode",
        "left-padded batch",
        "right-padded batch",
    ]
    assert report["replay"]["changed"] > 0
    assert report["replay"]["worst"]["ulps"] <= 0.5
    assert report["tokens"] == "seeded token ids"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_checkpoint_passes(bench: Callable[[str], Bench], kind: str) -> None:
    report = run(bench(kind).job("safetensors"), Silent())
    assert report["passed"], summary(ReportDocument.of(report))
    assert [c["name"] for c in report["cases"]] == ["prefill", "greedy decode"]


def test_a_fast_run_is_three_checks(bench: Callable[[str], Bench]) -> None:
    report = run(bench("llama").job(level="fast"), Silent())
    assert report["passed"], summary(ReportDocument.of(report))
    assert {c["name"]: c["positions"] for c in report["cases"]} == {
        "prefill": 128,
        "greedy decode": 8,
    }


def test_two_adapters_add_up(
    bench: Callable[[str], Bench], base: Callable[[str], Path], tmp_path: Path
) -> None:
    both = bench("llama")
    first = both.adapters[0][1]
    second = save_adapter(base("llama"), tmp_path / "second", seed=2)
    weights = merged(base("llama"), first, second)
    # a name with a dot, and one that is part of PEFT's own keys, must not matter
    both = replace(both, adapters=(("v1.0", first), ("lora", second)), weights=weights)
    assert run(both.job("safetensors", level="fast"), Silent())["passed"]
    one = replace(both, weights=merged(base("llama"), first))
    assert "replay" in failed(run(one.job("safetensors", level="fast"), Silent()))


def test_a_module_saved_whole_is_read_from_the_live_copy(
    bench: Callable[[str], Bench], base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = save_adapter(
        base("qwen3"), tmp_path / "head", modules_to_save=["lm_head"], target_modules=["q_proj"]
    )
    shipped = load_file(folder / "adapter_model.safetensors")
    weights = merged(base("qwen3"), folder)
    untouched = replace(bench("qwen3"), adapters=(("head", folder),), weights=weights)
    whole = untouched.changed("lm_head.weight", shipped["base_model.model.lm_head.weight"])
    assert run(whole.job("safetensors", level="fast"), Silent())["passed"]
    report = run(untouched.job("safetensors", level="fast"), Silent())
    assert [f["tensor"] for f in report["replay"]["failures"]] == ["lm_head.weight"]


def scaled_site(bench: Bench, base: Path) -> Bench:
    original = load_file(base / "model.safetensors")[SITE].astype(np.float64)
    wrong = original + 1.01 * (bench.weights[SITE] - original)
    return bench.changed(SITE, wrong.astype(np.float32))


def dropped_site(bench: Bench, base: Path) -> Bench:
    return bench.changed(SITE, load_file(base / "model.safetensors")[SITE])


def rslora_scale(bench: Bench, base: Path) -> Bench:
    folder = bench.adapters[0][1]
    return replace(bench, weights=merged(base, folder, scale=ALPHA / math.sqrt(RANK)))


def two_ulps(bench: Bench, base: Path) -> Bench:
    values = bench.weights[SITE].copy()
    values[3, 5] += 2 * np.spacing(values[3, 5])
    return bench.changed(SITE, values)


def untouched_bit(bench: Bench, base: Path) -> Bench:
    values = bench.weights["model.norm.weight"].copy()
    values[7] = np.nextafter(values[7], np.float32(9))
    return bench.changed("model.norm.weight", values)


def not_a_number(bench: Bench, base: Path) -> Bench:
    values = bench.weights[SITE].copy()
    values[0, 0] = np.nan
    return bench.changed(SITE, values)


@pytest.mark.parametrize("target", ["onnx", "safetensors"])
@pytest.mark.parametrize(
    "corrupt", [scaled_site, dropped_site, rslora_scale, two_ulps, untouched_bit, not_a_number]
)
def test_negative_controls(
    bench: Callable[[str], Bench],
    base: Callable[[str], Path],
    corrupt: Callable[[Bench, Path], Bench],
    target: str,
) -> None:
    report = run(corrupt(bench("llama"), base("llama")).job(target, level="fast"), Silent())
    assert not report["passed"]
    assert "replay" in failed(report)
    if corrupt is not rslora_scale:
        place = "model.norm" if corrupt is untouched_bit else SITE.removesuffix(".weight")
        assert [f["sites"] for f in report["replay"]["failures"]] == [[place]]
    if corrupt in (dropped_site, rslora_scale, not_a_number):
        assert failed(report) == {"prefill", "greedy decode", "replay"}
    json.dumps(report, allow_nan=False)


def test_pefts_own_merge_is_further_off_than_one_rounding(
    bench: Callable[[str], Bench], base: Callable[[str], Path]
) -> None:
    import peft
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(base("llama"))
    live = peft.PeftModel.from_pretrained(plain, str(bench("llama").adapters[0][1]))
    state = live.merge_and_unload().state_dict()
    weights = {n: v.numpy() for n, v in state.items() if n != "lm_head.weight"}
    report = run(replace(bench("llama"), weights=weights).job("safetensors"), Silent())
    assert failed(report) == {"replay"}  # its fp32 sums are fine for logits


def relabel(folder: Path, out: Path, rename: Callable[[str], str]) -> Path:
    """A copy of an adapter folder with its keys renamed."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({rename(k): v for k, v in tensors.items()}, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize(
    ("old", "new"),
    [("base_model.model.", ""), ("layers.0.mlp", "layers.9.mlp"), ("lora_A.", "lora_A.other.")],
)
def test_a_key_that_peft_ignores_is_an_error(
    bench: Callable[[str], Bench], tmp_path: Path, old: str, new: str
) -> None:
    whole = bench("llama")
    folder = relabel(whole.adapters[0][1], tmp_path / "odd", lambda key: key.replace(old, new))
    odd = replace(whole, adapters=(("odd", folder),))
    with pytest.raises(ParityError, match="did not load tensor"):
        run(odd.job("safetensors", level="fast"), Silent())


def test_values_that_peft_invents_are_an_error(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    whole = bench("llama")
    folder = tmp_path / "partial"
    shutil.copytree(whole.adapters[0][1], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(kept, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["init_lora_weights"] = False
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    partial = replace(whole, adapters=(("partial", folder),))
    with pytest.raises(ParityError, match=r"invented values for .*layers\.1\.mlp\.up_proj"):
        run(partial.job("safetensors", level="fast"), Silent())


def test_a_base_that_lacks_a_tensor_is_an_error(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    whole = bench("llama")
    lacking = tmp_path / "lacking"
    shutil.copytree(whole.base, lacking)
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    job = replace(whole.job("safetensors"), base_folder=lacking)
    with pytest.raises(ParityError, match=r"missing_keys: model\.norm\.weight"):
        run(job, Silent())


class Heard(Silent):
    """Remembers the stages that it was told of."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps = 0

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Any:
        self.stages.append(name)

        def advance(amount: int) -> None:
            self.steps += amount

        yield advance


def test_the_child_reports_what_a_run_in_this_process_does(
    bench: Callable[[str], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    job = bench("llama").job(level="fast")
    heard = Heard()
    report = prove(job, heard)
    assert report == run(job, Silent())
    assert report["passed"]
    assert heard.stages[0].startswith("reference") and heard.stages[-1] == "comparing logits"
    assert heard.steps == len(job.weights) + 2
    assert str(job.artifact) not in json.dumps(report)


def test_an_error_of_the_child_is_raised_here(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    whole = bench("llama")
    folder = relabel(whole.adapters[0][1], tmp_path / "odd", lambda key: f"x.{key}")
    job = replace(whole, adapters=(("odd", folder),)).job("safetensors", level="fast")
    with pytest.raises(
        ParityError, match="adapter odd: the reference did not load tensor"
    ) as caught:
        prove(job, Silent())
    assert "PEFT to use every tensor" in caught.value.expected


CRASHES = {
    "was killed by SIGSEGV": "os.kill(os.getpid(), signal.SIGSEGV)",
    "was killed by SIGKILL.*out of memory": "os.kill(os.getpid(), signal.SIGKILL)",
    "exit code 3 and no report: .*last words": "os._exit(3)",
    "ran past 2 s": "time.sleep(60)",
}


@pytest.mark.parametrize("said", sorted(CRASHES))
def test_a_crashed_child_is_an_error_that_names_the_signal(
    bench: Callable[[str], Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str
) -> None:
    lines = "import os, signal, sys, time\nprint('last words', file=sys.stderr, flush=True)\n"
    (tmp_path / "dying_child.py").write_text(lines + CRASHES[said] + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("adaptrix_export.prove.checker.MODULE", "dying_child")
    with pytest.raises(CheckerError, match=said) as caught:
        prove(bench("llama").job("safetensors"), Silent(), timeout_s=2.0)
    assert caught.value.exit_code == 3
    assert caught.value.crashed == ("SIGSEGV" in said)
