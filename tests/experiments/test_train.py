"""experiments/train.py and generate.py as commands: killed, stopped, continued, sampled from."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from gdn2_jax.data import load_tokenizer, train_tokenizer
from gdn2_jax.models import MIXERS
from gdn2_jax.models import PRESETS as MODELS
from gdn2_jax.parallel import make_mesh
from gdn2_jax.training import PRESETS, OptimizerConfig, check_mesh, load_trained, run_files
from gdn2_jax.training.checkpoint import read_checkpoints, restore_checkpoint
from gdn2_jax.training.config_file import load_config
from gdn2_jax.training.memory import predict_memory
from gdn2_jax.training.metrics import read_metrics
from gdn2_jax.training.step import abstract_state

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

# Steps of some 10 ms, and a checkpoint after every 40.
OPTIONS = {
    "steps": 120,
    "checkpoint-every": 40,
    "validate-every": 60,
    "validation-batches": 2,
    "log-every": 1,
    "sample-tokens": 8,
    "global-batch-size": 4,
    "accumulation": 2,
    "data.sequence-length": 32,
    "model.d-model": 16,
    "model.num-layers": 1,
    "model.hybrid": False,
    "model.mixer.num-heads": 1,
    "model.mixer.head-dim": 16,
    "model.mlp-dim": 32,
    "model.implementation": "recurrent",
}


def start(*arguments, before=(), **environment):
    """Starts train.py."""
    # Those that make compilation fast, on one device.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment}
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        variables["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    return subprocess.Popen(
        [*before, sys.executable, EXPERIMENTS / "train.py", *map(str, arguments)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(process):
    text, _ = process.communicate(timeout=300)
    return text


def wait_for(condition, process):
    """Polls; fails if the process ends first."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"ended too early:\n{output(process)}"
        assert time.monotonic() < deadline, "waited too long"
        # Longer would miss a save; shorter would take a core from the process.
        time.sleep(0.005)


def logged_step(files):
    """Of the last whole line."""
    if not files.metrics.exists():
        return 0
    with files.metrics.open("rb") as file:
        file.seek(max(files.metrics.stat().st_size - 1000, 0))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def saved_steps(files):
    return sorted(int(path.name) for path in files.checkpoints.glob("*") if path.name.isdigit())


def is_saving(files, process):
    """Whether the second checkpoint or a later one is half written; if so, time stands still."""

    def unfinished():
        return saved_steps(files) and any(files.checkpoints.glob("*.orbax-checkpoint-tmp*"))

    if not unfinished():
        return False
    process.send_signal(signal.SIGSTOP)
    if unfinished():
        return True
    process.send_signal(signal.SIGCONT)
    return False


class Interrupted(NamedTuple):
    files: object
    saved: list[list[int]]
    logged: list[int]
    stopped_output: str
    stopped_status: int
    last_output: str


@pytest.fixture(scope="module")
def options(tmp_path_factory, word_texts):
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    cache = tmp_path_factory.mktemp("cache")
    return [*options, f"--data.cache-directory={cache}", "--data", word_texts]


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start(*options, "--sample-tokens=0", "--run-dir", directory)
    text = output(process)
    assert process.returncode == 0, text
    return run_files(directory)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs that the runs share, but not the uninterrupted one."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def interrupted(options, cache, tmp_path_factory):
    """Killed before the first checkpoint and during a save; then stopped kindly."""
    directory = tmp_path_factory.mktemp("runs") / "interrupted"
    files = run_files(directory)
    saved, logged = [], []

    def go_on(*more, **environment):
        return start(*options, *more, "--run-dir", directory, **environment, **cache)

    def end(process, condition, number):
        wait_for(condition, process)
        process.send_signal(number)
        text = output(process)
        saved.append(saved_steps(files))
        logged.append(logged_step(files))
        return text

    process = go_on()
    end(process, lambda: logged_step(files) >= 10, signal.SIGKILL)
    process = go_on()
    end(process, lambda: is_saving(files, process), signal.SIGKILL)
    # Its rows are dropped first: it had got 40 steps further than its last checkpoint.
    last = saved[-1][-1]
    process = go_on()
    stopped_output = end(process, lambda: last < logged_step(files) < last + 40, signal.SIGTERM)
    stopped_status = process.returncode

    process = go_on("--sample-prompt", "\N{SNOWMAN}", PYTHONIOENCODING="ascii")
    last_output = output(process)
    assert process.returncode == 0, last_output
    return Interrupted(files, saved, logged, stopped_output, stopped_status, last_output)


@pytest.mark.slow
def test_kills_came_when_they_were_meant_to(interrupted):
    before_first, during_save, stopped = interrupted.saved
    assert before_first == [] and interrupted.logged[0] >= 10
    assert during_save and interrupted.logged[1] >= during_save[-1] + 40
    assert during_save[-1] < stopped[-1] < 120


@pytest.mark.slow
def test_sigterm_ends_the_run_with_a_checkpoint_of_its_last_step(interrupted):
    assert interrupted.stopped_status == 128 + signal.SIGTERM
    step = interrupted.saved[-1][-1]
    assert f"stopped after step {step} with a checkpoint" in interrupted.stopped_output
    assert interrupted.logged[-1] == step
    assert f"continuing from the checkpoint of step {step}" in interrupted.last_output


