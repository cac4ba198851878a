"""Rows that are nearly the same: MinHash with bands (Broder 1997).

A row's shingles are its runs of five characters, white space and case aside.
"""

from collections.abc import Iterable

import numpy as np

SHINGLE = 5  # characters
BANDS, ROWS = 16, 4  # 64 hashes: pairs of similarity 0.7 share a band with probability 0.988
MULTIPLIERS = np.random.default_rng(0).integers(1, 1 << 63, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
POWERS = np.uint64(0x9E3779B97F4A7C15) ** np.arange(SHINGLE, dtype=np.uint64)


def signature(text: str) -> np.ndarray:
    """Return the smallest hashes of a text's shingles, (BANDS * ROWS,)."""
    codes = np.frombuffer("".join(text.lower().split()).encode("utf-32-le"), dtype=np.uint32)
    codes = np.pad(codes.astype(np.uint64), (0, max(0, SHINGLE - len(codes))))
    shingles = np.unique(sum(codes[i : len(codes) - SHINGLE + 1 + i] * POWERS[i] for i in range(SHINGLE)))
    mixed = shingles ^ (shingles >> np.uint64(31))
    hashes = mixed[None] * MULTIPLIERS[:, None]
    return (
        ((hashes ^ (hashes >> np.uint64(29))) * MULTIPLIERS[:1, None] >> np.uint64(32))
        .min(1)
        .astype(np.uint32)
    )


class NearDuplicates:
    """Finds, for every text in turn, an earlier one that is nearly the same.

    Args:
        threshold: the share of common shingles (Jaccard similarity) from which two texts count as the same.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.signatures: list[np.ndarray] = []
        self.places: list[str] = []
        self.bands: list[dict[bytes, int]] = [{} for _ in range(BANDS)]
        self.found: list[tuple[str, str, float]] = []
        self.num_found = 0

    def add(self, text: str, place: str) -> None:
        """Look for a text among those before it, and remember it if it is new."""
        hashes = signature(text)
        keys = [part.tobytes() for part in hashes.reshape(BANDS, ROWS)]
        for index in self.candidates(keys):
            similarity = float((self.signatures[index] == hashes).mean())
            if similarity >= self.threshold:
                self.num_found += 1
                if len(self.found) < 5:
                    self.found.append((place, self.places[index], similarity))
                return
        for band, key in zip(self.bands, keys, strict=True):
            band.setdefault(key, len(self.signatures))
        self.signatures.append(hashes)
        self.places.append(place)

    def candidates(self, keys: Iterable[bytes]) -> list[int]:
        """Return the earlier texts that share a band."""
        return sorted({band[key] for band, key in zip(self.bands, keys, strict=True) if key in band})
