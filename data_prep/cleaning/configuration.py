"""Settings of a cleaning: read from YAML, and checked completely before anything runs."""

import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from data_prep.common.command_line import first_line
from data_prep.common.schema import STRICT, Positive, find_problems

INSTALL = 'pip install "gpt-accelerate[clean]"'


class CleaningSource(BaseModel):
    """A source to clean: parameters of `data_prep.sources.source.Source`, or a datatrove reader with its parameters."""

    model_config = ConfigDict(**{**STRICT, "extra": "allow"})
    reader: str | None = None


class StepSettings(BaseModel):
    """A step and its parameters; it applies to `sources` only, or to all of them if None."""

    model_config = ConfigDict(**{**STRICT, "extra": "allow"})
    step: str
    sources: list[str] | None = None


def _named(key: str) -> BeforeValidator:
    return BeforeValidator(lambda given: {key: given} if isinstance(given, str) else given)


class CleanConfig(BaseModel):
    """Settings of a cleaning, explained in `data_prep/configs/clean.yaml`."""

    model_config = STRICT
    sources: dict[str, Annotated[CleaningSource, _named("source")]] = Field(default_factory=dict)
    output: str = ""
    steps: list[Annotated[StepSettings, _named("step")]] = Field(default_factory=list)
    executor: Literal["local", "slurm", "ray"] = "local"
    executor_settings: dict[str, Any] = Field(default_factory=dict)
    tasks: Positive = 1
    workers: Positive = 1


def make_executor(config: CleanConfig, stage: Any, logs: Path, depends: Any, problems: list[str]) -> Any:
    """Makes datatrove's executor of a pass, to run after `depends`; adds to `problems` as `construct` does."""
    name = config.executor
    kind = pkgutil.resolve_name(f"datatrove.executor.{name}:{name.capitalize()}PipelineExecutor")
    ours = {"pipeline": stage.pipeline, "tasks": stage.tasks, "workers": min(config.workers, stage.tasks)}
    ours |= {"logging_dir": str(logs), "depends": depends, "skip_completed": True}
    return construct(kind, config.executor_settings, "executor_settings", problems, **ours)


def construct(kind: Callable[..., Any], settings: dict[str, Any], where: str, problems: list[str], **ours: Any) -> Any:
    """Calls `kind` with the settings as arguments; if it rejects them, adds the reason to `problems` and returns None.

    Args:
        where: the name of the settings, for messages.
        ours: arguments that are no settings, for those parameters that `kind` has.
    """
    parameters = inspect.signature(kind, eval_str=True).parameters
    fields: dict[str, Any] = {
        name: (_with_lists(parameter.annotation), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in parameters.items()
        if name not in ours and parameter.kind is not parameter.VAR_KEYWORD
    }
    schema = create_model(kind.__name__, __config__={**STRICT, "arbitrary_types_allowed": True}, **fields)
    if found := find_problems(settings, schema, where):
        problems += [f"{where}: {problem}" for _, problem in found]
        return None
    try:
        if "language" in parameters:
            language = settings.get("language", parameters["language"].default)
            pkgutil.resolve_name("datatrove.utils.word_tokenizers:load_word_tokenizer")(language)
        return kind(**settings, **{name: value for name, value in ours.items() if name in parameters})
    except Exception as error:  # datatrove's constructors raise many types
        problems.append(f"{where}: {first_line(error)}")
        return None


def _with_lists(hint: Any) -> Any:
    """Accepts lists where a type hint says tuple: datatrove annotates tuples of any length as `tuple[int]`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.Union[tuple(map(_with_lists, typing.get_args(hint)))]  # noqa: UP007
    return list if tuple in (hint, typing.get_origin(hint)) else hint
