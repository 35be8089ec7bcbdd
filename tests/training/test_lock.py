import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdn2_jax.training import load_trained, open_run, run_files
from gdn2_jax.training.lock import lock_directory

HOLD = """
import sys
from pathlib import Path
from gdn2_jax.training.lock import lock_directory
file = lock_directory(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(copy):
    """Another process, which trains in the directory."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, copy], **pipes)
    assert process.stdout.readline() == b"locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_run_of_another_process_is_refused_in_one_line_until_that_is_killed(config, copy, holder):
    unfinished = run_files(copy).checkpoints / "12.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with pytest.raises(BlockingIOError) as error:
        open_run(config, copy)
    assert f"got {copy}, which is in use by process {holder.pid} on " in str(error.value)
    assert "\n" not in str(error.value)
    assert load_trained(copy).step == 8
    assert unfinished.is_dir()  # Neither removes what is being saved.

    holder.kill()
    holder.wait()
    run = open_run(config, copy)
    assert not unfinished.exists()
    assert f"process {os.getpid()} on " in (copy / "lock").read_text()
    with pytest.raises(BlockingIOError, match="in use by"):
        open_run(config, copy)
    run.close()
    open_run(config, copy).close()


def test_a_run_that_cannot_be_opened_is_not_left_locked(config, copy):
    (run_files(copy).config).write_text("{")
    with pytest.raises(Exception, match="does not hold a configuration"):
        open_run(config, copy)
    lock_directory(copy).close()


@pytest.mark.parametrize("name", ["tensorboard", "checkpoints", "metrics.jsonl"])
def test_what_cannot_be_written_is_named_before_anything_is_compiled(config, copy, name):
    path = copy / name
    path.rename(copy / "moved")
    path.mkdir() if path.suffix else path.write_text("")
    with pytest.raises(ValueError, match=f"expected .*{name} to be a (file|directory), got"):
        open_run(config, copy)


def test_a_full_disk_is_told_with_the_file(tmp_path, file_size_limit):
    with file_size_limit(0), pytest.raises(OSError, match=f"File too large: '{tmp_path}/lock'"):
        lock_directory(tmp_path)


def test_a_directory_that_cannot_be_created_is_named(config):
    with pytest.raises(OSError, match="/proc/run"):
        open_run(config, Path("/proc/run"))
