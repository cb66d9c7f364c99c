"""GPT-3's quality classifier: what it learns, and the rule that it keeps documents by."""

import random

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

from data_prep.cleaning.quality import Classifier, fit_alpha, keep
from data_prep.common.command_line import UserError


def texts(seed, vocabulary, count):
    draw = random.Random(seed)
    return [" ".join(draw.choices(vocabulary, k=40)) for _ in range(count)]


SHARED = [f"both{i}" for i in range(20)]
GOOD, BAD = [*SHARED, "treatise", "hence", "moreover"], [*SHARED, "click", "subscribe", "cheap"]


@pytest.fixture(scope="module")
def classifier():
    return Classifier.train(texts(0, GOOD, 30), texts(1, BAD, 90))


def test_scores_are_those_of_scikit_learns_model(classifier):
    vectorizer = HashingVectorizer(n_features=2**18, token_pattern=r"\S+", alternate_sign=False)
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    learned = [text for i, text in enumerate(texts(0, GOOD, 30)) if i % 5 != 4]  # the others are for alpha
    model.fit(vectorizer.transform(learned + texts(1, BAD, 90)), [1] * 24 + [0] * 90)
    unseen = texts(2, GOOD, 5) + texts(3, BAD, 5) + ["never seen words"]
    expected = model.predict_proba(vectorizer.transform(unseen))[:, 1]
    assert classifier.scores(unseen) == pytest.approx(expected.tolist())
    assert min(expected[:5]) > 0.5 > max(expected[5:10])


def test_both_kinds_are_needed():
    for curated, raw in (([], ["a", "b"]), (["a"] * 4, ["b"]), (["a"] * 5, [])):
        counts = f"{len(curated)} curated and {len(raw)} raw documents to learn from; it needs 5 and 1"
        with pytest.raises(UserError, match=counts):
            Classifier.train(curated, raw)


def test_alpha_is_scipys_fit_to_the_scores_of_held_out_curated_documents(classifier):
    held_out = np.array(classifier.scores(texts(0, GOOD, 30)[4::5]))
    expected, location, scale = stats.lomax.fit(1 - held_out, floc=0, fscale=1)
    assert (location, scale) == (0, 1) and classifier.alpha == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("alpha", [2, 9, 40])
def test_alpha_is_found_again_in_what_was_drawn_with_it(alpha):
    drawn = np.random.default_rng(0).pareto(alpha, 200_000)
    assert fit_alpha(1 - drawn) == pytest.approx(alpha, rel=0.01)


@pytest.mark.parametrize("score", [0.0, 0.5, 0.9, 1.0])
def test_documents_are_kept_as_often_as_the_pareto_distribution_says(score):
    """numpy's pareto is Lomax: P(X > x) = (1 + x)^-alpha."""
    kept = np.mean([keep(score, f"document {i}", alpha=9, seed=3) for i in range(4000)])
    expected = (1 + (1 - score)) ** -9
    assert abs(kept - expected) <= 4 * np.sqrt(expected * (1 - expected) / 4000)


def test_the_draw_depends_on_text_and_seed_alone():
    first = [keep(0.9, f"document {i}", alpha=9, seed=0) for i in range(200)]
    assert first == [keep(0.9, f"document {i}", alpha=9, seed=0) for i in reversed(range(200))][::-1]
    assert first != [keep(0.9, f"document {i}", alpha=9, seed=1) for i in range(200)]
    assert len(set(first)) == 2
