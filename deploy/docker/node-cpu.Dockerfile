# A device owner's node on a CPU. Build from the root of the repository:
#   docker build -f deploy/docker/node-cpu.Dockerfile -t fedtune-node .
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/fedtune \
 && /opt/fedtune/bin/pip install --no-cache-dir --constraint constraints.txt \
      --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu \
 && /opt/fedtune/bin/pip install --no-cache-dir --constraint constraints.txt ".[cpu,lora]"

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --home-dir /var/lib/fedtune fedtune
COPY --from=build /opt/fedtune /opt/fedtune
COPY --chmod=755 deploy/docker/node-entry.sh /usr/local/bin/
ENV PATH=/opt/fedtune/bin:$PATH \
    FEDTUNE_DATA=/data \
    FEDTUNE_HOME=/var/lib/fedtune \
    FEDTUNE_LOG=json \
    FEDTUNE_TOKEN_FILE=/run/secrets/fedtune-token \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false
USER 10001
WORKDIR /var/lib/fedtune
VOLUME /var/lib/fedtune
ENTRYPOINT ["tini", "--", "node-entry.sh"]
