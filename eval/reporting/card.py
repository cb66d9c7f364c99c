"""Model card of a checkpoint, written from the records of its run."""

import math
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError, redact
from data_prep.common.schema import read_json
from eval.loss import perplexity
from eval.reporting import sections
from eval.reporting.records import Curve, Environment, Record

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
        licence: an identifier of the Hub, such as `mit`.
        pictures: files of `eval.reporting.plots.plot_all`, in the folder of the card.

    Raises:
        UserError: if the run has no `environment.json`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    about = record.environment
    if about is None:
        raise UserError(f"run {record.name} has no environment.json, which a model card is made from")
    record = truncate_to_step(record, step)
    results, tokens = _evaluation_results(record, about, step), record.tokens()
    metadata = ModelCardData(
        model_name=repository.rpartition("/")[2],
        base_model=about.base_model,
        datasets=sorted({one.source for one in about.data if one.revision}) or None,  # those on the Hub
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt-accelerate"],
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        write=sections,
        record=record,
        about=about,
        step=step,
        config=read_json(checkpoint / "config.json", dict[str, Any]),
        repository=repository,
        tokens=tokens.at(step) if tokens else None,
        seconds=record.seconds(),
        sources=", ".join(dict.fromkeys(map(sections.source, about.data))),
        prompt=repr(record.samples[0].prompt if record.samples else "The"),
        evaluation="\n\n".join(filter(None, [_evaluation_table(results), sections.pictures(pictures)])),
        prepared_by=[shlex.join(["python", "-m", *one.prepared_by]) for one in about.data if one.prepared_by],
    )
    return redact(str(card))


def truncate_to_step(record: Record, step: int) -> Record:
    """Returns the record without entries after a step."""
    curves = {}
    for name, curve in record.curves.items():
        count = sum(s <= step for s in curve.steps)
        if count:
            curves[name] = Curve(curve.steps[:count], curve.values[:count])
    return replace(record, curves=curves, samples=[sample for sample in record.samples if sample.step <= step])


def _evaluation_results(record: Record, about: Environment, step: int) -> list[Any]:
    """Returns all finite scores of a step's checkpoint, as the Hub's `EvalResult`."""
    from huggingface_hub import EvalResult

    def value(metric: str) -> float | None:
        curve = record.curves.get(metric, Curve())
        return curve.values[curve.steps.index(step)] if step in curve.steps else None

    def dataset(kind: str, name: str, limit: Any = None, **details: Any) -> dict[str, Any]:
        return {
            "dataset_type": kind,
            "dataset_name": name,
            "dataset_args": {"limit": limit} if limit else None,
            **details,
        }

    only = about.data[0] if len(about.data) == 1 else None
    names = ", ".join(map(sections.source, about.data))
    split = {"dataset_split": "validation", "dataset_revision": only.revision if only else None}
    text = dataset(only.source if only else "mixture", names, **split)
    loss = value("val_loss")
    found = [
        (text, "loss", "Validation loss, nats per token", loss),
        (text, "perplexity", "Perplexity per token", None if loss is None else perplexity(loss)),
        (text, "bits_per_byte", "Bits per byte", value("val_bits_per_byte")),
    ]
    limit = record.settings.get("hellaswag_limit")
    items = dataset("Rowan/hellaswag", "HellaSwag", limit, dataset_split="validation")
    for rule, metric in product(("completion", "lm_eval"), ("acc_norm", "acc")):
        found.append((items, metric, f"{metric} by the {rule} rule", value(f"hellaswag/{rule}/{metric}")))
    limits = record.harness_limits.get(name := f"step_{step:08d}", {})
    for task, scores in record.harness.get(name, {}).items():
        items = dataset(task, task, limits.get(task))
        found += [(items, metric, f"{metric} by lm-evaluation-harness", score) for metric, score in scores.items()]
    kind: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text Generation"}
    return [
        EvalResult(**kind, **data, metric_type=metric, metric_name=title, metric_value=round(score, 6))
        for data, metric, title, score in found
        if score is not None and math.isfinite(score)
    ]


def _evaluation_table(results: list[Any]) -> str:
    if not results:
        return "This checkpoint has not been evaluated."
    rows = []
    for one in results:
        note = f"the first {one.dataset_args['limit']} items" if one.dataset_args else ""
        rows.append([one.dataset_name, one.metric_name, f"{one.metric_value:.4f}", note])
    return sections.table(["data", "metric", "value", "of"], rows)
