# Not built by the tests: start from it and adapt it. For a GPU the host needs NVIDIA's container
# toolkit (`docker run --gpus all`); torch's wheel brings its own CUDA libraries.
#
#     docker build -t dseqjepa .
#     docker run --rm -v "$PWD":/work dseqjepa pretrain vitt8_64 data=my_pictures out=runs/mine
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY licenses licenses
COPY dseqjepa dseqjepa
RUN pip install --no-cache-dir -c constraints.txt '.[report,viz]'
WORKDIR /work
ENTRYPOINT ["dseqjepa"]
