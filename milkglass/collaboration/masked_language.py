"""Masked language modeling of a text by ALBERT, made from its sizes alone: nothing is read from a hub.

ALBERT: Lan et al., ICLR 2020, arXiv 1909.11942 (layers that share their weights, factorized embeddings); masking:
Devlin et al. 2019, arXiv 1810.04805 (BERT), section 3.1 and appendix A.1. The network is that of `transformers`.

A record is a block of `length` tokens: `[CLS]`, consecutive tokens of the text, `[SEP]`. Of those between, 15 % are
chosen, one at least and as many in every record; of the chosen 80 % become `[MASK]`, 10 % another token at random, 10 %
stay. As every record has as many, the mean over a batch's masked tokens is the mean over its records.

Where we differ from the paper: no sentence-order prediction; single tokens are masked, no n-grams; byte-level BPE in
place of SentencePiece, because it turns out the same on every machine and knows every character; no lower-casing.

The tokenizer is trained on the training part of the text, so volunteers with the same text have the same one. That
their texts are the same, `text_digest` tells.

Legend: B blocks in a batch, L length of a block, N blocks, M masked tokens of a batch, m of a block, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.collaboration.tasks import Batch, Passes, Task, evaluating
from milkglass.data import MINIMUM_PART
from milkglass.errors import DataError, MissingExtraError, RecipeError, nearest
from milkglass.randomness import drawing_from, public_source
from milkglass.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL: Final = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
"""The first tokens of every vocabulary, with ALBERT's own numbers; no text is ever encoded as one of them."""
CLS, SEP, MASK = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
NOT_ASKED: Final = -100
"""The target of a token that is not masked."""
_MASKED_SHARE: Final = 0.15
_BECOMES_MASK: Final = 0.8
_BECOMES_ANOTHER: Final = 0.1
_SMALLEST: Final = {"vocabulary": len(SPECIAL) + 256, "length": 8}  # a token for every byte; a block with some text
_TEST_BATCH: Final = 64


@final
@dataclass(frozen=True)
class Sizes:
    """Of an ALBERT. hidden: width of a layer, whose feed-forward part is four times as wide; length: tokens a block."""

    hidden: int
    layers: int
    heads: int
    embedding: int
    length: int
    vocabulary: int
    dropout: float = 0.0


SIZES: Final[Mapping[str, Sizes]] = {
    "tiny": Sizes(hidden=64, layers=2, heads=2, embedding=32, length=32, vocabulary=512),
    "small": Sizes(hidden=256, layers=6, heads=4, embedding=64, length=128, vocabulary=8_000),
    "base": Sizes(hidden=768, layers=12, heads=12, embedding=128, length=512, vocabulary=30_000),
}
"""`base` is the paper's, version 2 (no dropout). `tiny` has few tokens and short blocks: it soon learns context."""


