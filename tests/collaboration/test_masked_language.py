"""Masked language modeling as a volunteer's task: the tokenizer, the masks, the network, the refusals."""

from __future__ import annotations

import hashlib
import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from milkglass.collaboration.masked_language import (
    CLS,
    MASK,
    NOT_ASKED,
    SEP,
    SIZES,
    SPECIAL,
    MaskedLanguage,
    blocks_of,
    masked,
    sizes_of,
    train_tokenizer,
)
from milkglass.collaboration.tasks import task_of
from milkglass.errors import DataError, MilkglassError, MissingExtraError, RecipeError
from milkglass.randomness import Source, drawing_from, public_source
from milkglass.recipe import Recipe, parse_recipe

SMALL = {"vocabulary": 300, "length": 16, "hidden": 32, "embedding": 16}


def private(number: int) -> torch.Generator:
    return Source(bytes([number]) * 32).generator("volunteer")


def synthetic_text(sentences: int) -> str:
    """Sentences of five words, in which each word but the first follows from the one before it."""
    generator = private(200)
    chains = [
        "the red fox eats bread",
        "a blue owl drinks water",
        "one old man reads books",
        "my dear aunt sings psalms",
    ]
    chosen = torch.randint(len(chains), (sentences,), generator=generator).tolist()
    return "".join(f"{chains[number]}.\n" for number in chosen)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(synthetic_text(600).encode())
    return path


def recipe(path: Path, *, seed: int = 0, data: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    return parse_recipe(
        {
            "seed": seed,
            "data": {"path": str(path), **(data or {})},
            "network": {"name": "albert", "settings": SMALL | settings},
            "parties": {"mode": "data_parallel"},
        }
    )


def task_from(path: Path, **changes: Any) -> MaskedLanguage:
    task = task_of(recipe(path, **changes))
    assert isinstance(task, MaskedLanguage)
    return task


# The tokenizer and the blocks.


def test_the_same_text_gives_the_same_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    text = synthetic_text(200) + "Zoë 東京 🦊\r\n\tx = 1  \x85"  # many pairs are as frequent as others here
    made = set()
    for parallel in ("true", "false", "true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        made.add(train_tokenizer(text, 400).to_str())
    assert len(made) == 1
    assert train_tokenizer(text.replace("fox", "cat"), 400).to_str() not in made


def test_tokens_spell_the_text_whatever_it_holds() -> None:
    text = "Zoë 東京 🦊\r\n\tx = 1  \x85\x00 [MASK] <pad>[CLS]\n"
    tokenizer = train_tokenizer(synthetic_text(50), 300)
    from tokenizers.decoders import ByteLevel

    tokenizer.decoder = ByteLevel()
    blocks_NL = blocks_of(text, tokenizer, 3)  # one token a block: none is left over
    assert tokenizer.decode(blocks_NL[:, 1].tolist()) == text
    assert int(blocks_NL[:, 1].min()) >= len(SPECIAL), "a text that spells a special token is still a text"
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))


def test_blocks_are_consecutive_and_framed() -> None:
    text = synthetic_text(20)
    tokenizer = train_tokenizer(text, 300)
    numbers = blocks_of(text, tokenizer, 3)[:, 1]
    blocks_NL = blocks_of(text, tokenizer, 16)
    assert len(blocks_NL) == len(numbers) // 14
    assert torch.equal(blocks_NL[:, 1:-1].flatten(), numbers[: len(blocks_NL) * 14])
    assert set(blocks_NL[:, 0].tolist()) == {CLS}
    assert set(blocks_NL[:, -1].tolist()) == {SEP}
    assert blocks_of("", tokenizer, 16).shape == (0, 16)


def test_no_word_of_the_test_part_is_in_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(synthetic_text(400) + "xylophone quartz " * 300)
    task = task_from(path, data={"test_share": 0.4}, vocabulary=500)
    vocabulary = task.tokenizer.get_vocab()
    assert any("fox" in token for token in vocabulary)
    assert not any("xy" in token or "quar" in token for token in vocabulary)


# The masks.


