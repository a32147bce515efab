# A device owner's node on an NVIDIA GPU; the host needs the NVIDIA container toolkit. Build from the root of the repository:
#   docker build -f deploy/docker/node-cuda.Dockerfile -t fedtune-node-cuda .
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY . .
# The wheel of torch for CUDA brings CUDA's libraries along; only the driver comes from the host.
RUN python -m venv /opt/fedtune \
 && /opt/fedtune/bin/pip install --no-cache-dir --constraint constraints.txt torch==2.13.0 \
 && /opt/fedtune/bin/pip install --no-cache-dir --constraint constraints.txt ".[cpu,gpu,lora]"

FROM python:3.11-slim-bookworm
# Triton compiles its launchers with the system's C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --home-dir /var/lib/fedtune fedtune
COPY --from=build /opt/fedtune /opt/fedtune
COPY --chmod=755 deploy/docker/node-entry.sh /usr/local/bin/
ENV PATH=/opt/fedtune/bin:$PATH \
    FEDTUNE_DATA=/data \
    FEDTUNE_DEVICE=cuda \
    FEDTUNE_HOME=/var/lib/fedtune \
    FEDTUNE_LOG=json \
    FEDTUNE_TOKEN_FILE=/run/secrets/fedtune-token \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false \
    TRITON_CACHE_DIR=/var/lib/fedtune/triton
USER 10001
WORKDIR /var/lib/fedtune
VOLUME /var/lib/fedtune
ENTRYPOINT ["tini", "--", "node-entry.sh"]
