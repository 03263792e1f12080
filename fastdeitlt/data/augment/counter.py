"""Counter-based random numbers, pure functions of (seed, epoch, sample, copy).

The SplitMix64 sequence (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), started at a
hash of the key. Uses arrays throughout: NumPy's uint64 arrays wrap silently, as the hash needs.
"""

# B samples, n numbers a sample

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's output hash elementwise (uint64 to uint64, a bijection)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys(*parts: int | np.ndarray) -> np.ndarray:
    """Return one key per element of broadcast (seed, epoch, ...), uint64 [B]."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        part = np.atleast_1d(np.asarray(part, np.int64)).view(np.uint64)
        state = mix(state * _GOLDEN + mix(part + _GOLDEN))
    return state


def words(key_B: np.ndarray, stream: int, n: int) -> np.ndarray:
    """Return the first ``n`` words of a key's numbered stream, uint64 [B, n]."""
    start_B = mix(key_B + mix(np.array([stream + 1], np.uint64)))
    return mix(start_B[:, None] + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN)


def uniform(key_B: np.ndarray, stream: int, n: int) -> np.ndarray:
    """Return uniform float64 in [0, 1) with 53 random bits, [B, n]."""
    return (words(key_B, stream, n) >> np.uint64(11)) * 2.0**-53


def normal(key_B: np.ndarray, stream: int, n: int) -> np.ndarray:
    """Return standard normal float64 [B, n] (Box-Muller, cosine branch)."""
    u_Bn, v_Bn = np.split(uniform(key_B, stream, 2 * n), 2, axis=1)
    return np.sqrt(-2.0 * np.log1p(-u_Bn)) * np.cos(2.0 * np.pi * v_Bn)
