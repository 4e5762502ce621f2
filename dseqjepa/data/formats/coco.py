"""COCO 2017: photographs with boxes and masks of their objects.

Suffixes: N images, A annotations, K annotations of one image, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from PIL import Image
from torch import Tensor

from dseqjepa.data.decode import Frame, Size
from dseqjepa.data.formats.files import ListedFiles, check_there, inner
from dseqjepa.data.formats.jsonscan import Element, scan, taken
from dseqjepa.data.patience import patiently
from dseqjepa.data.source import Instances, Objects, Split
from dseqjepa.errors import InputError

PIXELS = Image.MAX_IMAGE_PIXELS or 2**27
"""Maximum number of pixels of an image; a larger one would not be decoded."""
MOST_GROUPS = 7
"""Maximum number of five-bit groups in a compressed run length: 2^34 pixels."""


class Coco(ListedFiles):
    """COCO 2017 (Lin et al., 2014): `annotations/instances_{train,val}2017.json` and the folders
    `train2017` and `val2017`, or any data set in this format.

    Images are ordered by id, and so are the categories' labels (1 to 80). Pre-training uses all
    118,287 training images. "train" are those with a non-crowd object,
    "val" all 5,000. There are no `labels`; `instances` returns the objects of an image.

    Boxes are COCO's own, even if empty. Only the file positions of the masks are kept in memory;
    masks are read and rasterized on demand. They have been validated before, so no
    library sees a mask that does not fit its image.

    Images have the orientation of their annotations: as stored, unless only the upright image has
    the height and width given in the file.

    Raises:
        InputError: a file is missing, damaged or inconsistent.
    """

    located_by: ClassVar[Literal["masks"]] = "masks"
    origin: ClassVar[str] = "cocodataset.org has it (2017 train and val images, annotations)"

    def __init__(self, path: Path, split: Split) -> None:
        root = inner(path, "coco", "annotations")
        part = "val2017" if split == "val" else "train2017"
        file = root / "annotations" / f"instances_{part}.json"
        self.annotations = file
        read = _Columns(file)
        for element in scan(file, "images", "annotations", "categories"):
            read.add(element)
        self.category_ids = tuple(sorted(read.categories))
        self.categories = tuple(read.categories[id] for id in self.category_ids)

        id_N = np.array(sorted(read.images), dtype=np.int64)
        place_A = _places(np.array(read.image, np.int64), id_N, file, "image")
        label_A = 1 + _places(
            np.array(read.category, np.int64), np.array(self.category_ids), file, "category"
        )
        crowd_A = np.array(read.crowd, dtype=bool)
        box_A4 = np.array(read.box, dtype=np.float64).reshape(-1, 4)
        size_A2 = np.array(read.rle_size, dtype=np.int64).reshape(-1, 2)
        size_N2 = np.array([read.images[id][1:] for id in id_N.tolist()], dtype=np.int64)
        own_A2 = size_N2.reshape(-1, 2)[place_A]
        wrong_A = (size_A2[:, 0] >= 0) & (size_A2 != own_A2).any(1)
        side_A1 = own_A2.max(1, initial=0, keepdims=True)
        corner_A4 = box_A4 + np.pad(box_A4[:, :2], ((0, 0), (2, 0)))
        extent_A2 = np.array(read.extent, dtype=np.float64).reshape(-1, 2)
        for end in (corner_A4, extent_A2):
            wrong_A |= ((end < -side_A1) | (end > 2 * side_A1)).any(1)
        if wrong_A.any():
            first = int(np.flatnonzero(wrong_A)[0])
            raise InputError(
                f"{file}: annotation {read.ids[first]} has a box or a mask that does not fit "
                f"image {read.image[first]} of {own_A2[first, 0]} x {own_A2[first, 1]} pixels"
            )

        kept_N = np.arange(len(id_N))
        if split == "train":
            kept_N = np.unique(place_A[~crowd_A])
        # Annotations by image, each image's in the file's order.
        order_A = place_A.argsort(kind="stable")
        self._first_N = np.searchsorted(place_A[order_A], kept_N, "left")
        self._last_N = np.searchsorted(place_A[order_A], kept_N, "right")
        self._id_N, self._size_N2 = id_N[kept_N], size_N2[kept_N]
        self._label_A, self._crowd_A = label_A[order_A], crowd_A[order_A]
        self._box_A4 = box_A4[order_A]
        self._area_A = np.array(read.area, dtype=np.float64)[order_A]
        self._number_A = np.array(read.ids, dtype=np.int64)[order_A]
        self._span_A2 = np.array(read.span, dtype=np.int64).reshape(-1, 2)[order_A]

        paths = [read.images[id][0] for id in self._id_N.tolist()]
        check_there(root / part, paths, file)
        super().__init__(root / part, paths)

    def frame(self, index: int) -> Frame:
        height, width = map(int, self._size_N2[index])
        return lambda: (height, width)

    def instances(self, index: int) -> Instances:
        """The objects of an image; their masks need the extra `detection`."""
        index = range(len(self))[index]
        height, width = map(int, self._size_N2[index])
        its = self._annotations_of(index)
        outlines = [
            annotation["segmentation"] for annotation in patiently(lambda: self._again(its))
        ]
        box_K4 = self._box_A4[its].copy()
        box_K4[:, 2:] += box_K4[:, :2]
        return Instances(
            boxes_K4=torch.from_numpy(box_K4).float(),
            label_K=self.labels_of(index),
            masks_KHW=_draw(outlines, height, width),
            crowd_K=torch.from_numpy(self._crowd_A[its].copy()),
            area_K=torch.from_numpy(self._area_A[its]).float(),
            image_id=int(self._id_N[index]),
        )

    def labels_of(self, index: int) -> Int64[Tensor, " K"]:
        return torch.from_numpy(self._label_A[self._annotations_of(index)].copy())

    def _annotations_of(self, index: int) -> slice:
        index = range(len(self))[index]
        return slice(int(self._first_N[index]), int(self._last_N[index]))

    def objects(self, index: int) -> Objects:
        """Masks of all non-crowd objects; pixels covered only by a crowd are unknown."""
        found = self.instances(index)
        masks_KHW = found.masks_KHW[~found.crowd_K]
        crowd_HW = found.masks_KHW[found.crowd_K].any(0)
        return Objects(masks_KHW, ~crowd_HW | masks_KHW.any(0))

    def _again(self, its: slice) -> list[dict[str, Any]]:
        """Re-read annotations."""
        found = []
        with open(self.annotations, "rb") as file:
            for number, (start, end) in zip(self._number_A[its], self._span_A2[its], strict=True):
                file.seek(int(start))
                try:
                    annotation = json.loads(file.read(int(end - start)))
                except (ValueError, RecursionError):
                    annotation = None
                if not isinstance(annotation, dict) or annotation.get("id") != number:
                    raise InputError(f"{self.annotations} has changed since it was opened")
                found.append(annotation)
        return found

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        for column in (self._id_N, self._label_A, self._crowd_A, self._box_A4, self._area_A):
            digest.update(column.tobytes())
        return digest.hexdigest()


class _Columns:
    """The annotations kept in memory: plain arrays, not a million objects."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.images: dict[int, tuple[str, int, int]] = {}
        self.categories: dict[int, str] = {}
        self.ids, self.image, self.category = array("q"), array("q"), array("q")
        self.crowd, self.area, self.box = array("b"), array("d"), array("d")
        self.span, self.rle_size, self.extent = array("q"), array("q"), array("d")

    def add(self, element: Element) -> None:
        if element.member == "images":
            id, name, height, width = taken(
                self.file, element, id=int, file_name=str, height=int, width=int
            )
            if id in self.images:
                raise InputError(f"{self.file}: duplicate image {id}")
            if min(height, width) < 1 or height * width > PIXELS:
                raise InputError(
                    f"{self.file}: image {id} is of {height} x {width} pixels, "
                    f"expected 1 to {PIXELS} in total"
                )
            self.images[id] = name, height, width
        elif element.member == "categories":
            id, name = taken(self.file, element, id=int, name=str)
            self.categories[id] = name
        else:
            id, image, category, box, area = taken(
                self.file,
                element,
                id=int,
                image_id=int,
                category_id=int,
                bbox=list,
                area=int | float,
            )
            try:
                x, y, width, height = _numbers([*box, area])[:-1]
                size, extent = _checked(element.value.get("segmentation"))
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{self.file}: annotation {id} is damaged ({error}); expected a bbox of four "
                    f"numbers, and polygons or run lengths as its segmentation"
                ) from error
            self.ids.append(id)
            self.image.append(image)
            self.category.append(category)
            self.crowd.append(bool(element.value.get("iscrowd")))
            self.area.append(area)
            self.box.extend((x, y, width, height))
            self.rle_size.extend(size)
            self.extent.extend(extent)
            self.span.extend((element.start, element.end))


