"""A folder is a list of the right images with the right labels, which decode to 8-bit RGB."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dseqjepa.data.images import ImageFolder, Subset, decode, holdout
from dseqjepa.data.source import BadImage, Source
from dseqjepa.errors import InputError
from tests.data.turned import with_orientation

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(path: Path, size: tuple[int, int] = (4, 4), colour: tuple[int, int, int] = RED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def pixel(path: Path, row: int = 0, column: int = 0) -> tuple[int, ...]:
    return tuple(decode(path)[:, row, column].tolist())


def relative_names(folder: ImageFolder) -> list[str]:
    return [os.path.relpath(folder.name(index), folder.root) for index in range(len(folder))]


# Which files


def test_every_image_at_any_depth_is_found_in_the_order_of_the_paths(tmp_path: Path) -> None:
    names = ["b/deep/er/x.PNG", "a.jpg", "b/y.JPEG", "c/z.webp", "c/t.TIFF", "c/g.gif", "c/m.bmp"]
    for name in names:
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    save(tmp_path / ".cache/x.png")
    assert relative_names(ImageFolder(tmp_path)) == sorted(names)


def test_links_are_followed_but_a_loop_ends_and_a_broken_link_is_nothing(tmp_path: Path) -> None:
    save(tmp_path / "data/a/x.png")
    save(tmp_path / "elsewhere/y.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/itself").symlink_to(tmp_path / "data/itself")
    (tmp_path / "data/gone.png").symlink_to(tmp_path / "nowhere.png")
    assert relative_names(ImageFolder(tmp_path / "data")) == ["a/x.png", "b/y.png"]


def test_a_name_that_is_no_utf8_is_read_and_can_be_printed(tmp_path: Path) -> None:
    plain = save(tmp_path / "x.png")
    plain.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    folder = ImageFolder(tmp_path)
    assert folder.image(0).shape == (3, 4, 4)
    assert folder.name(0).encode().endswith(rb"caf\xe9.png")
    folder.fingerprint()


def test_a_missing_folder_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    with pytest.raises(InputError, match=r"no such folder: .*flower; did you mean 'flowers'\?"):
        ImageFolder(tmp_path / "flower")
    with pytest.raises(InputError, match=r"no such folder: .*/nowhere/at/all$"):
        ImageFolder(tmp_path / "nowhere/at/all")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder, found a file"):
        ImageFolder(save(tmp_path / "x.png"))


def test_a_folder_without_images_says_what_it_saw_and_what_it_reads(tmp_path: Path) -> None:
    for name in ("a.txt", "b.npy"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"saw 2 files \(1 .*\), .*\.jpg .*\.tiff"):
        ImageFolder(tmp_path)


# Splits and labels


def test_labels_are_the_first_folder_level(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.png", "dog/3.png"):
        save(tmp_path / name)
    folder = ImageFolder(tmp_path)
    assert not folder.has_splits
    assert folder.classes == {"class": ("cat", "dog")}
    assert folder.labels["class"].tolist() == [0, 0, 1]
    assert folder.labels["class"].dtype == np.int64


@pytest.mark.parametrize("names", [("cat/1.png", "cat/2.png"), ("cat/1.png", "dog/2.png", "3.png")])
def test_one_folder_or_an_image_outside_of_them_means_no_labels(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        save(tmp_path / name)
    assert ImageFolder(tmp_path).labels == {}
    assert ImageFolder(tmp_path).classes == {}


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test", "Test"])
def test_a_label_means_the_same_class_in_both_splits(tmp_path: Path, held_out: str) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "train/c/3.png", f"{held_out}/c/4.png"):
        save(tmp_path / name)
    (tmp_path / "train/empty").mkdir()
    train, val = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "val")
    assert train.has_splits
    assert val.has_splits
    assert train.classes == val.classes == {"class": ("a", "b", "c")}
    assert train.labels["class"].tolist() == [0, 1, 2]
    assert val.labels["class"].tolist() == [2]
    whole = ImageFolder(tmp_path, "all")
    assert len(whole) == 4
    assert whole.classes == train.classes


def test_a_val_split_with_folders_that_train_lacks_has_no_labels(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/unsorted/4.png"):
        save(tmp_path / name)
    assert ImageFolder(tmp_path, "val").labels == {}


@pytest.mark.parametrize("alone", ["train", "val"])
def test_one_split_folder_alone_is_an_ordinary_folder(tmp_path: Path, alone: str) -> None:
    for name in (f"{alone}/1.png", "other/2.png"):
        save(tmp_path / name)
    folder = ImageFolder(tmp_path, "train")
    assert not folder.has_splits
    assert len(folder) == 2


def test_the_fingerprint_changes_with_names_and_sizes_only(tmp_path: Path) -> None:
    first, second = save(tmp_path / "one/a.bmp"), save(tmp_path / "two/a.bmp", colour=BLUE)
    assert (
        ImageFolder(tmp_path / "one").fingerprint() == ImageFolder(tmp_path / "two").fingerprint()
    )
    before = ImageFolder(tmp_path / "one").fingerprint()
    save(first, size=(5, 5))
    assert ImageFolder(tmp_path / "one").fingerprint() != before
    second.rename(second.with_name("b.bmp"))
    assert ImageFolder(tmp_path / "two").fingerprint() != before


# Parts of a source


@pytest.fixture
def ten(tmp_path: Path) -> Source:
    for index in range(10):
        save(tmp_path / f"{'ab'[index % 2]}/{index}.png", colour=(index, 0, 0))
    return ImageFolder(tmp_path)


def test_a_subset_is_the_chosen_images_with_their_labels(ten: Source) -> None:
    chosen = np.array([7, 2, 2])
    subset = Subset(ten, chosen)
    assert [subset.name(index) for index in range(3)] == [ten.name(int(index)) for index in chosen]
    for index, parent in enumerate(chosen):
        assert torch.equal(subset.image(index), ten.image(int(parent)))
    assert subset.labels["class"].tolist() == ten.labels["class"][chosen].tolist()
    assert subset.classes == ten.classes
    prints = {Subset(ten, np.array(order)).fingerprint() for order in ([7, 2], [2, 7], [2])}
    assert len(prints) == 3


def test_a_holdout_parts_the_images_and_depends_on_the_seed_alone(ten: Source) -> None:
    train, val = holdout(ten, seed=3)
    assert (len(train), len(val)) == (8, 2)
    assert sorted([*train.indices_B, *val.indices_B]) == list(range(10))
    assert holdout(ten, seed=3)[1].indices_B.tolist() == val.indices_B.tolist()
    assert len({tuple(holdout(ten, seed=seed)[1].indices_B.tolist()) for seed in range(9)}) > 5


def test_a_holdout_leaves_at_least_one_image_on_either_side(ten: Source) -> None:
    pair = Subset(ten, np.array([0, 1]))
    for fraction in (0.0, 1.0):
        assert [len(part) for part in holdout(pair, seed=0, fraction=fraction)] == [1, 1]
    with pytest.raises(InputError, match="at least 2 images, found 1"):
        holdout(Subset(ten, np.array([0])), seed=0)


# Decoding


def test_an_image_is_uint8_rgb_with_the_height_first(tmp_path: Path) -> None:
    image = decode(save(tmp_path / "x.png", size=(7, 5), colour=(1, 2, 3)))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 5, 7)
    assert image[:, 4, 6].tolist() == [1, 2, 3]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif"])
def test_the_exif_orientation_is_undone(tmp_path: Path, orientation: int, ending: str) -> None:
    upright = Image.new("RGB", (32, 16), BLUE)
    upright.paste(RED, (0, 0, 16, 8))
    path = tmp_path / f"x.{ending}"
    stored = with_orientation(path, upright, orientation)
    assert decode(path).shape == (3, 16, 32)
    assert pixel(path, 3, 7) == pytest.approx(RED, abs=12)
    assert pixel(path, 12, 28) == pytest.approx(BLUE, abs=12)
    as_stored = decode(path, "stored").permute(1, 2, 0).numpy()
    assert np.abs(as_stored.astype(int) - np.array(stored)).mean() < 12


def test_a_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)
    assert pixel(tmp_path / "x.jpg") == pytest.approx(RED, abs=8)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path, ending: str) -> None:
    high = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(256 * high + (255 - high)).save(tmp_path / f"x.{ending}")
    image = decode(tmp_path / f"x.{ending}")
    assert torch.equal(image, torch.from_numpy(high.astype(np.uint8)).expand(3, -1, -1))


def test_grey_and_black_and_white_become_three_equal_channels(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert pixel(tmp_path / "grey.png") == (77, 77, 77)
    assert pixel(tmp_path / "bit.png") == WHITE


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "grey.png")
    assert pixel(tmp_path / "clear.png") == WHITE
    assert pixel(tmp_path / "half.png") == pytest.approx((255, 127, 127), abs=1)
    assert pixel(tmp_path / "grey.png") == WHITE


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_a_palette_with_a_transparent_colour_is_laid_on_white(tmp_path: Path, ending: str) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *GREEN])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / f"x.{ending}", transparency=0)
    assert pixel(tmp_path / f"x.{ending}", 0, 0) == WHITE
    assert pixel(tmp_path / f"x.{ending}", 0, 1) == GREEN


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "x.gif") == RED


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_a_truncated_file_is_bad(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    noise().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImage, match=r"."):
        decode(path)


def test_an_empty_file_and_a_text_are_bad_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image at all\n" * 20)
    with pytest.raises(BadImage, match="the file is empty"):
        decode(tmp_path / "empty.png")
    with pytest.raises(BadImage, match="not a known image format"):
        decode(tmp_path / "text.jpg")


def test_a_file_that_has_gone_is_bad(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png")
    folder = ImageFolder(tmp_path)
    path.unlink()
    with pytest.raises(BadImage, match="No such file"):
        folder.image(0)


def test_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "x.png", size=(20, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert decode(tmp_path / "x.png").shape == (3, 10, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(BadImage, match="20 x 10 pixels, the limit is 199"),
    ):
        decode(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(BadImage, match="exceeds limit"):
        decode(tmp_path / "x.png")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.zeros((4, 4), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(BadImage, match="32-bit"):
        decode(tmp_path / "x.tif")
