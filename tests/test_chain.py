"""Chains: what they compute, and that lesions share everything and change nothing."""

import copy

import pytest
import torch
from helpers import SMALL, images, mix_modes, small, snapshot, states_by_hand
from torch import nn
from torch.testing import assert_close
from unravelling import Chain, Unit, resnet
from unravelling.chain import NoSkip
from unravelling.nets import Pad


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, y):
        return self.factor * y


X = torch.tensor([[1.0, -2.0]])


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (Unit(Times(3)), [[4.0, -8.0]]),  # y + 3y
        (Unit(Times(3), Times(10)), [[13.0, -26.0]]),
        (Unit(Times(3), Times(10), nn.ReLU()), [[13.0, 0.0]]),
        (Unit(Times(3), residual=False), [[3.0, -6.0]]),
        (Unit(Times(3), Times(10), nn.ReLU(), residual=False), [[3.0, 0.0]]),
        (Unit(Times(3), Times(10), nn.ReLU()).deleted(), [[10.0, 0.0]]),
        (Unit(Times(3), Times(10), residual=False).deleted(), [[10.0, -20.0]]),
        (Unit(Times(3)).deleted(), [[1.0, -2.0]]),
        (Unit(Times(3)).deleted().deleted(), [[1.0, -2.0]]),
        (Unit(Times(3)).scaled(0.5), [[2.5, -5.0]]),
        (Unit(Times(3), Times(10), nn.ReLU()).scaled(-4), [[0.0, 4.0]]),
        (Unit(Times(3), residual=False).scaled(0.5), [[1.5, -3.0]]),
        (Unit(Times(3)).scaled(0.5).scaled(0), [[1.0, -2.0]]),
        (Unit(Times(3)).deleted().scaled(5), [[1.0, -2.0]]),
        (Unit(Times(3)).split(0.25), [[4.0, -8.0]]),  # y/4 + (3y + 3y/4)
        (Unit(Times(3)).split(-2).deleted(), [[-2.0, 4.0]]),
        (Unit(Times(3), Times(10)).split(0.25).deleted(), [[10.0, -20.0]]),
        (Unit(Times(3), Times(10), nn.ReLU()).then(nn.ReLU()), [[13.0, 0.0]]),
        (Unit(Times(3), residual=False).then(Times(-1)), [[-3.0, 6.0]]),
        (Unit(Times(3)).deleted().then(Times(5)), [[1.0, -2.0]]),
    ],
)
def test_unit_computes_by_hand(unit, expected):
    assert unit(X).tolist() == expected


def test_unit_knows_its_kind():
    unit = Unit(Times(3), Times(10), name="a", stage=2, transition=True)
    gone = unit.deleted()
    assert (unit.is_transition, unit.is_deleted) == (True, False)
    assert (gone.is_transition, gone.is_deleted, gone.name, gone.stage) == (True, True, "a", 2)
    assert (gone.has_identity_skip, Unit(Times(3)).has_identity_skip) == (False, True)
    assert (Unit(Times(3)).is_transition, Unit(Times(3)).stage) == (False, 1)
    assert not Unit(Times(3), Times(10)).is_transition, "a skip of equal shape is no transition"
    assert repr(unit).startswith("Unit(\n  a, stage 2, residual, transition")
    assert "plain" in Unit(Times(3), residual=False).extra_repr()
    assert gone.extra_repr() == "a, stage 2, deleted, transition"


@pytest.mark.parametrize(
    ("skip", "changes"),
    [
        (nn.Conv2d(4, 4, 1), False),
        (nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)), False),
        (Pad(0, 1), False),
        (nn.MaxPool2d(3, 1, 1), False),
        (nn.Linear(7, 7), False),
        (nn.Conv1d(4, 4, 1), False),
        (nn.Conv3d(4, 4, 1), False),
        (nn.Conv1d(4, 4, 1, 2), True),
        (nn.Conv3d(4, 4, 1, (1, 1, 2)), True),
        (nn.Conv2d(4, 8, 1), True),
        (nn.Sequential(nn.Conv2d(4, 4, 1, 2), nn.BatchNorm2d(4)), True),
        (nn.MaxPool2d(2), True),
        (Pad(4, 1), True),
        (Pad(0, 2), True),
        (nn.Linear(7, 8), True),
        (NoSkip("a"), True),
    ],
)
def test_a_skip_says_whether_the_shape_changes(skip, changes):
    unit = Unit(Times(3), skip)
    assert unit.is_transition == changes
    assert Unit(Times(3), skip, transition=not changes).is_transition != changes
    assert unit.scaled(2).is_transition == changes
    assert unit.has_identity_skip is False
    if not isinstance(skip, (NoSkip, nn.Linear)):
        y = torch.zeros(1, 4, *[6] * {nn.Conv1d: 1, nn.Conv3d: 3}.get(type(skip), 2))
        assert (skip(y).shape != y.shape) == changes
        assert unit.deleted().is_transition == changes


