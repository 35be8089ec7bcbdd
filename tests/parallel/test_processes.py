"""experiments/train.py as a job of several processes on one CPU: killed, continued, stopped."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import train

from gdn2_jax.parallel import join_processes
from gdn2_jax.training import run_files
from gdn2_jax.training.metrics import read_metrics

STEPS, KILLED_AFTER = 40, 13
OPTIONS = {
    "steps": STEPS,
    "checkpoint-every": 10,
    "validate-every": 20,
    "validation-batches": 2,
    "log-every": 1,
    "sample-tokens": 2,
    "global-batch-size": 8,
    "accumulation": 2,
    "data.sequence-length": 32,
    "model.d-model": 16,
    "model.num-layers": 1,
    "model.hybrid": False,
    "model.mixer.num-heads": 2,
    "model.mixer.head-dim": 8,
    "model.mlp-dim": 32,
    "model.implementation": "recurrent",
}


class Job:
    """Two processes of two devices, each with its output in a file."""

    def __init__(self, directory, compiled, *arguments):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.files = run_files(directory)
        self._paths = [directory.with_suffix(f".{time.time()}-{i}") for i in range(2)]
        self.processes = []
        for i, path in enumerate(self._paths):
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=2", os.environ["XLA_FLAGS"]),
                "JAX_COMPILATION_CACHE_DIR": str(compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
                "JAX_COORDINATOR_ADDRESS": address,
            }
            command = [
                sys.executable,
                train.__file__,
                *map(str, arguments),
                "--run-dir",
                str(directory),
            ]
            with path.open("w") as output:
                streams = {"stdout": output, "stderr": subprocess.STDOUT}
                self.processes.append(subprocess.Popen(command, env=environment, **streams))

    def wait(self):
        """Returns the exit statuses; a process that ends badly does not end the others."""
        return [process.wait(timeout=300) for process in self.processes]

    def wait_for_step(self, step):
        deadline = time.monotonic() + 300
        while self.logged_step() < step:
            ended = [process.poll() for process in self.processes]
            assert ended == [None] * len(ended), self.outputs()
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.02)

    def logged_step(self):
        """Of the last whole line."""
        if not self.files.metrics.exists():
            return 0
        with self.files.metrics.open("rb") as file:
            file.seek(max(self.files.metrics.stat().st_size - 1000, 0))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0

    def outputs(self):
        return [path.read_text() for path in self._paths]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, word_texts):
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    cache = tmp_path_factory.mktemp("cache")
    return [*options, f"--data.cache-directory={cache}", "--data", word_texts]


def losses(files):
    names = ("step", "tokens", "loss", "grad_norm", "validation_loss")
    return [[row.get(name, 0) for name in names] for row in read_metrics(files.metrics)]


@pytest.mark.slow
def test_a_job_that_loses_a_process_fails_and_goes_on_exactly_also_with_others(arguments, tmp_path):
    """One of two processes is killed. They go on; so do two on another mesh, then this one alone."""
    compiled = tmp_path / "compiled"
    job = Job(tmp_path / "two", compiled, *arguments, "--mesh.fsdp", 4)
    job.wait_for_step(KILLED_AFTER)
    job.processes[1].kill()
    assert job.wait() == [1, -signal.SIGKILL], job.outputs()
    assert "started again, it goes on from its last checkpoint" in job.outputs()[0]
    saved = sorted(int(path.name) for path in job.files.checkpoints.iterdir())
    assert saved[-1] in (10, 20) and saved[-1] <= job.logged_step() < STEPS
    before = losses(job.files)
    shutil.copytree(tmp_path / "two", tmp_path / "other")

    job = Job(tmp_path / "two", compiled, *arguments, "--mesh.fsdp", 4)
    assert job.wait() == [0, 0], job.outputs()
    main, other = job.outputs()
    assert f"continuing from the checkpoint of step {saved[-1]}" in main
    assert "continuing" not in other and "a sample:" not in other
    after = losses(job.files)
    assert after[: len(before)] == before
    assert after[-1][0] == STEPS and after[-1][4] > 0

    mesh = ("--mesh.sequence", 2, "--mesh.tensor", 2)
    job = Job(tmp_path / "other", compiled, *arguments, *mesh)
    job.wait_for_step(saved[-1] + 5)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [128 + signal.SIGTERM] * 2, job.outputs()
    step = job.logged_step()
    assert f"stopped after step {step} with a checkpoint" in job.outputs()[0]
    assert (job.files.checkpoints / str(step)).is_dir()

    # On eight devices, half of them for other rows.
    more = ("--sample-tokens", 0, "--run-dir", tmp_path / "other")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train.main(list(map(str, (*arguments, *mesh, *more)))) == 0
    assert f"continuing from the checkpoint of step {step}" in printed.getvalue()
    np.testing.assert_allclose(losses(job.files), after, rtol=1e-4)


def test_a_job_started_by_hand_must_say_all_of_itself(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS: expected to be set"):
        join_processes()
