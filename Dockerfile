# syntax=docker/dockerfile:1
# tokenmill for CPUs. Weights are mounted, not baked in; the small bundled model needs none.
#
#   docker build -t tokenmill:cpu .
#   docker run --rm -p 8000:8000 tokenmill:cpu
#   docker run --rm -p 8000:8000 -v "$PWD/my-model:/models/my-model:ro" tokenmill:cpu --model /models/my-model

FROM rust:1.95-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# onig, the tokenizers' regular expressions, and ring are C.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked \
    && install -D target/release/tokenmill /out/tokenmill

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="tokenmill" \
      org.opencontainers.image.description="Serves large language models over the OpenAI API, on CPUs" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
# Certificates for downloads from the hub.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin tokenmill \
    && install -d -o tokenmill -g tokenmill /models
COPY --from=build /out/tokenmill /usr/local/bin/tokenmill
COPY scripts/healthcheck.sh /usr/local/bin/tokenmill-healthcheck
USER 10001:10001
ENV HF_HOME=/models/hub
VOLUME ["/models"]
EXPOSE 8000
# Large models take a while to load; until then the port is taken but not answered.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["/usr/local/bin/tokenmill-healthcheck"]
# SIGTERM lets running requests finish (--shutdown-timeout).
STOPSIGNAL SIGTERM
ENTRYPOINT ["tokenmill", "serve", "--host", "0.0.0.0"]