@pytest.mark.slow
def test_killed_run_ends_with_the_bits_of_the_uninterrupted_one(interrupted, uninterrupted):
    config = load_trained(uninterrupted.config.parent).config
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = abstract_state(config, device)
    results = []
    for files in (interrupted.files, uninterrupted):
        manager = read_checkpoints(files.checkpoints)
        state, progress = restore_checkpoint(manager, 120, abstract)
        manager.close()
        results.append((state, progress["position"]))
    assert results[0][1] == 120 * 4
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.slow
def test_killed_run_leaves_the_metrics_of_the_uninterrupted_one(interrupted, uninterrupted):
    def rows(files):
        return [
            {
                name: value
                for name, value in row.items()
                if name not in ("tokens_per_second", "time")
            }
            for row in read_metrics(files.metrics)
        ]

    assert len(rows(uninterrupted)) == 120 + 2
    assert rows(interrupted.files) == rows(uninterrupted)


@pytest.fixture
def copy(uninterrupted, tmp_path):
    return run_files(shutil.copytree(uninterrupted.config.parent, tmp_path / "copy"))


@pytest.mark.slow
def test_full_disk_ends_the_run_in_one_line_within_steps(options, cache, copy):
    """Files of more than 20 kB cannot be written: arrays, but not the metrics."""
    copy.metrics.unlink()
    few = ("--steps=10000", "--log-every=50", "--validate-every=10000", "--checkpoint-every=130")
    process = start(
        *(*options, *few, "--run-dir", copy.config.parent),
        before=("bash", "-c", 'ulimit -f 20; exec "$@"', "bash"),
        **cache,
    )
    text = output(process)
    assert process.returncode == 1, text
    assert "Traceback" not in text
    last = text.splitlines()[-1]
    line = f"train.py: the checkpoint of step 130 cannot be saved in {copy.checkpoints}, the last "
    assert last.startswith(line + "good one is that of step 120: ") and "File too large" in last
    assert logged_step(copy) < 260  # The next save would have been there.
    assert copy.plot.stat().st_size


@pytest.mark.slow
def test_terminal_that_knows_only_ascii_gets_the_rest_escaped(interrupted):
    assert "\\u2603" in interrupted.last_output
    assert interrupted.files.sample.read_text(encoding="utf-8").startswith("\N{SNOWMAN}")
    assert interrupted.files.summary.exists()


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_is_one_line_and_status_130(options, tmp_path):
    process = start(*options, "--run-dir", tmp_path)
    while "parameters" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    text = output(process)
    assert process.returncode == 128 + signal.SIGINT
    assert text.splitlines()[-1] == "train.py: stopped by SIGINT" and "Traceback" not in text


@pytest.mark.slow
def test_trained_model_is_sampled_from(uninterrupted, command):
    options = ("--prompt=the red ", "--tokens=12", "--batch=2", "--top-k=5", "--temperature=2")
    status, text, _ = command("generate.py", uninterrupted.config.parent, *options)
    assert status == 0
    first, second = text.split("\n--- sample 2 ---\n")
    assert first.startswith("the red ") and second.startswith("the red ") and len(second) > 12
    assert first.strip() != second.strip()


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("train")


def test_options_change_the_preset_that_is_named_first(script):
    config, directory, fit_vocabulary = script.parse(
        ["--data", "a.txt", "b.txt", "--optimizer.beta2", "0.99"]
    )
    assert directory == Path("runs/tiny") and config.model == PRESETS["tiny"].model
    assert (
        fit_vocabulary
        and config.data.paths == ("a.txt", "b.txt")
        and config.optimizer.beta2 == 0.99
    )

    for name, model in MODELS.items():
        assert PRESETS[name].model == model
    config, directory, _ = script.parse(["gdn2_100M", "--model.num-layers", "2"])
    assert directory == Path("runs/gdn2_100M")
    assert config.model == dataclasses.replace(MODELS["gdn2_100M"], num_layers=2)
    assert config.tokens_per_step == 524_288 and config.optimizer == OptimizerConfig()


