"""ELSA-Serve: exact long-context attention, Hugging Face integration, and an offloading LLM engine."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("elsa-serve")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
