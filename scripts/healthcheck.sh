#!/usr/bin/env bash
# Exits with 0 when the server on this machine says that it is healthy. Needs bash alone, so that
# containers need no HTTP client. PORT (8000) and HEALTH_PATH (/health) come from the environment.
set -euo pipefail

exec 3<>"/dev/tcp/127.0.0.1/${PORT:-8000}"
printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "${HEALTH_PATH:-/health}" >&3
IFS= read -r -t 4 status <&3
[[ $status == "HTTP/1.1 200 "* ]] || { echo "$status"; exit 1; }
