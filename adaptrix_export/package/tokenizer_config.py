"""A tokenizer_config.json that transformers 4 and 5, optimum and transformers.js read alike."""

from __future__ import annotations

import json
from pathlib import Path

from adaptrix_export.load.files.fields import LIST, TEXT, TEXTS, Kind, check_fields
from adaptrix_export.load.files.tensors import read_json
from adaptrix_export.load.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG

TEMPLATE_FILE = "chat_template.jinja"
# transformers 5 writes a name that 4 does not know; both read this one.
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
# A decoder has no use for token_type_ids; optimum's generate() refuses them.
DECODER_INPUTS = ["input_ids", "attention_mask"]
_FIELDS: dict[str, Kind] = {
    "chat_template": TEXT | LIST, "model_input_names": TEXTS, "tokenizer_class": TEXT,
}  # fmt: skip


def make_tokenizer_portable(folder: Path, decoder: bool) -> None:
    """Rewrite the file in `folder`, if it is there and something in it has to change."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return
    config = read_json(path)
    check_fields(TOKENIZER_CONFIG, config, _FIELDS)
    changed = dict(config)
    name = config.get("tokenizer_class")
    if name in CLASSES and (folder / TOKENIZER).is_file():
        changed["tokenizer_class"] = CLASSES[name]
    if decoder and changed.get("model_input_names") != DECODER_INPUTS:
        changed["model_input_names"] = DECODER_INPUTS
    template = folder / TEMPLATE_FILE
    if "chat_template" not in config and template.is_file():
        # transformers.js reads the template here alone
        changed["chat_template"] = template.read_text(encoding="utf-8")
    if changed != config:
        text = json.dumps(changed, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
