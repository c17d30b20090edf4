"""Side-by-side speed of what the library does and of what one would otherwise run: ``make bench``.

The arms of a comparison are interleaved, after one round that only counts, and first give the same results. The table
goes to ``data/speed.csv``, from which a page of the book is made; nothing here is a test. ``--only training``
runs one group and leaves the others' rows as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch._dynamo
from captum.attr import LayerFeatureAblation
from measuring import Arms, LiveBytes, compare
from nnsight import NNsight
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import cross_entropy, pad
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from unravelling import RECIPES, Chain, Dataset, Split, build, digits, fit, gradient_by_length, load, unravel
from unravelling.lesion import delete_each, evaluate_variants, variant_logits
from unravelling.nets import SHAPES, Pad
from unravelling.paths import sample_path_gradients
from unravelling.stats import wilson
from unravelling.train import evaluate

RESULTS = Path(__file__).parents[1] / "data/speed.csv"
SLICED = "fit, shortcuts by a slice"
Tables = Iterator[pd.DataFrame]


def images(shape: tuple[int, ...], classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noise of the shape ``(B, C, H, W)`` and labels: seconds do not depend on what is to be seen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randint(classes, shape[:1], generator=generator)


def language(layers: int, width: int, length: int) -> tuple[Chain, Tensor, Tensor]:
    """Return a GPT-2 of random weights as a chain, four texts of random tokens ``(4, length)``, and their labels."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, n_embd=width, n_head=4, vocab_size=1000, n_positions=length)
    tokens = torch.randint(1000, (4, length), generator=torch.Generator().manual_seed(0))
    return unravel(GPT2LMHeadModel(config).eval(), tokens), tokens, tokens


def compiled(chain: Chain) -> Chain:
    """Return a copy whose units are compiled, once for each kind, for any size of batch."""
    chain = copy.deepcopy(chain)
    for unit in chain.units:
        unit.compile(dynamic=True)
    return chain


# ---------------------------------------------------------------- deletions


def loop(chain: Chain, x: Any) -> Tensor:
    """Delete every unit in turn and run the whole network each time."""
    with torch.inference_mode():
        return torch.stack([chain.without(i)(x) for i in range(len(chain))])


def hooks(chain: Chain, x: Any) -> Tensor:
    """Replace each unit's output by its skip with a forward hook."""
    found = []
    for unit in chain.units:
        handle = unit.register_forward_hook(lambda unit, inputs, output: unit.post(unit.skip(*inputs)))
        with torch.inference_mode():
            found.append(chain(x))
        handle.remove()
    return torch.stack(found)


def captum(chain: Chain, x: Tensor) -> Tensor:
    """Set each branch's output to zero with captum, which returns the difference of the first logit."""
    whole = torch.zeros(1, 1, 1, 1, dtype=torch.long)  # all of the output is one feature
    with torch.inference_mode():
        intact = chain(x)[:, 0]
    found = []
    for unit in chain.units:
        ablation = LayerFeatureAblation(chain, unit.branch)
        difference = ablation.attribute(x, layer_baselines=0, layer_mask=whole, target=0)
        found.append(intact - difference.flatten(1)[:, 0].detach())
    return torch.stack(found)


def nnsight(chain: Chain, x: Tensor) -> Tensor:
    """Skip each branch with nnsight, for zeros of the shape that the unit's skip returns."""
    model, found = NNsight(chain), []
    for i, unit in enumerate(chain.units):
        with torch.inference_mode(), model.trace(x):
            branch = model.units[i].branch
            branch.skip(torch.zeros_like(unit.skip(branch.input)))
            logits = model.output.save()
        found.append(logits)
    return torch.stack(found)


