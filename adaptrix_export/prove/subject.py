"""The artifact under test, in the runtime that will serve it, one step of its cache at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from adaptrix_export.arch.tasks import FEATURES, GENERATION
from adaptrix_export.compat.transformers import cache_argument, cache_of
from adaptrix_export.errors import ParityError
from adaptrix_export.oracle.compare import Ids, Logits
from adaptrix_export.oracle.job import Job
from adaptrix_export.runtime.adapters import FOLDER, SUFFIX
from adaptrix_export.runtime.graph import ADAPTER_IDS, GRAPH
from adaptrix_export.runtime.layout import located

CONTEXT = "context."  # how the outputs begin that tell of gates
_PAST = "past_key_values."
# Where ONNX Runtime looks for the weights of a graph that it is given as bytes.
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# Threads that wait for work busily take a third of the processor time of a proof.
SPINNING = "session.intra_op.allow_spinning"


class Subject(Protocol):
    """A causal LM with a cache (`step`), or a model that answers whole rows (`encode`)."""

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits:
        """Whole rows: (batch, tokens, width) features or token logits, (batch, 1, labels)."""
        ...

    def pool(self, ids: Ids, mask: Ids, types: Ids, kind: str) -> Logits:
        """One vector a row, (batch, 1, width): `kind` is mean or cls."""
        ...

    def step(self, ids: Ids, mask: Ids, positions: Ids, cache: Any) -> tuple[Logits, Any]:
        """Feeds `ids` (batch, new) after `cache` (None at first).

        `mask` (batch, past + new) is 0 at pads, `positions` (batch, new). Returns logits
        (batch, new, vocabulary) and the cache for the next step.
        """
        ...


class OnnxSubject:
    """ONNX Runtime on the CPU, with the graph interface that the task has."""

    own_inputs: tuple[str, ...] = ()  # of a kind of graph, beyond that interface

    def __init__(
        self,
        folder: Path,
        threads: int | None,
        task: str = GENERATION,
        file: str = GRAPH,
        accuracy_level: int | None = None,
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.add_session_config_entry(SPINNING, "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        path = located(folder, file)
        graph: str | bytes = str(path)
        if accuracy_level is not None:
            graph = set_accuracy_level(path, accuracy_level)
            options.add_session_config_entry(EXTERNAL_FOLDER, str(path.parent))
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self.statistics: dict[str, list[float]] = {}  # of the gates, in the last step
        self._outputs = [o.name for o in self._session.get_outputs()]
        cached = task == GENERATION
        known = {"input_ids", "attention_mask", "position_ids" if cached else "token_type_ids"}
        known |= set(self.own_inputs)
        odd = [n for n in self._inputs if n not in known and not (cached and n.startswith(_PAST))]
        self._answer = "last_hidden_state" if task == FEATURES else "logits"
        if odd or self._answer not in self._outputs:
            inside = ", ".join(sorted(known)) + (f", {_PAST}*" if cached else "")
            raise ParityError(
                file,
                f"inputs {odd} beyond the interface" if odd else f"no output {self._answer}",
                f"{inside} -> {self._answer}" + (", present.*" if cached else ""),
            )

    def step(self, ids: Ids, mask: Ids, positions: Ids, cache: Any) -> tuple[Logits, Any]:
        past = cache if cache is not None else self._empty(len(ids))
        offered = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        fed = {name: value for name, value in offered.items() if name in self._inputs}
        out = self._run(fed)
        logits = np.asarray(out.pop("logits"))
        present = {name.replace("present.", _PAST, 1): value for name, value in out.items()}
        return logits.astype(np.float32), present

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits:
        output = self._whole(self._answer, ids, mask, types)
        return output if output.ndim == 3 else output[:, None]

    def pool(self, ids: Ids, mask: Ids, types: Ids, kind: str) -> Logits:
        return self._whole("sentence_embedding", ids, mask, types)[:, None]

    def _whole(self, output: str, ids: Ids, mask: Ids, types: Ids) -> Logits:
        offered = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        fed = {name: value for name, value in offered.items() if name in self._inputs}
        return np.asarray(self._run(fed)[output], np.float32)

    def _run(self, fed: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name; statistics of gates are kept apart from them."""
        out = dict(zip(self._outputs, self._session.run(None, fed), strict=True))
        statistics = [name for name in out if name.startswith(CONTEXT)]
        self.statistics = {
            name.removeprefix(CONTEXT): out.pop(name).tolist() for name in statistics
        }
        return out

    def _empty(self, batch: int) -> dict[str, Any]:
        """A cache of no tokens: symbolic sizes are the batch (first axis) and the past (others)."""
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        past: dict[str, Any] = {}
        for name, value in self._inputs.items():
            if not name.startswith(_PAST):
                continue
            if value.type not in types:
                raise ParityError("model.onnx", f"{name} has type {value.type}", f"{set(types)}")
            sizes = [n if isinstance(n, int) else 0 for n in value.shape]
            past[name] = np.zeros([batch, *sizes[1:]], dtype=types[value.type])
        return past


