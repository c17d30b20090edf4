"""Networks: parameters counted by hand, torchvision's block, shapes, names and seeds."""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchvision.models.resnet as torchvision_resnet
from helpers import SMALL, randomized
from torch import nn
from torch.testing import assert_close
from unravelling import build, plain, resnet, vgg
from unravelling.nets import SHAPES, Pad, SkipInit


def parameters(chain):
    return sum(p.numel() for p in chain.parameters())


def post_activation_parameters(n):
    """Layer by layer, option A, 3 channels in, 10 classes; a batch norm has two parameters a channel."""
    stem = 3 * 16 * 9 + 2 * 16
    stage1 = n * (16 * 16 * 9 + 2 * 16 + 16 * 16 * 9 + 2 * 16)
    stage2 = (16 * 32 * 9 + 2 * 32 + 32 * 32 * 9 + 2 * 32) + (n - 1) * (32 * 32 * 9 + 2 * 32 + 32 * 32 * 9 + 2 * 32)
    stage3 = (32 * 64 * 9 + 2 * 64 + 64 * 64 * 9 + 2 * 64) + (n - 1) * (64 * 64 * 9 + 2 * 64 + 64 * 64 * 9 + 2 * 64)
    return stem + stage1 + stage2 + stage3 + (64 * 10 + 10)


def pre_activation_parameters(n):
    """The same with each batch norm before its convolution: none after the stem, one before the pooling."""
    stage1 = n * (2 * 16 + 16 * 16 * 9 + 2 * 16 + 16 * 16 * 9)
    stage2 = (2 * 16 + 16 * 32 * 9 + 2 * 32 + 32 * 32 * 9) + (n - 1) * (2 * 32 + 32 * 32 * 9 + 2 * 32 + 32 * 32 * 9)
    stage3 = (2 * 32 + 32 * 64 * 9 + 2 * 64 + 64 * 64 * 9) + (n - 1) * (2 * 64 + 64 * 64 * 9 + 2 * 64 + 64 * 64 * 9)
    return 3 * 16 * 9 + stage1 + stage2 + stage3 + 2 * 64 + (64 * 10 + 10)


@pytest.mark.parametrize(
    ("depth", "published", "exact"),
    [
        (20, "0.27", 269_722),
        (32, "0.46", 464_154),
        (44, "0.66", 658_586),
        (56, "0.85", 853_018),
        (110, "1.7", 1_727_962),
    ],
)
def test_parameters_of_the_2015_networks(depth, published, exact):
    n = (depth - 2) // 6
    for chain in (resnet(depth, preactivation=False), plain(depth, preactivation=False)):
        assert parameters(chain) == exact == post_activation_parameters(n)
    assert f"{exact / 1e6:.{len(published) - 2}f}" == published  # table 6 of He et al. (2015), in millions


@pytest.mark.parametrize("depth", [8, 20, 110])
def test_parameters_of_the_other_forms(depth):
    n = (depth - 2) // 6
    projection = 16 * 32 + 32 * 64
    assert parameters(resnet(depth)) == parameters(plain(depth)) == pre_activation_parameters(n)
    assert parameters(resnet(depth, shortcut="projection")) == pre_activation_parameters(n) + projection
    post = resnet(depth, shortcut="projection", preactivation=False)
    assert parameters(post) == post_activation_parameters(n) + projection + 2 * (32 + 64)


def test_parameters_of_vgg():
    channels = [3, *[128] * 13]  # in every layer, as in the paper
    convolutions = sum(9 * a * b for a, b in pairwise(channels))
    norms = sum(2 * c for c in channels[1:])
    hidden, output = 128 * 128 + 128, 128 * 10 + 10
    assert parameters(vgg(15)) == convolutions + norms + hidden + 2 * 128 + output
    biases = sum(channels[1:])
    assert parameters(vgg(15, batch_norm=False)) == convolutions + biases + hidden + output


