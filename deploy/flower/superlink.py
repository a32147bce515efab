"""``python -m deploy.flower.superlink TOKEN_FILE FLEET_PORT …``: Flower's SuperLink, its control behind a token.

Flower's own control interface knows no passwords: without this, each account of the machine could run code as the
operator. ``flwr`` sends the token by itself where `deploy.common.flower_cli.write_connection` has put it.
"""

from __future__ import annotations

import hmac
import sys
from collections.abc import Sequence
from pathlib import Path

from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.supercore.auth.typing import AccountInfo
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin

from deploy.flower.versions import open_to_nodes, replace
from fedtune_strategies.folders import keep_private

PROGRAM = "flwr.superlink.cli.flower_superlink"


class TokenAccess(NoOpControlAuthnPlugin):
    """One account: whoever shows the token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """See Flower."""
        shown = dict(metadata).get(ACCESS_TOKEN_KEY, "")
        if hmac.compare_digest(shown if isinstance(shown, bytes) else shown.encode(errors="replace"), self._token):
            return super().validate_tokens_in_metadata(metadata)
        return False, None

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        """Give nobody another token."""
        return None, None


if __name__ == "__main__":
    keep_private()
    access = TokenAccess(Path(sys.argv.pop(1)).read_text().strip())
    open_to_nodes(PROGRAM, int(sys.argv.pop(1)))
    replace(PROGRAM, load_control_authn_plugin=lambda: access).flower_superlink()
