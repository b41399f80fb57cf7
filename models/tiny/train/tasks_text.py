"""String work (spell, reverse, count, sort, upper-case) and repeat-after-me."""

from __future__ import annotations

import random

from sample import Unit, ask, ends, polite, spelled, vary
from words import ADJECTIVES, ANIMALS, CITIES, COLORS, NAMES, NOUNS, VERBS, any_name, any_word, pseudo_word, random_code


def _quote(rng: random.Random, word: str) -> str:
    return rng.choice((word, word, f'"{word}"', f"'{word}'"))


def _spell(rng: random.Random, word: str) -> Unit:
    prompt = rng.choice(("Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "Spell out {w}.",
                         "Write {w} letter by letter.", "Can you spell {w}?"))
    return ask("strings", vary(rng, prompt.format(w=_quote(rng, word))), " ".join(word) + ".")


def _reverse(rng: random.Random, word: str) -> Unit:
    prompt = rng.choice(("Reverse the word {w}.", "Reverse {w}.", "Write {w} backwards.", "What is {w} backwards?",
                         "Spell {w} backwards.", "What is {w} reversed?", "Reverse the string {w}."))
    back = word[::-1]
    reply = f"{' '.join(word)} -> {' '.join(back)}: {spelled(back)}"
    return ask("strings", vary(rng, polite(rng, prompt.format(w=_quote(rng, word)))
               if prompt[0] in "RWS" and prompt[1] != "h" else prompt.format(w=_quote(rng, word))), reply, ends(back))


def _length(rng: random.Random, word: str) -> Unit:
    prompt = rng.choice(("How many letters are in {w}?", "How many letters does {w} have?", "Count the letters in {w}.",
                         "How long is the word {w}?", "How many letters are in the word {w}?",
                         "What is the length of {w}?"))
    steps = " ".join(f"{letter}{index}" for index, letter in enumerate(word, 1))
    reply = f"{steps}: {len(word)} letters."
    return ask("strings", vary(rng, prompt.format(w=_quote(rng, word))), reply, ends(f"{len(word)} letters"))


def _count(rng: random.Random, word: str) -> Unit:
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("aeioustrn")
    prompt = rng.choice(("How many times does {c} appear in {w}?", "How many {c}'s are in {w}?",
                         "Count the letter {c} in {w}.", "How many times is the letter {c} in {w}?",
                         "How often does the letter {c} occur in {w}?", "How many letters {c} are in {w}?"))
    steps, seen = [], 0
    for item in word:
        seen += item == letter
        steps.append(f"{item}{seen}" if item == letter else item)
    reply = f"{' '.join(steps)}: {letter} appears {seen} {'time' if seen == 1 else 'times'}."
    return ask("strings", vary(rng, prompt.format(c=letter, w=_quote(rng, word))), reply,
               ends(f"{seen} {'time' if seen == 1 else 'times'}"))


def _sort_letters(rng: random.Random, word: str) -> Unit:
    word = word[:7]
    prompt = rng.choice(("Sort the letters of {w}.", "Sort the letters in {w}.", "Put the letters of {w} in order.",
                         "Sort the letters of {w} alphabetically."))
    ordered = "".join(sorted(word))
    reply = f"{' '.join(word)} -> {' '.join(ordered)}: {spelled(ordered)}"
    return ask("strings", vary(rng, polite(rng, prompt.format(w=_quote(rng, word)))), reply, ends(ordered))


def _sort_items(rng: random.Random) -> Unit:
    count = rng.randint(3, 5)
    if rng.random() < 0.6:
        values = rng.sample(range(0, 100 if rng.random() < 0.7 else 10), count)
        items, ordered, what = [str(v) for v in values], [str(v) for v in sorted(values)], "numbers"
    else:
        pool: dict[str, str] = {w[0]: w for w in rng.sample(NOUNS + ANIMALS, 12)}
        items = rng.sample(list(pool.values()), min(count, len(pool)))
        ordered, what = sorted(items), "words"
    prompt = rng.choice(("Sort these {k}: {l}", "Sort the {k} {l}.", "Put these {k} in order: {l}", "Sort {l}.",
                         "Arrange the {k} {l} in order."))
    return ask("strings", vary(rng, polite(rng, prompt.format(k=what, l=", ".join(items)))), ", ".join(ordered))


