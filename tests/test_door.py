"""What is not meant is refused where it comes in: in words, by the name of the argument, before a table is made."""

import importlib
import inspect
import math
import pkgutil
import re
from types import GeneratorType

import numpy as np
import pandas as pd
import pytest
import torch
import unravelling
from helpers import images, small, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from unravelling import (
    RECIPES,
    Chain,
    Dataset,
    Recipe,
    Split,
    Unit,
    canonical_split,
    cifar10,
    delete_each,
    delete_random,
    digits,
    evaluate,
    fit,
    gradient_by_length,
    gradient_norms,
    mean_length,
    path_gradients,
    path_norms,
    plain,
    reestimate_batch_norm,
    reorder,
    replace_branches,
    resnet,
    sample_path_gradients,
    save,
    spectrum,
    taylor_importance,
    vgg,
    weight_spectrum,
)
from unravelling.batches import inputs_and_labels, iterate
from unravelling.chain import check_number, listed
from unravelling.data import augment
from unravelling.ensemble import average, disagreement, predictions, random_subnetworks, remove_members
from unravelling.lesion import evaluate_variants, variant_logits
from unravelling.nets import build
from unravelling.paths import cross_entropy, length_distribution, surviving
from unravelling.plots import chain_diagram, seed_lines
from unravelling.stats import error_difference, paired_bootstrap, seed_band, wilson
from unravelling.wording import error

X, Y = images(4)
CHAIN = small("pre")
PATHS = {
    gradient_by_length: {},
    path_gradients: {},
    mean_length: {},
    gradient_norms: {},
    weight_spectrum: {},
    path_norms: {"repeats": 2},
    sample_path_gradients: {"lengths": [1], "samples": 1},
}
"""Functions of a chain, inputs and labels, and the arguments that they need besides."""


def nan_at(i):
    x = X.clone()
    x[i] = math.nan
    return x


