"""The parts of `unravel` on small networks, against values computed by hand; whole architectures are elsewhere."""

import copy
import functools
import importlib
import inspect
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import unravelling
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from unravelling import Chain, Unit, delete_each, delete_random, evaluate, gradient_by_length, reorder, unravel
from unravelling.batches import inputs_and_labels
from unravelling.chain import NoSkip
from unravelling.from_model import Call
from unravelling.lesion import evaluate_variants, reestimate_batch_norm, score, summarize, variant_logits
from unravelling.paths import cross_entropy, gradient_norms, mean_length
from unravelling.tracing.trace import Unsupported
from unravelling.verify import compared_gradients


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear, self.tanh = nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh()

    def forward(self, y):
        return y + self.tanh(self.linear(self.norm(y)))


class Net(nn.Module):
    def __init__(self, block=Block, width=6, blocks=3):
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.layers = nn.ModuleList(block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        y = self.stem(x)
        for layer in self.layers:
            y = layer(y)
        return self.head(y)


class Guarded(Block):
    """A block whose control flow depends on the numbers, so that no graph can be made of it."""

    def forward(self, y):
        if not bool(y.isfinite().all()):
            raise FloatingPointError
        return super().forward(y)


class Masked(nn.Module):
    """A language model in the style of a library: a mask of the tokens, made once, and read by all blocks."""

    def __init__(self, width=6):
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 7)

    def forward(self, input_ids, attention_mask):
        y = self.embedding(input_ids)
        mask = (attention_mask == 1).to(y.dtype)[..., None]
        for layer in self.layers:
            y = y + torch.tanh(layer(y)) * mask
        return {"logits": self.head(y)}


