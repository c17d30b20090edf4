"""Settings that all tests share."""

import shutil
from functools import singledispatch

import pytest
import torch
from hypothesis import settings
from unravelling import from_model

settings.register_profile("unravelling", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("unravelling")
torch.set_num_threads(1)  # the networks are small: more threads only wait for each other

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Keep the reader's own cache and data out of the tests, and the process as it was found."""
    monkeypatch.setenv("UNRAVELLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNRAVELLING_DATA", raising=False)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def block_units(monkeypatch):
    """Return the library's `block_units` with a register of its own, so that a test's classes stay the test's."""
    fresh = singledispatch(from_model.block_units.__wrapped__)
    monkeypatch.setattr(from_model, "block_units", fresh)
    return fresh


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args):
    """The system's Chromium, since nothing is downloaded; tests that use it are skipped where there is none."""
    if not CHROMIUM:
        pytest.skip("needs chromium")
    return {**browser_type_launch_args, "executable_path": CHROMIUM, "args": ["--no-sandbox"]}
