"""All that a run compiles before its first step."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from gdn2_jax.evaluation import lower_evaluation
from gdn2_jax.training.config import TrainingConfig
from gdn2_jax.training.step import (
    abstract_batch,
    abstract_state,
    jit_initial_state,
    jit_train_step,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Programs[F: (Callable, Future)]:
    """Compiled functions, or their futures.

    Attributes:
      initial_state: () -> state; None for a run that goes on.
      train_step: (state, batch) -> (state, metrics).
      summed_losses: for `evaluate_perplexity`; None without a validation split.
    """

    initial_state: F | None
    train_step: F
    summed_losses: F | None


def submit_programs(
    config: TrainingConfig, mesh: Mesh, pool: Executor, begins: bool = True
) -> Programs[Future]:
    """Traces a run's functions and lets the pool's threads compile them.

    Tracing holds Python's lock, so that threads would only get in each other's way; compilation
    does not. `wait_for` takes the futures. A run that does not begin, but goes on, needs no initial
    state.
    """
    state = abstract_state(config, mesh)

    def submit(lowered: jax.stages.Lowered) -> Future:
        return pool.submit(lowered.compile)

    batch = abstract_batch(config, mesh, config.accumulation)
    train_step = submit(jit_train_step(config, mesh).lower(state, batch))
    summed_losses = None
    if config.data.validates:
        batch = abstract_batch(config, mesh)
        summed_losses = submit(lower_evaluation(config.model, mesh, state.params, batch))
    initial = submit(jit_initial_state(config, mesh).lower()) if begins else None
    return Programs(initial, train_step, summed_losses)


def wait_for(programs: Programs[Future]) -> Programs[Callable]:
    """Returns the compiled functions of futures."""
    return jax.tree.map(lambda future: future.result(), programs)


def compile_programs(config: TrainingConfig, mesh: Mesh, begins: bool = True) -> Programs[Callable]:
    """Compiles a run's functions; see `submit_programs`."""
    pool = ThreadPoolExecutor()
    try:
        return wait_for(submit_programs(config, mesh, pool, begins))
    finally:
        # Ctrl-C does not wait for compilations.
        pool.shutdown(wait=False, cancel_futures=True)
