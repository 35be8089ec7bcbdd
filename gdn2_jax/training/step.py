"""The state of a run and the function that advances it by one optimizer step."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int, Key

from gdn2_jax.models import Batch, LanguageModel, next_token_loss
from gdn2_jax.parallel import batch_sharding, on_mesh, param_shardings
from gdn2_jax.training.config import TrainingConfig
from gdn2_jax.training.optimizer import make_optimizer, schedule_borders, scheduled_rate

# Collectives start early and finish late, with computation between, also that of the next turn of a
# loop. Pieces of 32 MB: a piece can leave once its last gradient is there, beside the backward of
# earlier layers, and no more gradients than that are copied together for it. With pieces of 256 MB
# most layers' gradients were on their way at the end of the step, and 1.4 GiB more was alive.
_PIECE = 2**25
_OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
    "xla_gpu_all_gather_combine_threshold_bytes": _PIECE,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": _PIECE,
    "xla_gpu_all_reduce_combine_threshold_bytes": _PIECE,
}


class TrainState(NamedTuple):
    """What a training step reads and writes.

    Attributes:
      step: optimizer steps taken.
      borders: of the schedule, from `schedule_borders`; not part of a checkpoint.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    borders: Int[Array, "3"] | None = None


class StepMetrics(NamedTuple):
    """What a training step reports.

    Attributes:
      loss: mean cross-entropy of the batch's tokens in nats, before the update.
      grad_norm: global norm of the gradient, before clipping.
    """

    loss: Float[Array, ""]
    learning_rate: Float[Array, ""]
    grad_norm: Float[Array, ""]


def initial_state(config: TrainingConfig) -> TrainState:
    """Returns the state before the first step; traceable."""
    # One kind of key, and its first half, as ever: a seed means the same in every setting of JAX.
    key, _ = jax.random.split(jax.random.key(config.seed, impl="threefry2x32"))
    params = _initial_params(config, key)
    opt_state = make_optimizer(config.optimizer, 0.0).init(params)
    borders = jnp.asarray(run_borders(config))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, borders)


# Traced once for each configuration: a run asks for the state's shapes some ten times.
_traced_state = jax.jit(initial_state, static_argnums=0)


def run_borders(config: TrainingConfig) -> Int[np.ndarray, "3"]:
    """Returns the borders of a run's schedule."""
    return schedule_borders(config.optimizer, config.steps * config.accumulation)


def abstract_state(config: TrainingConfig, where: Mesh | Sharding) -> TrainState:
    """Returns the shapes and dtypes of a state, on a mesh or with one sharding for all arrays."""
    state = _traced_state.eval_shape(config)
    one = isinstance(where, Sharding)
    shardings = jax.tree.map(lambda _: where, state) if one else state_shardings(config, where)
    return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, shardings)


@functools.cache
def state_shardings(config: TrainingConfig, mesh: Mesh) -> TrainState:
    """How a state lies on the mesh: the optimizer's moments as their parameters, the rest whole."""
    params = param_shardings(lambda: _initial_params(config, jax.random.key(0)), mesh)
    state, whole = _traced_state.eval_shape(config), replicated(mesh)
    opt_state = optax.tree.map_params(
        make_optimizer(config.optimizer, 0.0),
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState._make((whole, params, opt_state, whole))


def train_step(
    config: TrainingConfig, state: TrainState, batch: Batch
) -> tuple[TrainState, StepMetrics]:
    """Takes one optimizer step: gradients of G microbatches, averaged in the parameters' dtype.

    The batch's rows are split into the microbatches, [G, B / G, T].
    """

    def loss_fn(params, batch):
        return next_token_loss(config.model, params, batch) / jnp.sum(batch.weights)

    def accumulate(total, microbatch):
        value_and_grad = jax.value_and_grad(loss_fn)(state.params, microbatch)
        return jax.tree.map(jnp.add, total, value_and_grad), None

    count = config.accumulation
    if count == 1:  # The sums would be one more copy of all gradients.
        one = jax.tree.map(operator.itemgetter(0), batch)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, one)
    else:
        loss_dtype = jnp.promote_types(config.model.dtype, jnp.float32)
        zeros = (jnp.zeros((), loss_dtype), jax.tree.map(jnp.zeros_like, state.params))
        total, _ = jax.lax.scan(accumulate, zeros, batch)
        loss, grads = jax.tree.map(lambda x: x / count, total)

    assert state.borders is not None
    rate = scheduled_rate(config.optimizer, state.borders, count, state.step)
    with jax.named_scope("optimizer"):
        updates, opt_state = make_optimizer(config.optimizer, rate).update(
            grads, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(loss, rate, optax.global_norm(grads))
    return TrainState(state.step + 1, params, opt_state, state.borders), metrics


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def jit_train_step(config: TrainingConfig, mesh: Mesh) -> Callable:
    """Returns `train_step` of state and batch, jitted for the mesh; the state is donated."""

    def step(state, batch):
        with on_mesh(mesh):
            return train_step(config, state, batch)

    shardings = state_shardings(config, mesh)
    return jax.jit(
        step,
        compiler_options=compiler_options(mesh.devices.flat, config.overlap),
        in_shardings=(shardings, batch_sharding(mesh, 1)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def compiler_options(devices: Iterable[jax.Device], overlap: bool) -> dict[str, bool | int] | None:
    """Returns what to give `jax.jit`; None for a single device and for other platforms than GPUs.

    Args:
      devices: that the step runs on.
      overlap: hide the time of collectives behind computation.
    """
    platforms = [device.platform for device in devices]
    several_gpus = len(platforms) > 1 and platforms[0] == "gpu"
    return dict(_OVERLAP) if overlap and several_gpus else None


def compile_train_step(config: TrainingConfig, mesh: Mesh) -> Callable:
    """Returns `jit_train_step`, compiled."""
    batch = abstract_batch(config, mesh, config.accumulation)
    return jit_train_step(config, mesh).lower(abstract_state(config, mesh), batch).compile()


def jit_initial_state(config: TrainingConfig, mesh: Mesh) -> Callable:
    """Returns `initial_state` of the configuration, without arguments, jitted for the mesh.

    The borders of its schedule are those of another number of steps, so that this one compiles
    nothing anew: use `with_borders`.
    """
    init = functools.partial(initial_state, dataclasses.replace(config, steps=1))
    return jax.jit(init, out_shardings=state_shardings(config, mesh))


def with_borders(config: TrainingConfig, mesh: Mesh, state: TrainState) -> TrainState:
    """Returns a state with the borders of the run's schedule."""
    return state._replace(borders=jax.device_put(run_borders(config), replicated(mesh)))


def abstract_batch(config: TrainingConfig, mesh: Mesh, *leading: int) -> Batch:
    """Returns shapes, dtypes and shardings of microbatches [*leading, B, T] on the mesh."""
    shape = (*leading, config.microbatch_size, config.data.sequence_length)
    sharding = batch_sharding(mesh, len(leading))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return Batch._make((ids, ids, weights, ids if config.data.reset_at_documents else None))


def _initial_params(config: TrainingConfig, key: Key[Array, ""]) -> Any:
    # The definition of the operator traces ten times faster than kernels, and none of it remains;
    # unrolled, each layer's random numbers would be compiled again, a minute for 18 layers.
    fast = dataclasses.replace(config.model, implementation="recurrent", unroll=False)
    model = LanguageModel(fast)
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