@pytest.mark.parametrize(
    ("name", "depth"),
    [("resnet8", 8), ("resnet20-post", 20), ("plain56", 56), ("resnet110", 110), ("vgg15", 15), ("vgg15-nobn", 15)],
)
def test_depth_counts_the_weighted_layers(name, depth):
    chain = build(name, width=1)
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in chain.modules()) == depth
    assert len(chain) == (13 if name.startswith("vgg") else (depth - 2) // 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projection", [True, False])
def test_post_activation_block_is_torchvisions(projection, training):
    chain = randomized(resnet(14, width=16, preactivation=False, shortcut="projection"), dtype=torch.float64)
    unit = chain.units[2] if projection else chain.units[1]
    shape = (16, 32, 2) if projection else (16, 16, 1)
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32)) if projection else None
    block = torchvision_resnet.BasicBlock(*shape, downsample).double()
    pairs = list(zip([block.conv1, block.bn1, block.relu, block.conv2, block.bn2], unit.branch, strict=True))
    pairs += [(downsample, unit.skip)] if projection else []
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    block.train(training)
    unit.train(training)
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(i) for module, i in zip([block, unit], inputs, strict=True)]
    assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    for output in outputs:
        (output**2).sum().backward()
    assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-12)
    for theirs, ours in pairs:
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-12, msg=name)
        for p, q in zip(theirs.buffers(), ours.buffers(), strict=True):
            assert_close(q, p, rtol=1e-12, atol=1e-12)


def functional(name, chain, x):
    """The whole network from its list of parameters, as the papers draw it (width 4, two blocks a stage)."""
    kinds = nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, SkipInit
    parts = iter([module for module in chain.modules() if isinstance(module, kinds)])

    def conv(y, stride=1):
        part = next(parts)
        return F.conv2d(y, part.weight, part.bias, stride, part.weight.shape[-1] // 2)

    def norm(y):
        part = next(parts)
        return F.batch_norm(y, part.running_mean, part.running_var, part.weight, part.bias)

    def linear(y):
        part = next(parts)
        return y @ part.weight.T + part.bias

    if name == "vgg15":
        for layer in range(1, 14):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if layer in (2, 4, 7, 10, 13) else x
        return linear(F.relu(norm(linear(x.flatten(1)))))
    x = conv(x)
    x = F.relu(norm(x)) if "post" in name or "stem" in name else x
    for block in range(6):
        stride = 2 if block in (2, 4) else 1
        if "nobn" in name:
            f = conv(F.relu(conv(F.relu(x), stride))) * next(parts).factor
        elif "post" in name:
            f = norm(conv(F.relu(norm(conv(x, stride)))))
        else:
            f = conv(F.relu(norm(conv(F.relu(norm(x)), stride))))
        if stride == 2 and "projection" in name:
            x = norm(conv(x, 2)) if "post" in name else conv(x, 2)
        elif stride == 2:
            x = torch.cat([x[:, :, ::2, ::2], torch.zeros_like(f[:, x.shape[1] :])], 1)
        x = F.relu(x + f) if "post" in name else x + f
    x = x if "post" in name else F.relu(x if "nobn" in name else norm(x))
    return linear(x.mean((2, 3)))


@pytest.mark.parametrize(
    "name",
    ["resnet14", "resnet14-post", "resnet14-projection", "resnet14-post-projection", "resnet14-nobn", "resnet14-stem",
     "vgg15"],
)
def test_the_whole_network_by_hand(name):
    chain = randomized(build(name, "cifar10", width=4), dtype=torch.float64)
    assert chain.config["name"] == name
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(chain(x), functional(name, chain, x), rtol=1e-10, atol=1e-12)


def test_pad_keeps_every_other_pixel_and_appends_zeros():
    x = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)
    y = Pad(2, 2)(x)
    assert y.shape == (2, 5, 3, 2)
    for b in range(2):
        for c in range(5):
            for i in range(3):
                for j in range(2):
                    assert y[b, c, i, j] == (x[b, c, 2 * i, 2 * j] if c < 3 else 0)


