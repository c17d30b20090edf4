"""Side-by-side speed of what the library does and of the usual way: ``make bench``.

The arms are interleaved, after one unmeasured round each. Every arm is reported by its minimum and median in seconds
and by its ratio to the first. Nothing here is a test.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from unravelling import RECIPES, Chain, build, digits, fit, gradient_by_length
from unravelling.lesion import evaluate_variants

Arms = dict[str, Callable[[], object]]


def compare(title: str, arms: Arms, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for lap, (name, arm) in itertools.product(range(rounds + 1), arms.items()):
        start = time.perf_counter()
        arm()
        if lap:
            seconds[name].append(time.perf_counter() - start)
    print(f"\n{title} ({rounds} rounds, {torch.get_num_threads()} threads)")
    first = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"  {name:34s} min {min(times):8.3f} s   median {median:8.3f} s   {median / first:6.2f} × the first")


def deletions(network: str) -> Arms:
    chain, data = build(network, "digits").eval(), digits()
    batches = data.test.batches()
    intact = tuple(range(len(chain)))
    variants = [intact, *((*intact[:i], ~i, *intact[i + 1 :]) for i in intact)]

    def hooks() -> None:
        """Replace a unit's output by its skip with a forward hook: the whole network runs every time."""
        for unit in chain.units:
            handle = unit.register_forward_hook(lambda unit, inputs, output: unit.post(unit.skip(*inputs)))
            run(chain, batches)
            handle.remove()

    def naive() -> None:
        for i in intact:
            run(chain.without(i), batches)

    return {"shared prefixes": lambda: evaluate_variants(chain, batches, variants), "a loop": naive, "hooks": hooks}


def run(chain: Chain, batches: list[tuple[Tensor, Tensor]]) -> None:
    with torch.inference_mode():
        for x, _ in batches:
            chain(x)


def spectra(network: str) -> Arms:
    chain = build(network, "digits").eval()
    x, y = digits().test.batches(32)[0]
    return {
        "forward and backward": lambda: cross_entropy(chain(x), y).backward(),
        "exact gradient by length": lambda: gradient_by_length(chain, x, y),
    }


def training(network: str) -> Arms:
    data, recipe = digits(), RECIPES["digits"]

    def usual() -> None:
        """Run one epoch the ordinary way: DataLoader over float images, NCHW."""
        chain = build(network, "digits")
        images = data.train.normalize(data.train.images).contiguous()
        loader = DataLoader(TensorDataset(images, data.train.labels), recipe.batch_size, shuffle=True, drop_last=True)
        optimizer = torch.optim.SGD(chain.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(chain(x), y).backward()
            optimizer.step()

    return {
        "fit, one epoch": lambda: fit(build(network, "digits"), data, recipe, stop_after=1, progress=False),
        "DataLoader, one epoch": usual,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", default="resnet110")
    options = parser.parse_args()
    for title, make in (("delete each unit", deletions), ("path lengths", spectra), ("training", training)):
        compare(f"{title}, {options.network}, digits", make(options.network), options.rounds)
