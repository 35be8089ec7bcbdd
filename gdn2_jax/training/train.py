"""The training loop."""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time

import grain
import jax
from tqdm import tqdm

from gdn2_jax.data import PackedSequences, train_iterator
from gdn2_jax.evaluation import evaluate_perplexity, sample_text
from gdn2_jax.files import write_text
from gdn2_jax.models import Batch
from gdn2_jax.parallel import batch_reader, greatest_of_processes, put_batch
from gdn2_jax.training.checkpoint import check_saved, save_checkpoint
from gdn2_jax.training.config import TrainingConfig
from gdn2_jax.training.config_file import load_config, save_config
from gdn2_jax.training.flops import peak_flops, training_flops_per_token
from gdn2_jax.training.metrics import MetricsLog, plot_losses, read_metrics
from gdn2_jax.training.optimizer import scheduled_rate
from gdn2_jax.training.programs import Programs, compile_programs
from gdn2_jax.training.run import Progress, Run, summarized_step
from gdn2_jax.training.step import (
    StepMetrics,
    TrainState,
    abstract_state,
    replicated,
    run_borders,
    with_borders,
)
from gdn2_jax.training.weights import place_weights


class DivergenceError(Exception):
    """The loss or the gradient is no longer finite."""


class StoppedError(Exception):
    """A signal, by its number, has stopped the run, with a checkpoint."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped after step {step} with a checkpoint; start again to continue")
        self.signal = number


def train(run: Run, programs: Programs | None = None) -> TrainState:
    """Trains from the run's latest checkpoint, or from the start, to its last step.

    Writes the files of `RunFiles`. A run that is killed at any point and started again ends with
    the same parameters, and the same metrics apart from times, as one that is not. SIGTERM and
    SIGINT end a run after the next step, with a checkpoint; of several processes, one that receives
    it ends all after the next step that is logged. Signals reach the main thread only: in another
    one they act as usual.

    Args:
      run: from `open_run`; it is closed.
      programs: compiled for the run's configuration and mesh, to be spared the wait; compiled here if
        None.

    Returns:
      The state after the last step.

    Raises:
      ValueError: the weights of `config.init_from` are of another model.
      StoppedError: a signal has stopped the run.
      DivergenceError: loss or gradient became NaN or infinite. Such a state is never saved.
      CheckpointError: a checkpoint cannot be saved.
      OSError: another file of the run cannot be written.
    """
    config, files = run.config, run.files
    start = 0 if run.state is None else int(run.state.step)
    with contextlib.closing(run):
        if run.state and start >= config.steps and summarized_step(files) == start:
            _say(f"{files.config.parent} is finished at step {start}; more --steps continue it")
            _list_files(run)
            return run.state

        if start and start < config.steps:
            _say_change_of_rate(load_config(files.config), config, start)
        if _is_primary():
            save_config(config, files.config)
            run.corpus.tokenizer.save(files.tokenizer)
        _say(run.corpus.description)
        _say(_describe(run))
        if start:
            _say(f"continuing from the checkpoint of step {start}")
        state = run.state
        if state is None or start < config.steps:
            log = MetricsLog(files.metrics, files.tensorboard, start)
            with contextlib.closing(log):
                params = None
                if state is None and config.init_from:
                    params = place_weights(config, run.mesh)
                programs = programs or _compile(run)
                if state is None:
                    assert programs.initial_state is not None  # compiled, as the run begins
                    state = programs.initial_state()
                if params is not None:
                    state = state._replace(params=params)
                state = with_borders(config, run.mesh, state)
                try:
                    state = _take_steps(run, programs, state, start, log)
                finally:
                    _plot(run)
        _finish(run, state)
    return state


def _say_change_of_rate(old: TrainingConfig, new: TrainingConfig, step: int) -> None:
    """Tells what another number of steps does to the learning rate."""
    before, after = (
        float(scheduled_rate(config.optimizer, run_borders(config), config.accumulation, step))
        for config in (old, new)
    )
    if not math.isclose(before, after, rel_tol=1e-2):
        _say(
            f"steps: {old.steps} before, {new.steps} now: the learning rate of the next step is "
            f"{after:.2g} instead of {before:.2g}, as the schedule spans all steps (a run that "
            "begins with --optimizer.schedule constant or wsd keeps its rate)"
        )


def _compile(run: Run) -> Programs:
    began = time.perf_counter()
    programs = compile_programs(run.config, run.mesh, begins=run.state is None)
    _say(f"compiled in {time.perf_counter() - began:.0f} s")
    return programs


def _take_steps(
    run: Run, programs: Programs, state: TrainState, start: int, log: MetricsLog
) -> TrainState:
    """Returns the state after the last step."""
    config = run.config
    batches, progress = _open_batches(run)
    with contextlib.closing(batches), _StopSignal() as stop, _progress_bar(config, start) as bar:
        clock, clock_step = time.perf_counter(), start
        shown = plotted = -math.inf
        saved = start
        # Of the steps since the last line of metrics; a run that goes on has those before it, too.
        losses = [*progress.losses]
        for step in range(start + 1, config.steps + 1):
            check_saved(run.checkpoints, saved)
            state, metrics = programs.train_step(state, _device_batch(run, next(batches)))
            bar.update()
            losses.append(metrics.loss)
            last = step == config.steps
            validates = last or step % config.validate_every == 0
            logs = last or step == 1 or step % config.log_every == 0
            # Of several processes, all must stop after the same step. JAX's preemption sync point
            # knows SIGTERM alone, and nothing in a single process.
            asks = logs or jax.process_count() == 1
            stops = greatest_of_processes(stop.received) if asks else 0
            saves = last or stops or step % config.checkpoint_every == 0
            if logs or validates or saves:
                losses = [float(loss) for loss in jax.device_get(losses)]
                row = _checked(run, step, metrics, losses)
            if logs:
                now = time.perf_counter()
                row |= _speed(run, (step - clock_step) / (now - clock))
                clock, clock_step = now, step
                log.write(row)
                losses = []
                bar.set_postfix_str(_abbreviate(row), refresh=False)
                if not sys.stderr.isatty() and (now - shown > 10 or last):
                    _say(f"step {step:,} of {config.steps:,}: {_abbreviate(row)}")
                    shown = now
            if validates and run.corpus.validation is not None:
                validation = _validate(run, programs, state, run.corpus.validation)
                log.write({"step": step, "time": _time(), **validation})
                _say(f"step {step:,}: {_format(validation)}")
            if saves:
                progress = progress._replace(
                    position=step * config.global_batch_size,
                    iterator=batches.get_state(),
                    losses=[*losses],
                )
                check_saved(run.checkpoints, saved, wait=True)
                save_checkpoint(run.checkpoints, state, progress._asdict())
                saved = step
            if _is_primary() and (validates or saves) and time.perf_counter() - plotted > 60:
                _plot(run)
                plotted = time.perf_counter()
            if validates or saves:
                clock, clock_step = time.perf_counter(), step
            if stops:
                break
        check_saved(run.checkpoints, saved, wait=True)
    if step < config.steps:
        raise StoppedError(stops, step)
    return state


def _open_batches(run: Run) -> tuple[grain.DatasetIterator, Progress]:
    """Returns the iterator at the run's position, and the progress with these readers."""
    reader = batch_reader(run.mesh)
    readers = [reader.count, run.config.data.num_workers]
    saved = run.progress
    # The iterator's own state fits only as many readers as wrote it; the position fits any.
    fits = saved.readers == readers
    start_sequence = saved.start_sequence if fits else saved.position
    batches = train_iterator(
        run.corpus.train,
        global_batch_size=run.config.global_batch_size,
        process_index=reader.index,
        process_count=reader.count,
        start_sequence=start_sequence,
        num_workers=run.config.data.num_workers,
    )
    if fits:
        batches.set_state(saved.iterator)
    return batches, saved._replace(readers=readers, start_sequence=start_sequence)


