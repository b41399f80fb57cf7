"""Trains the byte-level BPE tokenizer on generated text and writes its Hugging Face files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from chat import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START, segments
from corpus import sample
from facts import CAPITALS, ELEMENTS
from sample import SPELL_CLOSE, SPELL_OPEN, unmark
from words import CITIES, NAMES, WORDS

CONTEXT = 2048
SPECIALS = [END_OF_TEXT, IM_START, IM_END]


def _texts(seed: int, count: int) -> Iterator[str]:
    for index in range(count):
        item = sample(seed, index, "main", set())
        yield "".join(unmark(piece) for piece, _ in segments(item.messages, item.tools))
    names = WORDS + NAMES + CITIES + list(CAPITALS) + list(CAPITALS.values()) + [name for name, _ in ELEMENTS]
    for name in names:
        yield f" {name} {name} {name}\n{name}" * 4


def train(vocab_size: int, seed: int, count: int) -> Tokenizer:
    """Learn the merges: digits stand alone, every byte has a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_texts(seed, count), trainer)
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {str(tokenizer.token_to_id(token)): {
        "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
    } for token in SPECIALS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, "bos_token": None,
        "eos_token": IM_END, "pad_token": END_OF_TEXT, "unk_token": None, "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT, "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Encoder:
    """Turns rendered chats into token ids, letter by letter where the text is marked so."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(path))
        self._letters: dict[str, list[int]] = {}

    def _letter(self, letter: str) -> list[int]:
        if letter not in self._letters:
            self._letters[letter] = self.tokenizer.encode(letter, add_special_tokens=False).ids
        return self._letters[letter]

    def encode(self, text: str) -> list[int]:
        """Token ids of one piece of text."""
        if SPELL_OPEN not in text:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for part in text.split(SPELL_OPEN):
            letters, closed, rest = part.partition(SPELL_CLOSE)
            if not closed:
                letters, rest = "", part
            for letter in letters:
                ids += self._letter(letter)
            ids += self.tokenizer.encode(rest, add_special_tokens=False).ids if rest else []
        return ids


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    write(train(args.vocab_size, args.seed, args.samples), args.out)


if __name__ == "__main__":
    main()
