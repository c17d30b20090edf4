"""`unravel` on small constructions, one a kind of network: each with its units said beforehand, or its refusal."""

import collections
import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unravelling import gradient_by_length, sample_path_gradients, unravel, weight_spectrum
from unravelling.tracing.trace import Unsupported, _is_layer
from unravelling.verify import _kinks_aside, compared_gradients, gradients, refuse_unequal


def linear():
    return nn.Linear(8, 8)


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.ln, self.a, self.b, self.id = nn.LayerNorm(8), linear(), linear(), nn.Identity()
        self.g, self.f = nn.Parameter(torch.randn(8)), f

    def forward(self, x):
        return self.f(self, x)


class Wrapped(nn.Module):
    def __init__(self, f, body):
        super().__init__()
        self.i, self.m, self.o, self.body, self.f = linear(), linear(), linear(), body, f

    def forward(self, x):
        return self.f(self, x)


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def body(f, blocks=3):
    return nn.Sequential(*(Block(f) for _ in range(blocks)))


def net(f, blocks=3):
    return seeded(lambda: nn.Sequential(linear(), *body(f, blocks), linear()))


def wrapped(f, inner=lambda: body(add)):
    return seeded(lambda: Wrapped(f, inner()))


def add(s, x):
    return x + s.a(s.ln(x))


def exact(chain, model, x=X, units=None, rounding=0.0):
    """The chain's logits are the model's, its gradients too, every length of paths sums to the whole, and 2 checks."""
    args = x if isinstance(x, tuple) else (x,)
    with torch.no_grad():
        assert (chain(x) - model(*args)).abs().max() <= rounding
    chain.verify(x)
    if units is not None:
        assert len([u for u in chain.units if u.residual]) == len(chain) == units
    y = torch.zeros(len(chain(x)), dtype=torch.long)
    summed = gradient_by_length(chain, x, y).sum(0)
    state = chain.stem(x).detach().requires_grad_()
    out = state
    for unit in chain.units:
        out = unit(out)
    expected = torch.autograd.grad(F.cross_entropy(chain.head(out), y), state)[0]
    assert torch.allclose(summed, expected, rtol=1e-4, atol=rounding + 1e-7)