def blocks(count: int, length: int = 64, vocabulary: int = 500) -> Tensor:
    blocks_NL = torch.randint(len(SPECIAL), vocabulary, (count, length), generator=private(9))
    blocks_NL[:, 0], blocks_NL[:, -1] = CLS, SEP
    return blocks_NL


@pytest.mark.parametrize(("length", "each"), [(3, 1), (8, 1), (16, 2), (64, 9), (512, 76)])
def test_as_many_tokens_are_masked_in_every_block(length: int, each: int) -> None:
    originals_NL = blocks(50, length)
    batch = masked(originals_NL, 500, private(1))
    asked_NL = batch.targets != NOT_ASKED
    assert set(asked_NL.sum(dim=1).tolist()) == {each}
    assert torch.equal(batch.targets[asked_NL], originals_NL[asked_NL])
    assert torch.equal(batch.inputs[~asked_NL], originals_NL[~asked_NL])


def test_special_tokens_are_never_masked_nor_drawn_as_another() -> None:
    originals_NL = blocks(400, 16, vocabulary=len(SPECIAL) + 3)
    batch = masked(originals_NL, len(SPECIAL) + 3, private(1))
    asked_NL = batch.targets != NOT_ASKED
    assert not asked_NL[:, 0].any()
    assert not asked_NL[:, -1].any()
    assert asked_NL[:, 1:-1].any(dim=0).all(), "every other place is masked sometimes"
    inside_N = batch.inputs[:, 1:-1].flatten()
    assert set(inside_N.tolist()) == {MASK, *range(len(SPECIAL), len(SPECIAL) + 3)}


def test_of_masked_tokens_eight_in_ten_are_hidden_and_one_in_ten_is_another() -> None:
    originals_NL = blocks(2000, vocabulary=30_000)
    batch = masked(originals_NL, 30_000, private(1))
    asked_NL = batch.targets != NOT_ASKED
    now_M, were_M = batch.inputs[asked_NL], originals_NL[asked_NL]
    shares = {
        0.8: float((now_M == MASK).double().mean()),
        0.1: float(((now_M != MASK) & (now_M != were_M)).double().mean()),
    }
    deviation = math.sqrt(0.8 * 0.2 / len(now_M))
    for expected, share in shares.items():
        assert abs(share - expected) < 5 * deviation, shares


def test_masks_follow_from_the_generator() -> None:
    originals_NL = blocks(20)
    one, two, other = (masked(originals_NL, 500, private(number)) for number in (1, 1, 2))
    assert torch.equal(one.inputs, two.inputs)
    assert not torch.equal(one.targets, other.targets)


# The task.


