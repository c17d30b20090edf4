"""Networks that `unravel` must understand or refuse, those of other libraries and some in plain torch, all at random.

Every case also says where its branches end, in the names of the model's own modules. That is enough to delete a branch,
or to scale the gradient that flows through it, by editing a copy of the model: the oracle for everything a chain does.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

# ---------------------------------------------------------------- plain torch, understood


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class CifarBlock(nn.Module):
    """A block of He et al. (2015) for CIFAR: option A as a lambda, and the sum in place."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c:
            pad = (c - c_in) // 2
            self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad)))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class CifarResNet(nn.Module):
    def __init__(self, blocks=2, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        c = width
        stages = []
        for stage in range(3):
            layers = []
            for i in range(blocks):
                layers.append(CifarBlock(c, width * 2**stage, 2 if stage and not i else 1))
                c = width * 2**stage
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(c, 10)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class PreActBlock(nn.Module):
    """A pre-activation block whose projection starts after batch norm and ReLU, as it does in many repositories."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        if stride != 1 or c_in != c:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class PreActNet(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        sizes = [(width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1)]
        blocks, c = [], width
        for size, stride in sizes:
            blocks.append(PreActBlock(c, size, stride))
            c = size
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(c)
        self.linear = nn.Linear(c, 10)

    def forward(self, x):
        out = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class DecoderBlock(nn.Module):
    def __init__(self, width, heads, kind):
        super().__init__()
        self.kind = kind
        self.ln1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        if self.kind == "parallel":
            return x + (self.attn(self.ln1(x)) + self.mlp(self.ln2(x)))
        if self.kind == "parallel-left":  # the additions associate to the left: (x + attention) + MLP
            return x + self.attn(self.ln1(x)) + self.mlp(self.ln2(x))
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Decoder(nn.Module):
    """A small GPT: embeddings of tokens and positions, whose sum is no residual unit; the head is tied to the first."""

    def __init__(self, kind="serial", vocabulary=11, width=16, heads=2, blocks=3, context=12):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, kind) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids):
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Functional(nn.Module):
    """A net in the style of no library: bare parameters, blocks that are functions, and a residual sum in a branch."""

    def __init__(self, width=8, depth=4):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(2 * depth))
        self.read = nn.Parameter(torch.randn(3 * 16, width) / 7)
        self.write = nn.Parameter(torch.randn(width, 10))
        self.ends = nn.ModuleList(nn.Identity() for _ in range(depth))

    @staticmethod
    def inner(h, w):
        return torch.add(h, torch.tanh(h @ w))

    def forward(self, x):
        y = F.avg_pool2d(x, 8).flatten(1) @ self.read
        for i, end in enumerate(self.ends):
            h = self.inner(F.silu(y), self.weights[2 * i])
            h = end(h @ self.weights[2 * i + 1])
            y = y.add(h) if i % 2 else torch.add(h, y)
        return torch.tanh(y) @ self.write


class Weighted(nn.Module):
    """Sums with factors: a scaled branch, a scaled skip, and a branch that is subtracted."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Linear(3 * 16, width)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4))
        self.gain = nn.Parameter(torch.full((width,), 1e-6))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        y = torch.relu(self.stem(F.avg_pool2d(x, 8).flatten(1)))
        y = y + 0.5 * self.branches[0](y)
        y = 0.8 * y + self.gain * self.branches[1](y)
        y = y - self.branches[2](y)
        y = torch.add(y, self.branches[3](y), alpha=0.3)
        return self.head(y)


class Tied(nn.Module):
    """One block that is used three times."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Linear(3 * 16, width)
        self.norm = nn.LayerNorm(width)
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        y = self.stem(F.avg_pool2d(x, 8).flatten(1))
        for _ in range(3):
            y = y + torch.relu(self.block(self.norm(y)))
        return self.head(y)


class Residual(nn.Module):
    """A wrapper that adds its input to what any module makes of it."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


def convmixer(width=8, depth=3):
    """Trockman & Kolter (2022): a Sequential of Sequentials, where half of the layers are residual."""
    return nn.Sequential(
        nn.Conv2d(3, width, 8, 8),
        nn.GELU(),
        nn.BatchNorm2d(width),
        *(
            nn.Sequential(
                Residual(
                    nn.Sequential(nn.Conv2d(width, width, 3, groups=width, padding=1), nn.GELU(), nn.BatchNorm2d(width))
                ),
                nn.Conv2d(width, width, 1),
                nn.GELU(),
                nn.BatchNorm2d(width),
            )
            for _ in range(depth)
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


class InPlaceBranch(nn.Module):
    """Blocks whose branch overwrites what the skip is about to read: the sum is relu(y) + branch(y)."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Linear(3 * 16, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.ReLU(inplace=True), nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(3)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        y = self.stem(F.avg_pool2d(x, 8).flatten(1))
        for layer in self.layers:
            y = y + layer(y)
        return self.head(y)


# ---------------------------------------------------------------- plain torch, to be refused or warned of


class UNet(nn.Module):
    def __init__(self, add=False):
        super().__init__()
        self.add = add
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.middle = nn.Conv2d(8, 8, 3, 1, 1)
        self.up2 = nn.Conv2d(16, 8, 3, 1, 1)
        self.up1 = nn.Conv2d(16, 8, 3, 1, 1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(a))
        c = F.relu(self.middle(b))
        d = F.relu(self.up2(torch.cat([b, c], 1)))
        d = F.interpolate(d, scale_factor=2.0)
        return self.out(F.relu(self.up1(torch.cat([a, d], 1))))


class DenseNet(nn.Module):
    def __init__(self, growth=4, layers=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + i * growth), nn.ReLU(), nn.Conv2d(8 + i * growth, growth, 3, 1, 1))
            for i in range(layers)
        )
        self.head = nn.Linear(8 + layers * growth, 10)

    def forward(self, x):
        y = self.stem(x)
        for layer in self.layers:
            y = torch.cat([y, layer(y)], 1)
        return self.head(y.mean((2, 3)))


class VGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(4)
        )
        self.classifier = nn.Linear(8 * 4, 10)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class DataDependent(Tied):
    """Control flow that depends on the numbers: the last block is left out where the state is small."""

    def forward(self, x):
        y = self.stem(F.avg_pool2d(x, 8).flatten(1))
        for _ in range(3):
            if y.abs().mean() > 0.1:
                y = y + torch.relu(self.block(self.norm(y)))
        return self.head(y)


class TwoInputs(Tied):
    """A second input, a time say, that every block reads."""

    def forward(self, x, t):
        y = self.stem(F.avg_pool2d(x, 8).flatten(1))
        for _ in range(3):
            y = y + torch.relu(self.block(self.norm(y)) * t)
        return self.head(y)


class Counting(Tied):
    """A buffer that every forward pass changes, and that the output depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class LongSkip(nn.Module):
    """A skip around all other blocks, as in networks for super-resolution."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Linear(3 * 16, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        self.end = nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        first = y = self.stem(F.avg_pool2d(x, 8).flatten(1))
        for layer in self.layers:
            y = y + layer(y)
        return self.head(first + self.end(y))


class Overlapping(LongSkip):
    """Skips that cross: what a layer of the first unit computes is added within the second one's branch, too."""

    def forward(self, x):
        a = self.stem(F.avg_pool2d(x, 8).flatten(1))
        b = self.layers[0](a)
        c = self.layers[1](b) + a
        d = self.layers[2](c) + b
        return self.head(self.end(d) + c)


# ---------------------------------------------------------------- cases


def randomize(model: nn.Module, inputs: Tensor, seed: int = 0) -> nn.Module:
    """Move batch norm statistics and every constant parameter away from 0 and 1, where they hide errors; set eval mode.

    Constant are the parameters that start so: affine ones, gains near 0 (layer scale), and weights that make a new
    block the identity. The statistics are those of ``inputs``, perturbed, so that every branch counts.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                if (parameter == 0).all() and parameter.dim() == 1:
                    parameter.normal_(0, 0.3, generator=generator)
                else:
                    parameter.uniform_(0.5, 1.5, generator=generator)
        if norms:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0
            model.train()(inputs)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                spread = norm.running_var.sqrt()
                norm.running_mean += 0.3 * spread * torch.randn(len(spread), generator=generator)
                norm.running_var *= torch.empty(len(spread)).uniform_(0.5, 2, generator=generator)
                norm.num_batches_tracked.fill_(7)
    return model.eval()


Names = list[tuple[str, ...]]


def matching(pattern: str, keep: Callable[[nn.Module], bool] = lambda _: True) -> Callable[[nn.Module], Names]:
    """List the modules with such a name, in the order in which they are registered, if ``keep`` says so of the parent.

    The parent is the module that the group ``parent`` of the pattern names.
    """

    def names(model: nn.Module) -> Names:
        matches = [match for name, _ in model.named_modules() if (match := re.fullmatch(pattern, name))]
        return [(match[0],) for match in matches if keep(model.get_submodule(match.groupdict().get("parent", "")))]

    return names


@dataclass(frozen=True)
class Case:
    """A model, an input, and where its branches end.

    Args:
        build: makes the model.
        branches: given the model, names for each residual unit the modules that alone add to its stream.
        units: how many residual units there are.
        first: name of the module whose input is y_0; None where only the input's gradient is compared.
        vocabulary: number of tokens of a language model; None for images ``(2, 3, 32, 32)``.
        needs: what has to be installed.
        tolerance: of the logits, relative to their largest; 0 for equality to the last bit.
        reason: why they are not equal to the last bit.
        rounding: of gradients in float64, relative; larger where the model itself computes in float32.
        options: keyword arguments for `unravel`.
    """

    build: Callable[[], nn.Module]
    branches: Callable[[nn.Module], Names]
    units: int
    first: str | None = None
    vocabulary: int | None = None
    needs: str = "torch"
    size: int = 32
    tolerance: float = 0.0
    reason: str = ""
    rounding: float = 1e-9
    options: dict = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 0) -> Tensor:
        """Images ``(B, 3, H, W)`` or tokens ``(B, T)``."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary is not None:
            return torch.randint(self.vocabulary, (batch, 10), generator=generator)
        x = torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=torch.float64)
        return x.to(dtype)


class Gate(nn.Module):
    """Whatever a module computes, times ``value``; its gradient times ``gradient`` more."""

    def __init__(self, module: nn.Module, value: float, gradient: float) -> None:
        super().__init__()
        self.module, self.value, self.gradient = module, value, gradient

    def forward(self, *args, **kwargs):
        out = self.module(*args, **kwargs)
        out = out if self.value == 1 else out * self.value
        return out if self.gradient == 1 else out.detach() + self.gradient * (out - out.detach())


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its parameters and buffers, so that it costs next to nothing."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def edited(
    case: Case, model: nn.Module, units: Iterable[int], *, value: float = 1.0, gradient: float = 1.0
) -> nn.Module:
    """Return a copy of a model in which the branches of some residual units, and what they pass back, are scaled."""
    branches = case.branches(model)
    model = twin(model)
    for unit in units:
        for name in branches[unit]:
            model.set_submodule(name, Gate(model.get_submodule(name), value, gradient))
    return model.eval()


def logits_of(output) -> Tensor:
    """The logits, in whatever a library's model returns."""
    return output if isinstance(output, Tensor) else output.logits


def labels_for(logits: Tensor, seed: int = 1) -> Tensor:
    """Classes ``(B,)`` for logits ``(B, K)``, and tokens ``(B, T)`` for ``(B, T, K)``."""
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(seed))


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits ``(B, K)`` or ``(B, T, K)``."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def torchvision(name: str, /, *args, **kwargs) -> nn.Module:
    return getattr(importlib.import_module("torchvision.models"), name)(*args, num_classes=10, **kwargs)


