"""Package metadata of gdn2-jax (build system and tool settings: pyproject.toml)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "absl-py",
    "chex",
    "grain",
    "matplotlib",
    "optax",
    "orbax-checkpoint",
    "pyarrow",
    "scipy",
    "tensorboardX",
    "tokenizers",
    "tqdm",
    "tyro",
]
INTEROP = ["flatbuffers", "safetensors"]
TEST = [
    *INTEROP,
    "beartype",
    "chex",
    "einops",
    "hypothesis",
    "pyright[nodejs]",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "sentencepiece",
]

INIT = (Path(__file__).parent / "gdn2_jax" / "__init__.py").read_text(encoding="utf-8")

setup(
    name="gdn2-jax",
    version=re.search(r'__version__ = "(.+)"', INIT)[1],
    description="Gated DeltaNet-2 in JAX: operator, Flax layers, training and decoding",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    # gdn2_jax/pallas is a link to pallas/, so that the kernels are installed as gdn2_jax.pallas.
    packages=find_packages(include=["gdn2_jax", "gdn2_jax.*"]),
    package_data={"gdn2_jax": ["py.typed"]},
    install_requires=["jax>=0.11,<0.13", "flax", "jaxtyping"],
    extras_require={
        "train": TRAIN,
        "interop": INTEROP,
        "test": TEST,
        "corpus": ["resiliparse"],
        "eval": ["lm-eval>=0.4.13", "wonderwords"],
        "docs": ["mkdocs-material", "mkdocstrings[python]", "ruff"],
        "cuda": ["jax[cuda13]>=0.11,<0.13"],
        # implementation="triton": jax-triton 0.3.1 goes with triton 3.6, by which the kernels are tested and measured on
        # GPUs; 0.4.1, the newest, with 3.7 to 3.9: all programs are lowered by 0.4.1 and 3.9, no GPU has run them.
        "triton": ["jax-triton>=0.3.1", "triton>=3.6"],
        "peers": [
            "torch",
            "triton",
            "fla-core",
            "flash-linear-attention",
            "nvidia-cudnn-frontend",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.12",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
