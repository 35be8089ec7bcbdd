"""The full-attention mixer of the Transformer."""

from jaxtyping import Array, Float

from gdn2_jax.layers.inputs import check_attributes
from gdn2_jax.layers.softmax_attention import full_attention
from gdn2_jax.layers.softmax_attention_layer import SoftmaxAttentionLayer


class Attention(SoftmaxAttentionLayer):
    """Causal multi-head softmax attention to all tokens of the document so far, with rotary.

    Parameters, calls, the decoding cache and the other attributes are those of
    `SlidingWindowAttention`.

    Attributes:
      context_length: number of tokens that the cache holds. With `decode=True` a query sees no more
        keys than that; otherwise there is no such bound.
    """

    context_length: int = 2048

    @property
    def _cache_size(self) -> int:
        return self.context_length

    def _attend(self, q, k, v, segment_ids, cache=None) -> Float[Array, "B T N H"]:
        return full_attention(q, k, v, segment_ids, cache)

    def _attend_span(self, q, k, v, segment_ids) -> Float[Array, "B T N H"]:
        raise NotImplementedError(
            "full attention does not split sequences over devices; expected a mesh with sequence 1"
        )

    def _check_attributes(self, width: int) -> None:
        check_attributes(self, "context_length")
        super()._check_attributes(width)