def sizes_of(settings: Mapping[str, Any]) -> Sizes:
    """The sizes that `network.settings` asks for: those of its `size` (default tiny), each of them replaceable.

    Raises RecipeError for an unknown setting or a value that makes no network.
    """
    known = ["size", *(field.name for field in fields(Sizes))]
    for name in settings:
        if name not in known:
            raise RecipeError(f"network 'albert' has no setting {name!r}; {nearest(name, known)}")
    size = settings.get("size", "tiny")
    if size not in list(SIZES):  # a list, for what TOML gives may have no hash
        raise RecipeError(f"network 'albert': no size {size!r}; {nearest(str(size), SIZES)}")
    changes = {name: value for name, value in settings.items() if name != "size"}
    for name, value in changes.items():
        if name == "dropout":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise RecipeError(f"network 'albert': dropout is {value!r}; expected a number from 0 to below 1")
            continue
        least = _SMALLEST.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RecipeError(f"network 'albert': {name} is {value!r}; expected a whole number of {least} or more")
    sizes = replace(SIZES[size], **changes)
    if sizes.hidden % sizes.heads:
        raise RecipeError(f"network 'albert': hidden is {sizes.hidden}; expected a multiple of heads, {sizes.heads}")
    return sizes


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens, fewer where no more pairs come twice; the same for a text.

    Its first tokens are SPECIAL; a text that spells one of them is encoded as its characters.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise _missing_extra() from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def blocks_of(text: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """The text as blocks (N, L) int64 in its own order, each between [CLS] and [SEP]; a shorter rest is left out."""
    numbers = [
        number
        for line in text.splitlines(keepends=True)
        for number in tokenizer.encode(line, add_special_tokens=False).ids
    ]
    inner = length - 2
    whole = len(numbers) // inner
    blocks_NL = torch.empty(whole, length, dtype=torch.int64)
    blocks_NL[:, 0], blocks_NL[:, -1] = CLS, SEP
    blocks_NL[:, 1:-1] = torch.tensor(numbers[: whole * inner], dtype=torch.int64).view(whole, inner)
    return blocks_NL


def masked(blocks_BL: Tensor, vocabulary: int, generator: torch.Generator) -> Batch:
    """The blocks with some tokens masked, and what these were: inputs, targets (B, L) int64, NOT_ASKED elsewhere.

    vocabulary: how many tokens there are, SPECIAL among them; only others replace a token at random.
    """
    count, inner = len(blocks_BL), blocks_BL.shape[1] - 2
    # the same order on every machine, also where two numbers are equal
    order = torch.rand(count, inner, generator=generator).argsort(dim=1, stable=True)
    chosen_Bm = order[:, : max(1, round(_MASKED_SHARE * inner))] + 1
    were_Bm = blocks_BL.gather(1, chosen_Bm)
    fate_Bm = torch.rand(chosen_Bm.shape, generator=generator)
    another_Bm = torch.randint(len(SPECIAL), vocabulary, chosen_Bm.shape, generator=generator)
    replaced_Bm = torch.where(fate_Bm < _BECOMES_MASK + _BECOMES_ANOTHER, another_Bm, were_Bm)
    replaced_Bm = torch.where(fate_Bm < _BECOMES_MASK, MASK, replaced_Bm)
    targets_BL = torch.full_like(blocks_BL, NOT_ASKED).scatter(1, chosen_Bm, were_Bm)
    return Batch(blocks_BL.scatter(1, chosen_Bm, replaced_Bm), targets_BL)


@final
class MaskedLanguage(Task):
    """Guess the masked tokens of a text: a record is a block of it.

    Measures: `loss` and `accuracy` of masked test tokens, `perplexity`, the exponential of the loss. tokenizer: the one
    trained on the text. text_digest: SHA-256 of the file, in hexadecimal. Raises RecipeError for the network's settings
    or a key that does not go with a text, DataError for the text, MissingExtraError without `milkglass[collab]`.
    """

    def __init__(self, recipe: Recipe) -> None:
        sizes = sizes_of(recipe.network.settings)
        _check_keys(recipe)
        path = Path(str(recipe.data.path))
        content = _read(path)
        self.digest = self.text_digest = hashlib.sha256(content).hexdigest()
        self.agreement = f"a text with the SHA-256 {self.text_digest}"
        text = _decoded(content, path)
        end = round(len(text) * (1 - recipe.data.test_share))
        self.tokenizer = train_tokenizer(text[:end], sizes.vocabulary)
        self._vocabulary = self.tokenizer.get_vocab_size()
        parts = [blocks_of(part, self.tokenizer, sizes.length) for part in (text[:end], text[end:])]
        train_NL, test_NL = parts[0][: recipe.data.train_records], parts[1][: recipe.data.test_records]
        if min(len(train_NL), len(test_NL)) < MINIMUM_PART:
            raise DataError(
                f"{path}: {len(train_NL)} training and {len(test_NL)} test blocks of {sizes.length} tokens; expected "
                f"at least {MINIMUM_PART} of each: take a longer text, or a lower length in network.settings"
            )
        public = public_source(recipe.seed)
        self._blocks_NL, self.records, self._passes = train_NL, len(train_NL), Passes(len(train_NL))
        self._test = masked(test_NL, self._vocabulary, public.generator("test masks"))
        self.network = _albert(sizes, public.generator("weights"))

    def draw(self, generator: torch.Generator, size: int) -> Batch:
        blocks_BL = self._blocks_NL[self._passes.next(generator, size)]
        return masked(blocks_BL, self._vocabulary, generator)

    def loss(self, batch: Batch) -> Tensor:
        logits_MV, targets_M = self._guess(batch)
        return F.cross_entropy(logits_MV, targets_M)

    def test(self) -> dict[str, float]:
        loss_sum, right, asked = 0.0, 0, 0
        with evaluating(self.network):
            for batch in self._test.split(_TEST_BATCH):
                logits_MV, targets_M = self._guess(batch)
                loss_sum += float(F.cross_entropy(logits_MV, targets_M, reduction="sum"))
                right += int((logits_MV.argmax(dim=1) == targets_M).sum())
                asked += len(targets_M)
        loss = loss_sum / asked
        perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())  # infinite where it is too large
        return {"loss": loss, "perplexity": perplexity, "accuracy": right / asked}

    def _guess(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the masked tokens and what these were (M,); the costly last layer runs on them alone."""
        hidden_BLH = self.network.get_submodule("albert")(batch.inputs).last_hidden_state
        asked_BL = batch.targets != NOT_ASKED
        return self.network.get_submodule("predictions")(hidden_BLH[asked_BL]), batch.targets[asked_BL]


def _albert(sizes: Sizes, generator: torch.Generator) -> nn.Module:
    """An AlbertForMaskedLM of these sizes, float32, its weights drawn from `generator`."""
    try:
        from transformers import AlbertConfig, AlbertForMaskedLM
    except ImportError:
        raise _missing_extra() from None
    config = AlbertConfig(
        vocab_size=sizes.vocabulary,
        embedding_size=sizes.embedding,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.hidden,
        max_position_embeddings=sizes.length,
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
    )
    with drawing_from(generator):
        network: nn.Module = AlbertForMaskedLM(config)
    return network


def _check_keys(recipe: Recipe) -> None:
    if recipe.data.test_path is not None:
        raise RecipeError("data.test_path does not go with a text; expected none, its last test_share is for tests")
    for name in ("sensitive", "ids", "record_shape", "classes"):
        if getattr(recipe.data, name):
            raise RecipeError(f"data.{name} does not go with a text; expected none: that is for pictures and tables")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a text in UTF-8") from None


def _decoded(content: bytes, path: Path) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; expected a text in UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: an empty text; expected some")
    return text


def _missing_extra() -> MissingExtraError:
    return MissingExtraError("masked language modeling", "collab")
