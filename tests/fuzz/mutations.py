"""Mutated images: the same ones for the same seed, on any machine."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.service.crafted import SEEDS

LENGTHS = (b"\0\0", b"\xff\xff", b"\x7f\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\1\0\0")


def mutants(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(name, file): each a seed picture with one to eight changes. The name repeats it: `mutant(name)`."""
    names = sorted(SEEDS)
    for number in range(count):
        name = f"{names[number % len(names)]}:{seed}:{number}"
        yield name, mutant(name)


def mutant(name: str) -> bytes:
    """The mutant of this name."""
    source = name.split(":")[0]
    rng = random.Random(name)
    data = bytearray(SEEDS[source]())
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        _change(data, rng)
    return bytes(data)


def _change(data: bytearray, rng: random.Random) -> None:
    """One change. Headers are short and matter most, so half of all changes fall into the first 64 bytes."""
    at = rng.randrange(min(len(data), 64) if rng.random() < 0.5 else len(data)) if data else 0
    length = rng.choice((1, 2, 4, 16, 64))
    match rng.randrange(8):
        case 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        case 1 if data:
            data[at] ^= 1 << rng.randrange(8)
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = rng.randbytes(length)
        case 4:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
        case 5:
            data[at : at + 4] = rng.choice(LENGTHS)
        case 6:
            other = SEEDS[rng.choice(sorted(SEEDS))]()
            start = rng.randrange(len(other))
            data[at : at + length] = other[start : start + length]
        case _:
            del data[max(1, at) :]
