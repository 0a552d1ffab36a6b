"""Seeds of torch generators: one per (run seed, purpose, step)."""

from __future__ import annotations

__all__ = ["STREAMS", "mixed_seed"]

# Purposes never share random numbers, whatever the run's seed.
STREAMS = (
    "target", "decompose", "evaluate", "initialise target", "initialise components", "start",
)  # fmt: skip
_MASK64 = 0xFFFFFFFFFFFFFFFF


def mixed_seed(seed: int, stream: str, step: int = 0) -> int:
    """A 63-bit generator seed in which every bit depends on all of (seed, stream, step).

    The splitmix64 finaliser (Steele, Lea, Flood 2014), because torch's CPU generator reads only
    the low 32 bits of a seed.

    Args:
        seed: of the run, below 2^32. stream: one of :data:`STREAMS`. step: below 2^32.
    """
    x = (seed << 35) ^ (STREAMS.index(stream) << 32) ^ step
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & _MASK64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
        x ^= x >> 31
    return x >> 1