@pytest.mark.parametrize(
    "name", ["resnet14", "resnet14-post", "resnet14-projection", "resnet14-nobn", "plain14", "vgg15"]
)
def test_states_and_their_gradients_keep_the_layout_that_is_fast(name):
    chain = build(name, "cifar10", width=4).to(memory_format=torch.channels_last)
    states = chain.trace(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    images = [state for state in states if state.requires_grad and state.shape[2:] != (1, 1)]
    gradients = torch.autograd.grad(chain.head(states[-1]).sum(), images)[:-1]  # the last is one number a channel
    for tensor in (*images, *gradients):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({"in_channels": 1, "image_size": 8, "width": 4}, [8, 8, 4, 4, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]),
        ({"in_channels": 3, "image_size": 32, "width": 4}, [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2, 1]),
    ],
)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_shapes_in_vgg(options, sides, batch_norm):
    chain = vgg(15, **options, batch_norm=batch_norm).eval()
    channels, side = options["in_channels"], options["image_size"]
    expected = [channels, *[4] * 13]
    with torch.no_grad():
        states = chain.trace(torch.randn(2, channels, side, side))
        assert [tuple(y.shape) for y in states] == [(2, c, s, s) for c, s in zip(expected, sides, strict=True)]
        assert chain.head(states[-1]).shape == (2, 10)
    changes = [a.shape != b.shape for a, b in pairwise(states)]
    assert [unit.is_transition for unit in chain.units] == changes
    assert [not unit.has_identity_skip for unit in chain.units] == changes


@pytest.mark.parametrize("width", [1, 3])
def test_only_the_first_layer_of_vgg_can_append_channels(width):
    chain = vgg(15, in_channels=1, width=width, image_size=8)
    appending = [[part.extra_channels for part in unit.skip.modules() if isinstance(part, Pad)] for unit in chain.units]
    assert appending == [[width - 1] if width > 1 else [], *[[]] * 12]


