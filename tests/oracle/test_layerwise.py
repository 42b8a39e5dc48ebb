"""A model that is run layer by layer, its weights read as they are needed, is the same model."""

from __future__ import annotations

from math import prod

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from adaptrix_export.errors import RecipeError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.measure.calibration import Calibration
from adaptrix_export.oracle.layered import ADAPTED, BASE, STUDENT, Live
from adaptrix_export.oracle.layerwise import LayerReader, fits
from adaptrix_export.passes.context import pass_context
from adaptrix_export.passes.redistribute.redistribute import Redistribute, split_terms
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from tests.artifacts import save_base_with_tokenizer
from tests.tiny import save_adapter

DEPTH = {"llama": "num_hidden_layers", "gpt2": "n_layer", "bert": "num_hidden_layers"}


@pytest.fixture(scope="module", params=list(DEPTH))
def plan(request, tmp_path_factory):
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    options = {DEPTH[kind]: 6, "shard": "200KB"}
    if kind == "bert":
        base = save_base_with_tokenizer(kind, folder / "base", initializer_range=0.15, **options)
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules=["query", "output.dense"])
        peft = get_peft_model(AutoModel.from_pretrained(base), lora)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        peft.save_pretrained(folder / "adapter")
    else:
        base = save_base_with_tokenizer(kind, folder / "base", dtype=torch.bfloat16, **options)
        save_adapter(base, folder / "adapter")
    opened = open_base(str(base))
    return Plan(opened, (open_adapter(str(folder / "adapter"), opened),))


def room_for(plan, layers):
    """Bytes for what lies outside of the layers and so many of them."""
    stack = plan.base.architecture.stacks[0].prefix + "."
    sizes = {name: 4 * prod(t.shape) for name, t in plan.base.tensors.items()}
    rest = sum(size for name, size in sizes.items() if not name.startswith(stack))
    return rest + layers * (sum(sizes.values()) - rest) // 6


def opened(plan, memory):
    stack, _, _ = split_terms(plan, plan.adapters[0])
    return Live.open(plan.base, (("a", plan.adapters[0].folder),), stack, memory)


def answers(live, ids):
    found = []
    with torch.no_grad():
        for who in (ADAPTED, STUDENT, BASE):
            hidden = live.enter(ids, who)
            for number in range(len(live.layers)):
                hidden = live.layer(who, number, hidden)
            found.append(live.leave(ids, hidden, who))
    return found


def test_it_answers_as_the_whole_model_and_holds_no_more_than_its_room(plan):
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    whole, parts = opened(plan, None), opened(plan, room_for(plan, 2))
    assert whole.reader is None and parts.reader is not None
    for one, other in zip(answers(whole, ids), answers(parts, ids), strict=True):
        assert torch.equal(one, other)
    reader = parts.reader
    assert 0 < reader.most <= reader.room
    assert reader.reads == 16  # 6, then the 5 after the one that stays, twice
    # in memory are the weights of two layers; what stands for the others has no size
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for layer in parts.layers
        for name, p in layer.named_parameters()
        if "lora_" not in name
    }
    assert sum(held.values()) <= reader.room + 4 * 6 * 20
    assert torch.equal(whole.base_answer(ids)[0], parts.base_answer(ids)[0])


@pytest.mark.parametrize("strategy", ["fit", "distill"])
def test_what_it_redistributes_is_the_same(tmp_path, plan, strategy, monkeypatch):
    """Training goes back through layers whose weights have been given up since."""
    readers = []
    made = LayerReader.__init__

    def noted(self, *args):
        made(self, *args)
        readers.append(self)

    monkeypatch.setattr(LayerReader, "__init__", noted)
    files = []
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    for memory in (None, room_for(plan, 1)):
        with pass_context(Silent()) as context:
            step = Redistribute(
                layers=(1, 3), strategy=strategy, steps=4, max_memory=memory, context=context,
                calibration=Calibration(str(text), 256, 32),
            )  # fmt: skip
            adapter = step(plan).adapters[0]
            files.append((adapter.folder / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert len(readers) == 1 and readers[0].most <= readers[0].room and readers[0].reads > 6


def test_too_little_room_for_one_layer_is_refused(plan):
    assert not fits(plan.base, room_for(plan, 1))
    with pytest.raises(RecipeError, match="max_memory.*at least"):
        opened(plan, room_for(plan, 1) // 2)


def test_a_parameter_without_a_tensor_is_refused_by_name(plan):
    stack = plan.base.architecture.stacks[0].prefix
    name = next(n for n in plan.base.tensors if n.startswith(f"{stack}.2."))
    tensors = {n: t for n, t in plan.base.tensors.items() if n != name}
    object.__setattr__(plan.base, "tensors", tensors)
    with pytest.raises(UnsupportedError, match="no tensor of that name"):
        opened(plan, room_for(plan, 1))
