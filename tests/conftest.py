"""Settings for every test. Examples are derandomized so that a red test is red for everyone, on every run."""

import hypothesis

hypothesis.settings.register_profile("fastcontrast", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fastcontrast")
