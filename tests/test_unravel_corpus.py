"""`unravel` on more architectures of other libraries, each with its units said beforehand."""

import copy
import warnings

import pytest
import torch
from architecture_table import row, rows
from architectures import CASES, OTHERS, labels_for, logits_of
from torch.nn import functional as F
from unravelling import gradient_by_length, unravel


def test_the_corpus_has_sixty_architectures_of_three_libraries():
    assert len(CASES) + len(OTHERS) >= 60
    libraries = {name.partition(" ")[0] for name in [*CASES, *OTHERS]}
    assert {"timm", "torchvision", "transformers"} <= libraries


def test_the_reference_lists_every_architecture_and_its_units():
    units = {name: str(case.units) for name, case in [*CASES.items(), *OTHERS.items()]}
    assert {name: entry["Units"] for name, entry in rows().items()} == units


@pytest.mark.parametrize("name", OTHERS)
def test_units_logits_gradients_deletions_spectrum_and_the_model_itself(name):
    case = OTHERS[name]
    pytest.importorskip(name.partition(" ")[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.build().eval()
    before, x = copy.deepcopy(model.state_dict()), case.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no addition that matters is lost
        chain = unravel(model, x, **case.options)
    assert sum(unit.residual for unit in chain.units) == case.units
    with torch.no_grad():
        expected = logits_of(model(**x) if isinstance(x, dict) else model(x))
        assert (chain(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    found = row(name, chain, x)
    assert found["Deletions"] == f"{case.deletions} of {len(chain)}"
    assert found == rows()[name], "run tests/architecture_table.py"
    y = labels_for(expected)
    spectrum = gradient_by_length(chain, x, y)
    state = chain.stem(x).detach().requires_grad_()
    out = state
    for unit in chain.units:
        out = unit(out)
    logits = chain.head(out)
    whole = torch.autograd.grad(F.cross_entropy(logits.flatten(0, -2), y.flatten()), state)[0]
    assert (spectrum.sum(0) - whole).norm() <= 1e-4 * whole.norm()
    assert not model.training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
