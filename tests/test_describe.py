"""Every setting is documented, and the command shows what the classes declare."""

from __future__ import annotations

import pytest

from dseqjepa.commands import COMMANDS
from dseqjepa.config import Config, Section
from dseqjepa.describe import describe_settings
from dseqjepa.errors import InputError
from dseqjepa.settings import sections_of
from dseqjepa.tasks.config import TASKS


def sections(model: type[Section]) -> set[type[Section]]:
    inner = {each for key in model.model_fields for each in sections_of(model, key)}
    return {model}.union(*(sections(each) for each in inner))  # type: ignore[arg-type]


ALL = sorted(
    set().union(*(sections(model) for model in (Config, *TASKS.values(), *COMMANDS.values()))),
    key=lambda model: model.__name__,
)


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.__name__)
def test_every_setting_and_section_says_what_it_means(model: type[Section]) -> None:
    assert "__doc__" in vars(model)
    assert (model.__doc__ or "").strip()
    for key, field in model.model_fields.items():
        is_tag = key == "name" and field.annotation is not str and field.default is not None
        assert field.description or sections_of(model, key) or is_tag, key


def test_a_section_shows_type_range_default_and_meaning() -> None:
    text = "\n".join(describe_settings("method.regions"))
    assert text.startswith("method.regions: How images are cut into regions.")
    assert "  kind  components | clusters | bands, default components\n" in text
    assert "  min_area  number >= 0.0 and <= 1.0, default 0.15\n      Minimum share" in text
    assert "seed" not in text
    knn = "\n".join(describe_settings("knn"))
    assert "  k  whole number >= 1 and <= 1000000000, default 20\n      Number of neigh" in knn
    assert "  ks  [whole number >= 1 and <= 1000000000, ...], default [5, 10," in knn


def test_a_single_setting_is_explained_with_or_without_its_section() -> None:
    lines = list(describe_settings("optim.minutes"))
    assert lines[0].startswith("  optim.minutes  none | number > 0")
    assert list(describe_settings("minutes")) == lines
    named = [line for line in describe_settings("workers") if not line.startswith("      ")]
    assert len(named) > 3
    assert all(line.split()[0].endswith(".workers") for line in named)
    assert len({line.split()[0] for line in named}) == len(named)


def test_all_sections_are_shown_once_and_the_methods_keys_by_method() -> None:
    lines = list(describe_settings())
    heads = [line.partition(":")[0] for line in lines if line and not line.startswith(" ")]
    assert len(heads) == len(set(heads))
    assert {"data", "method name=dseq", "optim", "knn", "linear.sweep", "embed", "export"} <= {
        *heads
    }
    assert max(len(line) for line in lines if line.startswith(6 * " ")) <= 100
    method = list(describe_settings("method"))
    assert sum(line.startswith("  prediction_weight ") for line in method) == 1, "said once"


def test_an_unknown_section_names_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"no section or setting 'optimm'; did you mean 'optim'\?"):
        list(describe_settings("optimm"))
