"""The parts of `unravel` on small networks, against values computed by hand; whole architectures are elsewhere."""

import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from unravelling import Chain, Unit, block_units, delete_each, delete_random, gradient_by_length, reorder, unravel
from unravelling.chain import NoSkip, inputs_and_labels
from unravelling.lesion import evaluate_variants, reestimate_batch_norm, score, summarize, variant_logits
from unravelling.paths import cross_entropy, gradient_norms, mean_length
from unravelling.tracing.trace import Unsupported


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


def test_block_of_ones_own_in_three_lines():
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


def test_wrong_units_of_a_class_are_noticed_and_named():
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
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---------------------------------------------------------------- inputs


def test_context_is_that_of_the_last_input():
    model, (batch, labels) = seeded(Masked), tokens()
    with pytest.warns(UserWarning, match="attention_mask"):
        chain = unravel(model, batch)
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
    assert loss.mean() == pytest.approx(F.cross_entropy(torch.from_numpy(logits), labels).item(), rel=1e-6)


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