def quiet(model, x=X, **options):
    """Unravel without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return unravel(model, x, **options)


# ---------------------------------------------------------------- every addition is accounted for

SECOND = {
    "no weights": lambda s, x: add(s, x + (x.roll(1, -1) - x)),
    "identity": lambda s, x: s.id(h := add(s, x)) + s.b(torch.tanh(h)),
    "addcmul": lambda s, x: torch.addcmul(h := add(s, x), s.g, s.b(h)),
    "addcmul value": lambda s, x: torch.addcmul(h := add(s, x), s.g, s.b(h), value=0.5),
    "lerp": lambda s, x: torch.lerp(h := add(s, x), s.b(h), 0.25),
    "lerp method": lambda s, x: (h := add(s, x)).lerp(s.b(h), torch.full((8,), 0.25)),
    "stack": lambda s, x: torch.stack([h := add(s, x), s.b(h)]).sum(0),
    "stack last": lambda s, x: torch.stack([s.b(h := add(s, x)), h], -1).sum(dim=-1),
    "python sum": lambda s, x: sum([h := add(s, x), s.b(h)]),
    "addmm": lambda s, x: torch.addmm(h := add(s, x), torch.tanh(h), s.b.weight),
    "addmm alpha beta": lambda s, x: torch.addmm(h := add(s, x), torch.tanh(h), s.b.weight, alpha=0.5, beta=0.9),
    "baddbmm": lambda s, x: torch.baddbmm(
        (h := add(s, x))[:, None], torch.tanh(h)[:, None], s.b.weight.expand(len(h), 8, 8))[:, 0],
    "addcdiv": lambda s, x: torch.addcdiv(h := add(s, x), s.b(h), 1 + s.g.exp()),
    "subtract": lambda s, x: torch.subtract(h := add(s, x), s.b(h)),
    "rsub": lambda s, x: torch.rsub(s.b(h := add(s, x)), h),
    "add by name": lambda s, x: torch.add(input=(h := add(s, x)), other=s.b(h)),
    "lerp by name": lambda s, x: torch.lerp(input=(h := add(s, x)), end=s.b(h), weight=0.25),
    "index_add": lambda s, x: (h := add(s, x)).index_add(1, torch.arange(4), s.b(h)[:, :4]),
    "scatter_add": lambda s, x: torch.scatter_add(h := add(s, x), 1, torch.arange(4).expand(len(h), 4), s.b(h)[:, :4]),
}


@pytest.mark.parametrize("kind", SECOND)
def test_fused_and_plain_additions_are_units(kind):
    model = net(SECOND[kind])
    chain = quiet(model)
    exact(chain, model, units=6, rounding=1e-6)
    assert not any("additions became units" in note for note in chain.notes)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lin_skip = linear(), linear()

    def forward(self, x):
        return F.relu(self.conv(x)) + torch.tanh(self.lin_skip(x))


def test_of_two_ways_with_as_many_weights_the_one_that_is_called_a_skip_is_one():
    model = seeded(lambda: nn.Sequential(linear(), Conv(), Conv(), linear()))
    chain = unravel(model, X)
    exact(chain, model, units=2)
    y = chain.stem(X)
    assert torch.equal(chain.units[0].skip(y), torch.tanh(model[1].lin_skip(y)))


def test_what_prepares_both_ways_of_the_first_block_is_no_part_of_the_stem():
    model = net(lambda s, x: (h := s.ln(x)) + s.a(torch.tanh(h)))
    chain = quiet(model)
    exact(chain, model, units=3)
    assert torch.equal(chain.stem(X), model[0](X))


def test_a_sequence_that_is_the_branch_names_the_unit():
    model = wrapped(lambda s, x: s.o((h := s.i(x)) + s.body(h)), lambda: nn.Sequential(linear(), nn.ReLU(), linear()))
    assert [unit.name for unit in quiet(model).units] == ["body"]


def test_a_deleted_lerp_is_an_edit_of_the_source():
    model = net(SECOND["lerp"])
    chain = unravel(model, X)
    for i in range(3):
        other = copy.deepcopy(model)
        nn.init.zeros_(other[i + 1].b.weight)
        nn.init.zeros_(other[i + 1].b.bias)
        assert torch.allclose(chain.without(2 * i + 1)(X), other(X), atol=1e-6)


@pytest.mark.parametrize(
    "f", [lambda s, x: torch.addcmul(x, s.g, s.b(x)), lambda s, x: torch.lerp(x, s.b(x), 0.25)], ids=["addcmul", "lerp"]
)
def test_fused_additions_one_after_another_have_their_deletions_compared(f):
    chain = unravel(net(f), X)
    deletion = chain.verify(X).set_index("check").loc["deletion"]
    assert (deletion["compared"], deletion["of"], len(chain)) == (3, 3, 3)


@pytest.mark.parametrize(
    ("f", "where"),
    [
        (lambda s, x: s.o(s.m(x).sigmoid() * s.body(s.i(x))), None),
        (lambda s, x: s.o(s.m(h := s.i(x)).sigmoid() * s.body(h)), None),
        (lambda s, x: s.o((h := s.i(x)) + s.m(s.body(h))), "the head"),
    ],
    ids=["gate", "gate of y_0", "long skip"],
)
def test_blocks_beside_another_way_are_units(f, where):
    model = wrapped(f)
    chain = unravel(model, X)
    exact(chain, model, units=3)
    told = [note for note in chain.notes if "3 of 4 additions became units; the rest lie in" in note]
    assert bool(told) == (where is not None)
    assert all(where in note for note in told)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.body[1].a.weight)
    nn.init.zeros_(other.body[1].a.bias)
    assert torch.equal(chain.without(1)(X), other(X))


def test_the_first_state_is_read_by_every_block():
    class Anchored(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o, self.blocks = linear(), linear(), body(lambda s, x: s.a(torch.tanh(s.ln(x))), 6)

        def forward(self, x):
            y = first = self.i(x)
            for block in self.blocks:
                h = 0.9 * y + 0.1 * first
                y = h + block(h)
            return self.o(y)

    model = seeded(Anchored)
    chain = unravel(model, X)
    exact(chain, model, units=6)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.blocks[2].a.weight)
    nn.init.zeros_(other.blocks[2].a.bias)
    assert torch.equal(chain.without(2)(X), other(X))


def test_additions_that_are_no_units_are_told_of():
    inner = lambda s, x: x + s.b((h := s.ln(x)) + s.a(h))  # noqa: E731
    with pytest.warns(UserWarning, match=r"^3 of 6 additions became units; the rest lie in the branch of 1 \(1\), the"):
        chain = unravel(net(inner), X)
    assert any("3 of 6 additions" in note for note in chain.notes)
    assert quiet(net(add), X).notes == []


TWO = torch.tensor([1.0, 0.5])
UNSEEN = {
    "weighted stack": lambda s, x: (torch.stack([x, s.a(s.ln(x))]) * TWO.view(2, 1, 1)).sum(0),
    "einsum": lambda s, x: torch.einsum("nbd,n->bd", torch.stack([x, s.a(s.ln(x))]), TWO),
    "matmul": lambda s, x: (TWO.view(1, 2) @ torch.stack([x, s.a(s.ln(x))], 1))[:, 0],
    "concatenation": lambda s, x: torch.cat([x.unsqueeze(0), s.a(s.ln(x)).unsqueeze(0)]).sum(0),
    "scatter": lambda s, x: x.scatter_reduce(1, torch.arange(8).repeat(len(x), 1), s.a(s.ln(x)), "sum"),
    "index": lambda s, x: x.index_put((torch.arange(len(x)),), s.a(s.ln(x)), accumulate=True),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_additions_in_another_form_are_told_of(kind):
    f = UNSEEN[kind]
    model = net(lambda s, x: add(s, f(s, x)))
    with pytest.warns(UserWarning, match=r"^3 of 6 additions became units; the rest lie in "):
        chain = unravel(model, X)
    exact(chain, model, units=3)
    with pytest.raises(Unsupported, match=r"by a sum over a stack, or by scattering \(3 times, first in 1\)"):
        unravel(net(f), X)
    model = seeded(lambda: nn.Sequential(linear(), *body(f), linear()))
    chain = unravel(model, X, units=["1", "2", "3"], branch=lambda s, x: f(s, x) - x)
    exact(chain, model, units=3, rounding=1e-6)


JOINED = {
    "vstack": lambda s, x: torch.vstack([x, s.a(s.ln(x))])[: len(x)],
    "hstack": lambda s, x: F.linear(torch.hstack([x, s.a(s.ln(x))]), torch.cat([s.b.weight, s.b.weight], 1)),
    "concatenation": lambda s, x: F.linear(torch.cat([x, s.a(s.ln(x))], 1), torch.cat([s.b.weight, s.b.weight], 1)),
    "pooled": lambda s, x: torch.hstack([x, s.a(s.ln(x))]).mean(1, keepdim=True).expand(len(x), 8),
    "two projections": lambda s, x: (torch.stack([s.a(s.ln(x)), s.b(s.ln(x))]) @ s.a.weight)[1],
    "interleaved": lambda s, x: torch.stack([x, s.a(s.ln(x))], -1).flatten(1)[:, ::2],
    "largest": lambda s, x: x.scatter_reduce(1, torch.arange(8).repeat(len(x), 1), s.a(s.ln(x)), "amax"),
    "put": lambda s, x: x.index_put((torch.arange(len(x)),), s.a(s.ln(x))),
}


@pytest.mark.parametrize("kind", JOINED)
def test_what_is_joined_but_not_added_counts_as_no_addition(kind):
    f = JOINED[kind]
    assert quiet(net(lambda s, x: add(s, f(s, x)))).notes == []


def test_stacks_beside_sums_without_a_skip_are_refused_as_these():
    def both(s, x):
        y = UNSEEN["weighted stack"](s, x)
        return s.a(y) + s.b(y)

    with pytest.raises(Unsupported, match=r"^Sequential has 6 additions, but no chain of residual units: "):
        unravel(net(both), X)


def dropped(s, x):
    return F.dropout(x, 0.1, s.training)


@pytest.mark.parametrize(("branch", "compared"), [
    (lambda s, x: dropped(s, s.a(x)), 3),
    (lambda s, x: dropped(s, s.a(x) + s.b(x)), 3),
    (lambda s, x: s.b(x) + dropped(s, s.a(dropped(s, x))), 3),
    (lambda s, x: dropped(s, x) + s.a(x), 0),  # a part of the branch is the state itself, which no module returns
])
def test_a_dropout_that_is_no_module_is_looked_through(branch, compared):
    model = net(lambda s, x: x + branch(s, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sum within the branch is told of
        chain = unravel(model, X)
    exact(chain, model, units=3)
    checks = chain.verify(X).set_index("check")
    assert checks.loc["deletion", ["compared", "equal"]].tolist() == [compared, compared]


# ---------------------------------------------------------------- sizes


class Sized(nn.Module):
    """Tokens, whose forward decides by how many there are."""

    def __init__(self, decide):
        super().__init__()
        self.i, self.blocks, self.o, self.decide = linear(), body(add), linear(), decide

    def forward(self, x):
        return self.o(self.decide(x, self.blocks(self.i(x))))


@pytest.mark.parametrize("limit", [12, 10])
def test_guards_of_export_are_enforced(limit):
    model = seeded(lambda: Sized(lambda x, y: y if x.shape[1] <= limit else y.flip(1)))
    sequences = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    chain = unravel(model, sequences[:, :10])
    for length in (5, 10):
        assert torch.equal(chain(sequences[:, :length]), model(sequences[:, :length]))
    with pytest.raises(ValueError, match=rf"other sizes .*{limit}.*Unravel the model with an example of the new size"):
        chain(sequences[:, :13])
    assert torch.equal(unravel(model, sequences)(sequences), model(sequences))


@pytest.mark.parametrize("decide", [lambda x, y: len(x) == 2, lambda x, y: x.shape[1] == 5])
def test_a_chain_that_is_right_for_the_example_alone_is_refused(decide):
    """The model stands for one whose tracing lost that its forward pass depends on sizes."""
    model, x = net(add), torch.randn(2, 5, 8)
    chain, logits = unravel(model, x), model(x)
    refuse_unequal(chain, chain._origin, x, logits, chain(x))
    other = Sized(lambda x, y: y if decide(x, y) else y.flip(-1))
    other.i, other.blocks, other.o = nn.Identity(), model, nn.Identity()
    with pytest.raises(Unsupported, match="not for inputs of the sizes"):
        refuse_unequal(chain, dataclasses.replace(chain._origin, model=other.eval()), x, logits, chain(x))


def test_sizes_stay_free_with_len_args_and_kwargs():
    class Free(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.i, self.blocks, self.o, self.kind = linear(), body(add), linear(), kind

        def forward(self, x, *args, **kwargs):
            y = self.blocks(self.i(x)).reshape(len(x), -1, 8)
            return self.o(y + args[0][:, None] if args else y + kwargs["z"][:, None] if kwargs else y)

    x, z = torch.randn(6, 5, 8), torch.randn(6, 8)
    for example in ((x,), (x, z), {"x": x, "z": z}):
        some = {k: v[:3] for k, v in example.items()} if isinstance(example, dict) else tuple(v[:3] for v in example)
        model = seeded(lambda: Free(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chain = unravel(model, some)
        expected = model(**example) if isinstance(example, dict) else model(*example)
        assert torch.equal(chain(example), expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_looked_through(wrap):
    model = net(add)
    exact(unravel(wrap(model), X[:1]), model, units=3)


# ---------------------------------------------------------------- hooks


def test_hooks_on_blocks_are_refused_before_they_are_called():
    model, seen = net(add), []
    handle = model[2].register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.raises(Unsupported, match=r"^2 has a hook \(<lambda>\).*handle\.remove\(\)"):
        unravel(model, X)
    assert seen == []
    handle.remove()
    exact(unravel(model, X), model, units=3)


def test_hooks_on_layers_are_called_in_the_chain_as_in_the_model():
    model = net(add)
    model[2].a.register_forward_hook(lambda module, args, output: 2 * output)
    nn.utils.weight_norm(model[1].a)
    chain = unravel(model, X)
    exact(chain, model, units=3)
    seen = []
    model[1].ln.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    chain(X)
    assert seen == [torch.Tensor]


# ---------------------------------------------------------------- layers between the additions


def test_layers_between_additions_follow_the_first():
    def mixer():
        block = lambda: nn.Sequential(Block(add), linear(), nn.GELU(), nn.LayerNorm(8))  # noqa: E731
        return nn.Sequential(linear(), block(), block(), block(), linear())

    model = seeded(mixer)
    chain = quiet(model)
    exact(chain, model, units=3)
    assert all(unit.has_identity_skip and not unit.is_transition for unit in chain.units)
    assert [len(unit.post) for unit in chain.units] == [3, 3, 3]
    swapped = copy.deepcopy(model)
    swapped[1], swapped[3] = swapped[3], swapped[1]
    assert torch.equal(chain.reordered([2, 1, 0])(X), swapped(X))


def test_reshapes_within_a_block_are_no_transitions():
    def f(s, x):
        x = add(s, x)
        y = x.reshape(len(x), -1, 8)
        return (y + s.b(torch.tanh(y))).reshape(x.shape)

    images = torch.randn(2, 3, 3, 8)
    model = net(f)
    chain = quiet(model, images)
    assert torch.equal(chain(images), model(images))
    assert not any(unit.is_transition for unit in chain.units)
    assert len(chain) == 6


# ---------------------------------------------------------------- refused though clean


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.i, self.blocks, self.o = linear(), linear(), body(lambda s, x: s.a(s.ln(x))), linear()

    def forward(self, t, x):
        t, y = self.time(t), self.i(x)
        for block in self.blocks:
            y = y + block(y + t)
        return self.o(y)


def test_the_stream_is_found_or_named():
    model, inputs = seeded(Conditioned), (X.flip(0), X)
    with pytest.warns(UserWarning, match="stream starts at 'x'"):
        chain = unravel(model, inputs)
    exact(chain, model, inputs, units=3)
    exact(quiet(model, inputs, stream="x"), model, inputs, units=3)
    with pytest.raises(ValueError, match=r"stream='y' names no input that the model uses: these are t, x"):
        unravel(model, inputs, stream="y")


def test_values_of_a_shape_alone_are_shared_by_the_blocks():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.blocks, self.o = linear(), body(lambda s, x: s.a(s.ln(x))), linear()

        def forward(self, x):
            y, ranks = self.i(x), None
            for k, block in enumerate(self.blocks):
                y = y + block(y)
                ranks = torch.ones_like(y).cumsum(1) if k == 0 else ranks
                y = y * ranks
            return self.o(y)

    model = seeded(Counting)
    exact(quiet(model), model, units=3)


def test_assignment_to_a_fresh_tensor_within_a_branch():
    def f(s, x):
        z = torch.zeros_like(x)
        z[:, :4] = s.a(s.ln(x))[:, :4]
        z[:, 4:] += s.b(x)[:, 4:]
        return x + z

    model = net(f)
    exact(quiet(model), model, units=3)


def test_networks_of_lora_layers_are_told_of():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = linear(), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    with pytest.warns(UserWarning, match="no identity beside their branch.*LoRA"):
        chain = unravel(seeded(lambda: nn.Sequential(Lora(), nn.ReLU(), Lora(), nn.ReLU(), Lora(), linear())), X)
    assert len(chain) == 3


def test_layers_as_skips_are_told_of_beside_blocks_that_change_the_shape():
    class Two(nn.Module):
        def __init__(self, *size):
            super().__init__()
            self.a, self.b = nn.Linear(*size), nn.Linear(*size)

        def forward(self, x):
            return self.a(x) + torch.tanh(self.b(x))

    sizes = [(8, 8), (8, 8), (8, 6), (6, 6), (6, 6)]
    with pytest.warns(UserWarning, match="4 of 5 units have no identity beside their branch"):
        unravel(seeded(lambda: nn.Sequential(linear(), *(Two(*size) for size in sizes), nn.Linear(6, 8))), X)


def test_a_forward_that_assigns_to_its_module_leaves_nothing_behind():
    class Rotary(nn.Module):
        """Keeps a table that is no buffer, and moves it in the forward pass, as Meta's Llama does."""

        def __init__(self):
            super().__init__()
            self.i, self.o, self.table = linear(), linear(), torch.randn(16, 8)
            self.blocks = nn.ModuleList(linear() for _ in range(3))

        def forward(self, x):
            y = self.i(x)
            self.table = self.table.to(y.device)
            for block in self.blocks:
                y = y + torch.tanh(block(y * self.table[: x.shape[1]]))
            return self.o(y.mean(1))

    model, x = seeded(Rotary), torch.randn(2, 5, 8)
    before = model.table
    exact(quiet(model, x), model, x, units=3)
    assert model.table is before


