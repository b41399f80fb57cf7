"""Records what Hugging Face transformers computes for small random models of every family.

    python tests/parity/record_logits.py [CASE ...]

writes tests/parity/recorded/CASE/ with

    config.json             as the library saves it, or in the older spelling (`legacy`)
    model.safetensors       random weights, seeded by the name of the case
    expected.safetensors    token_ids [48] u32, logits [48, 131] f32,
                            positions [n] u32, cos and sin [n, head_dim / 2] f32

Weights are rounded to the case's dtype and everything is computed in f32 on the CPU with
eager attention, so that a difference is ours and not a kernel's. The sizes are chosen to
catch mistakes: the vocabulary is no multiple of 16, three query heads share a key head, the
sliding windows are shorter than the prompt, Qwen3's heads are wider than hidden / heads.

Recorded with torch 2.11.0, transformers 5.17.0, safetensors 0.8.0.
"""

import json
import pathlib
import sys
import zlib

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

FOLDER = pathlib.Path(__file__).parent / "recorded"
PROMPT_LEN = 48
POSITIONS = [0, 1, 2, 3, 7, 15, 16, 31, 47, 63, 100, 127, 200, 255, 511, 1023]
SIZES = dict(
    vocab_size=131,
    hidden_size=96,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)


def rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_MSCALE = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    beta_fast=16.0,
    beta_slow=2.0,
    mscale=0.9,
    mscale_all_dim=0.5,
    truncate=False,
)
LLAMA, MISTRAL = (LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)
QWEN2, QWEN3 = (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
MIXTRAL, QWEN3_MOE = (MixtralConfig, MixtralForCausalLM), (Qwen3MoeConfig, Qwen3MoeForCausalLM)
QWEN3_MOE_SIZES = dict(
    hidden_size=64,
    head_dim=24,
    num_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=40,
)
STABLELM = (StableLmConfig, StableLmForCausalLM)
STABLELM_ROPE = rope("default", partial_rotary_factor=0.25)
DEEPSEEK_V2 = (DeepseekV2Config, DeepseekV2ForCausalLM)
DEEPSEEK_V3 = (DeepseekV3Config, DeepseekV3ForCausalLM)
DEEPSEEK_SIZES = dict(
    hidden_size=72,
    intermediate_size=88,
    num_hidden_layers=3,
    num_key_value_heads=6,
    rms_norm_eps=1e-4,
    kv_lora_rank=32,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=40,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=40,
    n_shared_experts=2,
)

# name: (classes, changed configuration, dtype of the weights, older spelling of config.json)
CASES = {
    "llama": (LLAMA, dict(rms_norm_eps=1e-5), torch.bfloat16, True),
    "llama_tied_f32": (
        LLAMA,
        dict(tie_word_embeddings=True, num_hidden_layers=1, eos_token_id=[2, 3]),
        torch.float32,
        False,
    ),
    "llama_biases": (
        LLAMA,
        dict(attention_bias=True, mlp_bias=True, num_hidden_layers=1),
        torch.float16,
        False,
    ),
    "llama_linear": (
        LLAMA,
        dict(rope("linear", factor=4.0), num_hidden_layers=1),
        torch.bfloat16,
        False,
    ),
    "llama_llama3": (LLAMA, LLAMA3, torch.bfloat16, True),
    "llama_yarn": (LLAMA, dict(YARN, num_hidden_layers=1), torch.bfloat16, False),
    "llama_yarn_mscale": (LLAMA, dict(YARN_MSCALE, num_hidden_layers=1), torch.bfloat16, True),
    "mistral_window": (MISTRAL, dict(sliding_window=16, head_dim=16), torch.bfloat16, True),
    "qwen2_tied": (
        QWEN2,
        dict(tie_word_embeddings=True, use_sliding_window=False),
        torch.bfloat16,
        True,
    ),
    "qwen2_upper_window": (
        QWEN2,
        dict(use_sliding_window=True, sliding_window=12, max_window_layers=1),
        torch.bfloat16,
        False,
    ),
    "qwen3": (
        QWEN3,
        dict(hidden_size=64, head_dim=24, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        torch.bfloat16,
        False,
    ),
    "qwen3_tied": (
        QWEN3,
        dict(hidden_size=64, head_dim=32, num_hidden_layers=1, tie_word_embeddings=True),
        torch.bfloat16,
        True,
    ),
    "mixtral": (
        MIXTRAL,
        dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=72),
        torch.bfloat16,
        True,
    ),
    "mixtral_window": (
        MIXTRAL,
        dict(
            num_local_experts=4,
            num_experts_per_tok=1,
            intermediate_size=56,
            sliding_window=16,
            num_hidden_layers=1,
        ),
        torch.bfloat16,
        False,
    ),
    "qwen3_moe": (
        QWEN3_MOE,
        dict(QWEN3_MOE_SIZES, norm_topk_prob=True),
        torch.bfloat16,
        True,
    ),
    "qwen3_moe_dense_layers": (
        QWEN3_MOE,
        dict(
            QWEN3_MOE_SIZES,
            norm_topk_prob=False,
            num_hidden_layers=4,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
            use_sliding_window=True,
            sliding_window=20,
        ),
        torch.bfloat16,
        False,
    ),
    "stablelm": (STABLELM, dict(STABLELM_ROPE, layer_norm_eps=1e-3), torch.bfloat16, True),
    "stablelm_capped": (
        STABLELM,
        dict(
            rope("default", partial_rotary_factor=0.5),
            use_qkv_bias=True,
            num_hidden_layers=1,
            final_logit_softcapping=1.5,
        ),
        torch.bfloat16,
        False,
    ),
    "deepseek_v2": (
        DEEPSEEK_V2,
        dict(DEEPSEEK_SIZES, q_lora_rank=None, topk_method="greedy", routed_scaling_factor=1.5),
        torch.bfloat16,
        True,
    ),
    "deepseek_v2_groups": (
        DEEPSEEK_V2,
        dict(
            DEEPSEEK_SIZES,
            num_hidden_layers=2,
            q_lora_rank=48,
            attention_bias=True,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=4.0,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.7),
        ),
        torch.bfloat16,
        True,
    ),
    "deepseek_v3": (
        DEEPSEEK_V3,
        dict(
            DEEPSEEK_SIZES,
            kv_lora_rank=48,
            qk_nope_head_dim=16,
            v_head_dim=24,
            q_lora_rank=56,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=0.6,
            ),
        ),
        torch.bfloat16,
        False,
    ),
}


