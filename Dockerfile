# The training image. It was written from the base image's documentation and has not been built by the project's CI,
# which has neither a container engine nor a GPU.
#
#   docker build --build-arg BASE=NGC_PYTORCH_IMAGE -t megatron-vlmr1 .
#   docker run --rm --gpus all --ipc=host -v /data:/data megatron-vlmr1 train configs/rec.yaml --nproc 8 \
#       model.path=/data/Qwen2.5-VL-3B-Instruct data.train=/data/shards/rec run_dir=/data/runs/rec
#
# BASE is NVIDIA's PyTorch image from the NGC catalogue, tag 25.09-py3, which megatron-core pins for long-term support:
# PyTorch, Transformer Engine, apex, flash attention and NCCL built against each other.
ARG BASE=nvidia/pytorch:25.09-py3
FROM ${BASE}

ARG UID=1000

WORKDIR /opt/megatron-vlmr1
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY configs configs
COPY launch launch
COPY megatron_vlmr1 megatron_vlmr1

# The image's own torch and transformer-engine satisfy the ranges and must stay: PIP_CONSTRAINT, set by the image, pins
# what it was built with, and the [cuda] extra, which would build transformer-engine from source, is left out.
RUN before=$(python -c 'import torch; print(torch.__version__)') \
 && pip install --no-cache-dir . \
 && test "$before" = "$(python -c 'import torch; print(torch.__version__)')" \
 && pip show --quiet transformer-engine \
 && vlmr1 --version

RUN useradd --create-home --no-log-init --uid "$UID" --non-unique vlmr1
USER ${UID}
WORKDIR /home/vlmr1

ENTRYPOINT ["vlmr1"]
CMD ["--help"]
