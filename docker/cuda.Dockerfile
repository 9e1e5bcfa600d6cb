# docker build -f docker/cuda.Dockerfile -t cero_jax:cuda . && docker run --rm --gpus all -v "$PWD/runs:/runs" cero_jax:cuda
# CUDA's libraries come with jax; the host needs NVIDIA's driver and container toolkit.
FROM python:3.12-slim

WORKDIR /cero_jax
COPY pyproject.toml README.md LICENSE ./
COPY cero_jax cero_jax
RUN pip install --no-cache-dir '.[train]' 'jax[cuda12]>=0.10'
COPY train.py ./
COPY configs configs
COPY examples examples

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# No shell between: SIGTERM reaches the run, which saves and stops.
ENTRYPOINT ["python", "train.py"]
CMD ["configs/chain_sum.py", "--work-dir=/runs/chain_sum"]
