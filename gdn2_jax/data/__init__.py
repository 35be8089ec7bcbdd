"""Text corpora as packed training batches: prepare once, read in any order, resume anywhere."""

from gdn2_jax.data.batches import train_iterator, validation_batches
from gdn2_jax.data.config import DataConfig, path_options
from gdn2_jax.data.corpus import Corpus, prepare
from gdn2_jax.data.packing import Excerpt, PackedSequences
from gdn2_jax.data.store import TokenStore
from gdn2_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "DataConfig",
    "Excerpt",
    "PackedSequences",
    "TokenStore",
    "Tokenizer",
    "load_tokenizer",
    "path_options",
    "prepare",
    "train_iterator",
    "train_tokenizer",
    "validation_batches",
]
