#!/usr/bin/env bash
# Proves and measures tokenmill on a GPU.
#
#     scripts/gpu-check.sh [--binary FILE] [--out DIR] [--device cuda:0] [--limit SECONDS] [--dry] PART...
#
# Every part runs alone, ends within SECONDS (480) or is ended, and leaves records (and its output) in
# DIR; the last one, `report`, makes DIR/report of all records there. Parts:
#
#   kernels          memory and arithmetic limits, and single operations beside them; the limits stand in
#                    the records of the parts after it
#   torch            the same products, those of codes, and attention by PyTorch, where python3 has torch
#   verify           a few cases of every operation against plain loops
#   sanitize         the same under compute-sanitizer, where that is installed
#   golden           the bundled model's answers in every weight format, and with an FP8 cache; fails
#                    where a format is further from bf16 than it may be
#   start            from the command to the first token
#   steps-FORMAT     decode steps at batch 1 to 256 over 1k context, recorded and launched one by one, and
#                    prompts of 1k and 8k tokens as one step
#   prefill-FORMAT   the same prompts through the engine
#   serve-FORMAT     1,000 tokens in and 1,000 out over HTTP, at 64 and 256 streams; serve-eager-FORMAT
#                    without recorded steps
#   moe-FORMAT       as steps-FORMAT, recorded, of a mixture of experts: Qwen3-30B-A3B's shapes;
#                    moe-eager-FORMAT its decode steps launched one by one
#   moe-serve-FORMAT, moe-serve-eager-FORMAT   as serve-FORMAT, of the mixture
#   report           tables and plots
#
# FORMAT is bf16, fp8, int8, int4 or mxfp4: random weights in the shapes of Llama 3.1 8B, or as said.
# Without PART all parts run, one after the other. Needs the binary, a driver, and for fast `bf16`, and
# prompts in FP8 by FP8, CUDA's cuBLASLt (that of PyTorch's wheels is found); `golden` and `torch` need
# python3. With --dry shapes and loads are tiny: that tries this script, also with `--device cpu`.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
binary=target/release/tokenmill
out=gpu-check
device=cuda:0
limit=480
dry=""
alone=""
parts=()
while (($#)); do
    case $1 in
        --binary) binary=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --limit) limit=$2; shift 2 ;;
        --dry) dry=yes; shift ;;
        --alone) alone=yes; shift ;; # within the time limit already: how this script calls itself
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) echo "unknown flag $1; --help lists what there is" >&2; exit 2 ;;
        *) parts+=("$1"); shift ;;
    esac
