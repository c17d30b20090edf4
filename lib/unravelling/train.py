"""Training: a recipe, one loop with exact resume, and evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .batches import NOTHING, Batches, class_last, device_of, eval_mode, iterate, move, named_failure, scores
from .chain import FLAG, Chain, check_chain, check_kind, check_number
from .data import Dataset, Split, check_path, checksum, write_atomically


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum on augmented batches.

    Attributes:
        name: shown in tables.
        epochs, iterations: passes over the training images, or steps in all; one of the two is None.
        batch_size: images a step.
        lr: peak learning rate.
        schedule: ``"onecycle"``, up to ``lr`` over the first quarter and down to zero, both as a cosine; or
            ``"steps"``, divided by 10 at each fraction of the run in ``milestones``.
        warmup: iterations at a tenth of ``lr`` before ``"steps"`` begins (He et al., 2015, for 110 layers).
        momentum, nesterov, weight_decay: as in `torch.optim.SGD`, on all parameters.
        crop, flip: as in `~unravelling.data.augment`.
        bagged: whether the training images are drawn anew with replacement, once, by the seed (Breiman, 1996).
        survival: probability with which the last unit's branch takes part in a step, falling to it linearly from 1
            (stochastic depth, Huang et al., 2016); all branches always do when None.
        active: how many branches take part in a step, chosen at random (Veit et al., 2016, section 5: 23 of 54).
        rescale: whether a branch that takes part is divided by its probability to do so. If not, branches must be
            multiplied by it at test time, as Huang et al. do: `as_tested` does that.
        precision: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 autocast where the device is faster in it.
    """

    name: str
    epochs: int | None = None
    iterations: int | None = None
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "onecycle"
    milestones: tuple[float, ...] = ()
    warmup: int = 0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    crop: int = 0
    flip: bool = False
    bagged: bool = False
    survival: float | None = None
    active: int | None = None
    rescale: bool = True
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_kind(str, "a text", name=self.name)
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError(f"recipe {self.name!r} needs either epochs or iterations")
        numbers = {"batch_size": 1, "warmup": 0, "crop": 0}
        numbers |= {key: 1 for key in ("epochs", "iterations", "active") if getattr(self, key) is not None}
        for key, least in numbers.items():  # those of NumPy become Python's, which a checkpoint can hold
            object.__setattr__(self, key, check_number(least, **{key: getattr(self, key)}))
        check_kind(tuple | list, "fractions in a tuple", milestones=self.milestones)
        rates = [(key, getattr(self, key)) for key in ("lr", "momentum", "weight_decay")]
        for key, value in rates:
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"recipe {self.name!r}: {key} {value!r} is not a finite number of 0 or more")
        if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in self.milestones):
            raise ValueError(f"recipe {self.name!r}: milestones {self.milestones} are not fractions of the run")
        if self.survival is not None and self.active is not None:
            raise ValueError(f"recipe {self.name!r} has both survival and active: choose one way to leave branches out")
        if self.survival is not None and not (isinstance(self.survival, (int, float)) and 0 < self.survival <= 1):
            raise ValueError(f"recipe {self.name!r}: survival {self.survival!r} is not a probability above 0")
        if not all(isinstance(value, bool) for value in (self.nesterov, self.flip, self.bagged, self.rescale)):
            raise TypeError(f"recipe {self.name!r}: nesterov, flip, bagged and rescale must be True or False")
        for key, allowed in {"schedule": ("onecycle", "steps"), "precision": ("float32", "bfloat16", "auto")}.items():
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"recipe {self.name!r}: {key} {value!r} is not one of {', '.join(allowed)}")

    def lr_at(self, step: int, total: int) -> float:
        """Return the learning rate of step ``step``, from 0, out of ``total``."""
        if self.schedule == "steps":
            if step < self.warmup:
                return self.lr / 10
            return self.lr / 10 ** sum(step >= round(m * total) for m in self.milestones)
        if total < 4:
            return self.lr  # too few steps to rise and to fall
        peak = total / 4
        phase = (step + 1) / peak if step < peak else 1 + (step - peak) / (total - peak)
        return self.lr * 0.5 * (1 - math.cos(math.pi * phase))


