"""Batches: every form of one works in every function, on the chain's device and in its type, and poisons nothing."""

from collections import UserDict, namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import images, mix_modes, small, snapshot
from torch import nn
from unravelling import (
    Chain,
    Dataset,
    Split,
    Unit,
    delete_each,
    delete_random,
    digits,
    evaluate,
    reestimate_batch_norm,
    reorder,
    resnet,
)
from unravelling.batches import eval_mode, inputs_and_labels, iterate, move
from unravelling.ensemble import predictions, random_subnetworks
from unravelling.lesion import evaluate_variants, variant_logits

Pair = namedtuple("Pair", "image target")
X, Y = images(6)
FORMS = {
    "tuple": lambda: (X, Y),
    "list": lambda: [X, Y],
    "loader's": lambda: next(iter(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 6))),
    "named": lambda: Pair(X, Y),
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "other arrays": lambda: (np.flip(np.flip(X.numpy(), 3).copy(), 3), Y.numpy().astype(">i8")),  # in other layouts
    "float64": lambda: (X.double(), Y),
    "in a list": lambda: [(X, Y)],
    "lists in a list": lambda: [[X[:4], Y[:4]], [X[4:], Y[4:]]],
    "generator": lambda: ((X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4)),
    "loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 4),
    "dict": lambda: {"x": X, "labels": Y},
    "dicts": lambda: [UserDict(x=X[:3], label=Y[:3]), {"x": X[3:], "labels": Y[3:]}],
}


class FromDict(nn.Module):
    """A stem that takes a tensor, or a dict with one."""

    def __init__(self, stem):
        super().__init__()
        self.stem = stem

    def forward(self, x):
        return self.stem(x["x"] if isinstance(x, dict) else x)


def chain(dtype=torch.float32):
    made = small("pre", dtype)
    made.stem = FromDict(made.stem).train(made.stem.training)
    return made


FUNCTIONS = {
    "evaluate": lambda chain, data: pd.DataFrame([evaluate(chain, data)]),
    "delete_each": delete_each,
    "delete_random": lambda chain, data: delete_random(chain, data, 2, 3),
    "reorder": lambda chain, data: reorder(chain, data, 1, 3),
    "evaluate_variants": lambda chain, data: pd.DataFrame(evaluate_variants(chain, data, [range(6)])[1]),
    "variant_logits": lambda chain, data: pd.DataFrame(variant_logits(chain, data, [range(6)])[0][0]),
    "predictions": lambda chain, data: pd.DataFrame(predictions([chain], data)[0][0]),
    "random_subnetworks": lambda chain, data: pd.DataFrame(random_subnetworks(chain, data, 4, 1)[0][0]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_form_of_a_batch_gives_the_same(function, form):
    expected = FUNCTIONS[function](chain(), [(X, Y)])
    pd.testing.assert_frame_equal(FUNCTIONS[function](chain(), FORMS[form]()), expected, rtol=1e-4, atol=1e-5)
    double = FUNCTIONS[function](chain(torch.float64), FORMS[form]())
    pd.testing.assert_frame_equal(double, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", [*FORMS, "bare tensor", "bare tensors", "dict without labels"])
def test_statistics_are_reestimated_from_every_form(form):
    forms = FORMS | {
        "bare tensor": lambda: X,
        "bare tensors": lambda: [X],
        "dict without labels": lambda: {"x": X},
    }
    batches = {"lists in a list": [4, 2], "generator": [2, 2, 2], "loader": [4, 2], "dicts": [3, 3]}.get(form, [6])
    expected = reestimate_batch_norm(chain(), [(x, None) for x in X.split(batches)]).state_dict()
    found = reestimate_batch_norm(chain(), forms[form]()).state_dict()
    assert any(not torch.equal(tensor, found[name]) for name, tensor in chain().state_dict().items())
    assert all(torch.allclose(tensor, found[name], atol=1e-6) for name, tensor in expected.items())


def test_a_split_is_a_source_of_batches():
    whole = digits().validation.take(torch.arange(30))
    expected = reestimate_batch_norm(small("pre"), whole.batches(500)).state_dict()
    found = reestimate_batch_norm(small("pre"), whole).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


class Caching(torch.utils.data.Dataset):
    """Makes its items when they are first asked for, and keeps them."""

    def __init__(self):
        self.items = {}

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i not in self.items:
            self.items[i] = X[i] * 1, Y[i] * 1
        return self.items[i]


@pytest.mark.parametrize("function", [*FUNCTIONS, "reestimate_batch_norm"])
def test_a_dataset_that_keeps_its_items_can_be_trained_on_afterwards(function):
    dataset, network = Caching(), chain()
    loader = torch.utils.data.DataLoader(
        dataset, 3, collate_fn=lambda items: [torch.stack(p) for p in zip(*items, strict=True)]
    )
    modes = []

    def watched():
        for batch in loader:
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), network.training))
            yield batch

    network.train()
    (FUNCTIONS | {"reestimate_batch_norm": reestimate_batch_norm})[function](network, watched())
    assert set(modes) == {(False, True, True)}
    x, _ = dataset[0]
    assert not x.is_inference()
    weight = torch.ones(1, requires_grad=True)
    (weight * x).sum().backward()  # an inference tensor cannot be saved for backward
    assert weight.grad is not None