def _torchvision_resnet(block: str, *args, **kwargs) -> nn.Module:
    module = importlib.import_module("torchvision.models.resnet")
    return module.ResNet(getattr(module, block), *args, num_classes=10, zero_init_residual=True, **kwargs)


def _torchvision_convnext() -> nn.Module:
    module = importlib.import_module("torchvision.models.convnext")
    sizes = [(8, 16, 3), (16, 32, 2), (32, None, 1)]
    return module.ConvNeXt([module.CNBlockConfig(*size) for size in sizes], num_classes=10)


def _torchvision_efficientnet(fused: bool) -> nn.Module:
    module = importlib.import_module("torchvision.models.efficientnet")
    if fused:
        settings = [
            module.FusedMBConvConfig(1, 3, 1, 16, 16, 2),
            module.FusedMBConvConfig(4, 3, 2, 16, 24, 2),
            module.MBConvConfig(4, 3, 2, 24, 32, 2),
        ]
    else:
        settings = [
            module.MBConvConfig(1, 3, 1, 16, 16, 2),
            module.MBConvConfig(6, 5, 2, 16, 24, 3),
            module.MBConvConfig(6, 3, 2, 24, 32, 1),
        ]
    return module.EfficientNet(settings, dropout=0.2, num_classes=10, last_channel=64)


