import re

import pytest
import tyro

from gdn2_jax.data import DataConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("paths", "corpus.txt"),
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
    with pytest.raises(ValueError, match=f"^{field}"):
        DataConfig(**{field: value})


def test_every_field_can_be_set_on_the_command_line_and_is_explained():
    arguments = ["--paths", "a.txt", "b", "--tokenizer", "train:300", "--seed", "5"]
    arguments += ["--validation-fraction", "0", "--reset-at-documents"]
    config = tyro.cli(DataConfig, args=arguments)
    assert config.paths == ("a.txt", "b")
    assert config.trained_vocab_size == 300
    assert (config.validation_fraction, config.seed, config.reset_at_documents) == (0, 5, True)

    text = tyro.extras.get_parser(DataConfig).format_help()
    for phrase in ("searched recursively", "one document a file", "T + 1 tokens"):
        words = map(re.escape, phrase.split())
        assert re.search(r"[\s│]+".join(words), text), phrase