class Merging(nn.Linear):
    """Merges its low-rank part in eval mode, as loralib's layers do."""

    def __init__(self, *size):
        super().__init__(*size)
        self.low, self.merged = nn.Parameter(torch.randn(8, 8)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.low if mode else self.low
            self.merged = not mode
        return self


class Rescaling(nn.Linear):
    """Halves its weights in the first pass, as transformers' RWKV does."""

    done = False

    def forward(self, x):
        if not self.done:
            with torch.no_grad():
                self.weight.div_(2)
            self.done = True
        return super().forward(x)


@pytest.mark.parametrize("kind", [Merging, Rescaling])
def test_weights_that_a_pass_changes_come_back_and_the_model_is_refused(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o, self.layers = linear(), linear(), nn.ModuleList(kind(8, 8) for _ in range(3))

        def forward(self, x):
            y = self.i(x)
            for layer in self.layers:
                y = y + torch.tanh(layer(y))
            return self.o(y)

    model = Net().train(kind is Merging)
    before, expected = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval()(X)
    with pytest.raises(ValueError, match=r"changes the parameter layers\.0\.weight, .*call model.eval\(\), then"):
        unravel(model, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.eval()(X), expected)
    exact(unravel(model, X), model, units=3)  # now that this has happened


@pytest.mark.parametrize("keywords", [False, True])
def test_block_units_are_recommended_where_they_can_help(keywords):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(linear() for _ in range(3))

        def run(self, x):
            for layer in self.layers:
                x = x + layer(x) if x.sum().item() > 0 else x - layer(x)
            return x

    class Named(Careful):
        def forward(self, x):
            return self.run(x)

    class Keywords(Careful):
        def forward(self, x, **options):
            return self.run(x)

    with pytest.raises(ValueError, match=r"[Ww]rite a wrapper whose forward, with named arguments") as error:
        unravel(seeded(Keywords if keywords else Named), X)
    assert ("block_units" in str(error.value)) is not keywords


def test_a_tensor_that_is_no_buffer_comes_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.calls = body(add), torch.zeros(())

        def forward(self, x):
            self.calls += 1
            return self.body(x)

    model = seeded(Counting)
    unravel(model, X)
    assert model.calls == 0


@pytest.mark.parametrize("make", [lambda: torch.eye(8).to_sparse(), lambda: torch.empty(3, device="meta")])
def test_tensors_that_cannot_be_compared_are_no_obstacle(make):
    model = seeded(lambda: body(add))
    model.adjacency = make()
    exact(quiet(model), model, units=3)


def test_blocks_inline_in_a_part_leave_its_embedding_to_the_stem():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
            self.layers = nn.ModuleList(linear() for _ in range(3))

        def forward(self, tokens):
            y = self.norm(self.embedding(tokens))
            for layer in self.layers:
                y = y + torch.tanh(layer(y))
            return y

    model, tokens = seeded(lambda: nn.Sequential(Body(), nn.Linear(8, 11))), torch.arange(12).view(2, 6) % 11
    chain = quiet(model, tokens)
    assert [unit.has_identity_skip for unit in chain.units] == [True] * 3
    shares = gradient_by_length(chain, tokens, tokens)
    assert shares.shape == (4, 2, 6, 8)
    assert chain.verify(tokens)["equal"].tolist() == chain.verify(tokens)["compared"].tolist()


def test_a_time_before_the_state_is_read_by_every_block():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.o = nn.ModuleList(nn.Linear(9, 8) for _ in range(3)), linear()

        def forward(self, t, x):
            for layer in self.layers:
                x = x + torch.tanh(layer(torch.cat([x, torch.ones_like(x[:, :1]) * t], 1)))
            return self.o(x)

    model, inputs = seeded(Flow), (torch.tensor(0.5), X)
    with pytest.warns(UserWarning, match="the stream starts at 'x'"):
        chain = unravel(model, inputs)
    exact(chain, model, inputs, units=3)
    assert all(isinstance(unit.post, nn.Identity) for unit in chain.units)  # nothing of the reading from t is left


@dataclasses.dataclass
class Output:
    loss: object
    logits: torch.Tensor


def test_logits_in_a_dataclass_or_a_named_tuple():
    named = collections.namedtuple("named", "logits hidden")
    for make in (lambda y: Output(None, y), lambda y: Output(loss=None, logits=y), lambda y: named(y, 1)):
        model = wrapped(lambda s, x, make=make: make(s.o(s.body(s.i(x)))))
        chain = quiet(model)
        assert len(chain) == 3
        assert torch.equal(chain(X), model(X).logits)


def test_a_weight_that_is_expanded_over_the_batch_names_its_unit():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(8, 8) for _ in range(3))

        def forward(self, x):
            for weight in self.weights:
                x = x + torch.bmm(x[:, None], weight.expand(len(x), 8, 8))[:, 0]
            return x

    assert [unit.name for unit in quiet(seeded(Bare)).units] == ["weights.0", "weights.1", "weights.2"]


def test_a_mixer_without_weights_names_its_unit():
    class Mixer(nn.Module):
        def forward(self, x):
            return x.roll(1, -1) - x

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.mixer, self.after, self.mlp = nn.LayerNorm(8), Mixer(), nn.LayerNorm(8), linear()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            x = x + self.scale * self.mixer(self.before(x))
            return x + self.mlp(self.after(x))

    names = [unit.name for unit in quiet(seeded(lambda: nn.Sequential(linear(), Layer(), Layer(), linear()))).units]
    assert names == ["1.mixer", "1.mlp", "2.mixer", "2.mlp"]


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_branch_in_which_the_state_itself_is_added_is_not_compared_by_zeros_of_the_state(sign):
    model = net(lambda s, x: x + s.g * (s.a(x) + x if sign > 0 else s.a(x) - x))
    with pytest.warns(UserWarning, match="3 of 6 additions"):
        chain = unravel(model, X)
    exact(chain, model, units=3, rounding=1e-6)
    assert chain.verify(X).set_index("check").loc["deletion", "compared"] == 0


def test_rounding_across_a_kink_is_told_from_a_gradient_that_is_lost():
    kink, shifted = nn.ReLU(), wrapped(lambda s, x: torch.relu(x + 1e-30))
    blind = wrapped(lambda s, x: torch.relu(x).detach() + 0 * x)
    x = torch.tensor([[0.0, 1.0, -1.0]])

    def gaps(module):
        pair = gradients(module, kink, x)[1], gradients(kink, kink, x)[1]
        return [max(gap for *_, gap in compared_gradients(*some))
                for some in (pair, _kinks_aside(module, kink, x, 1e-4, pair))]

    assert gaps(shifted)[0] > 0.1
    assert gaps(shifted)[1] == 0
    assert min(gaps(blind)) > 0.1


def test_what_forks_and_meets_again_between_two_units_follows_the_first():
    class Reduce(nn.Module):
        """As between the stages of an Inception-ResNet: two ways that a concatenation joins."""

        def __init__(self):
            super().__init__()
            self.c, self.d = linear(), nn.Linear(8, 4)

        def forward(self, x):
            return torch.cat([torch.tanh(self.c(x)), self.d(x)], 1)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x):
            return x + torch.tanh(self.a(x))

    model = seeded(lambda: nn.Sequential(linear(), Block(add), Block(add), Reduce(), Wide(), Wide(), nn.Linear(12, 8)))
    chain = quiet(model)
    exact(chain, model, units=4)
    assert [unit.has_identity_skip for unit in chain.units] == [True] * 4
    assert {id(p) for p in chain.units[1].post.parameters()} == {id(p) for p in model[3].parameters()}


