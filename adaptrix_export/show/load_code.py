"""How each client loads an artifact, as code to copy: a row for each client.

The same rows go into the page, the model card and the docs. Layout `flat` keeps `model.onnx` in the
folder itself, `hub` in `onnx/`; what a client needs told for either stands in its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adaptrix_export.show.facts import Facts

TEXT, FEATURES, SEQ2SEQ = "text-generation", "feature-extraction", "text2text-generation"
_OPTIMUM_CLASS = {
    TEXT: "ORTModelForCausalLM",
    FEATURES: "ORTModelForFeatureExtraction",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    SEQ2SEQ: "ORTModelForSeq2SeqLM",
}
_AUTO_CLASS = {
    TEXT: "AutoModelForCausalLM",
    FEATURES: "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Snippet:
    client: str
    language: str
    code: str


@dataclass(frozen=True)
class Client:
    """`takes` says whether this client opens such an artifact; `code` is how."""

    name: str
    language: str
    takes: Callable[[Facts], bool]
    code: Callable[[Facts, str], str]


def snippets(facts: Facts, place: str) -> list[Snippet]:
    """The code of every client that takes the artifact; `place` is its folder or hub name."""
    return [
        Snippet(client.name, client.language, client.code(facts, place).rstrip("\n"))
        for client in CLIENTS
        if client.takes(facts)
    ]


def _is_graph(facts: Facts) -> bool:
    return facts.graph is not None


def _generates(facts: Facts) -> bool:
    return _is_graph(facts) and facts.task == TEXT


def _in_hub_layout(facts: Facts) -> bool:
    return _is_graph(facts) and str(facts.graph).startswith("onnx/")


def _command(facts: Facts, place: str) -> str:
    chosen = f" --adapter {facts.adapters[0]}" if facts.switchable else ""
    return f'adaptrix-export run {place}{chosen} --prompt "Hello"\n'


def _runtime(facts: Facts, place: str) -> str:
    lines = ["from adaptrix_export.runtime import Session", "", f'session = Session("{place}")']
    if facts.switchable:
        names = facts.adapters
        lines.append(f'session.use("{names[0]}")')
        if len(names) > 1:
            lines.append(f'session.use({{"{names[0]}": 0.7, "{names[1]}": 0.3}})  # a mix')
    return "\n".join([*lines, 'print(session.generate("Hello", max_new_tokens=32))'])


def _onnxruntime(facts: Facts, place: str) -> str:
    code = (
        "import onnxruntime as ort\n\n"
        f'session = ort.InferenceSession("{place}/{facts.graph}")\n'
        "print([(i.name, i.shape) for i in session.get_inputs()])\n"
    )
    if facts.switchable and not facts.manifest.recipe.get("rows"):
        code += (
            "\nadapter = ort.LoraAdapter()\n"
            f'adapter.Load("{place}/adapters/{facts.adapters[0]}.onnx_adapter")\n'
            "options = ort.RunOptions()\n"
            "options.add_active_adapter(adapter)  # session.run(None, feed, options)\n"
        )
    return code


def _genai(facts: Facts, place: str) -> str:
    lines = ["import onnxruntime_genai as og", "", f'model = og.Model("{place}")']
    lines += ["tokenizer = og.Tokenizer(model)", "params = og.GeneratorParams(model)"]
    lines += ["params.set_search_options(max_length=64, do_sample=False)"]
    lines += ["generator = og.Generator(model, params)"]
    if facts.switchable:
        name = facts.adapters[0]
        lines += ["adapters = og.Adapters(model)"]
        lines += [f'adapters.load("{place}/adapters/{name}.onnx_adapter", "{name}")']
        lines += [f'generator.set_active_adapter(adapters, "{name}")']
    lines += ['generator.append_tokens(tokenizer.encode("Hello"))']
    lines += ["while not generator.is_done():", "    generator.generate_next_token()"]
    return "\n".join([*lines, "print(tokenizer.decode(generator.get_sequence(0)))"])


def _transformers_js(facts: Facts, place: str) -> str:
    head = 'import { pipeline } from "@huggingface/transformers";\n\n'
    if facts.task == TEXT:
        return (
            f'{head}const generate = await pipeline("text-generation", "{place}");\n'
            'console.log(await generate("Hello", { max_new_tokens: 32 }));\n'
        )
    call = f'const run = await pipeline("{facts.task}", "{place}");'
    return f'{head}{call}\nconsole.log(await run("Hello"));\n'


def _optimum(facts: Facts, place: str) -> str:
    name = _OPTIMUM_CLASS[facts.task]
    code = (
        f"from optimum.onnxruntime import {name}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {name}.from_pretrained("{place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        'inputs = tokenizer("Hello", return_tensors="pt")\n'
    )
    if facts.task in (TEXT, SEQ2SEQ):
        return code + "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))\n"
    return code + "print(model(**inputs))\n"


def _transformers(facts: Facts, place: str) -> str:
    name = _AUTO_CLASS[facts.task]
    return (
        f"from transformers import {name}, AutoTokenizer\n\n"
        f'model = {name}.from_pretrained("{place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
    )


def _peft(facts: Facts, place: str) -> str:
    name = _AUTO_CLASS.get(facts.task, "AutoModel")
    return (
        f"from peft import PeftModel\nfrom transformers import {name}\n\n"
        f'base = {name}.from_pretrained("BASE")\n'
        f'model = PeftModel.from_pretrained(base, "{place}")\n'
    )


def _sentence(facts: Facts, place: str) -> str:
    backend = ', backend="onnx"' if _is_graph(facts) else ""
    return (
        "from sentence_transformers import SentenceTransformer\n\n"
        f'model = SentenceTransformer("{place}"{backend})\n'
        'print(model.encode(["Hello"]).shape)\n'
    )


CLIENTS = (
    Client("adaptrix-export", "sh", _generates, _command),
    Client("adaptrix_export.runtime", "python", _generates, _runtime),
    Client("ONNX Runtime", "python", _is_graph, _onnxruntime),
    Client(
        "ONNX Runtime GenAI", "python",
        lambda f: _generates(f) and "genai_config.json" in f.outputs, _genai,
    ),
    Client(
        "transformers.js", "js",
        lambda f: _in_hub_layout(f) and not f.manifest.recipe.get("rows"), _transformers_js,
    ),
    Client(
        "Optimum", "python",
        lambda f: _is_graph(f) and f.task in _OPTIMUM_CLASS
        and not f.manifest.recipe.get("rows"), _optimum,
    ),
    Client(
        "Sentence Transformers", "python", lambda f: "modules.json" in f.outputs, _sentence,
    ),
    Client(
        "Transformers", "python",
        lambda f: f.target == "safetensors" and f.task in _AUTO_CLASS, _transformers,
    ),
    Client("PEFT", "python", lambda f: f.target == "peft", _peft),
)  # fmt: skip
