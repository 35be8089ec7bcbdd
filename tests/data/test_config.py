import re

import pytest
import tyro

from gdn2_jax.data import DataConfig, path_options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("paths", "corpus.txt"),
        ("paths", ("a.txt", "")),
        ("validation_paths", "corpus.txt"),
        ("validation_paths", ("",)),
        ("text_field", ""),
        ("tokenizer", ""),
        ("tokenizer", "train:"),
        ("tokenizer", "train:256"),
        ("tokenizer", "train:-5"),
        ("tokenizer", "train:many"),
        ("end_of_document", "</s>"),
        ("sequence_length", 0),
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("validation_fraction", float("nan")),
        ("seed", -1),
        ("num_workers", -1),
        ("cache_directory", ""),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_the_field(field, value):
    with pytest.raises(
        ValueError, match=f"^data.{field}: expected .*, got {re.escape(repr(value))}$"
    ):
        DataConfig(**{field: value})


def test_every_field_can_be_set_on_the_command_line_and_is_explained():
    arguments = ["--paths", "a.txt", "b", "--tokenizer", "train:300", "--seed", "5"]
    arguments += ["--validation-fraction", "0", "--reset-at-documents"]
    config = tyro.cli(DataConfig, args=arguments)
    assert config.paths == ("a.txt", "b")
    assert config.trained_vocab_size == 300
    assert (config.validation_fraction, config.seed, config.reset_at_documents) == (0, 5, True)

    text = tyro.extras.get_parser(DataConfig).format_help()
    for phrase in ("recursively", "one document a file", "T + 1 tokens"):
        words = map(re.escape, phrase.split())
        assert re.search(r"[\s│]+".join(words), text), phrase


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--data", "a", "b", "--steps", "5"], ["--steps", "5", "--data.paths", "a", "b"]),
        (["--data=a"], ["--data.paths", "a"]),
        (["--data", "a", "--x=1", "--data", "b", "c"], ["--x=1", "--data.paths", "a", "b", "c"]),
        (["--data=a", "--data.paths=b"], ["--data.paths", "a", "b"]),
        (
            ["--data.validation-paths", "v", "--data", "a", "--data.validation_paths=w"],
            ["--data.validation-paths", "v", "w", "--data.paths", "a"],
        ),
        (["--steps", "5"], ["--steps", "5"]),
    ],
)
def test_each_option_for_paths_stands_once_with_all_of_them(given, expected):
    assert path_options(given) == expected


@pytest.mark.parametrize("options", [["--data"], ["--data", "--steps", "5"]])
def test_an_option_for_paths_without_one_is_an_error(options):
    with pytest.raises(ValueError, match="--data.paths: expected files or directories, got none"):
        path_options(options)


def test_backslashes_in_the_separator_stand_for_line_ends():
    assert DataConfig(document_separator=r"\n\n").separator == "\n\n"
    assert DataConfig(document_separator="\n").separator == "\n"
    assert DataConfig(document_separator=r"\t<|\\n|>\r").separator == "\t<|\\n|>\r"
