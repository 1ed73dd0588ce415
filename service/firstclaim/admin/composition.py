"""Puts the page together. It opens nothing and builds no client: those are from `components.py`."""

from collections.abc import Sequence

from firstclaim.admin.audit import Audit
from firstclaim.admin.events import Events
from firstclaim.admin.identity import ProxyLogin
from firstclaim.admin.ledger import AdminLedger
from firstclaim.admin.limits import LoginLimit
from firstclaim.admin.login import Login
from firstclaim.admin.overview import Overview
from firstclaim.admin.page import AdminPage
from firstclaim.admin.replay import Replay
from firstclaim.admin.session import Signer
from firstclaim.inbox.pauses import Pauses
from firstclaim.inbox.routes import Routes
from firstclaim.observability.recent import RecentRequests
from firstclaim.passwords import Password
from firstclaim.postgres.pool import Pool
from firstclaim.settings import Settings
from firstclaim.web.health import HealthCheck


def compose(
    settings: Settings,
    pool: Pool,
    checks: Sequence[HealthCheck],
    routes: Routes,
    pauses: Pauses,
    recent: RecentRequests | None,
    process: str,
) -> AdminPage | None:
    """The page at /admin, or None if it is switched off. `process` is this process as the ledger names it."""
    if settings.admin_password is None or recent is None:
        return None
    password = Password.read(settings.admin_password.get_secret_value())
    signer, ledger = Signer(password.session_key), AdminLedger(pool)
    return AdminPage(
        signer,
        Login(password, signer, LoginLimit()),
        ProxyLogin(settings.admin_user_header, settings.admin_user_proxies, settings.admin_operators),
        Overview(ledger, checks, process, routes, pauses, recent),
        Events(ledger, routes, sorted(name for name in settings.endpoints if name is not None)),
        Replay(ledger, routes, settings.give_up_seconds),
        Audit(ledger),
        settings.admin_proxies,
    )
