"""Trains small models of several mixers on recall tasks: every seed and learning rate of a cell at once.

    python experiments/recall.py mqar                       # all cells that are not finished
    python experiments/recall.py mqar reassigned --devices 4 --minutes 9 --directory out
    python experiments/recall.py mqar --mixers gdn2 kda --lengths 256 --steps 500

A study is a file experiments/recall/STUDY.toml: a task, mixers, lengths, learning rates, seeds. A cell is
one mixer at one length; its runs, all seeds and learning rates, are one compiled program. Cells go to
the GPUs, small ones first, the first study's first; three processes of a GPU take turns, as small cells
compile for longer than they run. A batch is never seen twice, so accuracies are those of the training
batches, each before its own update.

--directory gets STUDY.jsonl, to which each run's row is appended, and the checkpoints of unfinished
cells. Runs whose finished row lies there or in experiments/results/recall are skipped. After --minutes,
SIGTERM or Ctrl-C all cells stop and record what they have as unfinished rows. They go on from there
next time.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from gdn2_jax.command import read_study as read_fields
from gdn2_jax.command import run_command

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from gdn2_jax.data.recall import TASKS, Questions, Task, draw, draw_rows, questions
from gdn2_jax.files import replacing
from gdn2_jax.models import (
    DeltaRule,
    LanguageModel,
    Mixer,
    ModelConfig,
    SoftmaxAttention,
    StateSpace,
    model_sizes,
    with_parameters_of,
)
from gdn2_jax.rows import append_row, read_rows, source_commit
from gdn2_jax.timing import Event, device_events
from gdn2_jax.workers import Message, Worker, share, worker_devices

HERE = Path(__file__).resolve().parent
STUDIES = HERE / "recall"
RESULTS = HERE / "results" / "recall"

_NEGATIVE = {"allow_negative_eigenvalues": True}
MIXERS: dict[str, Mixer] = {
    "gdn2": DeltaRule(),
    "gdn2_scalar_erase": DeltaRule(erase_gate="scalar"),
    "gdn2_scalar_write": DeltaRule(write_gate="scalar"),
    "gdn2_scalar_both": DeltaRule(erase_gate="scalar", write_gate="scalar"),
    "gdn2_tied": DeltaRule(erase_gate="scalar", write_gate="tied"),
    "gdn2_tied_sigmoid": DeltaRule(erase_gate="scalar", write_gate="tied", output_gate="sigmoid"),
    "gdn2_scalar_both_sigmoid": DeltaRule(
        erase_gate="scalar", write_gate="scalar", output_gate="sigmoid"
    ),
    "gdn2_sigmoid": DeltaRule(output_gate="sigmoid"),
    "gdn2_negative": DeltaRule(**_NEGATIVE),
    "kda": DeltaRule(kind="kda"),
    "kda_silu": DeltaRule(kind="kda", output_gate="silu"),
    "kda_negative": DeltaRule(kind="kda", **_NEGATIVE),
    "gdn": DeltaRule(kind="gdn"),
    "gdn_negative": DeltaRule(kind="gdn", **_NEGATIVE),
    "deltanet": DeltaRule(kind="deltanet"),
    "deltanet_negative": DeltaRule(kind="deltanet", **_NEGATIVE),
    "mamba2": StateSpace(kind="mamba2"),
    "mamba3": StateSpace(kind="mamba3"),
    "attention": SoftmaxAttention(kind="attention"),
    "attention_conv": SoftmaxAttention(kind="attention", conv_size=4),
}
"""What a study names. The sizes are those of the study."""
_MODEL_FIELDS = {field.name for field in dataclasses.fields(ModelConfig)} | {
    "num_heads",
    "head_dim",
}
_TRACING = threading.Lock()
"""Of a process: cells that are traced side by side would all be late, the first too."""
_COMPILING = ThreadPoolExecutor()
_CHECKPOINT_SECONDS = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What a file of experiments/recall holds; `task` and `model` are tables.

    Attributes:
      task: its name in `gdn2_jax.data.recall.TASKS` as "name", and its fields but `length`.
      mixers: keys of `MIXERS`.
      lengths: each is a cell of every mixer.
      learning_rates: of all mixers.
      seeds: of parameters and data; runs of one seed see the same batches.
      steps: of every run.
      tokens: a step's, for one run: the batch is as many sequences as that makes.
      shortest: half of a batch's rows hold shorter sequences as documents: two, four, and so on, down
        to this length, in turn. They are learnt from, but no accuracy counts them. None for none.
      test_lengths: multiples of the training length, on which the trained models are tested.
      warmup: share of the steps in which the learning rate rises; a cosine to 0 follows.
      weight_decay: AdamW's, of all parameters.
      window: steps a point of the accuracy's curve is the mean of; a dispatch.
      solved: a cell ends when all its runs reach this accuracy.
      runs_at_once: of a cell; memory bounds it.
      sizes: fields of the task or of `ModelConfig`, each with values: every combination makes cells.
      model: changes of `ModelConfig`'s fields for all mixers, and their `num_heads` and `head_dim`.
      shows: what the results page says of the study.
      in_summary: whether it is a panel of the summary's figure.
    """

    task: dict[str, Any]
    mixers: tuple[str, ...]
    lengths: tuple[int, ...]
    learning_rates: tuple[float, ...] = (5e-5, 1e-4, 5e-4, 1e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int
    tokens: int = 16384
    shortest: int | None = None
    test_lengths: tuple[int, ...] = ()
    warmup: float = 0.05
    weight_decay: float = 0.1
    window: int = 100
    solved: float = 0.999
    runs_at_once: int = 12
    sizes: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    shows: str = ""
    in_summary: bool = True


class Cell(NamedTuple):
    """Runs that are one program.

    Attributes:
      study: name of the study.
      mixer: key of `MIXERS`.
      length: of the training sequences.
      size: the fields that `Study.sizes` varies.
      runs: (learning rate, seed) of each run.
      config: of the study.
    """

    study: str
    mixer: str
    length: int
    size: dict[str, Any]
    runs: tuple[tuple[float, int], ...]
    config: Study

    def task(self, multiple: int = 1) -> Task:
        """The task at a multiple of the training length."""
        fields = {k: v for k, v in self.config.task.items() if k != "name"}
        kind = TASKS[self.config.task["name"]]
        known = {field.name for field in dataclasses.fields(kind)}
        fields |= {k: v for k, v in self.size.items() if k in known or k not in _MODEL_FIELDS}
        return kind(length=self.length * multiple, **fields)

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return max(1, self.config.tokens // self.length)

    @property
    def seeds(self) -> list[int]:
        """Of the data; runs that differ in the learning rate alone share it."""
        return sorted({seed for _, seed in self.runs})

    @property
    def seed_of_run(self) -> np.ndarray:
        """The place of each run's seed in `seeds`."""
        return np.array([self.seeds.index(seed) for _, seed in self.runs])

    @property
    def name(self) -> str:
        """What people read."""
        size = "".join(f" {key}={value}" for key, value in self.size.items())
        return f"{self.study} {self.length}{size} {self.mixer}"

    @property
    def cost(self) -> int:
        """Tokens."""
        return len(self.runs) * self.config.steps * self.batch * self.length

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a run's result depends on, except its learning rate and seed."""
        config = dataclasses.asdict(self.config)
        for key in (
            "mixers",
            "lengths",
            "learning_rates",
            "seeds",
            "sizes",
            "runs_at_once",
            "shows",
            "in_summary",
        ):
            del config[key]
        if self.config.shortest is None:
            del config["shortest"]  # older rows do not have it
        settings = {"study": self.study, "mixer": self.mixer, "length": self.length}
        return json.loads(json.dumps({**settings, "size": self.size, **config}))


# --- studies, rows ------------------------------------------------------------------------------


def read_study(name: str, **changes: Any) -> Study:
    """The study of a file, with changes.

    Raises:
      ValueError: there is no such file, or it has a wrong field.
    """
    study = read_fields(Study, STUDIES, name, **changes)
    if wrong := [mixer for mixer in study.mixers if mixer not in MIXERS]:
        raise ValueError(f"mixers: expected some of {', '.join(MIXERS)}, got {wrong[0]!r}")
    if study.task.get("name") not in TASKS:
        got = study.task.get("name")
        raise ValueError(f"task.name: expected one of {', '.join(TASKS)}, got {got!r}")
    return study


def cells(name: str, study: Study, finished: set[str]) -> list[Cell]:
    """The cells of a study's runs that are not finished, short sequences first."""
    sizes = [{}]
    for key, values in study.sizes.items():
        sizes = [{**size, key: value} for size in sizes for value in values]
    found = []
    for length in study.lengths:
        for size in sizes:
            for mixer in study.mixers:
                cell = Cell(name, mixer, length, size, (), study)
                cell.task()  # raises where the size does not fit
                every = [(rate, seed) for seed in study.seeds for rate in study.learning_rates]
                runs = [run for run in every if run_key(cell.settings, *run) not in finished]
                for start in range(0, len(runs), study.runs_at_once):
                    part = tuple(runs[start : start + study.runs_at_once])
                    found.append(cell._replace(runs=part))
    return sorted(found, key=lambda cell: (cell.length, cell.cost))


def run_key(settings: dict[str, Any], rate: float, seed: int) -> str:
    """Names a run by all that its result depends on."""
    text = json.dumps([settings, float(rate), seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def merged_rows(*paths: Path) -> list[dict]:
    """The rows of these files; of a run with several the finished one or else the longest."""
    best: dict[str, dict] = {}
    for row in itertools.chain.from_iterable(map(read_rows, paths)):
        old = best.get(row["run"])
        if old is None or (row["finished"], row["steps"]) > (old["finished"], old["steps"]):
            best[row["run"]] = row
    return list(best.values())


# --- models and programs ------------------------------------------------------------------------


def model_config(cell: Cell) -> ModelConfig:
    """The cell's model: the width of its heads, and an MLP that makes up for the mixer's parameters.

    The state of a layer is that of all other recurrent mixers.
    """
    task, size = cell.task(), cell.size
    changes = cell.config.model | {k: v for k, v in size.items() if k in _MODEL_FIELDS}
    changes.pop("vocab_size", None)  # the task's
    heads, head_dim = changes.pop("num_heads", 2), changes.pop("head_dim", 128)
    width = heads * head_dim
    mlp_dim = changes.pop("mlp_dim", width)
    shared = {"vocab_size": task.vocab_size, "d_model": width, "num_layers": 2, **changes}
    sizes = {
        DeltaRule: {"num_heads": heads, "head_dim": head_dim},
        StateSpace: {"inner_dim": width, "head_dim": head_dim, "state_dim": head_dim},
        SoftmaxAttention: {"num_heads": heads},
    }

    def sized(name: str) -> Mixer:
        return dataclasses.replace(MIXERS[name], **sizes[type(MIXERS[name])])

    reference = ModelConfig(mlp_dim=mlp_dim, mixer=sized("gdn2"), **shared)
    config = ModelConfig(mlp_dim=8, mixer=sized(cell.mixer), **shared)
    return with_parameters_of(config, reference, cell.length, multiple=8)


def check_sizes(cell: Cell, config: ModelConfig) -> dict[str, int]:
    """Parameters and state of the model.

    Raises:
      ValueError: its parameters are not within 2 % of GDN-2's, or its state is not GDN-2's.
    """
    ours = model_sizes(config, cell.length)
    theirs = model_sizes(model_config(cell._replace(mixer="gdn2")), cell.length)
    if abs(ours.block_parameters / theirs.block_parameters - 1) > 0.02:
        raise ValueError(
            f"mixers: expected parameters within 2 % of gdn2's {theirs.block_parameters:,}, "
            f"got {ours.block_parameters:,} of {cell.mixer}"
        )
    if ours.state not in (theirs.state, 0):
        raise ValueError(f"mixers: expected a state of {theirs.state:,}, got {ours.state:,}")
    return {name: getattr(ours, name) for name in ("parameters", "block_parameters", "state")}


class State(NamedTuple):
    """The state of all runs of a cell; the runs are the first axis of every leaf."""

    params: Any
    optimizer: Any


class Measured(NamedTuple):
    """Means over a window's batches, for each run.

    Attributes:
      loss: cross-entropy of the questions, in nats.
      accuracy: of the questions of each kind [runs, kinds].
      exact: share of sequences whose questions are all answered right.
    """

    loss: jax.Array
    accuracy: jax.Array
    exact: jax.Array


def optimizer(study: Study) -> optax.GradientTransformation:
    """Clipping and AdamW without the learning rate, which is each run's own."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(study.weight_decay),
    )


def initial_state(cell: Cell, config: ModelConfig, seeds: jax.Array) -> State:
    """Parameters of each run's seed, and the optimizer's zeros."""
    # Parameters do not depend on the implementation, and the recurrence compiles at once.
    model = LanguageModel(dataclasses.replace(config, implementation="recurrent"))

    def one(seed):
        params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
        return State(params, optimizer(cell.config).init(params))

    return jax.vmap(one)(seeds)


class Batches(NamedTuple):
    """Batches of each seed; every leaf has axes [batches, seeds, B] in front.

    Attributes:
      tokens: of each row.
      segment_ids: document of each token; None where a row is one document.
      asked: questions of each row.
    """

    tokens: jax.Array
    segment_ids: jax.Array | None
    asked: Questions


def draw_batches(
    task: Task,
    shortest: int | None,
    batch: int,
    count: int,
    split: int,
    seeds: jax.Array,
    start: jax.Array,
) -> Batches:
    """Batches `start` to `start + count - 1` of each seed; see `Study.shortest`."""
    documents = [1]
    while shortest and task.length % (2 * documents[-1] * shortest) == 0:
        documents.append(2 * documents[-1])
    # The kind of each row of all batches: whole sequences first, then the others in turn.
    whole = batch if len(documents) == 1 else batch - batch // 2
    turns = 1 + np.arange(count * (batch - whole)).reshape(count, -1) % max(1, len(documents) - 1)
    kinds = np.concatenate([np.zeros((count, whole), int), turns], axis=1).reshape(-1)
    places = [np.flatnonzero(kinds == kind) for kind in range(len(documents))]
    lengths = task.length // np.array(documents)[kinds]
    segment_ids = jnp.arange(task.length) // lengths[:, None] if len(documents) > 1 else None

    def of_seed(seed):
        rows = [start * batch + place for place in places]
        examples = [draw(task, seed, split, rows[0])]
        for number, some in zip(documents[1:], rows[1:]):
            examples.append(draw_rows(task, number, seed, split, some))
        order = np.argsort(np.concatenate(places))
        example = jax.tree.map(lambda *x: jnp.concatenate(x)[order], *examples)
        batches = Batches(example.tokens, segment_ids, questions(task, example))
        return jax.tree.map(lambda x: x.reshape(count, batch, *x.shape[1:]), batches)

    return jax.vmap(of_seed, out_axes=1)(seeds)


def answer(config: ModelConfig, kinds: int, params: Any, batch: Batches):
    """The loss of one run's batch, and a `Measured` of it."""
    asked, inputs = batch.asked, (batch.tokens, batch.segment_ids)
    hidden = LanguageModel(config).apply({"params": params}, *inputs, head=False)
    at = {"indices_are_sorted": True, "unique_indices": True, "mode": "promise_in_bounds"}
    hidden = jax.vmap(lambda x, positions: x.at[positions].get(**at))(hidden, asked.positions)
    kernel = params["lm_head"]["kernel"].astype(hidden.dtype)
    logits = jnp.einsum("bqd,dv->bqv", hidden, kernel, preferred_element_type=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, asked.targets)
    is_asked = asked.kinds > 0
    # A row of short sequences counts as much as a long one.
    of_row = jnp.sum(losses, -1, where=is_asked) / jnp.maximum(jnp.sum(is_asked, -1), 1)
    loss, judged = jnp.mean(of_row), jnp.all(asked.kinds <= kinds, axis=-1)
    right = jnp.argmax(logits, axis=-1) == asked.targets
    of_kind = asked.kinds[..., None] == 1 + jnp.arange(kinds)
    accuracy = jnp.sum(right[..., None] & of_kind, (0, 1)) / jnp.sum(of_kind, (0, 1))
    exact = jnp.mean(jnp.all(right | ~is_asked, axis=-1), where=judged)
    return loss, Measured(loss, accuracy, exact)


def train_window(
    cell: Cell,
    config: ModelConfig,
    state: State,
    rates: jax.Array,
    start: jax.Array,
    batches: Batches,
) -> tuple[State, Measured]:
    """A step of every run for each of the batches, the first of which is batch `start`."""
    study = cell.config
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, max(1, int(study.warmup * study.steps)), study.steps
    )
    kinds = len(cell.task().kinds)

    def step(state, rate, share, batch):
        def loss(params):
            return answer(config, kinds, params, batch)

        gradients, measured = jax.grad(loss, has_aux=True)(state.params)
        updates, moments = optimizer(study).update(gradients, state.optimizer, state.params)
        updates = jax.tree.map(lambda x: -rate * share * x, updates)
        return State(optax.apply_updates(state.params, updates), moments), measured

    def steps_of_all(carry, batch):
        state, number = carry
        batch = jax.tree.map(lambda x: x[cell.seed_of_run], batch)
        every_run = jax.vmap(step, in_axes=(0, 0, None, 0))
        state, measured = every_run(state, rates, schedule(number + 1), batch)
        return (state, number + 1), measured

    (state, _), measured = jax.lax.scan(steps_of_all, (state, start), batches)
    return state, jax.tree.map(lambda x: jnp.mean(x, axis=0), measured)


def test_window(cell: Cell, config: ModelConfig, params: Any, batches: Batches) -> Measured:
    """The means over batches without learning from them."""
    kinds = len(cell.task().kinds)

    def measure(_, batch):
        batch = jax.tree.map(lambda x: x[cell.seed_of_run], batch)
        return None, jax.vmap(lambda *x: answer(config, kinds, *x)[1])(params, batch)

    measured = jax.lax.scan(measure, None, batches)[1]
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), measured)


class Programs(NamedTuple):
    """A cell's compiled functions.

    Attributes:
      initial_state: seeds -> state.
      draw: start -> batches of a window.
      train: state, rates, start, batches -> state, measured.
      test: for each multiple of the length, (draw, measure).
      sizes: of the model.
      seconds: that tracing and compiling took.
    """

    initial_state: Callable
    draw: Callable
    train: Callable
    test: dict[int, tuple[Callable, Callable]]
    sizes: dict[str, int]
    seconds: float


def compile_cell(cell: Cell, pool: Executor = _COMPILING) -> Programs:
    """Traces programs one by one, as that holds Python's lock, and compiles them all at once."""
    config = model_config(cell)
    sizes = check_sizes(cell, config)
    count, study = len(cell.runs), cell.config
    seeds, rates = (jax.ShapeDtypeStruct((count,), d) for d in (jnp.uint32, jnp.float32))
    number = jax.ShapeDtypeStruct((), jnp.int32)

    def submit(function, *shapes, **options):
        lowered = jax.jit(function, **options).lower(*shapes)
        return pool.submit(lowered.compile), lowered.out_info

    def draws(task, shortest, split):
        batch = max(1, study.tokens // task.length)

        def window(start):
            of_data = jnp.array(cell.seeds, jnp.uint32)
            return draw_batches(task, shortest, batch, study.window, split, of_data, start)

        return submit(window, number)

    def shapes(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    with _TRACING:
        began = time.perf_counter()
        make, state = submit(lambda seeds: initial_state(cell, config, seeds), seeds)
        train_draw, batches = draws(cell.task(), study.shortest, 0)
        state = shapes(state)
        train, _ = submit(
            lambda *x: train_window(cell, config, *x),
            *(state, rates, number, shapes(batches)),
            donate_argnums=0,
        )
        test = {}
        for multiple in study.test_lengths:
            test_draw, batches = draws(cell.task(multiple), None, 1)
            measure, _ = submit(
                lambda *x: test_window(cell, config, *x), state.params, shapes(batches)
            )
            test[multiple] = test_draw, measure
    test = {multiple: tuple(f.result() for f in pair) for multiple, pair in test.items()}
    compiled = Programs(make.result(), train_draw.result(), train.result(), test, sizes, 0.0)
    return compiled._replace(seconds=time.perf_counter() - began)


# --- running cells ------------------------------------------------------------------------------


class Job(NamedTuple):
    """What all processes know.

    Attributes:
      directory: of the rows and checkpoints.
      commit: of the sources.
      profile: measure the GPU's share of the time after each cell.
    """

    directory: Path
    commit: str
    profile: bool = False


def run_cell(cell: Cell, programs: Programs, worker: Worker, job: Job) -> list[dict[str, Any]]:
    """Trains a cell's runs, from its checkpoint if there is one.

    Returns:
      A row for each run; none if it was stopped before the first window.
    """
    study = cell.config
    rates = jnp.array([rate for rate, _ in cell.runs], jnp.float32)
    seeds = jnp.array([seed for _, seed in cell.runs], jnp.uint32)
    keys = [run_key(cell.settings, *run) for run in cell.runs]
    path = (
        job.directory / "checkpoints" / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()}.npz"
    )
    state, curves, seconds, start = programs.initial_state(seeds), [], 0.0, jnp.int32(0)
    if path.exists():
        state, curves, seconds = load(path, state)
    tokens = study.window * cell.batch * cell.length * len(cell.runs)
    saved = time.perf_counter()
    end, solved = -(-study.steps // study.window), False
    while not (solved or len(curves) == end or worker.stopped()):
        began = time.perf_counter()
        start = jnp.int32(len(curves) * study.window)
        state, measured = programs.train(state, rates, start, programs.draw(start))
        measured = jax.tree.map(lambda x: np.asarray(x, np.float64).round(5), measured)
        seconds += time.perf_counter() - began
        curves.append(measured)
        accuracy = measured.accuracy.mean(axis=-1)
        solved = bool(accuracy.min() >= study.solved)
        worker.report(
            {
                "step": len(curves) * study.window,
                "steps": end * study.window,
                "accuracy": [float(accuracy.min()), float(accuracy.max())],
                "tokens": tokens,
                "seconds": time.perf_counter() - began,
            }
        )
        if time.perf_counter() - saved > _CHECKPOINT_SECONDS:
            save(path, state, curves, seconds)
            saved = time.perf_counter()
    finished = solved or len(curves) == end
    tests = {}
    if finished:
        for multiple, (test_draw, measure) in programs.test.items():
            measured = measure(state.params, test_draw(jnp.int32(0)))
            tests[multiple] = jax.tree.map(lambda x: np.asarray(x, np.float64).round(5), measured)
    elif curves:
        save(path, state, curves, seconds)
    shares = {}
    if job.profile and curves:
        # One window more; its results are dropped.
        events = device_events(lambda: programs.train(state, rates, start, programs.draw(start)))
        shares = profile(events, programs.train.as_text(), 1e3 * seconds / len(curves))
    rows = []
    for i, (rate, seed) in enumerate(cell.runs):
        if not curves:
            break
        accuracy = [window.accuracy[i] for window in curves]
        mean = np.mean(accuracy, axis=-1)
        passed = np.flatnonzero(mean >= 0.9)
        rows.append(
            {
                "run": keys[i],
                "study": cell.study,
                "task": cell.config.task["name"],
                "length": cell.length,
                "size": cell.size,
                "mixer": cell.mixer,
                "learning_rate": rate,
                "seed": seed,
                "finished": finished,
                "steps": len(curves) * study.window,
                "all_steps": end * study.window,
                "batch": cell.batch,
                "accuracy": float(mean[-1]),
                "peak_accuracy": float(mean.max()),
                "accuracy_by_kind": dict(zip(cell.task().kinds, map(float, accuracy[-1]))),
                "exact": float(curves[-1].exact[i]),
                "steps_to_90": int(passed[0] + 1) * study.window if len(passed) else None,
                "window": study.window,
                "curve": [[float(x) for x in point] for point in accuracy],
                "loss_curve": [float(window.loss[i]) for window in curves],
                "test": {
                    str(multiple): {
                        "accuracy": [float(x) for x in measured.accuracy[i]],
                        "exact": float(measured.exact[i]),
                    }
                    for multiple, measured in tests.items()
                },
                **programs.sizes,
                **shares,
                "runs_at_once": len(cell.runs),
                "seconds": round(seconds, 2),
                "tokens_per_second": round(tokens * len(curves) / seconds),
                "compile_seconds": round(programs.seconds, 1),
                "waited_seconds": round(worker.waited, 1),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "commit": job.commit,
                "settings": cell.settings,
            }
        )
    if finished:
        path.unlink(missing_ok=True)
    return rows


def profile(events: list[Event], compiled: str, milliseconds: float) -> dict[str, Any]:
    """Shares of a window's time: of all events, of the operator's kernels, and the largest by name."""
    from benchmark_training import breakdown, operation_names

    operations = breakdown(events, operation_names(compiled), "", 1)["operations_ms"]
    shares = {name: round(ms / milliseconds, 3) for name, ms in operations.items()}
    # Under vmap some kernels lose their name, and all lose their path: all are Mosaic's.
    kernels = sum(share for name, share in shares.items() if "mosaic_gpu" in name)
    busy = round(sum(event.milliseconds for event in events) / milliseconds, 3)
    largest = dict(list(shares.items())[:12])
    return {"gpu_share": busy, "operator_share": round(kernels, 3), "largest_shares": largest}


def save(path: Path, state: State, curves: list[Measured], seconds: float) -> None:
    """Writes a checkpoint, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    for name in Measured._fields:
        arrays[name] = np.stack([getattr(window, name) for window in curves])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, seconds=seconds, **arrays)


def load(path: Path, like: State) -> tuple[State, list[Measured], float]:
    """Reads what `save` wrote."""
    with np.load(path) as arrays:
        leaves, tree = jax.tree.flatten(like)
        state = jax.tree.unflatten(
            tree, [jnp.asarray(arrays[f"leaf{i}"]) for i in range(len(leaves))]
        )
        curves = [Measured(*window) for window in zip(*(arrays[name] for name in Measured._fields))]
        return state, curves, float(arrays["seconds"])


# --- the command --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The command line.

    Attributes:
      studies: names of files in experiments/recall.
      mixers: instead of the studies'.
      lengths: instead of the studies'.
      learning_rates: instead of the studies'.
      seeds: instead of the studies'.
      steps: instead of the studies'.
      directory: of rows and checkpoints.
      devices: number of GPUs, all if None; without GPUs, of processes.
      processes: of each GPU. One trains, meanwhile the others compile.
      minutes: after which to stop.
      profile: measure which share of the time the GPU and the operator's kernels take.
    """

    studies: tyro.conf.Positional[tuple[str, ...]]
    mixers: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    steps: int | None = None
    directory: Path = RESULTS
    devices: int | None = None
    processes: int = 3
    minutes: float = float("inf")
    profile: bool = False


def main(arguments: list[str]) -> int | str:
    """Returns the exit status, or a message for it to be 1."""
    began = time.time()
    options = tyro.cli(Options, args=arguments, prog="recall.py", description=__doc__)
    waiting = cells_of(options)
    devices = worker_devices(options.devices, options.processes)
    job = Job(options.directory, source_commit(), options.profile)
    total = sum(len(cell.runs) for cell in waiting)
    print(f"{total} runs in {len(waiting)} cells in {len(devices)} processes", flush=True)
    progress, following = Progress(waiting), iter(waiting)
    for message in share(
        lambda: next(following, None),
        compile_cell,
        functools.partial(run_cell, job=job),
        devices=devices,
        deadline=began + 60 * options.minutes,
        in_hand=2,
        programs=Path(tempfile.gettempdir()) / f"gdn2_jax_recall_{os.getuid()}",
    ):
        for row in message.value if message.kind == "done" else ():
            append_row(options.directory / f"{row['study']}.jsonl", row)
        progress.update(message)
    progress.line()
    if progress.failed:
        return f"recall.py: failed: {'; '.join(progress.failed)}"
    if progress.finished < total:
        return "recall.py: stopped; start again to continue"
    return 0


class Progress:
    """Prints what the processes report, one line every ten seconds."""

    def __init__(self, waiting: list[Cell]):
        """Counts what there is to do."""
        self.finished, self.failed, self._printed = 0, [], 0.0
        self._total = sum(len(cell.runs) for cell in waiting)
        self._tokens = sum(cell.cost for cell in waiting)
        self._active: dict[str, dict] = {}

    def update(self, message: Message) -> None:
        """Takes a message of a cell."""
        name, value = message.job.name, message.value
        if message.kind == "progress":
            self._active[name] = value
            self._tokens -= value["tokens"]
            if time.monotonic() - self._printed > 10:
                self.line()
            return
        self._active.pop(name, None)
        if message.kind == "failed":
            self.failed.append(f"{name}: {value}")
            print(f"failed: {self.failed[-1]}", flush=True)
        elif rows := value:
            finished = rows[0]["finished"]
            self.finished += len(rows) * finished
            best = max(rows, key=lambda row: row["accuracy"])
            left = rows[0]["all_steps"] - rows[0]["steps"]
            self._tokens -= left * rows[0]["batch"] * rows[0]["length"] * len(rows)
            print(
                f"{'finished' if finished else 'stopped '} {name}: "
                f"{best['accuracy']:.3f} at {best['learning_rate']:g}, "
                f"{sum(row['accuracy'] > 0.9 for row in rows)} of {len(rows)} runs above 0.9, "
                f"{rows[0]['steps']} steps, {rows[0]['tokens_per_second'] / 1e6:.2f}M tokens/s, "
                f"{rows[0]['seconds']:.0f} s, compiled in {rows[0]['compile_seconds']:.0f} s, "
                f"waited {rows[0]['waited_seconds']:.0f} s",
                flush=True,
            )

    def line(self) -> None:
        """Prints how far everything is."""
        self._printed = time.monotonic()
        parts, speed = [], 0.0
        for name, message in self._active.items():
            low, high = message["accuracy"]
            speed += message["tokens"] / message["seconds"]
            parts.append(f"{name} {message['step']}/{message['steps']} {low:.2f}..{high:.2f}")
        if speed:
            left = f"{self._tokens / speed / 60:.1f} min left"
            parts.append(f"{speed / 1e6:.2f}M tokens/s, {left}")
        print(f"[{self.finished}/{self._total} runs] {' | '.join(parts)}", flush=True)


def cells_of(options: Options) -> list[Cell]:
    """The cells to run, in order."""
    names = ("mixers", "lengths", "learning_rates", "seeds", "steps")
    changes = {name: value for name in names if (value := getattr(options, name))}
    found = []
    for name in options.studies or ("",):
        files = {folder / f"{name}.jsonl" for folder in (RESULTS, options.directory)}
        finished = {row["run"] for row in merged_rows(*files) if row["finished"]}
        found += cells(name, read_study(name, **changes), finished)
    return found


if __name__ == "__main__":
    sys.exit(run_command("recall.py", lambda: main(sys.argv[1:])))
