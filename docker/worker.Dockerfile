# The stream worker, the read API and every verb that needs no training; without torch, which the build checks.
#   docker build -f docker/worker.Dockerfile -t afterclick-worker .
# On a machine with an NVIDIA GPU add --build-arg EXTRA=gpu and run with --gpus all.

FROM python:3.12.12-slim-bookworm AS build
ARG EXTRA=worker
RUN python -m venv /opt/afterclick
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY serving ./serving
COPY streams ./streams
COPY training ./training
RUN /opt/afterclick/bin/pip install --no-cache-dir ".[${EXTRA},api]"
RUN ! /opt/afterclick/bin/python -c "import torch"

FROM python:3.12.12-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/afterclick afterclick \
 && install -d -o afterclick -g afterclick /var/lib/afterclick /var/lib/afterclick/releases /var/cache/afterclick
COPY --from=build /opt/afterclick /opt/afterclick
ENV PATH=/opt/afterclick/bin:$PATH PYTHONUNBUFFERED=1 NUMBA_CACHE_DIR=/var/cache/afterclick
WORKDIR /var/lib/afterclick
USER 10001:10001
# The blend's loops are machine code, compiled for this machine's CPU; a container on another one does
# it once more, at its start. A volume, because the file system may be read-only.
RUN python -c "from afterclick.serving.blend import compile_loops; compile_loops()"
VOLUME /var/cache/afterclick
EXPOSE 6066 8080
ENTRYPOINT ["afterclick"]
CMD ["worker"]
