"""The training loop."""

import contextlib
import json
import math
import signal
import sys
import time
from typing import Any, Self

import grain
import jax
import numpy as np
from tqdm import tqdm

from gdn2_jax.data import train_iterator
from gdn2_jax.evaluation import evaluate_perplexity, sample_text
from gdn2_jax.parallel import any_process, batch_reader, put_batch
from gdn2_jax.training.checkpoint import save_checkpoint
from gdn2_jax.training.config import TrainingConfig
from gdn2_jax.training.flops import peak_flops, training_flops_per_token
from gdn2_jax.training.metrics import MetricsLog, plot_losses, read_metrics
from gdn2_jax.training.programs import Programs, compile_programs
from gdn2_jax.training.run import Run, save_config
from gdn2_jax.training.step import StepMetrics, TrainState, abstract_state, replicated


class DivergenceError(Exception):
    """The loss or the gradient is no longer finite."""


def train(run: Run, programs: Programs | None = None) -> bool:
    """Trains from the run's latest checkpoint, or from the start, to its last step.

    Writes the files of `RunFiles`. A run that is killed at any point and started again ends with
    the same parameters, and the same metrics apart from times, as one that is not. SIGTERM and
    SIGINT end a run after the next step, with a checkpoint; of several processes, one that receives
    it ends all after the next step that is logged.

    Args:
      run: from `open_run`.
      programs: compiled for the run's configuration and mesh, to be spared the wait; compiled here if
        None.

    Returns:
      Whether the run is complete, and not stopped by a signal.

    Raises:
      DivergenceError: loss or gradient became NaN or infinite. Such a state is never saved.
    """
    config, files = run.config, run.files
    start = 0 if run.state is None else int(run.state.step)
    with contextlib.closing(run.checkpoints):
        if start >= config.steps and _is_summarized(run, start):
            _say(f"{files.config.parent} is finished at step {start}; more --steps continue it")
            _list_files(run)
            return True

        if _is_primary():
            save_config(config, files.config)
            run.corpus.tokenizer.save(files.tokenizer)
        _say(run.corpus.description)
        _say(_describe(run))
        if start:
            _say(f"continuing from the checkpoint of step {start}")
        state = run.state
        if start < config.steps:
            programs = programs or _compile(run)
            state = state or programs.initial_state()
            log = MetricsLog(files.metrics, files.tensorboard, start)
            with contextlib.closing(log):
                state = _take_steps(run, programs, state, start, log)
    if int(state.step) < config.steps:
        _say(f"stopped after step {int(state.step)} with a checkpoint; start again to continue")
        return False
    _finish(run, state)
    return True


def _compile(run: Run) -> Programs:
    began = time.perf_counter()
    programs = compile_programs(run.config, run.mesh)
    _say(f"compiled in {time.perf_counter() - began:.0f} s")
    return programs


def _take_steps(
    run: Run, programs: Programs, state: TrainState, start: int, log: MetricsLog
) -> TrainState:
    """Returns the state after the last step, or after a signal."""
    config = run.config
    batches, data_state = _open_batches(run)
    with contextlib.closing(batches), _StopSignal() as stop, _progress_bar(config, start) as bar:
        clock, clock_step = time.perf_counter(), start
        for step in range(start + 1, config.steps + 1):
            state, metrics = programs.train_step(state, _device_batch(run, next(batches)))
            bar.update()
            last = step == config.steps
            validates = last or step % config.validate_every == 0
            logs = last or step == 1 or step % config.log_every == 0
            # Of several processes, all must stop after the same step.
            asks = logs or jax.process_count() == 1
            stops = asks and any_process(stop.received)
            saves = last or stops or step % config.checkpoint_every == 0
            if logs or validates or saves:
                row = {"step": step, "tokens": step * config.tokens_per_step}
                row |= _checked(metrics, run, step)
            if logs:
                now = time.perf_counter()
                row |= _speed(run, (step - clock_step) / (now - clock))
                clock, clock_step = now, step
                log.write(row)
                bar.set_postfix_str(_abbreviate(row), refresh=False)
            if validates and run.corpus.validation is not None:
                validation = _validate(run, programs, state)
                log.write({"step": step, **validation})
                bar.write(f"step {step}: {_format(validation)}")
            if saves:
                progress = {"position": step * config.global_batch_size, **data_state}
                progress["iterator"] = batches.get_state()
                save_checkpoint(run.checkpoints, state, progress)
            if validates or saves:
                clock, clock_step = time.perf_counter(), step
            if stops:
                break
    return state


