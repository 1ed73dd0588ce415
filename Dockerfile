# docker build --build-arg REVISION="$(git rev-parse HEAD)" --tag firstclaim .
#
# The image holds exactly what requirements.lock pins by hash. Only the venv is copied from the builder stage, so
# neither pip's cache nor the build backend is in the image. Nothing is written at run time: `--read-only` works.
#
# The base image: Python 3.13.15 on Debian 13. The digest is that of the index, for all architectures.
FROM python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1


FROM base AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_COMPILE=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# The build backend, in a venv of its own that stays in this stage.
RUN printf '%s\n' \
        'hatchling==1.33.0 --hash=sha256:415290b84f464d2884303fca8974d38e7b85579069fab02a15db0828fbb1446d' \
        'packaging==26.3 --hash=sha256:d7193f7c8e4e93f444fde0262bf90af30e16fa0ad0ad44cb553c87339b23cd1c' \
        'pathspec==1.1.1 --hash=sha256:a00ce642f577bf7f473932318056212bc4f8bfdf53128c78bbd5af0b9b20b189' \
        'pluggy==1.7.0 --hash=sha256:7dd7b0d8832ba3cb632c306926ded123429211b83641b35dc5c41ad2d34f9bec' \
        'tomlkit==0.15.2 --hash=sha256:05562412163a3037b94497385fb7f9204c637bc605af7a48199e41cf2272f437' \
        'trove-classifiers==2026.9.21.13 --hash=sha256:8b1ff4f9c191b1040b71c37f1e445ab99732911e3cd91de52838453a854d7a17' \
        > backend.lock \
    && python -m venv --without-pip /opt/backend \
    && pip --python /opt/backend/bin/python install --only-binary=:all: --require-hashes -r backend.lock

# The dependencies. This layer is rebuilt only when the lock changes. Bytecode is compiled once, here, and is never
# checked against its source again, because the image's files do not change.
COPY requirements.lock ./
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --only-binary=:all: --require-hashes -r requirements.lock \
    && pip --python /opt/venv/bin/python check \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

# The project itself. From here on nothing is fetched from the network.
COPY pyproject.toml README.md LICENSE ./
COPY service ./service
RUN pip --python /opt/backend/bin/python wheel --no-index --no-deps --no-build-isolation --wheel-dir dist . \
    && pip --python /opt/venv/bin/python install --no-index --no-deps dist/*.whl \
    && pip --python /opt/venv/bin/python check \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib/python3*/site-packages/firstclaim


FROM base
# /app belongs to root: the service can read it, but not write to it. Your own image puts your handlers there, and your
# packages into the venv: docs/how-to/container.md.
RUN groupadd --gid 10001 firstclaim \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /app --shell /usr/sbin/nologin firstclaim
WORKDIR /app
COPY --from=builder /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/app \
    FIRSTCLAIM_HOST=0.0.0.0

# As a number, so that an orchestrator can verify that it is not root.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM

# Checks liveness, not readiness: an unreachable store must not cause a restart of the container. It asks the host and
# the port that `serve` listens on, wherever they are set. Orchestrators use their own probes: /livez and /readyz.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 CMD ["firstclaim", "livez"]

# Exec form: firstclaim is process 1, so that it receives SIGTERM itself.
ENTRYPOINT ["firstclaim"]
CMD ["serve"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="firstclaim" \
      org.opencontainers.image.description="Receives Stripe webhooks and dispatches each event once" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="$REVISION"
