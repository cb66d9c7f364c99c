"""Steps of a cleaning, and the settings of each."""

import importlib
import inspect
import pkgutil
import types
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, create_model

from data_prep.cleaning.decontamination import COMMON_DOCUMENTS
from data_prep.common.schema import STRICT, Positive
from data_prep.reading.sources import Source

# datatrove's blocks that look at one document each.
_BLOCKS = {
    "trafilatura": "extractors:Trafilatura",
    "url": "filters:URLFilter",
    "language": "filters:LanguageFilter",
    "gopher_repetition": "filters:GopherRepetitionFilter",
    "gopher_quality": "filters:GopherQualityFilter",
    "c4": "filters:C4QualityFilter",
    "fineweb": "filters:FineWebQualityFilter",
}
# Parameters of theirs that are not settings of a step.
_BLOCK_ARGUMENTS = ("exclusion_writer", "language")


@dataclass(frozen=True)
class Documents:
    """A request for documents, as in `data_prep.reading.sources.Source`; `text_column` is that of the cleaning if not
    given."""

    __pydantic_config__ = STRICT

    source: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str | None = None
    where: list[str] = field(default_factory=list)

    def request(self, text_column: str) -> Source:
        """The request, with the default for its column."""
        column = self.text_column or text_column
        return Source(self.source, self.name, self.split, self.revision, column, where=tuple(self.where))


@dataclass(frozen=True)
class MinLength:
    """Drops documents with fewer characters; the default is SlimPajama's."""

    __pydantic_config__ = STRICT

    characters: Positive = 200


@dataclass(frozen=True)
class ExactDedup:
    """Keeps one of the documents with the same text."""

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class MinHash:
    """Keeps one of the documents with nearly the same set of word n-grams; `jaccard` is the similarity of the pairs
    that are found with probability one half."""

    __pydantic_config__ = STRICT

    jaccard: Annotated[float, Field(ge=0.5, le=0.8)] = 0.7
    ngram: Positive = 5


@dataclass(frozen=True)
class QualityClassifier:
    """GPT-3's classifier; its training documents take about five bytes of memory for each byte of text. `alpha` is
    fitted to the scores of curated documents if not given; GPT-3's was 9."""

    __pydantic_config__ = STRICT

    curated: list[Documents]
    raw: list[Documents]
    documents: Positive = 100_000
    alpha: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class Educational:
    """Drops documents whose educational value, by a classifier with one label, is below `threshold` when rounded, as
    FineWeb-Edu did (Penedo et al. 2024, arXiv:2406.17557, section 4).

    Attributes:
        tokens: of a document that the classifier reads.
        documents: in a batch.
    """

    __pydantic_config__ = STRICT

    model: str = "HuggingFaceFW/fineweb-edu-classifier"
    revision: str | None = None
    threshold: int = 3
    tokens: Positive = 512
    documents: Positive = 16


@dataclass(frozen=True)
class Decontamination:
    """GPT-3's decontamination; `fields` as in `data_prep.cleaning.evaluation_sets.read_items`."""

    __pydantic_config__ = STRICT

    against: list[str]
    fields: list[str] | None = None
    common_documents: Positive = COMMON_DOCUMENTS


# In order of execution: fast ones first; duplicates before the classifiers, so that each text is scored once;
# evaluation sets last, so that no later step joins or changes texts. None: parameters of datatrove's block.
STEPS: dict[str, type | None] = {
    **dict.fromkeys(["trafilatura", "url", "language"]),
    "min_length": MinLength,
    **dict.fromkeys(["gopher_repetition", "gopher_quality", "c4", "fineweb"]),
    "exact_dedup": ExactDedup,
    "minhash": MinHash,
    "quality_classifier": QualityClassifier,
    "educational": Educational,
    "decontamination": Decontamination,
}
# Steps that compare documents with each other, and so cannot differ between sources.
TOGETHER = ("exact_dedup", "minhash", "decontamination")


def block_class(name: str) -> type:
    """datatrove's block of a step."""
    return pkgutil.resolve_name(f"datatrove.pipeline.{_BLOCKS[name]}")


def check_packages(name: str) -> None:
    """Raises an `ImportError` if packages that datatrove's block of a step needs are missing, or cannot be imported."""
    from datatrove.utils._import_utils import check_required_dependencies

    needed = [package for base in block_class(name).__mro__ for package in getattr(base, "_requires_dependencies", [])]
    check_required_dependencies(name, needed)
    for package in needed:
        importlib.import_module(package if isinstance(package, str) else package[0])


def schema_of(name: str) -> Any:
    """The schema of a step's settings."""
    return STEPS[name] or parameters(block_class(name), _BLOCK_ARGUMENTS)


def parameters(kind: type, without: tuple[str, ...]) -> Any:
    """A pydantic model of the parameters of datatrove's class `kind`."""
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    fields: dict[str, Any] = {
        name: (_with_lists(hints.get(name, Any)), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in without and parameter.kind is not parameter.VAR_KEYWORD
    }
    return create_model(kind.__name__, __config__=STRICT, **fields)


def _with_lists(hint: Any) -> Any:
    """A type hint with lists for tuples: datatrove annotates tuples of any length as `tuple[int]`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.Union[tuple(map(_with_lists, typing.get_args(hint)))]  # noqa: UP007
    return list if tuple in (hint, typing.get_origin(hint)) else hint
