import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gdn2_jax.data import train_iterator
from gdn2_jax.data.tokenizer import ByteTokenizer
from gdn2_jax.training import (
    PRESETS,
    CheckpointError,
    is_finished,
    load_trained,
    open_run,
    run_files,
)
from gdn2_jax.training.checkpoint import read_checkpoints, restore_checkpoint
from gdn2_jax.training.config_file import load_config, save_config
from gdn2_jax.training.run import _warn_of_loss
from gdn2_jax.training.step import abstract_state
from gdn2_jax.training.train import _open_batches


def replace(config, **changes):
    """Replaces fields, such as model__d_model=8."""
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            value = dataclasses.replace(getattr(config, part), **{field: value})
        config = dataclasses.replace(config, **{part: value})
    return config


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_config_survives_its_file(config, tmp_path):
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_the_configuration_of_a_run_of_version_0_1_is_read():
    assert load_config(Path(__file__).with_name("config_0_1.json")) == PRESETS["tiny"]


def test_other_configuration_is_refused_by_naming_the_fields(config, finished):
    before = contents(finished)
    other = replace(config, model__d_model=32, optimizer__beta2=0.99, global_batch_size=16)
    with pytest.raises(ValueError) as error:
        open_run(other, finished)
    for text in (
        "model.d_model is 16 there, 32 here",
        "optimizer.beta2 is 0.95 there, 0.99 here",
        "global_batch_size is 8 there, 16 here",
    ):
        assert text in str(error.value)
    assert contents(finished) == before


def test_what_changes_no_number_may_differ(config, finished):
    other = replace(config, steps=99, log_every=7, data__num_workers=1, model__remat="full")
    run = open_run(other, finished)
    assert int(run.state.step) == 8
    run.close()


def test_a_run_is_finished_by_its_summary_and_for_its_own_configuration(config, finished, copy):
    assert is_finished(config, finished)
    assert not is_finished(replace(config, steps=9), finished)
    assert not is_finished(replace(config, model__d_model=32), finished)
    run_files(copy).summary.unlink()
    assert not is_finished(config, copy)
    assert not is_finished(config, copy / "nowhere")


