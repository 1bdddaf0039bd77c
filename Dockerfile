# The kit in an image. The notebooks are then at the address that the last command prints:
#   docker build --tag kafka-spark-keras .
#   docker run --rm --publish 127.0.0.1:8888:8888 kafka-spark-keras
FROM debian:trixie-slim AS system
# The release of Debian fixes the versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates git make openjdk-21-jre-headless python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash reader \
    && install --directory --owner reader --group reader /opt/kit

# Not in the home folder, over which a JupyterHub mounts a volume.
FROM system
WORKDIR /opt/kit
COPY --chown=1000:1000 . .
USER 1000
RUN ./setup.sh && rm -rf "$HOME/.cache/uv"
ENV PATH="/opt/kit/.venv/bin:$PATH"
EXPOSE 8888
CMD ["jupyter", "lab", "--LabApp.default_url=/lab/tree/notebooks", "--ip=0.0.0.0", "--no-browser"]