def test_chain_of_three_by_hand():
    chain = Chain(Times(2), [Unit(Times(3)), Unit(Times(5)), Unit(Times(7), residual=False)], Times(-1))
    assert chain(X[:, :1]).item() == -(2 * 4 * 6 * 7)
    assert [y.item() for y in chain.trace(X[:, :1])] == [2, 8, 48, 336]
    assert chain.without(1)(X[:, :1]).item() == -(2 * 4 * 7)
    assert chain.without(0, 2)(X[:, :1]).item() == -(2 * 6)
    assert chain.without()(X[:, :1]).item() == chain(X[:, :1]).item()


@pytest.mark.parametrize("kind", SMALL)
def test_forward_and_trace_equal_the_loop_by_hand(kind):
    chain, (x, _) = small(kind), images()
    expected = states_by_hand(kind, chain, x)
    states = chain.trace(x)
    assert len(states) == len(chain) + 1 == len(expected)
    for state, by_hand in zip(states, expected, strict=True):
        assert torch.equal(state, by_hand)
    assert torch.equal(chain(x), chain.head(expected[-1]))


@pytest.mark.parametrize("kind", SMALL)
def test_without_equals_editing_the_source(kind):
    chain, (x, _) = small(kind, torch.float64), images(dtype=torch.float64)
    for gone in [(i,) for i in range(len(chain))] + [(0, 3, 5), tuple(range(len(chain)))]:
        lesioned = chain.without(*gone)
        assert len(lesioned) == len(chain)
        assert_close(lesioned(x), chain.head(states_by_hand(kind, chain, x, gone)[-1]), rtol=1e-10, atol=1e-14)
        assert not torch.allclose(lesioned(x), chain(x), rtol=1e-7, atol=0), "the oracle cannot tell the difference"


@pytest.mark.parametrize("kind", ["pre", "plain", "post"])
def test_without_equals_a_shorter_network(kind):
    """A unit with identity skip that is deleted is as good as never built (after the ReLU, which changes nothing)."""
    chain, (x, _) = small(kind), images()
    for i in (1, 3, 5):
        units = [copy.deepcopy(unit) for j, unit in enumerate(chain.units) if j != i]
        shorter = Chain(copy.deepcopy(chain.stem), units, copy.deepcopy(chain.head))
        assert torch.equal(chain.without(i)(x), shorter(x))


def test_a_scaled_unit_shares_its_parts_and_keeps_their_modes():
    unit = small("post").units[2]
    mix_modes(unit)
    before = snapshot(unit)
    scaled = unit.scaled(0.5)
    assert {p.data_ptr() for p in scaled.parameters()} == {p.data_ptr() for p in unit.parameters()}
    assert (scaled.name, scaled.stage, scaled.residual, scaled.training) == (unit.name, unit.stage, True, unit.training)
    assert scaled.is_transition
    assert snapshot(unit) == before


def test_lesions_compose():
    chain, (x, _) = small("pre"), images()
    assert torch.equal(chain.without(1).without(4)(x), chain.without(1, 4)(x))
    assert torch.equal(chain.without(1).without(1)(x), chain.without(1)(x))
    swapped = [1, 0, 2, 3, 4, 5]
    assert torch.equal(chain.without(1).reordered(swapped)(x), chain.reordered(swapped).without(0)(x))


@pytest.mark.parametrize("kind", ["pre", "post", "plain", "pre-projection"])
def test_reordered_equals_the_loop_by_hand(kind):
    deep = {
        "pre": lambda: resnet(20, width=4, in_channels=1),
        "post": lambda: resnet(20, width=4, in_channels=1, preactivation=False),
        "plain": SMALL["plain"],
        "pre-projection": lambda: resnet(20, width=4, in_channels=1, shortcut="projection"),
    }[kind]().eval()
    x, _ = images()
    order = [1, 0, 2, 3, 4, 5] if len(deep) == 6 else [2, 0, 1, 3, 5, 4, 6, 8, 7]
    moved = deep.reordered(order)
    assert torch.equal(moved(x), deep.head(states_by_hand(kind, deep, x, order=order)[-1]))
    assert not torch.equal(moved(x), deep(x))
    assert [unit.name for unit in moved.units] == [deep.units[i].name for i in order]
    assert torch.equal(deep.reordered(range(len(deep)))(x), deep(x))
    # undoing a permutation gives the network back
    inverse = sorted(range(len(order)), key=order.__getitem__)
    assert torch.equal(moved.reordered(inverse)(x), deep(x))


def test_lesions_share_every_parameter_and_reach_no_other():
    chain, (x, _) = small("post-projection"), images()
    own = {name: p.data_ptr() for name, p in chain.named_parameters()}
    lesioned = chain.without(2, 3)
    left = {name: p.data_ptr() for name, p in lesioned.named_parameters()}
    assert left == {name: own[name] for name in own if not name.startswith(("units.2.branch", "units.3.branch"))}
    buffers = {name: b.data_ptr() for name, b in chain.named_buffers()}
    assert all(buffers[name] == b.data_ptr() for name, b in lesioned.named_buffers())
    moved = chain.reordered([1, 0, 2, 3, 4, 5])
    assert sorted(p.data_ptr() for p in moved.parameters()) == sorted(own.values())
    lesioned(x).sum().backward()
    without_gradient = {name for name, p in chain.named_parameters() if p.grad is None}
    assert without_gradient == own.keys() - left.keys()


