"""What tests and benchmarks share: named workloads and earned tolerances. Imports only torch."""

from .shapes import LARGE, RAGGED, SMALL, Shape, named
from .tolerance import assert_as_good_as, relative_error

__all__ = ["LARGE", "RAGGED", "SMALL", "Shape", "assert_as_good_as", "named", "relative_error"]