def _torchvision_regnet() -> nn.Module:
    module = importlib.import_module("torchvision.models.regnet")
    sizes = module.BlockParams.from_init_params(depth=6, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return module.RegNet(sizes, num_classes=10)


def _torchvision_swin() -> nn.Module:
    module = importlib.import_module("torchvision.models.swin_transformer")
    return module.SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=10)


def timm(name: str, **kwargs) -> nn.Module:
    return importlib.import_module("timm").create_model(name, num_classes=10, **kwargs)


def _timm_mixer(block: str, mlp: str, mlp_ratio) -> nn.Module:
    module = importlib.import_module("timm.models.mlp_mixer")
    parts = {"block_layer": getattr(module, block), "mlp_layer": getattr(module, mlp)}
    return module.MlpMixer(
        num_classes=10, img_size=32, patch_size=8, num_blocks=3, embed_dim=16, mlp_ratio=mlp_ratio, **parts
    )


def transformer(name: str, config: dict, kind: str = "Config") -> nn.Module:
    transformers = importlib.import_module("transformers")
    stem = re.sub(r"For\w+$|LMHeadModel$", "", name)
    settings = getattr(transformers, stem + kind)(**config)
    return getattr(transformers, name)(settings)


TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def small_transformer(**more) -> dict:
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | {"intermediate_size": 32, "max_position_embeddings": 16} | TOKENS | more


