"""Builds a corpus of English prose and technical text out of documentation packages.

    pip install '.[train,corpus]'
    python experiments/build_corpus.py corpus                      # about 300 MB of text, half an hour on two cores
    python experiments/build_corpus.py corpus --vocab-size 16384   # and token ids, compressed to carry
    python experiments/build_corpus.py corpus --unpack             # where they were carried to

The packages below come from Debian's and Python's registries, at the versions that stand there; apt-get (after
`apt-get update`), dpkg-deb, pod2text (of Perl) and pip must be there. The directory gets packages/, documents.jsonl
(a document a line, with its package), licences.md and, with --vocab-size, tokenizer.json, facts.json, train-N.npy
and validation-0.npy (token ids, each document closed by its end token), and these as .xz. What is there is not
made again. Nothing runs this script by itself, and nothing of what it makes belongs in a repository.

resiliparse strips the markup, keeps the main part of each page and tells the language. A document that is not
English, or is mostly sentences of documents before, is left out.
"""

import argparse
import gzip
import hashlib
import html
import json
import lzma
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pool
from pathlib import Path

from gdn2_jax.command import run_command

import numpy as np
from tqdm import tqdm

from gdn2_jax.files import replacing

DEBIAN = """
anarchism=15.3-3 debian-handbook=11.20220922 debian-policy=4.6.2.0 debian-reference-en=2.100
developers-reference=12.18 dict-gcide=0.48.5+nmu2 gnome-user-docs=43.0-2 gnucash-docs=4.13-1
harden-doc=3.19+nmu1 linux-doc-6.12=6.12.117-1~deb12u1 mh-book=200605-2.2
python3.11-doc=3.11.2-6+deb12u9 ada-reference-manual-2012=1:2020.1commit85143dcb-4
ant-doc=1.10.13-1 apache2-doc=2.4.71-1~deb12u1 aptitude-doc-en=0.8.13-5 bash-doc=5.2.15-2
bind9-doc=1:9.18.49-1~deb12u3 buildbot-doc=3.7.0-2 cargo-doc=0.66.0+ds1-1
cinder-doc=2:21.3.1-1~deb12u1 clisp-doc=1:2.49.20210628.gitde01f0f-3 cmake-doc=3.25.1-1
cppreference-doc-en-html=20170409-2 csound-doc=1:6.18.0+dfsg0-1 db5.3-doc=5.3.28+dfsg2-1
dblatex-doc=0.3.12py3-2 debian-faq=11.1 derby-doc=10.14.2.0-2 designate-doc=1:15.0.2-0+deb11u1
dict-devil=1.0-13.1 dict-foldoc=20230119-1 dict-jargon=4.4.7-3.1 dict-wn=1:3.0-37
docbook-xsl-doc-html=1.79.1-1 docutils-doc=0.19+dfsg-6 dpdk-doc=22.11.11-0+deb12u1
erlang-doc=1:25.2.3+dfsg-1+deb12u4 exim4-doc-html=4.96-1 freedombox-doc-en=23.6.2+deb12u2
gap-doc=4.12.1-2 gimp-help-en=2.10.34-2 git-doc=1:2.39.5-0+deb12u3 glance-doc=2:25.1.0-2+deb12u5
gnome-devel-docs=40.3-1 gnuplot-doc=5.4.4+dfsg1-2 grass-doc=8.2.1-1
groonga-doc=13.0.0+dfsg-3~deb12u1 haproxy-doc=2.6.12-1+deb12u4 heat-doc=1:19.0.0-3
imagemagick-6-doc=8:6.9.11.60+dfsg-1.6+deb12u15 installation-guide-amd64=20230508+deb12u1
ironic-doc=1:21.4.4-0+deb12u2 keystone-doc=2:22.0.2-0+deb12u6 kicad-doc-en=6.0.11+dfsg-1
libboost1.81-doc=1.81.0-5+deb12u1 libreoffice-help-en-us=4:7.4.7-1+deb12u14
libvirt-doc=9.0.0-4+deb12u2 lilypond-doc-html=2.24.1-2 llvm-19-doc=1:19.1.7-3~deb12u1
maint-guide=1.2.53 manila-doc=1:15.1.0-2 maxima-doc=5.46.0-11 mit-scheme-doc=12.1-3
neutron-doc=2:21.0.0-7+deb12u1 nova-doc=2:26.2.2-1~deb12u5 ns3-doc=3.37-2
ntpsec-doc=1.2.2+dfsg1-1+deb12u1 octave-doc=7.3.0-2 octavia-doc=11.0.0-2+deb12u1
openvswitch-doc=3.1.0-2+deb12u1 perl-doc=5.36.0-7+deb12u4 postfix-doc=3.7.11-0+deb12u1
postgresql-doc-15=15.20-0+deb12u1 python-ase-doc=3.22.1-3+deb12u1
python-astropy-doc=5.2.1-2+deb12u1 python-celery-doc=5.2.6-5
python-cryptography-doc=38.0.4-3+deb12u1 python-dask-doc=2022.12.1+dfsg-2
python-django-doc=3:3.2.25-0+deb12u7 python-h5py-doc=3.7.0-8 python-ipython-doc=8.5.0-4
python-openstacksdk-doc=0.101.0-2 python-pandas-doc=1.5.3+dfsg-2
python-pymatgen-doc=2022.11.7+dfsg1-11+deb12u2 python-qutip-doc=4.7.1-2 python-scipy-doc=1.10.1-2
python-skimage-doc=0.19.3-8 python-sklearn-doc=1.2.1+dfsg-1 python-sqlalchemy-doc=1.4.46+ds1-1
python-statsmodels-doc=0.13.5+dfsg-7 python-sympy-doc=1.11.1-1 python-tables-doc=3.7.0-5
python-tornado-doc=6.2.0-3+deb12u4 python-xarray-doc=2023.01.0-1.1
qtbase5-doc-html=5.15.8+dfsg-11+deb12u3 qtdeclarative5-doc-html=5.15.8+dfsg-3
r-doc-html=4.2.2.20221110-2 racket-doc=8.7+dfsg1-1 rsyslog-doc=8.2302.0+dfsg-1
rust-doc=1.63.0+dfsg1-2 sbcl-doc=2:2.2.9-1 shorewall-doc=5.2.8-2 slurm-wlm-doc=22.05.8-4+deb12u3
sphinx-doc=5.3.0-4 sqlite3-doc=3.40.1-2+deb12u2 swi-prolog-doc=9.0.4+dfsg-2
swift-doc=2.30.1-0+deb12u3 tcl8.6-doc=8.6.13+dfsg-2 tk8.6-doc=8.6.13-2
twisted-doc=22.4.0-4+deb12u1 varnish-doc=7.1.1-2+deb12u1 vim-doc=2:9.0.1378-2+deb12u2
xen-doc=4.17.7+13-g2445b30a44-0+deb12u1 zsh-doc=5.9-4
"""
PYTHON = ("botocore==1.44.8",)

