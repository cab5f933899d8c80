# GPU machines: the trainer in /opt/tercet, SGLang's servers in /opt/sglang, which pins another
# PyTorch. It is linted (hadolint) and has not been built.
#
#   docker build -t tercet .
#   docker run --gpus all --shm-size 16g -v "$PWD":/work -w /work tercet \
#       torchrun --nproc-per-node 4 /opt/src/train/tapo.py --rollout.sglang_python /opt/sglang/bin/python ...
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

ARG SGLANG_VERSION=0.5.23
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Triton launches kernels through a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential git libnuma1 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/sglang \
    && /opt/sglang/bin/pip install "sglang==${SGLANG_VERSION}"

WORKDIR /opt/src
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY core core
COPY kernels kernels
COPY rollout rollout
COPY train train
COPY bench bench
# PyTorch for CUDA brings its own Triton. flash-attn is built from source against both.
RUN python3 -m venv /opt/tercet \
    && grep -v '^triton=' constraints.txt > gpu.txt \
    && /opt/tercet/bin/pip install -e . -c gpu.txt \
    && /opt/tercet/bin/pip install "setuptools>=77" wheel "liger-kernel>=0.6" -c gpu.txt \
    && MAX_JOBS=4 /opt/tercet/bin/pip install --no-build-isolation "flash-attn>=2.8"

ENV PATH=/opt/tercet/bin:${PATH}
# Nobody needs to be root to train; docker's --user makes files your own.
RUN useradd --create-home --uid 1001 trainer
USER 1001
CMD ["python", "-m", "tercet.train.doctor"]