def residual(flag: str) -> Callable[[nn.Module], bool]:
    return lambda block: bool(getattr(block, flag))


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}

CASES: dict[str, Case] = {
    # plain torch
    "cifar-resnet": Case(CifarResNet, matching(r"layer\d\.\d\.bn2"), 6, "layer1.0"),
    "preact-resnet": Case(PreActNet, matching(r"blocks\.\d\.conv2"), 6, "blocks.0"),
    "decoder": Case(Decoder, matching(r"blocks\.\d\.(attn|mlp)"), 6, "blocks.0", vocabulary=11),
    "decoder-parallel": Case(
        lambda: Decoder("parallel"),
        lambda model: [(f"blocks.{i}.attn", f"blocks.{i}.mlp") for i in range(3)],
        3,
        "blocks.0",
        vocabulary=11,
    ),
    "decoder-parallel-left": Case(
        lambda: Decoder("parallel-left"),
        lambda model: [(f"blocks.{i}.attn", f"blocks.{i}.mlp") for i in range(3)],
        3,
        "blocks.0",
        vocabulary=11,
        tolerance=1e-5,
        reason="(x + attention) + MLP is computed as x + (attention + MLP)",
    ),
    "functional": Case(Functional, matching(r"ends\.\d"), 4),
    "weighted": Case(Weighted, matching(r"branches\.\d"), 4, tolerance=1e-6, reason="factors move into the branches"),
    "convmixer": Case(convmixer, matching(r"\d\.0\.fn"), 3),
    # torchvision
    "torchvision resnet18": Case(
        lambda: torchvision("resnet18"), matching(r"layer\d\.\d\.bn2"), 8, "layer1.0", needs="torchvision"
    ),
    "torchvision resnet50": Case(
        lambda: _torchvision_resnet("Bottleneck", [1, 2, 3, 1], width_per_group=16),  # fewer blocks, of all kinds
        matching(r"layer\d\.\d\.bn3"),
        7,
        "layer1.0",
        needs="torchvision",
    ),
    "torchvision wide_resnet": Case(
        lambda: _torchvision_resnet("Bottleneck", [1, 2, 1, 1], width_per_group=80),
        matching(r"layer\d\.\d\.bn3"),
        5,
        "layer1.0",
        needs="torchvision",
    ),
    "torchvision resnext": Case(
        lambda: _torchvision_resnet("Bottleneck", [1, 2, 2, 1], groups=8, width_per_group=4),
        matching(r"layer\d\.\d\.bn3"),
        6,
        "layer1.0",
        needs="torchvision",
    ),
    "torchvision vit": Case(
        lambda: torchvision(
            "VisionTransformer",
            image_size=32,
            patch_size=8,
            num_layers=3,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
        ),
        matching(r"encoder\.layers\.encoder_layer_\d\.(dropout|mlp)"),
        6,
        "encoder.layers.encoder_layer_0",
        needs="torchvision",
    ),
    "torchvision convnext": Case(
        _torchvision_convnext,
        matching(r"features\.\d\.\d\.stochastic_depth"),
        6,
        "features.1.0",
        needs="torchvision",
    ),
    "torchvision mobilenet_v2": Case(
        lambda: torchvision("mobilenet_v2", width_mult=0.35),
        matching(r"(?P<parent>features\.\d+)\.conv", residual("use_res_connect")),
        10,
        "features.1",
        needs="torchvision",
    ),
    "torchvision mobilenet_v3": Case(
        lambda: torchvision("mobilenet_v3_small", width_mult=0.5),
        matching(r"(?P<parent>features\.\d+)\.block", residual("use_res_connect")),
        7,
        "features.1",
        needs="torchvision",
    ),
    "torchvision efficientnet": Case(
        lambda: _torchvision_efficientnet(False),
        matching(r"(?P<parent>features\.\d\.\d)\.stochastic_depth", residual("use_res_connect")),
        4,
        "features.1.0",
        needs="torchvision",
    ),
    "torchvision efficientnet_v2": Case(
        lambda: _torchvision_efficientnet(True),
        matching(r"(?P<parent>features\.\d\.\d)\.stochastic_depth", residual("use_res_connect")),
        4,
        "features.1.0",
        needs="torchvision",
    ),
    "torchvision regnet": Case(
        _torchvision_regnet,
        matching(r"trunk_output\.block\d\.[\w-]+\.f"),
        6,
        needs="torchvision",
    ),
    "torchvision swin": Case(
        _torchvision_swin,
        lambda model: [
            (f"features.{stage}.{i}.{part}",) for stage in (1, 3) for i in (0, 1) for part in ("attn", "mlp")
        ],
        8,
        needs="torchvision",
    ),
    # timm
    "timm resnet18": Case(
        lambda: timm("resnet18", channels=(8, 16, 24, 32)),
        matching(r"layer\d\.\d\.bn2"),
        8,
        "layer1.0",
        needs="timm",
    ),
    "timm resnet26d": Case(
        lambda: timm("resnet26d", channels=(8, 16, 24, 32)),
        matching(r"layer\d\.\d\.bn3"),
        8,
        "layer1.0",
        needs="timm",
    ),
    "timm resnetv2": Case(
        lambda: timm("resnetv2_50", layers=[1, 2, 1, 1], channels=(16, 32, 48, 64)),
        matching(r"stages\.\d\.blocks\.\d\.conv3"),
        5,
        "stages.0.blocks.0",
        needs="timm",
    ),
    "timm vit": Case(
        lambda: timm("vit_tiny_patch16_224", init_values=1e-5, **VIT),
        matching(r"blocks\.\d\.drop_path\d"),
        6,
        "blocks.0",
        needs="timm",
    ),
    "timm deit distilled": Case(
        lambda: timm("deit_tiny_distilled_patch16_224", **VIT),
        matching(r"blocks\.\d\.drop_path\d"),
        6,
        "blocks.0",
        needs="timm",
    ),
    "timm convnext": Case(
        lambda: timm("convnext_atto", depths=(1, 3, 1, 1), dims=(8, 16, 24, 32)),
        matching(r"stages\.\d\.blocks\.\d\.drop_path"),
        6,
        "stages.0",
        needs="timm",
    ),
    "timm mobilenetv3": Case(
        lambda: timm("mobilenetv3_small_050"),
        matching(r"(?P<parent>blocks\.\d\.\d)\.drop_path", lambda block: getattr(block, "has_skip", False)),
        7,
        "blocks.1.0",  # the block before has no skip, nor has any other of its class: it belongs to the stem
        needs="timm",
    ),
    "timm efficientnet_lite": Case(
        lambda: timm("efficientnet_lite0"),
        matching(r"(?P<parent>blocks\.\d\.\d)\.drop_path", residual("has_skip")),
        9,
        "blocks.1.0",  # the block before has no skip, nor has any other of its class: it belongs to the stem
        needs="timm",
    ),
    "timm mixer": Case(
        lambda: _timm_mixer("MixerBlock", "Mlp", (0.5, 2)),
        matching(r"blocks\.\d\.mlp_(tokens|channels)"),
        6,
        "blocks.0",
        needs="timm",
    ),
    "timm gmlp": Case(
        lambda: _timm_mixer("SpatialGatingBlock", "GatedMlp", 2),
        matching(r"blocks\.\d\.drop_path"),
        3,
        "blocks.0",
        needs="timm",
    ),
    "timm regnet": Case(
        lambda: timm("regnetx_002", depth=7), matching(r"s\d\.b\d+\.drop_path"), 7, "s1.b1", needs="timm"
    ),
    "timm nfnet": Case(
        lambda: timm("test_nfnet"), matching(r"stages\.\d\.\d\.drop_path"), 4, "stages.0.0", needs="timm"
    ),
    # transformers
    "transformers gpt2": Case(
        lambda: transformer(
            "GPT2LMHeadModel", {"vocab_size": 11, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16} | TOKENS
        ),
        matching(r"transformer\.h\.\d\.(attn\.resid_dropout|mlp)"),
        4,
        "transformer.h.0",
        vocabulary=11,
        needs="transformers",
    ),
    "transformers llama": Case(
        lambda: transformer("LlamaForCausalLM", small_transformer(num_key_value_heads=2)),
        matching(r"model\.layers\.\d\.(self_attn\.o_proj|mlp)"),
        4,
        "model.layers.0",
        vocabulary=11,
        needs="transformers",
        rounding=1e-6,  # its RMS norms
    ),
    "transformers gpt_neox": Case(
        lambda: transformer("GPTNeoXForCausalLM", small_transformer()),
        lambda model: [
            (f"gpt_neox.layers.{i}.post_attention_dropout", f"gpt_neox.layers.{i}.post_mlp_dropout") for i in range(2)
        ],
        2,
        "gpt_neox.layers.0",
        vocabulary=11,
        needs="transformers",
    ),
    "transformers vit": Case(
        lambda: transformer("ViTForImageClassification", small_transformer(image_size=32, patch_size=8, num_labels=10)),
        matching(r"vit\.layers\.\d\.(attention\.o_proj|mlp)"),
        4,
        "vit.layers.0",
        needs="transformers",
    ),
    "transformers bert": Case(
        lambda: transformer("BertForSequenceClassification", small_transformer(num_labels=10)),
        matching(r"bert\.encoder\.layer\.\d\.(attention\.)?output\.dropout"),
        4,
        "bert.encoder.layer.0",
        vocabulary=11,
        needs="transformers",
    ),
}


