"""Encrypted answers are the plain ones; the server cannot read; what cannot be computed, or was forged, is refused."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable

import pytest
import tenseal
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.cuts import cut
from milkglass.errors import CutError, DataError, MessageError, MissingExtraError
from milkglass.networks import cnn, mlp, resnet
from milkglass.private.homomorphic import (
    GUARANTEE,
    LARGEST_ANSWER,
    RECORDS_PER_CALL,
    HomomorphicClient,
    HomomorphicServer,
    fold,
    homomorphic_run,
)
from milkglass.randomness import drawing_from

torch.set_num_threads(1)

WIDTH, OUTPUTS = 3, 2
_NOISE = 1e-5


class FunctionInside(nn.Module):
    """Its ReLU is no layer, so no layer can be named."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, z_BD: Tensor) -> Tensor:
        y_BK: Tensor = self.last(F.relu(self.first(z_BD)))
        return y_BK


class Centered(nn.Module):
    """Each record's answer tells of the others."""

    def forward(self, z_BD: Tensor) -> Tensor:
        return z_BD - z_BD.mean(0)


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    with drawing_from(torch.Generator().manual_seed(1)):
        return make()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def linear() -> nn.Module:
    return drawn(lambda: nn.Linear(WIDTH, OUTPUTS))


def deep() -> nn.Module:
    """Everything that is affine at rest, with statistics that are not those of a new BatchNorm."""
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        norm.running_mean = torch.linspace(-1, 1, 6)
        norm.running_var = torch.linspace(0.5, 2, 6)
    convolutions = [nn.Conv2d(2, 6, 3, padding=1), norm, nn.AvgPool2d(2), nn.Dropout2d(0.5)]
    return nn.Sequential(nn.Identity(), *convolutions, nn.Flatten(), nn.Linear(24, 8), nn.Dropout(0.5), nn.Linear(8, 5))


@pytest.fixture(scope="module")
def client() -> HomomorphicClient:
    return HomomorphicClient(WIDTH, OUTPUTS)


@pytest.fixture(scope="module")
def server(client: HomomorphicClient) -> HomomorphicServer:
    return HomomorphicServer(client.public_context(), linear(), (WIDTH,))


