"""TLS to Postgres, from the parameters of its address or libpq's environment variables.

Guarantees: a mode that requires TLS never continues without it, and one that verifies never without verifying. A file
that cannot be used is named by its parameter. Files are read for every connection, so a renewed certificate is used
without a restart.

The driver reads the same parameters. It does not know `sslrootcert=system`, names no file in its errors, and fails over
a home folder that it may not look into, even where no file of it is needed (a container under another uid).
"""

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from firstclaim.errors import ConfigurationError, LedgerRefused
from firstclaim.urls.parts import unreadable_file
from firstclaim.urls.postgres import MODES

Attempt = ssl.SSLContext | bool | None  # as the driver takes it; None: by the URL

_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_VARIABLES = {name: "PG" + name.replace("_", "").upper() for name in (*_FILES, "sslmode")} | {
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
}


def attempts(given: Mapping[str, str]) -> tuple[Attempt, ...]:
    """What to try, one after the other, with the address's parameters `given`. Raises `LedgerRefused`."""
    found = {name: os.environ[variable] for name, variable in _VARIABLES.items() if os.environ.get(variable)}
    found |= given
    system = found.get("sslrootcert") == "system"
    mode = found.get("sslmode", "prefer").replace("_", "-")
    if mode == "disable":
        return (False,)
    if mode not in MODES:
        raise _refused(f"sslmode: expected one of {', '.join(MODES)}")
    if system:
        mode = "verify-full"  # as in libpq: the system trusts many, so the name must be right
        del found["sslrootcert"]
    if fault := unreadable_file(found, _FILES):
        raise _refused(fault)
    if "service" in given or (mode in ("allow", "prefer") and _home_is_readable()):
        return (None,)  # the driver tries both ways on one connection
    try:
        context = _context(found, mode, system=system)
    except (ssl.SSLError, ValueError) as error:
        raise _refused(f"TLS cannot be set up ({_reason(error)}): check {', '.join(_FILES)}") from error
    return (context, False) if mode == "prefer" else (False, context) if mode == "allow" else (context,)


def _context(found: Mapping[str, str], mode: str, *, system: bool) -> ssl.SSLContext:
    """As libpq does it: `require` verifies too if there is a root certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    root = found.get("sslrootcert") or _in_home("root.crt")
    if system:
        context.load_default_certs()
    elif root and mode not in ("allow", "prefer"):
        context.load_verify_locations(cafile=root)
    elif mode in ("verify-ca", "verify-full"):
        raise _refused(f"sslmode={mode} needs a root certificate: give its file as sslrootcert, or sslrootcert=system")
    else:
        context.verify_mode = ssl.CERT_NONE
    if context.verify_mode != ssl.CERT_NONE and (revoked := found.get("sslcrl") or _in_home("root.crl")):
        context.load_verify_locations(cafile=revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if certificate := found.get("sslcert") or _in_home("postgresql.crt"):
        key = found.get("sslkey") or _in_home("postgresql.key")
        context.load_cert_chain(certificate, key, password=lambda: found.get("sslpassword", ""))
    context.minimum_version = _version(found, "ssl_min_protocol_version", "TLSv1.2")
    if "ssl_max_protocol_version" in found:
        context.maximum_version = _version(found, "ssl_max_protocol_version", "")
    context.set_alpn_protocols(["postgresql"])
    return context


def _version(found: Mapping[str, str], name: str, default: str) -> ssl.TLSVersion:
    try:
        return ssl.TLSVersion[found.get(name, default).replace(".", "_")]
    except KeyError:
        raise _refused(f"{name}: expected TLSv1.2 or TLSv1.3") from None


def _in_home(name: str) -> str | None:
    """The path of a file that libpq looks for; None if there is none that can be read."""
    try:
        path = Path.home() / ".postgresql" / name
        return str(path) if os.access(path, os.R_OK) else None
    except (RuntimeError, KeyError):  # this uid has no home
        return None


def _home_is_readable() -> bool:
    """Whether the driver can look for its files there: one that does not exist is no error, any other failure is."""
    try:
        folder = Path.home() / ".postgresql"
    except (RuntimeError, KeyError):
        return True
    for name in ("postgresql.crt", "postgresql.key"):
        try:
            (folder / name).open("rb").close()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return False
    return True


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or type(error).__name__


def _refused(reason: str) -> LedgerRefused:
    return LedgerRefused(f"DATABASE_URL: {reason}", exit_code=ConfigurationError.exit_code)
