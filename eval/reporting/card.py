"""The model card of a checkpoint: all of it from what its run has written down."""

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError, redact
from data_prep.common.schema import read_json
from eval.common.scores import language_modeling_scores
from eval.reporting import sections
from eval.reporting.run_records import Curve, Record
from eval.reporting.sections import section, table

_RULES = ("completion", "lm_eval")


def model_card(record: Record, step: int, checkpoint: Path, repository: str, licence: str, pictures: list[Path]) -> str:
    """The text of the `README.md` of the checkpoint of a step.

    Args:
        record: of its run, which may have gone on since.
        checkpoint: a folder with its `config.json`.
        repository: `USER/NAME` on the Hub.
        licence: an identifier of the Hub's, as in `mit`.
        pictures: those of `eval.reporting.plots.plot_all`, which lie beside the card.
    """
    from huggingface_hub import ModelCard

    if record.environment is None:
        raise UserError(f"run {record.name} has no environment.json, which a model card is made from")
    record = until(record, step)
    samples = sections.last_samples(record)
    config = read_json(checkpoint / "config.json", dict[str, Any])
    parts = [
        f"# {repository.rpartition('/')[2]}",
        _summary(record, step),
        section("Use", _use(record, config, repository)),
        section("Evaluation", "\n\n".join(filter(None, [_evaluation(record, step), sections.pictures(pictures)]))),
        section("Model", _architecture(record, config)),
        section("Training", _training(record, step)),
        section("Data", sections.data(record)),
        section(f"Samples of step {samples[0].step}", sections.samples(record)) if samples else "",
        section("Limits", _limits()),
        section("Reproduction", _reproduction(record, repository)),
        section("Environment", sections.environment(record)),
        section("Licence", f"`{licence}`"),
    ]
    metadata = _metadata(record, step, repository, licence)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")
    return redact(str(card))


def until(record: Record, step: int) -> Record:
    """The record as it was when a step was evaluated."""
    curves = {}
    for name, curve in record.curves.items():
        points = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if s <= step]
        if points:
            curves[name] = Curve(*map(list, zip(*points, strict=True)))
    samples = [sample for sample in record.samples if sample.step <= step]
    return replace(record, curves=curves, samples=samples)


def _metadata(record: Record, step: int, repository: str, licence: str) -> Any:
    from huggingface_hub import ModelCardData

    sources = [one.source for one in record.environment.data if one.revision]  # those of the Hub
    return ModelCardData(
        model_name=repository.rpartition("/")[2],
        base_model=record.environment.base_model,
        datasets=sorted(set(sources)) or None,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt-accelerate"],
        eval_results=evaluation_results(record, step) or None,
    )


def evaluation_results(record: Record, step: int) -> list[Any]:
    """All scores of the checkpoint of a step, as the Hub's `EvalResult`s."""
    from huggingface_hub import EvalResult

    def result(task: str, name: str, metric: str, value: float, pretty: str | None = None, **dataset: Any) -> Any:
        return EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=task,
            dataset_name=name,
            metric_type=metric,
            metric_name=pretty,
            metric_value=round(value, 6),
            **dataset,
        )

    found = []
    data = record.environment.data
    trained_on = ", ".join(map(sections.source, data))
    split = {"dataset_split": "validation", "dataset_revision": data[0].revision if len(data) == 1 else None}
    if (loss := _at(record, "val_loss", step)) is not None:
        scores = language_modeling_scores(loss, 1, 0)
        source = data[0].source if len(data) == 1 else "mixture"
        for metric, pretty in {"loss": "Validation loss, nats per token", "perplexity": "Perplexity per token"}.items():
            found.append(result(source, trained_on, metric, scores[metric], pretty, **split))
        if (bits := _at(record, "val_bits_per_byte", step)) is not None:
            found.append(result(source, trained_on, "bits_per_byte", bits, "Bits per byte", **split))
    limit = record.settings.get("hellaswag_limit")
    for rule in _RULES:
        for metric in ("acc_norm", "acc"):
            if (value := _at(record, f"hellaswag/{rule}/{metric}", step)) is not None:
                found.append(
                    result(
                        "Rowan/hellaswag",
                        "HellaSwag",
                        metric,
                        value,
                        f"{metric} by the {rule} rule",
                        dataset_split="validation",
                        dataset_args={"limit": limit} if limit else None,
                    )
                )
    limits = record.harness_limits.get(f"step_{step:08d}", {})
    for task, scores in record.harness.get(f"step_{step:08d}", {}).items():
        for metric, value in scores.items():
            found.append(
                result(
                    task,
                    task,
                    metric,
                    value,
                    f"{metric} by lm-evaluation-harness",
                    dataset_args={"limit": limits[task]} if task in limits else None,
                )
            )
    return [one for one in found if math.isfinite(one.metric_value)]


