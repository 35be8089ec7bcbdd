"""Flags for every test; JAX reads them when its first backend starts.

Eight simulated CPU devices, and what makes compilation, of which the suite mostly consists, several
times faster: no optimisation by LLVM, one module for LLVM instead of up to 32 that it compiles in
parallel, and XLA's older emitter of fused loops, which does not set up MLIR for each loop. An
XLA_FLAGS that sets the number of devices replaces all of them: at night the suite runs with XLA's
own flags.
"""

import contextlib
import ctypes
import functools
import gc
import os
import random
import resource
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
given = os.environ.get("XLA_FLAGS", "")
if "device_count" not in given:
    os.environ["XLA_FLAGS"] = " ".join((given, *FLAGS))
# In the background of a script a process ignores Ctrl-C, and so do the commands that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


ROOT = Path(__file__).parent
# Where memory is filled: these run the operators. At night MALLOC_PERTURB_ does it everywhere.
FILLED = ("ops", "layers", "models", "pallas")
M_PERTURB = -6  # of malloc.h


def pytest_addoption(parser):
    parser.addoption(
        "--first-cases",
        action="store_true",
        help="run the first case of each parametrised test only, on versions that another run does "
        "not test: enough to find what they changed",
    )


@pytest.fixture(scope="session")
def hybrid_config():
    """A tiny hybrid model of bytes."""
    from gdn2_jax.models import DeltaRule, ModelConfig, SoftmaxAttention

    return ModelConfig(
        vocab_size=257,
        d_model=16,
        num_layers=2,
        mixer=DeltaRule(num_heads=1, head_dim=16),
        hybrid=True,
        attention=SoftmaxAttention(num_heads=1, window_size=8),
        mlp_dim=32,
        dtype="float32",
        implementation="recurrent",
    )


@pytest.fixture(scope="session")
def word_texts(tmp_path_factory):
    """A directory with twenty texts of words in random order."""
    directory = tmp_path_factory.mktemp("text")
    words = [
        "the",
        "a",
        "red",
        "blue",
        "green",
        "cat",
        "dog",
        "bird",
        "sits",
        "runs",
        "flies",
        "on",
        "under",
        "over",
        "mat",
        "tree",
    ]
    draw = random.Random(0)
    for i in range(20):
        (directory / f"{i}.txt").write_text(" ".join(draw.choices(words, k=1000)))
    return directory


@functools.cache
def param_shapes(module, x64, *inputs):
    """Traced once for all tests that use the same module."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


@pytest.fixture(scope="session")
def random_params():
    """A function of a module and its input: parameters of unit gain, made without compiling."""

    def make(module, *inputs):
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            name = path[-1].key
            if name == "kernel":
                return rng.normal(size=leaf.shape, scale=leaf.shape[-2] ** -0.5).astype(leaf.dtype)
            offset = {"scale": 1, "A_log": 1}.get(name, 0)
            return (offset + 0.5 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

        shapes = param_shapes(module, jax.config.jax_enable_x64, *map(jax.typeof, inputs))
        return jax.tree.map_with_path(draw, shapes)

    return make


@pytest.fixture(scope="module", autouse=True)
def filled_memory(request):
    """glibc fills what it frees and allocates: memory that nothing wrote shows.

    Compilation takes a tenth longer with it, so only where operators are tested.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and "MALLOC_PERTURB_" not in os.environ:
        folder = request.path.relative_to(ROOT).parts[0]
        mallopt(M_PERTURB, 129 if folder in FILLED else 0)


def pytest_collection_finish():
    """Collects garbage less often: tracing makes much, and none of what is imported here is some."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees the memory maps of compiled programs, of which a process may hold 65,530.

    A program has some hundreds. At the limit XLA cannot allocate memory, and crashes when it
    compiles or writes a program. Until then files share what they compile.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def file_size_limit():
    """A context in which writing fails beyond so many bytes of a file, as on a full disk."""

    @contextlib.contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


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
