"""Recipes: how a data folder is prepared, and YAML files that name several with their shares of a mixture."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from data_prep.common.command_line import UserError, option, raise_all
from data_prep.common.records import Dtype, Format
from data_prep.common.schema import STRICT, Positive, read_yaml, validate
from data_prep.reading.corpus import Corpus
from data_prep.reading.sources import Source


@dataclass(frozen=True)
class Recipe:
    """All that determines the contents of a data folder, and its share of a mixture."""

    __pydantic_config__ = STRICT

    source: Source
    tokenizer: str = option(
        "gpt2", "'gpt2'; 'bpe' for one trained on the text; or a folder or name that AutoTokenizer loads"
    )
    vocab_size: Positive = option(4096, "tokens of a trained tokenizer, end of text included", type=int)
    shard_tokens: Positive | None = option(
        None, "tokens in a shard; 100M by default, or a twentieth of a smaller local corpus", type=int
    )
    val_shards: Positive = option(1, "number of validation shards, which are the first ones", type=int)
    dtype: Dtype | None = option(
        None, "by default the smaller one that holds the vocabulary", choices=("uint16", "uint32")
    )
    format: Format = option("npy", "of the shards; bin is llm.c's", choices=("npy", "bin"))
    on_bad_file: Literal["stop", "skip"] = option(
        "stop", "skip: leave out and list a file that cannot be read, from there on", choices=("stop", "skip")
    )
    weight: Annotated[float, Field(gt=0)] | None = None

    def resolve(self, commit: str | None = None) -> Corpus:
        """Finds what the source consists of, as `Source.resolve`."""
        return self.source.resolve(commit, skip_bad_files=self.on_bad_file == "skip")


def read_recipes(path: Path) -> dict[Path, Recipe]:
    """Reads the recipe of each folder in a YAML file, whose settings are the options of `python -m data_prep.prepare`,
    and `weight` (`UserError` for an invalid file)."""
    content = validate(read_yaml(path), _RecipeFile, str(path))
    recipes = {}
    for name, settings in content.folders.items():
        source = {field.name: settings.pop(field.name) for field in fields(Source) if field.name in settings}
        recipes[Path(name)] = validate(settings | {"source": source}, Recipe, f"{path}: {name}")
    missing = [name for name, recipe in recipes.items() if recipe.weight is None]
    if missing and len(missing) < len(recipes):
        raise UserError(f"{path}: {missing[0]} has no weight, others have; give all folders one, or none")
    return recipes


@dataclass(frozen=True)
class _RecipeFile:
    __pydantic_config__ = STRICT

    folders: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


def check_sources(recipes: dict[Path, Recipe]) -> None:
    """Finds all sources, as the last folder may begin days after the first (`UserError` with all problems)."""
    problems = []
    for folder, recipe in recipes.items():
        try:
            recipe.resolve()
        except UserError as error:
            problems.append(f"{folder}: {error}")
    raise_all(problems, "folders cannot be prepared")


def training_flags(recipes: dict[Path, Recipe]) -> str:
    """The options with which the trainer reads the folders."""
    weights = [f"{recipe.weight:g}" for recipe in recipes.values() if recipe.weight is not None]
    return f"--data {shlex.join(map(str, recipes))}" + (f" --data_weights {' '.join(weights)}" if weights else "")
