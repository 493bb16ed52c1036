"""Run by test_adasum.py on two ranks: one step of plain SGD with Adasum; every rank writes what it
saw.

python adasum_job.py OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import dist_train.keras_horovod as hvk


def main(folder: Path) -> int:
    communicator = hvk.init()
    rng = np.random.default_rng(communicator.rank)
    x, y = rng.normal(size=(8, 5)).astype(np.float32), rng.normal(size=(8, 1)).astype(np.float32)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
    try:
        hvk.distribute(model, aggregation=hvk.Aggregation(op="adasum"))
    except ValueError as error:
        print(f"refused: {error}")
        return 2
    hvk.broadcast_variables(model)
    before = model.get_weights()[0]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x) - y))
    grad = tape.gradient(loss, model.trainable_variables)[0].numpy()
    model.fit(x, y, batch_size=8, epochs=1, verbose=0, shuffle=False)
    np.savez(folder / f"{communicator.rank}.npz", grad=grad, step=before - model.get_weights()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
