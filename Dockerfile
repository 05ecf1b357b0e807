# kvbench on a host with NVIDIA GPUs and their container toolkit. Versions stand in constraints.txt alone; torch comes
# from the package index with the CUDA libraries it was built for, so no CUDA image is needed.
#
#   docker build -t kvbench .
#   docker run --gpus all -v "$PWD/runs:/bench/runs" -v kvbench:/cache kvbench task=passkey arms=all
FROM python:3.11-slim

# Triton compiles its launchers when a kernel is first used.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY hydra_plugins hydra_plugins
COPY kvbench kvbench
COPY results/reference results/reference
RUN pip install --no-cache-dir --constraint constraints.txt .

# Weights, data and compiled kernels outlive the container in one volume.
ENV KVBENCH_CACHE=/cache/kvbench HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton
WORKDIR /bench
ENTRYPOINT ["python", "-m", "kvbench"]
