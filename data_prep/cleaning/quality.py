"""GPT-3's quality classifier (Brown et al. 2020, arXiv:2005.14165, appendix A): curated text against raw text."""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command_line import UserError

PARETO_ALPHA = 9  # of appendix A, chosen there to match the distribution of the scores of curated text
FEATURES = 2**18  # default of Spark's HashingTF, which appendix A's classifier reads


@dataclass(frozen=True)
class Classifier:
    """Logistic regression on hashed words: `weights` `[FEATURES]` and `intercept`."""

    weights: np.ndarray
    intercept: float

    @classmethod
    def train(cls, curated: Iterable[str], raw: Iterable[str]) -> "Classifier":
        """Trains on the documents of both kinds, which have the same total weight (`UserError` if one is empty)."""
        from scipy import sparse
        from sklearn.linear_model import LogisticRegression

        matrices = []
        for kind, texts in (("curated", curated), ("raw", raw)):
            documents = iter(texts)
            if (first := next(documents, None)) is None:
                raise UserError(f"the quality classifier has no {kind} documents to learn from; name files with some")
            matrices.append(_vectorizer().transform(itertools.chain([first], documents)))
        labels = np.repeat([1, 0], [matrix.shape[0] for matrix in matrices])
        model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(sparse.vstack(matrices), labels)
        return cls(model.coef_[0], float(model.intercept_[0]))

    def score(self, text: str) -> float:
        """Probability that `text` is curated."""
        logit = (_vectorizer().transform([text]) @ self.weights)[0] + self.intercept
        return float(1 / (1 + np.exp(-logit)))

    def save(self, path: Path) -> None:
        """Writes an `.npz` file."""
        np.savez(path, weights=self.weights, intercept=self.intercept)

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        """Reads the file of `save`."""
        with np.load(path) as file:
            return cls(file["weights"], float(file["intercept"]))


def keep(score: float, text: str, seed: int) -> bool:
    """Appendix A's rule, `pareto(9) > 1 - score`: keeps nearly all good documents, and some others.

    The draw is a function of text and seed, and so independent of the order of documents and of the number of tasks.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    generator = np.random.default_rng([seed, int.from_bytes(digest, "little")])
    return bool(generator.pareto(PARETO_ALPHA) > 1 - score)


def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=FEATURES, token_pattern=r"\S+", alternate_sign=False)
