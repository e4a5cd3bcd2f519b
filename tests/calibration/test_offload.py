import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import families
from torch import nn

from compress.calibration import activation_statistics
from compress.calibration.offload import META, Blockwise, Weights, collect
from compress.errors import CompressError
from compress.sites.discovery import find_sites
from compress.tasks.task import Batch


def held(model):
    """Bytes of weights in memory, counted from outside."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.device != META)


class Whole:
    """What `activation_statistics.collect` needs of a task."""

    def __init__(self, model):
        self.model = model


def batches():
    """Three batches, one with padding."""
    found = []
    for seed, length in ((0, 7), (1, 5), (2, 7)):
        inputs = families.tokens(seed, batch=3, length=length)
        if seed == 2:
            inputs["attention_mask"][1, 4:] = 0
        found.append(Batch(inputs, None, inputs["attention_mask"].bool()))
    return found


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def subject(request, tmp_path_factory):
    """A directory, the model that was saved there, its sites, and its statistics as a whole."""
    model, example = families.build(request.param)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    place = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(place / "model")
    sites = find_sites(model, example).sites
    activation_statistics.collect(Whole(model), sites, batches(), place / "whole", readers=True)
    return place, model, sites


def test_statistics_are_those_of_the_whole_model(subject, tmp_path):
    place, _, sites = subject
    told = []
    blockwise = Blockwise(place / "model")
    collect(blockwise, sites, batches(), tmp_path, readers=True, progress=lambda *done: told.append(done))
    for index in range(len(sites)):
        found, expected = (
            activation_statistics.read(tmp_path, index),
            activation_statistics.read(place / "whole", index),
        )
        assert found.count == expected.count == 3 * 7 + 3 * 5 + 3 * 7 - 3
        for name in ("mean", "second", "reader"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    collect(blockwise, sites[:1], batches(), tmp_path / "plain")
    assert activation_statistics.read(tmp_path / "plain", 0).reader is None
    assert told == [(done, 6) for done in range(1, 7)]


def test_at_most_one_block_is_in_memory_at_a_time(subject, tmp_path):
    place, model, sites = subject
    blockwise = Blockwise(place / "model")
    assert held(blockwise.model) == 0
    sizes = [sum(4 * p.numel() for p in block.parameters()) for block in blockwise.blocks]
    seen = []
    for number, block in enumerate(blockwise.blocks):
        block.register_forward_hook(lambda *_, n=number: seen.append((n, held(blockwise.model))))
    collect(blockwise, sites, batches(), tmp_path)
    # The first block is reached once more, to see what it is called with, but never run then.
    assert seen == [(number, sizes[number]) for number in (0, 0, 0, 1, 1, 1)]
    assert blockwise.peak_bytes == max(sizes) < sum(4 * p.numel() for p in model.parameters()) / 2 + 1
    assert [blockwise.block_bytes(number) for number in (0, 1)] == sizes
    assert held(blockwise.model) == blockwise.resident_bytes == 0


def test_shards_are_read_like_one_file(subject, tmp_path):
    place, model, sites = subject
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    collect(Blockwise(tmp_path / "shards"), sites, batches(), tmp_path / "found")
    for index in range(len(sites)):
        found, expected = (
            activation_statistics.read(tmp_path / "found", index),
            activation_statistics.read(place / "whole", index),
        )
        assert torch.equal(found.second, expected.second)


def test_other_weights_give_other_statistics(subject, tmp_path):
    """The control: the numbers come from the file."""
    place, model, sites = subject
    model.save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = load_file(path)
    name = next(
        name for name in tensors if "fc1.weight" in name or "up_proj" in name or "c_fc.weight" in name
    )
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    collect(Blockwise(tmp_path / "other"), sites, batches(), tmp_path / "found")
    gaps = [
        (
            activation_statistics.read(tmp_path / "found", k).second
            - activation_statistics.read(place / "whole", k).second
        )
        .abs()
        .max()
        for k in range(len(sites))
    ]
    assert gaps[0] == 0  # what stands before the change does not see it
    assert max(gaps) > 1e-3


def test_a_checkpoint_may_leave_out_the_name_of_the_body(tmp_path):
    model, _ = families.build("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    short = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    save_file(short, path, metadata={"format": "pt"})
    weights = Weights(tmp_path)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(weights.whole(name), model.get_parameter(name))
    rows = torch.tensor([3, 1, 3])
    assert torch.equal(weights.rows("transformer.wte.weight", rows), model.transformer.wte.weight[rows])


def test_half_precision_on_disk_is_float32_at_work(tmp_path):
    model, _ = families.build("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    blockwise = Blockwise(tmp_path)
    with blockwise.loaded(1) as block:
        weight = block.mlp.up_proj.weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.model.layers[1].mlp.up_proj.weight.float())
        assert blockwise.resident_bytes == blockwise.block_bytes(1)
    assert blockwise.resident_bytes == 0


def test_what_cannot_be_streamed_is_refused(tmp_path):
    with pytest.raises(CompressError, match=r"no readable model.safetensors or index"):
        Blockwise(tmp_path)
    model, example = families.build("llama")
    model.save_pretrained(tmp_path)
    sites = find_sites(model, example).sites
    blockwise = Blockwise(tmp_path)
    with pytest.raises(CompressError, match="no calibration data"):
        collect(blockwise, sites, [], tmp_path / "found")
    lost = sites[0].model_copy(update={"writer": "lm_head.weight"})
    with pytest.raises(CompressError, match=r"lm_head.weight lies in none of the blocks model.layers"):
        collect(blockwise, [lost], batches(), tmp_path / "found")
    blind = [Batch(b.inputs, None, torch.zeros_like(b.real)) for b in batches()]
    with pytest.raises(CompressError, match="all padding"):
        collect(blockwise, sites, blind, tmp_path / "found")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CompressError, match="hold NaN or infinity"):
        collect(Blockwise(tmp_path), sites, batches(), tmp_path / "found")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"holds no weights model.layers.0.mlp.up_proj.weight"):
        collect(Blockwise(tmp_path), sites, batches(), tmp_path / "found")


def test_blocks_that_need_different_masks_are_refused(tmp_path):
    model, _ = families.build("qwen2")
    model.save_pretrained(tmp_path)
    words = json.loads((tmp_path / "config.json").read_text())
    words |= {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
    words |= {"sliding_window": 3, "max_window_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(words))
    with pytest.raises(CompressError, match=r"different kinds \(full_attention, sliding_attention\)"):
        Blockwise(tmp_path)


def test_building_leaves_torch_as_it_was(tmp_path):
    model, _ = families.build("llama")
    model.save_pretrained(tmp_path)
    blockwise = Blockwise(tmp_path)
    assert isinstance(blockwise.model, transformers.LlamaForCausalLM)
    assert nn.Linear(2, 3).weight.device.type == "cpu"
    for (name, one), (_, other) in zip(blockwise.model.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(one, other), name
