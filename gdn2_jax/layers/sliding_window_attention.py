"""The sliding-window attention mixer of the hybrid models."""

from jaxtyping import Array, Float

from gdn2_jax.layers.inputs import check_attributes
from gdn2_jax.layers.softmax_attention import local_attention, local_attention_of_span
from gdn2_jax.layers.softmax_attention_layer import SoftmaxAttentionLayer


class SlidingWindowAttention(SoftmaxAttentionLayer):
    """Causal multi-head softmax attention over the last `window_size` tokens, with rotary.

    Query t sees the keys t - (window_size - 1), ..., t of its document.

    With `decode=True` the "cache" collection keeps the rotated keys, the values and the documents
    of the last `window_size` tokens in ring buffers, and for each row `slot`, where its next token
    goes, and `index`, its number of tokens so far, which from 2^31 on falls back to 2^30: outputs are as
    exact after any number of tokens. Calls, `init` and `segment_ids` behave as in `GatedDeltaNet2`.

    Attributes:
      num_heads: number of heads, each of width D / num_heads.
      window_size: number of keys a query sees, its own included.
      rope_theta: base of the rotary frequencies.
      conv_size: tokens seen by a short convolution of the queries, keys and values before rotary, as
        in the delta rule's layers; None for no convolution.
      dtype: as in `GatedDeltaNet2`.
      param_dtype: dtype of the kernels.
      kernel_init: initialiser of the query, key and value kernels; its names of axes count as in
        `GatedDeltaNet2`.
      out_kernel_init: initialiser of the output kernel (depth-scaled in the language model).
      decode: keep keys and values between calls.
    """

    window_size: int = 2048

    @property
    def _cache_size(self) -> int:
        return self.window_size

    def _attend(self, q, k, v, segment_ids, cache=None) -> Float[Array, "B T N H"]:
        return local_attention(q, k, v, self.window_size, segment_ids, cache)

    def _attend_span(self, q, k, v, segment_ids) -> Float[Array, "B T N H"]:
        return local_attention_of_span(q, k, v, self.window_size, segment_ids)

    def _check_attributes(self, width: int) -> None:
        check_attributes(self, "window_size")
        super()._check_attributes(width)
