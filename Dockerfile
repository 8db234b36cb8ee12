FROM python:3.13-slim

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . ./
RUN useradd --system --no-create-home clerkhooks && mkdir --parents instance && chown clerkhooks instance
USER clerkhooks

ENV PORT=8000
EXPOSE 8000
VOLUME /app/instance
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/readyz')"]
CMD ["python", "-m", "clerkhooks", "serve", "--migrate"]
