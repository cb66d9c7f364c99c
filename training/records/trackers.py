"""Starts the trackers of a run."""

import os

from accelerate import Accelerator

from data_prep.common.hub import limit_waiting
from training.publishing.dashboard import FOLDER
from training.settings.config import TrainingConfig


def start_trackers(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Starts the trackers of `report_to` with the settings of the run. Collective.

    trackio writes to `RUN/trackio`, unless the user's `TRACKIO_DIR` names another folder; a resumed run goes on there.
    """
    os.environ.setdefault("TRACKIO_DIR", str(config.run_folder / FOLDER))  # read when trackio is imported
    limit_waiting()  # trackio asks the Hub whose token it is
    accelerator.init_trackers(
        config.run_name,
        config={name: str(value) for name, value in config.to_dict().items()},
        init_kwargs={"trackio": {"name": config.run_name, "resume": "allow"}},
    )
