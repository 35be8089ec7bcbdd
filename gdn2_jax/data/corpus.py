"""From a DataConfig to packed sequences: read, split, tokenize, keep on disk."""

import bisect
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt64
from tqdm import tqdm

from gdn2_jax.data.cache import (
    are_at_rest,
    exclusive,
    file_digest,
    file_states,
    find_trusted,
    is_intact,
    new_entry,
    trust,
)
from gdn2_jax.data.config import DataConfig
from gdn2_jax.data.packing import PackedSequences
from gdn2_jax.data.sources import (
    Piece,
    file_kind,
    find_files,
    note_missing_separator,
    read_file,
    read_pieces,
)
from gdn2_jax.data.store import StoreWriter, TokenStore
from gdn2_jax.data.tokenizer import (
    Tokenizer,
    describe_losses,
    load_tokenizer,
    train_tokenizer,
)

_LOG = logging.getLogger(__name__)

# Part of every cache key: raise it when the files' meaning changes.
_FORMAT = 3
_BATCH_CHARACTERS = 2**22
_NOTES = "notes.json"

# A document of more than this share of the text is long: it gives its own end for validation.
_LONG = 0.05

# A document that crosses the fraction is held out whole if that exceeds it by no more than this.
_EXCESS = 0.1

# The held-out end of a long document begins at a line or a word, at most so far from its place.
_LINE = 4096

# Bars show only for steps that take more than a moment.
_BAR = {"delay": 2, "unit_scale": True, "leave": False}


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus, split for training and validation.

    Attributes:
      tokenizer: of `vocab_size` entries, with `encode`, `decode` and `save`.
      train: sequences of shuffled documents.
      validation: sequences of the text kept aside, in fixed order; None where nothing is.
      digest: of the files' contents, the tokenizer and the split. A run that goes on with another
        digest does not see the same data.
    """

    tokenizer: Tokenizer
    train: PackedSequences
    validation: PackedSequences | None
    digest: str

    @property
    def description(self) -> str:
        """Documents and bytes of both sides, in a line."""
        parts = {"training": self.train, "validation": self.validation}
        sizes = [
            f"{name} {part.store.num_documents:,} document{'s' * (part.store.num_documents != 1)}, "
            f"{part.store.num_bytes:,} bytes"
            for name, part in parts.items()
            if part is not None
        ]
        return "; ".join(sizes) if self.validation else f"{sizes[0]}; no validation"


def prepare(config: DataConfig) -> Corpus:
    """Reads and tokenizes a corpus, or opens it from the cache.

    The cache is keyed by the contents of the files, the tokenizer and the split. Contents are
    hashed once, and then taken for unchanged while sizes, times and inodes are, unless
    `config.verify` is set; the same holds for the files of the cache. Of several processes that
    prepare the same corpus with the same cache at once, one does the work and the others wait.

    Args:
      config: the texts, the tokenizer and the length of the sequences.

    Returns:
      The tokenizer and the packed training and validation sequences.

    Raises:
      FileNotFoundError: if a path or the tokenizer does not exist.
      ValueError: if a file cannot be read as text, or the corpus is empty or too small for one
        training and one validation sequence.
    """
    cache = Path(config.cache_directory).expanduser()
    files = find_files(config.paths, _LOG.warning, leave_out=cache)
    held_out = []
    if config.validation_paths:
        held_out = find_files(
            config.validation_paths, _LOG.warning, name="data.validation_paths", leave_out=cache
        )
    tokenizer = None
    if config.trained_vocab_size is None:
        tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
    request, at_rest = _request(config, files, held_out)
    with exclusive(cache, request):
        name = None if config.verify else find_trusted(cache, request)
        if name is None or not is_intact(cache / name):
            name = _cache_key(config, files, held_out)
            if not is_intact(cache / name, config.verify):
                with new_entry(cache / name, request) as directory:
                    _build(config, files, held_out, tokenizer, directory)
        if at_rest:
            trust(cache, request, name)
    entry = cache / name
    for note in json.loads((entry / _NOTES).read_text()):
        _LOG.warning("%s", note)
    return Corpus(
        tokenizer or load_tokenizer(entry / "tokenizer.json"),
        _pack(config, entry, "train", config.seed),
        _pack(config, entry, "validation", None) if config.validates else None,
        name,
    )


def _pack(config: DataConfig, entry: Path, split: str, seed: int | None) -> PackedSequences:
    store = TokenStore(entry, split)
    try:
        return PackedSequences(store, config.sequence_length, seed, config.reset_at_documents)
    except ValueError as error:
        raise ValueError(
            f"data.{error} in the {split} part (validation_fraction="
            f"{config.validation_fraction}, {store.num_documents} documents)"
        ) from error


def _settings(config: DataConfig) -> dict[str, str | float]:
    """The options that the entry depends on, beside the contents of files."""
    return {
        "format": _FORMAT,
        "text_field": config.text_field,
        "document_separator": config.separator,
        "tokenizer": config.tokenizer,
        "end_of_document": config.end_of_document,
        "validation_fraction": 0 if config.validation_paths else config.validation_fraction,
    }


def _request(
    config: DataConfig, files: Sequence[Path], held_out: Sequence[Path]
) -> tuple[str, bool]:
    """Returns the digest of a request, by paths and times, and whether the times can be trusted."""
    read = [*files, *held_out]
    if config.tokenizer != "bytes" and config.trained_vocab_size is None:
        read.append(Path(config.tokenizer).expanduser())
    states = file_states(read)
    names = [str(path.absolute()) for path in read]
    return _digest({**_settings(config), "files": [names, len(files), states]}), are_at_rest(states)


def _cache_key(config: DataConfig, files: Sequence[Path], held_out: Sequence[Path]) -> str:
    parts = _settings(config)
    if config.tokenizer != "bytes" and config.trained_vocab_size is None:
        parts["tokenizer"] = file_digest(Path(config.tokenizer).expanduser())
    read = [*files, *held_out]
    with ThreadPoolExecutor() as pool:
        digests = list(tqdm(pool.map(file_digest, read), "hash", len(read), **_BAR))
    kinds = [(file_kind(path), digest) for path, digest in zip(read, digests)]
    return _digest({**parts, "files": kinds[: len(files)], "validation": kinds[len(files) :]})


def _digest(parts) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


_Content = str | Int32[np.ndarray, " N"]


class _Survey(NamedTuple):
    """The digests of documents' texts, and their sizes in UTF-8 bytes."""

    digests: UInt64[np.ndarray, " documents"]
    sizes: Int64[np.ndarray, " documents"]


