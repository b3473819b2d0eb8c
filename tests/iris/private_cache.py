import pytest


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """HF's cache of converted files goes to the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