def test_other_text_is_refused(config, copy, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("a " * 1000)
    (tmp_path / "other/b.txt").write_text("b " * 1000)
    with pytest.raises(ValueError, match="data: .* was trained on another corpus"):
        open_run(replace(config, data__paths=(str(tmp_path / "other"),)), copy)


def test_tokenizer_must_fit_the_model(config, tmp_path):
    with pytest.raises(ValueError, match="model.vocab_size: .* tokenizer's 257, got 100"):
        open_run(replace(config, model__vocab_size=100), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_alters_text_is_told_once(config, caplog):
    class Lower(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.lower())

    _warn_of_loss(config, ByteTokenizer())
    assert not caplog.records
    _warn_of_loss(config, Lower())
    (record,) = caplog.records
    assert 'data.tokenizer: bytes alters text: "Ab  c\\tD' in record.getMessage()
    assert 'becomes "ab  c\\td' in record.getMessage()


def test_empty_corpus_is_refused_before_the_run_directory_exists(config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="the corpus is empty"):
        open_run(replace(config, data__paths=(str(tmp_path / "empty.txt"),)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_without_its_configuration_is_refused(config, copy):
    files = run_files(copy)
    files.config.write_text(files.config.read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"config\.json does not hold a configuration"):
        open_run(config, copy)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


# tensorstore may still report a failed read when its event loop is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_flipped_byte_anywhere_in_a_checkpoint_is_reported_or_harmless(config, copy):
    run = open_run(config, copy)
    abstract = abstract_state(config, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    files = [path for path in (run_files(copy).checkpoints / "8").rglob("*") if path.is_file()]
    files = [path for path in files if path.stat().st_size]
    arrays = max(files, key=lambda path: path.stat().st_size)
    places = [(path, path.stat().st_size // 2) for path in files]
    places += [(arrays, arrays.stat().st_size * tenth // 10) for tenth in range(10)]
    messages = {}
    for path, position in places:
        flip(path, position)
        try:
            state, progress = restore_checkpoint(run.checkpoints, 8, abstract)
        except CheckpointError as error:
            messages[path, position] = str(error)
        else:
            # Some files are not read.
            jax.tree.map(np.testing.assert_array_equal, state, run.state)
            assert progress == run.progress._asdict()
        flip(path, position)
    run.close()
    for message in messages.values():
        assert "checkpoints/8 is damaged" in message and "go on from step 4" in message
    assert {path for path, _ in messages} >= {arrays, *files[0].parent.glob("content/metadata")}
    # Damage that orbax does not notice.
    assert any("altered since it was saved: ['" in message for message in messages.values())


def test_a_checkpoint_of_version_0_1_with_its_random_numbers_is_read(config, copy, finished):
    run = open_run(config, finished)
    arrays = run.state._asdict()
    del arrays["borders"]
    directory = run_files(copy).checkpoints
    saved = {
        "params": ocp.args.StandardSave(arrays.pop("params")),
        "run": ocp.args.StandardSave({**arrays, "rng": jax.random.key(0)}),
        "content": ocp.args.JsonSave(json.loads((directory / "8/content/metadata").read_text())),
    }
    with contextlib.closing(ocp.CheckpointManager(directory)) as manager:
        manager.save(9, args=ocp.args.Composite(**saved))
    with contextlib.closing(open_run(config, copy)) as old:
        assert old.checkpoints.latest_step() == 9
        jax.tree.map(np.testing.assert_array_equal, old.state, run.state)
    run.close()


def test_altered_progress_is_reported(config, copy):
    content = run_files(copy).checkpoints / "8" / "content" / "metadata"
    text = content.read_text()
    assert '"position": 64' in text
    content.write_text(text.replace('"position": 64', '"position": 65'))
    with pytest.raises(CheckpointError, match=r"altered since it was saved: \['content'\]"):
        open_run(config, copy)


def test_parameters_alone_can_be_read(config, finished):
    trained = load_trained(finished)
    run = open_run(config, finished)
    jax.tree.map(np.testing.assert_array_equal, trained.params, run.state.params)
    assert trained.step == 8 and trained.config == config and trained.tokenizer.vocab_size == 257
    run.close()


def test_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        load_trained(tmp_path)


@pytest.mark.parametrize("readers", [[1, 0], [2, 3]])
def test_data_go_on_where_they_stopped_for_the_same_and_for_other_readers(
    config, finished, readers
):
    run = open_run(config, finished)
    run = run._replace(progress=run.progress._replace(readers=readers))
    batches, _ = _open_batches(run)
    stream = train_iterator(run.corpus.train, global_batch_size=config.global_batch_size)
    for _ in range(config.steps):
        next(stream)
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, next(batches), next(stream))
    batches.close(), stream.close(), run.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("accumulation", 3), ("checkpoints_kept", 0), ("seed", -1), ("seed", 2**32)],
)
def test_config_names_the_field_that_is_out_of_range(config, field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .* got {value}"):
        replace(config, **{field: value})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"steps": "30"}, "steps: expected an integer, got '30'"),
        ({"model": {"d_model": "16"}}, "d_model: expected an integer, got '16'"),
        ({"data": {"sequence_length": 8.0}}, "data.sequence_length: expected an integer, got 8.0"),
        ({"mesh": {"data": "all"}}, "mesh.data: expected an integer or None, got 'all'"),
        ({"data": []}, "'list' object has no attribute 'items'"),
        ({"optimizer": {"beta1": "0.9"}}, "optimizer.beta1: expected a number, got '0.9'"),
    ],
)
def test_a_wrong_type_in_a_runs_config_is_named(config, tmp_path, part, message):
    fields = dataclasses.asdict(config)
    for name, value in part.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=f"does not hold a configuration: {message}$"):
        load_config(tmp_path / "config.json")


def test_a_directory_that_orbax_could_not_write_is_refused_before(config, tmp_path):
    directory = tmp_path / b"run\xfc".decode(errors="surrogateescape")
    with pytest.raises(ValueError, match=r"^run_dir: expected a name in UTF-8, got '.*run\\udcfc'"):
        open_run(config, directory)
    assert not directory.exists()
    with pytest.raises(ValueError, match=r"^run_dir: expected a name in UTF-8"):
        read_checkpoints(directory / "checkpoints")


def test_a_run_does_not_lie_where_its_text_does(config, tmp_path):
    with pytest.raises(ValueError, match="^run_dir: expected a directory apart from the text's"):
        open_run(replace(config, data__paths=(str(tmp_path),)), tmp_path)


def test_a_prompt_that_the_last_sample_could_not_read_is_refused_before(config):
    with pytest.raises(ValueError, match=r"^sample_prompt: expected UTF-8 text, got '\\udcfc'$"):
        replace(config, sample_prompt=b"\xfc".decode(errors="surrogateescape"))
