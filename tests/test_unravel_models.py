"""`unravel` on real architectures, against edits of the models themselves.

The oracle never looks into a chain: it takes a copy of the model and scales what the last module of a branch gives, or
what it passes back (`architectures.edited`). A chain is right when it agrees with that.
"""

from __future__ import annotations

import copy
import functools
import types

import numpy as np
import pandas as pd
import pytest
import torch
from architecture_table import row, rows
from architectures import (
    CASES,
    VGG,
    Case,
    Counting,
    DataDependent,
    DenseNet,
    InPlaceBranch,
    LongSkip,
    Overlapping,
    Tied,
    TwoInputs,
    UNet,
    built,
    edited,
    labels_for,
    logits_of,
    loss,
    randomize,
    twin,
)
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from unravelling import Chain, Unit, delete_each, gradient_by_length, path_gradients, unravel

EVERY = pytest.mark.parametrize("name", CASES)
# One of a family, where a test is slow.
REPRESENTATIVE = [
    *("cifar-resnet", "preact-resnet", "decoder", "decoder-parallel-left", "functional", "convmixer"),
    *("torchvision resnet50", "torchvision vit", "torchvision convnext", "torchvision mobilenet_v2"),
    *("torchvision efficientnet_v2", "torchvision swin", "timm resnet26d", "timm resnetv2", "timm vit"),
    *("timm mobilenetv3", "timm nfnet", "transformers gpt2", "transformers bert"),
]
SOME = pytest.mark.parametrize("name", REPRESENTATIVE)
CHAINS_OF_FEW = [name for name, case in CASES.items() if case.units <= 6 and not name.startswith("torchvision w")]


SINGLE = torch.float32


@functools.cache
def _model(name: str, dtype: torch.dtype) -> nn.Module:
    model = built(name)
    return model if dtype == SINGLE else copy.deepcopy(model).to(dtype)


@functools.cache
def _chain(name: str, dtype: torch.dtype) -> Chain:
    case = CASES[name]
    return unravel(_model(name, dtype), case.inputs(dtype), **case.options)


def model_of(name: str, dtype: torch.dtype = SINGLE) -> nn.Module:
    """The model of a case, the same for all tests."""
    return _model(name, dtype)


def chain_of(name: str, dtype: torch.dtype = SINGLE) -> Chain:
    """Its chain, the same for all tests."""
    return _chain(name, dtype)


def residual_units(chain: Chain) -> list[int]:
    return [i for i, unit in enumerate(chain.units) if unit.residual]


def agree(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to the last bit, or within a share of the largest."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if tolerance:
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    else:
        assert torch.equal(found, expected)


def run(model: nn.Module, x) -> Tensor:
    with torch.no_grad():
        return logits_of(model(x))


# ---------------------------------------------------------------- the chain is the model


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_chain_equals_model(name, dtype):
    case, model, chain = CASES[name], model_of(name, dtype), chain_of(name, dtype)
    for batch, seed in ((2, 0), (2, 5), (3, 6)):  # the example, another, and another batch size
        x = case.inputs(dtype, batch, seed)
        expected = run(model, x)
        assert expected.isfinite().all()
        agree(run(chain, x), expected, case.tolerance if dtype == torch.float32 else min(case.tolerance, 1e-13))


@EVERY
def test_residual_units_are_all_found(name):
    chain = chain_of(name)
    assert len(residual_units(chain)) == CASES[name].units
    names = [unit.name for unit in chain.units]
    assert all(names)
    assert len(set(names)) == len(names)


@EVERY
def test_parameters_are_the_models_own(name):
    model, chain = model_of(name), chain_of(name)
    theirs = {id(parameter) for parameter in model.parameters()}
    ours = {id(parameter) for parameter in chain.parameters()}
    assert ours <= theirs
    used = {id(p) for p, g in zip(model.parameters(), gradients(model, CASES[name]), strict=True) if g is not None}
    assert used <= ours
    assert {b.data_ptr() for b in chain.buffers() if b.numel()} <= {b.data_ptr() for b in model.buffers() if b.numel()}


@functools.cache
def _gradients(name: str, chain: bool) -> list[Tensor | None]:
    model = model_of(name, torch.float64)
    return gradients(model, CASES[name], chain_of(name, torch.float64) if chain else None)


def gradients(model: nn.Module, case: Case, chain: nn.Module | None = None) -> list[Tensor | None]:
    """The loss gradient of the model's parameters, from its own forward pass or the chain's."""
    dtype = next(model.parameters()).dtype
    logits = logits_of((chain or model)(case.inputs(dtype)))
    return list(grad(loss(logits, labels_for(logits)), list(model.parameters()), allow_unused=True))


@EVERY
def test_parameter_gradients_are_equal(name):
    for found, expected in zip(_gradients(name, True), _gradients(name, False), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert (found - expected).abs().max() <= 1e-10 * expected.abs().max().clamp_min(1e-6)


@SOME
def test_verify_agrees(name):
    assert row(name, chain_of(name), CASES[name].inputs(seed=7)) == rows()[name], "run tests/architecture_table.py"


# ---------------------------------------------------------------- deletion is editing the source


@EVERY
def test_deletion_equals_editing_the_model(name):
    case, model, chain = CASES[name], model_of(name), chain_of(name)
    units, x = residual_units(chain), case.inputs(seed=3)
    intact = run(model, x)
    for k, i in enumerate(units):
        expected = run(edited(case, model, [k], value=0), x)
        assert not torch.equal(expected, intact), "the branch does nothing: the test would pass for a wrong unit"
        agree(run(chain.without(i), x), expected, case.tolerance)
    few = range(0, len(units), 2)
    agree(run(chain.without(*(units[k] for k in few)), x), run(edited(case, model, few, value=0), x), case.tolerance)


@SOME
def test_delete_each_measures_those_losses(name):
    case, model, chain = CASES[name], model_of(name), chain_of(name)
    x = case.inputs(batch=4, seed=3)
    y = labels_for(run(model, x))
    table = delete_each(chain, DataLoader(TensorDataset(x, y), batch_size=2))
    assert len(table) == len(chain)
    for k, i in enumerate(residual_units(chain)):
        deleted = edited(case, model, [k], value=0)
        logits = torch.cat([run(deleted, x[:2]), run(deleted, x[2:])])
        row = table.set_index("unit").loc[i]
        assert row.loss == pytest.approx(loss(logits, y).item(), rel=1e-4)
        assert row.error == pytest.approx((logits.argmax(-1) != y).double().mean().item(), abs=1e-12)


# What the block of each library computes without its branches, copied from no unit of the chain.
def _drop(name: str):
    def decorate(function):
        SKIP_ALONE[name] = function
        return function

    return decorate


SKIP_ALONE: dict = {}


@_drop("torchvision.models.resnet.BasicBlock")
@_drop("torchvision.models.resnet.Bottleneck")
def _(self, x):
    return self.relu(x if self.downsample is None else self.downsample(x))


@_drop("timm.models.resnet.BasicBlock")
@_drop("timm.models.resnet.Bottleneck")
def _(self, x):
    x = x if self.downsample is None else self.downsample(x)
    return getattr(self, "act3", None)(x) if hasattr(self, "act3") else self.act2(x)


@_drop("timm.models.resnetv2.PreActBottleneck")
def _(self, x):
    return x if self.downsample is None else self.downsample(self.norm1(x))


@_drop("timm.models.convnext.ConvNeXtBlock")
def _(self, x):
    return self.shortcut(x)


@_drop("timm.models.regnet.Bottleneck")
def _(self, x):
    return self.act3(self.downsample(x))


@_drop("torchvision.models.regnet.ResBottleneckBlock")
def _(self, x):
    return self.activation(x if self.proj is None else self.proj(x))


@_drop("torchvision.models.convnext.CNBlock")
@_drop("torchvision.models.mobilenetv2.InvertedResidual")
@_drop("torchvision.models.mobilenetv3.InvertedResidual")
@_drop("torchvision.models.efficientnet.MBConv")
@_drop("torchvision.models.efficientnet.FusedMBConv")
@_drop("torchvision.models.vision_transformer.EncoderBlock")
@_drop("torchvision.models.swin_transformer.SwinTransformerBlock")
@_drop("timm.models.vision_transformer.Block")
@_drop("timm.models._efficientnet_blocks.DepthwiseSeparableConv")
@_drop("timm.models._efficientnet_blocks.InvertedResidual")
@_drop("timm.models.mlp_mixer.MixerBlock")
@_drop("timm.models.mlp_mixer.SpatialGatingBlock")
@_drop("transformers.models.gpt2.modeling_gpt2.GPT2Block")
@_drop("transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer")
@_drop("transformers.models.llama.modeling_llama.LlamaDecoderLayer")
@_drop("transformers.models.vit.modeling_vit.ViTLayer")
@_drop("architectures.DecoderBlock")
@_drop("architectures.Residual")
def _(self, x, *args, **kwargs):
    return x


@_drop("timm.models.nfnet.NormFreeBlock")
def _(self, x):
    return x if self.downsample is None else self.downsample(self.act1(x) * self.beta)


@_drop("architectures.PreActBlock")
def _(self, x):
    return self.shortcut(F.relu(self.bn1(x))) if hasattr(self, "shortcut") else x


@_drop("architectures.CifarBlock")
def _(self, x):
    return F.relu(self.shortcut(x))


def block_of(model: nn.Module, names: tuple[str, ...]) -> str | None:
    """The name of the block around a branch: the nearest module whose class is known above."""
    name = names[0]
    while name:
        cls = type(model.get_submodule(name))
        if f"{cls.__module__}.{cls.__qualname__}" in SKIP_ALONE:
            return name
        name = name.rpartition(".")[0]
    return None


@EVERY
def test_deletion_equals_a_block_whose_forward_returns_its_skip(name):
    case, model, chain = CASES[name], model_of(name), chain_of(name)
    blocks: dict[str, list[int]] = {}
    for i, names in zip(residual_units(chain), case.branches(model), strict=True):
        block = block_of(model, names)
        if block is not None:
            blocks.setdefault(block, []).append(i)
    if not blocks:
        pytest.skip("this network has no block class of its own")
    x = case.inputs(seed=4)
    for block, units in blocks.items():
        without = twin(model)
        module = without.get_submodule(block)
        cls = type(module)
        module.forward = types.MethodType(SKIP_ALONE[f"{cls.__module__}.{cls.__qualname__}"], module)
        agree(run(chain.without(*units), x), run(without, x), case.tolerance)


# ---------------------------------------------------------------- the gradient along its paths


def first_state_gradient(case: Case, model: nn.Module, x: Tensor) -> Tensor:
    """The loss gradient of a model's own forward pass where its first unit begins, or at its input."""
    caught = []

    def catch(module, args, kwargs):
        state = args[0] if args else kwargs["hidden_states"]
        caught.append(state.detach().requires_grad_())
        return (caught[0], *args[1:]), kwargs

    if case.first is None:
        x = x.clone().requires_grad_()
        logits, at = logits_of(model(x)), x
    else:
        handle = model.get_submodule(case.first).register_forward_pre_hook(catch, with_kwargs=True)
        logits, at = logits_of(model(x)), caught[0]
        handle.remove()
    return grad(loss(logits, labels_for(logits)), at)[0]


@EVERY
def test_spectrum_sums_to_autograds_gradient(name):
    """Scaling what every branch passes back by t turns the gradient into Σ t^k G_k, at t = 1 into autograd's."""
    case, model, chain = CASES[name], model_of(name, torch.float64), chain_of(name, torch.float64)
    x = case.inputs(torch.float64, seed=8)
    y = labels_for(run(model, x))
    by_length = gradient_by_length(chain, x, y, loss, at="stem" if case.first else "pixels")
    plain = len(chain) - case.units  # they count as taken, and no gate scales them
    for t in (1.0, 0.5, -1.0):
        model_t = edited(case, model, range(case.units), gradient=t)
        expected = first_state_gradient(case, model_t, x)
        found = sum(t ** (k - plain) * g for k, g in enumerate(by_length))
        assert found.shape == expected.shape
        assert (found - expected).norm() <= case.rounding * expected.norm()


@pytest.mark.parametrize("name", CHAINS_OF_FEW)
def test_spectrum_equals_brute_force(name):
    case, chain = CASES[name], chain_of(name, torch.float64)
    x = case.inputs(torch.float64, seed=8)
    y = labels_for(run(chain, x))
    by_length = gradient_by_length(chain, x, y, loss)
    summed = torch.zeros_like(by_length)
    for bits, g in path_gradients(chain, x, y, loss).items():
        summed[sum(bits)] += g
    scale = by_length.flatten(1).norm(dim=1).max()
    assert (by_length - summed).norm() <= case.rounding * scale


# ---------------------------------------------------------------- the model stays as it is


def everything(model: nn.Module) -> dict:
    """All that can be told of a model from outside, to the last byte."""
    containers = (dict, set, list)
    seen: dict = {}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[name] = {
            "class": type(module),
            "training": module.training,
            "attributes": list(module.__dict__),
            "objects": [id(value) for value in module.__dict__.values()],
            "lengths": {key: len(value) for key, value in module.__dict__.items() if isinstance(value, containers)},
            "hooks": [list(value) for key, value in module.__dict__.items() if key.endswith("hooks")],
        }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        data = tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor.detach().clone()
        seen[f"tensor {name}"] = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor.grad)
        seen[f"bytes {name}"] = data.numpy().tobytes()
    return seen


@SOME
def test_model_is_unchanged_to_the_last_byte(name):
    case, model = CASES[name], copy.deepcopy(built(name))
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 5 != 0)
    before, random = everything(model), torch.get_rng_state()
    x = case.inputs()
    chain = unravel(model, x, **case.options)
    assert everything(model) == before
    chain.verify(x)
    assert everything(model) == before
    y = labels_for(run(chain, x))
    delete_each(chain, [(x, y)])
    gradient_by_length(chain.without(residual_units(chain)[0]), x, y, loss, max_length=1)
    chain.trace(x)
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    copy.deepcopy(chain).double().train()
    assert everything(model) == before


@SOME
def test_copy_of_a_chain_is_independent(name):
    case, chain = CASES[name], chain_of(name)
    x = case.inputs()
    expected = run(chain, x)
    twin = copy.deepcopy(chain)
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in chain.parameters())
    assert len(list(twin.parameters())) == len(list(chain.parameters()))
    agree(run(twin, x), expected, 0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(run(twin, x), expected)
    agree(run(chain, x), expected, 0)


# ---------------------------------------------------------------- reordering

SWAPS = {
    "cifar-resnet": ("layer1.0", "layer1.1"),
    "preact-resnet": ("blocks.0", "blocks.1"),
    "decoder": ("blocks.0", "blocks.2"),
    "decoder-parallel": ("blocks.0", "blocks.1"),
    "torchvision resnet18": ("layer1.0", "layer1.1"),
    "torchvision resnet50": ("layer3.1", "layer3.2"),
    "torchvision vit": ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_2"),
    "torchvision convnext": ("features.1.0", "features.1.1"),
    "torchvision efficientnet": ("features.2.1", "features.2.2"),
    "timm vit": ("blocks.0", "blocks.1"),
    "timm convnext": ("stages.1.blocks.0", "stages.1.blocks.1"),
    "timm mixer": ("blocks.0", "blocks.1"),
    "transformers gpt2": ("transformer.h.0", "transformer.h.1"),
    "transformers llama": ("model.layers.0", "model.layers.1"),
    "transformers gpt_neox": ("gpt_neox.layers.0", "gpt_neox.layers.1"),
}


@pytest.mark.parametrize("name", SWAPS)
def test_reordering_equals_swapping_blocks_of_the_model(name):
    case, model, chain = CASES[name], model_of(name), chain_of(name)
    a, b = SWAPS[name]
    swapped = twin(model)
    first, second = swapped.get_submodule(a), swapped.get_submodule(b)
    swapped.set_submodule(a, second)
    swapped.set_submodule(b, first)
    order = list(range(len(chain)))
    inside = {
        block: [
            i
            for i, names in zip(residual_units(chain), case.branches(model), strict=True)
            if names[0].startswith(f"{block}.")
        ]
        for block in (a, b)
    }
    for i, j in zip(inside[a], inside[b], strict=True):
        order[i], order[j] = j, i
    x = case.inputs(seed=9)
    expected = run(swapped, x)
    assert not torch.equal(expected, run(model, x))
    agree(run(chain.reordered(order), x), expected, case.tolerance)


# ---------------------------------------------------------------- nets of a kind of their own


def fresh(build, *args, **kwargs) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(build(*args, **kwargs), IMAGES)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_block_that_is_used_three_times():
    model = fresh(Tied)
    chain = unravel(model, IMAGES)
    assert len(chain) == 3
    assert torch.equal(run(chain, IMAGES), run(model, IMAGES))
    assert {id(p) for p in chain.parameters()} == {id(p) for p in model.parameters()}
    y = model.stem(F.avg_pool2d(IMAGES, 8).flatten(1))
    for _ in range(2):  # deletion of one use leaves the two others
        y = y + torch.relu(model.block(model.norm(y)))
    for i in range(3):
        assert torch.equal(run(chain.without(i), IMAGES), model.head(y).detach())


def test_branch_that_overwrites_its_input():
    """The sum is relu(y) + branch(relu(y)): the stream itself is rectified, in the deleted unit as well."""
    model = fresh(InPlaceBranch)
    chain = unravel(model, IMAGES)
    chain.verify(IMAGES)
    assert torch.equal(run(chain, IMAGES), run(model, IMAGES))
    lesioned = fresh(InPlaceBranch)
    lesioned.layers[1].append(nn.Threshold(float("inf"), 0.0))  # zero for every finite number
    assert torch.equal(run(chain.without(1), IMAGES), run(lesioned, IMAGES))


def test_a_value_of_the_first_unit_that_a_later_branch_adds_is_the_stems():
    model = fresh(Overlapping)
    with pytest.warns(UserWarning, match=r"2 of 3 additions became units; the rest lie in the branch of end \(1\)"):
        chain = unravel(model, IMAGES)
    assert any("the stem computes them" in note for note in chain.notes)
    table = chain.verify(IMAGES).set_index("check")
    assert table.loc["deletion", "compared"] == 2
    assert table["difference"].max() < 1e-5


def test_skip_around_all_the_other_blocks():
    model = fresh(LongSkip)
    chain = unravel(model, IMAGES)
    chain.verify(IMAGES)
    assert len(residual_units(chain)) == 3
    assert any("3 of 4 additions became units; the rest lie in the head" in note for note in chain.notes)
    assert torch.equal(run(chain, IMAGES), run(model, IMAGES))
    first = y = model.stem(F.avg_pool2d(IMAGES, 8).flatten(1))
    for i in (0, 2):
        y = y + model.layers[i](y)
    assert torch.equal(run(chain.without(1), IMAGES), model.head(first + model.end(y)).detach())


# ---------------------------------------------------------------- what is refused, and what is said


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (VGG, r"(?is)no (residual|skip)"),
        (DenseNet, r"(?is)(concat|torch\.cat|DenseNet)"),
        (UNet, r"(?is)(concat|torch\.cat|U-Net)"),
        (DataDependent, r"(?is)(control flow|depends on)"),
        (Counting, r"(?is)calls"),
    ],
)
def test_refusals_say_what_was_found(build, words):
    model = fresh(build)
    before = everything(model)
    with pytest.raises((ValueError, TypeError), match=words):
        unravel(model, IMAGES)
    assert everything(model) == before


def test_two_inputs_are_refused():
    model = fresh_two_inputs()
    with pytest.raises((ValueError, TypeError), match=r"(?is)(two|second|several|input|argument).*\bt\b|\bt\b.*input"):
        unravel(model, IMAGES)


def fresh_two_inputs() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TwoInputs().eval()


def test_training_mode_is_warned_of():
    model = fresh(CASES["cifar-resnet"].build).train()
    before = everything(model)
    with pytest.warns(UserWarning, match=r"(?i)training mode.*eval"):
        unravel(model, IMAGES)
    assert everything(model) == before


# ---------------------------------------------------------------- a reader's own blocks, by registration and by hand


class ReadersBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.f, self.g = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return torch.sigmoid(self.g(x)) * 2 + torch.tanh(self.f(self.norm(x)))


class ReadersNet(nn.Module):
    def __init__(self, block=ReadersBlock):
        super().__init__()
        self.stem = nn.Linear(3 * 16, 8)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        y = self.stem(F.avg_pool2d(x, 8).flatten(1))
        for layer in self.layers:
            y = layer(y)
        return self.head(y)


class Doubled(nn.Module):
    def forward(self, x):
        return torch.sigmoid(x) * 2


def test_block_registered_in_three_lines(block_units):
    @block_units.register
    def _(block: ReadersBlock) -> list[Unit]:
        return [Unit(nn.Sequential(block.norm, block.f, nn.Tanh()), nn.Sequential(block.g, Doubled()))]

    model = fresh(ReadersNet)
    chain = unravel(model, IMAGES)
    assert len(chain) == 3
    chain.verify(IMAGES)
    assert torch.equal(run(chain, IMAGES), run(model, IMAGES))
    y = model.stem(F.avg_pool2d(IMAGES, 8).flatten(1))
    y = model.layers[2](model.layers[1](torch.sigmoid(model.layers[0].g(y)) * 2))
    assert torch.equal(run(chain.without(0), IMAGES), model.head(y).detach())


class Wrong(nn.Module):
    """A block whose forward already holds the sum."""

    def __init__(self, width=8):
        super().__init__()
        self.f = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


def test_branch_that_already_contains_the_stream_is_named(block_units):
    @block_units.register
    def _(block: Wrong) -> list[Unit]:
        return [Unit(block)]

    model = fresh(ReadersNet, Wrong)
    with pytest.raises((ValueError, AssertionError), match=r"(?s)unit 0\b"):
        unravel(model, IMAGES).verify(IMAGES)


def test_only_the_wrong_unit_is_named():
    model = fresh(CASES["cifar-resnet"].build)
    chain = unravel(model, IMAGES)
    chain.units[4].branch = nn.Sequential(chain.units[4].branch, nn.Hardtanh(-0.1, 0.1))
    with pytest.raises((ValueError, AssertionError), match=r"(?s)unit 4\b"):
        chain.verify(IMAGES)


def test_units_said_by_hand():
    model = fresh(Tied)

    class Holder(nn.Module):  # blocks that are only their branches: the net itself adds
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3 * 16, 8), nn.Linear(8, 10)
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

        def forward(self, x):
            y = self.stem(F.avg_pool2d(x, 8).flatten(1))
            for layer in self.layers:
                y = y + layer(y)
            return self.head(y)

    model = fresh(Holder)
    chain = unravel(model, IMAGES)
    assert len(chain) == 3
    assert torch.equal(run(chain, IMAGES), run(model, IMAGES))
    block = fresh(CASES["cifar-resnet"].build)
    chain = unravel(block, IMAGES, units="layer*.*")
    assert len(chain) == 6
    assert torch.equal(run(chain, IMAGES), run(block, IMAGES))


