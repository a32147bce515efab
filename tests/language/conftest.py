from pathlib import Path

import pytest
import torch

from tests.models import CONFIGS, make_model, make_tokenizer

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folder of a tiny model by the name of its architecture."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        make_model(config).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(pad_token="<unk>")


@pytest.fixture(scope="session")
def shared_data():
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the development data in ../shared/data")
    return SHARED_DATA
