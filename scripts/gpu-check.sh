#!/usr/bin/env bash
# Proves and measures tokenmill on a GPU.
#
#     scripts/gpu-check.sh [--binary FILE] [--out DIR] [--device cuda:0] PART...
#
# Every part runs alone within eight minutes and leaves JSON (and its output) in DIR:
#
#   verify           a few cases of every operation against plain loops
#   sanitize         the same under compute-sanitizer, where that is installed
#   golden           the bundled model's answers, in every weight format and with an FP8 cache
#   kernels          memory and arithmetic ceilings, and single operations beside them
#   torch            the same ceilings, that of FP8 too, and attention by PyTorch, where python3 has torch
#   steps-FORMAT     decode steps at batch 1 to 256 over 1k context, recorded and launched one by one
#   prefill-FORMAT   prompts of 1k and 8k tokens
#   moe-FORMAT       decode steps and prompts as above, of a mixture of experts: Qwen3-30B-A3B's shapes
#   serve-FORMAT     1,000 tokens in and 1,000 out over HTTP, at 64 and 256 streams
#   start            from the command to the first token
#
# FORMAT is bf16, fp8, int8, int4 or mxfp4: random weights in the shapes of Llama 3.1 8B, or as said. Without PART
# all parts run, one after the other. Needs the binary, a driver, and for fast `bf16`, and prompts
# in FP8 by FP8, CUDA's cuBLASLt (that of PyTorch's wheels is found); `golden` and `torch` need python3.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
binary=target/release/tokenmill
out=gpu-check
device=cuda:0
parts=()
while (($#)); do
    case $1 in
        --binary) binary=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        -h | --help) sed -n '2,23s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) echo "unknown flag $1; --help lists what there is" >&2; exit 2 ;;
        *) parts+=("$1"); shift ;;
    esac