WRONG = {
    "a data set": (Dataset("d", None, None, None, ()), Y, TypeError, r"x, the inputs, is a Dataset without a tensor"),
    "a split": (digits().test, Y, TypeError, r"x, the inputs, is a Split without a tensor: expected a batch"),
    "a loader": (torch.utils.data.DataLoader([1]), Y, TypeError, r"x, the inputs, is a DataLoader without a tensor"),
    "a split alone": (digits().test, None, ValueError, r"a batch is a Split: expected a pair of inputs and labels"),
    "nothing": (None, Y, TypeError, r"x, the inputs, is a NoneType without a tensor: expected a batch"),
    "a text": ("x", Y, TypeError, r"x, the inputs, is a str without a tensor"),
    "an iterator": (iter([X]), Y, TypeError, r"x, the inputs, is a list_iterator without a tensor"),
    "an empty list": ([], Y, TypeError, r"x, the inputs, is a list without a tensor"),
    "no images": (X[:0], Y[:0], ValueError, r"a batch holds no images: leave it out"),
    "NaN": (nan_at(2), Y, ValueError, r"x, the inputs, hold NaN: leave such images out"),
    "fewer labels": (X, Y[:3], ValueError, r"there are 4 inputs, but 3 labels: expected one y for each x"),
    "a label below 0": (X, Y - 11, ValueError, r"there is a label -\d+: expected 0 to 9, or -100 to ignore it"),
    "-1": (X, torch.full_like(Y, -1), ValueError, r"there is a label -1: expected 0 to 9, or -100 to ignore it"),
    "a label too many": (X, Y * 0 + 10, ValueError, r"there is a label 10: expected 0 to 9, or -100 to ignore it"),
    "nothing counts": (X, Y * 0 - 100, ValueError, r"every label is -100, which counts for nothing"),
    "labels with a fraction": (X, Y + 0.5, TypeError, r"y, the labels, has the type torch.float32: .*y\.long\(\)"),
    "a list of labels": (X, Y.tolist(), TypeError, r"y, the labels, is a list: expected a tensor of classes"),
    "labels of another shape": (
        X,
        Y[:, None],
        ValueError,
        r"y, the labels, have shape \(4, 1\) beside logits of shape",
    ),
    "bytes": (X.byte(), Y, ValueError, r"the network cannot take x, inputs of shape \(4, 1, 8, 8\) uint8: "),
    "colours": (
        X.repeat(1, 3, 1, 1),
        Y,
        ValueError,
        r"the network cannot take x, inputs of shape \(4, 3, 8, 8\) float32",
    ),
    "another rank": (
        X.flatten(),
        Y.repeat(64),
        ValueError,
        r"the network cannot take x, inputs of shape \(256,\) float32",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("function", PATHS)
def test_inputs_and_labels_that_do_not_fit(function, kind):
    x, y, error, message = WRONG[kind]
    before = snapshot(CHAIN)
    with pytest.raises(error, match=f"^{message}"):
        function(CHAIN, x, y, **PATHS[function])
    assert snapshot(CHAIN) == before


@pytest.mark.parametrize("function", PATHS)
def test_what_fits_in_other_clothes(function):
    expected = function(CHAIN, X, Y, **PATHS[function])
    for x, y in [(X.numpy(), Y.numpy()), (X.double(), Y), (X, Y.int()), (X, Y.to(torch.uint8))]:
        found = function(CHAIN, x, y, **PATHS[function])
        assert str(found) == str(expected)


@pytest.mark.parametrize("function", PATHS)
def test_whether_the_caller_wants_gradients_does_not_matter(function):
    expected = str(function(CHAIN, X, Y, **PATHS[function]))
    with torch.no_grad():
        assert str(function(CHAIN, X, Y, **PATHS[function])) == expected
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert str(function(CHAIN, X.clone(), Y.clone(), **PATHS[function])) == expected


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize(
    ("chain", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, r"chain is a Linear: expected a Chain, such as unravel\(model, x\) returns"),
        ("resnet110", TypeError, r"chain is a str: expected a Chain"),
        (
            small("pre").to("meta"),
            ValueError,
            r"the network's weights are on the device meta, where they have no values",
        ),
    ],
)
def test_what_is_no_chain_or_has_no_weights(function, chain, error, message):
    with pytest.raises(error, match=f"^{message}"):
        function(chain, X, Y, **PATHS[function])


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (None, TypeError, "loss is a NoneType: expected a function of logits and labels"),
        (lambda logits, y: 1.0, TypeError, "the loss is a float without a gradient: compute it from the logits"),
        (lambda logits, y: logits.detach().sum(), TypeError, "the loss is a Tensor without a gradient"),
        (
            lambda logits, y: logits.sum() * math.nan,
            ValueError,
            "the loss is NaN or infinite: look for NaN in the network's weights",
        ),
        (lambda logits, y: logits, ValueError, r"the loss must be a real scalar, not \(4, 10\) of torch\.float32"),
        (lambda logits, y: logits.sum() * 1j, ValueError, r"the loss must be a real scalar, not \(\) of torch\.c"),
        (nn.CrossEntropyLoss, ValueError, "the loss cannot take logits and labels of shape"),  # the class itself
        (
            lambda logits, y: sum(p.sum() for p in CHAIN.parameters()) + logits.detach().sum(),
            ValueError,
            "the loss has no gradient at the logits: compute it from them",
        ),
        (
            lambda logits: logits.sum(),
            ValueError,
            r"the loss cannot take logits and labels of shape \(4, 10\) float32, \(4,\) int64: .* 1 positional",
        ),
        (lambda logits, y: nn.CrossEntropyLoss()(logits, y[:3]), ValueError, "the loss cannot take logits and labels"),
        (lambda logits, y: {}["weights"], ValueError, "the loss cannot take logits and labels of shape .*: 'weights'"),
        (lambda logits, y: 1 / 0, ValueError, "the loss cannot take logits and labels of shape .*: division by zero"),
    ],
)
def test_losses_that_are_none(function, loss, error, message):
    with pytest.raises(error, match=f"^{message}"):
        function(CHAIN, X, Y, loss=loss, **PATHS[function])