def test_additions_on_one_way_of_a_concatenation_are_refused_by_that_name():
    halves = lambda s, x: s.o(torch.cat([x[:, :4], x[:, 4:] + s.m(x)[:, 4:]], 1))  # noqa: E731
    after = lambda s, x: s.o(torch.cat([(h := s.i(x))[:, :4], h[:, 4:] + s.m(h)[:, 4:]], 1))  # noqa: E731
    for model in (wrapped(halves), wrapped(after)):
        with pytest.raises(ValueError, match=r"on some of the ways alone that a concatenation joins.*a part alone$"):
            unravel(model, X)


def test_refusals_name_the_cause_and_modules():
    def highway(s, x):
        t = torch.sigmoid(s.a(x))
        return t * torch.relu(s.b(x)) + (1 - t) * x

    with pytest.raises(Unsupported, match=r"gated, as in a highway network.*\(3 times, first in 1\)"):
        unravel(net(highway), X)

    def shuffle(s, x):
        a, b = x.chunk(2, 1)
        return torch.cat([a, s.a(F.pad(b, (0, 4)))[:, :4]], 1)

    with pytest.raises(Unsupported, match=r"3 concatenations \(the first in 1\), as .*a ShuffleNet has"):
        unravel(net(shuffle), X)


# ---------------------------------------------------------------- crashes


def under(region):
    def f(s, x):
        with region():
            a, b = s.ln(x).chunk(2, -1)
            return x + s.a(torch.cat([b, a], -1))

    return net(f)


def test_blocks_under_autocast():
    model = under(lambda: torch.autocast("cpu", torch.bfloat16))
    exact(unravel(model, X), model, units=3, rounding=0.02)


def test_blocks_without_gradient_are_refused_in_words():
    with pytest.raises(Unsupported, match="no_grad"):
        unravel(under(torch.no_grad), X)


def test_scripts_and_compiled_programs_are_refused_in_words():
    exported = torch.export.export(net(add), (X,)).module()
    for model in (torch.jit.trace(net(add), X), torch.jit.script(nn.Sequential(linear(), linear())), exported):
        with pytest.raises(Unsupported, match=r"TorchScript program, or one of torch\.export"):
            unravel(model, X)


def test_sparse_buffers_and_named_tuples(capfd):
    Batch = collections.namedtuple("Batch", ["x", "scale"])

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.blocks, self.o = linear(), body(lambda s, x: s.a(s.ln(x))), linear()
            self.register_buffer("adjacency", torch.eye(2).flip(0).to_sparse())

        def forward(self, x, scale):
            y = self.i(x) * scale
            for block in self.blocks:
                y = y + torch.sparse.mm(self.adjacency, block(y))
            return self.o(y)

    model, batch = seeded(Graph), Batch(X, X.abs())
    chain = unravel(model, batch, stream="x")
    assert torch.equal(chain(batch), model(*batch))
    assert len(chain) == 3
    assert capfd.readouterr() == ("", "")


def test_a_model_that_only_runs_without_gradients():
    model = net(add)
    with torch.no_grad():
        chain = unravel(model, X)
    exact(chain, model, units=3)


