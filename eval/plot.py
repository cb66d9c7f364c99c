"""Plot the training and validation loss of a run.

python -m eval.plot runs/quickstart
"""

from pathlib import Path

from data_prep.cli import ArgumentParser, UserError, run


def read_log(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each kind (`train`, `val`, ...) in a log of lines `STEP KIND VALUE`.

    Raises:
        UserError: for a file that cannot be read, or a line that is not such a line.
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            step, kind, value = line.split()
            steps, values = curves.setdefault(kind, ([], []))
            steps.append(int(step))
            values.append(float(value))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a log of lines 'STEP KIND VALUE' ({error})") from error
    return curves


def plot_losses(run_folder: Path) -> Path:
    """Draw `log.txt` of a run into `report/loss.png`, and return that path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_log(run_folder / "log.txt")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if "train" in curves:
        axes.plot(*curves["train"], color="#9ecae1", linewidth=1, label="training")
    if "val" in curves:
        steps, losses = curves["val"]
        axes.plot(steps, losses, color="#d94801", marker="o", markersize=4, label=f"validation, last {losses[-1]:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run_folder.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = run_folder / "report" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(".loss.partial.png")
    figure.savefig(temporary, dpi=150)
    temporary.rename(path)
    return path


def main() -> None:
    parser = ArgumentParser(prog="python -m eval.plot", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    print(plot_losses(parser.parse_args().run))


if __name__ == "__main__":
    run(main)
