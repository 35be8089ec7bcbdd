"""Processes that share the jobs of an experiment, one or several a GPU.

A process runs its jobs one after another. Meanwhile it prepares, that is compiles, the next ones. Processes
of one GPU take turns: while one runs a job, the others prepare theirs. The parent hands out the jobs and
collects results. It starts no JAX backend, which would take the GPUs.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gdn2_jax.command import out_of_memory

import jax

_GRACE = 40
"""Seconds that a process has to end its job after it was told to stop."""


class Worker(NamedTuple):
    """What a job knows of the process that runs it.

    Attributes:
      report: sends the parent a message of the kind "progress".
      stopped: whether the job must end now.
      waited: seconds for which the GPU ran no job before this one, or, without GPUs, the process.
    """

    report: Callable[[Any], None]
    stopped: Callable[[], bool]
    waited: float


class Message(NamedTuple):
    """What has become of a job.

    Attributes:
      kind: "done" or "failed" is a job's last message.
      job: from `next_job`.
      value: what the job reported, its result, or a line that says why it failed.
    """

    kind: Literal["progress", "done", "failed"]
    job: Any
    value: Any


def share(
    next_job: Callable[[], Any],
    prepare: Callable[[Any], Any],
    run: Callable[[Any, Any, Worker], Any],
    *,
    devices: Sequence[str],
    deadline: float,
    in_hand: int,
    programs: Path,
    logs: Path | None = None,
) -> Iterator[Message]:
    """Runs jobs in processes until there are no more, the deadline passes, or SIGTERM or SIGINT comes.

    All jobs that run are then told to stop. If a process dies, the job that it ran has failed; other
    processes take over what it had in hand.

    Args:
      next_job: gives a job, or None if there is none now; asked again after each message.
      prepare: job -> what `run` needs; called in threads.
      run: job, prepared, worker -> result. None says that SIGTERM has stopped it, and ends the
        process. A ValueError, OSError, NotImplementedError or JaxRuntimeError of `run` or
        `prepare` means that this job has failed.
      devices: from `worker_devices`: a process each, started when there is a job for it. Processes
        of the same GPU take turns.
      deadline: in seconds since the epoch.
      in_hand: jobs of a process: one runs, the others are prepared. At least 2.
      programs: directory of compiled programs, unless JAX_COMPILATION_CACHE_DIR names another, and
        of the files that say whose turn it is.
      logs: directory that gets the output of each process, worker-0.log and so on; None: they share
        that of the parent.
    """
    context = multiprocessing.get_context("spawn")
    processes, jobs_of, device_of = {}, {}, {}  # by connection
    returned = collections.deque()
    environment = {"JAX_COMPILATION_CACHE_DIR": str(programs)}
    if any(devices):
        # The clock is short: cuBLAS' own choice instead of trying every kernel for every product.
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        environment["XLA_FLAGS"] = flags
        if len(set(devices)) < len(devices):
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        programs.mkdir(parents=True, exist_ok=True)
        for device in set(devices):
            _turns(programs, device).touch()
    for name, value in environment.items():
        os.environ.setdefault(name, value)

    def start():
        number = len(processes)
        if devices[number]:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[number]
        log = logs and logs / f"worker-{number}.log"
        turns = _turns(programs, devices[number]) if devices[number] else None
        ours, theirs = context.Pipe()
        arguments = (theirs, prepare, run, in_hand, turns, log)
        processes[ours] = context.Process(target=_work, args=arguments, daemon=True)
        processes[ours].start()
        theirs.close()
        jobs_of[ours] = collections.deque()
        device_of[ours] = devices[number]
        return ours

    def hand_out() -> None:
        while True:
            to = freest(jobs_of, device_of)
            least = in_hand if to is None else len(jobs_of[to])
            can_start = len(processes) < len(devices)
            if least == in_hand and not can_start:
                return
            job = returned.popleft() if returned else next_job()
            if job is None:
                return
            if to is None or (can_start and least > 0):
                to = start()
            jobs_of[to].append(job)
            with contextlib.suppress(OSError):  # it has died, which is noticed below
                to.send(job)

    def stop(*_) -> None:
        nonlocal deadline
        deadline = min(deadline, time.time())

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            if time.time() < deadline:
                hand_out()
            else:
                late = time.time() > deadline + _GRACE
                for process in processes.values():
                    process.kill() if late else process.terminate()
            if not any(jobs_of.values()):
                return
            ready: list[Any] = multiprocessing.connection.wait(list(jobs_of), timeout=1.0)
            for connection in ready:
                jobs = jobs_of[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    del jobs_of[connection]
                    if jobs and time.time() < deadline:
                        yield Message("failed", jobs.popleft(), "its process died")
                        returned.extend(jobs)
                else:
                    yield Message(kind, jobs[0] if kind == "progress" else jobs.popleft(), value)
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
        for process in processes.values():
            process.join(_GRACE)
            process.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def freest[Name](jobs_of: dict[Name, Collection], device_of: dict[Name, str]) -> Name | None:
    """The process with the fewest jobs, among several one whose GPU has the fewest; None without any.

    So no GPU waits while two jobs take turns on another.
    """
    of_device = collections.Counter()
    for name, jobs in jobs_of.items():
        of_device[device_of[name]] += len(jobs)
    return min(
        jobs_of, key=lambda name: (len(jobs_of[name]), of_device[device_of[name]]), default=None
    )


def _turns(programs: Path, device: str) -> Path:
    """The file that the process locks whose turn it is, changed when the last turn ended."""
    return programs / f"turns-{device.replace('/', '-')}"


@contextlib.contextmanager
def _turn(turns: Path, stopped: Callable[[], bool]) -> Iterator[float]:
    """Waits for a GPU. Gives the seconds for which nobody has used it; ends early if stopped."""
    turns.parent.mkdir(parents=True, exist_ok=True)
    with turns.open("a") as file:
        while not stopped():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that dies lets go
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            yield 0.0
            return
        try:
            yield time.time() - os.fstat(file.fileno()).st_mtime
        finally:
            os.utime(file.fileno())


def _work(
    connection,
    prepare: Callable,
    run: Callable,
    in_hand: int,
    turns: Path | None,
    log: Path | None,
) -> None:
    """A process: runs the jobs that come until the connection is closed or SIGTERM comes."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its processes in order
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if log is not None:
        with log.open("a") as file:
            for output in (1, 2):
                os.dup2(file.fileno(), output)
    pool = concurrent.futures.ThreadPoolExecutor(in_hand - 1)
    following: collections.deque = collections.deque()

    def look(wait: bool) -> None:
        while wait or connection.poll(0.1):
            job, wait = connection.recv(), False
            following.append((job, pool.submit(prepare, job)))

    def report(value: Any) -> None:
        connection.send(("progress", value))

    try:
        while not stop.is_set():
            look(wait=not following)
            (job, prepared), began = following.popleft(), time.perf_counter()
            while not (prepared.done() or stop.is_set()):
                concurrent.futures.wait([prepared], timeout=1.0)
            waited = time.perf_counter() - began
            look(wait=False)
            try:
                with _turn(turns, stop.is_set) if turns else contextlib.nullcontext(waited) as idle:
                    if stop.is_set():
                        break
                    result = run(job, prepared.result(), Worker(report, stop.is_set, idle))
                connection.send(("done", result))
                if result is None:
                    break
            except (jax.errors.JaxRuntimeError, ValueError, OSError, NotImplementedError) as error:
                short = out_of_memory(error) if isinstance(error, RuntimeError) else None
                line = short or f"{type(error).__name__}: {error}"
                connection.send(("failed", line.splitlines()[0][:500]))
    except (EOFError, ConnectionError):
        pass  # there are no more jobs, or the parent has died
    sys.stdout.flush()
    os._exit(0)  # does not wait for a compilation that nobody needs any more


def worker_devices(count: int | None, processes: int = 1) -> list[str]:
    """Returns the CUDA_VISIBLE_DEVICES of each process, "" without GPUs.

    GPUs are found without JAX, which would take them. If CUDA_VISIBLE_DEVICES is set, only the
    GPUs that it names are used.

    Args:
      count: number of GPUs, or of processes without GPUs; None: all GPUs, or one process. A GPU is
        named again where there are fewer.
      processes: of each GPU.

    Raises:
      ValueError: `processes` is not positive.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [name for name in visible.split(",") if name]
    elif shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        found = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
        gpus = [str(i) for i in range(found)]
    else:
        gpus = []
    if processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    each = processes if gpus else 1
    gpus = gpus or [""]
    return each * [gpus[i % len(gpus)] for i in range(count or len(gpus))]
