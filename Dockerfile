# deepen in a container, at the versions of constraints.txt; as an ordinary user, with nothing cached.
#
#   docker build -t deepen .                                               for a CPU
#   docker build -t deepen --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#   docker run --rm deepen demo
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" -v "$HOME/.cache:/home/deepen/.cache" deepen run recipe.yaml
#
# The version comes from git, whose history .dockerignore keeps out: say --build-arg VERSION=0.2.0 for a release.
# The user is number 1000: what is mounted must be readable by it, and writable where a run is to be written.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=eval,quantised,gguf,web
ARG VERSION=
COPY . /src
RUN python -m venv /opt/deepen \
 && if [ -n "$VERSION" ]; then export SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION"; fi \
 && /opt/deepen/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" \
      -c /src/constraints.txt "/src[$EXTRAS]"

FROM python:3.11-slim
# g++ is for train.compile and bubblewrap for the sandbox, where the kernel gives a container no namespaces itself.
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap g++ \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 deepen \
 && mkdir /work && chown deepen:deepen /work
COPY --from=build /opt/deepen /opt/deepen
ENV PATH=/opt/deepen/bin:$PATH PYTHONUNBUFFERED=1
USER deepen
WORKDIR /work
ENTRYPOINT ["deepen"]
CMD ["--help"]
