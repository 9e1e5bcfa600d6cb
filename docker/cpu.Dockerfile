# docker build -f docker/cpu.Dockerfile -t cero_jax:cpu . && docker run --rm -v "$PWD/runs:/runs" cero_jax:cpu
FROM python:3.12-slim

WORKDIR /cero_jax
COPY pyproject.toml README.md LICENSE ./
COPY cero_jax cero_jax
RUN pip install --no-cache-dir '.[train]'
COPY train.py ./
COPY configs configs
COPY examples examples

# No shell between: SIGTERM reaches the run, which saves and stops.
ENTRYPOINT ["python", "train.py"]
CMD ["configs/chain_sum.py", "--work-dir=/runs/chain_sum"]
