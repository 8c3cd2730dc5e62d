"""Parties know each other by certificates: TLS accepts what is made here, and what is wrong is told in one line."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import TypeAdapter

from milkglass.certificates import (
    PARTY_NAME,
    Issued,
    Role,
    certs,
    issue,
    issue_authority,
    load_credentials,
    make_certificates,
)
from milkglass.errors import CertificateError, RunError
from milkglass.sections import PartyName

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of certificates that no test changes."""
    folder = tmp_path_factory.mktemp("kit") / "certificates"
    make_certificates(folder, "localhost", ["hospital-a", "Hospital_B"])
    return folder


def handshake(
    server: Path, client: Path, host: str = "localhost", role: Role = "client", *, strict: bool = True
) -> str:
    """The client's common name as the server reads it from a TLS handshake; the first refusal is raised.

    role: whose certificate the client shows.
    """
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.verify_mode = ssl.CERT_REQUIRED
    dialing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, folder, shown in ((accepting, server, "server"), (dialing, client, role)):
        if strict:
            context.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's own default from 3.13 on
        else:
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.load_verify_locations(folder / "rootCA.pem")
        context.load_cert_chain(folder / f"{shown}.crt", folder / f"{shown}.key")
    return _shake(accepting, dialing, host)


def _shake(accepting: ssl.SSLContext, dialing: ssl.SSLContext, host: str) -> str:
    def accept(there: socket.socket) -> str:
        with accepting.wrap_socket(there, server_side=True) as wrapped:
            wrapped.sendall(b"in")
            shown = wrapped.getpeercert(binary_form=True)
        assert shown is not None
        return _common_name_of(x509.load_der_x509_certificate(shown))

    here, there = socket.socketpair()
    with here, there, ThreadPoolExecutor(1) as pool:
        here.settimeout(10)
        there.settimeout(10)
        answer = pool.submit(accept, there)
        refused: OSError | None = None
        try:
            with dialing.wrap_socket(here, server_hostname=host) as wrapped:
                assert wrapped.recv(2) == b"in"
        except OSError as error:
            refused = error
        if isinstance(refused, ssl.SSLCertVerificationError):
            raise refused
        name = answer.result()
        if refused is not None:
            raise refused
        return name


