"""Reading images: every layout gives the pixels and labels that were written, and damage is a sentence."""

import gzip
import io
import json
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from stepladder.core.errors import UserError
from stepladder.data.image_files import idx, read


@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_as_they_are(tmp_path, place, packed, bars, write_idx):
    write_idx(tmp_path / place, packed=packed)
    train, test = read(str(tmp_path), 8, 1)
    for found, (pixels, labels) in ((train, bars(96)), (test, bars(40, 1))):
        assert np.array_equal(found.pixels[:, 0], pixels)
        assert found.labels == [str(label) for label in labels]


def test_folders_by_class(tmp_path, bars, write_folders):
    write_folders(tmp_path / "split")
    train, test = read(str(tmp_path / "split"), 8, 1)
    assert sorted(set(train.labels)) == ["bottom", "left", "right", "top"]
    pixels, labels = bars(48, 1)
    names = np.array(["top", "bottom", "left", "right"])[labels]
    for name in set(names):
        mine = np.array([label == name for label in test.labels])
        assert np.array_equal(test.pixels[mine][:, 0], pixels[names == name])  # in the order of their files
    write_folders(tmp_path / "whole", ("",))
    train, test = read(str(tmp_path / "whole"), 8, 1)
    assert len(train) == 48
    assert test is None


def test_images_are_brought_to_the_side_and_the_colours_of_the_encoder(tmp_path):
    place = tmp_path / "one"
    place.mkdir()
    Image.fromarray(np.full((4, 8), 200, np.uint8)).save(place / "wide.png")
    Image.fromarray(np.full((8, 8, 3), (255, 0, 0), np.uint8)).save(place / "red.png")
    grey, _ = read(str(tmp_path), 8, 1)
    red, wide = grey.pixels[:, 0]
    assert np.array_equal(wide[[1, 2, 5, 6], 4], [0, 200, 200, 0])  # padded with black, not stretched
    assert len(np.unique(red)) == 1
    colour, _ = read(str(tmp_path), 8, 3)
    assert colour.pixels.shape == (2, 3, 8, 8)
    assert colour.pixels[0, :, 0, 0].tolist() == [255, 0, 0]
    small, _ = read(str(tmp_path), 4, 1)
    assert small.pixels.shape == (2, 1, 4, 4)
    above, upper, lower, below = small.pixels[1, 0, :, 0].tolist()
    assert above == below < upper == lower  # smoothed, and still in the middle


def test_parquet_of_the_hub(tmp_path, bars):
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'stepladder[hf]'")
    from pyarrow import parquet

    names = ["top", "bottom", "left", "right"]
    about = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
    for split, seed in (("train", 0), ("test", 1)):
        pixels, labels = bars(20, seed)
        rows = []
        for image in pixels:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        table = arrow.table({"image": rows, "label": labels.astype(np.int64)})
        (tmp_path / "data").mkdir(exist_ok=True)
        target = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), target)
    train, test = read(str(tmp_path), 8, 1)
    pixels, labels = bars(20)
    assert np.array_equal(train.pixels[:, 0], pixels)
    assert train.labels == [names[label] for label in labels]
    assert len(test) == 20


def test_a_hub_dataset_is_downloaded_and_read(tmp_path, monkeypatch, write_idx):
    hub = pytest.importorskip("huggingface_hub", reason="needs the hub's client: pip install 'stepladder[hf]'")
    asked = []

    def download(repo, **options):
        asked.append((repo, options))
        return str(write_idx(tmp_path))

    monkeypatch.setattr(hub, "snapshot_download", download)
    train, _ = read("hub:me/bars", 8, 1)
    assert len(train) == 96
    assert asked == [("me/bars", {"repo_type": "dataset", "allow_patterns": ["*.parquet"]})]

    def offline(repo, **options):
        raise OSError("no way there")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="'me/bars' cannot be had from the hub: no way there"):
        read("hub:me/bars", 8, 1)


@pytest.mark.skipif(not find_spec("sklearn"), reason="needs scikit-learn: pip install 'stepladder[vision]'")
def test_the_digits_of_scikit_learn():
    train, test = read("digits", 8, 1)
    assert test is None
    assert train.pixels.shape == (1797, 1, 8, 8)
    assert train.labels[:10] == list("0123456789")
    assert train.pixels.max() == 255
    assert train.pixels[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16


def test_without_scikit_learn_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("stepladder.data.image_files.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'stepladder\[vision\]'"):
        read("digits", 8, 1)


def test_damage_is_named(tmp_path, write_idx):
    with pytest.raises(UserError, match="no images at"):
        read(str(tmp_path / "nowhere"), 8, 1)
    with pytest.raises(UserError, match="has no images"):
        read(str(tmp_path), 8, 1)
    whole = (write_idx(tmp_path, packed=False) / "train-images-idx3-ubyte").read_bytes()
    for data, sentence in ((whole[:-1], "cut off"), (whole + b"x", "appended"), (b"\0\0\x0d\3" + whole[4:], "no idx")):
        (tmp_path / "other").write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            idx(tmp_path / "other")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        idx(tmp_path / "cut.gz")
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    (tmp_path / "pictures" / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"x\.png' is no image"):
        read(str(tmp_path / "pictures"), 8, 1)
