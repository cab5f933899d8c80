"""Tercet's packages: every room, imported as `tercet.<room>`."""

from setuptools import setup

ROOMS = [
    "core",
    "core/data",
    "core/families",
    "kernels",
    "rollout",
    "train",
    "train/learner",
    "train/fit",
    "train/evaluation",
    "train/demo",
    "bench",
]

setup(
    name="tercet",
    version="0.1.0",
    description="TAPO (Fine-R1) training of Qwen-VL models for fine-grained recognition",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.13",
    packages=[f"tercet.{room.replace('/', '.')}" for room in ROOMS],
    package_dir={f"tercet.{room.replace('/', '.')}": room for room in ROOMS},
    package_data={
        "tercet.train": ["recipes/*.yaml"],
        "tercet.train.evaluation": ["published.csv"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "peft>=0.18",
        "accelerate>=1.6",
        "tokenizers>=0.22",
        "sentencepiece>=0.2.1",
        "protobuf>=4.25",
        "numpy>=1.26",
        "safetensors>=0.8",
        "pillow>=10.3",
        "pyarrow>=17",
        "httpx>=0.27",
        "pydantic>=2.9",
        "jsonargparse[signatures]>=4.50",
        "pyyaml>=6.0",
        "rich>=14.3",
        "matplotlib>=3.9",
        "tensorboard>=2.17",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.8", "liger-kernel>=0.6"],
        "bench": ["liger-kernel>=0.6", "cut-cross-entropy>=25.1", "trl>=1.0", "prefix-grouper"],
        "dev": [
            "pytest>=8.3",
            "pytest-benchmark>=5.1",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "pre-commit>=4.0",
            "gguf>=0.17",
        ],
    },
)
