"""Encrypted answers against plain ones: top-1 agreement, the largest error of a logit, bytes and seconds a record.

    python -m benchmarks.homomorphic_agreement [--records 1000] [--repetitions 5] [--out FILE.json]

scikit-learn's digits and perceptrons trained here in a few seconds, cut after their last ReLU, whose width is D; the
server's stage is the last layer, or two linear layers with dropout between them. Asked are up to 1,000 records that
the network was not trained on. Both sides run in one process on one thread. Wanted: top-1 equal on 99 % of 1,000
records. Seconds are medians over the repetitions, each with new keys; the ratio is that of the server's work to the
plain stage's on the same records, which is a product of small matrices and takes a tenth of a millisecond. Bytes of
plain activations are 4 D.
"""

from __future__ import annotations

import argparse
import statistics
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.setting import command_line, machine_line, write_result
from milkglass.cuts import cut
from milkglass.private.homomorphic import HomomorphicRun, homomorphic_run
from milkglass.randomness import drawing_from, public_source

_TRAINED_ON: Final = 797
_EPOCHS: Final = 40
_BATCH: Final = 64
_STAGES: Final = ((64, "one layer"), (64, "two layers"), (128, "one layer"))


def trained(width: int, server: str, x_BF: Tensor, y_B: Tensor) -> tuple[nn.Sequential, float]:
    """A perceptron whose layer `features` (D = width) ends the client's stage, and its accuracy (0 to 1) on the rest
    of the records.
    """
    generator = public_source(0).generator("weights")
    with drawing_from(generator):
        layers: list[nn.Module] = [nn.Linear(width, 10)]
        if server == "two layers":
            layers = [nn.Linear(width, 32), nn.Dropout(0.2), nn.Linear(32, 10)]
        features = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        model = nn.Sequential(OrderedDict(features=features, classifier=nn.Sequential(*layers)))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(_EPOCHS):
            for indices in torch.split(torch.randperm(_TRAINED_ON), _BATCH):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(x_BF[indices]), y_B[indices]))
                optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(x_BF[_TRAINED_ON:]).argmax(1) == y_B[_TRAINED_ON:]
    return model, float(right.float().mean())


def measure(width: int, server: str, records: int, repetitions: int) -> dict[str, Any]:
    """One server's stage: the worst agreement of all repetitions, the medians of times."""
    digits = load_digits()
    x_BF = torch.tensor(digits.data / 16, dtype=torch.float32)
    y_B = torch.tensor(digits.target)
    order = torch.randperm(len(x_BF), generator=public_source(0).generator("order"))
    x_BF, y_B = x_BF[order], y_B[order]
    model, accuracy = trained(width, server, x_BF, y_B)
    bottom, top = cut(model, "features")
    with torch.no_grad():
        z_BD = bottom(x_BF[_TRAINED_ON:][:records])
    runs = [homomorphic_run(top, z_BD) for _ in range(repetitions)]
    return {"width": width, "server": server, "accuracy": accuracy, "records": len(z_BD), **_summary(runs)}


def _summary(runs: list[HomomorphicRun]) -> dict[str, Any]:
    records = runs[0].records
    return {
        "top1_equal": min(run.top1_equal for run in runs),
        "top1_equal_low": min(run.top1_equal_low for run in runs),
        "largest_logit_error": max(run.largest_logit_error for run in runs),
        "largest_logit": float(runs[0].answers_BK.abs().max()),
        "key_bytes": runs[0].key_bytes,
        "bytes_up_per_record": runs[0].bytes_up / records,
        "bytes_down_per_record": runs[0].bytes_down / records,
        "client_milliseconds_per_record": 1000 * statistics.median(run.client_seconds for run in runs) / records,
        "server_milliseconds_per_record": 1000 * statistics.median(run.server_seconds for run in runs) / records,
        "server_to_plain": statistics.median(run.server_seconds / run.plain_seconds for run in runs),
    }


def main() -> None:
    """Measure every stage and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{command_line()}\n{machine_line()}\n")
    print("| D | server | accuracy, % | top-1 equal, % (95 % from) | largest logit error, of | keys, kB ", end="")
    print("| kB up | kB down | client, ms | server, ms | server / plain |")
    print(f"|{'---|' * 11}")
    rows = []
    for width, server in _STAGES:
        row = measure(width, server, arguments.records, arguments.repetitions)
        rows.append(row)
        cells = [
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['top1_equal']:.2f} ({100 * row['top1_equal_low']:.2f})",
            f"{row['largest_logit_error']:.1e}, {row['largest_logit']:.1f}",
            f"{row['key_bytes'] / 1000:.0f}",
            f"{row['bytes_up_per_record'] / 1000:.2f}",
            f"{row['bytes_down_per_record'] / 1000:.2f}",
            f"{row['client_milliseconds_per_record']:.3f}",
            f"{row['server_milliseconds_per_record']:.3f}",
            f"{row['server_to_plain']:.0f}",
        ]
        print(f"| {width} | {server} | {' | '.join(cells)} |", flush=True)
    print("\nBytes and milliseconds are per record.")
    if arguments.out:
        write_result(arguments.out, rows)


if __name__ == "__main__":
    main()
