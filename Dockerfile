# Triptych as an image for CPUs and for CUDA: docs/deploy.md says how it is used, and what of it was built where.
#   docker build --target cpu  --tag triptych:0.1.0-cpu --build-arg TORCH_INDEX_URL=URL .
#   docker build --target cuda --tag triptych:0.1.0-cuda .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# What is installed and not ours, in the versions of constraints.txt. Our packages are empty here: a change of them
# leaves these layers as they are. `--secret id=pip,src=FILE` gives pip a configuration that no layer keeps.
FROM base AS venv
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN mkdir serve_app deployments env_config \
    && touch README.md LICENSE serve_app/__init__.py deployments/__init__.py env_config/__init__.py \
    && python3 -m venv --without-pip /opt/venv

FROM venv AS venv-cpu
# The index of torch's CPU builds, as torch's own page of installation commands gives it.
ARG TORCH_INDEX_URL=""
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --constraint constraints.txt \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch torchvision \
    && python -c "import sys, torch; sys.exit(torch.version.cuda and f'torch {torch.__version__} is built for CUDA: give \
the index of the CPU builds as --build-arg TORCH_INDEX_URL=URL')"
ARG EXTRAS=s3,postgresql,c2pa,vision,tracing
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]" \
    && python3 -m pip --python /opt/venv/bin/python uninstall --yes --quiet triptych

FROM venv AS venv-cuda
ARG TORCH_INDEX_URL=""
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --constraint constraints.txt \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch torchvision \
    && python -c "import sys, torch; sys.exit(None if torch.version.cuda else f'torch {torch.__version__} is not built \
for CUDA: give the index of such builds as --build-arg TORCH_INDEX_URL=URL')"
ARG EXTRAS=s3,postgresql,c2pa,vision,tracing,precision
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]" \
    && python3 -m pip --python /opt/venv/bin/python uninstall --yes --quiet triptych
# The address of a built wheel of flash-attn for this Python and torch. Its sources need nvcc, which is not here.
ARG FLASH_ATTN_WHEEL=""
RUN case "$FLASH_ATTN_WHEEL" in \
        "") ;; \
        *.whl) python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps "$FLASH_ATTN_WHEEL" ;; \
        *) echo "FLASH_ATTN_WHEEL: must be the address of a .whl file, got $FLASH_ATTN_WHEEL" >&2; exit 1 ;; \
    esac

FROM base AS wheel
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY serve_app serve_app
COPY deployments deployments
COPY env_config env_config
RUN --mount=type=secret,id=pip,target=/etc/pip.conf python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM base AS runtime
# tini ends what Ray leaves behind and passes signals on; KubeRay asks pods for their health with wget. Packages for
# `compile` are the builder's to add: EXTRA_PACKAGES="g++ libc6-dev". Debian keeps one version of each: none is pinned.
ARG EXTRA_PACKAGES=""
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini wget $EXTRA_PACKAGES \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 triptych \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/triptych --shell /usr/sbin/nologin triptych \
    && install --directory --owner=10001 --group=10001 /var/lib/triptych /srv/triptych/outputs
# Everything that is written goes below /var/lib/triptych, /srv/triptych/outputs (logs) and /tmp (Ray): the rest may be
# read-only. The bytecode is in the layers.
ENV HOME=/var/lib/triptych \
    HF_HOME=/var/lib/triptych/hub \
    SGLANG_DIFFUSION_CACHE_ROOT=/var/lib/triptych/cache \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.proxy:around_proxy \
    RAY_USAGE_STATS_ENABLED=0 \
    PYTHONUNBUFFERED=1 \
    PYTHONUTF8=1
WORKDIR /srv/triptych
COPY checkpoints checkpoints
COPY ray_configs ray_configs
EXPOSE 8000
# As the launcher asks, but for its body, which `docker inspect` keeps: which stage is not there yet.
HEALTHCHECK --interval=15s --timeout=10s --start-period=15m --retries=3 \
    CMD ["wget", "--no-proxy", "--tries=1", "--timeout=5", "--content-on-error", "--quiet", "--output-document=-", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["tini", "--", "python", "-m", "serve_app.tools.launch"]
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="Triptych" \
    org.opencontainers.image.description="Diffusion models on Ray Serve: encoder, denoiser and VAE, each scaled on its own" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION"

# torch's CUDA builds bring the libraries of CUDA along; the driver is the host's, by NVIDIA's container toolkit.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=venv-cuda /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-index --no-deps /wheel/*.whl
USER 10001:10001
CMD ["ray_configs/containers/emoji_cuda.yaml"]

# The last target is the one that is built where none is named.
FROM runtime AS cpu
COPY --from=venv-cpu /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-index --no-deps /wheel/*.whl
USER 10001:10001
CMD ["ray_configs/containers/emoji_cpu.yaml"]