# ---------------------------------------------------------------- device and type


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_move_brings_floats_to_the_networks_type_and_leaves_the_rest(dtype):
    module = nn.Linear(2, 2).to(dtype)
    for given in (torch.float16, torch.float32, torch.float64):
        assert move(torch.ones(3, dtype=given), module).dtype == dtype
    for given in (torch.int64, torch.bool, torch.uint8):
        assert move(torch.ones(3, dtype=given), module).dtype == given
    assert move(np.ones(3), module).dtype == dtype
    assert move(torch.ones(3, dtype=torch.float64), nn.ReLU()).dtype == torch.float64, "no parameters, no type"
    nested = {"a": [torch.ones(1).double(), "text"], "b": (None, 3)}
    moved = move(nested, module)
    assert moved["a"][0].dtype == dtype
    assert (moved["a"][1], moved["b"]) == ("text", (None, 3))


def test_move_keeps_named_tuples():
    moved = move(Pair(torch.ones(1).double(), Pair(1, torch.ones(1))), nn.Linear(1, 1))
    assert isinstance(moved, Pair)
    assert isinstance(moved.target, Pair)
    assert (moved.image.dtype, moved.target.image) == (torch.float32, 1)


def test_a_type_that_the_device_lacks_does_not_reach_it():
    class Elsewhere(nn.Linear):
        """A module on a device that tensors cannot be copied to."""

    module = Elsewhere(2, 2).to("meta")
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "meta":
                seen.append(args[0].dtype)
            return out

    with Watch():
        assert move(torch.ones(3, dtype=torch.float64), module).device.type == "meta"
    assert seen == [torch.float32]


# ---------------------------------------------------------------- labels


class Shifting(nn.Module):
    shift_labels = True

    def forward(self, x):
        return x["x"]


def test_labels_that_are_tokens_are_shifted_where_the_stem_says_so():
    model = Chain(Shifting(), [Unit(nn.Identity())], nn.Identity())
    tokens = torch.tensor([[3, 1, 2], [5, 4, 0]])
    shifted = [[1, 2, -100], [4, 0, -100]]
    assert inputs_and_labels(model, {"x": tokens, "labels": tokens})[1].tolist() == shifted
    assert inputs_and_labels(model, (tokens, tokens))[1].tolist() == tokens.tolist()
    assert inputs_and_labels(model, {"x": tokens, "label": tokens[:, 0]})[1].tolist() == [3, 5]
    model.stem.shift_labels = False
    assert inputs_and_labels(model, {"x": tokens, "labels": tokens})[1].tolist() == tokens.tolist()
    assert [*inputs_and_labels(model, {"x": tokens, "labels": tokens})[0]] == ["x"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "there are no batches: an iterator can be used only once"),
        (iter(()), ValueError, "there are no batches: an iterator can be used only once"),
        ([(X[:0], Y[:0])], ValueError, "a batch holds no images: leave it out"),
        ([(X, Y, X)], ValueError, "a batch is a tuple of 3: expected a pair of inputs and labels, or a dict"),
        ([X], ValueError, "a batch is a Tensor: expected a pair"),
        (X, ValueError, "a batch is a Tensor: expected a pair"),
        ([None], ValueError, "a batch is a NoneType: expected a pair"),
        ({"x": X, "mask": Y}, ValueError, "the batch has x, mask, but no labels: put them under 'labels'"),
        (None, TypeError, "a NoneType holds no batches: pass a split, or batches"),
        (Dataset("d", None, None, None, ()), TypeError, "a Dataset holds no batches: pass one of its splits, such as"),
        (Split(X[:0].byte(), Y[:0], torch.zeros(1), torch.ones(1)), ValueError, "a batch holds no images"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_holds_no_batches(function, data, error, message):
    network = chain()
    before = snapshot(network)
    with pytest.raises(error, match=f"^{message}"):
        FUNCTIONS[function](network, data if not hasattr(data, "__next__") else iter(()))
    assert snapshot(network) == before


@pytest.mark.parametrize("data", [[], iter(()), (batch for batch in ()), [X[:0]]])
def test_no_statistics_without_images(data):
    with pytest.raises(ValueError, match=r"^(there are no batches|a batch holds no images)"):
        reestimate_batch_norm(resnet(8, width=2, in_channels=1), data)


def test_an_exhausted_loop_is_no_silent_ruin():
    network, batches = chain(), iter([(X, Y)])
    reestimate_batch_norm(network, batches)
    with pytest.raises(ValueError, match="an iterator can be used only once"):
        reestimate_batch_norm(network, batches)


def test_iterate_is_lazy():
    def endless():
        while True:
            yield X, Y

    first, _ = next(iterate(chain(), endless()))
    assert torch.equal(first, X)


def test_eval_mode_gives_every_part_its_mode_back_even_after_an_error():
    network = small("post")
    mix_modes(network)
    before = snapshot(network)
    with pytest.raises(ZeroDivisionError), eval_mode(network):  # noqa: PT012
        assert not any(part.training for part in network.modules())
        raise ZeroDivisionError
    assert snapshot(network) == before


def test_two_batches_of_images_in_a_list_are_no_images_with_labels():
    chain, (x, _) = small("pre"), images(8)
    anew = [reestimate_batch_norm(chain, [x[:4], x[4:]]), reestimate_batch_norm(chain, iter([x[:4], x[4:]]))]
    for name, buffer in anew[0].named_buffers():
        assert torch.equal(buffer, anew[1].get_buffer(name))


def test_as_many_classes_as_rows_of_pixels():
    """Segmentation has its classes second, whether or not the sizes can tell."""
    logits, y = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32).view(2, 4, 4) % 4
    network = nn.Identity()
    assert evaluate(network, [(logits, y)])["loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item())
