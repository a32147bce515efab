"""The status page: what a run's ledger says, folded into one JSON document and one small page that shows it."""

from deploy.status.page import write_page
from deploy.status.server import serve_page
from deploy.status.view import report

__all__ = ["report", "serve_page", "write_page"]