# ---------------------------------------------------------------- kinds of input, of labels and of numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cifar-resnet", "torchvision vit", "decoder", "timm convnext", "transformers llama"])
def test_half_precision(name, dtype):
    case = CASES[name]
    model = copy.deepcopy(built(name)).to(dtype)
    x = case.inputs(dtype)
    chain = unravel(model, x)
    expected = run(model, x)
    assert expected.dtype == dtype
    agree(run(chain, x), expected, 0)
    chain.verify(x)
    agree(run(chain.without(1), x), run(edited(case, model, [1], value=0), x), 0)
    table = delete_each(chain, [(x, labels_for(expected))])
    assert np.isfinite(table.loss).all()


@pytest.mark.parametrize("name", ["decoder", "transformers gpt2", "transformers llama"])
def test_other_lengths_of_text(name):
    case, model, chain = CASES[name], model_of(name), chain_of(name)
    x = case.inputs()[:, :7]
    agree(run(chain, x), run(model, x), 0)


@pytest.mark.parametrize("name", ["cifar-resnet", "torchvision resnet18", "timm convnext"])
def test_other_sizes_of_images(name):
    model, chain = model_of(name), chain_of(name)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    if name == "cifar-resnet":
        x = x[:, :, :48, :48]
    if chain.traced_by == "torch.export":  # the symbolic tracer of older versions of PyTorch cannot pool
        with pytest.raises(ValueError, match=r"traced this chain for \(any, 3, 32, 32\): unravel the model"):
            chain(x)
    else:
        agree(run(chain, x), run(model, x), 0)