def deletions(rounds: int) -> Tables:
    """Delete each unit: of the paper's network at two sizes of image, of a ResNet-50, of a language model."""
    from torchvision.models import resnet50

    small, large = (build("resnet110", name).eval().to(memory_format=torch.channels_last) for name in SHAPES)
    cases = [(f"ResNet-110, 8 × 8, batch {batch}", small, *images((batch, 1, 8, 8))) for batch in (8, 32, 128, 500)]
    cases.append(("ResNet-110, 32 × 32, batch 16", large, *images((16, 3, 32, 32))))
    x, y = images((4, 3, 224, 224), 1000)
    cases.append(("ResNet-50, 224 × 224, batch 4", unravel(resnet50().eval(), x), x, y))
    cases.append(("GPT-2, 12 layers of 256, 4 × 64 tokens", *language(12, 256, 64)))
    for setting, chain, x, y in cases:
        intact, few = tuple(range(len(chain))), x[:2]
        ours, _ = variant_logits(chain, [(few, y[:2])], [(*intact[:i], ~i, *intact[i + 1 :]) for i in intact])
        others = {"a loop over without": loop, "forward hooks": hooks}
        if x.is_floating_point() and len(x) < 500:
            others |= {"captum, LayerFeatureAblation": captum, "nnsight, skip": nnsight}
        arms: Arms = {"delete_each": partial(delete_each, chain, [(x, y)])}
        for name, other in others.items():
            logits = torch.from_numpy(ours[..., 0] if other is captum else ours)
            torch.testing.assert_close(other(chain, few), logits, atol=1e-4, rtol=1e-4)
            arms[name] = partial(other, chain, x)
        arms["delete_each in bfloat16"] = partial(delete_each, chain, [(x, y)], dtype=torch.bfloat16)
        yield compare("delete each unit", setting, arms, rounds, chain=chain)


def many(rounds: int) -> Tables:
    """Many lesions of one network, each of 10 random units: in float32 and bfloat16, and with units compiled.

    Of a trained network also how far errors in bfloat16 are from those in float32: ``error``, the mean over the draws,
    ``difference``, the largest of any draw, and ``of_interval``, the largest in half widths of a draw's 95 % interval.
    """
    trained, large = load("digits/resnet110-seed0"), build("resnet110", "cifar10").eval()
    large.to(memory_format=torch.channels_last)
    test, half = digits().test, torch.bfloat16
    cases: list[tuple[str, Chain, Any, int]] = [
        (f"ResNet-110, 8 × 8, {len(test)} images", trained, test.batches(125), 100),
        ("ResNet-110, 32 × 32, batch 32", large, [images((32, 3, 32, 32))], 20),
    ]
    for setting, chain, batches, draws in cases:
        random, n = np.random.default_rng(0), len(chain)
        gone = [set(random.choice(n, 10, replace=False).tolist()) for _ in range(draws)]
        variants = [tuple(~i if i in drawn else i for i in range(n)) for drawn in gone]

        def one_by_one(chain: Chain = chain, batches: Any = batches, gone: list[set[int]] = gone) -> None:
            with torch.inference_mode():
                for (x, _), drawn in product(batches, gone):
                    chain.without(*drawn)(x)

        fast, run = compiled(chain), partial(evaluate_variants, data=batches, variants=variants)
        arms: Arms = {
            "evaluate_variants": partial(run, chain),
            "a loop over without": one_by_one,
            "evaluate_variants, units compiled": partial(run, fast),
            "evaluate_variants in bfloat16": partial(run, chain, dtype=half),
            "evaluate_variants in bfloat16, units compiled": partial(run, fast, dtype=half),
        }
        # also to compile: what is compiled within the counting round is not what runs outside
        results = {name: arm() for name, arm in arms.items()}
        table = compare("draws of 10 deletions", f"{setting}, {draws} draws", arms, rounds, chain=chain)
        table = table.set_index("arm")
        if chain is trained:
            wrong, _ = results["evaluate_variants"]
            low, high = wilson(wrong.sum(1), wrong.shape[1])
            for name in (name for name in arms if name.startswith("evaluate_variants")):
                other, _ = results[name]
                apart = np.abs(other.mean(1) - wrong.mean(1))
                found = other.mean(), apart.max(), (apart / (high - low) * 2).max()
                table.loc[name, ["error", "difference", "of_interval"]] = found
        yield table.reset_index()


