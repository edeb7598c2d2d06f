"""What goes wrong with a peer and leaves the rest of a benchmark to run."""

from ouro.errors import OuroError


class PeerError(OuroError, RuntimeError):
    """A peer (PyTorch, llama.cpp) can not be had or does not run here; the message says why and what would help."""
