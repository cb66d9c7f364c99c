"""GPT-3's quality classifier (Brown et al. 2020, arXiv:2005.14165, appendix A): curated text against raw text."""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command_line import UserError

HELD_OUT = 5  # one of so many curated documents is not learned from: alpha is fitted to its score
FEATURES = 2**18  # default of Spark's HashingTF, which appendix A's classifier reads


@dataclass(frozen=True)
class Classifier:
    """Logistic regression on hashed words: `weights` `[FEATURES]` and `intercept`; `alpha` of the rule that keeps
    documents by their scores."""

    weights: np.ndarray
    intercept: float
    alpha: float

    @classmethod
    def train(cls, curated: Iterable[str], raw: Iterable[str]) -> "Classifier":
        """Trains on the documents of both kinds, which have the same total weight, and fits alpha to curated documents
        that were held out (`UserError` if a kind has too few)."""
        from scipy import sparse
        from sklearn.linear_model import LogisticRegression

        matrices = []
        for kind, texts in (("curated", curated), ("raw", raw)):
            documents = iter(texts)
            if (first := next(documents, None)) is None:
                raise UserError(f"the quality classifier has no {kind} documents to learn from; name files with some")
            matrices.append(_vectorizer().transform(itertools.chain([first], documents)).tocsr())
        curated_features, raw_features = matrices
        is_held_out = np.arange(curated_features.shape[0]) % HELD_OUT == HELD_OUT - 1
        if not is_held_out.any():
            raise UserError(f"the quality classifier has fewer than {HELD_OUT} curated documents; name files with more")
        learned = sparse.vstack([curated_features[~is_held_out], raw_features])
        labels = np.repeat([1, 0], [(~is_held_out).sum(), raw_features.shape[0]])
        model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(learned, labels)
        scores = model.predict_proba(curated_features[is_held_out])[:, 1]
        return cls(model.coef_[0], float(model.intercept_[0]), fit_alpha(scores))

    def score(self, text: str) -> float:
        """Probability that `text` is curated."""
        logit = (_vectorizer().transform([text]) @ self.weights)[0] + self.intercept
        return float(1 / (1 + np.exp(-logit)))

    def save(self, path: Path) -> None:
        """Writes an `.npz` file."""
        np.savez(path, weights=self.weights, intercept=self.intercept, alpha=self.alpha)

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        """Reads the file of `save`."""
        with np.load(path) as file:
            return cls(file["weights"], float(file["intercept"]), float(file["alpha"]))


def fit_alpha(scores: np.ndarray) -> float:
    """Alpha of the Lomax distribution, which numpy's `pareto` draws from, that is likeliest for `1 - scores`.

    Appendix A chose its alpha, 9, to match the distribution of the scores of curated text. The density of a shortfall
    x = 1 - score is alpha (1 + x)^-(alpha + 1), so the maximum of the likelihood is at 1 / mean(log(1 + x)).
    """
    return float(1 / max(np.log1p(1 - scores).mean(), np.finfo(float).eps))


def keep(score: float, text: str, alpha: float, seed: int) -> bool:
    """Appendix A's rule, `pareto(alpha) > 1 - score`: keeps nearly all good documents, and some others.

    The draw is a function of text and seed, and so independent of the order of documents and of the number of tasks.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    generator = np.random.default_rng([seed, int.from_bytes(digest, "little")])
    return bool(generator.pareto(alpha) > 1 - score)


def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=FEATURES, token_pattern=r"\S+", alternate_sign=False)
