# An image for each service: docker build --target scheduler -t tandem-scheduler .
#
#   scheduler     tandem-scheduler, without torch
#   gateway       tandem-gateway, without torch
#   worker-cpu    tandem-worker and all else, with torch for CPUs
#   smg           the gateway SMG, for several Tandems
#   worker-cuda   tandem-worker and all else, with torch and CUDA
ARG BASE_IMAGE=python:3.11-slim

FROM scratch AS source
COPY constraints.txt pyproject.toml README.md LICENSE /
COPY shared /shared
COPY tandem /tandem
COPY gateway_service /gateway_service
COPY scheduler_service /scheduler_service
COPY worker_service /worker_service

FROM ${BASE_IMAGE} AS environment
WORKDIR /src
RUN python3 -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:${PATH} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/src/constraints.txt
COPY constraints.txt ./

FROM ${BASE_IMAGE} AS base
RUN useradd --create-home --uid 1000 tandem && mkdir /run/tandem && chown tandem: /run/tandem
ENV PATH=/opt/tandem/bin:${PATH} PYTHONUNBUFFERED=1
# By number, so that Kubernetes sees that it is not root.
USER 1000
WORKDIR /home/tandem

# pip is of no use in an image, so it removes itself at the end.
FROM environment AS scheduler-environment
COPY --from=source / ./
RUN pip install ".[otel,smg]" && pip uninstall --yes pip setuptools

FROM base AS scheduler
COPY --from=scheduler-environment /opt/tandem /opt/tandem
CMD ["tandem-scheduler"]

FROM environment AS gateway-environment
COPY --from=source / ./
RUN pip install ".[gateway,otel]" && pip uninstall --yes pip setuptools

FROM base AS gateway
COPY --from=gateway-environment /opt/tandem /opt/tandem
CMD ["tandem-gateway"]

FROM environment AS worker-cpu-environment
# PyTorch's own index has CPU builds; the torch of PyPI would bring several GB of CUDA packages. So torch is
# installed first, and alone, from there.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps --index-url "${TORCH_INDEX_URL}" torch
COPY --from=source / ./
RUN pip install ".[otel,worker]" && pip uninstall --yes pip

FROM base AS worker-cpu
COPY --from=worker-cpu-environment /opt/tandem /opt/tandem
CMD ["tandem-worker"]

FROM environment AS smg-environment
RUN pip install smg && pip uninstall --yes pip setuptools

FROM base AS smg
COPY --from=smg-environment /opt/tandem /opt/tandem
CMD ["smg", "launch"]

FROM environment AS worker-cuda-environment
# First and alone, as it is gigabytes that a change of Tandem leaves as they are.
RUN pip install torch
COPY --from=source / ./
RUN pip install ".[gpu,otel]" && pip uninstall --yes pip

FROM base AS worker-cuda
# Triton compiles the code that launches its kernels, where it runs.
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 1000
COPY --from=worker-cuda-environment /opt/tandem /opt/tandem
CMD ["tandem-worker"]
