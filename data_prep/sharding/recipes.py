"""Recipes: YAML files that name data folders, how each is prepared, and their shares of a mixture."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_prep.common.command_line import UserError, option, raise_all
from data_prep.common.schema import STRICT, Positive, read_yaml, validate
from data_prep.reading.corpus import Corpus
from data_prep.reading.sources import Source


@dataclass(frozen=True)
class Recipe:
    """All that determines the contents of a data folder."""

    source: Source
    tokenizer: str = option(
        "gpt2", "'gpt2'; 'bpe' for one trained on the text; or a folder or name that AutoTokenizer loads"
    )
    vocab_size: int = option(4096, "tokens of a trained tokenizer, end of text included", type=int)
    shard_tokens: int | None = option(
        None, "tokens in a shard; 100M by default, or a twentieth of a smaller local corpus", type=int
    )
    val_shards: int = option(1, "number of validation shards, which are the first ones", type=int)
    dtype: Literal["uint16", "uint32"] | None = option(
        None, "by default the smaller one that holds the vocabulary", choices=("uint16", "uint32")
    )
    format: Literal["npy", "bin"] = option("npy", "of the shards; bin is llm.c's", choices=("npy", "bin"))
    on_bad_file: Literal["stop", "skip"] = option(
        "stop", "skip: leave out and list a file that cannot be read, from there on", choices=("stop", "skip")
    )

    def resolve(self, commit: str | None = None) -> Corpus:
        """Finds what the source consists of, as `Source.resolve`."""
        return self.source.resolve(commit, skip_bad_files=self.on_bad_file == "skip")


@dataclass(frozen=True)
class FolderSettings(Source):
    """How a folder is prepared, as the options of `python -m data_prep.prepare`; `weight` is its share of a mixture, in
    any unit."""

    tokenizer: str = "gpt2"
    vocab_size: Positive = 4096
    shard_tokens: Positive | None = None
    val_shards: Positive = 1
    dtype: Literal["uint16", "uint32"] | None = None
    format: Literal["npy", "bin"] = "npy"
    on_bad_file: Literal["stop", "skip"] = "stop"
    weight: Annotated[float, Field(gt=0)] | None = None

    def recipe(self) -> Recipe:
        """The recipe of the folder."""
        source = {one.name: getattr(self, one.name) for one in fields(Source)}
        others = {one.name: getattr(self, one.name) for one in fields(Recipe) if one.name != "source"}
        return Recipe(Source(**source), **others)


@dataclass(frozen=True)
class Recipes:
    """The folders of a recipe file, by their paths."""

    __pydantic_config__ = STRICT

    folders: dict[str, FolderSettings]

    def check_sources(self) -> None:
        """Finds all sources, as the last folder may begin days after the first (`UserError` with all problems)."""
        problems = []
        for name, settings in self.folders.items():
            try:
                settings.recipe().resolve()
            except UserError as error:
                problems.append(f"{name}: {error}")
        raise_all(problems, "folders cannot be prepared")

    def training_flags(self) -> str:
        """The options with which the trainer reads the folders."""
        weights = [f"{settings.weight:g}" for settings in self.folders.values() if settings.weight is not None]
        return f"--data {shlex.join(self.folders)}" + (f" --data_weights {' '.join(weights)}" if weights else "")


def read_recipes(path: Path) -> Recipes:
    """Reads a recipe file (`UserError` for one that is not right)."""
    recipes = validate(read_yaml(path), Recipes, str(path))
    if not recipes.folders:
        raise UserError(f"{path}: no folder is named")
    missing = [name for name, settings in recipes.folders.items() if settings.weight is None]
    if missing and len(missing) < len(recipes.folders):
        raise UserError(f"{path}: {missing[0]} has no weight, others have; give all folders one, or none")
    return recipes
