"""Settings for every test. Examples are derandomized so that a red test is red for everyone, on every run."""

import hypothesis
import pytest
import torch

from fastcontrast._torchvision import declare_torchvision_operators

hypothesis.settings.register_profile("fastcontrast", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fastcontrast")

declare_torchvision_operators()


@pytest.fixture
def one_thread():
    """For models so small that threads cost more than they bring, and much more where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Each of their tests runs others in a process of its own, for a minute or more. They start first, so that at the end no
# worker is left alone with one: two workers begin at the first test and in the middle.
LONGEST = ("test_transformers_4.py", "test_compile_gate.py", "test_kernels.py")


def pytest_collection_modifyitems(items):
    long = [item for item in items if item.path.name in LONGEST]
    rest = [item for item in items if item.path.name not in LONGEST]
    middle = len(rest) // 2
    items[:] = [*long[::2], *rest[:middle], *long[1::2], *rest[middle:]]
