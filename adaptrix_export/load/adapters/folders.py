"""Where in a folder an adapter lies, and what is said of a folder that has none."""

from __future__ import annotations

from pathlib import Path

from adaptrix_export.errors import SourceError
from adaptrix_export.load.files.tensors import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WEIGHTS_INDEX = "adapter_model.safetensors.index.json"
PICKLED = "adapter_model.bin"
# Any of these shows that a folder is an adapter's itself.
SIGNS = (CONFIG, WEIGHTS, WEIGHTS_INDEX, PICKLED, "adapters.safetensors", "metadata.json")
_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def nested_folder(place: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder of the adapter, and a note where it is a sub-folder of the one that was named.

    PEFT saves an adapter with a name of its own in a sub-folder; a trainer leaves its checkpoints
    in several. Raises SourceError where there is a choice.
    """
    if any((folder / name).is_file() for name in SIGNS) or any(folder.glob("*.gguf")):
        return folder, ()
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if path.is_file())
    if len(inside) == 1:
        return inside[0], (f"the adapter is in the sub-folder {inside[0].name}",)
    if inside:
        names = ", ".join(path.name for path in inside)
        last = max(inside, key=_step)
        raise SourceError(
            place, f"no adapter, and one in each of the sub-folders {names}", "one adapter",
            f"name one of them, such as {place}/{last.name}" if place else "name one of them",
        )  # fmt: skip
    return folder, ()


def _step(path: Path) -> tuple[int, str]:
    """Sorts `checkpoint-200` behind `checkpoint-90`."""
    number = path.name.rpartition("-")[2]
    return (int(number) if number.isdecimal() else -1, path.name)


def check_is_adapter(place: str, folder: Path) -> None:
    """Raise SourceError for a folder that is no adapter's: a whole model, or one without config."""
    if (folder / CONFIG).is_file():
        return
    whole = next((name for name in _WHOLE if (folder / name).is_file()), None)
    if whole and (folder / "config.json").is_file():
        raise SourceError(
            place, f"a whole model (config.json, {whole})", f"an adapter ({CONFIG})",
            "a merged or fully fine-tuned model needs no adapter: name it as the base",
        )  # fmt: skip
    weights = next((n for n in (WEIGHTS, WEIGHTS_INDEX, PICKLED) if (folder / n).is_file()), None)
    if weights:
        raise SourceError(
            place, f"{weights} and no {CONFIG}", f"{CONFIG} beside it",
            "rank and scale stand there; save the adapter with save_pretrained",
        )  # fmt: skip
    raise SourceError(place, f"no {CONFIG}", f"one, and {WEIGHTS}", "is this the adapter's folder?")


def adapter_as_base(place: str, folder: Path) -> SourceError | None:
    """The error for a base that is an adapter's folder; None for another one."""
    if (folder / "config.json").is_file() or not (folder / CONFIG).is_file():
        return None
    try:
        trained = read_json(folder / CONFIG).get("base_model_name_or_path")
    except SourceError:
        trained = None
    on = f", trained on {trained!r}" if trained else ""
    return SourceError(
        place, f"an adapter's folder ({CONFIG}){on}", "the folder of the base model",
        "name the model that the adapter was trained on as the base, and this as the adapter",
    )  # fmt: skip
