# `llm2clip serve` on a CPU. The model is a volume, and the server's options follow the image's name:
#
#   docker build --tag llm2clip .
#   docker run --publish 8000:8000 --volume ./aligned/model:/model:ro llm2clip
#   docker run --publish 8000:8000 --volume hub:/cache llm2clip me/my-model --no-page
#
# For a GPU, build with --build-arg TORCH_INDEX=INDEX, an index of torch's CUDA builds, and run with
# --gpus all.

FROM python:3.12-slim AS build
WORKDIR /source
COPY LICENSE README.md pyproject.toml setup.cfg ./
COPY examples/data examples/data
COPY modeling_llm2clip modeling_llm2clip
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# In a layer of its own, because torch is most of the image and changes least.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3013
RUN pip install --index-url "$TORCH_INDEX" torch torchvision
# The user owns /cache, so a volume there keeps what is downloaded from the Hub.
RUN useradd --uid 1000 --create-home llm2clip && install --directory --owner llm2clip /cache
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install "$(ls /wheels/*.whl)[onnx,search,serve,timm]"

USER 1000
ENV HF_HOME=/cache
VOLUME ["/model"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --retries=10 CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["llm2clip", "serve", "--host", "0.0.0.0"]
CMD ["/model"]