# ---------------------------------------------------------------- gradients


def gradients(rounds: int) -> Tables:
    """The gradient by path length, beside one backward pass through all branches, and beside the paper's sampling."""
    chain, (x, y) = build("resnet110", "digits").eval(), digits().test.batches(32)[0]
    with torch.no_grad():
        states = [state.detach().requires_grad_() for state in chain.trace(x)[:-1]]
    outputs = [unit.branch(state) for unit, state in zip(chain.units, states, strict=True) if unit.branch is not None]
    ones = [torch.ones_like(out) for out in outputs]

    def branches() -> None:
        """One vector-Jacobian product of every branch: the least unit of work, of which n(n + 1) / 2 / n are needed."""
        for out, state, one in zip(outputs, states, ones, strict=True):
            grad(out, state, one, retain_graph=True)

    def batched() -> None:
        """The same recursion with every branch's products in one call, as torch.func.vmap computes them."""
        top = torch.ones_like(chain.units[-1](states[-1]))[None]
        for unit, out, state in zip(reversed(chain.units), reversed(outputs), reversed(states), strict=True):
            skip = unit.skip(state)
            through = grad(out, state, top, retain_graph=True, is_grads_batched=True)[0]
            past = top if skip is state else grad(skip, state, top, retain_graph=True, is_grads_batched=True)[0]
            zero = torch.zeros_like(past[:1])
            top = torch.cat([past, zero]) + torch.cat([zero, through])

    lengths = range(0, len(chain) + 1, 6)
    arms: Arms = {
        "gradient_by_length": lambda: gradient_by_length(chain, x, y),
        "every branch backward once": branches,
        "every branch batched, as by vmap": batched,
        f"sampling, 2 paths at {len(lengths)} of 55 lengths": lambda: sample_path_gradients(chain, x, y, lengths, 2),
    }
    yield compare("gradient by path length", "ResNet-110, 8 × 8, batch 32", arms, rounds, chain=chain)


# ---------------------------------------------------------------- training


