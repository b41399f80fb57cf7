"""Long-context look-ups: a fact stated 200 to 1,500 tokens before it is asked for."""

from __future__ import annotations

import random

from sample import Message, Unit, ends, text_key
from words import (ADJECTIVES, ANIMALS, CITIES, COLORS, FOODS, NAMES, NOUNS, OBJECTS, PLACES, VERBS, any_city, any_name,
                   pseudo_word, random_code)

Fact = tuple[str, str, str, str]
"""What is stated, how it is asked, the reply, the answer within the reply."""


def _fact(rng: random.Random) -> Fact:
    kind = rng.randrange(8)
    color, item, name, city = rng.choice(COLORS), rng.choice(OBJECTS), any_name(rng), any_city(rng)
    if kind == 0:
        number = str(rng.randint(100, 99999))
        return (f"The code of the {color} {item} is {number}.", f"What is the code of the {color} {item}?",
                f"The code of the {color} {item} is {number}.", number)
    if kind == 1:
        word = rng.choice((pseudo_word(rng, 2), rng.choice(NOUNS), random_code(rng)))
        return (f"The secret word of {name} is {word}.", f"What is the secret word of {name}?",
                f"The secret word of {name} is {word}.", word)
    if kind == 2:
        return (f"{name} lives in {city}.", f"Where does {name} live?", f"{name} lives in {city}.", city)
    if kind == 3:
        food = rng.choice(FOODS)
        return (f"{name}'s favorite food is {food}.", f"What is {name}'s favorite food?", f"{name}'s favorite food is {food}.", food)
    if kind == 4:
        age = str(rng.randint(3, 99))
        return (f"{name} is {age} years old.", f"How old is {name}?", f"{name} is {age} years old.", f"{age} years old")
    if kind == 5:
        animal, pet = rng.choice(ANIMALS), any_name(rng)
        return (f"The {animal} of {name} is called {pet}.",
                f"What is the {animal} of {name} called?", f"The {animal} of {name} is called {pet}.", pet)
    if kind == 6:
        place = rng.choice(PLACES)
        return (f"The {color} {item} is hidden in the {place}.", f"Where is the {color} {item} hidden?",
                f"The {color} {item} is hidden in the {place}.", place)
    hour = f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"
    return (f"The train to {city} leaves at {hour}.", f"When does the train to {city} leave?",
            f"The train to {city} leaves at {hour}.", hour)


_FILLER = ["The {a} {n} stood near the {p}.", "Many people like to {v} in the {p}.", "A {c} bird sat on the {n} and sang.",
           "It was {a} in the {p} that day.", "{m} went to {t} to {v} and to {w}.", "Nobody knew why the {n} was {c}.",
           "In the morning {m} ate some {f}.", "The {n} and the {o} were both {a}.", "Some say that a {k} can {v}.",
           "{m} and {l} like to {v} together.", "The way to the {p} is {a}.", "There were {d} {c} flowers in the garden.",
           "The {k} saw a {n} and began to {v}.", "Later it began to rain, and everyone went home.",
           "{m} bought a {c} {n} in {t}.", "The old {o} was {a} and {b}."]


def _filler(rng: random.Random) -> str:
    return rng.choice(_FILLER).format(
        a=rng.choice(ADJECTIVES), b=rng.choice(ADJECTIVES), n=rng.choice(NOUNS), o=rng.choice(NOUNS), p=rng.choice(PLACES),
        v=rng.choice(VERBS), w=rng.choice(VERBS), c=rng.choice(COLORS), m=rng.choice(NAMES), l=rng.choice(NAMES),
        t=rng.choice(CITIES), f=rng.choice(FOODS), k=rng.choice(ANIMALS), d=rng.randint(2, 99))


_INTRO = ["Read this text.", "Here is a text. Remember it.", "Please read the following and answer my question.", "Text:",
          "Read carefully:", "Remember the following."]


def _facts(rng: random.Random, count: int) -> list[Fact]:
    chosen: dict[str, Fact] = {}
    while len(chosen) < count:
        fact = _fact(rng)
        chosen.setdefault(fact[1], fact)
    return list(chosen.values())


def _key(question: str, answer: str) -> str:
    return f"lookup|{text_key(question)}|{text_key(answer)}"


def _length(rng: random.Random, short: bool) -> int:
    """How many filler sentences, of about nine tokens each."""
    if short:
        return rng.randint(0, 8)
    return rng.randint(14, 70) if rng.random() < 0.7 else rng.randint(70, 165)


def lookup(rng: random.Random, short: bool = False) -> Unit:
    """Facts hidden in filler, then one to several questions; the last one is the checked one."""
    count = rng.randint(1, 3) if short else rng.randint(3, 8)
    facts = _facts(rng, count)
    sentences = [_filler(rng) for _ in range(_length(rng, short))]
    for fact in facts:
        sentences.insert(rng.randint(0, len(sentences)), fact[0])
    text = " ".join(sentences)
    asked = rng.sample(facts, rng.randint(1, len(facts)))
    return _as_document(rng, text, asked) if rng.random() < 0.7 else _as_chat(rng, text, asked)


def _as_document(rng: random.Random, text: str, asked: list[Fact]) -> Unit:
    question = asked[0][1]
    first = rng.choice((f"{rng.choice(_INTRO)}\n{text}\n\n{question}", f"{text}\n\nQuestion: {question}",
                        f"{rng.choice(_INTRO)}\n\n{text}\n\nQuestion: {question}", f"{question}\n\n{text}"))
    messages: list[Message] = [{"role": "user", "content": first}, {"role": "assistant", "content": asked[0][2]}]
    for _, ask, reply, _ in asked[1:]:
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
    return Unit("lookup", messages, ends(asked[-1][3]), _key(asked[-1][1], asked[-1][3]))


def _as_chat(rng: random.Random, text: str, asked: list[Fact]) -> Unit:
    messages: list[Message] = [{"role": "user", "content": f"{rng.choice(_INTRO)}\n{text}"},
                               {"role": "assistant", "content": "I have read it. What would you like to know?"}]
    for _, ask, reply, _ in asked:
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
    return Unit("lookup", messages, ends(asked[-1][3]), _key(asked[-1][1], asked[-1][3]))


def remembered(rng: random.Random) -> tuple[list[Message], list[Message]]:
    """A fact the user tells about themselves, and the later question about it (for dialogues)."""
    name, city, food, color = any_name(rng), any_city(rng), rng.choice(FOODS), rng.choice(COLORS)
    number = rng.randint(2, 9999)
    told, reply, question, answer = rng.choice((
        (f"My name is {name}.", f"Nice to meet you, {name}!", "What is my name?", f"Your name is {name}."),
        (f"Hi, I am {name}.", f"Nice to meet you, {name}!", "Do you remember my name?", f"Your name is {name}."),
        (f"I'm called {name}.", f"Nice to meet you, {name}!", "What's my name?", f"Your name is {name}."),
        (f"I live in {city}.", f"I will remember that you live in {city}.", "Where do I live?", f"You live in {city}."),
        (f"My favorite food is {food}.", f"I will remember that you like {food}.", "What is my favorite food?",
         f"Your favorite food is {food}."),
        (f"My favorite color is {color}.", f"I will remember that you like {color}.", "What is my favorite color?",
         f"Your favorite color is {color}."),
        (f"Remember the number {number}.", f"I will remember the number {number}.", "Which number should you remember?",
         f"The number is {number}.")))
    return ([{"role": "user", "content": told}, {"role": "assistant", "content": reply}],
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