done
formats=(bf16 fp8 int8 int4 mxfp4)
if ((${#parts[@]} == 0)); then
    parts=(kernels torch verify sanitize golden start)
    for format in "${formats[@]}"; do
        parts+=("steps-$format" "prefill-$format" "serve-$format" "serve-eager-$format")
    done
    for format in "${formats[@]}"; do
        parts+=("moe-$format" "moe-eager-$format" "moe-serve-$format" "moe-serve-eager-$format")
    done
fi
[[ -x $binary ]] || { echo "$binary is not there; name the binary with --binary" >&2; exit 2; }
[[ $binary == */* ]] || binary=./$binary
mkdir -p "$out"
server=""

# What a real and a dry run differ in.
batch_sizes=1,8,64,256 context=1024 prompts=(1024 8192) stream_counts=(64 256) served_len=1000
golden_flags=() kernel_flags=()
if [[ $dry ]]; then
    batch_sizes=1,2 context=32 prompts=(32 64) stream_counts=(1 2) served_len=20
    golden_flags=(--every 50 --allow bf16=100)
    for format in int8 w8a16 int4 int4-g64 mxfp4 fp8 q8_0; do golden_flags+=(--allow "$format=100"); done
    kernel_flags=(--hidden-size 256 --intermediate-size 512 --context-len 64 --batch-size 2 --copy-size 16M
        --weights-size 1M --milliseconds 1)
fi
# The longest prompt and its first token, in whole blocks.
max_len=$(((prompts[1] / 16 + 16) * 16))

# CUDA's libraries as PyTorch's wheels bring them.
add_libraries() {
    local found
    found=$(python3 - 2>/dev/null <<'PYTHON' || true
import glob, site
roots = site.getsitepackages() + [site.getusersitepackages()]
print(":".join(d for root in roots for d in glob.glob(f"{root}/nvidia/*/lib")))
PYTHON
    )
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}${found:+:$found}"
}

# chosen_device: the device in doctor's words, for records of what cannot say it itself.
chosen_device() { "$binary" doctor --device "$device" | sed -n 's/^chosen *\([^(]*([^)]*)\).*/\1/p'; }

# needs_memory GIB: whether the device has so much; skips the part otherwise.
needs_memory() {
    local free
    free=$("$binary" doctor --device "$device" | sed -n 's/^ *\([0-9]*\)[0-9.]* GiB of its memory free$/\1/p')
    if [[ ! $dry && $free ]] && ((free < $1)); then
        echo "skipped: $1 GiB are needed, and $free are free"
        return 1
    fi
}

# quantization FORMAT: the flag that makes it of bf16.
quantization() { [[ $1 == bf16 ]] || printf '%s\n' --quantization "$1"; }

# limit_flags: the limits of the kernels part, where it has run.
limit_flags() {
    printf '%s\n' --no-limits
    [[ ! -e $out/kernels.json ]] || printf '%s\n' --limits-json "$out/kernels.json"
}

# model_folder MODEL: a folder with its shapes; `--load-format dummy` makes up the rest.
model_folder() {
    mkdir -p "$out/$1"
    "shapes_of_${1%%-*}" >"$out/$1/config.json"
    echo "$out/$1"
}

# full REAL DRY: a size.
full() { [[ $dry ]] && echo "$2" || echo "$1"; }

shapes_of_llama() {
    cat <<JSON
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
 "hidden_size": $(full 4096 256), "intermediate_size": $(full 14336 512),
 "num_hidden_layers": $(full 32 2), "num_attention_heads": $(full 32 4),
 "num_key_value_heads": $(full 8 2), "head_dim": $(full 128 64), "vocab_size": $(full 128256 512),
 "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
 "tie_word_embeddings": false, "hidden_act": "silu",
 "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
JSON
}

shapes_of_qwen3() {
    cat <<JSON
{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
 "hidden_size": $(full 2048 256), "intermediate_size": $(full 6144 512),
 "moe_intermediate_size": $(full 768 128), "num_experts": $(full 128 8),
 "num_experts_per_tok": $(full 8 2), "norm_topk_prob": true, "decoder_sparse_step": 1,
 "mlp_only_layers": [], "num_hidden_layers": $(full 48 2), "num_attention_heads": $(full 32 4),
 "num_key_value_heads": $(full 4 2), "head_dim": $(full 128 64), "vocab_size": $(full 151936 512),
 "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
 "tie_word_embeddings": false, "hidden_act": "silu", "attention_bias": false}
JSON
}

# start_server FLAG...: waits until it is ready; sets `server` and `port`.
start_server() {
    port=$((20000 + RANDOM % 20000))
    "$binary" serve --device "$device" --port "$port" "$@" >"$out/server.log" 2>&1 &
    server=$!
    until PORT=$port HEALTH_PATH=/ready scripts/healthcheck.sh >/dev/null 2>&1; do
        kill -0 "$server" 2>/dev/null || { tail -5 "$out/server.log" >&2; server=""; return 1; }
        sleep 0.02
    done
}

stop_server() {
    kill "$server"
    wait "$server" || true
    server=""
}

# record KIND RESULTS NAME: what a script measured, as a record.
record() {
    "$binary" bench record "$1" "$2" --metadata "device=$(chosen_device)" --output-json "$out/$3.json"
}

part_kernels() {
    "$binary" bench kernels --device "$device" "${kernel_flags[@]}" --output-json "$out/kernels.json"
}

part_torch() {
    if ! python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        echo "skipped: python3 has no torch with CUDA"
        return
    fi
    python3 scripts/torch_times.py >"$out/torch.raw"
    record torch "$out/torch.raw" torch
}

part_verify() { "$binary" doctor --device "$device" --verify --output-json "$out/verify.json"; }

part_sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "skipped: compute-sanitizer is not installed"
        return
    fi
    compute-sanitizer --error-exitcode 9 --log-file "$out/sanitize.log" \
        "$binary" doctor --device "$device" --verify --output-json "$out/sanitize.json"
}

# golden NAME FORMAT,... FLAG...: what bf16 passes on CPUs is the baseline.
golden() {
    local name=$1 weights=$2 status=0
    shift 2
    python3 scripts/golden.py --binary "$binary" --json "$out/$name.raw" --baseline 86.2 "${golden_flags[@]}" \
        --formats "$weights" -- --device "$device" "$@" || status=$?
    [[ ! -e $out/$name.raw ]] || record golden "$out/$name.raw" "$name" || status=1
    return "$status"
}

part_golden() {
    local status=0
    rm -f "$out"/golden*.raw
    golden golden bf16,int8,w8a16,int4,int4-g64,mxfp4,fp8,q8_0 || status=$?
    golden golden-fp8-cache bf16,int8,int4 --kv-cache-dtype fp8 || status=$?
    return "$status"
}

# First with cold caches of the driver's, then once more.
part_start() {
    local results=()
    for run in first second; do
        local begin ready token
        begin=$(date +%s%N)
        start_server
        ready=$(date +%s%N)
        "$binary" bench serve --base-url "http://127.0.0.1:$port" --num-prompts 1 --input-len 16 \
            --output-len 1 --num-warmups 0 --no-limits >/dev/null
        token=$(date +%s%N)
        stop_server
        results+=("\"$run\": {\"ready_ms\": $(((ready - begin) / 1000000)), \"token_ms\": $(((token - begin) / 1000000))}")
    done
    printf '{%s, %s}\n' "${results[@]}" | tee "$out/start.raw"
    record start "$out/start.raw" start
}

# measure_steps MODEL FORMAT NAME FLAG...
measure_steps() {
    local folder flags
    folder=$(model_folder "$1")
    mapfile -t flags < <(quantization "$2"; limit_flags)
    "$binary" bench steps "$folder" --load-format dummy --device "$device" --max-model-len "$max_len" "${flags[@]}" \
        --max-num-seqs "${batch_sizes##*,}" --batch-sizes "$batch_sizes" --batch-context-len "$context" \
        --context-lens "$context" --num-iters 20 --metadata "case=$3" --output-json "$out/$3.json" "${@:4}"
}

part_steps() {
    measure_steps llama-3.1-8b "$1" "steps-$1" --prompt-lens "${prompts[0]},${prompts[1]}"
    measure_steps llama-3.1-8b "$1" "steps-eager-$1" --enforce-eager
}

part_prefill() {
    local folder flags
    folder=$(model_folder llama-3.1-8b)
    mapfile -t flags < <(quantization "$1"; limit_flags)
    for length in "${prompts[@]}"; do
        "$binary" bench latency "$folder" --load-format dummy --device "$device" --max-model-len "$max_len" "${flags[@]}" \
            --max-num-seqs 16 --max-num-batched-tokens "${prompts[1]}" --input-len "$length" --output-len 1 --num-iters 5 \
            --metadata "case=prefill-$1-$length" --output-json "$out/prefill-$1-$length.json"
    done
}

# measure_serve MODEL FORMAT NAME FLAG...: one server for all loads.
measure_serve() {
    local folder flags
    folder=$(model_folder "$1")
    mapfile -t flags < <(quantization "$2")
    start_server "$folder" --load-format dummy --max-model-len 2048 --served-model-name "$1" \
        --max-num-seqs "${stream_counts[1]}" --max-num-batched-tokens 8192 "${flags[@]}" "${@:4}"
    for streams in "${stream_counts[@]}"; do
        "$binary" bench serve --base-url "http://127.0.0.1:$port" --model "$1" --no-limits \
            --num-prompts $((2 * streams)) --input-len "$served_len" --output-len "$served_len" \
            --max-concurrency "$streams" --vocab-size "$(full 128000 500)" \
            --metadata "device=$(chosen_device)" --metadata "case=$3-$streams" --output-json "$out/$3-$streams.json"
    done
    stop_server
}

part_serve() { measure_serve llama-3.1-8b "$1" "serve-$1"; }

part_serve_eager() { measure_serve llama-3.1-8b "$1" "serve-eager-$1" --enforce-eager; }

# Weights of 57 GiB in bf16, and 24 of keys and values at batch 256. Loading them takes a minute: a part
# loads once.
moe_memory() { [[ $1 == bf16 ]] && echo 88 || echo 60; }

part_moe() {
    needs_memory "$(moe_memory "$1")" || return 0
    measure_steps qwen3-30b-a3b "$1" "moe-steps-$1" --prompt-lens "${prompts[0]},${prompts[1]}"
}

part_moe_eager() {
    needs_memory "$(moe_memory "$1")" || return 0
    measure_steps qwen3-30b-a3b "$1" "moe-steps-eager-$1" --enforce-eager
}

part_moe_serve() {
    needs_memory "$(moe_memory "$1")" || return 0
    measure_serve qwen3-30b-a3b "$1" "moe-serve-$1"
}

part_moe_serve_eager() {
    needs_memory "$(moe_memory "$1")" || return 0
    measure_serve qwen3-30b-a3b "$1" "moe-serve-eager-$1" --enforce-eager
}

# All records that lie in DIR, of this run and of earlier ones.
part_report() {
    local records
    mapfile -t records < <(grep -l '^  "benchmark": ' "$out"/*.json 2>/dev/null)
    if ((${#records[@]} == 0)); then
        echo "no record lies in $out"
        return
    fi
    "$binary" bench report --out "$out/report" "${records[@]}"
}

# function_of PART: the function that runs it, which takes its format.
function_of() {
    local name=$1
    for format in "${formats[@]}"; do name=${name%"-$format"}; done
    echo "part_${name//-/_}"
}

for part in "${parts[@]}"; do
    declare -F "$(function_of "$part")" >/dev/null || { echo "there is no part $part; --help lists them" >&2; exit 2; }
done
if [[ $alone ]]; then
    trap '[[ -z $server ]] || kill "$server" 2>/dev/null || true' EXIT
    "$(function_of "${parts[0]}")" "${parts[0]##*-}"
    exit
fi

add_libraries
[[ ${parts[-1]} == report ]] || parts+=(report)
flags=(--binary "$binary" --out "$out" --device "$device" --alone ${dry:+--dry})
failed=()
for part in "${parts[@]}"; do
    echo "== $part"
    begin=$SECONDS status=0
    # In a process of its own, so that time limit and first error end the part and only it.
    timeout --kill-after=15 "$limit" "${BASH_SOURCE[0]}" "${flags[@]}" "$part" 2>&1 | tee "$out/$part.log" || status=$?
    case $status in
        0) echo "-- $part took $((SECONDS - begin)) s" ;;
        124 | 137) echo "!! $part was ended after $limit s; what it had measured until then lies in $out" ;;
        *) echo "!! $part FAILED after $((SECONDS - begin)) s" ;;
    esac
    ((status == 0)) || failed+=("$part")
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