@pytest.mark.parametrize("dataset", SHAPES)
@pytest.mark.parametrize(
    "name", ["resnet14", "resnet14-post", "resnet14-projection", "resnet14-post-projection", "plain14", "plain14-post"]
)
def test_shapes_in_the_three_stages(name, dataset):
    channels, side = SHAPES[dataset]
    chain = build(name, dataset, width=3, classes=7).eval()
    with torch.no_grad():
        states = chain.trace(torch.randn(2, channels, side, side))
        expected = [(3, side)] * 3 + [(6, side // 2)] * 2 + [(12, side // 4)] * 2
        assert [tuple(y.shape) for y in states] == [(2, c, s, s) for c, s in expected]
        assert chain.head(states[-1]).shape == (2, 7)
    assert [unit.stage for unit in chain.units] == [1, 1, 2, 2, 3, 3]
    assert [unit.name for unit in chain.units] == [f"stage{s}.block{b}" for s in (1, 2, 3) for b in (0, 1)]
    assert [unit.is_transition for unit in chain.units] == [False, False, True, False, True, False]


@pytest.mark.parametrize("dataset", SHAPES)
@pytest.mark.parametrize("name", ["resnet8", "plain8-post", "resnet8-projection", "vgg15", "vgg15-nobn"])
def test_every_shortcut_has_the_shape_of_its_branch(name, dataset):
    channels, side = SHAPES[dataset]
    chain = build(name, dataset, width=4).eval()
    with torch.no_grad():
        for unit, y in zip(chain.units, chain.trace(torch.randn(1, channels, side, side)), strict=False):
            assert unit.skip(y).shape == unit.branch(y).shape


@pytest.mark.parametrize(
    ("depth", "nearest"), [(0, 8), (-4, 8), (2, 8), (7, 8), (10, 8), (19, 20), (109, 110), (112, 110), (1000, 998)]
)
@pytest.mark.parametrize("make", [resnet, plain])
def test_depths_that_do_not_exist(make, depth, nearest):
    message = f"depth {depth} is not 6n + 2: use a depth such as 8, 20, 56 or 110 (nearest: {nearest})"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(depth)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vgg(16), "there is no vgg(16) here: use vgg(15), the one that Veit et al. compare with"),
        (lambda: resnet(20, shortcut="conv"), 'unknown shortcut \'conv\': use "pad" or "projection"'),
        (
            lambda: build("resnext50"),
            "unknown network 'resnext50': expected a name such as resnet110, plain56-post or vgg15-nobn",
        ),
        (
            lambda: build("resnet20-post-nobn"),
            "without batch norm there is the pre-activation form alone: leave out preactivation=False and norm_stem",
        ),
        (
            lambda: build("resnet20-nobn-stem"),
            "without batch norm there is the pre-activation form alone: leave out preactivation=False and norm_stem",
        ),
        (lambda: build("plain20-nobn"), "plain has no variant -nobn: it has post"),
        (lambda: build("plain20-projection"), "plain has no variant -projection: it has post"),
        (lambda: build("vgg15-post"), "vgg has no variant -post: it has nobn"),
        (lambda: build("vgg15-wide"), "vgg has no variant -wide: it has nobn"),
        (
            lambda: build("resnet20-joint0"),
            "unknown network 'resnet20-joint0': expected a name such as resnet110, plain56-post or vgg15-nobn",
        ),
        (lambda: build("plain20-wide-joint2"), "plain has no variant -wide: it has post"),
        (lambda: build("resnet20", "mnist"), "unknown dataset 'mnist': expected one of digits, cifar10"),
    ],
)
def test_networks_that_do_not_exist(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_without_batch_norm_every_branch_starts_at_nothing_and_learns():
    chain = build("resnet14-nobn", "digits", width=4, seed=1)
    x, y = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    states = chain.trace(x)
    assert all(torch.equal(unit.skip(a), b) for unit, a, b in zip(chain.units, states[:-1], states[1:], strict=True))
    assert not any("norm" in type(module).__name__.lower() for module in chain.modules())
    assert not any(True for _ in chain.buffers())  # nothing that a deletion could make stale
    F.cross_entropy(chain(x), y).backward()
    assert all(unit.branch[-1].factor.grad != 0 for unit in chain.units)


@pytest.mark.parametrize("preactivation", [True, False])
def test_plain_is_the_resnet_minus_its_skips(preactivation):
    with_skips = randomized(resnet(20, width=4, preactivation=preactivation, seed=3))
    without = randomized(plain(20, width=4, preactivation=preactivation, seed=3))
    theirs = without.state_dict()
    assert with_skips.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in with_skips.state_dict().items())
    x = torch.randn(2, 3, 16, 16)
    y = with_skips.stem(x)
    for unit in with_skips.units:
        y = unit.post(unit.branch(y))
    assert torch.equal(without(x), with_skips.head(y))
    assert not torch.allclose(without(x), with_skips(x))


@pytest.mark.parametrize("kind", SMALL)
def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone(kind, monkeypatch):
    def on_every_gpu(seed):
        raise AssertionError("the generators of all GPUs were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", on_every_gpu)
    torch.default_generator.manual_seed(5)
    before = torch.get_rng_state()
    first = SMALL[kind]().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = SMALL[kind]().state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("make", [lambda seed: resnet(8, width=2, seed=seed), lambda seed: vgg(15, width=2, seed=seed)])
def test_another_seed_gives_other_weights(make):
    weights = [[p for p in make(seed).parameters() if p.dim() > 1] for seed in (0, 1)]
    assert not any(torch.equal(p, q) for p, q in zip(*weights, strict=True))


