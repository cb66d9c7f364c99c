"""The model card of a checkpoint, from the records of its run."""

import math
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError, redact
from data_prep.common.schema import read_json
from eval.common.scores import language_modeling_scores
from eval.reporting import sections
from eval.reporting.run_records import Curve, Environment, Record

_TEMPLATE = Path(__file__).with_name("model_card.md")


def model_card(
    record: Record,
    step: int,
    checkpoint: Path,
    repository: str,
    licence: str,
    pictures: list[Path],
) -> str:
    """Returns the text of `README.md` for the checkpoint of a step.

    Args:
        record: of its run, which may have continued after `step`.
        checkpoint: a folder with `config.json`.
        repository: `USER/NAME` on the Hub.
        licence: an identifier of the Hub, as `mit`.
        pictures: files of `eval.reporting.plots.plot_all`, in the folder of the card.

    Raises:
        UserError: if the run has no `environment.json`.
    """
    from huggingface_hub import ModelCard

    about = record.environment
    if about is None:
        raise UserError(f"run {record.name} has no environment.json, which a model card is made from")
    record = truncate_to_step(record, step)
    results = _evaluation_results(record, about, step)
    config = read_json(checkpoint / "config.json", dict[str, Any])
    tokens, settings = record.tokens(), record.settings
    card = ModelCard.from_template(
        _metadata(about, repository, licence, results),
        template_path=str(_TEMPLATE),
        write=sections,
        record=record,
        about=about,
        step=step,
        config=config,
        repository=repository,
        title=repository.rpartition("/")[2],
        initial=settings.get("model_name_or_path"),
        tokens=tokens.at(step) if tokens else None,
        seconds=record.seconds(),
        sources=", ".join(dict.fromkeys(map(sections.source, about.data))),
        prompt=repr(next(iter(settings.get("sample_prompts", [])), "The")),
        evaluation="\n\n".join(filter(None, [_evaluation_table(results), sections.pictures(pictures)])),
        samples_title=f"Samples of step {record.samples[-1].step}" if record.samples else "",
        prepared_by=[shlex.join(["python", "-m", *one.prepared_by]) for one in about.data if one.prepared_by],
    )
    return redact(str(card))


def _metadata(about: Environment, repository: str, licence: str, results: list[Any]) -> Any:
    """Returns what the Hub reads of a card."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        model_name=repository.rpartition("/")[2],
        base_model=about.base_model,
        datasets=sorted({one.source for one in about.data if one.revision}) or None,  # those on the Hub
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt-accelerate"],
        eval_results=results or None,
    )


def truncate_to_step(record: Record, step: int) -> Record:
    """Returns the record without what was logged after a step."""
    curves = {}
    for name, curve in record.curves.items():
        points = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if s <= step]
        if points:
            curves[name] = Curve(*map(list, zip(*points, strict=True)))
    samples = [sample for sample in record.samples if sample.step <= step]
    return replace(record, curves=curves, samples=samples)


def _evaluation_results(record: Record, about: Environment, step: int) -> list[Any]:
    """Returns all finite scores of the checkpoint of a step, as the Hub's `EvalResult`."""
    from huggingface_hub import EvalResult

    results = []

    def add(value: float | None, metric: str, description: str, dataset: str, name: str, **details: Any) -> None:
        if value is not None and math.isfinite(value):
            details |= {"dataset_type": dataset, "dataset_name": name, "metric_type": metric}
            details |= {"metric_name": description, "metric_value": round(value, 6)}
            results.append(EvalResult(task_type="text-generation", task_name="Text Generation", **details))

    only = about.data[0] if len(about.data) == 1 else None
    text = (only.source if only else "mixture", ", ".join(map(sections.source, about.data)))
    split: dict[str, Any] = {"dataset_split": "validation", "dataset_revision": only.revision if only else None}
    if (loss := _value_at(record, "val_loss", step)) is not None:
        perplexity = language_modeling_scores(loss, 1, 0)["perplexity"]
        add(loss, "loss", "Validation loss, nats per token", *text, **split)
        add(perplexity, "perplexity", "Perplexity per token", *text, **split)
        bits = _value_at(record, "val_bits_per_byte", step)
        add(bits, "bits_per_byte", "Bits per byte", *text, **split)
    limit = record.settings.get("hellaswag_limit")
    split = {"dataset_split": "validation", "dataset_args": {"limit": limit} if limit else None}
    for rule, metric in product(("completion", "lm_eval"), ("acc_norm", "acc")):
        value = _value_at(record, f"hellaswag/{rule}/{metric}", step)
        add(value, metric, f"{metric} by the {rule} rule", "Rowan/hellaswag", "HellaSwag", **split)
    name = f"step_{step:08d}"
    limits = record.harness_limits.get(name, {})
    for task, scores in record.harness.get(name, {}).items():
        details: dict[str, Any] = {"dataset_args": {"limit": limits[task]} if task in limits else None}
        for metric, value in scores.items():
            add(value, metric, f"{metric} by lm-evaluation-harness", task, task, **details)
    return results


def _value_at(record: Record, metric: str, step: int) -> float | None:
    """Returns the value of a metric at a step; None if it was not measured there."""
    curve = record.curves.get(metric, Curve())
    return curve.values[curve.steps.index(step)] if step in curve.steps else None


def _evaluation_table(results: list[Any]) -> str:
    notes = [f"the first {one.dataset_args['limit']:,} items" if one.dataset_args else "" for one in results]
    scores = [[one.dataset_name, one.metric_name, f"{one.metric_value:.4f}"] for one in results]
    rows = [[*score, note] for score, note in zip(scores, notes, strict=True)]
    return (
        sections.table(["data", "metric", "value", "of"], rows) if rows else "This checkpoint has not been evaluated."
    )