def test_weights_that_are_nan():
    chain = small("pre")
    nn.init.constant_(chain.units[3].branch[2].weight, math.nan)
    with pytest.raises(ValueError, match=r"^the network's states are NaN or infinite: look at weights"):
        gradient_by_length(chain, X, Y)


def test_a_failure_within_the_network_keeps_its_cause():
    with pytest.raises(ValueError, match=r"^the network cannot take x") as caught:
        gradient_by_length(CHAIN, X.repeat(1, 3, 1, 1), Y)
    assert isinstance(caught.value.__cause__, RuntimeError)

    class Full(nn.Module):
        def forward(self, y):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        gradient_by_length(Chain(Full(), [], nn.Identity()), X, Y)


CALLS = [
    (lambda: gradient_by_length(CHAIN, X, Y, at="top"), ValueError, "at is 'top': the gradient is taken at"),
    (lambda: gradient_by_length(CHAIN, X, Y, max_length=7), ValueError, "max_length 7 makes no sense"),
    (lambda: gradient_by_length(CHAIN, X, Y, max_length=-1), ValueError, "max_length must be at least 0, not -1"),
    (lambda: gradient_by_length(CHAIN, X, Y, max_length=1.5), TypeError, "max_length must be a whole number, not 1.5"),
    (lambda: gradient_by_length(CHAIN, X, Y, dtype="float64"), TypeError, "dtype is 'float64': expected a floating"),
    (
        lambda: gradient_by_length(CHAIN, X, Y, dtype=torch.int64),
        TypeError,
        "dtype is torch.int64: expected a floating",
    ),
    (lambda: sample_path_gradients(CHAIN, X, Y, 3, 2), TypeError, "lengths is 3: expected several, such as a list"),
    (lambda: sample_path_gradients(CHAIN, X, Y, [], 2), ValueError, "lengths is empty: expected at least one member"),
    (lambda: sample_path_gradients(CHAIN, X, Y, [1.5], 2), TypeError, "lengths must be a whole number, not 1.5"),
    (lambda: sample_path_gradients(CHAIN, X, Y, [7], 2), ValueError, "no path has length 7: this chain's have lengths"),
    (lambda: sample_path_gradients(CHAIN, X, Y, [1], 2.5), TypeError, "samples must be a whole number, not 2.5"),
    (lambda: sample_path_gradients(CHAIN, X, Y, [1], 1, seed=None), TypeError, "seed must be a whole number, not None"),
    (lambda: path_norms(CHAIN, X, Y, 0), ValueError, "repeats must be at least 2, not 0"),
    (lambda: path_norms(CHAIN, X, Y, 2, seed=-1), ValueError, "seed must be at least 0, not -1"),
    (lambda: path_norms(CHAIN, X, Y, 2, seed=2**64), ValueError, "seed must be less than 2^63, not 184467440737"),
    (lambda: canonical_split(CHAIN, X, 1), ValueError, "samples must be at least 2, not 1"),
    (lambda: canonical_split(CHAIN, nan_at(0)), ValueError, "x, the inputs, hold NaN"),
    (lambda: canonical_split(resnet(8, in_channels=1), X), ValueError, "batch norm is in training mode"),
    (
        lambda: spectrum(np.ones((3, 2))),
        TypeError,
        "gradients is a ndarray: expected the tensor from gradient_by_length",
    ),
    (lambda: spectrum(torch.ones(3)), ValueError, "gradients has shape (3,), or holds NaN or inf: expected"),
    (lambda: spectrum(nan_at(0)), ValueError, "gradients has shape (4, 1, 8, 8), or holds NaN"),
    (lambda: length_distribution(-1), ValueError, "n must be at least 0, not -1"),
    (lambda: length_distribution(True), TypeError, "n must be a whole number, not True"),
    (lambda: surviving(3, 0.5), TypeError, "d must be a whole number, not 0.5"),
    (lambda: surviving(3, 4), ValueError, "cannot delete 4 of 3 units"),
    (lambda: cross_entropy(torch.ones(3), torch.tensor(0)), ValueError, "y, the labels, have shape () beside logits"),
    (lambda: Unit(3), TypeError, "branch is a int: expected Module"),
    (lambda: Unit(nn.ReLU(), post=abs), TypeError, "post is a builtin_function_or_method: expected Module"),
    (lambda: Chain(nn.ReLU(), [nn.ReLU()], nn.ReLU()), TypeError, "unit is a ReLU: expected Unit"),
    (lambda: Chain(nn.ReLU(), 3, nn.ReLU()), TypeError, "units is a int: expected Iterable"),
    (lambda: Chain(None, [], nn.ReLU()), TypeError, "stem is a NoneType: expected Module"),
    (lambda: CHAIN.without("a"), IndexError, "unit 'a' does not exist: this chain has units 0 to 5"),
    (lambda: CHAIN.without([1, 2]), IndexError, "unit [1, 2] does not exist: this chain has units 0 to 5"),
    (lambda: CHAIN.without(math.nan), IndexError, "unit nan does not exist"),
    (lambda: CHAIN.reordered(3), TypeError, "order is 3: expected several, such as a list of one"),
    (lambda: CHAIN.reordered(list("abcdef")), IndexError, "unit 'a' does not exist"),
    (lambda: predictions(CHAIN, [(X, Y)]), TypeError, "chains is resnet14: 6 units"),
    (lambda: predictions([nn.ReLU()], [(X, Y)]), TypeError, "chain is a ReLU: expected a Chain"),
    (lambda: predictions([CHAIN, CHAIN], iter([(X, Y)])), ValueError, "there are no batches: an iterator can be used"),
    (
        lambda: predictions([CHAIN, resnet(8, in_channels=1, classes=11).eval()], [(X, Y)]),
        ValueError,
        "the members do not have the same classes",
    ),
    (lambda: average([]), ValueError, "logits has shape (0,) and type float64: expected (members, images, K)"),
    (lambda: disagreement(np.full((2, 3, 4), np.nan)), ValueError, "logits has shape (2, 3, 4) and type float64"),
    (
        lambda: remove_members(np.ones((3, 2, 2)), Y, [1]),
        ValueError,
        "labels is array([6, 3, 6, 0]): expected a whole number for each of 2",
    ),
    (lambda: remove_members(np.ones((3, 2, 2)), [0, 1], 1), TypeError, "removed is 1: expected several"),
    (lambda: remove_members(np.ones((3, 2, 2)), [0, 1], [0.5]), TypeError, "removed must be a whole number, not 0.5"),
    (lambda: random_subnetworks(CHAIN, [(X, Y)], 1.5, 2), TypeError, "active must be a whole number, not 1.5"),
    (lambda: resnet("20"), TypeError, "depth must be a whole number, not '20'"),
    (lambda: plain(20, width=0), ValueError, "width must be at least 1, not 0"),
    (lambda: vgg(15, image_size=-8), ValueError, "image_size must be at least 1, not -8"),
    (lambda: resnet(8, seed=0.5), TypeError, "seed must be a whole number, not 0.5"),
    (lambda: build(20), ValueError, "unknown network 20: expected a name such as resnet110"),
    (lambda: build("resnet20", ["digits"]), ValueError, "unknown dataset ['digits']: expected one of digits, cifar10"),
    (lambda: wilson(math.nan, 10), ValueError, "counts must be whole numbers, not shares, between 0 and 10 images"),
    (lambda: wilson("3", 10), TypeError, "count is '3': expected numbers"),
    (lambda: wilson([[1], [1, 2]], 10), TypeError, "count is no array of numbers: "),
    (lambda: wilson(1, None), TypeError, "images is None: expected numbers"),
    (lambda: error_difference("a", 0.1, 10), TypeError, "first is 'a': expected numbers"),
    (lambda: error_difference(0.1, math.nan, 10), ValueError, "counts must be whole numbers, not shares"),
    (lambda: paired_bootstrap([]), ValueError, "difference has shape (0,): expected at least one value, (…, images)"),
    (lambda: paired_bootstrap(["a"]), TypeError, "difference is ['a']: expected numbers"),
    (lambda: paired_bootstrap([1.0], resamples=0), ValueError, "resamples must be at least 1, not 0"),
    (lambda: paired_bootstrap([1.0], seed=-1), ValueError, "seed must be at least 0, not -1"),
    (lambda: seed_band([1], "k", "error"), TypeError, "table is a list: expected a DataFrame"),
    (
        lambda: seed_band(pd.DataFrame({"k": [1]}), "k", "e"),
        ValueError,
        "there is no column 'e' in the table: it has k",
    ),
    (lambda: seed_band(pd.DataFrame({"k": [1], "e": ["a"]}), "k", "e"), TypeError, "the column e is"),
    (lambda: check_number(3, trials=2), ValueError, "trials must be at least 3, not 2"),
    (lambda: listed(k=iter(())), ValueError, "k is empty: expected at least one member"),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_arguments_that_make_no_sense(number):
    call, error, message = CALLS[number]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call()


def test_missing_values_are_no_seeds():
    table = pd.DataFrame({"k": 1, "e": [1.0, 3.0, math.nan]})
    band = seed_band(table, "k", "e")
    assert band.equals(seed_band(table.dropna(), "k", "e"))
    assert band["seeds"].tolist() == [2]
    assert seed_band(table.astype(object), "k", "e")["mean"].tolist() == [2]


def test_numbers_of_other_kinds_will_do():
    assert check_number(k=np.int64(3)) == 3
    assert CHAIN.without(np.int64(3), 2.0, torch.tensor(1)).units[3].is_deleted
    assert repr(CHAIN.reordered(torch.tensor([1, 0, 2, 3, 4, 5]))) == repr(CHAIN)
    assert wilson([1, 2], 4)[0].shape == (2,)


# ---------------------------------------------------------------- True or False

NETWORKS = pd.DataFrame({"seed": [0, 1], "test_error": 0.1, "test_images": 500})
FLAGS = {
    Unit: {"branch": nn.ReLU()},
    resnet: {"depth": 8},
    plain: {"depth": 8},
    vgg: {},
    gradient_by_length: {"chain": CHAIN, "x": X, "y": Y},
    weight_spectrum: {"chain": CHAIN, "x": X, "y": Y},
    spectrum: {"gradients": X},
    inputs_and_labels: {"chain": CHAIN, "batch": (X, Y)},
    iterate: {"chain": CHAIN, "data": (X, Y)},
    augment: {"images": digits().test.images[:2], "generator": torch.Generator()},
    Split.shuffled: {"self": digits().test, "size": 2, "generator": torch.Generator()},
    cifar10: {"root": "."},
    Recipe: {"name": "a", "epochs": 1},
    fit: {"chain": CHAIN, "data": digits(), "recipe": RECIPES["digits"], "stop_after": 0},
    save: {"chain": CHAIN.without(0), "path": "a.safetensors"},
    seed_lines: {"table": NETWORKS, "x": "seed", "value": "test_error"},
    chain_diagram: {},
    error: {"table": NETWORKS},
}
"""Whatever takes an option that is True or False, and the arguments that it needs besides."""


def flags():
    """Every such option of what is public, by the signatures of all modules but those that tracing consists of."""
    for name in [module.name for module in pkgutil.iter_modules(unravelling.__path__, "unravelling.")]:
        module = importlib.import_module(name)
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == name]
        own += [value for kind in own if inspect.isclass(kind) for value in vars(kind).values()]
        for function in own:
            if callable(function) and not function.__name__.startswith("_"):
                for parameter in inspect.signature(function).parameters.values():
                    if parameter.annotation in ("bool", "bool | None"):
                        yield function, parameter.name


