"""Who is asking: the gateway's own keys, the tenant, and whose key the teacher sees.

Three ways to run, told apart by what is configured:

- `server.api_keys` set: a Bearer key must be one of them. It never leaves the gateway.
- open with the teacher's key: anyone who reaches the port is served at the gateway's expense; the tenant is
  whatever key the client sends.
- neither (client-key mode): the client's own authorization is forwarded and is the tenant. Nothing is
  answered by a student for a key that the teacher hasn't accepted lately: otherwise any made-up key would
  be served.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import SecretStr

from serving.errors import RequestError
from serving.tenant import ANONYMOUS, tenant_of

VERIFIED_FOR_S = 300.0
_VERIFIED_LIMIT = 10_000
_HASHED = "sha256:"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. `tenant` is a hash; `authorization` is for the teacher (None: our own)."""

    tenant: str
    authorization: str | None = None


class Gate:
    """Admits callers, and remembers which clients' keys the teacher has accepted."""

    def __init__(
        self,
        api_keys: Sequence[SecretStr],
        teacher_key: SecretStr | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digests = [_digest_of(key.get_secret_value()) for key in api_keys]
        self.client_keys = not api_keys and teacher_key is None
        self._clock = clock
        self._accepted: OrderedDict[str, float] = OrderedDict()

    def take_over(self, earlier: Gate) -> None:
        """Go on with the clients' keys that an earlier configuration's gate saw accepted.

        Only right while the teacher is the same: what one teacher accepts says nothing of another.
        """
        self._accepted = earlier._accepted

    def admit(self, authorization: str | None) -> Caller:
        """Say who the caller is. Raises RequestError (401) for a missing or unknown key."""
        key = _bearer(authorization)
        if self._digests:
            if key is None:
                raise _unauthorized("no API key was sent: use the header `Authorization: Bearer <key>`")
            if not _is_one_of(key, self._digests):
                raise _unauthorized("this API key isn't known to the gateway")
        # What isn't a Bearer key may still be somebody's credentials: two of them aren't one tenant.
        secret = authorization if key is None else key
        tenant = ANONYMOUS if not secret else tenant_of(secret)
        return Caller(tenant, authorization if self.client_keys else None)

    def verified(self, caller: Caller) -> bool:
        """Say whether a student may answer this caller."""
        if not self.client_keys:
            return True
        at = self._accepted.get(caller.tenant)
        return at is not None and self._clock() - at < VERIFIED_FOR_S

    def teacher_accepted(self, caller: Caller) -> None:
        """Note that the teacher answered a request made with the caller's key."""
        if self.client_keys:
            self._accepted[caller.tenant] = self._clock()
            self._accepted.move_to_end(caller.tenant)
            if len(self._accepted) > _VERIFIED_LIMIT:
                self._accepted.popitem(last=False)

    def teacher_refused(self, caller: Caller) -> None:
        """Note that the teacher wouldn't have the caller's key (401 or 403)."""
        self._accepted.pop(caller.tenant, None)


class AdminGate:
    """Guards what a stranger mustn't see: the metrics, and why the gateway isn't ready.

    Without `key`, a gateway that only its own machine can reach (`host` is loopback) shows them to everyone,
    and any other to nobody.
    """

    def __init__(self, key: SecretStr | None, host: str) -> None:
        self._digests = [] if key is None else [_digest_of(key.get_secret_value())]
        self._open = key is None and is_loopback(host)

    def admit(self, authorization: str | None) -> None:
        """Return for an admin. Raises RequestError (401), which says what to set or send."""
        if self._open:
            return
        if not self._digests:
            raise _unauthorized(
                "this gateway can be reached from other machines and has no server.admin_key: set one, and "
                "send it as `Authorization: Bearer <key>`"
            )
        key = _bearer(authorization)
        if key is None or not _is_one_of(key, self._digests):
            raise _unauthorized("this is for admins: send server.admin_key as `Authorization: Bearer <key>`")

    def admits(self, authorization: str | None) -> bool:
        """Say whether `admit` would return."""
        try:
            self.admit(authorization)
        except RequestError:
            return False
        return True


def is_loopback(host: str) -> bool:
    """Say whether an address to listen on can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_one_of(key: str, digests: Sequence[str]) -> bool:
    digest = hashlib.sha256(key.encode()).hexdigest()
    # Every key is compared, so that the time taken doesn't tell which one was near.
    return any([hmac.compare_digest(digest, known) for known in digests])  # noqa: C419


def _bearer(authorization: str | None) -> str | None:
    if authorization is None:
        return None
    scheme, _, key = authorization.partition(" ")
    key = key.strip()
    return key if scheme.lower() == "bearer" and key else None


def _digest_of(key: str) -> str:
    return (
        key[len(_HASHED) :].lower() if key.startswith(_HASHED) else hashlib.sha256(key.encode()).hexdigest()
    )


def _unauthorized(message: str) -> RequestError:
    return RequestError(message, status=401, kind="invalid_request_error", code="invalid_api_key")
