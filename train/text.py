"""Frozen text features of items: hashed TF-IDF, reduced by a truncated SVD.

1. tokens    lower-cased words and pairs of neighbours, hashed (CRC-32) into a fixed number of columns
2. weights   (1 + log tf) * idf, rows scaled to length 1
3. SVD       randomised subspace iteration (arXiv 0909.4061) from a fixed seed; rows scaled to one
             mean square

A pure function of the texts: no download, no language model, the same on every run.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["text_features"]

_WORD = re.compile(r"[a-z0-9]+")
_COLUMNS = 1 << 15
_ROOT_MEAN_SQUARE = 0.5  # of a feature: at 1 the first steps of Adam move the projection too far


def text_features(texts: Sequence[str], features: int) -> Tensor:
    """One row per text, fp32 [texts, features], contiguous; rows of root mean square 0.5 (zero for an empty text)."""
    if not texts:
        return torch.zeros(0, features)
    weights = _tf_idf(texts)
    rank = min(features, len(texts))
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(_COLUMNS, min(rank + 16, len(texts)), generator=generator)
    transposed = weights.t().coalesce()
    for _ in range(3):
        basis = transposed @ torch.linalg.qr(weights @ basis).Q
    left, values, _ = torch.linalg.svd(weights @ torch.linalg.qr(basis).Q, full_matrices=False)
    reduced = (left * values)[:, :rank]
    # The sign of a singular vector is arbitrary: make each column's largest entry positive.
    peaks = reduced.gather(0, reduced.abs().argmax(0, keepdim=True))
    reduced = torch.nn.functional.normalize(reduced * torch.where(peaks < 0, -1.0, 1.0), dim=1)
    padded = torch.nn.functional.pad(reduced, (0, features - rank)) * (_ROOT_MEAN_SQUARE * features**0.5)
    return padded.contiguous()  # the SVD's columns are


def _tf_idf(texts: Sequence[str]) -> Tensor:
    """Sparse matrix [texts, columns], fp32, rows of length 1."""
    counts = [Counter(_hashed_tokens(text)) for text in texts]
    documents = Counter(column for count in counts for column in count)
    rows, columns, values = [], [], []
    for index, count in enumerate(counts):
        row = sorted(count)
        tf = torch.tensor([float(count[column]) for column in row])
        df = torch.tensor([float(documents[column]) for column in row])
        weight = (1 + tf.log()) * torch.log((1 + len(texts)) / df)
        values.append(torch.nn.functional.normalize(weight, dim=0) if row else weight)
        columns.extend(row)
        rows.extend([index] * len(row))
    places = torch.tensor([rows, columns], dtype=torch.int64)
    size = (len(texts), _COLUMNS)
    return torch.sparse_coo_tensor(places, torch.cat(values), size, check_invariants=False).coalesce()


def _hashed_tokens(text: str) -> list[int]:
    words = _WORD.findall(text.lower())
    pairs = [f"{first} {second}" for first, second in pairwise(words)]
    return [zlib.crc32(token.encode()) % _COLUMNS for token in words + pairs]
