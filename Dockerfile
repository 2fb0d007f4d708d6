# Two images from one file: `docker build --target gateway .` has no torch, `--target worker .` has torch and the weights.
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 darkroom && install -d -o darkroom /var/lib/darkroom/store
WORKDIR /app
COPY constraints.txt ./

FROM base AS gateway
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY contract contract
COPY broker broker
COPY service service
COPY cli cli
RUN pip install -c constraints.txt .
USER darkroom
ENV DARKROOM_HOST=0.0.0.0 DARKROOM_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["darkroom", "gateway"]

FROM base AS worker
# torch in a layer of its own: it is large and changes rarely.
RUN pip install -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY contract contract
COPY broker broker
COPY models models
COPY worker worker
COPY cli cli
RUN pip install -c constraints.txt '.[worker]'
COPY weights weights
USER darkroom
ENV DARKROOM_MODEL_DIR=/app/weights
CMD ["darkroom", "worker"]