def set_accuracy_level(path: Path, level: int) -> bytes:
    """The graph in a file with another accuracy level of its quantized products: 0 leaves
    activations as they are."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    serialized: bytes = model.SerializeToString()
    return serialized


class SwitchableSubject(OnnxSubject):
    """A graph with slots, fed the factors in an adapter file, or with an adapter for each row.

    `choose` and `choose_rows` hold for the calls after them. Files are read as they will be served,
    by ONNX Runtime, and none of our runtime takes part.
    """

    own_inputs = (ADAPTER_IDS,)

    def __init__(self, job: Job, accuracy_level: int | None = None) -> None:
        super().__init__(job.artifact, job.threads, accuracy_level=accuracy_level)
        self._job = job
        self._factors: dict[str, Any] = {}
        self._ids: list[int] = [-1]
        self.by_row = ADAPTER_IDS in self._inputs
        self._names = list(dict.fromkeys(name for name, _ in job.adapters))

    def choose(self, name: str | None) -> None:
        """One adapter for all rows, None for the base alone."""
        if self.by_row:
            self.choose_rows([name])
        else:
            self._factors = {} if name is None else adapter_values(self._job, name)

    def choose_rows(self, names: list[str | None]) -> None:
        """An adapter, or None, for each row of the batches to come."""
        self._ids = [-1 if name is None else self._names.index(name) for name in names]

    def _run(self, fed: dict[str, Any]) -> dict[str, Any]:
        fed = {**fed, **self._factors}
        if self.by_row:
            ids = np.array(self._ids, np.int64)
            fed[ADAPTER_IDS] = np.broadcast_to(ids, (len(fed["input_ids"]),)).copy()
        return super()._run(fed)


def adapter_values(job: Job, name: str) -> dict[str, Any]:
    """The tensors of an adapter's file by name."""
    import onnxruntime as ort

    folder = job.adapter_folder or job.artifact / FOLDER
    file = folder / f"{name}{SUFFIX}"
    try:
        read = ort.AdapterFormat.read_adapter(str(file))
        return {key: value.numpy().copy() for key, value in read.get_parameters().items()}
    except Exception as error:  # ONNX Runtime's errors share no narrower base
        raise ParityError(f"adapter {name}", f"{file.name} cannot be read ({error})") from error


class TransformersSubject:
    """A merged checkpoint, loaded by transformers as its users load it, but in float32."""

    def __init__(self, folder: Path, threads: int | None, task: str = GENERATION) -> None:
        import torch

        from adaptrix_export.oracle.reference import load_model

        if threads is not None:
            torch.set_num_threads(threads)
        self._model = load_model(folder, task=task)

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits:
        from adaptrix_export.oracle.reference import encode

        return encode(self._model, ids, mask, types)

    def forward(self) -> Logits:
        """See `Reference.forward`."""
        from adaptrix_export.oracle.drawn import forward_on_drawn

        return forward_on_drawn(self._model, self._model)

    def images(self) -> Logits:
        from adaptrix_export.oracle.drawn import vision_on_drawn

        return vision_on_drawn(self._model)

    def pool(self, ids: Ids, mask: Ids, types: Ids, kind: str) -> Logits:
        raise ParityError("artifact", "a checkpoint that pools", "a graph with that output")

    def step(self, ids: Ids, mask: Ids, positions: Ids, cache: Any) -> tuple[Logits, Any]:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions),
                **cache_argument(cache),
                use_cache=True,
            )
        return cast(Logits, out.logits.float().numpy()), cache_of(out)