def _checked(outline: Any) -> tuple[Size, tuple[float, float]]:
    """The extent of a mask: height and width of run lengths, -1 for polygons; the smallest and
    largest coordinate of polygons, 0 for run lengths.

    `ValueError` if it is neither, or damaged.
    """
    if isinstance(outline, dict):
        size, counts = outline.get("size"), outline.get("counts")
        if not (isinstance(size, list) and [type(side) for side in size] == [int, int]):
            raise ValueError("run lengths without a size of two numbers")
        if isinstance(counts, str):
            counts = run_lengths(counts)
        if not (isinstance(counts, list) and {type(count) for count in counts} <= {int}):
            raise ValueError("run lengths that are not whole numbers")
        height, width = size
        if min(counts, default=0) < 0 or sum(counts) != height * width or min(size) < 1:
            raise ValueError(f"{sum(counts)} pixels in its run lengths of {height} x {width}")
        return (height, width), (0.0, 0.0)
    if not isinstance(outline, list) or not outline:
        raise ValueError("no segmentation")
    low = high = 0.0
    for polygon in outline:
        if not isinstance(polygon, list) or len(polygon) % 2:
            raise ValueError("a polygon that is not a list of points")
        points = _numbers(polygon)
        low, high = min(low, *points, 0.0), max(high, *points, 0.0)
    return (-1, -1), (low, high)


