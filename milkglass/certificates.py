"""Who a party is: its certificate, its key, and the root that it trusts. Also a private CA, for trials.

Fields are those of RFC 5280. File names are those of NVIDIA FLARE's start-up kits (`nvflare.lighter.impl.cert`), so
a kit's `startup` folder works unchanged. Where we differ: keys are ECDSA P-256, not RSA-2048; a certificate says what
it is for (key usage, extended key usage); the CA signs parties alone, never another CA (path length 0).

    FOLDER/ca/             rootCA.pem, rootCA.key: whoever has this key can make a party; it goes to nobody
    FOLDER/localhost/      rootCA.pem, server.crt, server.key
    FOLDER/hospital-a/     rootCA.pem, client.crt, client.key
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from milkglass.errors import CertificateError, RunError

Role = Literal["server", "client"]

PARTY_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
"""The pattern of a party's name in a recipe."""
LONGEST_VALIDITY_DAYS: Final = 3650
EXPIRES_SOON_DAYS: Final = 14
_CLOCK_DIFFERENCE: Final = timedelta(minutes=10)  # a new certificate must be valid on a machine whose clock is slow
_AUTHORITY: Final = "ca"
_ROOT: Final = "rootCA.pem"
_DNS_LABEL: Final = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_PURPOSES: Final = {
    "server": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],  # a hop in the middle dials on
    "client": [ExtendedKeyUsageOID.CLIENT_AUTH],
}


@dataclass(frozen=True)
class Issued:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate, as a file holds it."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key, as a file holds it: not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


@dataclass(frozen=True)
class Credentials:
    """What a party shows, and what it trusts, as PEM: `root` is whom it trusts, `chain` its own certificate first.

    name: the certificate's common name. cautions: a line for each thing that is allowed and should be mended.
    """

    root: bytes = field(repr=False)
    chain: bytes = field(repr=False)
    key: bytes = field(repr=False)
    name: str
    cautions: tuple[str, ...] = ()


def issue_authority(not_before: datetime, not_after: datetime) -> Issued:
    """A new CA, signed by itself. Writes nothing."""
    key = ec.generate_private_key(ec.SECP256R1())
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest
    builder = _builder(f"milkglass CA for trials {digest[:4].hex()}", None, key.public_key(), not_before, not_after)
    return Issued(builder.sign(key, hashes.SHA256()), key)


def issue(authority: Issued, role: Role, name: str, not_before: datetime, not_after: datetime) -> Issued:
    """A new key and certificate for the party `name`, signed by `authority`. Writes nothing."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, authority.certificate, key.public_key(), not_before, not_after)
    builder = builder.add_extension(x509.ExtendedKeyUsage(_PURPOSES[role]), critical=False)
    hosts = _hosts(role, name)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return Issued(builder.sign(authority.key, hashes.SHA256()), key)


def make_certificates(folder: Path, server: str, clients: Sequence[str], *, days: int = 365) -> list[Path]:
    """A private CA, for trials, and a certificate per party, valid for `days`; returns the files that it made.

    A CA that is there is used again, and so a client can be added later; parties that are there are left alone. No
    certificate outlives its CA. Raises CertificateError for a wrong name or a CA that cannot be used; RunError for a
    file that is in the way: none is ever replaced.
    """
    parties: list[tuple[Role, str]] = [("server", server), *(("client", name) for name in clients)]
    _check_names(folder, [name for _, name in parties])
    if not 1 <= days <= LONGEST_VALIDITY_DAYS:
        raise CertificateError(f"certificates valid for {days} days; expected 1 to {LONGEST_VALIDITY_DAYS}")
    now = datetime.now(UTC)
    not_before, not_after = now - _CLOCK_DIFFERENCE, now + timedelta(days=days)
    root_file, root_key_file = folder / _AUTHORITY / _ROOT, folder / _AUTHORITY / "rootCA.key"
    authority = _open_authority(root_file, root_key_file, now) if _all_there(root_file, root_key_file) else None
    missing = [(role, name) for role, name in parties if not _party_is_there(folder, role, name, authority)]
    made = []
    if authority is None:
        authority = issue_authority(not_before, not_after)
        made += [_write_new(root_key_file, authority.key_pem, 0o600), _write_new(root_file, authority.certificate_pem)]
    for role, name in missing:
        issued = issue(authority, role, name, not_before, min(not_after, authority.certificate.not_valid_after_utc))
        root, certificate, key = _files(folder / name, role)
        made += [_write_new(key, issued.key_pem, 0o600), _write_new(certificate, issued.certificate_pem)]
        made.append(_write_new(root, authority.certificate_pem))
    return made


def certs(folder: Path, server: str, clients: Sequence[str], *, days: int = 365) -> list[str]:
    """What `milkglass certs` does: make the certificates; the lines to print, one per party and one for the CA."""
    made = make_certificates(folder, server, clients, days=days)
    lines = []
    for role, name in (("server", server), *(("client", name) for name in clients)):
        certificate = folder / name / f"{role}.crt"
        until = f"valid until {_date(_certificates(certificate, _read(certificate))[0].not_valid_after_utc)}"
        what = "made" if certificate in made else "was there, left as it is"
        lines.append(f"{folder / name}: {what}, {until}; this folder goes to the {role} {name}, for its --tls")
    lines.append(f"{folder / _AUTHORITY}: the CA; its key makes further parties, so it goes to nobody")
    return lines


def load_credentials(folder: Path, role: Role) -> Credentials:
    """A party's certificate, key and root from its folder, checked. Raises CertificateError, one line, if one fails."""
    root_file, certificate_file, key_file = _files(folder, role)
    _check_files(folder, role)
    root_pem, chain_pem, key_pem = _read(root_file), _read(certificate_file), _read(key_file)
    chain, key = _certificates(certificate_file, chain_pem), _private_key(key_file, key_pem)
    _check_belongs(key_file, key, certificate_file, chain[0])
    path = _path_to_root(certificate_file, chain, root_file, _certificates(root_file, root_pem))
    now = datetime.now(UTC)
    for file, certificate in path:
        _check_dates(file, certificate, now)
    cautions = []
    if key_file.stat().st_mode & 0o077:
        cautions.append(f"{key_file}: can be read by others; chmod 600 {key_file}")
    end, file = min((certificate.not_valid_after_utc, file) for file, certificate in path)
    if end - now < timedelta(days=EXPIRES_SOON_DAYS):
        cautions.append(f"{file}: expires on {_date(end)}, in less than {EXPIRES_SOON_DAYS} days; have it renewed")
    return Credentials(root_pem, chain_pem, key_pem, _common_name(certificate_file, chain[0]), tuple(cautions))