def _upper(rng: random.Random) -> Unit:
    phrase = " ".join(any_word(rng) for _ in range(rng.choice((1, 1, 2, 2, 3))))
    if rng.random() < 0.15:
        phrase = any_name(rng)
    prompt = rng.choice(("Write {w} in upper case.", "Upper-case {w}.", "Make {w} uppercase.", "Convert {w} to uppercase.",
                         "Put {w} in capital letters.", "Write {w} in capitals.", "Turn {w} into capital letters."))
    quoted = phrase if " " not in phrase and rng.random() < 0.5 else rng.choice((f'"{phrase}"', f"'{phrase}'", phrase))
    upper = phrase.upper()
    return ask("strings", vary(rng, polite(rng, prompt.format(w=quoted))), spelled(upper),
               {"kind": "exact", "any_of": [upper]})


def strings(rng: random.Random) -> Unit:
    """One piece of work on the letters of a word or on a short list."""
    word = any_word(rng)
    kind = rng.choices(("spell", "reverse", "length", "count", "letters", "items", "upper"),
                       (14, 20, 14, 16, 12, 14, 14))[0]
    if kind == "items":
        return _sort_items(rng)
    if kind == "upper":
        return _upper(rng)
    makers = {"spell": _spell, "reverse": _reverse, "length": _length, "count": _count, "letters": _sort_letters}
    return makers[kind](rng, word)


_REPEAT = ["Repeat after me: {t}", "Repeat: {t}", "Say: {t}", "Say {t}", "Repeat this: {t}", "Please repeat: {t}",
           "Echo this back: {t}", "Write exactly this: {t}", "Copy this: {t}", "Say exactly: {t}",
           "Repeat the following: {t}", "Can you say {t}"]


def _phrase(rng: random.Random) -> str:
    kind = rng.randrange(6)
    if kind == 0:
        return " ".join(any_word(rng) for _ in range(rng.randint(1, 12)))
    if kind == 1:
        return " ".join(str(rng.randint(0, 9999)) for _ in range(rng.randint(1, 6)))
    if kind == 2:
        return " ".join(random_code(rng) for _ in range(rng.randint(1, 4)))
    if kind == 3:
        return " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 6)))
    if kind == 4:
        sentence = f"{any_name(rng)} and the {rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)} {rng.choice(VERBS)} to " \
                   f"{rng.choice(CITIES)} with {rng.randint(2, 99)} {rng.choice(COLORS)} {rng.choice(NOUNS)}s"
        return sentence + rng.choice(".!?")
    mixed = [rng.choice((any_word(rng), any_name(rng), str(rng.randint(0, 999)), random_code(rng), rng.choice(NAMES)))
             for _ in range(rng.randint(2, 10))]
    return rng.choice((" ", ", ", " - ", "; ")).join(mixed)


def repeat(rng: random.Random) -> Unit:
    """Copy a phrase of random words, numbers and codes exactly."""
    phrase = _phrase(rng)
    template = rng.choice(_REPEAT)
    if rng.random() < 0.25 and " {t}" in template and template[-4] == " " and ":" in template:
        template = template.replace("{t}", '"{t}"')
    return ask("repeat", template.format(t=phrase), phrase, {"kind": "exact", "any_of": [phrase]})


def copy(rng: random.Random) -> Unit:
    """A long phrase to copy: what teaches a young model to look back."""
    phrase = " ".join(_phrase(rng) for _ in range(rng.randint(2, 4)))
    return ask("repeat", rng.choice(_REPEAT).format(t=phrase), phrase)
