"""Educational value of documents, as FineWeb-Edu's classifier scores it (Penedo et al. 2024, arXiv:2406.17557)."""

from collections.abc import Callable
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from data_prep.cleaning.examples import KeepExamples
from data_prep.cleaning.step_settings import Educational
from data_prep.common.command_line import UserError, first_line


class EducationalFilter(BaseFilter):
    """Keeps documents whose score, from 0 to 5, rounds to at least the threshold; notes both."""

    name = "educational value"

    def __init__(self, settings: Educational, examples: KeepExamples) -> None:
        super().__init__(examples, batch_size=settings.documents)
        self.settings = settings
        self.scores: Callable[[list[str]], list[float]] | None = None

    def filter(self, doc: Document) -> bool:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool]:
        """As in datatrove; whether each document is kept."""
        self.scores = self.scores or scorer(self.settings)
        results = []
        for document, score in zip(batch, self.scores([document.text for document in batch]), strict=True):
            document.metadata["score"] = score
            document.metadata["int_score"] = rounded = round(min(max(score, 0), 5))
            results.append(rounded >= self.settings.threshold)
        return results


def check(settings: Educational) -> None:
    """Refuses a model that is no classifier with one label (`UserError`)."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model {settings.model!r}: {first_line(error)}") from error
    if config.num_labels != 1:
        raise UserError(f"model {settings.model!r} has {config.num_labels} labels; educational value is one number")


def scorer(settings: Educational) -> Callable[[list[str]], list[float]]:
    """A function that scores a batch of texts, on an accelerator if there is one (`UserError` if the model cannot be
    loaded)."""
    from transformers import pipeline

    try:
        classifier: Any = pipeline("text-classification", settings.model, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model {settings.model!r}: {first_line(error)}") from error
    options = {"truncation": True, "max_length": settings.tokens, "function_to_apply": "none"}

    def scores(texts: list[str]) -> list[float]:
        return [found["score"] for found in classifier(texts, batch_size=len(texts), **options)]

    return scores