_RECIPES = [
    Recipe("digits", epochs=20, batch_size=64, crop=1),
    Recipe("short", epochs=20, lr=0.2, nesterov=True, weight_decay=5e-4, crop=4, flip=True, precision="auto"),
    Recipe("paper", iterations=64_000, schedule="steps", milestones=(0.5, 0.75), warmup=400, crop=4, flip=True),
]
RECIPES = {recipe.name: recipe for recipe in _RECIPES}
"""Recipes by name.

``digits``: half a minute a network. ``short``: CIFAR-10 in 20 epochs, half a day of a CPU core for ResNet-110, two
hours where it has matrix units. ``paper``: 64k steps as He et al. (2015). Each has variants: ``-bagged``, and those
that leave branches out, ``-short-paths``, ``-short-paths-unscaled``, whose branches are scaled at test time instead
(`as_tested`), and ``-stochastic-depth``; ``-short-paths-long``, of two, updates each branch as often, or oftener."""
_VARIANTS: dict[str, dict[str, Any]] = {"short-paths": {"active": 23}, "stochastic-depth": {"survival": 0.5}}
_VARIANTS |= {"short-paths-unscaled": {"active": 23, "rescale": False}, "bagged": {"bagged": True}}
for _recipe, (_variant, _options) in product(_RECIPES, _VARIANTS.items()):
    _name = f"{_recipe.name}-{_variant}"
    RECIPES[_name] = replace(_recipe, name=_name, **_options)
for _name, _epochs in (("digits-short-paths", 60), ("short-short-paths", 47)):  # of 20, where 23 of 54 are active
    RECIPES[f"{_name}-long"] = replace(RECIPES[_name], name=f"{_name}-long", epochs=_epochs)


PARTS = ("identity", "chain", "optimizer", "generator", "history", "checksum")
"""What a checkpoint holds."""


@torch.inference_mode(False)  # which also turns gradients on
def fit(
    chain: Chain, data: Dataset, recipe: Recipe, *, seed: int = 0, checkpoint: str | Path | None = None,
    stop_after: int | None = None, on_epoch: Callable[[int, Chain], None] | None = None, progress: bool = True,
    graph: bool = False,
) -> pd.DataFrame:
    """Train the chain in place and return its history.

    A run that finds its checkpoint continues from there, and ends with the same bits as one that was never interrupted
    (on the same machine and with the same versions). Denormal numbers are flushed to zero meanwhile: deep plain
    networks train many times slower with them on a CPU.

    Args:
        chain: the network, on its device.
        data: trains on ``data.train``, reports on ``data.validation``; the test split is not touched.
        recipe: how to train.
        seed: of the order of the images and their augmentation.
        checkpoint: file to write after every epoch and to resume from.
        stop_after: epochs to run now at the most, to be resumed later; 0 only reads the checkpoint.
        on_epoch: called with the epoch, from 1, and the chain after every epoch, before the checkpoint is written.
        progress: whether to show a bar, which leaves nothing behind.
        graph: whether a GPU repeats each epoch's steps as a CUDA graph of the fourth one, several times as fast where
            many small layers keep it waiting for Python. The forward must not depend on values, and makes no random
            choices on the CPU; where the recipe leaves branches out, no two steps are alike, and there is no graph.

    Returns:
        One row an epoch, with ``epoch`` (from 1), ``lr``, ``train_loss``, ``train_error``, ``validation_loss``,
        ``validation_error``; errors as fractions, training ones averaged over the epoch's augmented batches.

    Raises:
        TypeError, ValueError: the checkpoint is corrupt, or belongs to another recipe, seed, network or dataset; there
            are too few images, or labels that are no classes; the network does not fit, or has diverged.
        OSError: the checkpoint could not be written, as on a full disk; the earlier one is kept.
    """
    check_chain(chain)
    check_kind(Dataset, "a Dataset", data=data)
    check_kind(Recipe, "a Recipe", recipe=recipe)
    check_kind(*FLAG, progress=progress, graph=graph)
    seed = check_number(seed=seed)
    check_number(stop_after=0 if stop_after is None else stop_after)
    if not any(parameter.requires_grad for parameter in chain.parameters()):
        raise ValueError("no parameter of the network can be trained: it has none, or none requires a gradient")
    if not len(data.validation):
        raise ValueError("data.validation holds no images: training reports on some")
    if max(int(split.labels.max()) for split in (data.train, data.validation) if len(split)) >= len(data.classes):
        raise ValueError(f"a label is beyond the {len(data.classes)} classes of the dataset {data.name!r}")
    if recipe.bagged:
        drawn = torch.randint(len(data.train), (len(data.train),), generator=torch.Generator().manual_seed(seed))
        data = replace(data, train=data.train.take(drawn))
    steps = max(1, len(data.train) // recipe.batch_size)  # if it is none, the first epoch says so
    iterations = recipe.iterations or (recipe.epochs or 0) * steps
    chain.to(memory_format=torch.channels_last)
    options = {key: getattr(recipe, key) for key in ("lr", "momentum", "nesterov", "weight_decay")}
    graph = graph and device_of(chain).type == "cuda" and _probabilities(chain, recipe) is None
    if graph:  # what the graph is to see of a changing rate lies on the GPU
        options |= {"lr": torch.tensor(recipe.lr, device=device_of(chain)), "fused": True}
    optimizer, generator = torch.optim.SGD(chain.parameters(), **options), torch.Generator().manual_seed(seed)
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in chain.state_dict().items()]
    images = [data.train.images, data.train.labels]
    identity = {"recipe": asdict(recipe), "seed": seed, "network": checksum(shapes)[:16], "data": checksum(images)[:16]}
    history: list[dict[str, Any]] = []
    path = None if checkpoint is None else check_path(checkpoint=checkpoint)
    if path is not None and path.exists():
        state = _read(path, identity)
        chain.load_state_dict(state["chain"])
        groups = optimizer.state_dict()["param_groups"]  # of this run, on whatever device the checkpoint was written
        optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        generator.set_state(state["generator"])
        history = state["history"]
    last = math.ceil(iterations / steps)
    last = last if stop_after is None else min(last, len(history) + stop_after)
    total = (last - len(history)) * steps
    bar = tqdm(total=total, desc=f"training for {last} epochs", leave=False, disable=not progress)
    with bar, _denormals_flushed():
        for epoch in range(len(history), last):
            ahead = range(epoch * steps, min((epoch + 1) * steps, iterations))
            rates = [recipe.lr_at(step, iterations) for step in ahead]
            row = _train_epoch(chain, data, recipe, optimizer, generator, rates, bar, graph)
            validation = evaluate(as_tested(chain, recipe), data.validation)
            row |= {f"validation_{key}": validation[key] for key in ("loss", "error")}
            history.append({"epoch": epoch + 1} | row)
            bar.set_postfix_str(f"validation error {100 * validation['error']:.1f} %")
            if on_epoch is not None:
                on_epoch(epoch + 1, chain)
            if path is not None:
                state = {"history": history, "generator": generator.get_state(), "chain": chain.state_dict()}
                state |= {"identity": json.dumps(identity, sort_keys=True), "optimizer": optimizer.state_dict()}
                write_atomically(path, partial(torch.save, state | {"checksum": checksum(state)}))
    chain.eval()
    return pd.DataFrame(history)


