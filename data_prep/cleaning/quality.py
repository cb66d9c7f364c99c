"""GPT-3's quality classifier (Brown et al. 2020, arXiv:2005.14165, appendix A): curated text against raw text."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.common.command_line import UserError

HELD_OUT = 5  # one of so many curated documents is not learned from: alpha is fitted to its score
FEATURES = 2**18  # default of Spark's HashingTF, which appendix A's classifier reads


@dataclass(frozen=True)
class Classifier:
    """scikit-learn's logistic regression on hashed words, with `alpha` of the rule for keeping a document."""

    model: Any
    alpha: float

    @classmethod
    def train(cls, curated: Iterable[str], raw: Iterable[str], alpha: float | None = None) -> "Classifier":
        """Trains on the documents of both kinds, which have the same total weight, and fits alpha, if it is not given,
        to curated documents that were held out (`UserError` if a kind has too few)."""
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        good, bad = list(curated), list(raw)
        if len(good) < HELD_OUT or not bad:
            needed = f"{len(good)} curated and {len(bad)} raw documents to learn from; it needs {HELD_OUT} and 1"
            raise UserError(f"the quality classifier has {needed}: name sources with more")
        held_out = good[HELD_OUT - 1 :: HELD_OUT]
        del good[HELD_OUT - 1 :: HELD_OUT]
        words = HashingVectorizer(n_features=FEATURES, token_pattern=r"\S+", alternate_sign=False)
        model = make_pipeline(words, LogisticRegression(class_weight="balanced", max_iter=1000))
        model.fit(good + bad, [1] * len(good) + [0] * len(bad))
        return cls(model, alpha or fit_alpha(model.predict_proba(held_out)[:, 1]))

    def scores(self, texts: list[str]) -> list[float]:
        """Probabilities that the texts are curated."""
        return self.model.predict_proba(texts)[:, 1].tolist()


def fit_alpha(scores: np.ndarray) -> float:
    """Maximum-likelihood alpha of the Lomax distribution (numpy's `pareto`) for `1 - scores`.

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
