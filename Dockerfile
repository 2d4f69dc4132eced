# The dependencies of Pedigree, for one machine and for all processes of a cluster (deploy/, docs/cluster.md). In the clone:
#   docker build --tag pedigree:cpu .
#   docker build --tag pedigree:gpu --build-arg ACCELERATOR=gpu .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/project" pedigree:cpu python -m dagster_project run --all
# The image does not contain the project: the clone is mounted at /project, and Ray workers receive the code with each job.
# For a project made by `pedigree init`, which has no code of its own: --build-arg CODE=installed keeps the package of this clone in the image.

# Must be the same minor version on driver and nodes: Ray refuses others
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# cpu: torch without CUDA; gpu: torch from PyPI, which brings CUDA's libraries (the host needs NVIDIA's driver and container toolkit)
ARG ACCELERATOR=cpu

# git for DVC and the clone; g++ for `compile: layers`; wget for KubeRay's probes. Debian keeps only the newest version of each, so none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git g++ wget \
    && rm -rf /var/lib/apt/lists/*

# clone: the code is that of the mounted clone, or of a job; installed: that of the image
ARG CODE=clone

WORKDIR /build
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY dagster_project dagster_project
# pyproject.toml has the ranges of versions, requirements.lock the versions
# hadolint ignore=DL3013
RUN if [ "$ACCELERATOR" = cpu ]; then pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu --constraint requirements.lock torch; fi \
    && if [ "$ACCELERATOR" = gpu ]; then extras=all,gpu; else extras=all; fi \
    && pip install --no-cache-dir --constraint requirements.lock ".[$extras]" \
    && if [ "$CODE" = clone ]; then pip uninstall --yes pedigree-llm; fi \
    && rm -rf /build

# /dagster: Dagster's home; /project: the clone. Any user can write to the former, because compose runs as the owner of the clone.
# git refuses to read a folder of another user, and the root of a volume belongs to root.
RUN useradd --uid 1000 --create-home pedigree && install --directory --mode=1777 /dagster /project \
    && git config --system --add safe.directory /project
# HOME, USER: a user without an entry in /etc/passwd has none, and DVC fails without a name
ENV HOME=/tmp USER=pedigree PYTHONPATH=/project PEDIGREE_PROJECT=/project DAGSTER_HOME=/dagster PYTHONUNBUFFERED=1 \
    DAGSTER_DISABLE_TELEMETRY=1 DVC_NO_ANALYTICS=1 RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /project
