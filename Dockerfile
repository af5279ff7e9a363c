# One image for everything that Flame runs in a container: worker (python -m flame.flamelet), server (flame serve), command.
#
#   docker build -t flame .                                          # light: no machine-learning library
#   docker build -t flame:torch --build-arg EXTRAS="$EXTRAS torch mlflow" .
#
# EXTRAS are the extras of setup.cfg. pip's own settings, such as PIP_EXTRA_INDEX_URL, may be given as --build-arg too. Wheels that lie
# in a folder `wheels` beside this file are preferred: .ci/wheels puts the CPU build of PyTorch there, where the registry
# has gigabytes of CUDA under the same version.
ARG BASE=python:3.11-slim-bookworm

# What is to be installed, alone in a stage, so that only a change of this list installs it anew.
FROM ${BASE} AS requirements
ARG EXTRAS="cloud docker kubernetes mongodb mqtt oidc tls"
COPY setup.cfg /
RUN python3 -c "import configparser, sys; \
setup = configparser.ConfigParser(); setup.read('/setup.cfg'); \
extras = setup['options.extras_require']; \
parts = [setup['options']['install_requires'], *(extras[name] for name in sys.argv[1:])]; \
print(*sorted({line.strip() for part in parts for line in part.splitlines() if line.strip()}), sep='\n')" \
    ${EXTRAS} > /requirements.txt

FROM ${BASE} AS dependencies
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS=/wheels
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PROGRESS_BAR=off
RUN python3 -m venv /opt/flame
COPY constraints.txt wheel[s] /wheels/
COPY --from=requirements /requirements.txt /
RUN /opt/flame/bin/pip install --quiet --constraint /wheels/constraints.txt --requirement /requirements.txt

FROM dependencies AS package
COPY setup.cfg pyproject.toml README.md /source/
COPY flame /source/flame
RUN /opt/flame/bin/pip wheel --quiet --no-deps --wheel-dir /dist /source

FROM ${BASE}
# A worker's user cannot write bytecode beside the standard library, so it would be compiled at every start.
RUN python3 -m compileall -q -x '/(test|idlelib|lib2to3|turtledemo|ensurepip)/' \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && useradd --create-home --uid 1000 flame \
    && install -d -o flame -g flame /var/lib/flame
COPY --from=dependencies /opt/flame /opt/flame
COPY --from=package /dist /tmp/dist
RUN /opt/flame/bin/pip install --quiet --no-deps --no-cache-dir --no-index /tmp/dist/*.whl
ENV PATH=/opt/flame/bin:$PATH PYTHONUNBUFFERED=1
# A first job that can be run from the image alone: see compose.yaml.
COPY examples/digits /opt/flame/demo/examples/digits
COPY deploy/compose /opt/flame/demo/deploy/compose
USER flame
WORKDIR /home/flame
EXPOSE 10100
CMD ["flame", "serve", "--host", "0.0.0.0", "--data-dir", "/var/lib/flame"]
