"""Tasks one after the other, by hand; earlier ones are kept by their statistics alone."""

import sys
from pathlib import Path

import forgetless as fl
from forgetless.data.examples import load_examples
from forgetless.data.modality import load_processor, training_batches
from forgetless.models.load import load_model
from forgetless.training.loop import train
from forgetless.training.settings import TrainingSettings

TASKS = {"pocket:problems": "pocket_problems", "pocket:series": "pocket_series"}


def main(out: str, steps: int = 200, limit: int = 200) -> list[list[float]]:
    model, reader, keep = load_model("pocket"), load_processor("pocket"), fl.Statistics({})
    R: list[list[float]] = []
    tasks = [{"kind": kind, "limit": limit} for kind in ("pocket_recall", *TASKS.values())]
    settings = TrainingSettings(steps=steps, batch_size=32, learning_rate=3e-3)
    for data in ["pocket:knowledge", *TASKS]:  # of the first only what the layers read is kept
        if keep:
            model = fl.attach(model, "lora_null_v1", rank=16, alpha=16, stats=keep, seed=len(R))
            train(model, reader, load_examples(data), settings, Path(out) / str(len(R)), seed=0)
            fl.export(model, Path(out) / f"adapter-{len(R)}")  # together they are the update
        R.append([result.value for result in fl.evaluate(model, tasks, reader).values()])
        read = fl.collect(model, training_batches(data, model, reader), adapters_on=True)
        keep, model = keep + read if keep else read, model.merge_and_unload() if keep else model
    return R


if __name__ == "__main__":
    found = main(sys.argv[1])
    print(found, fl.continual_metrics([row[1:] for row in found[1:]], found[0][1:]))