def _numbers(values: list[Any]) -> list[float]:
    """The values, all finite numbers; `ValueError` for anything else, such as text."""
    if {type(value) for value in values} <= {int, float}:
        with suppress(OverflowError):  # a whole number may have any size
            if math.isfinite(math.fsum(values)):
                return values
    raise ValueError("values that are not finite numbers")


def run_lengths(text: str) -> list[int]:
    """Decode COCO's compressed run lengths; `ValueError` if truncated.

    A number is written in groups of five bits, lowest first, as characters from `0` on; bit 32
    means that another group follows, and the highest bit of the last is the sign. From the fourth
    number on, the difference from the one two before is stored (maskApi.c of cocoapi, rleToString).
    """
    groups_G = np.frombuffer(text.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    is_last_G = (groups_G & 32) == 0
    end_C = np.flatnonzero(is_last_G)
    if ((groups_G < 0) | (groups_G > 63)).any() or not is_last_G[-1:].all():
        raise ValueError("compressed run lengths that are damaged")
    if not len(end_C):
        return []
    start_C = np.concatenate([[0], end_C[:-1] + 1])
    size_C = end_C - start_C + 1
    if size_C.max() > MOST_GROUPS:
        raise ValueError("a run length of more pixels than an image has")
    place_G = np.arange(len(groups_G)) - np.repeat(start_C, size_C)
    counts_C = np.add.reduceat((groups_G & 31) << (5 * place_G), start_C)
    counts_C -= np.where(groups_G[end_C] & 16, 1 << (5 * size_C), 0)
    counts_C[1::2] = counts_C[1::2].cumsum()
    counts_C[2::2] = counts_C[2::2].cumsum()
    return list(map(int, counts_C))


def _places(id_A: np.ndarray, known_N: np.ndarray, file: Path, what: str) -> np.ndarray:
    """The index of each id among the sorted known ones."""
    place_A = np.searchsorted(known_N, id_A)
    found_A = np.append(known_N, 0)[place_A] == id_A if len(known_N) else np.zeros(len(id_A), bool)
    found_A &= place_A < len(known_N)
    if not found_A.all():
        stray = id_A[np.flatnonzero(~found_A)[0]]
        raise InputError(f"{file}: an annotation is of {what} {stray}, which is not listed")
    return place_A


def mask_tools() -> ModuleType:
    """COCO's mask library (`encode`, `decode`, ...); `InputError` if none is installed."""
    try:
        from pycocotools import mask  # decodes masks faster than the other
    except ImportError:
        try:
            from faster_coco_eval import mask
        except ImportError:
            raise InputError(
                "COCO's masks need faster-coco-eval or pycocotools: "
                "pip install 'dseqjepa[detection]'"
            ) from None
    return mask


def _draw(outlines: list[Any], height: int, width: int) -> Bool[Tensor, "K H W"]:
    """Polygons, or run lengths in either encoding, as pixels."""
    mask_of = mask_tools()
    codes = []
    for outline in outlines:
        if isinstance(outline, list):
            # Two points have no area; the libraries would interpret them as a box.
            areas = [polygon for polygon in outline if len(polygon) >= 6] or [[0] * 6]
            codes.append(mask_of.merge(mask_of.frPyObjects(areas, height, width)))
        elif isinstance(outline["counts"], list):
            codes.append(mask_of.frPyObjects(outline, height, width))
        else:
            codes.append(outline)
    if not codes:
        return torch.zeros((0, height, width), dtype=torch.bool)
    # They come column by column, an object after the other.
    masks_KWH = torch.from_numpy(mask_of.decode(codes).T)
    return masks_KWH.permute(0, 2, 1).contiguous().bool()
