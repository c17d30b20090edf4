"""Write book/architectures.csv, which says in the reference what networks `unravel` takes and what of them is checked.

The command is ``python tests/architecture_table.py``.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch
from architectures import CASES, OTHERS, built
from unravelling import unravel
from unravelling.data import write_atomically
from unravelling.from_model import Unravelled

TABLE = Path(__file__).resolve().parents[1] / "book/architectures.csv"
HEADER = ["Network", "Units", "Gradients", "Deletions"]


def row(name: str, chain: Unravelled, x: Any) -> dict[str, str]:
    """What the table says of a network: its units, and how many gradients and deletions `verify` compared."""
    table = chain.verify(x).set_index("check")
    gradients = int(table.compared[table.index.str.startswith("gradient")].sum())
    residual = sum(unit.residual for unit in chain.units)
    deletions = f"{table.compared['deletion']} of {table.of['deletion']}"
    return dict(zip(HEADER, [name, str(residual), str(gradients), deletions], strict=True))


def rows() -> dict[str, dict[str, str]]:
    """The table as it is, by the names of the networks."""
    with TABLE.open(newline="") as file:
        return {entry["Network"]: entry for entry in csv.DictReader(file)}


def main() -> None:
    """Unravel every network, and write the table."""
    found = []
    for name, case in [*CASES.items(), *OTHERS.items()]:
        if name in CASES:
            model = built(name)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = case.build().eval()
        x = case.inputs()
        found.append(row(name, unravel(model, x, **case.options), x))
        print(*found[-1].values(), sep=", ", flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_atomically(TABLE, lambda path: path.write_text(text.getvalue()))


if __name__ == "__main__":
    main()