def test_warnings_point_at_the_caller():
    with pytest.warns(UserWarning, match="training mode") as caught:
        unravel(net(add).train(), X)
    assert [warning.filename for warning in caught] == [__file__]


# ---------------------------------------------------------------- other streams


def test_a_stack_of_residual_lstm_layers():
    """In the manner of Wu et al. (2016): from the second layer on, each adds its input to its output."""

    class Stack(nn.Module):
        def __init__(self, layers=4):
            super().__init__()
            self.embedding, self.o = nn.Embedding(7, 8), nn.Linear(8, 7)
            self.layers = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(layers))

        def forward(self, tokens):
            y, _ = self.layers[0](self.embedding(tokens))
            for layer in self.layers[1:]:
                y = y + layer(y)[0]
            return self.o(y)

    model, tokens = seeded(Stack), torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))
    chain = quiet(model, tokens)
    assert [unit.name for unit in chain.units] == ["layers.1", "layers.2", "layers.3"]
    table = chain.verify(tokens).set_index("check")
    assert table.compared["deletion"] == 3
    other = copy.deepcopy(model)
    for parameter in other.layers[2].parameters():  # gates of zero: nothing comes out
        nn.init.zeros_(parameter)
    assert torch.equal(chain.without(1)(tokens), other(tokens))
    longer = torch.randint(7, (3, 9))
    assert torch.equal(chain(longer), model(longer))


def test_a_subtracted_stream_and_its_forecasts_are_told_of():
    """N-BEATS: what a block explains is subtracted from the stream, and its forecast added to another sum."""

    class Doubly(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(lambda s, x: (s.a(h := torch.relu(s.ln(x))), s.b(h))) for _ in range(3))

        def forward(self, x):
            total = 0
            for block in self.blocks:
                back, forecast = block(x)
                x, total = x - back, total + forecast
            return total

    with pytest.raises(Unsupported, match="several streams"):
        unravel(seeded(Doubly), X)
    backcast = net(lambda s, x: x - s.a(s.ln(x)))
    exact(unravel(backcast, X), backcast, units=3)


def test_learned_multiples_of_the_stream_and_of_its_start():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.blocks, self.o = linear(), body(lambda s, x: s.a(torch.tanh(s.ln(x))), 4), linear()
            self.r, self.z = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

        def forward(self, x):
            y = first = self.i(x)
            for k, block in enumerate(self.blocks):
                y = self.r[k] * y + self.z[k] * first
                y = y + block(y)
            return self.o(y)

    model = seeded(Mixed)
    exact(unravel(model, X), model, units=4)


class Hyper(nn.Module):
    """Hyper-connections: n streams, which every layer reads a mixture of, mixes among themselves and writes to."""

    def __init__(self, streams=3, one=True):
        super().__init__()
        self.i, self.body, self.o, self.n, self.one = linear(), body(lambda s, x: s.a(s.ln(x))), linear(), streams, one
        self.read = nn.ParameterList(torch.randn(streams) for _ in self.body)
        self.mix = nn.ParameterList(torch.randn(streams, streams) for _ in self.body)
        self.write = nn.ParameterList(torch.randn(streams) for _ in self.body)

    def forward(self, x):
        streams = [self.i(x)] * self.n
        if self.one:
            y = torch.stack(streams, 1)
            for block, read, mix, write in zip(self.body, self.read, self.mix, self.write, strict=True):
                y = mix @ y + write[:, None] * block(read @ y)[:, None]
            return self.o(y.sum(1))
        for block, read, mix, write in zip(self.body, self.read, self.mix, self.write, strict=True):
            f = block(sum(read[k] * streams[k] for k in range(self.n)))
            streams = [sum(mix[k, j] * streams[j] for j in range(self.n)) + write[k] * f for k in range(self.n)]
        return self.o(sum(streams))


def test_hyper_connections_in_one_tensor_are_units_and_others_are_refused_by_name():
    model = seeded(Hyper)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the skips mix the streams by weights of their own, and that is told of
        chain = unravel(model, X)
    exact(chain, model, units=3, rounding=1e-5)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.write[1])
    with torch.no_grad():
        assert torch.allclose(chain.without(1)(X), other(X), rtol=1e-5, atol=1e-5)
    with pytest.raises(Unsupported, match="several streams"):
        unravel(seeded(lambda: Hyper(one=False)), X)


# ---------------------------------------------------------------- what other people's models turned up


def deleted(model, branch):
    """Return a copy of a model in which a layer of a branch returns zeros."""
    other = copy.deepcopy(model)
    branch(other).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    return other


def test_additions_within_one_long_skip_within_another_are_units():
    model = wrapped(lambda s, x: F.relu(x) + s.o((h := s.i(x)) + s.m(s.body(h))))
    with pytest.warns(UserWarning, match="3 of 5 additions became units; the rest lie in the head"):
        chain = unravel(model, X)
    exact(chain, model, units=3)
    assert torch.equal(chain.without(1)(X), deleted(model, lambda m: m.body[1].a)(X))


def test_two_streams_that_meet_in_a_concatenation_are_named():
    def reversible(s, x):
        a, b = s.i(x).chunk(2, 1)
        for block in s.body:
            a, b = b, a + block.a(torch.cat([b, b], 1))[:, :4]
        return s.o(torch.cat([a, b], 1))

    with pytest.raises(Unsupported, match=r"3 additions, .* several streams run beside each other"):
        unravel(wrapped(reversible), X)


def overwritten(s, x):
    """The sum is written into the state, which is returned by its other name."""
    y = x.clone()
    h = y
    h += s.a(s.ln(x))
    return y


def through_a_view(s, x):
    y = x.clone()
    y.view(-1, 2, 4).add_(s.a(s.ln(x)).view(-1, 2, 4))
    return y


@pytest.mark.parametrize("f", [overwritten, through_a_view])
def test_sums_in_place_under_another_name_are_units(f):
    model = net(f)
    chain = quiet(model)
    exact(chain, model, units=3)
    assert torch.equal(chain.without(1)(X), deleted(model, lambda m: m[2].a)(X))


def test_a_sum_in_a_part_of_the_state_is_refused_in_words():
    def partly(s, x):
        y = x.clone()
        part = y[:, :4]
        part += s.a(s.ln(x))[:, :4]
        return y.flip(1)

    with pytest.raises(Unsupported, match=r"^1 writes to a tensor in place and reads it by another name"):
        unravel(net(partly), X)


def test_assignment_to_a_part_has_a_gradient_where_torch_export_traces_it():
    def f(s, x):
        if x.shape[1] > 100:  # which torch.fx cannot decide
            return x
        z = x.new_empty(x.shape)
        z[:, :4] = s.a(s.ln(x))[:, :4]
        z[:, 4:] = x[:, 4:].sin()
        return x + z

    model = net(f)
    chain = quiet(model)
    assert chain.traced_by == "torch.export"
    exact(chain, model, units=3)


def test_a_mean_over_a_stack_is_a_sum():
    model = net(lambda s, x: torch.stack([x, s.a(s.ln(x))]).mean(0))
    chain = quiet(model)
    exact(chain, model, units=3, rounding=1e-6)
    assert torch.allclose(chain.without(1)(X), deleted(model, lambda m: m[2].a)(X), atol=1e-6)


def test_a_projection_beside_a_weight_of_two_parts_is_the_skip():
    class Convolutional(nn.Module):
        """A temporal convolutional network: the first block's skip is a projection that no name tells."""

        def __init__(self):
            super().__init__()
            norm = nn.utils.parametrizations.weight_norm
            sizes = [(8, 6), (6, 6), (6, 6)]
            self.blocks = nn.ModuleList(nn.Sequential(norm(nn.Linear(*size)), nn.ReLU()) for size in sizes)
            self.down, self.o = nn.Linear(8, 6), nn.Linear(6, 8)

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                x = torch.relu(block(x) + (x if i else self.down(x)))
            return self.o(x)

    model = seeded(Convolutional)
    chain = quiet(model)
    exact(chain, model, units=3)
    assert isinstance(chain.units[0].skip, nn.Linear)
    assert torch.equal(chain.without(0)(X), deleted(model, lambda m: m.blocks[0])(X))