class Guide(nn.Module):
    """A plain net, a block whose shape changes included."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))

    def forward(self, x):
        return self.features(x)


def seeded(build, *args, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **kwargs).eval()


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(5, (8,), generator=torch.Generator().manual_seed(2))


def tokens():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(7, (4, 5), generator=generator)
    mask = torch.randint(2, (4, 5), generator=generator)
    labels = torch.randint(7, (4, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}, labels


# ---------------------------------------------------------------- blocks


def test_block_of_ones_own_in_three_lines(block_units):
    class Mine(Guarded):
        pass

    model = seeded(Net, Mine)
    with pytest.raises(Unsupported, match="block_units"):
        unravel(model, X)

    @block_units.register
    def _(block: Mine):
        return [Unit(nn.Sequential(block.norm, block.linear, block.tanh), name="mlp")]

    chain = unravel(model, X)
    assert [unit.name for unit in chain.units] == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
    assert torch.equal(chain(X), model(X))
    assert {id(p) for p in chain.parameters()} == {id(p) for p in model.parameters()}


def test_wrong_units_of_a_class_are_noticed_and_named(block_units):
    class Careless(Guarded):
        pass

    @block_units.register
    def _(block: Careless):
        return [Unit(nn.Sequential(block.norm, block.linear))]

    with pytest.raises(Unsupported, match=r"unit 0 \(layers\.0\)"):
        unravel(seeded(Net, Careless), X)


def test_units_by_hand():
    model = seeded(Net)
    expected = unravel(model, X)
    by_name = unravel(model, X, units="layers.*")
    by_function = unravel(model, X, units="layers.*", branch=lambda b, y: torch.tanh(b.linear(b.norm(y))))
    some = unravel(model, X, units=["layers.1"])
    for chain in (expected, by_name, by_function, some):
        assert torch.equal(chain(X), model(X))
    assert len(by_name) == len(by_function) == 3
    assert len(some) == 1
    for i in range(3):
        assert torch.equal(by_function.without(i)(X), expected.without(i)(X))
    assert torch.equal(some.without(0)(X), expected.without(1)(X))


def test_branch_that_contains_the_stream_already():
    with pytest.raises(Unsupported, match="contains the stream already"):
        unravel(seeded(Net), X, units="layers.*", branch=lambda block, y: block(y))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"units": "blocks.*"}, "names no module"),
        ({"units": ["layers.7"]}, r"layers\.7"),
        ({"units": ["layers.0", "layers.0.norm"]}, "lies within"),
        ({"branch": "linear"}, "give units"),
        ({"skip": "linear"}, "give branch"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        unravel(seeded(Net), X, **options)


def test_plain_net_by_hand():
    model = seeded(Guide)
    with pytest.raises(Unsupported, match="no skip"):
        unravel(model, X)
    chain = unravel(model, X, units="features.*")
    assert [unit.residual for unit in chain.units] == [False] * 4
    assert [unit.can_be_deleted for unit in chain.units] == [False, True, True, False]
    assert [unit.stage for unit in chain.units] == [1, 1, 1, 2]
    assert torch.equal(chain(X), model(X))
    features = model.features
    assert torch.equal(chain.without(1)(X), features[3](features[2](features[0](X))))
    with pytest.raises(ValueError, match=r"features\.3 has no skip"):
        chain.without(3)
    with pytest.raises(ValueError, match="has no skip"):
        NoSkip()(X)


def test_without_an_example():
    model = seeded(Net)
    chain = unravel(model)
    assert torch.equal(chain(X), model(X))
    assert len(chain) == 3


# ---------------------------------------------------------------- the model


def test_sizes_that_tracing_took_for_constants_are_refused_at_others():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            y = self.stem(x)
            for layer in self.layers:
                y = y + layer(y).relu()
            return self.head(F.avg_pool2d(y, int(y.shape[-1])).flatten(1))  # the pixels, as a number in the graph

    model = Pooled().eval()
    chain = unravel(model, torch.randn(1, 3, 8, 8))
    assert chain.traced_by == "torch.export"
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(chain(x), model(x))
    message = r"^x has size \(2, 3, 12, 12\), and torch.export traced this chain for \(any, 3, 8, 8\): unravel the"
    with pytest.raises(ValueError, match=message):
        chain(torch.randn(2, 3, 12, 12))


@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_whose_size_is_a_constant_of_the_graph(size):
    class Constant(Net):
        def forward(self, x):
            return super().forward(x).reshape(int(x.shape[0]), -1)

    model, x = Constant().eval(), torch.randn(size, 4)
    chain = unravel(model, x)
    assert torch.equal(chain(x), model(x))
    with pytest.raises(ValueError, match=rf"^x has size \(3, 4\), and torch.export traced .* for \({size}, 4\)"):
        chain(torch.randn(3, 4))


def test_training_mode_is_warned_of_and_kept():
    model = seeded(Net)
    model.layers[1].train()
    before = [module.training for module in model.modules()]
    with pytest.warns(UserWarning, match="training mode"):
        unravel(model, X)
    assert [module.training for module in model.modules()] == before


def test_a_clean_model_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unravel(seeded(Net), X)


def test_verify_finds_a_changed_unit():
    model = seeded(Net)
    chain = unravel(model, X)
    table = chain.verify(X)
    assert (table.equal == table.compared).all()
    assert table.check.tolist() == ["logits", "gradient at the input", "gradient at the parameters", "deletion"]
    assert table.set_index("check").compared["gradient at the parameters"] == len(list(model.parameters()))
    chain.units[1] = chain.units[1].scaled(1.01)
    with pytest.raises(ValueError, match=r"unit 1 \(layers\.1\)"):
        chain.verify(X)


def test_gradients_are_compared_with_the_largest_of_their_kind():
    expected = {("input", "0"): torch.ones(1), ("parameters", "w"): torch.full((1,), 100.0)}
    found = expected | {("input", "0"): torch.full((1,), 1.5)}
    assert [gap for *_, gap in compared_gradients(found, expected)] == [0.5, 0]


def test_verify_finds_a_wrong_gradient():
    """A branch with the right value that passes nothing back."""

    class Detached(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, y):
            return self.inner(y).detach()

    chain = unravel(seeded(Net), X)
    chain.units[1].branch = Detached(chain.units[1].branch)
    with pytest.raises(ValueError, match="gradient"):
        chain.verify(X)


def test_verify_finds_a_wrong_skip():
    """Value and gradient are right, but the branch holds a part of the skip, which its deletion takes away."""

    class Half(nn.Module):
        def forward(self, y):
            return y / 2

    class More(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, y):
            return self.inner(y) + y / 2

    model = seeded(Net, Block)
    for layer in model.layers:
        layer.linear.weight.data *= 0.1
    chain = unravel(model, X, units="layers.*")
    chain.verify(X)
    chain.units[0].skip, chain.units[0].branch = Half(), More(chain.units[0].branch)
    with pytest.raises(ValueError, match=r"deletion of unit 0"):
        chain.verify(X)


def test_importing_the_library_imports_no_other():
    code = "import sys, unravelling; print([n for n in ('torchvision', 'timm', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------- inputs


def test_context_is_that_of_the_last_input():
    model, (batch, labels) = seeded(Masked), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain = unravel(model, batch)
    assert chain.notes == ["the stream starts at 'input_ids', and the units are handed 'attention_mask' beside it"]
    other = batch | {"attention_mask": 1 - batch["attention_mask"]}
    for x in (batch, other, {name: value[:3, :4] for name, value in batch.items()}):
        assert torch.equal(chain(x), model(**x)["logits"])
    assert not torch.equal(chain(batch), chain(other))
    twin = copy.deepcopy(chain).double()
    twin(other)  # must not fill the first chain's context
    y = chain.stem(batch)
    twin(other)
    assert torch.equal(chain.head(chain.units[1](chain.units[0](y))), model(**batch)["logits"])
    with pytest.raises(ValueError, match="attention_mask"):
        chain({"input_ids": batch["input_ids"]})
    with pytest.raises(RuntimeError, match="stem"):
        unravel_again(model, batch).units[0](y)
    assert torch.isfinite(gradient_by_length(chain, batch, labels)).all()


def unravel_again(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = unravel(model, batch)
    chain.stem.context.values = {}
    return chain


def test_losses_of_tokens():
    model, (batch, labels) = seeded(Masked), tokens()
    labels[0, 1:] = -100
    labels[2, 0] = -100
    chain = unravel_again(model, batch)
    halves = [{k: v[i : i + 2] for k, v in (batch | {"labels": labels}).items()} for i in (0, 2)]
    table = delete_each(chain, halves)
    for i in range(2):
        logits = chain.without(i)(batch)
        kept = labels != -100
        assert table.loss[i] == pytest.approx(F.cross_entropy(logits[kept], labels[kept]).item(), rel=1e-6)
        assert table.error[i] == pytest.approx((logits.argmax(-1) != labels)[kept].double().mean().item())
    assert (table.images == 4).all()
    assert table.equals(
        delete_each(chain, [(({k: v[i : i + 2] for k, v in batch.items()}), labels[i : i + 2]) for i in (0, 2)])
    )
    wrong, loss = evaluate_variants(chain, halves, [(0, 1), (0, ~1)])
    assert wrong.shape == loss.shape == (2, 4)
    assert cross_entropy(chain(batch), labels).item() == pytest.approx(loss[0].mean(), rel=1e-6)
    one = {name: value[:1] for name, value in batch.items()}
    assert summarize(*evaluate_variants(chain, one | {"labels": labels[:1]}, [(0, 1), (0, ~1)])).images[0] == 1


def test_labels_of_a_causal_language_model_are_shifted_in_dicts_alone():
    model, (batch, labels) = seeded(Masked), tokens()
    chain = unravel_again(model, batch)
    assert torch.equal(inputs_and_labels(chain, batch | {"labels": labels})[1], labels)
    chain.stem.shift_labels = True
    shifted = inputs_and_labels(chain, batch | {"labels": labels})[1]
    assert torch.equal(shifted[:, :-1], labels[:, 1:])
    assert (shifted[:, -1] == -100).all()
    assert torch.equal(inputs_and_labels(chain, (batch, labels))[1], labels)
    with pytest.raises(ValueError, match="no labels"):
        inputs_and_labels(chain, batch)
    given = gradient_by_length(chain, batch | {"labels": labels})
    assert torch.equal(given, gradient_by_length(chain, batch, shifted))
    assert torch.equal(mean_length(chain, batch | {"labels": labels}), mean_length(chain, batch, shifted))


def test_streamed_scores_equal_those_of_kept_logits():
    chain = unravel(seeded(Net), X)
    loader = DataLoader(TensorDataset(X, Y), batch_size=3)
    variants = [(0, 1, 2), (0, ~1, 2), (2, 1, 0)]
    kept = score(*variant_logits(chain, loader, variants))
    for found, expected in zip(evaluate_variants(chain, loader, variants), kept, strict=True):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    whole = evaluate_variants(chain, (X, Y), variants)
    assert np.allclose(whole[1], kept[1], rtol=1e-6)


def test_any_loss():
    chain = unravel(seeded(Net), X)
    target = torch.randn(8, 5, generator=torch.Generator().manual_seed(5))
    table = delete_each(chain, [(X[:3], target[:3]), (X[3:], target[3:])], loss=F.mse_loss)
    for i in range(3):
        assert table.loss[i] == pytest.approx(F.mse_loss(chain.without(i)(X), target).item(), rel=1e-5)
    assert table.error.isna().all()
    same = delete_each(chain, [(X, Y)], loss=F.cross_entropy)
    plain = delete_each(chain, [(X, Y)])
    assert np.allclose(same.loss, plain.loss, rtol=1e-5)
    assert same.error.equals(plain.error)
    assert len(delete_random(chain, [(X, target)], 2, 3, loss=F.mse_loss)) == 3
    assert len(reorder(chain, [(X, target)], 1, 2, loss=F.mse_loss)) == 2


def test_segmentation():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)

    class Identity(nn.Module):
        def forward(self, y):
            return y

    chain = Chain(Identity(), [Unit(Identity())], Identity())
    labels = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    _, loss = evaluate_variants(chain, [(torch.from_numpy(logits), labels)], [(~0,)])
    expected = F.cross_entropy(torch.from_numpy(logits), labels).item()
    assert loss.mean() == pytest.approx(expected, rel=1e-6)
    missed = int((logits.argmax(1) != labels.numpy()).sum())
    whole = evaluate(chain.without(0), [(torch.from_numpy(logits), labels)])
    assert whole == {"error": missed / 32, "loss": pytest.approx(expected, rel=1e-6), "wrong": missed, "images": 32}


def test_units_that_cannot_be_deleted_are_missing_values():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Block(4), nn.Linear(4, 6), Block(6)

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    chain = unravel(seeded(Mixed), X, units=["a", "b", "c"])
    table = delete_each(chain, [(X, Y)])
    assert table.loss.isna().tolist() == [False, True, False]
    assert table.unit.tolist() == [0, 1, 2]
    assert set(delete_random(chain, [(X, Y)], 1, 20).units) == {"0", "2"}
    with pytest.raises(ValueError, match="b has no skip"):
        delete_random(chain, [(X, Y)], 1, 1, candidates=[1])
    g = gradient_by_length(chain, X, Y)
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(chain(x), Y), x)[0]
    assert torch.allclose(g.sum(0), expected, rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="no unit"):
        delete_each(unravel(nn.Sequential(nn.Linear(4, 5)).eval(), X, units=["0"]), [(X, Y)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    model = seeded(Net).to(dtype)
    x = X if dtype != torch.float64 else X.double()  # half precision: inputs are cast
    chain = unravel(model, x)
    assert torch.equal(chain(x.to(dtype)), model(x.to(dtype)))
    assert delete_each(chain, [(x, Y)]).loss.notna().all()
    assert gradient_by_length(chain, x, Y).dtype == dtype
    assert gradient_by_length(chain, x, Y, dtype=torch.float64).dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu():
    model = seeded(Net).cuda()
    chain = unravel(model, X)
    assert torch.equal(chain(X.cuda()), model(X.cuda()))
    assert len(delete_each(chain, [(X, Y)])) == 3
    assert gradient_by_length(chain, X, Y).is_cuda


def test_tokens_have_no_gradient():
    model, (batch, labels) = seeded(Masked), tokens()
    chain = unravel_again(model, batch)
    with pytest.raises(ValueError, match="stem"):
        gradient_by_length(chain, batch, labels, at="pixels")
    assert len(gradient_norms(chain, batch, labels)) == 3


def test_dropout_in_training_mode_is_refused():
    model = nn.Sequential(Block(4), nn.Dropout(0.5), nn.Linear(4, 5)).eval()
    chain = unravel(model, X)
    model.train()
    with pytest.raises(ValueError, match="dropout"):
        gradient_by_length(chain, X, Y)


def test_batch_norm_as_a_function_cannot_be_estimated_anew():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 5)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x):
            return self.head(x + F.batch_norm(self.linear(x), self.mean, self.var))

    with pytest.raises(ValueError, match="register"):
        reestimate_batch_norm(unravel(seeded(Functional), X), [(X, Y)])


# ---------------------------------------------------------------- gradients, and what verify can tell


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is not its own."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class OwnBackward(Block):
    def forward(self, y):
        return y + self.tanh(Doubled.apply(self.linear(self.norm(y))))


class WithoutGradient(Block):
    def forward(self, y):
        with torch.no_grad():
            z = self.norm(y)
        return y + self.tanh(self.linear(z))


def test_a_chain_with_other_gradients_is_not_handed_over():
    with pytest.raises(Unsupported, match=r"gradient at the .* differs by .* block_units"):
        unravel(seeded(Net, OwnBackward), X)


def test_a_part_without_gradient_stays_without_one():
    chain = unravel(seeded(Net, WithoutGradient), X)
    assert chain.traced_by == "torch.export", "torch.fx loses it"
    table = chain.verify(X)
    assert (table.equal == table.compared).all()


def test_a_registered_block_keeps_a_backward_pass_of_its_own(block_units):
    class Registered(OwnBackward):
        pass

    @block_units.register
    def _(block: Registered):
        return [Unit(Call(block, lambda b, y: b.tanh(Doubled.apply(b.linear(b.norm(y))))))]

    model = seeded(Net, Registered)
    table = unravel(model, X).verify(X)
    assert (table.equal == table.compared).all()


class Attending(nn.Module):
    """Attention beside an MLP, added from left to right, which a chain does in another order."""

    def __init__(self, width=6, dtype=torch.float32):
        super().__init__()
        self.query, self.key, self.value, self.mlp = (nn.Linear(width, width, dtype=dtype) for _ in range(4))
        self.dtype = dtype

    def forward(self, y):
        z = y.to(self.dtype)
        attended = F.scaled_dot_product_attention(self.query(z), self.key(z), self.value(z))
        return y + attended.to(y.dtype) + torch.tanh(self.mlp(z)).to(y.dtype)


def test_verify_passes_where_a_gradient_is_zero_but_for_rounding():
    """The gradient at a key's bias is zero: softmax does not change when a constant is added."""
    model, x = seeded(Net, Attending, blocks=6), torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(6))
    logits = model(x)
    whole = torch.autograd.grad(logits.sum(), model.stem.bias, retain_graph=True)[0]
    of_biases = torch.autograd.grad(logits.sum(), [layer.key.bias for layer in model.layers])
    assert max(g.abs().max() for g in of_biases) < 1e-5 * whole.abs().max()
    table = unravel(model, x).verify(x).set_index("check")
    assert table.equal["gradient at the parameters"] < table.compared["gradient at the parameters"]