@functools.cache
def built(name: str) -> nn.Module:
    """The model of a case, float32, the same for all tests; skip the test where its library is not installed."""
    case = CASES[name]
    pytest.importorskip(case.needs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(case.build(), case.inputs(batch=8, seed=2))


# ---------------------------------------------------------------- more of them, by their units alone


@dataclass(frozen=True)
class Other:
    """A model, how many units it has, and for how many of these a module can be edited to delete them.

    Args:
        build: makes the model.
        units: how many residual units there are.
        deletions: for how many of them a module returns the end of the branch.
        kind: of its input: images ``(2, 3, 32, 32)``, tokens ``(2, 6)``, sounds ``(2, 8, 16)``, or two of these, for
            an encoder and for the decoder that the stream starts at.
    """

    build: Callable[[], nn.Module]
    units: int
    deletions: int
    kind: str = "images"

    @property
    def options(self) -> dict:
        """Keyword arguments for `unravel`."""
        return {"stream": "decoder_input_ids"} if " and " in self.kind else {}

    def inputs(self) -> Tensor | dict[str, Tensor]:
        """A tensor, or a dict of two."""
        generator = torch.Generator().manual_seed(0)
        kinds = {
            "images": torch.randn(2, 3, 32, 32, generator=generator),
            "tokens": torch.randint(11, (2, 6), generator=generator),
            "sounds": torch.randn(2, 8, 16, generator=generator),
        }
        first, _, second = self.kind.partition(" and ")
        if not second:
            return kinds[first]
        names = {"tokens": "input_ids", "sounds": "input_features"}
        return {names[first]: kinds[first], "decoder_input_ids": kinds[second].flip(1)}


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
STAGES = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}
LLM = small_transformer(num_key_value_heads=2)
SIDES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
}
BOTH = {"vocab_size": 11, "d_model": 16, "decoder_start_token_id": 0, **SIDES, **TOKENS}  # an encoder and a decoder

