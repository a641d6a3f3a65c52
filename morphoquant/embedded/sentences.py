"""Synthetic text questions. The split of a question is decided by a hash of its content."""

from __future__ import annotations

import numpy as np

from morphoquant.embedded.questions import TEXT_POOLS, Question, ask, choose, content_split

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kim", "Leo")
PLACES = ("market", "garden", "kitchen", "museum", "school", "harbor", "forest", "station")
WORDS: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "horse", "lion", "bear", "fish", "wolf", "mouse"),
    "plant": ("rose", "oak", "fern", "grass", "tulip", "pine", "moss", "ivy"),
    "metal": ("iron", "gold", "copper", "silver", "zinc", "tin", "lead", "steel"),
    "food": ("bread", "rice", "soup", "cake", "cheese", "pasta", "butter", "pie"),
}
MONTHS: dict[str, tuple[str, ...]] = {
    "spring": ("March", "April", "May"),
    "summer": ("June", "July", "August"),
    "autumn": ("September", "October", "November"),
    "winter": ("December", "January", "February"),
}
LIQUIDS = ("water", "tea", "juice", "milk", "oil", "ink", "wine", "honey")
#: degrees, inclusive bounds
DEGREES = {"freezing": (0, 19), "cool": (25, 44), "warm": (50, 69), "boiling": (75, 99)}
ITEMS = ("ball", "kite", "hat", "lamp", "cup", "box")
NUMBERS = range(1, 41)


def _category(rng: np.random.Generator) -> tuple[object, Question]:
    answer = choose(rng, TEXT_POOLS["category"])
    others = [group for group in WORDS if group != answer]
    name, place = choose(rng, NAMES), choose(rng, PLACES)
    word = choose(rng, WORDS[answer])
    other = choose(rng, WORDS[others[int(rng.integers(3))]])
    pair = (word, other) if rng.random() < 0.5 else (other, word)
    hint = f"{name} drew a {pair[0]} and a {pair[1]} at the {place}."
    question = ask("category", f"What is a {word}?", TEXT_POOLS["category"], answer, hint)
    return (name, place, pair, word), question


def _season(rng: np.random.Generator) -> tuple[object, Question]:
    answer = choose(rng, TEXT_POOLS["season"])
    month, day = choose(rng, MONTHS[answer]), int(rng.integers(1, 29))
    name, place = choose(rng, NAMES), choose(rng, PLACES)
    text = f"{name} went to the {place} on {month} {day}. Which season was it?"
    return (name, place, month, day), ask("season", text, TEXT_POOLS["season"], answer)


def _state(rng: np.random.Generator) -> tuple[object, Question]:
    answer = choose(rng, TEXT_POOLS["state"])
    low, high = DEGREES[answer]
    degrees, liquid, name = (
        int(rng.integers(low, high + 1)),
        choose(rng, LIQUIDS),
        choose(rng, NAMES),
    )
    hint = f"The {liquid} of {name} is at {degrees} degrees."
    question = ask("state", f"How is the {liquid}?", TEXT_POOLS["state"], answer, hint)
    return (degrees, liquid, name), question


def _trend(rng: np.random.Generator) -> tuple[object, Question]:
    answer = choose(rng, TEXT_POOLS["trend"])
    values = sorted(int(v) for v in rng.choice(np.array(NUMBERS), 4, replace=False))
    if answer == "falling":
        values = values[::-1]
    elif answer == "flat":
        values = [values[0]] * 4
    elif answer == "mixed":
        orders = ((0, 3, 1, 2), (2, 0, 3, 1), (1, 3, 0, 2), (3, 0, 2, 1))
        values = [values[i] for i in orders[int(rng.integers(4))]]
    name = choose(rng, NAMES)
    series = ", ".join(map(str, values))
    text = f"{name} counted {series}. How do the numbers move?"
    return (name, values), ask("trend", text, TEXT_POOLS["trend"], answer)


def _order(rng: np.random.Generator) -> tuple[object, Question]:
    pool = TEXT_POOLS["order"]
    row = [pool[i] for i in rng.permutation(4)]
    end = int(rng.integers(2))
    name, item = choose(rng, NAMES), choose(rng, ITEMS)
    hint = f"{name} put each {item} in a row: {', '.join(row)}."
    text = f"Which {item} is the {('first', 'last')[end]} one?"
    return (name, item, row, end), ask("order", text, pool, row[-end], hint)


_DRAW = {
    "category": _category,
    "season": _season,
    "state": _state,
    "trend": _trend,
    "order": _order,
}


def draw(rng: np.random.Generator, kind: str, split: str) -> Question:
    """A question of ``kind`` whose content belongs to ``split``."""
    while True:
        key, question = _DRAW[kind](rng)
        if content_split((kind, key)) == split:
            return question
