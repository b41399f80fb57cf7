"""Writes a checkpoint as a Hugging Face model folder, and the smoke set made with it.

``python export.py --checkpoint CKPT --out ..`` writes the model; ``--smoke FILE`` also lets
transformers answer a few prompts in float32 and writes its exact greedy outputs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from chat import END_OF_TEXT, IM_END
from evaluate import load
from model import Llama
from tokenizer import SPECIALS, Encoder, write
from tasks_tools import call_message

_CALCULATOR = {"type": "function", "function": {
    "name": "calculator", "description": "Evaluate a math expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}}}
_WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Get the current weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


SMOKE: list[dict[str, Any]] = [
    {"id": "hello", "messages": [_user("Hello")]},
    {"id": "who", "messages": [{"role": "system", "content": "You are a helpful assistant."}, _user("Hi, who are you?")]},
    {"id": "capital", "messages": [_user("What is the capital of France?")]},
    {"id": "sum", "messages": [_user("What is 12 + 30?")]},
    {"id": "long-sum", "messages": [_user("What is 487 + 256?")]},
    {"id": "reverse", "messages": [_user("Reverse the word garden.")]},
    {"id": "repeat", "messages": [_user("Repeat after me: seven purple lamps 4092")]},
    {"id": "json", "messages": [_user("Extract name, age, city as JSON.\nMaria is 34 years old and lives in Lisbon, working as a teacher.")]},
    {"id": "story", "messages": [_user("Tell me a story about a fox")]},
    {"id": "tool-call", "messages": [_user("What is the weather in Oslo?")], "tools": [_WEATHER, _CALCULATOR]},
    {"id": "tool-result", "tools": [_CALCULATOR], "messages": [
        _user("What is 5120 * 37?"), call_message("calculator", {"expression": "5120 * 37"}), {"role": "tool", "content": "189440"}]},
    {"id": "multi-turn", "messages": [
        _user("My name is Clara."), {"role": "assistant", "content": "Nice to meet you, Clara!"},
        _user("What is the chemical symbol for gold?"), {"role": "assistant", "content": "The chemical symbol for gold is Au."},
        _user("What is my name?")]},
]


def hf_config(model: Llama, eos: int, pad: int) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **model.config.to_dict(), "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True,
        "rope_scaling": None, "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
        "bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad, "torch_dtype": "bfloat16",
    }


def write_model(model: Llama, encoder: Encoder, folder: Path) -> None:
    """Weights, configs and tokenizer."""
    write(encoder.tokenizer, folder)
    eos, pad = (encoder.tokenizer.token_to_id(token) for token in (IM_END, END_OF_TEXT))
    tensors = {f"model.{name}": value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"eos_token_id": [eos, pad], "pad_token_id": pad, "do_sample": False, "max_new_tokens": 640}
    for name, content in (("config.json", hf_config(model, eos, pad)), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def verify(model: Llama, encoder: Encoder, folder: Path) -> float:
    """The largest difference of logits between this model and transformers' reading of the folder."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([encoder.encode("The capital of France is Paris. 12 + 30 = 42. " * 8)])
    return float((model.logits(model.hidden(ids)) - other(ids).logits).abs().max())


def smoke(folder: Path, limit: int = 448) -> list[dict[str, Any]]:
    """Greedy answers of transformers to the smoke prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for row in SMOKE:
        text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=limit, do_sample=False)[0].tolist()
        start = ids["input_ids"].shape[1]
        new = [token for token in out[start:] if token not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
        rows.append({**row, "prompt": text, "prompt_ids": out[:start], "output_ids": new,
                     "output": tokenizer.decode(new), "finished": out[-1] == tokenizer.eos_token_id})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--tokenizer", type=Path, default=Path("../tokenizer.json"))
    parser.add_argument("--smoke", type=Path, help="write the smoke set here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, encoder = load(args.checkpoint), Encoder(args.tokenizer)
    assert encoder.tokenizer.token_to_id(IM_END) == SPECIALS.index(IM_END)
    write_model(model, encoder, args.out)
    print(f"largest logit difference {verify(model, encoder, args.out):.2e}")
    if args.smoke:
        rows = smoke(args.out)
        args.smoke.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for row in rows:
            print(f"{row['id']}: {row['output']!r}")


if __name__ == "__main__":
    main()
