"""A sandbox for tests: the application commits as in production, and nothing of it stays."""

from .._dialects.savepoints import CommitFailure
from ..exceptions import SandboxError
from ._app import SandboxedApp
from ._record import Sandbox
from ._sandbox import sandbox

__all__ = ["CommitFailure", "Sandbox", "SandboxError", "SandboxedApp", "sandbox"]
