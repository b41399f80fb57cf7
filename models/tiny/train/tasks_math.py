"""Arithmetic and unit conversion."""

from __future__ import annotations

import random

from sample import Unit, ask, ends, polite, vary

_ADD = ["What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?", "Calculate {a} + {b}.", "Add {a} and {b}.",
        "What is {a} plus {b}?", "What is the sum of {a} and {b}?", "How much is {a} + {b}?", "Compute {a} + {b}."]
_SUB = ["What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?", "Calculate {a} - {b}.",
        "Subtract {b} from {a}.", "What is {a} minus {b}?", "How much is {a} - {b}?", "Compute {a} - {b}.",
        "What is {a} take away {b}?"]
_MUL = ["What is {a} x {b}?", "{a} * {b}", "{a}*{b}", "{a} x {b} = ?", "Calculate {a} * {b}.", "Multiply {a} by {b}.",
        "What is {a} times {b}?", "What is the product of {a} and {b}?", "How much is {a} x {b}?",
        "What is {a} * {b}?"]
_DIV = ["What is {a} / {b}?", "{a} / {b}", "Divide {a} by {b}.", "What is {a} divided by {b}?",
        "Calculate {a} / {b}.", "How much is {a} / {b}?"]


def _digits(value: int) -> list[int]:
    return [value // 10**place % 10 for place in range(3)]


def _add_reply(a: int, b: int) -> str:
    if a < 100 and b < 100:
        return f"{a} + {b} = {a + b}."
    steps, carry = [], 0
    for x, y in zip(_digits(a), _digits(b)):
        total = x + y + carry
        steps.append(f"{x}+{y}+1={total}" if carry else f"{x}+{y}={total}")
        carry = total // 10
    return f"{', '.join(steps)}, so {a} + {b} = {a + b}."


def _sub_reply(a: int, b: int) -> str:
    if a < 100 and b < 100 or a < b:
        return f"{a} - {b} = {a - b}."
    steps, borrow = [], 0
    for x, y in zip(_digits(a), _digits(b)):
        top = x - borrow
        borrow = int(top < y)
        top += 10 * borrow
        steps.append(f"{top}-{y}={top - y}")
    return f"{', '.join(steps)}, so {a} - {b} = {a - b}."


def _mul_reply(a: int, b: int) -> str:
    if max(a, b) <= 12:
        return f"{a} x {b} = {a * b}."
    tens, ones = a // 10 * 10, a % 10
    return f"{tens} x {b} = {tens * b}, {ones} x {b} = {ones * b}, so {a} x {b} = {a * b}."


def _number(rng: random.Random, three_digit: float) -> int:
    roll = rng.random()
    if roll < three_digit:
        return rng.randint(100, 999)
    if roll < three_digit + 0.08:
        return rng.randint(0, 9)
    return rng.randint(10, 99)


def _operands(rng: random.Random) -> tuple[int, int]:
    three = 0.75 if rng.random() < 0.5 else 0.0
    return _number(rng, three), _number(rng, three)


def arithmetic(rng: random.Random) -> Unit:
    """A sum, difference, small product or exact quotient; working is shown from three digits on."""
    kind = rng.choices(("add", "sub", "mul", "div"), (38, 36, 20, 6))[0]
    if kind == "add":
        a, b = _operands(rng)
        templates, reply, value = _ADD, _add_reply(a, b), a + b
    elif kind == "sub":
        a, b = _operands(rng)
        if a < b and not (b <= 20 and rng.random() < 0.5):
            a, b = b, a
        templates, reply, value = _SUB, _sub_reply(a, b), a - b
    elif kind == "mul":
        a, b = (rng.randint(13, 99), rng.randint(2, 9)) if rng.random() < 0.5 else (rng.randint(0, 12), rng.randint(0, 12))
        templates, reply, value = _MUL, _mul_reply(a, b), a * b
    else:
        b, value = rng.randint(1, 12), rng.randint(1, 12)
        a = b * value
        templates, reply = _DIV, f"{a} / {b} = {value}."
    template = rng.choice(templates[:1] * 2 + templates)
    prompt = vary(rng, template.format(a=a, b=b))
    memorised = kind == "div" or kind == "mul" and max(a, b) <= 12 or max(a, b) < 20
    key = f"arithmetic|{kind}:{a}:{b}:{template}" if memorised else f"arithmetic|{kind}:{a}:{b}"
    return ask("arithmetic", prompt, reply, ends(str(value)), key)


_UNITS: list[tuple[str, str, int]] = [
    ("kilometers", "meters", 1000), ("meters", "centimeters", 100), ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000), ("liters", "milliliters", 1000), ("hours", "minutes", 60),
    ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7), ("years", "months", 12),
    ("feet", "inches", 12), ("yards", "feet", 3), ("tons", "kilograms", 1000), ("dozen", "pieces", 12),
    ("decades", "years", 10), ("centuries", "years", 100), ("pounds", "ounces", 16), ("gallons", "quarts", 4),
]
_SYMBOLS = {"kilometers": "km", "meters": "m", "centimeters": "cm", "millimeters": "mm", "kilograms": "kg",
            "grams": "g", "liters": "l", "milliliters": "ml", "minutes": "min", "inches": "in", "feet": "ft"}
_CONVERT = ["Convert {n} {x} to {y}.", "How many {y} are in {n} {x}?", "How many {y} is {n} {x}?",
            "What is {n} {x} in {y}?", "{n} {x} in {y}", "{n} {x} to {y}", "How many {y} are there in {n} {x}?",
            "Change {n} {x} into {y}.", "Express {n} {x} in {y}."]


def _one(name: str) -> str:
    return {"feet": "foot", "inches": "inch", "centuries": "century", "dozen": "dozen"}.get(name, name[:-1])


def units(rng: random.Random) -> Unit:
    """A conversion between two units, in either direction, or a temperature."""
    if rng.random() < 0.1:
        return _temperature(rng)
    big, small, factor = rng.choice(_UNITS)
    n = rng.randint(1, 20 if factor in (10, 100, 1000) else 12)
    many = n * factor
    name_big = _one(big) if n == 1 else big
    template = rng.choice(_CONVERT)
    short = rng.random() < 0.25
    shown = _SYMBOLS if short else {}
    if rng.random() < 0.7:
        request = template.format(n=n, x=shown.get(big, name_big), y=shown.get(small, small))
        reply, value = f"{n} x {factor} = {many}, so {n} {name_big} = {many} {small}.", f"{many} {small}"
    else:
        request = template.format(n=many, x=shown.get(small, small), y=shown.get(big, big))
        reply, value = f"{many} / {factor} = {n}, so {many} {small} = {n} {name_big}.", f"{n} {name_big}"
    return ask("units", vary(rng, polite(rng, request) if request[0] in "CE" else request), reply, ends(value))


def _temperature(rng: random.Random) -> Unit:
    celsius = rng.randrange(-10, 105, 5)
    fahrenheit = celsius * 9 // 5 + 32
    template = rng.choice(_CONVERT[:1] + _CONVERT[3:6])
    if rng.random() < 0.6:
        prompt = template.format(n=celsius, x="degrees Celsius", y="Fahrenheit")
        reply, value = f"{celsius} degrees Celsius = {fahrenheit} degrees Fahrenheit.", f"{fahrenheit} degrees Fahrenheit"
    else:
        prompt = template.format(n=fahrenheit, x="degrees Fahrenheit", y="Celsius")
        reply, value = f"{fahrenheit} degrees Fahrenheit = {celsius} degrees Celsius.", f"{celsius} degrees Celsius"
    return ask("units", vary(rng, prompt), reply, ends(value))