@pytest.mark.parametrize("branch", [
    lambda s, x: s.g * s.a(x),
    lambda s, x: s.a(x).view(-1, 2, 4).transpose(1, 2).reshape(len(x), 8),
    lambda s, x: torch.sigmoid(s.b(x)) * s.a(x),
    lambda s, x: F.relu(s.a(x)).square() / 2,
], ids=["gain", "views", "gate", "square"])
def test_a_branch_ends_where_zeros_stay_zeros(branch):
    model = net(lambda s, x: x + branch(s, s.ln(x)))
    chain = quiet(model)
    exact(chain, model, units=3)
    checks = chain.verify(X).set_index("check")
    assert checks.loc["deletion", ["compared", "equal"]].tolist() == [3, 3]


def test_a_share_of_the_branch_that_is_no_product_of_zeros_is_not_compared():
    for branch in (lambda s, x: s.g / (2 + s.a(x).sigmoid()), lambda s, x: s.a(x) + s.g):
        model = net(lambda s, x, branch=branch: x + branch(s, s.ln(x)))
        checks = unravel(model, X).verify(X).set_index("check")
        assert checks.compared["deletion"] == 0


def test_units_without_layers_are_named_by_their_parameters():
    chain = quiet(net(lambda s, x: x + torch.tanh(x) * s.g))
    assert [unit.name for unit in chain.units] == ["1", "2", "3"]
    model = wrapped(lambda s, x: s.o((h := s.i(x)) + torch.tanh(h @ s.m.weight)))
    assert [unit.name for unit in quiet(model).units] == ["m.weight"]


def test_branches_that_the_gradient_does_not_reach():
    model = net(lambda s, x: x + s.a(s.ln(x.detach())))
    chain = quiet(model)
    exact(chain, model, units=3)
    y = torch.zeros(2, dtype=torch.long)
    gradients = gradient_by_length(chain, X, y)
    assert not gradients[1:].any()
    assert sample_path_gradients(chain, X, y, [0, 1], 2).norm.gt(0).tolist() == [True, True, False, False]


class Translator(nn.Module):
    """torch.nn.Transformer with a mask of which it asks whether it is causal."""

    def __init__(self):
        super().__init__()
        self.t = nn.Transformer(8, 2, 1, 2, 16, batch_first=True)
        self.o = linear()

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.o(self.t(source, target, tgt_mask=mask))


def test_masks_of_torch_transformers():
    model, inputs = seeded(Translator), (torch.randn(2, 5, 8), torch.randn(2, 4, 8))
    chain = quiet(model, inputs, stream="target")
    assert len(chain) == 6
    checks = chain.verify(inputs).set_index("check")
    assert checks.compared["deletion"] == 6
    longer = (torch.randn(3, 7, 8), torch.randn(3, 6, 8))
    assert torch.allclose(chain(longer), model(*longer), atol=1e-6)


def routed(s, x):
    chosen = s.a(x).sum(1) > 0
    y = torch.zeros_like(x)
    if chosen.any():
        y[chosen] = s.b(x[chosen])
    return x + y


def mapped(s, x):
    return x + torch.func.vmap(lambda row: s.a.weight @ row)(x)


@pytest.mark.parametrize("f", [routed, mapped])
def test_what_cannot_be_traced_is_refused_in_words_alone(f, capfd):
    with pytest.raises(Unsupported, match=r"cannot be traced: .*register their class with block_units"):
        unravel(net(f), X)
    assert capfd.readouterr() == ("", "")


def test_a_script_within_a_model_is_refused_by_its_name():
    model = net(add)
    model[2] = torch.jit.trace(model[2], X)
    with pytest.raises(Unsupported, match=r"^2 is a TorchScript program"):
        unravel(model, X)


def test_what_a_module_keeps_between_calls_is_given_back():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.cache, self.shapes = nn.Parameter(torch.randn(8)), {}, []

        def forward(self, x):
            self.shapes.append(len(x))
            if "table" not in self.cache:
                self.cache["table"] = self.table.exp()
            return x + self.cache["table"] * torch.tanh(x)

    model = seeded(lambda: nn.Sequential(linear(), Caching(), linear()))
    chain = unravel(model, X)
    assert len(chain) == 1
    assert model[1].cache == {}
    assert model[1].shapes == []


def test_a_model_without_a_backward_pass_is_compared_in_all_else():
    model = net(lambda s, x: torch.utils.checkpoint.checkpoint(lambda y: add(s, y), x, use_reentrant=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no input needs a gradient
        chain = unravel(model, X)
        checks = chain.verify(X).set_index("check")
    assert checks.compared.to_dict() == {"logits": 1, "deletion": 3}


def test_a_size_that_several_units_read_is_known_from_the_input():
    """torch.export reads a size once, from a value within the first block, and a later block uses it."""

    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.i, self.o, self.blocks = nn.Embedding(32, 8), linear(), linear(), body(lambda s, x: s.a(x))

        def forward(self, x):
            y = self.i(x)
            table = self.table(torch.arange(2 * x.shape[1], 0, -1.0).long())
            for block in self.blocks:
                scores = torch.einsum("btc,sc->bts", block(y), table)
                last = torch.arange(scores.shape[2]) - scores.shape[2]
                y = y + torch.einsum("bts,sc->btc", scores.softmax(2) * last, table)
            return self.o(y).mean(1) if x.shape[1] < 15 else self.o(y).sum(1)

    model, x = seeded(Sized), torch.randn(2, 5, 8)
    chain = quiet(model, x)
    assert chain.traced_by == "torch.export"
    exact(chain, model, x, units=3)
    assert torch.equal(chain(x[:, :3]), model(x[:, :3]))


def test_a_stream_without_gradients_is_told_of():
    def silent(s, x):
        with torch.no_grad():
            return x + s.a(s.ln(x)) if x.shape[1] < 100 else x

    with pytest.raises(Unsupported, match=r"torch\.no_grad\(\)"):
        unravel(net(silent), X)


def test_a_branch_that_is_added_to_all_parts_of_a_larger_state():
    model, y = net(lambda s, x: x + s.a(x).mean(1, keepdim=True)), torch.tensor([1, 2])
    chain = quiet(model)
    exact(chain, model, units=3)
    table = weight_spectrum(chain, X, y).groupby("unit").share.sum()
    loss = F.cross_entropy(model(X), y)
    weights = [list(block.a.parameters()) for block in model[1:4]]
    whole = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, w, retain_graph=True)]) for w in weights]
    squares = torch.stack([g @ g for g in whole])
    assert table.tolist() == pytest.approx((squares / squares.sum()).tolist(), rel=1e-4)


def test_a_skip_that_is_added_to_all_parts_of_a_larger_branch_is_none():
    """Its deletion would leave a smaller state than the network's."""
    model = net(lambda s, x: add(s, x.mean(0, keepdim=True) + s.b(s.ln(x))))
    chain = quiet(model)
    exact(chain, model, units=3)
    assert any("3 of 6 additions became units" in note for note in chain.notes)


def test_an_argument_that_lends_its_shape_or_type_alone_is_no_part_of_the_stream():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.i, self.o, self.blocks = nn.Embedding(9, 8), linear(), linear(), body(add)

        def forward(self, x):
            y = self.i(x)
            positions = self.table(torch.arange(len(x))).type_as(y).expand_as(y).to(y)
            return self.o(self.blocks(y + positions))

    model = seeded(Positions)
    chain = quiet(model)
    exact(chain, model, units=3)
    assert [unit.name for unit in chain.units] == ["blocks.0", "blocks.1", "blocks.2"]


