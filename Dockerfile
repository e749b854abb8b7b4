# The image of every Ray node, job and service: docs/operate/containers.md.
#   docker build --build-arg VARIANT=cpu  --tag focus-ray:0.1.0-cpu  .
#   docker build --build-arg VARIANT=cuda --tag focus-ray:0.1.0-cuda .

# For a build that cannot change: --build-arg PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS libraries
ARG VARIANT=cpu
# mirrors; empty: the indexes that pip and uv take by themselves
ARG PYPI_INDEX=
ARG TORCH_INDEX=
WORKDIR /source
COPY container/build-requirements.txt container/build-requirements.txt
RUN pip install --no-cache-dir --require-hashes ${PYPI_INDEX:+--index-url "${PYPI_INDEX}"} --requirement container/build-requirements.txt \
    && python -m venv --without-pip /opt/focus-ray
COPY container/install.sh container/install.sh
COPY pyproject.toml requirements.lock ./
RUN container/install.sh /opt/focus-ray dependencies --no-cache

FROM libraries AS wheel
COPY README.md LICENSE ./
COPY release release
COPY configs configs
COPY focus_ray focus_ray
RUN container/install.sh /opt/focus-ray wheel /wheel

FROM ${PYTHON_IMAGE}
# gigabytes that stay as they are when the sources change; the wheel comes last
COPY --from=libraries /opt/focus-ray /opt/focus-ray
# container/certificate.sh calls openssl; KubeRay's probes are `bash -c "wget ... | grep success"`; `ray up` wants openssh-client and rsync too
ARG SYSTEM_PACKAGES="wget openssl"
# the packages' versions are not pinned: they are those of the day, with Debian's mends
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ${SYSTEM_PACKAGES} \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --gid 0 --create-home --home-dir /home/focus --shell /bin/bash focus \
    && mkdir /home/focus/certificates /home/focus/secrets /home/focus/work \
    && chown --recursive 1000:0 /home/focus \
    && chmod --recursive g=u /home/focus \
    && echo "PATH=/opt/focus-ray/bin:\$PATH" > /etc/profile.d/focus-ray.sh
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    --mount=type=bind,from=wheel,source=/source/container,target=/source/container \
    /source/container/install.sh /opt/focus-ray package /wheel
ARG VARIANT=cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="focus_ray" \
      org.opencontainers.image.description="Industrial anomaly detection from normal images only, trained, searched and served on Ray" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}-${VARIANT}" \
      org.opencontainers.image.revision="${REVISION}"
# HOME and USER for whatever user id the container gets; its group is 0, to which the home folder belongs.
# Bytecode was compiled above, and cannot be written at run time.
ENV PATH=/opt/focus-ray/bin:$PATH \
    HOME=/home/focus \
    USER=focus \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
# a number: Kubernetes cannot tell whether a name is root's
USER 1000:0
# empty: `focus-ray submit` sends the folder that it is called in
WORKDIR /home/focus/work
# no entry point: `ray start`, `focus-ray serve` and `python` are all said in full. No health check either: what is healthy
# depends on what runs, so compose.yaml and KubeRay say it.
CMD ["focus-ray", "--help"]
