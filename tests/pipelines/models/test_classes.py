"""Classes as users name them."""

import pytest

from pipelines.cli.errors import ConfigError, DataError
from pipelines.models.classes import check_label_names, class_index

NAMES = ("airplane", "cat", "7", "dog")


def test_a_class_is_its_name_or_else_its_index() -> None:
    assert [class_index("labels", text, NAMES) for text in ("cat", "0", "3", "7")] == [1, 0, 3, 2]


@pytest.mark.parametrize("text", ["bird", "4", "-1", "1.0", "", "²", "9" * 300])
def test_another_class_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        class_index("labels", text, NAMES)
    assert (
        str(refused.value) == f"labels = {text}: is no class of the model, which has 0..3; by name {', '.join(NAMES)}"
    )


def test_an_index_of_thousands_of_digits_is_refused_in_a_short_line() -> None:
    with pytest.raises(ConfigError, match=r"^labels = 9{300}: is no class of the model, which has 0\.\.3; by name"):
        class_index("labels", "9" * 5000, NAMES)


def test_a_model_without_labels_has_no_class() -> None:
    with pytest.raises(ConfigError, match="labels = 3: the model was trained without labels"):
        class_index("labels", "3", ())


def test_data_must_mean_the_same_by_their_labels() -> None:
    check_label_names("data", "d", NAMES, NAMES)
    check_label_names("data", "d", None, NAMES)
    with pytest.raises(DataError, match="data = d: calls class 1 'bird', the model 'cat'"):
        check_label_names("data", "d", ("airplane", "bird", "7", "dog"), NAMES)
    with pytest.raises(DataError, match="data = d: has 3 classes, the model 4"):
        check_label_names("data", "d", NAMES[:3], NAMES)
