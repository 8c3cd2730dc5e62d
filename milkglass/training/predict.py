"""Inference across the cut: a client's stage here, the server's there; nothing crosses that a training would not send.

The same defense, egress guard and compressor are at work. Noise comes from a key that is drawn anew from the operating
system for every prediction, and forgotten: none of it is ever used again, neither that of the training nor that of an
earlier prediction, not even if a run folder is copied back. So each prediction of a record is a release more, and
whoever sees many averages noise away. Two answers: with `client.keep_releases` noise follows from the record, under a
key that stays in the run folder (`noise.key`), and a record is one release however often it is asked about; with
`client.most_queries` a ledger (`queries.ledger`) counts, and stops.

A run that was trained in one process holds both halves: there the messages go through the same codec, in this process.

Legend: N records, B of them in a message, K classes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from milkglass.certificates import Credentials
from milkglass.client import Client
from milkglass.errors import DataError, LinkError, RecipeError, RunError
from milkglass.randomness import KEY_BYTES, Source, public_source, read_key, write_key
from milkglass.records import UNLABELED, RawRecords
from milkglass.runs import RunFolder, write_beside
from milkglass.training.answer import TOP, Answering, check_way, only, read_stage
from milkglass.training.defended import defenses
from milkglass.training.evaluate import BATCH
from milkglass.training.inputs import RECORDS, form_in, read_input
from milkglass.training.party_folder import known_run
from milkglass.training.query_ledger import QueryLedger
from milkglass.training.serve import Form, agreement, crossing
from milkglass.training.setup import compressor, crossing_shapes, network_parts
from milkglass.training.split import computing_with, make_packings
from milkglass.training.summary import traffic_summary
from milkglass.transports.base import Transport
from milkglass.transports.exactly_once import Sender
from milkglass.transports.grpc import RUN_UNKNOWN, GrpcTransport, Log, silent
from milkglass.transports.local import LocalHub, LocalTransport
from milkglass.transports.wrappers import PackingService, PackingTransport

SUMMARY: Final = "predictions.json"
SUFFIXES: Final = (".csv", ".jsonl")
_BOTTOM: Final = "bottom.safetensors"
_HEAD: Final = "head.safetensors"
_KEY: Final = "noise.key"
_LEDGER: Final = "queries.ledger"
_FIRST_ROWS: Final = 10
_JOURNAL_BYTES: Final = 64 << 20

OnRecords = Callable[[int, int], None]
"""(records done, of how many): called after each message."""


def unwatched(done: int, total: int) -> None:
    """Nobody watches."""


@final
@dataclass(frozen=True)
class Predictions:
    """What the network says of N records. labels_N: UNLABELED where the file had none."""

    logits_NK: Tensor
    labels_N: Tensor

    @property
    def classes(self) -> Tensor:
        """The likeliest class of each, (N,)."""
        return self.logits_NK.argmax(dim=1)

    @property
    def probabilities(self) -> Tensor:
        """Of each class, (N, K) float64; a row adds up to 1."""
        return self.logits_NK.double().softmax(dim=1)

    @property
    def accuracy(self) -> float | None:
        """The share classified right; None without labels."""
        if (self.labels_N == UNLABELED).any():
            return None
        return int((self.classes == self.labels_N).sum()) / len(self.labels_N)


def predict(
    run: Path,
    given: Path,
    *,
    address: str | None = None,
    credentials: Credentials | None = None,
    batch: int = BATCH,
    out: Path | None = None,
    log: Log = silent,
    on_records: OnRecords = unwatched,
) -> dict[str, Any]:
    """Classify the records in the file `given` with the run folder `run`; returns what its predictions.json holds.

    address: HOST:PORT of the server that holds the other half; None for a run that holds both. credentials: this
    client's; None for a connection in plain text. batch: records in a message. out: a `.csv` or `.jsonl` file for every
    record's class and probabilities. Raises MilkglassError, one line, before anything leaves where it cannot be done.
    """
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise DataError(f"--out {out}: expected a file named {' or '.join('*' + suffix for suffix in SUFFIXES)}")
    folder = _open(run, whole=address is None)
    recipe, kept = folder.recipe, form_in(folder)
    most = max(recipe.training.batch_size, BATCH)
    if not 1 <= batch <= most:
        raise DataError(f"--batch {batch}: expected 1 to {most}, as many records as the recipe allows in a message")
    raw = read_input(given, kept, recipe.data.ids)
    form = Form(kept.shape, kept.classes, crossing_shapes(recipe, kept.shape, kept.classes))
    started = time.perf_counter()
    with computing_with(recipe.threads), _way_to_server(folder, form, address, credentials, log) as (client, between):
        predictions = _classify(client, raw, batch, on_records, between, _ledger(folder))
        seconds = time.perf_counter() - started
        summary = _summary(predictions, client, raw.where, seconds)
    if out is not None:
        write_beside(out, _rows(predictions, out.suffix.lower()))
    folder.write_json(SUMMARY, summary)
    return summary


def _open(run: Path, *, whole: bool) -> RunFolder:
    """The folder of a finished run that has what is needed of it."""
    folder = RunFolder.open_finished(run, (_BOTTOM, "summary.json"))
    recipe = folder.recipe
    check_way(recipe)
    has_top, has_run = ((run / name).is_file() for name in (TOP, "run.json"))
    if whole and not has_top:
        raise RunError(f"run folder {run}: {TOP} is missing: the server has it; --server HOST:PORT says where that is")
    if not whole and not has_run:
        raise RunError(f"run folder {run}: it was trained in one process, so no server knows it; leave --server out")
    if recipe.cut.back_at is not None and not (run / _HEAD).is_file():
        raise RunError(f"run folder {run}: half-written, {_HEAD} is missing")
    if not (run / RECORDS).is_file():
        raise RunError(f"run folder {run}: {RECORDS} is missing: an older milkglass made this run; train it again")
    if (run / _LEDGER).exists() and not (run / _KEY).exists():
        raise RunError(f"run folder {run}: {_KEY} is missing: without it {_LEDGER} counts nothing; put it back")
    folder.check_alarm()
    return folder


@contextmanager
def _way_to_server(
    folder: RunFolder, form: Form, address: str | None, credentials: Credentials | None, log: Log
) -> Iterator[tuple[Client, Callable[[], None]]]:
    """The client of a run, and what is to be done between two messages."""
    recipe = folder.recipe
    packings = make_packings(recipe, form.shapes)
    name = _name(folder)
    if address is None:
        service = Answering(recipe, form, folder)
        hub = LocalHub(PackingService(service, packings) if packings else service)
        local: Transport = LocalTransport(hub, name)
        yield _client(folder, form, name, PackingTransport(local, packings[name]) if packings else local), lambda: None
        return
    if credentials is not None and credentials.name != name:
        raise LinkError(f"run folder {folder.path}: it is {name}'s; the certificate is {credentials.name}'s")
    # what is on its way lies beside the run's other private files, and is gone afterwards
    try:
        journal = Path(tempfile.mkdtemp(dir=folder.path, prefix="predicting-"))
    except OSError as error:
        raise RunError(f"cannot write {folder.path}: {error.strerror or error}") from None
    try:
        transport = _dial(folder, form, name, address, credentials, journal, log)
        try:
            packed = PackingTransport(transport, packings[name]) if packings else transport
            yield _client(folder, form, name, packed), lambda: _rotate(transport.sender)
        finally:
            transport.close()
    finally:
        shutil.rmtree(journal, ignore_errors=True)


def _dial(
    folder: RunFolder,
    form: Form,
    name: str,
    address: str,
    credentials: Credentials | None,
    journal: Path,
    log: Log,
) -> GrpcTransport:
    recipe, run = folder.recipe, known_run(folder, "run.json")
    if run == RUN_UNKNOWN:
        raise RunError(f"{folder.path / 'run.json'}: damaged; expected a number")
    return GrpcTransport(
        address,
        credentials,
        Sender(journal),
        party=name,
        agreement=agreement(recipe, form, name),
        limits=only(crossing(recipe, form, name).to_client(), "predictions"),
        run=run,
        patience_seconds=recipe.client.patience_seconds,
        answer_seconds=recipe.client.answer_seconds,
        log=log,
    )


def _rotate(sender: Sender) -> None:
    """Keep the journal of what has been answered from growing."""
    if sender.size_bytes > _JOURNAL_BYTES:
        sender.rotate()


def _name(folder: RunFolder) -> str:
    """Whose run folder it is; of a whole run, the first client's."""
    clients = folder.recipe.parties.clients
    name = folder.read_json("summary.json").get("party", clients[0])
    if name not in clients:
        raise RecipeError(f"run folder {folder.path}: it is {name!r}'s, who is no client of its recipe")
    return str(name)


