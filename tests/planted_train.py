"""training/train.py in which something goes wrong: the pickled function in $PLANT is called before it trains."""

import os
import pickle
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from torch.distributed.elastic.multiprocessing.errors import record

    from data_prep.common.command_line import run
    from training.train import main, read_config

    pickle.loads(bytes.fromhex(os.environ["PLANT"]))()
    run(record(lambda: main(read_config())))
