"""The command line."""

from anomem.cli.main import main

__all__ = ["main"]
