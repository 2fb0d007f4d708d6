# Two images from one file: `docker build --target gateway .` has no torch, `--target worker .` has torch and the weights.
# docs/operations.md tells how to run them. Both run without root, and with a read-only root file system.
# Behind a mirror of PyPI add `--secret id=pip,src=pip.conf`: pip reads the file, and no layer keeps it.

# Another name for the same image, where Docker Hub is reached through a mirror.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE:-python:3.11.17-slim-bookworm} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    HOME=/tmp
RUN groupadd --gid 10001 darkroom \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp darkroom \
    && install -d -o darkroom -g darkroom /var/lib/darkroom/store /models
WORKDIR /app
STOPSIGNAL SIGTERM
ENTRYPOINT ["darkroom"]

# What is needed, told apart from our own code: a change of code leaves the large layers as they are.
FROM base AS build
COPY . ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --constraint constraints.txt hatchling \
    && pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && python deploy/requirements.py pyproject.toml requirements

FROM base AS gateway
COPY --from=build /app/constraints.txt /app/requirements/gateway.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --constraint constraints.txt --requirement gateway.txt
COPY --from=build /app/dist dist
RUN pip install --no-deps --no-index dist/*.whl
USER 10001:10001
ENV DARKROOM_HOST=0.0.0.0 DARKROOM_PORT=8000 DARKROOM_STORE_URL=file:/var/lib/darkroom/store
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"DARKROOM_PORT\"]}/healthz', timeout=4)"]
CMD ["gateway"]

FROM base AS worker
# Index of torch's CPU wheels, or of those for one version of CUDA. Without it pip takes the build of the usual index.
# It stays readable in the image's history: an index that wants a password goes into the secret instead.
ARG TORCH_INDEX_URL
COPY --from=build /app/constraints.txt /app/requirements/torch.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} \
    --requirement torch.txt
COPY --from=build /app/requirements/worker.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --constraint constraints.txt --requirement worker.txt
COPY --chown=10001:10001 weights/darkroom-small /models/darkroom-small
COPY --chown=10001:10001 weights/darkroom-small-x4 /models/darkroom-small-x4
COPY --from=build /app/dist dist
RUN pip install --no-deps --no-index dist/*.whl
USER 10001:10001
ENV DARKROOM_HOST=0.0.0.0 DARKROOM_WORKER_METRICS_PORT=9100 DARKROOM_MODEL_DIR=/models \
    DARKROOM_STORE_URL=file:/var/lib/darkroom/store
EXPOSE 9100
# Not well until its models are loaded, and no longer once its main loop has stopped turning.
HEALTHCHECK --interval=15s --timeout=10s --start-period=5m \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"DARKROOM_WORKER_METRICS_PORT\"]}/healthz', timeout=9)"]
CMD ["worker"]