def test_verify_allows_what_the_lowest_precision_within_does():
    model = seeded(Net, lambda width: Attending(width, torch.bfloat16), blocks=4)
    x = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(6))
    table = unravel(model, x).verify(x)
    assert (table.tolerance == 0.05).all()
    chain = unravel(model, x)
    chain.units[1] = chain.units[1].scaled(1.5)
    with pytest.raises(ValueError, match="differs"):
        chain.verify(x)


def test_verify_says_how_many_deletions_it_could_not_compare():
    class Shifted(Block):
        def forward(self, y):
            return y + (self.linear(self.norm(y)) + 1)

    row = unravel(seeded(Net, Shifted), X).verify(X).set_index("check").loc["deletion"]
    assert (row.compared, row["of"], row.equal) == (0, 3, 0)
    assert np.isnan(row.difference)
    assert "no module" in row.reason
    assert unravel(seeded(Net), X).verify(X).set_index("check")["of"]["deletion"] == 3


# ---------------------------------------------------------------- examples


class Shifted(Net):
    """A second input of one row for the whole batch, and sizes as numbers, so that only torch.export can trace it."""

    def forward(self, x, row):
        y = self.stem(x).reshape(x.shape[0], int(x.shape[1]) + 2) + row
        for layer in self.layers:
            y = layer(y)
        return self.head(y)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_input_of_one_row_beside_a_batch(batch):
    model, row = seeded(Shifted), torch.randn(1, 6, generator=torch.Generator().manual_seed(4))
    with pytest.warns(UserWarning, match="several inputs"):
        chain = unravel(model, (X[:batch], row))
    assert chain.traced_by == "torch.export"
    assert torch.equal(chain((X[:batch], row)), model(X[:batch], row))
    if batch > 1:
        assert torch.equal(chain((X[:5], row)), model(X[:5], row))
    else:  # the row may be the only one because the batch is of one
        with pytest.raises(ValueError, match=r"row has size \(1, 6\).* the same batch"):
            chain((X[:5], row))
        rows = row.expand(5, 6)
        assert torch.equal(chain((X[:5], rows)), model(X[:5], rows))