class _Part(NamedTuple):
    """A piece of a document on one side of the split.

    Attributes:
      content: of the piece, text or token ids.
      ends: whether the document ends with it, on this side.
      held_out: whether it is for validation.
      digest: of the document.
    """

    content: _Content
    ends: bool
    held_out: bool
    digest: int


def _build(
    config: DataConfig,
    files: Sequence[Path],
    held_out_files: Sequence[Path],
    tokenizer: Tokenizer | None,
    directory: Path,
) -> None:
    """Writes the files of a cache entry."""
    notes = []
    options = {
        "text_field": config.text_field,
        "document_separator": config.separator,
        "tokenizer": tokenizer,
    }
    count = _byte_counter(tokenizer)
    survey = _survey(files, options, count, notes.append)
    if not len(survey.sizes):
        raise ValueError("data.paths: expected text, got none in any document: the corpus is empty")
    held_out = _survey(held_out_files, options, count, notes.append)
    if held_out_files and not len(held_out.sizes):
        raise ValueError("data.validation_paths: expected text, got none in any document")
    if common := np.isin(held_out.digests, survey.digests).sum():
        notes.append(
            f"data.validation_paths: {common} of the documents are in the training text too"
        )

    fraction = 0 if held_out_files else config.validation_fraction
    starts = _split(survey, fraction)

    def parts(description: str) -> Iterator[_Part]:
        total = int(survey.sizes.sum() + held_out.sizes.sum())
        training = _divide(read_pieces(files, **options), survey, starts, count)
        validation = _divide(
            read_pieces(held_out_files, **options), held_out, np.zeros_like(held_out.sizes), count
        )
        return _bar(itertools.chain(training, validation), count, description, total)

    if tokenizer is None:
        texts = (str(part.content) for part in parts("train tokenizer") if not part.held_out)
        assert config.trained_vocab_size is not None
        tokenizer = train_tokenizer(texts, config.trained_vocab_size)
    tokenizer.save(directory / "tokenizer.json")
    losses = _write(parts("tokenize"), tokenizer, directory)
    if losses:
        notes.append(f"tokenizer: {config.tokenizer} is lossy: {losses}")
    (directory / _NOTES).write_text(json.dumps(notes))


