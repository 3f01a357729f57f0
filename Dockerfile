# Two images out of one file: `serving`, the default, and `training` (--target training).
#
#   docker build .
#   docker build --build-arg TORCH_REQUIREMENT="torch @ https://…/torch-2.14.1+cpu-….whl" .    CPU only: a quarter of it

# Any Debian-like image with Python 3.11 to 3.13 (with venv) as python3.
ARG BASE_IMAGE=python:3.11-slim-bookworm


FROM ${BASE_IMAGE} AS builder

# What pip is asked for as torch; the CUDA build that PyPI serves for Linux runs on the CPU too. It must not be older
# than the torch that exported the models, or they are refused.
ARG TORCH_REQUIREMENT="torch==2.14.1"

WORKDIR /build
COPY pyproject.toml constraints.txt ./
COPY scripts/requirements.py scripts/

# pip lives in an environment of its own, so that the image does not carry it.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv

# torch first: it is large and changes rarely. The constraints hold for all but torch, which the argument names.
RUN grep -vE '^(torch|torchvision)==' constraints.txt > others.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --constraint others.txt \
        "${TORCH_REQUIREMENT}"

# Left out: torch's C++ headers and tests, which no served module needs, and triton, a sixth of the whole. With it torch
# compiles some CUDA kernels at their first call, for which it looks for a C compiler that a slim image does not have;
# without it torch uses those that it ships.
RUN /opt/venv/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >> others.txt \
    && /opt/venv/bin/python scripts/requirements.py > requirements.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --constraint others.txt \
        --requirement requirements.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python uninstall --yes triton \
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/include /opt/venv/lib/python3*/site-packages/torch/test


FROM builder AS training-builder

ARG TORCHVISION_REQUIREMENT="torchvision==0.29.1"
# pip brings triton back, since torch asks for it.
RUN /opt/venv/bin/python scripts/requirements.py train > requirements.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --constraint others.txt \
        --requirement requirements.txt "${TORCHVISION_REQUIREMENT}" \
    && /opt/pip/bin/pip --python /opt/venv/bin/python uninstall --yes triton


FROM ${BASE_IMAGE} AS runtime

# The uid is fixed, so that a volume can be made readable or writable for it beforehand.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /srv/hourglass --shell /usr/sbin/nologin hourglass
WORKDIR /srv/hourglass
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOURGLASS_MODELS_STORE=/srv/hourglass/models_store
STOPSIGNAL SIGTERM


FROM runtime AS training

COPY --from=training-builder /opt/venv /opt/venv
COPY LICENSE pyproject.toml ./
COPY app app
COPY training training
# Writable for whichever user the container runs as: the owner of the mounted models_store, usually.
RUN install --directory --mode=1777 /data models_store
ENV HOURGLASS_DATA_ROOT=/data \
    HOME=/tmp
USER 10001:10001
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]


FROM runtime AS serving

COPY --from=builder /opt/venv /opt/venv
COPY LICENSE pyproject.toml ./
COPY app app
# The shipped models; a volume mounted here takes their place.
COPY models_store models_store
ENV HOURGLASS_HOST=0.0.0.0
EXPOSE 8000
USER 10001:10001
# A slim image has no curl. urlopen raises, and so exits 1, on every status but 2xx.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "\
import os, urllib.request; \
urllib.request.urlopen(f'http://127.0.0.1:{os.environ.get(\"HOURGLASS_PORT\", 8000)}/readyz', timeout=4)"]
CMD ["python", "-m", "app", "serve"]
