"""The command line: what it says, what it exits with, and what it must not import."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import adaptrix_export
from adaptrix_export.cli import main
from adaptrix_export.commands.build import build as build_command
from adaptrix_export.errors import AdapterError, ParityError, VerificationError
from adaptrix_export.pipeline import Outcome
from adaptrix_export.recipe import recipe
from adaptrix_export.recipe import words as recipe_words
from adaptrix_export.recipe.targets import TARGET_FACTS, Target
from adaptrix_export.show import terminal
from tests.tiny import save_adapter, save_base

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(main.commands)
FLAGS = ["--base", "b", "--adapter", "a", "--target", "onnx", "--out", "o"]
TOLERANCE = {"max_abs": 1e-3, "mean_kl": 1e-4, "top1": 0.99}
REPORT: dict[str, Any] = {
    "oracle": "PyTorch + PEFT on the original files",
    "target": "onnx",
    "task": "text-generation",
    "tolerance": "fp32",
    "tokens": "a prompt",
    "versions": {},
    "level": "full",
    "precision": "fp32",
    "passed": True,
    "cases": [
        {"name": "prefill", "positions": 128, "max_abs": 1e-6, "mean_kl": 1e-9, "top1": 1.0}
        | {"passed": True, "tolerance": TOLERANCE, "note": "", "finite": True}
    ],
    "replay": {"tensors": 9, "elements": 90, "changed": 4, "failed": 0, "failures": []}
    | {"worst": {"ulps": 0.5, "tensor": "x"}, "unmapped": [], "passed": True},
}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def build_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def build(wanted: object, telling: object) -> None:
        raise error

    monkeypatch.setattr("adaptrix_export.pipeline.build", build)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    loaded = python(
        "import sys, adaptrix_export\n"
        "from adaptrix_export.cli import main\n"
        f"main({[*command, '--help']!r}, standalone_mode=False)\n"
        "heavy = 'torch transformers peft numpy onnx onnxruntime onnx_ir pydantic rich'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert loaded.splitlines()[-1] == "[]"


def test_the_package_offers_its_two_names() -> None:
    assert adaptrix_export.Recipe is recipe.Recipe
    assert callable(adaptrix_export.build)
    with pytest.raises(AttributeError, match="no attribute 'bild'"):
        _ = adaptrix_export.bild


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "adaptrix_export", "--version"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.strip() == f"adaptrix-export, version {adaptrix_export.__version__}"


def test_the_commands_are_these() -> None:
    assert COMMANDS == [
        "add-adapter",
        "batch",
        "build",
        "compare",
        "completion",
        "conflicts",
        "convert",
        "drift",
        "inspect",
        "pull",
        "push",
        "redistribute",
        "report",
        "run",
        "schema",
        "sign",
        "validate",
        "verify",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_documented(name: str) -> None:
    shown = invoke(name, "--help").output
    assert "Examples:" in shown
    assert f"adaptrix-export {name}" in shown
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert any(f"adaptrix-export {name}" in page.read_text(encoding="utf-8") for page in pages)


def test_each_flag_of_build_tells_the_words_it_takes() -> None:
    shown = {param.name: param.metavar or "" for param in build_command.params}
    kinds = (
        ("target", Target),
        ("frontend", recipe_words.Frontend),
        ("task", recipe_words.Task),
        ("layout", recipe_words.Layout),
        ("provider", recipe_words.Provider),
        ("parity", recipe_words.ParityLevel),
        ("adaptrix_scaling", recipe_words.AdaptrixScaling),
        ("on_mismatch", recipe_words.OnMismatch),
    )
    for name, words in kinds:
        assert shown[name] == "|".join(words), name
    possible = dict.fromkeys(p for facts in TARGET_FACTS.values() for p in facts.precisions)
    assert shown["precision"] == "|".join(possible)
    sections = {"context", "quantize", "redistribute", "tokenizer"}
    assert set(recipe.Recipe.model_fields) - sections | {"tau", "layers"} <= set(shown)


def test_flags_and_settings_reach_the_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[recipe.Recipe] = []

    def build(wanted: recipe.Recipe, telling: object) -> Outcome:
        asked.append(wanted)
        return Outcome(wanted.out, REPORT, {"format": 1}, ("head untied",))

    monkeypatch.setattr("adaptrix_export.pipeline.build", build)
    path = tmp_path / "recipe.yaml"
    path.write_text("base: x\nadapter: y\ntarget: safetensors\nout: z\n", encoding="utf-8")
    done = invoke(
        "build", str(path), *FLAGS, "--adapter", "c", "--frontend", "native", "--task",
        "text-generation", "--provider", "cpu", "--precision", "fp32", "--parity", "fast",
        "--set", "parity.decode_steps=7", "--allow-pickle", "--adaptrix-scaling", "stored",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert asked == [
        recipe.Recipe(
            base="b",
            allow_pickle=True,
            adaptrix_scaling=recipe.AdaptrixScaling.STORED,
            adapters=(recipe.AdapterSpec(source="a"), recipe.AdapterSpec(source="c")),
            target=recipe.Target.ONNX,
            out=Path("o"),
            frontend=recipe.Frontend.NATIVE,
            task=recipe.Task.TEXT_GENERATION,
            precision=recipe.Precision.FP32,
            parity=recipe.Parity(level=recipe_words.ParityLevel.FAST, decode_steps=7),
        )
    ]
    assert "prefill" in done.stdout
    assert done.stdout.endswith("note: head untied\npublished o\n")


def test_build_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Outcome(Path("o"), REPORT, {"format": 1}, ())
    monkeypatch.setattr("adaptrix_export.pipeline.build", lambda wanted, telling: made)
    done = invoke("build", *FLAGS, "--json")
    told = json.loads(done.stdout)
    assert set(told.pop("timings")) == {"seconds", "stages"}
    assert told == {
        "out": "o",
        "report": REPORT,
        "manifest": {"format": 1},
        "notes": [],
    }


def test_a_build_without_proof_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Outcome(Path("o"), None, {}, ())
    monkeypatch.setattr("adaptrix_export.pipeline.build", lambda wanted, telling: made)
    assert "UNVERIFIED" in invoke("build", *FLAGS, "--parity", "off").stdout


def test_a_recipe_typo_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("parity: {levle: fast}\n", encoding="utf-8")
    done = invoke("build", str(path))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {path}: parity.levle: unknown key, expected one of level, long, text, "
        "decode_steps; did you mean 'level'?\n"
    )


def test_an_error_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    build_raises(monkeypatch, AdapterError("q_proj", "8 columns", "4", "another model?"))
    done = invoke("build", *FLAGS, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout) == {
        "error": "AdapterError",
        "place": "q_proj",
        "found": "8 columns",
        "expected": "4",
        "remedy": "another model?",
        "message": "q_proj: 8 columns, expected 4; another model?",
        "exit_code": 2,
    }


def test_control_characters_of_strangers_are_shown_not_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_raises(monkeypatch, AdapterError("a\x1b[2Jb", "bad"))
    assert invoke("build", *FLAGS).stderr.endswith("error: a\\x1b[2Jb: bad\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_failed_proof_shows_its_report(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    error = ParityError("o", "prefill", "parity")
    case = {**REPORT["cases"][0], "passed": False, "max_abs": float("nan")}
    error.report = {**REPORT, "passed": False, "cases": [case]}
    build_raises(monkeypatch, error)
    done = invoke("build", *FLAGS, *(["--json"] if as_json else []))
    assert done.exit_code == 1
    if as_json:
        assert json.loads(done.stdout)["report"]["cases"][0]["max_abs"] == "nan"
    else:
        assert "failed" in done.stdout
        assert done.stderr.endswith("error: o: prefill, expected parity\n")


def test_a_report_that_has_no_table_hides_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ParityError("o", "prefill", "parity")
    error.report = {"cases": [{"name": "prefill"}]}
    build_raises(monkeypatch, error)
    done = invoke("build", *FLAGS)
    assert done.exit_code == 1
    assert "note: no table of what was measured" in done.stderr
    assert done.stderr.endswith("error: o: prefill, expected parity\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 3, "this machine: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "out of memory"),
        (OSError(errno.ENOSPC, "full", "o.staging"), 3, "o.staging: the disk is full"),
        (KeyError("x"), 3, "internal error: KeyError: 'x'; run again with -v"),
        (PermissionError(errno.EACCES, "no", "o"), 2, "o: permission denied"),
        (ZeroDivisionError("x"), 3, "internal error: ZeroDivisionError"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was published"),
    ],
)
def test_other_failures(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    build_raises(monkeypatch, error)
    done = invoke("build", *FLAGS)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_verbose_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    build_raises(monkeypatch, KeyError("x"))
    assert "Traceback" in invoke("build", *FLAGS, "-v").stderr
    build_raises(monkeypatch, AdapterError("a", "b"))
    assert "Traceback" not in invoke("build", *FLAGS, "-v").stderr


@pytest.mark.parametrize("arguments", [["bild"], ["build", "--bse", "x"], ["run"]])
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("Usage:")


def test_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    found: dict[str, Any] = {"files": 9, "proof": "re-proved", "parity": REPORT, "note": None}

    def verify_artifact(path: Path, telling: object, base: object, adapters: object) -> Any:
        asked.append((path, base, adapters))
        return found

    monkeypatch.setattr("adaptrix_export.manage.verify_artifact.verify_artifact", verify_artifact)
    done = invoke("verify", "art", "--base", "b", "--adapter", "x", "--adapter", "y")
    assert "prefill" in done.stdout
    assert done.stdout.endswith("verified art, 9 files: hashes, and parity proved again\n")
    assert asked == [(Path("art"), "b", ("x", "y"))]
    assert json.loads(invoke("verify", "art", "--json").stdout) == {**found, "signature": None}
    found.update(parity=None, note="parity was not checked again", proof="hashes only")
    done = invoke("verify", "art")
    assert done.stdout.startswith("note: parity was not checked again\nunchanged art, 9 files")
    assert done.exit_code == 0
    assert invoke("verify", "art", "--require-parity").exit_code == 1
    found.update(proof="never proved")
    assert "UNVERIFIED art" in invoke("verify", "art").stdout
    assert json.loads(invoke("verify", "art", "--json").stdout)["proof"] == "never proved"


def test_verify_fails_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*anything: object) -> None:
        raise VerificationError("model.onnx", "another sha256", "that of the manifest")

    monkeypatch.setattr("adaptrix_export.manage.verify_artifact.verify_artifact", damaged)
    done = invoke("verify", "art")
    assert done.exit_code == 1
    assert "error: model.onnx: another sha256" in done.stderr


class FakeSession:
    """What `run` needs of a Session: a word is a token."""

    def __init__(self, folder: Path, provider: str, check: bool = True) -> None:
        self.tokenizer, self.used, self.provider = self, None, provider

    def use(self, adapter: dict[str, float]) -> None:
        self.used = adapter

    def stats(self) -> dict[str, Any]:
        return {"adapter": self.used, "provider": self.provider, "tokens": {}}

    def stream(self, asked: Any, *rest: Any, **how: Any) -> Any:
        if isinstance(asked, str):
            return iter(["a", " b"])
        return iter([f"<{token}>" for token in rest[0]])

    def encode(self, prompt: str) -> list[int]:
        return [len(prompt)]

    encode_chat = encode

    def generate_ids(self, ids: list[int], count: int, sampling: Any) -> list[int]:
        return ids * count + [sampling.seed] * bool(sampling.temperature)


def test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptrix_export.runtime.Session", FakeSession)
    assert invoke("run", "art", "--prompt", "hi").stdout == "a b\n"
    done = invoke("run", "art", "--prompt", "hi", "--max-new-tokens", "3", "--json")
    answer = {"prompt": "hi", "text": "<2><2><2>", "tokens": [2, 2, 2]}
    assert json.loads(done.stdout) == {
        **answer,
        "stats": {"adapter": {}, "provider": "auto", "tokens": {}},
    }
    mix = ("--adapter", "a=0.5", "--adapter", "b", "--provider", "cpu")
    drawn = invoke(
        "run", "art", "--prompt", "hi", "--max-new-tokens", "1", "--json", *mix,
        "--temperature", "0.7", "--seed", "9",
    )  # fmt: skip
    assert json.loads(drawn.stdout)["tokens"] == [2, 9]
    used = {"adapter": {"a": 0.5, "b": 1.0}, "provider": "cpu", "tokens": {}}
    assert json.loads(drawn.stdout)["stats"] == used
    assert invoke("run", "art", "--prompt", "hi", "--adapter", "a=x").exit_code == 2
    assert invoke("run", "art", "--prompt", "hi", "--max-new-tokens", "0").exit_code == 2


def test_the_schema_is_printed() -> None:
    assert json.loads(invoke("schema").stdout) == recipe.recipe_schema()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    base = save_base("gpt2", folder / "base")
    adapter = save_adapter(
        base,
        folder / "lora",
        target_modules=["c_attn", "c_fc"],
        rank_pattern={"c_fc": 2},
        use_rslora=True,
        layers_to_transform=[1, 2],
    )
    return str(base), str(adapter)


def test_inspect_tells_the_facts(models: tuple[str, str]) -> None:
    facts = json.loads(invoke("inspect", *models, "--json").stdout)
    base, adapter = facts["base"], facts["adapters"][0]
    assert (base["model_type"], base["layers"]) == ("gpt2", {"transformer.h": 4})
    assert (base["hidden_size"], base["attention_heads"], base["vocab_size"]) == (64, 4, 300)
    assert base["recommended_layers"] == [1, 2, 3]
    assert base["tied"] == {"lm_head.weight": "transformer.wte.weight"}
    assert base["megabytes"] == round(base["parameters"] * 4 / 1e6, 3)
    rows = {row["module"]: row for row in facts["modules"]}
    assert (rows["attn.c_attn"]["shape"], rows["attn.c_attn"]["count"]) == ([192, 64], 4)
    assert rows["transformer.wte"]["shape"] == [300, 64]
    assert (adapter["kind"], adapter["rslora"], adapter["alpha"]) == ("LORA", True, 7)
    assert adapter["ranks"] == [2, 4]
    assert adapter["scales"] == [3.5, round(7 / 2**0.5, 6)]
    assert adapter["layers"] == {"transformer.h": [1, 2]}
    assert adapter["sites"] == len(adapter["target_modules"]) * 2
    assert adapter["parameters"] * 4 / 1e6 == pytest.approx(adapter["megabytes"], abs=1e-3)


def test_inspect_shows_tables(models: tuple[str, str]) -> None:
    shown = invoke("inspect", *models).stdout
    assert "4 in transformer.h" in shown
    assert "transformer.h.*.attn.c_attn" in shown
    assert "LORA, rsLoRA" in shown
    assert "1-2 of transformer.h" in shown


def test_inspect_refuses_an_adapter_of_another_model(
    models: tuple[str, str], tmp_path: Path
) -> None:
    other = save_base("gpt2", tmp_path / "wide", n_embd=32)
    done = invoke("inspect", str(other), models[1])
    assert done.exit_code == 2
    assert "trained on another model" in done.stderr


def test_lines_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress() as telling:
        with telling.stage("merge", 2_000_000, "B") as advance:
            advance(2_000_000)
        telling.note("a note")
    shown = capsys.readouterr()
    assert shown.out == ""
    start, end, note = shown.err.splitlines()
    assert (start, note) == ("merge ...", "a note")
    assert end.startswith("merge: 2 MB, ")


@pytest.mark.parametrize(
    ("done", "total", "unit", "shown"),
    [
        (3, 30, "layers", "3/30 layers, "),
        (30, 30, "layers", "30 layers, "),
        (5e6, None, "B", "5 MB, "),
        (5e6, 1e7, "bytes", "5/10 MB, "),
        (2, None, "", "2, "),
        (0, 9, "layers", ""),
    ],
)
def test_amounts(done: float, total: float | None, unit: str, shown: str) -> None:
    assert terminal.amount_of(done, total, unit) == shown


def test_bars_on_a_terminal() -> None:
    with terminal._rich_bars() as bars:
        telling = terminal.Bars(bars)
        with telling.stage("count", 3, "things") as advance:
            advance(2)
        with telling.stage("wait"):
            telling.note("[not markup]")
    assert [(task.description, task.finished) for task in bars.tasks] == [
        ("count", True),
        ("wait", True),
    ]


class Talker:
    """A session that answers with the prompt, backwards."""

    def __init__(self, folder: object, provider: str = "auto", check: bool = True) -> None:
        self.made = 0

    def use(self, chosen: object) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return {"tokens": {"merged": self.made}}

    def stream(self, prompt: str, count: int, chat: bool, sampling: object) -> list[str]:
        self.made += len(prompt)
        return list(reversed(prompt))

    def generate(self, prompt: str, count: int, chat: bool, sampling: object) -> str:
        return "".join(self.stream(prompt, count, chat, sampling))


@pytest.fixture
def talker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptrix_export.runtime.Session", Talker)


@pytest.mark.usefixtures("talker")
def test_run_asks_until_an_empty_line() -> None:
    done = CliRunner().invoke(main, ["run", "x"], input="abc\nde\n\nnever\n")
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == ["cba", "ed"]
    assert CliRunner().invoke(main, ["run", "x"], input="abc\n").stdout.split() == ["cba"]


@pytest.mark.usefixtures("talker")
def test_run_takes_prompts_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("abc\n\nde\n", encoding="utf-8")
    done = invoke("run", "x", "--prompts", str(file))
    assert done.stdout.splitlines() == ["> abc", "cba", "> de", "ed"]
    told = json.loads(invoke("run", "x", "--prompts", str(file), "--json").stdout)
    assert [answer["text"] for answer in told["answers"]] == ["cba", "ed"]
    file.write_text("\n")
    assert invoke("run", "x", "--prompts", str(file)).exit_code == 2
    assert invoke("run", "x", "--prompts", str(file), "--prompt", "y").exit_code == 2
    assert invoke("run", "x", "--json").exit_code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_asks_this_program(shell):
    script = invoke("completion", shell).output
    assert f"_ADAPTRIX_EXPORT_COMPLETE={shell}_complete" in script
    assert "adaptrix-export" in script


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [("va", {"validate"}, "build"), ("build --target onnx", {"onnx", "onnx-switchable"}, "peft")],
)
def test_what_completion_offers(line, offered, not_offered):
    from click.shell_completion import BashComplete

    *words, incomplete = line.split()
    answer = BashComplete(main, {}, "adaptrix-export", "_ADAPTRIX_EXPORT_COMPLETE")
    values = {item.value for item in answer.get_completions(words, incomplete)}
    assert offered <= values and not_offered not in values
