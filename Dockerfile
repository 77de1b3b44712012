# CPU image of TraceFL; docs/deployment.md says how it is used.
FROM python:3.13-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 UV_NO_CACHE=1 UV_SYSTEM_PYTHON=1
RUN pip install uv

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY tracefl ./tracefl
RUN uv pip install --torch-backend cpu .

# The runs: a volume that is made here belongs to the user, who is not root.
RUN useradd --create-home --uid 1000 tracefl && mkdir -p /data/logs && chown -R tracefl /data
USER tracefl
WORKDIR /data
VOLUME /data/logs
ENTRYPOINT ["python", "-m", "tracefl.main"]
