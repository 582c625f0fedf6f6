"""Make `parcels.csv`: 800 messages to a parcel delivery company, with a teacher's answers and the right ones.

    python examples/generate.py            # writes examples/parcels.csv, the same bytes every time
    python examples/generate.py --seed 7 --count 2000 FILE     # others of the same kind, for whatever else needs some

Sentences are written by hand (`phrases.py`); this script fills slots, adds greetings, asides and typing
slips, and plays a teacher that is right about 95 times in 100: it mostly errs where a message could mean two
things, and now and then without a reason, as real ones do.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from phrases import AMBIGUOUS, ASIDES, CLOSERS, INTENTS, OPENERS, SLOTS

MESSAGES = 800
SEED = 20
AMBIGUOUS_SHARE = 0.08
HASTY = 0.45  # how often the teacher misreads a message that could mean two things
SLIP = 0.01  # how often it errs for no reason


def messages(seed: int = SEED, count: int = MESSAGES) -> Iterator[tuple[str, str, str]]:
    """Yield (text, teacher, gold), all texts different."""
    rng = random.Random(seed)
    labels = list(INTENTS)
    weights = [share for share, _ in INTENTS.values()]
    seen: set[str] = set()
    while len(seen) < count:
        if rng.random() < AMBIGUOUS_SHARE:
            core, gold, misread = rng.choice(AMBIGUOUS)
            teacher = misread if rng.random() < HASTY else gold
        else:
            gold = rng.choices(labels, weights)[0]
            core = rng.choice(INTENTS[gold][1])
            teacher = rng.choice(labels) if rng.random() < SLIP else gold
        text = slip(dress(core, rng), rng)
        if text not in seen:
            seen.add(text)
            yield text, teacher, gold


def dress(core: str, rng: random.Random) -> str:
    """Put a greeting before, an aside and thanks after, each only sometimes, and fill the slots."""
    parts = [core]
    if rng.random() < 0.22:
        parts.insert(rng.randrange(2), rng.choice(ASIDES))
    if rng.random() < 0.3:
        parts.insert(0, rng.choice(OPENERS))
    if rng.random() < 0.25:
        parts.append(rng.choice(CLOSERS))
    for index, part in enumerate(parts[:-1]):
        if part[-1] not in ".,:!?":
            parts[index] = f"{part}."
    return re.sub(r"\{(\w+)\}", lambda slot: fill(slot[1], rng), " ".join(parts))


def fill(slot: str, rng: random.Random) -> str:
    """Return a value for a slot; parcel codes and house numbers are made up."""
    if slot == "code":
        return f"PD{rng.randrange(10**6, 10**7)}"
    if slot == "number":
        return str(rng.randrange(1, 140))
    return rng.choice(SLOTS[slot])


def slip(text: str, rng: random.Random) -> str:
    """Type like people do: now and then in lower case, without the last stop, or with two letters swapped."""
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.2:
        text = text.rstrip(".?!")
    if rng.random() < 0.18:
        at = rng.randrange(len(text) - 1)
        if text[at : at + 2].isalpha():
            text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text


def main() -> None:
    """Write the file, beside this script unless another is named."""
    parser = argparse.ArgumentParser(description="Make messages to a parcel delivery company.")
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).with_name("parcels.csv"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=MESSAGES)
    given = parser.parse_args()
    with given.file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "teacher", "gold"])
        writer.writerows(messages(given.seed, given.count))


if __name__ == "__main__":
    main()
