"""What the experiments' tests start from."""

from tests.experiments.conftest import _one_thread, finished

__all__ = ["_one_thread", "finished"]
