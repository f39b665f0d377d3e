"""Replays the golden segments on this machine's device: `python -m trainchain.core.train.calibrate --threads N`.

Prints one JSON document. It is a process of its own because PyTorch is loaded in it, for a device that may fail.
"""

import argparse
import json
import os
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(prog="trainchain.core.train.calibrate")
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is talk
    answer.write(json.dumps(calibrate(threads)) + "\n")
    answer.close()


def calibrate(threads: int) -> dict[str, Any]:
    """The device, and for each precision its class and what became of the golden segments."""
    from trainchain.core.train import golden
    from trainchain.core.train.device import set_modes

    set_modes(threads, 0)
    return {"precisions": [_precision(precision, threads) for precision in golden.PRECISIONS]}


def _precision(precision: str, threads: int) -> dict[str, Any]:
    from trainchain.core.errors import TrainChainError
    from trainchain.core.train import golden
    from trainchain.core.train.device import numeric_class

    training, rows = golden.training(precision), golden.documents()
    try:
        model = golden.model(precision, rows)
        name = numeric_class(model.device, training, threads, model.adapter_path, 1)
        segments = [_segment(model, rows, precision, cold) for cold in (True, False)]
    except TrainChainError as error:
        return {"precision": precision, "absent": error.message}
    except RuntimeError as error:
        return {"precision": precision, "absent": f"PyTorch cannot train in it here: {str(error)[:200]}"}
    return {"precision": precision, "device": str(model.device), "numeric_class": name, "segments": segments}


def _segment(model: Any, rows: Any, precision: str, cold: bool) -> dict[str, Any]:
    """One golden segment, replayed twice."""
    from trainchain.core.replays import distances
    from trainchain.core.segments import state_digests
    from trainchain.core.tolerances import beyond, entry, tolerance
    from trainchain.core.train import golden

    training = golden.training(precision)
    start, claimed = golden.start(cold=cold), golden.expected(precision, cold=cold)
    end, again = (golden.replay(model, rows, start) for _ in range(2))
    found = distances(start, claimed, end, beta1=training.adam_beta1, beta2=training.adam_beta2)
    limit = tolerance(training, cold=cold)
    return {
        "segment": golden.name_of(precision, cold=cold),
        "equal": state_digests(end) == state_digests(claimed),
        "repeats": state_digests(end) == state_digests(again),
        "distances": {name: getattr(found, name) if found.finite else None for name in vars(limit)},
        "tolerance": vars(limit),
        "beyond": beyond(found, limit),
        "origin": entry(training).origin,
    }


if __name__ == "__main__":
    main()
