# The trainer: reads the log, writes releases; the only image with torch.
#   docker build -f docker/trainer.Dockerfile -t afterclick-trainer .

FROM python:3.12.12-slim-bookworm AS build
RUN python -m venv /opt/afterclick
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY serving ./serving
COPY streams ./streams
COPY training ./training
RUN /opt/afterclick/bin/pip install --no-cache-dir ".[train]"

FROM python:3.12.12-slim-bookworm
# The same user id as the worker's: both images mount the releases.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/afterclick afterclick \
 && install -d -o afterclick -g afterclick /var/lib/afterclick /var/lib/afterclick/releases /var/cache/afterclick
COPY --from=build /opt/afterclick /opt/afterclick
# matplotlib keeps a cache of fonts, and the file system is read-only.
ENV PATH=/opt/afterclick/bin:$PATH PYTHONUNBUFFERED=1 NUMBA_CACHE_DIR=/var/cache/afterclick MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /var/lib/afterclick
USER 10001:10001
# The blend's loops are machine code, compiled for this machine's CPU; a container on another one does
# it once more, at its start. A volume, because the file system may be read-only.
RUN python -c "from afterclick.serving.blend import compile_loops; compile_loops()"
VOLUME /var/cache/afterclick
ENTRYPOINT ["afterclick"]
CMD ["schedule", "--every", "1h", "--topic"]