# Characters of one package at most, so that none makes up most of the corpus, and bytes read for it.
MOST, MOST_READ = 16_000_000, 100_000_000

# Characters of the shortest document, and of sentences and lines that tell a document.
SHORTEST, TELLING = 400, 40

# Token ids of a file, about 40 MiB when compressed.
PART = 2**25

# Documents' sources, not documentation, indices, and pages for machines.
_LEFT_OUT = re.compile(
    r"/(_sources|_modules|_static|markdown|changelog[^/]*|NEWS[^/]*|genindex[^/]*|search|py-modindex|copyright|"
    r"robots|index-[a-z]|doxygen|javadoc|api-docs|inherits?|members|searchindex)(\.[a-z.]+|/|$)|"
    r"/(src|hoogle|implementors)/|-members\.html|/(functions|globals|namespacemembers)_[^/]*\.html"
)
_SUFFIXES = re.compile(r"\.(html?|xhtml|page|txt|rst|md|adoc|pod|dict\.dz)(\.gz)?$")


def main(arguments: list[str]) -> int | str | None:
    """Does the parts that are not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer; none: no token ids")
    parser.add_argument("--validation-fraction", type=float, default=0.02)
    parser.add_argument("--unpack", action="store_true", help="the .xz files, and do no more")
    options = parser.parse_args(arguments)
    directory = options.directory.absolute()
    if options.unpack:
        unpack(directory)
        return None
    documents = directory / "documents.jsonl"
    if not documents.exists():
        build(directory, download(directory / "packages"))
    digest = hashlib.sha256()
    with documents.open("rb") as file:
        for line in file:
            digest.update(line)
    print(f"{documents}: {documents.stat().st_size:,} bytes, SHA-256 {digest.hexdigest()}")
    if options.vocab_size:
        tokenize(directory, options.vocab_size, options.validation_fraction, digest.hexdigest())
    return None


def download(directory: Path) -> list[Path]:
    """Fetches the packages that are not there; returns their archives in the order of the lists."""
    directory.mkdir(parents=True, exist_ok=True)
    archives = []
    for package in tqdm(DEBIAN.split(), "download"):
        name, version = package.split("=", 1)
        pattern = f"{name}_{version.replace(':', '%3a')}_*.deb"
        if not list(directory.glob(pattern)):
            fetch(["apt-get", "download", "-qq", package], directory, "apt-get update")
        archives += directory.glob(pattern)
    for package in PYTHON:
        name, version = package.split("==")
        pattern = f"{name}-{version}-*.whl"
        if not list(directory.glob(pattern)):
            fetch([sys.executable, "-m", "pip", "download", "-q", "--no-deps", package], directory)
        archives += directory.glob(pattern)
    return archives


def fetch(command: list[str], directory: Path, first: str = "") -> None:
    """Downloads a package into a directory."""
    if code := subprocess.run(command, check=False, cwd=directory).returncode:
        known = f"; `{first}` tells this machine of the packages that there are" if first else ""
        raise SystemExit(
            f"{' '.join(command)}: expected the package, got exit status {code}{known}"
        )


def build(directory: Path, archives: list[Path]) -> None:
    """Writes documents.jsonl and licences.md."""
    seen_texts, seen_sentences, licences = set(), set(), []
    unfinished = directory / "documents.part"
    with unfinished.open("w") as file, Pool() as pool:
        for archive in archives:
            package = archive.name.split("_")[0].partition("-py3")[0]
            folder = directory / "unpacked"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            texts = pool.imap(read, extract(archive, folder), chunksize=8)
            licences.append(f"## {archive.stem}\n\n{licence(folder, package)}\n")
            kept = size = 0
            for text in without_common_lines([text for text in texts if text]):
                if size < MOST and is_new(text, seen_texts, seen_sentences):
                    file.write(json.dumps({"text": text, "source": package}) + "\n")
                    kept, size = kept + 1, size + len(text)
            print(f"{package}: {kept:,} documents, {size:,} characters", flush=True)
            shutil.rmtree(folder)
    (directory / "licences.md").write_text("\n".join(licences))
    unfinished.rename(directory / "documents.jsonl")


def extract(archive: Path, folder: Path) -> list[Path]:
    """Unpacks an archive; returns the files that may hold documents, in order."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        return sorted(folder.rglob("service-2.json*"))
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    chosen, size = [], 0
    # Of a large package a part that does not depend on the order of its chapters.
    for path in sorted(files, key=lambda path: hashlib.blake2b(path.name.encode()).digest()):
        name = str(path.relative_to(folder))
        if _SUFFIXES.search(name) and not _LEFT_OUT.search("/" + name) and size < MOST_READ:
            chosen.append(path)
            size += path.stat().st_size
    return sorted(chosen)


