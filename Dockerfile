# rlhf-recipes in a container.
#
#   docker build -t rlhf-recipes .                           for a processor
#   docker build -t rlhf-recipes --build-arg TORCH_INDEX= .  for a card: PyPI's PyTorch has CUDA
#
#   docker run --rm -v runs:/runs -v cache:/cache -v "$PWD:/data" rlhf-recipes run smoke
#   docker run --rm --gpus all …                             on a card
#
# The user in it has the id 1000. A folder of the host that it writes to must belong to that id.
#
# The page of `label` listens at 127.0.0.1 of the container, where `-p` does not lead. Give the
# container the host's network, and open the address that `label` prints:
#
#   docker run --rm -it --network host -v runs:/runs -v "$PWD:/data" rlhf-recipes label feedback
#
# `python -m tools.try_dockerfile` checks these steps where there is no Docker.
FROM python:3.12-slim

# Triton compiles a launcher for a card with the machine's C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# PyTorch first: it is the largest layer, and changes least.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /source/
RUN pip install --no-cache-dir --constraint /source/constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch

COPY pyproject.toml README.md LICENSE /source/
COPY rlhf_recipes /source/rlhf_recipes
COPY recipes /source/recipes
COPY docs /source/docs
RUN pip install --no-cache-dir --constraint /source/constraints.txt /source

# /runs keeps the runs, /cache the models and data of the hub; rows of your own are read in /data.
RUN useradd --create-home --uid 1000 person \
    && mkdir /runs /cache /data \
    && chown person /runs /cache /data
USER person
ENV RLHF_RECIPES_RUNS=/runs HF_HOME=/cache
VOLUME /runs /cache
WORKDIR /data
ENTRYPOINT ["rlhf-recipes"]
CMD ["--help"]
