# One image for both services, on CPU; docker-compose.yml says which of them a container runs.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
# PyTorch's own index has CPU builds; the torch of PyPI would bring several GB of CUDA packages. So torch is
# installed first, and alone, from there.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python3 -m venv /opt/tandem
COPY constraints.txt ./
RUN /opt/tandem/bin/pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX_URL}" -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY tandem tandem
COPY gateway_service gateway_service
COPY scheduler_service scheduler_service
COPY worker_service worker_service
RUN /opt/tandem/bin/pip install --no-cache-dir -c constraints.txt ".[worker]"

FROM ${BASE_IMAGE}
RUN useradd --create-home --uid 1000 tandem && mkdir /run/tandem && chown tandem: /run/tandem
COPY --from=build /opt/tandem /opt/tandem
ENV PATH=/opt/tandem/bin:${PATH} PYTHONUNBUFFERED=1
USER tandem
WORKDIR /home/tandem