@pytest.mark.parametrize("records", [1, 5, RECORDS_PER_CALL, RECORDS_PER_CALL + 1])
def test_decrypted_answers_are_the_plain_ones(
    records: int, client: HomomorphicClient, server: HomomorphicServer
) -> None:
    z_BD = 3 * normal(records, WIDTH)
    requests = client.encrypt(z_BD)
    assert len(requests) == -(-records // RECORDS_PER_CALL)
    answers_BK = client.decrypt(server.answer(requests), records)
    torch.testing.assert_close(answers_BK, linear().double()(z_BD.double()).detach(), atol=_NOISE, rtol=0)


@pytest.mark.parametrize(("width", "outputs"), [(1, 1), (1, 2), (2, 1), (200, 1)])
def test_narrow_and_wide_stages_are_computed_alike(width: int, outputs: int) -> None:
    """TenSEAL's batches of one column hold the first record in every slot."""
    stage = drawn(lambda: nn.Linear(width, outputs))
    assert homomorphic_run(stage, normal(7, width)).largest_logit_error < _NOISE


def test_a_deep_affine_stage_is_one_map_and_its_run_agrees_with_it() -> None:
    stage = drawn(deep)
    z_BCHW = normal(40, 2, 4, 4)
    W_DK, b_K = fold(stage, (2, 4, 4))
    assert stage.training  # folding looks at a copy at rest
    run = homomorphic_run(stage, z_BCHW, records=30)
    assert stage.training
    plain_BK = stage.eval()(z_BCHW[:30]).detach()
    torch.testing.assert_close((z_BCHW[:30].double().flatten(1) @ W_DK + b_K).float(), plain_BK)
    torch.testing.assert_close(run.answers_BK.float(), plain_BK, atol=_NOISE, rtol=1e-5)
    assert (run.records, run.top1_equal) == (30, 1.0)
    assert 0.8 < run.top1_equal_low < 1.0
    assert run.largest_logit_error == pytest.approx(float((run.answers_BK - plain_BK).abs().max()))
    assert run.bytes_up > 32 * run.bytes_down / 5 > 0  # 32 ciphertexts before rescaling against 5 after it
    assert min(run.key_bytes, run.client_seconds, run.server_seconds, run.plain_seconds) > 0


def test_weights_of_zero_are_computed_with_too(client: HomomorphicClient) -> None:
    stage = nn.Linear(WIDTH, OUTPUTS)
    with torch.no_grad():
        stage.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        stage.bias.zero_()
    z_BD = normal(4, WIDTH)
    server = HomomorphicServer(client.public_context(), stage, (WIDTH,))
    answers_BK = client.decrypt(server.answer(client.encrypt(z_BD)), 4)
    torch.testing.assert_close(answers_BK, stage(z_BD).detach().double(), atol=_NOISE, rtol=0)


def test_who_has_only_what_the_server_gets_cannot_decrypt(client: HomomorphicClient) -> None:
    context = tenseal.context_from(client.public_context())
    assert not context.is_private()
    assert not context.has_secret_key()
    request = tenseal.ckks_tensor_from(context, client.encrypt(normal(2, WIDTH))[0])
    with pytest.raises(ValueError, match="secret_key"):
        request.decrypt()


def test_nothing_that_crosses_holds_an_activation_or_how_many_there_were(client: HomomorphicClient) -> None:
    z_BD = normal(6, WIDTH)
    (request,) = client.encrypt(z_BD)
    (again,) = client.encrypt(z_BD)
    assert request != again  # encryption is random: equal records do not look equal
    for crossed in (request, client.public_context()):
        for values in (z_BD.flatten(), z_BD.T.flatten(), z_BD.double().flatten()):
            raw = values.numpy().tobytes()
            width = 4 * values.element_size()
            assert not any(raw[start : start + width] in crossed for start in range(0, len(raw) - width, width // 4))
    (one,) = client.encrypt(z_BD[:1])
    assert abs(len(one) - len(request)) < 0.01 * len(request)  # compression of random bytes varies by itself
    assert "not shown" in repr(client)


@pytest.mark.parametrize(
    ("model", "at", "shape", "layer", "way_out"),
    [
        (lambda: mlp((8,), 3, (6, 4)), "hidden1", (6,), "'hidden2.1' (ReLU)", "cut.at = 'hidden2'"),
        (lambda: cnn((1, 4, 4), 3, 8, 6), "block1", (8, 2, 2), "'block2.1' (GroupNorm)", "cut.at = 'hidden'"),
        (lambda: resnet((1, 4, 4), 3), "block2", (32, 2, 2), "'block3.norm1' (GroupNorm)", "cut.at = 'block3'"),
    ],
    ids=["mlp", "cnn", "resnet"],
)
def test_a_stage_that_is_not_affine_is_refused_and_the_cut_it_names_is_not(
    model: Callable[[], nn.Module], at: str, shape: tuple[int, ...], layer: str, way_out: str
) -> None:
    network = drawn(model)
    with pytest.raises(CutError, match=re.escape(layer)) as refused:
        fold(cut(network, at).top, shape)
    assert way_out in str(refused.value)
    assert "cut.back_at" in str(refused.value)
    deeper = cut(network, way_out.split("'")[1])
    z_BD = deeper.bottom(normal(1, *((8,) if at == "hidden1" else (1, 4, 4))))
    fold(deeper.top, z_BD.shape[1:])


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (FunctionInside, "what FunctionInside itself computes"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), "'1' (Softmax)"),
        (lambda: nn.Hardtanh(-1e5, 1e5), "Hardtanh"),
        (Centered, "what Centered itself computes"),
        (lambda: nn.Linear(5, 2), "fails on activations (4,)"),
        (lambda: nn.LSTM(4, 3), "not one float tensor"),
    ],
    ids=["function", "last layer", "far out", "couples records", "wrong shape", "tuple"],
)
def test_other_stages_are_refused_in_words(stage: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(CutError, match=re.escape(words)):
        fold(drawn(stage), (4,))


@pytest.mark.parametrize("bias", [2 * LARGEST_ANSWER, float("nan")])
def test_weights_out_of_range_are_refused(bias: float, client: HomomorphicClient) -> None:
    stage = linear()
    with torch.no_grad():
        stage.get_parameter("bias").fill_(bias)
    with pytest.raises(CutError, match="answers zeros with"):
        HomomorphicServer(client.public_context(), stage, (WIDTH,))


@pytest.mark.parametrize(
    "z_BD",
    [
        torch.zeros(2, WIDTH + 1),
        torch.zeros(WIDTH),
        torch.zeros(0, WIDTH),
        torch.tensor([[0.0, float("nan"), 0.0]]),
        torch.full((1, WIDTH), -(2.0**21)),
    ],
    ids=["width", "no batch", "no record", "not a number", "too large"],
)
def test_activations_that_cannot_be_encrypted_are_refused(z_BD: Tensor, client: HomomorphicClient) -> None:
    with pytest.raises(DataError, match="expected"):
        client.encrypt(z_BD)


@pytest.mark.parametrize("value", [LARGEST_ANSWER + 100, 3000.0, 4096.0, 8192.0])
def test_answers_too_large_for_the_parameters_never_come_out_wrong(value: float) -> None:
    """At 4,096 = 2^(48 - 36) the values wrap around: every record alone would read as 0."""
    client = HomomorphicClient(1, 1)
    server = HomomorphicServer(client.public_context(), nn.Identity(), (1,))
    answers = server.answer(client.encrypt(torch.full((RECORDS_PER_CALL, 1), value)))
    with pytest.raises(MessageError, match="makes no sense"):
        client.decrypt(answers, RECORDS_PER_CALL)


def test_forged_requests_and_answers_raise_one_line_or_change_nothing(
    client: HomomorphicClient, server: HomomorphicServer
) -> None:
    z_BD = normal(5, WIDTH)
    plain_BK = linear()(z_BD).detach().double()
    (request,) = client.encrypt(z_BD)
    (answer,) = server.answer([request])
    dice = random.Random(3)
    refused = 0
    for number in range(200):
        sent = request if number % 2 else answer
        forged = bytearray(sent)
        at = dice.randrange(100 if number % 4 < 2 else len(forged))
        forged[at : at + 4] = dice.randbytes(4)
        frame = bytes(forged[: dice.randrange(len(forged))]) if number % 5 == 0 else bytes(forged)
        try:
            got_BK = client.decrypt(server.answer([frame]) if number % 2 else [frame], 5)
        except MessageError as error:
            refused += "\n" not in str(error)
        else:  # such as a spare byte of a header
            torch.testing.assert_close(got_BK, plain_BK, atol=_NOISE, rtol=0)
    assert refused > 150


def test_a_lie_about_shape_or_batch_never_reaches_native_code(
    client: HomomorphicClient, server: HomomorphicServer
) -> None:
    """TenSEAL by itself dies of these by a segmentation fault."""
    (request,) = client.encrypt(normal(5, WIDTH))
    batch = b"\x20\x80\x10"
    assert request.startswith(b"\x0a\x01\x03")
    assert request.endswith(batch)
    more = request.removesuffix(batch) + b"\x20\x80\x80\x80\x08"
    for forged in (b"\x0a\x01\x04" + request[3:], more, request + b"\x08\x02", b"", request[:-1]):
        with pytest.raises(MessageError, match="truncated or forged"):
            server.answer([forged])
        with pytest.raises(MessageError, match="truncated or forged"):
            client.decrypt([forged], 5)


def test_answers_to_another_client_or_to_more_records_are_refused(client: HomomorphicClient) -> None:
    z_BD = normal(1, WIDTH)
    other = HomomorphicClient(WIDTH, OUTPUTS)
    answers = HomomorphicServer(other.public_context(), linear(), (WIDTH,)).answer(other.encrypt(z_BD))
    with pytest.raises(MessageError, match="another client's"):
        client.decrypt(answers, 1)
    with pytest.raises(MessageError, match="expected 2"):
        client.decrypt(answers, RECORDS_PER_CALL + 1)
    with pytest.raises(MessageError, match="truncated or forged; expected 2 ciphertexts"):
        client.decrypt(client.encrypt(z_BD), 1)


def test_a_context_that_is_damaged_or_private_or_of_other_parameters_is_refused(client: HomomorphicClient) -> None:
    private = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[48, 36, 24], n_threads=1)
    private.global_scale = 2.0**36
    other = private.copy()
    other.make_context_public()
    for context, words in (
        (client.public_context()[:-9], "damaged"),
        (b"", "damaged"),
        (private.serialize(save_secret_key=True), "secret key"),
        (other.serialize(), "other parameters"),
    ):
        with pytest.raises(MessageError, match=words):
            HomomorphicServer(context, linear(), (WIDTH,))


def test_without_tenseal_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(MissingExtraError, match=r"^homomorphic inference needs .* install 'milkglass\[he\]'$"):
        HomomorphicClient(WIDTH, OUTPUTS)
    with pytest.raises(MissingExtraError, match=r"milkglass\[he\]"):
        homomorphic_run(linear(), normal(2, WIDTH))


def test_the_guarantee_says_what_is_not_hidden() -> None:
    for words in ("never the activations", "weights are not hidden", "Training is not covered"):
        assert words in GUARANTEE
