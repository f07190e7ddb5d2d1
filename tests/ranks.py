from fastcontrast.testing.ranks import RankError, run  # noqa: F401