done
formats=(bf16 fp8 int8 int4 mxfp4)
if ((${#parts[@]} == 0)); then
    parts=(verify sanitize golden kernels torch start)
    for format in "${formats[@]}"; do parts+=("steps-$format" "prefill-$format" "moe-$format" "serve-$format"); done
fi
[[ -x $binary ]] || { echo "$binary is not there; name the binary with --binary" >&2; exit 2; }
mkdir -p "$out"
server=""

# CUDA's libraries as PyTorch's wheels bring them.
add_libraries() {
    local found
    found=$(python3 - 2>/dev/null <<'PYTHON' || true
import glob, site, sys
roots = site.getsitepackages() + [site.getusersitepackages()]
print(":".join(d for root in roots for d in glob.glob(f"{root}/nvidia/*/lib")))
PYTHON
    )
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}${found:+:$found}"
}

# quantization FORMAT: the flag that makes it of bf16.
quantization() { [[ $1 == bf16 ]] || echo "--quantization $1"; }

# model_folder MODEL: a folder with its shapes; `--load-format dummy` makes up the rest.
model_folder() {
    mkdir -p "$out/$1"
    "shapes_of_${1%%-*}" >"$out/$1/config.json"
    echo "$out/$1"
}

shapes_of_llama() {
    cat <<'JSON'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
 "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
 "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
 "tie_word_embeddings": false, "hidden_act": "silu",
 "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
JSON
}

shapes_of_qwen3() {
    cat <<'JSON'
{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
 "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
 "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true, "decoder_sparse_step": 1,
 "mlp_only_layers": [], "num_hidden_layers": 48, "num_attention_heads": 32,
 "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
 "rope_theta": 1000000.0, "max_position_embeddings": 40960, "tie_word_embeddings": false,
 "hidden_act": "silu", "attention_bias": false}
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

# engine_flags MODEL FORMAT MAX_LEN
engine_flags() {
    # shellcheck disable=SC2046 # a flag and its value, or nothing
    printf '%s\n' "$(model_folder "$1")" --load-format dummy --device "$device" --max-model-len "$3" \
        $(quantization "$2")
}

part_verify() { "$binary" doctor --device "$device" --verify --json >"$out/verify.json"; }

part_sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo '{"skipped": "compute-sanitizer is not installed"}' | tee "$out/sanitize.json"
        return
    fi
    compute-sanitizer --error-exitcode 9 --log-file "$out/sanitize.log" \
        "$binary" doctor --device "$device" --verify --json >"$out/sanitize.json"
}

part_golden() {
    python3 scripts/golden.py --binary "$binary" --json "$out/golden.json" \
        --formats bf16,int8,w8a16,int4,int4-g64,mxfp4,fp8,q8_0 -- --device "$device"
    python3 scripts/golden.py --binary "$binary" --json "$out/golden-fp8-cache.json" \
        --formats bf16 -- --device "$device" --kv-cache-dtype fp8
}

part_kernels() { "$binary" bench kernels --device "$device" --output-json "$out/kernels.json"; }

part_torch() {
    if ! python3 -c 'import torch' 2>/dev/null; then
        echo '{"skipped": "python3 has no torch"}' | tee "$out/torch.json"
        return
    fi
    python3 - >"$out/torch.json" <<'PYTHON'
import json, torch
from torch.nn.functional import scaled_dot_product_attention as attend

def microseconds(run, repeat=50):
    run(); torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat): run()
    end.record(); torch.cuda.synchronize()
    return 1000 * begin.elapsed_time(end) / repeat

bf16 = dict(device="cuda", dtype=torch.bfloat16)
rows = []
source = torch.empty(1 << 28, **bf16); target = torch.empty_like(source)
time = microseconds(lambda: target.copy_(source), 10)
rows.append({"operation": "copy", "microseconds": time, "gb_per_s": 4 * source.numel() / time / 1e3})
weight = torch.randn(14336, 4096, **bf16)
for n in (1, 8, 64, 2048):
    x = torch.randn(n, 4096, **bf16)
    time = microseconds(lambda: x @ weight.T)
    rows.append({"operation": f"matmul bf16, {n} rows", "microseconds": time,
                 "tflops": 2 * n * weight.numel() / time / 1e6})
if torch.cuda.get_device_capability() >= (8, 9):
    codes, one = weight.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    for n in (64, 2048):
        x = torch.randn(n, 4096, **bf16).to(torch.float8_e4m3fn)
        time = microseconds(lambda: torch._scaled_mm(x, codes.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
        rows.append({"operation": f"matmul fp8 by fp8, {n} rows", "microseconds": time,
                     "tflops": 2 * n * weight.numel() / time / 1e6})
for batch, queries in ((64, 1), (1, 1024)):
    q = torch.randn(batch, 32, queries, 128, **bf16)
    k, v = (torch.randn(batch, 8, 1024, 128, **bf16) for _ in range(2))
    time = microseconds(lambda: attend(q, k, v, is_causal=queries > 1, enable_gqa=True))
    rows.append({"operation": f"attention {batch} x {queries} over 1024", "microseconds": time})
print(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "rows": rows}, indent=2))
PYTHON
}

# measure_steps MODEL FORMAT CASE
measure_steps() {
    local flags
    mapfile -t flags < <(engine_flags "$1" "$2" 2048)
    for mode in recorded eager; do
        local eager=()
        [[ $mode == recorded ]] || eager=(--enforce-eager)
        "$binary" bench steps "${flags[@]}" "${eager[@]}" --max-num-seqs 256 --no-limits \
            --batch-sizes 1,8,64,256 --batch-context-len 1024 --context-lens 1024 --num-iters 20 \
            --metadata "case=$3" --metadata "mode=$mode" --output-json "$out/$3-$mode.json"
    done
}

# measure_prefill MODEL FORMAT CASE
measure_prefill() {
    local flags
    mapfile -t flags < <(engine_flags "$1" "$2" 8448)
    for length in 1024 8192; do
        "$binary" bench latency "${flags[@]}" --max-num-batched-tokens 8192 --no-limits \
            --input-len "$length" --output-len 1 --num-iters 5 \
            --metadata "case=$3-$length" --output-json "$out/$3-$length.json"
    done
}

part_steps() { measure_steps llama-3.1-8b "$1" "steps-$1"; }

part_prefill() { measure_prefill llama-3.1-8b "$1" "prefill-$1"; }

part_moe() {
    measure_steps qwen3-30b-a3b "$1" "moe-steps-$1"
    measure_prefill qwen3-30b-a3b "$1" "moe-prefill-$1"
}

part_serve() {
    local flags
    mapfile -t flags < <(engine_flags llama-3.1-8b "$1" 2048)
    start_server "${flags[0]}" "${flags[@]:1:2}" "${flags[@]:5}" --served-model-name llama \
        --max-num-seqs 256 --max-num-batched-tokens 8192
    for streams in 64 256; do
        "$binary" bench serve --base-url "http://127.0.0.1:$port" --model llama --no-limits \
            --num-prompts $((2 * streams)) --input-len 1000 --output-len 1000 \
            --max-concurrency "$streams" --vocab-size 128000 \
            --metadata "case=serve-$1-$streams" --output-json "$out/serve-$1-$streams.json"
    done
    stop_server
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
    printf '{%s, %s}\n' "${results[@]}" | tee "$out/start.json"
}

add_libraries
failed=()
for part in "${parts[@]}"; do
    echo "== $part"
    name=${part%%-*}
    if ! declare -F "part_$name" >/dev/null; then
        echo "there is no part $part; --help lists them" >&2
        exit 2
    fi
    begin=$SECONDS
    # In a shell of its own, so that the first error ends the part and only it. Not as the
    # condition of an `if`, under which errors would be passed over.
    set +e
    (
        set -e
        trap '[[ -z $server ]] || kill "$server" 2>/dev/null || true' EXIT
        "part_$name" "${part#*-}"
    ) 2>&1 | tee "$out/$part.log"
    status=${PIPESTATUS[0]}
    set -e
    if ((status == 0)); then
        echo "-- $part took $((SECONDS - begin)) s"
    else
        echo "!! $part FAILED after $((SECONDS - begin)) s"
        failed+=("$part")
    fi
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