def _builder(
    name: str,
    issuer: x509.Certificate | None,
    key: ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    """What every certificate has. issuer: None for a CA, which may sign parties; a party may sign no certificate."""
    is_authority = issuer is None
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    own_identifier = x509.SubjectKeyIdentifier.from_public_key(key)
    issuer_identifier = own_identifier if issuer is None else _key_identifier(issuer)
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(own_identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), False)
    )


def _key_identifier(authority: x509.Certificate) -> x509.SubjectKeyIdentifier:
    try:
        return authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.SubjectKeyIdentifier.from_public_key(authority.public_key())


def _hosts(role: Role, name: str) -> list[x509.GeneralName]:
    """The names under which a party may be dialed. A client's is there for checkers that ask for one."""
    if role == "client":
        return [x509.DNSName(name)] if re.fullmatch(_DNS_LABEL, name) else []
    try:
        return [x509.IPAddress(ipaddress.ip_address(name))]
    except ValueError:
        loopback = ("127.0.0.1", "::1") if name.casefold() == "localhost" else ()
        return [x509.DNSName(name), *(x509.IPAddress(ipaddress.ip_address(address)) for address in loopback)]


def _check_names(folder: Path, names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    with contextlib.suppress(OSError):  # no such folder yet
        seen = {path.name.casefold(): path.name for path in folder.iterdir()}
    for position, name in enumerate(names):
        if not re.fullmatch(PARTY_NAME, name):
            raise CertificateError(f"party {name!r}: expected up to 63 letters, digits and . _ -, the first no . _ -")
        if name.casefold() == _AUTHORITY:
            raise CertificateError(f"party {name!r}: that folder is the CA's; expected another name")
        if name.casefold() in {earlier.casefold() for earlier in names[:position]}:
            raise CertificateError(f"party {name!r}: named twice; expected a name of its own, whatever the case")
        there = seen.get(name.casefold(), name)
        if there != name:
            raise CertificateError(f"party {name!r}: {folder / there} is there; names that differ in case are one")


def _files(folder: Path, role: Role) -> tuple[Path, Path, Path]:
    """A party's root, certificate and key."""
    return folder / _ROOT, folder / f"{role}.crt", folder / f"{role}.key"


def _all_there(*files: Path) -> bool:
    """Whether all files are there. Raises RunError if only some are."""
    try:
        there = [file for file in files if file.exists()]
    except OSError as error:
        raise RunError(f"{files[0].parent}: {error.strerror or error}; expected a folder that can be read") from None
    absent = [file.name for file in files if file not in there]
    if there and absent:
        raise RunError(
            f"{there[0]}: is there without {' and '.join(absent)}, and no file is replaced; "
            f"expected all or none, so remove {there[0].parent} to have it made anew"
        )
    return bool(there)


def _party_is_there(folder: Path, role: Role, name: str, authority: Issued | None) -> bool:
    files = _files(folder / name, role)
    if not _all_there(*files):
        return False
    roots = _certificates(files[0], _read(files[0]))
    if authority is None or authority.certificate not in roots:
        raise RunError(
            f"{files[0]}: is not the CA in {folder / _AUTHORITY}, and no file is replaced; "
            f"remove {folder / name} to have it made anew"
        )
    return True


def _open_authority(root_file: Path, key_file: Path, now: datetime) -> Issued:
    certificate, key = _certificates(root_file, _read(root_file))[0], _private_key(key_file, _read(key_file))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{key_file}: not an ECDSA key; expected a CA of milkglass certs")
    _check_belongs(key_file, key, root_file, certificate)
    _check_dates(root_file, certificate, now)
    return Issued(certificate, key)


def _write_new(path: Path, content: bytes, mode: int = 0o644) -> Path:
    """Write a file that is not there yet. It has its mode from the start; a write that fails leaves no file."""
    try:
        for folder in (path.parent.parent, path.parent):  # with `parents`, only the last one would be closed to others
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        whys = [f"{above} is a file; expected a folder" for above in path.parents if above.is_file()]
        raise RunError(f"cannot make the folder {path.parent}: {[*whys, error.strerror][0]}") from None
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        words = "is there already, and no file is replaced; remove it, or name another folder"
        raise RunError(f"{path}: {words}") from None
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror or error}; expected a PEM file") from None