def _open_batches(run: Run) -> tuple[grain.DatasetIterator, dict[str, Any]]:
    """Returns the iterator at the run's position, and what is to be saved with its state."""
    reader = batch_reader(run.mesh)
    readers = [reader.count, run.config.data.num_workers]
    saved = run.progress
    # The iterator's own state fits only as many readers as wrote it; the position fits any.
    fits = saved.get("readers") == readers
    start_sequence = saved["start_sequence"] if fits else saved.get("position", 0)
    batches = train_iterator(
        run.corpus.train,
        global_batch_size=run.config.global_batch_size,
        process_index=reader.index,
        process_count=reader.count,
        start_sequence=start_sequence,
        num_workers=run.config.data.num_workers,
    )
    if fits:
        batches.set_state(saved["iterator"])
    return batches, {
        "corpus": run.corpus.digest,
        "readers": readers,
        "start_sequence": start_sequence,
    }


def _device_batch(run: Run, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Splits this process's rows into microbatches and puts them on the mesh."""
    split = {
        name: rows.reshape(run.config.accumulation, -1, rows.shape[-1])
        for name, rows in batch.items()
    }
    return put_batch(run.mesh, split)


def _checked(metrics: StepMetrics, run: Run, step: int) -> dict[str, float]:
    """Brings metrics to the host; waits for the step."""
    row = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
    if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
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


def _validate(run: Run, programs: Programs, state: TrainState) -> dict[str, float]:
    result = evaluate_perplexity(
        run.config.model,
        state.params,
        run.corpus.validation,
        mesh=run.mesh,
        batch_size=run.config.microbatch_size,
        max_batches=run.config.validation_batches,
        summed_losses=programs.summed_losses,
    )
    return {f"validation_{name}": value for name, value in result._asdict().items()}


def _finish(run: Run, state: TrainState) -> None:
    """Writes sample, plot and summary."""
    config, files = run.config, run.files
    text = _sample(run, state) if config.sample_tokens else None
    if not _is_primary():
        return
    rows = read_metrics(files.metrics)
    losses = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_loss" in row]
    summary = {"first_loss": losses[0]["loss"], **losses[-1], **(validations or [{}])[-1]}
    _say(_format(summary))
    if text is not None:
        files.sample.write_text(text + "\n")
    plot_losses(rows, files.plot)
    files.summary.write_text(json.dumps(summary, indent=2) + "\n")
    _list_files(run)


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


def _is_summarized(run: Run, step: int) -> bool:
    """Whether the summary, which is written last, is that of `step`."""
    try:
        return json.loads(run.files.summary.read_text())["step"] == step
    except (OSError, ValueError, KeyError):
        return False


def _describe(run: Run) -> str:
    params = abstract_state(run.config, run.mesh).params
    parameters = sum(x.size for x in jax.tree.leaves(params))
    return (
        f"{parameters:,} parameters, {run.corpus.train.store.num_tokens:,} tokens of text, "
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
        mininterval=1 if sys.stderr.isatty() else 10,
        disable=not _is_primary(),
    )


def _is_primary() -> bool:
    return jax.process_index() == 0


def _say(text: str) -> None:
    if _is_primary():
        print(text, flush=True)


class _StopSignal:
    """Notes SIGTERM or SIGINT, and lets a second one act as usual."""

    def __enter__(self) -> Self:
        self.received = False
        self._handlers = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        self.received = True
        signal.signal(number, self._handlers[number])
