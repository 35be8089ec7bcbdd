import sys
from pathlib import Path

from gdn2_jax.command import _compilation_cache, out_of_memory

import jax
import jax.numpy as jnp
import pytest


def test_too_little_memory_is_one_line_with_the_size():
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.block_until_ready(jnp.zeros(2**47, jnp.uint8))
    assert out_of_memory(error.value) == f"out of device memory, allocating {2**47} bytes"
    for text, line in (
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 816 bytes.\nLong",
            "out of device memory, allocating 816 bytes",
        ),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 75.50GiB (81B) on device 0",
            "out of device memory, allocating 75.50GiB",
        ),
        ("INTERNAL: something else, allocating 5 bytes", None),
    ):
        assert out_of_memory(jax.errors.JaxRuntimeError(text)) == line


def test_ctrl_c_during_imports_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/train.py"])
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "\ntrain.py: stopped by SIGINT\n"


def test_a_user_without_a_home_has_no_kept_programs(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert _compilation_cache() is None