def test_hooks_of_transformers_that_only_collect_are_no_obstacle():
    def hook(module, args, output):
        """Stand for the one that transformers leaves on every layer of a model called with output_hidden_states."""

    hook.__module__ = "transformers.utils.output_capturing"
    model = net(add)
    model[2].register_forward_hook(hook)
    exact(quiet(model), model, units=3)
    hook.__module__ = __name__
    with pytest.raises(Unsupported, match=r"^2 has a hook"):
        unravel(model, X)


def test_two_embeddings_of_the_tokens_make_no_unit():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.o, self.blocks = nn.Embedding(9, 8), linear(), body(add)
            self.register_buffer("places", torch.randn(9, 8))

        def forward(self, tokens):
            return self.o(self.blocks(self.tokens(tokens) + self.places[tokens.cumsum(1) % 9])).mean(1)

    model, tokens = seeded(Positions), torch.tensor([[1, 2, 3], [4, 5, 6]])
    exact(quiet(model, tokens), model, tokens, units=3)


class Images(nn.Module):
    def __init__(self, decide=False):
        super().__init__()
        self.i, self.o, self.decide = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 8), decide
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4)) for _ in range(3)
        )

    def forward(self, x):
        y = self.i(x)
        for block in self.blocks:
            y = y + block(y) if not self.decide or x.shape[2] > 2 else y
        return self.o(y.mean((2, 3)))


def test_batch_norm_that_torch_export_takes_apart_still_ends_a_branch():
    model, x = seeded(lambda: Images(decide=True)), torch.randn(2, 3, 16, 16)
    chain = quiet(model, x)
    assert chain.traced_by == "torch.export"
    checks = chain.verify(x).set_index("check")
    assert checks.loc["deletion", ["compared", "equal"]].tolist() == [3, 3]


def test_gradients_are_compared_on_few_and_small_images():
    model, x, seen = seeded(Images), torch.randn(5, 3, 160, 160), []
    handle = model.i.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    chain = quiet(model, x)
    handle.remove()
    assert seen == 3 * [(5, 3, 160, 160)] + 2 * [(2, 3, 64, 64)]  # the model, its graph, the chain; then both again
    assert torch.equal(chain(x), model(x))


# ---------------------------------------------------------------- values of the first layer that later ones read


class ValueResiduals(nn.Module):
    """Layers that add the first one's values to their own, as ResFormer's do; with ``mixed``, the first state, too."""

    def __init__(self, mixed):
        super().__init__()
        self.i, self.o, self.layers, self.mixed = linear(), linear(), body(add, 4), mixed

    def forward(self, x):
        y = first = self.i(x)
        values = None
        for layer in self.layers:
            y = 0.9 * y + 0.1 * first if self.mixed else y
            own = layer.a(layer.ln(y))
            values = own if values is None else values
            y = y + layer.b(torch.tanh(0.5 * own + 0.5 * values))
        return self.o(y)


@pytest.mark.parametrize("mixed", [False, True])
def test_values_that_the_first_layer_hands_to_all_others_are_the_stems(mixed):
    model = seeded(lambda: ValueResiduals(mixed))
    chain = quiet(model)
    exact(chain, model, units=4, rounding=1e-6)
    assert any("outlast" in note for note in chain.notes)
    for i, layer in enumerate(model.layers):
        other = copy.deepcopy(model)
        nn.init.zeros_(other.layers[i].b.weight)
        nn.init.zeros_(other.layers[i].b.bias)
        assert torch.allclose(chain.without(i)(X), other(X), atol=1e-6)
        assert layer.b.weight in set(chain.units[i].branch.parameters())


# ---------------------------------------------------------------- what only looks like a layer, an addition or a choice


def test_centring_is_no_unit():
    def centred(s, x):
        x = add(s, x)
        x = x - x.mean(-1, keepdim=True)
        return x / x.square().mean(-1, keepdim=True).sqrt()

    model = net(centred)
    chain = quiet(model)
    exact(chain, model, units=3, rounding=1e-6)
    assert [unit.name for unit in chain.units] == ["1", "2", "3"]


def test_blocks_that_live_in_modules_of_torch_are_looked_into():
    parametrized = net(add)
    nn.utils.parametrize.register_parametrization(parametrized[2], "g", nn.Identity())
    exact(quiet(parametrized.eval()), parametrized, units=3, rounding=1e-6)
    inner = seeded(lambda: nn.Sequential(net(add), nn.DataParallel(net(add))))
    exact(quiet(inner), inner, units=6, rounding=1e-6)
    assert _is_layer(nn.utils.parametrizations.weight_norm(linear()))
    encoder = nn.TransformerEncoderLayer(8, 2)
    encoder.register_parameter("g", nn.Parameter(torch.ones(8)))
    nn.utils.parametrize.register_parametrization(encoder, "g", nn.Identity())
    assert not _is_layer(encoder)


def test_a_block_named_twice_is_one_unit():
    model = net(add)
    chain = unravel(model, X, units=["1", "1", "2"])
    assert [unit.name for unit in chain.units] == ["1", "2"]
    assert not torch.equal(chain.without(0)(X), chain(X))


def test_a_mask_that_is_asked_whether_it_is_a_tensor():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = body(add)

        def forward(self, x, mask=None):
            for block in self.blocks:
                x = x + block.a(x) * (mask.unsqueeze(-1) if torch.is_tensor(mask) else 1)
            return x

    model, mask = seeded(Masked), torch.ones(2, 5, dtype=torch.long)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    chain = unravel(model, (x, mask))
    mask[:, 3:] = 0
    assert torch.equal(chain((x, mask)), model(x, mask))
    assert len(chain) == 3


# ---------------------------------------------------------------- inputs, outputs and what a pass leaves behind


def exits(form):
    def f(s, x):
        x, found = s.i(x), []
        for block in s.body:
            x = block(x)
            found.append(s.o(x))
        return form(found)

    return wrapped(f)


@pytest.mark.parametrize("form", [list, lambda found: dict(enumerate(found)), lambda found: (found[0], found[1:])])
def test_additions_that_lead_to_other_outputs_alone_are_told_of(form):
    model = exits(form)
    with pytest.warns(UserWarning, match="2 more additions lead to other outputs"):
        chain = unravel(model, X)
    assert len(chain) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(unravel(exits(lambda found: found[-1]), X)) == 3
        assert len(unravel(exits(lambda found: (found[-1], found[0])), X)) == 3


def test_a_model_that_overwrites_its_input_is_handed_copies():
    model, x = wrapped(lambda s, x: s.o(s.body(s.i(x.mul_(2))))), X.clone()
    chain = unravel(model, x)
    chain.verify(x)
    assert torch.equal(x, X)
    assert torch.equal(chain(x), model(X.clone()))
    assert torch.equal(x, X)


def test_a_model_that_counts_its_calls_is_refused_where_it_matters():
    def counting(step):
        def f(s, x):
            s.calls = getattr(s, "calls", 0) + 1
            return s.o(s.body(s.i(x))) * (1 + step * s.calls)

        return wrapped(f)

    exact(unravel(counting(0), X), counting(0), units=3)
    model = counting(1)
    with pytest.raises(Unsupported, match="each changes an attribute of its modules"):
        unravel(model, X)
    assert not hasattr(model, "calls")


