"""The ClientApp: builds the model anew for each message, as the template does."""

from pathlib import Path

import keras
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.federation_workload import BATCH_SIZE, compiled_model, read_silo

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    keras.backend.clear_session()
    (x, y), _ = read_silo(Path(str(context.node_config["data"])))
    model = compiled_model(str(context.run_config["size"]))
    model.set_weights(message.content.array_records["arrays"].to_numpy_ndarrays())
    epochs = context.run_config["local-epochs"]
    history = model.fit(x, y, epochs=epochs, batch_size=BATCH_SIZE, verbose=0).history
    metrics = MetricRecord(
        {"num-examples": len(x), **{name: values[-1] for name, values in history.items()}}
    )
    return Message(
        RecordDict({"arrays": ArrayRecord(model.get_weights()), "metrics": metrics}),
        reply_to=message,
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    keras.backend.clear_session()
    _, (x, y) = read_silo(Path(str(context.node_config["data"])))
    model = compiled_model(str(context.run_config["size"]))
    model.set_weights(message.content.array_records["arrays"].to_numpy_ndarrays())
    loss, accuracy = model.evaluate(x, y, verbose=0)
    metrics = MetricRecord({"num-examples": len(x), "eval_loss": loss, "eval_accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