OTHERS: dict[str, Other] = {
    "timm convnextv2": Other(lambda: timm("convnextv2_atto", **STAGES), 5, 5),
    "timm beit": Other(lambda: timm("beit_base_patch16_224", **SMALL_VIT), 6, 6),
    "timm eva02": Other(lambda: timm("eva02_tiny_patch14_224", **SMALL_VIT), 6, 6),
    "timm deit3": Other(lambda: timm("deit3_small_patch16_224", **SMALL_VIT), 6, 6),
    "timm xcit": Other(lambda: timm("xcit_nano_12_p16_224", img_size=32, embed_dim=16, depth=2, num_heads=2), 10, 10),
    "timm seresnet": Other(lambda: timm("seresnet50", layers=(1, 1, 1, 1), channels=(8, 16, 24, 32)), 4, 4),
    "timm resnest": Other(lambda: timm("resnest26d", layers=(1, 1, 1, 1)), 4, 4),
    "timm res2net": Other(lambda: timm("res2net50_14w_8s", layers=(1, 1, 1, 1)), 4, 4),
    "timm inception_next": Other(lambda: timm("inception_next_tiny", depths=(1, 1, 1, 1), dims=(24, 48, 72, 96)), 4, 4),
    "timm starnet": Other(lambda: timm("starnet_s1"), 15, 15),
    "timm byobnet": Other(lambda: timm("test_byobnet"), 4, 4),
    "timm test_convnext": Other(lambda: timm("test_convnext"), 9, 9),
    "timm test_resnet": Other(lambda: timm("test_resnet"), 4, 4),
    "timm swin": Other(
        lambda: timm(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 4)
        ),
        8,
        8,
    ),
    "timm pvt_v2": Other(
        lambda: timm("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 2, 2)), 8, 8
    ),
    "torchvision mnasnet": Other(lambda: torchvision("mnasnet0_5"), 10, 10),
    "transformers bloom": Other(
        lambda: transformer(
            "BloomForCausalLM", {"vocab_size": 11, "hidden_size": 16, "n_layer": 2, "n_head": 2} | TOKENS
        ),
        4,
        4,
        kind="tokens",
    ),
    "transformers mpt": Other(
        lambda: transformer(
            "MptForCausalLM",
            {"vocab_size": 11, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16, "expansion_ratio": 2}
            | TOKENS,
        ),
        4,
        4,
        kind="tokens",
    ),
    "transformers opt": Other(
        lambda: transformer("OPTForCausalLM", small_transformer(ffn_dim=32, word_embed_proj_dim=16)),
        4,
        4,
        kind="tokens",
    ),
    "transformers falcon": Other(lambda: transformer("FalconForCausalLM", small_transformer()), 2, 2, kind="tokens"),
    "transformers olmo2": Other(lambda: transformer("Olmo2ForCausalLM", LLM), 4, 4, kind="tokens"),
    "transformers granite": Other(
        lambda: transformer("GraniteForCausalLM", LLM | {"residual_multiplier": 0.5}), 4, 4, kind="tokens"
    ),
    "transformers qwen2": Other(lambda: transformer("Qwen2ForCausalLM", LLM), 4, 4, kind="tokens"),
    "transformers qwen3": Other(lambda: transformer("Qwen3ForCausalLM", LLM | {"head_dim": 8}), 4, 4, kind="tokens"),
    "transformers mistral": Other(lambda: transformer("MistralForCausalLM", LLM), 4, 4, kind="tokens"),
    "transformers gemma3": Other(
        lambda: transformer(
            "Gemma3ForCausalLM",
            LLM | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
            "TextConfig",
        ),
        4,
        4,
        kind="tokens",
    ),
    "transformers t5": Other(
        lambda: transformer(
            "T5ForConditionalGeneration",
            {"vocab_size": 11, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            | TOKENS
            | {"decoder_start_token_id": 0},
        ),
        6,
        6,
        kind="tokens and tokens",
    ),
    "transformers bart": Other(
        lambda: transformer("BartForConditionalGeneration", BOTH | {"max_position_embeddings": 16}),
        6,
        6,
        kind="tokens and tokens",
    ),
    "transformers whisper encoder": Other(
        lambda: transformer(
            "WhisperForAudioClassification",
            BOTH | {"num_mel_bins": 8, "max_source_positions": 8, "num_labels": 10, "classifier_proj_size": 8},
        ),
        4,
        4,
        kind="sounds",
    ),
    "transformers whisper decoder": Other(
        lambda: transformer(
            "WhisperForConditionalGeneration",
            BOTH | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        ),
        6,
        6,
        kind="sounds and tokens",
    ),
    "timm davit": Other(
        lambda: timm("davit_tiny", depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), window_size=4), 16, 16
    ),
    "timm repvit": Other(lambda: timm("repvit_m0_9", embed_dim=(8, 16), depth=(2, 2)), 11, 11),
}
