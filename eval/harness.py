"""EleutherAI's lm-evaluation-harness on any GPT-2, in this process.

python -m eval.harness runs/quickstart/checkpoints/step_00001000 --tasks lambada_openai,wikitext
python -m eval.harness gpt2 --tasks gpt2_zero_shot --limit 100 --batch_size 16

Other options go to the harness (`lm_eval run --help`). The plain `lm_eval --model hf --model_args
pretrained=CHECKPOINT` works too; add `--include_path eval/tasks` for the tasks over local files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.common.command_line import ArgumentParser, UserError, first_line, raise_all, run, unknown_name
from data_prep.common.files import write_text
from eval.reporting.records import harness_scores

if TYPE_CHECKING:
    from accelerate import Accelerator

    from modeling import GPTModel

TASKS = Path(__file__).with_name("tasks")


def check_installed() -> None:
    """Raises `UserError` if the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError('the harness is not installed; pip install "lm-eval[hf]"')


def check_tasks(tasks: list[str], include_path: str = str(TASKS)) -> Any:
    """Returns the harness's `TaskManager`. Raises `UserError` for unknown tasks, with the nearest known name."""
    check_installed()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    known = [*manager.all_tasks, *manager.all_groups, *manager.all_tags]
    problems = [
        f"task {unknown_name(task, known)}"
        for task in tasks
        if not manager.match_tasks([task]) and not task.endswith(".yaml") and not Path(task).is_dir()
    ]
    if problems:
        raise UserError("; ".join(problems) + " (all: lm_eval ls tasks)")
    return manager


def load_tasks(tasks: list[str], n_positions: int, include_path: str = str(TASKS)) -> Any:
    """Loads the data of `tasks` once and returns the harness's `TaskManager`. Raises `UserError` as `check_tasks`, for
    data that cannot be loaded, and for tasks that generate more tokens than the context has."""
    from datasets.exceptions import DatasetsError

    manager = check_tasks(tasks, include_path)
    try:
        loaded = manager.load(tasks)["tasks"]
    except (OSError, ImportError, ValueError, DatasetsError) as error:
        raise UserError(f"tasks {', '.join(tasks)}: {first_line(error)}") from error
    check_generation(loaded, n_positions)
    return manager


def check_generation(tasks: dict[str, Any], context: int, max_gen_toks: int = 0) -> None:
    """Raises `UserError` for tasks that generate so many tokens that no room is left for a prompt.

    Args:
        max_gen_toks: of tasks that do not say how many.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    generating = {name: task.config for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"}
    raise_all(
        [
            f"task {name!r} generates {wanted} tokens, which leaves no room for a prompt in a context of {context}; "
            f"leave it out"
            for name, config in generating.items()
            if (wanted := normalize_gen_kwargs(config.generation_kwargs or {}, max_gen_toks)["max_gen_toks"]) >= context
        ]
    )


def evaluate_tasks(
    accelerator: Accelerator,
    model: GPTModel,
    tokenizer: Any,
    tasks: list[str],
    task_manager: Any,
    *,
    output: Path,
    limit: int | None = None,
    batch_size: int = 16,
    check_stop: Callable[[bool], bool],
) -> dict[str, float]:
    """Runs harness tasks on a model in memory and writes the results to `output`. Collective. Returns scores keyed by
    `lm_eval/TASK/METRIC`, an empty dict on other ranks. `task_manager` is from `load_tasks`, `check_stop` as in
    `StoppableLM`.

    The harness seeds the random numbers of Python, numpy and torch.
    """
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    from eval.common.harness_model import StoppableLM
    from eval.common.models import evaluating

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about a model in memory, and about `limit`
    with evaluating(model):
        evaluated = StoppableLM(check_stop, pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        evaluated.accelerator = accelerator
        evaluated._rank, evaluated._world_size = accelerator.process_index, accelerator.num_processes
        options: dict[str, Any] = {"task_manager": task_manager, "limit": limit}
        results = lm_eval.simple_evaluate(evaluated, tasks=tasks, **options, log_samples=False, bootstrap_iters=0)
    if results is None:
        return {}
    write_text(output, json.dumps(results, indent=2, default=handle_non_serializable) + "\n")
    by_task = harness_scores(results).items()
    return {f"lm_eval/{task}/{metric}": value for task, scores in by_task for metric, value in scores.items()}


def main() -> None:
    parser = ArgumentParser("python -m eval.harness", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("tasks", required=True, metavar="A,B,...", help="tasks, or groups such as gpt3_zero_shot")
    parser.add_option("stock", action="store_true", help="use transformers' GPT-2 instead of GPTModel")
    parser.add_option("model_args", default="", metavar="A=B,...", help="of the harness's model, as dtype=bfloat16")
    parser.add_option("include_path", default=str(TASKS), help="folder of task files")
    parser.add_option("output_path", help="results; by default beside the checkpoint")
    args, others = parser.parse_known_args()
    from eval.common.models import check_folder

    check_folder(args.model)
    check_installed()
    from lm_eval import evaluator
    from lm_eval._cli.harness import HarnessCLI

    import eval.common.harness_model  # noqa: F401  registers "gpt-accelerate"

    evaluate: Any = evaluator.evaluate

    def check_and_evaluate(lm: Any, task_dict: dict[str, Any], **options: Any) -> Any:
        check_generation(task_dict["tasks"], lm.max_length, lm.max_gen_toks)
        return evaluate(lm=lm, task_dict=task_dict, **options)

    # Here, as the settings of its tasks are known only once it has loaded them and applied its own options.
    evaluator.evaluate = check_and_evaluate
    command = HarnessCLI()
    words = ["run", "--model", "hf" if args.stock else "gpt-accelerate", "--tasks", args.tasks]
    words += ["--model_args", ",".join(filter(None, [f"pretrained={args.model}", args.model_args]))]
    folder = Path(args.model).absolute()
    beside = folder if folder.is_dir() else Path(args.model.replace("/", "__"))  # here for a model on the Hub
    output = args.output_path or str(beside.with_name(f"{beside.name}.lm_eval.json"))
    words += ["--include_path", args.include_path, "--output_path", output]
    try:
        command.execute(command._parser.parse_args([*words, *others]))
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        check_tasks(args.tasks.split(","), args.include_path)  # raises with the nearest known name
        raise


if __name__ == "__main__":
    run(main)