def _at(record: Record, metric: str, step: int) -> float | None:
    """The value of a metric at a step; None if it was not measured there."""
    curve = record.curves.get(metric, Curve())
    return curve.values[curve.steps.index(step)] if step in curve.steps else None


def _summary(record: Record, step: int) -> str:
    about = record.environment
    sources = ", ".join(dict.fromkeys(map(sections.source, about.data)))
    start = f"`{record.settings['init_from']}`" if record.settings.get("init_from") else "random weights"
    tokens = _tokens(record, step)
    return (
        f"A GPT-2 with {about.parameters:,} parameters, pre-trained from {start} on "
        f"{f'{tokens:,.0f}' if tokens else 'an unknown number of'} tokens of {sources}; step {step:,} of the run "
        f"`{record.name}`. An ordinary Hugging Face GPT-2 checkpoint, which everything that reads one loads."
    )


def _use(record: Record, config: dict[str, Any], repository: str) -> str:
    prompt = next(iter(record.settings.get("sample_prompts", [])), "The")
    return f"""```python
from transformers import pipeline

generate = pipeline("text-generation", model="{repository}")
print(generate({prompt!r}, max_new_tokens={min(50, config["n_positions"] // 2)})[0]["generated_text"])
```

`AutoModelForCausalLM.from_pretrained("{repository}", revision=...)` takes a commit, or a tag such as `step_00000500`
where there is one."""


def _evaluation(record: Record, step: int) -> str:
    rows = [
        [one.dataset_name, one.metric_name or one.metric_type, f"{one.metric_value:.4f}", _limit_note(one)]
        for one in evaluation_results(record, step)
    ]
    return table(["data", "metric", "value", "of"], rows) if rows else "This checkpoint has not been evaluated."


def _limit_note(result: Any) -> str:
    return f"the first {result.dataset_args['limit']:,} items" if result.dataset_args else ""


def _architecture(record: Record, config: dict[str, Any]) -> str:
    rows = [
        ["parameters", f"{record.environment.parameters:,}, embeddings tied to the head"],
        ["layers", str(config["n_layer"])],
        ["width", str(config["n_embd"])],
        ["attention heads", str(config["n_head"])],
        ["context", f"{config['n_positions']:,} tokens"],
        ["vocabulary", f"{config['vocab_size']:,}"],
        ["weights", "float32, safetensors"],
    ]
    return table(["", "GPT-2, decoder only"], rows)


def _tokens(record: Record, step: int) -> float | None:
    curve = record.tokens()
    return None if curve is None else curve.at(step)


def _training(record: Record, step: int) -> str:
    about, tokens, seconds = record.environment, _tokens(record, step), record.seconds()
    rows = [["tokens", sections.number(tokens, ",.0f")], ["steps", f"{step:,}"]]
    if tokens and (flops := about.flops_per_token):
        rows.append(["FLOPs", f"{tokens * flops:.3g}, of {flops:,.0f} a token"])
    rows.append(["hardware", sections.hardware(about)])
    if seconds:
        since = f" since step {seconds.steps[0]:,}, where it branched off" if seconds.steps[0] else ""
        took = sections.duration(seconds.at(step))
        rows.append(["time", f"{took} of training{since}, evaluations and checkpoints aside"])
    settings = f"<details><summary>All settings</summary>\n\n{sections.settings([record])}\n\n</details>"
    return f"{table(['', ''], rows)}\n\n{settings}"


def _limits() -> str:
    return (
        "A base model: it continues text and has not been taught to follow instructions, to be right or to be safe. It "
        "repeats what is in its data, errors and prejudices included. Evaluate it for your purpose before it is used."
    )


def _reproduction(record: Record, repository: str) -> str:
    about = record.environment
    lines = [
        f"# gpt-accelerate at commit {about.git_revision or 'unknown'}",
        f"hf download {repository} training_config.yaml --local-dir .",
        *(shlex.join(["python", "-m", *one.prepared_by]) for one in about.data if one.prepared_by),
    ]
    processes = f"--num_processes {about.num_processes} " if about.num_processes > 1 else ""
    lines.append(f"accelerate launch {processes}training/train.py training_config.yaml")
    return "```bash\n" + "\n".join(lines) + "\n```"