def _byte_counter(tokenizer: Tokenizer | None) -> Callable[[_Content], int]:
    """Returns a function that counts the bytes of text or token ids."""
    # Without a tokenizer there are no token ids to count.
    lengths = np.zeros(0, np.int32) if tokenizer is None else tokenizer.byte_lengths()

    def count(content: _Content) -> int:
        return len(content.encode()) if isinstance(content, str) else int(lengths[content].sum())

    return count


def _bar[P: (Piece, _Part)](
    pieces: Iterable[P],
    count: Callable[[_Content], int],
    description: str,
    total: int | None = None,
) -> Iterator[P]:
    with tqdm(desc=description, total=total, unit="B", **_BAR) as bar:
        for piece in pieces:
            yield piece
            bar.update(count(piece.content))


def _survey(
    files: Sequence[Path],
    options: Mapping[str, Any],
    count: Callable[[_Content], int],
    note: Callable[[str], None],
) -> _Survey:
    """Reads all documents once; many files at a time, as hashing and unpacking use all cores."""

    def survey_file(path: Path) -> tuple[list[int], list[int], list[str], bool | None]:
        digests, sizes, notes, cut = [], [], [], []

        def pieces() -> Iterator[Piece]:
            cut.append((yield from read_file(path, note=notes.append, **options)))

        digest, size = hashlib.blake2b(digest_size=8), 0
        for content, ends in pieces():
            digest.update(content.encode() if isinstance(content, str) else content.tobytes())
            length = count(content)
            size += length
            bar.update(length)
            if ends:
                digests.append(int.from_bytes(digest.digest()))
                sizes.append(size)
                digest, size = hashlib.blake2b(digest_size=8), 0
        return digests, sizes, notes, cut[0]

    digests, sizes, cut = [], [], []
    with tqdm(desc="read", unit="B", **_BAR) as bar, ThreadPoolExecutor() as pool:
        # In the order of the files, whichever is read first.
        for file_digests, file_sizes, notes, file_cut in pool.map(survey_file, files):
            digests += file_digests
            sizes += file_sizes
            cut.append(file_cut)
            for text in notes:
                note(text)
    note_missing_separator(options["document_separator"], cut, note)
    return _Survey(np.array(digests, np.uint64), np.array(sizes, np.int64))


def _split(survey: _Survey, fraction: float) -> Int64[np.ndarray, " documents"]:
    """Chooses the validation text; returns the byte of each document at which it begins.

    A long document gives its last part; the fraction says how long that is. Short documents are held
    out whole, the smallest digests first, until their share is the fraction. The last of them gives
    only its end.

    The choice depends on the texts alone: another tokenizer, seed or order of files does not
    change it. Equal documents are divided equally. A larger fraction holds out the same and more.
    """
    digests, sizes = survey
    starts = sizes.copy()
    long = sizes > _LONG * sizes.sum()
    starts[long] -= (fraction * sizes[long]).astype(np.int64)

    unique, which = np.unique(digests[~long], return_inverse=True)  # in ascending order
    totals = np.bincount(which, sizes[~long], len(unique))  # of all copies
    rest = totals.sum()
    before = np.cumsum(totals) - totals
    # Documents of special tokens alone have no bytes.
    shares = np.clip((fraction * rest - before) / np.maximum(totals, 1), 0, 1)
    excess = totals * (1 - shares)
    shares[(shares > 0) & (excess <= _EXCESS * rest * min(fraction, 1 - fraction))] = 1
    starts[~long] -= (shares[which] * sizes[~long]).astype(np.int64)
    return starts