@pytest.mark.parametrize("wrong", ["no", 0, 1, np.array([True])])
@pytest.mark.parametrize(("function", "name"), list(flags()))
def test_what_is_neither_true_nor_false_is_refused(function, name, wrong):
    def call():
        result = function(**FLAGS[function] | {name: wrong})
        return next(result) if isinstance(result, GeneratorType) else result

    with pytest.raises(TypeError, match=rf"\b{name}\b.* True or False$"):
        call()


def test_true_of_numpys_will_do():
    assert spectrum(X, per_sample=np.bool_(True)).equals(spectrum(X, per_sample=True))
    assert set(FLAGS) == {function for function, _ in flags()}


# ---------------------------------------------------------------- anything, for anything

JUNK = st.sampled_from(
    [
        *(None, True, 0, -1, 3, 10**9, 2**70, 0.5, math.nan, math.inf, "", "abc", b"x", (), [], {}, set(), object),
        *([1, 2], (1, "a"), [None], {"labels": 1}, range(3), iter([]), lambda *args: None, 1j, np.nan, np.float32(2)),
        *(torch.tensor(3), torch.ones(2, 3), torch.zeros(0), torch.full((4, 1, 8, 8), math.nan), torch.ones(4).bool()),
        *(X, Y, X.double(), X.byte(), X[:2], X[0], X.numpy(), Y.numpy(), np.zeros(0), np.array(["a"]), X.to("meta")),
        *(nn.ReLU(), CHAIN, [CHAIN], nn.Linear(2, 2), Unit(nn.ReLU()), torch.float64, torch.int64, torch.device("cpu")),
        *(digits(), digits().test, Dataset("d", None, None, None, ()), torch.utils.data.DataLoader([1, 2])),
        *(pd.DataFrame(), pd.DataFrame({"k": [1, 2], "e": [0.5, math.nan]}), pd.Series(["a"]), [(X, Y)], [(X, Y[:2])]),
    ]
)
LOGITS, LABELS = np.random.default_rng(0).normal(size=(3, 4, 10)), Y.numpy()
TABLE = pd.DataFrame({"k": [1, 1, 2], "e": [0.1, 0.2, 0.3]})
FUZZED = {
    **{function: {"chain": CHAIN, "x": X, "y": Y, "loss": cross_entropy, **more} for function, more in PATHS.items()},
    canonical_split: {"chain": CHAIN, "x": X, "samples": 2, "seed": 0},
    spectrum: {"gradients": X.detach()},
    cross_entropy: {"logits": torch.ones(4, 10), "y": Y},
    length_distribution: {"n": 3},
    surviving: {"n": 3, "d": 1},
    Unit: {"branch": nn.ReLU(), "skip": None, "post": None},
    Chain: {"stem": nn.ReLU(), "units": [Unit(nn.ReLU())], "head": nn.ReLU()},
    CHAIN.split: {"c": 0.5},
    CHAIN.reordered: {"order": range(6)},
    resnet: {"depth": 8, "in_channels": 1, "classes": 10, "width": 1, "shortcut": "pad", "seed": 0},
    vgg: {"depth": 15, "in_channels": 1, "classes": 10, "width": 1, "image_size": 8, "seed": 0},
    build: {"name": "resnet8", "dataset": "digits", "seed": 0},
    wilson: {"count": 1, "images": 10},
    error_difference: {"first": 0.1, "second": 0.2, "images": 10},
    paired_bootstrap: {"difference": np.ones(3), "resamples": 3, "seed": 0},
    seed_band: {"table": TABLE, "by": "k", "value": "e"},
    inputs_and_labels: {"chain": CHAIN, "batch": (X, Y)},
    average: {"logits": LOGITS},
    disagreement: {"logits": LOGITS},
    predictions: {"chains": [CHAIN], "data": [(X, Y)]},
    random_subnetworks: {"chain": CHAIN, "data": [(X, Y)], "active": 3, "members": 2, "seed": 0},
    remove_members: {"logits": LOGITS, "labels": LABELS, "removed": [1], "trials": 2, "seed": 0},
    evaluate: {"chain": CHAIN, "data": [(X, Y)]},
    evaluate_variants: {"chain": CHAIN, "data": [(X, Y)], "variants": [range(6)], "loss": None, "max_memory": 9},
    variant_logits: {"chain": CHAIN, "data": [(X, Y)], "variants": [range(6)], "dtype": None},
    delete_each: {"chain": CHAIN, "data": [(X, Y)], "loss": None, "max_memory": 9, "dtype": None},
    delete_random: {"chain": CHAIN, "data": [(X, Y)], "k": 1, "trials": 2, "seed": 0, "candidates": None},
    reorder: {"chain": CHAIN, "data": [(X, Y)], "swaps": 1, "trials": 2, "seed": 0},
    replace_branches: {"chain": CHAIN, "data": [(X, Y)], "kind": "mean", "seed": 0},
    taylor_importance: {"chain": CHAIN, "data": [(X, Y)], "loss": None},
    reestimate_batch_norm: {"chain": CHAIN, "batches": [(X, Y)]},
}
FUZZED[gradient_by_length] |= {"at": "stem", "max_length": 2, "dtype": torch.float64}
FUZZED[path_norms]["seed"] = FUZZED[sample_path_gradients]["seed"] = 0
SLOTS = [(function, name) for function, arguments in FUZZED.items() for name in arguments]
SYNONYMS = {
    **dict.fromkeys(["x", "batch", "data"], r"\bx\b|batch|inputs|network"),
    **dict.fromkeys(["y", "labels"], r"\by\b|label|batch"),
    **dict.fromkeys(["count", "first", "second", "images"], r"counts|count|first|second|images|numbers"),
    **{
        "chain": "chain|batch norm|network|logits",
        "chains": "chain|member",
        "units": "unit",
        "order": "order|unit",
        "name": "network",
    },
    **{
        "depth": "depth|vgg",
        "removed": "remove|member",
        "logits": "logits|labels",
        "active": "active|units",
        "lengths": "length",
    },
    **{"by": "column|table", "value": "column", "n": r"\bn\b|units", "d": r"\bd\b|units"},
    **{"k": r"\bk\b|units", "swaps": "swap", "candidates": "unit|choose", "variants": "variant|unit|network"},
    "batches": r"\bx\b|batch|inputs|network|statistics",
}


