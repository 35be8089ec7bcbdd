"""Processes that share jobs: what is run where, and what becomes of a job that fails or is stopped."""

import itertools
import os
import signal
import time

import pytest

from gdn2_jax.rows import source_commit
from gdn2_jax.workers import freest, share, worker_devices

JOBS = """
import os, time
from pathlib import Path

def prepare(job):
    if job == "unfit":
        raise ValueError("job: expected another,\\ngot this")
    return f"prepared {job}"

def run(job, prepared, worker):
    if job == "deadly":
        os._exit(1)
    if job == "endless":
        worker.report("started")
        while not worker.stopped():
            time.sleep(0.02)
        return "stopped"
    if job == "cleared":
        [turns.unlink() for turns in Path(__file__).parent.glob("turns-*")]
    if job.startswith("turn"):
        began = time.time()
        time.sleep(0.3)
        return os.getpid(), began, time.time(), worker.waited
    return prepared, os.environ["CUDA_VISIBLE_DEVICES"]
"""


@pytest.fixture
def messages(tmp_path, monkeypatch):
    """A function of jobs: the messages about them."""
    (tmp_path / "jobs_of_test_workers.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    # `share` sets them for its processes.
    names = ("CUDA_VISIBLE_DEVICES", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    for name in (*names, "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")
    import jobs_of_test_workers as jobs

    def call(next_job, devices=("7",), deadline=float("inf")):
        options = {"devices": devices, "deadline": deadline, "in_hand": 2, "programs": tmp_path}
        return share(next_job, jobs.prepare, jobs.run, logs=tmp_path, **options)

    return call


def of(*jobs):
    following = iter(jobs)
    return lambda: next(following, None)


def test_a_dead_process_fails_its_job_and_leaves_the_others_to_another(messages, tmp_path):
    jobs = of("deadly", "a", "b", "unfit", "c")
    found = {job: (kind, value) for kind, job, value in messages(jobs, devices=("3", "5"))}
    assert found.pop("deadly") == ("failed", "its process died")
    assert found.pop("unfit") == ("failed", "ValueError: job: expected another,")
    assert found == {job: ("done", (f"prepared {job}", "5")) for job in "abc"}
    assert (tmp_path / "worker-1.log").exists()


def test_jobs_may_follow_from_results_and_stop_at_a_signal_and_the_deadline(messages):
    waiting, found = ["first"], []
    handler = signal.getsignal(signal.SIGTERM)
    for kind, job, value in messages(lambda: waiting.pop() if waiting else None):
        found.append((kind, job, value))
        if job == "first":
            waiting.extend(["never", "endless"])
        elif kind == "progress":
            os.kill(os.getpid(), signal.SIGTERM)
    assert found == [
        ("done", "first", ("prepared first", "7")),
        ("progress", "endless", "started"),
        ("done", "endless", "stopped"),
    ]
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not list(messages(of("a"), deadline=time.time()))


def test_a_job_goes_to_the_gpu_with_the_fewest_jobs():
    devices = {"a": "3", "b": "5", "c": "3", "d": "5"}
    assert freest({"a": [], "b": [], "c": ["long"], "d": []}, devices) == "b"
    assert freest({"a": ["x"], "b": ["x"], "c": ["x"], "d": []}, devices) == "d"
    assert freest({"c": ["x"], "b": ["x", "y"]}, devices) == "c"
    assert freest({}, devices) is None


def test_processes_share_the_gpus_that_the_parent_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert worker_devices(None) == ["2", "5"] and worker_devices(3) == ["2", "5", "2"]
    assert worker_devices(None, processes=2) == ["2", "5", "2", "5"]
    with pytest.raises(ValueError, match="processes: expected at least 1, got 0"):
        worker_devices(None, processes=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert worker_devices(None) == [""] and worker_devices(2, processes=3) == ["", ""]


def test_the_named_commit_wins_over_the_copys(monkeypatch):
    monkeypatch.setenv("GDN2_JAX_COMMIT", "abc")
    assert source_commit() == "abc"
    monkeypatch.delenv("GDN2_JAX_COMMIT")
    assert source_commit() not in ("abc", "")


def test_processes_of_one_gpu_take_turns_and_say_for_how_long_it_was_idle(messages):
    turns = [turn for _, _, turn in messages(of(*("turn",) * 4), devices=("7", "7"))]
    assert len({process for process, *_ in turns}) == 2
    turns.sort(key=lambda turn: turn[1])
    for (_, _, end, _), (_, began, _, idle) in itertools.pairwise(turns):
        assert began >= end
        assert abs(idle - (began - end)) < 0.1


def test_results_are_kept_and_jobs_go_on_where_the_files_of_turns_are_deleted(messages):
    found = {job: kind for kind, job, _ in messages(of("cleared", "a"), devices=("7", "7"))}
    assert found == {"cleared": "done", "a": "done"}


def test_a_process_that_dies_in_its_turn_lets_the_next_one_run(messages):
    found = {job: kind for kind, job, _ in messages(of("deadly", "turn"), devices=("7", "7"))}
    assert found == {"deadly": "failed", "turn": "done"}
