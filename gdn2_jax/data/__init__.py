"""Text corpora as packed training batches: prepare once, read in any order, resume anywhere."""

from gdn2_jax.data.batches import train_iterator, validation_batches
from gdn2_jax.data.config import DataConfig
from gdn2_jax.data.corpus import Corpus, prepare
from gdn2_jax.data.packing import PackedSequences
from gdn2_jax.data.store import TokenStore
from gdn2_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "DataConfig",
    "PackedSequences",
    "TokenStore",
    "Tokenizer",
    "load_tokenizer",
    "prepare",
    "train_iterator",
    "train_tokenizer",
    "validation_batches",
]
