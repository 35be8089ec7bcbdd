"""One token of one text through a GDN-2 model, where a kernel does all between a layer's products.

A step of decoding reads every weight for one row. The rest is little work in many launches: the modules'
own step takes 37 a layer on a Hopper GPU, this one takes 12.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.layers.decay import decay_rate
from gdn2_jax.layers.rms_norm import rms_norm
from gdn2_jax.models.config import ModelConfig
from gdn2_jax.models.mixers import DeltaRule
from gdn2_jax.models.session import Session
from gdn2_jax.ops import rounding_seeds
from gdn2_jax.pallas.mixer_step import MixerParams, mixer_step
from gdn2_jax.parallel import dense_product

_SERVED = DeltaRule(kind="gdn2")
_CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "b_proj", "w_proj", "f_proj_0", "g_proj_0")


def kernels_serve(config: ModelConfig, batch: int) -> bool:
    """Whether `token_step` computes what the model does; on a Hopper GPU alone."""
    mixer = config.mixer
    if not isinstance(mixer, DeltaRule) or config.hybrid or config.mlp_dim is None:
        return False
    free = ("num_heads", "head_dim", "state_rounding")
    plain = all(
        getattr(mixer, name) == value for name, value in vars(_SERVED).items() if name not in free
    )
    # No GPU has run the kernel with rounded states or 64 channels yet: it serves them by name.
    named = config.implementation == "pallas"
    return (
        plain
        and (named or (mixer.state_rounding is None and mixer.head_dim == 128))
        and batch == 1
        and config.unroll
        and mixer.head_dim in (64, 128)
        and jnp.dtype(config.dtype) == jnp.bfloat16
        and (named or config.implementation is None)
    )


def prepared(config: ModelConfig, params: dict) -> dict:
    """What `token_step` takes of a model's parameters, whose layers are apart and merged."""
    return params | {"layers": [_prepared_block(config, x["block"]) for x in params["layers"]]}


def _prepared_block(config: ModelConfig, params: dict) -> dict:
    mixer, mlp = params["mixer"], params["mlp"]

    def matrix(x):
        return x["kernel"].astype(config.dtype)

    inner = MixerParams(
        *(mixer[name]["kernel"] for name in _CONVOLUTIONS),
        decay_kernel=matrix(mixer["f_proj_1"]),
        gate_kernel=matrix(mixer["g_proj_1"]),
        gate_bias=mixer["g_proj_1"]["bias"],
        rate=jnp.repeat(decay_rate(mixer["A_log"], jnp.float32), mixer["dt_bias"].shape[-1]),
        dt_bias=mixer["dt_bias"].reshape(-1),
        norm_scale=mixer["o_norm"]["scale"],
    )
    return {
        "mixer_norm": params["mixer_norm"]["scale"],
        "projections": mixer["merged"],
        "inner": inner,
        "o_proj": matrix(mixer["o_proj"]),
        "mlp_norm": params["mlp_norm"]["scale"],
        "gate_proj": matrix(mlp["gate_proj"]),
        "up_proj": matrix(mlp["up_proj"]),
        "down_proj": matrix(mlp["down_proj"]),
    }


def settled(cache: dict) -> dict:
    """A cache of the same texts whose windows hold zeros in place of other documents' inputs.

    Without `segment_ids` no further token changes the documents in it: the last token's goes on.
    """
    if "inputs" in cache:
        ids = cache["segment_ids"]
        own = ids == ids[..., -1:]
        window = jnp.where(own[..., None], cache["inputs"], 0)
        return {"inputs": window, "segment_ids": jnp.broadcast_to(ids[..., -1:], ids.shape)}
    return {name: settled(x) if isinstance(x, dict) else x for name, x in cache.items()}


def token_step(config: ModelConfig, params: dict, cache: dict, token: Int[Array, "1 1"]) -> Session:
    """The session after one token of one row, whose document goes on.

    Args:
      config: one that `kernels_serve`.
      params: what `prepared` returns.
      cache: of a session, settled, as a list of layers.
      token: its id.
    """
    x = params["embed"]["embedding"][token[0, 0]].astype(jnp.float32)
    layers = []
    for layer, kept in zip(params["layers"], cache["layers"], strict=True):
        x, kept = _block(config, layer, kept["block"]["mixer"], x)
        layers.append({"block": {"mixer": kept}})
    norm = functools.partial(rms_norm, config.norm_epsilon, jnp.float32)
    head = params["lm_head"]["kernel"].astype(config.dtype)
    logits = _product(norm(x, params["final_norm"]["scale"]), head)
    return Session({"layers": layers}, logits[None])


def _block(config: ModelConfig, params: dict, cache: dict, x: Array) -> tuple[Array, dict]:
    merged = params["projections"]
    first: dict[str, Any] = {name: start for name, start, _ in merged.columns}
    norm = functools.partial(rms_norm, config.norm_epsilon, jnp.float32)
    projected = _product(norm(x, params["mixer_norm"]), merged.kernel)
    cache, seeds = dict(cache), None
    if "position" in cache:
        cache["position"] = cache["position"] + jnp.uint32(1)
        seeds = rounding_seeds(cache["position"], cache["state"].shape[1])
    cache["state"], windows, y = mixer_step(
        cache["state"],
        tuple(cache[name]["inputs"] for name in _CONVOLUTIONS),
        projected[None].astype(config.dtype),
        params["inner"],
        seeds,
        columns=tuple(first[name] for name in _PROJECTIONS),
        epsilon=config.norm_epsilon,
    )
    for name, window in zip(_CONVOLUTIONS, windows):
        cache[name] = cache[name] | {"inputs": window}
    x += _product(y[0], params["o_proj"])
    y = norm(x, params["mlp_norm"])
    hidden = jax.nn.silu(_product(y, params["gate_proj"])) * _product(y, params["up_proj"])
    return x + _product(hidden, params["down_proj"]), cache


def _product(x: Float[Array, "D"], kernel: Float[Array, "D F"]) -> Float[Array, "F"]:
    """In float32, of operands in the kernel's dtype."""
    x = x.astype(kernel.dtype)[None]
    options = {"preferred_element_type": jnp.float32}
    return dense_product(x, kernel, (((1,), (0,)), ((), ())), **options)[0]
