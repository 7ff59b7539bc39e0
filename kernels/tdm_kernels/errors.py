"""What this package raises on purpose. It lies below tdm_serve, so it has its own small tree.

KernelError
├── BadArgument          a tensor that an operation does not take; also a ValueError
└── KernelUnavailable    an explicitly chosen way to run that cannot run here, and why; also a RuntimeError
"""

from __future__ import annotations


class KernelError(Exception):
    """Base of everything that tdm_kernels raises on purpose. The message is a sentence for the user."""


class BadArgument(KernelError, ValueError):
    """A tensor or value that an operation does not take; the message holds it and what is allowed."""


class KernelUnavailable(KernelError, RuntimeError):
    """An explicitly chosen way to run that cannot run here; the message says why."""