def _client(folder: RunFolder, form: Form, name: str, transport: Transport) -> Client:
    recipe = folder.recipe
    chosen = defenses(recipe)
    parts = network_parts(recipe, form.record_shape, form.classes, public_source(recipe.seed), chosen=chosen)
    read_stage(folder, _BOTTOM, parts.bottom)
    if parts.head is not None:
        read_stage(folder, _HEAD, parts.head)
    return Client(
        parts.bottom,
        None,
        transport,
        head=parts.head,
        defenses=chosen,
        compressor=compressor(recipe),
        keep_releases=recipe.client.keep_releases,
        name=name,
        source=_kept_source(folder) if recipe.client.keep_releases else Source(os.urandom(KEY_BYTES)),
    )


def _kept_source(folder: RunFolder) -> Source:
    """What stays in the folder from one prediction to the next, made by the first one."""
    path = folder.path / _KEY
    with suppress(FileExistsError):
        return read_key(path) if path.exists() else write_key(path)
    return read_key(path)  # another prediction was faster


def _ledger(folder: RunFolder) -> QueryLedger | None:
    most = folder.recipe.client.most_queries
    return None if most is None else QueryLedger(folder.path / _LEDGER, most, _kept_source(folder))


def _classify(
    client: Client,
    raw: RawRecords,
    batch: int,
    on_records: OnRecords,
    between: Callable[[], None],
    ledger: QueryLedger | None,
) -> Predictions:
    """All records, batch by batch; a file's records are converted as their turn comes."""
    parts = []
    for start in range(0, len(raw), batch):
        rows = np.arange(start, min(start + batch, len(raw)))
        x = raw.rows(rows)
        if ledger is not None:
            ledger.charge(x, kept=client.keeps_releases)
        logits_BK, _ = client.predict(x)
        parts.append(logits_BK)
        between()
        on_records(int(rows[-1]) + 1, len(raw))
    return Predictions(torch.cat(parts), torch.from_numpy(raw.labels))


