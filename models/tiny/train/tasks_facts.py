"""Questions about the fact tables."""

from __future__ import annotations

import random

from facts import CAPITALS, COUNTS, DAYS, ELEMENTS, MONTH_DAYS, MONTHS, ORDINALS
from sample import Unit, ask, ends, vary

_CAPITAL = ["What is the capital of {x}?", "What's the capital of {x}?", "Which city is the capital of {x}?",
            "Name the capital of {x}.", "Tell me the capital of {x}.", "Capital of {x}?", "capital of {x}",
            "What is the capital city of {x}?", "Do you know the capital of {x}?"]
_COUNTRY = ["{x} is the capital of which country?", "Which country has {x} as its capital?",
            "What country is {x} the capital of?", "Of which country is {x} the capital?"]
_SYMBOL = ["What is the chemical symbol for {x}?", "What is the symbol of {x}?", "Which symbol does {x} have?",
           "Give me the chemical symbol of {x}.", "Chemical symbol of {x}?", "What's the symbol for {x}?"]
_ELEMENT = ["Which element has the symbol {x}?", "What element is {x}?", "Which chemical element is {x}?",
            "What does the chemical symbol {x} stand for?", "Name the element with the symbol {x}."]
_NUMBER = ["What is the atomic number of {x}?", "Which atomic number does {x} have?", "Atomic number of {x}?",
           "Tell me the atomic number of {x}.", "What's the atomic number of {x}?"]
_BY_NUMBER = ["Which element has atomic number {x}?", "What element has the atomic number {x}?",
              "Name the element with atomic number {x}."]


def _fact(rng: random.Random, templates: list[str], subject: str, reply: str, answer: str) -> Unit:
    weighted = templates[:1] * 2 + templates
    return ask("facts", vary(rng, rng.choice(weighted).format(x=subject)), reply, ends(answer))


def _capital(rng: random.Random) -> Unit:
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    if rng.random() < 0.65:
        return _fact(rng, _CAPITAL, country, f"The capital of {country} is {city}.", city)
    return _fact(rng, _COUNTRY, city, f"{city} is the capital of {country}.", country)


def _element(rng: random.Random) -> Unit:
    number = rng.randrange(len(ELEMENTS))
    name, symbol = ELEMENTS[number]
    kind = rng.choices((0, 1, 2, 3), (35, 25, 25, 15))[0]
    if kind == 0:
        return _fact(rng, _SYMBOL, name, f"The chemical symbol for {name} is {symbol}.", symbol)
    if kind == 1:
        return _fact(rng, _ELEMENT, symbol, f"{symbol} is the symbol for {name}.", name)
    if kind == 2:
        return _fact(rng, _NUMBER, name, f"The atomic number of {name} is {number + 1}.", str(number + 1))
    return _fact(rng, _BY_NUMBER, str(number + 1), f"The element with atomic number {number + 1} is {name}.", name)


def _neighbour(rng: random.Random) -> Unit:
    names, what = (MONTHS, "month") if rng.random() < 0.6 else (DAYS, "day")
    index = rng.randrange(len(names))
    name = names[index]
    if rng.random() < 0.5:
        other = names[(index + 1) % len(names)]
        templates = ["Which {w} comes after {x}?", "What {w} comes after {x}?", "What comes after {x}?",
                     "Which {w} follows {x}?", "What is the {w} after {x}?"]
        reply = f"After {name} comes {other}."
    else:
        other = names[(index - 1) % len(names)]
        templates = ["Which {w} comes before {x}?", "What {w} comes before {x}?", "What comes before {x}?",
                     "What is the {w} before {x}?"]
        reply = f"Before {name} comes {other}."
    return _fact(rng, [t.replace("{w}", what) for t in templates], name, reply, other)


def _calendar(rng: random.Random) -> Unit:
    kind = rng.randrange(5)
    if kind == 0:
        index = rng.randrange(12)
        days = MONTH_DAYS[index]
        templates = ["How many days does {x} have?", "How many days are in {x}?", "How many days are there in {x}?",
                     "How long is {x} in days?"]
        return _fact(rng, templates, MONTHS[index], f"{MONTHS[index]} has {days} days.", f"{days} days")
    if kind == 1:
        small, big, count = rng.choice(COUNTS)
        templates = [f"How many {small} are in a {{x}}?", f"How many {small} does a {{x}} have?",
                     f"How many {small} are there in a {{x}}?", f"How many {small} in a {{x}}?"]
        article = "An" if big == "hour" else "A"
        shown = [t.replace("a {x}", "an {x}") if big == "hour" else t for t in templates]
        return _fact(rng, shown, big, f"{article} {big} has {count} {small}.", f"{count} {small}")
    if kind == 2:
        names, what = (MONTHS, "month of the year") if rng.random() < 0.65 else (DAYS, "day of the week")
        index = rng.randrange(len(names))
        templates = [f"What is the {{x}} {what}?", f"Which is the {{x}} {what}?", f"Name the {{x}} {what}."]
        reply = f"The {ORDINALS[index]} {what} is {names[index]}."
        return _fact(rng, templates, ORDINALS[index], reply, names[index])
    return _neighbour(rng)


def facts(rng: random.Random) -> Unit:
    """One question about capitals, chemical elements or the calendar."""
    kind = rng.choices(("capital", "element", "calendar"), (40, 42, 18))[0]
    return {"capital": _capital, "element": _element, "calendar": _calendar}[kind](rng)