def _train_epoch(
    chain: Chain, data: Dataset, recipe: Recipe, optimizer: torch.optim.SGD, generator: torch.Generator,
    rates: Sequence[float], bar: tqdm, graph: bool,
) -> dict[str, float]:
    """Take a step at each learning rate, and return the row of the history."""
    device, classes = device_of(chain), len(data.classes)
    bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and _has_fast_bfloat16(device))
    loss_sum, wrong = torch.zeros((), device=device), torch.zeros((), device=device)
    batches = data.train.shuffled(recipe.batch_size, generator, crop=recipe.crop, flip=recipe.flip, device=device)
    draw = thinning(chain, recipe)
    chain.train()

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with named_failure(x), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = draw(generator)(move(x, chain))
        if logits.shape != (len(y), logits.shape[-1]) or logits.shape[-1] < classes:
            shape = tuple(logits.shape)
            raise ValueError(f"the network returns {shape} for {len(y)} images of {classes} classes: expected (B, K)")
        loss = cross_entropy(logits.float(), y)
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach() * len(y))
        wrong.add_((logits.argmax(1) != y).sum())

    take: Callable[[Tensor, Tensor], None] = step
    for number, (lr, (x, y)) in enumerate(zip(rates, batches, strict=False)):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if graph else lr
        if graph and number == 3:  # the first ones make what lasts, such as the momentum
            take = _captured(step, x, y)
        take(x, y)
        bar.update()
    seen = len(rates) * recipe.batch_size
    return {"lr": rates[-1], "train_loss": loss_sum.item() / seen, "train_error": wrong.item() / seen}