def test_tracing_leaves_no_mark_on_the_example():
    class Constant(Net):
        def forward(self, x):
            return super().forward(x).reshape(int(x.shape[0]), -1)

    x = X.clone()
    unravel(seeded(Constant), x)
    assert vars(x) == {}
    assert torch.equal(x, X)
    torch.export.export(seeded(Net), (x,), strict=False)


# ---------------------------------------------------------------- language models of a library


def gpt2(cls=None):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0)
    config.eos_token_id = config.pad_token_id = 0
    return seeded(cls or transformers.GPT2LMHeadModel, config)


class Wrapper(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = pytest.importorskip("transformers").GPT2LMHeadModel(config)

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def test_labels_are_shifted_as_the_own_loss_of_a_causal_language_model_does():
    transformers = pytest.importorskip("transformers")

    class Mine(transformers.GPT2LMHeadModel):
        pass

    ids = tokens()[0]["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for cls in (transformers.GPT2LMHeadModel, Mine, Wrapper):
        model = gpt2(cls)
        expected = getattr(model, "model", model)(**batch, labels=ids).loss
        chain = unravel_again(model, batch)
        inputs, labels = inputs_and_labels(chain, batch | {"labels": ids})
        assert cross_entropy(chain(inputs), labels).item() == pytest.approx(expected.item(), rel=1e-5), cls


# ---------------------------------------------------------------- units that no class tells


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_encoder_layers_of_pytorch(norm_first, whole):
    class Encoder(Net):
        def __init__(self):
            super().__init__(blocks=0)
            layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x):
            y = self.stem(x)
            for layer in [self.encoder] if whole else self.encoder.layers:
                y = layer(y)
            return self.head(y)

    x = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(6))
    table = unravel(seeded(Encoder), x).verify(x).set_index("check")
    assert table.compared["deletion"] == table["of"]["deletion"] == 4