def _summary(predictions: Predictions, client: Client, where: str, seconds: float) -> dict[str, Any]:
    classes_N, probabilities_NK = predictions.classes, predictions.probabilities
    counts_K = torch.bincount(classes_N, minlength=predictions.logits_NK.shape[1])
    first = [
        {
            "record": number,
            "class": int(classes_N[number]),
            "probability": float(probabilities_NK[number, classes_N[number]]),
            **({} if predictions.accuracy is None else {"label": int(predictions.labels_N[number])}),
        }
        for number in range(min(_FIRST_ROWS, len(classes_N)))
    ]
    return {
        "input": where,
        "records": len(classes_N),
        "classes": counts_K.tolist(),
        "accuracy": predictions.accuracy,
        "defense": " + ".join(defense.describe() for defense in client.defenses) or "none",
        **traffic_summary(client.transport.traffic),
        "seconds": seconds,
        "first": first,
    }


def _rows(predictions: Predictions, suffix: str) -> bytes:
    """A line for each record: its number from 0, its class, the probability of each class with 9 digits."""
    text = io.StringIO()
    pairs = zip(predictions.classes.tolist(), predictions.probabilities.tolist(), strict=True)
    if suffix == ".csv":
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["record", "class", *(f"p{k}" for k in range(predictions.logits_NK.shape[1]))])
        writer.writerows([number, k, *(f"{p:.9g}" for p in row)] for number, (k, row) in enumerate(pairs))
    else:
        for number, (k, row) in enumerate(pairs):
            line = {"record": number, "class": k, "probabilities": [float(f"{p:.9g}") for p in row]}
            text.write(json.dumps(line) + "\n")
    return text.getvalue().encode()