def put(folder: Path, authority: Issued, issued: Issued, role: Role = "client") -> Path:
    """A party's folder, written as it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rootCA.pem").write_bytes(authority.certificate_pem)
    (folder / f"{role}.crt").write_bytes(issued.certificate_pem)
    (folder / f"{role}.key").touch(0o600)
    (folder / f"{role}.key").write_bytes(issued.key_pem)
    return folder


def signed(
    subject: x509.Name,
    key: PublicKey,
    issuer: tuple[x509.Name, PrivateKey],
    *,
    authority: bool = False,
    end: datetime = NOW + 99 * DAY,
    hosts: tuple[str, ...] = (),
) -> bytes:
    """A certificate as other tools make them, in PEM: no purpose, no key identifiers."""
    names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
    builder = x509.CertificateBuilder(issuer[0], subject, key, x509.random_serial_number(), NOW - DAY, end)
    if hosts:
        builder = builder.add_extension(names, critical=False)
    if authority:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(issuer[1], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def refuses(kind: type[Exception], *words: str) -> AbstractContextManager[pytest.ExceptionInfo[Exception]]:
    """One line that holds these words, in this order."""
    return pytest.raises(kind, match="^[^\n]*" + "[^\n]*".join(map(re.escape, words)) + "[^\n]*$")


def test_parties_of_one_ca_meet_and_know_each_others_names(kit: Path) -> None:
    assert handshake(kit / "localhost", kit / "hospital-a") == "hospital-a"
    assert handshake(kit / "localhost", kit / "Hospital_B", "127.0.0.1") == "Hospital_B"
    assert handshake(kit / "localhost", kit / "hospital-a", "::1") == "hospital-a"


def test_a_server_may_dial_on_as_a_client_and_a_client_may_not_serve(kit: Path, tmp_path: Path) -> None:
    assert handshake(kit / "localhost", kit / "localhost", role="server") == "localhost"
    posing = shutil.copytree(kit / "hospital-a", tmp_path / "posing")
    for ending in ("crt", "key"):
        (posing / f"client.{ending}").rename(posing / f"server.{ending}")
    with refuses(ssl.SSLCertVerificationError, "purpose"):
        handshake(posing, kit / "hospital-a", "hospital-a")


def test_a_server_of_another_name_is_refused(kit: Path) -> None:
    with refuses(ssl.SSLCertVerificationError, "Hostname mismatch"):
        handshake(kit / "localhost", kit / "hospital-a", "server.example.org")


def test_a_stranger_of_another_ca_is_refused_by_both_sides(kit: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path, "localhost", ["hospital-a"])
    with refuses(ssl.SSLCertVerificationError, "CERTIFICATE_VERIFY_FAILED"):
        handshake(tmp_path / "localhost", kit / "hospital-a")
    shutil.copy(tmp_path / "localhost/rootCA.pem", tmp_path / "hospital-a/rootCA.pem")
    for name in ("client.crt", "client.key"):  # one that trusts the server, and is not trusted
        shutil.copy(kit / "hospital-a" / name, tmp_path / "hospital-a" / name)
    with refuses(ssl.SSLCertVerificationError, "unable to get local issuer certificate"):
        handshake(tmp_path / "localhost", tmp_path / "hospital-a")


def test_a_server_refuses_whoever_shows_no_certificate(kit: Path) -> None:
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.verify_mode = ssl.CERT_REQUIRED
    accepting.load_verify_locations(kit / "localhost/rootCA.pem")
    accepting.load_cert_chain(kit / "localhost/server.crt", kit / "localhost/server.key")
    dialing = ssl.create_default_context(cafile=kit / "hospital-a/rootCA.pem")
    with refuses(ssl.SSLError, "PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        _shake(accepting, dialing, "localhost")


@pytest.mark.parametrize(
    ("start", "end", "words"), [(-9 * DAY, -DAY, "expired on"), (DAY, 9 * DAY, "not valid before")]
)
def test_wrong_dates_are_refused_when_loaded_and_by_the_other_side(
    start: timedelta, end: timedelta, words: str, tmp_path: Path
) -> None:
    authority = issue_authority(NOW - 99 * DAY, NOW + 99 * DAY)
    server = put(tmp_path / "s", authority, issue(authority, "server", "localhost", NOW - DAY, NOW + DAY), "server")
    client = put(tmp_path / "c", authority, issue(authority, "client", "a", NOW + start, NOW + end))
    with refuses(ssl.SSLCertVerificationError, words.split()[0]):
        handshake(server, client)
    edge = f"{NOW + (end if end < timedelta() else start):%Y-%m-%d %H:%M} UTC"
    with refuses(CertificateError, str(client / "client.crt"), words, edge, "clock says", "UTC"):
        load_credentials(client, "client")


def test_a_roots_dates_count_as_well(tmp_path: Path) -> None:
    authority = issue_authority(NOW - 99 * DAY, NOW - DAY)
    client = put(tmp_path / "c", authority, issue(authority, "client", "a", NOW - DAY, NOW + 99 * DAY))
    with refuses(CertificateError, str(client / "rootCA.pem"), "expired on"):
        load_credentials(client, "client")


def test_names_and_purposes_are_as_asked(kit: Path, tmp_path: Path) -> None:
    def hosts(file: Path) -> x509.SubjectAlternativeName:
        return _certificate(file).extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    make_certificates(tmp_path, "10.0.0.7", ["a"])
    make_certificates(tmp_path, "gpu.example.org", ["a"])
    localhost = hosts(kit / "localhost/server.crt")
    assert localhost.get_values_for_type(x509.DNSName) == ["localhost"]
    assert localhost.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]
    address = hosts(tmp_path / "10.0.0.7/server.crt")
    assert list(address) == [x509.IPAddress(ip_address("10.0.0.7"))]
    host = hosts(tmp_path / "gpu.example.org/server.crt")
    assert list(host) == [x509.DNSName("gpu.example.org")]
    assert list(hosts(kit / "hospital-a/client.crt")) == [x509.DNSName("hospital-a")]
    with pytest.raises(x509.ExtensionNotFound):  # an underscore is no DNS name's
        hosts(kit / "Hospital_B/client.crt")
    client = _certificate(kit / "hospital-a/client.crt")
    purposes = client.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_party_can_sign_nobody_and_the_ca_signs_no_other_ca(kit: Path) -> None:
    root = _certificate(kit / "ca/rootCA.pem")
    party = _certificate(kit / "localhost/server.crt")
    for certificate, is_authority in ((root, True), (party, False)):
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value == x509.BasicConstraints(is_authority, 0 if is_authority else None)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.key_cert_sign == is_authority
        assert usage.digital_signature != is_authority
    # a party of the CA's own name is a party still
    issued = issue(Issued(root, _key(kit)), "client", _common_name_of(root), NOW, NOW + DAY)
    assert not issued.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def _certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def _key(kit: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key((kit / "ca/rootCA.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _common_name_of(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def test_certificates_are_valid_at_once_also_by_a_slow_clock_and_for_the_days_asked(tmp_path: Path) -> None:
    make_certificates(tmp_path, "localhost", [], days=3)
    certificate = _certificate(tmp_path / "localhost/server.crt")
    assert timedelta(minutes=5) < datetime.now(UTC) - certificate.not_valid_before_utc < timedelta(minutes=20)
    assert abs(certificate.not_valid_after_utc - datetime.now(UTC) - 3 * DAY) < timedelta(minutes=1)
    make_certificates(tmp_path, "localhost", ["late"], days=99)
    late = _certificate(tmp_path / "late/client.crt")
    assert late.not_valid_after_utc == certificate.not_valid_after_utc  # no certificate outlives its CA
    assert late.serial_number != certificate.serial_number


def test_keys_and_folders_are_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_certificates(tmp_path / "kit", "localhost", ["hospital-a"])
    finally:
        os.umask(before)
    assert made == [path for path in made if path.is_file()]
    assert sorted(made) == sorted(path for path in (tmp_path / "kit").rglob("*") if path.is_file())
    assert {path.relative_to(tmp_path / "kit").as_posix() for path in made if path.suffix == ".key"} == {
        "ca/rootCA.key",
        "localhost/server.key",
        "hospital-a/client.key",
    }
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o600 if path.suffix == ".key" else 0o644)
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "kit").stat().st_mode & 0o777 == 0o700


def test_a_key_is_closed_before_a_byte_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: dict[str, tuple[int, bool]] = {}

    def watching(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = opening(path, flags, mode)
        modes[path.name] = (os.fstat(descriptor).st_mode & 0o777, bool(flags & os.O_EXCL))
        return descriptor

    opening = os.open
    monkeypatch.setattr(os, "open", watching)
    make_certificates(tmp_path, "localhost", ["a"])
    assert {name: seen for name, seen in modes.items() if name.endswith(".key")} == dict.fromkeys(
        ("rootCA.key", "server.key", "client.key"), (0o600, True)
    )


def test_a_client_is_added_later_and_the_others_keep_their_bytes(tmp_path: Path) -> None:
    first = make_certificates(tmp_path, "localhost", ["hospital-a"])
    before = {path: path.read_bytes() for path in first}
    second = make_certificates(tmp_path, "localhost", ["hospital-a", "hospital-b"])
    assert {path.parent.name for path in second} == {"hospital-b"}
    assert {path: path.read_bytes() for path in first} == before
    assert handshake(tmp_path / "localhost", tmp_path / "hospital-b") == "hospital-b"
    assert make_certificates(tmp_path, "localhost", ["hospital-a", "hospital-b"]) == []


def test_nothing_is_ever_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificates(tmp_path, "localhost", ["a"])
    (tmp_path / "a/client.crt").unlink()
    before = (tmp_path / "a/client.key").read_bytes()
    with refuses(RunError, str(tmp_path / "a/rootCA.pem"), "without client.crt", f"remove {tmp_path / 'a'} "):
        make_certificates(tmp_path, "localhost", ["new", "a"])
    assert (tmp_path / "a/client.key").read_bytes() == before
    assert not (tmp_path / "new").exists()
    with refuses(RunError, str(tmp_path / "localhost/rootCA.pem"), "without client.crt and client.key"):
        make_certificates(tmp_path, "b", ["localhost"])  # a server's folder, asked for as a client's
    (tmp_path / "ca/rootCA.key").unlink()
    with refuses(RunError, str(tmp_path / "ca/rootCA.pem"), "without rootCA.key"):
        make_certificates(tmp_path, "localhost", ["new"])
    # another process was faster, between the look and the write
    monkeypatch.setattr("milkglass.certificates._all_there", lambda *_: False)
    with refuses(RunError, str(tmp_path / "ca/rootCA.pem"), "is there already"):
        make_certificates(tmp_path, "localhost", ["a"])


def test_parties_of_another_ca_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    make_certificates(tmp_path, "localhost", ["a"])
    shutil.rmtree(tmp_path / "ca")
    with refuses(RunError, str(tmp_path / "localhost/rootCA.pem"), "is not the CA", f"remove {tmp_path / 'localhost'}"):
        make_certificates(tmp_path, "localhost", ["a"])
    assert not (tmp_path / "ca").exists()


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refuses(RunError, f"cannot write {tmp_path / 'ca/rootCA.key'}", "No space left"):
        make_certificates(tmp_path, "localhost", ["a"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.undo()
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        words = f"cannot make the folder {folder / 'ca'}: {tmp_path / 'file'} is a file; expected a folder"
        with refuses(RunError, words):
            make_certificates(folder, "localhost", ["a"])


def test_a_ca_that_cannot_be_used_is_refused(kit: Path, tmp_path: Path) -> None:
    old = issue_authority(NOW - 9 * DAY, NOW - DAY)
    for number, (root, key, words) in enumerate(
        (
            (old.certificate_pem, old.key_pem, ("rootCA.pem", "expired on")),
            (old.certificate_pem, (kit / "ca/rootCA.key").read_bytes(), ("rootCA.key", "does not belong to")),
            (old.certificate_pem, b"no key", ("rootCA.key", "not a readable private key")),
            (old.certificate_pem, _pem(_rsa_key()), ("rootCA.key", "not an ECDSA key")),
        )
    ):
        folder = tmp_path / str(number) / "ca"
        folder.mkdir(parents=True)
        (folder / "rootCA.pem").write_bytes(root)
        (folder / "rootCA.key").write_bytes(key)
        with refuses(CertificateError, *words):
            make_certificates(folder.parent, "localhost", ["a"])
        assert len(list(folder.parent.rglob("*"))) == 3


@pytest.mark.parametrize(
    ("server", "clients", "days", "words"),
    [
        ("localhost", ["../a"], 365, ("party '../a'", "expected up to 63 letters")),
        ("-a", ["a"], 365, ("party '-a'", "expected up to 63 letters")),
        ("localhost", ["a\n"], 365, (r"party 'a\n'", "expected up to 63 letters")),
        ("localhost", ["a" * 64], 365, ("expected up to 63 letters",)),
        ("localhost", [""], 365, ("party ''", "expected up to 63 letters")),
        ("CA", ["a"], 365, ("party 'CA'", "the CA's", "another name")),
        ("localhost", ["a", "b", "A"], 365, ("party 'A'", "named twice")),
        ("localhost", ["A", "a"], 365, ("party 'a'", "named twice")),
        ("localhost", ["LocalHost"], 365, ("party 'LocalHost'", "named twice")),
        ("localhost", ["a"], 0, ("0 days", "expected 1 to")),
        ("localhost", ["a"], 10**9, ("1000000000 days", "expected 1 to")),
    ],
)
def test_wrong_names_and_days_are_refused_before_anything_is_made(
    server: str, clients: list[str], days: int, words: tuple[str, ...], tmp_path: Path
) -> None:
    with refuses(CertificateError, *words):
        make_certificates(tmp_path / "kit", server, clients, days=days)
    assert not (tmp_path / "kit").exists()


def test_a_name_that_differs_in_case_from_a_party_that_is_there_is_refused(kit: Path) -> None:
    with refuses(CertificateError, "party 'HOSPITAL-A'", str(kit / "hospital-a"), "differ in case"):
        make_certificates(kit, "localhost", ["HOSPITAL-A"])


def test_party_names_are_those_of_recipes() -> None:
    assert TypeAdapter(PartyName).json_schema()["pattern"] == f"^{PARTY_NAME}$"


def test_credentials_are_the_files_and_never_show_the_key(kit: Path) -> None:
    loaded = load_credentials(kit / "hospital-a", "client")
    assert loaded.root == (kit / "hospital-a/rootCA.pem").read_bytes() == (kit / "ca/rootCA.pem").read_bytes()
    assert loaded.chain == (kit / "hospital-a/client.crt").read_bytes()
    assert loaded.key == (kit / "hospital-a/client.key").read_bytes()
    assert loaded.name == "hospital-a"
    assert loaded.cautions == ()
    assert load_credentials(kit / "localhost", "server").name == "localhost"
    shown = repr(replace(loaded, key=b"sesame"))
    assert "hospital-a" in shown
    assert "sesame" not in shown
    assert "PRIVATE" not in repr(loaded) + str(loaded)


def test_a_key_that_others_can_read_is_a_caution(kit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kit / "hospital-a", tmp_path / "a")
    (folder / "client.key").chmod(0o640)
    (caution,) = load_credentials(folder, "client").cautions
    assert caution == f"{folder / 'client.key'}: can be read by others; chmod 600 {folder / 'client.key'}"


def test_a_certificate_that_ends_soon_is_a_caution(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = issue_authority(now - DAY, now + 99 * DAY)
    soon = put(tmp_path / "soon", authority, issue(authority, "client", "a", now - DAY, now + 13.9 * DAY))
    (caution,) = load_credentials(soon, "client").cautions
    assert caution.startswith(f"{soon / 'client.crt'}: expires on {now + 13.9 * DAY:%Y-%m-%d}")
    later = put(tmp_path / "later", authority, issue(authority, "client", "a", now - DAY, now + 14.1 * DAY))
    assert load_credentials(later, "client").cautions == ()
    ending = issue_authority(now - DAY, now + 2 * DAY)
    root = put(tmp_path / "root", ending, issue(ending, "client", "a", now - DAY, now + 99 * DAY))
    (caution,) = load_credentials(root, "client").cautions
    assert caution.startswith(f"{root / 'rootCA.pem'}: expires on")


def test_missing_files_are_named_with_what_was_expected(kit: Path, tmp_path: Path) -> None:
    with refuses(CertificateError, str(tmp_path / "none"), "no such folder", "rootCA.pem, client.crt, client.key"):
        load_credentials(tmp_path / "none", "client")
    folder = shutil.copytree(kit / "hospital-a", tmp_path / "a")
    with refuses(CertificateError, "no server.crt and no server.key", "this is the folder of a client"):
        load_credentials(folder, "server")
    (folder / "client.crt").unlink()
    with refuses(CertificateError, f"{folder}: no client.crt; expected rootCA.pem, client.crt, client.key"):
        load_credentials(folder, "client")
    (folder / "client.crt").mkdir()
    with refuses(CertificateError, str(folder / "client.crt"), "Is a directory", "expected a PEM file"):
        load_credentials(folder, "client")


def test_the_folder_of_all_parties_names_those_that_could_be_meant(kit: Path) -> None:
    with refuses(
        CertificateError, f"{kit}: no rootCA.pem", f"such as {kit / 'Hospital_B'} or {kit / 'hospital-a'}"
    ) as refused:
        load_credentials(kit, "client")
    assert "localhost" not in str(refused.value)
    with refuses(CertificateError, f"such as {kit / 'localhost'}"):
        load_credentials(kit, "server")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rootCA.pem", b"", "not a readable certificate"),
        ("client.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "not a readable certificate"),
        ("client.key", b"\x00\xff", "not a readable private key"),
        ("client.key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a readable private key"),
    ],
)
def test_files_that_are_not_pem_are_named(kit: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    folder = shutil.copytree(kit / "hospital-a", tmp_path / "a")
    (folder / name).write_bytes(content)
    with refuses(CertificateError, str(folder / name), words, "expected PEM"):
        load_credentials(folder, "client")


def test_a_key_under_a_password_or_of_another_party_is_refused(kit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kit / "hospital-a", tmp_path / "a")
    shutil.copy(kit / "Hospital_B/client.key", folder / "client.key")
    with refuses(CertificateError, str(folder / "client.key"), "does not belong to", str(folder / "client.crt")):
        load_credentials(folder, "client")
    locked = _key(kit).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    (folder / "client.key").write_bytes(locked)
    with refuses(CertificateError, str(folder / "client.key"), "encrypted", "without a password"):
        load_credentials(folder, "client")


def test_a_certificate_of_another_ca_is_refused_also_under_the_roots_own_name(kit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kit / "hospital-a", tmp_path / "a")
    root = _certificate(folder / "rootCA.pem")
    key = ec.generate_private_key(ec.SECP256R1())
    same_name = signed(root.subject, key.public_key(), (root.subject, key), authority=True)
    for other in (issue_authority(NOW, NOW + 99 * DAY).certificate_pem, same_name):
        (folder / "rootCA.pem").write_bytes(other)
        with refuses(CertificateError, str(folder / "client.crt"), "not signed by", str(folder / "rootCA.pem")):
            load_credentials(folder, "client")


def test_a_chain_is_walked_to_the_root(tmp_path: Path) -> None:
    root = issue_authority(NOW - DAY, NOW + 99 * DAY)
    middle = issue_authority(NOW - DAY, NOW + 99 * DAY)
    crossed = signed(  # the middle CA's name and key, signed by the root
        middle.certificate.subject,
        middle.key.public_key(),
        (root.certificate.subject, root.key),
        authority=True,
        end=NOW + 5 * DAY,
    )
    party = issue(middle, "client", "a", NOW - DAY, NOW + 99 * DAY)
    folder = put(tmp_path / "a", root, party)
    with refuses(CertificateError, "not signed by", "nor through the certificates behind its own"):
        load_credentials(folder, "client")
    (folder / "client.crt").write_bytes(party.certificate_pem + crossed)
    loaded = load_credentials(folder, "client")
    assert loaded.name == "a"
    assert loaded.chain == party.certificate_pem + crossed
    assert ["expires on" in caution for caution in loaded.cautions] == [True]  # the one in the middle counts
    (folder / "client.crt").write_bytes(crossed + party.certificate_pem)
    with refuses(CertificateError, "client.key", "does not belong to"):
        load_credentials(folder, "client")
    (folder / "rootCA.pem").write_bytes(party.certificate_pem + root.certificate_pem)  # several roots: one is enough
    (folder / "client.crt").write_bytes(party.certificate_pem + crossed)
    assert load_credentials(folder, "client").name == "a"


def test_a_certificate_without_a_common_name_is_refused(tmp_path: Path) -> None:
    authority = issue_authority(NOW - DAY, NOW + 99 * DAY)
    one, two = (x509.NameAttribute(NameOID.COMMON_NAME, name) for name in "ab")
    for number, subject in enumerate((x509.Name([]), x509.Name([one, two]))):
        key = _rsa_key()
        certificate = signed(subject, key.public_key(), (authority.certificate.subject, authority.key))
        folder = put(tmp_path / str(number), authority, authority)
        (folder / "client.crt").write_bytes(certificate)
        (folder / "client.key").write_bytes(_pem(key))
        with refuses(CertificateError, str(folder / "client.crt"), "common names (CN)", "expected one"):
            load_credentials(folder, "client")


def test_a_start_up_kit_of_nvidia_flare_is_used_as_it_is(tmp_path: Path) -> None:
    # as nvflare.lighter makes them: RSA, a root without path length, no purposes, keys in OpenSSL's old form
    root, (root_key, server_key, client_key) = common_name("project"), (_rsa_key() for _ in range(3))
    root_pem = signed(root, root_key.public_key(), (root, root_key), authority=True)
    for role, name, key in (("server", "localhost", server_key), ("client", "site-1", client_key)):
        startup = tmp_path / name / "startup"
        startup.mkdir(parents=True)
        (startup / "rootCA.pem").write_bytes(root_pem)
        certificate = signed(common_name(name), key.public_key(), (root, root_key), hosts=(name,))
        (startup / f"{role}.crt").write_bytes(certificate)
        (startup / f"{role}.key").write_bytes(_pem(key))
    assert handshake(tmp_path / "localhost/startup", tmp_path / "site-1/startup", strict=False) == "site-1"
    loaded = load_credentials(tmp_path / "site-1/startup", "client")
    assert loaded.name == "site-1"
    assert len(loaded.cautions) == 1  # keys of a kit that was unpacked are open to others
    with refuses(CertificateError, "such as", str(tmp_path / "localhost/startup")):
        load_credentials(tmp_path / "localhost", "server")


def _rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def _pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def test_the_command_says_what_goes_to_whom(tmp_path: Path) -> None:
    first = certs(tmp_path, "localhost", ["hospital-a"], days=30)
    assert len(first) == 3
    assert all("made, valid until" in line for line in first[:2])
    assert first[1].startswith(f"{tmp_path / 'hospital-a'}: ")
    assert f"{datetime.now(UTC) + 30 * DAY:%Y-%m-%d}" in first[1]
    assert first[2].startswith(f"{tmp_path / 'ca'}: ")
    assert "nobody" in first[2]
    second = certs(tmp_path, "localhost", ["hospital-a", "hospital-b"])
    assert ["left as it is" in line for line in second] == [True, True, False, False]
