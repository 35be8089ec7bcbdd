"""Flags for every test; JAX reads them when its first backend starts.

Eight simulated CPU devices, and no optimisation by LLVM: the suite is mostly compilation, which
that makes several times faster.
"""

import os

import jax
import pytest

os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )
)


def pytest_addoption(parser):
    parser.addoption(
        "--first-cases",
        action="store_true",
        help="run the first case of each parametrised test only, on versions that another run does "
        "not test: enough to find what they changed",
    )


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees the memory maps of compiled programs, of which a process may hold 65,530.

    Workers that ran for long crashed while they compiled; the limit is the suspected cause.
    """
    yield
    jax.clear_caches()


def pytest_itemcollected(item):
    """One worker runs all tests of a file, which share fixtures and compiled programs.

    Unless they are in groups of their own; for `--dist loadgroup`.
    """
    if not item.get_closest_marker("xdist_group"):
        item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.hookimpl(trylast=True)  # after -m has left out what is marked
def pytest_collection_modifyitems(config, items):
    if config.getoption("--first-cases"):
        first = list({getattr(x, "function", x): x for x in reversed(items)}.values())[::-1]
        config.hook.pytest_deselected(items=[x for x in items if x not in first])
        items[:] = first