def _check_files(folder: Path, role: Role) -> None:
    """Raise CertificateError, which says what was expected, unless a party's three files are in its folder."""
    files = _files(folder, role)
    wanted = ", ".join(file.name for file in files)
    try:
        if not folder.is_dir():
            raise CertificateError(f"{folder}: no such folder; expected one that holds {wanted}")
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CertificateError(f"{folder}: no {' and no '.join(missing)}; {_where_else(folder, role, wanted)}")
    except OSError as error:
        raise CertificateError(f"{folder}: {error.strerror or error}; expected one that holds {wanted}") from None


def _where_else(folder: Path, role: Role, wanted: str) -> str:
    """The end of a line about missing files: what was expected, and what was perhaps meant."""
    parties = sorted(
        inner for inner in folder.iterdir() if inner.is_dir() and all(file.exists() for file in _files(inner, role))
    )
    if parties:
        return f"expected one party's folder, such as {' or '.join(map(str, parties))}"
    other: Role = "client" if role == "server" else "server"
    if any(file.exists() for file in _files(folder, other)[1:]):
        return f"expected {wanted}; this is the folder of a {other}"
    return f"expected {wanted}"


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        for certificate in certificates:  # these are parsed when they are asked for
            _ = certificate.subject, certificate.issuer, certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{path}: not a readable certificate; expected PEM, 'BEGIN CERTIFICATE'") from None
    return certificates


def _private_key(path: Path, pem: bytes) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise CertificateError(f"{path}: encrypted; expected a private key without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{path}: not a readable private key; expected PEM, 'BEGIN PRIVATE KEY'") from None


def _check_belongs(key_file: Path, key: PrivateKeyTypes, file: Path, certificate: x509.Certificate) -> None:
    if key.public_key() != certificate.public_key():
        raise CertificateError(f"{key_file}: does not belong to {file}; expected the key it was made with")


def _check_dates(path: Path, certificate: x509.Certificate, now: datetime) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        raise CertificateError(f"{path}: not valid before {_date(start)}; this machine's clock says {_date(now)}")
    if now > end:
        raise CertificateError(f"{path}: expired on {_date(end)}; this machine's clock says {_date(now)}")


def _date(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _path_to_root(
    file: Path, chain: Sequence[x509.Certificate], root_file: Path, roots: Sequence[x509.Certificate]
) -> list[tuple[Path, x509.Certificate]]:
    """The certificates, each with its file, from the party's own to a root's. Raises CertificateError if broken."""
    for position, certificate in enumerate(chain):
        for root in roots:
            if _signed(certificate, root):
                return [*((file, one) for one in chain[: position + 1]), (root_file, root)]
        if position + 1 == len(chain) or not _signed(certificate, chain[position + 1]):
            break
    raise CertificateError(
        f"{file}: not signed by {root_file}, nor through the certificates behind its own; expected one of that CA"
    )


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _common_name(path: Path, certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not names[0].value:
        raise CertificateError(f"{path}: {len(names)} common names (CN); expected one, the party's name")
    return str(names[0].value)
