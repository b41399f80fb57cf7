#!/usr/bin/env python3
"""Writes the models that engines are compared on: real shapes, random weights, one tokenizer.

For each name a folder in Hugging Face's layout (config.json, tokenizer, model.safetensors in bf16)
and, with --gguf, the same weights as GGUF in f16, ready for llama-quantize. The GGUF is written
directly: llama.cpp's converter needs PyTorch and refuses tokenizers that it has never seen. Rows
of q and k are not permuted as it would; with random weights that changes nothing that takes time.

    make_models.py --out DIR [--gguf] bench-0.5b bench-1b
"""

import argparse
import json
import math
import pathlib
import string

import numpy as np

VOCAB_SIZE = 32768
END_OF_TEXT = "<|endoftext|>"

MODELS: dict[str, dict] = {
    "bench-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    "bench-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    # For trying this script and compare-peers.sh out; it says nothing about any engine.
    "bench-nano": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
}


def config_of(name: str) -> dict:
    """config.json of a model."""
    return {
        **MODELS[name],
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": VOCAB_SIZE - 1,
        "eos_token_id": VOCAB_SIZE - 1,
    }


def byte_symbols() -> list[str]:
    """The printable character for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + rest.index(byte)) for byte in range(256)]


def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a byte-level BPE: bytes, then words of two and three letters."""
    tokens, merges = byte_symbols(), []
    space = byte_symbols()[ord(" ")]
    for first in ["", space]:
        starts = [first + letter for letter in string.ascii_lowercase]
        if first:
            merges += [(first, letter) for letter in string.ascii_lowercase]
            tokens += starts
        for _ in range(2):
            pairs = [(start, letter) for start in starts for letter in string.ascii_lowercase]
            starts = [start + letter for start, letter in pairs]
            merges += pairs
            tokens += starts
    room = VOCAB_SIZE - 1 - 256
    return tokens[: 256 + room] + [END_OF_TEXT], merges[:room]


def tensors_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the order of computation."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, q)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        shapes[at + "mlp.gate_proj.weight"] = (wide, hidden)
        shapes[at + "mlp.up_proj.weight"] = (wide, hidden)
        shapes[at + "mlp.down_proj.weight"] = (hidden, wide)
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def bf16_bits(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random weights as tokenmill's --load-format dummy makes them: either sign, 2^-7 to 2^-5."""
    if name.endswith("norm.weight"):
        return np.full(shape, 0x3F80, dtype=np.uint16)
    if name.endswith("bias"):
        return np.zeros(shape, dtype=np.uint16)
    bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), dtype=np.uint16)
    return ((bits & 0x80FF) | 0x3C00).reshape(shape)


def write_safetensors(path: pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """All tensors, bf16, in one file."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            bf16_bits(name, shape, rng).tofile(file)


def write_tokenizer(folder: pathlib.Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokens, merges = vocabulary()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": VOCAB_SIZE - 1, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": [f"{left} {right}" for left, right in merges]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768,
              "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[stem]}.{kind}"


def write_gguf(path: pathlib.Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """The same weights for llama.cpp: matrices in f16, the rest in f32."""
    import gguf

    head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    writer = gguf.GGUFWriter(path, config["model_type"])
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(VOCAB_SIZE)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.NORMAL] * (VOCAB_SIZE - 1) + [gguf.TokenType.CONTROL]
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(VOCAB_SIZE - 1)
    writer.add_eos_token_id(VOCAB_SIZE - 1)
    writer.add_add_bos_token(False)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = (bf16_bits(name, shape, rng).astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(gguf_name(name), values.astype(np.float16) if len(shape) == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(MODELS), metavar="MODEL")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the models")
    parser.add_argument("--gguf", action="store_true", help="also write MODEL/f16.gguf")
    args = parser.parse_args()
    for name in args.models:
        folder, config = args.out / name, config_of(name)
        shapes = tensors_of(config)
        folder.mkdir(parents=True, exist_ok=True)
        # Written under another name first: what is there is whole.
        if not (folder / "model.safetensors").exists():
            (folder / "config.json").write_text(json.dumps(config, indent=2))
            write_tokenizer(folder)
            write_safetensors(folder / "model.part", shapes)
            (folder / "model.part").rename(folder / "model.safetensors")
        if args.gguf and not (folder / "f16.gguf").exists():
            write_gguf(folder / "f16.part", config, shapes)
            (folder / "f16.part").rename(folder / "f16.gguf")
        print(folder)


if __name__ == "__main__":
    main()