def test_a_transition_is_a_unit_that_changes_the_shape_of_its_state():
    class Projected(nn.Module):
        def __init__(self, width, wider):
            super().__init__()
            self.shortcut, self.linear = nn.Linear(width, wider, bias=False), nn.Linear(width, wider)

        def forward(self, y):
            return self.shortcut(y) + torch.tanh(self.linear(y))

    model = nn.Sequential(Projected(4, 4), Block(4), Projected(4, 6), Block(6), nn.Linear(6, 5)).eval()
    chain = unravel(model, X)
    assert [unit.is_transition for unit in chain.units] == [False, False, True, False]
    assert [unit.has_identity_skip for unit in chain.units] == [False, True, False, True]
    assert [unit.stage for unit in chain.units] == [1, 1, 2, 2]


def test_a_registered_block_that_takes_more_than_the_state_is_read_from_its_graph(block_units):
    class Gated(Block):
        def forward(self, y, gate):
            return y + self.tanh(self.linear(self.norm(y))) * gate

    class GatedNet(Net):
        def __init__(self):
            super().__init__(Gated)

        def forward(self, x, gate):
            y = self.stem(x)
            for layer in self.layers:
                y = layer(y, gate)
            return self.head(y)

    @block_units.register
    def _(block: Gated):
        return [Unit(nn.Sequential(block.norm, block.linear, block.tanh))]

    model, gate = seeded(GatedNet), torch.linspace(0.5, 1.5, 8)[:, None]
    with pytest.warns(UserWarning, match=r"layers\.0 is called with more than its state"):
        chain = unravel(model, (X, gate))
    assert len(chain) == 3
    for g in (gate, gate.flip(0)):
        assert torch.equal(chain((X, g)), model(X, g))