def licence(folder: Path, package: str) -> str:
    """What the package says of its licences: the short names, or where the text is."""
    files = sorted([*folder.rglob("copyright"), *folder.rglob("METADATA")])
    if not files:
        return "stated in the package that it depends on"
    text = files[0].read_text(errors="replace")
    names = re.findall(r"^(?:License|License-Expression): *(\S.*)$", text, re.MULTILINE)
    names = list(dict.fromkeys(names)) or re.findall(
        r"/usr/share/common-licenses/(\S+?)[\s'.,)]", text
    )
    return ", ".join(dict.fromkeys(names)) or text.strip()[:600]


def read(path: Path) -> str | None:
    """The text of a file without markup; None if it is not an English document."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.lang import detect_fast

    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix in (".gz", ".dz") else raw
        kind = _SUFFIXES.search(path.name)
        kind = kind[1] if kind else "json"
        text = raw.decode(errors="strict" if kind != "html" else "replace")
    except (OSError, EOFError, UnicodeDecodeError, ValueError):
        return None
    if len(text) > 20_000_000 and kind != "dict.dz":
        return None
    if kind in ("html", "htm", "xhtml"):
        text = extract_plain_text(text, main_content=True, alt_texts=False, form_fields=False)
    elif kind == "page":
        text = extract_plain_text(text, main_content=False)
    elif kind == "json":
        text = "\n\n".join(map(extract_plain_text, _strings(json.loads(text))))
    elif kind == "pod":
        done = subprocess.run(["pod2text", path], capture_output=True, check=False)
        text = done.stdout.decode(errors="replace")
    text = re.sub(r"[ \t\r]+\n", "\n", html.unescape(text).replace("\x00", ""))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    letters = sum(map(str.isalpha, text[:20_000]))
    if len(text) < SHORTEST or letters < 0.55 * len(text[:20_000]):
        return None
    language, _ = detect_fast(text[:20_000], cutoff=10_000)
    return text + "\n" if language == "en" else None


def _strings(tree) -> Iterator[str]:
    """What stands under "documentation" in a description of a service."""
    if isinstance(tree, list):
        for value in tree:
            yield from _strings(value)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _strings(value)


def without_common_lines(texts: list[str]) -> Iterator[str]:
    """Leaves out lines that stand in many documents of a package, such as headers and footers."""
    often = max(8, len(texts) // 20)
    counts = Counter(line for text in texts for line in set(text.splitlines()) if line)
    for text in texts:
        # A short line may be a part of every example: only longer lines are footers.
        lines = [line for line in text.splitlines() if len(line) < TELLING or counts[line] <= often]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
        # A dictionary or a manual in one file is cut, so that a document is a part of the corpus.
        start = 0
        while len(text) - start > 400_000:
            paragraph = text.find("\n\n", start + 100_000, start + 400_000)
            line = text.find("\n", start + 100_000, start + 400_000)
            stop = max(paragraph + 2, line + 1, start + 100_000)
            yield text[start:stop]
            start = stop
        yield text[start:]


def is_new(text: str, seen_texts: set[bytes], seen_sentences: set[int]) -> bool:
    """Whether a document is neither a copy of one before nor mostly made of their sentences."""
    digest = hashlib.blake2b(re.sub(r"\W+", " ", text).lower().encode(), digest_size=8).digest()
    if len(text) < SHORTEST or digest in seen_texts:
        return False
    seen_texts.add(digest)
    # Whatever the width of the lines.
    sentences = {" ".join(part.split()) for part in re.split(r"(?<=[.!?:;])\s|\n\s*\n", text)}
    numbers = {
        int.from_bytes(hashlib.blake2b(sentence.encode(), digest_size=8).digest()): len(sentence)
        for sentence in sentences
        if len(sentence) >= TELLING
    }
    total = sum(numbers.values())
    known = sum(size for number, size in numbers.items() if number in seen_sentences)
    seen_sentences.update(numbers)
    return total >= SHORTEST / 2 and known < 0.5 * total


def tokenize(directory: Path, vocab_size: int, fraction: float, digest: str) -> None:
    """Writes tokenizer, token ids and facts; prints what there is to carry."""
    from gdn2_jax.data import DataConfig, prepare

    corpus = prepare(
        DataConfig(
            paths=(str(directory / "documents.jsonl"),),
            tokenizer=f"train:{vocab_size}",
            validation_fraction=fraction,
            cache_directory=str(directory / "cache"),
            sequence_length=1024,
        )
    )
    corpus.tokenizer.save(directory / "tokenizer.json")
    facts = {"text_sha256": digest, "vocab_size": corpus.tokenizer.vocab_size}
    for name in ("train", "validation"):
        store = getattr(corpus, name).store
        # Parts that can be carried one by one, each of whole documents.
        borders = store.offsets[np.searchsorted(store.offsets, range(0, store.num_tokens, PART))]
        for number, tokens in enumerate(np.split(store.tokens, borders[1:])):
            np.save(directory / f"{name}-{number}.npy", tokens)
        facts[name] = {
            "documents": store.num_documents,
            "tokens": store.num_tokens,
            "bytes": store.num_bytes,
            "sha256": hashlib.sha256(np.ascontiguousarray(store.tokens)).hexdigest(),
        }
    (directory / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))
    with ThreadPoolExecutor() as pool:
        for path in pool.map(compress, sorted(directory.glob("*.npy"))):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def compress(path: Path) -> Path:
    """Compresses token ids of 16 bits."""
    # Every other byte is similar. lp says so, which is not the default.
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**26, "lc": 0, "lp": 1, "pb": 1}
    ]
    compressed = path.with_name(path.name + ".xz")
    with path.open("rb") as file, lzma.open(compressed, "wb", filters=filters) as to:
        shutil.copyfileobj(file, to, 2**20)
    return compressed


def unpack(directory: Path) -> None:
    """Writes the .npy files from the .xz files, many at once."""

    def one(path: Path) -> None:
        new = replacing(path.with_suffix(""))
        with new as temporary, lzma.open(path) as file, temporary.open("wb") as to:
            shutil.copyfileobj(file, to, 2**20)

    packed = sorted(directory.glob("*.npy.xz"))
    if not packed:
        raise ValueError(f"{directory}: expected .npy.xz files, got none")
    with ThreadPoolExecutor() as pool:
        list(pool.map(one, packed))


if __name__ == "__main__":
    sys.exit(run_command("build_corpus.py", lambda: main(sys.argv[1:])))