def randomize(model):
    """Weights large enough that attention is far from uniform and no norm is trivial."""
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.3)
        else:
            parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3)


def in_older_spelling(config):
    """Undoes the renaming of transformers 5, since most published models predate it."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    if parameters.get("rope_type") != "default":
        config["rope_scaling"] = parameters
    config["torch_dtype"] = config.pop("dtype")
    return config


@torch.no_grad()
def record(name):
    (config_class, model_class), changes, dtype, legacy = CASES[name]
    torch.manual_seed(zlib.crc32(name.encode()))
    config = config_class(**{**SIZES, **changes})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    randomize(model)
    model.to(dtype)
    folder = FOLDER / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    saved = json.loads((folder / "config.json").read_text())
    if legacy:
        saved = in_older_spelling(saved)
    (folder / "config.json").write_text(json.dumps(saved, indent=1) + "\n")

    model.float()
    # Built anew, because casting the model to its dtype has rounded the frequencies.
    rotary = model.model.rotary_emb = type(model.model.rotary_emb)(config)
    token_ids = torch.randint(3, config.vocab_size, (1, PROMPT_LEN))
    logits = model(token_ids, use_cache=False).logits[0]
    # The library reads this field in few of its families; ours means it in all of them.
    if cap := saved.get("final_logit_softcapping"):
        logits = cap * torch.tanh(logits / cap)
    positions = torch.tensor([POSITIONS])
    angles = rotary(torch.zeros(1, 1, 1), positions)
    # DeepSeek-V2's are complex numbers; others are repeated for both halves of a head.
    is_complex = torch.is_tensor(angles)
    cos, sin = (angles.real, angles.imag) if is_complex else angles
    half = cos.shape[-1] if is_complex else cos.shape[-1] // 2
    save_file(
        {
            "token_ids": token_ids[0].to(torch.uint32),
            "logits": logits.contiguous(),
            "positions": positions[0].to(torch.uint32),
            "cos": cos[0, :, :half].contiguous(),
            "sin": sin[0, :, :half].contiguous(),
        },
        folder / "expected.safetensors",
    )
    for file in folder.iterdir():
        file.chmod(0o644)
    print(f"{name}: logits of deviation {logits.std():.2f}")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        record(case)