def ordinary_epoch(network: str, data: Dataset, batch_size: int, workers: int, device: str = "cpu") -> None:
    """Train one epoch the ordinary way: DataLoader, torchvision's transforms image by image, float32, NCHW."""
    height = data.train.images.shape[-1]
    transform = v2.Compose(
        [
            v2.RandomCrop(height, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((data.train.mean / 255).tolist(), (data.train.std / 255).tolist()),
        ]
    )

    class Images(TensorDataset):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            image, label = super().__getitem__(i)
            return transform(image), label

    loader = DataLoader(
        Images(data.train.images.contiguous(), data.train.labels), batch_size, True, num_workers=workers, drop_last=True
    )
    chain = build(network, "cifar10").to(device)
    optimizer = torch.optim.SGD(chain.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for x, y in loader:
        optimizer.zero_grad()
        loss = cross_entropy(chain(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
    loss.item()  # waits for a GPU


def noise_dataset(count: int) -> Dataset:
    """Return ``count`` images of noise in the form of CIFAR-10: only seconds are measured on them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(
        pixels, torch.randint(10, (count,), generator=generator), torch.full((3,), 127.5), torch.full((3,), 64.0)
    )
    one = split.take(torch.arange(1))  # fit reports on validation images, which the ordinary loop here does not
    return Dataset("noise", split, one, one, tuple("0123456789"))


class Slice(Pad):
    """The same shortcut by a slice, whose gradients, and so all gradients below, are in another layout than states."""

    def forward(self, y: Tensor) -> Tensor:
        """Map what `Pad` does, to the same values."""
        return pad(y[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


def sliced(network: str, device: str = "cpu") -> Chain:
    """Return a network with `Slice` in its shortcuts."""
    chain = build(network, "cifar10").to(device)
    for unit in chain.units:
        if isinstance(unit.skip, Pad):
            unit.skip = Slice(unit.skip.extra_channels, unit.skip.stride)
    return chain


def training(rounds: int) -> Tables:
    """One epoch of training on images of CIFAR-10's size, end to end; and the share of it that loading takes."""
    recipe = RECIPES["short"]
    for network, count in (("resnet20", 2560), ("resnet56", 1280), ("resnet110", 640)):
        data = noise_dataset(count)

        def batches(data: Dataset = data) -> None:
            for _ in data.train.shuffled(recipe.batch_size, torch.Generator(), crop=recipe.crop, flip=recipe.flip):
                pass

        def ours(chain: Chain, data: Dataset = data) -> None:
            fit(chain, data, recipe, stop_after=1, progress=False)

        plain, fast, other = build(network, "cifar10"), build(network, "cifar10"), sliced(network)
        for unit in fast.units:
            unit.compile()  # in the round that is not measured
        arms: Arms = {
            "fit": lambda chain=plain: ours(chain),
            "DataLoader and torchvision": lambda n=network, d=data: ordinary_epoch(n, d, recipe.batch_size, 0),
            "fit, units compiled": lambda chain=fast: ours(chain),
            SLICED: lambda chain=other: ours(chain),
            "fit's batches alone": batches,
        }
        label = network.replace("resnet", "ResNet-")
        yield compare(f"one epoch of {count} images", f"{label}, 32 × 32, batch {recipe.batch_size}", arms, rounds)


def training_on_gpu(rounds: int) -> Tables:
    """The same on a GPU: bfloat16 and a CUDA graph, beside the ordinary loop in PyTorch's own float32."""
    recipe, device = RECIPES["short"], "cuda"
    data = noise_dataset(44_928)  # as many steps as an epoch of CIFAR-10 has
    for network in ("resnet20", "resnet56", "resnet110"):
        chain, other = build(network, "cifar10").to(device), sliced(network, device)
        arms: Arms = {
            "fit, graph": lambda c=chain: fit(c, data, recipe, stop_after=1, progress=False, graph=True),
            "DataLoader and torchvision": lambda n=network: ordinary_epoch(n, data, recipe.batch_size, 8, device),
            SLICED: lambda c=other: fit(c, data, recipe, stop_after=1, progress=False, graph=True),
        }
        label = network.replace("resnet", "ResNet-")
        work = f"one epoch of {len(data.train)} images on a GPU"
        yield compare(work, f"{label}, 32 × 32, batch {recipe.batch_size}", arms, rounds)


# ---------------------------------------------------------------- tracing, importing


def tracing(rounds: int) -> Tables:
    """Make a chain of a model, beside a forward pass of it and beside torchlens's trace."""
    import torchlens
    from torchvision.models import resnet50

    model, (x, _) = resnet50().eval(), images((1, 3, 224, 224))

    def forward() -> None:
        with torch.inference_mode():
            model(x)

    arms: Arms = {
        "unravel": lambda: unravel(model, x),
        "one forward": forward,
        "torchlens, trace": lambda: torchlens.trace(model, x),
    }
    yield compare("unravel a model", "ResNet-50, 224 × 224, batch 1", arms, rounds)


def importing(rounds: int) -> Tables:
    """``import unravelling`` beside ``import torch``, without and with pandas, each in a new interpreter."""

    usual = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(module: str) -> Callable[[], Any]:
        command = [sys.executable, "-c", f"import {module}"]
        return lambda: subprocess.run(command, check=True, timeout=120, env=usual)  # so that none is compiled anew

    arms = {f"import {name}": run(name) for name in ("unravelling", "torch", "torch, pandas")}
    yield compare("import", "a new interpreter", arms, rounds)


# ---------------------------------------------------------------- growth


def growth(rounds: int) -> Tables:
    """How processor seconds and live bytes grow: one row a size, the arm is the size."""
    works: dict[str, Callable[[Chain, Tensor, Tensor], Any]] = {
        "delete_each": lambda chain, x, y: delete_each(chain, [(x, y)]),
        "gradient_by_length": lambda chain, x, y: gradient_by_length(chain, x, y),
        "forward": lambda chain, x, y: evaluate(chain, [(x, y)]),
    }

    def tower(n: int, batch: int, side: int) -> tuple[Chain, Tensor, Tensor]:
        chain = build(f"resnet{2 * n + 2}", "digits").eval()
        for part in chain.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                torch.nn.init.constant_(part.weight, n**-0.5)  # so that untrained networks of any depth stay finite
        return chain, *images((batch, 1, side, side))

    cases = [("units", n, partial(tower, n, 4, 8)) for n in (9, 27, 54, 108, 270, 810)]
    cases += [("batch", batch, partial(tower, 27, batch, 8)) for batch in (16, 64, 256)]
    cases += [("resolution", side, partial(tower, 9, 4, side)) for side in (16, 32, 64, 128)]
    cases += [("length of text", length, partial(language, 4, 128, length)) for length in (32, 128, 512)]
    for axis, value, make in cases:
        chain, x, y = make()
        for name, work in works.items():
            if name == "gradient_by_length" and len(chain) > 108:
                continue  # minutes, and no other exponent
            with LiveBytes() as live:
                work(chain, x, y)
            start = time.process_time()  # of all threads: a single run, so what else runs should not count
            work(chain, x, y)
            seconds = time.process_time() - start
            row = {"work": f"growth of {name}", "setting": axis, "arm": value, "minimum": seconds, "median": seconds}
            yield pd.DataFrame([row | {"rounds": 1, "peak_bytes": live.peak}])


def profiles(rounds: int) -> Tables:
    """Which operators the time goes to, as shares of all time within operators, by torch's profiler."""
    chain, (x, y) = build("resnet110", "digits").eval(), digits().test.batches(32)[0]
    trained, data = build("resnet20", "cifar10"), noise_dataset(640)
    works: dict[str, Callable[[], Any]] = {
        "a loop over without": partial(loop, chain, x),
        "delete_each": partial(delete_each, chain, [(x, y)]),
        "gradient_by_length": partial(gradient_by_length, chain, x, y),
        "fit": partial(fit, trained, data, RECIPES["short"], stop_after=1, progress=False),
    }
    for work, run in works.items():
        run()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run()
        spent = pd.Series({row.key: row.self_cpu_time_total for row in profiled.key_averages()}).nlargest(200)
        rows = [{"arm": name, "share": share} for name, share in (spent / spent.sum()).head(6).items()]
        setting = "ResNet-20, 32 × 32" if work == "fit" else "ResNet-110, 8 × 8, batch 32"
        yield pd.DataFrame(rows).assign(work=f"profile of {work}", setting=setting, rounds=1)


ON_CPU = (deletions, many, gradients, training, tracing, importing, growth, profiles)
ORDER = [f.__name__ for f in (*ON_CPU, training_on_gpu)]
GROUPS = {f.__name__: f for f in (*ON_CPU, *([training_on_gpu] if torch.cuda.is_available() else []))}


def commit() -> str:
    """Return the commit that is measured, with a plus sign if files differ from it."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        run = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    return "unknown"


def processor() -> str:
    """Return the processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Run the chosen groups and put their rows in the place of the earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of every arm, after one that only counts")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # each kind of unit and size of batch is one: beyond, they run uncompiled
    told = {"threads": options.threads, "hardware": processor(), "torch": torch.__version__.partition("+")[0]}
    told |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit()}
    for name in options.only:
        rows = []
        for table in GROUPS[name](options.rounds):
            print(table.drop(columns=["work", "rounds"]).to_string(index=False), flush=True)
            rows.append(table)
        gpu = f", {torch.cuda.get_device_name()}" if name == training_on_gpu.__name__ else ""
        table = pd.concat(rows).assign(group=name, **told | {"hardware": told["hardware"] + gpu})
        earlier = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame({"group": []})
        whole = pd.concat([earlier[earlier["group"] != name], table]) if len(earlier) else table
        whole = whole.sort_values("group", key=lambda names: names.map(ORDER.index), kind="stable")
        temporary = RESULTS.with_suffix(".tmp")
        whole.to_csv(temporary, index=False, float_format="%.6g")
        temporary.replace(RESULTS)


if __name__ == "__main__":
    main()
