"""From a DataConfig to packed sequences: read, split by document, tokenize, keep on disk."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from tqdm import tqdm

from gdn2_jax.data.config import DataConfig
from gdn2_jax.data.packing import PackedSequences
from gdn2_jax.data.sources import find_files, read_documents
from gdn2_jax.data.store import StoreWriter, TokenStore, file_digest, is_intact, seal
from gdn2_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

# Part of every cache key: raise it when the files' meaning changes.
_FORMAT = 1
_BATCH_CHARACTERS = 2**22

# Bars show only for steps that take more than a moment.
_BAR = {"delay": 2, "unit_scale": True, "leave": False}


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus, split by document.

    Attributes:
      tokenizer: of `vocab_size` entries, with `encode`, `decode` and `save`.
      train: sequences of shuffled documents.
      validation: sequences of the documents kept aside, in fixed order; None where
        `validation_fraction` is 0.
      digest: of the files' contents, the tokenizer and the split. A run that goes on with another
        digest does not see the same data.
    """

    tokenizer: Tokenizer
    train: PackedSequences
    validation: PackedSequences | None
    digest: str


def prepare(config: DataConfig) -> Corpus:
    """Reads and tokenizes a corpus, or opens it from the cache.

    The cache is keyed by the contents of the files, the tokenizer and the split, and checked byte
    for byte when opened, so neither an outdated nor a damaged entry is ever used. Processes that
    prepare the same corpus at once do the work twice but do not disturb each other.

    Args:
      config: where the text is and what to make of it.

    Returns:
      The tokenizer and the packed training and validation sequences.

    Raises:
      FileNotFoundError: if a path or the tokenizer does not exist.
      ValueError: if a file cannot be read as text, or the corpus is empty or too small for one
        training and one validation sequence.
    """
    files = find_files(config.paths)
    tokenizer = None
    if config.trained_vocab_size is None:
        tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
    entry = Path(config.cache_directory).expanduser() / _cache_key(config, files)
    if not is_intact(entry):
        _build(config, files, tokenizer, entry)
    return Corpus(
        tokenizer or load_tokenizer(entry / "tokenizer.json"),
        _pack(config, entry, "train", config.seed),
        _pack(config, entry, "validation", None) if config.validation_fraction else None,
        entry.name,
    )


def _pack(config: DataConfig, entry: Path, split: str, seed: int | None) -> PackedSequences:
    store = TokenStore(entry, split)
    try:
        return PackedSequences(store, config.sequence_length, seed, config.reset_at_documents)
    except ValueError as error:
        raise ValueError(
            f"the corpus is too small: in the {split} part (validation_fraction="
            f"{config.validation_fraction}, {store.num_documents} documents) {error}"
        ) from error


def _cache_key(config: DataConfig, files: Sequence[Path]) -> str:
    with ThreadPoolExecutor() as pool:
        digests = list(tqdm(pool.map(file_digest, files), "hash", len(files), **_BAR))
    tokenizer = config.tokenizer
    if tokenizer != "bytes" and config.trained_vocab_size is None:
        tokenizer = file_digest(Path(tokenizer).expanduser())
    parts = {
        "format": _FORMAT,
        "files": [(path.suffix, digest) for path, digest in zip(files, digests)],
        "text_field": config.text_field,
        "document_separator": config.document_separator,
        "tokenizer": tokenizer,
        "end_of_document": config.end_of_document,
        "validation_fraction": config.validation_fraction,
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _build(
    config: DataConfig, files: Sequence[Path], tokenizer: Tokenizer | None, entry: Path
) -> None:
    """Writes a cache entry, complete or not at all."""

    def documents(description: str, total: int | None) -> Iterator[str]:
        texts = read_documents(
            files, text_field=config.text_field, document_separator=config.document_separator
        )
        return tqdm(texts, description, total, unit=" documents", **_BAR)

    held_out = _split(documents("read", None), config.validation_fraction)
    if tokenizer is None:
        texts = zip(documents("train tokenizer", len(held_out)), held_out)
        training_texts = (text for text, held in texts if not held)
        tokenizer = train_tokenizer(training_texts, config.trained_vocab_size)

    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=entry.parent) as temporary:
        directory = Path(temporary) / entry.name
        directory.mkdir()
        tokenizer.save(directory / "tokenizer.json")
        texts = documents("tokenize", len(held_out))
        _write(texts, held_out, tokenizer, directory)
        seal(directory)
        _publish(directory, entry)


def _split(documents: Iterable[str], fraction: float) -> Bool[np.ndarray, " documents"]:
    """Chooses the validation documents: those of the smallest digests, up to `fraction` of bytes.

    Depends on nothing but the texts, so it stays the same with another tokenizer, seed or order
    of files, and equal documents fall on one side.
    """
    digests, sizes = [], []
    for document in documents:
        text = document.encode()
        digests.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()))
        sizes.append(len(text))
    if not digests:
        raise ValueError("paths: the corpus is empty, no document has any text")
    digests = np.array(digests, np.uint64)
    if fraction == 0:
        return np.zeros(len(digests), bool)
    order = np.argsort(digests)
    totals = np.cumsum(np.array(sizes)[order])
    held_out = digests <= digests[order[np.searchsorted(totals, fraction * totals[-1])]]
    if held_out.all():
        raise ValueError(
            f"validation_fraction={fraction} leaves no document for training, of the "
            f"{len(digests)} in the corpus: give more documents, set document_separator to cut "
            ".txt files into several, or set validation_fraction to 0"
        )
    return held_out


def _write(
    texts: Iterable[str],
    held_out: Bool[np.ndarray, " documents"],
    tokenizer: Tokenizer,
    directory: Path,
) -> None:
    """Tokenizes the documents into the stores "train" and "validation"."""
    writers = [
        StoreWriter(directory, split, tokenizer.vocab_size, tokenizer.end_of_document)
        for split in ("train", "validation")
    ]
    for batch in _by_characters(zip(texts, held_out, strict=True), _BATCH_CHARACTERS):
        encoded = tokenizer.encode_batch([text for text, _ in batch])
        for (text, held), tokens in zip(batch, encoded, strict=True):
            writers[int(held)].append(text, tokens)
    for writer in writers:
        writer.close()


def _by_characters(pairs, limit):
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[0])
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _publish(directory: Path, entry: Path) -> None:
    """Moves a finished entry to its place, unless another process was first."""
    if entry.exists() and not is_intact(entry):
        logging.getLogger(__name__).warning("%s was damaged and is replaced", entry)
        shutil.rmtree(entry)
    try:
        directory.rename(entry)
    except OSError:
        if not is_intact(entry):
            raise