def test_names_of_modules_and_of_functions_are_apart():
    for name in ("from_model", "tracing", "tracing.trace", "tracing.reading", "tracing.parts", "verify"):
        assert inspect.ismodule(importlib.import_module(f"unravelling.{name}"))
        assert inspect.ismodule(functools.reduce(getattr, name.split("."), unravelling))
    assert inspect.isfunction(unravelling.unravel)


def test_modules_import_lower_floors_alone():
    floors = ["chain", "batches", "tracing.trace", "tracing.reading", "tracing.parts", "verify", "from_model"]
    for floor, name in enumerate(floors):
        module = importlib.import_module(f"unravelling.{name}")
        taken = {getattr(value, "__module__", None) for value in vars(module).values()}
        assert taken.isdisjoint(f"unravelling.{higher}" for higher in floors[floor + 1 :])


@pytest.mark.parametrize("case", ["empty", "tolerance", "negative", "NaN input", "NaN weight"])
def test_verify_refuses_what_would_compare_nothing(case):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3)).eval()
    x, tolerance = torch.randn(2, 4), None
    chain = unravel(model, x, units=["1"])
    if case == "empty":
        x = x[:0]
    elif case == "NaN input":
        x = x * float("nan")
    elif case == "NaN weight":
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
    else:
        tolerance = {"tolerance": float("nan"), "negative": -1.0}[case]
    with pytest.raises(ValueError, match="tolerance must be" if tolerance is not None else "logits for x"):
        chain.verify(x, tolerance=tolerance)


def test_a_copy_is_compared_with_a_copy_of_the_model():
    model = Net().eval()
    chain = copy.deepcopy(unravel(model, X))
    chain.verify(X)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    chain.verify(X)


@pytest.mark.parametrize("x", [torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.uint8), "text"])
def test_an_example_that_the_model_cannot_take(x):
    with pytest.raises(ValueError, match=r"^the model cannot take x, the example of shape"):
        unravel(Net().eval(), x)