@pytest.mark.parametrize("name", ["transformers gpt2", "transformers llama"])
def test_batches_of_dicts(name):
    case, model = CASES[name], model_of(name)
    ids = case.inputs()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    chain = unravel(model, batch)
    for m in (mask, mask.flip(0)):  # the mask of the batch counts, not that of the example
        batch = {"input_ids": ids, "attention_mask": m}
        with torch.no_grad():
            expected = model(**batch).logits
        agree(run(chain, batch), expected, 0)
    y = labels_for(expected)
    y[mask == 0] = -100
    table = delete_each(chain, [(batch, y)])
    for k, i in enumerate(residual_units(chain)):
        with torch.no_grad():
            logits = edited(case, model, [k], value=0)(**batch).logits
        row = table.set_index("unit").loc[i]
        assert row.loss == pytest.approx(loss(logits, y).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["decoder"])
def test_ignored_labels(name):
    case, model, chain = CASES[name], model_of(name), chain_of(name)
    x = case.inputs()
    y = labels_for(run(model, x))
    y[:, ::3] = -100
    table = delete_each(chain, [(x, y)])
    for k, i in enumerate(residual_units(chain)):
        logits = run(edited(case, model, [k], value=0), x)
        row = table.set_index("unit").loc[i]
        assert row.loss == pytest.approx(loss(logits, y).item(), rel=1e-4)
        kept = y != -100
        assert row.error == pytest.approx((logits.argmax(-1) != y)[kept].double().mean().item())


def test_any_scalar_loss():
    case, model, chain = CASES["cifar-resnet"], model_of("cifar-resnet"), chain_of("cifar-resnet")
    x = case.inputs()
    target = torch.randn(2, 10, generator=torch.Generator().manual_seed(4))
    table = delete_each(chain, [(x, target)], loss=F.mse_loss)
    for k, i in enumerate(residual_units(chain)):
        expected = F.mse_loss(run(edited(case, model, [k], value=0), x), target).item()
        row = table.set_index("unit").loc[i]
        assert row.loss == pytest.approx(expected, rel=1e-5)
    assert isinstance(table, pd.DataFrame)