def _captured(step: Callable[[Tensor, Tensor], None], x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], None]:
    """Return a step as a CUDA graph, which is to be called with tensors of the same shapes; it is not taken yet."""
    inputs, graph = (x.clone(), y.clone()), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*inputs)

    def replay(x: Tensor, y: Tensor) -> None:
        for fixed, new in zip(inputs, (x, y), strict=True):
            fixed.copy_(new)
        graph.replay()

    return replay


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Flush denormal numbers to zero for the duration of a ``with`` block."""
    before = (torch.tensor([1e-40]) * 1).item() == 0  # torch can set this, but not tell it
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def thinning(chain: Chain, recipe: Recipe) -> Callable[[torch.Generator], Chain]:
    """Return what draws the part of a chain that a step trains: all, unless the recipe has ``survival`` or ``active``.

    A draw shares the chain's parameters; the generator decides which branches it leaves out. Raises ValueError for more
    active units than there are, or for a plain unit, which has no skip to be left with.
    """
    probability = _probabilities(chain, recipe)
    if probability is None:
        return lambda generator: chain
    factors = (1 / probability).tolist() if recipe.rescale else [1.0] * len(chain)
    there = [unit.scaled(f) if f != 1 else unit for unit, f in zip(chain.units, factors, strict=True)]
    gone = [unit.deleted() for unit in chain.units]

    def draw(generator: torch.Generator) -> Chain:
        drawn = (torch.randperm if recipe.active else torch.rand)(len(chain), generator=generator)
        keep = drawn.argsort() < recipe.active if recipe.active else drawn < probability
        return chain.with_units(pair[k] for *pair, k in zip(gone, there, keep.tolist(), strict=True))

    return draw


def as_tested(chain: Chain, recipe: Recipe) -> Chain:
    """Return a chain as it is to be tested after training with a recipe: its branches as large as they were on average.

    That is the chain itself, unless the recipe left branches out without ``rescale``: then every branch is multiplied
    by the probability that it took part (Huang et al., 2016, equation 5). Parameters are shared; errors: `thinning`'s.
    """
    probability = _probabilities(chain, recipe)
    if probability is None or recipe.rescale:
        return chain
    return chain.with_units(unit.scaled(p) for unit, p in zip(chain.units, probability.tolist(), strict=True))


def _probabilities(chain: Chain, recipe: Recipe) -> Tensor | None:
    """Return with which probability each branch takes part in a step, ``(n,)``; None where all of them always do."""
    n = len(chain)
    if recipe.survival is None and recipe.active is None:
        return None
    if not all(unit.residual for unit in chain.units):
        raise ValueError(f"recipe {recipe.name!r} leaves branches out, but this network has units without a skip")
    if recipe.survival is not None:
        return 1 - torch.arange(1, n + 1, dtype=torch.float64) / n * (1 - recipe.survival)
    assert recipe.active is not None
    if not 1 <= recipe.active <= n:
        raise ValueError(f"recipe {recipe.name!r} needs {recipe.active} active units: this chain has {n}")
    return torch.full((n,), recipe.active / n, dtype=torch.float64)


def evaluate(chain: nn.Module, data: Split | Batches) -> dict[str, float]:
    """Return ``error`` (a fraction), ``loss`` (mean cross-entropy, nats), ``wrong`` and ``images`` in eval mode.

    Args:
        chain: maps inputs to logits ``(B, K)``, or ``(B, T, K)`` or ``(B, K, H, W)``, where tokens or pixels count.
        data: a split, or `~unravelling.batches.Batches`; labels of -100 are left out.

    Raises TypeError or ValueError where there are no batches, or no labels that fit; or logits are NaN or infinite.
    """
    wrong, loss, images = 0, 0.0, 0
    for x, y in iterate(chain, data):
        with eval_mode(chain), torch.inference_mode(), named_failure(x):  # around the model alone, not the iterator
            logits = chain(x)
        if not isinstance(logits, Tensor):
            kind = type(logits).__name__
            raise TypeError(f"the network returns a {kind}: expected logits (B, K), or (B, T, K) for tokens")
        labels = y.cpu() if isinstance(y, Tensor) else y
        logits = class_last(logits.cpu().double(), labels)  # on the CPU, since a device may lack float64
        missed, losses, kept = scores(logits, labels)
        if not losses.isfinite().all():
            raise ValueError("logits are NaN or infinite: look at weights and inputs, or the training has diverged")
        wrong, loss, images = wrong + int(missed.sum()), loss + float(losses.sum()), images + int(kept.sum())
    if not images:
        raise ValueError(NOTHING)
    return {"error": wrong / images, "loss": loss / images, "wrong": wrong, "images": images}


def _read(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's content, or raise ValueError where it is damaged or belongs to another run."""
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError("it is no file")
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = [part for part in PARTS if not isinstance(state, dict) or part not in state]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}: was it written by fit?")
        if state.pop("checksum") != checksum(state):
            raise ValueError("its content does not match its checksum")
        stored = json.loads(state["identity"])
        stored["recipe"] = json.loads(json.dumps(asdict(Recipe(**stored["recipe"]))))  # with fields that came later
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        raise ValueError(f"checkpoint {path} cannot be read ({error}): delete it to train from the start") from error
    for key, value in json.loads(json.dumps(identity)).items():
        if stored.get(key) != value:
            what = f"checkpoint {path} belongs to another {key} ({stored.get(key)}, now {value})"
            raise ValueError(f"{what}: choose another file, or delete it to train from the start")
    return state


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())  # else float32 is faster