def _divide(
    pieces: Iterable[Piece],
    survey: _Survey,
    starts: Int64[np.ndarray, " documents"],
    count: Callable[[_Content], int],
) -> Iterator[_Part]:
    """Yields the pieces, cut where the held-out end of a document begins."""
    documents = zip(survey.digests.tolist(), survey.sizes.tolist(), starts.tolist(), strict=True)
    begins, held_out = True, False
    digest = size = start = position = 0
    for content, ends in pieces:
        if begins:
            digest, size, start = next(documents)
            position, held_out = 0, start < size and start == 0
        stop = position + count(content)
        if not held_out and stop > start:
            cut = _place_of_byte(content, start - position, count)
            if isinstance(content, str):
                cut = _line_start(content, cut, min(_LINE, (size - start) // 2))
            yield _Part(content[:cut], True, False, digest)
            held_out, content = True, content[cut:]
        yield _Part(content, ends, held_out, digest)
        position, begins = stop, ends


def _place_of_byte(content: _Content, byte: int, count: Callable[[_Content], int]) -> int:
    """Returns the last place in a piece before which are no more than so many bytes."""
    if type(content) is str:
        return len(content.encode()[:byte].decode(errors="ignore"))
    return bisect.bisect_right(range(len(content)), byte, key=lambda n: count(content[: n + 1]))


def _line_start(text: str, place: int, limit: int) -> int:
    """Returns where the next line or, failing that, the next white space is, or `place`."""
    following = text[place : place + limit]
    newline = following.find("\n")
    if newline >= 0:
        return place + newline + 1
    words = following.split(maxsplit=1)
    return place + len(words[0]) if len(words) > 1 and following[0] > " " else place


def _write(parts: Iterable[_Part], tokenizer: Tokenizer, directory: Path) -> str:
    """Tokenizes into the stores "train" and "validation"; describes what tokens do not give back.

    The validation documents are ordered by their digests, whatever files they are in.
    """
    train, validation = (
        StoreWriter(
            directory, name, tokenizer.vocab_size, tokenizer.end_of_document, name == "validation"
        )
        for name in ("train", "validation")
    )
    count, byte_lengths = _byte_counter(tokenizer), tokenizer.byte_lengths()
    digests, samples = [], []
    for batch in _batches(_at_cuts(parts, tokenizer.last_cut), _BATCH_CHARACTERS):
        if type(batch[0].content) is str:
            samples.append(batch[0].content[:1000].strip())
        training = [part for part in batch if not part.held_out]
        encoded = _encode(training, tokenizer.encode_batch)
        for part, tokens in zip(training, encoded, strict=True):
            train.append(tokens, count(part.content), ends=part.ends)
        held_out = [part for part in batch if part.held_out]
        encoded = _encode(held_out, tokenizer.encode_with_bytes)
        for part, tokens in zip(held_out, encoded, strict=True):
            tokens, lengths = tokens if type(tokens) is tuple else (tokens, byte_lengths[tokens])
            num_bytes = count(part.content)
            if validation.append(tokens, num_bytes, ends=part.ends, byte_lengths=lengths):
                digests.append(part.digest)
    train.close()
    validation.close(np.argsort(np.array(digests, np.uint64), kind="stable"))
    return describe_losses(tokenizer, samples[:256])


def _encode(parts: Sequence[_Part], encode_batch: Callable[[Sequence[str]], list]) -> list:
    """Encodes the parts that are text; parts that are token ids stay."""
    encoded = iter(encode_batch([part.content for part in parts if type(part.content) is str]))
    return [next(encoded) if type(part.content) is str else part.content for part in parts]


def _at_cuts(parts: Iterable[_Part], last_cut: Callable[[str], int]) -> Iterator[_Part]:
    """Moves the borders between pieces to where tokenizing pieces gives the tokens of the whole."""
    waiting = []
    for part in parts:
        if type(part.content) is not str:
            yield part
            continue
        cut = len(part.content) if part.ends else last_cut(part.content)
        if not (cut or part.ends):
            waiting.append(part.content)
            continue
        yield part._replace(content="".join([*waiting, part.content[:cut]]))
        waiting = [part.content[cut:]]


def _batches(parts: Iterable[_Part], limit: int) -> Iterator[list[_Part]]:
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part.content)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