@pytest.mark.parametrize("name", ["resnet8", "vgg15-nobn"])
def test_convolutions_start_as_he_et_al_initialise_them(name):
    chain = build(name, width=16)
    convolutions = [module for module in chain.modules() if isinstance(module, nn.Conv2d) and module.in_channels >= 16]
    assert convolutions
    for module in convolutions:
        expected = (2 / (9 * module.out_channels)) ** 0.5  # fan-out
        assert abs(module.weight.std() / expected - 1) < 5 / (2 * module.weight.numel()) ** 0.5
        assert abs(module.weight.mean()) < 5 * expected / module.weight.numel() ** 0.5
        assert module.bias is None or not module.bias.any()
    assert not any(module.bias.any() for module in chain.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize(
    "name",
    ["resnet14", "resnet14-post", "resnet14-post-projection", "resnet14-projection-nobn", "plain14-post", "vgg15-nobn",
     "resnet8-wide", "resnet14-post-joint2"],
)  # fmt: skip
def test_the_config_rebuilds_the_network(name):
    chain = build(name, "digits", classes=3, seed=4, **({} if "wide" in name else {"width": 2}))
    config = dict(chain.config)
    assert config.pop("name") == name
    again = build(name, seed=4, **config)
    state = again.state_dict()
    assert chain.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in chain.state_dict().items())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(chain.eval()(x), again.eval()(x))


def test_a_wide_resnet20_has_about_the_parameters_of_resnet110():
    nets = build("resnet20-wide", "cifar10"), resnet(20, width=40), resnet(110)
    wide, same, deep = (sum(p.numel() for p in net.parameters()) for net in nets)
    assert wide == same
    assert 0.95 < wide / deep < 1.05


def test_joint_networks_are_the_average_of_separate_ones():
    x = torch.randn(4, 1, 8, 8)
    joint = build("resnet8-joint3", "digits", width=2, seed=5).eval()
    members = [build("resnet8", "digits", width=2, seed=seed).eval() for seed in (15, 16, 17)]
    with torch.no_grad():
        mean = sum(member(x).double().softmax(1) for member in members) / 3
        assert torch.allclose(joint(x).double().softmax(1), mean, atol=1e-6)
    assert len(joint) == 1
    with pytest.raises(ValueError, match="the unit resnet8-joint3 has no skip"):
        joint.without(0)(x)


def test_build_knows_the_datasets():
    assert build("vgg15", "digits").config == {
        "name": "vgg15", "in_channels": 1, "classes": 10, "width": 64, "image_size": 8,
    }  # fmt: skip
    assert build("vgg15", "cifar10").config["width"] == 128
    options = build("vgg15", "cifar10", width=2, in_channels=1).config
    assert (options["image_size"], options["width"], options["in_channels"]) == (32, 2, 1)
    assert build("resnet8", "cifar10").config == {"name": "resnet8", "in_channels": 3, "classes": 10, "width": 16}


@pytest.mark.parametrize(
    ("name", "option", "meant"),
    [
        ("resnet8-wide", {"width": 16}, "'resnet8-wide' means width=40, not 16"),
        ("resnet8-post", {"preactivation": True}, "'resnet8-post' means preactivation=False, not True"),
        ("plain8-post", {"preactivation": True}, "'plain8-post' means preactivation=False, not True"),
        ("resnet8-nobn", {"batch_norm": True}, "'resnet8-nobn' means batch_norm=False, not True"),
        ("vgg15-nobn", {"batch_norm": True}, "'vgg15-nobn' means batch_norm=False, not True"),
        ("resnet8-projection", {"shortcut": "pad"}, "means shortcut='projection', not 'pad'"),
        ("resnet8-wide-joint2", {"width": 2}, "'resnet8-wide' means width=40, not 2"),
    ],
)
def test_an_option_that_contradicts_the_name_is_refused_and_an_equal_one_is_not(name, option, meant):
    with pytest.raises(ValueError, match=f"{re.escape(meant)}: leave out the option, or the suffix of the name$"):
        build(name, "digits", **option)
    ((key, _),) = option.items()
    value = {"width": 40, "shortcut": "projection"}.get(key, False)
    same, asked = build(name, "digits", **{key: value}), build(name, "digits")
    assert same.config == asked.config
    assert same.config["name"] == name
    assert repr(same) == repr(asked)


def test_options_win_over_what_a_name_leaves_open():
    assert build("resnet8", batch_norm=False).config["name"] == "resnet8-nobn"
    assert build("vgg15", "digits", batch_norm=False, width=2).config["name"] == "vgg15-nobn"
    assert build("resnet8", shortcut="projection", preactivation=False).config["name"] == "resnet8-post-projection"