@pytest.mark.parametrize("kind", SMALL)
def test_lesions_change_nothing(kind):
    chain, (x, _) = small(kind), images()
    mix_modes(chain)
    for part in chain.modules():  # a batch norm in training mode would change its own statistics
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.training = False
    before = snapshot(chain)
    with torch.no_grad():
        for lesioned in (chain.without(1, 2), chain.reordered(range(len(chain))), chain.without(*range(len(chain)))):
            lesioned(x)
            assert lesioned.training == chain.training
    assert snapshot(chain) == before


@pytest.mark.parametrize("training", [True, False])
def test_lesions_keep_the_mode_of_each_part(training):
    chain = small("post-projection")
    mix_modes(chain)
    chain.training = chain.units[1].training = training
    lesioned = chain.without(1)
    assert lesioned.training == chain.reordered(range(6)).training == training
    assert lesioned.units[1].training == chain.units[1].training
    modes = dict(chain.named_modules())
    for name, part in lesioned.named_modules():
        if name != "units":
            assert part.training == modes[name].training, name


def test_indices_that_do_not_exist():
    chain = resnet(110, width=1)
    for bad in (54, 100, -1):
        with pytest.raises(IndexError, match=f"^unit {bad} does not exist: this chain has units 0 to 53$"):
            chain.without(3, bad)
    for bad in (True, 1.5):
        with pytest.raises(IndexError, match=f"^unit {bad} does not exist"):
            chain.without(bad)
    with pytest.raises(ValueError, match=r"^unit 7 is named more than once: name each unit once$"):
        chain.without(3, 7, 7)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([0, 1, 2], ValueError, "order names 3 units, but this chain has 9: name each one once"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 8], ValueError, "order names 10 units, but this chain has 9: name each one once"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 9], IndexError, "unit 9 does not exist: this chain has units 0 to 8"),
        ([0, 1, 2, 3, 4, 5, 6, 7, -1], IndexError, "unit -1 does not exist: this chain has units 0 to 8"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 7], ValueError, "unit 7 is named more than once: name each unit once"),
        (
            [0, 4, 2, 3, 1, 5, 6, 7, 8],
            ValueError,
            "unit 4 belongs to stage 2 and does not fit at position 1, which is in stage 1: "
            "move units within their stage only",
        ),
        (
            [0, 1, 2, 4, 3, 5, 6, 7, 8],
            ValueError,
            "unit 3 changes the shape of its input: leave it at position 3",
        ),
        (
            [0, 1, 3, 2, 4, 5, 6, 7, 8],
            ValueError,
            "unit 3 changes the shape of its input: leave it at position 3",
        ),
    ],
)
def test_orders_that_do_not_fit(order, error, message):
    chain = resnet(20, width=2, in_channels=1)
    before = snapshot(chain)
    with pytest.raises(error) as caught:
        chain.reordered(order)
    assert str(caught.value) == message
    assert snapshot(chain) == before


def test_a_unit_moves_with_a_skip_that_keeps_the_shape():
    """A projection of equal shape is no identity, and no reason to stay."""
    torch.manual_seed(0)
    units = [Unit(nn.Linear(3, 3), nn.Linear(3, 3)), Unit(nn.Linear(3, 3)), Unit(nn.Linear(3, 4), nn.Linear(3, 4))]
    chain, x = Chain(nn.Identity(), units, nn.Identity()), torch.randn(2, 3)
    y = units[1](x)
    assert torch.equal(chain.reordered([1, 0, 2])(x), units[2](units[0](y)))
    with pytest.raises(ValueError, match="unit 2 changes the shape of its input: leave it at position 2"):
        chain.reordered([0, 2, 1])


def test_a_unit_without_a_skip_is_refused_without_a_call(monkeypatch):
    monkeypatch.setattr(NoSkip, "forward", lambda self, y: pytest.fail("a module was called to raise its error"))
    unit = Unit(nn.Linear(3, 4), NoSkip("block3"), residual=False)
    with pytest.raises(ValueError, match=r"^the unit block3 has no skip and changes the shape of its state"):
        unit.deleted()
    assert not unit.can_be_deleted


def test_a_deleted_transition_stays_where_it_is():
    chain = resnet(14, width=2, in_channels=1).without(2)
    with pytest.raises(ValueError, match="unit 2 changes the shape of its input"):
        chain.reordered([0, 1, 3, 2, 4, 5])


def test_repr_is_one_readable_line():
    chain = resnet(110)
    assert len(chain) == 54
    assert repr(chain) == "resnet110: 54 units (18+18+18), 1.73 M parameters"
    assert repr(chain.without(3, 7)).startswith("resnet110: 54 units (18+18+18), deleted [3, 7], 1.72 M")
    assert repr(Chain(nn.Identity(), [Unit(Times(1))], nn.Identity())) == "chain: 1 units (1), 0.00 M parameters"


def test_a_changed_chain_has_the_mode_of_the_old_one():
    chain = small("pre").eval()
    assert not any(part.training for part in chain.with_units(list(chain.units)).modules())
