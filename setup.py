"""trillama: the Triton kernels of a Llama, each beside its PyTorch reference, and a thin model that runs on either.

`trillama` is a namespace of three packages whose folders stand at the top of the repository. They are mapped one by one:
installed under its own name, the folder `kernels` would overwrite Hugging Face's package of that name.
"""

from pathlib import Path

from setuptools import setup

TRANSFORMERS = "transformers>=4.57,<6"
PEERS = ["liger-kernel>=0.8; platform_system == 'Linux'"]
PLOT = ["matplotlib>=3.7"]
META = ["sentencepiece>=0.2"]
TEST = ["pytest>=8", "pytest-benchmark>=5", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "ruff>=0.8", "tiktoken>=0.7"]
TEST += [TRANSFORMERS, "accelerate>=1.0", *PLOT, *META]

setup(
    name="trillama",
    version="0.1.0",
    author="The trillama authors",
    description="Triton kernels for Llama-style language models, each with a PyTorch reference, and a thin model on top",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords="triton, llama, kernels, flash-attention, rmsnorm, rope, swiglu, decoding, kv-cache, quantization, transformers",
    python_requires=">=3.10",
    packages=["trillama.kernels", "trillama.kernels.compat", "trillama.model", "trillama.bench", "trillama.bench.hardware"],
    package_dir={
        "trillama.kernels": "kernels",
        "trillama.kernels.compat": "kernels/compat",
        "trillama.model": "model",
        "trillama.bench": "bench",
        "trillama.bench.hardware": "bench/hardware",
    },
    package_data={package: ["py.typed"] for package in ("trillama.kernels", "trillama.model", "trillama.bench")},
    install_requires=[
        "torch>=2.6",
        # Only where Triton has wheels: everywhere else the reference path runs without it.
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        # Compiles the decode step for CPUs; without it that runs in PyTorch alone.
        "numba>=0.61; platform_python_implementation == 'CPython'",
        "numpy>=1.26",
        "safetensors>=0.4.5",
        "tokenizers>=0.20",
        "gguf>=0.10",
        "jinja2>=3.1",
        "huggingface_hub>=0.25",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": TEST,
        "bench": ["pytest>=8", "pytest-benchmark>=5", TRANSFORMERS, *PLOT],
        "plot": PLOT,
        "meta": META,
        "transformers": [TRANSFORMERS],
        "peers": PEERS,
    },
    entry_points={"console_scripts": ["trillama = trillama.model.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
