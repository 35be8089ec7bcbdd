"""What an installation gives: light imports, and a core that needs nothing but its dependencies."""

import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code, executable=sys.executable, **options):
    result = subprocess.run(
        [executable, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light_fast_and_starts_no_backend():
    """Else jax.distributed.initialize and flags set after the import would come too late."""
    # Processor time, so that whatever else runs on the machine does not count.
    code = """
import os, sys, time, jax, jax.numpy
start = time.process_time()
import gdn2_jax
seconds = time.process_time() - start
import gdn2_jax.testing
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
print(seconds, jax.device_count("cpu"), *sys.modules)
"""
    seconds, devices, *loaded = python(code).split()
    assert float(seconds) < 2 and devices == "3"
    heavy = {"optax", "orbax", "grain", "chex", "matplotlib", "tyro", "tensorboardX", "pyarrow"}
    assert "jax" in loaded and not heavy & set(loaded)


def test_core_install_requires_only_jax_flax_and_jaxtyping():
    core = [line for line in requires("gdn2-jax") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in core} == {"jax", "flax", "jaxtyping"}


@pytest.mark.slow
def test_sdist_and_its_wheel_run_in_an_empty_environment_with_the_core_dependencies(tmp_path):
    source, executable = tmp_path / "source", tmp_path / "venv" / "bin" / "python"
    # A copy, because building leaves files behind.
    source.mkdir()
    for package in ("gdn2_jax", "pallas"):
        shutil.copytree(ROOT / package, source / package, symlinks=True)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / file, source)
    venv.create(tmp_path / "venv")
    # Compiling what is installed takes as long as all the rest.
    pip = [sys.executable, "-m", "pip", "--python", executable, "install", "--quiet"]
    install = [*pip, "--no-compile", "-c", source / "constraints.txt"]
    # Outside the environment, which shall hold the dependencies alone.
    subprocess.run([*install, "setuptools>=77", "--target", tmp_path / "tools"], check=True)
    build = f"import setuptools.build_meta as build; build.build_sdist({str(tmp_path)!r})"
    python(build, executable, cwd=source, env={"PYTHONPATH": str(tmp_path / "tools")})
    shutil.rmtree(source / "gdn2_jax")
    # pip makes the wheel from the sdist, which therefore holds all that a wheel needs.
    (sdist,) = tmp_path.glob("*.tar.gz")
    subprocess.run([*install, sdist], check=True)
    code = """
import importlib.util
import gdn2_jax, gdn2_jax.layers, gdn2_jax.models, gdn2_jax.testing, gdn2_jax.pallas.mosaic
for package in ("tyro", "grain", "matplotlib", "pallas"):
    assert importlib.util.find_spec(package) is None, package
rows = gdn2_jax.testing.compare_with_recurrence(
    gdn2_jax.gated_delta_rule_2, gdn2_jax.testing.operator_inputs(1, 3, 1, 4)
)
assert all(row.passed for row in rows)
print(gdn2_jax.__file__, gdn2_jax.pallas.mosaic.__file__)
"""
    printed = python(code, executable, cwd=tmp_path)
    assert all(str(tmp_path / "venv") in path for path in printed.split())