def test_volunteers_of_one_text_begin_alike(text: Path) -> None:
    global_state = torch.get_rng_state()
    one, two, other = task_from(text), task_from(text), task_from(text, seed=1)
    assert torch.equal(torch.get_rng_state(), global_state)
    weights = [torch.cat([p.flatten() for p in task.network.parameters()]) for task in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert {parameter.dtype for parameter in one.network.parameters()} == {torch.float32}
    assert one.network.training
    assert one.test() == two.test()
    assert one.text_digest == hashlib.sha256(text.read_bytes()).hexdigest()


def test_shapes_follow_from_the_recipe_and_not_from_the_text(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("abcdefgh ijklmnop qrstuvwx\n" * 200)
    shapes = [[p.shape for p in task_from(path).network.parameters()] for path in (text, other)]
    assert shapes[0] == shapes[1]


def test_every_block_comes_once_in_a_pass(text: Path) -> None:
    task, generator = task_from(text), private(1)
    end = round(0.8 * len(text.read_text()))
    expected_NL = blocks_of(text.read_text()[:end], task.tokenizer, 16)
    assert task.records == len(expected_NL)
    batches = [task.draw(generator, size) for size in (100, 1, task.records - 101)]
    drawn = [torch.where(batch.targets == NOT_ASKED, batch.inputs, batch.targets) for batch in batches]
    assert sorted(torch.cat(drawn).tolist()) == sorted(expected_NL.tolist())


def test_batches_follow_from_the_private_generator(text: Path) -> None:
    batches = [task_from(text).draw(private(number), 32) for number in (1, 1, 2)]
    assert torch.equal(batches[0].inputs, batches[1].inputs)
    assert torch.equal(batches[0].targets, batches[1].targets)
    assert not torch.equal(batches[0].inputs, batches[2].inputs)


def test_the_loss_is_that_of_the_whole_network_at_masked_places_alone(text: Path) -> None:
    task = task_from(text)
    batch = task.draw(private(1), 8)
    logits_BLV = task.network(batch.inputs).logits  # of every token, as transformers computes it
    asked = [(b, i) for b in range(8) for i in range(16) if batch.targets[b, i] != NOT_ASKED]
    each = [-F.log_softmax(logits_BLV[b, i], 0)[batch.targets[b, i]] for b, i in asked]
    loss = task.loss(batch)
    assert loss.shape == ()
    torch.testing.assert_close(loss, torch.stack(each).mean())
    torch.testing.assert_close(loss, task.network(batch.inputs, labels=batch.targets).loss)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in task.network.parameters())


def test_means_of_pieces_come_to_the_mean_of_the_whole(text: Path) -> None:
    task = task_from(text)
    batch = task.draw(private(1), 20)
    pieces = list(batch.split(8))
    mean = sum(len(piece) * task.loss(piece).item() for piece in pieces) / 20
    assert mean == pytest.approx(task.loss(batch).item(), rel=1e-5)


def test_the_test_is_of_the_last_part_under_public_masks(text: Path) -> None:
    task = task_from(text, data={"test_records": 70})
    whole = text.read_text()
    test_NL = blocks_of(whole[round(0.8 * len(whole)) :], task.tokenizer, 16)[:70]
    assert len(test_NL) == 70, "more than one batch of the test"
    masks = public_source(0).generator("test masks")
    batch = masked(test_NL, task.tokenizer.get_vocab_size(), masks)
    with torch.no_grad():
        loss = float(task.loss(batch))
        guesses = task.network(batch.inputs).logits.argmax(dim=2)[batch.targets != NOT_ASKED]
    right = (guesses == batch.targets[batch.targets != NOT_ASKED]).double().mean()
    measured = task.test()
    assert set(measured) == {"loss", "perplexity", "accuracy"}
    assert measured["loss"] == pytest.approx(loss, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert measured["accuracy"] == pytest.approx(float(right))


def test_the_test_depends_on_no_private_draw_and_on_no_dropout(text: Path) -> None:
    task = task_from(text, dropout=0.5)
    before = task.test()
    batch = task.draw(private(3), 40)
    assert task.test() == before
    assert task.network.training
    losses = []
    for number in (1, 1, 2):
        with drawing_from(private(number)):
            losses.append(task.loss(batch).item())
    assert losses[0] == losses[1] != losses[2], "dropout is at work in training, from the generator given"


def test_an_infinite_perplexity_is_said(text: Path) -> None:
    task = task_from(text)
    with torch.no_grad():
        task.network.get_parameter("predictions.bias").copy_(torch.linspace(0, 1e5, 300))
    assert task.test()["perplexity"] == math.inf


def test_a_few_steps_teach_it_to_look_around(tmp_path: Path) -> None:
    words = ["fox", "owl", "man", "aunt", "bread", "water", "books", "psalms", "river", "stone", "cloud", "horse"]
    chosen = torch.randint(len(words), (400,), generator=private(200)).tolist()
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{f'{words[number]} ' * 40}\n" for number in chosen))
    task, generator = task_from(path, vocabulary=400), private(1)
    adam = torch.optim.Adam(task.network.parameters(), 2e-3)
    before = task.test()
    for _ in range(250):
        adam.zero_grad()
        task.loss(task.draw(generator, 32)).backward()  # type: ignore[no-untyped-call]
        adam.step()
    after = task.test()
    assert before["loss"] == pytest.approx(math.log(400), rel=0.1), "untrained, it knows nothing"
    assert after["loss"] < 1.8, "counting words alone comes to log(12), 2.5"
    assert after["accuracy"] > 0.5


def test_shakespeare_is_learned_from(data_folder: Path) -> None:
    tables = {
        "data": {"path": str(data_folder / "tinyshakespeare.txt"), "test_share": 0.02},
        "network": {"name": "albert", "settings": {"size": "tiny"}},
        "parties": {"mode": "data_parallel"},
    }
    task, generator = task_of(parse_recipe(tables)), private(1)
    adam = torch.optim.Adam(task.network.parameters(), 3e-3)
    before = task.test()["loss"]
    for _ in range(40):
        adam.zero_grad()
        task.loss(task.draw(generator, 32)).backward()  # type: ignore[no-untyped-call]
        adam.step()
    assert task.records > 10_000
    assert task.test()["loss"] < before - 0.7


def test_nothing_is_asked_of_a_network(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    task = task_from(text)
    task.loss(task.draw(private(1), 8)).backward()  # type: ignore[no-untyped-call]
    task.test()


# Sizes and refusals.


def test_base_has_the_sizes_of_the_paper() -> None:
    base = sizes_of({"size": "base"})
    assert base == SIZES["base"]
    assert (base.hidden, base.layers, base.heads, base.embedding) == (768, 12, 12, 128)
    assert (base.length, base.vocabulary, base.dropout) == (512, 30_000, 0)
    assert sizes_of({}) == SIZES["tiny"]
    assert sizes_of({"size": "small", "layers": 3}).layers == 3


def test_layers_share_their_weights(text: Path) -> None:
    counts = [sum(p.numel() for p in task_from(text, layers=layers).network.parameters()) for layers in (1, 4)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hiden": 64}, r"no setting 'hiden'; did you mean 'hidden'\? known: size, hidden, .*, dropout$"),
        ({"size": "bass"}, r"no size 'bass'; did you mean 'base'\? known: tiny, small, base$"),
        ({"size": ["tiny"]}, r"no size \['tiny'\]; .*known: tiny, small, base$"),
        ({"layers": 0}, r"layers is 0; expected a whole number of 1 or more$"),
        ({"layers": True}, r"layers is True; expected a whole number"),
        ({"hidden": 64.0}, r"hidden is 64.0; expected a whole number"),
        ({"vocabulary": 260}, r"vocabulary is 260; expected a whole number of 261 or more$"),
        ({"length": 7}, r"length is 7; expected a whole number of 8 or more$"),
        ({"heads": 3}, r"hidden is 64; expected a multiple of heads, 3$"),
        ({"dropout": 1}, r"dropout is 1; expected a number from 0 to below 1$"),
        ({"dropout": "much"}, r"dropout is 'much'; expected a number"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^network 'albert'.*{message}"):
        sizes_of(settings)


def _refusal(make: Callable[[], object]) -> str:
    with pytest.raises(MilkglassError) as caught:
        make()
    assert isinstance(caught.value, DataError | RecipeError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty text; expected some"),
        (b" \n\t\n", "an empty text; expected some"),
        (b"good until here \xff\xfe", "byte 16 is not UTF-8; expected a text in UTF-8"),
        (b"a text of one line", "training and 0 test blocks of 16 tokens; expected at least 8 of each"),
    ],
)
def test_texts_that_are_none_are_refused_in_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    line = _refusal(lambda: task_from(path))
    assert line.startswith(str(path))
    assert words in line


def test_a_text_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "No such file" in _refusal(lambda: task_from(tmp_path / "none.txt"))
    (tmp_path / "folder.txt").mkdir()
    assert "Is a directory" in _refusal(lambda: task_from(tmp_path / "folder.txt"))


@pytest.mark.parametrize(
    ("key", "value"), [("test_path", "b.txt"), ("sensitive", ["sex"]), ("ids", "id"), ("classes", 2)]
)
def test_keys_of_other_records_are_refused(key: str, value: object, text: Path) -> None:
    line = _refusal(lambda: task_from(text, data={key: value}))
    assert line.startswith(f"data.{key} does not go with a text; expected none")


def test_fewer_records_are_taken_where_the_recipe_says_so(text: Path) -> None:
    assert task_from(text, data={"train_records": 50}).records == 50


@pytest.mark.parametrize("package", ["tokenizers", "transformers"])
def test_without_the_extra_it_is_said_what_to_install(
    package: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"^masked language modeling needs .* install 'milkglass\[collab\]'$"):
        task_from(text)