def told(function, name, error):
    """Whether an error says in words which argument is wrong."""
    mine = isinstance(error, (ValueError, TypeError, IndexError))
    return mine and re.search(SYNONYMS.get(name, name), str(error)) is not None


def holds_nan(result):
    if isinstance(result, dict):
        return any(map(holds_nan, result.values()))
    if isinstance(result, pd.DataFrame):
        return bool(result.select_dtypes("number").isna().any(axis=None))
    return isinstance(result, torch.Tensor) and result.is_floating_point() and bool(result.isnan().any())


def call_with(function, name, junk):
    """None where a call is answered or refused in words, else what is wrong with it."""
    try:
        result = function(**FUZZED[function] | {name: junk})
    except Exception as error:
        return None if told(function, name, error) else f"{type(error).__name__}: {error}"
    empty = isinstance(result, (pd.DataFrame, list)) and not len(result)
    expected = function in (canonical_split, seed_band) or (function, name) == (remove_members, "removed")
    return "a table that is empty, or holds NaN" if empty or (holds_nan(result) and not expected) else None


COSTLY = {"width", "in_channels", "classes", "image_size", "samples", "repeats", "resamples", "members", "trials", "n"}


def test_whatever_is_given_for_an_argument_is_answered_or_refused_in_words():
    """At most one in twenty refusals leaves it open which argument was wrong; no wrong table is handed over."""
    calls, wrong = 0, {}

    @settings(max_examples=1000)
    @given(st.sampled_from(SLOTS), JUNK)
    def attempt(slot, junk):
        nonlocal calls
        function, name = slot
        if not (name in COSTLY and isinstance(junk, int) and junk > 100):
            calls += 1
            complaint = call_with(function, name, junk)
            if complaint:
                wrong[function.__name__, name, repr(junk)[:50]] = complaint

    before = snapshot(CHAIN)
    attempt()
    assert snapshot(CHAIN) == before
    assert calls > 900
    assert [where for where, complaint in wrong.items() if "a table" in complaint] == []
    assert len(wrong) <= 0.05 * calls, wrong
