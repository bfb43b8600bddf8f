"""Packaging of recexplore; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

_HERE = Path(__file__).parent
_VERSION = {}
exec((_HERE / "recexplore" / "__init__.py").read_text(), _VERSION)
_GIN_FOLDERS = ["", *sorted(p.name for p in (_HERE / "gin_configs").iterdir() if p.is_dir())]
_GIN_PACKAGES = [".".join(["recexplore.gin_configs", name]).rstrip(".") for name in _GIN_FOLDERS]

_SERVE = [
    "fastapi>=0.115",
    "prometheus-client>=0.21",
    "pydantic>=2.10",
    "uvicorn[standard]>=0.34",
]
_TEST = [
    *_SERVE,
    "beartype>=0.21",
    "build>=1.2",
    "chex>=0.1.90",
    "httpx>=0.27",
    "hypothesis>=6.100",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "redis>=5.0",
    "ruff>=0.12",
    "scipy>=1.13",
    "selenium>=4.20",
    "setuptools>=75",
]

_GIT = "git+https://github.com"
_T5X = [  # the first three are on no registry
    f"t5x @ {_GIT}/google-research/t5x@cc342d4",
    f"airio @ {_GIT}/google/airio",
    f"jestimator @ {_GIT}/google-research/jestimator",
    "cached-property>=2.0",
    "fiddle>=0.3",
    "grain>=0.2.12",
]

setup(
    name="recexplore",
    version=_VERSION["__version__"],
    description="LLM-powered exploration for recommender systems, trained and served with JAX",
    long_description=(_HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["recexplore", "recexplore.*"]), *_GIN_PACKAGES],
    package_dir={"recexplore": "recexplore", "recexplore.gin_configs": "gin_configs"},
    package_data={
        "recexplore.serving": ["*.html"],
        "recexplore.simulation": ["*.json"],
        **{package: ["*.gin"] for package in _GIN_PACKAGES},
    },
    install_requires=[
        "clu>=0.0.12",
        "etils[epath]>=1.9",
        "flax>=0.12.8",
        "gin-config>=0.5.0",
        "ibis-framework[duckdb]>=12.0",
        "jax>=0.10.2",
        "jaxtyping>=0.3.0",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyarrow>=20.0",
        "rich>=13.7",
        "safetensors>=0.8",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "sentencepiece>=0.2.0",
        "seqio>=0.0.20",
        "sqlglot<29",  # ibis 12 can't drop a table with later ones
        "tensorboard>=2.19",  # clu writes through it but doesn't ask for it
        "tensorflow>=2.21",
        "tensorflow-datasets>=4.9.10",
        "tensorflow-text>=2.21.1",
        "tokenizers>=0.21",
    ],
    extras_require={
        "test": _TEST,
        "bench": ["torch>=2.6", "transformers>=5.0"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "gpu": ["jax[cuda12]>=0.10.2"],
        "redis": ["redis>=5.0"],
        "serve": _SERVE,
        "t5x": _T5X,
    },
    entry_points={"console_scripts": ["recexplore=recexplore.cli:main"]},
)
