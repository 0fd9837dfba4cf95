"""b2s api: the HTTP API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from b2s.commands.worker import add_log, log_of

if TYPE_CHECKING:
    from b2s.api.keys import Keys
    from b2s.api.settings import Limits, TokenRules

_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_EPILOG: Final = """\
The login (--dsn) is a role of its own: NOINHERIT, a member of etl_frontend and of the roles that tokens may
stand for. Each request runs in the role its token stands for. Secrets come from files or the environment:
the DSN from B2S_DSN or B2S_DSN_FILE, the shared secret from B2S_API_JWT_SECRET or --jwt-secret-file.
GET /health and GET /ready are for probes; GET /openapi.json describes the rest. docs/http-api.md."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s api."""
    parser.epilog = _EPILOG

    def add(group: Any, option: str, variable: str, default: str | None, text: str, **more: Any) -> None:
        shown = f"{variable}; default {default}" if default else variable
        default = os.environ.get(variable) or default
        group.add_argument(option, default=default, help=f"{text} ({shown})", **more)

    where = parser.add_argument_group("where to listen")
    add(where, "--host", "B2S_API_HOST", "127.0.0.1", "address")
    add(where, "--port", "B2S_API_PORT", "8080", "port, 0 for any", type=int)
    add(where, "--tls-cert", "B2S_API_TLS_CERT", None, "certificate chain in PEM", metavar="FILE")
    add(where, "--tls-key", "B2S_API_TLS_KEY", None, "its private key", metavar="FILE")
    who = parser.add_argument_group("whose tokens to accept")
    add(who, "--audience", "B2S_API_AUDIENCE", None, "what aud has to be; required")
    add(who, "--issuer", "B2S_API_ISSUER", None, "what iss has to be")
    add(who, "--jwks", "B2S_API_JWKS", None, "key set: a file or an https:// URL", metavar="PLACE")
    add(who, "--jwt-key", "B2S_API_JWT_KEY", None, "public key in PEM, RSA or P-256", metavar="FILE")
    add(
        who,
        "--jwt-secret-file",
        "B2S_API_JWT_SECRET_FILE",
        None,
        "shared secret of HS256; or B2S_API_JWT_SECRET",
        metavar="FILE",
    )
    add(who, "--leeway", "B2S_API_LEEWAY", "30s", "how far clocks may differ", metavar="TIME")
    add(who, "--subject-claim", "B2S_API_SUBJECT_CLAIM", "sub", "who asks, for the record", metavar="CLAIM")
    add(who, "--role-claim", "B2S_API_ROLE_CLAIM", "role", "where the role is said", metavar="CLAIM")
    add(
        who,
        "--roles",
        "B2S_API_ROLES",
        "etl_admin,etl_operator,etl_reader",
        "accepted values of that claim, or VALUE=ROLE where they differ; the first that fits counts",
        metavar="LIST",
    )
    limits = parser.add_argument_group("limits")
    add(limits, "--connections", "B2S_API_CONNECTIONS", "10", "to the database, at most", type=int)
    add(limits, "--waiting", "B2S_API_WAITING", "100", "requests that wait for one, at most", type=int)
    add(limits, "--timeout", "B2S_API_TIMEOUT", "10s", "of a request", metavar="TIME")
    add(limits, "--max-body", "B2S_API_MAX_BODY", "65536", "bytes of a body", type=int)
    add(limits, "--grace", "B2S_API_GRACE", "30s", "for requests under way when told to stop", metavar="TIME")
    add_log(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C; requests that are under way then get --grace to end."""
    from b2s.errors import UsageError
    from b2s.options import seconds

    try:
        from b2s.api.server import serve
    except ImportError as error:
        raise UsageError(
            f"b2s api needs the extra api ({error.name} is missing)", "pip install 'b2s[api]'"
        ) from None
    log = log_of(arguments)
    rules, limits = _rules(arguments), _limits(arguments)
    if bool(arguments.tls_cert) is not bool(arguments.tls_key):
        raise UsageError("--tls-cert and --tls-key belong together", "give both, or neither")
    if arguments.host not in _LOOPBACK and not arguments.tls_cert:
        log.warning("tokens_travel_in_the_clear", hint="unless a proxy in front of this ends TLS: --tls-cert")
    return serve(
        arguments.dsn,
        _keys(arguments, log),
        rules,
        limits,
        log,
        host=arguments.host,
        port=arguments.port,
        tls=(arguments.tls_cert, arguments.tls_key) if arguments.tls_cert else None,
        grace_s=seconds("--grace", arguments.grace),
    )


def _keys(arguments: argparse.Namespace, log: Any) -> Keys:
    from b2s.api.keys import AnyOf, FixedKeys, Key, key_set, pem_key, secret_key
    from b2s.errors import UsageError

    fixed: list[Key] = []
    if secret := os.environ.get("B2S_API_JWT_SECRET"):
        fixed.append(secret_key(secret.encode(), "B2S_API_JWT_SECRET"))
    if arguments.jwt_secret_file:
        content = Path(arguments.jwt_secret_file).read_bytes().strip()
        fixed.append(secret_key(content, arguments.jwt_secret_file))
    if arguments.jwt_key:
        fixed.append(pem_key(Path(arguments.jwt_key)))
    parts: list[Keys] = [FixedKeys(tuple(fixed))] if fixed else []
    if arguments.jwks:
        parts.append(key_set(arguments.jwks, log))
    if not parts:
        raise UsageError(
            "there is no key to verify tokens with",
            "--jwks, --jwt-key, --jwt-secret-file or B2S_API_JWT_SECRET",
        )
    return AnyOf(parts)


def _rules(arguments: argparse.Namespace) -> TokenRules:
    from b2s.api.settings import TokenRules
    from b2s.errors import UsageError
    from b2s.options import seconds

    if not arguments.audience:
        raise UsageError("--audience is missing", "what the claim aud of a token has to be, e.g. b2s")
    roles: dict[str, str] = {}
    for word in filter(None, (one.strip() for one in arguments.roles.split(","))):
        value, _, role = word.rpartition("=")
        roles.setdefault(value or role, role)
    if not roles or "" in roles.values():
        raise UsageError(f"--roles {arguments.roles} names no role", "--roles admins=etl_admin,etl_operator")
    return TokenRules(
        arguments.audience,
        arguments.issuer,
        seconds("--leeway", arguments.leeway),
        arguments.subject_claim,
        arguments.role_claim,
        roles,
    )


def _limits(arguments: argparse.Namespace) -> Limits:
    from b2s.api.settings import Limits
    from b2s.errors import UsageError
    from b2s.options import seconds

    for option, value, least in (
        ("--connections", arguments.connections, 1),
        ("--waiting", arguments.waiting, 1),
        ("--max-body", arguments.max_body, 2),
        ("--port", arguments.port, 0),
    ):
        if value < least:
            raise UsageError(f"{option} is at least {least}, not {value}")
    timeout = seconds("--timeout", arguments.timeout)
    return Limits(arguments.connections, arguments.waiting, arguments.max_body, timeout, min(2.0, timeout))
