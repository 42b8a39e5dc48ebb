"""What config.json tells transformers.js: which file to open, and of what type its cache is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptrix_export.package.layout import HUB_DATA, WHOLE
from adaptrix_export.runtime.layout import ONNX_FOLDER

# transformers.js' name for the file without a suffix, model.onnx, whatever its weights are. Without
# it, it asks for model_quantized.onnx in a browser.
PLAIN_FILE = "fp32"


def browser_config(folder: Path) -> dict[str, Any]:
    """The key `transformers.js_config`; nothing for what transformers.js cannot open."""
    home = folder / ONNX_FOLDER
    if not any(home.glob("*.onnx")):
        return {}
    external = {
        path.stem: (home / f"{path.stem}{HUB_DATA}").exists()
        for path in sorted(home.glob("*.onnx"))
    }
    if (home / WHOLE).exists():  # transformers.js knows of no other graph beside it
        external = {Path(WHOLE).stem: external[Path(WHOLE).stem]}
    every = set(external.values())
    settings = {
        "dtype": PLAIN_FILE,
        "use_external_data_format": every.pop() if len(every) == 1 else external,
    }
    return {"transformers.js_config": settings}