def test_the_documented_lines_fit_gpus_of_80_gb(script):
    """Rows of 4 hosts are those of one with a quarter of the batch."""
    page = (EXPERIMENTS.parent / "docs" / "training.md").read_text()
    lines = re.findall(r"experiments/train.py (swa_gdn2_1.3B .*)", page)
    runs = set()
    for line, devices, hosts in zip(lines, (1, 8, 8, 8), (1, 1, 4, 4), strict=True):
        config, *_ = script.parse(line.split())
        config = dataclasses.replace(config, global_batch_size=config.global_batch_size // hosts)
        mesh = make_mesh(config.mesh, jax.devices()[:devices])
        check_mesh(config, mesh)
        runs.add((config, mesh))
    for config, mesh in runs:
        assert sum(predict_memory(config, mesh)) < 64 * 2**30


def test_mixer_takes_the_matched_model_and_options_override_it(script):
    config, directory, _ = script.parse(["--mixer", "kda", "--model.mixer.num-heads", "4"])
    assert directory == Path("runs/tiny-kda")
    kda = MODELS["swa_kda_tiny"]
    mixer = dataclasses.replace(kda.mixer, num_heads=4)
    assert config.model == dataclasses.replace(kda, mixer=mixer)
    assert config.data == PRESETS["tiny"].data
    for name in MIXERS:
        config, *_ = script.parse(["gdn2_1.3B", f"--mixer={name}"])
        assert config.model == MODELS[f"{name}_1.3B"]
    for option in ("--model.mixer", "--model.mixer.kind"):
        with pytest.raises(ValueError, match="^model.mixer: expected no value; --mixer NAME"):
            script.parse([option, "kda"])


def test_the_vocabulary_is_the_tokenizers_unless_it_is_given(script, tmp_path):
    train_tokenizer(["the red cat sits under a green tree"] * 9, 300).save(tmp_path / "t.json")
    size = load_tokenizer(tmp_path / "t.json").vocab_size
    for options, expected in (
        ([], 257),
        (["--data.tokenizer", "train:999"], 999),
        ([f"--data.tokenizer={tmp_path / 't.json'}"], size),
    ):
        config, _, fit_vocabulary = script.parse(["gdn2_1.3B", *options])
        assert fit_vocabulary
        assert script.with_vocabulary(config).model.vocab_size == expected
    assert not script.parse(["--model.vocab_size", "512"]).fit_vocabulary


@pytest.mark.slow
def test_a_run_goes_on_by_its_directory_alone_and_starts_others(script, uninterrupted):
    source = uninterrupted.config.parent
    old = load_config(uninterrupted.config)
    assert script.parse(["--run-dir", str(source)]) == (old, source, False)
    config, *_ = script.parse([f"--run_dir={source}", "--steps", "300"])
    assert config == dataclasses.replace(old, steps=300)
    # With a preset, whatever is not given is the preset's.
    assert script.parse(["tiny", "--run-dir", str(source)]).config == PRESETS["tiny"]

    given = ["--init-from", str(source), "--data", "b.txt", "--optimizer.learning-rate", "1e-4"]
    config, directory, _ = script.parse(given)
    assert directory == Path("runs/tiny-from-uninterrupted")
    assert config.model == old.model and config.steps == 120
    assert config.data.paths == ("b.txt",) and config.optimizer.learning_rate == 1e-4
    config, *_ = script.parse(["tiny", *given])
    assert config.model == old.model and config.steps == PRESETS["tiny"].steps


@pytest.mark.slow
def test_another_mixer_trains_in_the_tiny_preset_and_generates(script, tmp_path, options):
    """All take steps in models/test_mixers, GDN-2 trains above."""
    few = {
        "steps": 6,
        "model.d-model": 32,
        "model.num-layers": 1,
        "model.hybrid": False,
        "model.mlp-dim": 32,
        "model.implementation": "xla",  # The Mamba operators' chunkwise form trains nowhere else.
        "global-batch-size": 8,
        "data.sequence-length": 64,
        "log-every": 1,
        "validation-batches": 1,
        "sample-tokens": 8,
    }
    cache = next(option for option in options if option.startswith("--data.cache"))
    arguments = [*(f"--{name}={value}" for name, value in few.items()), cache, *options[-2:]]
    arguments = ["--mixer", "mamba3", *map(str, arguments), "--run-dir", str(tmp_path)]
    assert script.main(arguments) == 0
    summary = json.loads(run_files(tmp_path).summary.read_text())
    assert summary["loss"] < summary["first_loss"] - 0.2
    assert run_files(tmp_path).sample.read_text().startswith("def ")


def test_an_implementation_that_the_device_has_not_is_refused_in_one_line(
    script, options, tmp_path
):
    arguments = [str(option) for option in options if "implementation" not in str(option)]
    chosen = ["--model.implementation=pallas", "--global-batch-size=16"]
    status = script.main([*arguments, *chosen, "--run-dir", str(tmp_path)])
    assert status.startswith("train.py: ") and "pallas" in status and "\n" not in status


def test_help_shows_presets_and_options(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script.parse(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for words in ("mamba3_mimo, attention", "--steps INT", "--optimizer.decay-mask", "--mixer STR"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "Unrecognized options: --stepz"),
        (["tinny"], "expected a preset, tiny, or [swa_]MIXER_SCALE of gdn2, kda"),
        (["--mixer", "mamba9"], "mixer: expected one of gdn2, kda"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--data", "/nonexistent"], "expected a file or directory that exists, got /nonexistent"),
    ],
)
def test_mistake_on_the_command_line_ends_with_one_clear_message(
    script, arguments, message, tmp_path, capsys
):
    try:
        status = script.main([*arguments, "--run-dir", str(tmp_path / "run")])
    except SystemExit as exit:
        status = exit.code
    printed = capsys.readouterr()
    assert status not in (0, None)
    assert message in f"{status} {printed.out} {printed.err}"
    assert not (tmp_path / "run").exists()