def test_what_torch_says_of_a_model_while_it_is_traced_is_not_handed_on():
    class Instance(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.body, self.o = linear(), body(add), linear()

        def forward(self, x):  # reversible normalisation
            self.mean, self.scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
            return self.o(self.body(self.i((x - self.mean) / self.scale))) * self.scale + self.mean

    model, x = seeded(Instance), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chain = unravel(model, x)
    assert [str(w.message)[:13] for w in caught] == ["3 of 4 additi"]
    assert not hasattr(model, "mean")
    assert any("path gradients hold that fixed" in note for note in chain.notes)
    assert torch.equal(chain(x), model(x))
    assert not any("hold that fixed" in note for note in unravel(net(add), X).notes)


def test_complex_networks_are_compared_with_their_gradients():
    class Complex(nn.Module):
        def __init__(self, real):
            super().__init__()
            self.i, self.layers, self.real = self.layer(), nn.ModuleList(self.layer() for _ in range(3)), real

        @staticmethod
        def layer():
            return nn.Linear(8, 8, dtype=torch.complex64)

        def forward(self, x):
            x = self.i(x)
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x.abs() if self.real else x

    x = torch.randn(2, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    for real in (True, False):
        chain = unravel(seeded(lambda real=real: Complex(real)), x)
        table = chain.verify(x).set_index("check")
        assert table["compared"].to_dict() == {
            "logits": 1, "gradient at the input": 1, "gradient at the parameters": 8, "deletion": 3
        }
    with pytest.raises(TypeError, match="loss of your own"):
        gradient_by_length(chain, x, torch.zeros(2, dtype=torch.long))
    assert gradient_by_length(chain, x, x, lambda logits, y: (logits - y).abs().sum(), at="pixels").is_complex()


def test_functions_that_ask_for_the_mode_are_told_of():
    model = net(lambda s, x: x + F.dropout(s.a(s.ln(x)), 0.5, training=s.training))
    chain = unravel(model, X)
    assert [note for note in chain.notes if note.startswith("dropout: computed as in eval mode")]
    assert torch.equal(chain.train()(X), chain.eval()(X))
    assert unravel(net(add), X).notes == []


@pytest.mark.parametrize("later", [
    lambda s, y, h: y + s.g(torch.tanh(y)) * h,
    lambda s, y, h: y + s.g(torch.softmax(y @ h.T, -1) @ h),
    lambda s, y, h: y + s.g(torch.cat([y, h], 1)[:, ::2]),
], ids=["gate", "attention", "input"])
def test_a_branch_that_is_read_again_later_is_no_unit_whose_deletion_leaves_it(later):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.f, self.g, self.k, self.o = (linear() for _ in range(5))

        def forward(self, x):
            y = self.i(x)
            h = self.f(torch.tanh(y))
            y = later(self, y + h, h)
            return self.o(y + self.k(torch.tanh(y)))

    model = seeded(Again)
    with pytest.warns(UserWarning, match=r"2 of 3 additions became units; the rest lie in the stem \(1\)"):
        chain = unravel(model, X)
    assert [unit.name for unit in chain.units] == ["g", "k"]
    exact(chain, model, units=2)


@pytest.mark.parametrize("f", [
    lambda x, y: torch.cat((x[None], y[None])).sum(0), lambda x, y: torch.cat([x, y], 1).view(-1, 2, 8).sum(1),
    lambda x, y: torch.stack([x, y]).cumsum(0)[-1], lambda x, y: torch._foreach_add([x], [y])[0],
    lambda x, y: 2 * F.avg_pool1d(torch.stack([x, y], -1), 2)[..., 0],
], ids=["None", "view", "cumsum", "foreach", "pool"])
def test_an_addition_in_another_form_is_counted(f):
    blocks = [Block(add), Block(lambda s, x: f(x, s.a(s.ln(x)))), Block(add)]
    with pytest.warns(UserWarning, match="2 of 3 additions became units"):
        chain = unravel(seeded(lambda: nn.Sequential(linear(), *blocks, linear())), X)
    assert [unit.residual for unit in chain.units] == [True, False, True]


def test_a_loss_before_the_logits_is_refused_in_words():
    model = wrapped(lambda s, x: ((y := s.o(s.body(s.i(x)))).sum(), y))
    with pytest.raises(Unsupported, match="a single number first, such as a loss"):
        unravel(model, X)


def test_autocast_around_a_whole_forward_is_kept():
    model = wrapped(torch.autocast("cpu", torch.bfloat16)(lambda s, x: s.body(s.i(x))))
    chain = unravel(model, X)
    with torch.no_grad():
        assert model(X).dtype == chain(X).dtype == torch.bfloat16
        assert torch.equal(chain(X), model(X))


def test_a_chain_with_a_context_can_be_copied():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.t, self.i, self.o, self.layers = linear(), linear(), linear(), nn.ModuleList(map(linear_at, range(3)))

        def forward(self, x, t):
            t, x = self.t(t), self.i(x)
            for layer in self.layers:
                x = x + torch.tanh(layer(x + t))
            return self.o(x)

    def linear_at(_):
        return linear()

    model = seeded(Conditioned)
    chain = unravel(model, (X, X.flip(0)), stream="x")
    assert chain((X, X.flip(0))).requires_grad  # and its graph hangs on the context
    other = copy.deepcopy(chain)
    assert torch.equal(other((X, X)), model(X, X))
    y = torch.zeros(2, dtype=torch.long)
    double = gradient_by_length(chain, (X, X), y, dtype=torch.float64)
    assert torch.allclose(double.float(), gradient_by_length(chain, (X, X), y), atol=1e-6)


def test_complex_values_assigned_to_a_slice_keep_their_gradient():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat) / 3)

        def forward(self, x):
            f = torch.fft.rfft(x)
            kept = torch.zeros(*x.shape[:-1], x.shape[-1] // 2 + 1, dtype=torch.cfloat)
            kept[..., :3] = f[..., :3] @ self.w
            return x + torch.fft.irfft(kept, n=x.shape[-1])

    model = seeded(lambda: nn.Sequential(linear(), *(Spectral() for _ in range(3)), linear()))
    exact(unravel(model, X), model, units=3, rounding=1e-6)


def test_a_chain_without_the_gradient_that_the_model_has_is_refused(monkeypatch):
    def broken(module, model, x, true=gradients):
        if module is not model:
            raise RuntimeError("no derivative")
        return true(module, model, x)

    monkeypatch.setattr("unravelling.verify.gradients", broken)
    with pytest.raises(Unsupported, match="the chain fails where the model does not: no derivative"):
        unravel(net(add), X)


def test_hooks_of_all_modules_are_not_called_while_a_model_is_traced():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(output)))
    try:
        chain = unravel(net(add), X)
        assert set(seen) == {torch.Tensor}
        seen.clear()
        chain(X)
        assert len(seen) > 3
    finally:
        handle.remove()


def test_weights_without_a_shape_or_values_are_refused_by_name():
    with pytest.raises(Unsupported, match=r"0\.weight has no shape yet"):
        unravel(nn.Sequential(nn.LazyLinear(8), Block(add)).eval(), X)
    with pytest.raises(Unsupported, match=r"0\.weight is on the device meta"):
        unravel(net(add).to("meta"), X)
    assert len(unravel(net(add).to("meta"))) == 3


@pytest.mark.parametrize("e", [lambda s, x, z: s.m(z), lambda s, x, z: s.m(x), lambda s, x, z: s.m(x.mean(0, True))],
                         ids=["of the state", "of the input", "of their mean"])
def test_a_value_beside_the_state_that_all_blocks_read_is_the_stems(e):
    def f(s, x):
        z = s.i(x)
        beside = e(s, x, z)
        for block in s.body:
            z = z + block.a(torch.tanh(z + beside))
        return s.o(z)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = unravel(wrapped(f), X)
    assert [unit.name for unit in chain.units] == ["body.0.a", "body.1.a", "body.2.a"]
    exact(chain, wrapped(f), units=3)
    assert any("path gradients hold that fixed" in note for note in chain.notes)


def test_what_crosses_to_a_later_sum_of_the_stream_is_not_held():
    class Crossing(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.f, self.k, self.g, self.m, self.o = (linear() for _ in range(6))

        def forward(self, x):
            y = self.i(x)
            h = self.f(torch.tanh(y))
            y = y + self.k(torch.tanh(h))
            y = y + self.g(torch.tanh(y)) + h  # which lies within the first unit
            return self.o(y + self.m(torch.tanh(y)))

    model = seeded(Crossing)
    with pytest.warns(UserWarning, match="2 of 4 additions became units"):
        chain = unravel(model, X)
    assert not any("the stem computes them" in note for note in chain.notes)
    exact(chain, model, units=2, rounding=1e-6)
