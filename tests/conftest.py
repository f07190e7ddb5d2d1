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
