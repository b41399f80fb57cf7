#!/usr/bin/env bash
# Runs the official OpenAI clients for Python and JavaScript against the real binary.
#
# Builds nothing: $TOKENMILL_BIN is the binary, by default the release build. Starts it twice
# with the bundled model ($TOKENMILL_MODEL names another one), once open and once behind a key,
# and stops both at the end. The clients are installed once, from pinned lists, into a cache
# outside the tree.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
binary=${TOKENMILL_BIN:-$target/release/tokenmill}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tokenmill/sdk
logs=$(mktemp -d "${TMPDIR:-/tmp}/tokenmill-sdk.XXXXXX")
servers=()

[[ -x $binary ]] || {
    echo "no binary at $binary; build it with: cargo build --release" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
        if [[ -n $candidate ]] && "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or later is needed" >&2
    return 1
}

# Ends what this script started, by its own process ids.
stop_servers() {
    local status=$? pid
    for pid in "${servers[@]}"; do
        kill -TERM "$pid" 2>/dev/null || true
    done
    for pid in "${servers[@]}"; do
        wait "$pid" 2>/dev/null || true
    done
    if ((status != 0)); then
        tail -n 40 "$logs"/*.log >&2 || true
    fi
    rm -rf "$logs"
    exit "$status"
}
trap stop_servers EXIT
trap 'exit 130' INT TERM

# start NAME [VAR=VALUE...]: starts a server with these variables; its URL is in $url then.
start() {
    local name=$1 port pid
    shift
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    env "$@" "$binary" serve --host 127.0.0.1 --port "$port" --shutdown-timeout 2 \
        --kv-cache-memory 512M ${TOKENMILL_MODEL:+"$TOKENMILL_MODEL"} >"$logs/$name.log" 2>&1 &
    pid=$!
    servers+=("$pid")
    url=http://127.0.0.1:$port/v1
    for _ in $(seq 600); do
        kill -0 "$pid" 2>/dev/null || {
            echo "the $name server ended before it was ready" >&2
            return 1
        }
        "$python" -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health')" \
            2>/dev/null && return
        sleep 0.1
    done
    echo "the $name server was not ready within a minute" >&2
    return 1
}

install_python_client() {
    local key
    key=$("$python" --version | cat - "$here/python/requirements.txt" | sha256sum | cut -c1-16)
    venv=$cache/python-$key
    [[ -e $venv/ready ]] && return
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/pip" --quiet --disable-pip-version-check install -r "$here/python/requirements.txt"
    touch "$venv/ready"
}

# The test is copied beside its packages, because Node looks for packages beside the importing file.
install_node_client() {
    local key
    key=$(cat "$here/node/package.json" "$here/node/package-lock.json" | sha256sum | cut -c1-16)
    node_dir=$cache/node-$key
    mkdir -p "$node_dir"
    cp "$here"/node/package.json "$here"/node/package-lock.json "$node_dir/"
    if [[ ! -e $node_dir/ready ]]; then
        (cd "$node_dir" && npm ci --silent --no-audit --no-fund)
        touch "$node_dir/ready"
    fi
    cp "$here"/node/*.test.js "$node_dir/"
}

python=$(find_python)
install_python_client
install_node_client

start open -u TOKENMILL_API_KEY
export TOKENMILL_BASE_URL=$url
start guarded TOKENMILL_API_KEY=sdk-suite-key
export TOKENMILL_GUARDED_URL=$url TOKENMILL_GUARDED_KEY=sdk-suite-key

failed=0
echo "== openai for Python ($("$venv/bin/pip" --disable-pip-version-check list --format=freeze | grep '^openai=='))"
PYTHONDONTWRITEBYTECODE=1 "$venv/bin/pytest" -q -rs "$here/python" || failed=1
echo "== openai for JavaScript ($(node -p "require('$node_dir/node_modules/openai/package.json').version"))"
(cd "$node_dir" && node --test --test-reporter=spec sdk.test.js) || failed=1
exit "$failed"