def _device_batch(run: Run, batch: Batch) -> Batch:
    """Splits this process's rows into microbatches and puts them on the mesh."""
    split = (run.config.accumulation, -1, run.config.data.sequence_length)
    return put_batch(run.mesh, jax.tree.map(lambda rows: rows.reshape(split), batch))


def _checked(run: Run, step: int, metrics: StepMetrics, losses: list[float]) -> dict[str, float]:
    """Brings metrics to the host; waits for the step."""
    sequences = step * run.config.global_batch_size
    row = {"step": step, "time": _time(), "tokens": step * run.config.tokens_per_step}
    row["epoch"] = sequences / len(run.corpus.train)
    row |= {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
    row["mean_loss"] = math.fsum(losses) / len(losses)
    if not (math.isfinite(row["mean_loss"]) and math.isfinite(row["grad_norm"])):
        saved = run.checkpoints.latest_step()
        raise DivergenceError(
            f"the run has diverged: loss {row['loss']}, gradient norm {row['grad_norm']} at step "
            f"{step}. "
            + ("No checkpoint was written." if saved is None else f"Last checkpoint: step {saved}.")
        )
    return row


def _speed(run: Run, steps_per_second: float) -> dict[str, float]:
    config = run.config
    tokens_per_second = steps_per_second * config.tokens_per_step
    speed = {"tokens_per_second": tokens_per_second}
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is not None and config.model.dtype in ("bfloat16", "float16"):
        flops = training_flops_per_token(config.model, config.data.sequence_length)
        speed["model_flop_utilisation"] = tokens_per_second * flops / (peak * jax.device_count())
    return speed


def _abbreviate(row: dict[str, float]) -> str:
    text = f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
    if "model_flop_utilisation" in row:
        text += f", MFU {row['model_flop_utilisation']:.1%}"
    return text


def _validate(
    run: Run, programs: Programs, state: TrainState, sequences: PackedSequences
) -> dict[str, float]:
    result = evaluate_perplexity(
        run.config.model,
        state.params,
        sequences,
        mesh=run.mesh,
        batch_size=run.config.microbatch_size,
        max_batches=run.config.validation_batches,
        summed_losses=programs.summed_losses,
    )
    return {f"validation_{name}": value for name, value in result._asdict().items()}


def _finish(run: Run, state: TrainState) -> None:
    """Writes sample and summary."""
    config, files = run.config, run.files
    text = _sample(run, state) if config.sample_tokens else None
    if not _is_primary():
        return
    rows = read_metrics(files.metrics)
    losses = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_loss" in row]
    # Of what the file still has, but the step: by that a run is known to be finished.
    summary = {"first_loss": losses[0]["loss"], **losses[-1]} if losses else {}
    summary |= (validations or [{}])[-1] | {"step": int(state.step)}
    _say(_format({name: value for name, value in summary.items() if name != "time"}))
    if text is not None:
        write_text(files.sample, text + "\n")
    write_text(files.summary, json.dumps(summary, indent=2) + "\n")
    _list_files(run)


def _plot(run: Run) -> None:
    if not _is_primary():
        return
    # Fonts do not know the surrogates of a name that is not UTF-8.
    name = os.fsencode(run.files.config.parent.name).decode(errors="replace")
    title = f"{name}: {run.config.model.mixer.kind}, {_size(run)} parameters"
    rows = read_metrics(run.files.metrics)
    tokens = run.config.tokens_per_step
    # What stops the plot, such as a full disk, stops what matters soon enough.
    with contextlib.suppress(OSError):
        plot_losses(rows, run.files.plot, title=title, tokens_per_step=tokens)


def _size(run: Run) -> str:
    params = abstract_state(run.config, run.mesh).params
    return f"{sum(x.size for x in jax.tree.leaves(params)):,}"


def _time() -> float:
    return round(time.time(), 3)


def _sample(run: Run, state: TrainState) -> str:
    _say("\na sample:")
    params = state.params
    if run.mesh.size > 1:
        # Sampling has one row for one device.
        whole = jax.device_put(params, replicated(run.mesh))
        params = jax.tree.map(lambda x: x.addressable_data(0), whole)
    (text,) = sample_text(
        run.config.model,
        params,
        run.corpus.tokenizer,
        run.config.sample_prompt,
        max_new_tokens=run.config.sample_tokens,
        temperature=0.8,
        seed=run.config.seed,
        stream=sys.stdout if _is_primary() else None,
    )
    _say("\n")
    return text


def _describe(run: Run) -> str:
    return (
        f"{_size(run)} parameters, {run.corpus.train.store.num_tokens:,} tokens of text, "
        f"{run.config.steps:,} steps of {run.config.tokens_per_step:,} tokens on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    )


def _list_files(run: Run) -> None:
    for name, path in run.files._asdict().items():
        if path.exists():
            _say(f"  {name:<12}{path}")


def _format(row: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in row.items())


def _progress_bar(config: TrainingConfig, start: int) -> tqdm:
    return tqdm(
        desc="train",
        total=config.steps,
        initial=start,
        unit="step",
        mininterval=1,
        # Elsewhere lines are printed.
        disable=not (_is_primary() and sys.stderr.isatty()),
    )


def _is_primary() -> bool:
    return jax.process_index() == 0


def _say(text: str) -> None:
    if _is_primary():
        # Above the bar. A terminal that is gone does not end the run.
        with contextlib.suppress(OSError):
            tqdm.write(text)
            sys.stdout.flush()


class _StopSignal:
    """Notes SIGTERM or SIGINT, and lets a second one act as usual.

    Attributes:
      received: the number of the signal; 0 before it.
    """

    def __enter__(self):
        self.received = 0
        main = threading.current_thread() is threading.main_thread()
        self._handlers = {
            # Python lets no other thread handle signals.
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
            if main
        }
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        self.received = number
        signal.signal(number, self._handlers[number])
