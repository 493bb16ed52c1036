"""python experiments_job.py FOLDER: trains every experiment that comes along, shortened, on its
ranks.
"""

import sys
from pathlib import Path

from dist_train.keras_horovod import init
from dist_train.trainer import train
from tests.shortened import EXPERIMENTS, shortened

if __name__ == "__main__":
    communicator = init()
    for path in EXPERIMENTS:
        communicator.all_gather_object("ready")  # the root has written the data of the one before
        train(shortened(path, Path(sys.argv[1])), communicator)
