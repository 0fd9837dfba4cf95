"""Who asks: a bearer token, verified, becomes a subject and a database role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import jwt

from b2s.api.keys import Keys
from b2s.api.problems import Problem
from b2s.api.settings import TokenRules

_LONGEST: Final = 8192
_LONGEST_SUBJECT: Final = 255


@dataclass(frozen=True, slots=True)
class Identity:
    """Whoever a verified token speaks for, and the database role it acts in."""

    subject: str
    role: str


class Verifier:
    """Verifies tokens by the keys and the rules it is given."""

    def __init__(self, keys: Keys, rules: TokenRules) -> None:
        self._keys = keys
        self._rules = rules

    async def identify(self, authorization: str | None) -> Identity:
        """The identity behind an Authorization header. Raises Problem: 401 (token) or 403 (role)."""
        claims = await self._claims(_bearer(authorization))
        subject = claims.get(self._rules.subject_claim)
        if (
            not isinstance(subject, str)
            or not subject.strip()
            or len(subject) > _LONGEST_SUBJECT
            or "\x00" in subject
        ):
            raise unauthorized(f"the token has no usable claim {self._rules.subject_claim}")
        return Identity(subject.strip(), self._role(claims))

    async def _claims(self, token: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise unauthorized("the token cannot be read") from None
        algorithm, key_id = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or not isinstance(key_id, str | None) or "crit" in header:
            raise unauthorized("the token cannot be read")
        candidates = await self._keys.candidates(algorithm, key_id)
        failure = unauthorized("the token is not signed with a key that is known here")
        for key in candidates:
            try:
                return jwt.decode(
                    token,
                    key.material,
                    algorithms=[key.algorithm],
                    audience=self._rules.audience,
                    issuer=self._rules.issuer,
                    leeway=self._rules.leeway_s,
                    options={"require": ["exp", "aud", *(["iss"] if self._rules.issuer else [])]},
                )
            except jwt.InvalidSignatureError:
                continue
            except jwt.ExpiredSignatureError:
                raise unauthorized("the token has expired", "auth.expired") from None
            except (jwt.PyJWTError, ValueError, TypeError) as error:
                failure = unauthorized(_REASONS.get(type(error), "the token is not valid"))
        raise failure

    def _role(self, claims: Mapping[str, Any]) -> str:
        held = set(_values(claims, self._rules.role_claim))
        for value, role in self._rules.roles.items():
            if value in held:
                return role
        raise Problem(
            403,
            "auth.no_role",
            f"the claim {self._rules.role_claim} of the token names no role that may use this API",
            f"it accepts: {', '.join(self._rules.roles)}",
        )


_REASONS: Final[Mapping[type[Exception], str]] = {
    jwt.InvalidAudienceError: "the token is for somebody else (aud)",
    jwt.InvalidIssuerError: "the token is from somebody else (iss)",
    jwt.ImmatureSignatureError: "the token is not valid yet (nbf, iat)",
    jwt.MissingRequiredClaimError: "the token lacks a claim: exp, aud and iss are looked at",
}


def unauthorized(message: str, code: str = "auth.invalid") -> Problem:
    """A 401 that says how to do better."""
    error = "" if code == "auth.missing" else f', error="invalid_token", error_description="{message}"'
    return Problem(401, code, message, headers={"WWW-Authenticate": f'Bearer realm="b2s"{error}'})


def _bearer(authorization: str | None) -> str:
    if not authorization:
        raise unauthorized("this needs a token: Authorization: Bearer ...", "auth.missing")
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > _LONGEST:
        raise unauthorized("the Authorization header is not a bearer token")
    return token


def _values(claims: Mapping[str, Any], name: str) -> Iterable[str]:
    """The values of a claim: a string, a list, the words of a scope; dots in a name lead into objects."""
    found: Any = claims.get(name)
    if found is None:
        found = claims
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, str):
        return found.split() if name in ("scope", "scp") else [found]
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []
