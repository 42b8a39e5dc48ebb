"""Writes `.onnx_adapter` files: ONNX Runtime's flatbuffers format, the same bytes every time.

`onnxruntime.AdapterFormat.export_adapter` writes the same format, with whatever the memory held
in the gaps between its fields. Schema: onnxruntime/lora/adapter_format/adapter_schema.fbs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import flatbuffers
import numpy as np

from adaptrix_export.plan import Array
from adaptrix_export.runtime.adapters import FOLDER
from adaptrix_export.runtime.stamps import adapter_version
from adaptrix_export.save.safetensors_file import write_safetensors
from adaptrix_export.save.writer import HashingWriter

FORMAT_VERSION = 1
IDENTIFIER = b"TORT"
_FLOAT = 1  # ONNX's number of the type
_ALIGNMENT = 8  # of a tensor's bytes
_NAME, _DIMS, _TYPE, _DATA = range(4)  # fields of a parameter
_FORMAT, _ADAPTER, _MODEL, _PARAMETERS = range(4)  # fields of the file


def write_adapter(path: Path, values: Mapping[str, Array], model_version: int) -> tuple[int, str]:
    """Write float32 tensors by name; returns the adapter's version stamp and the file's sha256.

    `model_version` is the stamp of the graph that the adapter belongs to.
    """
    version = adapter_version(values)
    builder = flatbuffers.Builder(sum(v.nbytes + 256 for v in values.values()) + 1024)
    parameters = [_parameter(builder, name, values[name]) for name in sorted(values)]
    builder.StartVector(4, len(parameters), 4)
    for offset in reversed(parameters):
        builder.PrependUOffsetTRelative(offset)
    vector = builder.EndVector()
    builder.StartObject(4)
    builder.PrependInt32Slot(_FORMAT, FORMAT_VERSION, 0)
    builder.PrependInt32Slot(_ADAPTER, version, 0)
    builder.PrependInt32Slot(_MODEL, model_version, 0)
    builder.PrependUOffsetTRelativeSlot(_PARAMETERS, vector, 0)
    builder.Finish(builder.EndObject(), file_identifier=IDENTIFIER)
    with HashingWriter(path) as out:
        out.write(bytes(builder.Output()))
        return version, out.hexdigest


@dataclass(frozen=True)
class _Values:
    """A `Tensor` whose values are in memory already."""

    name: str
    values: Array
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.values.shape)

    def read(self) -> Array:
        return self.values

    def rows(self, start: int, stop: int) -> Array:
        return self.values[start:stop]


def write_web_adapter(
    folder: Path, name: str, values: Mapping[str, Array], model_version: int
) -> str:
    """The same tensors as safetensors, which a browser reads; returns the file's name in `folder`.

    Its metadata is one key, because the order of several is not the same in every writer.
    """
    file = f"{FOLDER}/{name}.safetensors"
    stamps = {"adapter_version": adapter_version(values), "model_version": model_version}
    tensors = {key: _Values(key, np.asarray(v, "<f4")) for key, v in values.items()}
    write_safetensors(folder / file, tensors, {"adaptrix": json.dumps(stamps, sort_keys=True)})
    return file


def _parameter(builder: flatbuffers.Builder, name: str, values: Array) -> int:
    array = np.ascontiguousarray(values, dtype="<f4")
    label = builder.CreateString(name)
    dims = builder.CreateNumpyVector(np.array(array.shape, dtype="<i8"))
    builder.Prep(_ALIGNMENT, array.nbytes)  # zeros, so that the bytes after them are aligned
    data = builder.CreateByteVector(array.tobytes())
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(_NAME, label, 0)
    builder.PrependUOffsetTRelativeSlot(_DIMS, dims, 0)
    builder.PrependInt32Slot(_TYPE, _FLOAT, 0)
    builder.PrependUOffsetTRelativeSlot(_DATA, data, 0)
    return int(builder.EndObject())
